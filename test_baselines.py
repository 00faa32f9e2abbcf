"""Every baseline against a naive loop that keeps lists of positions and multiplies plain matrices."""

import itertools
import math

import pytest
import torch

from baselines import BASELINES, H2O, Oracle, PyramidInfer, SnapKV
from conftest import random_prompts, tiny_decoder, window_rows
from decode import FullPolicy, Session, generate, strip_pads
from evicting import Budget
from full_cache import FullCache
from naive_baselines import NAIVE, Naive, naive_h2o, naive_snapkv, top
from pyramid import answer_shares, contexts, cosine, solve_pyramid
from settings import Settings
from smallkv import SmallKV

LENGTHS, STEPS = (150, 61, 9), 45
BUDGETS = (0.05, 0.2, 0.5, 1.0)


def fed_tokens(batch, steps):
    return random_prompts(*[steps] * batch, seed=7)


def held_positions(cache, layer, b, g):
    return sorted(j for j in cache.position[layer][b, g].tolist() if j >= 0)


def compare(llm, policy, naive, lengths, steps, budget):
    """Logits of every step, and the positions in the slots, of a batch against the naive loop of each sequence."""
    prompts, fed = random_prompts(*lengths), fed_tokens(len(lengths), steps)
    cpu = tiny_decoder(layers=llm.config.layers)
    expected = [naive(cpu, prompt, tokens, budget) for prompt, tokens in zip(prompts, fed)]
    session = Session(llm, policy, prompts, steps + 1)
    logits = [session.prefill().cpu()]
    for i in range(steps):
        logits.append(session.step([tokens[i] for tokens in fed]).cpu())
        if isinstance(session.cache, FullCache):
            continue
        for b, (_, held) in enumerate(expected):
            for (layer, g), positions in held[i].items():
                assert held_positions(session.cache, layer, b, g) == positions, (i, b, layer, g)
    for b, (rows, _) in enumerate(expected):
        mine = torch.stack([row[b] for row in logits])
        torch.testing.assert_close(mine, torch.stack(rows), atol=2e-4, rtol=1e-3)


# ---- Equalities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(90,), (70, 40, 9)], ids=["one", "batch"])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("name", BASELINES)
@torch.inference_mode()
def test_equals_a_naive_loop(name, share, lengths, device):
    """Prompts of different lengths beside each other: spare slots stay NaN (conftest.py) and must not be seen."""
    llm = tiny_decoder(layers=3, device=device)
    budget = Budget(share)
    compare(llm, BASELINES[name](llm, budget), NAIVE[name], lengths, 40, budget)


@pytest.mark.parametrize("name", BASELINES)
def test_the_whole_budget_is_the_full_cache(name, device):
    """Tokens of free-running answers and logits of given ones, in a batch of different lengths."""
    llm = tiny_decoder(layers=3, device=device)
    prompts = random_prompts(150, 61, 9)
    assert generate(llm, BASELINES[name](llm, Budget(1.0)), prompts, 60) == generate(llm, FullPolicy(llm), prompts, 60)
    full, all_kept = (
        Session(llm, policy, prompts, 60) for policy in (FullPolicy(llm), BASELINES[name](llm, Budget(1.0)))
    )
    torch.testing.assert_close(all_kept.prefill(), full.prefill(), atol=1e-5, rtol=1e-5)
    for i in range(50):
        torch.testing.assert_close(
            all_kept.step([i, 2 * i % 97, 5]), full.step([i, 2 * i % 97, 5]), atol=5e-5, rtol=1e-4
        )


@pytest.mark.parametrize("share", [0.05, 0.3])
@pytest.mark.parametrize("name", BASELINES)
def test_a_batch_is_its_sequences(name, share, device):
    """Left-padded as tokenizers make it, beside other lengths, in chunks: the tokens of each prompt alone."""
    llm = tiny_decoder(layers=3, device=device)
    prompts = random_prompts(120, 71, 12, 1)
    padded = torch.tensor([[96] * (120 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (120 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    alone = [generate(llm, BASELINES[name](llm, Budget(share)), [prompt], 40)[0] for prompt in prompts]
    assert generate(llm, BASELINES[name](llm, Budget(share)), strip_pads(padded, mask), 40) == alone
    session = Session(llm, BASELINES[name](llm, Budget(share)), prompts, 40, chunk=17)
    logits = session.prefill()
    for i in range(39):
        tokens = [answer[i] for answer in alone]
        assert logits.argmax(-1).tolist() == tokens
        logits = session.step(tokens)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 1)])
@pytest.mark.parametrize("name", BASELINES)
@torch.inference_mode()
def test_head_groupings(name, heads, kv_heads):
    """One query head a KV head, and all heads on one."""
    llm, prompt, fed = tiny_decoder(heads=heads, kv_heads=kv_heads), *random_prompts(50, 20)
    budget = Budget(0.3)
    expected, _ = NAIVE[name](llm, prompt, fed, budget)
    session = Session(llm, BASELINES[name](llm, budget), [prompt], 21)
    logits = [session.prefill()] + [session.step([token]) for token in fed]
    torch.testing.assert_close(torch.cat(logits), torch.stack(expected), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("budget", [Budget(tokens=12), Budget(0.2, of_prompt=True)], ids=["tokens", "of prompt"])
@pytest.mark.parametrize("name", ["h2o", "streaming", "snapkv"])
@torch.inference_mode()
def test_fixed_budgets(name, budget, device):
    """Absolute tokens, and H2O's own base, which does not grow with the answer."""
    llm = tiny_decoder(layers=3, device=device)
    compare(llm, BASELINES[name](llm, budget), NAIVE[name], (70, 9), 25, budget)
    if name == "h2o":
        held = Session(llm, H2O(llm, budget), random_prompts(70), 26)
        held.prefill()
        for i in range(25):
            held.step([i])
        assert held.cache.tokens(0) == budget.kept(95, 70) == held.cache.key[0].shape[2]


@torch.inference_mode()
def test_h2o_as_published_keeps_the_same(device):
    llm, budget = tiny_decoder(layers=3, device=device), Budget(0.2)
    compare(llm, H2O(llm, budget, eager=True), naive_h2o, (90, 40), 20, budget)


@torch.inference_mode()
def test_snapkv_average_pooling(device):
    llm, budget = tiny_decoder(layers=3, device=device), Budget(0.3)

    def naive(llm, prompt, fed, budget):
        return naive_snapkv(llm, prompt, fed, budget, "avg")

    compare(llm, SnapKV(llm, budget, pooling="avg"), naive, (90, 40), 20, budget)


def test_snapkv_keeps_its_whole_window_of_32():
    llm = tiny_decoder()
    session = Session(llm, SnapKV(llm, Budget(0.5)), random_prompts(150), 2)
    session.prefill()
    for layer, g in itertools.product(range(2), range(2)):
        held = held_positions(session.cache, layer, 0, g)
        assert held[-32:] == list(range(118, 150)) and len(held) == 75
    assert SnapKV(llm, Budget(0.2)).observed(150) == 15


# ---- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BASELINES)
def test_ledger_is_what_is_allocated(name, dtype, share, device):
    """Predicted from shapes = measured on the tensors, before and after a run; and no tensor is missing from it."""
    llm = tiny_decoder(layers=3).to(device, dtype)
    policy, prompts = BASELINES[name](llm, Budget(share)), random_prompts(150, 61, 9)
    session = Session(llm, policy, prompts, 30)
    predicted = policy.predict([150, 61, 9], 180)["LLM"]

    def check():
        values = vars(session.cache).values()
        tensors = [tensor for value in values for tensor in (value if isinstance(value, list) else [value])]
        assert session.cache.ledger() == predicted
        assert sum(t.nbytes for t in tensors if torch.is_tensor(t)) == sum(entry.size for entry in predicted)

    check()
    session.prefill()
    for i in range(29):
        session.step([i, i, i])
    check()


@pytest.mark.parametrize("name", ["h2o", "streaming", "window"])
def test_the_pool_is_the_budget(name):
    """K and V of the evicting methods take the budget's share of the full cache, and every slot of it is in use."""
    llm = tiny_decoder(layers=3)
    session = Session(llm, BASELINES[name](llm, Budget(0.2)), random_prompts(150), 50)
    full = FullCache.predict(llm.config, 1, 200, "cpu", torch.float32)[0].size
    assert session.cache.ledger()[0].size == 0.2 * full
    session.prefill()
    for i in range(50):
        session.step([i])
    assert session.cache.tokens(0) == 40


def test_oracle_says_that_it_keeps_everything():
    llm = tiny_decoder()
    full = FullPolicy(llm).predict([100], 120)
    assert Oracle(llm, Budget(0.05)).predict([100], 120) == full


# ---- PyramidInfer's lengths ------------------------------------------------------------------------------------------


def test_shipped_schedule_keeps_what_the_published_code_keeps():
    """kv-systems.md, 3b: p = 0.9, 32 layers, recent ratio 0.2: 76 % on average, layer 16 81 %, the last 37 to 38 %."""
    n = 2048
    recent = int(0.2 * n) + 1
    stored = [context + recent for context in contexts("cosine", 0.9, 32, n - recent)[:-1]]
    assert sum(stored) / 32 / n == pytest.approx(0.76, abs=0.005)
    assert stored[16] / n == pytest.approx(0.81, abs=0.005)
    assert 0.37 <= stored[-1] / n <= 0.38
    assert [cosine(layer, 4, 0.1) for layer in (0, 2)] == pytest.approx([1.0, 0.55])


@pytest.mark.parametrize("layers", [1, 2, 28, 80])
@pytest.mark.parametrize("length", [1, 9, 100, 512, 2048])
@pytest.mark.parametrize("percent", [1, 5, 10, 20, 30, 50, 76, 90, 100])
def test_layer_budgets_have_the_mean_that_was_asked(percent, length, layers):
    kept = Budget(percent / 100).kept(length)
    entering, recent, cut = solve_pyramid(length, kept, layers)
    stored = [context + recent for context in (entering[1:] if cut else entering[:-1])]
    assert entering[0] + recent == length and len(stored) == layers
    assert stored == sorted(stored, reverse=True) and stored[-1] >= 1
    floor = layers * (recent + min(1, length - recent))  # no layer holds less, whatever is asked
    assert sum(stored) <= max(layers * kept, floor)
    assert sum(stored) >= 0.9 * layers * kept - layers
    if percent == 100:
        assert stored == [length] * layers


def test_answer_shares_have_the_mean_that_was_asked():
    assert answer_shares(1.0, 28) == [16] * 28
    for share in (0.1, 0.2, 0.5, 0.8):
        kept = answer_shares(share, 28)
        assert kept == sorted(kept, reverse=True)
        assert share * 16 - 1 <= sum(kept) / 28 <= share * 16 + 0.5
    shipped = [max(1, int(16 * 0.9 * cosine(layer, 28, 0.1))) for layer in range(28)]
    mean = 0.9 * sum(cosine(layer, 28, 0.1) for layer in range(28)) / 28
    assert answer_shares(mean, 28) == shipped


def test_pyramid_refuses_a_prompt_in_pieces():
    llm = tiny_decoder()
    policy = PyramidInfer(llm, Budget(0.2))
    policy.whole_prompt = False
    with pytest.raises(ValueError, match="cannot be prefilled in chunks"):
        Session(llm, policy, random_prompts(60), 2, chunk=20).prefill()


# ---- Bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_named():
    llm = tiny_decoder()
    for share in (0.0, 1.1, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"budget {share} is outside"):
            Budget(share)
    with pytest.raises(ValueError, match="budget of 0 tokens is too small"):
        Budget(tokens=0)
    with pytest.raises(ValueError, match="unknown pooling 'min'; supported: max, avg"):
        SnapKV(llm, Budget(0.2), pooling="min")


# ---- Fused scores -------------------------------------------------------------------------------------------


def naive_fused(llm, slm, prompt, fed, settings, head_map):
    """Critical tokens of every step: the LLM's own weights on what it held, the SLM's rows on the rest."""
    naive, d, held = Naive(llm), settings.score_decay, {}
    heads = list(itertools.product(range(llm.config.layers), range(llm.config.kv_heads)))
    naive.prompt(prompt)
    memory, history = {head: {j: 0.0 for j in range(len(prompt))} for head in heads}, []
    for layer, g in heads:
        for query, row in enumerate(naive.rows[layer]):
            for j, weights in row[g].items():
                memory[layer, g][j] += d ** (len(prompt) - 1 - query) * weights.sum().item()
    for i, token in enumerate(fed):
        n = len(prompt) + i + 1
        size = settings.planned(n)
        rows = window_rows(slm, torch.tensor([prompt + fed[: i + 1]]))[:, -1][head_map]  # (L, H, n)
        rows = rows.view(*head_map.shape, n).unflatten(1, (llm.config.kv_heads, -1)).sum(2)
        before, held = held, {}
        for layer, g in heads:
            row, past = rows[layer, g].tolist(), memory[layer, g]
            past[n - 1] = 0.0
            score = {j: math.inf if j >= n - size.recent else d * past[j] + row[j] for j in range(n)}
            held[layer, g] = before[layer, g] + [n - 1] if i % settings.refresh else top(score, size.critical)
        naive.token(token, lambda layer, g, n: held[layer, g])
        for layer, g in heads:
            for j in range(n):
                own = naive.rows[layer][-1][g].get(j)
                gained = rows[layer, g, j].item() if own is None else own.sum().item()
                memory[layer, g][j] = d * memory[layer, g][j] + gained
        history.append(held)
    return history


@pytest.mark.parametrize("decay, refresh", [(1.0, 1), (0.5, 1), (0.5, 3)])
@torch.inference_mode()
def test_fused_equals_a_naive_loop(decay, refresh, device):
    head_map = torch.randint(8, (2, 6), generator=torch.Generator().manual_seed(5))
    settings = Settings(budget=0.2, score_decay=decay, scores="fused", refresh=refresh, reach=float("inf"))
    prompts, fed = random_prompts(110, 101), fed_tokens(2, 15)
    models = tiny_decoder(), tiny_decoder(heads=4, head_dim=8, seed=1)
    expected = [naive_fused(*models, *each, settings, head_map) for each in zip(prompts, fed)]
    models = tiny_decoder(device=device), tiny_decoder(heads=4, head_dim=8, seed=1, device=device)
    session = Session(models[0], SmallKV(*models, settings, head_map=head_map), prompts, 16)
    session.prefill()
    for i in range(15):
        session.step([tokens[i] for tokens in fed])
        for b, history in enumerate(expected):
            for (layer, g), positions in history[i].items():
                held = session.cache.key_position[layer, b, g].tolist()
                assert sorted(j for j in held if j >= 0) == positions, (i, b, layer, g)


def test_fused_without_memory_is_smallkv():
    llm, slm = tiny_decoder(), tiny_decoder(heads=4, head_dim=8, seed=1)
    one, other = (Settings(budget=0.1, score_decay=0.0, scores=scores) for scores in ("slm", "fused"))
    prompts = random_prompts(140, 110)
    assert generate(llm, SmallKV(llm, slm, one), prompts, 30) == generate(llm, SmallKV(llm, slm, other), prompts, 30)
