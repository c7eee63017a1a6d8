"""A layer that repeats an earlier one is not run again, and the program is the same as if it had been."""

import functools
import itertools

import pytest
import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from irprune.errors import TraceError
from irprune.frontend import repeats
from irprune.frontend.export import trace


class Block(nn.Module):
    def __init__(self, index: int = 0, width: int = 4) -> None:
        super().__init__()
        self.index = index
        self.act = functools.partial(torch.nn.functional.gelu, approximate="tanh")
        self.up, self.norm, self.down = nn.Linear(width, 6), nn.LayerNorm(6), nn.Linear(6, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.norm(self.up(x))))


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.scale = nn.Parameter(torch.tensor(2.0))  # so that the first block's input has a gradient, too

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale
        for block in self.blocks:
            x = block(x)
        return x


def net(kind: type = Block, count: int = 3) -> Net:
    torch.manual_seed(0)
    return Net(*(kind(index) for index in range(count))).eval()


def operations(program) -> list[tuple]:
    """Every operation with its operands by position, its size and the modules that it lies in."""
    at = {node: index for index, node in enumerate(program.module.graph.nodes)}

    def positions(args):
        return str(map_aggregate(args, lambda value: f"%{at[value]}" if isinstance(value, fx.Node) else value))

    return [
        (
            str(node.target),
            positions(node.args),
            positions(node.kwargs),
            str(getattr(node.meta.get("val"), "shape", None)),
            tuple((node.meta.get("nn_module_stack") or {}).values()),
        )
        for node in at
    ]


@pytest.fixture
def repeated(monkeypatch) -> list[int]:
    """How many calls each trace replaced by an earlier one."""
    counts: list[int] = []
    written_out = repeats.Repeats.written_out

    def counting(self, traced):
        again = len(traced.graph.find_nodes(op="call_function", target=torch.ops.irprune.again.default))
        out = written_out(self, traced)
        counts.append(again)
        return out

    monkeypatch.setattr(repeats.Repeats, "written_out", counting)
    return counts


def both(monkeypatch, module, *args):
    """The program, and the program of a trace that runs every layer."""
    held = [(part, dict(vars(part))) for part in module.modules()]
    program = trace(module, args)
    assert all(vars(part) == before for part, before in held)
    with monkeypatch.context() as patch:
        patch.setattr(repeats, "_alike", lambda model: [])
        return program, trace(module, args)


def same(monkeypatch, module, *args, names=True) -> None:
    program, whole = both(monkeypatch, module, *args)
    assert operations(program) == operations(whole)
    assert not names or [node.name for node in program.module.graph.nodes] == [node.name for node in whole.module.graph.nodes]
    assert list(program.tensors) == list(whole.tensors)


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


def test_three_equal_blocks_are_run_once(monkeypatch, repeated):
    same(monkeypatch, net(), X)
    assert repeated[0] == 2


def test_an_attribute_that_nobody_reads_may_differ_and_one_that_is_read_may_not(monkeypatch, repeated):
    class Scaled(Block):
        def forward(self, x):
            return super().forward(x) * (1 + self.index % 2)

    same(monkeypatch, net(Scaled, 5), X)
    assert repeated[0] == 0  # 0, 1, 2, 3, 4: every layer answers otherwise

    class Alternating(Block):
        def __init__(self, index):
            super().__init__(index)
            self.local = index % 2 == 0

        def forward(self, x):
            return super().forward(x) * (2 if self.local else 3)

    same(monkeypatch, net(Alternating, 5), X)
    assert repeated[-1] == 3


class Signed(nn.Module):
    """What it gives depends on an attribute that it may do without."""

    def __init__(self, index: int, flip: bool) -> None:
        super().__init__()
        self.index, self.flip = index, flip
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.c(self.b(self.a(x)).relu())
        return -out if getattr(self, "flip", True) else out


def test_layers_of_parts_that_are_like_one_before_the_layers(monkeypatch, repeated):
    """The parts of a layer are no repetitions of their own: the layer is one."""

    class Two(nn.Module):
        def __init__(self, index):
            super().__init__()
            self.one, self.two = Signed(index, True), Signed(index, False)

        def forward(self, x):
            return x + self.two(x + self.one(x))

    same(monkeypatch, nn.Sequential(Signed(0, True), *(Two(index) for index in range(3))).eval(), X)
    assert repeated[0] == 2


def test_a_part_that_two_layers_share_and_a_third_has_of_its_own(monkeypatch, repeated):
    class Sharing(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part, self.norm = part, nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(x + self.part(x))

    shared = Signed(0, False)
    same(monkeypatch, Net(Sharing(shared), Sharing(shared), Sharing(Signed(1, True))).eval(), X)


def test_an_attribute_may_be_missing_or_on_the_class(monkeypatch, repeated):
    class Some(Block):
        def __init__(self, index):
            super().__init__(index)
            if index == 2:
                self.twice = True

        def forward(self, x):
            return super().forward(x) * (2 if hasattr(self, "twice") else 1)

    same(monkeypatch, net(Some, 4), X)
    assert repeated[-1] == 2

    class OnClass(Block):
        factor = 1

        def __init__(self, index):
            super().__init__(index)
            if index == 2:
                self.factor = 2

        def forward(self, x):
            return super().forward(x) * self.factor

    same(monkeypatch, net(OnClass, 4), X)


def test_a_class_with_its_own_look_up(monkeypatch, repeated):
    class Own(Block):
        def __getattr__(self, name):
            return 7 if name == "seven" else super().__getattr__(name)

        def forward(self, x):
            return super().forward(x) * self.seven

    look_up = Own.__getattr__
    same(monkeypatch, net(Own), X)
    assert repeated[0] == 2
    assert Own.__getattr__ is look_up
    assert "__getattr__" not in vars(Block)
    assert "forward" not in vars(Own) or Own.forward.__qualname__.endswith("Own.forward")


def test_shapes_of_weights_and_inputs_count(monkeypatch, repeated):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Block(), Block()

        def forward(self, x):
            return self.one(x), self.two(x[0])

    same(monkeypatch, Wide().eval(), X)
    assert repeated[0] == 0
    same(monkeypatch, nn.Sequential(Block(width=4), nn.Linear(4, 5), Block(width=5)).eval(), X)


def test_a_block_that_remembers_is_run(monkeypatch, repeated):
    class Counting(Block):
        calls = 0

        def __init__(self, index):
            super().__init__(index)
            self.last = None

        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    class Reader(Net):
        def forward(self, x):
            super().forward(x)
            return sum(block.last for block in self.blocks)

    torch.manual_seed(0)
    module = Reader(*(Counting(index) for index in range(3))).eval()
    program = trace(module, (X,))
    torch.testing.assert_close(program(X), module(X))


def test_a_block_that_reads_its_neighbour_is_run(monkeypatch, repeated):
    class Neighbour(Block):
        def forward(self, x):
            return super().forward(x) * (self.before[0].index + 1 if self.index else 1)

    module = net(Neighbour, 4)
    for one, two in itertools.pairwise(module.blocks):
        two.before = [one]
    same(monkeypatch, module, X)
    assert repeated[0] == 0


def test_a_tensor_from_outside_makes_the_trace_be_made_again(monkeypatch, repeated):
    class Leaking(Block):
        def forward(self, x):
            return super().forward(x) + self.shared["sum"]

    class Shares(Net):
        def forward(self, x):
            x = x * self.scale
            for block in self.blocks:
                block.shared["sum"] = x.sum()
                x = block(x)
            return x

    torch.manual_seed(0)
    module, shared = Shares(*(Leaking(index) for index in range(3))).eval(), {"sum": None}
    for block in module.blocks:
        block.shared = shared
    program = trace(module, (X,))
    torch.testing.assert_close(program(X), module(X))
    assert not repeated or repeated[0] == 0


def test_weights_that_are_shared_between_and_within_blocks(monkeypatch, repeated):
    between = net()
    for block in between.blocks[1:]:
        block.norm = between.blocks[0].norm
    same(monkeypatch, between, X)
    within = net()
    within.blocks[0].up.bias = within.blocks[0].norm.bias
    program, whole = both(monkeypatch, within, X)
    assert operations(program) == operations(whole)
    assert program.aliases == whole.aliases


def test_one_tensor_given_three_times_stays_one(monkeypatch, repeated):
    class Same(Block):
        def forward(self, x, y):
            return super().forward(x) * (2 if x is y else 3)

    class Calls(Net):
        def forward(self, x):
            x = x * self.scale
            for block in self.blocks:
                x = block(x, x)
            return self.blocks[0](x, x + 0)

    torch.manual_seed(0)
    same(monkeypatch, Calls(*(Same(index) for index in range(3))).eval(), X)
    assert repeated[0] == 2


def test_what_is_returned_as_it_came_and_in_containers(monkeypatch, repeated):
    class Pair(Block):
        def forward(self, x, bias=None, *, flag=True):
            return {"x": super().forward(x), "bias": bias, "more": (x.shape[1], None)}

    class Passes(Net):
        def forward(self, x):
            bias = x.mean(0) * self.scale
            x = x * self.scale
            for block in self.blocks:
                out = block(x, bias=bias, flag=False)
                assert out["bias"] is bias
                x = out["x"] * out["more"][0]
            return x + out["bias"]

    torch.manual_seed(0)
    same(monkeypatch, Passes(*(Pair(index) for index in range(3))).eval(), X)
    assert repeated[0] == 2


def test_writing_in_place_into_the_input(monkeypatch, repeated):
    class InPlace(Block):
        def forward(self, x):
            x.mul_(2)
            return self.down(self.norm(self.up(x)))

    class Keeps(Net):
        def forward(self, x):
            total = x = x * self.scale
            for block in self.blocks:
                y = block(x)
                total = total + x
                x = y
            return total

    torch.manual_seed(0)
    module = Keeps(*(InPlace(index) for index in range(3))).eval()
    same(monkeypatch, module, X)
    torch.testing.assert_close(trace(module, (X,))(X), module(X))


def test_sizes_that_depend_on_data_are_not_repeated(monkeypatch, repeated):
    class Counts(Block):
        def forward(self, x):
            return super().forward(x) * (x > 0).nonzero().shape[0]

    same(monkeypatch, net(Counts), X)
    assert repeated == [0, 0] or repeated == []


def test_gradient_mode_regions_and_hooks(monkeypatch, repeated):
    class Frozen(Block):
        def forward(self, x):
            with torch.no_grad():
                y = x * 2
            return super().forward(x) + y

    same(monkeypatch, net(Frozen), X, names=False)
    assert repeated[0] == 2
    hooked = net()
    seen = []
    for block in hooked.blocks:
        block.up.register_forward_hook(lambda module, args, out: seen.append(out))
    same(monkeypatch, hooked, X)
    assert len(seen) >= 6


def test_an_error_in_a_repeated_block_names_its_line():
    class Broken(Block):
        def forward(self, x):
            if x.sum() > 1e9:
                return x
            return super().forward(x)

    with pytest.raises(TraceError, match="test_repeats"):
        trace(net(Broken), (X,))


def test_on_the_meta_device(monkeypatch, repeated):
    same(monkeypatch, net().to("meta"), torch.empty(2, 4, device="meta"))
    assert repeated[0] == 2
