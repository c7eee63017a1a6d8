"""Run an ONNX file like the program that it came from, compare the two, and time them."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils import _pytree as pytree

from irprune.backend.onnx import Call, Signature
from irprune.backend.proof import Double
from irprune.backend.timing import Latency, sampled
from irprune.errors import DataError, ExportError, IrpruneError, ParityError, wording
from irprune.ir.program import Interface, Program
from irprune.pipeline.progress import track

if TYPE_CHECKING:
    from irprune.backend.cache import Cached

Provider = Literal["auto", "cpu", "cuda"]

# Largest error that counts as equal, relative to the largest magnitude of an output: some hundred
# roundings, as two libraries sum in different order; a wrong weight shows at a thousand times this.
RELATIVE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# What onnxruntime may err more than torch itself does by rounding, where that is more than the relative tolerance.
ROUNDINGS = 4

# An output below this magnitude is judged as if it had it: what cancels out is rounding noise.
_SMALLEST_SCALE = 1e-2


def opened(path: Path, *, threads: int = 0, provider: Provider = "auto", profile: str | None = None) -> tuple[Any, str]:
    """An ONNX file in onnxruntime, and the device that it runs on.

    Args:
        path: The model file; external data is found beside it.
        threads: Threads within one operation; 0 leaves the choice to onnxruntime.
        provider: Where it runs; ``auto`` takes CUDA where onnxruntime offers it.
        profile: Prefix of the file that onnxruntime's profiler writes.

    Raises:
        ExportError: onnxruntime cannot load the file, or does not have the provider.
        DataError: It is no ONNX file.
    """
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if provider == "cuda" and "CUDAExecutionProvider" not in available:
        raise ExportError("onnxruntime has no CUDA provider here", hint="install onnxruntime-gpu, or give provider=cpu")
    device = "cuda" if provider != "cpu" and "CUDAExecutionProvider" in available else "cpu"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    # A pool that spins after its run takes the cores from whatever is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"] if device == "cuda" else ["CPUExecutionProvider"]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers), device
    except Exception as error:  # the binding's own exceptions share no narrower base
        raise _unloadable(path, error) from error


class Session:
    """An ONNX file in onnxruntime, called as its program is.

    Args:
        path: The model file; external data is found beside it.
        program: The program that the file was exported from: its call structure is taken over.
        threads: Threads within one operation; 0 leaves the choice to onnxruntime.
        provider: Where it runs; ``auto`` takes CUDA where onnxruntime offers it.

    Raises:
        ExportError: onnxruntime cannot load the file, for one because it has no kernel for an
            operation in this dtype.
    """

    def __init__(self, path: Path, program: Program, *, threads: int = 0, provider: Provider = "auto") -> None:
        self.path = path
        self._cache: Cached | None = None
        self._called_as(program)
        self._session, self.device = opened(path, threads=threads, provider=provider)
        self._results = [value.name for value in self._session.get_outputs()]
        self._elements = {value.name: value.type for value in self._session.get_inputs()}

    def _called_as(self, program: Program) -> None:
        self.signature = Signature.of(program)
        parameters = self.signature.parameters
        self._binder = inspect.Signature([inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in parameters])
        self._positional = len(self.signature.income.child(0).children())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs in the model's own structure, tensors on the device of the first input.

        Raises:
            DataError: The arguments do not fit the model: structure, dtype or a fixed size.
        """
        feeds = self._feeds(args, kwargs)
        feeds.update(self._empty(feeds))
        home = next(iter(feeds.values())).device if feeds else torch.device("cpu")
        binding, run = self._bind(feeds)
        run()
        values = binding.get_outputs_as_ortvaluevector()
        tensors = (_tensor(value).to(home) for value in itertools.islice(values, len(self.signature.outputs)))
        leaves = [
            result.value if result.name is None else next(tensors).item() if result.scalar else next(tensors)
            for result in self.signature.results
        ]
        return pytree.tree_unflatten(leaves, self.signature.outcome)

    def whole(self, program: Program, cache: Cached) -> Session:
        """A file with a cache as a session that is called as the program without one is: every token is new."""
        out = copy.copy(self)
        out._called_as(program)
        out._cache = cache
        return out

    def _empty(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A cache without positions."""
        if self._cache is None:
            return {}
        interface = self._cache.program.interface
        leaves = dict(zip(interface.inputs, zip(pytree.tree_leaves(interface.example), interface.dynamic, strict=True), strict=True))
        sizes = {label: tensor.shape[axis] for name, tensor in feeds.items() for axis, label in leaves[name][1].items()}
        out = {}
        for state in self._cache.states:
            value, labels = leaves[state.past]
            shape = [0 if axis == state.axis else sizes.get(labels.get(axis, ""), size) for axis, size in enumerate(value.shape)]
            out[state.past] = value.new_zeros(shape)
        return out

    def feeds(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """The file's inputs by name for a call."""
        return self._feeds(args, kwargs)

    def runner(self, *args: Any, **kwargs: Any) -> Callable[[], None]:
        """A function without arguments that only runs the model on these ones, for timing."""
        return self._bind(self._feeds(args, kwargs))[1]

    def _bind(self, feeds: Mapping[str, torch.Tensor]) -> tuple[Any, Callable[[], None]]:
        binding = self._session.io_binding()
        held = {name: tensor.detach().to(self.device).contiguous() for name, tensor in feeds.items()}
        for name, tensor in held.items():
            binding.bind_input(name, self.device, 0, _element(tensor), tuple(tensor.shape), tensor.data_ptr())
        for name in self._results:
            binding.bind_output(name, self.device)

        def run() -> None:
            try:
                self._session.run_with_iobinding(binding)
            except Exception as error:
                shapes = ", ".join(f"{name} {_ONNX_NAME[tensor.dtype]}{list(tensor.shape)}" for name, tensor in held.items())
                raise DataError(
                    f"onnxruntime cannot run the model on {shapes}: {wording(error)}",
                    where=str(self.path),
                    hint="give the example's sizes on all axes that are not dynamic",
                ) from error

        return binding, run

    def _feeds(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        expected = f"the model takes ({', '.join(self.signature.parameters)}) as in example_inputs()"
        try:
            bound = self._binder.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise DataError(f"arguments do not fit: {error}; {expected}", hint="call predict as the model is called") from error
        values = list(bound.items())
        ordered = (tuple(value for _, value in values[: self._positional]), dict(values[self._positional :]))
        leaves, structure = pytree.tree_flatten(ordered)
        if structure != self.signature.income:
            raise DataError(f"arguments do not have the example's structure; {expected}", hint="call predict as the model is called")
        feeds = {}
        for argument, leaf in zip(self.signature.arguments, leaves, strict=True):
            name = argument.name
            if argument.fixed:
                if isinstance(leaf, torch.Tensor) or leaf != argument.value:
                    raise DataError(
                        f"argument '{name}' is {argument.value!r} in the traced model", hint="give that, or trace with another value"
                    )
                continue
            if not isinstance(leaf, torch.Tensor):
                raise DataError(f"input '{name}' is a {type(leaf).__name__}, not a tensor; {expected}", hint="give a torch tensor")
            if (given := f"tensor({_ONNX_NAME.get(leaf.dtype, leaf.dtype)})") != self._elements[name]:
                raise DataError(f"input '{name}' is a {given}, the model takes a {self._elements[name]}", hint="convert it with .to()")
            feeds[name] = leaf
        return feeds


_ONNX_NAME = {
    torch.float64: "double",
    torch.float32: "float",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool",
}


def _element(tensor: torch.Tensor) -> int:
    from onnx import TensorProto

    name = _ONNX_NAME[tensor.dtype].upper()
    return int(TensorProto.DataType.Value(name))


def _tensor(value: Any) -> torch.Tensor:
    """A result of onnxruntime, its memory shared; its older versions hand out booleans as bytes."""
    tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(value)
    return tensor.bool() if value.data_type() == "tensor(bool)" else tensor


def _unloadable(path: Path, error: Exception) -> IrpruneError:
    if "INVALID_PROTOBUF" in str(error):
        return DataError("this is no ONNX file, or a part of one", where=str(path), hint="name the ONNX file of a run")
    hint = "give the model in float32 (model.float()), or validate where onnxruntime has a CUDA provider"
    if "NOT_IMPLEMENTED" not in str(error) and "Could not find an implementation" not in str(error):
        hint = "export again with another opset, or with optimize=false"
    return ExportError(f"onnxruntime cannot load the file: {wording(error)}", where=str(path), hint=hint)


# -- inputs -----------------------------------------------------------------------------------------


def fresh_inputs(interface: Interface, sizes: Mapping[str, int] | None = None, *, seed: int = 0) -> Call:
    """Random ``(args, kwargs)`` like the example.

    Integers are drawn between zero and the example's largest (indices stay valid; where the example
    has negative ones, from its own values), numbers from a normal distribution with the example's mean
    and deviation within its range. What is a mask in the example (zeros and ones) is all ones; numbers of
    which some are infinite, as of a mask that is added, are the example's own, so that no row is masked whole
    that was not.

    Args:
        interface: Of the program.
        sizes: Label of a dynamic axis to its size; the example's size where it is missing.
        seed: Seed of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    leaves, spec = pytree.tree_flatten(interface.example)
    fresh = []
    for leaf, labels in zip(leaves, interface.dynamic, strict=True):
        if isinstance(leaf, torch.Tensor):
            shape = [(sizes or {}).get(labels.get(axis, ""), size) for axis, size in enumerate(leaf.shape)]
            leaf = _draw(leaf, shape, generator)
        fresh.append(leaf)
    args, kwargs = pytree.tree_unflatten(fresh, spec)
    return args, kwargs


def _draw(example: torch.Tensor, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    values = example.detach().cpu().flatten()
    if values.numel() == 0:
        return example.new_zeros(shape)
    wide = values.to(torch.float64) if values.is_floating_point() else values.to(torch.int64)
    low, high = wide.min(), wide.max()
    if bool(((wide == 0) | (wide == 1)).all()) and high == 1:
        return torch.ones(shape, dtype=example.dtype, device=example.device)
    if not values.is_floating_point() and low >= 0:
        drawn = torch.randint(0, int(high) + 1, shape, generator=generator)
    elif not bool(wide.isfinite().all()):
        drawn = wide.reshape(example.shape)
        for axis, size in enumerate(shape):
            drawn = drawn.index_select(axis, torch.arange(size) % drawn.shape[axis])
    elif not values.is_floating_point():
        drawn = wide[torch.randint(0, len(wide), shape, generator=generator)]
    else:
        deviation = wide.std(correction=0)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * (deviation if deviation > 0 else 1) + wide.mean()
        if deviation > 0:
            drawn = drawn.clamp(low, high)
    return drawn.to(example.dtype).to(example.device)


def dynamic_sizes(interface: Interface) -> dict[str, int]:
    """Label of each dynamic axis to its size in the example."""
    leaves = pytree.tree_leaves(interface.example)
    return {label: leaf.shape[axis] for leaf, labels in zip(leaves, interface.dynamic, strict=True) for axis, label in labels.items()}


# -- parity -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parity:
    """That a file computes what its program computes.

    Attributes:
        max_abs_err: The largest absolute difference, at the output and sizes where it came closest to
            what is allowed.
        tolerance: What was allowed there.
        sizes: The sizes of the dynamic axes that were compared.
    """

    max_abs_err: float
    tolerance: float
    sizes: tuple[dict[str, int], ...]


def parity(
    program: Program,
    session: Session,
    *,
    batch: Sequence[int] = (),
    relative_tolerance: float | None = None,
    seed: int = 0,
    inputs: Callable[[Mapping[str, int]], Call] | None = None,
) -> Parity:
    """Compare onnxruntime with torch on fresh random inputs, every output, at several sizes.

    Each dynamic axis is tried at the example's size and at another one (one more, twice, or one less:
    the first that the program itself can do), the axis ``batch`` also at one.

    Args:
        program: The reference.
        session: The file.
        batch: Sizes of the axis ``batch`` instead of these.
        relative_tolerance: Allowed error over the largest magnitude of an output; by default
            :data:`RELATIVE_TOLERANCE` of the program's coarsest dtype, or :data:`ROUNDINGS` times what torch's own
            result is off from the same computed in float64, where that is more (a deep network whose large values
            cancel out). Integers and booleans must be equal.
        seed: Seed of the inputs.
        inputs: Draws the inputs of given sizes, in place of :func:`fresh_inputs`.

    Raises:
        ParityError: Shapes, dtypes or values differ, or onnxruntime cannot run a size that torch can.
        DataError: The program itself cannot run on such inputs.
    """
    relative = relative_tolerance or RELATIVE_TOLERANCE[precision(program)]
    closest = (-1.0, 0.0, 0.0)
    draw = inputs or functools.partial(fresh_inputs, program.interface, seed=seed)
    cases = _cases(program, batch, draw)
    for sizes, expected in track(cases, "parity"):
        args, kwargs = draw(sizes)
        try:
            found = session(*args, **kwargs)
        except DataError as error:
            raise ParityError(f"torch can, but {error.message}", where=_sizes(sizes), hint=_HINT) from error
        leaves = (pytree.tree_leaves(outputs) for outputs in (expected, found))
        rounding = functools.partial(_rounding, program, (args, kwargs)) if relative_tolerance is None else None
        for number, (result, want, got) in enumerate(zip(session.signature.results, *leaves, strict=True)):
            if result.name is not None:
                where = f"output {result.name}" + (f", {_sizes(sizes)}" if sizes else "")
                own = functools.partial(rounding, number, want) if rounding is not None else None
                closest = max(closest, _compare(torch.as_tensor(want), torch.as_tensor(got), relative, where, own))
    return Parity(closest[1], closest[2], tuple(sizes for sizes, _ in cases))


def error_of(program: Program, session: Session, *, seed: int = 0) -> float:
    """The error of a file on fresh inputs over its output, both root mean square, of the worst output; nothing is required of it."""
    args, kwargs = fresh_inputs(program.interface, seed=seed)
    with torch.no_grad():
        leaves = (pytree.tree_leaves(outputs) for outputs in (program(*args, **kwargs), session(*args, **kwargs)))
    worst = 0.0
    for want, got in zip(*leaves, strict=True):
        if isinstance(want, torch.Tensor) and want.is_floating_point() and want.numel():
            error, size = ((value.double().square().mean().sqrt()) for value in (want - got, want))
            worst = max(worst, float(error / size.clamp_min(_SMALLEST_SCALE)))
    return worst


_HINT = "do not use this file; export again, with optimize=false or another opset if it was written by this very program"


def _cases(program: Program, batch: Sequence[int], draw: Callable[[Mapping[str, int]], Call]) -> list[tuple[dict[str, int], Any]]:
    """Sizes of the dynamic axes and what the program answers to fresh inputs of them."""
    interface = program.interface
    example = dynamic_sizes(interface)

    def attempt(sizes: dict[str, int]) -> tuple[dict[str, int], Any]:
        args, kwargs = draw(sizes)
        with torch.no_grad():
            return sizes, program(*args, **kwargs)

    def first(options: Iterable[dict[str, int]]) -> tuple[dict[str, int], Any]:
        failure: Exception | None = None
        for sizes in options:
            try:
                return attempt(sizes)
            except Exception as error:  # whatever the model raises where a size does not suit it
                failure = failure or error
        raise DataError(
            f"the program cannot run on random inputs like its example: {wording(failure or RuntimeError('no size'))}",
            where=_sizes(sizes),
            hint="give example inputs that are typical, or declare the axis static in dynamic_axes()",
        ) from failure

    def others(sizes: Mapping[str, int]) -> Iterable[dict[str, int]]:
        fixed = {"batch": sizes["batch"]} if batch and "batch" in sizes else {}
        for change in (lambda size: size + 1, lambda size: 2 * size, lambda size: max(size - 1, 1)):
            yield {**{label: change(size) for label, size in sizes.items()}, **fixed}

    if not example:
        return [first([example])]
    if batch and "batch" in example:
        starts = [{**example, "batch": size} for size in batch]
        return [first([start]) if number % 2 == 0 else first(others(start)) for number, start in enumerate(starts)]
    cases = [first([example]), first(others(example))]
    if example.get("batch", 1) > 1:
        cases.append(first([{**example, "batch": 1}]))
    return cases


def _rounding(program: Program, inputs: Call, number: int, want: torch.Tensor) -> float:
    """How far an output is off from the same computed in float64; 0 where the program cannot be computed so."""
    flat = [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in pytree.tree_leaves(inputs)]
    try:
        with torch.no_grad():
            exact = pytree.tree_leaves(Double(program).run(*flat, enable_io_processing=False))[number]
    except (RuntimeError, TypeError, ValueError):  # an operation that does not take float64, or a constant that stays float32
        return 0.0
    error = (exact.detach() - want.detach().double()).abs()
    return float(error[error.isfinite()].max()) if bool(error.isfinite().any()) else 0.0


def _compare(
    want: torch.Tensor, got: torch.Tensor, relative: float, where: str, rounding: Callable[[], float] | None = None
) -> tuple[float, float, float]:
    """The error over its tolerance, the error and the tolerance; raises where it is larger.

    ``rounding`` is asked how exact ``want`` is itself, where the relative tolerance is not enough.
    """
    if want.shape != got.shape or want.dtype != got.dtype:
        raise ParityError(
            f"onnxruntime gives {_ONNX_NAME[got.dtype]}{list(got.shape)}, torch {_ONNX_NAME[want.dtype]}{list(want.shape)}",
            where=where,
            hint=_HINT,
        )
    if want.numel() == 0:
        return 0.0, 0.0, 0.0
    exact = not want.is_floating_point()
    a, b = want.detach().double(), got.detach().double()
    finite = a.isfinite()
    if not bool(finite.any()):
        raise ParityError("torch gives no finite value on random inputs, so nothing can be compared", where=where, hint=_HINT_FINITE)
    if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        raise ParityError("onnxruntime gives NaN or infinity elsewhere than torch", where=where, hint=_HINT)
    error = float((a[finite] - b[finite]).abs().max())
    tolerance = 0.0 if exact else relative * max(float(a[finite].abs().max()), _SMALLEST_SCALE)
    if error > tolerance and not exact and rounding is not None:
        tolerance = max(tolerance, ROUNDINGS * rounding())
    if error > tolerance:
        raise ParityError(f"onnxruntime differs from torch by {error:.3g}, allowed is {tolerance:.3g}", where=where, hint=_HINT)
    return error / tolerance if tolerance else 0.0, error, tolerance


_HINT_FINITE = "give example inputs with typical values: random ones are drawn alike"


def precision(program: Program) -> torch.dtype:
    """The coarsest floating dtype of weights, inputs and results."""
    tensors = [*program.tensors.values(), *pytree.tree_leaves(program.interface.example)]
    values = (node.meta.get("val") for node in program.nodes)
    dtypes = {tensor.dtype for tensor in (*tensors, *values) if isinstance(tensor, torch.Tensor)}
    return max(dtypes & RELATIVE_TOLERANCE.keys(), key=RELATIVE_TOLERANCE.__getitem__, default=torch.float32)


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{label} = {size}" for label, size in sizes.items())


# -- latency ----------------------------------------------------------------------------------------


def latency(*calls: Callable[[], Any], **options: Any) -> tuple[Latency, ...]:
    """One :class:`Latency` per function, timed side by side; options as :func:`irprune.backend.timing.sampled` takes them."""
    return tuple(Latency.of(samples) for samples in sampled(*calls, **options))


_MEMORY = """
import resource, sys
import numpy, onnxruntime
path, inputs, threads, provider = sys.argv[1:]
def held():
    try:
        return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before = peak(), held()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(threads)
options.log_severity_level = 4
session = onnxruntime.InferenceSession(path, options, providers=[provider])
results = session.run(None, dict(numpy.load(inputs)))
print(max(peak() - before[0], held() - before[1]))
"""


def peak_memory(session: Session, args: Sequence[Any], kwargs: Mapping[str, Any], *, threads: int = 0) -> int | None:
    """Bytes that loading a file and one call add to a process of its own; ``None`` where that cannot be told.

    Peak or resident, whichever grew more: the libraries' own start hides the peak of a small model.
    """
    feeds = session.feeds(*args, **kwargs)
    if session.device != "cpu" or any(tensor.dtype == torch.bfloat16 for tensor in feeds.values()):
        return None
    with tempfile.TemporaryDirectory(prefix="irprune-") as folder:
        inputs = Path(folder) / "inputs.npz"
        arrays: dict[str, Any] = {name: tensor.detach().cpu().numpy() for name, tensor in feeds.items()}
        np.savez(inputs, **arrays)
        command = [sys.executable, "-c", _MEMORY, str(session.path), str(inputs), str(threads), "CPUExecutionProvider"]
        done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else None


def runner(program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[], None]:
    """A function without arguments that runs a program without gradients and waits for its device."""
    wait = torch.cuda.synchronize if any(tensor.is_cuda for tensor in program.tensors.values()) else None

    def run() -> None:
        with torch.inference_mode():
            program(*args, **kwargs)
            if wait is not None:
                wait()

    return run


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Run torch with this many threads; 0 leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
