"""What a plan ranks by, in Triton: the rows of the matched SLM heads, and the score memory of `--scores fused`.

Where it sits: SLM -> **scores** -> plan (kernels_plan.py), on a side stream of the decode step (graph.py). Beyond the
paper, see `Settings.scores`. `sum_scores` exists twice with one signature, `..._torch` (the twin) and `..._triton`: the
scores of the matched heads, summed for each KV head (Eq. 4, Eq. 5), and the memory make what the plan ranks by. In a
step without a plan the same sum is the memory itself, of all but the critical tokens.

In a layer's attention (kernels_eq6.py) that of the critical tokens fades and gets the LLM's own weights, for the next
step.

With fused scores, the default, the SLM's are logits, in 16 bits for a model of 16 bits, with the log of each head's sum
(`lse`, see kernels_decode.py): each number that the gather reads costs an exp2. Bytes, for Qwen2-7B with Qwen2-0.5B:
the floor is every score once, 2 * 24 * 14 a token and sequence (44 MB, 0.015 ms of an H100 at 4 x 16,384; 0.35 GB, 0.12
ms at 32 x 16,384). The gather reads a row for each of the LLM's 28 * 28 heads (0.1 and 0.82 GB), some of them from the
L2 cache; the memory is read besides, 2 * 28 * 4 a token and sequence (15 MB and 0.12 GB), and totals of 4 * 28 * 4 are
written.

Shapes follow the legend in model.py; L is the number of layers at hand.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CRITICAL, MARGINAL = 2, 1  # a token's tier in a plan; 0 is offloaded
TOKENS = 1024  # of a program: eight a thread of four warps


# ---- The twins -------------------------------------------------------------------------------------------------------


def head_sum_torch(score: Tensor, index: Tensor, kv_heads: int, lse: Tensor | None) -> Tensor:
    """Scores of the matched SLM heads, summed over each KV head's: score (L', B, H', S), index (B, L, H) -> (L, B, G,
    S) fp32. With lse (L', B, H') fp32 score holds logits as powers of two, fp32 or fp16, and 2 ** (score - lse) is
    summed."""
    B, L, _ = index.shape
    heads, sequence = score.shape[2], torch.arange(B, device=score.device)[:, None, None]
    matched = index // heads, sequence, index % heads
    rows = score[matched] if lse is None else torch.exp2(score[matched] - lse[matched][..., None])  # (B, L, H, S)
    return rows.view(B, L, kv_heads, -1, score.shape[3]).sum(3).transpose(0, 1)


def sum_scores_torch(
    score: Tensor, index: Tensor, length: Tensor, total: Tensor, lse: Tensor | None = None,
    memory: Tensor | None = None, decay: float = 0.0, tier: Tensor | None = None,
) -> None:  # fmt: skip
    """What the plan ranks by: total = decay * memory + the scores of a KV head's matched heads.

    score (L', B, H', S) fp32, none below 0, or with lse (L', B, H') fp32 logits, fp32 or fp16. index (B, L, H)
    int64: f(i), counted l' * H' + h'. length (B,) int32. total (L, B, G, S) fp32 is written up to each length.

    With `--scores fused` score is the SLM's newest row, and memory (L, B, G, S), fp32 or 16 bits, the LLM's own. tier
    (L, B, G, S) int8, if given: those CRITICAL there have their memory as it was. With them, and total the memory
    itself, this does to the memory what a plan would that changed no tier.
    """
    found = head_sum_torch(score, index, total.shape[2], lse)
    if memory is not None:
        found = decay * memory.float() + found
        if tier is not None:
            found = found.where(tier != CRITICAL, memory.float())
    seen = torch.arange(total.shape[3], device=total.device) < length[:, None, None]
    total.copy_(found.where(seen, total))


# ---- The kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def head_rows(
    index_ptr, lse_ptr, score_layer, score_head, b, B, GROUP: tl.constexpr, HEADS: tl.constexpr, LOGITS: tl.constexpr
):
    """Where the rows of the matched heads of sequence b begin, one offset for each head of the group, and the log of
    their sums (LOGITS; else nothing that counts)."""
    rows, logs = (), ()
    for i in tl.static_range(GROUP):
        head = tl.load(index_ptr + i)
        rows = rows + ((head // HEADS) * score_layer + (head % HEADS) * score_head,)
        if LOGITS:
            logs = logs + (tl.load(lse_ptr + ((head // HEADS) * B + b) * HEADS + head % HEADS),)
        else:
            logs = logs + (0.0,)
    return rows, logs


@triton.jit
def head_sum(score_ptr, heads, token, reach, GROUP: tl.constexpr, LOGITS: tl.constexpr):
    """Sums over the matched heads, `head_rows`, up to `reach`; what stands there beyond a length may be anything."""
    rows, logs = heads
    total = tl.zeros(token.shape, tl.float32)
    for i in tl.static_range(GROUP):  # unrolled: the loads of all heads are under way together
        score = tl.load(score_ptr + rows[i] + token, mask=token < reach, other=0.0).to(tl.float32)
        if LOGITS:
            score = tl.exp2(score - logs[i])
        total += score
    return total


@triton.jit
def whole_loads(length, ALIGNED: tl.constexpr):
    """How far to read, or to write what nobody reads: a mask that ends anywhere would cut every 16 bytes into four."""
    reach = length
    if ALIGNED:
        reach = tl.cdiv(length, 16) * 16
    return reach


@triton.jit
def _sum_kernel(
    score_ptr, index_ptr, length_ptr, total_ptr, lse_ptr, memory_ptr, tier_ptr, index_batch, index_layer, score_layer,
    score_batch, score_head, capacity, decay, B,
    G: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, ALIGNED: tl.constexpr,
    MEMORY: tl.constexpr, LOGITS: tl.constexpr, TIER: tl.constexpr,
):  # fmt: skip
    """Some tokens of one KV head of one sequence and layer."""
    line, at = tl.program_id(0), tl.program_id(1) * TOKENS
    layer, b, g = line // (B * G), line // G % B, line % G
    length = tl.load(length_ptr + b)
    if at >= length:
        return
    reach = whole_loads(length, ALIGNED)
    heads = head_rows(index_ptr + b * index_batch + layer * index_layer + g * GROUP, lse_ptr, score_layer, score_head,
                      b, B, GROUP, HEADS, LOGITS)  # fmt: skip
    token = at + tl.arange(0, TOKENS)
    cell = line.to(tl.int64) * capacity + token
    if MEMORY:
        memory = tl.load(memory_ptr + cell, mask=token < reach, other=0.0).to(tl.float32)
    total = head_sum(score_ptr + b.to(tl.int64) * score_batch, heads, token, reach, GROUP, LOGITS)
    if MEMORY:
        total = decay * memory + total
        if TIER:
            total = tl.where(tl.load(tier_ptr + cell, mask=token < reach, other=0) == 2, memory, total)
    # Totals are kept in the L2 cache, where the plan reads them next and then the next layer's take their place; the
    # memory, which is large and read in the next step, is not.
    tl.store(total_ptr + cell, total, mask=token < length, eviction_policy="" if TIER else "evict_last")


# ---- The launchers ---------------------------------------------------------------------------------------------------


def sum_scores_triton(
    score: Tensor, index: Tensor, length: Tensor, total: Tensor, lse: Tensor | None = None,
    memory: Tensor | None = None, decay: float = 0.0, tier: Tensor | None = None,
) -> None:  # fmt: skip
    L, B, G, S = total.shape
    assert score.stride(3) == 1 and index.stride(2) == 1
    assert all(tensor.is_contiguous() for tensor in (total, lse, memory, tier) if tensor is not None)
    _sum_kernel[(L * B * G, triton.cdiv(S, TOKENS))](
        score, index, length, total, total if lse is None else lse, total if memory is None else memory,
        total if tier is None else tier, *index.stride()[:2], *score.stride()[:3], S, decay, B,
        G=G, GROUP=index.shape[2] // G, HEADS=score.shape[2], TOKENS=TOKENS, ALIGNED=S % 16 == 0,
        MEMORY=memory is not None, LOGITS=lse is not None, TIER=tier is not None, num_warps=4,
    )  # fmt: skip
