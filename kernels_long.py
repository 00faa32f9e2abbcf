"""The plan of rows that are longer than a program can hold in registers.

Where it sits: under kernels_plan.py, which says what a plan is, launches this one for more than `ROW` tokens, and ranks
by the same `rank_bits`. The scores, as bits, stay in the L2 cache, and each pass over them settles a digit of BITS bits
of the k-th largest by a histogram (radix select).

Shapes follow the legend in model.py.
"""

import triton
import triton.language as tl

from kernels_tiers import assign_line

TOKENS = 2048  # of a row, tokens that a program looks at together
BITS = 4  # of a digit: more make fewer passes, and costlier histograms (a vote of the warp for each bit and bin)


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
def score_bits(total_ptr, prior_ptr, token, reach, PRIOR: tl.constexpr):
    """Scores with their prior, as int32 bits: positive floats order like these."""
    score = tl.load(total_ptr + token, mask=token < reach, other=0.0)
    if PRIOR:
        score += tl.load(prior_ptr + token, mask=token < reach, other=0.0)
    return score.to(tl.int32, bitcast=True)


@triton.jit
def rank_bits(bits, token, end, length, recent):
    """What tokens before `end` rank by, from the bits of their scores: recent tokens on top; -1 from `length` on."""
    if end > length - recent:  # most are neither
        bits = tl.where(token >= length - recent, 0x7F7FFFFF, bits)  # the largest finite number
        bits = tl.where(token == length - 1, 0x7F800000, bits)  # infinity
        bits = tl.where(token < length, bits, -1)
    return bits


@triton.jit
def long_kernel(
    total_ptr, length_ptr, sizes_ptr, tier_ptr, held_ptr, memory_ptr, source_ptr, target_ptr, count_ptr, newest_ptr,
    moved_ptr, queue_ptr, prior_ptr, capacity, slots, host_rows, prior_batch, moves, B,
    G: tl.constexpr, WIDTH: tl.constexpr, MEMORY: tl.constexpr, LIMITED: tl.constexpr, SLOTS: tl.constexpr,
    PRIOR: tl.constexpr, bits_ptr, kept_ptr, BITS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One KV head of one sequence and layer."""
    pair = tl.program_id(0)
    length = tl.load(length_ptr + pair // G % B)
    critical = tl.load(sizes_ptr + length * 3)
    recent = tl.load(sizes_ptr + length * 3 + 1)
    line, base = pair.to(tl.int64) * capacity, pair.to(tl.int64) * slots
    total_ptr += line
    bits_ptr += line
    tier_ptr += line
    memory_ptr += line
    prior_ptr += pair // G % B * prior_batch
    for at in range(0, capacity, TOKENS):
        token = at + tl.arange(0, TOKENS)
        bits = score_bits(total_ptr, prior_ptr, token, length, PRIOR)
        bits = rank_bits(bits, token, at + TOKENS, length, recent)
        tl.store(bits_ptr + token, bits, mask=token < length)
        tl.store(tier_ptr + token, tl.zeros([TOKENS], tl.int8), mask=token < capacity)
    tl.debug_barrier()
    if LIMITED:
        _take(bits_ptr, tier_ptr, length, critical, 0, -1, BITS, TOKENS)  # -1: wants in
        for at in range(0, slots, TOKENS):
            slot = at + tl.arange(0, TOKENS)
            held = tl.load(held_ptr + base + slot, mask=slot < slots, other=-1)
            tl.store(tier_ptr + held, tl.full([TOKENS], -2, tl.int8), mask=held >= 0)  # -2: is in, top or not
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
            score = tl.load(total_ptr + token, mask=token < length, other=0.0)
            critical_now = tl.load(tier_ptr + token, mask=token < length, other=2) == 2
            tl.store(memory_ptr + token, score, mask=~critical_now)
    if SLOTS:
        tl.debug_barrier()
        assign_line(pair, length, 2, tier_ptr - line, held_ptr, source_ptr, target_ptr, count_ptr, newest_ptr,
                    moved_ptr, queue_ptr, kept_ptr, slots, capacity, host_rows, B * G, WIDTH, TOKENS)  # fmt: skip
