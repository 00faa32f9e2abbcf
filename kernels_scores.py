"""What a plan ranks by, in Triton: the rows of the matched SLM heads, and the score memory of `--scores fused`.

Where it sits: under the plan (kernels_plan.py), which reads both and writes the memory for all tokens. In a layer's
attention (kernels_eq6.py) the memory of the critical tokens gets the LLM's own weights, for the next step's plan.
Beyond the paper, see `Settings.scores`.

`head_rows` and `head_sum` are what its kernels share with the plan's. `fade_memory` is for a step without a plan:
memory = decay * memory, plus the SLM's row where a token is not critical. It exists twice with one signature,
`..._torch` (the twin) and `..._triton`.

Shapes follow the legend in model.py; L is the number of layers at hand.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CRITICAL, MARGINAL = 2, 1  # a token's tier in a plan; 0 is offloaded
TOKENS = 2048  # tokens of a program that fades


# ---- The twins -------------------------------------------------------------------------------------------------------


def head_sum_torch(score: Tensor, index: Tensor, kv_heads: int, lse: Tensor | None) -> Tensor:
    """Scores of the matched SLM heads, summed over each KV head's: score (L', B, H', S), index (B, L, H) -> (L, B, G,
    S). With lse (L', B, H') score holds logits as powers of two, and 2 ** (score - lse) is summed."""
    B, L, _ = index.shape
    heads, sequence = score.shape[2], torch.arange(B, device=score.device)[:, None, None]
    matched = index // heads, sequence, index % heads
    rows = score[matched] if lse is None else torch.exp2(score[matched] - lse[matched][..., None])  # (B, L, H, S)
    return rows.view(B, L, kv_heads, -1, score.shape[3]).sum(3).transpose(0, 1)


def fade_memory_torch(
    row: Tensor, index: Tensor, length: Tensor, tier: Tensor, memory: Tensor, decay: float, lse: Tensor | None = None
) -> None:
    """What a plan does to the memory, with the tiers as they are.

    row (L', B, H', S) fp32: the SLM's newest attention, or its logits with lse (L', B, H') fp32; index (B, L, H) int64:
    f(i), both as for the plan. tier (L, B, G, S) int8. memory (L, B, G, S) fp32 is updated; from length (B,) int32 on
    it stays as it is.
    """
    gained = head_sum_torch(row, index, tier.shape[2], lse)  # (L, B, G, S)
    faded = decay * memory
    seen = torch.arange(tier.shape[3], device=row.device) < length[:, None, None]
    memory.copy_(faded.where(tier == CRITICAL, faded + gained).where(seen, memory))


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
        score = tl.load(score_ptr + rows[i] + token, mask=token < reach, other=0.0)
        if LOGITS:
            score = tl.exp2(score - logs[i])
        total += score
    return total


@triton.jit
def whole_loads(length, ALIGNED: tl.constexpr):
    """How far to read: a mask that ends anywhere would cut every load of 16 bytes into four."""
    reach = length
    if ALIGNED:
        reach = tl.cdiv(length, 16) * 16
    return reach


@triton.jit
def _fade_kernel(
    row_ptr, index_ptr, length_ptr, tier_ptr, memory_ptr, lse_ptr, index_batch, index_layer, row_layer, row_batch,
    row_head, capacity, decay, B,
    G: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, ALIGNED: tl.constexpr,
    LOGITS: tl.constexpr,
):  # fmt: skip
    """Some tokens of one KV head of one sequence and layer."""
    line, at = tl.program_id(0), tl.program_id(1) * TOKENS
    layer, b, g = line // (B * G), line // G % B, line % G
    length = tl.load(length_ptr + b)
    if at >= length:
        return
    reach = whole_loads(length, ALIGNED)
    heads = head_rows(index_ptr + b * index_batch + layer * index_layer + g * GROUP, lse_ptr, row_layer, row_head,
                      b, B, GROUP, HEADS, LOGITS)  # fmt: skip
    token = at + tl.arange(0, TOKENS)
    gained = head_sum(row_ptr + b.to(tl.int64) * row_batch, heads, token, reach, GROUP, LOGITS)
    cell = line.to(tl.int64) * capacity + token
    critical = tl.load(tier_ptr + cell, mask=token < reach, other=0) == 2
    memory = tl.load(memory_ptr + cell, mask=token < reach, other=0.0)
    after = decay * memory + tl.where(critical, 0.0, gained)
    tl.store(memory_ptr + cell, tl.where(token < length, after, memory), mask=token < reach)


# ---- The launchers ---------------------------------------------------------------------------------------------------


def fade_memory_triton(
    row: Tensor, index: Tensor, length: Tensor, tier: Tensor, memory: Tensor, decay: float, lse: Tensor | None = None
) -> None:
    L, B, G, S = tier.shape
    assert row.stride(3) == 1 and index.stride(2) == 1 and tier.is_contiguous() and memory.is_contiguous()
    assert lse is None or lse.is_contiguous()
    _fade_kernel[(L * B * G, triton.cdiv(S, TOKENS))](
        row, index, length, tier, memory, row if lse is None else lse, *index.stride()[:2], *row.stride()[:3], S, decay,
        B, G=G, GROUP=index.shape[2] // G, HEADS=row.shape[2], TOKENS=TOKENS, ALIGNED=S % 16 == 0,
        LOGITS=lse is not None, num_warps=8,
    )  # fmt: skip
