"""The equalities of the method: what SmallKV does, step by step, against a loop that does it plainly (tests/naive.py).

Where it sits: beside smallkv.py, which it should be read with. The models are tiny and random, their attention far from
uniform; fp32. `python -m pytest -n 0 test_smallkv.py`.
"""

# ruff: noqa: F811 - fixtures are imported by name, since this file stands outside the folder of their conftest.py

import itertools
import math

import pytest
import torch

from conftest import device, poisoned_memory, random_prompts, tiny_decoder  # noqa: F401
from decode import Policy, Session, generate
from model import Decoder
from naive import NaiveSmallKV
from smallkv import SMALL_BUDGET, Settings, SmallKV, TierSizes

LENGTHS, STEPS = (150, 97, 210), 20  # one is shorter than the matching window and passes it, one longer
METHODS = {
    "default": Settings(),
    "no marginal tier": Settings(marginal=False),
    "paper": Settings.paper(),
    "paper, no marginal tier": Settings.paper(marginal=False),
    "newest row": Settings(scores="slm", score_decay=0.0),
    "slm alone": Settings(scores="slm", score_decay=0.5),
    "fused, all of the past": Settings(score_decay=1.0, marginal=False),
    "fused, nothing of the past": Settings(score_decay=0.0),
    "no shift": Settings(scores="slm", saliency_shift=False),
    "no shift, no marginal tier": Settings(scores="slm", saliency_shift=False, marginal=False, score_decay=1.0),
    "5 %": Settings(budget=0.05),
    "60 %": Settings(budget=0.6, scores="slm"),
    "90 %": Settings(budget=0.9),
    "tokens": Settings(budget_tokens=40),
    "jaccard": Settings(matcher="jaccard", reach=math.inf),
    "reach 1": Settings(reach=1.0),
    "SLM's cache cut": Settings(slm_budget=0.4),
    "SLM's cache cut, its scores": Settings(slm_budget=0.2, scores="slm", score_decay=0.7),
    "SLM's cache cut, no shift": Settings(slm_budget=0.1, scores="slm", saliency_shift=False),
    "third tier on the device": Settings(offload="none"),
}


def models(device="cpu", llm={}, slm={}) -> tuple[Decoder, Decoder]:
    return tiny_decoder(device=device, **llm), tiny_decoder(device=device, **{"heads": 4, "seed": 1, **slm})


def close(actual, expected):
    torch.testing.assert_close(actual.cpu(), expected.cpu(), atol=1e-4, rtol=1e-4)


def tiers(cache, b) -> dict:
    """By layer and KV head: the tokens in critical and in marginal slots of sequence b, as lists."""
    tables = cache.critical_position, cache.marginal_position
    at = itertools.product(range(cache.config.layers), range(cache.config.kv_heads))
    return {
        (layer, g): [[] if table is None else [j for j in table[layer, b, g].tolist() if j >= 0] for table in tables]
        for layer, g in at
    }


def check_tiers(session, b, naive):
    """The tokens in the slots, how many, and that their rows are those of the offloaded tier to the bit."""
    cache, n, settings = session.policy.cache, session.lengths[b], session.policy.settings
    if cache.key.is_cuda:
        torch.cuda.synchronize()
    for head, (critical, marginal) in tiers(cache, b).items():
        assert sorted(critical) == sorted(naive.critical[head])
        assert sorted(marginal) == sorted(naive.marginal[head])
        assert not set(critical) & set(marginal)  # the rest is offloaded alone
        if settings.saliency_shift:
            size = settings.sizes(n)
            assert (len(critical), len(marginal)) == (size.critical, size.marginal)
            assert set(critical) >= set(range(n - size.recent, n))
    slots = [(cache.key, cache.critical_position, 0), (cache.value, cache.critical_position, 1)]
    if cache.marginal is not None:
        slots.append((cache.marginal, cache.marginal_position, 1))
    for pool, table, kind in slots:
        pool, position = pool[:, b].cpu(), table[:, b].cpu().long()  # (L, G, C, D), (L, G, C)
        index, old = position.clamp(min=0)[..., None].expand(pool.shape), (position >= 0) & (position < n - 1)
        made = torch.stack((naive.llm.key, naive.llm.value)[kind]).gather(2, index)
        close(pool[position >= 0], made[position >= 0])
        rows = cache.offloaded[:, b, ..., kind, :].cpu().gather(2, index)  # the newest token's come with the next step
        assert torch.equal(pool[old], rows[old])


def check_tables(session, b, naive):
    """K and V in the offloaded tier, and the SLM's scores."""
    policy, n = session.policy, session.lengths[b]
    for kind, rows in enumerate((naive.llm.key, naive.llm.value)):
        close(policy.cache.offloaded[:, b, :, : n - 1, kind], torch.stack(rows)[:, :, :-1])
    if policy.slm_cache.score is not None:
        close(policy.slm_cache.score[:, b, :, :n], naive.score)


def check(settings, device, lengths=LENGTHS, steps=STEPS, head_map=None, **shapes):
    """A batch that chooses its own tokens against one naive loop a sequence."""
    prompts, (llm, slm) = random_prompts(*lengths), models(**shapes)
    loops = [NaiveSmallKV(llm, slm, settings, prompt, head_map) for prompt in prompts]
    session = Session(SmallKV(*models(device, **shapes), settings, head_map), prompts, steps)
    logits, expected = session.prefill(), [loop.logits for loop in loops]
    for _ in range(steps):
        close(logits, torch.stack(expected))
        tokens = logits.argmax(-1).tolist()
        assert tokens == [row.argmax().item() for row in expected]
        logits, expected = session.step(tokens), [loop.step(token) for loop, token in zip(loops, tokens)]
        for b, loop in enumerate(loops):
            check_tiers(session, b, loop)
        assert session.policy.cache.moved.sum(0).tolist() == [sum(loop.came[k] for loop in loops) for k in (0, 1)]
    for b, loop in enumerate(loops):
        check_tables(session, b, loop)


# ---- The method is the naive loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_equals_a_naive_loop(name, device):
    """Tokens, logits, tiers, slots, rows that came, scores: after every step, in a batch of mixed lengths."""
    check(METHODS[name], device)


@pytest.mark.parametrize("settings", [Settings(), Settings.paper(budget=0.1)], ids=["default", "paper"])
@pytest.mark.parametrize("llm, slm", [
    ({"heads": 4, "kv_heads": 4}, {}), ({"heads": 6, "kv_heads": 1}, {"kv_heads": 4}),
    ({"layers": 3, "head_dim": 32}, {"layers": 5}), ({"layers": 4}, {"layers": 1}), ({}, {"heads": 12, "kv_heads": 3}),
], ids=["no groups", "one KV head", "a deeper SLM", "the SLM's first layer", "more SLM heads"])  # fmt: skip
def test_models_of_other_shapes(llm, slm, settings, device):
    check(settings, device, lengths=(120, 99), steps=8, llm=llm, slm=slm)


@pytest.mark.parametrize("name", ["default", "newest row", "no shift"])
def test_a_given_head_map_takes_the_place_of_matching(name, device):
    head_map = torch.randint(4, (2, 6), generator=torch.Generator().manual_seed(5))
    check(METHODS[name], device, (130, 95), 8, head_map)


def test_prompts_of_one_token_and_budgets_of_one(device):
    check(Settings(), device, lengths=(1, 2, 101), steps=4)
    check(Settings(budget_tokens=1), device, lengths=(100, 99), steps=4)


# ---- The method is the full cache where it should be -----------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {}, {"marginal": False}, {"scores": "slm", "score_decay": 1.0}, {"scores": "slm", "saliency_shift": False},
    {"slm_budget": 0.1}, {"offload": "none"},
], ids=str)  # fmt: skip
def test_the_whole_budget_is_the_full_cache(changes, device):
    pair, prompts = models(device), random_prompts(*LENGTHS)
    policies = Policy(pair[0]), SmallKV(*pair, Settings(budget=1.0, **changes))
    full, small = (Session(policy, prompts, 30) for policy in policies)
    expected, logits = full.prefill(), small.prefill()
    for _ in range(30):
        close(logits, expected)
        tokens = expected.argmax(-1).tolist()
        assert logits.argmax(-1).tolist() == tokens
        expected, logits = full.step(tokens), small.step(tokens)


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
    full, split = Session(Policy(llm), prompts, 20), Session(policy, prompts, 20)
    expected, logits = full.prefill(), split.prefill()
    for token in range(20):
        close(logits, expected)
        expected, logits = full.step([token, token + 1]), split.step([token, token + 1])


@pytest.mark.parametrize("matcher", ["cosine", "jaccard"])
def test_an_llm_that_assists_itself_is_matched_with_its_own_heads(matcher, device):
    """Heads stand for themselves without being told so (but where two have equal top sets), and Eq. 6 is exact."""
    llm, (prompt,) = tiny_decoder(device=device), random_prompts(150)
    policy = SmallKV(llm, llm, Covering(matcher=matcher, reach=math.inf))
    session, full = Session(policy, [prompt], 3), Session(Policy(llm), [prompt], 3)
    session.prefill(), full.prefill()
    assert policy.maps[0].index.flatten().tolist() == list(range(12))
    close(session.step([5]), full.step([5]))


# ---- Batches, chunks, places: nothing depends on them ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "paper", "no shift", "SLM's cache cut"])
def test_a_batch_is_its_prompts_alone(name, device):
    """Whatever the neighbours are, and wherever it stands among them."""
    pair, prompts = models(device), random_prompts(150, 97, 210, 101, 30)
    together = generate(SmallKV(*pair, METHODS[name]), prompts, 15)
    assert together == [generate(SmallKV(*pair, METHODS[name]), [prompt], 15)[0] for prompt in prompts]
    backwards = generate(SmallKV(*pair, METHODS[name]), prompts[::-1], 15)
    assert backwards == together[::-1]


@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("name", ["default", "paper", "no shift", "SLM's cache cut", "SLM's cache cut, its scores"])
def test_a_prefill_in_chunks_is_that_of_the_whole_prompt(name, chunk, device):
    """Head maps, tiers and logits; chunks end in the middle of the matching window."""
    pair, prompts = models(device), random_prompts(150, 97, 210)
    whole, pieces = (Session(SmallKV(*pair, METHODS[name]), prompts, 8, chunk=size) for size in (None, chunk))
    expected, logits = whole.prefill(), pieces.prefill()
    for step in range(6):
        close(logits, expected)
        expected, logits = (session.step([step, 2 * step, 90 - step]) for session in (whole, pieces))
        for b in range(3):
            one, other = (tiers(session.policy.cache, b) for session in (whole, pieces))
            assert all(sorted(a) == sorted(c) for head in one for a, c in zip(one[head], other[head]))
    assert whole.policy.index.equal(pieces.policy.index)


def test_where_the_third_tier_lies_changes_nothing(device):
    answers = []
    for offload in ("cpu", "none"):
        policy = SmallKV(*models(device), Settings(offload=offload))
        answers.append(generate(policy, random_prompts(*LENGTHS), 25))
        assert policy.cache.offloaded.is_cuda == (offload == "none" and device == "cuda")
    assert answers[0] == answers[1] != generate(Policy(models(device)[0]), random_prompts(*LENGTHS), 25)


# ---- Saliency shift --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "no marginal tier", "newest row", "5 %", "no shift"])
def test_what_was_dropped_comes_back_but_without_saliency_shift(name, device):
    """Offloaded tokens that are critical or marginal in a later step; without saliency shift there is none."""
    session = Session(SmallKV(*models(device), METHODS[name]), random_prompts(150, 120), 30)
    session.prefill()
    dropped, came_back = set(), 0
    for step in range(30):
        session.step([step, (7 * step) % 97])
        for b in range(2):
            for head, (critical, marginal) in tiers(session.policy.cache, b).items():
                held = {*critical, *marginal}
                came_back += sum((b, head, j) in dropped for j in held)
                dropped |= {(b, head, j) for j in range(session.lengths[b]) if j not in held}
    assert dropped and (came_back > 0) == METHODS[name].saliency_shift


# ---- The split of the budget -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [100, 137, 1000, 16384])
def test_the_budget_is_split_two_to_one_to_two(length):
    """2:1:2 at 20 %, the floor below 7.5 %, the ceiling from 80 %; never more bytes than the budget."""
    at_20 = Settings(budget=0.2).sizes(length)
    assert at_20.recent == int(0.05 * length + 1e-9)
    assert at_20.critical - at_20.recent == int(0.1 * length + 1e-9)
    assert abs(at_20.marginal - 0.1 * length) <= 4  # the odd rows that rounding leaves go here
    at_5 = Settings(budget=0.05).sizes(length)
    assert at_5.critical - at_5.recent == int(SMALL_BUDGET / 2 * length + 1e-9)
    assert at_5.recent == max(1, int(0.00625 * length + 1e-9))
    at_90 = Settings(budget=0.9).sizes(length)
    assert at_90.critical + at_90.marginal == length and at_90.critical == int(1.8 * length + 1e-9) - length
    assert Settings(budget=1.0).sizes(length) == TierSizes(length, int(0.25 * length + 1e-9), 0)
    assert Settings(marginal=False).sizes(length) == TierSizes(int(0.2 * length + 1e-9), int(0.05 * length + 1e-9), 0)
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
