"""The score memory of `--scores fused` in Triton: what the LLM sees of a token, and the SLM's word on the rest.

Where it sits: beside the plan (kernels_plan.py), which reads the memory and writes it for all tokens; then
LLM attention -> **its weights on the critical tokens** -> the memory, for the next step's plan. Beyond the paper, see
`Settings.scores`. Each function exists twice with one signature, `..._torch` (the twin) and `..._triton`.

| function      | flow                                                                                   |
| ------------- | -------------------------------------------------------------------------------------- |
| `fade_memory` | no plan in this step: memory = decay * memory, plus the SLM's row where not critical   |
| `add_weights` | after a layer's attention: plus the LLM's own weights of the critical tokens           |

Shapes follow the legend in model.py; L is the number of layers at hand.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_plan import CRITICAL, head_rows, head_sum, head_sum_torch, whole_loads

TOKENS = 2048  # tokens of a program that fades
SLOTS = 512  # slots of a program that adds


# ---- The twins -------------------------------------------------------------------------------------------------------


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


def add_weights_torch(weight: Tensor, position: Tensor, memory: Tensor) -> None:
    """Add what each K slot weighed in one layer's attention, weight (B, H, C) fp32, summed over the heads of a group,
    to the memory (B, G, S) of its token; position (B, G, C) int32, -1 for an empty slot."""
    B, G, C = position.shape
    own = weight.view(B, G, -1, C).sum(2).where(position >= 0, 0)
    memory.scatter_add_(-1, position.long().clamp(min=0), own)


# ---- The kernels -----------------------------------------------------------------------------------------------------


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


@triton.jit
def _add_kernel(
    weight_ptr, position_ptr, memory_ptr, slots, capacity, GROUP: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    """Some slots of one KV head: a token has one slot, so no two programs add to the same number."""
    pair = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    inside = slot < slots
    token = tl.load(position_ptr + pair * slots + slot, mask=inside, other=-1)
    own = tl.zeros([SLOTS], tl.float32)
    for i in tl.static_range(GROUP):
        own += tl.load(weight_ptr + (pair * GROUP + i) * slots + slot, mask=inside, other=0.0)
    cell = memory_ptr + pair * capacity + token
    tl.store(cell, tl.load(cell, mask=token >= 0, other=0.0) + own, mask=token >= 0)


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


def add_weights_triton(weight: Tensor, position: Tensor, memory: Tensor) -> None:
    B, G, C = position.shape
    assert weight.is_contiguous() and position.is_contiguous() and memory.is_contiguous()
    _add_kernel[(B * G, triton.cdiv(C, SLOTS))](
        weight, position, memory, C, memory.shape[2], GROUP=weight.shape[1] // G, SLOTS=SLOTS, num_warps=4,
    )  # fmt: skip
