"""The equalities of the method: what SmallKV does, step by step, against a loop that does it plainly (tests/naive.py).

Where it sits: beside smallkv.py, which it should be read with. The models are tiny and random, their attention far from
uniform; fp32. `python -m pytest -n 0 test_smallkv.py`.
"""

# ruff: noqa: F811 - fixtures are imported by name, since this file stands outside the folder of their conftest.py

import itertools
import math

import pytest
import torch

from conftest import HERE, LENGTHS, close, device, poisoned_memory, random_prompts, tiny_decoder  # noqa: F401
from decode import Policy, Session
from model import Decoder
from naive import NaiveSmallKV, check_caches
from smallkv import SMALL_BUDGET, Settings, SmallKV, TierSizes

STEPS = 20
METHODS = {
    "default": Settings(),
    "three tiers": Settings(marginal=True),
    "paper": Settings.paper(),
    "paper, no marginal tier": Settings.paper(marginal=False),
    "newest row": Settings(scores="slm", score_decay=0.0, marginal=True),
    "slm alone": Settings(scores="slm", score_decay=0.5, marginal=True),
    "fused, all of the past": Settings(score_decay=1.0),
    "fused, nothing of the past": Settings(score_decay=0.0, marginal=True),
    "no shift": Settings(scores="slm", saliency_shift=False, marginal=True),
    "no shift, no marginal tier": Settings(scores="slm", saliency_shift=False, score_decay=1.0),
    "5 %": Settings(budget=0.05, marginal=True),
    "60 %": Settings(budget=0.6, scores="slm", marginal=True),
    "90 %": Settings(budget=0.9, marginal=True),
    "tokens": Settings(budget_tokens=40, marginal=True),
    "jaccard": Settings(matcher="jaccard", reach=math.inf, marginal=True),
    "reach 1": Settings(reach=1.0, marginal=True),
    "as many for every head": Settings(uniform=True),
    "the paper's, heads share": Settings.paper(uniform=False),
    "SLM's cache cut": Settings(slm_budget=0.4, marginal=True),
    "SLM's cache cut, its scores": Settings(slm_budget=0.2, scores="slm", score_decay=0.7),
    "SLM's cache cut, no shift": Settings(slm_budget=0.1, scores="slm", saliency_shift=False, marginal=True),
    "SLM's cache of one token": Settings(slm_budget=0.003, scores="slm"),
    "third tier on the device": Settings(offload="none", marginal=True),
}


def models(device="cpu", llm={}, slm={}) -> tuple[Decoder, Decoder]:
    return tiny_decoder(device=device, **llm), tiny_decoder(device=device, **{"heads": 4, "seed": 1, **slm})


def check(settings, device, lengths=LENGTHS, steps=STEPS, head_map=None, chunk=64, **shapes):
    """A batch that chooses its own tokens, its prompts in chunks, against one naive loop a sequence, which has no
    chunks and no neighbours: tokens, logits, and all that is in the caches, after every step."""
    prompts, (llm, slm) = random_prompts(*lengths), models(**shapes)
    loops = [NaiveSmallKV(llm, slm, settings, prompt, head_map) for prompt in prompts]
    session = Session(SmallKV(*models(device, **shapes), settings, head_map), prompts, steps, chunk)
    logits, expected, cache = session.prefill(), [loop.logits for loop in loops], session.policy.cache
    for _ in range(steps):
        close(logits, torch.stack(expected), 1e-4)
        tokens = logits.argmax(-1).tolist()
        assert tokens == [row.argmax().item() for row in expected]
        logits, expected = session.step(tokens), [loop.step(token) for loop, token in zip(loops, tokens)]
        for b, loop in enumerate(loops):
            check_caches(session, b, loop, len(loop.text) - 1)
        assert cache.moved.sum(0).tolist() == [sum(loop.came[k] for loop in loops) for k in (0, 1)]
    for b, loop in enumerate(loops):
        assert loop.map is None or torch.equal(session.policy.index[:, b].cpu(), loop.map.int())
    if cache.memory is not None:
        for layer in range(cache.config.layers):
            cache.fold(layer)  # as the next plan would
        for b, loop in enumerate(loops):
            close(cache.memory[:, b, :, : len(loop.text)], loop.memory, 1e-4)


def check_alike(full, other, steps):
    """Two sessions that are fed the first one's choices have the same logits."""
    expected, logits = full.prefill(), other.prefill()
    for _ in range(steps):
        close(logits, expected, 1e-4)
        tokens = expected.argmax(-1).tolist()
        expected, logits = full.step(tokens), other.step(tokens)


# ---- The method is the naive loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_equals_a_naive_loop(name, device):
    check(METHODS[name], device)


@pytest.mark.parametrize("settings", [Settings(), Settings.paper(budget=0.1)], ids=["default", "paper"])
@pytest.mark.parametrize("llm, slm", [
    ({"heads": 4, "kv_heads": 4}, {}), ({"heads": 6, "kv_heads": 1}, {"kv_heads": 4}),
    ({"layers": 3, "head_dim": 32}, {"layers": 5}), ({"layers": 4}, {"layers": 1}), ({}, {"heads": 12, "kv_heads": 3}),
], ids=["no groups", "one KV head", "a deeper SLM", "the SLM's first layer", "more SLM heads"])  # fmt: skip
def test_models_of_other_shapes(llm, slm, settings, device):
    check(settings, device, (120, 99), 8, chunk=None, llm=llm, slm=slm)


@pytest.mark.parametrize("name", ["default", "newest row", "no shift"])
def test_a_given_head_map_takes_the_place_of_matching(name, device):
    head_map = torch.randint(4, (2, 6), generator=torch.Generator().manual_seed(5))
    check(METHODS[name], device, (130, 95), 8, head_map)


def test_prompts_of_one_token_and_budgets_of_one(device):
    check(Settings(), device, lengths=(1, 2, 101), steps=4)
    check(Settings(budget_tokens=1), device, lengths=(100, 99), steps=4)


def test_steps_on_kernels_equal_a_naive_loop(monkeypatch):
    """Scores, plan, movement, attention as on a GPU; the prefill is without: the interpreter is slow."""
    run = Session.run

    def on_kernels(self):
        with monkeypatch.context() as patch:
            patch.setattr("ops.FORCE", True if HERE == "cpu" else None)
            run(self)

    monkeypatch.setattr(Session, "run", on_kernels)
    check(Settings(), HERE, (110,), 3, llm={"heads": 4}, slm={"heads": 2})


# ---- The method is the full cache where it should be -----------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {}, {"marginal": False}, {"scores": "slm", "score_decay": 1.0}, {"scores": "slm", "saliency_shift": False},
    {"slm_budget": 0.1}, {"offload": "none"},
], ids=str)  # fmt: skip
def test_the_whole_budget_is_the_full_cache(changes, device):
    pair, prompts = models(device), random_prompts(*LENGTHS)
    policies = Policy(pair[0]), SmallKV(*pair, Settings(budget=1.0, **changes))
    check_alike(*(Session(policy, prompts, 30) for policy in policies), 30)


class Covering(Settings):
    """Everything stays: `share` of the tokens critical, the rest marginal."""

    share = 0.5

    def split(self, length: torch.Tensor) -> torch.Tensor:
        critical = (self.share * length).long().clamp(min=1)
        return torch.stack((critical, torch.ones_like(length), length - critical), 1)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("scores", ["slm", "fused"])
def test_exact_borrowed_weights_are_exact_attention(share, scores, device, monkeypatch):
    """The SLM is the LLM, its heads stand for themselves, nothing is offloaded: Eq. 6 is exact at any split."""
    monkeypatch.setattr(Covering, "share", share)
    llm, prompts = tiny_decoder(device=device), random_prompts(120, 110)
    policy = SmallKV(llm, llm, Covering(scores=scores, reach=math.inf), torch.arange(12).view(2, 6))
    check_alike(Session(Policy(llm), prompts, 20), Session(policy, prompts, 20), 20)


@pytest.mark.parametrize("matcher", ["cosine", "jaccard"])
def test_an_llm_that_assists_itself_is_matched_with_its_own_heads(matcher, device):
    """Heads stand for themselves without being told so (but where two have equal top sets), and Eq. 6 is exact."""
    llm, prompts = tiny_decoder(device=device), random_prompts(150)
    policy = SmallKV(llm, llm, Covering(matcher=matcher, reach=math.inf))
    check_alike(Session(Policy(llm), prompts, 3), Session(policy, prompts, 3), 3)
    assert policy.maps[0].index.flatten().tolist() == list(range(12))


# ---- Saliency shift --------------------------------------------------------------------------------------------------


def holds(cache, layer, tokens):
    """Whether a token is critical or marginal: (B, G, tokens)."""
    cells = [slots.cells(tokens) for slots in cache.slots_of(layer) if slots is not None]
    B, G = cells[0].shape[0], cache.config.kv_heads
    held = torch.zeros(B, G * tokens + 1, dtype=torch.bool, device=cells[0].device)
    return held.scatter_(1, torch.cat(cells, 1), True)[:, :-1].view(B, G, tokens)


@pytest.mark.parametrize("name", ["default", "three tiers", "newest row", "5 %", "no shift"])
def test_what_was_dropped_comes_back_but_without_saliency_shift(name, device):
    """Offloaded tokens that are critical or marginal in a later step; without saliency shift there is none."""
    session = Session(SmallKV(*models(device), METHODS[name]), random_prompts(150, 120), 30)
    session.prefill()
    cache, token, dropped, came_back = session.policy.cache, torch.arange(180, device=device), False, False
    for step in range(30):
        session.step([step, (7 * step) % 97])
        held = torch.stack([holds(cache, layer, len(token)) for layer in range(2)])  # (L, B, G, S)
        came_back |= (held & dropped).any().item()
        dropped |= ~held & (token < session.length[:, None, None])
    assert dropped.any() and came_back == METHODS[name].saliency_shift


# ---- The split of the budget -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [100, 137, 1000, 16384])
def test_the_budget_is_split_two_to_one_to_two(length):
    """2:1:2 at 20 %, the floor below 7.5 %, the ceiling from 80 %; never more bytes than the budget."""
    at_20 = Settings(budget=0.2, marginal=True).sizes(length)
    assert at_20.recent == int(0.05 * length + 1e-9)
    assert at_20.critical - at_20.recent == int(0.1 * length + 1e-9)
    assert abs(at_20.marginal - 0.1 * length) <= 4  # the odd rows that rounding leaves go here
    at_5 = Settings(budget=0.05, marginal=True).sizes(length)
    assert at_5.critical - at_5.recent == int(SMALL_BUDGET / 2 * length + 1e-9)
    assert at_5.recent == max(1, int(0.00625 * length + 1e-9))
    at_90 = Settings(budget=0.9, marginal=True).sizes(length)
    assert at_90.critical + at_90.marginal == length and at_90.critical == int(1.8 * length + 1e-9) - length
    assert Settings(budget=1.0).sizes(length) == TierSizes(length, int(0.25 * length + 1e-9), 0)
    assert Settings().sizes(length) == TierSizes(int(0.2 * length + 1e-9), int(0.05 * length + 1e-9), 0)
    assert Settings(budget_tokens=length).sizes(length) == Settings(budget=1.0).sizes(length)
    assert Settings(budget_tokens=2 * length).sizes(length) == Settings(budget=1.0).sizes(length)
    for percent, marginal in itertools.product(range(1, 101), (True, False)):
        size = Settings(budget=percent / 100, marginal=marginal).sizes(length)
        rows = 2 * size.critical + size.marginal
        assert rows <= max(2, 2 * percent * length / 100 + 1e-6), (percent, size)
        assert rows >= 2 * percent * length // 100 - 1, (percent, size)
        assert 1 <= size.recent <= size.critical and size.critical + size.marginal <= length


def test_nothing_is_dropped_before_the_matching_window():
    for settings in METHODS.values():
        assert [settings.sizes(n) for n in (1, 50, 99)] == [TierSizes(n, 1, 0) for n in (1, 50, 99)]
    assert Settings(budget=0.1).sizes(100).critical < 20


@pytest.mark.parametrize("marginal", [True, False])
@pytest.mark.parametrize("budget", [0.05, 0.2, 0.85, 1.0])
def test_with_all_drafts_the_tiers_are_those_of_the_length_they_reach(budget, marginal):
    settings = Settings(budget=budget, marginal=marginal)
    for length, drafts in itertools.product((100, 163, 1000, 4097), (0, 1, 4)):
        chosen, last = settings.sizes(length, drafts), settings.sizes(length + drafts)
        assert (chosen.critical, chosen.marginal) == (max(1, last.critical - drafts), last.marginal)
        assert 1 <= chosen.recent <= chosen.critical and chosen.critical + chosen.marginal <= length
        assert chosen.critical + drafts <= max(last.critical, 1 + drafts)  # the newest token is there in any case
        assert drafts or chosen == last
    assert settings.sizes(99, 4) == TierSizes(99, 1, 0)


@pytest.mark.parametrize("change, message", [
    ({"budget": 0.0}, "budget 0.0 is outside"), ({"budget": 1.5}, "budget 1.5 is outside"),
    ({"budget": math.nan}, "budget nan is outside"), ({"budget_tokens": 0}, "budget of 0 tokens"),
    ({"score_decay": 1.2}, "score decay 1.2"), ({"matcher": "dice"}, "unknown matcher 'dice'; supported: jaccard"),
    ({"scores": "llm"}, "unknown scores 'llm'; supported: slm, fused"), ({"reach": 0.5}, "reach 0.5 is below 1"),
    ({"offload": "disk"}, "unknown offload 'disk'; supported: cpu, none"), ({"reach": math.nan}, "reach nan is below"),
    ({"saliency_shift": False}, "fused scores need the SLM's"), ({"slm_budget": 0.0}, "SLM budget 0.0 is outside"),
    ({"slm_budget": 1.1}, "SLM budget 1.1 is outside"),
])  # fmt: skip
def test_settings_out_of_range_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**change)
