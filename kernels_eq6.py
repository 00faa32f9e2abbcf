"""Decode attention on the tiers in Triton (Eq. 6): critical K, V and marginal V, one new token a sequence.

Where it sits: the LLM's attention in a decode step (graph.py), after the movement of its layer. `tiered_attention`
exists twice with one signature: `..._torch` (the twin, which calls the truth in kernels.py) and `..._triton`.

Flash decoding as in kernels_decode.py. The first kernel takes one split of the K slots with the values they name, and
the same split of the V slots for what is borrowed; the second merges the splits with `(1 - m)` of Eq. 6. With fused
scores it also adds what each token weighed to the LLM's score memory, which fades: the logits lie in a scratch of one
layer, which stays in the L2 cache, and no weights are written in between. (Weights written by slot, and found by the
next step's sum through a table of slots by token, took 2 to 10 us less here and up to 9 more there: no step was faster.
Nor was one in which a few programs add them on a stream of their own, beside the output projection: they take 100 us
for what all multiprocessors do in 8, and the projection and the gate wait for those that they have.)

The pools may be int8 (int8_rows.py).

Shapes follow the legend in model.py; decode drops the T dimension: query is (B, H, D).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels
from int8_rows import Scales, level_products, onto_output, paired_output, query_levels, rounded_query, value_pairs
from kernels_decode import Launch, logit_scale, merge_warps, scratch, split_size, stages

# On an H100, bf16. They were (8192, 4, 3, 1056); the new numbers took, in us,
#   TIERED    4 x 3,379: 20.4 -> 17.1; 32 x 3,379: 91.6 -> 85.4; 64 x 460: 38.7 -> 31.3
#   MARGINAL  4 x 3,379 and as many marginal: 61.0 -> 42.1
TIERED = Launch(tile=8192, warps=4, stages=3, programs=264)
MARGINAL = Launch(tile=4096, warps=4, stages=3, programs=528)
# With 8 bits, without a marginal tier, 16-bit queries; of nine others none was faster in a step.
INT8 = Launch(tile=16384, warps=4, stages=3, programs=264)
SLOTS = 512  # whose weights one program of the merge adds to the memory


# ---- The twin --------------------------------------------------------------------------------------------------------


def tiered_attention_torch(
    query: Tensor, key: Tensor, value: Tensor, key_position: Tensor, value_slot: Tensor | None = None,
    borrowed: Tensor | None = None, memory: Tensor | None = None, decay: float = 1.0, scales: Scales = (None, None),
) -> Tensor:  # fmt: skip
    """Eq. 6 on the pools: query (B, H, D), key (B, G, C, D), value (B, G, N, D); returns (B, H, D).

    key_position (B, G, C) int32: the token in each K slot, -1 if none. value_slot (B, G, C) int32: where in the V pool
    its value lies; None: at the same slot. borrowed (B, H, N) fp32: A'_f(i) on the marginal tokens by V slot, 0
    elsewhere; None: there is no marginal tier. memory (B, G, S), fp32 or 16 bits, if given (`--scores fused`): that of
    each critical token becomes decay times what it was plus what the token weighs in the outputs of the KV head's query
    heads, the sum of (1 - m) softmax(q K_C), in place. scales: K's and V's, (B, G, 2, D) each, if the pools are int8.
    """
    B, H, _ = query.shape
    if value_slot is None:
        value_slot = torch.arange(key.shape[2], device=key.device).expand(key.shape[:3])
    if borrowed is None:
        borrowed = torch.zeros(B, H, value.shape[2], device=query.device)
    used = key_position >= 0
    query = rounded_query(query[:, None], scales[0])  # (B, 1, H, D)
    key, value = key.to(query.dtype), value.to(query.dtype)
    out, by_value_slot = kernels.tiered_attention(
        query.transpose(1, 2), key, value, used, value_slot.long(), borrowed
    )
    if memory is not None:
        share = H // key.shape[1]
        critical = by_value_slot.gather(-1, value_slot.long().repeat_interleave(share, 1))  # (B, H, C)
        own = critical.unflatten(1, (-1, share)).sum(2).where(used, 0)  # (B, G, C)
        token, before = key_position.long().clamp(min=0), memory.float()
        gained = (decay - 1) * before.gather(-1, token).where(used, 0) + own
        memory.copy_(before.scatter_add_(-1, token, gained))
    return onto_output(out.transpose(1, 2), scales[1])[:, 0]


# ---- The kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _tiered_split_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, position_ptr, slot_ptr, borrowed_ptr, logit_ptr, stat_ptr, acc_ptr, lent_ptr,
    critical_slots, value_slots, logit_head, scale, splits, size,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, MARGINAL: tl.constexpr,
    MEMORY: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """One split of the K slots with the values they name, and the same split of the V slots for what is borrowed.

    INT8: v_ptr has two levels in each number, and `acc` and `lent` the even channels of a row before the odd ones.
    """
    pair, split = tl.program_id(0), tl.program_id(1)
    row, dim = tl.arange(0, ROWS), tl.arange(0, D)
    WIDTH: tl.constexpr = D // 2 if INT8 else D  # numbers of a row of V
    column = tl.arange(0, WIDTH)
    real = row < GROUP
    query = tl.load(q_ptr + (pair * GROUP + row)[:, None] * D + dim, mask=real[:, None], other=0.0)  # (ROWS, D)
    if INT8:
        high, low, unit = query_levels(query, tl.load(k_scale_ptr + pair * 2 * D + dim))
        unit *= scale
    head = (pair * GROUP + row).to(tl.int64)
    keys, values = pair.to(tl.int64) * critical_slots, pair.to(tl.int64) * value_slots
    start = split * size
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)  # summed up at the end: a sum over the warps waits for all of them
    acc, odd_acc = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    for at in range(start, tl.minimum(start + size, critical_slots), BLOCK):
        slot = at + tl.arange(0, BLOCK)
        inside = slot < critical_slots
        used = tl.load(position_ptr + keys + slot, mask=inside, other=-1) >= 0
        # Loaded whether used or not: a mask that is loaded first halves the depth of the pipeline.
        key = tl.load(k_ptr + (keys + slot)[:, None] * D + dim, mask=inside[:, None], other=0.0)
        if INT8:
            logit = level_products(high, low, key) * unit[:, None]  # (ROWS, BLOCK)
        else:
            logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        logit = tl.where(used, logit, -float("inf"))
        if MEMORY:
            # Whole lines: a mask that ends anywhere would cut every store of 16 bytes. And kept in the L2 cache, where
            # the next layer's go to the same addresses: else K and V, which nobody reads again, drive them out.
            whole = real[:, None] & (slot < logit_head)
            tl.store(logit_ptr + head[:, None] * logit_head + slot, logit, mask=whole, eviction_policy="evict_last")
        higher = tl.maximum(top, tl.max(logit, 1))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)  # a tile whose slots are all empty
        weight = tl.exp2(logit - anchor[:, None])
        shrink = tl.exp2(top - anchor)
        if MARGINAL:
            where = tl.load(slot_ptr + keys + slot, mask=used, other=0)
            value = tl.load(v_ptr + (values + where)[:, None] * WIDTH + column, mask=used[:, None], other=0.0)
        else:
            value = tl.load(v_ptr + (values + slot)[:, None] * WIDTH + column, mask=inside[:, None], other=0.0)
        if INT8:
            value, odd = value_pairs(value, query.dtype)
            odd_acc = odd_acc * shrink[:, None] + tl.dot(weight.to(odd.dtype), odd, input_precision="ieee")
        elif not MARGINAL:  # a slot that is not used may hold NaN
            value = tl.where(used[:, None], value, 0.0)
        acc = acc * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        total = total * shrink[:, None] + weight
        top = higher
    stat = stat_ptr + (pair * GROUP + row) * 3 * splits + split
    tl.store(stat, top, mask=real)
    tl.store(stat + splits, tl.sum(total, 1), mask=real)
    part = (pair * splits + split).to(tl.int64) * GROUP + row
    tl.store(acc_ptr + part[:, None] * D + column, acc, mask=real[:, None])
    if INT8:
        tl.store(acc_ptr + part[:, None] * D + WIDTH + column, odd_acc, mask=real[:, None])
    if MARGINAL:
        mass = tl.zeros([ROWS], tl.float32)
        lent, odd_lent = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
        for at in range(start, tl.minimum(start + size, value_slots), BLOCK):
            slot = at + tl.arange(0, BLOCK)
            asked = real[:, None] & (slot < value_slots)[None]
            share = tl.load(borrowed_ptr + head[:, None] * value_slots + slot, mask=asked, other=0.0)  # (ROWS, BLOCK)
            marginal = tl.max(share, 0) > 0  # a critical value is not read a second time
            value = tl.load(v_ptr + (values + slot)[:, None] * WIDTH + column, mask=marginal[:, None], other=0.0)
            if INT8:
                value, odd = value_pairs(value, query.dtype)
                odd_lent += tl.dot(share.to(odd.dtype), odd, input_precision="ieee")
            lent += tl.dot(share.to(value.dtype), value, input_precision="ieee")
            mass += tl.sum(share, 1)
        tl.store(stat + 2 * splits, mass, mask=real)
        tl.store(lent_ptr + part[:, None] * D + column, lent, mask=real[:, None])
        if INT8:
            tl.store(lent_ptr + part[:, None] * D + WIDTH + column, odd_lent, mask=real[:, None])


@triton.jit
def _tiered_merge_kernel(
    out_ptr, v_scale_ptr, position_ptr, logit_ptr, stat_ptr, acc_ptr, lent_ptr, memory_ptr, slots, logit_head, capacity,
    decay, splits,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, SLOTS: tl.constexpr,
    MARGINAL: tl.constexpr, MEMORY: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one KV head. Program i of it writes the output of query head i, if there is one, and adds the
    weights of the i-th SLOTS of the K slots to the memory of their tokens: a token has one slot, so no two programs add
    to the same number."""
    pair, turn = tl.program_id(0), tl.program_id(1)
    row, split, dim = tl.arange(0, ROWS), tl.arange(0, SPLITS), tl.arange(0, D)
    real, held = row < GROUP, split < splits
    stat = stat_ptr + (pair * GROUP + row)[:, None] * 3 * splits + split  # (ROWS, SPLITS)
    tops = tl.load(stat, mask=real[:, None] & held, other=-float("inf"))
    sums = tl.load(stat + splits, mask=real[:, None] & held, other=0.0)
    if MEMORY:  # asked for before the sums over the splits, which take as long as they
        slot = turn * SLOTS + tl.arange(0, SLOTS)
        line = (pair * GROUP + row).to(tl.int64)[:, None] * logit_head
        logit = tl.load(logit_ptr + line + slot, mask=real[:, None] & (slot < logit_head), other=-float("inf"))
        token = tl.load(position_ptr + pair.to(tl.int64) * slots + slot, mask=slot < slots, other=-1)
        cell = memory_ptr + pair.to(tl.int64) * capacity + token
        before = tl.load(cell, mask=token >= 0, other=0.0).to(tl.float32)
    top = tl.where(real, tl.max(tops, 1), 0.0)  # (ROWS,)
    shrink = tl.exp2(tops - top[:, None])
    scale = 1 / tl.where(real, tl.sum(sums * shrink, 1), 1.0)
    if MARGINAL:
        scale = scale * (1 - tl.sum(tl.load(stat + 2 * splits, mask=real[:, None] & held, other=0.0), 1))
    if turn < GROUP:
        part = (pair * splits + split).to(tl.int64) * GROUP + turn
        acc = tl.load(acc_ptr + part[:, None] * D + dim, mask=held[:, None], other=0.0)  # (SPLITS, D)
        mine = row == turn
        own = tl.sum(tl.where(mine[:, None], shrink * scale[:, None], 0.0), 0)  # (SPLITS,)
        out = tl.sum(acc * own[:, None], 0)
        if MARGINAL:
            out += tl.sum(tl.load(lent_ptr + part[:, None] * D + dim, mask=held[:, None], other=0.0), 0)
        channel = dim
        if INT8:
            out, channel = paired_output(out, v_scale_ptr + pair * 2 * D, D)
        tl.store(out_ptr + (pair * GROUP + turn) * D + channel, out.to(out_ptr.dtype.element_ty))
    if MEMORY:
        weight = tl.where(real[:, None], tl.exp2(logit - top[:, None]) * scale[:, None], 0.0)  # (ROWS, SLOTS)
        tl.store(cell, decay * before + tl.sum(weight, 0), mask=token >= 0)


# ---- The launcher ----------------------------------------------------------------------------------------------------


def tiered_attention_triton(
    query: Tensor, key: Tensor, value: Tensor, key_position: Tensor, value_slot: Tensor | None = None,
    borrowed: Tensor | None = None, memory: Tensor | None = None, decay: float = 1.0, scales: Scales = (None, None),
) -> Tensor:  # fmt: skip
    B, H, D = query.shape
    G, C, N = key.shape[1], key.shape[2], value.shape[2]
    given = [query, key, value, key_position, value_slot, borrowed, memory, *scales]
    given = [tensor for tensor in given if tensor is not None]
    assert all(tensor.is_contiguous() for tensor in given), "the pools of one layer are contiguous"
    assert (value_slot is None) == (borrowed is None), "a marginal tier needs both"
    marginal = borrowed is not None
    int8 = scales[0] is not None
    key_scale, value_scale = scales if int8 else (query, query)  # not read
    values = value.view(torch.int16) if int8 else value
    launch = MARGINAL if marginal else INT8 if int8 and query.itemsize == 2 else TIERED
    group, block = H // G, launch.tile // D
    split = split_size(B * G, N, block, launch.programs)
    rows, splits = max(16, triton.next_power_of_2(group)), triton.cdiv(N, split)
    stat, acc = scratch(query, B * H, 3, splits), scratch(query, B * G, splits, group, D)
    lent = torch.empty_like(acc) if marginal else acc
    line = 16 * triton.cdiv(C, 16)  # whole loads of 16 bytes
    logit = stat if memory is None else scratch(query, B * H, line)
    _tiered_split_kernel[(B * G, splits)](
        query, key, values, key_scale, key_position, value_slot if marginal else key_position,
        borrowed if marginal else stat, logit, stat, acc, lent, C, N, line, logit_scale(D), splits, split,
        GROUP=group, ROWS=rows, D=D, BLOCK=block, MARGINAL=marginal, MEMORY=memory is not None, INT8=int8,
        num_warps=launch.warps, num_stages=stages(launch, query),
    )  # fmt: skip
    out = torch.empty_like(query)
    turns = group if memory is None else max(group, triton.cdiv(C, SLOTS))
    _tiered_merge_kernel[(B * G, turns)](
        out, value_scale, key_position, logit, stat, acc, lent, stat if memory is None else memory, C, line,
        0 if memory is None else memory.shape[2], decay, splits,
        GROUP=group, ROWS=triton.next_power_of_2(group), D=D, SPLITS=triton.next_power_of_2(splits), SLOTS=SLOTS,
        MARGINAL=marginal, MEMORY=memory is not None, INT8=int8, num_warps=merge_warps(splits),
    )  # fmt: skip
    return out
