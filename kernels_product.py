"""Matrix products of few rows in Triton, with the small work before and after them in the same launch.

Where it sits: inside the layers of a small decoder in a decode step (graph.py), the SLM above all. None of it is the
paper's. A product of a 0.5B reads 2 to 17 MB, 1 to 6 us of an H100, so what counts is how many launches a layer has and
how early each of them has its loads in flight.

| function       | what it is                                          | in a layer                         |
| -------------- | --------------------------------------------------- | ---------------------------------- |
| `norm_product` | residual add, RMSNorm, product                      | the qkv product                    |
| `norm_gate`    | the same, and silu(gate) * up of the product        | gate and up                        |
| `product`      | product whose inputs are cut into splits            | the products back to hidden size   |

`product` has few outputs, so its inputs are cut as well and it returns the parts of the sum, fp32; whoever comes next
adds them up in their order: the same sum in every run. With few rows that is every program of the next product, which
also norms the rows for itself: the norm is a factor of each row, so it takes one pass, the squares are summed beside
the product and the factor is applied at its end. The factor comes late for fp16, where residual times norm weight may
pass 65,504; there, and with more rows, the norm is a launch of its own.

Shapes follow the legend in model.py; decode drops the T dimension. K are the inputs, N the outputs of a product.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels_layer import add_norm_torch, add_norm_triton, gate_torch

MAX_ROWS = 64  # one block of rows: each weight is read once
MAX_HIDDEN = 1536  # larger products are long enough for cuBLAS to hide their ends
NORM_ROWS = 8  # up to that many rows every program adds and norms them for itself
PROGRAMS = 264  # of a product that is split: two for each of the 132 multiprocessors of an H100


class Launch(NamedTuple):
    """block: outputs of one program. depth: inputs of a tile. splits: programs that share the inputs of an output."""

    block: int
    depth: int
    warps: int
    stages: int
    splits: int = 1


def suits(rows: int, hidden: int) -> bool:
    """Whether a decoder of this hidden size takes these products for so many rows, or one library call for each."""
    return rows <= MAX_ROWS and hidden <= MAX_HIDDEN


def pick_launch(rows: int, N: int, K: int, dtype: torch.dtype, split: bool) -> Launch:
    """By shape alone. fp32 has no matrix unit here (its digits are kept), so its tiles are small."""
    wide = rows > 16
    block, depth = (32, 64) if wide else (16, 128)
    if dtype == torch.float32:
        depth = 32
    splits = 1
    if split:  # at least four tiles each, and no more than eight, for their sums are read by many
        splits = max(1, min(PROGRAMS // triton.cdiv(N, block), K // (4 * depth), 8))
    return Launch(block, depth, 4, 2 if dtype == torch.float32 else 4, splits)


# ---- The twins -------------------------------------------------------------------------------------------------------


def norm_product_torch(
    x: Tensor, update: Tensor | None, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x + update, its RMSNorm with weights `norm` (K,), times weight (N, K) plus bias (N,): (B, N), and x + update.

    x (B, K); update (splits, B, K) fp32 is the parts of a sum, None: nothing is added. What x holds afterwards is
    open: use the second result.
    """
    return F.linear(add_norm_torch(x, update, norm, eps), weight, bias), x


def norm_gate_torch(
    x: Tensor, update: Tensor | None, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `norm_product` with the weights of gate and up in one, (2 N, K), and bias (2 N,): silu(gate) * up, (B, N)."""
    both, x = norm_product_torch(x, update, norm, eps, weight, bias)
    return gate_torch(both), x


def product_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, K) times weight (N, K) plus bias (N,), as parts of a sum: (splits, B, N) fp32."""
    return F.linear(x, weight, bias).float()[None]


# ---- The kernel ------------------------------------------------------------------------------------------------------


@triton.jit
def _product_kernel(
    x_ptr, update_ptr, norm_ptr, weight_ptr, bias_ptr, out_ptr, sum_ptr, M, N, K, size, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, NORM: tl.constexpr, UPDATES: tl.constexpr,
    GATE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """BLOCK outputs of all rows over `size` inputs. Weights are the left factor: their rows lie in memory as the matrix
    unit wants them, and its right side goes down to eight, a few rows of x."""
    column, split = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    row, depth = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    real, inside = row < M, column < N
    line = weight_ptr + column.to(tl.int64)[:, None] * K  # (BLOCK, 1)
    mine = row < tl.where(tl.program_id(0) == 0, M, 0)  # the first program writes the sum of residual and update
    acc = tl.zeros([BLOCK, ROWS], tl.float32)
    other = tl.zeros([BLOCK, ROWS], tl.float32)  # up, where acc is gate
    squares = tl.zeros([ROWS, DEPTH], tl.float32)
    for at in range(split * size, tl.minimum(split * size + size, K), DEPTH):
        k = at + depth
        here = inside[:, None] & (k < K)
        weight = tl.load(line + k, mask=here, other=0.0)  # (BLOCK, DEPTH)
        cell, asked = row[:, None] * K + k, real[:, None] & (k < K)
        x = tl.load(x_ptr + cell, mask=asked, other=0.0)  # (ROWS, DEPTH)
        if NORM:
            if UPDATES > 0:
                update = tl.zeros([ROWS, DEPTH], tl.float32)
                for part in tl.static_range(UPDATES):
                    update += tl.load(update_ptr + part * M * K + cell, mask=asked, other=0.0)
                x = (x.to(tl.float32) + update.to(x.dtype).to(tl.float32)).to(x.dtype)
                tl.store(sum_ptr + cell, x, mask=mine[:, None] & (k < K))
            wide = x.to(tl.float32)
            squares += wide * wide
            x = (wide * tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)).to(x.dtype)
        acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
        if GATE:
            up = tl.load(line + N * K + k, mask=here, other=0.0)
            other = tl.dot(up, tl.trans(x), other, input_precision="ieee")
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 1) / K + eps)  # (ROWS,)
        acc, other = acc * scale, other * scale
    if BIAS:
        once = column < tl.where(split == 0, N, 0)
        bias = tl.load(bias_ptr + column, mask=once, other=0.0).to(tl.float32)
        acc += bias[:, None]
    target = out_ptr + (split * M + row) * N + column[:, None]  # (BLOCK, ROWS)
    if GATE:
        if BIAS:
            other += tl.load(bias_ptr + N + column, mask=inside, other=0.0).to(tl.float32)[:, None]
        dtype = out_ptr.dtype.element_ty
        gate = acc.to(dtype).to(tl.float32)
        acc = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32) * other.to(dtype).to(tl.float32)
    tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & real)


# ---- The launchers ---------------------------------------------------------------------------------------------------


def norm_product_triton(
    x: Tensor, update: Tensor | None, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _normed(x, update, norm, eps, weight, bias, False)


def norm_gate_triton(
    x: Tensor, update: Tensor | None, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _normed(x, update, norm, eps, weight, bias, True)


def product_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    N, K = weight.shape
    launch = pick_launch(len(x), N, K, x.dtype, True)
    splits = triton.cdiv(K, _size(K, launch))  # a short last one may leave fewer
    out = torch.empty(splits, len(x), N, device=x.device, dtype=torch.float32)
    _launch(x, None, None, 0.0, weight, bias, out, None, False, launch)
    return out


def _normed(x, update, norm, eps, weight, bias, gate: bool) -> tuple[Tensor, Tensor]:
    B, K = x.shape
    N = len(weight) // 2 if gate else len(weight)
    out, total = torch.empty(B, N, device=x.device, dtype=x.dtype), x
    if B > NORM_ROWS or x.dtype == torch.float16:
        x, norm, update = add_norm_triton(x, update, norm, eps), None, None
    elif update is not None:
        total = torch.empty_like(x)  # while others still read x
    _launch(x, update, norm, eps, weight, bias, out, total, gate, pick_launch(B, N, K, x.dtype, False))
    return out, total


def _launch(x, update, norm, eps, weight, bias, out, total, gate: bool, launch: Launch) -> None:
    (M, K), N = x.shape, out.shape[-1]
    assert M <= MAX_ROWS and x.is_contiguous() and weight.is_contiguous(), "few rows, one after another"
    assert update is None or update.is_contiguous()
    size = _size(K, launch)
    _product_kernel[(triton.cdiv(N, launch.block), triton.cdiv(K, size))](
        x, x if update is None else update, x if norm is None else norm, weight, x if bias is None else bias, out,
        x if total is None else total, M, N, K, size, eps,
        ROWS=max(8, triton.next_power_of_2(M)), BLOCK=launch.block, DEPTH=launch.depth, NORM=norm is not None,
        UPDATES=0 if update is None else len(update), GATE=gate, BIAS=bias is not None,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip


def _size(K: int, launch: Launch) -> int:
    """Inputs of one split: whole tiles."""
    return launch.depth * triton.cdiv(K, launch.depth * launch.splits)
