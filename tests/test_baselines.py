"""Every baseline against a naive loop (naive.py): logits, and the tokens that it keeps, after every step.

The pools are new memory, filled with NaN (conftest.py): a slot that is free and seen shows in the logits.
"""

import math

import pytest
import torch

from baselines import BASELINES, answer_shares, contexts, cosine, solve_pyramid
from cache import FullCache
from conftest import close, random_prompts, tiny_decoder
from decode import Policy, Session, generate
from naive import NAIVE


def check(name, lengths, steps, budget, tokens=None, device="cpu", **shape):
    """A batch that is fed given tokens, its prompts in chunks, against one naive loop a sequence."""
    prompts, fed = random_prompts(*lengths), random_prompts(*[steps] * len(lengths), seed=7)
    policy, cpu = BASELINES[name](tiny_decoder(device=device, **shape), budget, tokens), tiny_decoder(**shape)
    expected = [NAIVE[name](cpu, *own, policy.kept) for own in zip(prompts, fed)]
    session = Session(policy, prompts, steps, chunk=64)
    logits, cache = [session.prefill().cpu()], policy.cache
    for step, new in enumerate(zip(*fed)):
        logits.append(session.step(list(new)).cpu().clone())
        for b, (_, history) in enumerate(expected):
            for (layer, g), held in ({} if history is None else history[step]).items():
                position = cache.position[layer][b, g].tolist()
                assert sorted(j for j in position if j >= 0) == held, (step, b, layer, g)
    for b, (rows, _) in enumerate(expected):
        close(torch.stack([row[b] for row in logits]), torch.stack(rows), 1e-3)
    return session


# ---- Equalities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("lengths, steps, budget, tokens, shape", [
    *(((150, 61, 9), 40, budget, None, {"layers": 3}) for budget in (0.05, 0.2, 0.5, 1.0)),
    *(((70, 9), 20, 0.2, tokens, {}) for tokens in (1, 2, 12, 1000)),  # whatever the length
    ((50,), 20, 0.3, None, {"heads": 4, "kv_heads": 4}), ((50,), 20, 0.3, None, {"kv_heads": 1, "head_dim": 32}),
    ((1, 2), 12, 0.5, None, {}),
])  # fmt: skip
def test_every_baseline_equals_a_naive_loop(name, lengths, steps, budget, tokens, shape, device):
    """In batches of mixed lengths; of a prompt shorter than the budget all stays, until the answer makes it longer."""
    session = check(name, lengths, steps, budget, tokens, device, **shape)
    if tokens and name in ("h2o", "streaming", "window"):
        assert [session.policy.cache.tokens(b)["critical"] for b in (0, 1)] == [min(tokens, 90), min(tokens, 29)]


@pytest.mark.parametrize("name", BASELINES)
def test_the_whole_budget_is_the_full_cache(name, device):
    """Tokens of answers that run freely, in a batch of mixed lengths."""
    llm, prompts = tiny_decoder(device=device), random_prompts(100, 61, 9)
    assert generate(BASELINES[name](llm, 1.0), prompts, 25) == generate(Policy(llm), prompts, 25)


# ---- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["h2o", "streaming", "window"])
def test_the_pool_is_the_budget(name):
    """K and V take the budget's share of the full cache's bytes, and at the end every slot is in use."""
    llm, prompts = tiny_decoder(layers=3), random_prompts(150)
    policy = BASELINES[name](llm, 0.2)
    session = Session(policy, prompts, 50)
    full = FullCache(llm.config, 1, 200, "meta", torch.float32).ledger()[0].size
    assert policy.cache.ledger()[0].size == 0.2 * full
    session.prefill()
    for token in range(50):
        session.step([token])
    assert policy.cache.tokens(0) == {"critical": 40} and policy.cache.key[0].shape[2] == 40


def test_the_oracle_says_that_it_keeps_everything():
    llm = tiny_decoder()
    full, oracle = (policy.ledgers([100], 120)["LLM"] for policy in (Policy(llm), BASELINES["oracle"](llm, 0.05)))
    assert oracle == full


# ---- PyramidInfer's lengths ------------------------------------------------------------------------------------------


def test_the_shipped_schedule_keeps_what_the_published_code_keeps():
    """p = 0.9, 32 layers, recent ratio 0.2: 76 % on average, layer 16 81 %, the last 37 to 38 %."""
    n = 2048
    recent = int(0.2 * n) + 1
    stored = [context + recent for context in contexts("cosine", 0.9, 32, n - recent)[:-1]]
    assert sum(stored) / 32 / n == pytest.approx(0.76, abs=0.005)
    assert stored[16] / n == pytest.approx(0.81, abs=0.005)
    assert 0.37 <= stored[-1] / n <= 0.38
    assert [cosine(layer, 4, 0.1) for layer in (0, 2)] == pytest.approx([1.0, 0.55])


@pytest.mark.parametrize("layers", [1, 2, 28, 80])
@pytest.mark.parametrize("length", [1, 9, 100, 512, 2048])
def test_layer_budgets_have_the_mean_that_was_asked(length, layers):
    for percent in (1, 5, 10, 20, 30, 50, 76, 90, 100):
        kept = max(1, int(percent / 100 * length + 1e-9))
        entering, recent, cut = solve_pyramid(length, kept, layers)
        stored = [context + recent for context in (entering[1:] if cut else entering[:-1])]
        assert entering[0] + recent == length and len(stored) == layers
        assert stored == sorted(stored, reverse=True) and stored[-1] >= 1
        floor = layers * (recent + min(1, length - recent))  # no layer holds less, whatever is asked
        assert 0.9 * layers * kept - layers <= sum(stored) <= max(layers * kept, floor)
        assert percent < 100 or stored == [length] * layers


def test_answer_shares_have_the_mean_that_was_asked():
    assert answer_shares(1.0, 28) == [16] * 28
    for share in (0.1, 0.2, 0.5, 0.8):
        kept = answer_shares(share, 28)
        assert kept == sorted(kept, reverse=True)
        assert share * 16 - 1 <= sum(kept) / 28 <= share * 16 + 0.5
    shipped = [max(1, int(16 * 0.9 * cosine(layer, 28, 0.1))) for layer in range(28)]
    mean = 0.9 * sum(cosine(layer, 28, 0.1) for layer in range(28)) / 28
    assert answer_shares(mean, 28) == shipped


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
def test_budgets_out_of_range_are_named(name):
    llm = tiny_decoder()
    for share in (0.0, 1.1, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"budget {share} is outside"):
            BASELINES[name](llm, share)
    with pytest.raises(ValueError, match="budget of 0 tokens is too small"):
        BASELINES[name](llm, 0.2, 0)
