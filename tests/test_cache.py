"""The caches by themselves: scores against whole attention matrices, the cut cache against H2O, ledgers against bytes.

What the three tiers hold after every step is in test_smallkv.py; how slots and rows are chosen in test_tiers.py.
"""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ops
from cache import CutCache, FullCache, Prompt, ScoredCache, TieredCache
from conftest import BF16, FP32, HERE, randn, random_prompts, tiny_decoder
from decode import Policy, Session
from match import accumulated_scores, seen_window
from model import Config, Decoder, Span
from naive import Evicting, NaiveSmallKV, h2o
from smallkv import Settings, SmallKV
from test_decode import POLICIES, answers_of, given, made


def slm(device="cpu") -> Decoder:
    return tiny_decoder(heads=4, head_dim=16, seed=1, device=device)


def attention(decoder, text) -> torch.Tensor:
    """Attention matrices of all heads on a text: (L, H, n, n)."""
    tokens = torch.tensor([text], device=decoder.device)
    rows = seen_window(decoder, tokens).rows(slice(None))
    return rows.view(decoder.config.layers, -1, *rows.shape[1:])


def faded(rows, decay) -> torch.Tensor:
    """sum over queries of decay ** age * A[q, j]: (..., n, n) -> (..., n)."""
    age = torch.arange(rows.shape[-1] - 1, -1, -1, device=rows.device)
    return (torch.tensor(decay, device=rows.device) ** age[:, None] * rows).sum(-2)


def fill(decoder, cache, b, text, prompt, chunk, tokens=1):
    """A prompt of so many tokens in chunks, then the rest by steps of `tokens` at once, in a batch of one."""
    ids, device = torch.tensor([text], device=decoder.device), decoder.device
    staged = cache.staging(b, prompt)
    for start in range(0, prompt, chunk):
        end = min(start + chunk, prompt)
        decoder(ids[:, start:end], Span.chunk(start, end, device), staged, logits="scores")
    cache.load(b, staged)
    for at in range(prompt, len(text), tokens):
        length = torch.tensor([at + 1], dtype=torch.int32, device=device)
        for t in range(tokens):
            cache.at = t
            decoder(ids[:, at + t : at + t + 1], Span.step(length + t), cache, logits="scores")
        cache.fold(length)


# ---- Scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [1.0, 0.9, 0.5, 0.0])
@pytest.mark.parametrize("chunk, tokens", [(1024, 1), (50, 5), (10, 2)])
def test_scores_are_the_faded_sum_of_attention_rows(decay, chunk, tokens, device):
    """A prompt in chunks, then steps of one row or of several at once, against whole attention matrices (Eq. 1)."""
    decoder, (text,) = slm(device), random_prompts(140)
    cache = ScoredCache(decoder.config, 1, 150, device, FP32, decay, rows=tokens)
    fill(decoder, cache, 0, text, 130, chunk, tokens)
    rows = attention(decoder, text)
    newest = torch.exp2(cache.logits[-1, :, 0, :, :140] - cache.lse[-1, :, 0, :, None])
    torch.testing.assert_close(newest, rows[:, :, -1], atol=1e-5, rtol=1e-4)
    assert (cache.score is None) == (decay == 0)
    if decay:
        torch.testing.assert_close(cache.score[:, 0, :, :140], faded(rows, decay), atol=1e-5, rtol=1e-4)
        assert not cache.score[..., 140:].any()
    if decay == 1:
        torch.testing.assert_close(cache.score[:, 0, :, :140], accumulated_scores(rows), atol=1e-5, rtol=1e-4)


def test_of_several_rows_as_many_count_as_are_kept():
    """Rows beyond a sequence's own are as if they had never been there."""
    config, kept = slm().config, torch.tensor([0, 2, 4], dtype=torch.int32)
    cache = ScoredCache(config, 3, 20, "cpu", FP32, 0.5, rows=4)
    cache.score.copy_(randn(*cache.score.shape, seed=1, device="cpu").abs())
    cache.logits.copy_(randn(*cache.logits.shape, seed=2, device="cpu"))
    length = torch.tensor([10, 11, 3], dtype=torch.int32)
    expected = cache.score.clone()
    for b, t in itertools.product(range(3), range(4)):
        if t < kept[b]:
            end = length[b] + t
            row = torch.exp2(cache.logits[t, :, b] - cache.lse[t, :, b, :, None])
            expected[:, b, :, :end] = 0.5 * expected[:, b, :, :end] + row[..., :end]
    cache.fold(length, kept)
    torch.testing.assert_close(cache.score, expected)


@pytest.mark.parametrize("chunk", [1024, 64, 7])
def test_a_prompt_leaves_the_sums_that_are_asked_for(chunk, device):
    """Several decays at once; of a small one the early chunks, whose weights vanish, are not summed at all."""
    decoder, (text,) = tiny_decoder(device=device), random_prompts(150)
    prompt = Prompt(decoder.config, 150, device, FP32, 1.0, 0.5)
    fill(decoder, type("Once", (), {"staging": lambda *_: prompt, "load": lambda *_: None})(), 0, text, 150, chunk)
    rows = attention(decoder, text)
    for decay in (1.0, 0.5):
        expected = faded(rows, decay)
        torch.testing.assert_close(prompt.sums[decay][:, 0], expected, atol=1e-5, rtol=1e-4)
        by_kv_head = expected.view(2, 2, 3, 150).sum(2)
        torch.testing.assert_close(prompt.by_kv_head(decay), by_kv_head, atol=1e-5, rtol=1e-4)


# ---- The SLM's cache, cut --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
def test_a_cut_cache_that_keeps_all_is_the_scored_cache(decay, device):
    decoder, (text,), found = slm(device), random_prompts(140), []
    shape = decoder.config, 1, 145, device, FP32, decay
    for cache in (ScoredCache(*shape), CutCache(*shape, 1.0)):
        fill(decoder, cache, 0, text, 130, 50)
        row = torch.exp2(cache.logits - cache.lse[..., None])[..., :140]
        found.append([row] if cache.score is None else [row, cache.score])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("share", [0.4, 0.1, 0.003])
@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
def test_a_cut_cache_keeps_what_h2o_would_keep(share, decay, device):
    """Tokens, K and V, what each has gathered, scores by position, newest rows: against H2O's loop on the SLM."""
    decoder, texts = slm(device), random_prompts(170, 60)
    for text, prompt in zip(texts, (150, 45)):
        cache = CutCache(decoder.config, 1, 175, device, FP32, decay, share)
        naive = Evicting(slm(), text[:prompt], lambda n: max(1, int(share * n + 1e-9)), h2o)
        fill(decoder, cache, 0, text, prompt, 64)
        score = faded(torch.stack(naive.rows), decay)  # (L, H, n)
        for token in text[prompt:]:
            naive.step(token)
            gone = torch.ones(2, 4, naive.length, dtype=torch.bool)
            for (layer, g), held in naive.held.items():
                gone[layer, 2 * g : 2 * g + 2, list(held)] = False
            row = torch.stack(naive.rows)[:, :, -1]
            score = (decay * torch.nn.functional.pad(score, (0, 1)) + row).masked_fill(gone, 0)
        for (layer, g), held in naive.held.items():
            position = cache.position[layer][0, g].tolist()
            slots = {j: slot for slot, j in enumerate(position) if j >= 0}
            assert sorted(slots) == sorted(held) and len(held) == max(1, int(share * len(text) + 1e-9))
            order = [slots[j] for j in held]
            for mine, expected in ((cache.key, naive.key), (cache.value, naive.value)):
                torch.testing.assert_close(
                    mine[layer][0, g, order].cpu(), expected[layer][g, list(held)], atol=1e-5, rtol=1e-4
                )
            gathered = cache.heavy[layer][0, g, order].cpu()
            torch.testing.assert_close(gathered, torch.tensor(list(held.values())), atol=1e-4, rtol=1e-4)
        n, newest = len(text), torch.exp2(cache.logits - cache.lse[..., None])[0, :, 0].cpu()
        torch.testing.assert_close(newest[..., :n], row, atol=1e-5, rtol=1e-4)
        if decay:
            torch.testing.assert_close(cache.score[:, 0, :, :n].cpu(), score, atol=1e-4, rtol=1e-4)


# ---- Three tiers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["cpu", "none"])
def test_prompts_reach_the_offloaded_tier_as_they_were_made(offload, device):
    """Every prompt's K and V, while the next ones are prefilled, are those of the full cache."""
    pair, lengths = (tiny_decoder(device=device), slm(device)), (150, 97, 260, 150, 1)
    policies = SmallKV(*pair, Settings(offload=offload)), Policy(pair[0])
    for policy in policies:
        Session(policy, random_prompts(*lengths), 10, chunk=100).prefill()
    if device == "cuda":
        torch.cuda.synchronize()
    tiers, full = (policy.cache for policy in policies)
    assert tiers.offloaded.is_cuda == (device == "cuda" and offload == "none")
    for b, n in enumerate(lengths):
        for kind, rows in enumerate((full.key, full.value)):
            torch.testing.assert_close(tiers.offloaded[:, b, :, :n, kind].cpu(), rows[:, b, :, :n].cpu())


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_bytes_that_came_are_k_and_v_of_critical_rows_and_v_of_marginal_ones(dtype):
    pair = tiny_decoder().to(dtype), slm().to(dtype)
    policy = SmallKV(*pair, Settings())
    session, moved = Session(policy, random_prompts(150, 120), 5), lambda: policy.cache.moved.sum(0).tolist()
    session.prefill()
    assert moved() == [0, 0]
    session.step([1, 2])  # the first plan brings whole tiers, but for the newest token
    sizes = [Settings().sizes(n) for n in (151, 121)]
    rows = sum(2 * (size.critical - 1) + size.marginal for size in sizes)
    brought = policy.cache.row_bytes(*moved())
    assert brought == 2 * 2 * rows * 16 * dtype.itemsize  # layers, KV heads, head dim
    held = [{"critical": size.critical, "marginal": size.marginal} for size in sizes]
    assert [policy.cache.tokens(b) for b in (0, 1)] == held
    session.step([3, 4])
    assert brought < policy.cache.row_bytes(*moved()) < 2 * brought


def test_the_kernels_give_the_naive_loop(monkeypatch):
    """Steps as on a GPU: scores, plan, movement, attention. The prefill is without: the interpreter is slow."""
    (prompt,), settings, shape = random_prompts(110), Settings(), {"layers": 1, "kv_heads": 2}
    pair = [tiny_decoder(heads=h, seed=seed, device=d, **shape) for d in ("cpu", HERE) for h, seed in ((4, 0), (2, 1))]
    policy, loop = SmallKV(*pair[2:], settings), NaiveSmallKV(*pair[:2], settings, prompt)
    session = Session(policy, [prompt], 3)
    logits, expected = session.prefill(), loop.logits
    monkeypatch.setattr(ops, "FORCE", True if HERE == "cpu" else None)
    for step in range(3):
        torch.testing.assert_close(logits[0].cpu(), expected, atol=1e-4, rtol=1e-4)
        token = expected.argmax().item()
        logits, expected = session.step([token]), loop.step(token)
        for g, table in enumerate(policy.cache.critical_position[0, 0].tolist()):
            assert {j for j in table if j >= 0} == loop.critical[0, g]
    assert policy.cache.moved.sum(0).tolist() == loop.came and len(loop.critical[0, 0]) < 30


# ---- Ledgers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", POLICIES)
def test_a_ledger_is_what_is_allocated(name, dtype, device):
    """Predicted on the meta device = bytes of the tensors, before and after a run; and no tensor is missing from it."""
    llm, assistant, lengths = tiny_decoder(layers=3, device=device).to(dtype), slm(device).to(dtype), [150, 61, 120]
    policy = POLICIES[name](llm, assistant)
    session = made(policy, random_prompts(*lengths), 12)
    predicted = policy.ledgers(lengths, session.capacity)
    for run in (False, True):
        if run:
            answers_of(session, 12)
        assert set(predicted) == set(policy.caches) and ("SLM" in predicted) == (len(policy.models) == 2)
        for model, cache in policy.caches.items():
            assert cache.ledger() == predicted[model]
            tensors = {what: [x for x in (value if isinstance(value, list) else [value]) if torch.is_tensor(x)]
                       for what, value in vars(cache).items()}  # fmt: skip
            counts = sum(x.nbytes for what in ("moved", "kept") for x in tensors.pop(what, ()))  # by layer or by length
            assert counts <= 8 * (session.capacity + 2)
            assert sum(x.nbytes for own in tensors.values() for x in own) == sum(line.size for line in cache.ledger())
            on_host = {line.what for line in cache.ledger() if line.host}
            tiered = isinstance(cache, TieredCache)
            assert on_host == ({"offloaded K, V"} if tiered and cache.offload == "cpu" else set())
            assert not tiered or cache.offloaded.is_cuda == (device == "cuda" and cache.offload == "none")


@pytest.mark.parametrize("name", POLICIES)
def test_asking_for_a_ledger_changes_nothing(name):
    """In the middle of a batch, about another one; and a policy serves one batch after the other."""
    policy, prompts, answers = POLICIES[name](tiny_decoder(), slm()), random_prompts(150, 61), []
    for asks in (False, True):
        answers.append([[], []])
        session = made(policy, prompts, 24, progress=lambda count: asks and policy.ledgers([7, 9, 20], 40))
        for new in given(session, 24):
            answers[-1] = [old + tokens for old, tokens in zip(answers[-1], new)]
            assert not asks or policy.ledgers([7, 9, 20], 40)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("marginal", [True, False])
def test_slots_follow_the_budget_not_the_context(marginal):
    llm = tiny_decoder()
    full = FullCache(llm.config, 1, 2000, "meta", FP32).ledger()[0].size
    for budget in (0.05, 0.1, 0.2, 0.5, 1.0):
        ledger = SmallKV(llm, slm(), Settings(budget=budget, marginal=marginal)).ledgers([1000], 2000)["LLM"]
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
    n, pair = 3000, (tiny_decoder(kv_heads=6), slm())
    for settings in (Settings.paper(), Settings(), Settings(slm_budget=0.2)):
        with Largest() as largest:
            Session(SmallKV(*pair, settings), random_prompts(n), 5, chunk=256).prefill()
        assert 256 * n < largest.numbers < n * n / 1.5  # 6 heads x 256 queries x 3,000 keys, against 9,000,000
