"""Ledgers against bytes, and what memory the caches and a prefill take.

What is in the caches after every step is held against naive loops in test_smallkv.py, test_baselines.py and
test_speculative.py; how slots and rows are chosen in test_tiers.py.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cache import FullCache, TieredCache
from conftest import BF16, FP32, pair, random_prompts, tiny_decoder
from decode import Session
from model import Config, Decoder
from smallkv import Settings, SmallKV
from test_decode import POLICIES, answers_of, given, made


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", POLICIES)
def test_a_ledger_is_what_is_allocated(name, dtype, device):
    """Predicted on the meta device = bytes of the tensors, before and after a run; and no tensor is missing from it."""
    lengths, models = [150, 61, 120], [model.to(dtype) for model in pair(device)]
    policy = POLICIES[name](*models)
    session = made(policy, random_prompts(*lengths), 12)
    predicted = policy.ledgers(lengths, session.capacity)
    for run in (False, True):
        if run:
            answers_of(session, 12)
        assert set(predicted) == set(policy.caches) and ("SLM" in predicted) == (len(policy.models) == 2)
        for model, cache in policy.caches.items():
            assert cache.ledger() == predicted[model]
            tensors = {what: [x for x in (value if isinstance(value, (list, tuple)) else [value]) if torch.is_tensor(x)]
                       for what, value in vars(cache).items()}  # fmt: skip
            counts = sum(x.nbytes for what in ("moved", "kept") for x in tensors.pop(what, ()))  # by layer or by length
            assert counts <= 8 * (session.capacity + 2)
            assert sum(x.nbytes for own in tensors.values() for x in own) == sum(line.size for line in cache.ledger())
            on_host = {line.what for line in cache.ledger() if line.host}
            tiered = isinstance(cache, TieredCache)
            assert on_host == ({"offloaded K, V"} if tiered and cache.offload == "cpu" else set())
            if tiered:
                assert cache.offloaded.is_cuda == (device == "cuda" and cache.offload == "none")
                assert cache.row_bytes(3, 5) == (2 * 3 + 5) * 16 * dtype.itemsize  # K and V, V alone; head_dim


@pytest.mark.parametrize("name", POLICIES)
def test_asking_for_a_ledger_changes_nothing(name):
    """In the middle of a batch, about another one; and a policy serves one batch after the other."""
    policy, prompts, answers = POLICIES[name](*pair()), random_prompts(150, 61), []
    for asks in (False, True):
        answers.append([[], []])
        session = made(policy, prompts, 24, progress=lambda count: asks and policy.ledgers([7, 9, 20], 40))
        for new in given(session, 24):
            answers[-1] = [old + tokens for old, tokens in zip(answers[-1], new)]
            assert not asks or policy.ledgers([7, 9, 20], 40)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("marginal", [True, False])
def test_slots_follow_the_budget_not_the_context(marginal):
    llm, slm = pair()
    full = FullCache(llm.config, 1, 2000, "meta", FP32).ledger()[0].size
    for budget in (0.05, 0.1, 0.2, 0.5, 1.0):
        ledger = SmallKV(llm, slm, Settings(budget=budget, marginal=marginal)).ledgers([1000], 2000)["LLM"]
        held = sum(line.size for line in ledger if line.what in ("critical K, V", "marginal V"))
        one_row = 2 * 2 * 16 * 4  # of V in all heads: two lengths may round in favour of different tiers
        assert budget * full - 2 * one_row <= held <= budget * full + 4 * one_row


def test_the_paper_s_best_combination_takes_7_percent():
    """A.3: 40 % of the SLM's cache and 20 of its 24 layers, Qwen2-0.5B beside Qwen2-7B: 1/4.67 x 0.4 x 20/24."""
    common = {"model_type": "qwen2", "vocab_size": 100, "max_position_embeddings": 32768, "intermediate_size": 100}
    shapes = (3584, 28, 28, 4), (896, 20, 14, 2)
    names = "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"
    with torch.device("meta"):
        models = [Decoder(Config.from_hf({**common, **dict(zip(names, shape))})).to(BF16) for shape in shapes]
    length = 20_000
    ledgers = SmallKV(*models, Settings(slm_budget=0.4, marginal=False)).ledgers([length], length)
    kept, critical = ledgers["SLM"][0], ledgers["LLM"][0]
    full = FullCache(models[0].config, 1, length, "meta", BF16).ledger()[0].size
    assert full == 2 * 28 * 4 * 128 * 2 * length
    assert kept.size == 2 * 20 * 2 * 64 * 2 * 8000  # layers, KV heads, dimensions, bytes, tokens
    assert kept.size / full == pytest.approx(0.0714, abs=5e-5) and critical.size / full == pytest.approx(0.2)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that was ever made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if torch.is_tensor(tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


def test_no_tensor_is_as_large_as_the_prompt_squared(monkeypatch):
    """Prefill of both models and matching, with scores of every kind, in chunks of 256 of 3,000 tokens."""

    def mask(queries, keys):  # what the bias object turns into on a CPU; the mode cannot see the object itself
        return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)

    monkeypatch.setattr("torch.nn.attention.bias.causal_lower_right", mask)
    n, models = 3000, (tiny_decoder(kv_heads=6), pair()[1])
    for settings in (Settings.paper(), Settings(), Settings(slm_budget=0.2)):
        with Largest() as largest:
            Session(SmallKV(*models, settings), random_prompts(n), 5, chunk=256).prefill()
        assert 256 * n < largest.numbers < n * n / 1.5  # 6 heads x 256 queries x 3,000 keys, against 9,000,000
