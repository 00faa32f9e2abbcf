"""Every attention, each behind one function: the plain PyTorch truth.

Where it sits: below the caches (cache.py), which call nothing else to attend. The functions here are the twins that a
faster kernel must equal, argument for argument.

| function                 | flow                         | paper                              |
| ------------------------ | ---------------------------- | ---------------------------------- |
| `causal_attention`       | prefill of both models       | vanilla attention                  |
| `attention_rows`         | matching window              | the matrices of Eq. 1-2            |
| `column_sums`            | prefill -> scores            | Eq. 1, in blocks                   |
| `full_attention_step`    | SLM's (or full) decode step  | vanilla attention, the row is kept |
| `full_attention_block`   | drafts verified, full cache  | the same for several new tokens    |
| `tiered_attention`       | LLM's decode step            | Eq. 6                              |
| `tiered_attention_block` | drafts verified, three tiers | Eq. 6 for several new tokens       |

Queries are scaled before the product, not after: unscaled products of fp16 can pass 65,504.

Shapes follow the legend in model.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NEGLIGIBLE = 1e-9  # weights below it are beyond fp32's resolution
SCORE_BLOCK = 256  # query rows whose attention is held at once when scores are summed


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

    For the few rows that are looked at one by one; its memory is H x T x S, so callers keep T small.
    """
    B, H, T, D = query.shape
    G, S = key.shape[1], key.shape[2]
    grouped = query.view(B, G, H // G, T, D)
    logits = (grouped * D**-0.5 @ key[:, :, None].transpose(-1, -2)).float()  # (B, G, H/G, T, S)
    queries = torch.arange(first, first + T, device=query.device)[:, None]
    future = torch.arange(S, device=query.device) > queries  # (T, S)
    return logits.masked_fill(future, -torch.inf).softmax(-1).view(B, H, T, S)


def column_sums(query: Tensor, key: Tensor, decay: float) -> Tensor:
    """Scores that T queries, the last T of S tokens, leave on the keys (Eq. 1): (B, H, S) fp32.

    sum over queries q of decay^(last - q) * A[q, j], by blocks of SCORE_BLOCK queries, so that memory is O(S).
    decay = 1 is the paper's plain sum. With decay < 1 queries whose weights are below fp32's resolution are skipped.
    """
    B, H, T, _ = query.shape
    S = key.shape[2]
    scores = torch.zeros(B, H, S, dtype=torch.float32, device=query.device)
    for start in range(T - queries_that_count(decay, T), T, SCORE_BLOCK):
        end = min(start + SCORE_BLOCK, T)
        age = torch.arange(T - start - 1, T - end - 1, -1, device=query.device, dtype=torch.float32)  # (block,)
        weight = torch.pow(decay, age)
        rows = attention_rows(query[:, :, start:end], key[:, :, : S - T + end], first=S - T + start)
        scores[:, :, : S - T + end] += (weight[:, None] * rows).sum(2)
    return scores


def queries_that_count(decay: float, queries: int) -> int:
    """How many of the last `queries` have a weight, decay^age, worth the work; decay 0 keeps the newest alone."""
    if decay == 1:
        return queries
    return 1 if decay == 0 else min(queries, 1 + math.ceil(math.log(NEGLIGIBLE) / math.log(decay)))


def full_attention_step(query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """One new token a sequence on its full cache.

    query (B, H, 1, D), key and value (B, G, S, D), positions (B,): the newest token's; later columns are not seen.
    Returns the output (B, H, 1, D) and the attention rows (B, H, S) fp32.
    """
    out, rows = full_attention_block(query, key, value, positions[:, None])
    return out, rows[:, :, 0]


def full_attention_block(query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """T new tokens a sequence on its full cache, each seeing what stands up to its own position.

    query (B, H, T, D), key and value (B, G, S, D), positions (B, T). Returns the output (B, H, T, D) and the attention
    rows (B, H, T, S) fp32: for the few tokens of a decode or verify step, not for a prefill.
    """
    B, H, T, D = query.shape
    G, S = key.shape[1], key.shape[2]
    grouped = query.reshape(B, G, H // G * T, D)
    logits = (grouped * D**-0.5 @ key.transpose(-1, -2)).float().view(B, G, -1, T, S)
    unseen = torch.arange(S, device=query.device) > positions[:, :, None]  # (B, T, S)
    rows = logits.masked_fill(unseen[:, None, None], -torch.inf).softmax(-1)
    out = rows.to(value.dtype).view(B, G, -1, S) @ value  # (B, G, H/G * T, D)
    return out.view(B, H, T, D), rows.view(B, H, T, S)


def tiered_attention(
    query: Tensor, key: Tensor, value: Tensor, key_used: Tensor, value_slot: Tensor, borrowed: Tensor
) -> tuple[Tensor, Tensor]:
    """One new token a sequence on the critical and marginal tiers (Eq. 6).

    query (B, H, 1, D); key (B, G, C, D): the K pool; value (B, G, N, D): the V pool, N >= C slots, which holds the
    values of critical and marginal tokens alike. key_used (B, G, C) bool: slots that hold a token. value_slot
    (B, G, C) int64: where in the V pool the value of each K slot lies. borrowed (B, H, N) fp32: the SLM's attention
    A'_f(i) on the marginal tokens by V slot, 0 elsewhere.

        o = (1 - m) softmax(q K_C) V_C + sum over j in M of A'_f(i)[j] V_j,    m = sum over j in M of A'_f(i)[j]

    The paper leaves the factor (1 - m) open; with it, exact borrowed probabilities give exact attention.
    Returns the output (B, H, 1, D) and the weight of every V slot in it (B, H, N) fp32, which sums to one.
    """
    out, weight = tiered_attention_block(query, key, value, key_used[:, :, None], value_slot, borrowed[:, :, None])
    return out, weight[:, :, 0]


def tiered_attention_block(
    query: Tensor, key: Tensor, value: Tensor, key_seen: Tensor, value_slot: Tensor, borrowed: Tensor
) -> tuple[Tensor, Tensor]:
    """T new tokens a sequence on the tiers (Eq. 6), each with what it sees and a row of its own to borrow.

    As `tiered_attention`, with query (B, H, T, D), key_seen (B, G, T, C) bool: the K slots whose token is not after
    this one, and borrowed (B, H, T, N). Returns the output (B, H, T, D) and the weights (B, H, T, N) fp32.
    """
    B, H, T, D = query.shape
    G, N = key.shape[1], value.shape[2]
    grouped = query.reshape(B, G, H // G * T, D)
    logits = (grouped * D**-0.5 @ key.transpose(-1, -2)).float().view(B, G, H // G, T, -1)  # (B, G, H/G, T, C)
    critical = logits.masked_fill(~key_seen[:, :, None], -torch.inf).softmax(-1)
    weight = borrowed.view(B, G, H // G, T, N)
    mass = weight.sum(-1, keepdim=True)  # m, (B, G, H/G, T, 1)
    slot = value_slot[:, :, None, None].expand_as(critical)
    weight = weight.scatter_add(-1, slot, (1 - mass) * critical)  # empty K slots add their zero to slot 0
    weight = weight.view(B, G, H // G * T, N)
    # A slot nobody weighs may hold anything, NaN included: 0 * NaN would reach the sum.
    used = (weight != 0).any(2)[..., None]  # (B, G, N, 1)
    out = weight.to(value.dtype) @ value.where(used, 0)  # (B, G, H/G * T, D)
    return out.view(B, H, T, D), weight.view(B, H, T, N)
