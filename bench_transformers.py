"""The same weights in Transformers with SDPA: the rival that everybody has.

Where it sits: under bench.py. One prefill of the whole batch, then one token at a time through a DynamicCache, as its
`generate` does.
"""

import torch

from bench_clock import Clock
from bench_count import Setting
from model import Decoder

STEPS = 5  # timed


def make_transformers(llm: Decoder, device: torch.device):
    """A Transformers model that shares the decoder's weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = dict(llm.raw)
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=llm.dtype)
    rotary = type(model.model.rotary_emb)(config).to(device)
    names = {k if k.startswith("lm_head") else f"model.{k}": v for k, v in llm.state_dict().items()}
    model.load_state_dict(names, strict=False, assign=True)
    model.model.rotary_emb = rotary
    return model.eval()


@torch.inference_mode()
def time_transformers(
    llm: Decoder, setting: Setting, clock: Clock, prefill: bool
) -> tuple[float | None, list[float], int]:  # fmt: skip
    """Seconds of the prefill (None without one: the cache is then random) and of each step; tokens before the first."""
    from transformers import DynamicCache

    model = make_transformers(llm, clock.device)
    cache, config, ttft = DynamicCache(config=model.config), llm.config, None
    tokens = torch.zeros(setting.batch, 1, dtype=torch.long, device=clock.device)
    if prefill:
        prompts = torch.randint(config.vocab_size, (setting.batch, setting.prompt), device=clock.device)
        model(input_ids=prompts[:1], use_cache=True, logits_to_keep=1)  # kernels are chosen at their first call
        ttft = clock.once(lambda: model(input_ids=prompts, past_key_values=cache, use_cache=True, logits_to_keep=1))
    else:
        for layer in range(config.layers):
            shape = (setting.batch, config.kv_heads, setting.prompt, config.head_dim)
            cache.update(*(torch.randn(shape, device=clock.device, dtype=llm.dtype) for _ in range(2)), layer)

    def work():
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
        tokens.copy_(logits[:, -1:].argmax(-1))

    clock.laps(work, 2)
    return ttft, clock.laps(work, STEPS), setting.prompt + 2 + STEPS // 2
