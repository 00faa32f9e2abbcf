"""The method and its caches, each against an oracle: a naive loop, a full pass, or the same thing done another way."""

import itertools

import pytest
import torch

import kernels
from backend import TRITON
from cache import TieredCache
from conftest import by_slm, check_ledgers, played, random_prompts, tiny_decoder, window_rows
from decode import FullPolicy, Sampler, Session, generate, strip_pads
from full_cache import FullCache, ScoredCache
from match import accumulated_scores
from model import Span
from settings import Settings, TierSizes
from smallkv import SmallKV

# ---- the method, end to end ------------------------------------------------------------------------------------------

LENGTHS = (150, 97, 260, 101)
VARIANTS = {
    "default": Settings(),
    "slm alone": by_slm(),
    "paper": Settings.paper(),
    "newest row": by_slm(score_decay=0.0, marginal=True),
    "jaccard": by_slm(matcher="jaccard"),
    "marginal": by_slm(marginal=True, score_decay=0.5),
    "no shift": by_slm(saliency_shift=False, score_decay=1.0, marginal=True),
    "no shift, decay": by_slm(saliency_shift=False),
    "neither": by_slm(saliency_shift=False, marginal=False),
    "5 %": by_slm(budget=0.05, marginal=True),
    "tokens": by_slm(budget_tokens=40),
    "refresh": by_slm(refresh=3),
    "refresh, marginal": by_slm(marginal=True, score_decay=0.5, refresh=4),
    "split": by_slm(marginal=True, split="1:1:6"),
    "gate": by_slm(marginal=True, gate=0.6),
    "moves": by_slm(max_moves=2),
    "fused, all of it": Settings(score_decay=0.9, marginal=True, gate=0.6, refresh=2),
}


@pytest.fixture(scope="module")
def pair():
    return tiny_decoder(), tiny_decoder(heads=4, head_dim=8, seed=1)


@pytest.fixture(scope="module")
def full_answers(pair):
    return generate(pair[0], FullPolicy(pair[0]), random_prompts(*LENGTHS), 30)


def test_full_cache_equals_one_pass(pair, full_answers):
    for prompt, answer in zip(random_prompts(*LENGTHS), full_answers):
        logits = pair[0](torch.tensor([prompt + answer]))[0]
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == answer


@pytest.mark.parametrize("marginal", [True, False])
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_whole_budget_equals_full_cache(pair, full_answers, decay, marginal):
    policy = SmallKV(*pair, by_slm(budget=1.0, score_decay=decay, marginal=marginal))
    assert generate(pair[0], policy, random_prompts(*LENGTHS), 30) == full_answers


@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_changes_nothing(pair, full_answers, name):
    """Mixed lengths, one below the matching window: the same tokens as each prompt alone, and without prefetch."""
    prompts = random_prompts(*LENGTHS)
    together = generate(pair[0], SmallKV(*pair, VARIANTS[name]), prompts, 30)
    alone = [generate(pair[0], SmallKV(*pair, VARIANTS[name]), [prompt], 30)[0] for prompt in prompts]
    assert together == alone
    late = by_slm(**{**vars(VARIANTS[name]), "prefetch": False})
    assert generate(pair[0], SmallKV(*pair, late), prompts, 30) == together
    assert together != full_answers  # the budget must bite, or this test shows nothing


@pytest.mark.parametrize("prefetch", [True, False])
def test_prefetch_and_device_change_nothing(prefetch, device):
    """On a GPU: the side stream, the host's memory and all, against the same run on the CPU."""
    settings = by_slm(budget=0.2, score_decay=0.5, marginal=True, prefetch=prefetch)
    prompts = random_prompts(*LENGTHS)
    cpu = tiny_decoder(), tiny_decoder(heads=4, head_dim=8, seed=1)
    expected = generate(cpu[0], SmallKV(*cpu, settings), prompts, 20)
    llm, slm = tiny_decoder(device=device), tiny_decoder(heads=4, head_dim=8, seed=1, device=device)
    assert generate(llm, SmallKV(llm, slm, settings), prompts, 20) == expected


def test_left_padded_batches_are_taken_as_tokenizers_make_them():
    padded = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]])
    assert strip_pads(padded, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])) == [[5, 6], [1, 2, 3, 4]]
    with pytest.raises(ValueError, match="padded on the left"):
        strip_pads(padded, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]))


class Covering(Settings):
    """Everything stays: `share` of the tokens critical, the rest marginal."""

    share = 0.5

    def sizes(self, length: int) -> TierSizes:
        critical = max(1, int(self.share * length))
        return TierSizes(critical, 1, length - critical)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("decay", [1.0, 0.0])
def test_own_assistant_and_nothing_evicted_is_full_attention(pair, share, decay, monkeypatch, device):
    """SLM := LLM with the identity map: borrowed probabilities are exact, so Eq. 6 must be, at any split."""
    monkeypatch.setattr(Covering, "share", share)
    llm = tiny_decoder(device=device)
    prompts = random_prompts(120, 110)
    identity = torch.arange(12).view(2, 6)
    full = Session(llm, FullPolicy(llm), prompts, 20)
    split = Session(llm, SmallKV(llm, llm, Covering(score_decay=decay, marginal=True), head_map=identity), prompts, 20)
    expected, logits = full.prefill(), split.prefill()
    for token in range(20):
        expected, logits = full.step([token, token + 1]), split.step([token, token + 1])
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["default", "paper", "newest row", "marginal", "no shift", "refresh",
                                  "refresh, marginal"])  # fmt: skip
def test_tiers_partition_the_positions_and_hold_the_right_bits(pair, name, device):
    """After every step: K pool within V pool, sizes as planned, every slot equal to the full cache's row, bit for bit.

    The full cache here is filled with the very keys and values that the compressed LLM made.
    """
    llm, slm = (model.to(device) for model in pair)
    settings = VARIANTS[name]
    policy = SmallKV(llm, slm, settings)
    session = Session(llm, policy, random_prompts(150, 120), 40)
    session.prefill()
    cache = session.cache
    came_back = False
    seen_out: set[tuple[int, ...]] = set()
    for step in range(30):
        session.step([step % 97, (7 * step) % 97])
        if device == "cuda":
            torch.cuda.synchronize()
        for layer, b, g in itertools.product(range(2), range(2), range(2)):
            keys, values = cache.key_position[layer, b, g].tolist(), cache.value_position[layer, b, g].tolist()
            critical, held = {j for j in keys if j >= 0}, {j for j in values if j >= 0}
            n, since = session.lengths[b], step % settings.refresh
            size = settings.planned(n - since)
            assert critical <= held <= set(range(n))
            assert (len(critical), len(held)) == (size.critical + since, size.critical + since + size.marginal)
            assert set(range(n - settings.sizes(n).recent, n)) <= critical
            for pool, names, host in ((cache.key, keys, cache.host_key), (cache.value, values, cache.host_value)):
                for slot, j in enumerate(names):
                    if 0 <= j < n - 1:  # the newest token's row is on its way to the host
                        assert torch.equal(pool[layer, b, g, slot], host[layer, b, g, j])
            for slot, j in enumerate(keys):
                if j >= 0:
                    assert values[cache.value_slot[layer, b, g, slot]] == j
            came_back |= any((layer, b, g, j) in seen_out for j in critical)
            seen_out |= {(layer, b, g, j) for j in range(n) if j not in held}
    if name != "paper":  # accumulated scores hardly move in 30 steps
        assert came_back == settings.saliency_shift  # without it, what is dropped is gone


def test_host_keeps_what_was_made(pair):
    """The host's K and V after a run are those of a full cache fed by the same tokens, where attention was full."""
    llm, slm = (model.to("cpu") for model in pair)
    prompts = random_prompts(130)
    whole = Session(llm, SmallKV(llm, slm, by_slm(budget=1.0)), prompts, 10)
    full = Session(llm, FullPolicy(llm), prompts, 10)
    whole.prefill(), full.prefill()
    for token in range(8):
        whole.step([token]), full.step([token])
    made = 130 + 7  # the last token goes to the host with the next step
    torch.testing.assert_close(whole.cache.host_key[:, :, :, :made], full.cache.key[:, :, :, :made],
        atol=1e-5, rtol=1e-4)


def test_prompts_reach_the_host_while_others_are_prefilled(device):
    """Copies that begin late, on CUDA, still find every prompt as it was made; and then nothing of it is held."""
    pair = tiny_decoder(device=device), tiny_decoder(heads=4, head_dim=8, seed=1, device=device)
    prompts = random_prompts(150, 97, 260, 150, 130, 260)
    small = Session(pair[0], SmallKV(*pair, by_slm()), prompts, 10, chunk=100)
    full = Session(pair[0], FullPolicy(pair[0]), prompts, 10, chunk=100)
    full.prefill()
    if device == "cuda":
        with torch.cuda.stream(small.cache.stream):
            torch.cuda._sleep(100_000_000)  # tens of ms: longer than all these prefills
    small.prefill()
    small.cache.finish_loading()
    for b, prompt in enumerate(prompts):
        for host, made in ((small.cache.host_key, full.cache.key), (small.cache.host_value, full.cache.value)):
            torch.testing.assert_close(host[:, b, :, : len(prompt)], made[:, b, :, : len(prompt)])
    assert small.cache._copied is None


@pytest.mark.parametrize(
    "changes",
    [{}, {"matcher": "jaccard"}, {"gate": 0.5, "marginal": True}, {"slm_budget": 0.5}, {"given": True}],
)
def test_a_prefill_waits_for_nothing(changes):
    """From the first prompt on the host only launches: whatever would wait for the device is an error."""
    if not torch.cuda.is_available():
        pytest.skip("a CUDA device is needed")

    class Strict(SmallKV):
        def prefill(self, b, *prompt):
            torch.cuda.set_sync_debug_mode("error")
            return super().prefill(b, *prompt)

    pair = tiny_decoder(device="cuda"), tiny_decoder(heads=4, head_dim=16, seed=1, device="cuda")
    changes = dict(changes)
    head_map = torch.zeros(2, 6, dtype=torch.long) if changes.pop("given", False) else None
    policy = Strict(*pair, Settings(**changes), head_map, TRITON.column_sums)
    try:
        Session(pair[0], policy, random_prompts(150, 97, 260), 10, chunk=100).prefill()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [found is None for found in policy.maps] == [False, head_map is None, False]


@pytest.mark.parametrize("decay", [1.0, 0.9, 0.5, 0.0])
@pytest.mark.parametrize("chunk", [1024, 50, 10])
def test_scores_are_the_decayed_sum_of_attention_rows(decay, chunk):
    """Prefill in chunks plus decode steps against full attention matrices: score[j] = sum d^(age of q) A[q, j]."""
    slm = tiny_decoder(heads=4, head_dim=8, seed=1)
    (tokens,) = random_prompts(140)
    cache = ScoredCache(slm.config, 1, 140, "cpu", torch.float32, decay, keep_row=True)
    for start in range(0, 130, chunk):
        end = min(130, start + chunk)
        slm(torch.tensor([tokens[start:end]]), Span.block(start, end, "cpu"), cache.staging(0, 130))
    for i in range(130, 140):
        slm(torch.tensor([tokens[i : i + 1]]), Span.step([i], "cpu"), cache)
    rows = window_rows(slm, torch.tensor([tokens]))  # (L * H, 140, 140)
    weight = torch.tensor([decay ** (139 - q) for q in range(140)])
    expected = (weight[:, None] * rows).sum(1)
    torch.testing.assert_close(cache.score.flatten(0, 2), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cache.row.flatten(0, 2), rows[:, -1], atol=1e-5, rtol=1e-4)
    if decay == 1.0:
        torch.testing.assert_close(cache.score.flatten(0, 2), accumulated_scores(rows), atol=1e-5, rtol=1e-4)


def test_without_saliency_shift_the_ranking_is_the_llms_own(pair):
    """The LLM's own scores against a naive loop that replays its weights: prefill rows, then what each step saw."""
    llm, slm = (model.to("cpu") for model in pair)
    (prompt,) = random_prompts(120)
    policy = SmallKV(llm, slm, by_slm(budget=0.2, marginal=False, saliency_shift=False, score_decay=1.0))
    session = Session(llm, policy, [prompt], 20)
    session.prefill()
    rows = window_rows(llm, torch.tensor([prompt])).view(2, 2, 3, 120, 120)
    expected = rows.sum((2, 3))  # summed over queries and the three heads of a KV head
    torch.testing.assert_close(session.cache.score[:, 0, :, :120], expected, atol=1e-4, rtol=1e-4)
    session.step([3])
    gained = session.cache.score[:, 0, :, :121].sum(-1) - expected.sum(-1)
    torch.testing.assert_close(gained, torch.full((2, 2), 3.0), atol=1e-3, rtol=0)  # each head hands out one unit
    top = expected.topk(24 - 6 + 0).indices  # 20 % of 121 is 24 tokens, 6 of them recent
    for layer, g in itertools.product(range(2), range(2)):
        kept = {j for j in session.cache.key_position[layer, 0, g].tolist() if 0 <= j < 115}
        assert kept == {j for j in top[layer, g].tolist() if j < 115} | kept and len(kept) == 18


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
def test_plan_ranks_by_the_matched_heads_and_sums_a_group(pair, decay):
    """Critical tokens of every layer, KV head and step against a naive top-k of sum_h sum_q d^age A_f(h)[q, j]."""
    llm, slm = tiny_decoder(), tiny_decoder(heads=4, head_dim=8, seed=1)
    head_map = torch.randint(8, (2, 6), generator=torch.Generator().manual_seed(5))
    settings = by_slm(budget=0.2, score_decay=decay, marginal=True, reach=float("inf"))
    prompts = random_prompts(140, 113)
    session = Session(llm, SmallKV(llm, slm, settings, head_map=head_map), prompts, 10)
    session.prefill()
    for step, b, fed in played(session, prompts, 5):
        n = len(fed)
        rows = window_rows(slm, torch.tensor([fed]))  # (8, n, n)
        weight = torch.tensor([decay ** (n - 1 - q) for q in range(n)])
        scores = (weight[:, None] * rows).sum(1)[head_map].view(2, 2, 3, n).sum(2)  # (L, G, n)
        size = settings.sizes(n)
        scores[..., n - size.recent :] = torch.inf
        for layer, g in itertools.product(range(2), range(2)):
            expected = set(scores[layer, g].topk(size.critical).indices.tolist())
            kept = {j for j in session.cache.key_position[layer, b, g].tolist() if j >= 0}
            assert kept == expected, (step, b, layer, g)


@pytest.mark.parametrize("budget", [0.2, 0.6, 0.7])
def test_without_saliency_shift_what_is_dropped_is_gone(budget):
    llm, slm = tiny_decoder(), tiny_decoder(heads=4, head_dim=8, seed=1)
    settings = by_slm(budget=budget, saliency_shift=False, marginal=True)
    session = Session(llm, SmallKV(llm, slm, settings), random_prompts(150), 30)
    session.prefill()
    gone = torch.zeros(2, 2, 180, dtype=torch.bool)
    for step in range(25):
        session.step([step])
        n = session.lengths[0]
        position = session.cache.value_position[:, 0].long()  # (L, G, N)
        held = torch.zeros(2, 2, 181, dtype=torch.bool)
        held.scatter_(-1, position.where(position >= 0, 180), True)
        assert not (held[..., :180] & gone).any()
        gone[..., :n] |= ~held[..., :n]
    assert gone.any()


def test_fp16_survives_large_products():
    """q . k above 65,504 before the scale: the softmax must not see infinities."""
    query, key = torch.full((1, 1, 1, 64), 40.0).half(), torch.full((1, 1, 3, 64), 40.0).half()
    value = torch.ones(1, 1, 3, 64).half()
    used, slots = torch.ones(1, 1, 3, dtype=torch.bool), torch.arange(3).view(1, 1, 3)
    for out in (
        kernels.full_attention_step(query, key, value, torch.tensor([2]))[0],
        kernels.tiered_attention(query, key, value, used, slots, torch.zeros(1, 1, 3))[0],
        kernels.attention_rows(query, key, 2) @ value.float(),
    ):
        torch.testing.assert_close(out.float(), torch.ones(1, 1, 1, 64), atol=1e-3, rtol=0)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "slm alone", "marginal", "no shift"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ledger_is_what_is_allocated(pair, name, dtype, device):
    """Predicted from shapes = measured on the tensors, line by line; and no cache tensor is missing from it."""
    llm, slm = tiny_decoder().to(device, dtype), tiny_decoder(heads=4, head_dim=8, seed=1).to(device, dtype)
    policy = SmallKV(llm, slm, VARIANTS[name])
    check_ledgers(policy, [150, 120], 300)
    full = FullPolicy(llm)
    assert full.make_cache([150, 120], 300).ledger() == full.predict([150, 120], 300)["LLM"]


def test_slots_follow_the_budget_not_the_context():
    llm, slm = tiny_decoder(), tiny_decoder(heads=4, head_dim=8, seed=1)
    full = FullCache.predict(llm.config, 1, 2000, "cpu", torch.float32)[0].size
    for budget in (0.05, 0.1, 0.2, 0.5):
        cache = SmallKV(llm, slm, by_slm(budget=budget, marginal=True)).make_cache([1000], 2000)
        assert isinstance(cache, TieredCache)
        one_row = 2 * 2 * 16 * 4  # in each layer and KV head: two lengths may round in favour of different tiers
        assert cache.key.nbytes + cache.value.nbytes <= budget * full + one_row


def test_no_tensor_as_large_as_the_prompt_squared(monkeypatch):
    """Prefill of both models, scores of every kind: the largest tensor ever made stays far below n x n."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if torch.is_tensor(tensor):
                    self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
            return result

    def mask(queries, keys):  # what the bias object turns into on a CPU; the mode below cannot see the object itself
        return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)

    monkeypatch.setattr("torch.nn.attention.bias.causal_lower_right", mask)
    llm, slm = tiny_decoder(kv_heads=6), tiny_decoder(heads=4, head_dim=8, seed=1)
    n = 3000
    for settings in (by_slm(score_decay=1.0), by_slm(saliency_shift=False, score_decay=1.0)):
        with Largest() as largest:
            Session(llm, SmallKV(llm, slm, settings), random_prompts(n), 5, chunk=256).prefill()
        assert 256 * n < largest.elements < n * n / 1.5  # 6 heads x 256 queries x 3,000 keys, against 9,000,000


# ---- sampling --------------------------------------------------------------------------------------------------------


def test_sampler_keeps_the_right_tokens():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    assert Sampler(1.0).probabilities(logits).tolist() == pytest.approx([0.5, 0.25, 0.15, 0.1])
    assert Sampler(1.0, top_k=2).probabilities(logits).tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert Sampler(1.0, top_p=0.6).probabilities(logits).tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert Sampler(1.0, top_p=0.1).probabilities(logits).tolist() == pytest.approx([1, 0, 0, 0])
    assert Sampler(0.5).probabilities(logits)[0].item() == pytest.approx(0.25 / (0.25 + 0.0625 + 0.0225 + 0.01))
    assert Sampler()(logits[None], []) == [0]


def test_sampling_depends_on_the_seed_alone(pair):
    prompts = random_prompts(120, 130)
    policy = SmallKV(*pair, by_slm())
    first = generate(pair[0], policy, prompts, 20, sampler=Sampler(1.0, seed=3))
    assert generate(pair[0], policy, prompts[1:], 20, sampler=Sampler(1.0, seed=3)) == first[1:]
    assert generate(pair[0], policy, prompts, 20, sampler=Sampler(1.0, seed=4)) != first
