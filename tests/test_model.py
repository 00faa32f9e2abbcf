"""Configs as Transformers reads them, and what the decoder does with a cache against one whole pass.

Its logits are held against Transformers' where checkpoints are loaded: test_checkpoint.py.
"""

import copy
import math

import pytest
import torch

from cache import FullCache
from conftest import FP32, close, random_prompts, tiny_decoder
from model import Config, Span, rope_frequencies

transformers = pytest.importorskip("transformers", reason="the oracle of these tests; see requirements-dev.txt")

SMALL = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 10000.0}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}


def raw_config(kind: str, changes: dict) -> dict:
    """A config.json of the small model; what is changed to ... is not there."""
    return {name: value for name, value in {**SMALL, "model_type": kind, **changes}.items() if value is not ...}


def test_yarn_opens_the_positions_that_it_was_turned_on_for():
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert Config.from_hf(raw_config("qwen2", {"rope_scaling": yarn})).max_positions == 256
    assert Config.from_hf(raw_config("qwen2", {})).max_positions == 64


@pytest.mark.parametrize("changes, message", [
    ({"rope_parameters": {"rope_type": "linear"}}, "rope type 'linear' lacks factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1.0"),
    ({"vocab_size": "280"}, "vocab_size is '280'; expected a whole number from 1 to 16,777,216"),
    ({"vocab_size": None}, "vocab_size is None; expected"), ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"), ({"hidden_size": 10**30}, "hidden_size is 10+;"),
    ({"head_dim": -1}, "head_dim is -1; expected"), ({"head_dim": 7}, "head_dim is 7; expected an even number"),
    ({"hidden_size": 4, "head_dim": None}, "head_dim is 0; expected an even number"),
    *(({"rms_norm_eps": value}, f"rms_norm_eps is {value}; expected a number above 0")
      for value in (-1, 0, math.nan, math.inf, None)), ({"rms_norm_eps": 10**400}, "rms_norm_eps is 10+; expected"),
    ({"rope_theta": 0}, "rope_theta is 0; expected"), ({"rope_theta": "10000"}, "rope_theta is '10000'; expected"),
    ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; expected an object"),
    ({"rope_scaling": {"type": "yarn", "factor": -4.0}}, "factor is -4.0; expected a number above 0"),
    ({"rope_scaling": {"type": "yarn", "factor": 0}}, "factor is 0; expected a number above 0"),
    ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": "no"}}, "truncate is 'no'; expected true or false"),
    ({"rope_scaling": {"type": ["yarn"]}}, "unknown rope type"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "expected an object of rope_type and numbers"),
    ({"original_max_position_embeddings": -2, "rope_scaling": LLAMA3}, "original_max_position_embeddings is -2"),
    ({"layer_types": 5}, "layer_types is 5; expected a list of 2"), ({"layer_types": [5, 6]}, "sliding-window"),
    ({"layer_types": ["full_attention"]}, "layer_types is .*; expected a list of 2"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; expected true or false"),
    ({"attention_bias": 1}, "attention_bias is 1; expected true or false"),
    ({"intermediate_size": ..., "num_hidden_layers": ...}, "config.json lacks intermediate_size, num_hidden_layers"),
    ({"num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
])  # fmt: skip
def test_configs_that_are_refused(changes, message):
    """Others are named where checkpoints are loaded: test_checkpoint.py."""
    with pytest.raises(ValueError, match=message):
        Config.from_hf(raw_config("llama", changes))


TYPED = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}  # as model cards spell it, no theta


@pytest.mark.parametrize("kind, changes", [
    ("llama", {"partial_rotary_factor": None, "num_key_value_heads": None, "head_dim": None}),
    ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": TYPED}),
    ("qwen2", {"rope_parameters": {"rope_type": "default"}, "rope_scaling": TYPED, "rope_theta": 5e5}),
    ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}, "rope_scaling": {}}),
    ("llama", {"rope_scaling": LLAMA3, "original_max_position_embeddings": 8}),
    ("qwen2", {"rope_scaling": {**TYPED, "beta_fast": 2, "beta_slow": 2}, "original_max_position_embeddings": 48}),
    ("qwen2", {"rope_scaling": {**TYPED, "beta_fast": 1, "beta_slow": 30, "truncate": False}}),
    ("qwen2", {"rope_scaling": {**TYPED, "mscale": 0.7, "mscale_all_dim": 1.2}}),
    ("qwen3", {"head_dim": ...}),
])  # fmt: skip
def test_configs_are_read_as_transformers_reads_them(kind, changes):
    """The frequencies, the factor on cos and sin, and the numbers of heads."""
    raw = raw_config(kind, changes)
    expected = transformers.AutoConfig.for_model(**copy.deepcopy(raw))
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(expected)
    config = Config.from_hf(raw)
    inv_freq, factor = rope_frequencies(config)
    torch.testing.assert_close(inv_freq, rotary.inv_freq, atol=0, rtol=1e-6)
    assert math.isclose(factor, rotary.attention_scaling, rel_tol=1e-12)
    heads = expected.num_key_value_heads, getattr(expected, "head_dim", None) or SMALL["hidden_size"] // 6
    assert (config.kv_heads, config.head_dim) == heads


# ---- With a cache --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk, tokens, family, on_kernels", [
    (1, 1, "llama", False), (7, 3, "qwen3", False), (40, 3, "llama", False), (7, 3, "llama", True),
    (12, 1, "qwen3", True),
])  # fmt: skip
def test_chunks_and_steps_equal_one_pass(chunk, tokens, family, on_kernels, device, request):
    """One sequence in chunks, then in steps of one token or of a few at once, beside one that has no prompt; on plain
    PyTorch, and where all small kernels and attention are Triton's."""
    decoder = tiny_decoder(model_type=family, device=device)
    ids = [torch.tensor(prompt, device=device) for prompt in random_prompts(25, 6)]
    whole, prompts = [decoder(own[None])[0] for own in ids], (19, 0)
    if on_kernels:
        request.getfixturevalue("kernels_on")
    cache, parts = FullCache(decoder.config, 2, 30, device, FP32), [[], []]
    for start in range(0, 19, chunk):
        end = min(19, start + chunk)
        parts[0] += decoder(ids[0][None, start:end], Span.chunk(start, end, device), cache.staging(0, 19))
    for at in range(0, 6, tokens):
        new = torch.stack([own[n + at : n + at + tokens] for own, n in zip(ids, prompts)])
        length = torch.tensor(prompts, dtype=torch.int32, device=device) + at + 1
        for part, logits in zip(parts, decoder(new, Span.step(length, tokens), cache)):
            part.append(logits)
    for b, part in enumerate(parts):
        close(torch.cat(part), whole[b], 1e-4)
        assert cache.key[:, b, :, len(whole[b]) :].isnan().all()


def test_what_is_asked_of_a_forward(device):
    """The last token's logits, hidden states, or nothing: then nothing runs after the last layer's attention, and the
    cache is as after a whole forward."""
    decoder = tiny_decoder(device=device)
    tokens = torch.tensor(random_prompts(19, 19), device=device)
    whole = decoder(tokens)
    torch.testing.assert_close(decoder(tokens, logits="last"), whole[:, -1:])
    hidden = decoder(tokens, logits="none")
    torch.testing.assert_close(decoder.lm_head(decoder.norm(hidden)[1]), whole)
    caches = [FullCache(decoder.config, 1, 19, device, FP32) for _ in range(2)]
    span = Span.chunk(0, 19, device)
    decoder(tokens[:1], span, caches[0])
    ran = []
    for name, module in decoder.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    assert decoder(tokens[:1], span, caches[1], logits="scores") is None
    assert torch.equal(caches[0].key, caches[1].key) and torch.equal(caches[0].value, caches[1].value)
    assert ran[-3:] == ["layers.1.self_attn.qkv_proj", "layers.1.self_attn", ""]


def test_angles_are_in_fp32_whatever_the_weights_are():
    decoder = tiny_decoder().to(torch.bfloat16)
    cos, sin = decoder._turns(torch.tensor([[0, 300]], dtype=torch.int32))
    inverse, factor = rope_frequencies(decoder.config)
    assert cos.dtype == sin.dtype == FP32 and factor == 1.0
    torch.testing.assert_close(cos[0, 1], (300 * inverse.double()).cos().float(), atol=1e-4, rtol=0)
    assert (cos[0, 0] == 1).all() and (sin[0, 0] == 0).all()
