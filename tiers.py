"""From scores to tiers, from tiers to slots, from slots to rows that move: nothing of it reaches the host.

Where it sits: scores -> **tier plan -> slots -> migration** -> LLM, for one layer of the LLM at a time. Each function
stands here twice with one signature, `NAME_torch` (the plain PyTorch truth) and `NAME_triton`; `NAME` chooses (ops.py).

| function     | flow                                                                    | paper               |
| ------------ | ----------------------------------------------------------------------- | ------------------- |
| `plan_tiers` | scores -> critical and marginal tokens -> slots -> lists of rows        | Eq. 4, 5            |
| `store_rows` | the newest rows into the offloaded tier                                 |                     |
| `bring_rows` | rows out of the offloaded tier into slots                               | Algorithm 1, line 9 |

The table of positions by slot is the only link between slots and tokens. A token that stays in its tier keeps its slot
and its row; one that leaves frees the slot; one that comes takes a free slot, and its row is listed to be brought.

The Triton plan ranks without sorting: positive floats order like their bits, so the bits of the last token that is in
are found by search, each time counting how many tokens are above. A row of up to ROW tokens stays in registers; of a
longer one the rest is read again.

Shapes follow the legend in model.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops import use_triton

RECENT, NEWEST = 0x7F7FFFFF, 0x7F800000  # bits of the largest fp32 and of infinity: what these tokens rank by
ROW = 32768  # tokens of a row that a program holds in registers
BRING_BYTES = 1 << 17  # that a program of the mover has under way: a thousand rows fill PCIe
MOVERS = 3  # programs of the mover, each with a multiprocessor that the LLM's products do without meanwhile
LARGE = 1 << 26  # bytes of a pool beyond which its moves outlast a layer, and one program more is worth it


# ---- The plan --------------------------------------------------------------------------------------------------------


def plan_tiers_torch(
    total: Tensor, length: Tensor, sizes: Tensor, critical: Tensor, marginal: Tensor | None, memory: Tensor | None,
    newest: Tensor, rows: Tensor, count: Tensor, mark: Tensor, host_rows: int,
) -> None:  # fmt: skip
    """Rank the tokens of one layer, cut the ranking into tiers, give the tiers' tokens their slots.

    total (B, G, S) fp32: scores; a token whose score is below 0 is never taken. length (B,) int32: tokens with the
    newest one. sizes (S + 1, 3) int32: critical, recent (no more) and marginal tokens by length. Recent tokens rank
    first, the newest first; equal scores by position.

    critical (B, G, C) and marginal (B, G, M) int32 are updated: the token in each slot, -1 if none; marginal None:
    there is no such tier. newest (B, G, T) int32 is written: the slots of the newest token and, with drafts, of the T -
    1 tokens after it, which are critical whatever they score. memory (B, G, S), if given: tokens that are not
    critical have their totals there afterwards.

    rows (2, 2, B * G * max(C, M)) and count (2,) int32, 0 when they come, are written: for both tiers the first count
    rows to bring, [0] where from, counted by b, g, token with host_rows rows a KV head, and [1] where to, by b, g,
    slot. The T newest tokens are not among them: their rows are made on the device. mark (B, G, S) int8, all 0: a
    scratch, left as it came.
    """
    (B, G, S), T = total.shape, newest.shape[2]
    token, end = torch.arange(S, device=total.device), length.long()[:, None, None]
    most, recent, middling = (n.long()[:, None, None] for n in sizes[length.long()].unbind(-1))
    bits = total.contiguous().view(torch.int32).long()  # positive floats order like their bits
    bits = bits.masked_fill(token >= end - recent, RECENT).masked_fill(token == end - 1, NEWEST)
    taken = (bits >= 0) & (token < end)
    key = ((bits << 24) + (S - token)).where(taken, -1 - token)  # all different: equal scores by position; S < 2 ** 24
    first = key.topk(min(S, sum(p.shape[2] for p in (critical, marginal) if p is not None))).values  # largest first

    def best(count: Tensor) -> Tensor:
        least = first.gather(-1, (count - 1).clamp(0, first.shape[2] - 1).expand(B, G, 1))
        return taken & (key >= least) & (count > 0)

    top = best(most)
    middle = best(most + middling) & ~top
    for tier, (position, wanted) in enumerate(((critical, top), (marginal, middle))):
        if position is None:
            continue
        drafts = T - 1 if tier == 0 else 0
        after, fresh = _assign(position.long(), wanted, end, drafts)
        fresh &= after < end - 1
        place = (fresh.flatten().cumsum(0) - 1).where(fresh.flatten(), rows.shape[2])
        slot = torch.arange(after.numel(), device=total.device)
        source = (slot // after.shape[2]) * host_rows + after.flatten()
        for kind, values in enumerate((source, slot)):  # one column more takes what is not listed
            wide = torch.zeros(rows.shape[2] + 1, dtype=torch.int32, device=total.device)
            rows[tier, kind] = wide.scatter_(0, place, values.int())[:-1]
        count[tier] += fresh.sum()
        position.copy_(after)
    for t in range(T):
        newest[:, :, t] = (critical == end - 1 + t).byte().argmax(-1)
    if memory is not None:
        memory.copy_(memory.where(top | (token >= end), total))


def _assign(position: Tensor, wanted: Tensor, end: Tensor, drafts: int) -> tuple[Tensor, Tensor]:
    """Slots of one pool: position (B, G, C) int64 and wanted (B, G, S) bool -> position afterwards, and which slots got
    another token (B, G, C). The n-th token that comes takes the n-th free slot; the drafts come last."""
    C, S = position.shape[2], wanted.shape[2]
    stays = (position >= 0) & (position < S) & wanted.gather(-1, position.clamp(0, S - 1))
    inside = torch.zeros_like(wanted[..., :1]).expand(*wanted.shape[:2], S + 1).contiguous()
    inside.scatter_(-1, position.where(stays, S), True)
    enters = wanted & ~inside[..., :S]
    coming = enters.sum(-1, keepdim=True)
    queue = torch.full((*position.shape[:2], max(C, S) + drafts + 1), -1, device=position.device)
    place = (enters.cumsum(-1) - 1).where(enters, queue.shape[2] - 1)
    queue.scatter_(-1, place, torch.arange(S, device=position.device).expand_as(place))
    for draft in range(drafts):
        queue.scatter_(-1, coming + draft, (end + draft).expand_as(coming))
    turn = (~stays).cumsum(-1) - 1
    came = queue.gather(-1, turn.clamp(min=0)).where(turn < coming + drafts, -1)
    return position.where(stays, came), ~stays & (came >= 0)


@triton.jit
def _bits(total_ptr, token, length, recent):
    """What a token ranks by: the bits of its score, -1 if it is never taken."""
    score = tl.load(total_ptr + token, mask=(token >= 0) & (token < length), other=-1.0)
    bits = tl.maximum(score.to(tl.int32, bitcast=True), -1)
    bits = tl.where(token >= length - recent, 0x7F7FFFFF, bits)  # RECENT
    bits = tl.where(token == length - 1, 0x7F800000, bits)  # NEWEST
    return tl.where((token >= 0) & (token < length), bits, -1)


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
def _cut(total_ptr, length, recent, count, LINES: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """Where the `count` best end: (low, last). In are tokens with bits above low, and those with just low up to the
    position last. `many` tokens are at least low, `fewer` than count at least high; the next value that is tried is in
    the middle at first, then where a straight line through both has count, but for every third."""
    bits = _bits(total_ptr, _block(LINES, WIDTH), length, recent)
    low, high, fewer, turn, last = 0, 0x7F800001, 0, 0, length
    many = _count(bits, total_ptr, length, recent, low, LINES, WIDTH, WHOLE)  # all that compete
    while (many > count) & (high - low > 1):
        share = (many - count + 0.5) / (many - fewer + 1.0)
        share = tl.where((turn < 6) | (turn % 3 == 2), 0.5, share)
        middle = low + tl.minimum(tl.maximum((share * (high - low)).to(tl.int32), 1), high - low - 1)
        found = _count(bits, total_ptr, length, recent, middle, LINES, WIDTH, WHOLE)
        enough = found >= count
        low, many = tl.where(enough, middle, low), tl.where(enough, found, many)
        high, fewer = tl.where(enough, high, middle), tl.where(enough, fewer, found)
        turn += 1
    if many > count:  # more tokens than places have just these bits: the first of them are in
        before, last = 0, -1
        for at in range(0, length, WIDTH):
            token = at + tl.arange(0, WIDTH)
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
    wanted = _within(bits, token, low, last) & (_within(bits, token, over, beyond) == 0) & (token != length - 1)
    return (wanted & (tl.load(mark_ptr + token, mask=token < length, other=1) == 0)).to(tl.int32)


@triton.jit
def _fill(
    total_ptr, position_ptr, rows_ptr, count_ptr, mark_ptr, queue_ptr, newest_ptr, memory_ptr, length, recent, low,
    last, over, beyond, slots, listed, host_rows, T: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Slots of one pool of one KV head, for the tokens within (low, last) that are not within (over, beyond). A scratch
    by token marks those that keep their slots; the others that are wanted queue up in another. newest_ptr: the pool
    takes the T newest tokens too; memory_ptr: what is not within (low, last) is remembered there."""
    pair = tl.program_id(0)
    base = pair.to(tl.int64) * slots
    for at in range(0, slots, WIDTH):
        slot = at + tl.arange(0, WIDTH)
        token = tl.load(position_ptr + base + slot, mask=slot < slots, other=-1)
        bits = _bits(total_ptr, token, length, recent)
        stays = _within(bits, token, low, last) & (_within(bits, token, over, beyond) == 0)
        tl.store(mark_ptr + token, tl.full([WIDTH], 1, tl.int8), mask=stays)
        tl.store(position_ptr + base + slot, tl.where(stays, token, -1), mask=slot < slots)
    tl.debug_barrier()
    # Column by column of the blocks: one scan for all of them.
    number = tl.zeros([WIDTH], tl.int32)
    for at in range(0, length, WIDTH):
        token = at + tl.arange(0, WIDTH)
        number += _enters(total_ptr, mark_ptr, token, length, recent, low, last, over, beyond)
    place, coming = tl.cumsum(number, 0) - number, tl.sum(number, 0)
    for at in range(0, length, WIDTH):
        token = at + tl.arange(0, WIDTH)
        enters = _enters(total_ptr, mark_ptr, token, length, recent, low, last, over, beyond)
        tl.store(queue_ptr + place, token, mask=enters == 1)
        place += enters
        if memory_ptr is not None:
            outside = (token < length) & (_within(_bits(total_ptr, token, length, recent), token, low, last) == 0)
            tl.store(memory_ptr + token, tl.load(total_ptr + token, mask=outside, other=0.0), mask=outside)
    entering, first_new = coming, length
    if newest_ptr is not None:  # they come last and bring no row
        first_new = tl.where(tl.load(mark_ptr + length - 1) == 0, length - 1, length)
        entering = coming + T - 1 + length - first_new
    tl.debug_barrier()
    first = tl.atomic_add(count_ptr, coming, sem="relaxed")  # of the layer's list; a later launch reads it
    free = 0
    for at in range(0, slots, WIDTH):
        slot = at + tl.arange(0, WIDTH)
        token = tl.load(position_ptr + base + slot, mask=slot < slots, other=-1)
        tl.store(mark_ptr + token, tl.zeros([WIDTH], tl.int8), mask=token >= 0)
        empty = (slot < slots) & (token < 0)
        nth = free + tl.cumsum(empty.to(tl.int32), 0) - 1  # of the free slots
        brought = empty & (nth < coming)
        token = tl.load(queue_ptr + nth, mask=brought, other=0)
        tl.store(rows_ptr + first + nth, pair * host_rows + token, mask=brought)
        tl.store(rows_ptr + listed + first + nth, pair * slots + slot, mask=brought)
        if newest_ptr is not None:
            token = tl.where(brought, token, first_new + nth - coming)
            fresh = empty & (nth >= coming) & (nth < entering)
            tl.store(newest_ptr + pair * T + token - (length - 1), slot, mask=fresh)
        tl.store(position_ptr + base + slot, token, mask=empty & (nth < entering))
        free += tl.sum(empty.to(tl.int32), 0)


@triton.jit(do_not_specialize=["S", "C", "M"])  # else loads of 16 bytes and scattered stores would exchange layouts
def _plan_kernel(
    total_ptr, length_ptr, sizes_ptr, critical_ptr, marginal_ptr, memory_ptr, newest_ptr, rows_ptr, count_ptr, mark_ptr,
    queue_ptr, S, C, M, host_rows, G: tl.constexpr, T: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """One KV head of one sequence; WHOLE: a block holds its row."""
    pair = tl.program_id(0)
    length = tl.load(length_ptr + pair // G)
    most, recent = tl.load(sizes_ptr + length * 3), tl.load(sizes_ptr + length * 3 + 1)
    totals, marks = total_ptr + pair.to(tl.int64) * S, mark_ptr + pair.to(tl.int64) * S
    queue, memory = queue_ptr + pair.to(tl.int64) * tl.maximum(C, M), memory_ptr
    listed = tl.num_programs(0) * tl.maximum(C, M)  # rows of a list
    if memory_ptr is not None:
        memory = memory_ptr + pair.to(tl.int64) * S
    low, last = _cut(totals, length, recent, most, LINES, WIDTH, WHOLE)
    _fill(totals, critical_ptr, rows_ptr, count_ptr, marks, queue, newest_ptr, memory, length, recent, low, last,
          0x7FFFFFFF, -1, C, listed, host_rows, T, WIDTH)  # fmt: skip
    if marginal_ptr is not None:
        middling = tl.load(sizes_ptr + length * 3 + 2)
        under, final = _cut(totals, length, recent, most + middling, LINES, WIDTH, WHOLE)
        tl.debug_barrier()
        _fill(totals, marginal_ptr, rows_ptr + 2 * listed, count_ptr + 1, marks, queue, None, None, length, recent,
              under, final, low, last, M, listed, host_rows, T, WIDTH)  # fmt: skip


def plan_tiers_triton(
    total: Tensor, length: Tensor, sizes: Tensor, critical: Tensor, marginal: Tensor | None, memory: Tensor | None,
    newest: Tensor, rows: Tensor, count: Tensor, mark: Tensor, host_rows: int,
) -> None:  # fmt: skip
    (B, G, S), C, M = total.shape, critical.shape[2], 0 if marginal is None else marginal.shape[2]
    tables = total, sizes, critical, marginal, memory, newest, rows, count, mark
    assert all(table.is_contiguous() for table in tables if table is not None)
    queue = torch.empty(B * G * max(C, M), device=total.device, dtype=torch.int32)
    warps = min(32, max(4, triton.next_power_of_2(S) // 512))
    width = 4 * 32 * warps  # four tokens a thread
    lines = max(1, min(ROW // width, triton.next_power_of_2(triton.cdiv(S, width))))
    _plan_kernel[(B * G,)](
        total, length, sizes, critical, marginal, memory, newest, rows, count, mark, queue, S, C, M, host_rows,
        G=G, T=newest.shape[2], LINES=lines, WIDTH=width, WHOLE=lines * width >= S, num_warps=warps,
    )  # fmt: skip


def plan_tiers(
    total: Tensor, length: Tensor, sizes: Tensor, critical: Tensor, marginal: Tensor | None, memory: Tensor | None,
    newest: Tensor, rows: Tensor, count: Tensor, mark: Tensor, host_rows: int,
) -> None:  # fmt: skip
    function = plan_tiers_triton if use_triton(total) else plan_tiers_torch
    function(total, length, sizes, critical, marginal, memory, newest, rows, count, mark, host_rows)


# ---- Movement --------------------------------------------------------------------------------------------------------


def bring_rows_torch(key: Tensor | None, value: Tensor, offloaded: Tensor, rows: Tensor, count: Tensor) -> None:
    """Rows of one layer out of the offloaded tier (B, G, S', 2, D) into slots (B, G, C, D): K and V of the critical, or
    V alone (key None) of the marginal. rows (2, n), count () int32: of `plan_tiers`. The bytes arrive as they left."""
    listed = torch.arange(rows.shape[1], device=rows.device)
    source, target = rows[:, listed.where(listed < count, 0)].long()  # beyond the count the first row once more
    D = value.shape[-1]
    for kind, pool in enumerate((key, value)):
        if pool is not None:
            flat, come = pool.view(-1, D), offloaded.view(-1, D).index_select(0, 2 * source + kind)
            flat.index_copy_(0, target, come.where(count > 0, flat.index_select(0, target)))


@triton.jit
def _bring_kernel(
    key_ptr, value_ptr, offloaded_ptr, rows_ptr, count_ptr, listed, D: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """The programs share the list out evenly. The host's memory is read by the kernel itself, over PCIe."""
    count, dim = tl.load(count_ptr), tl.arange(0, D)
    for at in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        nth = at + tl.arange(0, ROWS)
        inside = (nth < count)[:, None]
        source = tl.load(rows_ptr + nth, mask=nth < count, other=0).to(tl.int64)[:, None] * 2 * D
        target = tl.load(rows_ptr + listed + nth, mask=nth < count, other=0).to(tl.int64)[:, None] * D
        value = tl.load(offloaded_ptr + source + D + dim, mask=inside)
        if key_ptr is not None:
            tl.store(key_ptr + target + dim, tl.load(offloaded_ptr + source + dim, mask=inside), mask=inside)
        tl.store(value_ptr + target + dim, value, mask=inside)


def bring_rows_triton(key: Tensor | None, value: Tensor, offloaded: Tensor, rows: Tensor, count: Tensor) -> None:
    assert all(x.is_contiguous() for x in (key, value, offloaded, rows) if x is not None)
    D = value.shape[-1]
    at_once = BRING_BYTES // (D * value.itemsize * (1 if key is None else 2))
    _bring_kernel[(MOVERS + (value.nbytes > LARGE),)](
        key, value, offloaded, rows, count, rows.shape[1], D=D, ROWS=at_once, num_warps=32, num_stages=1
    )


def bring_rows(key: Tensor | None, value: Tensor, offloaded: Tensor, rows: Tensor, count: Tensor) -> None:
    (bring_rows_triton if use_triton(value) else bring_rows_torch)(key, value, offloaded, rows, count)


def store_rows_torch(key: Tensor, value: Tensor, offloaded: Tensor, newest: Tensor, start: Tensor) -> None:
    """K and V of the T newest tokens of one layer, in slots newest (B, G, T) of key, value (B, G, C, D), into the
    offloaded tier (B, G, S', 2, D): token t of sequence b to position start[b] + t, start (B,) int32; below 0:
    nothing."""
    slot = newest.long()[..., None].expand(*newest.shape, key.shape[3])
    both = torch.stack([pool.gather(2, slot) for pool in (key, value)], 3)  # (B, G, T, 2, D)
    position = (start[:, None] + torch.arange(newest.shape[2], device=start.device)).clamp(min=0).long()
    position = position[:, None, :, None, None].expand(both.shape)
    offloaded.scatter_(2, position, both.where(start[:, None, None, None, None] >= 0, offloaded.gather(2, position)))


@triton.jit
def _store_kernel(
    key_ptr, value_ptr, offloaded_ptr, newest_ptr, start_ptr, slots, host_rows,
    G: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One token of one KV head."""
    pair, t, dim = (tl.program_id(0) // T).to(tl.int64), tl.program_id(0) % T, tl.arange(0, D)
    start = tl.load(start_ptr + pair // G)
    if start >= 0:
        source = (pair * slots + tl.load(newest_ptr + pair * T + t)) * D + dim
        target = offloaded_ptr + (pair * host_rows + start + t) * 2 * D + dim
        tl.store(target, tl.load(key_ptr + source))
        tl.store(target + D, tl.load(value_ptr + source))


def store_rows_triton(key: Tensor, value: Tensor, offloaded: Tensor, newest: Tensor, start: Tensor) -> None:
    assert all(x.is_contiguous() for x in (key, value, offloaded, newest))
    _store_kernel[(newest.numel(),)](
        key, value, offloaded, newest, start, key.shape[2], offloaded.shape[2],
        G=newest.shape[1], T=newest.shape[2], D=key.shape[3], num_warps=1,
    )  # fmt: skip


def store_rows(key: Tensor, value: Tensor, offloaded: Tensor, newest: Tensor, start: Tensor) -> None:
    (store_rows_triton if use_triton(key) else store_rows_torch)(key, value, offloaded, newest, start)
