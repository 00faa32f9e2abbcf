"""The two large matrix products of a layer, gate-up and down, for few rows, in Triton.

Where it sits: inside the layers of both models in a decode step (graph.py). None of it is the paper's. With up to
MAX_ROWS rows a product is bound by the bytes of its weights, and each weight is read once.

| function        | what it is                             | what it saves                                       |
| --------------- | -------------------------------------- | --------------------------------------------------- |
| `gate_product`  | silu(gate) * up of one product         | a launch, and both halves to memory and back        |
| `split_product` | a product whose inputs are cut up, too | idle multiprocessors: hidden size is few outputs    |

The parts of a sum that `split_product` returns are added up by the norm that comes next (`add_norm`, kernels_layer.py),
always in the same order: the same sum in every run.

us on an H100 in bf16 at Qwen2's shapes, weights from memory; in brackets the library's product (cuBLAS). "gate-up" is
with the norm before it and the gate, "down" alone, without the 0.6 to 0.8 us that a norm takes longer to add the parts:

| rows | gate-up, 0.5B | gate-up, 7B     | down, 0.5B  | down, 7B      |
| ---- | ------------- | --------------- | ----------- | ------------- |
| 4    | 10.9 (12.1)   | 98.8 (101.6)    | 5.5 (7.8)   | 49.2 (54.0)   |
| 32   | 11.9 (12.6)   | 105.7 (106.4)   | 6.5 (8.0)   | 50.6 (53.8)   |
| 64   | 12.2 (13.0)   | 106.9 (111.8)   | 6.9 (8.3)   | 52.1 (55.2)   |

The other two products, qkv and o, are the library's: ours brought 0.9 us at best and lost up to 6.5. Norms stay out of
the products: every program would norm for itself, and with that in all four an SLM's step of 1.33 ms took 1.79.

Shapes follow the legend in model.py; decode drops the T dimension. K are the inputs, N the outputs of a product.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels_layer import gate_torch

MAX_ROWS = 64  # one block of rows: each weight is read once
LARGE = 2048  # hidden sizes beyond have outputs enough for fewer splits; measured were 896 and 3584


class Launch(NamedTuple):
    """block: outputs of one program. depth: inputs of a tile. splits: programs that share the inputs of an output."""

    block: int
    depth: int
    warps: int
    stages: int
    splits: int = 1


def pick_launch(rows: int, hidden: int, dtype: torch.dtype, gate: bool) -> Launch:
    """The fastest of those measured at 4, 32 and 64 rows, or within 3 % of it (6 % with 8 splits instead of 16, whose
    sums cost the norm more). fp32 has no matrix unit here (its digits are kept), so its tiles are small."""
    if rows <= 16:
        launch = Launch(16, 256, 4, 4) if gate and hidden > LARGE else Launch(16, 128, 2, 4)
    else:
        launch = Launch(64, 128, 8 if rows <= 32 else 4, 3)
    if dtype == torch.float32:
        launch = launch._replace(depth=32, stages=2)
    return launch if gate else launch._replace(splits=4 if hidden > LARGE else 8)


# ---- The twins -------------------------------------------------------------------------------------------------------


def gate_product_torch(x: Tensor, weight: Tensor) -> Tensor:
    """silu(gate) * up of x (B, K); weight (2 inner, K) is that of gate, then that of up. Returns (B, inner)."""
    return gate_torch(F.linear(x, weight))


def split_product_torch(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, K) times weight (N, K), as the parts of a sum: (splits, B, N) fp32."""
    return F.linear(x, weight).float()[None]


# ---- The kernel ------------------------------------------------------------------------------------------------------


@triton.jit
def _product_kernel(
    x_ptr, weight_ptr, out_ptr, M, N, K, size,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """BLOCK outputs of all rows over `size` inputs. Weights are the left factor: their rows lie in memory as the matrix
    unit wants them, and its right side goes down to eight, a few rows of x."""
    column, split = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    row, depth = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    real, inside = row < M, column < N
    line = weight_ptr + column.to(tl.int64)[:, None] * K  # (BLOCK, 1)
    acc = tl.zeros([BLOCK, ROWS], tl.float32)
    other = tl.zeros([BLOCK, ROWS], tl.float32)  # up, where acc is gate
    for at in range(split * size, tl.minimum(split * size + size, K), DEPTH):
        k = at + depth
        here = inside[:, None] & (k < K)
        weight = tl.load(line + k, mask=here, other=0.0)  # (BLOCK, DEPTH)
        x = tl.load(x_ptr + row[:, None] * K + k, mask=real[:, None] & (k < K), other=0.0)  # (ROWS, DEPTH)
        acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
        if GATE:
            up = tl.load(line + N * K + k, mask=here, other=0.0)
            other = tl.dot(up, tl.trans(x), other, input_precision="ieee")
    if GATE:  # rounded where two launches round: gate and up, silu, their product
        dtype = out_ptr.dtype.element_ty
        gate = acc.to(dtype).to(tl.float32)
        acc = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32) * other.to(dtype).to(tl.float32)
    target = out_ptr + (split * M + row) * N + column[:, None]  # (BLOCK, ROWS)
    tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & real)


# ---- The launchers ---------------------------------------------------------------------------------------------------


def gate_product_triton(x: Tensor, weight: Tensor) -> Tensor:
    B, K = x.shape
    out = torch.empty(B, len(weight) // 2, device=x.device, dtype=x.dtype)
    _launch(x, weight, out, K, pick_launch(B, K, x.dtype, True), True)
    return out


def split_product_triton(x: Tensor, weight: Tensor) -> Tensor:
    B, (N, K) = len(x), weight.shape
    launch = pick_launch(B, N, x.dtype, False)
    size = launch.depth * triton.cdiv(K, launch.depth * launch.splits)  # inputs of one split: whole tiles
    out = torch.empty(triton.cdiv(K, size), B, N, device=x.device, dtype=torch.float32)
    _launch(x, weight, out, size, launch, False)
    return out


def _launch(x: Tensor, weight: Tensor, out: Tensor, size: int, launch: Launch, gate: bool) -> None:
    (M, K), N = x.shape, out.shape[-1]
    assert M <= MAX_ROWS and x.is_contiguous() and weight.is_contiguous(), "few rows, one after another"
    _product_kernel[(triton.cdiv(N, launch.block), triton.cdiv(K, size))](
        x, weight, out, M, N, K, size,
        ROWS=max(8, triton.next_power_of_2(M)), BLOCK=launch.block, DEPTH=launch.depth, GATE=gate,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
