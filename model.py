"""The decoder: one self-written transformer for Qwen2, Qwen2.5, Qwen3 and LLaMA 3.x (SmolLM2 is LLaMA-type).

Where it sits: tokens -> **SLM** -> scores -> tier plan -> migration -> **LLM** -> token. Both models are this one
class; they differ in the cache they are given. Of a cache the decoder knows `attend` alone: it hands over the product
that holds query, key and value of the new tokens; what is kept of them, and what attention sees, is the cache's
(cache.py).

Shape legend, used in every module:

    B  sequences in the batch         L  layers              D  head_dim
    T  new tokens of a sequence       H  query heads         C  slots of the critical tier
    S  positions a cache can hold     G  KV heads (H % G = 0) M  slots of the marginal tier
    V  vocabulary                     W  tokens of the matching window
    N  slots of a layer's pool where they are not one tier's

A prime (L', H') means the SLM. Activations are (B, T, hidden). Attention of a few new tokens (decode) takes queries
(B, T, H, D), of many (prefill) (B, H, T, D); K and V are (B, G, S, D). The index of a token in a sequence is its
position: a prompt is prefilled alone, so no pad ever enters a model.

The products of one input are one matrix: query, key and value (`qkv_proj`), gate and up (`gate_up_proj`). checkpoint.py
joins them when it loads.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import causal_attention
from ops import Rope, add_norm, gate, rotate

SUPPORTED_MODELS = ("llama", "qwen2", "qwen3")
SUPPORTED_ROPE = {  # and what they must say
    "default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}  # fmt: skip
MAX_POSITIONS = {"llama": 2048, "qwen2": 32768, "qwen3": 32768}  # where config.json does not say


@dataclass(frozen=True)
class Config:
    """Architecture of one checkpoint, every choice an explicit field. Made from config.json by `Config.from_hf`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    tied: bool  # the output projection is the embedding matrix
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over head_dim on query and key, before RoPE (Qwen3)
    rope: dict  # rope_type, rope_theta and the parameters of that type

    @classmethod
    def from_hf(cls, raw: dict) -> "Config":
        """Read a Hugging Face config.json (Transformers 4 and 5 spellings). ValueError names what is not supported, or
        the key, its value and what is expected."""
        kind = raw.get("model_type")
        if kind not in SUPPORTED_MODELS:
            supported = ", ".join(SUPPORTED_MODELS)
            raise ValueError(f"unknown model_type {kind!r:.40} in config.json; supported: {supported}")
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [name for name in required if name not in raw]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act {raw['hidden_act']!r:.40} is not supported; supported: silu")
        layers = _count(raw, "num_hidden_layers", most=1 << 12)
        listed = ["full_attention"] * layers if raw.get("layer_types") is None else raw["layer_types"]
        if not isinstance(listed, list) or len(listed) != layers:
            raise ValueError(f"config.json: layer_types is {listed!r:.60}; expected a list of {layers}")
        if _flag(raw, "use_sliding_window", False) or any(found != "full_attention" for found in listed):
            raise ValueError(
                f"sliding-window attention is in use (sliding_window={raw.get('sliding_window')!r:.40}); "
                "supported: full attention in every layer (use_sliding_window: false)"
            )
        hidden, query_heads = _count(raw, "hidden_size"), _count(raw, "num_attention_heads")
        kv_heads = _count(raw, "num_key_value_heads", query_heads, null=True)
        if query_heads % kv_heads:
            raise ValueError(f"num_attention_heads {query_heads} is not a multiple of num_key_value_heads {kv_heads}")
        head_dim = _count(raw, "head_dim", 128 if kind == "qwen3" else hidden // query_heads, null=True)
        if head_dim % 2 or head_dim == 0:
            raise ValueError(f"config.json: head_dim is {head_dim}; expected an even number, RoPE turns pairs")
        rope, bias = _rope(raw), _flag(raw, "attention_bias", False)
        positions = _count(raw, "max_position_embeddings", MAX_POSITIONS[kind], most=1 << 24)
        if rope["rope_type"] == "yarn":  # Qwen2.5's recipe turns yarn on and leaves the number as it was
            positions = max(positions, int(rope["factor"] * rope["original_max_position_embeddings"]))
        return cls(
            model_type=kind,
            vocab_size=_count(raw, "vocab_size", most=1 << 24),
            hidden_size=hidden,
            intermediate_size=_count(raw, "intermediate_size"),
            layers=layers,
            query_heads=query_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=positions,
            norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            tied=_flag(raw, "tie_word_embeddings", False),
            qkv_bias=bias or kind == "qwen2",  # Qwen2 has it always and does not say so
            o_bias=bias and kind != "qwen2",
            mlp_bias=_flag(raw, "mlp_bias", False),
            qk_norm=kind == "qwen3",
            rope=rope,
        )


def _checked(raw: dict, key: str, fits: Callable[[object], bool], expected: str, default, null: bool):
    """A value of config.json: the default where the key is absent, or (null) where it is null."""
    value = raw.get(key)
    if key not in raw and default is not None or null and value is None:
        return default
    if not fits(value):
        raise ValueError(f"config.json: {key} is {value!r:.60}; expected {expected}")
    return value


def _count(raw: dict, key: str, default: int | None = None, null: bool = False, most: int = 1 << 20) -> int:
    def fits(n):
        return type(n) is int and 0 < n <= most

    return _checked(raw, key, fits, f"a whole number from 1 to {most:,}", default, null)


def _number(raw: dict, key: str, default: float | None = None, null: bool = False) -> float | None:
    def fits(x):
        return type(x) in (int, float) and 0 < x < 1e30

    found = _checked(raw, key, fits, "a number above 0", default, null)
    return found if found is None else float(found)


def _flag(raw: dict, key: str, default: bool) -> bool:
    return _checked(raw, key, lambda x: type(x) is bool, "true or false", default, True)


def _rope(raw: dict) -> dict:
    """One dict of RoPE's parameters. As in Transformers `rope_scaling`, which model cards say to add, wins as a whole
    over `rope_parameters`, and `original_max_position_embeddings` beside them over the one in them."""
    for name in ("rope_scaling", "rope_parameters"):
        found = {} if raw.get(name) is None else raw[name]
        if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
            raise ValueError(f"config.json: {name} is {found!r:.60}; expected an object of rope_type and numbers")
    found = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = next((found[name] for name in ("rope_type", "type") if found.get(name) is not None), "default")
    if not isinstance(kind, str) or kind not in SUPPORTED_ROPE:
        raise ValueError(f"unknown rope type {kind!r:.40} in config.json; supported: {', '.join(SUPPORTED_ROPE)}")
    for part in (raw, found):
        if part.get("partial_rotary_factor") not in (None, 1):
            raise ValueError("partial_rotary_factor other than 1.0 is not supported")
    missing = [name for name in SUPPORTED_ROPE[kind] if found.get(name) is None]
    if missing:
        raise ValueError(f"rope type {kind!r} lacks {', '.join(missing)} in config.json")
    theta = _number(raw, "rope_theta", 10000.0, null=True)
    rope = {"rope_type": kind, "rope_theta": _number(found, "rope_theta", theta, null=True)}
    rope |= {name: _number(found, name) for name in SUPPORTED_ROPE[kind]}
    if kind == "llama3" and rope["low_freq_factor"] == rope["high_freq_factor"]:
        raise ValueError(f"config.json: low_freq_factor and high_freq_factor are both {rope['low_freq_factor']}")
    if kind == "yarn":
        optional = {"attention_factor": None, "beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": None}
        given = {name: value for name, value in found.items() if value != 0 or name == "attention_factor"}  # 0: none
        rope |= {name: _number(given, name, default, null=True) for name, default in optional.items()}
        rope["truncate"] = _flag(found, "truncate", True)
        if rope["rope_theta"] == 1:
            raise ValueError("config.json: rope_theta is 1; expected another, yarn takes its logarithm")
    positions = _count(raw, "max_position_embeddings", MAX_POSITIONS[raw["model_type"]], most=1 << 24)
    original = "original_max_position_embeddings"
    rope[original] = _count(raw, original, _count(found, original, positions, True, 1 << 24), True, 1 << 24)
    return rope


# ---- RoPE ------------------------------------------------------------------------------------------------------------


def rope_frequencies(config: Config, device: torch.device | str | None = None) -> tuple[Tensor, float]:
    """Inverse frequencies (D/2,) fp32 and the factor on cos and sin, for the checkpoint's rope type.

    linear: positions divided by `factor`. llama3: long wavelengths divided, short kept, a ramp between (LLaMA 3.1).
    yarn: the same idea with the ramp over dimensions, and attention sharpened by the factor (arXiv 2309.00071).
    """
    rope, dim = config.rope, config.head_dim
    kind, base = rope["rope_type"], rope["rope_theta"]
    inv_freq = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)  # (D/2,)
    if kind == "default":
        return inv_freq, 1.0
    factor, original = rope["factor"], rope["original_max_position_embeddings"]
    if kind == "linear":
        return inv_freq / factor, 1.0
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = original * inv_freq / (2 * math.pi)  # rotations over the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wavelength, untouched; 0: long, divided
        return keep * inv_freq + (1 - keep) * inv_freq / factor, 1.0

    def dimension_of(rotations):
        """The (fractional) dimension whose wavelength turns `rotations` times over the original context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension_of(rope["beta_fast"]), dimension_of(rope["beta_slow"])
    if rope["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / (high - low or 0.001)
    divide = ramp.clamp(0, 1)
    return inv_freq * (1 - divide) + inv_freq / factor * divide, _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: dict) -> float:
    def mscale(scale):
        return 0.1 * scale * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    if rope["attention_factor"] is not None:
        return float(rope["attention_factor"])
    if rope["mscale"] and rope["mscale_all_dim"]:
        return mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return mscale(1.0)


# ---- The decoder -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Where the T new tokens of a call stand.

    length (B,) int32: tokens of each sequence with the first new one. positions (B, T) int32: length - 1 + t. past: in
    a prefill, which takes one sequence, the tokens before the new ones, known on the host; None in a decode step, where
    nothing but the shapes is.
    """

    length: Tensor
    positions: Tensor
    past: int | None = None

    @classmethod
    def chunk(cls, start: int, end: int, device) -> "Span":
        """Tokens start..end-1 of one sequence, in a prefill."""
        positions = torch.arange(start, end, device=device, dtype=torch.int32)[None]
        return cls(positions[:, 0] + 1, positions, start)

    @classmethod
    def step(cls, length: Tensor, tokens: int = 1) -> "Span":
        """T new tokens of each sequence, in a decode step: length (B,) counts the first of them."""
        return cls(length, length[:, None] - 1 + torch.arange(tokens, device=length.device, dtype=torch.int32))


class NoCache:
    """Plain causal attention over the tokens of one call: training, matching windows, measurements. observe(layer,
    query (B, H, T, D), key (B, G, T, D)) is shown what attends; nothing it returns is used."""

    def __init__(self, config: Config, observe=None):
        self.config, self.observe = config, observe

    def attend(self, layer: int, qkv: Tensor, rope: Rope, span: Span) -> Tensor:
        heads = rotate(qkv, rope, self.config.kv_heads, self.config.head_dim)
        query, key, value = (x.transpose(1, 2) for x in heads)  # (B, heads, T, D)
        if self.observe is not None:
            self.observe(layer, query, key)
        return causal_attention(query, key, value).transpose(1, 2)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + update and its norm, (B, T, hidden) each; x may be overwritten."""
        return add_norm(x, update, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer, self.config = layer, config
        hidden, head_dim = config.hidden_size, config.head_dim
        heads = config.query_heads + 2 * config.kv_heads
        self.qkv_proj = nn.Linear(hidden, heads * head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.query_heads * head_dim, hidden, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(head_dim, config.norm_eps) for _ in range(2))

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], cache, span: Span, project: bool = True) -> Tensor:
        """project False ends with the attention itself: an SLM's last layer, of which nothing else is asked."""
        norms = (self.q_norm.weight, self.k_norm.weight, self.config.norm_eps) if self.config.qk_norm else None
        out = cache.attend(self.layer, self.qkv_proj(x), Rope(*turns, norms), span)  # (B, T, H, D)
        return self.o_proj(out.flatten(2)) if project else out


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gate(self.gate_up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, update: Tensor | None, turns, cache, span: Span) -> tuple[Tensor, Tensor]:
        """The residual stream, and what the block adds to it: summed by the next norm."""
        x, hidden = self.input_layernorm(x, update)
        x, hidden = self.post_attention_layernorm(x, self.self_attn(hidden, turns, cache, span))
        return x, self.mlp(hidden)


class Decoder(nn.Module):
    """A decoder-only transformer; parameter names are the checkpoint's own but for the joined products, without the
    leading `model.`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight
        self._frequencies: tuple[Tensor, float] | None = None  # of RoPE, on the device where they were last used

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def forward(
        self, tokens: Tensor, span: Span | None = None, cache=None, logits: str = "all", observe=None
    ) -> Tensor | None:  # fmt: skip
        """Run the model over tokens (B, T).

        span: where the tokens stand; None: a sequence of T tokens from its beginning.
        cache: holds what came before and takes what is made now; None: plain causal attention over the T tokens, shown
            to `observe` (`NoCache`).
        logits: "all" -> (B, T, V); "last" -> (B, 1, V) of the last token; "none" -> hidden states (B, T, hidden) before
            the last norm; "scores" -> None: nothing after the last layer's attention, all that is asked of an SLM.
        """
        if span is None:
            span = Span.chunk(0, tokens.shape[1], tokens.device)
        cache = NoCache(self.config, observe) if cache is None else cache
        x, update = F.embedding(tokens, self.embed_tokens.weight), None  # (B, T, hidden)
        turns = self._turns(span.positions)
        layers = list(self.layers)
        for layer in layers[: len(layers) - (logits == "scores")]:
            x, update = layer(x, update, turns, cache, span)
        if logits == "scores":
            x, hidden = layers[-1].input_layernorm(x, update)
            layers[-1].self_attn(hidden, turns, cache, span, project=False)
            return None
        if logits == "last":
            x, update = x[:, -1:].contiguous(), update[:, -1:].contiguous()
        if logits == "none":
            return x + update
        return self.lm_head(self.norm(x, update)[1])

    def _turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin (B, T, D/2) fp32 at the tokens' positions; angles in fp32, since bf16 cannot count past 256."""
        if self._frequencies is None or self._frequencies[0].device != positions.device:
            self._frequencies = rope_frequencies(self.config, positions.device)
        inverse, factor = self._frequencies
        angle = positions[..., None].float() * inverse  # (B, T, D/2)
        return angle.cos() * factor, angle.sin() * factor
