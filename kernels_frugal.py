"""The SLM's cut cache in Triton (`--slm-budget`, appendix A.3): who leaves his slot, and attention over the slots.

Where it sits: tokens -> **SLM -> scores** -> tier plan, inside a static step (graph_frugal.py), in place of
`kernels_decode.scored_attention` on a whole cache. Each function exists twice with one signature, `..._torch` (the
twin) and `..._triton`.

| function         | flow                                                                     | paper        |
| ---------------- | ------------------------------------------------------------------------ | ------------ |
| `make_room`      | H2O's rule: who does not stay leaves, the newest token takes a free slot | A.3          |
| `slot_attention` | attention over the slots, its row into the scores and into `heavy`       | Eq. 1, Eq. 4 |

K, V and `heavy` lie by slot; the scores (and rows) by position, 0 for what is not held, as the plan wants to read them.
So a token that leaves takes its scores with it, and attention writes its row where `position` says.

`make_room` is one launch a step for all layers. With a plan in every step nobody or one token leaves a KV head; more do
when the plans are further apart. They are found one after another: a pass over the slots for each.

`slot_attention` is flash decoding as in kernels_decode.py: splits of the slots, then a merge. It has kernels of its own
since `heavy` is a sum over the heads of a group: one program of the merge takes all of them, for some slots. Logits are
kept as powers of two, and K and V are loaded from free slots too: a mask that must be loaded first halves the depth of
the pipeline.

Shapes follow the legend in model.py; decode drops the T dimension. N is the number of slots.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

import kernels
from frugal import heavy_and_recent
from kernels_tiers import admit_newest

SLOTS = 2048  # slots that a program of `make_room` looks at together
TILE = 16384  # bytes of a tile of K, 128 slots at D = 64 in 16 bits; with those of V 64 to 100 KB of shared memory
PROGRAMS = 1056  # of the splits that are aimed at: eight for each of the 132 multiprocessors of an H100
CHUNK = 512  # slots whose logits one program of the merge turns into probabilities, for all heads of a group


# ---- The twins -------------------------------------------------------------------------------------------------------


def make_room_torch(
    position: Tensor, heavy: Tensor, score: Tensor, row: Tensor | None, length: Tensor, kept: Tensor | None,
    newest_slot: Tensor,
) -> None:  # fmt: skip
    """Drop who does not stay, and give the newest token the first free slot; see frugal.FrugalCache.

    position (L, B, G, N) int32, -1 where a slot is free, and heavy (L, B, G, N) fp32 are updated in place; so are score
    and row (L, B, H, S) fp32, where a token that leaves has 0 from now on (row None: no marginal tier). length (B,)
    int32 counts the newest token. kept (S + 1,) int32: tokens that stay at each length; None: nobody leaves, there are
    slots for all. newest_slot (L, B, G) int32 is written. A slot must be free for the newest token.
    """
    if kept is not None:
        end, stay = (column.long()[:, None, None] for column in (length, kept[length.long()]))
        leaves = (position >= 0) & (heavy_and_recent(position, heavy, end, stay) >= stay - 1)
        for table in (score, row):
            if table is not None:
                _put(table, position.where(leaves, -1), 0.0)
        position.masked_fill_(leaves, -1)
        heavy.masked_fill_(leaves, 0)
    admit_newest(position, length, newest_slot)


def slot_attention_torch(
    query: Tensor, key: Tensor, value: Tensor, position: Tensor, heavy: Tensor, score: Tensor, decay: float,
    row: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The newest query (B, H, D) on the slots, key and value (B, G, N, D), that hold a token; returns (B, H, D).

    position (B, G, N) int32: the token in each slot, -1 if none; K and V there are not read. In place: heavy (B, G, N)
    fp32 grows by the attention of the heads of its group; score (B, H, S) fp32 = decay * score + attention at the
    positions held, and row (B, H, S), if given, takes the attention itself. With decay 0 the old score is not read.
    """
    G, N = position.shape[1:]
    own, nothing = torch.arange(N, device=key.device).expand_as(position), query.new_zeros(*query.shape[:2], N).float()
    out, attention = kernels.tiered_attention(query[:, :, None], key, value, position >= 0, own, nothing)
    heavy += attention.unflatten(1, (G, -1)).sum(2)  # (B, H, N) -> (B, G, N)
    if row is not None:
        _put(row, position, attention)
    if decay:
        held = position.long().clamp(min=0).repeat_interleave(query.shape[1] // G, 1)
        attention = attention + decay * score.gather(-1, held)  # what an empty slot finds is not put back
    _put(score, position, attention)
    return out[:, :, 0]


def _put(table: Tensor, position: Tensor, values: Tensor | float) -> None:
    """table (..., H, S) takes values (..., H, N), or one number, at the positions (..., G, N) that are not -1."""
    end = table.shape[-1]
    column = position.long().where(position >= 0, end).repeat_interleave(table.shape[-2] // position.shape[-2], -2)
    wide = F.pad(table, (0, 1)).scatter_(-1, column, values)  # empty slots go to a column that is cut off
    table.copy_(wide[..., :end])


# ---- The kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _room_kernel(
    position_ptr, heavy_ptr, score_ptr, row_ptr, length_ptr, kept_ptr, newest_ptr, score_layer, score_batch, score_head,
    slots, B, G: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr, DROP: tl.constexpr,
    ROW: tl.constexpr,
):  # fmt: skip
    """One KV head of one sequence and layer; HEADS is GROUP as a power of two."""
    line = tl.program_id(0)
    layer, b, g = line // (B * G), line // G % B, line % G
    length = tl.load(length_ptr + b)
    position_ptr += line.to(tl.int64) * slots
    heavy_ptr += line.to(tl.int64) * slots
    if DROP:
        kept = tl.load(kept_ptr + length)
        recent = kept - kept // 2
        held = 0
        for at in range(0, slots, SLOTS):
            slot = at + tl.arange(0, SLOTS)
            held += tl.sum((tl.load(position_ptr + slot, mask=slot < slots, other=-1) >= 0).to(tl.int32), 0)
        head = tl.arange(0, HEADS)
        scores = layer.to(tl.int64) * score_layer + b.to(tl.int64) * score_batch + (g * GROUP + head) * score_head
        for _ in range(0, held - kept + 1):
            lowest = tl.full([], float("inf"), tl.float32)
            leaves = 0
            for at in range(0, slots, SLOTS):
                slot = at + tl.arange(0, SLOTS)
                token = tl.load(position_ptr + slot, mask=slot < slots, other=-1)
                goes = (token >= 0) & (token < length - recent)
                gathered = tl.load(heavy_ptr + slot, mask=goes, other=float("inf"))
                least = tl.min(gathered, 0)
                last = tl.max(tl.where(goes & (gathered == least), slot, 0), 0)
                leaves = tl.where(least <= lowest, last, leaves)  # of equal ones the last slot leaves first
                lowest = tl.minimum(lowest, least)
            token = tl.load(position_ptr + leaves)
            tl.debug_barrier()  # every thread has read it
            tl.store(position_ptr + leaves, -1)
            tl.store(heavy_ptr + leaves, 0.0)
            tl.store(score_ptr + scores + token, tl.zeros([HEADS], tl.float32), mask=head < GROUP)
            if ROW:
                tl.store(row_ptr + scores + token, tl.zeros([HEADS], tl.float32), mask=head < GROUP)
            tl.debug_barrier()
    free = slots + 0
    for at in range(0, slots, SLOTS):
        slot = at + tl.arange(0, SLOTS)
        token = tl.load(position_ptr + slot, mask=slot < slots, other=0)
        free = tl.minimum(free, tl.min(tl.where(token < 0, slot, slots), 0))
    tl.store(position_ptr + free, length - 1)
    tl.store(newest_ptr + line, free)


@triton.jit
def _slot_split_kernel(
    q_ptr, k_ptr, v_ptr, position_ptr, logit_ptr, stat_ptr, acc_ptr, slots, scale, splits, size,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One split of one KV head's slots: logits, max, sum and unscaled output of its ROWS query heads, GROUP of them
    real."""
    pair, split = tl.program_id(0), tl.program_id(1)
    row, dim = tl.arange(0, ROWS), tl.arange(0, D)
    real, head = row < GROUP, (pair * GROUP + row).to(tl.int64)
    query = tl.load(q_ptr + head[:, None] * D + dim, mask=real[:, None], other=0.0)  # (ROWS, D)
    base = pair.to(tl.int64) * slots
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for at in range(split * size, tl.minimum(split * size + size, slots), BLOCK):
        slot = at + tl.arange(0, BLOCK)
        inside = slot < slots
        used = tl.load(position_ptr + base + slot, mask=inside, other=-1) >= 0
        key = tl.load(k_ptr + (base + slot)[:, None] * D + dim, mask=inside[:, None], other=0.0)  # (BLOCK, D)
        logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale  # (ROWS, BLOCK)
        logit = tl.where(used, logit, -float("inf"))
        tl.store(logit_ptr + head[:, None] * slots + slot, logit, mask=real[:, None] & inside)
        higher = tl.maximum(top, tl.max(logit, 1))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)  # a tile whose slots are all free
        weight = tl.exp2(logit - anchor[:, None])
        shrink = tl.exp2(top - anchor)
        value = tl.load(v_ptr + (base + slot)[:, None] * D + dim, mask=inside[:, None], other=0.0)
        value = tl.where(used[:, None], value, 0.0)
        acc = acc * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        total = total * shrink + tl.sum(weight, 1)
        top = higher
    stat = stat_ptr + head * 2 * splits + split
    tl.store(stat, top, mask=real)
    tl.store(stat + splits, total, mask=real)
    tl.store(acc_ptr + (head * splits + split)[:, None] * D + dim, acc, mask=real[:, None])


@triton.jit
def _slot_merge_kernel(
    out_ptr, position_ptr, stat_ptr, acc_ptr, logit_ptr, heavy_ptr, score_ptr, row_ptr, score_batch, score_head,
    slots, splits, chunks, decay,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    OLD: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one KV head's query heads; each program turns one chunk of their logits into probabilities.
    The outputs are shared among the programs of a KV head."""
    pair, chunk = tl.program_id(0), tl.program_id(1)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, D)
    live = split < splits
    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    cell = pair.to(tl.int64) * slots + slot
    token = tl.load(position_ptr + cell, mask=slot < slots, other=-1)
    used = token >= 0
    line = (pair // G).to(tl.int64) * score_batch + (pair % G) * GROUP * score_head + token
    gathered = tl.zeros([CHUNK], tl.float32)
    for i in tl.static_range(GROUP):  # unrolled: the loads of all heads are under way together
        head = (pair * GROUP + i).to(tl.int64)
        logit = tl.load(logit_ptr + head * slots + slot, mask=used, other=-float("inf"))
        stat = stat_ptr + head * 2 * splits + split
        tops = tl.load(stat, mask=live, other=-float("inf"))
        top = tl.max(tops, 0)
        shrink = tl.exp2(tops - top)
        scale = 1 / tl.sum(tl.load(stat + splits, mask=live, other=0.0) * shrink, 0)
        if chunk == i % chunks:
            part = (head * splits + split)[:, None] * D
            acc = tl.load(acc_ptr + part + dim, mask=live[:, None], other=0.0)  # (SPLITS, D)
            out = tl.sum(acc * shrink[:, None], 0) * scale
            tl.store(out_ptr + head * D + dim, out.to(out_ptr.dtype.element_ty))
        probability = tl.exp2(logit - top) * scale
        gathered += probability
        if ROW:
            tl.store(row_ptr + line + i * score_head, probability, mask=used)
        if OLD:
            probability += decay * tl.load(score_ptr + line + i * score_head, mask=used, other=0.0)
        tl.store(score_ptr + line + i * score_head, probability, mask=used)
    before = tl.load(heavy_ptr + cell, mask=used, other=0.0)
    tl.store(heavy_ptr + cell, before + gathered, mask=used)


# ---- The launchers ---------------------------------------------------------------------------------------------------


def make_room_triton(
    position: Tensor, heavy: Tensor, score: Tensor, row: Tensor | None, length: Tensor, kept: Tensor | None,
    newest_slot: Tensor,
) -> None:  # fmt: skip
    L, B, G, N = position.shape
    group = score.shape[2] // G
    assert all(tensor.is_contiguous() for tensor in (position, heavy, newest_slot)), "tables are contiguous"
    assert score.stride(3) == 1 and (row is None or row.stride() == score.stride())
    _room_kernel[(L * B * G,)](
        position, heavy, score, score if row is None else row, length, length if kept is None else kept, newest_slot,
        *score.stride()[:3], N, B,
        G=G, GROUP=group, HEADS=triton.next_power_of_2(group), SLOTS=SLOTS, DROP=kept is not None, ROW=row is not None,
        num_warps=8,
    )  # fmt: skip


def slot_attention_triton(
    query: Tensor, key: Tensor, value: Tensor, position: Tensor, heavy: Tensor, score: Tensor, decay: float,
    row: Tensor | None = None,
) -> Tensor:  # fmt: skip
    B, H, D = query.shape
    G, N = position.shape[1:]
    assert all(tensor.is_contiguous() for tensor in (query, key, value, position, heavy)), "the slots are contiguous"
    assert score.stride(2) == 1 and (row is None or row.stride() == score.stride())
    group, block = H // G, TILE // (D * key.element_size())
    split = block * max(2, triton.cdiv(N, block * max(1, PROGRAMS // (B * G))))  # slots of a split: whole tiles
    splits, chunks = triton.cdiv(N, split), triton.cdiv(N, CHUNK)
    scratch = dict(device=query.device, dtype=torch.float32)
    stat, acc = torch.empty(B * H, 2, splits, **scratch), torch.empty(B * H, splits, D, **scratch)
    logit = torch.empty(B * H, N, **scratch)
    _slot_split_kernel[(B * G, splits)](
        query, key, value, position, logit, stat, acc, N, D**-0.5 * math.log2(math.e), splits, split,
        GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), D=D, BLOCK=block, num_warps=4, num_stages=3,
    )  # fmt: skip
    out = torch.empty_like(query)
    _slot_merge_kernel[(B * G, chunks)](
        out, position, stat, acc, logit, heavy, score, score if row is None else row, *score.stride()[:2],
        N, splits, chunks, decay,
        G=G, GROUP=group, D=D, SPLITS=triton.next_power_of_2(splits), CHUNK=CHUNK, OLD=decay != 0,
        ROW=row is not None, num_warps=4 if splits <= 32 else 8,
    )  # fmt: skip
    return out
