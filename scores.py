"""What attention says of tokens: weights summed into score tables, and what a plan of the LLM's tiers ranks by.

Where it sits: SLM -> **scores** -> tier plan (tiers.py). An attention row is held as it comes from kernels.py: logits
as powers of two and lse, the log of their sum, so that a weight is 2 ** (logit - lse).

| function        | flow                                                                             | paper      |
| --------------- | -------------------------------------------------------------------------------- | ---------- |
| `add_weights`   | an attention row -> a score table: the SLM's, the LLM's own memory, H2O's        | Eq. 1      |
| `rank_scores`   | scores of the matched heads f(i) -> what the tokens of one LLM layer rank by     | Eq. 4, 5   |
| `matched_rows`  | newest rows of the matched heads -> what the marginal slots borrow               | Eq. 6      |

The SLM's rows of one step are logits (T, L', B, H', S), fp16 for a model of 16 bits and else fp32, and lse (T, L', B,
H') fp32, T = 1 without drafts; the score table (L', B, H', S) fp32 is as it was before these rows.

Shapes follow the legend in model.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops import use_triton

TOKENS = 1024  # of a program


# ---- An attention row into a table -----------------------------------------------------------------------------------


def add_weights_torch(
    table: Tensor, logits: Tensor, lse: Tensor, decay: float, length: Tensor | None, position: Tensor | None = None
) -> None:
    """table = decay * table + weight in place, for the tokens that the row sees.

    logits (B, H, C), lse (B, H). table (B, H, S), or (B, G, S), which takes the sum over the query heads of a KV head.
    length (n,) int32: a row sees the tokens before length[b % n]; 0 leaves the table as it is; None: all. position (B,
    G, C) int32, if given: the token in each slot, -1 if none; tokens in no slot stay as they are, length is not asked.
    """
    B, H, C = logits.shape
    rows, S = table.shape[1:]
    weight = torch.exp2(logits.float() - lse[..., None]).view(B, rows, -1, C).sum(2)  # (B, rows, C)
    if position is None:
        end = torch.full((B,), C, device=table.device) if length is None else length.repeat(B // len(length))
        seen = torch.arange(S, device=table.device) < end[:, None, None]
        table.copy_((decay * table + weight).where(seen, table))
        return
    token = position.repeat_interleave(rows // position.shape[1], 1).long()  # (B, rows, C)
    held, token = token >= 0, token.clamp(min=0)
    change = (decay - 1) * table.gather(-1, token) + weight
    table.scatter_add_(-1, token, change.where(held, 0))


@triton.jit
def _weights_kernel(
    table_ptr, logit_ptr, lse_ptr, length_ptr, position_ptr, lengths, capacity, slots, decay,
    ROWS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS slots of one row of the table; GROUP query heads add up to it."""
    line, slot = tl.program_id(0), tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    seen, token = slot < slots, slot
    if position_ptr is not None:
        token = tl.load(position_ptr + line.to(tl.int64) * slots + slot, mask=seen, other=-1)
        seen = token >= 0
    elif length_ptr is not None:
        seen = seen & (token < tl.load(length_ptr + line // ROWS % lengths))
    cell = table_ptr + line.to(tl.int64) * capacity + token
    total = decay * tl.load(cell, mask=seen, other=0.0)
    for i in tl.static_range(GROUP):
        head = line.to(tl.int64) * GROUP + i
        logit = tl.load(logit_ptr + head * slots + slot, mask=seen, other=-float("inf"))
        total += tl.exp2(logit.to(tl.float32) - tl.load(lse_ptr + head))
    tl.store(cell, total, mask=seen)


def add_weights_triton(
    table: Tensor, logits: Tensor, lse: Tensor, decay: float, length: Tensor | None, position: Tensor | None = None
) -> None:
    B, H, C = logits.shape
    rows, S = table.shape[1:]
    assert all(x.is_contiguous() for x in (table, logits, lse)) and (position is None or position.is_contiguous())
    assert position is None or position.shape[1] == rows, "with slots, the table's rows are the KV heads"
    _weights_kernel[(B * rows, triton.cdiv(C, TOKENS))](
        table, logits, lse, length, position, 1 if length is None else len(length), S, C, decay,
        ROWS=rows, GROUP=H // rows, TOKENS=TOKENS, num_warps=4,
    )  # fmt: skip


def add_weights(
    table: Tensor, logits: Tensor, lse: Tensor, decay: float, length: Tensor | None, position: Tensor | None = None
) -> None:
    (add_weights_triton if use_triton(table) else add_weights_torch)(table, logits, lse, decay, length, position)


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


def matched_rows_torch(logits: Tensor, lse: Tensor, index: Tensor, position: Tensor, out: Tensor) -> None:
    """What the marginal tokens borrow, A'_f(i) (Eq. 6): out (B, T, H, M) fp32 is written, 0 in free slots.

    index (B, H) int32 as above; position (B, G, M) int32: the token in each slot of the marginal tier, -1 if none.
    """
    (T, _, B, heads, _), H = logits.shape, index.shape[1]
    at = index.long() // heads, torch.arange(B, device=index.device)[:, None], index.long() % heads
    token = position.repeat_interleave(H // position.shape[1], 1).long()  # (B, H, M)
    for t in range(T):
        weight = torch.exp2(logits[t][at].gather(-1, token.clamp(min=0)).float() - lse[t][at][..., None])
        out[:, t] = weight.where(token >= 0, 0)


@triton.jit
def _borrow_kernel(
    out_ptr, logit_ptr, lse_ptr, index_ptr, position_ptr, layers, B, S, slots,
    H: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, T: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS slots of one query head of one sequence."""
    line, slot = tl.program_id(0), tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    b, head = line // H, tl.load(index_ptr + line)
    token = tl.load(position_ptr + (line // GROUP).to(tl.int64) * slots + slot, mask=slot < slots, other=-1)
    for t in tl.static_range(T):
        row, lse = _row_at(logit_ptr, lse_ptr, head, t, b, layers, B, S, HEADS)
        weight = tl.exp2(tl.load(row + token, mask=token >= 0, other=-float("inf")).to(tl.float32) - lse)
        out = ((b * T + t) * H + line % H).to(tl.int64) * slots + slot
        tl.store(out_ptr + out, weight, mask=slot < slots)


def matched_rows_triton(logits: Tensor, lse: Tensor, index: Tensor, position: Tensor, out: Tensor) -> None:
    (T, layers, B, heads, S), (G, slots), H = logits.shape, position.shape[1:], index.shape[1]
    assert all(x.is_contiguous() for x in (logits, lse, index, position, out))
    _borrow_kernel[(B * H, triton.cdiv(slots, TOKENS))](
        out, logits, lse, index, position, layers, B, S, slots,
        H=H, GROUP=H // G, HEADS=heads, T=T, TOKENS=TOKENS, num_warps=4,
    )  # fmt: skip


def matched_rows(logits: Tensor, lse: Tensor, index: Tensor, position: Tensor, out: Tensor) -> None:
    (matched_rows_triton if use_triton(logits) else matched_rows_torch)(logits, lse, index, position, out)
