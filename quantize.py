"""INT4 weights: GPTQ and AWQ checkpoints as published on the hub, and any other one rounded on the fly.

Where it sits: under checkpoint.py, which fills the decoder of model.py; the paper's 72B (section 5) is one such.
All three sources end in one layout (kernels_int4.py) in one module, `Int4Linear`, in place of the layers' nn.Linear.
Embedding, output projection, norms and biases stay as they are.

On the fly it is round-to-nearest, 128 inputs a group, asymmetric: each group's own smallest and largest weight (and 0)
span the 16 levels. Symmetric levels would save the zeros, a byte in 67, and cost a wider step in every group that is
lopsided: an error larger by an eighth on SmolLM2 (README). GPTQ and AWQ choose their levels by data and are better.

    source   4-bit numbers                                 zero
    gptq     qweight (K / 8, N): 8 inputs a word           qzeros (groups, N / 8), one less than it is
    gptq_v2  the same                                      qzeros as it is
    awq      qweight (K, N / 8): 8 outputs a word, in      qzeros in that order too
             the order 0, 2, 4, 6, 1, 3, 5, 7

K are the inputs, N the outputs of a matrix product; 4-bit numbers of a word stand from its lowest bits up.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels_int4 import DECODE_ROWS, dequantize_torch, int4_matmul_torch
from model import Decoder

GROUP = 128  # inputs that share a scale
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


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
        self.matmul, self.dequantize = int4_matmul_torch, dequantize_torch  # see `run_on`

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).contiguous()  # (M, K)
        if self.order is not None:
            rows = rows.index_select(1, self.order)
        layout = self.packed, self.scale, self.zero
        if len(rows) <= DECODE_ROWS:
            out = self.matmul(rows, *layout, self.bias)
        else:
            weight = self.dequantize(*layout, self.in_features, x.dtype)  # (K, N)
            out = rows @ weight if self.bias is None else torch.addmm(self.bias, rows, weight)
        return out.view(*x.shape[:-1], self.out_features)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weights as an nn.Linear would hold them, (N, K)."""
        weight = dequantize_torch(self.packed, self.scale, self.zero, self.in_features, dtype)
        if self.order is not None:
            weight = torch.empty_like(weight).index_copy_(0, self.order.long(), weight)
        return weight.T

    def fill(self, nibbles: Tensor, scale: Tensor, zero: Tensor, order: Tensor | None = None) -> None:
        """Take 4-bit numbers (K, N) uint8, their scales and zeros (groups, N)."""
        self.packed, self.scale, self.zero = pack(nibbles, self.group), scale.contiguous(), zero.contiguous()
        if self.order is not None:
            self.order = order.int()


def pack(nibbles: Tensor, group: int) -> Tensor:
    """(K, N) uint8 -> (rows, N) int16, a short last group filled up with zeros that meet no input."""
    inputs, N = nibbles.shape
    groups = math.ceil(inputs / group)
    padded = nibbles.new_zeros(groups * group, N)
    padded[:inputs] = nibbles
    lines = padded.view(groups, 4, group // 4, N).short()  # nibble i of row r: input i * group / 4 + r
    words = lines[:, 0] | lines[:, 1] << 4 | lines[:, 2] << 8 | lines[:, 3] << 12
    return words.flatten(0, 1)


def round_to_int4(weight: Tensor, group: int = GROUP, symmetric: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """weight (N, K) -> 4-bit numbers (K, N), scales bf16 and zeros (groups, N).

    No weight is off by more than half its scale. The scale is rounded up to bf16 before the weights are rounded with
    it: what that loses is a step wider by less than a 128th.
    """
    inputs, groups = weight.shape[1], math.ceil(weight.shape[1] / group)
    wide = weight.float().T
    lines = nn.functional.pad(wide, (0, 0, 0, groups * group - inputs)).view(groups, group, -1)
    low, high = lines.amin(1).clamp(max=0), lines.amax(1).clamp(min=0)  # (groups, N)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    step = ((high - low) / 15).clamp(min=1e-30)
    scale = ((step.view(torch.int32) + 0xFFFF) >> 16).short().view(torch.bfloat16)
    zero = torch.full_like(low, 8) if symmetric else (-low / scale.float()).round().clamp(0, 15)
    nibbles = (lines / scale.float()[:, None]).round().add(zero[:, None]).clamp(0, 15)
    return nibbles.flatten(0, 1)[:inputs].byte(), scale, zero.byte()


# ---- Published checkpoints -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    """How the INT4 weights of a checkpoint are stored; method "int4": they are not, and are rounded while loading."""

    method: str = "int4"
    group: int = GROUP  # -1: all inputs are one group
    offset: int = 0  # what is added to a stored zero
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
                names = ", ".join(map(str, supported))
                raise ValueError(
                    f"quantization_config: {name} {value!r} is not supported with {method}; supported: {names}"
                )
        inside = raw.get("modules_in_block_to_quantize") or []
        only = [name for names in inside for name in ([names] if isinstance(names, str) else names)]
        return cls(method, group, int(layout == "gptq"), method == "gptq" and bool(raw.get("desc_act")),
                   tuple(only), tuple(raw.get("modules_to_not_convert") or ()))  # fmt: skip

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

    def read(self, module: Int4Linear, tensors: dict[str, Tensor]) -> None:
        """Fill the module from a product's tensors; ValueError if they cannot be what they say."""
        if self.method == "int4":
            module.fill(*round_to_int4(tensors["weight"], self.inner))
            return
        for name in ("qweight", "qzeros"):
            if tensors[name].dtype != torch.int32:
                raise ValueError(f"{name} should be int32, not {tensors[name].dtype}")
        along = range(8) if self.method == "gptq" else AWQ_ORDER
        zero = unpack(tensors["qzeros"], along) + self.offset  # (groups, N)
        nibbles = unpack(tensors["qweight"].T, along).T if self.method == "gptq" else unpack(tensors["qweight"], along)
        order = None
        if tensors.get("g_idx") is not None or self.ordered:
            order = self._order(tensors.get("g_idx"), module.in_features)
            nibbles = nibbles if order is None else nibbles[order]
        scale = tensors["scales"]
        scale = scale if scale.dtype.itemsize == 2 else scale.half()
        if self.size(module.in_features) > GROUP:  # every 128 inputs get the scale of their group
            of = torch.arange(len(module.scale), device=scale.device) * GROUP // self.size(module.in_features)
            scale, zero = scale[of], zero[of]
        module.fill(nibbles, scale, zero, order)

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


def int4_bytes(inputs: int, outputs: int, group: int = GROUP) -> int:
    """Bytes of one product's weights, scales and zeros."""
    return math.ceil(inputs / group) * (group // 2 + 3) * outputs


def unpack(words: Tensor, along) -> Tensor:
    """(rows, n) int32 -> (rows, 8 n) uint8: nibble i of a word becomes column `along[i]` of its eight."""
    out = torch.empty(*words.shape, 8, dtype=torch.uint8, device=words.device)
    for i, column in enumerate(along):
        out[..., column] = ((words >> 4 * i) & 15).byte()
    return out.flatten(1)


# ---- Decoders --------------------------------------------------------------------------------------------------------


def int4_modules(decoder: Decoder) -> dict[str, Int4Linear]:
    return {name: module for name, module in decoder.named_modules() if isinstance(module, Int4Linear)}


def put_int4(decoder: Decoder, scheme: Scheme) -> None:
    """Empty Int4Linear in place of the layers' products that the scheme takes, on the decoder's device."""
    for name, linear in list(decoder.layers.named_modules()):
        if isinstance(linear, nn.Linear) and scheme.takes(f"model.layers.{name}"):
            parent, _, leaf = name.rpartition(".")
            with linear.weight.device:
                module = Int4Linear(linear.in_features, linear.out_features, linear.bias is not None, scheme.inner,
                                    scheme.ordered)  # fmt: skip
            setattr(decoder.layers.get_submodule(parent), leaf, module)


def run_on(decoder: Decoder, backend) -> None:
    """Let the INT4 products of this decoder run on the backend's kernels (backend.py)."""
    for module in int4_modules(decoder).values():
        module.matmul, module.dequantize = backend.int4_matmul, backend.dequantize


def join_int4(modules: list[Int4Linear]) -> Int4Linear:
    """One module for several products of the same input; their own tensors become views of its."""
    first = modules[0]
    if any((m.order is None) != (first.order is None) for m in modules) or (
        first.order is not None and not all(torch.equal(m.order, first.order) for m in modules)
    ):
        raise ValueError("products of one input have different g_idx and cannot be joined; use --backend torch")
    with torch.device("meta"):
        whole = Int4Linear(first.in_features, sum(m.out_features for m in modules), False, first.group)
    whole.matmul, whole.dequantize, whole.order = first.matmul, first.dequantize, first.order
    sizes = [m.out_features for m in modules]
    for name in ("packed", "scale", "zero"):
        tensor = torch.cat([getattr(m, name) for m in modules], 1)
        setattr(whole, name, tensor)
        for module, part in zip(modules, tensor.split(sizes, 1)):
            setattr(module, name, part)
    if first.bias is not None:
        whole.bias = nn.Parameter(torch.cat([m.bias for m in modules]), requires_grad=False)
        for module, part in zip(modules, whole.bias.data.split(sizes)):
            module.bias = nn.Parameter(part, requires_grad=False)
    return whole
