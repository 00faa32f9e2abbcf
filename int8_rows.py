"""Rows of K and V in 8 bits: what a level is worth, rounding to levels, and back.

Where it sits: under the caches. K and V of the LLM may lie so in all tiers (`Settings.llm_kv`, cache.py), those of the
SLM in its own cache (`Settings.slm_kv`, full_cache.py). Rows are rounded where they are written, and move as they are.

A level is round((x - zero point) / scale), both for each sequence, layer, KV head and channel, K's and V's alike. Keys
have channels that are a hundred times as large as others, so one scale a token would lose the small ones; and the
largest are those that RoPE hardly turns, nearly constant over a text (Qwen2's biases), so what tells their tokens apart
is small beside the zero point. Both come from the prompt (`scales_of`): its range, and a quarter more, is 254 levels;
what a later token has beyond them is cut off. All numbers are taken to be finite.

Attention takes levels as they are. No softmax sees K's zero points, which add the same to every token's logit, and its
scales go into the query (`into_query`); V's scales and zero points meet the output, since weights sum to 1
(`onto_output`).

In a decode step's kernels nothing is left to do for each level of K: the query is rounded to 15 bits, which are two
numbers of 8 bits, and tensor cores multiply these with levels (`query_levels`, `level_products`); what that rounds is
a hundredth of what K lost to its own levels, two where a few channels are far larger. Levels of V are read in pairs, 16
bits as the tensor cores' loads want them, and two operations on bits make fp16 numbers of them (`value_pairs`): a level
at a time would be one load of a byte from shared memory each, and a conversion that runs at a quarter of the speed.
(Rounds of drafts, kernels_verify.py, still turn levels into numbers of the query's dtype.)

Shapes follow the legend in model.py.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

AT_ONCE = 1 << 24  # numbers of a prompt that are rounded together: in fp32 they take 64 MB, twice
LEVELS = 127  # to either side of zero
QUERY_LEVELS = 127 * 128  # of a query's largest number: 128 * high + low, high in -127..127, low in -64..63
SHORTEST = 100  # tokens of a prompt whose range is taken for that of what follows
FAINT = 1e-30  # a query whose largest number is below: its unit stays a normal fp32 number
ROOM = 1.25  # how much wider than in the prompt a channel's range may get
Scales = tuple[Tensor | None, Tensor | None]  # K's and V's, fp32 (..., 2, D), where rows are int8; else None


def check_prompts(name: str, lengths: list[int]) -> None:
    """ValueError if one is too short to give scales. name: of what would be in 8 bits."""
    if min(lengths) < SHORTEST:
        raise ValueError(f"{name} in 8 bits takes its scales from the prompt, which needs {SHORTEST} tokens; one has "
                         f"{min(lengths)}: leave it exact")  # fmt: skip


def scales_of(rows: Tensor) -> Tensor:
    """What one level is worth in each channel, and what level 0 stands for: (..., n, D) -> (..., 2, D) fp32."""
    low, high = (end.float() for end in rows.aminmax(dim=-2))
    scale = ((high - low) * (ROOM / (2 * LEVELS))).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.stack((scale, (low + high) / 2), -2)


def encode(rows: Tensor, scales: Tensor | None) -> Tensor:
    """Rows (..., D) as int8, scales (..., 2, D) broadcast over them; as they are if it is None."""
    if scales is None:
        return rows
    scale, zero = scales.unbind(-2)
    return ((rows.float() - zero) / scale).clamp(-LEVELS, LEVELS).round().to(torch.int8)


def decode(held: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What the levels stand for; the rows as they are if scales is None."""
    if scales is None:
        return held
    scale, zero = scales.unbind(-2)
    return (held * scale + zero).to(dtype)


def per_token(scales: Tensor | None) -> Tensor | None:
    """Scales of KV heads (..., 2, D), to be broadcast over their tokens' rows (..., n, D)."""
    return None if scales is None else scales.unsqueeze(-3)


def prompt_rows(made: Tensor, scales: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """K or V of a prompt, made (L, G, n, D), as a cache holds them: some layers, and their rows (L', G, n, D). scales
    (L, G, 2, D) are written; None: rows are as they are."""
    layers = max(1, AT_ONCE // made[0].numel())  # few launches for short prompts, little memory for long ones
    for part in (slice(first, first + layers) for first in range(0, len(made), layers)):
        if scales is None:
            yield part, made[part]
        else:
            scales[part] = scales_of(made[part])
            yield part, encode(made[part], per_token(scales[part]))


def into_query(query: Tensor, scales: Tensor | None) -> Tensor:
    """Query (B, T, H, D) whose products with K's levels are logits less a constant of their row; scales: K's,
    (B, G, 2, D); None: as it is."""
    if scales is None:
        return query
    grouped = query.float().unflatten(2, (scales.shape[1], -1)) * scales[:, None, :, :1]  # (B, T, G, H/G, D)
    return grouped.flatten(2, 3).to(query.dtype)


def rounded_query(query: Tensor, scales: Tensor | None) -> Tensor:
    """`into_query` in the 15 bits in which a decode step's kernels take it. (They keep all of them; here the query's
    dtype has the last word.)"""
    if scales is None:
        return query
    folded = into_query(query.float(), scales)
    unit = folded.abs().amax(-1, keepdim=True).clamp(min=FAINT) * (1 / QUERY_LEVELS)
    return ((folded / unit).round() * unit).to(query.dtype)


def onto_output(out: Tensor, scales: Tensor | None) -> Tensor:
    """Attention (B, T, H, D) on V's levels -> on V; scales: V's, (B, G, 2, D)."""
    if scales is None:
        return out
    scale, zero = scales[:, None].split(1, 3)  # (B, 1, G, 1, D) each
    return (out.float().unflatten(2, (scale.shape[2], -1)) * scale + zero).flatten(2, 3).to(out.dtype)


@triton.jit
def _nearest(number):
    """The whole number nearest to it, half to even as torch.round does: numbers near 1.5 * 2**23 have no fraction."""
    return (number + 12582912.0) - 12582912.0


@triton.jit
def levels(row, scale, zero, LEVELS: tl.constexpr):
    """`encode` inside a kernel, of numbers in fp32."""
    level = tl.minimum(tl.maximum(tl.div_rn(row - zero, scale), -LEVELS), LEVELS)
    return _nearest(level).to(tl.int8)


@triton.jit
def query_levels(query, scale, LEVELS: tl.constexpr = QUERY_LEVELS, FAINT: tl.constexpr = FAINT):
    """`rounded_query` inside a kernel, (ROWS, D) with K's scales (D,): high and low int8, unit (ROWS,) fp32; the query
    is (128 * high + low) * unit."""
    query = query.to(tl.float32) * scale
    unit = tl.maximum(tl.max(tl.abs(query), 1), FAINT) * (1 / LEVELS)
    level = _nearest(tl.div_rn(query, tl.broadcast_to(unit[:, None], query.shape))).to(tl.int32)
    high = (level + 64) >> 7
    return high.to(tl.int8), (level - (high << 7)).to(tl.int8), unit


@triton.jit
def level_products(high, low, key):
    """Of a query and keys (BLOCK, D), all levels: (ROWS, BLOCK) fp32, in units."""
    key = tl.trans(key)
    return (tl.dot(high, key) * 128 + tl.dot(low, key)).to(tl.float32)


@triton.jit
def value_pairs(pair, dtype: tl.constexpr):
    """Levels that were read two at a time, (BLOCK, D/2) int16: those of even channels and those of odd ones, in fp16,
    or in fp32 if that is the model's dtype."""
    # 0x6400 is 1024 in fp16, whose last bits are ones; and a level with its sign bit turned is 128 + level.
    even = ((pair & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
    odd = (((pair >> 8) & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
    if dtype == tl.float32:
        even, odd = even.to(tl.float32), odd.to(tl.float32)
    return even, odd


@triton.jit
def paired_output(out, scale_ptr, D: tl.constexpr):
    """`onto_output` inside a kernel, for sums over `value_pairs`, the even channels (D/2,) before the odd ones: the
    outputs and their channels. scale_ptr: of V's (2, D) of this KV head."""
    at = tl.arange(0, D)
    channel = at % (D // 2) * 2 + at // (D // 2)
    return out * tl.load(scale_ptr + channel) + tl.load(scale_ptr + D + channel), channel
