"""Complex numbers as two real tensors: the program without them computes what the one with them does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from irprune.analysis.groups import discover
from irprune.backend.onnx import export
from irprune.backend.onnx_ops import hypot
from irprune.backend.real_pairs import in_real_pairs
from irprune.backend.rewrite import remove
from irprune.backend.runtime import Session
from irprune.errors import ExportError
from irprune.frontend.export import trace
from irprune.ir.program import Program
from irprune.rules.infer import typed

ROWS, WIDTH = 6, 8


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(len(shape)))


class Between(nn.Module):
    """Something complex between two linear layers."""

    def __init__(self, inner: Callable[..., Tensor], *weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(weight) for weight in weights])
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.inner(self.first(x), *self.weights))
        return out


def pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def flat(z: Tensor) -> Tensor:
    return torch.view_as_real(z).flatten(-2)


def written(z: Tensor, x: Tensor) -> Tensor:
    """What a Fourier layer does with the frequencies that it keeps, and a view that sees it."""
    out = torch.zeros(x.shape[0], ROWS, WIDTH // 2, dtype=torch.complex64)
    seen = out[:, :, 1:]
    out[:, :2, :3] = z[:, :2, :3]
    out[:, -2:, :3] = z[:, -2:, :3]
    return flat(out) + seen.real.sum((1, 2))[:, None, None]


HALF = WIDTH // 2
WRITTEN_OUT: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "rotary": (lambda x, w: flat(pairs(x) * torch.polar(torch.ones(ROWS, HALF), w.abs())), (drawn(ROWS, HALF),)),
    "product": (lambda x, w: flat(pairs(x) @ w), (drawn(HALF, HALF),)),
    "einsum": (lambda x, w: flat(torch.einsum("bsc,cd->bsd", pairs(x), w)), (drawn(HALF, HALF),)),
    "linear": (lambda x, w, b: flat(F.linear(pairs(x), w, b)), (drawn(HALF, HALF), drawn(HALF))),
    "convolution": (lambda x, w: flat(F.conv1d(pairs(x).mT, w, padding=1).mT), (drawn(HALF, HALF, 3),)),
    "made of two": (lambda x: flat(torch.complex(x[..., :HALF], x[..., HALF:])), ()),
    "real to complex": (lambda x, w: (x.to(torch.complex64) @ w).real, (drawn(WIDTH, WIDTH),)),
    "double precision and back": (lambda x: flat(pairs(x).to(torch.complex128).conj().to(torch.complex64)), ()),
    "complex number": (lambda x: torch.exp(0.5j * x).real + (x * (2 + 1j)).imag, ()),
    "several results": (lambda x: torch.stack([one.abs() for one in pairs(x).unbind(-1)] * 2, -1), ()),
    "parts, angle, conjugate": (lambda x: torch.cat([pairs(x).conj().angle(), pairs(x).conj().imag], -1), ()),
    "moved": (lambda x: flat(torch.cat([pairs(x).roll(1, 1)[..., :1], pairs(x).flip(-1)[..., 1:]], -1)), ()),
    "chosen rows": (lambda x, w: flat(pairs(x) * w[torch.arange(ROWS)]), (drawn(10, HALF),)),
    "sums": (lambda x: x + pairs(x).mean(1, keepdim=True).abs().sum(-1, keepdim=True), ()),
    "powers": (lambda x: flat(pairs(x) ** 2 / (1 + pairs(x).abs())), ()),
    "written in place": (lambda x, w: written(pairs(x) @ w, x), (drawn(HALF, HALF),)),
    "state space": (lambda x, a: x * torch.exp(a * torch.arange(ROWS)[:, None]).sum(-1).real[:, None], (drawn(5) * 0.1,)),
}
TRANSFORMS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "of both axes": (lambda x: torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real, ()),
    "filter": (lambda x, w: torch.fft.irfft(torch.fft.rfft(x, dim=1) * w, n=ROWS, dim=1), (drawn(HALF, WIDTH),)),
    "filter in two": (lambda x, w: torch.fft.irfft2(torch.fft.rfft2(x) * w, s=(ROWS, WIDTH)), (drawn(ROWS, HALF + 1),)),
    "of complex": (lambda x: flat(torch.fft.ifft2(torch.fft.fftshift(torch.fft.fft(pairs(x)), dim=1))), ()),
}


def complex_values(program: Program) -> list[str]:
    return [node.name for node in program.nodes if isinstance(value := node.meta.get("val"), Tensor) and value.is_complex()]


def traced(inner: Callable[..., Tensor], weights: tuple[Tensor, ...]) -> tuple[Program, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, ROWS, WIDTH)
    return trace(Between(inner, *weights).eval(), (x,), dynamic={"x": {0: "batch"}}), x


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_nothing_complex_is_left(name: str) -> None:
    program, x = traced(*WRITTEN_OUT[name])
    assert complex_values(program)
    want = program(x)
    new = in_real_pairs(program)
    assert complex_values(new) == []
    assert not any(tensor.is_complex() for tensor in new.tensors.values())
    assert torch.allclose(new(x), want, atol=1e-5)
    assert torch.allclose(new(more := torch.cat([x, -x])), program(more), atol=1e-5)
    assert torch.equal(program(x), want)


@pytest.mark.parametrize("name", ["rotary", "convolution", "powers", "written in place", *TRANSFORMS])
def test_the_file_computes_what_the_program_does(name: str, tmp_path: Path) -> None:
    program, x = traced(*{**WRITTEN_OUT, **TRANSFORMS}[name])
    session = Session(export(program, tmp_path / "model.onnx").path, program)
    for given in (x, torch.cat([x, -x])):
        assert torch.allclose(session(given), program(given), atol=1e-5)


class Rotated(nn.Module):
    """Positions as complex numbers, made from angles on the way: the inner axis is prunable by pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.register_buffer("rates", torch.logspace(0, -1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[1]).float(), self.rates)
        turns = torch.polar(torch.ones_like(angles), angles)
        return flat(pairs(self.q(x)) * turns) @ flat(pairs(self.k(x)) * turns).mT


def test_a_pruned_program_whose_values_share_their_descriptions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = typed(trace(Rotated().eval(), (x := torch.randn(2, ROWS, WIDTH),)))
    (group,) = discover(program).prunable
    smaller = remove(program, {group.var: np.arange(group.size) < 5})
    values = {node.name: node.meta["val"] for node in smaller.nodes}
    assert values["ones_like"] is values["outer"], "what this test is about"
    session = Session(export(smaller, tmp_path / "model.onnx").path, smaller)
    assert torch.allclose(session(x), smaller(x), atol=1e-5)


def test_dynamic_axes_pass_transforms_of_transforms(tmp_path: Path) -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.norm = nn.Embedding(9, WIDTH), nn.LayerNorm(WIDTH)

        def forward(self, ids: Tensor) -> Tensor:
            h = self.norm(self.words(ids))
            for _ in range(2):
                h = self.norm(h + torch.fft.fftn(h, dim=(1, 2)).real)
            return h

    torch.manual_seed(0)
    ids = torch.arange(12).view(2, 6) % 9
    program = trace(Mixer().eval(), (ids,), dynamic={"ids": {0: "batch", 1: "sequence"}})
    session = Session(export(program, tmp_path / "model.onnx").path, program)
    for given in (ids, ids.view(3, 4)):
        assert torch.allclose(session(given), program(given), atol=1e-5)


def test_a_program_without_complex_numbers_is_the_one_that_it_was() -> None:
    program, _ = traced(lambda x: x.relu(), ())
    assert in_real_pairs(program) is program


def test_tensors_that_have_the_name_of_a_half() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", drawn(HALF))
            self.register_buffer("w_real", torch.full((WIDTH,), 3.0))

        def forward(self, x: Tensor) -> Tensor:
            return flat(pairs(x) * self.w) + self.w_real

    x = torch.randn(3, ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    program = trace(Named(), (x,))
    new = in_real_pairs(program)
    assert set(new.tensors) == {"w_real", "w_real_", "w_imag"}
    assert torch.allclose(new(x), program(x), atol=1e-6)


@pytest.mark.parametrize("what", ["input", "output"])
def test_complex_inputs_and_outputs_are_refused(what: str, tmp_path: Path) -> None:
    class Open(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs() if what == "input" else x * 1j

    x = torch.randn(3, 4, dtype=torch.complex64 if what == "input" else torch.float32)
    with pytest.raises(ExportError, match=f"a complex {what} has no place in an ONNX file"):
        export(trace(Open(), (x,)), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_complex_tensor_computed_in_place_is_refused() -> None:
    """What else looks at the tensor would not see it."""
    program, _ = traced(lambda x: flat(pairs(x).clone().mul_(2j)), ())
    with pytest.raises(ExportError, match=r"test_real_pairs.py:\d+\): operation .aten::mul_. writes complex numbers in place"):
        in_real_pairs(program)


def test_hypot_of_numbers_whose_squares_leave_the_range() -> None:
    from onnxscript import evaluator

    with evaluator.default_as(evaluator.default()):
        sides = np.array([3e30, 0, -5], np.float32), np.array([4e30, 0, 12], np.float32)
        found = hypot(*sides)
    assert np.allclose(np.asarray(found.value if hasattr(found, "value") else found), [5e30, 0, 13])
