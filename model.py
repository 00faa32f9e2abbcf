"""The decoder: one self-written transformer for Qwen2, Qwen2.5, Qwen3 and LLaMA 3.x (SmolLM2 is LLaMA-type).

Where it sits: tokens -> **SLM** -> scores -> tier plan -> migration -> **LLM** -> token. Both models are this one
class; they differ in the cache they are given. The decoder computes query, key and value; what is kept of them, and
what attention sees, is the business of the cache (cache.py), reached through one method, `cache.attend`.

Shape legend, used in every module:

    B  sequences in the batch         L  layers              D  head_dim
    T  tokens in this call            H  query heads         C  slots of the K pool (critical tokens)
    S  positions a cache can hold     G  KV heads (H % G = 0) N  slots of the V pool (critical + marginal tokens)
    V  vocabulary                     W  tokens of the matching window

A prime (L', H') means the SLM. Activations are (B, T, hidden), attention tensors (B, heads, T, D). The index of a token
in a cache is its position: batches arrive left-padded, and the pads are cut off before the models see them (decode.py).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import causal_attention

SUPPORTED_MODELS = ("llama", "qwen2", "qwen3")
SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")


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
        """Read a Hugging Face config.json (Transformers 4 and 5 spellings). ValueError names what is not supported."""
        model_type = raw.get("model_type")
        if model_type not in SUPPORTED_MODELS:
            supported = ", ".join(SUPPORTED_MODELS)
            raise ValueError(f"unknown model_type {model_type!r} in config.json; supported: {supported}")
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [name for name in required if name not in raw]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        counts = (*required, "num_key_value_heads", "head_dim", "max_position_embeddings")
        wrong = [n for n in counts if raw.get(n) is not None and not (isinstance(raw[n], int) and raw[n] > 0)]
        if wrong:
            raise ValueError("config.json: " + ", ".join(f"{n} {raw[n]!r} should be above 0" for n in wrong))
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act {raw['hidden_act']!r} is not supported; supported: silu")
        windowed = [t for t in raw.get("layer_types") or [] if t != "full_attention"]
        if raw.get("use_sliding_window") or windowed:
            raise ValueError(
                f"sliding-window attention is in use (sliding_window={raw.get('sliding_window')}); "
                "supported: full attention in every layer (use_sliding_window: false)"
            )
        query_heads = raw["num_attention_heads"]
        kv_heads = raw.get("num_key_value_heads") or query_heads
        if query_heads % kv_heads:
            raise ValueError(f"num_attention_heads {query_heads} is not a multiple of num_key_value_heads {kv_heads}")
        attention_bias = bool(raw.get("attention_bias", False))
        return cls(
            model_type=model_type,
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            layers=raw["num_hidden_layers"],
            query_heads=query_heads,
            kv_heads=kv_heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // query_heads,
            max_positions=_max_positions(raw),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            tied=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or model_type == "qwen2",  # Qwen2 has it always and does not say so
            o_bias=attention_bias and model_type != "qwen2",
            mlp_bias=bool(raw.get("mlp_bias", False)),
            qk_norm=model_type == "qwen3",
            rope=_rope_parameters(raw),
        )


def _max_positions(raw: dict) -> int:
    """Positions the model can address. Qwen2.5's recipe turns yarn on and leaves the number as it was."""
    positions, rope = raw.get("max_position_embeddings") or 2048, _rope_parameters(raw)
    if rope["rope_type"] == "yarn":
        return max(positions, int(rope["factor"] * rope["original_max_position_embeddings"]))
    return positions


def _rope_parameters(raw: dict) -> dict:
    """Normalise `rope_parameters` (Transformers 5) or `rope_scaling` + `rope_theta` (4) to one dict, and check it."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("type", None) if "rope_type" not in rope else rope["rope_type"]
    rope["rope_type"] = rope["rope_type"] or "default"
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = raw.get("rope_theta") or 10000.0
    kind = rope["rope_type"]
    if kind not in SUPPORTED_ROPE:
        raise ValueError(f"unknown rope type {kind!r} in config.json; supported: {', '.join(SUPPORTED_ROPE)}")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial_rotary_factor other than 1.0 is not supported")
    needed = {"linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"], "yarn": ["factor"]}
    missing = [name for name in needed.get(kind, []) if rope.get(name) is None]
    if missing:
        raise ValueError(f"rope type {kind!r} lacks {', '.join(missing)} in config.json")
    rope.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings") or 2048)
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

    low, high = dimension_of(rope.get("beta_fast") or 32), dimension_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / max(high - low, 0.001)
    divide = ramp.clamp(0, 1)
    return inv_freq * (1 - divide) + inv_freq / factor * divide, _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: dict) -> float:
    def mscale(scale):
        return 0.1 * scale * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return mscale(1.0)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, heads, T, D) by cos, sin (B, 1, T, D): dimension i is paired with i + D/2, as in the checkpoints."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


# ---- The decoder -----------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # x / sqrt(mean of squares + eps), in fp32 inside: the mean overflows fp16, loses half its digits in bf16. The
        # weight comes after x is rounded, as in Transformers; on a GPU one kernel and a product, not eight.
        return self.weight * F.rms_norm(x, self.weight.shape, eps=self.eps)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer, self.config = layer, config
        hidden, head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.query_heads * head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, config.kv_heads * head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, config.kv_heads * head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.query_heads * head_dim, hidden, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(head_dim, config.norm_eps)
            self.k_norm = RMSNorm(head_dim, config.norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache, span: "Span", observe) -> Tensor:
        B, T, _ = x.shape
        split = (B, T, -1, self.config.head_dim)
        query = self.q_proj(x).view(split)  # (B, T, H, D)
        key = self.k_proj(x).view(split)  # (B, T, G, D)
        value = self.v_proj(x).view(split).transpose(1, 2)  # (B, G, T, D)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query = apply_rope(query.transpose(1, 2), *rope)  # (B, H, T, D)
        key = apply_rope(key.transpose(1, 2), *rope)  # (B, G, T, D): stored rotated, never rotated again
        if observe is not None:
            observe(self.layer, query, key)
        if cache is None:
            out = causal_attention(query, key, value)  # (B, H, T, D)
        else:
            out = cache.attend(self.layer, query, key, value, span)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope, cache, span, observe) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, span, observe)
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass(frozen=True)
class Span:
    """Where the tokens of one call stand.

    positions: (B, T) int64 on the model's device. end: one more than the largest position, known on the host, so that
    a cache can cut its tensors without asking the device.
    """

    positions: Tensor
    end: int

    @classmethod
    def block(cls, start: int, end: int, device) -> "Span":
        """Tokens start..end-1 of one sequence, as in a prefill chunk."""
        return cls(torch.arange(start, end, device=device)[None], end)

    @classmethod
    def step(cls, positions: list[int], device, tokens: int = 1) -> "Span":
        """One token for each sequence, as in a decode step; or some from there on, as when drafts are verified."""
        first = torch.tensor(positions, device=device)[:, None]
        return cls(first + torch.arange(tokens, device=device), max(positions) + tokens)


class Decoder(nn.Module):
    """A decoder-only transformer; parameter names are the checkpoint's own, without the leading `model.`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def forward(
        self, tokens: Tensor, span: Span | None = None, cache=None, logits: str = "all", observe=None
    ) -> Tensor:  # fmt: skip
        """Run the model over tokens (B, T).

        span: where the tokens stand; None means a fresh sequence, positions 0..T-1.
        cache: holds what came before and takes what is made now; None is plain causal attention over the T tokens.
        logits: "all" -> (B, T, V); "last" -> (B, 1, V) of the last token; "none" -> hidden states (B, T, hidden), for
            an SLM whose attention is wanted and whose words are not.
        observe: called with (layer, query (B, H, T, D), key (B, G, T, D)) in every layer: a reader's window, nothing
            it returns is used.
        """
        if span is None:
            span = Span.block(0, tokens.shape[1], tokens.device)
        x = self.embed_tokens(tokens)  # (B, T, hidden)
        rope = self._rotary(span.positions, x.dtype)
        for layer in self.layers:
            x = layer(x, rope, cache, span, observe)
        if logits == "none":
            return x
        if logits == "last":
            x = x[:, -1:]
        return self.lm_head(self.norm(x))

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin (B, 1, T, D) at the tokens' true positions; angles in fp32, since bf16 cannot count past 256."""
        inv_freq, factor = rope_frequencies(self.config, positions.device)
        angle = positions[:, None, :, None].float() * inv_freq  # (B, 1, T, D/2)
        angle = torch.cat((angle, angle), dim=-1)  # (B, 1, T, D)
        return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)
