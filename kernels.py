"""Every attention: a prefill's over many queries, a decode step's over the rows of a cache (Eq. 6).

Where it sits: below the caches (cache.py), which call nothing else to attend. Each function that runs in a step or is
costly in a prefill stands here twice with one signature, `NAME_torch` (the plain PyTorch truth) and `NAME_triton`;
`NAME` chooses (ops.py). What attention says of tokens goes into scores by scores.py.

| function           | flow                                               | paper                 |
| ------------------ | -------------------------------------------------- | --------------------- |
| `causal_attention` | prefill of both models                             | vanilla attention     |
| `attention_rows`   | matching window                                    | the matrices of Eq. 1 |
| `column_sums`      | prefill -> scores                                  | Eq. 1, in blocks      |
| `decode_attention` | every step: full cache, SLM, the LLM's tiers, drafts | Eq. 6               |

Shapes follow the legend in model.py.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ops import Slots, use_triton

LOG2_E = math.log2(math.e)  # logits are powers of two: exp2 is one instruction
NEGLIGIBLE = 1e-9  # weights below it are beyond fp32's resolution
SCORE_BLOCK = 256  # query rows whose attention is held at once when scores are summed
QUERIES, KEYS = 64, 64  # a tile of the column sums
TILE, WARPS, STAGES = 4096, 4, 4  # of decode attention: numbers of a tile of K, and of V; held STAGES - 1 times
INDIRECT = 1  # stages more where rows are looked up in a list, which has to be there first
PROGRAMS = 264  # splits aimed at: two for each multiprocessor of an H100
ROWS_MAX = 64  # query rows of one program
HALF_MAX = 65504.0  # the largest fp16: logits stop there


# ---- Many queries: prefill -------------------------------------------------------------------------------------------


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of T queries, the last T of S tokens, on all S: (B, H, T, D) x (B, G, S, D)^2 -> (B, H, T, D).

    Flash attention where PyTorch has it; no T x S matrix is kept.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)  # (B, H, S, D)
    if query.shape[2] == key.shape[2]:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    # Imported here: it brings torch._dynamo along, seconds that only a prompt of several chunks should wait for.
    from torch.nn.attention.bias import causal_lower_right

    return F.scaled_dot_product_attention(query, key, value, attn_mask=causal_lower_right(query.shape[2], key.shape[2]))


def attention_rows(query: Tensor, key: Tensor, first: int = 0) -> Tensor:
    """Softmax attention of queries at positions first..first+T-1 on keys 0..S-1, causal: (B, H, T, S) fp32.

    For the few rows that are looked at one by one; its memory is H x T x S, so callers keep T small. Queries are scaled
    before the product: unscaled products of fp16 can pass 65,504.
    """
    B, H, T, D = query.shape
    G, S = key.shape[1], key.shape[2]
    grouped = query.reshape(B, G, H // G, T, D)
    logits = (grouped * D**-0.5 @ key[:, :, None].transpose(-1, -2)).float()  # (B, G, H/G, T, S)
    queries = torch.arange(first, first + T, device=query.device)[:, None]
    future = torch.arange(S, device=query.device) > queries  # (T, S)
    return logits.masked_fill(future, -torch.inf).softmax(-1).view(B, H, T, S)


def queries_that_count(decay: float, queries: int) -> int:
    """How many of the last `queries` have a weight, decay^age, worth the work; decay 0 keeps the newest alone."""
    if decay == 1:
        return queries
    return 1 if decay == 0 else min(queries, 1 + math.ceil(math.log(NEGLIGIBLE) / math.log(decay)))


def column_sums_torch(query: Tensor, key: Tensor, decay: float) -> Tensor:
    """Scores that T queries (B, H, T, D), the last T of S tokens, leave on keys (B, G, S, D), Eq. 1: (B, H, S) fp32.

    sum over queries q of decay^(last - q) * A[q, j], by blocks of SCORE_BLOCK queries, so that memory is O(S).
    decay = 1 is the paper's plain sum. With decay < 1 queries whose weights are below fp32's resolution are skipped.
    """
    B, H, T, _ = query.shape
    S = key.shape[2]
    scores = torch.zeros(B, H, S, dtype=torch.float32, device=query.device)
    for start in range(T - queries_that_count(decay, T), T, SCORE_BLOCK):
        end = min(start + SCORE_BLOCK, T)
        age = torch.arange(T - start - 1, T - end - 1, -1, device=query.device, dtype=torch.float32)  # (block,)
        rows = attention_rows(query[:, :, start:end], key[:, :, : S - T + end], first=S - T + start)
        scores[:, :, : S - T + end] += (torch.pow(decay, age)[:, None] * rows).sum(2)
    return scores


@triton.jit
def _tile(query, k_ptr, token, k_token, last, S, scale, D: tl.constexpr):
    """Causal logits (QUERIES, KEYS) of queries at positions `last` on keys at `token`, -inf where nothing is seen."""
    dim = tl.arange(0, D)
    key = tl.load(k_ptr + token.to(tl.int64)[:, None] * k_token + dim, mask=(token < S)[:, None], other=0.0)
    logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    return tl.where(token[None] <= last[:, None], logit, -float("inf"))


@triton.jit
def _lse_kernel(
    q_ptr, k_ptr, lse_ptr, k_batch, k_head, k_token, T, S, count, scale,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The log of the sum of QUERIES queries' weights; `count` of the T queries take part, the last ones."""
    head, row, dim = tl.program_id(1), tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, D)
    b, h = head // H, head % H
    last = S - count + row
    place = (b.to(tl.int64) * T + T - count + row) * H + h
    query = tl.load(q_ptr + place[:, None] * D + dim, mask=(row < count)[:, None], other=0.0)
    keys = k_ptr + b.to(tl.int64) * k_batch + (h // GROUP) * k_head
    top, total = tl.full([QUERIES], -float("inf"), tl.float32), tl.zeros([QUERIES], tl.float32)
    for at in range(0, tl.minimum(S - count + (tl.program_id(0) + 1) * QUERIES, S), KEYS):
        logit = _tile(query, keys, at + tl.arange(0, KEYS), k_token, last, S, scale, D)
        higher = tl.maximum(top, tl.max(logit, 1))  # the first tile has key 0, which every query sees
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(logit - higher[:, None]), 1)
        top = higher
    tl.store(lse_ptr + head.to(tl.int64) * count + row, top + tl.log2(total), mask=row < count)


@triton.jit
def _column_kernel(
    q_ptr, k_ptr, lse_ptr, out_ptr, k_batch, k_head, k_token, T, S, count, scale, log_decay,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """KEYS keys: the weights of the queries that see them, from the first such tile on."""
    head, token, dim = tl.program_id(1), tl.program_id(0) * KEYS + tl.arange(0, KEYS), tl.arange(0, D)
    b, h = head // H, head % H
    keys = k_ptr + b.to(tl.int64) * k_batch + (h // GROUP) * k_head
    column = tl.zeros([KEYS], tl.float32)
    for at in range(tl.maximum(tl.program_id(0) * KEYS - (S - count), 0) // QUERIES * QUERIES, count, QUERIES):
        row = at + tl.arange(0, QUERIES)
        live = row < count
        place = (b.to(tl.int64) * T + T - count + row) * H + h
        query = tl.load(q_ptr + place[:, None] * D + dim, mask=live[:, None], other=0.0)
        logit = _tile(query, keys, token, k_token, S - count + row, S, scale, D)
        lse = tl.load(lse_ptr + head.to(tl.int64) * count + row, mask=live, other=float("inf"))
        age = tl.where(live, count - 1 - row, 0).to(tl.float32)
        column += tl.sum(tl.exp2(logit - lse[:, None] + (age * log_decay)[:, None]), 0)
    tl.store(out_ptr + head.to(tl.int64) * S + token, column, mask=token < S)


def column_sums_triton(query: Tensor, key: Tensor, decay: float) -> Tensor:
    """A flash forward keeps no matrix, so the logits are made a second time, tile by tile: one kernel finds the log of
    each query's sum, the other walks down the columns with it."""
    B, H, T, D = query.shape
    G, S = key.shape[1:3]
    count = queries_that_count(decay, T)
    query = query.transpose(1, 2).contiguous()  # (B, T, H, D), as the products leave it
    assert key.stride(3) == 1
    lse, out = (torch.empty(B * H, n, device=query.device, dtype=torch.float32) for n in (count, S))
    numbers = *key.stride()[:3], T, S, count, D**-0.5 * LOG2_E
    shape = dict(H=H, GROUP=H // G, D=D, QUERIES=QUERIES, KEYS=KEYS, num_warps=4, num_stages=2)
    _lse_kernel[(triton.cdiv(count, QUERIES), B * H)](query, key, lse, *numbers, **shape)
    log_decay = math.log2(decay) if decay > 0 else 0.0
    _column_kernel[(triton.cdiv(S, KEYS), B * H)](query, key, lse, out, *numbers, log_decay, **shape)
    return out.view(B, H, S)


def column_sums(query: Tensor, key: Tensor, decay: float) -> Tensor:
    return (column_sums_triton if use_triton(query) else column_sums_torch)(query, key, decay)


# ---- A few queries: decode -------------------------------------------------------------------------------------------


def decode_attention_torch(
    query: Tensor, key: Tensor, value: Tensor, length: Tensor, slots: Slots | None = None,
    logits: Tensor | None = None, lse: Tensor | None = None, weight: Tensor | None = None,
    marginal: Tensor | None = None, marginal_slots: Slots | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """T new tokens of each sequence, query (B, T, H, D), on a cache. length (B,) int32: tokens of each sequence with
    the first new one; new token t sees those before length + t.

    slots None: key, value (B, G, S, D), row j is token j. Else (B, N, D), pools that the KV heads of a sequence share;
    slots says whose row is where: each place of a head has a token, the last T of them the new ones.

    logits fp32 or fp16, if given, takes the scaled products as powers of two, -inf for what is not seen: (B, T, H, S),
    beyond the last token that any new one sees left as it is; or (B, T, H/G, N), for each place of the list the query
    heads of its KV head, free places left as they are.

    weight (B, T, H/G, M) fp32, marginal (B, M, D) and marginal_slots, if given: attention borrowed from the SLM for
    tokens of which the LLM keeps V alone, 0 in free slots (Eq. 6):

        o = (1 - m) softmax(q K_C) V_C + sum over j in M of A'_f(i)[j] V_j,    m = sum over j in M of A'_f(i)[j]

    The paper leaves the factor (1 - m) open; with it, exact borrowed weights give exact attention.

    Returns the output (B, T, H, D) and lse (B, T, H) fp32, the one given if there is one: 2 ** (logits - lse) is what
    each token weighs in the output.
    """
    B, T, H, D = query.shape
    G = key.shape[1] if slots is None else slots.begin.shape[1] - 2
    new = torch.arange(T, device=query.device)[:, None]  # (T, 1)
    if slots is None:
        row = torch.arange(key.shape[2], device=key.device)
        seen = (row < (length[:, None, None] + new))[:, None].expand(B, G, -1, -1)  # (B, G, T, S)
    else:
        row, head = torch.arange(key.shape[1], device=key.device), slots.heads()
        key, value = (rows_of(pool, slots) for pool in (key, value))  # (B, 1, N, D)
        mine = head[:, None] == torch.arange(G, device=key.device)[:, None]  # (B, G, N)
        seen = mine[:, :, None] & (row < slots.begin[:, 1:-1, None, None] - T + 1 + new)  # (B, G, T, N)

    def fold(rows: Tensor, table: Tensor) -> Tensor:
        """(B, G, H/G, T, x) @ (B, G or 1, x, y): heads and tokens as one side, or the table is copied for each head."""
        return (rows.reshape(*table.shape[:2], -1, table.shape[2]) @ table).view(*rows.shape[:4], -1)

    grouped = query.view(B, T, G, H // G, D).permute(0, 2, 3, 1, 4)  # (B, G, H/G, T, D)
    product = fold(grouped * D**-0.5, key.transpose(-1, -2)).float() * LOG2_E  # (B, G, H/G, T, S or N)
    product = product.masked_fill(~seen[:, :, None], -torch.inf)
    total = product.mul(1 / LOG2_E).logsumexp(-1, keepdim=True)  # natural logarithm
    share = torch.exp2(product - total * LOG2_E)
    used = seen.any(2) if slots is None else (head < G)[:, None]
    out = fold(share.to(value.dtype), value.where(used[..., None], 0))  # what is not seen may be NaN, and so 0 * NaN
    log = total[..., 0] * LOG2_E
    if weight is not None:
        held = marginal_slots.heads()
        own = held[:, None] == torch.arange(G, device=held.device)[:, None]  # (B, G, M)
        borrowed = weight.transpose(1, 2)[:, None].where(own[:, :, None, None], 0)  # (B, G, H/G, T, M)
        rest = (1 - borrowed.sum(-1)).clamp(min=0)  # 1 - m
        rows = rows_of(marginal, marginal_slots).where((held < G)[:, None, :, None], 0)
        out = rest[..., None].to(out.dtype) * out + fold(borrowed.to(value.dtype), rows)
        log = log - torch.log2(rest)
    if logits is not None:
        rows = product.clamp(max=HALF_MAX).to(logits.dtype)
        if slots is None:
            far = (row >= length[:, None] + T - 1)[:, None, None]
            rows = rows.permute(0, 3, 1, 2, 4).flatten(2, 3)  # (B, T, H, S)
        else:
            far = (head == G)[:, None, None]
            own = head.clamp(max=G - 1)[:, None, None, None].expand(B, 1, *rows.shape[2:])
            rows = rows.gather(1, own)[:, 0].transpose(1, 2)  # (B, T, H/G, N)
        logits.copy_(logits.where(far, rows))
    out, log = (x.permute(0, 3, 1, 2, *range(4, x.dim())).reshape(B, T, H, *x.shape[4:]) for x in (out, log))
    return out, log if lse is None else lse.copy_(log)


def rows_of(pool: Tensor, slots: Slots) -> Tensor:
    """Rows of a pool (B, N, D) in the order of its list: (B, 1, N, D)."""
    return pool.gather(1, slots.slot.long()[..., None].expand_as(pool))[:, None]


@triton.jit
def _splits_of(head, begin_ptr, rows, size, G: tl.constexpr):
    """A KV head of one sequence: its first place, the one after its last, and how many splits of `size` that is."""
    start, stop = head * (rows // G), (head + 1) * (rows // G)
    if begin_ptr is not None:
        start, stop = tl.load(begin_ptr + head), tl.load(begin_ptr + head + 1)
    return start, stop, tl.cdiv(stop - start, size)


@triton.jit
def _split_kernel(
    q_ptr, k_ptr, v_ptr, length_ptr, slot_ptr, begin_ptr, logit_ptr, weight_ptr, marginal_ptr, marginal_slot_ptr,
    marginal_begin_ptr, part_ptr, rows, marginal_rows, size, scale,
    G: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One split of the places of one KV head: unscaled output, top, sum of ROWS query rows; and the same share of the
    marginal tier. The splits of a sequence are numbered head after head."""
    b, number = tl.program_id(0), tl.program_id(1)
    begins, marginal_begins = begin_ptr, marginal_begin_ptr
    if begin_ptr is not None:
        begins += b * (G + 2)
    g, split, splits, start, stop, before = 0, 0, 0, 0, 0, 0
    for head in tl.static_range(G):
        first, end, count = _splits_of(head, begins, rows, size, G)
        mine = (number >= before) & (number < before + count)
        g, split = tl.where(mine, head, g), tl.where(mine, number - before, split)
        splits = tl.where(mine, count, splits)
        start, stop = tl.where(mine, first, start), tl.where(mine, end, stop)
        before += count
    if number >= before:
        return
    dim, row = tl.arange(0, D), tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    real, t, i = row < T * GROUP, row // GROUP, row % GROUP
    query = tl.load(q_ptr + (((b * T + t) * G + g) * GROUP + i)[:, None] * D + dim, mask=real[:, None], other=0.0)
    base = b.to(tl.int64) * rows
    if slot_ptr is None:
        stop = tl.minimum(stop, start + tl.load(length_ptr + b) + T - 1)
    top, total = tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for at in range(start + split * size, tl.minimum(start + (split + 1) * size, stop), BLOCK):
        place = at + tl.arange(0, BLOCK)
        inside, slot = place < stop, place
        if slot_ptr is not None:
            slot = tl.load(slot_ptr + base + place, mask=inside, other=0)
        key = tl.load(k_ptr + (base + slot)[:, None] * D + dim, mask=inside[:, None], other=0.0)  # (BLOCK, D)
        seen = place < (stop - T + 1 + t)[:, None]  # (ROWS, BLOCK)
        logit = tl.where(seen, tl.dot(query, tl.trans(key), input_precision="ieee") * scale, -float("inf"))
        if logit_ptr is not None:
            if slot_ptr is None:
                line = ((b * T + t) * G + g) * GROUP + i
                line = logit_ptr + line.to(tl.int64)[:, None] * (rows // G) + place - start
            else:
                line = logit_ptr + ((b * T + t) * GROUP + i).to(tl.int64)[:, None] * rows + place
            tl.store(line, tl.minimum(logit, 65504.0).to(logit_ptr.dtype.element_ty), mask=real[:, None] & inside)
        higher = tl.maximum(top, tl.max(logit, 1))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)  # a row that has seen nothing yet
        share, shrink = tl.exp2(logit - anchor[:, None]), tl.exp2(top - anchor)
        value = tl.load(v_ptr + (base + slot)[:, None] * D + dim, mask=inside[:, None], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(share.to(value.dtype), value, input_precision="ieee")
        total, top = total * shrink[:, None] + share, higher
    WIDTH: tl.constexpr = 2 * D + 4
    part = part_ptr + ((b * tl.num_programs(1) + number).to(tl.int64) * (T * GROUP) + row) * WIDTH
    tl.store(part[:, None] + dim, acc, mask=real[:, None])
    tl.store(part + 2 * D, top, mask=real)
    tl.store(part + 2 * D + 1, tl.sum(total, 1), mask=real)
    if weight_ptr is not None:
        marginal_begins += b * (G + 2)
        start, stop = tl.load(marginal_begins + g), tl.load(marginal_begins + g + 1)
        share, base = tl.cdiv(tl.cdiv(stop - start, BLOCK), splits) * BLOCK, b.to(tl.int64) * marginal_rows
        mass, acc = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, D], tl.float32)
        for at in range(start + split * share, tl.minimum(start + (split + 1) * share, stop), BLOCK):
            place = at + tl.arange(0, BLOCK)
            inside = place < stop
            line = weight_ptr + ((b * T + t) * GROUP + i).to(tl.int64)[:, None] * marginal_rows + place
            borrowed = tl.load(line, mask=real[:, None] & inside, other=0.0)  # (ROWS, BLOCK)
            slot = tl.load(marginal_slot_ptr + base + place, mask=inside, other=0)
            value = tl.load(marginal_ptr + (base + slot)[:, None] * D + dim, mask=inside[:, None], other=0.0)
            value = tl.where((tl.max(borrowed, 0) > 0)[:, None], value, 0.0)
            acc += tl.dot(borrowed.to(value.dtype), value, input_precision="ieee")
            mass += tl.sum(borrowed, 1)
        tl.store(part[:, None] + D + dim, acc, mask=real[:, None])
        tl.store(part + 2 * D + 2, mass, mask=real)


@triton.jit
def _merge_kernel(
    out_ptr, lse_ptr, part_ptr, begin_ptr, rows, size, numbers,
    G: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    MARGINAL: tl.constexpr,
):  # fmt: skip
    """The splits of one query head of one token, SPLITS at once."""
    place, dim = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    b, t, h = place // (T * G * GROUP), place // (G * GROUP) % T, place % (G * GROUP)
    begins = begin_ptr
    if begin_ptr is not None:
        begins += b * (G + 2)
    before, splits = 0, 0
    for head in tl.static_range(G):
        _, _, count = _splits_of(head, begins, rows, size, G)
        before, splits = before + tl.where(head < h // GROUP, count, 0), tl.where(head == h // GROUP, count, splits)
    parts = part_ptr + ((b * numbers + before) * (T * GROUP) + t * GROUP + h % GROUP) * (2 * D + 4)
    top, total, mass = -float("inf"), 0.0, 0.0
    acc, lent = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        part, live = parts + split.to(tl.int64) * (T * GROUP * (2 * D + 4)), split < splits
        tops = tl.load(part + 2 * D, mask=live, other=-float("inf"))
        sums = tl.load(part + 2 * D + 1, mask=live, other=0.0)
        higher = tl.maximum(top, tl.max(tops, 0))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)
        shrink, old = tl.exp2(tops - anchor), tl.exp2(top - anchor)
        out = tl.load(part[:, None] + dim, mask=live[:, None], other=0.0)  # (SPLITS, D)
        acc = acc * old + tl.sum(out * shrink[:, None], 0)
        total, top = total * old + tl.sum(sums * shrink, 0), higher
        if MARGINAL:
            mass += tl.sum(tl.load(part + 2 * D + 2, mask=live, other=0.0), 0)
            lent += tl.sum(tl.load(part[:, None] + D + dim, mask=live[:, None], other=0.0), 0)
    out, lse = acc / total, top + tl.log2(total)
    if MARGINAL:
        rest = tl.maximum(1 - mass, 0.0)  # 1 - m
        out = rest * out + lent
        lse -= tl.log2(rest)
    tl.store(out_ptr + place * D + dim, out.to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr + place, lse)


def decode_attention_triton(
    query: Tensor, key: Tensor, value: Tensor, length: Tensor, slots: Slots | None = None,
    logits: Tensor | None = None, lse: Tensor | None = None, weight: Tensor | None = None,
    marginal: Tensor | None = None, marginal_slots: Slots | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Flash decoding: the places of a head are cut into splits; a program takes one split of one KV head for all query
    rows that share it, so each row of K and V is read once; a second kernel merges the splits. A head with more places
    has more splits, so that programs are alike whatever the heads' shares."""
    B, T, H, D = query.shape
    G = key.shape[1] if slots is None else slots.begin.shape[1] - 2
    rows = key.numel() // (B * D)  # of a sequence
    lse = torch.empty(B, T, H, device=query.device, dtype=torch.float32) if lse is None else lse
    slot, _, begin = slots or (None,) * 3
    marginal_slot, _, marginal_begin = marginal_slots or (None,) * 3
    tables = query, key, value, slot, begin, logits, lse, weight, marginal, marginal_slot, marginal_begin
    assert all(table.is_contiguous() for table in tables if table is not None)
    group = H // G
    queries = max(16, min(ROWS_MAX, triton.next_power_of_2(T * group)))  # 16: what a matrix unit takes
    blocks = triton.cdiv(T * group, queries)
    half = query.element_size() == 2  # fp32 takes twice the shared memory
    block = max(16, TILE // D // (1 if half else 2))
    each = triton.cdiv(rows, G)
    size = block * max(2, triton.cdiv(each, block * max(1, PROGRAMS // (B * G * blocks))))
    numbers = G * triton.cdiv(each, size) if slots is None else rows // size + G
    stages = (STAGES if half else 2) + (0 if slots is None else INDIRECT)
    out = torch.empty_like(query)
    part = torch.empty(B * numbers * T * group, 2 * D + 4, device=query.device, dtype=torch.float32)
    _split_kernel[(B, numbers, blocks)](
        query, key, value, length, slot, begin, logits, weight, marginal, marginal_slot, marginal_begin, part, rows,
        0 if marginal is None else marginal.shape[1], size, D**-0.5 * LOG2_E,
        G=G, GROUP=group, T=T, ROWS=queries, D=D, BLOCK=block, num_warps=WARPS, num_stages=stages,
    )  # fmt: skip
    together = triton.next_power_of_2(triton.cdiv(each, size))
    _merge_kernel[(B * T * H,)](
        out, lse, part, begin, rows, size, numbers, G=G, GROUP=group, T=T, D=D, SPLITS=together,
        MARGINAL=weight is not None, num_warps=4 if together <= 32 else 8,
    )  # fmt: skip
    return out, lse


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, length: Tensor, slots: Slots | None = None,
    logits: Tensor | None = None, lse: Tensor | None = None, weight: Tensor | None = None,
    marginal: Tensor | None = None, marginal_slots: Slots | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    function = decode_attention_triton if use_triton(query) else decode_attention_torch
    return function(query, key, value, length, slots, logits, lse, weight, marginal, marginal_slots)
