"""From scores to tiers, from tiers to slots and to lists of rows that move: nothing of it reaches the host.

Where it sits: scores -> **tier plan -> slots** -> migration (ops.py) -> LLM, for one layer of the LLM at a time (Eq. 4,
5). `plan_tiers` chooses between its plain PyTorch truth and its Triton version (ops.py).

A list of places (ops.Slots) is the only link between slots and tokens. A token that stays in its tier keeps its slot;
one that leaves frees it; one that comes, of whatever KV head, takes a free one, and its row is listed to be brought.
Beyond the paper, the KV heads of a layer share its slots: a head that looks at hundreds of tokens gets more of them
than one that looks at three (AdaKV, arXiv 2407.11550, does so once, for a prompt). Between heads, scores are compared
by their level, an eighth of an octave, so that a count of tokens by head and level is all that a head needs to know of
the others.

The Triton plan is three launches: tokens are counted by level; one program for each KV head finds its share and its
tokens; the slots that heads have freed are dealt to the tokens that come. Nothing is sorted: positive floats order like
their bits, so the bits of the last token that is in are searched within its level, each time counting how many tokens
are above. A row of up to ROW tokens stays in registers, of a longer one the rest is read again.

Shapes follow the legend in model.py.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ops import Slots, use_triton

RECENT, NEWEST = 0x7F7FFFFF, 0x7F800000  # bits of the largest fp32 and of infinity: what these tokens rank by
LEVELS = 256  # 0: never taken; 1 to 254: eighths of an octave from 2 ** -27 to 26, and what is beyond; 255: recent
LEVEL_BITS, LEVEL_BASE = 20, 799  # of a score's bits, those below its level; the level before the first
ROW = 32768  # tokens of a row that a program holds in registers
COUNTED = 1024  # tokens of a program that counts


# ---- The plan --------------------------------------------------------------------------------------------------------


def shares_torch(counts: Tensor, most: Tensor, shared: bool) -> Tensor:
    """How many of its best tokens each KV head takes: (B, G) int64.

    counts (B, G, LEVELS): tokens of each level or above; most (B, 1): tokens a head on average. shared: as many levels,
    from the top, as fit into G * most; of the next level the heads take what is left, the first ones first. Else `most`
    for each. No head takes more than it has.
    """
    G = counts.shape[1]
    if not shared:
        return counts[..., 1].minimum(most)
    level = (counts[..., 1:].sum(1) > G * most).sum(-1, keepdim=True) + 1  # the last that fits; 256: none does
    padded = F.pad(counts, (0, 1))
    taken, more = (padded.gather(2, at[:, None].expand(-1, G, 1))[..., 0] for at in (level, (level - 1).clamp(min=1)))
    extra, left = more - taken, G * most - taken.sum(-1, keepdim=True)
    return taken + (left - extra.cumsum(-1) + extra).clamp(min=0).minimum(extra)


def plan_tiers_torch(
    total: Tensor, length: Tensor, sizes: Tensor, shared: bool, critical: Slots, marginal: Slots | None,
    memory: Tensor | None, newest: Tensor, rows: Tensor, count: Tensor, mark: Tensor, levels: Tensor, host_rows: int,
) -> None:  # fmt: skip
    """Rank the tokens of one layer, cut the ranking into tiers, give the tiers' tokens their slots.

    total (B, G, S) fp32: scores; a token whose score is below 0 is never taken. length (B,) int32: tokens with the
    newest one. sizes (S + 1, 3) int32: critical, recent (no more) and marginal tokens of a KV head by length, or if
    they are shared, of a head on average (`shares_torch`). Recent tokens rank first, the newest first; equal scores of
    a head by position.

    critical and marginal are updated; marginal None: there is no such tier. newest (B, G, T) int32 is written: the
    slots of the newest token and, with drafts, of the T - 1 tokens after it, which are critical whatever they score and
    have the last places of their head. memory (B, G, S), if given: tokens that are not critical have their totals there
    afterwards.

    rows (2, 2, n) and count (2,) int32, 0 when they come, are written: for both tiers the first count rows to bring,
    [0] where from, counted by b, g, token with host_rows rows a KV head, and [1] where to, by b, slot. The T newest
    tokens are not among them: their rows are made on the device. Scratches, all 0 and left as they came: mark (B, G, S)
    int8, levels (B, G, LEVELS) int32.
    """
    (B, G, S), T = total.shape, newest.shape[2]
    token, end = torch.arange(S, device=total.device), length.long()[:, None, None]
    most, recent, middling = (n.long()[:, None] for n in sizes[length.long()].unbind(-1))
    bits = total.contiguous().view(torch.int32).long()  # positive floats order like their bits
    bits = bits.masked_fill(token >= end - recent[..., None], RECENT).masked_fill(token == end - 1, NEWEST)
    taken = (bits >= 0) & (token < end)
    level = ((bits >> LEVEL_BITS) - LEVEL_BASE).clamp(1, LEVELS - 2).masked_fill(bits >= RECENT, LEVELS - 1)
    at_level = torch.zeros(B, G, LEVELS, dtype=torch.long, device=total.device)
    at_level.scatter_add_(-1, level.where(taken, 0), torch.ones_like(bits))
    counts = at_level.flip(-1).cumsum(-1).flip(-1)
    share = shares_torch(counts, most, shared)  # (B, G)
    both = shares_torch(counts, most + middling, shared)
    key = ((bits << 24) + (S - token)).where(taken, -1 - token)  # all different: equal scores by position; S < 2 ** 24
    places = sum(slots.slot.shape[1] for slots in (critical, marginal) if slots is not None)
    first = key.topk(min(S, places)).values  # largest first

    def best(count: Tensor) -> Tensor:
        least = first.gather(-1, (count - 1).clamp(0, first.shape[2] - 1)[..., None])
        return taken & (key >= least) & (count > 0)[..., None]

    top = best(share)
    newest.copy_(_assign(critical, top & (token < end - 1), T, rows[0], count[0], host_rows, end[..., 0]))
    if marginal is not None:
        _assign(marginal, best(both) & ~top, 0, rows[1], count[1], host_rows, end[..., 0])
    if memory is not None:
        memory.copy_(memory.where(top | (token >= end), total))


def _assign(
    slots: Slots, wanted: Tensor, drafts: int, rows: Tensor, count: Tensor, host_rows: int, end: Tensor
) -> Tensor:
    """One pool: the places of tokens wanted (B, G, S), and of the `drafts` tokens of each KV head from end - 1 on. The
    n-th token that comes takes the n-th free slot. Returns the slots of the drafts, (B, G, drafts)."""
    (B, G, S), N, device = wanted.shape, slots.token.shape[1], wanted.device
    head, cell = slots.heads(), slots.cells(S)  # (B, N)
    stays = F.pad(wanted.flatten(1), (0, 1)).gather(1, cell.clamp(max=G * S)) & (slots.token < S)
    inside = torch.zeros(B, G * S + 1, dtype=torch.bool, device=device).scatter_(1, cell.where(stays, G * S), True)
    enters = wanted & ~inside[:, :-1].view_as(wanted)
    comes, width = F.pad(enters, (0, drafts), value=True).flatten(1), S + drafts  # (B, G * width)
    queue = torch.full((B, N + 1), -1, device=device)  # the n-th that comes: head * width + token
    queue.scatter_(1, (comes.cumsum(1) - 1).where(comes, N), torch.arange(G * width, device=device).expand(B, -1))
    came = queue[:, :-1].gather(1, ((~stays).cumsum(1) - 1).clamp(min=0)).where(~stays, -1)  # (B, N)
    owner, column = (came // width).where(came >= 0, G).where(~stays, head), came % width
    is_draft = (came >= 0) & (column >= S)
    token = column.where(~is_draft, end - 1 + column - S).where(came >= 0, -1).where(~stays, slots.token)
    fresh = (came >= 0) & ~is_draft
    listed = (fresh.flatten().cumsum(0) - 1).where(fresh.flatten(), rows.shape[1])
    b = torch.arange(B, device=device)[:, None]
    for kind, values in enumerate(((b * G + owner) * host_rows + token, b * N + slots.slot)):
        wide = torch.zeros(rows.shape[1] + 1, dtype=torch.int32, device=device)  # the last column is not listed
        rows[kind] = wide.scatter_(0, listed, values.flatten().int())[:-1]
    count += fresh.sum()
    where = (owner * drafts + column - S).where(is_draft, G * drafts)
    fresh = torch.zeros(B, G * drafts + 1, dtype=torch.int32, device=device).scatter_(1, where, slots.slot)
    order = (2 * owner + is_draft).argsort(dim=1, stable=True)  # the drafts are the last of their head
    slots.slot.copy_(slots.slot.gather(1, order))
    slots.token.copy_(token.gather(1, order))
    slots.begin.copy_((owner[:, None] < torch.arange(G + 2, device=device)[:, None]).sum(-1))
    return fresh[:, :-1].view(B, G, drafts)


@triton.jit
def _bits(total_ptr, token, length, recent):
    """What a token ranks by: the bits of its score, -1 if it is never taken."""
    score = tl.load(total_ptr + token, mask=(token >= 0) & (token < length), other=-1.0)
    bits = tl.maximum(score.to(tl.int32, bitcast=True), -1)
    bits = tl.where(token >= length - recent, 0x7F7FFFFF, bits)  # RECENT
    bits = tl.where(token == length - 1, 0x7F800000, bits)  # NEWEST
    return tl.where((token >= 0) & (token < length), bits, -1)


@triton.jit
def _levels_kernel(
    total_ptr, length_ptr, sizes_ptr, levels_ptr, S, G: tl.constexpr, COUNTED: tl.constexpr, LEVELS: tl.constexpr,
    SHIFT: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    """COUNTED tokens of one KV head of one sequence."""
    pair, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * COUNTED
    length = tl.load(length_ptr + pair // G)
    if at < length:
        bits = _bits(total_ptr + pair * S, at + tl.arange(0, COUNTED), length, tl.load(sizes_ptr + length * 3 + 1))
        level = tl.minimum(tl.maximum((bits >> SHIFT) - BASE, 1), LEVELS - 2)
        level = tl.where(bits >= 0x7F7FFFFF, LEVELS - 1, tl.where(bits < 0, 0, level))
        found = tl.histogram(level, LEVELS)
        tl.atomic_add(levels_ptr + pair * LEVELS + tl.arange(0, LEVELS), found, mask=found > 0, sem="relaxed")


@triton.jit
def _block(LINES: tl.constexpr, WIDTH: tl.constexpr):
    """Places (LINES, WIDTH) of a block of a row: a thread has whole columns."""
    return tl.arange(0, LINES)[:, None] * WIDTH + tl.arange(0, WIDTH)


@triton.jit
def _count(bits, total_ptr, length, recent, value, LINES: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """How many tokens of a row rank at `value` or above it. bits: of its first block, which is all of it if WHOLE."""
    found = tl.sum((bits - value) >> 31, 0)  # -1 for each that is below: fewer instructions than a comparison
    held = LINES * WIDTH
    if not WHOLE:
        for at in range(LINES * WIDTH, length, LINES * WIDTH):
            found += tl.sum((_bits(total_ptr, at + _block(LINES, WIDTH), length, recent) - value) >> 31, 0)
            held += LINES * WIDTH
    return held + tl.sum(found, 0)


@triton.jit
def _cut(
    total_ptr, length, recent, count, counts, LEVELS: tl.constexpr, SHIFT: tl.constexpr, BASE: tl.constexpr,
    LINES: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Where the `count` best end: (low, last). In are tokens with bits above low, and those with just low up to the
    position last. counts (LEVELS,): tokens of each level or above. In the level where they end `many` tokens are at
    least low, `fewer` than count at least high; the next value that is tried is where a straight line through both has
    count, but for every third, which is the middle."""
    at = tl.arange(0, LEVELS)
    level = tl.max(tl.where(counts >= count, at, 0), 0)
    many, fewer = tl.sum(tl.where(at == level, counts, 0), 0), tl.sum(tl.where(at == level + 1, counts, 0), 0)
    low, high = (level + BASE) << SHIFT, (level + 1 + BASE) << SHIFT
    low = tl.where(level == LEVELS - 1, 0x7F7FFFFF, tl.where(level <= 1, 0, low))
    high = tl.where(level == LEVELS - 1, 0x7F800001, tl.where(level == LEVELS - 2, 0x7F7FFFFF, high))
    turn, last = 0, length
    if many > count:
        bits = _bits(total_ptr, _block(LINES, WIDTH), length, recent)
        while (many > count) & (high - low > 1):
            share = (many - count + 0.5) / (many - fewer + 1.0)
            share = tl.where(turn % 3 == 2, 0.5, share)
            middle = low + tl.minimum(tl.maximum((share * (high - low)).to(tl.int32), 1), high - low - 1)
            found = _count(bits, total_ptr, length, recent, middle, LINES, WIDTH, WHOLE)
            enough = found >= count
            low, many = tl.where(enough, middle, low), tl.where(enough, found, many)
            high, fewer = tl.where(enough, high, middle), tl.where(enough, fewer, found)
            turn += 1
    if many > count:  # more tokens than places have just these bits: the first of them are in
        before, last = 0, -1
        for start in range(0, length, WIDTH):
            token = start + tl.arange(0, WIDTH)
            equal = (_bits(total_ptr, token, length, recent) == low).to(tl.int32)
            nth = before + tl.cumsum(equal, 0)
            last = tl.maximum(last, tl.max(tl.where((equal == 1) & (nth <= count - fewer), token, -1), 0))
            before += tl.sum(equal, 0)
    return low, last


@triton.jit
def _within(bits, token, low, last):
    return (bits > low) | ((bits == low) & (token <= last))


@triton.jit
def _enters(total_ptr, mark_ptr, token, length, recent, low, last, over, beyond):
    """1 for tokens that are wanted and in no slot; the newest is not among them."""
    bits = _bits(total_ptr, token, length, recent)
    wanted = _within(bits, token, low, last) & (_within(bits, token, over, beyond) == 0) & (token < length - 1)
    return (wanted & (tl.load(mark_ptr + token, mask=token < length, other=1) == 0)).to(tl.int32)


@triton.jit
def _sift(
    total_ptr, slot_ptr, token_ptr, begin_ptr, next_ptr, spare_ptr, note_ptr, count_ptr, mark_ptr, memory_ptr, length,
    recent, low, last, over, beyond, new, places, N, G: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of one pool the places of one KV head, for the tokens within (low, last) that are not within (over, beyond).
    Those that stay, with their slots, then those that come, then the T newest go to its new places, from `new` on, of
    the next list (2, N); the slots of the others to its old places of spare (N,). A scratch by token marks those that
    stay. memory_ptr: what is not within (low, last) is remembered there. note_ptr takes what `_deal` needs."""
    g = tl.program_id(1)
    old, end = tl.load(begin_ptr + g), tl.load(begin_ptr + g + 1)
    staying = 0
    for at in range(old, end, WIDTH):
        place = at + tl.arange(0, WIDTH)
        slot = tl.load(slot_ptr + place, mask=place < end, other=0)
        token = tl.load(token_ptr + place, mask=place < end, other=-1)
        bits = _bits(total_ptr, token, length, recent)
        stays = _within(bits, token, low, last) & (_within(bits, token, over, beyond) == 0) & (token < length - 1)
        nth = staying + tl.cumsum(stays.to(tl.int32), 0)  # with this one
        tl.store(next_ptr + new + nth - 1, slot, mask=stays)
        tl.store(next_ptr + N + new + nth - 1, token, mask=stays)
        tl.store(spare_ptr + place - nth, slot, mask=(place < end) & (stays == 0))
        tl.store(mark_ptr + token, tl.full([WIDTH], 1, tl.int8), mask=stays)
        staying += tl.sum(stays.to(tl.int32), 0)
    tl.debug_barrier()
    # Column by column of the blocks: one scan for all of them.
    number = tl.zeros([WIDTH], tl.int32)
    for at in range(0, length, WIDTH):
        token = at + tl.arange(0, WIDTH)
        number += _enters(total_ptr, mark_ptr, token, length, recent, low, last, over, beyond)
    place, coming = new + staying + tl.cumsum(number, 0) - number, tl.sum(number, 0)
    for at in range(0, length, WIDTH):
        token = at + tl.arange(0, WIDTH)
        enters = _enters(total_ptr, mark_ptr, token, length, recent, low, last, over, beyond)
        tl.store(next_ptr + N + place, token, mask=enters == 1)
        place += enters
        if memory_ptr is not None:
            outside = (token < length) & (_within(_bits(total_ptr, token, length, recent), token, low, last) == 0)
            tl.store(memory_ptr + token, tl.load(total_ptr + token, mask=outside, other=0.0), mask=outside)
    tl.debug_barrier()
    for at in range(new, new + staying, WIDTH):
        place = at + tl.arange(0, WIDTH)
        token = tl.load(next_ptr + N + place, mask=place < new + staying, other=0)
        tl.store(mark_ptr + token, tl.zeros([WIDTH], tl.int8), mask=place < new + staying)
    for at in range(new + staying + coming, new + places, WIDTH):  # the newest, or nothing
        place = at + tl.arange(0, WIDTH)
        fresh = tl.where(g < G, length - 1 + place - new - staying - coming, -1)
        tl.store(next_ptr + N + place, fresh, mask=place < new + places)
    first = tl.atomic_add(count_ptr, coming, sem="relaxed")  # of the layer's list
    note = note_ptr + g * 6
    tl.store(note, old)
    tl.store(note + 1, end - old - staying)  # freed, in `spare` from `old` on
    tl.store(note + 2, new)
    tl.store(note + 3, staying)
    tl.store(note + 4, coming)
    tl.store(note + 5, first)


@triton.jit
def _shares(counts, most, G: tl.constexpr, LEVELS: tl.constexpr, SHARED: tl.constexpr):
    """How many tokens each KV head takes: `shares_torch`, of counts (HEADS, LEVELS)."""
    level = tl.arange(0, LEVELS)
    share = tl.minimum(tl.sum(tl.where(level == 1, counts, 0), 1), most)
    if SHARED:
        fits = tl.sum(((tl.sum(counts, 0) > G * most) & (level > 0)).to(tl.int32), 0) + 1
        share = tl.sum(tl.where(level == fits, counts, 0), 1)
        extra = tl.sum(tl.where(level == tl.maximum(fits - 1, 1), counts, 0), 1) - share
        left = G * most - tl.sum(share, 0)
        share += tl.minimum(tl.maximum(left - tl.cumsum(extra, 0) + extra, 0), extra)
    return share


@triton.jit
def _own(values, g, HEADS: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, HEADS) == g, values, 0), 0)


@triton.jit(do_not_specialize=["S", "N", "M"])  # else loads of 16 bytes and scattered stores would exchange layouts
def _plan_kernel(
    total_ptr, length_ptr, sizes_ptr, levels_ptr, slot_ptr, token_ptr, begin_ptr, m_slot_ptr, m_token_ptr, m_begin_ptr,
    memory_ptr, next_ptr, spare_ptr, note_ptr, count_ptr, mark_ptr, S, N, M, G: tl.constexpr, T: tl.constexpr,
    SHARED: tl.constexpr, HEADS: tl.constexpr, LEVELS: tl.constexpr, SHIFT: tl.constexpr, BASE: tl.constexpr,
    LINES: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One KV head of one sequence, or (g = G) its free places; WHOLE: a block holds the row. HEADS: G + 1, padded."""
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(length_ptr + b)
    most, recent = tl.load(sizes_ptr + length * 3), tl.load(sizes_ptr + length * 3 + 1)
    middling = tl.load(sizes_ptr + length * 3 + 2)
    head, level = tl.arange(0, HEADS), tl.arange(0, LEVELS)
    cells = levels_ptr + (b * G + head[:, None]) * LEVELS + level
    counts = tl.load(cells, mask=(head < G)[:, None] & (level > 0), other=0)
    counts = tl.sum(counts, 1)[:, None] - tl.cumsum(counts, 1) + counts  # of each level or above
    share = _shares(counts, most, G, LEVELS, SHARED)
    row = b * G + tl.minimum(g, G - 1)
    totals, marks, memory = total_ptr + row * S, mark_ptr + row * S, memory_ptr
    if memory_ptr is not None:
        memory += row * S
    mine = tl.sum(tl.where((head == g)[:, None], counts, 0), 0)
    own = _own(share, g, HEADS)
    length = tl.where(g < G, length, 0)  # no token is wanted without a head
    low, last = _cut(totals, length, recent, own, mine, LEVELS, SHIFT, BASE, LINES, WIDTH, WHOLE)
    places = tl.where(head < G, share + T - 1, 0)
    new = tl.sum(tl.where(head < g, places, 0), 0)
    places = tl.where(g < G, own + T - 1, N - new)
    notes = note_ptr + b * (G + 1) * 6
    _sift(
        totals, slot_ptr + b * N, token_ptr + b * N, begin_ptr + b * (G + 2), next_ptr + 2 * b * N, spare_ptr + b * N,
        notes, count_ptr, marks, memory, length, recent, low, last, 0x7FFFFFFF, -1, new, places, N, G, WIDTH,
    )  # fmt: skip
    if m_slot_ptr is not None:
        both = _shares(counts, most + middling, G, LEVELS, SHARED)
        all_own = _own(both, g, HEADS)
        under, final = _cut(totals, length, recent, all_own, mine, LEVELS, SHIFT, BASE, LINES, WIDTH, WHOLE)
        new = tl.sum(tl.where(head < g, both - share, 0), 0)
        places = tl.where(g < G, all_own - own, M - new)
        lists = tl.num_programs(0).to(tl.int64)  # those of the critical tier come first
        tl.debug_barrier()
        _sift(
            totals, m_slot_ptr + b * M, m_token_ptr + b * M, m_begin_ptr + b * (G + 2),
            next_ptr + 2 * (lists * N + b * M), spare_ptr + lists * N + b * M, notes + lists * (G + 1) * 6,
            count_ptr + 1, marks, None, length, recent, under, final, low, last, new, places, M, G, WIDTH,
        )  # fmt: skip


@triton.jit
def _deal(
    slot_ptr, token_ptr, begin_ptr, next_ptr, spare_ptr, note_ptr, rows_ptr, newest_ptr, listed, host_rows, N,
    T: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of one pool the list of one KV head, or of the free places, as `_sift` has noted it: the n-th token that comes,
    whatever the head, takes the n-th slot that was freed."""
    b, g, note = tl.program_id(0).to(tl.int64), tl.program_id(1), note_ptr + tl.program_id(1) * 6
    new, staying, coming, first = tl.load(note + 2), tl.load(note + 3), tl.load(note + 4), tl.load(note + 5)
    end, before = N, 0  # tokens that come before those of this head
    for head in tl.static_range(G):
        after = tl.load(note_ptr + head * 6 + 8)  # where the next one begins
        end = tl.where(head == g, after, end)
        theirs = after - tl.load(note_ptr + head * 6 + 2) - tl.load(note_ptr + head * 6 + 3)
        before += tl.where(head < g, theirs, 0)
    for at in range(new, end, WIDTH):
        place = at + tl.arange(0, WIDTH)
        nth, source, passed = place - new - staying, place, 0
        for head in tl.static_range(G + 1):
            freed = before + nth - passed
            source = tl.where(freed >= 0, tl.load(note_ptr + head * 6) + freed, source)
            passed += tl.load(note_ptr + head * 6 + 1)
        inside, comes = place < end, (place < end) & (nth >= 0)
        token = tl.load(next_ptr + N + place, mask=inside, other=-1)
        slot = tl.load(next_ptr + place, mask=inside & (nth < 0), other=0)
        slot += tl.load(spare_ptr + source, mask=comes, other=0)
        tl.store(slot_ptr + place, slot, mask=inside)
        tl.store(token_ptr + place, token, mask=inside)
        brought = comes & (nth < coming)
        tl.store(rows_ptr + first + nth, (b * G + g) * host_rows + token, mask=brought)
        tl.store(rows_ptr + listed + first + nth, b * N + slot, mask=brought)
        if newest_ptr is not None:
            fresh = comes & (nth >= coming) & (token >= 0)
            tl.store(newest_ptr + (b * G + g) * T + nth - coming, slot, mask=fresh)
    tl.store(begin_ptr + g, new)


@triton.jit(do_not_specialize=["N", "M"])
def _deal_kernel(
    levels_ptr, slot_ptr, token_ptr, begin_ptr, m_slot_ptr, m_token_ptr, m_begin_ptr, next_ptr, spare_ptr, note_ptr,
    rows_ptr, newest_ptr, listed, host_rows, N, M,
    T: tl.constexpr, G: tl.constexpr, LEVELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    b, g, lists = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0).to(tl.int64)
    if g < G:
        tl.store(levels_ptr + (b * G + g) * LEVELS + tl.arange(0, LEVELS), tl.zeros([LEVELS], tl.int32))
    notes = note_ptr + b * (G + 1) * 6
    _deal(
        slot_ptr + b * N, token_ptr + b * N, begin_ptr + b * (G + 2), next_ptr + 2 * b * N, spare_ptr + b * N, notes,
        rows_ptr, newest_ptr, listed, host_rows, N, T, G, WIDTH,
    )  # fmt: skip
    if m_slot_ptr is not None:
        _deal(
            m_slot_ptr + b * M, m_token_ptr + b * M, m_begin_ptr + b * (G + 2), next_ptr + 2 * (lists * N + b * M),
            spare_ptr + lists * N + b * M, notes + lists * (G + 1) * 6, rows_ptr + 2 * listed, None, listed, host_rows,
            M, T, G, WIDTH,
        )  # fmt: skip


def plan_tiers_triton(
    total: Tensor, length: Tensor, sizes: Tensor, shared: bool, critical: Slots, marginal: Slots | None,
    memory: Tensor | None, newest: Tensor, rows: Tensor, count: Tensor, mark: Tensor, levels: Tensor, host_rows: int,
) -> None:  # fmt: skip
    (B, G, S), N, M = total.shape, critical.token.shape[1], 0 if marginal is None else marginal.token.shape[1]
    lists = *critical, *(marginal or (None,) * 3)
    tables = total, sizes, memory, newest, rows, count, mark, levels, *lists
    assert all(table is None or table.is_contiguous() for table in tables)
    int32 = {"device": total.device, "dtype": torch.int32}
    scratch = [torch.empty(n, **int32) for n in (2 * B * (N + M), B * (N + M), 2 * B * (G + 1) * 6)]
    warps = min(32, max(4, triton.next_power_of_2(S) // 512))
    width = 4 * 32 * warps  # four tokens a thread
    lines = max(1, min(ROW // width, triton.next_power_of_2(triton.cdiv(S, width))))
    numbers = {"LEVELS": LEVELS, "SHIFT": LEVEL_BITS, "BASE": LEVEL_BASE}
    _levels_kernel[(B * G, triton.cdiv(S, COUNTED))](
        total, length, sizes, levels, S, G, COUNTED, **numbers, num_warps=4
    )  # fmt: skip
    _plan_kernel[(B, G + 1)](
        total, length, sizes, levels, *lists, memory, *scratch, count, mark, S, N, M, G=G, T=newest.shape[2],
        SHARED=shared, HEADS=triton.next_power_of_2(G + 1), **numbers, LINES=lines, WIDTH=width,
        WHOLE=lines * width >= S, num_warps=warps,
    )  # fmt: skip
    _deal_kernel[(B, G + 1)](
        levels, *lists, *scratch, rows, newest, rows.shape[2], host_rows, N, M, T=newest.shape[2], G=G, LEVELS=LEVELS,
        WIDTH=1024, num_warps=8,
    )  # fmt: skip


def plan_tiers(
    total: Tensor, length: Tensor, sizes: Tensor, shared: bool, critical: Slots, marginal: Slots | None,
    memory: Tensor | None, newest: Tensor, rows: Tensor, count: Tensor, mark: Tensor, levels: Tensor, host_rows: int,
) -> None:  # fmt: skip
    function = plan_tiers_triton if use_triton(total) else plan_tiers_torch
    function(total, length, sizes, shared, critical, marginal, memory, newest, rows, count, mark, levels, host_rows)
