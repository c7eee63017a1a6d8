"""Groups: kinds, roles, exactness, reasons, keys, and their text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import toys
from nets import Net, net, tensor, text
from torch import Tensor, nn
from torch.nn import functional as F

from irprune.analysis.groups import discover, summary
from irprune.ir.facts import Group, Groups
from irprune.ir.program import Program
from irprune.ir.text import dump
from irprune.rules.infer import typed

Golden = Callable[[str, str], None]
X = torch.linspace(-1, 1, 8).reshape(2, 4)
SEQUENCE = torch.linspace(-1, 1, 120).sin().reshape(2, 5, 12)


def roles(group: Group) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for member in group.members:
        out.setdefault(member.role, []).append(str(member))
    return out


def only(program: Program) -> Group:
    (group,) = discover(program).prunable
    return group


# -- text ------------------------------------------------------------------------------------------

PROGRAMS: dict[str, Callable[[], Program]] = {
    "mlp": lambda: toys.program(toys.Mlp(), X),
    "residual": lambda: toys.program(toys.Residual(), X),
    "concat_two": lambda: toys.program(toys.ConcatTwo(), X),
    "grouped_conv": lambda: toys.program(toys.GroupedConv(), torch.linspace(-1, 1, 96).reshape(2, 3, 4, 4)),
    "normed_residual": lambda: toys.program(toys.NormedResidual(), X),
    "attention": lambda: toys.program(toys.Attention(), SEQUENCE, dynamic={"x": {0: "batch", 1: "length"}}),
    "squeeze_excite": lambda: net(squeeze_excite, tensor(2, 3, 6, 6)),
    "unknown_op": lambda: net(unknown, tensor(3, 4)),
}


def squeeze_excite(n: Net, x: Tensor) -> Tensor:
    h = n.layer(lambda: nn.BatchNorm2d(8))(n.conv(x, 8, bias=False))
    return n.conv(h * torch.sigmoid(n.conv(F.relu(n.conv(h.mean((2, 3), keepdim=True), 4)), 8)), 2)


def unknown(n: Net, x: Tensor) -> Tensor:
    return n.linear(F.relu(n.linear(torch.linalg.qr(n.linear(x, 5)).Q, 8)), 3)


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_and_groups_as_text(name: str, golden: Golden) -> None:
    program = PROGRAMS[name]()
    golden(f"{name}.ir", dump(program, discover(program)))


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_text_does_not_depend_on_the_run(name: str) -> None:
    first, second = PROGRAMS[name](), PROGRAMS[name]()
    assert dump(first, discover(first)) == dump(second, discover(second))


# -- kinds -----------------------------------------------------------------------------------------


def gelu_by_tanh(x: Tensor) -> Tensor:
    """Written out, it adds a value and a function of it: not a skip connection."""
    return 0.5 * x * (1.0 + torch.tanh(0.79788 * (x + 0.044715 * x.pow(3))))


def response_norm(x: Tensor) -> Tensor:
    """Global response normalisation (ConvNeXt V2): a value plus a multiple of it that a norm decides."""
    g = x.norm(dim=1, keepdim=True)
    return x + 0.5 * x * (g / g.mean(-1, keepdim=True))


@pytest.mark.parametrize(
    ("kinds", "fn", "shape"),
    [
        ("ffn:8", lambda n, x: n.linear(F.relu(n.linear(x, 8)), 3), (3, 4)),
        ("ffn:8", lambda n, x: n.linear(F.silu(n.linear(x, 8)) * n.linear(x, 8), 3), (3, 4)),
        ("conv:8", lambda n, x: n.conv(F.relu(n.conv(x, 8, 3)), 3), (2, 3, 6, 6)),
        ("conv:8", lambda n, x: n.linear(n.conv(x, 8, 3).mean((2, 3)), 3), (2, 3, 6, 6)),
        ("conv:8", lambda n, x: n.conv(n.conv(n.conv(x, 8), 8, 3, groups=8), 3), (2, 3, 6, 6)),
        ("norm_groups:2 conv:4~", lambda n, x: n.conv(F.group_norm(n.conv(x, 8), 2), 3), (2, 3, 6, 6)),
        ("residual:6 ffn:8", lambda n, x: (lambda h: n.linear(h + n.linear(n.linear(h, 8).relu(), 6), 3))(n.linear(x, 6)), (3, 4)),
        ("other:8", lambda n, x: n.linear(x, 8).sum(-1), (3, 4)),
        ("ffn:8", lambda n, x: n.linear(gelu_by_tanh(n.linear(x, 8)), 3), (3, 4)),
        ("ffn:8~", lambda n, x: n.linear(response_norm(n.linear(x, 8)), 3), (3, 5, 4)),
        ("conv:6", lambda n, x: n.conv((lambda h: h + n.parameter(6, 1, 1) * h)(n.conv(x, 6)), 3), (2, 3, 6, 6)),
        ("residual:6", lambda n, x: n.conv((lambda h: h + n.conv(h, 6, 3, padding=1, groups=6))(n.conv(x, 6)), 3), (2, 3, 6, 6)),
    ],
)
def test_kinds_come_from_structure(kinds: str, fn: Callable[..., Any], shape: tuple[int, ...]) -> None:
    assert text(discover(net(fn, tensor(*shape)))) == kinds


def test_heads_queries_and_their_dimensions_are_told_apart() -> None:
    groups = discover(PROGRAMS["attention"]())
    assert text(groups) == "head_dim:4 heads:2 query_heads:2 head_dim:8"
    assert summary(groups) == {"head_dim": 2, "heads": 1, "query_heads": 1}


def test_names_say_the_kind_and_count_in_execution_order() -> None:
    groups = discover(toys.program(toys.Residual(), X))
    assert [group.name for group in groups] == ["fixed0", "residual0", "ffn0", "fixed1"]
    assert groups["ffn0"].size == 8


# -- roles -----------------------------------------------------------------------------------------


def test_rows_are_written_and_columns_are_read() -> None:
    assert roles(only(toys.program(toys.Mlp(), X))) == {"write": ["fc1.bias:0", "fc1.weight:0"], "read": ["fc2.weight:1"]}


def test_what_is_applied_index_by_index_is_carried() -> None:
    def fn(n: Net, x: Tensor) -> Tensor:
        return n.conv(n.layer(lambda: nn.BatchNorm2d(8))(n.conv(x, 8)) * n.parameter(8, 1, 1) + n.buffer(8, 1, 1), 2)

    found = roles(only(net(fn, tensor(2, 3, 6, 6))))
    assert found == {
        "write": ["conv0.bias:0", "conv0.weight:0"],
        "carry": ["layer0.bias:0", "layer0.running_mean:0", "layer0.running_var:0", "layer0.weight:0", "parameter0:0", "buffer0:0"],
        "read": ["conv1.weight:1"],
    }


def test_a_depthwise_convolution_carries_its_channels() -> None:
    found = roles(only(net(lambda n, x: n.conv(n.conv(n.conv(x, 8, bias=False), 8, 3, groups=8, bias=False), 2), tensor(2, 3, 6, 6))))
    assert found == {"write": ["conv0.weight:0"], "carry": ["conv1.weight:0"], "read": ["conv2.weight:1"]}


def test_an_embedding_writes_and_a_tied_head_reads() -> None:
    def fn(n: Net, x: Tensor) -> Tensor:
        table = n.parameter(5, 6)
        return F.linear(F.embedding(x, table) + n.parameter(6), table)

    assert roles(only(net(fn, torch.tensor([[0, 1], [2, 3]])))) == {"read": ["parameter0:1"], "carry": ["parameter1:0"]}


def test_a_block_on_a_residual_stream_reads_and_writes_it() -> None:
    stream = next(group for group in discover(toys.program(toys.Residual(), X)).prunable if group.kind == "residual")
    assert roles(stream) == {
        "write": ["stem.bias:0", "stem.weight:0", "fc2.bias:0", "fc2.weight:0"],
        "read": ["fc1.weight:1", "head.weight:1"],
    }

    def square(n: Net, x: Tensor) -> Tensor:
        h = n.linear(x, 6, bias=False)
        return n.linear(h + n.linear(h, 6, bias=False), 3)

    assert roles(only(net(square, tensor(3, 4)))) == {
        "write": ["linear0.weight:0", "linear1.weight:0"],
        "read": ["linear1.weight:1", "linear2.weight:1"],
    }


def test_matrices_that_a_router_chooses_are_weights() -> None:
    """The neurons of routed experts are written and read by stacks of matrices; no product of activations makes them heads."""

    def fn(n: Net, x: Tensor) -> Tensor:
        h = n.linear(x, 6, bias=False)
        expert = n.linear(h, 4, bias=False).argmax(-1)
        up, down = n.parameter(4, 8, 6)[expert], n.parameter(4, 6, 8)[expert]
        return n.linear(h + (down @ (up @ h[..., None]).relu())[..., 0], 3, bias=False)

    groups = {group.kind: group for group in discover(net(fn, tensor(3, 4))).prunable}
    assert roles(groups["ffn"]) == {"write": ["parameter0:1"], "read": ["parameter1:2"]}
    assert roles(groups["residual"]) == {
        "write": ["linear0.weight:0", "parameter1:1"],
        "read": ["linear1.weight:1", "parameter0:2", "linear2.weight:1"],
    }


def test_recurrent_units_are_written_and_read_by_one_layer() -> None:
    def fn(n: Net, x: Tensor) -> Tensor:
        return n.linear(n.layer(lambda: nn.GRU(6, 8, batch_first=True))(x)[0], 3)

    assert roles(only(net(fn, tensor(3, 5, 6)))) == {
        "write": ["layer0.bias_hh_l0:0", "layer0.bias_ih_l0:0", "layer0.weight_hh_l0:0", "layer0.weight_ih_l0:0"],
        "read": ["layer0.weight_hh_l0:1", "linear0.weight:1"],
    }


def test_members_say_where_their_positions_stand() -> None:
    """Two heads of three dimensions in six rows; twice in a fused weight."""

    def fn(n: Net, x: Tensor) -> Tensor:
        k, v = n.linear(x, 12, bias=False).view(-1, 5, 2, 2, 3).unbind(2)
        return n.linear((k.transpose(1, 2) @ v.permute(0, 2, 3, 1)).softmax(-1).sum(-1).transpose(1, 2), 3)

    heads = next(group for group in discover(net(fn, tensor(2, 5, 6))).prunable if group.kind == "heads")
    (maps,) = heads.members[0].maps
    assert maps.tolist() == [0, 0, 0, 1, 1, 1] * 2


# -- exactness -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixer", "fn"),
    [
        ("layer_norm", lambda h: F.layer_norm(h, (8,))),
        ("rms_norm", lambda h: F.rms_norm(h, (8,))),
        ("softmax", lambda h: h.softmax(-1)),
        ("mean", lambda h: h - h.mean(-1, keepdim=True)),
        ("amax", lambda h: h - h.amax(-1, keepdim=True)),
        ("var", lambda h: h / h.var(-1, keepdim=True)),
    ],
)
def test_what_mixes_along_an_axis_makes_it_inexact_and_is_named(mixer: str, fn: Callable[[Tensor], Tensor]) -> None:
    group = only(net(lambda n, x: n.linear(fn(n.linear(x, 8)), 3), tensor(3, 4)))
    assert not group.exact
    assert group.mixers == (mixer,)


def test_exactness_holds_through_splits_and_joins_up_to_the_mixer() -> None:
    """Only the half that the norm sees is inexact."""

    def fn(n: Net, x: Tensor) -> Tensor:
        a, b = n.linear(x, 8).chunk(2, -1)
        return n.linear(torch.cat([F.layer_norm(a, (4,)), b.relu()], -1), 3)

    assert text(discover(net(fn, tensor(3, 4)))) == "ffn:4~ ffn:4"


def test_a_mixer_that_comes_before_a_later_tie_still_counts() -> None:
    """The mixed axis is split only by an operation after the norm: both factors are inexact."""

    def fn(n: Net, x: Tensor) -> Tensor:
        return n.linear(F.layer_norm(n.linear(x, 8), (8,)).view(-1, 2, 4).transpose(1, 2).reshape(-1, 8), 3)

    assert text(discover(net(fn, tensor(3, 4)))) == "ffn:2~ ffn:4~"


def test_groups_of_a_group_norm_are_exact_and_channels_within_them_are_not() -> None:
    groups = discover(net(lambda n, x: n.conv(F.group_norm(n.conv(x, 8), 2), 3), tensor(2, 3, 6, 6)))
    assert [(group.kind, group.exact) for group in groups.prunable] == [("norm_groups", True), ("conv", False)]


# -- what stays whole ------------------------------------------------------------------------------


def reasons(groups: Groups) -> set[tuple[int, str, str | None]]:
    return {(group.size, group.frozen.code, group.frozen.node) for group in groups if group.frozen is not None}


def test_the_interface_stays() -> None:
    assert reasons(discover(toys.program(toys.Mlp(), X))) == {(4, "interface", "x"), (3, "interface", "output")}


@pytest.mark.parametrize(
    ("reason", "fn"),
    [
        ((5, "no-rule", "linalg_qr"), lambda n, x: n.linear(torch.linalg.qr(n.linear(x, 5)).Q, 3)),
        ((8, "data-dependent", "sort"), lambda n, x: n.linear(n.linear(x, 8).sort(-1).values[..., :3], 3)),
        ((8, "data-dependent", "mul"), lambda n, x: n.linear(x, 3) * n.linear(x, 8).argmax(-1, keepdim=True)),
        ((8, "position", "tril"), lambda n, x: n.linear(n.linear(x, 8).tril(), 3)),
        ((6, "misaligned", "view"), lambda n, x: n.linear(n.linear(x, 6).view(2, 9), 3).sum(0) + n.linear(x, 3)),
        ((8, "mixed", "linalg_pinv"), lambda n, x: n.linear(x, 3) * torch.linalg.pinv(n.linear(x, 8)).sum()),
    ],
)
def test_a_frozen_group_names_the_operation_that_froze_it(reason: tuple[int, str, str], fn: Callable[..., Any]) -> None:
    assert reason in reasons(discover(net(fn, tensor(3, 4), dynamic={"inputs": {}})))


def test_rows_of_an_embedding_stay() -> None:
    groups = discover(net(lambda n, x: n.linear(F.embedding(x, n.parameter(5, 6)), 3), torch.tensor([[0, 1], [2, 3]])))
    assert (5, "data-dependent", "embedding") in reasons(groups)
    assert text(groups) == "ffn:6"


def test_a_user_freezes_tensors_by_name() -> None:
    program = toys.program(toys.Residual(), X)
    frozen = discover(program, freeze=("fc1.*",))
    assert frozen.prunable == ()
    assert {group.frozen.message for group in frozen if group.frozen.code == "user"} <= {
        f"fc1.{name} is named to stay whole" for name in ("weight", "bias")
    }
    assert [group.name for group in discover(program, freeze=("head.*",)).prunable] == ["ffn0"]
    assert discover(program, freeze=("nothing",)) == discover(program)


def test_a_frozen_axis_keeps_its_reason_on_both_sides_of_the_operation() -> None:
    """Not only the operand of an operation that is not understood stays, but what comes out of it."""
    groups = discover(net(lambda n, x: n.linear(torch.linalg.qr(n.linear(x, 5)).R * n.parameter(5), 3), tensor(8, 4)))
    members = {str(member) for group in groups if group.frozen and group.frozen.code == "no-rule" for member in group.members}
    assert members == {"linear0.weight:0", "linear0.bias:0", "parameter0:0", "linear1.weight:1"}
    assert groups.prunable == ()


# -- keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_keys_are_unique_and_do_not_depend_on_weights_or_batch(name: str) -> None:
    program = PROGRAMS[name]()
    keys = [group.key for group in discover(program)]
    assert len(set(keys)) == len(keys)
    assert [group.key for group in discover(PROGRAMS[name]())] == keys
    again = typed(program.clone())
    assert [(group.key, group.size) for group in discover(again)] == [(group.key, group.size) for group in discover(program)]


def test_keys_name_the_first_tensor_axis_and_factor() -> None:
    groups = discover(PROGRAMS["attention"]())
    assert {group.key: (group.kind, group.size) for group in groups.prunable} == {
        "q.bias:0#0": ("heads", 2),
        "q.bias:0#1": ("query_heads", 2),
        "q.bias:0#2": ("head_dim", 4),
        "v.bias:0#1": ("head_dim", 8),
    }
