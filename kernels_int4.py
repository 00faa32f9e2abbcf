"""INT4 weights in Triton: a product of few rows with 4-bit weights (W4A16), and the weights themselves for many rows.

Where it sits: inside `Int4Linear` (quantize.py), in place of a layer's matrix products; the paper runs its 72B in INT4.
Each function exists twice with one signature: the plain PyTorch twin (`..._torch`) and the Triton version.

The layout, for K inputs (a multiple of the group size here; short last groups are padded) and N outputs:

    packed (K / 4, N) int16    GROUP / 4 rows a group; nibble i of row r holds input i * GROUP / 4 + r of the group
    scale  (K / GROUP, N)      bf16 or fp16
    zero   (K / GROUP, N)      uint8, 0 to 16
    weight = scale * (nibble - zero)

Four words of 4 bits to 16 bits, not eight to 32, because a matrix unit is fed 16-bit numbers: a tile of words lies in
the registers as the tile of weights will, and nothing is shuffled. Inputs of one nibble follow one another, so the
activations are read as they are.

How the product works: one program takes BLOCK outputs and a share of the groups, for all rows, so that each word is
read once. 16 + nibble is a floating-point number whose exponent says 16 and whose highest four mantissa bits are the
nibble: two integer operations, no conversion, exact in fp32, fp16 and bf16. A group's sum is corrected by
(16 + zero) * sum of its inputs and scaled in fp32, so weights are never rounded to 16 bits. Where the outputs are too
few to fill the GPU, the groups are split among programs, and a second kernel adds the parts in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DECODE_ROWS = 64  # up to here a product is bound by the bytes of its weights; above, dequantise and multiply
BLOCK = 128  # outputs of one program: a tile of words and activations, four deep, takes 37 KB of shared memory
PROGRAMS = 528  # how many programs are aimed at: four for each of the 132 multiprocessors of an H100, all at once
MERGE_BLOCK = 1024


# ---- The twins -------------------------------------------------------------------------------------------------------


def dequantize_torch(packed: Tensor, scale: Tensor, zero: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    """The weights (inputs, N), rounded once to dtype. inputs: without the padding of a short last group."""
    groups, N = scale.shape
    words = packed.unflatten(0, (groups, -1))  # (groups, GROUP / 4, N)
    weight = torch.empty(groups, 4, *words.shape[1:], device=packed.device)
    for nibble in range(4):
        weight[:, nibble] = (words >> 4 * nibble) & 15
    weight = weight.flatten(1, 2).sub_(zero[:, None]).mul_(scale[:, None])  # (groups, GROUP, N)
    return weight.flatten(0, 1)[:inputs].to(dtype)


def int4_matmul_torch(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, inputs) times the weights, plus bias (N,): (M, N)."""
    weight = dequantize_torch(packed, scale, zero, x.shape[1], x.dtype)
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


# ---- The kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _sixteen_plus(word, NIBBLE: tl.constexpr, DTYPE: tl.constexpr, PAIRS: tl.constexpr):
    """16 + one nibble of each word, as floating-point numbers, by their bits; PAIRS: see `pair_code`."""
    if DTYPE == tl.float32:
        bits = (((word.to(tl.int32) >> (4 * NIBBLE)) & 15) << 19) | 0x41800000
    elif DTYPE == tl.float16:
        if PAIRS is not None:
            return tl.inline_asm_elementwise(PAIRS[NIBBLE], "=r,r", [word], dtype=tl.float16, is_pure=True, pack=2)
        bits = (((word >> (4 * NIBBLE)) & 15) << 6) | 0x4C00
    else:
        if PAIRS is not None:
            return tl.inline_asm_elementwise(PAIRS[NIBBLE], "=r,r", [word], dtype=tl.bfloat16, is_pure=True, pack=2)
        bits = (((word >> (4 * NIBBLE)) & 15) << 3) | 0x4180
    return bits.to(DTYPE, bitcast=True)


@triton.jit
def _matmul_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, K, groups, packed_row, scale_row, zero_row, size,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """BLOCK outputs of all rows over `size` groups. out is (M, N), or fp32 (splits, M, N) of which this is one part."""
    column, split = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    row, line = tl.arange(0, ROWS), tl.arange(0, GROUP // 4)
    inside, real = column < N, row < M
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for group in range(split * size, tl.minimum(split * size + size, groups)):
        at = (group * (GROUP // 4) + line).to(tl.int64)
        word = tl.load(packed_ptr + at[:, None] * packed_row + column, mask=inside[None], other=0)  # (GROUP / 4, BLOCK)
        part = tl.zeros([ROWS, BLOCK], tl.float32)
        total = tl.zeros([ROWS, GROUP // 4], tl.float32)
        for nibble in tl.static_range(4):
            k = group * GROUP + nibble * (GROUP // 4) + line
            x = tl.load(x_ptr + row[:, None] * K + k, mask=real[:, None] & (k < K), other=0.0)  # (ROWS, GROUP / 4)
            part = tl.dot(x, _sixteen_plus(word, nibble, x.dtype, PAIRS), part, input_precision="ieee")
            total += x.to(tl.float32)
        scale = tl.load(scale_ptr + group * scale_row + column, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(zero_ptr + group * zero_row + column, mask=inside, other=0).to(tl.float32) + 16
        acc += scale * (part - tl.sum(total, 1)[:, None] * zero)
    if SPLIT:
        out_ptr += split * M * N
    elif BIAS:
        acc += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + row[:, None] * N + column, acc.to(out_ptr.dtype.element_ty),
        mask=real[:, None] & inside,
    )  # fmt: skip


@triton.jit
def _merge_kernel(part_ptr, bias_ptr, out_ptr, N, cells, splits, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the parts (splits, M, N) of a block of the M x N cells."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < cells
    acc = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        acc += tl.load(part_ptr + split * cells + at, mask=inside, other=0.0)
    if BIAS:
        acc += tl.load(bias_ptr + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dequantize_kernel(
    packed_ptr, scale_ptr, zero_ptr, out_ptr, N, K, packed_row, scale_row, zero_row,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One group of BLOCK outputs: weights (K, N) row by row."""
    group, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, line = column < N, tl.arange(0, GROUP // 4)
    at = (group * (GROUP // 4) + line).to(tl.int64)
    word = tl.load(packed_ptr + at[:, None] * packed_row + column, mask=inside[None], other=0)
    scale = tl.load(scale_ptr + group * scale_row + column, mask=inside, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + group * zero_row + column, mask=inside, other=0).to(tl.float32) + 16
    for nibble in tl.static_range(4):
        weight = (_sixteen_plus(word, nibble, tl.float32, None) - zero) * scale
        k = group * GROUP + nibble * (GROUP // 4) + line
        out = out_ptr + k[:, None].to(tl.int64) * N + column
        tl.store(out, weight.to(out_ptr.dtype.element_ty), mask=(k < K)[:, None] & inside)


# ---- The launchers ---------------------------------------------------------------------------------------------------


def pair_code(x: Tensor) -> tuple[str, ...] | None:
    """PTX for two words of 16 bits at once, one line a nibble: what `_sixteen_plus` does to each, in two instructions.

    The compiler shifts 16-bit words one by one, which makes the product slower than its memory. None: let it, for
    fp32, and on a CPU, where the interpreter knows no PTX.
    """
    if not x.is_cuda or x.dtype == torch.float32:
        return None
    to, mask, sixteen = (6, "0x03C003C0", "0x4C004C00") if x.dtype == torch.float16 else (3, "0x00780078", "0x41804180")
    lines = []
    for start in range(0, 16, 4):
        shift = f"shr.b32 word, $1, {start - to};" if start > to else f"shl.b32 word, $1, {to - start};"
        lines.append(f"{{ .reg .b32 word; {shift} lop3.b32 $0, word, {mask}, {sixteen}, 0xEA; }}")  # (word & mask) | 16
    return tuple(lines)


def split_groups(columns: int, groups: int) -> int:
    """Groups of one split: as few as keep the programs at PROGRAMS, and at least four."""
    splits = max(1, min(PROGRAMS // columns, groups // 4))
    return triton.cdiv(groups, splits)


def int4_matmul_triton(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None = None) -> Tensor:
    M, K = x.shape
    groups, N = scale.shape
    assert M <= DECODE_ROWS and x.is_contiguous(), "few rows, one after another"
    assert packed.stride(1) == scale.stride(1) == zero.stride(1) == 1, "outputs of a group lie one after another"
    rows, columns = max(16, triton.next_power_of_2(M)), triton.cdiv(N, BLOCK)
    size = split_groups(columns, groups)
    splits = triton.cdiv(groups, size)
    out = torch.empty(M, N, device=x.device, dtype=x.dtype)
    parts = out if splits == 1 else torch.empty(splits, M, N, device=x.device, dtype=torch.float32)
    bias_or_any = out if bias is None else bias
    _matmul_kernel[(columns, splits)](
        x, packed, scale, zero, bias_or_any, parts, M, N, K, groups,
        packed.stride(0), scale.stride(0), zero.stride(0), size,
        GROUP=4 * packed.shape[0] // groups, ROWS=rows, BLOCK=BLOCK, SPLIT=splits > 1, BIAS=bias is not None,
        PAIRS=pair_code(x), num_warps=8 if rows == 64 else 4, num_stages=4 if rows == 16 else 3,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(triton.cdiv(M * N, MERGE_BLOCK),)](
            parts, bias_or_any, out, N, M * N, splits, BIAS=bias is not None, BLOCK=MERGE_BLOCK, num_warps=4
        )
    return out


def dequantize_triton(packed: Tensor, scale: Tensor, zero: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    groups, N = scale.shape
    assert packed.stride(1) == scale.stride(1) == zero.stride(1) == 1, "outputs of a group lie one after another"
    out = torch.empty(inputs, N, device=packed.device, dtype=dtype)
    _dequantize_kernel[(groups, triton.cdiv(N, 256))](
        packed, scale, zero, out, N, inputs, packed.stride(0), scale.stride(0), zero.stride(0),
        GROUP=4 * packed.shape[0] // groups, BLOCK=256, num_warps=4,
    )  # fmt: skip
    return out
