"""What an SLM costs beside an LLM, from config.json alone (Appendix A: Eq. 7-9, Tables 3 and 4).

Where it sits: under experiments.py; who counts bytes of a cache (evaluate.py, distill.py, bench.py) calls `cache_bytes`
or `cache_ratio`. It reads shapes (model.Config, shapes.py), loads no weights and runs nothing. The formulas are missing
in the text of the paper that this was written from; they are put down here as its words and its figures give them:
Eq. 7 yields its 5.71 and 21.9 %, the layers' part of Eq. 8 its 14.9; the rest of Eq. 8 and Eq. 9 are our reading.

Two of the paper's figures are not Eq. 7-9: 14.9 leaves out the n^2 and vocabulary terms of its own Eq. 8 (with them the
ratio is lower, and falls with n), and the latencies of Table 4 are no ratio of shapes at all: they were timed, by all
signs, so they are shown beside ours and not reproduced.
"""

import math
from dataclasses import dataclass, replace

import torch

from checkpoint import weight_bytes
from model import Config
from shapes import SHAPES

MODELS = {name: Config.from_hf(raw) for name, raw in SHAPES.items()}


@dataclass(frozen=True)
class PaperPair:
    """A column of Table 4; latency and cache: how many times the LLM's is the SLM's, as printed there."""

    slm: str
    llm: str
    latency: float
    cache: float


PAPER_PAIRS = (
    PaperPair("Qwen2-0.5B", "Qwen2-7B", 3.57, 4.67),
    PaperPair("Qwen2.5-0.5B", "Qwen2.5-14B", 6.52, 16.0),
    PaperPair("Qwen2-7B", "Qwen2-72B", 4.47, 5.71),
    PaperPair("LLaMA-3.2-1B", "LLaMA-3.1-8B", 3.19, 4.0),
)


def cache_bytes(config: Config, length: int, batch: int, value_bytes: int) -> int:
    """Eq. 7: K and V of every layer, KV head, dimension, token and sequence."""
    return 2 * config.layers * config.kv_heads * config.head_dim * length * batch * value_bytes


def layer_flops(config: Config, length: int, batch: int = 1) -> int:
    """Eq. 8 without its n^2 and vocabulary terms: 24 b n h^2 a layer, an MLP 4h wide and no shared KV heads."""
    return config.layers * 24 * batch * length * config.hidden_size**2


def forward_flops(config: Config, length: int, batch: int = 1) -> int:
    """Eq. 8: L (24 b n h^2 + 4 b n^2 h) + 2 b n h V."""
    attention = config.layers * 4 * batch * length**2 * config.hidden_size
    return layer_flops(config, length, batch) + attention + 2 * batch * length * config.hidden_size * config.vocab_size


def decode_flops(config: Config, length: int) -> int:
    """One token on `length` cached ones as the checkpoint really is: two a weight (less a lookup), QK^T and AV."""
    weights = weight_bytes(config, torch.bfloat16) // torch.bfloat16.itemsize
    lookup = 0 if config.tied else config.vocab_size * config.hidden_size
    return 2 * (weights - lookup) + 4 * config.layers * config.query_heads * config.head_dim * length


def matching_flops(llm: Config, slm: Config, window: int) -> int:
    """Eq. 9 as match.py computes it: a product of two membership vectors of `window` tokens for each pair of heads."""
    return 2 * window * (llm.layers * llm.query_heads) * (slm.layers * slm.query_heads)


def cache_ratio(llm: Config, slm: Config) -> float:
    return cache_bytes(llm, 1, 1, 1) / cache_bytes(slm, 1, 1, 1)


def share_of_saving(llm: Config, slm: Config, budget: float) -> float:
    """The SLM's full cache as a share of what the LLM's cache saves at this budget (A.1: 21.9 % at 20 %)."""
    return 1 / cache_ratio(llm, slm) / (1 - budget)


def early(config: Config, layers: int) -> Config:
    """The shape of an SLM that stops after so many layers (`--slm-layers`, A.3)."""
    if not 1 <= layers <= config.layers:
        raise ValueError(f"{layers} layers were asked for; 1 to {config.layers} can run")
    return replace(config, layers=layers)


def slm_share(llm: Config, slm: Config, slm_budget: float = 1.0) -> float:
    """K and V of the SLM, cut to a budget, as a share of the LLM's full cache. A.3's best, 20 layers at 0.4: 7.14 %."""
    return slm_budget / cache_ratio(llm, slm)


def break_even_tokens(
    llm: Config, slm: Config, budget: float, value_bytes: int = 2, slm_budget: float = 1.0
) -> int | None:  # fmt: skip
    """Tokens (length x batch) from which the LLM's cache saves more bytes than SLM weights and SLM cache take.

    A decode step reads all of these once, so it is also where the bytes of a step break even. None: it never does.
    """
    saved = (1 - budget) * cache_bytes(llm, 1, 1, value_bytes) - slm_budget * cache_bytes(slm, 1, 1, value_bytes)
    if saved <= 0:
        return None
    weights = weight_bytes(slm, torch.bfloat16) // torch.bfloat16.itemsize * value_bytes
    return math.ceil(weights / saved)


def compare(llm: Config, slm: Config, budget: float, lengths: list[int], slm_budget: float = 1.0) -> dict:
    """Every ratio (LLM to SLM) of one pair, as JSON types. lengths: contexts whose break-even batch is asked for.

    slm_budget: the share of its cache that the SLM keeps; fewer layers are another `slm`, see `early`.
    """
    if not 0 < budget < 1:
        raise ValueError(f"--budget {budget} is outside (0, 1): at 1 nothing is saved; the paper's is 0.2")
    if not lengths or min(lengths) < 1:
        raise ValueError("--length: at least one context of at least 1 token")
    tokens = break_even_tokens(llm, slm, budget, slm_budget=slm_budget)
    return {
        "cache": cache_ratio(llm, slm),
        "slm_share": slm_share(llm, slm, slm_budget),
        "share_of_saving": share_of_saving(llm, slm, budget) * slm_budget,
        "layer_flops": layer_flops(llm, 1) / layer_flops(slm, 1),
        "forward_flops": {n: forward_flops(llm, n) / forward_flops(slm, n) for n in lengths},
        "decode_flops": {n: decode_flops(llm, n) / decode_flops(slm, n) for n in lengths},
        "matching_share": matching_flops(llm, slm, 200) / forward_flops(llm, 200),
        "break_even_tokens": tokens,
        "break_even_batch": {n: None if tokens is None else math.ceil(tokens / n) for n in lengths},
    }
