"""Every OffQ operation in plain torch: the oracle that other backends are tested against.

Shapes: T tokens, K input channels, N output channels, G groups of K / G channels, D head_size.
"""

from typing import Any

import torch
from torch import Tensor

from vllm_offq.format import unpack_int4
from vllm_offq.kernels.interface import ExpertLinear, Features, Weight
from vllm_offq.quantizer import dequantize, group_range, quantize
from vllm_offq.rotation import apply_block_hadamard

FEATURES = Features(kv_multiple=1, fused_inputs=True)


def prepare_weight(weight_packed: Tensor, weight_scale: Tensor, group_size: int) -> Weight:
    """From the checkpoint's form. weight_packed: [N, K / 2] uint8; weight_scale: [N, 1 or G]."""
    codes = unpack_int4(weight_packed)
    sums = codes.unflatten(-1, (-1, group_size)).sum(-1, dtype=torch.int32).float()
    return Weight(codes, weight_scale, sums)


def rotate_quantize(
    x: Tensor,
    group_size: int,
    rotation_block_size: int,
    clip_ratio: float,
    symmetric: bool,
    bits: int = 4,
) -> tuple[Tensor, Tensor, Tensor]:
    """Online block Hadamard (none if rotation_block_size is 0), then the group grid.

    x: [T, K]. Returns: codes [T, K] int8, scale and offset [T, G] float32.
    """
    x = x.float()
    if rotation_block_size:
        x = apply_block_hadamard(x, rotation_block_size)
    scale, offset = group_range(x, group_size, clip_ratio, symmetric, bits)
    return quantize(x, scale, offset, bits), scale, offset


def gemm(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor,
    weight: Weight,
) -> Tensor:
    """``y[t,n] = sum_g s_x[t,g] s_w[n,g] sum_k q_x q_w + sum_g o[t,g] s_w[n,g] r[n,g]``.

    codes [T, K] int8; scale, offset [T, G]; r are weight.sums. Returns: [T, N] float32. The inner
    sum is an exact integer (float32 holds it while a group is shorter than 2^18 channels).
    """
    num_groups = scale.shape[-1]
    weight_scale = weight.scale.float()
    per_group = weight_scale.shape[-1] > 1
    y = offset @ (weight.sums * weight_scale if per_group else weight.sums).T
    x_groups = codes.float().unflatten(-1, (num_groups, -1))
    w_groups = weight.codes.unflatten(-1, (num_groups, -1))
    for group in range(num_groups):
        accumulator = x_groups[:, group] @ w_groups[:, group].T.float()
        if per_group:
            accumulator *= weight_scale[:, group]
        y.addcmul_(accumulator, scale[:, group, None])
    return y if per_group else y * weight_scale[:, 0]


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    rotation_block_size: int,
    clip_ratio: float,
    symmetric: bool,
    bits: int = 4,
) -> Tensor:
    """Rotate, quantize, multiply, add bias. x: [..., K]. Returns: [..., N] in x's dtype.

    out_features is N: a backend may pad its weights; bits: 4 or 8, of the activations.
    """
    codes, scale, offset = rotate_quantize(
        x.flatten(0, -2), group_size, rotation_block_size, clip_ratio, symmetric, bits
    )
    y = gemm(codes, scale, offset, weight)
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], out_features)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``x / sqrt(mean(x^2) + epsilon) * weight`` in float32.

    x: [..., K]; weight: [K]. Returns: like x, rounded once.
    """
    inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
    return (x.float() * inverse * weight.float()).to(x.dtype)


def fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """rms_norm of x + residual, which is rounded after it; and that sum. Both in x's dtype."""
    total = (x.float() + residual.float()).contiguous()
    return rms_norm(total, weight, epsilon).to(x.dtype), total.to(x.dtype)


def rms_norm_linear(x: Tensor, norm_weight: Tensor, epsilon: float, *linear_inputs: Any) -> Tensor:
    """`linear` of rms_norm(x). linear_inputs: what it takes after x."""
    return linear(rms_norm(x, norm_weight, epsilon), *linear_inputs)


def fused_add_rms_norm_linear(
    x: Tensor, residual: Tensor, norm_weight: Tensor, epsilon: float, *linear_inputs: Any
) -> tuple[Tensor, Tensor]:
    """`linear` of the norm that fused_add_rms_norm returns, and its sum."""
    normalized, total = fused_add_rms_norm(x, residual, norm_weight, epsilon)
    return linear(normalized, *linear_inputs), total


def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(gate) * up`` in float32. x: [..., 2 I], gate and up. Returns: [..., I], x's dtype."""
    gate, up = x.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def silu_and_mul_linear(x: Tensor, *linear_inputs: Any) -> Tensor:
    """`linear` of silu_and_mul(x). x: [..., 2 K]; linear_inputs: what it takes after x."""
    return linear(silu_and_mul(x), *linear_inputs)


def experts(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: ExpertLinear, down: ExpertLinear
) -> Tensor:
    """A mixture of experts, ``y[t] = sum_k w[t,k] down_e(silu(gate_e(x[t])) * up_e(x[t]))``.

    x: [T, K]; topk_ids: [T, k] integers, e = topk_ids[t,k], negative: another rank's expert, which
    adds nothing; topk_weights: [T, k] float32; gate_up: [E, 2 I, K], the gates first; down:
    [E, K, I]. Returns: [T, K] in x's dtype, which also the linears return; summed in float32.
    """
    y = torch.zeros(x.shape[0], down.out_features, device=x.device)
    for expert in range(gate_up.weight.codes.shape[0]):
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        activated = silu_and_mul(linear(x[token], *gate_up.of(expert)))
        part = linear(activated, *down.of(expert)).float()
        y.index_add_(0, token, part * topk_weights[token, slot, None].float())
    return y.to(x.dtype)


def rotate_heads(x: Tensor, rotation: Tensor) -> Tensor:
    """Each head times the rotation of its KV head.

    x: [T, H, D]; rotation: [H_kv, D, D], H_kv divides H. Returns: [T, H, D] float32.
    """
    tokens, num_heads, head_size = x.shape
    grouped = x.float().unflatten(1, (rotation.shape[0], -1))
    rotated = torch.einsum("thgd,hde->thge", grouped, rotation.float())
    return rotated.reshape(tokens, num_heads, head_size)


def kv_page_bytes(head_size: int, group_size: int) -> int:
    """Bytes of one token of one KV head: codes of K and V, then float16 scales and offsets."""
    return head_size + 8 * (head_size // group_size)


def _pack_head(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """x: [..., D]. Returns: nibbles [..., D / 2] uint8 (channel d low, d + D / 2 high, the pair
    that rotary embeddings turn together) and [..., 2 G] float16, scales then offsets."""
    scale, offset = (part.half() for part in group_range(x, group_size))
    low, high = (quantize(x, scale.float(), offset.float()) + 8).view(torch.uint8).chunk(2, -1)
    return low | high << 4, torch.cat([scale, offset], -1)


def _unpack_head(packed: Tensor, parameters: Tensor) -> Tensor:
    codes = torch.cat([packed & 15, packed >> 4], -1).to(torch.int8) - 8
    return dequantize(codes, *parameters.chunk(2, -1))


def kv_store(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    group_size: int,
    rotation: Tensor | None = None,
) -> None:
    """Rotate the new tokens' keys, quantize, pack and scatter keys and values.

    key, value: [T, H_kv, D]; kv_cache: [blocks, H_kv, block_size, C] uint8, written in place, C
    bytes as in kv_page_bytes; slot_mapping: [T] int64, negative for padding; rotation:
    [H_kv, D, D] float32. How a backend arranges the bytes of one block and head is its own affair.
    """
    if rotation is not None:
        key = rotate_heads(key, rotation)
    valid = slot_mapping >= 0
    packed = [_pack_head(x[valid], group_size) for x in (key, value)]
    page = torch.cat(
        [codes for codes, _ in packed] + [params.view(torch.uint8) for _, params in packed], -1
    )
    slots, block_size = slot_mapping[valid], kv_cache.shape[2]
    kv_cache[slots // block_size, :, slots % block_size] = page


def kv_load(
    kv_cache: Tensor, blocks: Tensor, length: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """The first `length` tokens in the given blocks, dequantized.

    Returns: key and value, [H_kv, length, D] float32.
    """
    num_heads, content_bytes = kv_cache.shape[1], kv_cache.shape[3]
    head_size = content_bytes * group_size // (group_size + 8)
    page = kv_cache[blocks].transpose(0, 1).reshape(num_heads, -1, content_bytes)[:, :length]
    codes, parameters = page[..., :head_size], page[..., head_size:].contiguous()
    key_codes, value_codes = codes.chunk(2, -1)
    key_parameters, value_parameters = parameters.view(torch.float16).chunk(2, -1)
    return _unpack_head(key_codes, key_parameters), _unpack_head(value_codes, value_parameters)


def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    output: Tensor,
    scale: float,
    group_size: int,
    sliding_window: int | None = None,
    rotation: Tensor | None = None,
    max_query_len: int | None = None,
    logits_soft_cap: float | None = None,
    workspace: Tensor | None = None,
) -> None:
    """Causal attention of a ragged batch over packed pages.

    query: [T, H, D], rotated here like the keys; block_table: [R, B] int32; seq_lens: [R] int32,
    context length of each request, the new tokens included; query_start_loc: [R + 1] int32, row
    bounds; output: [T, H, D], written in place; sliding_window: how many last tokens, itself
    included, a token sees; rotation: [H_kv, D, D] float32; max_query_len: no request has more new
    tokens, for backends that must not look at query_start_loc; logits_soft_cap: c of
    c tanh(score / c), which takes the place of a score; workspace: [FEATURES.attention_workspace]
    float32 to write to, None: the backend allocates what it needs.
    """
    if rotation is not None:
        query = rotate_heads(query, rotation)
    bounds = query_start_loc.tolist()
    for request, length in enumerate(seq_lens.tolist()):
        start, end = bounds[request], bounds[request + 1]
        if end == start:
            continue
        num_blocks = -(-length // kv_cache.shape[2])
        key, value = kv_load(kv_cache, block_table[request, :num_blocks].long(), length, group_size)
        position = torch.arange(length - (end - start), length, device=query.device)[:, None]
        context = torch.arange(length, device=query.device)[None, :]
        visible = context <= position
        if sliding_window is not None:
            visible &= context > position - sliding_window
        new = query[start:end].float().transpose(0, 1)
        if not logits_soft_cap:
            attended = torch.nn.functional.scaled_dot_product_attention(
                new, key, value, attn_mask=visible, scale=scale, enable_gqa=True
            )
        else:
            key, value = (x.repeat_interleave(len(new) // len(x), 0) for x in (key, value))
            scores = new @ key.transpose(1, 2) * scale
            scores = logits_soft_cap * (scores / logits_soft_cap).tanh()
            attended = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value
        output[start:end] = attended.transpose(0, 1)
