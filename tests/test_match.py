"""Matching of heads (Eq. 1-3): loops over pairs of heads, planted answers, layers within reach.

Sequences that are matched late are in test_smallkv.py.
"""

import itertools
import math

import pytest
import torch

import match
from conftest import random_prompts, tiny_decoder
from decode import Session
from match import SINKS, layers_within, match_heads
from naive import matrices
from smallkv import Settings, SmallKV


def models(device="cpu"):
    """An LLM of 5 layers of 6 heads, an SLM of 2 layers of 4."""
    return tiny_decoder(layers=5, device=device), tiny_decoder(heads=4, seed=1, device=device)


def alike(a, s, matcher, k):
    """Two heads' matrices (W, W), compared as the matcher does: Eq. 1 and 2 as sets, or whole rows but for the sink."""
    if matcher == "cosine":
        return torch.cosine_similarity(a[:, 1:].flatten(), s[:, 1:].flatten(), dim=0).item()
    one, other = (set(sum(rows).topk(k).indices.tolist()) for rows in (a, s))
    return len(one & other) / len(one | other)


# ---- Eq. 1-3 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", [math.inf, 1.0])
@pytest.mark.parametrize("matcher", match.MATCHERS)
def test_the_most_similar_head_is_found_pair_by_pair(matcher, reach):
    """In every layer, and among the layers within reach; five layers of 6 heads are more than the 8 taken together."""
    llm, slm = models()
    (window,) = random_prompts(120)
    mine, theirs = matrices(llm, window), matrices(slm, window)  # (30, 120, 120), (8, 120, 120)
    found = match_heads(llm, slm, window, matcher, reach)
    for head, a in enumerate(mine):
        layer, h = divmod(head, 6)
        every = [alike(a, s, matcher, 12) for s in theirs]
        near = every[: 4 * layers_within(reach, layer, 5, 2)]
        assert every[found.index[layer, h]] == pytest.approx(max(near), abs=1e-6) and found.index[layer, h] < len(near)
        matched, scores = theirs[found.index[layer, h]].sum(0)[SINKS:], a.sum(0)[SINKS:]
        assert found.similarity[layer, h].item() == pytest.approx(
            torch.cosine_similarity(scores, matched, dim=0).item(), abs=1e-5
        )
        best = [torch.cosine_similarity(scores, s.sum(0)[SINKS:], dim=0).item() for s, value in zip(theirs, every)
                if value == pytest.approx(max(every), abs=1e-6)]  # fmt: skip
        assert any(found.anywhere[layer, h].item() == pytest.approx(value, abs=1e-5) for value in best)
    assert torch.equal(found.similarity, found.anywhere) == (reach == math.inf)


@pytest.mark.parametrize("matcher", match.MATCHERS)
def test_a_planted_permutation_is_found(matcher, device):
    """An SLM that is the LLM with its heads shuffled in every layer: the map must undo the shuffle."""
    llm, slm = (tiny_decoder(kv_heads=6, device=device) for _ in range(2))
    shuffles = [torch.randperm(6, generator=torch.Generator().manual_seed(layer)) for layer in range(2)]
    for block, shuffle in zip(slm.layers, shuffles):
        qkv, out = block.self_attn.qkv_proj.weight, block.self_attn.o_proj.weight
        qkv.copy_(qkv.view(3, 6, 16, -1)[:, shuffle].flatten(0, 2))
        out.copy_(out.view(-1, 6, 16)[:, shuffle].flatten(1))
    (window,) = random_prompts(150)
    found = match_heads(llm, slm, window, matcher)
    for layer, shuffle in enumerate(shuffles):
        assert found.index[layer].tolist() == (layer * 6 + shuffle.argsort()).tolist()
    torch.testing.assert_close(found.similarity.cpu(), torch.ones(2, 6), atol=1e-4, rtol=0)


def test_how_alike_two_models_attend_is_measured_pair_by_pair():
    """On a text longer than the window: the best head of the text, and the one that the window matches."""
    llm, slm = models()
    (text,) = random_prompts(230)
    mine, theirs = (matrices(model, text).sum(1)[:, SINKS:] for model in (llm, slm))
    best, matched = match.score_similarity(llm, slm, text)
    index = match_heads(llm, slm, text[:200], "jaccard").index
    for layer, h in itertools.product(range(5), range(6)):
        every = [torch.cosine_similarity(mine[6 * layer + h], s, dim=0).item() for s in theirs]
        assert best[layer, h].item() == pytest.approx(max(every), abs=1e-5)
        assert matched[layer, h].item() == pytest.approx(every[index[layer, h]], abs=1e-5)


def test_unknown_matchers_are_refused():
    with pytest.raises(ValueError, match="unknown matcher 'dice'; supported: jaccard, cosine"):
        match_heads(*models(), random_prompts(110)[0], "dice")


# ---- Reach ---------------------------------------------------------------------------------------------------------


def test_layers_within_reach_are_counted_one_by_one():
    for layers, slm_layers, reach in itertools.product((1, 4, 7, 28), (1, 3, 7, 24), (1.0, 1.5, 2.0, math.inf)):
        for layer in range(layers):
            near = [n for n in range(slm_layers) if n == 0 or n * layers <= reach * layer * slm_layers or reach > 9]
            assert layers_within(reach, layer, layers, slm_layers) == len(near)


def test_head_maps_beyond_the_reach_are_refused():
    llm, slm = tiny_decoder(layers=4), tiny_decoder(layers=4)
    head_map = torch.zeros(4, 6, dtype=torch.long)
    head_map[1, 2] = 12  # layer 2
    with pytest.raises(ValueError, match=r"SLM layers \[0, 2, 0, 0\] are not all among the first \[1, 2, 3, 4\]"):
        SmallKV(llm, slm, Settings(reach=1.0), head_map)
    assert SmallKV(llm, slm, Settings(reach=2.0), head_map).needed == [1, 3, 4, 4]


# ---- In the prefill ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 130, 256])
@pytest.mark.parametrize("matcher", match.MATCHERS)
def test_matching_in_the_prefill_is_that_of_a_forward_of_its_own(matcher, chunk, device):
    """Chunks shorter than the window, longer than it, and the whole prompt; windows of 200 and of fewer tokens. Each
    prompt has a map of its own, and nothing is run once more for it."""
    llm, slm = models(device)
    prompts = random_prompts(230, 131)
    policy = SmallKV(llm, slm, Settings(matcher=matcher))
    seen = []
    for model in (llm, slm):
        model.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0].shape[1])))
    Session(policy, prompts, 10, chunk=chunk).prefill()
    assert [sum(count for model, count in seen if model is each) for each in (llm, slm)] == [361, 361]
    maps = [match_heads(llm, slm, prompt[:200], matcher, policy.settings.reach) for prompt in prompts]
    for b, expected in enumerate(maps):
        assert torch.equal(policy.maps[b].index, expected.index)
        assert torch.equal(policy.index[:, b], expected.index.int())
        torch.testing.assert_close(policy.maps[b].similarity, expected.similarity, atol=1e-5, rtol=1e-5)
    assert not torch.equal(maps[0].index, maps[1].index)
