"""Slots, the split of the budget, tiers and matching, each against set arithmetic or a planted answer."""

import itertools
import math
import random

import pytest
import torch

from cache import assign_slots
from conftest import random_prompts, tiny_decoder, window_rows
from decode import Session
from match import SINKS, cosine_similarity, jaccard_similarity, layers_within, match_heads, row_features
from settings import SMALL_BUDGET, Settings, TierSizes
from smallkv import SmallKV, plan_tiers

# ---- slots and tiers -------------------------------------------------------------------------------------------------


def test_slots_hold_exactly_what_is_wanted_and_keep_what_stays():
    rng = random.Random(0)
    B, G, slots, tokens = 2, 3, 5, 12
    position = torch.full((B, G, slots), -1)
    for _ in range(30):
        wanted = torch.zeros(B, G, tokens, dtype=torch.bool)
        for b, g in itertools.product(range(B), range(G)):
            wanted[b, g, rng.sample(range(tokens), rng.randint(0, slots))] = True
        new, slot, fresh = assign_slots(position, wanted)
        for b, g in itertools.product(range(B), range(G)):
            before, after = position[b, g].tolist(), new[b, g].tolist()
            want = wanted[b, g].nonzero().flatten().tolist()
            assert sorted(token for token in after if token >= 0) == want
            stays = [(i, token) for i, token in enumerate(before) if token in want]
            assert all(after[i] == token for i, token in stays)
            assert fresh[b, g].nonzero().flatten().tolist() == [t for t in want if t not in before]
            assert all(after[slot[b, g, token]] == token for token in want)
        position = new


def test_plan_is_the_ranking_cut_in_three():
    lengths = [12, 7]
    sizes = [TierSizes(5, 2, 4), TierSizes(3, 1, 2)]
    scores = torch.rand(2, 3, 12, generator=torch.Generator().manual_seed(0))
    scores[0, 0, :4] = 0.5  # equal scores rank by position
    critical, marginal = plan_tiers(scores, sizes, lengths)
    for b, g in itertools.product(range(2), range(3)):
        n, size = lengths[b], sizes[b]
        recent = list(range(n - size.recent, n))
        rest = sorted((j for j in range(n) if j not in recent), key=lambda j: (-scores[b, g, j].item(), j))
        ranked = recent + rest
        assert critical[b, g].nonzero().flatten().tolist() == sorted(ranked[: size.critical])
        expected = sorted(ranked[size.critical : size.critical + size.marginal])
        assert marginal[b, g].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("length", [100, 137, 1000, 16384])
def test_split_of_the_budget(length):
    """2:1:2 at 20 %, the floor below 7.5 %, the ceiling above 80 %; never more bytes than the budget."""
    at_20 = Settings(budget=0.2, marginal=True).sizes(length)
    assert at_20.recent == int(0.05 * length + 1e-9)
    assert at_20.critical - at_20.recent == int(0.1 * length + 1e-9)
    assert abs(at_20.marginal - 0.1 * length) <= 4  # the odd rows that rounding leaves go here
    at_5 = Settings(budget=0.05, marginal=True).sizes(length)
    assert at_5.critical - at_5.recent == int(SMALL_BUDGET / 2 * length + 1e-9)
    assert at_5.recent == max(1, int(0.00625 * length + 1e-9))
    assert Settings(budget=1.0).sizes(length) == TierSizes(length, int(0.25 * length + 1e-9), 0)
    covered = Settings(budget=0.9, marginal=True).sizes(length)
    assert covered.critical + covered.marginal == length
    no_marginal = Settings(budget=0.2, marginal=False).sizes(length)
    assert (no_marginal.critical, no_marginal.marginal) == (int(0.2 * length + 1e-9), 0)
    for percent, marginal in itertools.product(range(1, 101), (True, False)):
        size = Settings(budget=percent / 100, marginal=marginal).sizes(length)
        rows = 2 * size.critical + size.marginal
        assert rows <= max(2, 2 * percent * length / 100 + 1e-6), (percent, size)
        assert rows >= 2 * percent * length // 100 - 1, (percent, size)
        assert 1 <= size.recent <= size.critical and size.critical + size.marginal <= length
    assert Settings(budget_tokens=64).sizes(length).critical <= 64
    assert Settings(budget_tokens=length).sizes(length).critical == length


def test_nothing_is_dropped_before_the_matching_window():
    assert Settings(budget=0.1).sizes(99) == TierSizes(99, 1, 0)
    assert Settings(budget=0.1).sizes(100).critical < 20


@pytest.mark.parametrize("marginal", [True, False])
@pytest.mark.parametrize("budget", [0.05, 0.2, 0.85, 1.0])
def test_a_plan_that_lasts_leaves_places_for_the_tokens_to_come(budget, marginal):
    """In no step between two plans are there more tokens than the budget of that step, or fewer recent ones."""
    for length, refresh in itertools.product((100, 163, 1000, 4097), (1, 2, 4)):
        settings = Settings(budget=budget, marginal=marginal, refresh=refresh)
        chosen = settings.planned(length)
        assert refresh > 1 or chosen == settings.sizes(length)
        assert 1 <= chosen.recent <= chosen.critical and chosen.critical + chosen.marginal <= length
        for since in range(refresh):
            size = settings.sizes(length + since)
            assert 2 * (chosen.critical + since) + chosen.marginal <= 2 * budget * (length + since) + 2
            assert min(chosen.recent + since, size.critical) >= size.recent
        assert since + chosen.critical == size.critical
    assert Settings(budget=0.1, refresh=4).planned(99) == TierSizes(99, 1, 0)


@pytest.mark.parametrize(
    "change, message",
    [({"budget": 0.0}, "budget 0.0 is outside"), ({"budget": 1.5}, "budget 1.5 is outside"),
     ({"budget_tokens": 0}, "budget of 0 tokens"), ({"score_decay": 1.2}, "score decay 1.2"),
     ({"matcher": "dice"}, "unknown matcher 'dice'"), ({"refresh": 0}, "a plan every 0 steps")],
)  # fmt: skip
def test_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**change)


# ---- matching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matcher", ["jaccard", "cosine"])
def test_matcher_finds_a_planted_permutation(matcher):
    """An SLM that is the LLM with its heads shuffled in every layer: the map must undo the shuffle."""
    llm, slm = tiny_decoder(kv_heads=6), tiny_decoder(kv_heads=6)
    shuffles = [torch.randperm(6, generator=torch.Generator().manual_seed(layer)) for layer in range(2)]
    for block, shuffle in zip(slm.layers, shuffles):
        attention = block.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight.copy_(projection.weight.view(6, 16, -1)[shuffle].flatten(0, 1))
        attention.o_proj.weight.copy_(attention.o_proj.weight.view(-1, 6, 16)[:, shuffle].flatten(1))
    (window,) = random_prompts(150)
    found = match_heads(llm, slm, window, matcher)
    for layer, shuffle in enumerate(shuffles):
        assert found.index[layer].tolist() == (layer * 6 + shuffle.argsort()).tolist()
    torch.testing.assert_close(found.similarity, torch.ones(2, 6), atol=1e-4, rtol=0)


def test_jaccard_equals_set_arithmetic():
    one, other = (torch.rand(h, 30, generator=torch.Generator().manual_seed(h)) for h in (4, 5))
    similarity = jaccard_similarity(one, other, 7)
    for i, s in itertools.product(range(4), range(5)):
        a, b = set(one[i].topk(7).indices.tolist()), set(other[s].topk(7).indices.tolist())
        assert similarity[i, s].item() == pytest.approx(len(a & b) / len(a | b))


def test_matching_waits_for_100_tokens_and_uses_at_most_200():
    llm, slm = tiny_decoder(), tiny_decoder(heads=4, head_dim=8, seed=1)
    short, long = random_prompts(97, 230)
    policy = SmallKV(llm, slm, Settings.paper(budget=0.2))
    session = Session(llm, policy, [short, long], 10)
    session.prefill()
    assert policy.maps[0] is None
    assert torch.equal(policy.maps[1].index, match_heads(llm, slm, long[:200], "jaccard").index)
    kept = []
    for token in (5, 6, 7, 8):
        session.step([token, token])
        kept.append((session.cache.key_position[:, 0] >= 0).sum(-1).unique().tolist())
    assert kept == [[98], [99], [15], [15]]  # 20 % of 100 and of 101: 10 critical and 5 recent
    assert torch.equal(policy.maps[0].index, match_heads(llm, slm, short + [5, 6, 7], "jaccard").index)


def test_matching_stays_within_reach():
    """SLM layers within reach by counting them one by one; and the best head among those, not the best of all."""
    for layers, slm_layers, reach in itertools.product((1, 4, 7, 28), (1, 3, 7, 24), (1.0, 1.5, 2.0, math.inf)):
        for layer in range(layers):
            deep = [n for n in range(slm_layers) if n == 0 or n * layers <= reach * layer * slm_layers or reach > 9]
            assert layers_within(reach, layer, layers, slm_layers) == len(deep)
    llm, slm = tiny_decoder(layers=6), tiny_decoder(layers=4, heads=4, seed=1)
    (window,) = random_prompts(120)
    every, near = (match_heads(llm, slm, window, "cosine", reach) for reach in (math.inf, 1.0))
    rows, slm_rows = (row_features(window_rows(model, torch.tensor([window]))) for model in (llm, slm))
    similarity = cosine_similarity(rows, slm_rows).view(6, 6, 16)
    for layer, heads in enumerate((4, 4, 8, 12, 12, 16)):  # 0, 2/3, 4/3, 2, 8/3, 10/3: how many SLM layers have begun
        assert torch.equal(near.index[layer], similarity[layer, :, :heads].argmax(-1))
    assert (every.index[0] >= 4).any() and torch.equal(every.index, similarity.argmax(-1))
    policy = SmallKV(llm, slm, Settings(reach=1.0))
    Session(llm, policy, [window], 4).prefill()
    assert torch.equal(policy.maps[0].index, near.index)


def test_bad_reach_and_head_maps_beyond_it_are_refused():
    with pytest.raises(ValueError, match="reach 0.5 is below 1"):
        Settings(reach=0.5)
    llm, slm = tiny_decoder(layers=4), tiny_decoder(layers=4)
    head_map = torch.zeros(4, 6, dtype=torch.long)
    head_map[1, 2] = 12  # layer 2
    with pytest.raises(ValueError, match=r"SLM layers \[0, 2, 0, 0\] are not all among the first \[1, 2, 3, 4\]"):
        SmallKV(llm, slm, Settings(reach=1.0), head_map)
    SmallKV(llm, slm, Settings(reach=2.0), head_map)


@pytest.mark.parametrize("chunk", [7, 130, 256])
@pytest.mark.parametrize("matcher", ["jaccard", "cosine"])
def test_matching_in_the_prefill_is_that_of_a_forward_of_its_own(matcher, chunk, device):
    """Chunks shorter than the window, longer than it, and the whole prompt; windows of 200 and of fewer tokens. Each
    prompt has a map of its own, and nothing is run once more for it."""
    llm, slm = tiny_decoder(layers=5, device=device), tiny_decoder(heads=4, head_dim=8, seed=1, device=device)
    prompts = random_prompts(230, 131)
    policy = SmallKV(llm, slm, Settings(matcher=matcher))
    seen = []
    for model in (llm, slm):
        model.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0].shape[1])))
    Session(llm, policy, prompts, 10, chunk=chunk).prefill()
    assert [sum(count for model, count in seen if model is each) for each in (llm, slm)] == [361, 361]
    maps = [match_heads(llm, slm, prompt[:200], matcher, policy.settings.reach) for prompt in prompts]
    for b, expected in enumerate(maps):
        assert torch.equal(policy.maps[b].index, expected.index) and torch.equal(policy.index[b], expected.index)
        torch.testing.assert_close(policy.maps[b].similarity, expected.similarity, atol=1e-5, rtol=1e-5)
    assert not torch.equal(maps[0].index, maps[1].index)


@pytest.mark.parametrize("matcher", ["jaccard", "cosine"])
def test_the_most_similar_head_is_found_pair_by_pair(matcher):
    """Eq. 1-3 by loops over pairs of heads; five layers of 6 heads are more than the SLM's 8 heads taken together."""
    llm, slm = tiny_decoder(layers=5), tiny_decoder(heads=4, head_dim=8, seed=1)
    (window,) = random_prompts(120)
    tokens = torch.tensor([window])
    mine, theirs = window_rows(llm, tokens), window_rows(slm, tokens)  # (30, 120, 120), (8, 120, 120)

    def alike(a, s):
        if matcher == "cosine":
            return torch.cosine_similarity(a[:, 1:].flatten(), s[:, 1:].flatten(), dim=0).item()
        one, other = (set(rows.sum(0).topk(12).indices.tolist()) for rows in (a, s))
        return len(one & other) / len(one | other)

    found = match_heads(llm, slm, window, matcher)
    for a, best, similarity in zip(mine, found.index.flatten().tolist(), found.similarity.flatten().tolist()):
        every = [alike(a, s) for s in theirs]
        assert every[best] == pytest.approx(max(every), abs=1e-6)
        scores = [rows.sum(0)[SINKS:] for rows in (a, theirs[best])]
        assert similarity == pytest.approx(torch.cosine_similarity(*scores, dim=0).item(), abs=1e-5)
