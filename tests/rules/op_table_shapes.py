"""The table's operations that rearrange, make, look up and repeat positions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from nets import Net, tensor
from op_table import IMAGE, ROWS, SEQUENCE, STATIC, VECTOR, aten, case
from torch import Tensor, nn
from torch.nn import functional as F

# -- regrouping ------------------------------------------------------------------------------------

case(
    "view",
    "ffn:2 ffn:4",
    SEQUENCE,
    lambda n, x: n.linear(n.linear(x, 8).view(-1, 5, 2, 4).transpose(1, 2).relu().transpose(1, 2).reshape(-1, 5, 8), 3),
)
case("view/left out", "ffn:2 ffn:4", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8).view(x.shape[0], 5, -1, 4).view(x.shape[0], 5, -1), 3))
case("view/through the batch", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8).view(-1, 8).relu().view(-1, 5, 8), 3))
case(
    "reshape/width into the batch",
    "other:8",
    SEQUENCE,
    lambda n, x: n.linear(n.linear(x, 8).transpose(1, 2).reshape(-1, 5), 3).reshape(-1, 8, 3).sum(1),
    zeroing=False,
)
case("reshape/cut inside", "ffn:4", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8).reshape(-1, 10, 4), 3))
case("reshape/cut across", "", SEQUENCE, lambda n, x: n.linear(n.linear(x, 6).reshape(-1, 3, 10), 3))
case("view/other type", "ffn:8", ROWS, lambda n, x: n.linear(n.linear(x, 8).sign().view(torch.int64).view(torch.float64), 3))
case("view/other width", "", ROWS, lambda n, x: n.linear(n.linear(x, 8).view(torch.int32).view(torch.float64), 3))
case("reshape", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8).reshape(-1, 8).relu().reshape(-1, 5, 8), 3))
case(
    "_unsafe_view view_copy _reshape_copy",
    "ffn:2 ffn:2 ffn:2",
    ROWS,
    lambda n, x: n.linear(aten._unsafe_view(aten._reshape_copy(aten.view_copy(n.linear(x, 8), [3, 2, 4]), [3, 4, 2]), [3, 8]), 3),
    dynamic=STATIC,
)
case("flatten", "conv:8", IMAGE, lambda n, x: n.linear(n.conv(x, 8, 3).flatten(1), 3))
case("unflatten", "ffn:2 ffn:4", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8).unflatten(-1, (2, 4)).flatten(-2), 3))
case("unflatten/left out", "ffn:2 ffn:4", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8).unflatten(-1, (2, -1)).flatten(-2), 3))
case("ravel unflatten", "ffn:8", ROWS, lambda n, x: n.linear(n.linear(x, 8).ravel().unflatten(0, (-1, 8)), 3))
case(
    "view_as",
    "ffn:2 ffn:4",
    SEQUENCE,
    lambda n, x: n.linear((lambda a, b: b.view_as(a) * a)(n.linear(x, 8).view(-1, 5, 2, 4), n.linear(x, 8)).flatten(-2), 3),
)
case("reshape_as", "ffn:2 ffn:4", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8).view(-1, 5, 2, 4).reshape_as(n.linear(x, 8)), 3))

# -- reordering ------------------------------------------------------------------------------------

case("permute", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8).permute(2, 0, 1).relu().permute(1, -1, 0), 3))
case("permute_copy", "ffn:8", SEQUENCE, lambda n, x: n.linear(aten.permute_copy(n.linear(x, 8), [2, 0, 1]).permute(1, 2, 0), 3))
case(
    "transpose swapaxes swapdims transpose_copy",
    "ffn:8",
    SEQUENCE,
    lambda n, x: n.linear(aten.transpose_copy(aten.swapdims(n.linear(x, 8).swapaxes(0, 2), 1, -1), 1, 2).transpose(0, -1), 3),
)
case("t t_copy", "ffn:8", ROWS, lambda n, x: n.linear(aten.t_copy(n.linear(x, 8).t().relu()), 3))
case("numpy_T", "ffn:8", ROWS, lambda n, x: (n.parameter(3, 8) @ n.linear(x, 8).T).T)
case("mT mH adjoint", "ffn:8", SEQUENCE, lambda n, x: n.parameter(3, 8) @ n.linear(x, 8).mT.mH.adjoint())
case("matrix_H", "ffn:8", ROWS, lambda n, x: n.parameter(3, 8) @ n.linear(x, 8).H)
case("movedim", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8).movedim(-1, 0).relu().movedim(0, 2), 3))
case(
    "moveaxis",
    "ffn:8",
    (tensor(3, 2, 5, 6),),
    lambda n, x: n.linear(n.linear(x, 8).moveaxis((1, 3), (0, 1)).relu().moveaxis((0, 1), (1, 3)), 3),
)
case("unsqueeze squeeze", "ffn:8", ROWS, lambda n, x: n.linear(n.linear(x, 8).unsqueeze(-1).unsqueeze(0).squeeze(0).squeeze(-1), 3))
case(
    "unsqueeze_copy squeeze_copy", "ffn:8", ROWS, lambda n, x: n.linear(aten.squeeze_copy(aten.unsqueeze_copy(n.linear(x, 8), -1), [-1]), 3)
)
case("squeeze/every axis", "ffn:8", ROWS, lambda n, x: n.linear(n.linear(x, 8)[:, None, :, None].squeeze(), 3))
case("squeeze/several", "ffn:8", ROWS, lambda n, x: n.linear(n.linear(x, 8)[:, None, :, None].squeeze((1, 2, 3)), 3))
case("squeeze/of what is longer", "ffn:8", ROWS, lambda n, x: n.linear(n.linear(x, 8).squeeze(1), 3))
case(
    "squeeze/of a single position",
    "ffn:5",
    ROWS,
    lambda n, x: n.linear((lambda h: h[:, 0:1].squeeze(1)[:, None] * h[:, 1:])(n.linear(x, 6)), 3),
)

# -- broadcasting and repeating --------------------------------------------------------------------

case("expand", "ffn:8", ROWS, lambda n, x: n.linear(n.linear(x, 8)[:, None].expand(-1, 5, -1).sum(1), 3))
case("expand/flattened", "ffn:8 other:5", ROWS, lambda n, x: n.linear(n.linear(x, 8)[:, :, None].expand(-1, 8, 5).reshape(-1, 40), 3))
case(
    "expand/of a single position",
    "other:5 ffn:8",
    ROWS,
    lambda n, x: n.linear((lambda h: h[:, 0:1].expand(-1, 8) * n.linear(x, 8))(n.linear(x, 6)), 3),
)
case("expand_as", "ffn:8", ROWS, lambda n, x: n.linear(n.linear(x, 1).expand_as(n.linear(x, 8)) * n.linear(x, 8), 3))
case(
    "broadcast_to expand_copy",
    "ffn:8",
    ROWS,
    lambda n, x: n.linear(aten.expand_copy(torch.broadcast_to(n.linear(x, 8)[:, None], (3, 5, 8)), [3, 5, 8]), 3),
    dynamic=STATIC,
)
case("repeat", "ffn:8 other:3", ROWS, lambda n, x: n.linear(n.linear(x, 8).repeat(1, 3), 3))
case("repeat/the batch", "ffn:8 other:3", ROWS, lambda n, x: n.linear(n.linear(x, 8).repeat(2, 1, 3), 3))
case("tile", "ffn:8 other:3", ROWS, lambda n, x: n.linear(n.linear(x, 8).tile(3), 3))
case("tile/the batch", "ffn:8 other:3", ROWS, lambda n, x: n.linear(n.linear(x, 8).tile((2, 1, 3)), 3))
case("repeat_interleave", "ffn:8 other:3", ROWS, lambda n, x: n.linear(n.linear(x, 8).repeat_interleave(3, -1), 3))
case(
    "repeat_interleave/output size", "ffn:3 other:2", ROWS, lambda n, x: n.linear(n.linear(x, 3).repeat_interleave(2, -1, output_size=6), 3)
)
case("repeat_interleave/everything", "ffn:8 other:2", ROWS, lambda n, x: n.linear(n.linear(x, 8).repeat_interleave(2).view(-1, 16), 3))
case(
    "repeat_interleave/by a tensor",
    "",
    ROWS,
    lambda n, x: n.linear(n.linear(x, 3).repeat_interleave(torch.tensor([1, 2, 3]), -1, output_size=6), 3),
)

# -- slicing ---------------------------------------------------------------------------------------


def sliced(width: int, *parts: slice) -> Callable[[Net, Tensor], Tensor]:
    """Each part of a hidden layer read by a layer of its own."""

    def fn(n: Net, x: Tensor) -> Tensor:
        hidden = n.linear(x, width)
        return torch.stack([n.linear(hidden[:, part], 3) for part in parts]).sum(0)

    return fn


def multiplied(width: int, a: slice, b: slice) -> Callable[[Net, Tensor], Tensor]:
    """Two parts of a hidden layer that are made equal."""

    def fn(n: Net, x: Tensor) -> Tensor:
        hidden = n.linear(x, width)
        return n.linear(hidden[:, a] * hidden[:, b], 3)

    return fn


case("slice/halves", "ffn:4", ROWS, multiplied(8, slice(0, 4), slice(4, 8)))
case("slice/uneven", "ffn:3 ffn:5", ROWS, sliced(8, slice(0, 3), slice(3, None)))
case("slice/overlapping reads", "ffn:3 ffn:3 ffn:2", ROWS, sliced(8, slice(0, 5), slice(3, None)))
case("slice/shifted by three", "ffn:2", ROWS, multiplied(8, slice(0, 5), slice(3, None)))
case("slice/from the end", "ffn:5 ffn:2", ROWS, sliced(8, slice(-3, None), slice(None, -2)))
case("slice/even and odd", "ffn:4", ROWS, multiplied(8, slice(None, None, 2), slice(1, None, 2)))
case("slice/steps that do not divide", "ffn:3 other:3 ffn:2", ROWS, sliced(8, slice(None, None, 3), slice(2, None, 3)))
case("slice/steps inside", "other:6 ffn:2", ROWS, sliced(8, slice(2, 6, 2)))
case("slice/beyond the end", "ffn:3 ffn:5", ROWS, sliced(8, slice(0, 3), slice(3, 100)))
case("slice/empty", "ffn:8", ROWS, lambda n, x: n.linear((lambda h: torch.cat([h[:, :8], h[:, 8:]], -1))(n.linear(x, 8)), 3))
case(
    "slice/of the major factor",
    "ffn:3 ffn:2 ffn:2",
    ROWS,
    lambda n, x: (lambda h: n.linear(h[:, :2].flatten(1), 3) + n.linear(h[:, 2:].flatten(1), 3))(n.linear(x, 12).view(-1, 4, 3)),
)
case(
    "slice/inside the minor factor",
    "ffn:2",
    ROWS,
    lambda n, x: (lambda h: n.linear(h[:, :5], 3) + n.linear(h[:, 5:], 3) + n.linear(h.view(-1, 4, 3).sum(1), 3))(n.linear(x, 12)),
)
case("slice_copy", "ffn:3 other:5", ROWS, lambda n, x: n.linear(aten.slice_copy(n.linear(x, 8), 1, 0, 3), 3))
case(
    "narrow",
    "other:2 ffn:2 ffn:3",
    ROWS,
    lambda n, x: (lambda h: n.linear(h.narrow(1, 2, 4), 3) + n.linear(h.narrow(1, -3, 3), 3))(n.linear(x, 8)),
)
case("narrow_copy", "ffn:3 other:5", ROWS, lambda n, x: n.linear(aten.narrow_copy(n.linear(x, 8), 1, 2, 3), 3))
case("select", "ffn:4", ROWS, lambda n, x: n.linear((lambda h: h[:, 0] * h[:, -1])(n.linear(x, 8).view(-1, 2, 4)), 3))
case("select_copy", "ffn:4", ROWS, lambda n, x: n.linear(aten.select_copy(n.linear(x, 8).view(-1, 2, 4), 1, 0), 3))
case(
    "select/of one number everywhere",
    "ffn:8",
    ROWS,
    lambda n, x: (lambda h: n.linear(h * torch.full_like(h, 1.5)[:, 5, None], 3))(n.linear(x, 8)),
)
case(
    "select/of numbers written",
    "",
    ROWS,
    lambda n, x: n.linear((lambda h: h * torch.zeros_like(h).copy_(h)[:, 5, None])(n.linear(x, 8)), 3),
)
case(
    "slice_scatter",
    "ffn:3 ffn:5",
    ROWS,
    lambda n, x: n.linear(torch.slice_scatter(n.linear(x, 8), n.linear(x, 3), 1, 2, 5), 3),
)
case("slice_scatter/step", "", ROWS, lambda n, x: n.linear(torch.slice_scatter(n.linear(x, 8), n.linear(x, 4), 1, 0, 8, 2), 3))
case("slice_scatter/places", "ffn:8", SEQUENCE, lambda n, x: n.linear(torch.slice_scatter(n.linear(x, 8), n.linear(x[:, :2], 8), 1, -2), 3))
case("select_scatter", "ffn:8", SEQUENCE, lambda n, x: n.linear(torch.select_scatter(n.linear(x, 8), n.linear(x[:, 0], 8), 1, 2), 3))
case("unbind", "ffn:4", ROWS, lambda n, x: n.linear((lambda a, b: a * b)(*n.linear(x, 8).view(-1, 2, 4).unbind(1)), 3))
case("unbind_copy", "ffn:4", ROWS, lambda n, x: n.linear(sum(aten.unbind_copy(n.linear(x, 8).view(-1, 2, 4), 1)), 3))
case("split", "ffn:4", ROWS, lambda n, x: n.linear((lambda a, b: a * b)(*n.linear(x, 8).split(4, -1)), 3))
case(
    "split/short last part",
    "ffn:3 ffn:2",
    ROWS,
    lambda n, x: (lambda a, b, c: n.linear(a * b, 3) + n.linear(c, 3))(*n.linear(x, 8).split(3, -1)),
)
case(
    "split/singles",
    "ffn:5",
    ROWS,
    lambda n, x: n.linear((lambda a, b, c: a * n.linear(x, 5) + b * n.linear(x, 5) + c)(*n.linear(x, 3).split(1, -1)), 2),
)
case(
    "split_with_sizes",
    "ffn:3 ffn:4",
    ROWS,
    lambda n, x: (lambda a, b, c: n.linear(a, 3) + n.linear(c * b, 3))(*n.linear(x, 8).split([3, 1, 4], -1)),
)
case("chunk", "ffn:3 ffn:2", ROWS, lambda n, x: (lambda a, b, c: n.linear(a * b, 3) + n.linear(c, 3))(*n.linear(x, 8).chunk(3, -1)))
case(
    "tensor_split",
    "ffn:3 ffn:2",
    ROWS,
    lambda n, x: (lambda a, b, c: n.linear(a * b, 3) + n.linear(c, 3))(*n.linear(x, 8).tensor_split(3, -1)),
)
case(
    "tensor_split/at",
    "ffn:2 ffn:3",
    ROWS,
    lambda n, x: (lambda a, b, c: n.linear(a, 3) + n.linear(b * c, 3))(*n.linear(x, 8).tensor_split((2, 5), -1)),
)
case(
    "unsafe_split unsafe_chunk split_copy unsafe_split_with_sizes",
    " ".join(["ffn:4"] * 4),
    ROWS,
    lambda n, x: sum(
        n.linear(torch.mul(*part), 3)
        for part in (
            aten.unsafe_split(n.linear(x, 8), 4, 1),
            aten.unsafe_chunk(n.linear(x, 8), 2, 1),
            aten.split_copy(n.linear(x, 8), 4, 1),
            aten.unsafe_split_with_sizes(n.linear(x, 8), [4, 4], 1),
        )
    ),
)
case("hsplit", "ffn:4", ROWS, lambda n, x: n.linear(torch.mul(*torch.hsplit(n.linear(x, 8), 2)), 3))
case("hsplit/vector", "ffn:4", (tensor(4),), lambda n, x: n.linear(torch.mul(*torch.hsplit(n.linear(x, 8), 2)), 3), dynamic=STATIC)
case("vsplit", "ffn:4", ROWS, lambda n, x: n.linear(torch.mul(*torch.vsplit(n.linear(x, 8).T, 2)).T, 3))
case("dsplit", "ffn:4", SEQUENCE, lambda n, x: n.linear(torch.mul(*torch.dsplit(n.linear(x, 8), 2)), 3))

# -- joining ---------------------------------------------------------------------------------------

case("cat", "ffn:3 ffn:5", ROWS, lambda n, x: n.linear(torch.cat([n.linear(x, 3), n.linear(x, 5)], -1), 3))
case("cat/one value twice", "ffn:3", ROWS, lambda n, x: n.linear((lambda h: torch.cat([h, h], -1))(n.linear(x, 3)), 3))
case("cat/batches", "ffn:6", ROWS, lambda n, x: n.linear(torch.cat([n.linear(x, 6), n.linear(x, 6)], 0), 3))
case("cat/against a whole", "ffn:3 ffn:5", ROWS, lambda n, x: n.linear(torch.cat([n.linear(x, 3), n.linear(x, 5)], -1) + n.linear(x, 8), 3))
case(
    "cat/against another cut",
    "ffn:3 ffn:3 ffn:2",
    ROWS,
    lambda n, x: n.linear(torch.cat([n.linear(x, 3), n.linear(x, 5)], -1) * torch.cat([n.linear(x, 5), n.linear(x, 3)], -1), 3),
)
case(
    "cat/swapped",
    "ffn:3",
    ROWS,
    lambda n, x: n.linear((lambda a, b: torch.cat([a, b], -1) * torch.cat([b, a], -1))(n.linear(x, 3), n.linear(x, 3)), 3),
)
case(
    "cat/swapped, uneven",
    "",
    ROWS,
    lambda n, x: n.linear((lambda a, b: torch.cat([a, b], -1) * torch.cat([b, a], -1))(n.linear(x, 3), n.linear(x, 5)), 3),
)
case("cat/with the input", "ffn:5", ROWS, lambda n, x: n.linear(torch.cat([x, n.linear(x, 5)], -1), 3))
case(
    "concat concatenate",
    "ffn:3 ffn:5 ffn:2",
    ROWS,
    lambda n, x: n.linear(aten.concatenate([aten.concat([n.linear(x, 3), n.linear(x, 5)], -1), n.linear(x, 2)], 1), 3),
)
case("hstack", "ffn:3 ffn:5", ROWS, lambda n, x: n.linear(torch.hstack([n.linear(x, 3), n.linear(x, 5)]), 3))
case("vstack", "ffn:3 ffn:5", ROWS, lambda n, x: n.linear(torch.vstack([n.linear(x, 3).T, n.linear(x, 5).T]).T, 3))
case("dstack", "ffn:3 ffn:5", SEQUENCE, lambda n, x: n.linear(torch.dstack([n.linear(x, 3), n.linear(x, 5)]), 3))
case(
    "hstack/vectors", "ffn:3 ffn:5", (tensor(4),), lambda n, x: n.linear(torch.hstack([n.linear(x, 3), n.linear(x, 5)]), 3), dynamic=STATIC
)
case("vstack/vectors", "", (tensor(4),), lambda n, x: n.linear(torch.vstack([n.linear(x, 3), n.linear(x, 3)]), 3), dynamic=STATIC)
case("column_stack", "ffn:3 ffn:5", ROWS, lambda n, x: n.linear(torch.column_stack([n.linear(x, 3), n.linear(x, 5)]), 3))
case(
    "column_stack/vectors", "", (tensor(4),), lambda n, x: n.linear(torch.column_stack([n.linear(x, 3), n.linear(x, 3)]), 3), dynamic=STATIC
)
case("row_stack", "ffn:3 ffn:5", ROWS, lambda n, x: n.linear(torch.row_stack([n.linear(x, 3).T, n.linear(x, 5).T]).T, 3))
case("stack", "ffn:6", ROWS, lambda n, x: n.linear(torch.stack([n.linear(x, 6), n.linear(x, 6)], 1).sum(1), 3))
case("stack/flattened", "ffn:6", ROWS, lambda n, x: n.linear(torch.stack([n.linear(x, 6), n.linear(x, 6)], -1).flatten(1), 3))
case("constant_pad_nd", "conv:8", IMAGE, lambda n, x: n.conv(aten.constant_pad_nd(n.conv(x, 8), [1, 1]), 2))
case("pad", "conv:8", IMAGE, lambda n, x: n.conv(F.pad(n.conv(x, 8, 3), (1, 1, 1, 1)), 2))
case("pad/channels", "conv:8 other:2 other:3", IMAGE, lambda n, x: n.conv(F.pad(n.conv(x, 8), (0, 0, 0, 0, 2, 3), value=1.5), 2))
case(
    "pad/channels of a shortcut",
    "conv:8 conv:2 conv:2",
    IMAGE,
    lambda n, x: (lambda h: n.conv(F.pad(h, (0, 0, 0, 0, 2, 2)) + n.conv(h.relu(), 12), 2))(n.conv(x, 8)),
)
case("pad/cropping", "", ROWS, lambda n, x: n.linear(F.pad(n.linear(x, 8), (-2, 0)), 3))
case("pad/reflecting", "", (tensor(3, 2, 4),), lambda n, x: n.linear(F.pad(n.linear(x, 8), (2, 1), mode="reflect"), 3))
case("pad/circular", "", (tensor(3, 2, 4),), lambda n, x: n.linear(F.pad(n.linear(x, 8), (2, 1), mode="circular"), 3))
case(
    "reflection_pad1d replication_pad1d",
    "ffn:8",
    (tensor(3, 4, 6),),
    lambda n, x: n.linear(aten.replication_pad1d(aten.reflection_pad1d(n.linear(x, 8).mT, [2, 1]), [1, 1]).mT, 3),
)
case(
    "reflection_pad2d replication_pad2d",
    "conv:8",
    IMAGE,
    lambda n, x: n.conv(aten.replication_pad2d(aten.reflection_pad2d(n.conv(x, 8), [2, 1, 1, 1]), [1, 1, 1, 1]), 3),
)
case(
    "replication_pad3d",
    "conv:8",
    (tensor(2, 3, 4, 4, 4),),
    lambda n, x: n.conv(aten.replication_pad3d(n.conv(x, 8, rank=3), [1] * 6), 3, rank=3),
)

# -- permuting -------------------------------------------------------------------------------------

case("roll", "ffn:8", ROWS, lambda n, x: n.linear(n.linear(x, 8).roll(3, -1), 3))
case("roll/by half, added", "ffn:4", ROWS, lambda n, x: n.linear((lambda h: h.roll(4, -1) + h)(n.linear(x, 8)), 3))
case("roll/all the way round", "ffn:4", ROWS, lambda n, x: n.linear((lambda h: h + h.roll(4, -1))(n.linear(x, 4)), 3))
case("roll/two axes", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8).roll((1, 2), (1, 2)), 3))
case("roll/back and forth", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8).roll(-2, -1).relu().roll(2, -1), 3))
case("roll/everything", "", ROWS, lambda n, x: n.linear(n.linear(x, 8).roll(3), 3))
case("flip/of space", "conv:4", IMAGE, lambda n, x: n.conv(n.conv(x, 4).flip(2, 3), 3))
case("fliplr flipud", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8).fliplr().transpose(0, 1).flipud().transpose(0, 1), 3))
case(
    "rot90",
    "conv:4",
    IMAGE,
    lambda n, x: n.conv(n.conv(x, 4).rot90(1, (2, 3)) + n.conv(x, 4).rot90(2, (2, 3)) + n.conv(x, 4).rot90(-1, (2, 3)), 3),
)
case(
    "fft_fftshift fft_ifftshift", "conv:4", IMAGE, lambda n, x: n.conv(torch.fft.ifftshift(torch.fft.fftshift(n.conv(x, 4), (2, 3)), 2), 3)
)
case(
    "fft_fftfreq fft_rfftfreq",
    "conv:4",
    IMAGE,
    lambda n, x: n.conv(n.conv(x, 4) * torch.fft.fftfreq(6, dtype=x.dtype) * torch.fft.rfftfreq(10, dtype=x.dtype)[:, None], 3),
)
case("pixel_shuffle", "conv:2", IMAGE, lambda n, x: n.conv(F.pixel_shuffle(n.conv(x, 8), 2), 3))
case("pixel_unshuffle", "conv:2", IMAGE, lambda n, x: n.conv(F.pixel_unshuffle(n.conv(x, 2), 2), 3))
case("channel_shuffle", "conv:2 conv:4", IMAGE, lambda n, x: n.conv(F.channel_shuffle(n.conv(x, 8), 2), 3))
case(
    "meshgrid",
    "ffn:6",
    (tensor(4),),
    lambda n, x: n.linear(torch.mul(*torch.meshgrid(x, n.parameter(6), indexing="ij")), 3),
    dynamic=STATIC,
)
case(
    "meshgrid/xy",
    "ffn:6",
    (tensor(4),),
    lambda n, x: n.linear(torch.mul(*torch.meshgrid(n.parameter(6), x, indexing="xy")), 3),
    dynamic=STATIC,
)

# -- making ----------------------------------------------------------------------------------------

case(
    "zeros ones full",
    "ffn:8",
    ROWS,
    lambda n, x: n.linear(
        n.linear(x, 8) + torch.ones(8, dtype=x.dtype) * torch.full((3, 8), 2.0, dtype=x.dtype) + torch.zeros(8, dtype=x.dtype), 3
    ),
    dynamic=STATIC,
)
case(
    "broadcast_tensors",
    "ffn:8",
    SEQUENCE,
    lambda n, x: n.linear(torch.stack(torch.broadcast_tensors(n.linear(x, 8), n.parameter(8), n.linear(x, 1)), -1).sum(-1), 3),
)
case(
    "atleast_1d atleast_2d atleast_3d",
    "ffn:8",
    ROWS,
    lambda n, x: n.linear(torch.atleast_1d(torch.atleast_2d(n.parameter(8)) + torch.atleast_3d(n.linear(x, 8))[..., 0]), 3),
)
case("atleast_2d/several", "ffn:8", VECTOR, lambda n, x: n.linear(sum(torch.atleast_2d(n.linear(x, 8), n.parameter(8))), 3), dynamic=STATIC)
case(
    "new_zeros new_ones new_full scalar_tensor",
    "ffn:8",
    ROWS,
    lambda n, x: n.linear(n.linear(x, 8) * x.new_ones(8) + x.new_zeros(x.shape[0], 8) + x.new_full((8,), 0.5) * aten.scalar_tensor(2.0), 3),
)
case(
    "zeros_like ones_like full_like",
    "ffn:8",
    ROWS,
    lambda n, x: n.linear((lambda h: h * torch.ones_like(h) + torch.zeros_like(h) + torch.full_like(h, 0.5))(n.linear(x, 8)), 3),
)
case(
    "empty new_empty empty_like",
    "ffn:8",
    ROWS,
    lambda n, x: n.linear(
        (
            lambda h: (
                h + aten.fill(torch.empty(8, dtype=x.dtype), 1.0) + aten.fill(x.new_empty(8), 2.0) + aten.fill(torch.empty_like(h), 3.0)
            )
        )(n.linear(x, 8)),
        3,
    ),
    stepwise=False,
)
case("arange", "ffn:8", ROWS, lambda n, x: n.linear(n.linear(x, 8) + torch.arange(8) ** 2, 3))
case(
    "arange/of a dynamic axis",
    "other:8",
    ROWS,
    lambda n, x: (n.linear(x, 8).T * torch.arange(x.shape[0], dtype=x.dtype)).sum(0)[:, None] * n.linear(x, 2),
    zeroing=False,
)
case("eye", "other:8 other:8", ROWS, lambda n, x: n.linear(n.linear(x, 8) @ torch.eye(8, dtype=x.dtype), 3))
case(
    "linspace logspace hann_window hamming_window bartlett_window blackman_window kaiser_window",
    "ffn:8",
    ROWS,
    lambda n, x: n.linear(
        n.linear(x, 8) * torch.linspace(0, 1, 8, dtype=x.dtype)
        + torch.logspace(0, 1, 8, dtype=x.dtype) * torch.hann_window(8, dtype=x.dtype)
        + torch.hamming_window(8, dtype=x.dtype) * torch.bartlett_window(8, dtype=x.dtype)
        + torch.blackman_window(8, dtype=x.dtype) * torch.kaiser_window(8, dtype=x.dtype),
        3,
    ),
)
case("tril triu", "", SEQUENCE, lambda n, x: n.linear(torch.tril(n.linear(x, 8)) + torch.triu(n.linear(x, 8)), 3))
case("tril/of a constant", "other:8 other:8", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8) @ torch.ones(8, 8, dtype=x.dtype).tril(), 3))
case(
    "diagonal diagonal_copy",
    "",
    SEQUENCE,
    lambda n, x: n.linear(n.linear(x, 8).diagonal(0, 1, 2) + aten.diagonal_copy(n.linear(x, 8), 0, 1, 2), 3),
)
case("diag_embed", "", ROWS, lambda n, x: n.linear(torch.diag_embed(n.linear(x, 8)).sum(1), 3))
case("diag", "", ROWS, lambda n, x: F.linear(x, torch.diag(n.parameter(4))))
case("trace", "", ROWS, lambda n, x: n.linear(x, 3) * torch.trace(n.parameter(4, 4)))
case("diff", "", ROWS, lambda n, x: n.linear(n.linear(x, 8).diff(dim=-1), 3))
case("diff/of another axis", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8).diff(n=2, dim=1), 3))
case(
    "bucketize searchsorted",
    "ffn:3",
    ROWS,
    lambda n, x: (
        n.linear(
            torch.bucketize(n.linear(x, 4), torch.arange(3.0, dtype=x.dtype)).to(x.dtype)
            + torch.searchsorted(torch.arange(3.0, dtype=x.dtype), n.linear(x, 4)),
            3,
        )
        * n.linear(n.linear(x, 3), 3)
    ),
)
case(
    "tril_indices triu_indices",
    "ffn:8",
    ROWS,
    lambda n, x: n.linear(n.linear(x, 8) + (torch.tril_indices(4, 4).sum(0)[:8] * torch.triu_indices(4, 4).sum(0)[2:]).to(x.dtype), 3),
)

# -- looking up ------------------------------------------------------------------------------------

TOKENS = (torch.tensor([[0, 3, 1], [2, 2, 4]]),)

case("embedding", "ffn:8", TOKENS, lambda n, x: n.linear(n.layer(lambda: nn.Embedding(5, 8))(x), 3))
case("embedding_bag", "ffn:8", TOKENS, lambda n, x: n.linear(F.embedding_bag(x, n.parameter(5, 8)), 3))
case(
    "_embedding_bag",
    "ffn:8",
    TOKENS,
    lambda n, x: n.linear(aten._embedding_bag(n.parameter(5, 8), x.flatten(), torch.tensor([0, 2]))[0], 3),
    dynamic=STATIC,
)
case(
    "_embedding_bag_forward_only",
    "ffn:8",
    TOKENS,
    lambda n, x: n.linear(aten._embedding_bag_forward_only(n.buffer(5, 8), x.flatten(), torch.tensor([0, 2]))[0], 3),
    dynamic=STATIC,
)
case("index", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8)[:, torch.tensor([0, 4, 4])], 3))
case("index/features", "other:6", ROWS, lambda n, x: n.linear(n.linear(x, 8)[:, torch.tensor([0, 4, 4])], 3))
case(
    "index/two, apart",
    "ffn:8",
    (tensor(3, 4, 5, 6),),
    lambda n, x: n.linear(n.linear(x, 8).transpose(2, 3)[:, torch.tensor([0, 1]), :, torch.tensor([3, 4])], 3),
)
case(
    "index/two, together",
    "ffn:8",
    (tensor(3, 4, 5, 6),),
    lambda n, x: n.linear(n.linear(x, 8)[:, torch.tensor([[0], [1]]), torch.tensor([3, 4])], 3),
)
case("index/by a mask", "ffn:8", ROWS, lambda n, x: n.linear(n.linear(x, 8), 3)[:, torch.tensor([True, False, True])])
case("index/rows by a mask", "", ROWS, lambda n, x: F.linear(x, n.parameter(8, 4)[torch.arange(8) % 2 == 0]))
case(
    "index/places by a mask beside features",
    "ffn:8",
    SEQUENCE,
    lambda n, x: n.linear((lambda h: h[x[..., 0] > 0].sum(0) * h)(n.linear(x, 8)), 3),
)
case(
    "index/features beside a mask",
    "ffn:8",
    SEQUENCE,
    lambda n, x: n.linear(n.linear(x, 8)[:, x[0, :, 0] > 0].sum(1), 3),
)
case("index/a mask and positions", "", SEQUENCE, lambda n, x: n.linear(x, 8)[x[:, 0, 0] > 0, :, torch.tensor([3])].sum())
case("index/features by a mask", "", SEQUENCE, lambda n, x: n.linear(x, 8)[:, :, x[0, 0].repeat(2)[:8] > 0].sum(-1))
case(
    "index_put/rows by a mask",
    "ffn:8",
    SEQUENCE,
    lambda n, x: n.linear((lambda h, m: h.index_put([m], n.linear(h[m], 8)))(n.linear(x, 8), x[..., 0] > 0), 3),
)
case(
    "index_put/one row by a mask",
    "ffn:8",
    SEQUENCE,
    lambda n, x: n.linear(n.linear(x, 8).index_put([x[..., 0] > 0], n.parameter(8)), 3),
)
case(
    "index_put/behind a mask",
    "ffn:8",
    SEQUENCE,
    lambda n, x: n.linear(aten.index_put(n.linear(x, 8), [None, x[0, :, 0] > 0], n.parameter(1, 1, 8)), 3),
)
case("index_put/features by a mask", "", ROWS, lambda n, x: n.linear((lambda h: h.index_put([h > 0], n.parameter(1)))(n.linear(x, 8)), 3))
case("_unsafe_index", "ffn:8", SEQUENCE, lambda n, x: n.linear(aten._unsafe_index(n.linear(x, 8), [None, torch.tensor([0, 4, 4])]), 3))
case("index_select", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8).index_select(1, torch.tensor([0, 4])), 3))
case("take_along_dim", "ffn:8", SEQUENCE, lambda n, x: n.linear(torch.take_along_dim(n.linear(x, 8), n.linear(x, 8).argsort(1), 1), 3))
case(
    "take_along_dim/one order for all",
    "ffn:8",
    SEQUENCE,
    lambda n, x: n.linear(torch.take_along_dim(n.linear(x, 8), n.linear(x, 1).argsort(1), 1), 3),
)
case("take", "ffn:3", ROWS, lambda n, x: n.linear(n.linear(x, 8).take(torch.tensor([[0, 3, 5]])), 3))
case("gather", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8).gather(1, n.linear(x, 8).argsort(1)), 3))
case(
    "gather/features",
    "other:2",
    ROWS,
    lambda n, x: n.linear(n.linear(x, 8).gather(1, torch.zeros(3, 2, dtype=torch.long)), 3),
    dynamic=STATIC,
)
case(
    "gather/first positions",
    "",
    SEQUENCE,
    lambda n, x: n.linear(n.linear(x, 8).gather(1, torch.zeros(3, 2, 4, dtype=torch.long)), 3),
    dynamic=STATIC,
)
case(
    "scatter scatter_add scatter_reduce",
    "ffn:8 ffn:8 ffn:8",
    SEQUENCE,
    lambda n, x: (
        n.linear(n.linear(x, 8).scatter(1, torch.zeros(3, 5, 8, dtype=torch.long), 0.5), 3)
        + n.linear(n.linear(x, 8).scatter_add(1, torch.zeros(3, 5, 8, dtype=torch.long), n.linear(x, 8)), 3)
        + n.linear(n.linear(x, 8).scatter_reduce(1, torch.zeros(3, 5, 8, dtype=torch.long), n.linear(x, 8), "sum"), 3)
    ),
    dynamic=STATIC,
)
case(
    "scatter/features",
    "",
    ROWS,
    lambda n, x: n.linear(n.linear(x, 8).scatter(1, torch.zeros(3, 2, dtype=torch.long), n.linear(x, 2)), 3),
    dynamic=STATIC,
)
case(
    "index_add index_copy index_fill",
    "ffn:8 ffn:8 ffn:8",
    SEQUENCE,
    lambda n, x: (
        n.linear(n.linear(x, 8).index_add(1, torch.tensor([0, 2]), n.linear(x, 8)[:, :2]), 3)
        + n.linear(n.linear(x, 8).index_copy(1, torch.tensor([0, 2]), n.linear(x, 8)[:, :2]), 3)
        + n.linear(n.linear(x, 8).index_fill(1, torch.tensor([0, 2]), 0.5), 3)
    ),
)
case(
    "index_put",
    "ffn:8",
    SEQUENCE,
    lambda n, x: n.linear(n.linear(x, 8).index_put([torch.tensor([0, 2])], n.linear(x, 8)[:2]), 3),
    dynamic=STATIC,
)
case(
    "index_put/features",
    "",
    ROWS,
    lambda n, x: n.linear(n.linear(x, 8).index_put([torch.tensor([0, 2]), torch.tensor([1, 1])], torch.ones(2, dtype=x.dtype)), 3),
    dynamic=STATIC,
)
case(
    "_unsafe_index_put",
    "ffn:8",
    SEQUENCE,
    lambda n, x: n.linear(aten._unsafe_index_put(n.linear(x, 8), [torch.tensor([0, 2])], n.linear(x, 8)[:2]), 3),
    dynamic=STATIC,
)
case("sort", "", ROWS, lambda n, x: n.linear(n.linear(x, 8).sort(-1).values, 3))
case("sort/of another axis", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8).sort(1).values, 3))
case("topk", "other:8~", ROWS, lambda n, x: n.linear(n.linear(x, 8).topk(3, -1).values, 3), least=3)
case("topk/the smallest", "other:8~", ROWS, lambda n, x: n.linear(n.linear(x, 8).topk(3, -1, False).values, 3), least=3)
case("topk/of another axis", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.linear(x, 8).topk(2, 1).values, 3))
case(
    "argsort msort",
    "ffn:8",
    SEQUENCE,
    lambda n, x: n.linear(n.linear(x, 8).argsort(1) + aten.msort(n.linear(x, 8).transpose(0, 1)).transpose(0, 1), 3),
)
case("one_hot", "", TOKENS, lambda n, x: n.linear(F.one_hot(x, 5).double(), 3))
case("isin", "", ROWS, lambda n, x: n.linear(torch.isin(n.linear(x, 8).round(), torch.tensor([0.0, 1.0], dtype=x.dtype)).double(), 3))
case(
    "bincount histc",
    "ffn:8",
    ROWS,
    lambda n, x: (
        n.linear(n.linear(x, 8), 3)
        + torch.histc(n.linear(x, 5), 3, -2.0, 2.0)
        + aten.bincount((n.linear(x, 5) > 0).long().flatten(), None, 3)[:3]
    ),
)

case(
    "nonzero masked_select _unique2 unique_dim",
    "ffn:4",
    ROWS,
    lambda n, x: (
        n.linear(n.linear(x, 4), 2)
        + (n.linear(x, 3) > 0).nonzero().sum()
        + n.linear(x, 3).masked_select(x[:, :3] > 0).sum()
        + n.linear(x, 3).round().unique().sum()
        + n.linear(x, 3).unique(dim=0).sum()
    ),
)

# -- drawing random numbers ------------------------------------------------------------------------

case(
    "rand randn randint",
    "ffn:8",
    ROWS,
    lambda n, x: (
        n.linear(n.linear(x, 8).relu(), 3)
        + n.linear(n.linear(x, 5) + torch.rand(5, dtype=x.dtype) + torch.randn(5, dtype=x.dtype) + torch.randint(4, (5,)), 3)
    ),
)
case(
    "rand_like randn_like randint_like",
    "ffn:8",
    ROWS,
    lambda n, x: (
        n.linear(n.linear(x, 8), 3)
        + n.linear((lambda h: h * torch.rand_like(h) + torch.randn_like(h) + torch.randint_like(h, 4))(n.linear(x, 5)), 3)
    ),
)
case(
    "bernoulli normal uniform exponential",
    "ffn:8",
    ROWS,
    lambda n, x: (
        n.linear(n.linear(x, 8), 3)
        + n.linear(
            n.linear(x, 5).sigmoid().bernoulli()
            + aten.normal(n.linear(x, 5))
            + aten.uniform(n.linear(x, 5))
            + aten.exponential(n.linear(x, 5)),
            3,
        )
    ),
)
case(
    "dropout native_dropout alpha_dropout feature_dropout",
    "ffn:8",
    ROWS,
    lambda n, x: (
        n.linear(n.linear(x, 8), 3)
        + n.linear(
            sum(aten.native_dropout(n.linear(x, 5), 0.5, True))
            + aten.dropout(n.linear(x, 5), 0.5, True)
            + aten.alpha_dropout(n.linear(x, 5), 0.5, True)
            + aten.feature_dropout(n.linear(x, 5), 0.5, True),
            3,
        )
    ),
)
case("randperm", "ffn:8", ROWS, lambda n, x: n.linear(n.linear(x, 8), 3) + n.linear(n.linear(x, 5)[:, torch.randperm(5)], 3))

# -- recurrent layers ------------------------------------------------------------------------------

case("lstm", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.layer(lambda: nn.LSTM(6, 8, batch_first=True))(x)[0], 3))
case(
    "lstm/two layers, both directions",
    "ffn:8",
    SEQUENCE,
    lambda n, x: n.linear(n.layer(lambda: nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True))(x)[0], 3),
)
case("lstm/last state", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.layer(lambda: nn.LSTM(6, 8, batch_first=True))(x)[1][0][-1], 3))
case("lstm/projected", "", SEQUENCE, lambda n, x: n.linear(n.layer(lambda: nn.LSTM(6, 8, batch_first=True, proj_size=5))(x)[0], 3))
case("gru", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.layer(lambda: nn.GRU(6, 8, batch_first=True))(x)[0], 3))
case(
    "gru/after a hidden layer, without bias",
    "ffn:7 ffn:8",
    SEQUENCE,
    lambda n, x: n.linear(n.layer(lambda: nn.GRU(7, 8, batch_first=True, bias=False))(n.linear(x, 7))[0], 3),
)
case("rnn_tanh", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.layer(lambda: nn.RNN(6, 8, batch_first=True))(x)[0], 3))
case("rnn_relu", "ffn:8", SEQUENCE, lambda n, x: n.linear(n.layer(lambda: nn.RNN(6, 8, batch_first=True, nonlinearity="relu"))(x)[0], 3))
case("lstm_cell", "ffn:8", ROWS, lambda n, x: n.linear(n.layer(lambda: nn.LSTMCell(4, 8))(x)[0], 3))
case("gru_cell", "ffn:8", ROWS, lambda n, x: n.linear(n.layer(lambda: nn.GRUCell(4, 8))(x), 3))
case("rnn_tanh_cell", "ffn:8", ROWS, lambda n, x: n.linear(n.layer(lambda: nn.RNNCell(4, 8))(x), 3))
case("rnn_relu_cell", "ffn:8", ROWS, lambda n, x: n.linear(n.layer(lambda: nn.RNNCell(4, 8, nonlinearity="relu"))(x), 3))
case(
    "gru_cell/from a state",
    "ffn:8",
    ROWS,
    lambda n, x: n.linear((lambda cell: cell(x, cell(x, n.linear(x, 8))))(n.layer(lambda: nn.GRUCell(4, 8))), 3),
)


def put_where_a_mask_is(mask: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Net, Tensor], Tensor]:
    def fn(n: Net, x: Tensor) -> Tensor:
        h = n.linear(x, 8)
        return n.linear(h.masked_scatter(mask(x, h), n.linear(x.flatten(0, 1), 8)), 3)

    return fn


case("masked_scatter", "ffn:8", SEQUENCE, put_where_a_mask_is(lambda x, _: x[..., :1] > 0), dynamic=STATIC)
case("masked_scatter/expanded", "ffn:8", SEQUENCE, put_where_a_mask_is(lambda x, h: (x[..., :1] > 0).expand_as(h)), dynamic=STATIC)
case("masked_scatter/position by position", "", SEQUENCE, put_where_a_mask_is(lambda _, h: h > 0), dynamic=STATIC)


# -- complex numbers -----------------------------------------------------------------------------


def turned(n: Net, x: Tensor) -> Tensor:
    """Rotary embedding in complex numbers: pairs of features go together."""
    z = torch.view_as_complex(n.linear(x, 8).reshape(3, 4, 2))
    z = z * torch.polar(torch.ones(4, dtype=x.dtype), n.parameter(4))
    return n.linear(torch.view_as_real(z).flatten(-2), 3)


case("view_as_complex polar view_as_real", "ffn:4", ROWS, turned, dynamic=STATIC)


def parts(n: Net, x: Tensor) -> Tensor:
    z = torch.complex(n.linear(x, 4), n.linear(x, 4))
    angle = z.angle()
    z = torch.ops.aten.conj_physical(torch.ops.aten._conj(z) * z).conj()
    z = torch.ops.aten._neg_view(z).resolve_conj().resolve_neg()
    return n.linear(z.real, 3) + n.linear(z.imag, 3) + n.linear(angle, 3)


case("complex conj_physical _conj _neg_view resolve_conj resolve_neg real imag angle", "ffn:4", ROWS, parts, zeroing=False)


def spectra(apply: Callable[[Tensor], Tensor], *back: Callable[[Tensor], Tensor]) -> Callable[[Net, Tensor], Tensor]:
    def fn(n: Net, x: Tensor) -> Tensor:
        h = apply(n.linear(x, 4).transpose(1, 2))
        for step in back:
            h = step(h)
        return n.linear(torch.view_as_real(h).sum(-1).transpose(1, 2) if h.is_complex() else h.transpose(1, 2), 3)

    return fn


for _name, _steps in {
    "fft_fft fft_ifft": (torch.fft.fft, torch.fft.ifft),
    "fft_rfft fft_irfft": (torch.fft.rfft, torch.fft.irfft),
    "fft_hfft fft_ihfft": (torch.fft.ihfft, torch.fft.hfft),
}.items():
    case(_name, "ffn:4", SEQUENCE, spectra(*_steps), zeroing=False, dynamic=STATIC)

for _name, _steps in {
    "fft_fft2 fft_ifft2": (torch.fft.fft2, torch.fft.ifft2),
    "fft_rfft2 fft_irfft2": (torch.fft.rfft2, torch.fft.irfft2),
    "fft_fftn fft_ifftn": (torch.fft.fftn, torch.fft.ifftn),
    "fft_rfftn fft_irfftn": (torch.fft.rfftn, torch.fft.irfftn),
}.items():
    case(_name, "", SEQUENCE, spectra(*_steps), zeroing=False, dynamic=STATIC)
