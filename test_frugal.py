"""An SLM that costs less: its cache cut by H2O's rule, its first layers alone, and what both take in bytes."""

import itertools

import pytest
import torch

import measures
import overhead
from baselines import H2O
from checkpoint import weight_bytes
from conftest import by_slm, check_ledgers, random_prompts, tiny_decoder
from decode import FullPolicy, Session, generate
from evicting import Budget
from frugal import FrugalCache, kept_tokens
from full_cache import FullCache, ScoredCache
from match import match_heads
from model import Decoder, Span
from smallkv import SmallKV
from speculative import SpeculativeFull, SpeculativeSmallKV
from test_experiments import N, dense, naive_cosine, naive_jaccard

LENGTHS = (150, 97, 200, 101)


@pytest.fixture(scope="module")
def pair():
    return tiny_decoder(), tiny_decoder(heads=4, head_dim=8, seed=1)


def by_position(rows, position):
    """rows (slots, ...) of one layer, sequence and KV head as {token: row}."""
    return {token: rows[slot] for slot, token in enumerate(position.tolist()) if token >= 0}


@pytest.mark.parametrize("share", [0.4, 0.1])
@torch.inference_mode()
def test_the_slm_keeps_what_h2o_would_keep(pair, share, device):
    """Token for token against the H2O baseline run on the SLM, whose K and V show what it attended to."""
    llm, slm = (tiny_decoder(device=device), tiny_decoder(heads=4, head_dim=8, seed=1, device=device))
    prompts = random_prompts(150, 97)
    session = Session(llm, SmallKV(llm, slm, by_slm(slm_budget=share, score_decay=0.5)), prompts, 30)
    h2o = Session(slm, H2O(slm, Budget(share)), prompts, 30)
    session.prefill(), h2o.prefill()
    for step in range(25):
        tokens = [(11 * step + 3) % 97, (7 * step + 5) % 97]
        session.step(tokens), h2o.step(tokens)
        mine, theirs = session.policy.slm_cache, h2o.cache
        for layer, b, g in itertools.product(range(2), range(2), range(2)):
            held = by_position(mine.heavy[layer, b, g], mine.position[layer, b, g])
            expected = by_position(theirs.score[layer][b, g], theirs.position[layer][b, g])
            assert held == expected and len(held) == kept_tokens(share, session.lengths[b])
            for pool, other in ((mine.key, theirs.key), (mine.value, theirs.value)):
                held = by_position(pool[layer, b, g], mine.position[layer, b, g])
                expected = by_position(other[layer][b, g], theirs.position[layer][b, g])
                assert all(torch.equal(held[token], row) for token, row in expected.items())


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
@torch.inference_mode()
def test_a_whole_budget_is_the_scored_cache(pair, decay):
    """Scores and newest rows by position, prefill in chunks and steps: nothing is dropped, so nothing may differ."""
    slm = pair[1]
    (tokens,) = random_prompts(140)
    shape = slm.config, 1, 140, "cpu", torch.float32, decay
    whole, slots = ScoredCache(*shape, keep_row=True), FrugalCache(*shape, keep_row=True, share=1.0)
    for cache in (whole, slots):
        staged = cache.staging(0, 130)
        for start, end in ((0, 50), (50, 129), (129, 130)):
            slm(torch.tensor([tokens[start:end]]), Span.block(start, end, "cpu"), staged, logits="none")
        cache.load(0, staged, 130)
        for i in range(130, 140):
            cache.begin(True)
            slm(torch.tensor([tokens[i : i + 1]]), Span.step([i], "cpu"), cache, logits="none")
    heads = torch.tensor([[5, 0, 7, 7]])
    for name in ("score", "row"):
        one, two = (cache.of_heads(getattr(cache, name), heads, 140) for cache in (whole, slots))
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("budget, slm_budget", [(0.3, 0.4), (0.6, 0.1)])
@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
def test_what_the_slm_has_dropped_ranks_last(pair, decay, budget, slm_budget):
    """Critical sets against a naive ranking: a KV head's sum over its query heads of what they hold, 0 for the rest."""
    llm, slm = pair
    head_map = torch.randint(8, (2, 6), generator=torch.Generator().manual_seed(5))
    settings = by_slm(budget=budget, score_decay=decay, slm_budget=slm_budget, reach=float("inf"))
    session = Session(llm, SmallKV(llm, slm, settings, head_map=head_map), random_prompts(140, 113), 10)
    session.prefill()
    by_nobody = 0  # critical tokens that no matched head has a score for
    for step in range(6):
        session.step([(11 * step + 3) % 97, (7 * step + 5) % 97])
        cache = session.policy.slm_cache
        for layer, b, g in itertools.product(range(2), range(2), range(2)):
            n = session.lengths[b]
            score = torch.zeros(n)
            for head in head_map[layer, 3 * g : 3 * g + 3].tolist():
                theirs, h = divmod(head, 4)
                for token, value in by_position(cache.score[theirs, b, h], cache.position[theirs, b, h // 2]).items():
                    score[token] += value
            size = settings.sizes(n)
            ranked = sorted(range(n), key=lambda j: (j < n - size.recent, -score[j].item(), j))
            kept = {j for j in session.cache.key_position[layer, b, g].tolist() if j >= 0}
            assert kept == set(ranked[: size.critical])
            by_nobody += sum(score[j].item() == 0 for j in kept)
    assert (by_nobody > 0) == (budget == 0.6)


@pytest.mark.parametrize("marginal", [True, False])
@pytest.mark.parametrize("refresh", [1, 3])
def test_a_batch_changes_nothing_and_the_budget_bites(pair, marginal, refresh):
    settings = by_slm(slm_budget=0.3, marginal=marginal, score_decay=0.5, refresh=refresh)
    prompts = random_prompts(*LENGTHS)
    together = generate(pair[0], SmallKV(*pair, settings), prompts, 30)
    assert together == [generate(pair[0], SmallKV(*pair, settings), [prompt], 30)[0] for prompt in prompts]
    whole = by_slm(marginal=marginal, score_decay=0.5, refresh=refresh)
    assert together != generate(pair[0], SmallKV(*pair, whole), prompts, 30)
    full = generate(pair[0], FullPolicy(pair[0]), prompts, 30)
    assert generate(pair[0], SmallKV(*pair, by_slm(budget=1.0, slm_budget=0.1)), prompts, 30) == full


def test_a_frugal_view_of_the_whole_cache_is_the_plain_one():
    llm, slm, (ids,) = tiny_decoder(), tiny_decoder(layers=3, heads=4, head_dim=8, seed=1), random_prompts(N, seed=3)
    chosen = match_heads(llm, slm, ids, "cosine").index.flatten()
    rows, others = dense(llm, ids).sum(1), dense(slm, ids).sum(1)[chosen]
    found = measures.frugal_view(llm, slm, ids, 1.0, 0.2)
    expected = [naive_cosine(one, two) for one, two in zip(rows, others)]
    assert found["similarity"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    named, important = (one.view(2, 2, 3, N).sum(2).topk(24).indices.flatten(0, 1).tolist() for one in (others, rows))
    assert found["jaccard"] == pytest.approx(naive_jaccard(list(map(set, named)), list(map(set, important))), abs=1e-6)
    less = measures.kept_scores(slm, ids, 0.3)
    assert ((less > 0).sum(-1) == 36).all()  # 30 % of 120 tokens, in every head


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda pair, settings: SmallKV(*pair, settings),
    lambda pair, settings: SpeculativeSmallKV(*pair, settings, 3),
    lambda pair, settings: SpeculativeFull(*pair, 3),
], ids=["smallkv", "drafts", "full, drafts"])  # fmt: skip
@pytest.mark.parametrize("settings", [by_slm(slm_budget=0.4), by_slm(slm_budget=0.4, marginal=True), by_slm()],
                         ids=["frugal", "frugal, marginal", "whole"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ledger_is_what_is_allocated(make, settings, dtype, device):
    """Predicted from shapes = measured on the tensors; and no tensor of a cache is missing from it."""
    pair = tiny_decoder().to(device, dtype), tiny_decoder(heads=4, head_dim=8, seed=1).to(device, dtype)
    policy = make(pair, settings)
    check_ledgers(policy, [150, 120], 300)


def test_the_paper_s_best_combination_takes_7_percent():
    """A.3: 40 % of the SLM's cache and 20 of its 24 layers, Qwen2-0.5B beside Qwen2-7B: 1/4.67 x 0.4 x 20/24."""
    llm, slm = overhead.MODELS["Qwen2-7B"], overhead.early(overhead.MODELS["Qwen2-0.5B"], 20)
    with torch.device("meta"):
        models = [Decoder(config).to(torch.bfloat16) for config in (llm, slm)]
    length = 20_000
    ledgers = SmallKV(*models, by_slm(budget=0.2, slm_budget=0.4)).predict([length], length)
    slm_bytes = {entry.what: entry.size for entry in ledgers["SLM"]}
    llm_bytes = {entry.what: entry.size for entry in ledgers["LLM"]}
    full = sum(entry.size for entry in FullCache.predict(llm, 1, length, "meta", torch.bfloat16))
    assert full == 2 * 28 * 4 * 128 * 2 * length
    assert slm_bytes["kept K, V"] == 2 * 20 * 2 * 64 * 2 * 8000  # layers, KV heads, dimensions, bytes, tokens
    assert slm_bytes["kept K, V"] / full == pytest.approx(0.0714, abs=5e-5)
    assert llm_bytes["critical K, V"] / full == pytest.approx(0.2)
    found = overhead.compare(llm, slm, 0.2, [length], slm_budget=0.4)
    assert found["slm_share"] == pytest.approx(slm_bytes["kept K, V"] / full)
    assert slm_bytes["scores"] == 20 * (14 + 2) * 4 * 8000  # of 14 query heads, and H2O's own of 2 KV heads
    with pytest.raises(ValueError, match="25 layers were asked for; 1 to 24 can run"):
        overhead.early(overhead.MODELS["Qwen2-0.5B"], 25)


def test_reductions_change_the_break_even():
    """Fewer layers: fewer weights and a smaller cache; a budget: a smaller cache alone."""
    llm, slm = overhead.MODELS["Qwen2-7B"], overhead.MODELS["Qwen2-0.5B"]
    short = overhead.early(slm, 20)
    weights, saved = weight_bytes(short, torch.bfloat16), 0.8 * 57344 - 0.4 * 20 * 512
    tokens = overhead.compare(llm, short, 0.2, [2304], slm_budget=0.4)["break_even_tokens"]
    assert (tokens - 1) * saved < weights <= tokens * saved
    assert tokens < overhead.compare(llm, short, 0.2, [2304])["break_even_tokens"]
    assert tokens < overhead.compare(llm, slm, 0.2, [2304], slm_budget=0.4)["break_even_tokens"]


# ---- early stop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slm_budget", [1.0, 0.4])
def test_without_drafts_the_slm_computes_no_logits(pair, slm_budget, monkeypatch):
    """From prefill and matching to the last step: neither its output matrix nor the norm before it runs."""
    llm, slm = tiny_decoder(), tiny_decoder(layers=3, heads=4, head_dim=8, seed=1)

    def forbidden(*given):
        raise AssertionError("the SLM computed logits")

    monkeypatch.setattr(slm.lm_head, "forward", forbidden)
    monkeypatch.setattr(slm.norm, "forward", forbidden)
    settings = by_slm(slm_budget=slm_budget)
    answers = generate(llm, SmallKV(llm, slm, settings), random_prompts(150, 97), 10)
    assert [len(answer) for answer in answers] == [10, 10]
    with pytest.raises(AssertionError, match="computed logits"):
        drafting = SpeculativeFull(llm, slm, 2)
        drafting.make_cache([5], 10)
        drafting.draft([3], Span.step([0], "cpu"), 0, words=True)


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_a_budget_out_of_range(share):
    with pytest.raises(ValueError, match=f"SLM budget {share} is outside"):
        by_slm(slm_budget=share)
