"""Which multiples of sizes an execution provider runs at full speed.

Kernels work in blocks: a size that is no multiple of the block is padded, or takes a slower way. So a network with
fewer channels can be slower than the whole one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from irprune.backend.runtime import Provider, opened
from irprune.backend.timing import sampled


class Multiples(NamedTuple):
    """The smallest numbers whose multiples are fast.

    Attributes:
        convolution: For channels of a convolution.
        product: For axes of a matrix product, and everything else.
    """

    convolution: int
    product: int


# Provider and instruction set to multiples, as ``prune{round_to=measure}`` finds them, though never below eight: a
# convolution of the CPU provider works in blocks as wide as a vector register; tensor cores want eight.
STORED = {("cuda", ""): Multiples(8, 8), ("cpu", "AVX512"): Multiples(16, 8), ("cpu", ""): Multiples(8, 8)}

CANDIDATES = (1, 2, 4, 8, 16, 32)
_WIDTH = 256
# A multiple is good if a width that is one takes no longer per multiply-accumulate than this, the full width being 1.
_ALLOWED = 1.05


def stored(provider: Provider = "auto") -> Multiples:
    """The multiples of the provider that onnxruntime would take, from a table."""
    import onnxruntime

    if provider != "cpu" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return STORED["cuda", ""]
    return STORED.get(("cpu", torch.backends.cpu.get_cpu_capability()), STORED["cpu", ""])


def measured(provider: Provider = "auto") -> Multiples:
    """The same, from the time that a 3 x 3 convolution and a matrix product take on one thread."""
    return Multiples(*(best(_times(make, provider)) for make in (_convolution, _product)))


def best(found: Mapping[int, float]) -> int:
    """The smallest multiple that is at full speed, and all larger ones with it.

    Args:
        found: Multiple to time per multiply-accumulate, over that of a width that suits any provider.
    """
    good = CANDIDATES[-1]
    for multiple in reversed(CANDIDATES):
        if found[multiple] > _ALLOWED:
            break
        good = multiple
    return good


def _times(make: Callable[[int, Path, Provider], Callable[[], object]], provider: Provider) -> dict[int, float]:
    """Time per multiply-accumulate of widths that are multiples of a number and of no larger power of two."""
    widths = [_WIDTH - multiple for multiple in CANDIDATES] + [_WIDTH]
    with tempfile.TemporaryDirectory(prefix="irprune-") as folder:
        calls = [make(width, Path(folder) / f"{width}.onnx", provider) for width in widths]
        # On one thread processor time is what counts, and the least of it what the kernel takes undisturbed.
        samples = sampled(*calls, rounds=15, seconds=10, sample_ms=3, clock=time.process_time)
    each = [min(taken) / width**2 for taken, width in zip(samples, widths, strict=True)]
    return {multiple: time / each[-1] for multiple, time in zip(CANDIDATES, each, strict=False)}


def _convolution(width: int, path: Path, provider: Provider) -> Callable[[], object]:
    return _call("Conv", (width, width, 3, 3), (1, width, 14, 14), path, provider, pads=[1, 1, 1, 1])


def _product(width: int, path: Path, provider: Provider) -> Callable[[], object]:
    return _call("MatMul", (width, width), (64, width), path, provider)


def _call(
    operation: str, weight: tuple[int, ...], given: tuple[int, ...], path: Path, provider: Provider, **attributes: Any
) -> Callable[[], object]:
    """Two of an operation in a row in onnxruntime, so that their inner layout may be the provider's own."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array((random.standard_normal(weight) / weight[-1]).astype(np.float32), f"w{number}") for number in range(2)
    ]
    nodes = [
        helper.make_node(operation, [source, f"w{n}"], [target], **attributes)
        for n, (source, target) in enumerate((("x", "h"), ("h", "y")))
    ]
    bounds = [helper.make_tensor_value_info(name, TensorProto.FLOAT, given) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "multiples", bounds[:1], bounds[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    session, _ = opened(path, threads=1, provider=provider)
    feeds = {"x": random.standard_normal(given).astype(np.float32)}
    return lambda: session.run(None, feeds)
