"""One small network per coupling pattern, with the groups that must be prunable in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from nets import Net, tensor
from op_table import IMAGE, ROWS, SEQUENCE, SIGNAL, STATIC, Case, heads, merged
from torch import Tensor, nn
from torch.nn import functional as F

PATTERNS: list[Case] = []

Pattern = Callable[..., Any]


def pattern(groups: str, inputs: tuple[Tensor, ...], **options: Any) -> Callable[[Pattern], Pattern]:
    def add(fn: Pattern) -> Pattern:
        PATTERNS.append(Case(fn.__name__, groups, inputs, fn, **options))
        return fn

    return add


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return merged(F.scaled_dot_product_attention(q, k, v))


def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    return merged((q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ v)


def qkv(n: Net, x: Tensor, width: int = 8, count: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return heads(n.linear(x, width), count), heads(n.linear(x, width), count), heads(n.linear(x, width), count)


# -- residuals and gates ---------------------------------------------------------------------------


@pattern("residual:6 ffn:8", ROWS)
def residual(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 6)
    return n.linear(h + n.linear(F.gelu(n.linear(h, 8)), 6), 3)


@pattern("ffn:8", ROWS)
def residual_on_the_input(n: Net, x: Tensor) -> Tensor:
    return n.linear(x + n.linear(F.relu(n.linear(x, 8)), 4), 3)


@pattern("ffn:8", ROWS)
def residual_to_the_output(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 6)
    return h + n.linear(F.relu(n.linear(h, 8)), 6)


@pattern("residual:6~ ffn:8", ROWS)
def residual_with_norms(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 6)
    h = h + n.linear(F.gelu(n.linear(n.layer(lambda: nn.LayerNorm(6))(h), 8)), 6)
    return n.linear(n.layer(lambda: nn.RMSNorm(6))(h), 3)


@pattern("ffn:8", ROWS)
def gated_product(n: Net, x: Tensor) -> Tensor:
    return n.linear(F.silu(n.linear(x, 8)) * n.linear(x, 8), 3)


@pattern("ffn:8", ROWS)
def gate_and_up_fused(n: Net, x: Tensor) -> Tensor:
    gate, up = n.linear(x, 16).chunk(2, -1)
    return n.linear(F.silu(gate) * up, 3)


@pattern("ffn:8", ROWS)
def gate_and_up_interleaved(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 16)
    return n.linear(F.silu(h[..., ::2]) * h[..., 1::2], 3)


@pattern("residual:6", ROWS)
def layer_scale(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 6)
    return n.linear(h + n.parameter(6) * n.linear(h, 6), 3)


@pattern("ffn:6", ROWS)
def highway(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 6)
    g = torch.sigmoid(n.linear(h, 6))
    return n.linear(g * n.linear(h, 6) + (1 - g) * h, 3)


@pattern("conv:8 conv:4", IMAGE)
def squeeze_and_excitation(n: Net, x: Tensor) -> Tensor:
    h = n.conv(x, 8)
    gate = torch.sigmoid(n.conv(F.relu(n.conv(h.mean((2, 3), keepdim=True), 4)), 8))
    return n.conv(h * gate, 2)


@pattern("conv:8 ffn:4", IMAGE)
def squeeze_and_excitation_by_linears(n: Net, x: Tensor) -> Tensor:
    h = n.conv(x, 8)
    gate = torch.sigmoid(n.linear(F.relu(n.linear(F.adaptive_avg_pool2d(h, 1).flatten(1), 4)), 8))
    return n.conv(h * gate[:, :, None, None], 2)


@pattern("", IMAGE)
def channel_attention_by_neighbours(n: Net, x: Tensor) -> Tensor:
    h = n.conv(x, 8)
    gate = n.conv(h.mean((2, 3))[:, None], 1, 3, rank=1, padding=1)
    return n.conv(h * gate[:, 0, :, None, None], 2)


@pattern("ffn:4 ffn:5 ffn:6", ROWS)
def dense_concatenation(n: Net, x: Tensor) -> Tensor:
    features = [x]
    for width in (4, 5, 6):
        features.append(F.relu(n.linear(torch.cat(features, -1), width)))
    return n.linear(torch.cat(features, -1), 3)


@pattern("conv:4 conv:8 conv:4", IMAGE)
def u_net(n: Net, x: Tensor) -> Tensor:
    a = F.relu(n.conv(x, 4, 3, padding=1))
    b = F.relu(n.conv(F.max_pool2d(a, 2), 8, 3, padding=1))
    up = n.conv(b, 4, 2, transposed=True, stride=2)
    return n.conv(torch.cat([up, a], 1), 2)


@pattern("conv:8 ffn:6", IMAGE)
def feature_modulation(n: Net, x: Tensor) -> Tensor:
    h = n.conv(x, 8)
    scale, shift = n.linear(F.relu(n.linear(x.mean((2, 3)), 6)), 16).chunk(2, -1)
    return n.conv(h * scale[..., None, None] + shift[..., None, None], 2)


# -- attention -------------------------------------------------------------------------------------

MULTI_HEAD = "heads:2 head_dim:4 head_dim:4"


@pattern(MULTI_HEAD, SEQUENCE)
def attention_by_matmul_and_softmax(n: Net, x: Tensor) -> Tensor:
    return n.linear(eager(*qkv(n, x)), 3)


@pattern(MULTI_HEAD, SEQUENCE)
def qkv_fused_one_after_another(n: Net, x: Tensor) -> Tensor:
    q, k, v = (heads(part, 2) for part in n.linear(x, 24).chunk(3, -1))
    return n.linear(sdpa(q, k, v), 3)


@pattern("head_dim:4 heads:2", SEQUENCE)
def qkv_fused_as_an_axis(n: Net, x: Tensor) -> Tensor:
    q, k, v = n.linear(x, 24).reshape(-1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return n.linear(sdpa(q, k, v), 3)


@pattern(MULTI_HEAD, SEQUENCE)
def qkv_fused_within_heads(n: Net, x: Tensor) -> Tensor:
    q, k, v = n.linear(x, 24).view(-1, 5, 2, 12).transpose(1, 2).chunk(3, -1)
    return n.linear(sdpa(q, k, v), 3)


@pattern("head_dim:4 heads:2", SEQUENCE)
def qkv_fused_within_heads_as_an_axis(n: Net, x: Tensor) -> Tensor:
    fused = n.linear(x, 24).view(-1, 5, 2, 3, 4)
    q, k, v = (fused[..., i, :].transpose(1, 2) for i in range(3))
    return n.linear(sdpa(q, k, v), 3)


@pattern(MULTI_HEAD, SEQUENCE)
def qkv_sliced_from_one_weight(n: Net, x: Tensor) -> Tensor:
    weight, bias = n.parameter(24, 6), n.parameter(24)
    q, k, v = (heads(F.linear(x, weight[i : i + 8], bias[i : i + 8]), 2) for i in (0, 8, 16))
    return n.linear(sdpa(q, k, v), 3)


@pattern("head_dim:2 heads:2 heads:2 head_dim:2", SEQUENCE)
def grouped_queries_fused_and_split(n: Net, x: Tensor) -> Tensor:
    q, k, v = n.linear(x, 16).split([8, 4, 4], -1)
    return n.linear(sdpa(heads(q, 4), heads(k, 2).repeat_interleave(2, 1), heads(v, 2).repeat_interleave(2, 1)), 3)


@pattern("head_dim:4 heads:2 query_heads:3 head_dim:4", SEQUENCE)
def grouped_queries_expanded(n: Net, x: Tensor) -> Tensor:
    def repeated(t: Tensor) -> Tensor:
        return t[:, :, None].expand(-1, 2, 3, 5, 4).reshape(-1, 6, 5, 4)

    return n.linear(sdpa(heads(n.linear(x, 24), 6), repeated(heads(n.linear(x, 8), 2)), repeated(heads(n.linear(x, 8), 2))), 3)


@pattern("heads:2 head_dim:2 head_dim:2 heads:3", SEQUENCE)
def grouped_queries_tiled(n: Net, x: Tensor) -> Tensor:
    k, v = (heads(n.linear(x, 4), 2).repeat(1, 3, 1, 1) for _ in range(2))
    return n.linear(sdpa(heads(n.linear(x, 12), 6), k, v), 3)


@pattern("head_dim:2 query_heads:6 head_dim:2", SEQUENCE)
def one_key_for_all_queries(n: Net, x: Tensor) -> Tensor:
    q = heads(n.linear(x, 12), 6)
    k, v = (n.linear(x, 2)[:, None].expand(-1, 6, -1, -1) for _ in range(2))
    return n.linear(sdpa(q, k, v), 3)


@pattern("head_dim:4 heads:2 query_heads:2", SEQUENCE)
def grouped_queries_fused_within_groups(n: Net, x: Tensor) -> Tensor:
    fused = n.linear(x, 32).view(-1, 5, 2, 4, 4)
    q = fused[:, :, :, :-2].flatten(2, 3).transpose(1, 2)
    k, v = (fused[:, :, :, [i]].expand(-1, 5, 2, 2, 4).flatten(2, 3).transpose(1, 2) for i in (-2, -1))
    return n.linear(sdpa(q, k, v), 3)


@pattern(MULTI_HEAD, (tensor(3, 5, 6), tensor(3, 7, 4, seed=2)))
def cross_attention(n: Net, x: Tensor, memory: Tensor) -> Tensor:
    return n.linear(sdpa(heads(n.linear(x, 8), 2), heads(n.linear(memory, 8), 2), heads(n.linear(memory, 8), 2)), 3)


@pattern("head_dim:2 heads:2 head_dim:4", SEQUENCE)
def rotary_halves(n: Net, x: Tensor) -> Tensor:
    angle = torch.arange(5)[:, None] * n.buffer(2)
    angle = torch.cat([angle, angle], -1)

    def rotate(t: Tensor) -> Tensor:
        return t * angle.cos() + torch.cat([-t[..., 2:], t[..., :2]], -1) * angle.sin()

    q, k, v = qkv(n, x)
    return n.linear(sdpa(rotate(q), rotate(k), v), 3)


@pattern("heads:2 head_dim:2 head_dim:4", SEQUENCE)
def rotary_with_constant_frequencies(n: Net, x: Tensor) -> Tensor:
    angle = torch.arange(5)[:, None] / 100 ** (torch.arange(0, 4, 2) / 4)
    angle = torch.cat([angle, angle], -1)

    def rotate(t: Tensor) -> Tensor:
        return t * angle.cos() + torch.cat([-t[..., 2:], t[..., :2]], -1) * angle.sin()

    q, k, v = qkv(n, x)
    return n.linear(sdpa(rotate(q), rotate(k), v), 3)


@pattern("head_dim:2 heads:2 head_dim:4", SEQUENCE)
def rotary_interleaved(n: Net, x: Tensor) -> Tensor:
    angle = (torch.arange(5)[:, None] * n.buffer(2)).repeat_interleave(2, -1)

    def rotate(t: Tensor) -> Tensor:
        return t * angle.cos() + torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(-2) * angle.sin()

    q, k, v = qkv(n, x)
    return n.linear(sdpa(rotate(q), rotate(k), v), 3)


@pattern("head_dim:2 heads:2 head_dim:4 head_dim:8", SEQUENCE)
def rotary_of_a_part(n: Net, x: Tensor) -> Tensor:
    angle = torch.arange(5)[:, None] * n.buffer(2)
    angle = torch.cat([angle, angle], -1)

    def rotate(t: Tensor) -> Tensor:
        turned, rest = t[..., :4], t[..., 4:]
        turned = turned * angle.cos() + torch.cat([-turned[..., 2:], turned[..., :2]], -1) * angle.sin()
        return torch.cat([turned, rest], -1)

    q, k, v = qkv(n, x, 16)
    return n.linear(sdpa(rotate(q), rotate(k), v), 3)


@pattern("head_dim:4~ heads:2 head_dim:4", SEQUENCE)
def norms_on_queries_and_keys(n: Net, x: Tensor) -> Tensor:
    q, k, v = qkv(n, x)
    return n.linear(sdpa(n.layer(lambda: nn.RMSNorm(4))(q), n.layer(lambda: nn.LayerNorm(4))(k), v), 3)


@pattern(MULTI_HEAD, SEQUENCE)
def relative_position_bias_table(n: Net, x: Tensor) -> Tensor:
    place = (torch.arange(5)[:, None] - torch.arange(5)[None] + 4).flatten()
    bias = n.parameter(9, 2)[place].view(5, 5, 2).permute(2, 0, 1)
    return n.linear(eager(*qkv(n, x), bias[None]), 3)


@pattern(MULTI_HEAD, SEQUENCE)
def relative_position_embedding(n: Net, x: Tensor) -> Tensor:
    bias = n.layer(lambda: nn.Embedding(9, 2))(torch.arange(5)[:, None] - torch.arange(5)[None] + 4)
    return n.linear(eager(*qkv(n, x), bias.permute(2, 0, 1)[None]), 3)


@pattern(MULTI_HEAD, SEQUENCE)
def slopes_per_head(n: Net, x: Tensor) -> Tensor:
    slopes = torch.tensor([0.5, 0.25], dtype=x.dtype)
    return n.linear(eager(*qkv(n, x), slopes[:, None, None] * torch.arange(5)), 3)


@pattern(MULTI_HEAD, SEQUENCE)
def heads_merged_with_the_batch(n: Net, x: Tensor) -> Tensor:
    q, k, v = (t.reshape(-1, 5, 4) for t in qkv(n, x))
    y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
    return n.linear(merged(y.view(-1, 2, 5, 4)), 3)


@pattern(MULTI_HEAD, SEQUENCE, zeroing=False)
def linear_attention(n: Net, x: Tensor) -> Tensor:
    q, k, v = qkv(n, x)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return n.linear(merged((q @ (k.transpose(-1, -2) @ v)) / (q @ k.sum(-2)[..., None])), 3)


@pattern("heads:2 head_dim:4 head_dim:4~", SEQUENCE)
def attention_across_channels(n: Net, x: Tensor) -> Tensor:
    q, k, v = qkv(n, x)
    mixed = (q.transpose(-1, -2) @ k).softmax(-1)
    return n.linear(merged((mixed @ v.transpose(-1, -2)).transpose(-1, -2)), 3)


@pattern("heads:2 head_dim:4 heads:4 head_dim:4", SEQUENCE)
def talking_heads(n: Net, x: Tensor) -> Tensor:
    q, k = heads(n.linear(x, 8), 2), heads(n.linear(x, 8), 2)
    weights = n.linear((q @ k.transpose(-1, -2)).permute(0, 2, 3, 1), 4).permute(0, 3, 1, 2)
    return n.linear(merged(weights.softmax(-1) @ heads(n.linear(x, 16), 4)), 3)


@pattern("heads:2 head_dim:3", SEQUENCE)
def torch_attention_on_the_input(n: Net, x: Tensor) -> Tensor:
    return n.layer(lambda: nn.MultiheadAttention(6, 2, batch_first=True))(x, x, x)[0]


@pattern("residual:8~ heads:2 head_dim:4 ffn:16", SEQUENCE)
def torch_encoder_layer(n: Net, x: Tensor) -> Tensor:
    return n.linear(n.layer(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))(n.linear(x, 8)), 3)


@pattern("conv:8 heads:2 head_dim:4 head_dim:4", IMAGE)
def attention_in_windows(n: Net, x: Tensor) -> Tensor:
    h = n.conv(x, 8)
    windows = h.view(-1, 8, 2, 3, 2, 3).permute(0, 2, 4, 3, 5, 1).reshape(-1, 9, 8)
    y = n.linear(sdpa(*qkv(n, windows)), 3)
    return y.view(-1, 2, 2, 3, 3, 3).permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, 6, 6)


# -- splits, joins and permutations ----------------------------------------------------------------


@pattern("ffn:2 ffn:3 ffn:4", ROWS)
def uneven_split_and_join(n: Net, x: Tensor) -> Tensor:
    a, b, c = n.linear(x, 9).split([2, 3, 4], -1)
    return n.linear(torch.cat([c.tanh(), a.sigmoid(), b], -1), 3)


@pattern("conv:2 conv:4 conv:2", IMAGE)
def channel_shuffle_between_grouped_convolutions(n: Net, x: Tensor) -> Tensor:
    h = n.conv(x, 8).view(-1, 2, 4, 6, 6).transpose(1, 2).reshape(-1, 8, 6, 6)
    return n.conv(n.conv(h, 8, 3, groups=4), 3)


@pattern("conv:4 conv:4 conv:4", IMAGE)
def half_of_the_channels_pass_by(n: Net, x: Tensor) -> Tensor:
    a, b = n.conv(x, 8).chunk(2, 1)
    h = torch.cat([a, n.conv(F.relu(b), 4)], 1)
    return n.conv(h, 3)


@pattern("conv:2", IMAGE)
def pixel_shuffle_upsampling(n: Net, x: Tensor) -> Tensor:
    return n.conv(F.relu(F.pixel_shuffle(n.conv(x, 8, 3, padding=1), 2)), 3)


@pattern("conv:2 ffn:8", IMAGE)
def patch_merging(n: Net, x: Tensor) -> Tensor:
    h = n.conv(x, 2).permute(0, 2, 3, 1)
    h = torch.cat([h[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
    return n.linear(F.gelu(n.linear(h, 8)), 3)


@pattern("conv:6 ffn:4", IMAGE)
def patches_and_class_token(n: Net, x: Tensor) -> Tensor:
    patches = n.conv(x, 6, 3, stride=3).flatten(2).transpose(1, 2)
    token = n.parameter(1, 1, 6).expand(patches.shape[0], -1, -1)
    h = torch.cat([token, patches], 1) + n.parameter(1, 5, 6)
    return n.linear(F.relu(n.linear(h[:, 0], 4)), 3)


@pattern("conv:8", IMAGE)
def channels_flattened_into_a_linear(n: Net, x: Tensor) -> Tensor:
    return n.linear(F.max_pool2d(F.relu(n.conv(x, 8, 3)), 2).flatten(1), 3)


@pattern("conv:4", IMAGE)
def channels_last_linear(n: Net, x: Tensor) -> Tensor:
    return n.linear(n.conv(x, 4).permute(0, 2, 3, 1), 3).permute(0, 3, 1, 2)


@pattern("ffn:6 other:3 ffn:4", ROWS)
def repeated_features_scaled(n: Net, x: Tensor) -> Tensor:
    return n.linear(n.linear(n.linear(x, 6).repeat_interleave(3, -1) * n.parameter(18), 4), 3)


@pattern("ffn:4 ffn:3", SEQUENCE)
def mixing_over_positions(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 4)
    h = n.linear(F.gelu(n.linear(h.transpose(1, 2), 3)), 5).transpose(1, 2)
    return n.linear(h, 2)


# -- single positions ------------------------------------------------------------------------------

PAIRS = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
CYCLES = torch.tensor([3, 0, 1, 2, 5, 6, 7, 4])


@pattern("ffn:8", ROWS)
def channels_reversed(n: Net, x: Tensor) -> Tensor:
    return n.linear(F.relu(n.linear(x, 8)).flip(-1), 3)


@pattern("ffn:4", ROWS)
def channels_added_to_their_mirror(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 8)
    return n.linear(h + h.flip(-1), 3)


@pattern("ffn:3~", ROWS)
def an_odd_number_of_channels_mirrored(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 7)
    return n.linear(F.layer_norm(h + h.flip(-1), (7,)), 3)


@pattern("ffn:8", ROWS)
def channels_rolled(n: Net, x: Tensor) -> Tensor:
    return n.linear(n.linear(x, 8).roll(3, -1), 3)


@pattern("ffn:2", ROWS)
def channels_added_to_what_is_rolled_by_two(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 8)
    return n.linear(h.tanh() + h.roll(2, -1), 3)


@pattern("conv:4 conv:8", IMAGE)
def windows_shifted(n: Net, x: Tensor) -> Tensor:
    h = n.conv(n.conv(x, 4).roll((1, 2), (2, 3)), 8)
    return n.conv(h.roll((-1, -2), (2, 3)), 2)


@pattern("ffn:8", ROWS)
def channels_in_a_constant_order(n: Net, x: Tensor) -> Tensor:
    return n.linear(F.relu(n.linear(x, 8))[:, CYCLES], 3)


@pattern("ffn:4 ffn:5", ROWS)
def channels_added_to_their_partner(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 8)
    return n.linear(n.linear(h + h[:, PAIRS], 5), 3)


@pattern("ffn:2", ROWS)
def channels_multiplied_around_cycles(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 8)
    return n.linear(h * h.index_select(1, CYCLES).sigmoid(), 3)


@pattern("conv:8", IMAGE)
def order_in_a_buffer(n: Net, x: Tensor) -> Tensor:
    h = n.conv(n.conv(x, 8)[:, n.indices(8)], 8, 3, groups=8)
    return n.conv(h, 2)


@pattern("ffn:5 other:3", ROWS)
def some_channels_chosen(n: Net, x: Tensor) -> Tensor:
    return n.linear(n.linear(x, 8).index_select(1, torch.tensor([6, 0, 3, 2, 7])), 3)


@pattern("ffn:5 ffn:4", ROWS)
def every_other_of_an_odd_number(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 9)
    return n.linear(h[:, ::2].tanh(), 3) + n.linear(h[:, 1::2], 3)


@pattern("head_dim:2 heads:4 head_dim:2", SEQUENCE)
def heads_in_a_constant_order(n: Net, x: Tensor) -> Tensor:
    q, k, v = qkv(n, x, 8, 4)
    order = torch.tensor([2, 0, 3, 1])
    return n.linear(sdpa(q[:, order], k[:, order], v.flip(1)), 3)


@pattern("conv:4 conv:2 conv:4", IMAGE)
def shuffle_by_the_operation(n: Net, x: Tensor) -> Tensor:
    h = F.channel_shuffle(n.conv(x, 8, groups=1), 4)
    return n.conv(n.conv(h.relu(), 8, 3, groups=2), 3)


@pattern("conv:2 conv:2 conv:3", IMAGE)
def shuffle_whose_groups_overlap(n: Net, x: Tensor) -> Tensor:
    h = n.conv(x, 24).view(-1, 4, 6, 6, 6).transpose(1, 2).reshape(-1, 24, 6, 6)
    return n.conv(n.conv(h, 12, groups=4), 3)


@pattern("ffn:8 other:3", ROWS)
def features_tiled(n: Net, x: Tensor) -> Tensor:
    return n.linear(n.linear(x, 8).repeat(1, 3) * n.parameter(24), 3)


@pattern("ffn:8", ROWS)
def gate_by_half_slices(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 16)
    return n.linear(h[..., 8:] * F.gelu(h[..., :8]), 3)


@pattern("ffn:6 ffn:4", ROWS)
def sums_of_all_pairs(n: Net, x: Tensor) -> Tensor:
    a, b = n.linear(x, 6), n.linear(x, 4)
    return n.linear(F.relu(a[:, :, None] + b[:, None, :]).flatten(1), 3)


@pattern("ffn:6 ffn:5", SEQUENCE)
def broadcast_against_missing_axes(n: Net, x: Tensor) -> Tensor:
    scale = n.linear(x.mean(1), 6)[:, None]
    h = n.linear(x, 6) * scale + n.parameter(1, 6) - n.buffer(1, 1, 6)
    return n.linear((h[..., None] * n.linear(x, 5)[:, :, None, :]).sum(1).flatten(1), 3)


# -- convolutions ----------------------------------------------------------------------------------


@pattern("residual:8 conv:16", IMAGE)
def inverted_residual(n: Net, x: Tensor) -> Tensor:
    h = n.conv(x, 8)
    wide = F.relu6(n.conv(F.relu6(n.conv(h, 16)), 16, 3, padding=1, groups=16))
    return n.conv(h + n.conv(wide, 8), 2)


@pattern("residual:2 residual:4", IMAGE)
def grouped_convolution_on_a_residual(n: Net, x: Tensor) -> Tensor:
    h = n.conv(x, 8)
    return n.conv(h + n.conv(h.relu(), 8, 3, padding=1, groups=4), 2)


@pattern("conv:8 conv:3 conv:3", IMAGE)
def shortcut_strided_and_padded_with_channels(n: Net, x: Tensor) -> Tensor:
    h = n.conv(x, 8, 3, padding=1)
    return n.conv(F.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3)) + n.conv(h.relu(), 14, 3, padding=1, stride=2), 2)


@pattern("conv:8~ conv:6", IMAGE, zeroing=False)
def standardised_weights(n: Net, x: Tensor) -> Tensor:
    weight = n.parameter(6, 8, 3, 3)
    weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
    return n.conv(F.conv2d(n.conv(x, 8), weight), 2)


@pattern("conv:8", IMAGE)
def convolution_weight_transposed(n: Net, x: Tensor) -> Tensor:
    return n.conv(F.conv2d(x, n.parameter(3, 8, 3, 3).transpose(0, 1)), 2)


@pattern("conv:8", SIGNAL)
def signal_with_transposed_convolution(n: Net, x: Tensor) -> Tensor:
    return n.conv(F.relu(n.conv(x, 8, 4, rank=1, transposed=True, stride=2)), 2, rank=1)


@pattern("conv:8", IMAGE)
def batch_norm_and_a_buffer(n: Net, x: Tensor) -> Tensor:
    return n.conv(n.layer(lambda: nn.BatchNorm2d(8))(n.conv(x, 8)).relu() * n.buffer(8, 1, 1), 2)


@pattern("conv:4 norm_groups:3 conv:2~", IMAGE)
def group_norm_groups_and_channels_within(n: Net, x: Tensor) -> Tensor:
    h = n.conv(n.conv(x, 4), 6, 3, padding=1)
    return n.conv(n.layer(lambda: nn.GroupNorm(3, 6))(h).relu(), 2)


@pattern("conv:2 conv:3 conv:4", IMAGE)
def grouped_convolution_groups_and_channels_within(n: Net, x: Tensor) -> Tensor:
    return n.conv(n.conv(n.conv(x, 6).relu(), 12, 3, groups=3), 2)


@pattern("conv:4 conv:8", IMAGE)
def pixel_unshuffle_downsampling(n: Net, x: Tensor) -> Tensor:
    return n.conv(F.relu(n.conv(F.pixel_unshuffle(n.conv(x, 4), 2), 8)), 3)


@pattern("conv:4 conv:6", (tensor(2, 2, 4, 6, 6),))
def volume_with_batch_norm(n: Net, x: Tensor) -> Tensor:
    h = n.layer(lambda: nn.BatchNorm3d(4))(n.conv(x, 4, 3, rank=3, padding=1)).relu()
    return n.conv(F.max_pool3d(n.conv(h, 6, rank=3), 2), 2, rank=3)


@pattern("conv:4 conv:2 conv:2", SIGNAL)
def grouped_transposed_convolution(n: Net, x: Tensor) -> Tensor:
    h = n.conv(n.conv(x, 8, rank=1), 8, 4, rank=1, transposed=True, stride=2, groups=4)
    return n.conv(h.relu(), 2, rank=1)


@pattern("ffn:8 ffn:4 conv:6", ROWS)
def vector_to_image(n: Net, x: Tensor) -> Tensor:
    h = n.linear(F.relu(n.linear(x, 8)), 36).view(-1, 4, 3, 3)
    return n.conv(n.conv(h, 6, 2, transposed=True, stride=2).relu(), 2)


@pattern("conv:6 conv:6", IMAGE)
def instance_norm_and_slopes(n: Net, x: Tensor) -> Tensor:
    h = n.layer(lambda: nn.InstanceNorm2d(6, affine=True))(n.conv(x, 6, 3))
    return n.conv(n.layer(lambda: nn.PReLU(6))(n.conv(n.layer(lambda: nn.PReLU(6))(h), 6)), 2)


# -- recurrence ------------------------------------------------------------------------------------


@pattern("ffn:6", SEQUENCE)
def recurrent_units(n: Net, x: Tensor) -> Tensor:
    return n.linear(n.layer(lambda: nn.LSTM(6, 6, batch_first=True))(x)[0], 3)


@pattern("ffn:5 ffn:4", SEQUENCE)
def gated_recurrent_units_in_both_directions(n: Net, x: Tensor) -> Tensor:
    h = n.layer(lambda: nn.GRU(5, 4, batch_first=True, bidirectional=True))(n.linear(x, 5))[0]
    return n.linear(h, 3)


@pattern("ffn:4 ffn:5", SEQUENCE)
def last_state_of_a_recurrent_layer(n: Net, x: Tensor) -> Tensor:
    _, (h, _) = n.layer(lambda: nn.LSTM(6, 4, batch_first=True))(x)
    return n.linear(F.relu(n.linear(h[-1], 5)), 3)


@pattern("ffn:5", SEQUENCE, dynamic=STATIC)
def recurrent_cell_in_a_loop(n: Net, x: Tensor) -> Tensor:
    cell = n.layer(lambda: nn.GRUCell(6, 5))
    h = torch.zeros(x.shape[0], 5, dtype=x.dtype)
    for step in range(3):
        h = cell(x[:, step], h)
    return n.linear(h, 3)


# -- weights that are computed or shared -----------------------------------------------------------


@pattern("ffn:2 ffn:8", ROWS)
def low_rank_addition(n: Net, x: Tensor) -> Tensor:
    low = F.linear(F.linear(x, n.parameter(2, 4)), n.parameter(8, 2))
    return n.linear(F.relu(F.linear(x, n.parameter(8, 4)) + low * 0.5), 3)


@pattern("ffn:8 other:2", ROWS)
def low_rank_merged(n: Net, x: Tensor) -> Tensor:
    return n.linear(F.linear(x, n.parameter(8, 4) + n.parameter(8, 2) @ n.parameter(2, 4)), 3)


@pattern("ffn:8", ROWS, zeroing=False)
def weight_norm(n: Net, x: Tensor) -> Tensor:
    return n.linear(n.layer(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)))(x), 3)


@pattern("ffn:8", ROWS)
def spectral_norm(n: Net, x: Tensor) -> Tensor:
    return n.linear(n.layer(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)))(x), 3)


@pattern("other:8", ROWS)
def weight_used_transposed_too(n: Net, x: Tensor) -> Tensor:
    weight = n.parameter(8, 4)
    return F.linear(F.relu(F.linear(x, weight)), weight.T)


@pattern("ffn:8 other:8", ROWS)
def square_weight_used_both_ways(n: Net, x: Tensor) -> Tensor:
    weight = n.parameter(8, 8)
    return n.linear(F.linear(F.relu(F.linear(n.linear(x, 8), weight)), weight.T), 3)


@pattern("residual:6~", (torch.tensor([[0, 3, 1], [2, 2, 4]]),))
def tied_embedding(n: Net, x: Tensor) -> Tensor:
    table = n.parameter(5, 6)
    h = F.embedding(x, table)
    return F.linear(F.layer_norm(h + n.linear(h, 6), (6,)), table)


@pattern("residual:6~ other:6 ffn:4", (torch.tensor([[0, 3, 1], [2, 2, 4]]),))
def embeddings_with_positions(n: Net, x: Tensor) -> Tensor:
    h = F.embedding(x, n.parameter(5, 6)) + n.parameter(9, 6)[: x.shape[1]]
    h = h + n.linear(F.gelu(n.linear(h, 4)), 6)
    return n.linear(n.layer(lambda: nn.LayerNorm(6))(h), 5)


@pattern("residual:6 ffn:8", ROWS)
def module_called_twice(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 6)
    for _ in range(2):
        h = h + n.layer(lambda: nn.Linear(8, 6), name="down")(F.relu(n.layer(lambda: nn.Linear(6, 8), name="up")(h)))
    return n.linear(h, 3)


@pattern("ffn:8", ROWS)
def module_called_on_two_values(n: Net, x: Tensor) -> Tensor:
    up = n.layer(lambda: nn.Linear(4, 8), name="up")
    return n.linear(F.relu(up(x)) - F.relu(up(-x)), 3)


@pattern("ffn:8", ROWS)
def per_channel_buffers(n: Net, x: Tensor) -> Tensor:
    return n.linear((n.linear(x, 8) - n.buffer(8)) / (n.buffer(1, 8) ** 2 + 1), 3)


@pattern("ffn:8", ROWS)
def raw_parameters(n: Net, x: Tensor) -> Tensor:
    return F.linear(F.relu(x @ n.parameter(4, 8) + n.parameter(8)), n.parameter(3, 8), n.parameter(3))


@pattern("ffn:8", ROWS)
def parameters_stacked_and_selected(n: Net, x: Tensor) -> Tensor:
    weights = n.parameter(2, 8, 4)
    return n.linear(F.linear(x, weights[0]) * F.linear(x, weights[1]).sigmoid(), 3)


@pattern("other:4~ ffn:8", ROWS)
def soft_mixture_of_experts(n: Net, x: Tensor) -> Tensor:
    hidden = torch.einsum("bi,eio->beo", x, n.parameter(4, 4, 8)).relu()
    answers = torch.einsum("beo,eop->bep", hidden, n.parameter(4, 8, 3))
    return (answers * n.linear(x, 4).softmax(-1)[..., None]).sum(1)


@pattern("experts:4~ ffn:8", ROWS, least=2)
def neurons_of_experts_that_are_picked(n: Net, x: Tensor) -> Tensor:
    top, which = n.linear(x, 4).softmax(-1).topk(2, -1)
    gate = torch.zeros(x.shape[0], 4, dtype=x.dtype).scatter(-1, which, top)
    hidden = torch.einsum("bi,eio->beo", x, n.parameter(4, 4, 8)).relu()
    answers = torch.einsum("beo,eop->bep", hidden, n.parameter(4, 8, 3))
    return (answers * gate[..., None]).sum(1)


@pattern("ffn:6 ffn:5 ffn:7", ROWS)
def experts_one_after_another(n: Net, x: Tensor) -> Tensor:
    gate = n.linear(x, 3).softmax(-1)
    return sum(gate[:, i, None] * n.linear(F.relu(n.linear(x, width)), 3) for i, width in enumerate((6, 5, 7)))


@pattern("ffn:8", ROWS)
def parametrised_weight(n: Net, x: Tensor) -> Tensor:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight.tanh()

    layer = n.layer(lambda: nn.utils.parametrize.register_parametrization(nn.Linear(4, 8), "weight", Doubled()))
    return n.linear(layer(x), 3)


@pattern("heads:2 head_dim:4 head_dim:4", SEQUENCE)
def attention_by_einsum(n: Net, x: Tensor) -> Tensor:
    q, k, v = (n.linear(x, 8).view(-1, 5, 2, 4) for _ in range(3))
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 2).softmax(-1)
    return n.linear(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2), 3)


# -- what is written in place, reduced or read twice -----------------------------------------------


@pattern("ffn:3 ffn:5", ROWS)
def part_overwritten_in_place(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 8).clone()
    h[:, :3] = 0.5
    return n.linear(h, 3)


@pattern("ffn:3 ffn:5", ROWS)
def part_written_through_a_view(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 8).clone()
    h.view(-1, 1, 8)[:, 0, :3].add_(n.linear(x, 3))
    return n.linear(h, 3)


@pattern("ffn:8", ROWS)
def accumulated_in_place(n: Net, x: Tensor) -> Tensor:
    total = torch.zeros(x.shape[0], 8, dtype=x.dtype)
    for _ in range(3):
        total += F.relu(n.linear(x, 8))
    return n.linear(total, 3)


@pattern("ffn:8", SEQUENCE)
def running_sum_over_positions(n: Net, x: Tensor) -> Tensor:
    return n.linear(n.linear(x, 8).cumsum(1) / torch.arange(1, 6)[:, None], 3)


@pattern("ffn:8~", ROWS, least=2)
def centred_and_scaled_by_hand(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 8)
    return n.linear((h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True) + 1e-5).sqrt(), 3)


@pattern("ffn:8~", ROWS)
def root_mean_square_by_hand(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 8)
    return n.linear(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) * n.parameter(8), 3)


@pattern("ffn:8", ROWS)
def unit_length(n: Net, x: Tensor) -> Tensor:
    return n.linear(F.normalize(n.linear(x, 8), dim=-1), 3)


@pattern("ffn:8~", ROWS)
def largest_feature_subtracted(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 8)
    return n.linear((h - h.amax(-1, keepdim=True)).exp(), 3)


@pattern("ffn:4 ffn:4~", ROWS)
def several_outputs(n: Net, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    a, b = n.linear(x, 8).split(4, -1)
    return n.linear(a.relu(), 3), {"b": n.linear(b.softmax(-1), 2), "x": x * 2}


@pattern("ffn:8", ROWS)
def output_of_a_hidden_sum(n: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    h = n.linear(x, 8)
    return n.linear(h, 3), (h * n.parameter(8)).sum(-1)


@pattern("", ROWS)
def hidden_layer_returned(n: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    h = n.linear(x, 8)
    return n.linear(h, 3), h


@pattern("other:5", (tensor(3, 4), tensor(3, 4, seed=2)))
def distances_between_pairs(n: Net, x: Tensor, y: Tensor) -> Tensor:
    a, b = n.layer(lambda: nn.Linear(4, 5), name="same")(x), n.layer(lambda: nn.Linear(4, 5), name="same")(y)
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


@pattern("ffn:8", ROWS, dynamic=STATIC)
def sizes_written_as_numbers(n: Net, x: Tensor) -> Tensor:
    h = n.linear(x, 8).reshape(3, 1, 8).expand(3, 2, 8).reshape(6, 8)
    return n.linear(h + torch.zeros(6, 8, dtype=x.dtype), 3)


@pattern("ffn:8", ROWS)
def rows_split_at_a_computed_place(n: Net, x: Tensor) -> Tensor:
    """As routed experts split their rows: lengths are read from contents, the width shrinks."""
    first = (x[:, 0] > 0).sum()
    lengths = torch.stack([first, 3 - first]).tolist()
    for length in lengths:
        torch._check(length >= 0)
    low, high = n.linear(x, 8).split(lengths)
    return n.linear(low.relu(), 3).sum(0) + n.linear(high.tanh(), 3).sum(0)


# -- routing ---------------------------------------------------------------------------------------


def routed(n: Net, x: Tensor, count: int = 4) -> tuple[Tensor, Tensor]:
    """The two experts that each row goes to, and their weights."""
    return n.linear(x, count).softmax(-1).topk(2, -1)


@pattern("experts:4~ ffn:5", ROWS, least=2)
def experts_whose_weights_are_gathered(n: Net, x: Tensor) -> Tensor:
    weights, chosen = routed(n, x)
    h = torch.einsum("ri,rkio->rko", x, n.parameter(4, 4, 5)[chosen]).relu() + n.parameter(4, 5)[chosen]
    return (torch.einsum("rki,rkio->rko", h, n.parameter(4, 5, 3)[chosen]) * weights[..., None]).sum(1)


@pattern("experts:4~ ffn:5", ROWS, least=2)
def experts_weighted_where_they_are_chosen(n: Net, x: Tensor) -> Tensor:
    weights, chosen = routed(n, x)
    dense = torch.zeros(3, 4, dtype=x.dtype).scatter(1, chosen, weights)
    h = torch.einsum("ri,eio->reo", x, n.parameter(4, 4, 5)).relu()
    return (torch.einsum("rei,eio->reo", h, n.parameter(4, 5, 3)) * dense[..., None]).sum(1)


@pattern("experts:4~", ROWS, least=2)
def experts_told_apart_by_classes(n: Net, x: Tensor) -> Tensor:
    weights, chosen = routed(n, x)
    return (F.one_hot(chosen, 4).to(x.dtype) * weights[..., None]).sum(1) @ n.parameter(4, 3)


@pattern("", ROWS)
def the_number_of_an_expert_is_told(n: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    weights, chosen = routed(n, x)
    return (n.parameter(4, 3)[chosen] * weights[..., None]).sum(1), chosen


@pattern("", ROWS)
def the_number_of_an_expert_is_compared(n: Net, x: Tensor) -> Tensor:
    weights, chosen = routed(n, x)
    return (weights * (chosen == 1)).sum(-1, keepdim=True) + n.linear(x, 3)
