"""The tiers in Triton: who is critical, who gets which slot, and what the marginal slots borrow.

No index leaves the GPU.

Where it sits: scores -> **plan -> slots** -> movement (kernels_move.py) -> LLM, between the SLM's step and the LLM's
(graph.py). All scores are there by then, so several layers of the LLM share a launch: one program for each layer,
sequence and KV head. Each function exists twice with one signature, `..._torch` (the twin) and `..._triton`.

| function       | flow                                                                 | paper                  |
| -------------- | -------------------------------------------------------------------- | ---------------------- |
| `plan_layers`  | scores of the matched heads -> the tier of every token               | Eq. 4, Eq. 5           |
| `assign_slots` | tiers -> slots: who stays keeps his, the rest fills the gaps         | Algorithm 1            |
| `lend_rows`    | the SLM's newest row -> what the marginal slots borrow               | Eq. 6                  |
| `admit_newest` | no plan in this step: the newest token takes a free slot             | -                      |

Ranking does not sort. Positive floats order like their bits, so the k-th largest is found digit by digit (radix
select): a histogram of the leading BITS bits says in which bin it lies and how many are above, then the next digit of
that bin alone, and so on until the bin holds no more than are wanted. Random scores are told apart after 5 or 6 of the
8 digits. The sums are made once, in a scratch that stays in the L2 cache (66 KB a program at 16,896 tokens).

Bytes, for Qwen2-7B with Qwen2-0.5B: the floor is every SLM score once, 4 * 24 * 14 a token and sequence (88 MB, 0.03 ms
of an H100 at 4 x 16,384; 0.71 GB, 0.24 ms at 32 x 16,384). The gather reads a row for each of the LLM's 28 * 28 heads
(0.21 and 1.64 GB) and writes 28 * 4 sums (29 and 235 MB), which some 8 passes read from L2. Estimated, not measured:
0.15 ms and 1.2 ms a step for all layers, of which the LLM waits for the first group only (graph.py).

Shapes follow the legend in model.py. Lengths and sizes are device tensors; `sizes` (S + 1, 3) int32 is the table of
critical, recent and marginal tokens by length. L is the number of layers at hand.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

import cache
from kernels_move import Moves

CRITICAL, MARGINAL = 2, 1  # a token's tier in a plan; 0 is offloaded
TOKENS = 2048  # tokens that a program looks at together
BITS = 4  # of a digit: more make fewer passes, and costlier histograms (a vote of the warp for each bit and bin)


# ---- The twins -------------------------------------------------------------------------------------------------------


def plan_layers_torch(
    score: Tensor, index: Tensor, length: Tensor, sizes: Tensor, tier: Tensor, prior: Tensor | None = None,
    held: Tensor | None = None, moves: int | None = None,
) -> None:  # fmt: skip
    """Rank the tokens by the scores of the matched SLM heads and cut the ranking into tiers.

    score (L', B, H', S) fp32, none below 0. index (B, L, H) int64: f(i), counted l' * H' + h'. length (B,) int32. tier
    (L, B, G, S) int8 is written: CRITICAL, MARGINAL or 0; beyond a length it is 0. The scores of the H/G heads of a KV
    head are summed, recent tokens rank first (the newest before all), equal scores rank by position. prior (B, S)
    fp32, not below 0, is added to every sum.

    moves: at most that many tokens enter the critical set, the newest not counted: of those that are new in the
    ranking's top the best enter, and the best of those held (held (L, B, G, C) int32: their positions, -1 for an empty
    slot) keep the other places. Not for a marginal tier, whose tokens would have to be limited too.
    """
    L, B, G, S = tier.shape
    heads = score.shape[2]
    sequence = torch.arange(B, device=score.device)[:, None, None]
    total = score[index // heads, sequence, index % heads].view(B, L, G, -1, S).sum(3).transpose(0, 1)  # (L, B, G, S)
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
    inside = torch.zeros(L, B, G, S + 1, dtype=torch.bool, device=score.device)
    inside = inside.scatter_(-1, held.long().where(held >= 0, S), True)[..., :S]
    enter = best(top & ~inside, torch.as_tensor(moves + 1))
    stay = best(inside & seen, critical - enter.sum(-1, keepdim=True))
    tier.copy_(CRITICAL * (enter | stay))


def assign_slots_torch(
    position: Tensor, tier: Tensor, lowest: int, length: Tensor, moves: Moves, newest_slot: Tensor, moved: Tensor
) -> None:
    """Give every token whose tier is at least `lowest` a slot of the pool; see cache.assign_slots.

    position (L, B, G, N) int32 is updated in place: the token in each slot, -1 if none. moves is written, by slot; the
    newest token is not among them, its row is made on the device. newest_slot (L, B, G) int32 is written: where the
    newest token lies. moved (1,) int64 grows by the rows to come.
    """
    after = cache.assign_slots(position.long().flatten(0, 1), (tier >= lowest).flatten(0, 1))[0].view_as(position)
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
def _take(bits_ptr, tier_ptr, end, count, AMONG: tl.constexpr, TAKEN: tl.constexpr, BITS: tl.constexpr,
          TOKENS: tl.constexpr):  # fmt: skip
    """Of the tokens before `end` whose byte is AMONG the `count` best get the byte TAKEN: those with the largest int32
    bits (none below 0), equal ones in order, all if there are fewer. Returns how many they are."""
    end = tl.where(count > 0, end, 0)
    bins = tl.arange(0, 1 << BITS)
    prefix = 0  # the digits found so far: whoever has larger ones is taken
    rest = count + 0  # how many of those with these digits are taken
    shift = (30 // BITS) * BITS
    done = 0
    while done == 0:
        found = tl.zeros([1 << BITS], tl.int32)
        for at in range(0, end, TOKENS):
            token = at + tl.arange(0, TOKENS)
            bits = tl.load(bits_ptr + token, mask=token < end, other=0)
            among = (tl.load(tier_ptr + token, mask=token < end, other=-9) == AMONG) & (bits >> shift >> BITS == prefix)
            # Bin 0 counts everybody else too: it is the last that is asked, when all the others were too few.
            found += tl.histogram(tl.where(among, (bits >> shift) & ((1 << BITS) - 1), 0), 1 << BITS)
        from_here = tl.sum(found, 0) - tl.cumsum(found, 0) + found  # how many have this digit or a larger one
        digit = tl.maximum(tl.sum((from_here >= rest).to(tl.int32), 0) - 1, 0)
        rest -= tl.sum(tl.where(bins > digit, found, 0), 0)
        prefix = (prefix << BITS) + digit
        done = ((tl.sum(tl.where(bins == digit, found, 0), 0) == rest) | (shift == 0)).to(tl.int32)
        shift -= BITS * (1 - done)
    equals = 0
    taken = 0
    for at in range(0, end, TOKENS):
        token = at + tl.arange(0, TOKENS)
        leading = tl.load(bits_ptr + token, mask=token < end, other=0) >> shift
        among = tl.load(tier_ptr + token, mask=token < end, other=-9) == AMONG
        equal = (among & (leading == prefix)).to(tl.int32)
        nth = equals + tl.cumsum(equal, 0)
        take = among & ((leading > prefix) | ((equal > 0) & (nth <= rest)))
        tl.store(tier_ptr + token, tl.full([TOKENS], TAKEN, tl.int8), mask=take)
        equals += tl.sum(equal, 0)
        taken += tl.sum(take.to(tl.int32), 0)
    tl.debug_barrier()
    return taken


@triton.jit
def _plan_kernel(
    score_ptr, index_ptr, length_ptr, sizes_ptr, tier_ptr, bits_ptr, prior_ptr, held_ptr, index_batch, index_layer,
    score_layer, score_batch, score_head, prior_batch, capacity, slots, moves, B,
    G: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr,
    MARGINAL: tl.constexpr, PRIOR: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """One KV head of one sequence and layer: sum the matched heads once, then take who belongs to each tier."""
    line = tl.program_id(0)
    layer, b, g = line // (B * G), line // G % B, line % G
    length = tl.load(length_ptr + b)
    critical = tl.load(sizes_ptr + length * 3)
    recent = tl.load(sizes_ptr + length * 3 + 1)
    tier_ptr += line.to(tl.int64) * capacity
    bits_ptr += line.to(tl.int64) * capacity
    index_ptr += b * index_batch + layer * index_layer + g * GROUP
    for at in range(0, capacity, TOKENS):
        token = at + tl.arange(0, TOKENS)
        seen = token < length
        total = tl.zeros([TOKENS], tl.float32)
        for i in tl.static_range(GROUP):  # unrolled: the loads of all heads are under way together
            head = tl.load(index_ptr + i)
            source = (head // HEADS) * score_layer + b.to(tl.int64) * score_batch + (head % HEADS) * score_head
            total += tl.load(score_ptr + source + token, mask=seen, other=0.0)
        if PRIOR:
            total += tl.load(prior_ptr + b * prior_batch + token, mask=seen, other=0.0)
        bits = total.to(tl.int32, bitcast=True)
        bits = tl.where(token >= length - recent, 0x7F7FFFFF, bits)  # the largest finite number
        bits = tl.where(token == length - 1, 0x7F800000, bits)  # infinity
        tl.store(bits_ptr + token, bits, mask=seen)
        tl.store(tier_ptr + token, tl.zeros([TOKENS], tl.int8), mask=token < capacity)
    tl.debug_barrier()
    if LIMITED:
        _take(bits_ptr, tier_ptr, length, critical, 0, -1, BITS, TOKENS)  # -1: wants in
        held_ptr += line.to(tl.int64) * slots
        for at in range(0, slots, TOKENS):
            slot = at + tl.arange(0, TOKENS)
            name = tl.load(held_ptr + slot, mask=slot < slots, other=-1)
            tl.store(tier_ptr + name, tl.full([TOKENS], -2, tl.int8), mask=name >= 0)  # -2: is in, top or not
        tl.debug_barrier()
        entered = _take(bits_ptr, tier_ptr, length, moves + 1, -1, 2, BITS, TOKENS)
        _take(bits_ptr, tier_ptr, length, critical - entered, -2, 2, BITS, TOKENS)
        for at in range(0, length, TOKENS):  # those who may not enter, and those who leave
            token = at + tl.arange(0, TOKENS)
            tier = tl.load(tier_ptr + token, mask=token < length, other=0)
            tl.store(tier_ptr + token, tl.zeros([TOKENS], tl.int8), mask=(token < length) & (tier < 0))
    else:
        _take(bits_ptr, tier_ptr, length, critical, 0, 2, BITS, TOKENS)
        if MARGINAL:
            _take(bits_ptr, tier_ptr, length, tl.load(sizes_ptr + length * 3 + 2), 0, 1, BITS, TOKENS)


@triton.jit
def _assign_kernel(
    position_ptr, tier_ptr, length_ptr, token_ptr, slot_ptr, count_ptr, newest_ptr, moved_ptr, queue_ptr, wanted_ptr,
    slots, capacity, lowest, B,
    G: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One KV head of one sequence and layer. A scratch by token says who is wanted and has no slot; they queue up in
    another, in order; the n-th free slot takes the n-th of them."""
    pair = tl.program_id(0)
    length = tl.load(length_ptr + pair // G % B)
    line, base = pair.to(tl.int64) * capacity, pair.to(tl.int64) * slots
    slot = tl.arange(0, SLOTS)
    inside = slot < slots
    for at in range(0, length, TOKENS):
        token = at + tl.arange(0, TOKENS)
        tier = tl.load(tier_ptr + line + token, mask=token < length, other=0)
        tl.store(wanted_ptr + line + token, (tier >= lowest).to(tl.int8), mask=token < length)
    tl.debug_barrier()
    held = tl.load(position_ptr + base + slot, mask=inside, other=-1)
    keep = (held >= 0) & (tl.load(wanted_ptr + line + held, mask=held >= 0, other=0) > 0)
    tl.store(wanted_ptr + line + held, tl.zeros([SLOTS], tl.int8), mask=keep)
    tl.debug_barrier()
    entering = 0
    for at in range(0, length, TOKENS):
        token = at + tl.arange(0, TOKENS)
        enters = tl.load(wanted_ptr + line + token, mask=token < length, other=0).to(tl.int32)
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


def _warps(width: int) -> int:
    """Threads for a row of slots that stays in registers: 8 elements each, up to 16 warps."""
    return max(4, min(16, width // 256))


def plan_layers_triton(
    score: Tensor, index: Tensor, length: Tensor, sizes: Tensor, tier: Tensor, prior: Tensor | None = None,
    held: Tensor | None = None, moves: int | None = None,
) -> None:  # fmt: skip
    L, B, G, S = tier.shape
    limited = moves is not None
    assert score.stride(3) == 1 and index.stride(2) == 1 and tier.is_contiguous()
    assert not limited or held.is_contiguous()
    _plan_kernel[(L * B * G,)](
        score, index, length, sizes, tier, torch.empty_like(tier, dtype=torch.int32),
        score if prior is None else prior, held if limited else tier, *index.stride()[:2], *score.stride()[:3],
        0 if prior is None else prior.stride(0), S, held.shape[3] if limited else 0, moves or 0, B,
        G=G, GROUP=index.shape[2] // G, HEADS=score.shape[2], BITS=BITS, TOKENS=TOKENS,
        MARGINAL=not limited, PRIOR=prior is not None, LIMITED=limited, num_warps=8, num_stages=1,
    )  # fmt: skip


def assign_slots_triton(
    position: Tensor, tier: Tensor, lowest: int, length: Tensor, moves: Moves, newest_slot: Tensor, moved: Tensor
) -> None:
    L, B, G, N = position.shape
    assert all(tensor.is_contiguous() for tensor in (position, tier, newest_slot, *moves))
    slots = triton.next_power_of_2(N)
    _assign_kernel[(L * B * G,)](
        position, tier, length, *moves, newest_slot, moved, torch.empty_like(position), torch.empty_like(tier),
        N, tier.shape[3], lowest, B, G=G, SLOTS=slots, TOKENS=TOKENS, num_warps=_warps(slots), num_stages=1,
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
        VALUES=triton.next_power_of_2(N), num_warps=_warps(triton.next_power_of_2(N)), num_stages=1,
    )  # fmt: skip
