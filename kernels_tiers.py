"""The slots in Triton: which token gets which slot of a pool, and what the marginal slots borrow.

No index leaves the GPU.

Where it sits: scores -> plan (kernels_plan.py) -> **slots** -> movement (kernels_move.py) -> LLM. The plan's own launch
gives the K pool's slots, by `fill_slots` or `assign_line`; those of the V pool, and what is lent, have their launches
after it on the same stream (graph.py): one program for each layer, sequence and KV head. The first two functions exist
twice with one signature, `..._torch` (the twin) and `..._triton`.

| function       | flow                                                                 | paper                  |
| -------------- | -------------------------------------------------------------------- | ---------------------- |
| `assign_slots` | tiers -> slots: who stays keeps his, the rest fills the gaps         | Algorithm 1            |
| `lend_rows`    | the SLM's newest row -> what the marginal slots borrow               | Eq. 6                  |
| `admit_newest` | no plan in this step: the newest token takes a free slot             | -                      |

Shapes follow the legend in model.py. Lengths are device tensors. L is the number of layers at hand.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

import cache
from kernels_move import Moves
from kernels_scores import MARGINAL

TOKENS = 8192  # tokens at most that a program looks at together: 16 bytes a thread of 16 warps


# ---- The twins -------------------------------------------------------------------------------------------------------


def assign_slots_torch(
    position: Tensor, tier: Tensor, lowest: int, length: Tensor, host_rows: int, moves: Moves, newest_slot: Tensor,
    moved: Tensor,
) -> None:  # fmt: skip
    """Give every token whose tier is at least `lowest` a slot of the pool; see cache.assign_slots.

    position (L, B, G, N) int32 is updated in place: the token in each slot, -1 if none. moves, those of the L layers
    with counts of 0, is written, where a KV head has host_rows rows on the host; the newest token is not among them,
    its row is made on the device. newest_slot (L, B, G) int32 is written: where the newest token lies. moved (1,) int64
    grows by the rows to come.
    """
    after = cache.assign_slots(position.long().flatten(0, 1), (tier >= lowest).flatten(0, 1))[0].view_as(position)
    newest = length.long()[:, None, None] - 1
    newest_slot.copy_((after == newest).byte().argmax(-1))
    fresh = (after != position) & (after != newest) & (after >= 0)
    pair = torch.arange(fresh[0, :, :, 0].numel(), device=after.device).view(*fresh.shape[1:3], 1)  # b, g
    slot = torch.arange(fresh.shape[3], device=after.device)
    for layer, new in enumerate(fresh):
        moves.count[layer] = count = new.sum()
        moves.source[layer, :count] = (pair * host_rows + after[layer])[new].int()
        moves.target[layer, :count] = (pair * fresh.shape[3] + slot)[new].int()
    position.copy_(after)
    moved += moves.count.sum()


def lend_rows_torch(
    row: Tensor, index: Tensor, tier: Tensor, key_position: Tensor, value_position: Tensor, value_slot: Tensor,
    borrowed: Tensor,
) -> None:  # fmt: skip
    """What the marginal tokens borrow, by V slot, and where the value of each K slot lies.

    row (L', B, H', S) fp32: the SLM's newest attention. value_slot (L, B, G, C) int32 and borrowed (L, B, H, N) fp32
    are written.
    """
    B, N = value_position.shape[1], value_position.shape[3]
    heads, share = row.shape[2], index.shape[2] // value_position.shape[2]
    sequence = torch.arange(B, device=row.device)[:, None, None]
    token = value_position.long().clamp(min=0)
    marginal = (value_position >= 0) & (tier.gather(-1, token) == MARGINAL)
    matched = row[index // heads, sequence, index % heads].transpose(0, 1)  # (L, B, H, S)
    lent = matched.gather(-1, token.repeat_interleave(share, 2))  # (L, B, H, N)
    borrowed.copy_(lent.where(marginal.repeat_interleave(share, 2), 0))
    inverse = torch.zeros(*tier.shape[:3], tier.shape[3] + 1, dtype=torch.long, device=row.device)
    names = torch.arange(N, device=row.device).expand_as(value_position)
    inverse.scatter_(-1, value_position.long().where(value_position >= 0, tier.shape[-1]), names)
    value_slot.copy_(inverse.gather(-1, key_position.long().clamp(min=0)))


def admit_newest(position: Tensor, length: Tensor, newest_slot: Tensor) -> None:
    """Between two plans: the newest token of each sequence takes a free slot, and nobody leaves.

    position (L, B, G, N) and newest_slot (L, B, G) int32 are written. `Settings.planned` has left a slot free for every
    step up to the next plan. A few small launches for all layers: no kernel of its own.
    """
    free = (position < 0).byte().argmax(-1, keepdim=True)
    position.scatter_(-1, free, (length - 1)[:, None, None].expand_as(free))
    newest_slot.copy_(free[..., 0])


# ---- The kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def fill_slots(
    held, keep, pair, length, entering, coming, position_ptr, source_ptr, target_ptr, count_ptr, newest_ptr, moved_ptr,
    queue_ptr, slots, host_rows, pairs, SLOTS: tl.constexpr,
):  # fmt: skip
    """Who keeps his slot stays; the n-th free slot takes the n-th of the queue, in which `entering` tokens stand. The
    rows of the first `coming` of them are listed: of all but the newest token, which would be the last."""
    slot, base = tl.arange(0, SLOTS), pair.to(tl.int64) * slots
    layer = pair // pairs
    # Relaxed: the lists are read by a later launch, and else each would wait until the GPU has seen all stores so far.
    first = tl.atomic_add(count_ptr + layer, coming, sem="relaxed")  # of the layer's list, for this KV head
    tl.atomic_add(moved_ptr, coming.to(tl.int64), sem="relaxed")
    free = (slot < slots) & (keep == 0)
    nth = tl.cumsum(free.to(tl.int32), 0) - 1  # of the free slots up to this one, itself included
    came = tl.load(queue_ptr + base + nth, mask=free & (nth < entering), other=-1)
    held = tl.where(keep, held, came)
    tl.store(position_ptr + base + slot, held, mask=slot < slots)
    tl.store(newest_ptr + pair, tl.sum(tl.where(held == length - 1, slot, 0), 0))
    fresh = free & (nth < coming)
    place = layer.to(tl.int64) * pairs * slots + first + nth
    tl.store(source_ptr + place, pair % pairs * host_rows + came, mask=fresh)
    tl.store(target_ptr + place, pair % pairs * slots + slot, mask=fresh)


@triton.jit
def assign_line(
    pair, length, lowest, tier_ptr, position_ptr, source_ptr, target_ptr, count_ptr, newest_ptr, moved_ptr, queue_ptr,
    kept_ptr, slots, capacity, host_rows, pairs, SLOTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One KV head of one sequence and layer. A scratch by token says who keeps his slot; the rest of the wanted queue
    up in another, in order."""
    line, base = pair.to(tl.int64) * capacity, pair.to(tl.int64) * slots
    slot = tl.arange(0, SLOTS)
    for at in range(0, length, TOKENS):
        token = at + tl.arange(0, TOKENS)
        tl.store(kept_ptr + line + token, tl.zeros([TOKENS], tl.int8), mask=token < capacity)
    held = tl.load(position_ptr + base + slot, mask=slot < slots, other=-1)
    keep = (held >= 0) & (tl.load(tier_ptr + line + held, mask=held >= 0, other=0) >= lowest)
    tl.debug_barrier()
    tl.store(kept_ptr + line + held, tl.full([SLOTS], 1, tl.int8), mask=keep)
    tl.debug_barrier()
    entering = 0
    coming = 0
    for at in range(0, length, TOKENS):  # masks end at the capacity, not the length: whole loads of 16 bytes
        token = at + tl.arange(0, TOKENS)
        wanted = tl.load(tier_ptr + line + token, mask=token < capacity, other=0) >= lowest
        enters = (wanted & (tl.load(kept_ptr + line + token, mask=token < capacity, other=0) == 0)).to(tl.int32)
        nth = entering + tl.cumsum(enters, 0) - 1
        tl.store(queue_ptr + base + nth, token, mask=enters > 0)
        entering += tl.sum(enters, 0)
        coming += tl.sum(tl.where(token == length - 1, 0, enters), 0)
    tl.debug_barrier()
    fill_slots(held, keep, pair, length, entering, coming, position_ptr, source_ptr, target_ptr, count_ptr, newest_ptr,
               moved_ptr, queue_ptr, slots, host_rows, pairs, SLOTS)  # fmt: skip


@triton.jit
def _assign_kernel(
    position_ptr, tier_ptr, length_ptr, source_ptr, target_ptr, count_ptr, newest_ptr, moved_ptr, queue_ptr, kept_ptr,
    slots, capacity, host_rows, lowest, B,
    G: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    length = tl.load(length_ptr + pair // G % B)
    assign_line(pair, length, lowest, tier_ptr, position_ptr, source_ptr, target_ptr, count_ptr, newest_ptr, moved_ptr,
                queue_ptr, kept_ptr, slots, capacity, host_rows, B * G, SLOTS, TOKENS)  # fmt: skip


@triton.jit
def _lend_kernel(
    row_ptr, index_ptr, tier_ptr, key_position_ptr, value_position_ptr, value_slot_ptr, borrowed_ptr, inverse_ptr,
    index_batch, index_layer, row_layer, row_batch, row_head, critical_slots, value_slots, capacity, B,
    G: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    layer, b, g = pair // (B * G), pair // G % B, pair % G
    line = pair.to(tl.int64) * capacity
    slot = tl.arange(0, VALUES)
    inside = slot < value_slots
    token = tl.load(value_position_ptr + pair.to(tl.int64) * value_slots + slot, mask=inside, other=-1)
    tl.store(inverse_ptr + line + token, slot, mask=token >= 0)
    marginal = (token >= 0) & (tl.load(tier_ptr + line + token, mask=token >= 0, other=0) == 1)
    for i in range(GROUP):
        head = tl.load(index_ptr + b * index_batch + layer * index_layer + g * GROUP + i)
        source = (head // HEADS) * row_layer + b.to(tl.int64) * row_batch + (head % HEADS) * row_head
        lent = tl.load(row_ptr + source + token, mask=marginal, other=0.0)
        tl.store(borrowed_ptr + (pair.to(tl.int64) * GROUP + i) * value_slots + slot, lent, mask=inside)
    tl.debug_barrier()
    slot = tl.arange(0, KEYS)
    cell = pair.to(tl.int64) * critical_slots + slot
    token = tl.load(key_position_ptr + cell, mask=slot < critical_slots, other=-1)
    where = tl.load(inverse_ptr + line + token, mask=token >= 0, other=0)
    tl.store(value_slot_ptr + cell, where, mask=slot < critical_slots)


# ---- The launchers ---------------------------------------------------------------------------------------------------


def slot_warps(width: int) -> int:
    """Threads for a row of slots that stays in registers: 8 elements each, up to 16 warps."""
    return max(4, min(16, width // 256))


def assign_slots_triton(
    position: Tensor, tier: Tensor, lowest: int, length: Tensor, host_rows: int, moves: Moves, newest_slot: Tensor,
    moved: Tensor,
) -> None:  # fmt: skip
    L, B, G, N = position.shape
    S = tier.shape[3]
    assert all(tensor.is_contiguous() for tensor in (position, tier, newest_slot, *moves.lists))
    slots = triton.next_power_of_2(N)
    _assign_kernel[(L * B * G,)](
        position, tier, length, *moves.lists, newest_slot, moved, torch.empty_like(position), torch.empty_like(tier),
        N, S, host_rows, lowest, B, G=G, SLOTS=slots, TOKENS=min(TOKENS, triton.next_power_of_2(S)),
        num_warps=slot_warps(slots), num_stages=1,
    )  # fmt: skip


def lend_rows_triton(
    row: Tensor, index: Tensor, tier: Tensor, key_position: Tensor, value_position: Tensor, value_slot: Tensor,
    borrowed: Tensor,
) -> None:  # fmt: skip
    L, B, G, N = value_position.shape
    C, S = key_position.shape[3], tier.shape[3]
    assert index.stride(2) == 1 and tier.is_contiguous()
    inverse = torch.empty_like(tier, dtype=torch.int32)
    _lend_kernel[(L * B * G,)](
        row, index, tier, key_position, value_position, value_slot, borrowed, inverse,
        *index.stride()[:2], *row.stride()[:3], C, N, S, B,
        G=G, GROUP=index.shape[2] // G, HEADS=row.shape[2], KEYS=triton.next_power_of_2(C),
        VALUES=triton.next_power_of_2(N), num_warps=slot_warps(triton.next_power_of_2(N)), num_stages=1,
    )  # fmt: skip
