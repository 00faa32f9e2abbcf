"""The plan in Triton: which tokens are critical, which marginal, and the slots of the critical.

No index leaves the GPU.

Where it sits: scores (kernels_scores.py) -> **plan -> slots** -> movement -> LLM, on a side stream of the decode step
(graph.py). Layers of the LLM whose matched heads lie in the same SLM layers are planned as soon as these are done, and
share a launch, whose programs take the rows, one for each layer, sequence and KV head. `plan_layers` (Eq. 4, Eq. 5)
exists twice with one signature: `..._torch` (the twin) and `..._triton`. The slots could be a launch of their own, as
those of the V pool are (kernels_tiers.py), but here what they need is at hand: who is critical, and who has just become
so.

Ranking does not sort. Positive floats order like their bits, so a number that k tokens reach is searched among the
31-bit integers: from where the last plan's critical set ended it takes some 4 to 7 counts, where bit after bit takes 16
to 20. A program holds its whole row in registers meanwhile: a count is a comparison a token, with one sum over the
program. A row longer than `ROW` tokens does not fit: kernels_long.py.

Bytes, for Qwen2-7B with Qwen2-0.5B in 16 bits: totals and tiers are read, memory and tiers written, 8 a token, layer
and KV head (58 MB, 0.02 ms of an H100 at 4 x 16,384; 0.47 GB, 0.16 ms at 32 x 16,384), the totals out of the L2 cache,
where the launch before has just put them. Most of its time is not bytes: a program has one row at a time, and each of
its stages waits for the one before (17 us a row).

Shapes follow the legend in model.py. Lengths and sizes are device tensors; `sizes` (S + 1, 3) int32 is the table of
critical, recent and marginal tokens by length. L is the number of layers at hand.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_long import BITS, TOKENS, long_kernel, rank_bits, score_bits
from kernels_move import Moves
from kernels_scores import CRITICAL, MARGINAL, whole_loads
from kernels_tiers import assign_slots_torch, fill_slots

# At most, where each takes all registers of a multiprocessor and the LLM does not wait for the plan: its stages wait
# for one another and read little, and what others read meanwhile needs fewer multiprocessors than there are. On an H100
# with 32 x 16,384 tokens, 10 % moved, a step took 10.54 ms, and with a program for each of the 128 rows 10.83; since
# rows take half the time 10.15, and with 32 or 40 programs the same.
PROGRAMS, WHOLE = 48, 16  # warps with all registers
ROW = 32768  # tokens that a program holds in registers: 64 a thread with 16 warps


# ---- The twin --------------------------------------------------------------------------------------------------------


def plan_layers_torch(
    total: Tensor, length: Tensor, sizes: Tensor, tier: Tensor, held: Tensor | None = None, moves: int | None = None,
    memory: Tensor | None = None, slots: tuple | None = None, prior: Tensor | None = None, hurry: bool = False,
    cut: Tensor | None = None,
) -> None:  # fmt: skip
    """Rank the tokens by their scores and cut the ranking into tiers.

    total (L, B, G, S) fp32, of `sum_scores`, none below 0. length (B,) int32. tier (L, B, G, S) int8 is written:
    CRITICAL, MARGINAL or 0; beyond a length it is 0. Recent tokens rank first (the newest before all), equal scores by
    position.

    held (L, B, G, C) int32: the token in each slot of the K pool, -1 if none; for moves and slots. With these, tier
    must say CRITICAL of just these tokens when it comes: some versions of this read the one, some the other.

    moves: at most that many tokens enter the critical set, the newest not counted: of those that are new in the
    ranking's top the best enter, and the best of those held keep the other places. Not for a marginal tier, whose
    tokens would have to be limited too.

    memory (L, B, G, S), fp32 or 16 bits, with `--scores fused`: afterwards who is not critical has total there. What
    the critical have fades as they get what they weigh in the LLM (kernels_eq6.py). From length on it stays as it is.
    Recent tokens must be critical.

    slots: what `assign_slots` (kernels_tiers.py) takes after the length: the critical get the slots, held is updated.
    prior (B, S) fp32, none below 0: total + prior ranks, total is remembered. hurry: the LLM waits for this plan.
    cut (L, B, G) int32: where the last critical set ended, a hint at where the next one may; any number will do. The
    kernel whose rows lie in registers reads and writes it.
    """
    token = torch.arange(total.shape[3], device=total.device)
    end = length.long()[:, None, None]
    critical, recent, marginal = (column.long()[:, None, None] for column in sizes[length.long()].unbind(-1))
    score = total if prior is None else total + prior[:, None]
    score = score.masked_fill(token >= end - recent, torch.finfo(torch.float32).max)
    score = score.masked_fill(token == end - 1, torch.inf)
    seen = (token < end).expand_as(total)

    def best(among: Tensor, count: Tensor) -> Tensor:
        """The `count` best tokens of `among`."""
        order = score.masked_fill(~among, -1).argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(-1, order, token.expand_as(order))
        return (rank < count) & among

    top = best(seen, critical)
    if moves is None:
        tier.copy_(CRITICAL * top + MARGINAL * (best(seen, critical + marginal) & ~top))
    else:
        inside = tier == CRITICAL
        enter = best(top & ~inside, torch.as_tensor(moves + 1))
        stay = best(inside & seen, critical - enter.sum(-1, keepdim=True))
        tier.copy_(CRITICAL * (enter | stay))
    if memory is not None:
        memory.copy_(memory.float().where((tier == CRITICAL) | ~seen, total))
    if slots is not None:
        assign_slots_torch(held, tier, CRITICAL, length, *slots)


# ---- The kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _cut(rows, number, count, guess, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Where the `count` best of a row end: (low, last). Among them are those whose bits are above `low`, and those with
    just these bits up to position `last`. rows: the bits in chunks, -1 for `number` fewer than all who compete.

    `many` are at least `low`, fewer than `count` at least `high`. First in leaps from `guess` until it is in between,
    then where a straight line through both counts would have it; every third time in the middle, which no row defeats.
    """
    beyond_all = 0x7F800001  # infinity, the newest token's, is 0x7F800000
    low, many, high, fewer = 0, number + 0, beyond_all, 0
    at, leap, turn = tl.minimum(tl.maximum(guess, 1), beyond_all - 1), 1 << 17, 0
    done = (number <= count).to(tl.int32)  # all of them
    while done == 0:
        found = tl.zeros([CHUNK], tl.int32)
        for i in tl.static_range(CHUNKS):
            found += (rows[i] - at) >> 31  # -1 if it is smaller: half the instructions of a comparison
        there = CHUNK * CHUNKS + tl.sum(found, 0)
        enough = there >= count
        low, many = tl.where(enough, at, low), tl.where(enough, there, many)
        high, fewer = tl.where(enough, high, at), tl.where(enough, fewer, there)
        done = ((there == count) | (high - low == 1)).to(tl.int32)
        share = tl.where(turn % 3 == 2, 0.5, (many - count + 0.5) / (many - fewer + 1.0))
        between = ((high - low).to(tl.float32) * share).to(tl.int32)
        beyond = tl.where((low > 0) & (high < beyond_all), between, tl.where(enough, leap, high - low - leap))
        at = low + tl.minimum(tl.maximum(beyond, 1), high - low - 1)
        leap = tl.where(leap < 1 << 27, leap * 8, leap)
        turn += 1
    last = number * 0 + CHUNK * CHUNKS
    if (number > count) & (many != count):  # more have these bits than there are places: the first of them
        found = tl.zeros([CHUNK], tl.int32)
        for i in tl.static_range(CHUNKS):
            found += (rows[i] > low).to(tl.int32)
        rest = count - tl.sum(found, 0)
        for i in tl.static_range(CHUNKS):
            equal = (rows[i] == low).to(tl.int32)
            token = i * CHUNK + tl.arange(0, CHUNK)
            nth = (equal > 0) & (tl.cumsum(equal, 0) == rest)
            last = tl.minimum(last, tl.min(tl.where(nth, token, CHUNK * CHUNKS), 0))
            rest -= tl.sum(equal, 0)
    return low, last


@triton.jit
def _best(rows, low, last, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Those of a row that a cut leaves above it, a bit for each chunk."""
    found = tl.zeros([CHUNK], tl.int32)
    for i in tl.static_range(CHUNKS):
        token = i * CHUNK + tl.arange(0, CHUNK)
        found |= ((rows[i] > low) | ((rows[i] == low) & (token <= last))).to(tl.int32) << i
    return found


@triton.jit
def _competitors(rows, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """How many tokens of a row compete."""
    found = tl.zeros([CHUNK], tl.int32)
    for i in tl.static_range(CHUNKS):
        found += (rows[i] >= 0).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit
def _row_kernel(
    total_ptr, length_ptr, sizes_ptr, tier_ptr, held_ptr, memory_ptr, source_ptr, target_ptr, count_ptr, newest_ptr,
    moved_ptr, queue_ptr, prior_ptr, cut_ptr, capacity, slots, host_rows, prior_batch, moves, B, pairs,
    G: tl.constexpr, WIDTH: tl.constexpr, MEMORY: tl.constexpr, LIMITED: tl.constexpr, SLOTS: tl.constexpr,
    PRIOR: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Each program takes a KV head of one sequence and layer after the other, its row in registers: CHUNKS tensors of
    CHUNK tokens."""
    at, first = tl.arange(0, CHUNK), tl.program_id(0)
    for more in range(0, pairs - first, tl.num_programs(0)):
        pair = first + more
        length = tl.load(length_ptr + pair // G % B)
        critical = tl.load(sizes_ptr + length * 3)
        recent = tl.load(sizes_ptr + length * 3 + 1)
        marginal = tl.load(sizes_ptr + length * 3 + 2)
        line, base = pair.to(tl.int64) * capacity, pair.to(tl.int64) * slots
        totals, tiers, memories = total_ptr + line, tier_ptr + line, memory_ptr + line
        priors = prior_ptr + pair // G % B * prior_batch
        reach = whole_loads(length, ALIGNED)
        scores, rows = (), ()
        inside = tl.zeros([CHUNK], tl.int32)  # bit i: the token of chunk i is held; so are the other sets below
        # All loads at once: beside the models each takes microseconds, and nothing else runs here meanwhile.
        for i in tl.static_range(CHUNKS):
            token = i * CHUNK + at
            scores = scores + (score_bits(totals, priors, token, reach, PRIOR),)
            if LIMITED | SLOTS:
                inside |= (tl.load(tiers + token, mask=token < capacity, other=0) == 2).to(tl.int32) << i
        if SLOTS:
            slot = tl.arange(0, WIDTH)
            held = tl.load(held_ptr + base + slot, mask=slot < slots, other=-1)
            new = (tl.load(tiers + length - 1) != 2).to(tl.int32)  # the newest token: only a second plan finds it held
        tl.debug_barrier()  # everybody has read who is held
        for i in tl.static_range(CHUNKS):
            rows = rows + (rank_bits(scores[i], i * CHUNK + at, (i + 1) * CHUNK, length, recent),)
        low, last = _cut(rows, length, critical, tl.load(cut_ptr + pair), CHUNK, CHUNKS)
        tl.store(cut_ptr + pair, low)
        top = _best(rows, low, last, CHUNK, CHUNKS)
        enters, below = top & ~inside, tl.zeros([CHUNK], tl.int32)
        if LIMITED:
            coming, staying = (), ()
            for i in tl.static_range(CHUNKS):
                coming = coming + (tl.where((enters >> i) & 1 == 1, rows[i], -1),)
                staying = staying + (tl.where((inside >> i) & 1 == 1, rows[i], -1),)
            comers = _competitors(coming, CHUNK, CHUNKS)
            low, last = _cut(coming, comers, moves + 1, low, CHUNK, CHUNKS)
            enters = _best(coming, low, last, CHUNK, CHUNKS)
            places = critical - tl.minimum(comers, moves + 1)
            low, last = _cut(staying, _competitors(staying, CHUNK, CHUNKS), places, low, CHUNK, CHUNKS)
            top = enters | _best(staying, low, last, CHUNK, CHUNKS)
        elif marginal > 0:
            low, last = _cut(rows, length, critical + marginal, low, CHUNK, CHUNKS)
            below = _best(rows, low, last, CHUNK, CHUNKS) & ~top
        if MEMORY:
            for i in tl.static_range(CHUNKS):
                token = i * CHUNK + at
                score = rows[i].to(tl.float32, bitcast=True)
                if PRIOR:
                    score = tl.load(totals + token, mask=token < reach, other=0.0)
                tl.store(memories + token, score, mask=(token < length) & ((top >> i) & 1 == 0))
        for i in tl.static_range(CHUNKS):
            tier = ((top >> i) & 1) * 2 + ((below >> i) & 1)
            tl.store(tiers + i * CHUNK + at, tier.to(tl.int8), mask=i * CHUNK + at < capacity)
        if SLOTS:
            # Who enters queues up column by column of the chunks, which takes one scan; the newest token comes last.
            enters &= ~tl.where(at == (length - 1) % CHUNK, 1 << ((length - 1) // CHUNK), 0)
            number = tl.zeros([CHUNK], tl.int32)
            for i in tl.static_range(CHUNKS):
                number += (enters >> i) & 1
            coming, place = tl.sum(number, 0), tl.cumsum(number, 0) - number
            # As they are, but spread over the threads one by one, as single numbers are stored: once, not by chunk.
            enters, place = tl.gather(enters, at, 0), tl.gather(place, at, 0)
            for i in tl.static_range(CHUNKS):
                enters_here = (enters >> i) & 1
                tl.store(queue_ptr + base + place, i * CHUNK + at, mask=enters_here == 1)
                place += enters_here
            tl.store(queue_ptr + base + coming, length - 1, mask=new == 1)
            token = tl.maximum(held, 0)
            keep = (held >= 0) & ((tl.gather(top, token % CHUNK, 0) >> (token // CHUNK)) & 1 == 1)
            tl.debug_barrier()  # the queue stands
            fill_slots(held, keep, pair, length, coming + new, coming, held_ptr, source_ptr, target_ptr, count_ptr,
                       newest_ptr, moved_ptr, queue_ptr, slots, host_rows, B * G, WIDTH)  # fmt: skip


# ---- The launcher ----------------------------------------------------------------------------------------------------


def row_warps(capacity: int) -> int:
    """Warps of a program that holds a whole row."""
    return 4 if capacity <= 4096 else 8 if capacity <= 8192 else 16


def plan_layers_triton(
    total: Tensor, length: Tensor, sizes: Tensor, tier: Tensor, held: Tensor | None = None, moves: int | None = None,
    memory: Tensor | None = None, slots: tuple | None = None, prior: Tensor | None = None, hurry: bool = False,
    cut: Tensor | None = None,
) -> None:  # fmt: skip
    L, B, G, S = tier.shape
    limited, C = moves is not None, 0 if held is None else held.shape[3]
    host_rows, given, newest, moved = slots or (0, Moves(*[tier] * 4), tier, tier)  # not written
    tables = [tensor for tensor in (total, tier, held, memory, *given.lists, newest, moved) if tensor is not None]
    assert all(tensor.is_contiguous() for tensor in tables)
    assert prior is None or prior.stride(1) == 1
    assert held is not None or not (limited or slots), "who is held decides: pass the positions"
    queue = tier if slots is None else torch.empty_like(held)
    tables = (
        length, sizes, tier, tier if held is None else held, total if memory is None else memory, *given.lists, newest,
        moved, queue, total if prior is None else prior,
    )  # fmt: skip
    numbers = S, C, host_rows, 0 if prior is None else prior.stride(0), moves or 0, B
    kind = {
        "G": G, "WIDTH": triton.next_power_of_2(max(1, C)), "MEMORY": memory is not None, "LIMITED": limited,
        "SLOTS": slots is not None, "PRIOR": prior is not None,
    }  # fmt: skip
    if S > ROW:
        long_kernel[(L * B * G,)](
            total, *tables, *numbers, **kind, bits_ptr=torch.empty_like(tier, dtype=torch.int32),
            kept_ptr=tier if slots is None else torch.empty_like(tier),
            BITS=BITS, TOKENS=TOKENS, num_warps=8, num_stages=1,
        )  # fmt: skip
        return
    warps = row_warps(S)
    chunk = 4 * 32 * warps  # tokens: four a thread, a load of 16 bytes
    rows = L * B * G
    cut = torch.zeros(L, B, G, dtype=torch.int32, device=total.device) if cut is None else cut
    _row_kernel[(min(rows, PROGRAMS) if warps == WHOLE and not hurry else rows,)](
        total, *tables, cut, *numbers, rows, **kind, CHUNK=chunk, CHUNKS=triton.cdiv(S, chunk), ALIGNED=S % 16 == 0,
        num_warps=warps,
    )  # fmt: skip
