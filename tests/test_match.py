"""Matching of heads (Eq. 1-3): loops over pairs of heads, planted answers, layers within reach, late matches."""

import itertools
import math

import pytest
import torch

import match
from conftest import randn, random_prompts, tiny_decoder
from decode import Session
from match import SINKS, Window, layers_within, match_heads, match_windows, seen_window
from smallkv import Settings, SmallKV


def models(device="cpu"):
    """An LLM of 5 layers of 6 heads, an SLM of 2 layers of 4."""
    return tiny_decoder(layers=5, device=device), tiny_decoder(heads=4, seed=1, device=device)


def matrices(decoder, text):
    """Attention matrices of every head on a whole text: (L * H, W, W) fp32."""
    return seen_window(decoder, torch.tensor([text], device=decoder.device)).rows(slice(None))


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


def test_jaccard_is_set_arithmetic():
    one, other = (torch.rand(h, 30, generator=torch.Generator().manual_seed(h)) for h in (4, 5))
    similarity = match.jaccard_similarity(one, other, 7)
    for i, s in itertools.product(range(4), range(5)):
        a, b = set(one[i].topk(7).indices.tolist()), set(other[s].topk(7).indices.tolist())
        assert similarity[i, s].item() == pytest.approx(len(a & b) / len(a | b))


def test_scores_of_any_length_are_column_sums(device):
    """Eq. 1 over a text longer than a block of queries."""
    llm, _ = models(device)
    (text,) = random_prompts(300)
    expected = match.accumulated_scores(matrices(llm, text))
    found = match.head_scores(llm, torch.tensor([text], device=device))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


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
    windows = [seen_window(model, torch.tensor(random_prompts(110))) for model in models()]
    with pytest.raises(ValueError, match="unknown matcher 'dice'; supported: jaccard, cosine"):
        match_windows(*windows, "dice", math.inf)


# ---- Reach ---------------------------------------------------------------------------------------------------------


def test_layers_within_reach_are_counted_one_by_one():
    for layers, slm_layers, reach in itertools.product((1, 4, 7, 28), (1, 3, 7, 24), (1.0, 1.5, 2.0, math.inf)):
        for layer in range(layers):
            near = [n for n in range(slm_layers) if n == 0 or n * layers <= reach * layer * slm_layers or reach > 9]
            assert layers_within(reach, layer, layers, slm_layers) == len(near)


def test_head_maps_beyond_the_reach_are_refused():
    with pytest.raises(ValueError, match="reach 0.5 is below 1"):
        Settings(reach=0.5)
    llm, slm = tiny_decoder(layers=4), tiny_decoder(layers=4)
    head_map = torch.zeros(4, 6, dtype=torch.long)
    head_map[1, 2] = 12  # layer 2
    with pytest.raises(ValueError, match=r"SLM layers \[0, 2, 0, 0\] are not all among the first \[1, 2, 3, 4\]"):
        SmallKV(llm, slm, Settings(reach=1.0), head_map)
    assert SmallKV(llm, slm, Settings(reach=2.0), head_map).needed == [1, 3, 4, 4]


# ---- The window of a sequence --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, chunks", [(100, (7,) * 20), (130, (130,)), (120, (50, 200)), (150, (149, 1, 60))])
def test_a_window_keeps_the_first_tokens(width, chunks):
    """Whatever the chunks; what comes later changes nothing."""
    llm, _ = models()
    query, key = (randn(5, heads, sum(chunks), 16, seed=heads, device="cpu") for heads in (6, 2))
    window, start = Window(llm, width), 0
    for count in chunks:
        assert (window.filled == width) == (start >= width)
        for layer in range(5):
            window.observe(layer, *(x[layer, :, start : start + count][None] for x in (query, key)))
        start += count
    assert torch.equal(window.query, query[:, :, :width]) and torch.equal(window.key, key[:, :, :width])


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


def test_matching_waits_for_100_tokens_and_uses_at_most_200(device):
    """Until then everything is kept; then 20 % of the bytes: 10 % critical and 5 % recent tokens."""
    llm, slm = models(device)
    short, long = random_prompts(97, 230)
    policy = SmallKV(llm, slm, Settings.paper(budget=0.2))
    session = Session(policy, [short, long], 10)
    session.prefill()
    assert policy.maps[0] is None
    assert torch.equal(policy.maps[1].index, match_heads(llm, slm, long[:200], "jaccard").index)
    kept = []
    for token in (5, 6, 7, 8):
        session.step([token, token])
        kept.append((policy.cache.critical_position[:, 0] >= 0).sum(-1).unique().tolist())
    assert kept == [[98], [99], [15], [15]]
    assert torch.equal(policy.maps[0].index, match_heads(llm, slm, short + [5, 6, 7], "jaccard").index)
