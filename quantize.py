"""INT4 weights: GPTQ and AWQ checkpoints as published on the hub, any other one rounded while it loads; and the matrix
product with them (W4A16).

Where it sits: in the layers of either model (model.py), in place of nn.Linear; checkpoint.py fills them. The paper's
72B (Section 5) is one such model. Embedding, output projection, norms and biases stay as they are.

All sources end in one layout; for K inputs (the last group may be short: it is padded) and N outputs:

    packed (K / 4, N) int16    GROUP / 4 rows a group; nibble i of row r holds input i * GROUP / 4 + r of the group
    scale  (K / GROUP, N)      bf16 or fp16
    zero   (K / GROUP, N)      uint8, 0 to 15
    weight = scale * (nibble - zero)

Four numbers in 16 bits, not eight in 32, because a matrix unit is fed 16-bit numbers: a tile of words lies in the
registers as the tile of weights will, and nothing is shuffled. Inputs of one nibble follow one another, so activations
are read as they are.

    source   4-bit numbers                                 zero
    gptq     qweight (K / 8, N): 8 inputs a word           qzeros (groups, N / 8), each less by one: a word of eight is
                                                           less by 0x11111111, a zero of 0 borrows from the next one
    gptq_v2  the same                                      qzeros as it is
    awq      qweight (K, N / 8): 8 outputs a word, in      qzeros in that order too
             the order 0, 2, 4, 6, 1, 3, 5, 7

4-bit numbers of a word stand from its lowest bits up. Rounded while loading: to the nearest of 16 levels that span each
group's own smallest and largest weight, and 0; GPTQ and AWQ choose their levels by data and are better.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from model import Decoder
from ops import use_triton

GROUP = 128  # inputs that share a scale
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
DECODE_ROWS = 64  # up to here a product is bound by the bytes of its weights; above, dequantise and multiply
BLOCK = 128  # outputs of one program: a tile of words and activations, four deep, takes 37 KB of shared memory
PROGRAMS = 528  # programs aimed at: four for each of the 132 multiprocessors of an H100, all at once
CELLS = 1024  # numbers of one program that adds parts
# The decoder's products of one input are one matrix; the checkpoint's products that it holds, one after another.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


# ---- The product -----------------------------------------------------------------------------------------------------


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


@triton.jit
def _sixteen_plus(word, NIBBLE: tl.constexpr, DTYPE: tl.constexpr, PAIRS: tl.constexpr):
    """16 + one nibble of each word, by its bits: an exponent that says 16, and the nibble as the highest four bits of
    the mantissa. Two integer operations, no conversion, exact in fp32, fp16 and bf16. PAIRS: see `pair_code`."""
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
    x_ptr, packed_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, K, groups, size, GROUP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """BLOCK outputs of all rows over `size` groups, so that each word is read once; out (splits, M, N), one part each.

    A group's sum is corrected by (16 + zero) * sum of its inputs and scaled in fp32: weights are never rounded to 16
    bits.
    """
    column, split = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    row, line = tl.arange(0, ROWS), tl.arange(0, GROUP // 4)
    inside, real = column < N, row < M
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for group in range(split * size, tl.minimum(split * size + size, groups)):
        at = (group * (GROUP // 4) + line).to(tl.int64)
        word = tl.load(packed_ptr + at[:, None] * N + column, mask=inside[None], other=0)  # (GROUP / 4, BLOCK)
        part = tl.zeros([ROWS, BLOCK], tl.float32)
        total = tl.zeros([ROWS, GROUP // 4], tl.float32)
        for nibble in tl.static_range(4):
            k = group * GROUP + nibble * (GROUP // 4) + line
            x = tl.load(x_ptr + row[:, None] * K + k, mask=real[:, None] & (k < K), other=0.0)  # (ROWS, GROUP / 4)
            part = tl.dot(x, _sixteen_plus(word, nibble, x.dtype, PAIRS), part, input_precision="ieee")
            total += x.to(tl.float32)
        scale = tl.load(scale_ptr + group * N + column, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(zero_ptr + group * N + column, mask=inside, other=0).to(tl.float32) + 16
        acc += scale * (part - tl.sum(total, 1)[:, None] * zero)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    cell = split * M * N + row[:, None] * N + column
    tl.store(out_ptr + cell, acc.to(out_ptr.dtype.element_ty), mask=real[:, None] & inside)


@triton.jit
def _add_parts_kernel(part_ptr, bias_ptr, out_ptr, N, cells, splits, BLOCK: tl.constexpr):
    """Add the parts (splits, M, N) of a block of the M x N cells, in a fixed order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < cells
    acc = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        acc += tl.load(part_ptr + split * cells + at, mask=inside, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dequantize_kernel(packed_ptr, scale_ptr, zero_ptr, out_ptr, N, K, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """One group of BLOCK outputs: weights (K, N) row by row."""
    group, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, line = column < N, tl.arange(0, GROUP // 4)
    at = (group * (GROUP // 4) + line).to(tl.int64)
    word = tl.load(packed_ptr + at[:, None] * N + column, mask=inside[None], other=0)
    scale = tl.load(scale_ptr + group * N + column, mask=inside, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + group * N + column, mask=inside, other=0).to(tl.float32) + 16
    for nibble in tl.static_range(4):
        weight = (_sixteen_plus(word, nibble, tl.float32, None) - zero) * scale
        k = group * GROUP + nibble * (GROUP // 4) + line
        out = out_ptr + k[:, None].to(tl.int64) * N + column
        tl.store(out, weight.to(out_ptr.dtype.element_ty), mask=(k < K)[:, None] & inside)


def pair_code(x: Tensor) -> tuple[str, ...] | None:
    """PTX for two words of 16 bits at once, one line a nibble: what `_sixteen_plus` does to each, in two instructions.
    The compiler shifts 16-bit words one by one, which makes the product slower than its memory. None: let it, for fp32,
    and on a CPU, where the interpreter knows no PTX."""
    if not x.is_cuda or x.dtype == torch.float32:
        return None
    to, mask, sixteen = (6, "0x03C003C0", "0x4C004C00") if x.dtype == torch.float16 else (3, "0x00780078", "0x41804180")
    lines = []
    for start in range(0, 16, 4):
        shift = f"shr.b32 word, $1, {start - to};" if start > to else f"shl.b32 word, $1, {to - start};"
        lines.append(f"{{ .reg .b32 word; {shift} lop3.b32 $0, word, {mask}, {sixteen}, 0xEA; }}")  # (word & mask) | 16
    return tuple(lines)


def split_groups(columns: int, groups: int) -> int:
    """Groups of one split, where the outputs alone are too few programs to fill the GPU: as few as keep the programs at
    PROGRAMS, and at least four."""
    return triton.cdiv(groups, max(1, min(PROGRAMS // columns, groups // 4)))


def int4_matmul_triton(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None = None) -> Tensor:
    (M, K), (groups, N) = x.shape, scale.shape
    assert M <= DECODE_ROWS, "few rows: the weights are read once for all of them"
    assert all(table.is_contiguous() for table in (x, packed, scale, zero))
    rows, columns = max(16, triton.next_power_of_2(M)), triton.cdiv(N, BLOCK)
    size = split_groups(columns, groups)
    splits = triton.cdiv(groups, size)
    out = torch.empty(M, N, device=x.device, dtype=x.dtype)
    parts = out if splits == 1 else torch.empty(splits, M, N, device=x.device, dtype=torch.float32)
    _matmul_kernel[(columns, splits)](
        x, packed, scale, zero, bias if splits == 1 else None, parts, M, N, K, groups, size,
        GROUP=4 * packed.shape[0] // groups, ROWS=rows, BLOCK=BLOCK, PAIRS=pair_code(x),
        num_warps=8 if rows == 64 else 4, num_stages=4 if rows == 16 else 3,
    )  # fmt: skip
    if splits > 1:
        _add_parts_kernel[(triton.cdiv(M * N, CELLS),)](parts, bias, out, N, M * N, splits, BLOCK=CELLS, num_warps=4)
    return out


def dequantize_triton(packed: Tensor, scale: Tensor, zero: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    groups, N = scale.shape
    assert all(table.is_contiguous() for table in (packed, scale, zero))
    out = torch.empty(inputs, N, device=packed.device, dtype=dtype)
    _dequantize_kernel[(groups, triton.cdiv(N, 256))](
        packed, scale, zero, out, N, inputs, GROUP=4 * packed.shape[0] // groups, BLOCK=256, num_warps=4
    )
    return out


class Packed(NamedTuple):
    """INT4 weights in the layout of the module. order (K,): inputs in the order in which the groups take them; None: as
    they come."""

    packed: Tensor
    scale: Tensor
    zero: Tensor
    order: Tensor | None = None


class Int4Linear(nn.Module):
    """nn.Linear with INT4 weights. group: 64 or 128. ordered: the inputs are taken in another order, `order` (K,)."""

    def __init__(self, inputs: int, outputs: int, bias: bool, group: int = GROUP, ordered: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.group = inputs, outputs, group
        groups = math.ceil(inputs / group)
        self.register_buffer("packed", torch.zeros(groups * group // 4, outputs, dtype=torch.int16))
        self.register_buffer("scale", torch.zeros(groups, outputs, dtype=torch.bfloat16))
        self.register_buffer("zero", torch.zeros(groups, outputs, dtype=torch.uint8))
        self.register_buffer("order", torch.zeros(inputs, dtype=torch.int32) if ordered else None)
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).contiguous()  # (M, K)
        if self.order is not None:
            rows = rows.index_select(1, self.order)
        layout, triton_here = (self.packed, self.scale, self.zero), use_triton(x)
        if len(rows) <= DECODE_ROWS:
            out = (int4_matmul_triton if triton_here else int4_matmul_torch)(rows, *layout, self.bias)
        else:
            weight = (dequantize_triton if triton_here else dequantize_torch)(*layout, self.in_features, x.dtype)
            out = rows @ weight if self.bias is None else torch.addmm(self.bias, rows, weight)
        return out.view(*x.shape[:-1], self.out_features)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weights as an nn.Linear would hold them, (N, K)."""
        weight = dequantize_torch(self.packed, self.scale, self.zero, self.in_features, dtype)
        if self.order is not None:
            weight = torch.empty_like(weight).index_copy_(0, self.order.long(), weight)
        return weight.T

    def fill(self, parts: list[Packed]) -> None:
        """Take the weights of one product, or of several of this input: their outputs one after another. ValueError if
        these take the inputs in different orders."""
        if self.order is not None:
            if not all(torch.equal(parts[0].order, part.order) for part in parts):
                raise ValueError("products of one input have different g_idx and cannot be joined; use a checkpoint "
                                 "with desc_act false")  # fmt: skip
            self.order = parts[0].order.int()
        self.packed, self.scale, self.zero = (torch.cat(tables, 1) for tables in list(zip(*parts))[:3])


# ---- Rounding --------------------------------------------------------------------------------------------------------


def pack(nibbles: Tensor, group: int) -> Tensor:
    """(K, N) uint8 -> (rows, N) int16, a short last group filled up with zeros that meet no input."""
    padded = nn.functional.pad(nibbles, (0, 0, 0, -len(nibbles) % group))
    lines = padded.unflatten(0, (-1, 4, group // 4)).short()  # nibble i of row r: input i * group / 4 + r
    words = lines[:, 0] | lines[:, 1] << 4 | lines[:, 2] << 8 | lines[:, 3] << 12
    return words.flatten(0, 1)


def round_to_int4(weight: Tensor, group: int = GROUP) -> Packed:
    """weight (N, K), rounded: no number is off by more than half its group's scale. That is rounded up to bf16 before
    the weights are rounded with it, which makes a step wider by less than a 128th."""
    inputs = weight.shape[1]
    lines = nn.functional.pad(weight.float().T, (0, 0, 0, -inputs % group)).unflatten(0, (-1, group))
    low, high = lines.amin(1).clamp(max=0), lines.amax(1).clamp(min=0)  # (groups, N)
    step = ((high - low) / 15).clamp(min=1e-30)
    scale = ((step.view(torch.int32) + 0xFFFF) >> 16).short().view(torch.bfloat16)
    zero = (-low / scale.float()).round().clamp(0, 15)
    nibbles = (lines / scale.float()[:, None]).round().add(zero[:, None]).clamp(0, 15)
    return Packed(pack(nibbles.flatten(0, 1)[:inputs].byte(), group), scale, zero.byte())


def int4_bytes(inputs: int, outputs: int, group: int = GROUP) -> int:
    """Bytes of one product's weights, scales and zeros."""
    return math.ceil(inputs / group) * (group // 2 + 3) * outputs


# ---- Published checkpoints -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    """How the INT4 weights of a checkpoint are stored; method "int4": they are not, and are rounded while loading."""

    method: str = "int4"
    group: int = GROUP  # -1: all inputs are one group
    borrowed: bool = False  # stored zeros are less by one
    symmetric: bool = False  # every zero is 8
    ordered: bool = False  # groups are not of consecutive inputs (GPTQ's desc_act)
    only: tuple[str, ...] = ()  # endings of the module names that are quantised; none: all in the layers
    never: tuple[str, ...] = ()  # parts of the module names that are not

    @classmethod
    def from_config(cls, raw: dict | None) -> "Scheme | None":
        """Read `quantization_config` of a config.json, None if there is none. ValueError names what is unsupported."""
        if raw is None:
            return None
        if not isinstance(raw, dict):
            raise ValueError(f"quantization_config should be a JSON object, not {raw!r}")
        method = raw.get("quant_method")
        if method not in ("gptq", "awq"):
            raise ValueError(f"unknown quant_method {method!r} in quantization_config; supported: gptq, awq")
        missing = [name for name in ("bits", "group_size") if raw.get(name) is None]
        if missing:
            raise ValueError(f"quantization_config lacks {', '.join(missing)}")
        group = raw["group_size"]
        if type(group) is not int or not (group in (-1, 64) or (group > 0 and group % GROUP == 0)):
            raise ValueError(f"group_size {group!r} is not supported; supported: 64, multiples of 128, -1 (one group)")
        layout = raw.get("checkpoint_format", "gptq") if method == "gptq" else str(raw.get("version", "gemm")).lower()
        wanted = {"bits": (raw["bits"], (4,)), "lm_head": (bool(raw.get("lm_head")), (False,)),
                  "dynamic": (raw.get("dynamic") or None, (None,))}  # fmt: skip
        if method == "gptq":
            wanted["checkpoint_format"] = layout, ("gptq", "gptq_v2")
            wanted["is_marlin_format"] = bool(raw.get("is_marlin_format")), (False,)
        else:
            wanted["version"] = layout, ("gemm",)
            wanted["zero_point"] = raw.get("zero_point", True), (True,)
        for name, (value, supported) in wanted.items():
            if value not in supported:
                raise ValueError(f"quantization_config: {name} {value!r} is not supported with {method}; supported: "
                                 + ", ".join(map(str, supported)))  # fmt: skip
        named = {name: raw.get(name) or [] for name in ("modules_in_block_to_quantize", "modules_to_not_convert")}
        for name, found in named.items():
            flat = [x for part in found for x in (part if isinstance(part, list) else [part])] * isinstance(found, list)
            if not isinstance(found, list) or not all(isinstance(part, str) for part in flat):
                raise ValueError(f"quantization_config: {name} is {found!r:.60}; expected a list of names")
            named[name] = tuple(flat)
        symmetric = method == "gptq" and raw.get("sym") is True
        return cls(method, group, layout == "gptq", symmetric, method == "gptq" and bool(raw.get("desc_act")),
                   *named.values())  # fmt: skip

    @property
    def inner(self) -> int:
        """Group size of the layout; a larger published group has its scale several times."""
        return 64 if self.group == 64 else GROUP

    def size(self, inputs: int) -> int:
        """Inputs of a published group."""
        return inputs if self.group == -1 else self.group

    def takes(self, name: str) -> bool:
        """Whether the module of this checkpoint name is quantised."""
        return (not self.only or name.endswith(self.only)) and not any(part in name for part in self.never)

    def tensors(self, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of one product's tensors in the checkpoint, without its bias."""
        if self.method == "int4":
            return {"weight": (outputs, inputs)}
        if outputs % 8 or (self.method == "gptq" and inputs % 8):
            raise ValueError(f"a matrix of {inputs} x {outputs} cannot be stored by {self.method}, 8 numbers a word")
        groups = math.ceil(inputs / self.size(inputs))
        weight = (inputs // 8, outputs) if self.method == "gptq" else (inputs, outputs // 8)
        shapes = {"qweight": weight, "qzeros": (groups, outputs // 8), "scales": (groups, outputs)}
        return shapes | ({"g_idx": (inputs,)} if self.method == "gptq" else {})  # g_idx alone may be missing

    def read(self, tensors: dict[str, Tensor]) -> Packed:
        """One product's tensors in our layout; ValueError if they cannot be what they say."""
        if self.method == "int4":
            return round_to_int4(tensors["weight"], self.inner)
        for name in ("qweight", "qzeros"):
            if tensors[name].dtype != torch.int32:
                raise ValueError(f"{name} should be int32, not {tensors[name].dtype}")
        along = range(8) if self.method == "gptq" else AWQ_ORDER
        zero = unpack(tensors["qzeros"] + 0x11111111 * self.borrowed, along)  # (groups, N); the sum of words wraps
        if self.symmetric and (zero != 8).any():
            stored = sorted(set(unpack(tensors["qzeros"], along).flatten().tolist()))
            raise ValueError(f"sym is true, and qzeros hold {stored[:4]}: a checkpoint_format of gptq stores 7, of "
                             "gptq_v2 8; correct the one that is wrong in quantization_config")  # fmt: skip
        nibbles = unpack(tensors["qweight"].T, along).T if self.method == "gptq" else unpack(tensors["qweight"], along)
        inputs, order = len(nibbles), None
        if tensors.get("g_idx") is not None or self.ordered:
            order = self._order(tensors.get("g_idx"), inputs)
            nibbles = nibbles if order is None else nibbles[order]
        scale = tensors["scales"]
        scale = scale if scale.dtype.itemsize == 2 else scale.half()
        if self.size(inputs) > GROUP:  # every 128 inputs get the scale of their group
            of = torch.arange(0, inputs, GROUP, device=scale.device) // self.size(inputs)
            scale, zero = scale[of], zero[of]
        return Packed(pack(nibbles, self.inner), scale, zero, order)

    def _order(self, index: Tensor | None, inputs: int) -> Tensor | None:
        """g_idx (K,), the group of each input -> the inputs group by group; None if they are so already."""
        if index is None:
            raise ValueError("desc_act is true, but there is no g_idx to say which input is in which group")
        natural = torch.arange(inputs, device=index.device) // self.size(inputs)
        order = index.long().argsort(stable=True)
        if not torch.equal(index.long()[order], natural):
            raise ValueError(f"g_idx does not divide {inputs} inputs into groups of {self.group}")
        if not self.ordered and not torch.equal(index.long(), natural):
            raise ValueError("g_idx is not in order, but desc_act is false: one of them is wrong")
        return order if self.ordered else None


def unpack(words: Tensor, along) -> Tensor:
    """(rows, n) int32 -> (rows, 8 n) uint8: nibble i of a word becomes column `along[i]` of its eight."""
    out = torch.empty(*words.shape, 8, dtype=torch.uint8, device=words.device)
    for i, column in enumerate(along):
        out[..., column] = ((words >> 4 * i) & 15).byte()
    return out.flatten(1)


# ---- Decoders --------------------------------------------------------------------------------------------------------


def checkpoint_names(name: str) -> list[str]:
    """What the checkpoint calls a decoder's module or tensor; a joined product is several, in the order of its rows."""
    if name.startswith("lm_head"):
        return [name]
    for joined, parts in JOINED.items():
        if joined in name:
            return [f"model.{name.replace(joined, part)}" for part in parts]
    return [f"model.{name}"]


def int4_modules(decoder: Decoder) -> dict[str, Int4Linear]:
    return {name: module for name, module in decoder.named_modules() if isinstance(module, Int4Linear)}


def put_int4(decoder: Decoder, scheme: Scheme) -> None:
    """Empty Int4Linear in place of the layers' products that the scheme takes, on the decoder's device. ValueError if
    it takes only some of those that are joined."""
    for name, linear in list(decoder.named_modules()):
        parts = checkpoint_names(name)
        taken = [part for part in parts if scheme.takes(part)]
        if not isinstance(linear, nn.Linear) or name == "lm_head" or not taken:
            continue
        if taken != parts:
            raise ValueError(f"{', '.join(taken)} alone are INT4, but of products of one input all or none can be")
        parent, _, leaf = name.rpartition(".")
        with linear.weight.device:
            shape = linear.in_features, linear.out_features, linear.bias is not None
            setattr(decoder.get_submodule(parent), leaf, Int4Linear(*shape, scheme.inner, scheme.ordered))
