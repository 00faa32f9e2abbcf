"""Decode attention on a full cache in Triton: one new token a sequence, bound by the bytes of K and V.

Where it sits: the SLM's attention in a decode step (graph.py), and that of the full cache; kernels_eq6.py has the
LLM's. Each function here exists twice with one signature: the plain PyTorch twin (`..._torch`, which calls the truth in
kernels.py) and the Triton version (`..._triton`).

| function           | flow                                                        | paper             |
| ------------------ | ----------------------------------------------------------- | ----------------- |
| `decode_attention` | full cache: the rival, and nothing but the output           | vanilla attention |
| `scored_attention` | SLM: the same, and its row goes into the scores             | Eq. 1, Eq. 4      |

How the kernels work (flash decoding): the tokens of a sequence are cut into splits, one program takes one split of one
KV head with all the query heads that share it, so that each row of K and V is read once; a second kernel merges the
splits. Lengths are device tensors and the grid is that of the capacity, so one captured graph serves growing sequences;
programs beyond a length return at once. A group of query heads is padded to the 16 rows a matrix unit wants.

K and V may be int8 (int8_rows.py).

The row of the SLM needs the sum over all splits. Where nothing of the past goes into the scores (decay 0) and nobody
borrows the row, the first kernel writes its logits straight into `score`, the second the log of each head's sum into
`lse`, and whoever reads the scores computes 2 ** (score - lse) as it goes (kernels_scores.py). Both are less an anchor,
the log of the step before: the logits that count are then near 0, where 16 bits are precise.
Otherwise the logits lie in a scratch of one layer, and the second kernel makes them probabilities and adds them to the
scores.

Shapes follow the legend in model.py; decode drops the T dimension: query is (B, H, D).
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels
from int8_rows import Scales, level_products, onto_output, paired_output, query_levels, rounded_query, value_pairs
from kernels_scores import whole_loads

LOG2_E = math.log2(math.e)  # logits as powers of two: exp2 is one instruction
CHUNK = 2048  # tokens whose logits one program of the merge turns into probabilities
HALF_MAX = 65504.0  # the largest fp16: an anchor may be far away, and infinity would not fade


class Launch(NamedTuple):
    """tile: numbers in a tile of K; it and one of V are held `stages` - 1 times in shared memory. programs: how many
    are aimed at."""

    tile: int
    warps: int
    stages: int
    programs: int


# On an H100, 132 multiprocessors, with 16-bit queries, at 32 x 16,384, 64 x 2,048 and 4 x 16,384, in us:
#   FULL         378.6, 109.6 and 57.9 as (8192, 4, 3, 1056); so 366.5, 103.6 and 54.8
#   SCORED       108.4, 35.1 and 21.0 as (4096, 4, 4, 1056); so 107.9, 34.2 and 19.9
#   FULL_INT8    207.7, 69.7 and 40.5 as (8192, 4, 3, 1056); so 196.4, 62.5 and 39.5
#   SCORED_INT8  64.0, 26.4 and 16.1 with 1056 programs; so 62.8, 22.6 and 15.6
FULL = Launch(tile=4096, warps=2, stages=3, programs=660)  # 32 tokens at D = 128
SCORED = Launch(tile=4096, warps=2, stages=3, programs=660)
FULL_INT8 = Launch(tile=8192, warps=2, stages=3, programs=660)
SCORED_INT8 = Launch(tile=8192, warps=4, stages=3, programs=528)


# ---- The twins -------------------------------------------------------------------------------------------------------


def decode_attention_torch(
    query: Tensor, key: Tensor, value: Tensor, length: Tensor, scales: Scales = (None, None)
) -> Tensor:
    """query (B, H, D) on key, value (B, G, S, D); sequence b sees its first length[b] tokens, length (B,) int32.

    scales: K's and V's, (B, G, 2, D) each, if they are int8. Returns (B, H, D).
    """
    return _full_step(query, key, value, length, scales)[0]


def scored_attention_torch(
    query: Tensor, key: Tensor, value: Tensor, length: Tensor, score: Tensor, decay: float, row: Tensor | None = None,
    lse: Tensor | None = None, anchor: Tensor | None = None, scales: Scales = (None, None),
) -> Tensor:  # fmt: skip
    """`decode_attention`, and score = decay * score + attention row in place, on the tokens seen.

    score and row are (B, H, S) fp32; row, if given, takes the attention row itself (marginal tokens borrow it). With
    decay 0 the old score is not read. What lies beyond a length is neither read nor written, but for logits: where
    S is a multiple of 16 they may be written up to the next one.

    lse and anchor (B, H) fp32, if given: score, fp32 or fp16, takes the logits as powers of two and lse the base-2 log
    of each head's sum, both less anchor, which takes that log: the attention row is 2 ** (score - lse). That needs
    decay 0 and no row. Of int8 keys the logits lack what the zero points add to all of them.
    """
    assert lse is None or (decay == 0 and row is None), f"logits as scores, with decay {decay} or a row"
    out, probability = _full_step(query, key, value, length, scales)
    seen = (torch.arange(score.shape[-1], device=score.device) < length[:, None])[:, None].expand_as(score)
    if lse is not None:
        logit = _logits(rounded_query(query[:, None], scales[0]), key.to(query.dtype))
        total = logit.masked_fill(~seen, -torch.inf).logsumexp(-1) * LOG2_E
        shifted = logit * LOG2_E - anchor[..., None]
        if score.dtype == torch.float16:
            shifted = shifted.clamp(max=HALF_MAX)
        score.copy_(torch.where(seen, shifted, score))
        lse.copy_(total - anchor), anchor.copy_(total)
        return out
    old = decay * score if decay else torch.zeros_like(score)
    score.copy_(torch.where(seen, old + probability, score))
    if row is not None:
        row.copy_(torch.where(seen, probability, row))
    return out


def _full_step(
    query: Tensor, key: Tensor, value: Tensor, length: Tensor, scales: Scales
) -> tuple[Tensor, Tensor]:
    """Output (B, H, D) and row (B, H, S)."""
    query = rounded_query(query[:, None], scales[0])  # (B, 1, H, D)
    key, value = key.to(query.dtype), value.to(query.dtype)
    unseen = torch.arange(value.shape[2], device=value.device) >= length[:, None]  # (B, S)
    value = value.masked_fill(unseen[:, None, :, None], 0)  # unseen columns weigh 0, and 0 * NaN is NaN
    out, row = kernels.full_attention_step(query.transpose(1, 2), key, value, length.long() - 1)
    return onto_output(out.transpose(1, 2), scales[1])[:, 0], row


def _logits(query: Tensor, key: Tensor) -> Tensor:
    """query (B, 1, H, D) -> (B, H, S) fp32, as kernels.full_attention_block has them."""
    B, _, H, D = query.shape
    grouped = query.view(B, key.shape[1], -1, D)  # (B, G, H/G, D)
    return (grouped * D**-0.5 @ key.transpose(-1, -2)).float().view(B, H, -1)


# ---- The kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _full_split_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, length_ptr, logit_ptr, stat_ptr, acc_ptr, anchor_ptr, k_batch, k_head,
    v_batch, v_head, logit_batch, logit_head, scale, splits, size,
    G: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    SCORED: tl.constexpr, LSE: tl.constexpr, HALF_MAX: tl.constexpr, ALIGNED: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """One split of one KV head: max, sum and unscaled output of its ROWS query heads (GROUP of them are real).

    INT8: v_ptr has two levels in each number, and `acc` the even channels of a row before the odd ones.
    """
    pair, split = tl.program_id(0), tl.program_id(1)
    b, g = pair // G, pair % G
    row, dim = tl.arange(0, ROWS), tl.arange(0, D)
    WIDTH: tl.constexpr = D // 2 if INT8 else D  # numbers of a row of V
    column = tl.arange(0, WIDTH)
    real = row < GROUP
    query = tl.load(q_ptr + (pair * GROUP + row)[:, None] * D + dim, mask=real[:, None], other=0.0)  # (ROWS, D)
    length = tl.load(length_ptr + b)  # on its way together with the query
    if INT8:
        high, low, unit = query_levels(query, tl.load(k_scale_ptr + pair * 2 * D + dim))
        unit *= scale
    if LSE:
        anchor = tl.load(anchor_ptr + pair * GROUP + row, mask=real, other=0.0)
    start = split * size
    if start >= length:
        return
    keys = k_ptr + b.to(tl.int64) * k_batch + g * k_head
    values = v_ptr + b.to(tl.int64) * v_batch + g * v_head
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)  # summed up at the end: a sum over the warps waits for all of them
    acc, odd_acc = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    for at in range(start, tl.minimum(start + size, length), BLOCK):
        token = at + tl.arange(0, BLOCK)
        seen = token < length
        key = tl.load(keys + token[:, None] * D + dim, mask=seen[:, None], other=0.0)  # (BLOCK, D)
        if INT8:
            logit = level_products(high, low, key) * unit[:, None]  # (ROWS, BLOCK)
        else:
            logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        logit = tl.where(seen, logit, -float("inf"))
        if SCORED:
            line = b.to(tl.int64) * logit_batch + (g * GROUP + row) * logit_head
            kept = logit
            if LSE:
                kept = logit - anchor[:, None]
                if logit_ptr.dtype.element_ty == tl.float16:
                    kept = tl.minimum(kept, HALF_MAX)
            tl.store(logit_ptr + line[:, None] + token, kept.to(logit_ptr.dtype.element_ty),
                     mask=real[:, None] & (token < whole_loads(length, ALIGNED)))  # fmt: skip
        higher = tl.maximum(top, tl.max(logit, 1))
        weight = tl.exp2(logit - higher[:, None])
        shrink = tl.exp2(top - higher)
        value = tl.load(values + token[:, None] * WIDTH + column, mask=seen[:, None], other=0.0)
        if INT8:
            value, odd = value_pairs(value, query.dtype)
            odd_acc = odd_acc * shrink[:, None] + tl.dot(weight.to(odd.dtype), odd, input_precision="ieee")
        acc = acc * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        total = total * shrink[:, None] + weight
        top = higher
    stat = stat_ptr + (pair * GROUP + row) * 2 * splits + split
    tl.store(stat, top, mask=real)
    tl.store(stat + splits, tl.sum(total, 1), mask=real)
    part = (pair * splits + split).to(tl.int64) * GROUP + row
    tl.store(acc_ptr + part[:, None] * D + column, acc, mask=real[:, None])
    if INT8:
        tl.store(acc_ptr + part[:, None] * D + WIDTH + column, odd_acc, mask=real[:, None])


@triton.jit
def _merge_kernel(
    out_ptr, length_ptr, stat_ptr, acc_ptr, v_scale_ptr, logit_ptr, score_ptr, row_ptr, lse_ptr, anchor_ptr,
    score_batch, score_head, logit_head, splits, size, decay,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    SCORED: tl.constexpr, OLD: tl.constexpr, ROW: tl.constexpr, LSE: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one query head; each program turns one chunk of logits into probabilities, the first one
    writes the output. Scores are score * decay + probability (OLD), or the probability alone. LSE: the logits are the
    scores, and the log of their sum is written; there is one program a head then. INT8: the output gets V's scales and
    zero points."""
    head, chunk = tl.program_id(0), tl.program_id(1)  # head counts over the batch
    pair = head // GROUP
    b = pair // G
    split, dim = tl.arange(0, SPLITS), tl.arange(0, D)
    held = split < splits
    stat = stat_ptr + head * 2 * splits + split  # what lies beyond a length is no number; it is loaded, not used
    tops = tl.load(stat, mask=held, other=-float("inf"))
    sums = tl.load(stat + splits, mask=held, other=0.0)
    length = tl.load(length_ptr + b)
    if (chunk > 0) & (chunk * CHUNK >= length):
        return
    if SCORED:  # asked for before the sums over the splits, which take as long as they
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        seen = token < length
        logit = tl.load(logit_ptr + head.to(tl.int64) * logit_head + token, mask=seen, other=-float("inf"))
        line = b.to(tl.int64) * score_batch + (head % (G * GROUP)) * score_head + token
        if OLD:
            old = tl.load(score_ptr + line, mask=seen, other=0.0)
    live = held & (split * size < length)
    tops = tl.where(live, tops, -float("inf"))
    top = tl.max(tops, 0)
    shrink = tl.exp2(tops - top)
    total = tl.sum(tl.where(live, sums, 0.0) * shrink, 0)
    scale = 1 / total
    if chunk == 0:
        part = (pair * splits + split).to(tl.int64) * GROUP + head % GROUP
        acc = tl.load(acc_ptr + part[:, None] * D + dim, mask=live[:, None], other=0.0)  # (SPLITS, D)
        out = tl.sum(acc * shrink[:, None], 0) * scale
        channel = dim
        if INT8:
            out, channel = paired_output(out, v_scale_ptr + pair * 2 * D, D)
        tl.store(out_ptr + head * D + channel, out.to(out_ptr.dtype.element_ty))
    if LSE:
        log = top + tl.log2(total)
        tl.store(lse_ptr + head, log - tl.load(anchor_ptr + head))
        tl.store(anchor_ptr + head, log)
    if SCORED:
        probability = tl.exp2(logit - top) * scale
        if ROW:
            tl.store(row_ptr + line, probability, mask=seen)
        if OLD:
            probability += decay * old
        tl.store(score_ptr + line, probability, mask=seen)


# ---- The launchers ---------------------------------------------------------------------------------------------------


def split_size(pairs: int, tokens: int, block: int, programs: int) -> int:
    """Tokens of one split, a multiple of a tile's `block`: as few as keep to so many programs, so that a small batch
    still fills the GPU."""
    wanted = max(1, programs // pairs)
    return block * max(2, triton.cdiv(tokens, block * wanted))


def decode_attention_triton(
    query: Tensor, key: Tensor, value: Tensor, length: Tensor, scales: Scales = (None, None)
) -> Tensor:
    return _full_triton(query, key, value, length, scales)


def scored_attention_triton(
    query: Tensor, key: Tensor, value: Tensor, length: Tensor, score: Tensor, decay: float, row: Tensor | None = None,
    lse: Tensor | None = None, anchor: Tensor | None = None, scales: Scales = (None, None),
) -> Tensor:  # fmt: skip
    assert score.stride(2) == 1 and (row is None or row.stride() == score.stride())
    assert lse is None or (decay == 0 and row is None), f"logits as scores, with decay {decay} or a row"
    assert lse is None or (lse.is_contiguous() and anchor.is_contiguous())
    return _full_triton(query, key, value, length, scales, score, decay, row, lse, anchor)


def _full_triton(query, key, value, length, scales, score=None, decay=0.0, row=None, lse=None, anchor=None) -> Tensor:
    B, H, D = query.shape
    G, S = key.shape[1], key.shape[2]
    assert key.stride()[2:] == (D, 1) and value.stride() == key.stride(), "token rows must lie one after another"
    int8 = scales[0] is not None
    assert query.is_contiguous() and all(scale.is_contiguous() for scale in scales if int8)
    key_scale, value_scale = scales if int8 else (query, query)  # not read
    values = value.view(torch.int16) if int8 else value
    launch = (FULL_INT8 if int8 else FULL) if score is None else (SCORED_INT8 if int8 else SCORED)
    group, block = H // G, launch.tile // D
    split = split_size(B * G, S, block, launch.programs)
    rows, splits = max(16, triton.next_power_of_2(group)), triton.cdiv(S, split)
    stat, acc = scratch(query, B * H, 2, splits), scratch(query, B * G, splits, group, D)
    scored = score is not None and lse is None  # the merge makes the scores
    logit = scratch(query, B, H, S) if scored else stat if score is None else score
    _full_split_kernel[(B * G, splits)](
        query, key, values, key_scale, length, logit, stat, acc, stat if lse is None else anchor, *key.stride()[:2],
        *values.stride()[:2], *logit.stride()[:2], logit_scale(D), splits, split,
        G=G, GROUP=group, ROWS=rows, D=D, BLOCK=block, SCORED=score is not None, LSE=lse is not None, HALF_MAX=HALF_MAX,
        ALIGNED=S % 16 == 0, INT8=int8, num_warps=launch.warps,
        num_stages=stages(launch, query),
    )  # fmt: skip
    out = torch.empty_like(query)
    strides = score.stride()[:2] if scored else (0, 0)
    _merge_kernel[(B * H, triton.cdiv(S, CHUNK) if scored else 1)](
        out, length, stat, acc, value_scale, logit, score if scored else logit, logit if row is None else row,
        *((logit, logit) if lse is None else (lse, anchor)), *strides, S, splits, split, decay,
        G=G, GROUP=group, D=D, SPLITS=triton.next_power_of_2(splits), CHUNK=CHUNK,
        SCORED=scored, OLD=decay != 0, ROW=row is not None, LSE=lse is not None, INT8=int8,
        num_warps=merge_warps(splits),
    )  # fmt: skip
    return out


def logit_scale(D: int) -> float:
    """Of the logits, as powers of two."""
    return D**-0.5 * LOG2_E


def stages(launch: Launch, query: Tensor) -> int:
    """fp32 takes twice the shared memory: with more it would pass the 160 KB of an A100."""
    return launch.stages if query.element_size() == 2 else 2


def merge_warps(splits: int) -> int:
    return 4 if splits <= 32 else 8


def scratch(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, device=like.device, dtype=torch.float32)
