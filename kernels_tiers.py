"""The tiers in Triton: who is critical, who gets which slot, and the rows that come from the host.

No index leaves the GPU.

Where it sits: scores -> **plan -> slots** -> movement (kernels_move.py) -> LLM, on a side stream of the decode step
(graph.py), one layer of the LLM at a time. Each function exists twice with one signature, `..._torch` (the twin) and
`..._triton`.

| function       | flow                                                                 | paper                  |
| -------------- | -------------------------------------------------------------------- | ---------------------- |
| `plan_layer`   | scores of the matched heads -> the tier of every token               | Eq. 4, Eq. 5           |
| `assign_slots` | tiers -> slots: who stays keeps his, the rest fills the gaps         | Algorithm 1            |
| `lend_rows`    | the SLM's newest row -> what the marginal slots borrow               | Eq. 6                  |

Ranking does not sort. The k-th largest of positive floats is found by bisection on their bits (as integers they order
alike): count how many are at least `middle`, halve, at most 31 times, on scores that stay in registers. Sorting rows of
16,896 costs more than the LLM's layer that has to hide it.

Shapes follow the legend in model.py. Lengths and sizes are device tensors; `sizes` (S + 1, 3) int32 is the table of
critical, recent and marginal tokens by length.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

import cache
from kernels_move import Moves

CRITICAL, MARGINAL = 2, 1  # a token's tier in a plan; 0 is offloaded
TOKENS = 2048  # tokens that one pass of the slot assignment looks at


# ---- The twins -------------------------------------------------------------------------------------------------------


def plan_layer_torch(
    score: Tensor, index: Tensor, length: Tensor, sizes: Tensor, tier: Tensor, prior: Tensor | None = None,
    held: Tensor | None = None, moves: int | None = None,
) -> None:  # fmt: skip
    """Rank the tokens by the scores of the matched SLM heads and cut the ranking into tiers, for one layer.

    score (L', B, H', S) fp32, none below 0. index (B, H) int64: f(i), counted l' * H' + h'. length (B,) int32. tier
    (B, G, S) int8 is written: CRITICAL, MARGINAL or 0; beyond a length it is 0. The scores of the H/G heads of a KV
    head are summed, recent tokens rank first (the newest before all), equal scores rank by position. prior (B, S)
    fp32, not below 0, is added to every sum.

    moves: at most that many tokens enter the critical set, the newest not counted: of those that are new in the
    ranking's top the best enter, and the best of those held (held (B, G, C) int32: their positions, -1 for an empty
    slot) keep the other places. Not for a marginal tier, whose tokens would have to be limited too.
    """
    B, G, S = tier.shape
    heads = score.shape[2]
    sequence = torch.arange(B, device=score.device)[:, None]
    total = score[index // heads, sequence, index % heads].view(B, G, -1, S).sum(2)  # (B, G, S)
    if prior is not None:
        total = total + prior[:, None]
    token = torch.arange(S, device=score.device)
    end = length.long()[:, None, None]
    critical, recent, marginal = (column.long()[:, None, None] for column in sizes[length.long()].unbind(-1))
    total = total.masked_fill(token >= end - recent, torch.finfo(torch.float32).max)
    total = total.masked_fill(token == end - 1, torch.inf)
    seen = (token < end).expand_as(total)

    def best(among: Tensor, count: Tensor) -> Tensor:
        """The `count` best tokens of `among`."""
        order = total.masked_fill(~among, -1).argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(-1, order, token.expand_as(order))
        return (rank < count) & among

    top = best(seen, critical)
    if moves is None:
        tier.copy_(CRITICAL * top + MARGINAL * (best(seen, critical + marginal) & ~top))
        return
    inside = torch.zeros(B, G, S + 1, dtype=torch.bool, device=score.device)
    inside = inside.scatter_(-1, held.long().where(held >= 0, S), True)[..., :S]
    enter = best(top & ~inside, torch.as_tensor(moves + 1))
    stay = best(inside & seen, critical - enter.sum(-1, keepdim=True))
    tier.copy_(CRITICAL * (enter | stay))


def assign_slots_torch(
    position: Tensor, tier: Tensor, lowest: int, length: Tensor, moves: Moves, newest_slot: Tensor, moved: Tensor
) -> None:
    """Give every token whose tier is at least `lowest` a slot of the pool; see cache.assign_slots.

    position (B, G, N) int32 is updated in place: the token in each slot, -1 if none. moves is written, by slot; the
    newest token is not among them, its row is made on the device. newest_slot (B, G) int32 is written: where the newest
    token lies. moved (1,) int64 grows by the rows to come.
    """
    after, _, _ = cache.assign_slots(position.long(), tier >= lowest)
    newest = length.long()[:, None, None] - 1
    newest_slot.copy_((after == newest).byte().argmax(-1))
    fresh = (after != position) & (after != newest) & (after >= 0)
    order = fresh.byte().argsort(dim=-1, descending=True, stable=True)
    moves.count.copy_(fresh.sum(-1))
    moves.token.copy_(after.where(fresh, -1).gather(-1, order))
    moves.slot.copy_(order.where(fresh.gather(-1, order), -1))
    position.copy_(after)
    moved += moves.count.sum()


def lend_rows_torch(
    row: Tensor, index: Tensor, tier: Tensor, key_position: Tensor, value_position: Tensor, value_slot: Tensor,
    borrowed: Tensor,
) -> None:  # fmt: skip
    """What the marginal tokens borrow, by V slot, and where the value of each K slot lies, for one layer.

    row (L', B, H', S) fp32: the SLM's newest attention. value_slot (B, G, C) int32 and borrowed (B, H, N) fp32 are
    written.
    """
    B, G, N = value_position.shape
    heads, share = row.shape[2], index.shape[1] // G
    sequence = torch.arange(B, device=row.device)[:, None]
    token = value_position.long().clamp(min=0)
    marginal = (value_position >= 0) & (tier.gather(-1, token) == MARGINAL)
    lent = row[index // heads, sequence, index % heads].gather(-1, token.repeat_interleave(share, 1))  # (B, H, N)
    borrowed.copy_(lent.where(marginal.repeat_interleave(share, 1), 0))
    inverse = torch.zeros(B, G, tier.shape[-1] + 1, dtype=torch.long, device=row.device)
    names = torch.arange(N, device=row.device).expand_as(value_position)
    inverse.scatter_(-1, value_position.long().where(value_position >= 0, tier.shape[-1]), names)
    value_slot.copy_(inverse.gather(-1, key_position.long().clamp(min=0)))


# ---- The kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _best(bits, among, count):
    """The `count` largest of the int32 `bits` (none below 0) where `among`, equal ones in order; all if fewer."""
    bits = tl.where(among, bits, -1)
    low = 0  # at least `count` are >= low, or all are wanted
    high = 0x7F800001  # above infinity: none is >= high
    while high - low > 1:
        middle = low + (high - low) // 2
        found = tl.sum((bits >= middle).to(tl.int32), 0)
        low = tl.where(found >= count, middle, low)
        high = tl.where(found > count, high, tl.where(found == count, middle + 1, middle))
    above = bits > low
    equal = bits == low
    spare = count - tl.sum(above.to(tl.int32), 0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= spare))


@triton.jit
def _plan_kernel(
    score_ptr, index_ptr, length_ptr, sizes_ptr, tier_ptr, prior_ptr, held_ptr, index_batch, score_layer, score_batch,
    score_head, prior_batch, capacity, slots, moves,
    G: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr,
    MARGINAL: tl.constexpr, PRIOR: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """One KV head of one sequence: sum the matched heads, find the thresholds, write the tiers."""
    pair = tl.program_id(0)
    b, g = pair // G, pair % G
    length = tl.load(length_ptr + b)
    critical = tl.load(sizes_ptr + length * 3)
    recent = tl.load(sizes_ptr + length * 3 + 1)
    token = tl.arange(0, TOKENS)
    seen = token < length
    total = tl.zeros([TOKENS], tl.float32)
    for i in range(GROUP):
        head = tl.load(index_ptr + b * index_batch + g * GROUP + i)
        line = (head // HEADS) * score_layer + b.to(tl.int64) * score_batch + (head % HEADS) * score_head
        total += tl.load(score_ptr + line + token, mask=seen, other=0.0)
    if PRIOR:
        total += tl.load(prior_ptr + b * prior_batch + token, mask=seen, other=0.0)
    bits = total.to(tl.int32, bitcast=True)
    bits = tl.where(token >= length - recent, 0x7F7FFFFF, bits)  # the largest finite number
    bits = tl.where(token == length - 1, 0x7F800000, bits)  # infinity
    top = _best(bits, seen, critical)
    line = pair.to(tl.int64) * capacity
    if LIMITED:
        tl.store(tier_ptr + line + token, tl.zeros([TOKENS], tl.int8), mask=token < capacity)
        tl.debug_barrier()
        slot = tl.arange(0, SLOTS)
        name = tl.load(held_ptr + pair.to(tl.int64) * slots + slot, mask=slot < slots, other=-1)
        tl.store(tier_ptr + line + name, tl.full([SLOTS], 1, tl.int8), mask=name >= 0)
        tl.debug_barrier()
        inside = tl.load(tier_ptr + line + token, mask=seen, other=0) > 0
        tl.debug_barrier()
        enter = _best(bits, top & (inside == 0), moves + 1)
        stay = _best(bits, inside, critical - tl.sum(enter.to(tl.int32), 0))
        tier = (enter | stay).to(tl.int8) * 2
    else:
        tier = top.to(tl.int8) * 2
        if MARGINAL:
            covered = _best(bits, seen, critical + tl.load(sizes_ptr + length * 3 + 2))
            tier += (covered & (top == 0)).to(tl.int8)
    tl.store(tier_ptr + line + token, tier, mask=token < capacity)


@triton.jit
def _assign_kernel(
    position_ptr, tier_ptr, length_ptr, token_ptr, slot_ptr, count_ptr, newest_ptr, moved_ptr, queue_ptr, mark_ptr,
    slots, capacity, lowest,
    G: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One KV head of one sequence. Who is held is marked in a scratch by token; those who enter queue up in another,
    in order; the n-th free slot takes the n-th of them."""
    pair = tl.program_id(0)
    length = tl.load(length_ptr + pair // G)
    line, base = pair.to(tl.int64) * capacity, pair.to(tl.int64) * slots
    slot = tl.arange(0, SLOTS)
    inside = slot < slots
    for at in range(0, length, TOKENS):
        token = at + tl.arange(0, TOKENS)
        tl.store(mark_ptr + line + token, tl.zeros([TOKENS], tl.int8), mask=token < length)
    tl.debug_barrier()
    held = tl.load(position_ptr + base + slot, mask=inside, other=-1)
    keep = (held >= 0) & (tl.load(tier_ptr + line + held, mask=held >= 0, other=0) >= lowest)
    tl.store(mark_ptr + line + held, tl.full([SLOTS], 1, tl.int8), mask=keep)
    tl.debug_barrier()
    entering = 0
    for at in range(0, length, TOKENS):
        token = at + tl.arange(0, TOKENS)
        wanted = tl.load(tier_ptr + line + token, mask=token < length, other=0) >= lowest
        marked = tl.load(mark_ptr + line + token, mask=token < length, other=1)
        enters = (wanted & (marked == 0)).to(tl.int32)
        nth = entering + tl.cumsum(enters, 0) - 1
        tl.store(queue_ptr + base + nth, token, mask=enters > 0)
        entering += tl.sum(enters, 0)
    tl.debug_barrier()
    free = (inside & (keep == 0)).to(tl.int32)
    nth = tl.cumsum(free, 0) - 1
    takes = (free > 0) & (nth < entering)
    came = tl.load(queue_ptr + base + nth, mask=takes, other=-1)
    held = tl.where(keep, held, came)
    tl.store(position_ptr + base + slot, held, mask=inside)
    tl.store(newest_ptr + pair, tl.sum(tl.where(held == length - 1, slot, 0), 0))
    fresh = takes & (came != length - 1)
    before = tl.cumsum(fresh.to(tl.int32), 0)  # fresh slots up to and including this one
    count = tl.sum(fresh.to(tl.int32), 0)
    place = base + tl.where(fresh, before - 1, count + slot - before)  # the fresh first, both in order
    tl.store(token_ptr + place, tl.where(fresh, came, -1), mask=inside)
    tl.store(slot_ptr + place, tl.where(fresh, slot, -1), mask=inside)
    tl.store(count_ptr + pair, count)
    tl.atomic_add(moved_ptr, count.to(tl.int64))


@triton.jit
def _lend_kernel(
    row_ptr, index_ptr, tier_ptr, key_position_ptr, value_position_ptr, value_slot_ptr, borrowed_ptr, inverse_ptr,
    index_batch, row_layer, row_batch, row_head, critical_slots, value_slots, capacity,
    G: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    b, g = pair // G, pair % G
    line = pair.to(tl.int64) * capacity
    slot = tl.arange(0, VALUES)
    inside = slot < value_slots
    token = tl.load(value_position_ptr + pair.to(tl.int64) * value_slots + slot, mask=inside, other=-1)
    tl.store(inverse_ptr + line + token, slot, mask=token >= 0)
    marginal = (token >= 0) & (tl.load(tier_ptr + line + token, mask=token >= 0, other=0) == 1)
    for i in range(GROUP):
        head = tl.load(index_ptr + b * index_batch + g * GROUP + i)
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


def _warps(width: int) -> int:
    """Threads for a row that stays in registers: 16 to 32 elements each."""
    return max(4, min(32, width // 512))


def plan_layer_triton(
    score: Tensor, index: Tensor, length: Tensor, sizes: Tensor, tier: Tensor, prior: Tensor | None = None,
    held: Tensor | None = None, moves: int | None = None,
) -> None:  # fmt: skip
    B, G, S = tier.shape
    assert score.stride(3) == 1 and index.stride(1) == 1 and tier.is_contiguous()
    limited, tokens = moves is not None, triton.next_power_of_2(S)
    slots = held.shape[2] if limited else 1
    _plan_kernel[(B * G,)](
        score, index, length, sizes, tier, score if prior is None else prior, held if limited else tier,
        index.stride(0), *score.stride()[:3], 0 if prior is None else prior.stride(0), S, slots, moves or 0,
        G=G, GROUP=index.shape[1] // G, HEADS=score.shape[2], TOKENS=tokens, SLOTS=triton.next_power_of_2(slots),
        MARGINAL=not limited, PRIOR=prior is not None, LIMITED=limited, num_warps=_warps(tokens), num_stages=1,
    )  # fmt: skip


def assign_slots_triton(
    position: Tensor, tier: Tensor, lowest: int, length: Tensor, moves: Moves, newest_slot: Tensor, moved: Tensor
) -> None:
    B, G, N = position.shape
    assert all(tensor.is_contiguous() for tensor in (position, tier, newest_slot, *moves))
    slots = triton.next_power_of_2(N)
    _assign_kernel[(B * G,)](
        position, tier, length, *moves, newest_slot, moved, torch.empty_like(position), torch.empty_like(tier),
        N, tier.shape[2], lowest, G=G, SLOTS=slots, TOKENS=TOKENS, num_warps=min(16, _warps(slots)), num_stages=1,
    )  # fmt: skip


def lend_rows_triton(
    row: Tensor, index: Tensor, tier: Tensor, key_position: Tensor, value_position: Tensor, value_slot: Tensor,
    borrowed: Tensor,
) -> None:  # fmt: skip
    B, G, N = value_position.shape
    C, S = key_position.shape[2], tier.shape[2]
    inverse = torch.empty(B, G, S, dtype=torch.int32, device=row.device)
    _lend_kernel[(B * G,)](
        row, index, tier, key_position, value_position, value_slot, borrowed, inverse,
        index.stride(0), *row.stride()[:3], C, N, S,
        G=G, GROUP=index.shape[1] // G, HEADS=row.shape[2], KEYS=triton.next_power_of_2(C),
        VALUES=triton.next_power_of_2(N), num_warps=_warps(triton.next_power_of_2(N)), num_stages=1,
    )  # fmt: skip
