"""What no implementation avoids, counted from config.json: bytes that a step moves, operations of a prefill.

Where it sits: beside the flow: bench.py sets its times beside these floors, experiments/overhead.py counts on from
them. No weights are loaded and nothing runs. With the shapes of published models.
"""

from dataclasses import replace

import torch

from evicting import kept_tokens
from model import Config
from quantize import int4_bytes
from smallkv import Settings, TierSizes

FP32 = 4  # bytes of a score

# ---- Shapes ----------------------------------------------------------------------------------------------------------

COUNTS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size",
          "vocab_size", "tie_word_embeddings")  # fmt: skip
QWEN = {"model_type": "qwen2", "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
LLAMA_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}  # fmt: skip
LLAMA = {"model_type": "llama", "max_position_embeddings": 131072, "rope_theta": 5e5, "rms_norm_eps": 1e-5}
LLAMA_1B, LLAMA_8B = ({**LLAMA, "rope_scaling": {**LLAMA_ROPE, "factor": factor}} for factor in (32.0, 8.0))


def raw_config(family: dict, *counts) -> dict:
    """A config.json: what its family has in common, and COUNTS."""
    return {**family, **dict(zip(COUNTS, counts))}


SHAPES = {  # as published
    "Qwen2-0.5B": raw_config(QWEN, 24, 14, 2, 896, 4864, 151936, True),
    "Qwen2-7B": raw_config(QWEN, 28, 28, 4, 3584, 18944, 152064, False),
    "Qwen2-72B": raw_config(QWEN, 80, 64, 8, 8192, 29568, 152064, False),
    "Qwen2.5-0.5B": raw_config(QWEN, 24, 14, 2, 896, 4864, 151936, True),
    "Qwen2.5-14B": raw_config(QWEN, 48, 40, 8, 5120, 13824, 152064, False),
    "LLaMA-3.2-1B": raw_config(LLAMA_1B, 16, 32, 8, 2048, 8192, 128256, True),
    "LLaMA-3.1-8B": raw_config(LLAMA_8B, 32, 32, 8, 4096, 14336, 128256, False),
}


def early(config: Config, layers: int | None) -> Config:
    """The shape of an SLM that stops after so many layers; None: all. ValueError if it has not so many."""
    layers = config.layers if layers is None else layers
    if not 1 <= layers <= config.layers:
        raise ValueError(f"{layers} layers were asked for; 1 to {config.layers} can run")
    return replace(config, layers=layers)


# ---- What a step moves, what a prefill computes ----------------------------------------------------------------------


def cache_bytes(config: Config, length: int, batch: int, value_bytes: int) -> int:
    """Eq. 7: K and V of every layer, KV head, dimension, token and sequence."""
    return 2 * config.layers * config.kv_heads * config.head_dim * length * batch * value_bytes


def cache_ratio(llm: Config, slm: Config) -> float:
    """Eq. 7 of the LLM over that of the SLM."""
    return cache_bytes(llm, 1, 1, 1) / cache_bytes(slm, 1, 1, 1)


def products(config: Config, observed: bool = False) -> list[tuple[int, int]]:
    """Inputs and outputs of all matrix products of the layers. observed: up to the last attention, all that is asked of
    an SLM without drafts."""
    D, hidden, inner = config.head_dim, config.hidden_size, config.intermediate_size
    qkv, query = (config.query_heads + 2 * config.kv_heads) * D, config.query_heads * D
    layer = [(hidden, qkv), (query, hidden), (hidden, 2 * inner), (inner, hidden)]
    return layer * (config.layers - observed) + layer[:1] * observed


def product_bytes(config: Config, itemsize: int, int4: bool = False, observed: bool = False) -> int:
    """Bytes of their weights, in INT4 with scales and zeros; biases and norms, too few to show, are left out."""
    return sum(int4_bytes(*each) if int4 else itemsize * each[0] * each[1] for each in products(config, observed))


def step_bytes(
    llm: Config, slm: Config | None, batch: int, length: int, itemsize: int, size: TierSizes | None = None,
    settings: Settings = Settings(), int4: tuple[bool, bool] = (False, False), drafts: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Bytes that a decode step, or a round of drafts, cannot avoid to move on the device, by kind.

    size None is the full cache, slm None a method without one. Weights, K and V are read; the SLM's newest rows, of the
    model's itemsize, its scores and the LLM's memory, both fp32, count twice: written and read. The LLM's output
    projection counts, its embedding does not (one row a token). int4: whether the layers of LLM and SLM are INT4.
    """
    held = length if size is None else size.critical + size.marginal / 2
    found = {
        "LLM weights": product_bytes(llm, itemsize, int4[0]) + itemsize * llm.vocab_size * llm.hidden_size,
        "LLM K, V": cache_bytes(llm, 1, batch, itemsize) * held,
    }
    if slm is None:
        return found
    drafting = product_bytes(slm, itemsize, int4[1]) + itemsize * slm.vocab_size * slm.hidden_size
    kept = length if settings.slm_budget == 1 else int(kept_tokens(settings.slm_budget, torch.tensor(length)))
    found["SLM weights"] = drafts * drafting + product_bytes(slm, itemsize, int4[1], observed=True)
    found["SLM K, V"] = (drafts + 1) * cache_bytes(slm, kept, batch, itemsize)
    if size is not None:
        past = FP32 * (not settings.fused and settings.score_decay > 0)  # the score; fused ones have the memory
        rows = ((drafts + 1) * itemsize + past) * slm.layers * slm.query_heads
        found["scores"] = 2 * batch * length * (rows + FP32 * settings.fused * llm.layers * llm.kv_heads)
    if settings.slm_budget < 1:  # attention gathered, written and read, and position of each slot
        found["SLM slots"] = 3 * FP32 * batch * kept * slm.layers * slm.kv_heads
    return found


def prefill_flops(llm: Config, slm: Config | None, batch: int, prompt: int) -> int:
    """Multiplications and additions of a prefill: matrix products of every token, causal attention, the last logits."""
    total = 2 * batch * llm.vocab_size * llm.hidden_size
    for config in (llm, slm) if slm else (llm,):
        attention = 2 * 2 * config.layers * config.query_heads * config.head_dim * prompt * (prompt + 1) // 2
        total += batch * (2 * product_bytes(config, 1, observed=config is slm) * prompt + attention)
    return total
