"""Random networks: a list of small steps that each keep a tensor of shape (batch, channels, places).

A step is drawn from a menu of coupling patterns; its sizes are drawn with it. The network is built in
double precision with random weights, so that a removed index that should have stayed shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

Draw = Callable[[st.SearchStrategy[Any]], Any]
PLACES = 6
ACTIVATIONS = (F.relu, F.gelu, torch.sigmoid, torch.tanh, F.silu)


class Step(nn.Module):
    """One step: modules by name, and what is done with them to ``(batch, places, channels)``."""

    def __init__(self, text: str, run: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.text = text
        self.parts = nn.ModuleDict(modules)
        self._run = run

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, **dict(self.parts.items()))


class Vector(nn.Module):
    """A raw parameter that is used by position."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(*shape))

    def forward(self) -> Tensor:
        return self.value


class Network(nn.Module):
    """Steps between a linear stem and a linear head."""

    def __init__(self, width: int, steps: list[Step], last: int) -> None:
        super().__init__()
        self.stem = nn.Linear(5, width)
        self.steps = nn.ModuleList(steps)
        self.head = nn.Linear(last, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for step in self.steps:
            x = step(x)
        return self.head(x)

    def __str__(self) -> str:
        return " | ".join(step.text for step in self.steps)  # type: ignore[misc]


def _linear(draw: Draw, c: int) -> tuple[Step, int]:
    out, act = draw(st.sampled_from([4, 6, 8, 12])), draw(st.sampled_from(ACTIVATIONS))
    return Step(f"linear {c}-{out}", lambda x, f: act(f(x)), f=nn.Linear(c, out, bias=draw(st.booleans()))), out


def _feed_forward(draw: Draw, c: int) -> tuple[Step, int]:
    hidden, act, gated = (
        draw(st.sampled_from([4, 6, 10])),
        draw(st.sampled_from(ACTIVATIONS)),
        draw(st.sampled_from(["no", "two", "packed", "half"])),
    )
    down = nn.Linear(hidden, c)
    if gated == "two":
        step = Step("gated", lambda x, g, u, d: x + d(act(g(x)) * u(x)), g=nn.Linear(c, hidden), u=nn.Linear(c, hidden), d=down)
    elif gated == "packed":

        def packed(x: Tensor, g: nn.Module, d: nn.Module) -> Tensor:
            a, b = g(x).chunk(2, -1)
            return x + d(act(a) * b)

        step = Step("packed gate", packed, g=nn.Linear(c, 2 * hidden), d=down)
    elif gated == "half":

        def half(x: Tensor, g: nn.Module, d: nn.Module) -> Tensor:
            z = g(x)
            return x + d(z[..., hidden:] * act(z[..., :hidden]))

        step = Step("half slices", half, g=nn.Linear(c, 2 * hidden), d=down)
    else:
        step = Step("feed forward", lambda x, u, d: x + d(act(u(x))), u=nn.Linear(c, hidden), d=down)
    return step, c


def _norm(draw: Draw, c: int) -> tuple[Step, int]:
    kind = draw(st.sampled_from(["layer", "rms", "manual", "group", "batch"]))
    if kind == "layer":
        return Step("layer norm", lambda x, n: n(x), n=nn.LayerNorm(c)), c
    if kind == "rms":
        return Step("rms norm", lambda x, n: n(x), n=nn.RMSNorm(c, eps=1e-6)), c
    if kind == "manual":
        return Step("manual rms", lambda x, w: w() * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), w=Vector(c)), c
    if kind == "batch":
        return Step("batch norm", lambda x, n: n(x.transpose(1, 2)).transpose(1, 2), n=nn.BatchNorm1d(c)), c
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4) if c % g == 0]))
    return Step(f"group norm {groups}", lambda x, n: n(x.transpose(1, 2)).transpose(1, 2), n=nn.GroupNorm(groups, c)), c


def _attention(draw: Draw, c: int) -> tuple[Step, int]:
    kv, repeat, width = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([2, 4]))
    heads = kv * repeat
    layout = (
        draw(st.sampled_from(["apart", "fused", "stacked", "interleaved"])) if repeat == 1 else draw(st.sampled_from(["apart", "fused"]))
    )
    rotary, plain = draw(st.booleans()), draw(st.booleans())
    sizes = [heads * width, kv * width, kv * width]

    def rotate(t: Tensor) -> Tensor:
        angle = torch.arange(PLACES, dtype=t.dtype)[:, None] * (0.5 ** torch.arange(width // 2, dtype=t.dtype))
        angle = torch.cat([angle, angle], -1)
        return t * angle.cos() + torch.cat([-t[..., width // 2 :], t[..., : width // 2]], -1) * angle.sin()

    def run(x: Tensor, o: nn.Module, **p: nn.Module) -> Tensor:
        b, t, _ = x.shape
        if layout == "apart":
            q, k, v = (p[n](x).view(b, t, -1, width).transpose(1, 2) for n in ("q", "k", "v"))
        elif layout == "fused":
            q, k, v = (part.view(b, t, -1, width).transpose(1, 2) for part in p["q"](x).split(sizes, -1))
        elif layout == "stacked":
            q, k, v = p["q"](x).view(b, t, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (part.transpose(1, 2) for part in p["q"](x).view(b, t, heads, 3 * width).chunk(3, -1))
        if rotary:
            q, k = rotate(q), rotate(k)
        if repeat > 1:
            k, v = (s[:, :, None].expand(b, kv, repeat, t, width).reshape(b, heads, t, width) for s in (k, v))
        if plain:
            y = (q @ k.transpose(-1, -2) / width**0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + o(y.transpose(1, 2).reshape(b, t, heads * width))

    o = nn.Linear(heads * width, c)
    if layout == "apart":
        modules = {n: nn.Linear(c, size) for n, size in zip("qkv", sizes, strict=True)}
    else:
        modules = {"q": nn.Linear(c, sum(sizes))}
    return Step(f"attention {layout} {kv}x{repeat}x{width}{' rotary' * rotary}{' plain' * plain}", run, o=o, **modules), c


def _concat(draw: Draw, c: int) -> tuple[Step, int]:
    a, b, keep = draw(st.sampled_from([2, 3, 5])), draw(st.sampled_from([3, 4])), draw(st.booleans())
    step = Step(
        f"concat {a}|{b}{'|x' * keep}",
        lambda x, f, g: torch.cat([f(x), g(x).tanh(), *([x] if keep else [])], -1),
        f=nn.Linear(c, a),
        g=nn.Linear(c, b),
    )
    return step, a + b + c * keep


def _split(draw: Draw, c: int) -> tuple[Step, int]:
    at = draw(st.integers(1, c - 1))
    mode = draw(st.sampled_from(["swap", "one", "sum"]))
    if mode == "sum" and c % 2 == 0:
        return Step("split halves, add", lambda x: sum(x.chunk(2, -1)[1:], x.chunk(2, -1)[0].relu())), c // 2
    if mode == "one":
        return Step(f"split {at}, change one", lambda x: torch.cat([x[..., :at].tanh(), x[..., at:]], -1)), c
    return Step(f"split {at}, swap", lambda x: torch.cat([x[..., at:], x[..., :at]], -1)), c


def _regroup(draw: Draw, c: int) -> tuple[Step, int]:
    choices = [g for g in (2, 3, 4) if c % g == 0 and c // g > 1]
    if not choices:
        return _linear(draw, c)
    g = draw(st.sampled_from(choices))
    mode = draw(st.sampled_from(["shuffle", "mean", "sum", "max", "minor mean", "repeat", "interleave", "scale"]))
    if mode == "shuffle":
        return Step(f"shuffle {g}", lambda x: x.view(*x.shape[:2], g, c // g).transpose(2, 3).reshape(*x.shape[:2], c)), c
    if mode == "repeat":
        return Step("repeat", lambda x: x.repeat(1, 1, 2)), 2 * c
    if mode == "interleave":
        return Step("repeat interleave", lambda x: x.repeat_interleave(2, -1)), 2 * c
    if mode == "scale":
        return Step("per-group scale", lambda x, w: (x.view(*x.shape[:2], g, c // g) * w()).flatten(2), w=Vector(g, 1)), c
    if mode == "minor mean":
        return Step(f"mean within {g}", lambda x: x.view(*x.shape[:2], g, c // g).mean(-1)), g
    reduce = {"mean": lambda t: t.mean(2), "sum": lambda t: t.sum(2), "max": lambda t: t.amax(2)}[mode]
    return Step(f"{mode} over {g}", lambda x: reduce(x.view(*x.shape[:2], g, c // g))), c // g


def _convolution(draw: Draw, c: int) -> tuple[Step, int]:
    groups = draw(st.sampled_from([g for g in (1, 2, 3, c) if c % g == 0]))
    out = groups * draw(st.sampled_from([1, 2, 3]))
    mode = draw(st.sampled_from(["signal", "transposed", "image", "shuffled", "same weight"]))
    act = draw(st.sampled_from(ACTIVATIONS))
    if mode == "signal":
        conv: nn.Module = nn.Conv1d(c, out, 3, padding=1, groups=groups)
    elif mode == "transposed":
        conv = nn.ConvTranspose1d(c, out, 3, padding=1, groups=groups)
    elif mode == "image":
        conv = nn.Sequential(nn.Unflatten(2, (2, 3)), nn.Conv2d(c, out, 3, padding=1, groups=groups), nn.Flatten(2))
    elif mode == "shuffled":
        conv = nn.Sequential(
            nn.Conv1d(c, out, 1, groups=groups), nn.ChannelShuffle(groups), nn.Conv1d(out, out, 3, padding=1, groups=groups)
        )
    else:
        conv, out = nn.Conv1d(c, c, 3, padding=1, groups=groups), c
        conv = nn.Sequential(conv, nn.Tanh(), conv)
    return Step(f"conv {mode} {c}-{out} in {groups}", lambda x, f: act(f(x.transpose(1, 2))).transpose(1, 2), f=conv), out


def _recurrent(draw: Draw, c: int) -> tuple[Step, int]:
    kind, hidden, two = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN])), draw(st.sampled_from([3, 4])), draw(st.booleans())
    step = Step(f"{kind.__name__} {hidden}", lambda x, f: f(x)[0], f=kind(c, hidden, batch_first=True, bidirectional=two))
    return step, hidden * (1 + two)


def _experts(draw: Draw, c: int) -> tuple[Step, int]:
    experts, hidden, picked = draw(st.sampled_from([2, 3, 4])), draw(st.sampled_from([3, 4])), draw(st.booleans())

    def run(x: Tensor, router: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
        gate = router(x).softmax(-1)
        if picked:
            top, which = gate.topk(2, -1)
            gate = torch.zeros_like(gate).scatter(-1, which, top)
        answers = torch.einsum("bteh,ehc->btec", torch.einsum("btc,ech->bteh", x, up()).relu(), down())
        return x + (answers * gate[..., None]).sum(2)

    parts = {"router": nn.Linear(c, experts), "up": Vector(experts, c, hidden), "down": Vector(experts, hidden, c)}
    return Step(f"{experts} experts{' top 2' * picked}", run, **parts), c


def _weights(draw: Draw, c: int) -> tuple[Step, int]:
    out = draw(st.sampled_from([4, 6]))
    mode = draw(st.sampled_from(["normed", "low rank", "both ways", "twice", "scaled", "stacked"]))
    if mode == "normed":
        return Step("weight norm", lambda x, f: f(x), f=nn.utils.parametrizations.weight_norm(nn.Linear(c, out))), out
    if mode == "low rank":
        return Step("low rank", lambda x, w, a, b: F.linear(x, w() + a() @ b()), w=Vector(out, c), a=Vector(out, 2), b=Vector(2, c)), out
    if mode == "both ways":
        return Step("both ways", lambda x, w: F.linear(F.linear(x, w()).relu(), w().T), w=Vector(out, c)), c
    if mode == "twice":
        return Step("twice", lambda x, f: x + f(x.tanh() + f(x)), f=nn.Linear(c, c)), c
    if mode == "stacked":
        return Step("stacked", lambda x, w: F.linear(x, w()[0]) * F.linear(x, w()[1]).sigmoid(), w=Vector(2, out, c)), out
    return Step("layer scale", lambda x, f, w: x + f(x) * w(), f=nn.Linear(c, c), w=Vector(c)), c


def _places(draw: Draw, c: int) -> tuple[Step, int]:
    mode = draw(st.sampled_from(["mix", "gather", "cumsum", "fold", "merge", "in place"]))
    if mode == "mix":
        hidden = draw(st.sampled_from([3, 4]))
        run = lambda x, u, d: x + d(F.gelu(u(x.transpose(1, 2)))).transpose(1, 2)  # noqa: E731
        return Step("mix places", run, u=nn.Linear(PLACES, hidden), d=nn.Linear(hidden, PLACES)), c
    if mode == "gather":
        order = torch.tensor(draw(st.permutations(range(PLACES))))
        return Step("gather places", lambda x: x.gather(1, order[None, :, None].expand(x.shape[0], -1, c))), c
    if mode == "cumsum":
        return Step("running sum", lambda x: x.cumsum(1)), c
    if mode == "fold":
        return Step("fold places", lambda x, f: f(x.reshape(x.shape[0], -1))[:, None].expand(-1, PLACES, -1), f=nn.Linear(PLACES * c, 4)), 4
    if mode == "merge":
        run = lambda x, f: f(torch.cat([x[:, ::2], x[:, 1::2]], -1)).repeat_interleave(2, 1)  # noqa: E731
        return Step("merge places", run, f=nn.Linear(2 * c, 4)), 4

    def write(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., : c // 2] = x[..., : c // 2].tanh()
        return x.mul_(2)

    return Step("in place", write), c


def _excite(draw: Draw, c: int) -> tuple[Step, int]:
    return Step(
        "squeeze, excite", lambda x, f, g: x * torch.sigmoid(g(F.relu(f(x.mean(1, keepdim=True))))), f=nn.Linear(c, 3), g=nn.Linear(3, c)
    ), c


def _mixed(draw: Draw, c: int) -> tuple[Step, int]:
    mode = draw(st.sampled_from(["centre", "softmax", "cumsum", "norm", "std", "logsumexp"]))
    run = {
        "centre": lambda x: x - x.mean(-1, keepdim=True),
        "softmax": lambda x: x.softmax(-1),
        "cumsum": lambda x: x.cumsum(-1),
        "norm": lambda x: x / (x.norm(dim=-1, keepdim=True) + 1),
        "std": lambda x: x / (x.std(-1, correction=0, keepdim=True) + 1),
        "logsumexp": lambda x: x - x.logsumexp(-1, keepdim=True),
    }[mode]
    return Step(mode, run), c


def _position(draw: Draw, c: int) -> tuple[Step, int]:
    mode = draw(
        st.sampled_from(["table", "flip", "mirror", "roll", "roll, add", "pad", "einsum", "order", "order, add", "some", "every other"])
    )
    shift, order = draw(st.integers(1, c)), torch.tensor(draw(st.permutations(range(c))))
    if mode == "table":
        return Step("position table", lambda x, e: x + e(torch.arange(PLACES)), e=nn.Embedding(PLACES, c)), c
    if mode == "pad":
        return Step("pad", lambda x: F.pad(x, (1, 2))), c + 3
    if mode == "einsum":
        return Step("einsum", lambda x, w: torch.einsum("btc,cd->btd", x, w()), w=Vector(c, 4)), 4
    if mode == "some":
        some = torch.tensor(draw(st.lists(st.integers(0, c - 1), min_size=2, max_size=c)))
        return Step(f"channels {some.tolist()}", lambda x: x[..., some]), len(some)
    if mode == "every other":
        first = draw(st.integers(0, 1))
        return Step(f"every other from {first}", lambda x: x[..., first::2]), len(range(first, c, 2))
    run = {
        "flip": lambda x: x.flip(-1),
        "mirror": lambda x: x + x.flip(-1),
        "roll": lambda x: x.roll(shift, -1),
        "roll, add": lambda x: x + x.roll(shift, -1),
        "order": lambda x: x.index_select(-1, order),
        "order, add": lambda x: x * x[..., order].sigmoid(),
    }[mode]
    return Step(f"{mode} {shift if 'roll' in mode else order.tolist()}", run), c


STEPS = (
    _linear,
    _feed_forward,
    _norm,
    _attention,
    _concat,
    _split,
    _regroup,
    _convolution,
    _excite,
    _mixed,
    _position,
    _recurrent,
    _experts,
    _weights,
    _places,
)


@st.composite
def networks(draw: Draw) -> Network:
    """A network of one to five steps."""
    width = draw(st.sampled_from([4, 6, 8, 12]))
    channels, steps = width, []
    for _ in range(draw(st.integers(1, 5))):
        step, channels = draw(st.sampled_from(STEPS))(draw, channels)
        steps.append(step)
        if channels < 2:
            break
    torch.manual_seed(0)
    network = Network(width, steps, channels).double().eval()
    for parameter in network.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn_like(parameter) * 0.5 + 0.2)
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return network
