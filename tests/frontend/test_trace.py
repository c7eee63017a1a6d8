"""What a traced program keeps of the model: its numbers, names, calling convention and sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from irprune.errors import TraceError
from irprune.frontend.export import trace
from irprune.ir.program import Program

torch.set_num_threads(1)


def targets(program: Program) -> list[str]:
    return [str(node.target) for node in program.nodes if node.op not in ("placeholder", "get_attr", "output")]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def test_program_computes_what_the_model_computes_at_another_batch_size() -> None:
    model = Mlp()
    program = trace(model, (torch.randn(3, 4),))
    x = torch.randn(5, 4)
    assert torch.equal(program(x), model(x))
    assert targets(program) == ["aten.linear.default", "aten.relu.default", "aten.linear.default"]
    assert program.interface.inputs == ("x",)
    assert program.interface.outputs == ("output0",)
    assert program.interface.dynamic == ({0: "batch"},)
    assert program.interface.notes == ()


def test_weights_are_shared_under_the_models_own_names_and_trainable() -> None:
    model = Mlp()
    program = trace(model, (torch.randn(3, 4),))
    assert list(program.tensors) == ["up.weight", "up.bias", "down.weight", "down.bias"]
    assert program.tensors["up.weight"] is model.up.weight
    program(torch.randn(2, 4)).sum().backward()
    assert model.up.weight.grad is not None


class Settings(nn.Module):
    """Dropout and batch norm, which behave differently in training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.drop(self.norm(x)))


def test_trace_is_in_evaluation_mode_and_restores_each_parts_mode() -> None:
    model = Settings()
    program = trace(model, (torch.randn(3, 4),))
    assert [part.training for part in (model, model.norm, model.drop, model.frozen)] == [True, True, True, False]
    assert targets(program) == ["aten.batch_norm.default"]
    x = torch.randn(6, 4)
    assert torch.equal(program(x), model.eval()(x))
    assert model.norm.num_batches_tracked == 0


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: dict[str, Tensor] | None = None, scale: float = 1.0, *, z: Tensor) -> dict[str, Any]:
        assert y is not None
        return {"sum": self.fc(x) + y["k"] * scale, "rest": (z - x, x)}


def test_keyword_inputs_and_named_outputs() -> None:
    model = Keywords()
    x, k, z = torch.randn(3, 3, 4)
    program = trace(model, (x,), {"z": z, "scale": 2.0, "y": {"k": k}})
    assert program.interface.inputs == ("x", "y_k", "scale", "z")
    assert program.interface.outputs == ("sum", "rest.0", "rest.1")
    assert program.interface.dynamic == ({0: "batch"}, {0: "batch"}, {}, {0: "batch"})
    expected = model(x, {"k": k}, 2.0, z=z)
    for found in (
        program(x, y={"k": k}, scale=2.0, z=z),
        program(x, z=z, scale=2.0, y={"k": k}),
        program(x, {"k": k}, 2.0, z=z),
        program.clone()(x=x, z=z, scale=2.0, y={"k": k}),
    ):
        assert set(found) == {"sum", "rest"}
        assert torch.equal(found["sum"], expected["sum"])
        assert torch.equal(found["rest"][0], z - x)


def test_wanted_outputs_alone_stay() -> None:
    model = Keywords()
    x, k, z = torch.randn(3, 3, 4)
    one = trace(model, (x,), {"y": {"k": k}, "z": z}, outputs=["rest.0"])
    assert torch.equal(one(x, y={"k": k}, z=z), z - x)
    assert one.interface.outputs == ("rest.0",)
    assert targets(one) == ["aten.sub.Tensor"]
    two = trace(model, (x,), {"y": {"k": k}, "z": z}, outputs=["rest.1", "sum"])
    assert torch.equal(two(x, y={"k": k}, z=z)[0], x)


@dataclasses.dataclass
class Pair:
    left: Tensor
    right: Tensor


class Dataclasses(nn.Module):
    def forward(self, pair: Pair) -> Pair:
        return Pair(pair.right * 2, pair.left)


def test_dataclasses_go_in_and_out() -> None:
    a, b = torch.randn(2, 3, 4)
    program = trace(Dataclasses(), (Pair(a, b),))
    found = program(Pair(a, b))
    assert isinstance(found, Pair)
    assert torch.equal(found.left, b * 2)
    assert torch.equal(found.right, a)
    assert program.interface.inputs == ("pair_left", "pair_right")
    assert program.interface.outputs == ("left", "right")


class Variadic(nn.Module):
    def forward(self, *terms: Tensor, **more: Tensor) -> list[Any]:
        return [terms[0] - terms[1], more["last"], None, 3]


def test_one_tensor_given_as_several_inputs_stays_several_inputs() -> None:
    x = torch.randn(3, 4)
    program = trace(Variadic(), (x, x), {"last": x})
    a, b, c = torch.randn(3, 5, 4)
    found = program(a, b, last=c)
    assert torch.equal(found[0], a - b)
    assert torch.equal(found[1], c)
    assert found[2:] == [None, 3]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def test_tied_weights_are_one_tensor_with_an_alias() -> None:
    model = Tied()
    program = trace(model, (torch.randint(7, (2, 3)),))
    assert program.aliases == {"head.weight": "embed.weight"}
    assert [(node.op, node.name) for node in program.nodes][:2] == [("placeholder", "ids"), ("get_attr", "embed_weight")]
    assert [node.target for node in program.nodes if node.op == "get_attr"] == ["embed.weight"]
    ids = torch.randint(7, (4, 3))
    assert torch.equal(program(ids), model(ids))


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("kept", torch.arange(4.0))
        self.register_buffer("derived", torch.full((4,), -torch.inf), persistent=False)
        self.plain = torch.arange(4.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.kept + torch.exp(self.derived) + self.plain + torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_buffers_and_constants() -> None:
    model = Buffers()
    program = trace(model, (torch.randn(2, 4),))
    assert list(program.tensors)[:5] == ["fc.weight", "fc.bias", "kept", "derived", "plain"]
    assert program.tensors["kept"] is model.kept
    assert not program.is_parameter("kept")
    x = torch.randn(3, 4)
    assert torch.equal(program(x), model(x))


class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            a, b = (x * 2).chunk(2, dim=1)
            with torch.autocast("cpu", enabled=False):
                c = torch.cat([b, a], dim=1)
        return self.fc(c), a


def test_gradient_mode_and_disabled_autocast_are_inlined() -> None:
    model = Regions()
    program = trace(model, (torch.randn(2, 4),))
    assert "wrap" not in program.module.code
    assert all(node.op != "call_module" for node in program.nodes)
    x = torch.randn(3, 4)
    for found, want in zip(program(x), model(x), strict=True):
        assert torch.equal(found, want)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x[:, :, 0:4].to(torch.float32)[:]
        z = y.clone()
        z[:, 1:].mul_(2)
        torch.stack([y, y])
        return z[:, :2].to(torch.float64)


def test_what_changes_nothing_is_dropped_and_in_place_work_stays() -> None:
    program = trace(Noise(), (torch.randn(2, 3, 4),))
    assert targets(program) == [
        "aten.clone.default",
        "aten.slice.Tensor",
        "aten.mul_.Tensor",
        "aten.slice.Tensor",
        "aten.to.dtype",
    ]
    x = torch.randn(5, 3, 4)
    assert torch.equal(program(x), Noise()(x))


class WritesItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1) * 2


def test_example_inputs_are_left_as_they_were() -> None:
    x = torch.zeros(2, 3)
    program = trace(WritesItsInput(), (x,))
    assert not x.any()
    assert not vars(x)
    assert not program.interface.example[0][0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_types(dtype: torch.dtype) -> None:
    model = Mlp().to(dtype)
    program = trace(model, (torch.randn(2, 4, dtype=dtype),))
    x = torch.randn(3, 4, dtype=dtype)
    assert program(x).dtype == dtype
    assert torch.equal(program(x), model(x))


@pytest.mark.parametrize("given", ["meta", "cpu", "fake"])
def test_model_on_the_meta_device(given: str) -> None:
    with FakeTensorMode() if given == "fake" else torch.device(given):
        x = torch.randn(2, 4)
    program = trace(Mlp().to("meta"), (x,))
    assert program.tensors["up.weight"].is_meta
    assert program.interface.dynamic == ({0: "batch"},)
    assert program(*program.interface.example[0]).shape == (2, 4)


def test_model_of_fake_tensors() -> None:
    with FakeTensorMode():
        program = trace(Mlp(), (torch.randn(2, 4),))
    assert targets(program) == ["aten.linear.default", "aten.relu.default", "aten.linear.default"]


# -- dynamic axes ---------------------------------------------------------------------------------


class Two(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.flatten(1), b.sum(1)


def sizes(program: Program) -> list[list[str]]:
    return [[str(size) for size in node.meta["val"].shape] for node in program.nodes if node.op == "placeholder"]


def test_equal_labels_are_one_size_even_where_the_model_does_not_compare_them() -> None:
    program = trace(Two(), (torch.randn(2, 5, 4), torch.randn(2, 5)), dynamic={"a": {0: "batch", 1: "seq"}, "b": {0: "batch", 1: "seq"}})
    (a_batch, a_seq, width), (b_batch, b_seq) = sizes(program)
    assert (a_batch, a_seq) == (b_batch, b_seq)
    assert a_batch != a_seq
    assert width == "4"
    assert program.interface.dynamic == ({0: "batch", 1: "seq"}, {0: "batch", 1: "seq"})
    assert program(torch.randn(3, 6, 4), torch.randn(3, 6))[0].shape == (3, 24)


def test_different_labels_of_one_example_size_are_different_sizes() -> None:
    program = trace(Two(), (torch.randn(2, 5, 4), torch.randn(2, 5)), dynamic={"a": {0: "batch", 1: "m"}, "b": {0: "batch", 1: "n"}})
    (_, m, _), (_, n) = sizes(program)
    assert m != n


def test_inputs_of_another_first_size_are_static_by_default() -> None:
    program = trace(Two(), (torch.randn(2, 5, 4), torch.randn(7, 5)))
    assert program.interface.dynamic == ({0: "batch"}, {})


def test_an_input_can_be_static() -> None:
    program = trace(Mlp(), (torch.randn(1, 4),), dynamic={"x": {}})
    assert program.interface.dynamic == ({},)
    assert sizes(program) == [["1", "4"]]


def test_axes_of_tensors_in_containers_are_named_by_path_or_by_parameter() -> None:
    x, k, z = torch.randn(3, 3, 4)
    model = Keywords()
    by_path = trace(model, (x,), {"y": {"k": k}, "z": z}, dynamic={"y.k": {0: "batch"}, "x": {0: "batch"}, "z": {0: "batch"}})
    by_parameter = trace(model, (x,), {"y": {"k": k}, "z": z}, dynamic={"y": {-2: "batch"}})
    assert by_path.interface.dynamic == by_parameter.interface.dynamic == ({0: "batch"},) * 3


class Adds(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


def test_labels_that_the_model_makes_equal_become_one_with_a_note() -> None:
    program = trace(Adds(), (torch.randn(3, 4), torch.randn(3, 4)), dynamic={"a": {0: "rows"}, "b": {0: "lines"}})
    assert program.interface.dynamic == ({0: "rows"}, {0: "rows"})
    assert program.interface.notes == ("axis 0 ('lines') of input 'b' always has the size of 'rows' in this model",)


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(3, 1)


def line_of(model: type[nn.Module], offset: int = 1) -> str:
    code = model.forward.__code__
    return f"{code.co_filename}:{code.co_firstlineno + offset}"


def test_default_axis_that_the_model_makes_constant_is_a_note_with_the_line() -> None:
    program = trace(Constant(), (torch.randn(3, 4),))
    assert program.interface.dynamic == ({},)
    assert program.interface.notes == (
        f"axis 0 ('batch') of input 'x' is not dynamic: the model works for size 3 only ({line_of(Constant)})",
    )


def test_asked_axis_that_the_model_makes_constant_is_an_error_with_the_line() -> None:
    with pytest.raises(TraceError) as caught:
        trace(Constant(), (torch.randn(3, 4),), dynamic={"x": {0: "rows"}})
    assert str(caught.value) == (
        f"[trace] at {line_of(Constant)}: axis 0 ('rows') of input 'x' is not dynamic: the model works for size 3 only\n"
        "  to go on: take sizes from the input's shape there, or leave the axis out of dynamic_axes()"
    )


class CausalEncoder(nn.Module):
    """A causal mask and a padding mask, as users write them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.encoder(x, mask=mask, src_key_padding_mask=padding)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_transformer_layers_with_masks_are_traced_operation_by_operation(frozen: bool) -> None:
    """Without gradients torch would take its fast path, one opaque operation, and put zeros in padded places."""
    model = CausalEncoder().eval().requires_grad_(not frozen)
    x, padding = torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]])
    program = trace(model, (x, padding))
    assert targets(program).count("aten.scaled_dot_product_attention.default") == 1
    with torch.enable_grad():
        torch.testing.assert_close(program(x, padding), model(x.requires_grad_(), padding), rtol=1e-5, atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


def test_enabled_autocast_becomes_casts() -> None:
    class Mixed(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                h = self.up(x)
            return self.down(h.float())

    model = Mixed()
    program = trace(model, (torch.randn(3, 4),))
    x = torch.randn(5, 4)
    assert torch.equal(program(x), model(x))
    assert [name for name in targets(program) if "copy" not in name] == ["aten.linear.default"] * 2
    assert sum("copy" in name for name in targets(program)) == 4, "the input, the weight and the bias down, the result up"


def test_mapped_functions_become_operations_on_batches() -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(3, 6, 4))
            self.down = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.vmap(lambda weight: torch.relu(x @ weight.T))(self.weights)
            return self.down(hidden.mean(0))

    model = Ensemble()
    program = trace(model, (torch.randn(3, 4),))
    x = torch.randn(5, 4)
    assert torch.equal(program(x), model(x))
    assert targets(program)[1:] == ["aten.matmul.default", "aten.relu.default", "aten.mean.dim", "aten.linear.default"]


def test_records_that_no_output_depends_on_are_left_out() -> None:
    class Counts(Mlp):
        """A counter, statistics of the hidden layer, and a running mean that is subtracted."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))
            self.register_buffer("largest", torch.zeros(6))
            self.register_buffer("shift", torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            self.calls += 1
            self.largest.copy_(h.detach().abs().amax(0))
            h += self.shift
            return self.down(h)

    model = Counts()
    program = trace(model, (torch.randn(3, 4),))
    calls = model.calls.clone()
    x = torch.randn(5, 4)
    found = program(x)
    assert torch.equal(model.calls, calls), "the program counts nothing"
    assert torch.equal(found, model(x))
    assert targets(program) == ["aten.linear.default", "aten.add_.Tensor", "aten.linear.default"]
