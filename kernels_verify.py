"""What a round of drafts needs beside the kernels of a decode step: T tokens a sequence, verified in one forward.

Where it sits: under graph_speculative.py, between the SLM's drafts and the LLM's answer to them. The attention of the
newest token and its drafts is that of kernels_decode.py (full cache) and kernels_eq6.py (tiers) with a mask of its own
for each: none sees a draft after it.
The paper names speculative decoding as what makes the SLM pay for itself (appendix A.3). Each function exists twice
with one signature, `..._torch` (the twin) and `..._triton`.

| function           | flow                                                                              | paper      |
| ------------------ | --------------------------------------------------------------------------------- | ---------- |
| `fold_rows`        | the SLM's rows of a round -> scores: to plan by, and those that stay              | Eq. 1      |
| `admit_drafts`     | the plan has placed the newest token; its drafts take the slots left free         | -          |
| `verify_attention` | LLM: T queries on the full cache or on the tiers, each with its own row to borrow | Eq. 6      |

The T queries of the heads that share a KV head are the rows of one matrix, so that K and V are read once for all of
them: 5 tokens of 7 heads are 35 rows, padded to 64. Where they are more than 64, each block of 64 reads K and V again.

Shapes follow the legend in model.py; T = K + 1 tokens of a round. length (B,) int32 counts up to the newest token, the
first of the round: token t of it stands at length - 1 + t.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels
from int8_rows import Scales, into_query, onto_output

TILE, BLOCK_MAX = 8192, 128  # numbers in a tile of K, and tokens: 64 at D = 128
ROWS_MAX = 64  # query rows of a program: with 64 tokens and D = 128 the sums fill a half of the registers
PROGRAMS = 528  # aimed at: four for each multiprocessor of an H100; each leaves T times the output of a decode step
CHUNK = 1024  # tokens whose scores one program folds


# ---- The twins -------------------------------------------------------------------------------------------------------


def verify_attention_torch(
    query: Tensor, key: Tensor, value: Tensor, length: Tensor, key_position: Tensor | None = None,
    value_slot: Tensor | None = None, borrowed: Tensor | None = None, scales: Scales = (None, None),
) -> Tensor:  # fmt: skip
    """query (B, T, H, D) on key (B, G, C, D) and value (B, G, N, D), each token on what stands up to its own position.

    key_position (B, G, C) int32: the token in each K slot, -1 if none; None is a full cache, token j in slot j.
    value_slot (B, G, C) int32: where in the V pool its value lies; None: at the same slot. borrowed (T, B, H, N) fp32:
    A'_f(i) of each token's own row on the marginal tokens by V slot, 0 elsewhere; None: there is no marginal tier.
    scales: K's and V's, (B, G, 2, D) each, if they are int8. Returns (B, T, H, D).
    """
    query = into_query(query, scales[0])
    key, value = key.to(query.dtype), value.to(query.dtype)
    T, heads = query.shape[1], query.transpose(1, 2)  # (B, H, T, D)
    own = length.long()[:, None] - 1 + torch.arange(T, device=length.device)  # (B, T)
    if key_position is None:
        unseen = torch.arange(value.shape[2], device=value.device) > own[:, -1:]  # (B, S)
        value = value.masked_fill(unseen[:, None, :, None], 0)  # unseen columns weigh 0, and 0 * NaN is NaN
        out, _ = kernels.full_attention_block(heads, key, value, own)
    else:
        position = key_position[:, :, None]  # (B, G, 1, C)
        seen = (position >= 0) & (position <= own[:, None, :, None])  # (B, G, T, C)
        if value_slot is None:
            value_slot = torch.arange(key.shape[2], device=key.device).expand(key.shape[:3])
        if borrowed is None:
            lent = torch.zeros(*heads.shape[:3], value.shape[2], device=key.device)
        else:
            lent = borrowed.permute(1, 2, 0, 3).contiguous()  # (B, H, T, N)
        out, _ = kernels.tiered_attention_block(heads, key, value, seen, value_slot.long(), lent)
    return onto_output(out.transpose(1, 2), scales[1]).contiguous()


def admit_drafts_torch(position: Tensor, length: Tensor, newest_slot: Tensor, slots: Tensor) -> None:
    """The T - 1 drafts take free slots, in order; nobody leaves. The plan has left as many free.

    position (L, B, G, N) int32 is updated. newest_slot (L, B, G) int32: where the newest token lies. slots (L, B, T, G)
    int32 is written: where each token of the round lies.
    """
    first, drafts = length.long()[:, None, None], slots.shape[2] - 1
    free = position < 0
    nth = free.long().cumsum(-1) - 1
    position.copy_(torch.where(free & (nth < drafts), first + nth, position))
    slots[:, :, 0] = newest_slot
    for t in range(drafts):
        slots[:, :, t + 1] = (position == first + t).byte().argmax(-1)


def fold_rows_torch(
    score: Tensor, rows: Tensor, length: Tensor, count: Tensor, decay: float, out: Tensor, largest: bool
) -> None:
    """score = decay * score + row, for the first count[b] rows of a round; out (L, B, H, S) is written.

    score (L, B, H, S), rows (L, B, H, T, S) fp32; what lies in a row beyond its own token is no attention. largest: out
    takes each token's largest score after any of these rows (drafts.Waiting.foreseen), else the last one. out may be
    score itself. Without rows (count 0), and at and beyond length - 1 + T, nothing is written.
    """
    T, S = rows.shape[3:]
    token = torch.arange(S, device=score.device)
    end, count = (table.long()[:, None, None] for table in (length, count))  # (B, 1, 1)
    last, best = score, torch.zeros_like(score)
    for t in range(T):
        after = decay * last + rows[:, :, :, t].where(token < end + t, 0)
        last = after.where(t < count, last)
        best = best.maximum(after.where(t < count, 0))
    out.copy_((best if largest else last).where((token < end - 1 + T) & (count > 0), out))


# ---- The kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _verify_split_kernel(
    q_ptr, k_ptr, v_ptr, length_ptr, position_ptr, slot_ptr, borrowed_ptr, stat_ptr, acc_ptr, lent_ptr,
    key_slots, value_slots, borrowed_token, scale, splits, size,
    G: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    TIERED: tl.constexpr, MARGINAL: tl.constexpr,
):  # fmt: skip
    """One split of one KV head: max, sum and unscaled output of ROWS query rows, row = token * GROUP + head."""
    pair, split, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = pair // G, pair % G
    row, dim = tl.arange(0, ROWS), tl.arange(0, D)
    line = block * ROWS + row
    real = line < T * GROUP
    t, head = line // GROUP, g * GROUP + line % GROUP
    query_at = ((b * T + t) * (G * GROUP) + head).to(tl.int64)
    query = tl.load(q_ptr + query_at[:, None] * D + dim, mask=real[:, None], other=0.0)  # (ROWS, D)
    length = tl.load(length_ptr + b)
    keys, values = pair.to(tl.int64) * key_slots, pair.to(tl.int64) * value_slots
    if TIERED:
        stop = key_slots
    else:
        stop = length - 1 + T
    start = split * size
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for at in range(start, tl.minimum(start + size, stop), BLOCK):
        slot = at + tl.arange(0, BLOCK)
        if TIERED:
            position = tl.load(position_ptr + keys + slot, mask=slot < stop, other=-1)
        else:
            position = tl.where(slot < stop, slot, -1)
        used = position >= 0
        key = tl.load(k_ptr + (keys + slot)[:, None] * D + dim, mask=used[:, None], other=0.0)
        logit = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee") * scale  # (ROWS, BLOCK)
        seen = used[None] & (position[None] < (length + t)[:, None])
        logit = tl.where(seen, logit, -float("inf"))
        higher = tl.maximum(top, tl.max(logit, 1))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)  # a row that has seen nothing yet
        weight = tl.exp(logit - anchor[:, None])
        shrink = tl.exp(top - anchor)
        if MARGINAL:
            where = tl.load(slot_ptr + keys + slot, mask=used, other=0)
        else:
            where = slot
        value = tl.load(v_ptr + (values + where)[:, None] * D + dim, mask=used[:, None], other=0.0)
        value = value.to(query.dtype)
        acc = acc * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        total = total * shrink + tl.sum(weight, 1)
        top = higher
    part = ((pair * tl.num_programs(2) + block) * splits + split).to(tl.int64) * ROWS + row
    tl.store(stat_ptr + part * 3, top, mask=real)
    tl.store(stat_ptr + part * 3 + 1, total, mask=real)
    tl.store(acc_ptr + part[:, None] * D + dim, acc, mask=real[:, None])
    if MARGINAL:
        mass = tl.zeros([ROWS], tl.float32)
        lent = tl.zeros([ROWS, D], tl.float32)
        source = borrowed_ptr + t.to(tl.int64) * borrowed_token + (b * (G * GROUP) + head).to(tl.int64) * value_slots
        for at in range(start, tl.minimum(start + size, value_slots), BLOCK):
            slot = at + tl.arange(0, BLOCK)
            asked = real[:, None] & (slot < value_slots)[None]
            share = tl.load(source[:, None] + slot, mask=asked, other=0.0)  # (ROWS, BLOCK)
            marginal = tl.max(share, 0) > 0  # a critical value is not read a second time
            value = tl.load(v_ptr + (values + slot)[:, None] * D + dim, mask=marginal[:, None], other=0.0)
            value = value.to(query.dtype)
            lent += tl.dot(share.to(value.dtype), value, input_precision="ieee")
            mass += tl.sum(share, 1)
        tl.store(stat_ptr + part * 3 + 2, mass, mask=real)
        tl.store(lent_ptr + part[:, None] * D + dim, lent, mask=real[:, None])


@triton.jit
def _verify_merge_kernel(
    out_ptr, stat_ptr, acc_ptr, lent_ptr, splits, blocks,
    G: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    MARGINAL: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one query head of one token."""
    cell = tl.program_id(0)
    head, token = cell % (G * GROUP), cell // (G * GROUP)  # token counts over the batch
    pair, line = token // T * G + head // GROUP, token % T * GROUP + head % GROUP
    split, dim = tl.arange(0, SPLITS), tl.arange(0, D)
    live = split < splits
    part = ((pair * blocks + line // ROWS) * splits + split).to(tl.int64) * ROWS + line % ROWS
    tops = tl.load(stat_ptr + part * 3, mask=live, other=-float("inf"))
    shrink = tl.exp(tops - tl.max(tops, 0))  # of a split that this token does not see: 0
    scale = 1 / tl.sum(tl.load(stat_ptr + part * 3 + 1, mask=live, other=0.0) * shrink, 0)
    if MARGINAL:
        scale = scale * (1 - tl.sum(tl.load(stat_ptr + part * 3 + 2, mask=live, other=0.0), 0))
    acc = tl.load(acc_ptr + part[:, None] * D + dim, mask=live[:, None], other=0.0)  # (SPLITS, D)
    out = tl.sum(acc * shrink[:, None], 0) * scale
    if MARGINAL:
        out += tl.sum(tl.load(lent_ptr + part[:, None] * D + dim, mask=live[:, None], other=0.0), 0)
    tl.store(out_ptr + cell.to(tl.int64) * D + dim, out.to(out_ptr.dtype.element_ty))


@triton.jit
def _admit_kernel(
    position_ptr, length_ptr, newest_ptr, slots_ptr, slots, B, G: tl.constexpr, T: tl.constexpr, SLOTS: tl.constexpr
):
    pair = tl.program_id(0)  # a KV head of a sequence and layer
    length = tl.load(length_ptr + pair // G % B)
    slot = tl.arange(0, SLOTS)
    cell = position_ptr + pair.to(tl.int64) * slots + slot
    inside = slot < slots
    free = inside & (tl.load(cell, mask=inside, other=0) < 0)
    nth = tl.cumsum(free.to(tl.int32), 0) - 1
    takes = free & (nth < T - 1)
    tl.store(cell, length + nth, mask=takes)
    place = slots_ptr + pair // G * T * G + pair % G
    tl.store(place + (nth + 1) * G, slot, mask=takes)
    tl.store(place, tl.load(newest_ptr + pair))


@triton.jit
def _fold_kernel(
    score_ptr, rows_ptr, length_ptr, count_ptr, out_ptr, capacity, decay, B,
    H: tl.constexpr, T: tl.constexpr, OLD: tl.constexpr, LARGEST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One chunk of the tokens of one head of one sequence and layer."""
    line = tl.program_id(0)
    b = line // H % B
    length, count = tl.load(length_ptr + b), tl.load(count_ptr + b)
    token = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    written = token < tl.where(count > 0, length - 1 + T, 0)
    cell = line.to(tl.int64) * capacity + token
    last = tl.zeros([CHUNK], tl.float32)
    if OLD:
        last = tl.load(score_ptr + cell, mask=written, other=0.0)
    best = tl.zeros([CHUNK], tl.float32)
    for t in tl.static_range(T):
        source = rows_ptr + (line.to(tl.int64) * T + t) * capacity + token
        after = tl.load(source, mask=token < tl.where(t < count, length + t, 0), other=0.0)
        if OLD:
            after += decay * last
        last = tl.where(t < count, after, last)
        if LARGEST:
            best = tl.where(t < count, tl.maximum(best, after), best)
    if LARGEST:
        tl.store(out_ptr + cell, best, mask=written)
    else:
        tl.store(out_ptr + cell, last, mask=written)


# ---- The launchers ---------------------------------------------------------------------------------------------------


def verify_attention_triton(
    query: Tensor, key: Tensor, value: Tensor, length: Tensor, key_position: Tensor | None = None,
    value_slot: Tensor | None = None, borrowed: Tensor | None = None, scales: Scales = (None, None),
) -> Tensor:  # fmt: skip
    query = into_query(query, scales[0])  # here, not in the kernels: a round has tokens enough for some launches more
    B, T, H, D = query.shape
    G, C, N = key.shape[1], key.shape[2], value.shape[2]
    given = [tensor for tensor in (query, key, value, key_position, value_slot) if tensor is not None]
    assert all(tensor.is_contiguous() for tensor in given), "caches and pools of one layer are contiguous"
    assert (value_slot is None) == (borrowed is None), "a marginal tier needs both"
    marginal = borrowed is not None
    assert not marginal or borrowed[0].is_contiguous()
    group, tile = H // G, min(TILE // D, BLOCK_MAX)
    rows = max(16, min(ROWS_MAX, triton.next_power_of_2(T * group)))
    blocks = triton.cdiv(T * group, rows)
    split = tile * max(2, triton.cdiv(N, tile * max(1, PROGRAMS // (B * G * blocks))))
    splits = triton.cdiv(N, split)
    part = (B * G * blocks, splits, rows)
    stat, acc = (torch.empty(*part, width, device=key.device, dtype=torch.float32) for width in (3, D))
    lent = torch.empty_like(acc) if marginal else acc
    _verify_split_kernel[(B * G, splits, blocks)](
        query, key, value, length, length if key_position is None else key_position,
        value_slot if marginal else length, borrowed if marginal else stat, stat, acc, lent,
        C, N, borrowed.stride(0) if marginal else 0, D**-0.5, splits, split,
        G=G, GROUP=group, T=T, ROWS=rows, D=D, BLOCK=tile, TIERED=key_position is not None, MARGINAL=marginal,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    out = torch.empty_like(query, dtype=query.dtype if scales[1] is None else torch.float32)
    _verify_merge_kernel[(B * T * H,)](
        out, stat, acc, lent, splits, blocks,
        G=G, GROUP=group, T=T, ROWS=rows, D=D, SPLITS=triton.next_power_of_2(splits), MARGINAL=marginal,
        num_warps=4 if splits <= 32 else 8,
    )  # fmt: skip
    return onto_output(out, scales[1]).to(query.dtype)


def admit_drafts_triton(position: Tensor, length: Tensor, newest_slot: Tensor, slots: Tensor) -> None:
    L, B, G, N = position.shape
    assert all(tensor.is_contiguous() for tensor in (position, newest_slot, slots))
    width = triton.next_power_of_2(N)
    _admit_kernel[(L * B * G,)](
        position, length, newest_slot, slots, N, B, G=G, T=slots.shape[2], SLOTS=width,
        num_warps=max(4, min(16, width // 256)),
    )  # fmt: skip


def fold_rows_triton(
    score: Tensor, rows: Tensor, length: Tensor, count: Tensor, decay: float, out: Tensor, largest: bool
) -> None:
    L, B, H, T, S = rows.shape
    assert all(tensor.is_contiguous() for tensor in (score, rows, out))
    _fold_kernel[(L * B * H, triton.cdiv(S, CHUNK))](
        score, rows, length, count, out, S, decay, B, H=H, T=T, OLD=decay != 0, LARGEST=largest, CHUNK=CHUNK,
        num_warps=4,
    )  # fmt: skip
