"""What attention says of tokens: weights summed into score tables, and what a plan of the LLM's tiers ranks by.

Where it sits: SLM -> **scores** -> tier plan (tiers.py). An attention row is held as it comes from kernels.py: logits
as powers of two and lse, the log of their sum, so that a weight is 2 ** (logit - lse).

| function        | flow                                                                             | paper      |
| --------------- | -------------------------------------------------------------------------------- | ---------- |
| `add_weights`   | an attention row -> the SLM's scores                                             | Eq. 1      |
| `add_held`      | an attention row of slots -> the LLM's own memory                                | Eq. 1      |
| `rank_scores`   | scores of the matched heads f(i) -> what the tokens of one LLM layer rank by     | Eq. 4, 5   |
| `matched_rows`  | newest rows of the matched heads -> what the marginal slots borrow               | Eq. 6      |

The SLM's rows of one step are logits (T, L', B, H', S), fp16 for a model of 16 bits and else fp32, and lse (T, L', B,
H') fp32, T = 1 without drafts; the score table (L', B, H', S) fp32 is as it was before these rows.

Shapes follow the legend in model.py.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ops import Slots, use_triton

TOKENS = 1024  # of a program


# ---- An attention row into a table -----------------------------------------------------------------------------------


def add_weights_torch(table: Tensor, logits: Tensor, lse: Tensor, decay: float, length: Tensor) -> None:
    """table = decay * table + weight in place, for the tokens that the row sees.

    table, logits (B, H, S), lse (B, H). length (n,) int32: a row sees the tokens before length[b % n]; 0 leaves the
    table as it is.
    """
    weight = torch.exp2(logits.float() - lse[..., None])
    end = length.repeat(len(table) // len(length))[:, None, None]
    table.copy_((decay * table + weight).where(torch.arange(table.shape[2], device=table.device) < end, table))


@triton.jit
def _weights_kernel(
    table_ptr, logit_ptr, lse_ptr, length_ptr, lengths, capacity, decay, H: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """TOKENS tokens of one head."""
    line, token = tl.program_id(0), tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    seen = (token < capacity) & (token < tl.load(length_ptr + line // H % lengths))
    cell = line.to(tl.int64) * capacity + token
    logit = tl.load(logit_ptr + cell, mask=seen, other=-float("inf"))
    weight = tl.exp2(logit.to(tl.float32) - tl.load(lse_ptr + line))
    tl.store(table_ptr + cell, decay * tl.load(table_ptr + cell, mask=seen, other=0.0) + weight, mask=seen)


def add_weights_triton(table: Tensor, logits: Tensor, lse: Tensor, decay: float, length: Tensor) -> None:
    B, H, S = table.shape
    assert all(x.is_contiguous() for x in (table, logits, lse))
    _weights_kernel[(B * H, triton.cdiv(S, TOKENS))](
        table, logits, lse, length, len(length), S, decay, H=H, TOKENS=TOKENS, num_warps=4
    )  # fmt: skip


def add_weights(table: Tensor, logits: Tensor, lse: Tensor, decay: float, length: Tensor) -> None:
    (add_weights_triton if use_triton(table) else add_weights_torch)(table, logits, lse, decay, length)


def add_held_torch(table: Tensor, logits: Tensor, lse: Tensor, decay: float, slots: Slots) -> None:
    """table (B, G, S) = decay * table + weight in place, for the tokens that are in slots; others stay as they are.

    logits (B, H/G, N): of each place the query heads of its KV head, whose weights are summed; lse (B, H).
    """
    (B, G, S), H = table.shape, lse.shape[1]
    head, cell = slots.heads().clamp(max=G - 1), slots.cells(S)  # (B, N)
    own = lse.view(B, G, H // G).gather(1, head[..., None].expand(-1, -1, H // G))  # (B, N, H/G)
    weight = torch.exp2(logits.float().transpose(1, 2) - own).sum(-1)  # (B, N)
    wide = F.pad(table.flatten(1), (0, 1))  # places without a token have the last column
    wide.scatter_(1, cell, decay * wide.gather(1, cell) + weight)
    table.copy_(wide[:, :-1].view_as(table))


@triton.jit
def _head_of(place, begin_ptr, G: tl.constexpr):
    """The KV head of places of a sequence's list; the last one for free places."""
    head = tl.zeros_like(place)
    for g in tl.static_range(1, G):
        head += (place >= tl.load(begin_ptr + g)).to(tl.int32)
    return head


@triton.jit
def _held_kernel(
    table_ptr, logit_ptr, lse_ptr, token_ptr, begin_ptr, capacity, slots, decay,
    G: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS places of one sequence."""
    b, place = tl.program_id(0).to(tl.int64), tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    token = tl.load(token_ptr + b * slots + place, mask=place < slots, other=-1)
    held, head = token >= 0, b * G + _head_of(place, begin_ptr + b * (G + 2), G)
    cell = table_ptr + head * capacity + token
    total = decay * tl.load(cell, mask=held, other=0.0)
    for i in tl.static_range(GROUP):
        logit = tl.load(logit_ptr + (b * GROUP + i) * slots + place, mask=held, other=-float("inf"))
        total += tl.exp2(logit.to(tl.float32) - tl.load(lse_ptr + head * GROUP + i, mask=held, other=0.0))
    tl.store(cell, total, mask=held)


def add_held_triton(table: Tensor, logits: Tensor, lse: Tensor, decay: float, slots: Slots) -> None:
    (B, G, S), (GROUP, N) = table.shape, logits.shape[1:]
    assert all(x.is_contiguous() for x in (table, logits, lse, *slots))
    _held_kernel[(B, triton.cdiv(N, TOKENS))](
        table, logits, lse, slots.token, slots.begin, S, N, decay, G=G, GROUP=GROUP, TOKENS=TOKENS, num_warps=4
    )  # fmt: skip


def add_held(table: Tensor, logits: Tensor, lse: Tensor, decay: float, slots: Slots) -> None:
    (add_held_triton if use_triton(table) else add_held_torch)(table, logits, lse, decay, slots)


# ---- Scores of the matched heads -------------------------------------------------------------------------------------


def rank_scores_torch(
    logits: Tensor, lse: Tensor, score: Tensor | None, index: Tensor, decay: float, length: Tensor, kv_heads: int,
    memory: Tensor | None = None, allowed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What the tokens of one LLM layer rank by: (B, G, S) fp32; what stands at or beyond a length is no score.

    index (B, H) int32: f(i), counted l' * H' + h'. length (B,) int32: tokens with the newest one. A head's score is
    decay * score + its newest row, or the row alone where score is None; a KV head's is the sum over its query heads
    (one token set for all of them). memory (B, G, S), if given: decay * memory is added, the LLM's own attention.

    allowed (B,) int32: with T > 1 rows, how many of a sequence's drafts count; a head's score is then the largest that
    it has after any of these rows: what a later draft looks at is in place when it is verified.
    """
    (T, _, B, heads, S), H = logits.shape, index.shape[1]
    at = index.long() // heads, torch.arange(B, device=index.device)[:, None], index.long() % heads
    running = torch.zeros(B, H, S, device=logits.device) if score is None else score[at]
    best = torch.zeros_like(running)
    for t in range(T):
        weight = torch.exp2(logits[t][at].float() - lse[t][at][..., None])  # (B, H, S)
        running = weight if score is None else decay * running + weight
        counts = True if allowed is None else (allowed >= t)[:, None, None]
        best = best.maximum(running.where(torch.as_tensor(counts, device=best.device), 0))
    total = best.view(B, kv_heads, -1, S).sum(2)
    return total if memory is None else decay * memory + total


@triton.jit
def _row_at(logit_ptr, lse_ptr, head, t, b, layers, B, S, HEADS: tl.constexpr):
    """Where the row of an SLM head begins, and the log of its sum."""
    line = ((t * layers + head // HEADS) * B + b).to(tl.int64) * HEADS + head % HEADS
    return logit_ptr + line * S, tl.load(lse_ptr + line)


@triton.jit
def _rank_kernel(
    total_ptr, logit_ptr, lse_ptr, score_ptr, index_ptr, length_ptr, memory_ptr, allowed_ptr, decay, layers, B, S,
    G: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, T: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one KV head of one sequence."""
    pair, token = tl.program_id(0), tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    b, seen = pair // G, token < S  # whole loads: what lies beyond a length is read and not used
    if tl.program_id(1) * TOKENS >= tl.load(length_ptr + b):
        return
    total = tl.zeros([TOKENS], tl.float32)
    cell = pair.to(tl.int64) * S + token
    if memory_ptr is not None:
        total = decay * tl.load(memory_ptr + cell, mask=seen, other=0.0)
    for i in tl.static_range(GROUP):
        head = tl.load(index_ptr + pair * GROUP + i)
        running, best = tl.zeros([TOKENS], tl.float32), tl.zeros([TOKENS], tl.float32)
        if score_ptr is not None:
            line = ((head // HEADS) * B + b).to(tl.int64) * HEADS + head % HEADS
            running = tl.load(score_ptr + line * S + token, mask=seen, other=0.0)
        for t in tl.static_range(T):
            row, lse = _row_at(logit_ptr, lse_ptr, head, t, b, layers, B, S, HEADS)
            weight = tl.exp2(tl.load(row + token, mask=seen, other=-float("inf")).to(tl.float32) - lse)
            if score_ptr is not None:
                weight += decay * running
            running = weight
            if allowed_ptr is None:
                best = tl.maximum(best, running)
            else:
                best = tl.where(tl.load(allowed_ptr + b) >= t, tl.maximum(best, running), best)
        total += best
    tl.store(total_ptr + cell, total, mask=seen)


def rank_scores_triton(
    logits: Tensor, lse: Tensor, score: Tensor | None, index: Tensor, decay: float, length: Tensor, kv_heads: int,
    memory: Tensor | None = None, allowed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    T, layers, B, heads, S = logits.shape
    assert all(x.is_contiguous() for x in (logits, lse, score, index, memory) if x is not None)
    total = torch.empty(B, kv_heads, S, device=logits.device, dtype=torch.float32)
    _rank_kernel[(B * kv_heads, triton.cdiv(S, TOKENS))](
        total, logits, lse, score, index, length, memory, allowed, decay, layers, B, S,
        G=kv_heads, GROUP=index.shape[1] // kv_heads, HEADS=heads, T=T, TOKENS=TOKENS, num_warps=4,
    )  # fmt: skip
    return total


def rank_scores(
    logits: Tensor, lse: Tensor, score: Tensor | None, index: Tensor, decay: float, length: Tensor, kv_heads: int,
    memory: Tensor | None = None, allowed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    function = rank_scores_triton if use_triton(logits) else rank_scores_torch
    return function(logits, lse, score, index, decay, length, kv_heads, memory, allowed)


# ---- Rows that are borrowed ------------------------------------------------------------------------------------------


def matched_rows_torch(logits: Tensor, lse: Tensor, index: Tensor, slots: Slots, out: Tensor) -> None:
    """What the marginal tokens borrow, A'_f(i) (Eq. 6): out (B, T, H/G, M) fp32 is written, for each place of the
    marginal slots the query heads of its KV head; 0 where there is no token. index (B, H) int32 as above."""
    (T, _, B, heads, _), (GROUP, M) = logits.shape, out.shape[2:]
    head, token = slots.heads(), slots.token.long()
    first = head.clamp(max=index.shape[1] // GROUP - 1)[:, None] * GROUP
    own = first + torch.arange(GROUP, device=head.device)[:, None]  # (B, H/G, M)
    match = index.long().gather(1, own.flatten(1)).view(B, GROUP, M)
    at = match // heads, torch.arange(B, device=index.device)[:, None, None], match % heads
    for t in range(T):
        weight = torch.exp2(logits[t][(*at, token.clamp(min=0)[:, None])].float() - lse[t][at])
        out[:, t] = weight.where(token[:, None] >= 0, 0)


@triton.jit
def _borrow_kernel(
    out_ptr, logit_ptr, lse_ptr, index_ptr, token_ptr, begin_ptr, layers, B, S, slots,
    G: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, T: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS places of one sequence, for one query head of each place's KV head."""
    b, i, place = tl.program_id(0), tl.program_id(2), tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    token = tl.load(token_ptr + b.to(tl.int64) * slots + place, mask=place < slots, other=-1)
    own = (b * G + _head_of(place, begin_ptr + b * (G + 2), G)) * GROUP + i
    match = tl.load(index_ptr + own)
    for t in tl.static_range(T):
        row, lse = _row_at(logit_ptr, lse_ptr, match, t, b, layers, B, S, HEADS)
        weight = tl.exp2(tl.load(row + token, mask=token >= 0, other=-float("inf")).to(tl.float32) - lse)
        line = ((b * T + t) * GROUP + i).to(tl.int64) * slots
        tl.store(out_ptr + line + place, weight, mask=place < slots)


def matched_rows_triton(logits: Tensor, lse: Tensor, index: Tensor, slots: Slots, out: Tensor) -> None:
    (T, layers, B, heads, S), (GROUP, M), H = logits.shape, out.shape[2:], index.shape[1]
    assert all(x.is_contiguous() for x in (logits, lse, index, *slots, out))
    _borrow_kernel[(B, triton.cdiv(M, TOKENS), GROUP)](
        out, logits, lse, index, slots.token, slots.begin, layers, B, S, M,
        G=H // GROUP, GROUP=GROUP, HEADS=heads, T=T, TOKENS=TOKENS, num_warps=4,
    )  # fmt: skip


def matched_rows(logits: Tensor, lse: Tensor, index: Tensor, slots: Slots, out: Tensor) -> None:
    (matched_rows_triton if use_triton(logits) else matched_rows_torch)(logits, lse, index, slots, out)
