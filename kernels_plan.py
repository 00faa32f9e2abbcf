"""The plan in Triton: which tokens are critical, which marginal. No index leaves the GPU.

Where it sits: scores -> **plan** -> slots (kernels_tiers.py) -> movement -> LLM, on a side stream of the decode step
(graph.py). Layers of the LLM whose matched heads lie in the same SLM layers are planned as soon as these are done, and
share a launch: one program for each layer, sequence and KV head. `plan_layers` (Eq. 4, Eq. 5) exists twice with one
signature: `..._torch` (the twin) and `..._triton`.

Ranking does not sort. Positive floats order like their bits, so the k-th largest is found bit by bit, the highest
first: a bit stays if k tokens or more are as large with it. Random scores are told apart after some 20 of the 31 bits,
and the search ends there. A program holds its whole row in registers meanwhile: the scores are read once and the tiers
written once, and what is left is a comparison a token and bit, with one sum over the program for each bit.

A row longer than `ROW` tokens does not fit. Its sums go to a scratch in the L2 cache, and each pass over them settles
a digit of BITS bits by a histogram (radix select).

Bytes, for Qwen2-7B with Qwen2-0.5B: the floor is every SLM score once, 4 * 24 * 14 a token and sequence (88 MB, 0.03 ms
of an H100 at 4 x 16,384; 0.71 GB, 0.24 ms at 32 x 16,384). The gather reads a row for each of the LLM's 28 * 28 heads
(0.21 and 1.64 GB), some of them from L2. Fused scores, the default, read and write the LLM's memory besides: 4 * 28 * 4
a token and sequence each way (30 MB and 0.24 GB). Scores may come as logits, with the log of each head's sum (`lse`,
see kernels_decode.py): the bytes are the same, and each number that the gather reads costs an exp2.

Shapes follow the legend in model.py. Lengths and sizes are device tensors; `sizes` (S + 1, 3) int32 is the table of
critical, recent and marginal tokens by length. L is the number of layers at hand.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_scores import CRITICAL, MARGINAL, head_rows, head_sum, head_sum_torch, whole_loads

ROW = 32768  # tokens that a program holds in registers: 64 a thread with 16 warps
TOKENS = 2048  # of a longer row, tokens that a program looks at together
BITS = 4  # of a digit: more make fewer passes, and costlier histograms (a vote of the warp for each bit and bin)


# ---- The twin --------------------------------------------------------------------------------------------------------


def plan_layers_torch(
    score: Tensor, index: Tensor, length: Tensor, sizes: Tensor, tier: Tensor, prior: Tensor | None = None,
    held: Tensor | None = None, moves: int | None = None, memory: Tensor | None = None, decay: float = 0.0,
    lse: Tensor | None = None,
) -> None:  # fmt: skip
    """Rank the tokens by the scores of the matched SLM heads and cut the ranking into tiers.

    score (L', B, H', S) fp32, none below 0. index (B, L, H) int64: f(i), counted l' * H' + h'. length (B,) int32. tier
    (L, B, G, S) int8 is written: CRITICAL, MARGINAL or 0; beyond a length it is 0. The scores of the H/G heads of a KV
    head are summed, recent tokens rank first (the newest before all), equal scores rank by position. prior (B, S)
    fp32, not below 0, is added to every sum. lse (L', B, H') fp32: score holds logits, see `head_sum_torch`.

    moves: at most that many tokens enter the critical set, the newest not counted: of those that are new in the
    ranking's top the best enter, and the best of those held (held (L, B, G, C) int32: their positions, -1 for an empty
    slot) keep the other places. Not for a marginal tier, whose tokens would have to be limited too.

    memory (L, B, G, S) fp32, with `--scores fused`: score is the SLM's newest row, and the ranking by decay * memory +
    sum. Afterwards that is the memory of who is not critical (without the prior); the critical have decay * memory, and
    wait for the LLM's own weights (kernels_eq6.py). Beyond a length it is 0. Recent tokens must be critical.
    """
    L, B, G, S = tier.shape
    total = head_sum_torch(score, index, G, lse)
    if memory is not None:
        total = decay * memory + total
    remembered = total
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
    else:
        inside = torch.zeros(L, B, G, S + 1, dtype=torch.bool, device=score.device)
        inside = inside.scatter_(-1, held.long().where(held >= 0, S), True)[..., :S]
        enter = best(top & ~inside, torch.as_tensor(moves + 1))
        stay = best(inside & seen, critical - enter.sum(-1, keepdim=True))
        tier.copy_(CRITICAL * (enter | stay))
    if memory is not None:
        memory.copy_((decay * memory).where(tier == CRITICAL, remembered).where(seen, 0))


# ---- The kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _bits(
    token, length, recent, reach, score_ptr, heads, prior_ptr, memory_ptr, decay,
    GROUP: tl.constexpr, PRIOR: tl.constexpr, MEMORY: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """What tokens are ranked by, as int32 bits: the sums over the matched heads, recent tokens on top; -1 from `length`
    on."""
    total = head_sum(score_ptr, heads, token, reach, GROUP, LOGITS)
    if MEMORY:
        total = decay * tl.load(memory_ptr + token, mask=token < reach, other=0.0) + total
    if PRIOR:
        total += tl.load(prior_ptr + token, mask=token < reach, other=0.0)
    bits = total.to(tl.int32, bitcast=True)
    bits = tl.where(token >= length - recent, 0x7F7FFFFF, bits)  # the largest finite number
    bits = tl.where(token == length - 1, 0x7F800000, bits)  # infinity
    return tl.where(token < length, bits, -1)


@triton.jit
def _remember(token, bits, critical, length, reach, prior_ptr, memory_ptr, decay, PRIOR: tl.constexpr):
    """The memory after a plan: the score, or what fades where the LLM will see the token."""
    score = bits.to(tl.float32, bitcast=True)
    if PRIOR:
        score -= tl.load(prior_ptr + token, mask=token < reach, other=0.0)
    faded = decay * tl.load(memory_ptr + token, mask=token < reach, other=0.0)
    memory = tl.where(token < length, tl.where(critical, faded, score), 0.0)
    tl.store(memory_ptr + token, memory, mask=token < reach)


@triton.jit
def _cut(rows, number, count, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Where the `count` best of a row end: (low, last). Among them are those whose bits are above `low`, and those with
    just these bits up to position `last`. rows: the bits in chunks, -1 for `number` fewer than all who compete."""
    low = 0
    bit = 30
    many = number + 0
    done = (number <= count).to(tl.int32)  # all of them
    while done == 0:
        candidate = low | (1 << bit)
        found = tl.zeros([CHUNK], tl.int32)
        for i in tl.static_range(CHUNKS):
            found += (rows[i] - candidate) >> 31  # -1 if it is smaller: half the instructions of a comparison
        many = CHUNK * CHUNKS + tl.sum(found, 0)
        low = tl.where(many >= count, candidate, low)
        done = ((many == count) | (bit == 0)).to(tl.int32)
        bit -= 1
    last = number * 0 + CHUNK * CHUNKS
    if (number > count) & (many != count):  # more have these bits than there are places: the first of them
        found = tl.zeros([CHUNK], tl.int32)
        for i in tl.static_range(CHUNKS):
            found += (rows[i] > low).to(tl.int32)
        rest = count - tl.sum(found, 0)
        for i in tl.static_range(CHUNKS):
            equal = (rows[i] == low).to(tl.int32)
            token = i * CHUNK + tl.arange(0, CHUNK)
            at = (equal > 0) & (tl.cumsum(equal, 0) == rest)
            last = tl.minimum(last, tl.min(tl.where(at, token, CHUNK * CHUNKS), 0))
            rest -= tl.sum(equal, 0)
    return low, last


@triton.jit
def _row_kernel(
    score_ptr, index_ptr, length_ptr, sizes_ptr, tier_ptr, prior_ptr, held_ptr, memory_ptr, lse_ptr, index_batch,
    index_layer, score_layer, score_batch, score_head, prior_batch, capacity, slots, moves, decay, B,
    G: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    ALIGNED: tl.constexpr, PRIOR: tl.constexpr, MEMORY: tl.constexpr, LIMITED: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """One KV head of one sequence and layer, its row in registers: CHUNKS tensors of CHUNK tokens."""
    line = tl.program_id(0)
    layer, b, g = line // (B * G), line // G % B, line % G
    length = tl.load(length_ptr + b)
    critical = tl.load(sizes_ptr + length * 3)
    recent = tl.load(sizes_ptr + length * 3 + 1)
    tier_ptr += line.to(tl.int64) * capacity
    score_ptr += b.to(tl.int64) * score_batch
    prior_ptr += b * prior_batch
    memory_ptr += line.to(tl.int64) * capacity
    reach = whole_loads(length, ALIGNED)
    heads = head_rows(index_ptr + b * index_batch + layer * index_layer + g * GROUP, lse_ptr, score_layer, score_head,
                      b, B, GROUP, HEADS, LOGITS)  # fmt: skip
    rows = ()
    for i in tl.static_range(CHUNKS):
        token = i * CHUNK + tl.arange(0, CHUNK)
        rows = rows + (_bits(token, length, recent, reach, score_ptr, heads, prior_ptr, memory_ptr, decay, GROUP,
                             PRIOR, MEMORY, LOGITS),)  # fmt: skip
    low, last = _cut(rows, length, critical, CHUNK, CHUNKS)
    if LIMITED:
        for i in tl.static_range(CHUNKS):
            token = i * CHUNK + tl.arange(0, CHUNK)
            tl.store(tier_ptr + token, tl.zeros([CHUNK], tl.int8), mask=token < capacity)
        tl.debug_barrier()
        held_ptr += line.to(tl.int64) * slots
        for at in range(0, slots, CHUNK):
            slot = at + tl.arange(0, CHUNK)
            name = tl.load(held_ptr + slot, mask=slot < slots, other=-1)
            tl.store(tier_ptr + name, tl.full([CHUNK], 1, tl.int8), mask=name >= 0)  # 1: is in
        tl.debug_barrier()
        coming, staying = (), ()
        for i in tl.static_range(CHUNKS):
            token = i * CHUNK + tl.arange(0, CHUNK)
            inside = tl.load(tier_ptr + token, mask=token < capacity, other=0) == 1
            top = (rows[i] > low) | ((rows[i] == low) & (token <= last))
            coming = coming + (tl.where(top & (inside == 0), rows[i], -1),)
            staying = staying + (tl.where(inside, rows[i], -1),)
        tl.debug_barrier()
        comers = _competitors(coming, CHUNK, CHUNKS)
        low, last = _cut(coming, comers, moves + 1, CHUNK, CHUNKS)
        places = critical - tl.minimum(comers, moves + 1)
        low_stay, last_stay = _cut(staying, _competitors(staying, CHUNK, CHUNKS), places, CHUNK, CHUNKS)
        for i in tl.static_range(CHUNKS):
            token = i * CHUNK + tl.arange(0, CHUNK)
            enters = (coming[i] > low) | ((coming[i] == low) & (token <= last))
            stays = (staying[i] > low_stay) | ((staying[i] == low_stay) & (token <= last_stay))
            tl.store(tier_ptr + token, tl.where(enters | stays, 2, 0).to(tl.int8), mask=token < capacity)
            if MEMORY:
                _remember(token, rows[i], enters | stays, length, reach, prior_ptr, memory_ptr, decay, PRIOR)
    else:
        low_held, last_held = low, last
        marginal = tl.load(sizes_ptr + length * 3 + 2)
        if marginal > 0:
            low_held, last_held = _cut(rows, length, critical + marginal, CHUNK, CHUNKS)
        for i in tl.static_range(CHUNKS):
            token = i * CHUNK + tl.arange(0, CHUNK)
            top = (rows[i] > low) | ((rows[i] == low) & (token <= last))
            held = (rows[i] > low_held) | ((rows[i] == low_held) & (token <= last_held))
            tier = tl.where(top, 2, tl.where(held, 1, 0))
            tl.store(tier_ptr + token, tier.to(tl.int8), mask=token < capacity)
            if MEMORY:
                _remember(token, rows[i], top, length, reach, prior_ptr, memory_ptr, decay, PRIOR)


@triton.jit
def _competitors(rows, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """How many tokens of a row compete."""
    found = tl.zeros([CHUNK], tl.int32)
    for i in tl.static_range(CHUNKS):
        found += (rows[i] >= 0).to(tl.int32)
    return tl.sum(found, 0)


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
def _long_kernel(
    score_ptr, index_ptr, length_ptr, sizes_ptr, tier_ptr, prior_ptr, held_ptr, memory_ptr, lse_ptr, bits_ptr,
    index_batch, index_layer, score_layer, score_batch, score_head, prior_batch, capacity, slots, moves, decay, B,
    G: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr,
    PRIOR: tl.constexpr, MEMORY: tl.constexpr, LIMITED: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """The same for a row of any length: sum the matched heads once, then take who belongs to each tier."""
    line = tl.program_id(0)
    layer, b, g = line // (B * G), line // G % B, line % G
    length = tl.load(length_ptr + b)
    critical = tl.load(sizes_ptr + length * 3)
    recent = tl.load(sizes_ptr + length * 3 + 1)
    tier_ptr += line.to(tl.int64) * capacity
    bits_ptr += line.to(tl.int64) * capacity
    score_ptr += b.to(tl.int64) * score_batch
    prior_ptr += b * prior_batch
    memory_ptr += line.to(tl.int64) * capacity
    heads = head_rows(index_ptr + b * index_batch + layer * index_layer + g * GROUP, lse_ptr, score_layer, score_head,
                      b, B, GROUP, HEADS, LOGITS)  # fmt: skip
    for at in range(0, capacity, TOKENS):
        token = at + tl.arange(0, TOKENS)
        bits = _bits(token, length, recent, length, score_ptr, heads, prior_ptr, memory_ptr, decay, GROUP, PRIOR,
                     MEMORY, LOGITS)  # fmt: skip
        tl.store(bits_ptr + token, bits, mask=token < length)
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
        _take(bits_ptr, tier_ptr, length, tl.load(sizes_ptr + length * 3 + 2), 0, 1, BITS, TOKENS)
    if MEMORY:
        tl.debug_barrier()
        for at in range(0, length, TOKENS):
            token = at + tl.arange(0, TOKENS)
            bits = tl.load(bits_ptr + token, mask=token < length, other=0)
            top = tl.load(tier_ptr + token, mask=token < length, other=0) == 2
            _remember(token, bits, top, length, length, prior_ptr, memory_ptr, decay, PRIOR)


# ---- The launcher ----------------------------------------------------------------------------------------------------


def row_warps(capacity: int) -> int:
    """Warps of a program that holds a whole row."""
    return 4 if capacity <= 4096 else 8 if capacity <= 8192 else 16


def plan_layers_triton(
    score: Tensor, index: Tensor, length: Tensor, sizes: Tensor, tier: Tensor, prior: Tensor | None = None,
    held: Tensor | None = None, moves: int | None = None, memory: Tensor | None = None, decay: float = 0.0,
    lse: Tensor | None = None,
) -> None:  # fmt: skip
    L, B, G, S = tier.shape
    limited = moves is not None
    assert score.stride(3) == 1 and index.stride(2) == 1 and tier.is_contiguous()
    assert all(tensor is None or tensor.is_contiguous() for tensor in (memory, lse))
    assert not limited or held.is_contiguous()
    tables = (
        score, index, length, sizes, tier, score if prior is None else prior, held if limited else tier,
        score if memory is None else memory, score if lse is None else lse,
    )  # fmt: skip
    numbers = (
        *index.stride()[:2], *score.stride()[:3], 0 if prior is None else prior.stride(0), S,
        held.shape[3] if limited else 0, moves or 0, decay, B,
    )  # fmt: skip
    kind = {
        "G": G, "GROUP": index.shape[2] // G, "HEADS": score.shape[2],
        "PRIOR": prior is not None, "MEMORY": memory is not None, "LIMITED": limited,
        "LOGITS": lse is not None,
    }  # fmt: skip
    if S > ROW:
        bits = torch.empty_like(tier, dtype=torch.int32)
        _long_kernel[(L * B * G,)](*tables, bits, *numbers, **kind, BITS=BITS, TOKENS=TOKENS, num_warps=8, num_stages=1)
        return
    warps = row_warps(S)
    chunk = 4 * 32 * warps  # tokens: four a thread, a load of 16 bytes
    _row_kernel[(L * B * G,)](
        *tables, *numbers, **kind, CHUNK=chunk, CHUNKS=triton.cdiv(S, chunk), ALIGNED=S % 16 == 0, num_warps=warps,
    )  # fmt: skip
