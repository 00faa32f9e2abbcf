"""The loop: what a step may not do, capture, sampling, where answers end, what a batch is made of.

Methods are held against their naive loops in test_smallkv.py, test_baselines.py and test_speculative.py; here it is
asked of all of them that their step or round never reads the device from the host, and that its graph is the step.
"""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import decode
import speculative
from baselines import BASELINES
from cache import ScoredCache, TieredCache
from conftest import BF16, FP32, LENGTHS, pair, randn, random_prompts, tiny_decoder
from decode import Policy, Sampler, Session, Timing, generate, generate_ids
from smallkv import Settings, SmallKV
from speculative import DraftedFull, RoundSession, speculate_ids

SETTINGS = {
    "default": Settings(), "paper": Settings.paper(), "three tiers": Settings(marginal=True),
    "slm alone": Settings(scores="slm", marginal=True), "slm's cache cut": Settings(slm_budget=0.4, marginal=True),
    "slm's cache cut, its scores": Settings(slm_budget=0.4, scores="slm"), "reach 1": Settings(reach=1.0),
    "no shift": Settings(scores="slm", saliency_shift=False, marginal=True),
    "on the device": Settings(offload="none", marginal=True),
}  # fmt: skip
STEPS = {
    "full": lambda llm, slm: Policy(llm),
    **{name: lambda llm, slm, kind=kind: kind(llm, 0.2) for name, kind in BASELINES.items()},
    **{name: lambda llm, slm, how=how: SmallKV(llm, slm, how) for name, how in SETTINGS.items()},
}
ROUNDS = {
    "full, drafts": lambda llm, slm: DraftedFull(llm, slm, 3),
    "smallkv, drafts": lambda llm, slm: SmallKV(llm, slm, Settings(scores="slm", marginal=True), drafts=3),
    "paper, drafts": lambda llm, slm: SmallKV(llm, slm, Settings.paper(marginal=False), drafts=3),
}
POLICIES = {**STEPS, **ROUNDS}
SAMPLED = Sampler(0.8, top_k=20, top_p=0.9, seed=5)
METHODS = [(name, Sampler()) for name in POLICIES] + [(name, SAMPLED) for name in ROUNDS]


def made(policy, prompts, count, sampler=Sampler(), stop=frozenset(), **options) -> Session:
    if getattr(policy, "drafts", 0):
        return RoundSession(policy, prompts, count, sampler, stop, **options)
    return Session(policy, prompts, count, **options)


def given(session, count, sampler=Sampler(), stop=frozenset()):
    """New tokens of every step or round, a list a sequence."""
    if isinstance(session, RoundSession):
        return speculate_ids(session, count, stop)
    return generate_ids(session, sampler, count, stop)


def answers_of(session, count, sampler=Sampler(), stop=frozenset()):
    """All answers, stop tokens among them."""
    answers = [[] for _ in session.prompts]
    for new in given(session, count, sampler, stop):
        for answer, tokens in zip(answers, new):
            answer += tokens
    return answers


def test_full_cache_answers_are_those_of_whole_passes(full_answers, device):
    llm = tiny_decoder(device=device)
    assert generate(Policy(llm), random_prompts(*LENGTHS), 30) == full_answers
    for prompt, answer in zip(random_prompts(*LENGTHS), full_answers):
        logits = llm(torch.tensor([prompt + answer], device=device))[0]
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == answer


# ---- What is captured waits for nothing ------------------------------------------------------------------------------


class NoMasks(TorchDispatchMode):
    """Refuses assignment by a mask: it reads numbers, and the meta device lets it pass."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masked = "index_put" in function.__name__ and any(x is not None and x.dtype == torch.bool for x in args[1])
        assert not masked, f"{function} reads the device from the host"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def no_waiting(on_gpu):
    """From a call of this on, whatever would wait for the device is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name, sampler", METHODS)
@torch.inference_mode()
def test_a_step_runs_where_there_are_no_numbers(name, sampler):
    """On the meta device: every shape is known to the host, no tensor of the step is on the host, no number is read."""
    session = made(POLICIES[name](*pair("meta")), random_prompts(150, 97), 10, sampler, {5})
    with NoMasks():
        session.forward()
        session.forward()


@pytest.mark.parametrize("name, sampler", METHODS)
@torch.inference_mode()
def test_a_step_waits_for_nothing(name, sampler, no_waiting):
    session = made(POLICIES[name](*pair("cuda")), random_prompts(150, 97), 10, sampler, {5}, capture=False)
    session.prefill(), session.forward(), session.forward()
    torch.cuda.synchronize()
    no_waiting()
    session.forward()


@pytest.mark.parametrize("name, sampler", METHODS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_captured_step_makes_the_tokens_of_the_same_step_run_eagerly(name, sampler, dtype, on_gpu):
    llm, slm = (model.to(dtype) for model in pair("cuda"))
    answers = []
    for capture in (False, True):
        session = made(POLICIES[name](llm, slm), random_prompts(*LENGTHS), 24, sampler, capture=capture)
        answers.append(answers_of(session, 24, sampler))
        assert (session.graph is not None) == capture
    assert answers[0] == answers[1]


@pytest.mark.parametrize("late", [(ScoredCache, "decode"), (TieredCache, "place"), (TieredCache, "migrate")])
@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("reach", [1.0, 2.0])
def test_what_comes_late_is_waited_for(late, capture, reach, monkeypatch, on_gpu):
    """The SLM's rows, a plan, rows from the host; enough layers for the LLM to begin before the SLM is done."""
    plain = getattr(*late)

    def slowly(*given, **named):
        torch.cuda._sleep(500_000)  # cycles, a third of a millisecond
        return plain(*given, **named)

    sizes, answers = ({"layers": 6}, {"layers": 4, "heads": 4, "seed": 1}), []
    for device in ("cpu", "cuda"):
        models = [tiny_decoder(device=device, **size) for size in sizes]
        session = Session(SmallKV(*models, Settings(reach=reach)), random_prompts(*LENGTHS), 14, capture=capture)
        answers.append(answers_of(session, 14))
        monkeypatch.setattr(*late, slowly)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("changes", [{}, {"matcher": "jaccard"}, {"slm_budget": 0.5}, {"given": True}], ids=str)
def test_a_prefill_waits_for_nothing(changes, no_waiting):
    """From the first prompt on the host only launches."""

    class Strict(SmallKV):
        def prefill(self, *given):
            no_waiting()
            return super().prefill(*given)

    head_map = torch.zeros(2, 6, dtype=torch.long) if changes.get("given") else None
    settings = Settings(**{name: value for name, value in changes.items() if name != "given"})
    policy = Strict(*pair("cuda"), settings, head_map)
    Session(policy, random_prompts(*LENGTHS), 10, chunk=100).prefill()
    assert [found is None for found in policy.maps] == [False, head_map is None, False]


@pytest.mark.parametrize("slm_budget", [1.0, 0.4])
def test_without_drafts_the_slm_ends_with_its_last_attention(slm_budget, monkeypatch):
    """From prefill and matching to the last step: no last MLP, no last norm, no logits."""
    llm, slm = pair()

    def forbidden(*given):
        raise AssertionError("not asked for")

    block = slm.layers[-1]
    for module in (slm.lm_head, slm.norm, block.mlp, block.post_attention_layernorm, block.self_attn.o_proj):
        monkeypatch.setattr(module, "forward", forbidden)
    policy = SmallKV(llm, slm, Settings(slm_budget=slm_budget, reach=1.0), torch.zeros(2, 6, dtype=torch.long))
    assert [len(answer) for answer in generate(policy, random_prompts(150, 97), 10)] == [10, 10]
    with pytest.raises(AssertionError, match="not asked for"):
        answers_of(made(DraftedFull(llm, slm, 2), random_prompts(5), 5), 5)


# ---- Batches and chunks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("name", POLICIES)
def test_a_prompt_in_chunks_is_the_whole_prompt(name, chunk, device):
    """Tokens of the answers, whatever the method keeps of the prompt; PyramidInfer takes it whole in any case."""
    llm, slm = pair(device)
    whole, pieces = (made(POLICIES[name](llm, slm), random_prompts(*LENGTHS), 8, chunk=n) for n in (None, chunk))
    assert (pieces.chunk, whole.chunk) == (210 if name == "pyramidinfer" else chunk, 210)
    assert answers_of(pieces, 8) == answers_of(whole, 8)


def test_chunks_are_as_many_tokens_as_the_memory_takes():
    """Half of what is free for the activations of one chunk, at least 512 tokens."""
    llm, slm = pair()
    numbers = 6 * 32 + 3 * 48 + 3 * (6 + 2 * 2) * 16
    assert decode.prefill_chunk([llm], 1 << 30) == (1 << 29) // (4 * numbers)
    assert decode.prefill_chunk([llm.to(BF16)], 1 << 30) == (1 << 29) // (2 * numbers)
    assert decode.prefill_chunk([llm], 100) == decode.CHUNK_MIN


def test_progress_counts_the_tokens_of_all_prompts():
    for policy in (Policy(pair()[0]), SmallKV(*pair(), Settings())):
        seen = []
        Session(policy, random_prompts(*LENGTHS), 5, chunk=60, progress=seen.append).prefill()
        assert seen == [60, 60, 30, 60, 37, 60, 60, 60, 30]


def test_what_does_not_fit_is_named():
    llm, slm = tiny_decoder(max_position_embeddings=200), tiny_decoder(max_position_embeddings=160)
    decode.check_positions([llm], [150, 20], 50)
    with pytest.raises(ValueError, match="prompt of 150 tokens plus 51 new ones is 201, longer than the 200 positions"):
        decode.check_positions([llm], [150, 20], 51)
    with pytest.raises(ValueError, match="is 161, longer than the 160 positions"):  # the SLM's count as well
        Session(SmallKV(llm, slm, Settings()), random_prompts(150), 11)
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(ValueError, match="empty prompt"):
            Session(Policy(llm), prompts, 5)
    session = Session(Policy(llm), random_prompts(20, 5), 2)
    session.prefill(), session.step([1, 2]), session.step([3, 4])
    with pytest.raises(ValueError, match="no room for a token more than the capacity of 22 positions"):
        session.step([5, 6])
    odd = SimpleNamespace(device=torch.device("cuda"), config=SimpleNamespace(head_dim=80))
    with pytest.raises(ValueError, match="head_dim 80 does not fit the kernels"):
        decode.check_head_dims([llm, odd])
    decode.check_head_dims([tiny_decoder(head_dim=80)])  # on a CPU


def test_only_tokens_that_both_models_have_are_logits():
    """Checkpoints of one family have embeddings of different sizes; what is beyond the smaller one are padding rows."""
    llm, slm = tiny_decoder(vocab=97), tiny_decoder(vocab=50, seed=1)
    prompts = random_prompts(120, 20, vocab=50)
    for policy in (SmallKV(llm, slm, Settings()), SmallKV(slm, llm, Settings())):
        session = Session(policy, prompts, 3)
        assert session.prefill().shape == session.step([1, 2]).shape == (2, 50)
    for policy in (DraftedFull(llm, slm, 2), DraftedFull(slm, llm, 2)):
        assert max(map(max, answers_of(made(policy, prompts, 12), 12))) < 50


# ---- Where answers end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "default", "full, drafts"])
def test_an_answer_ends_with_its_first_stop_token(name, full_answers, device):
    """The others go on; all stop after as many tokens as were asked for."""
    prompts, make = random_prompts(*LENGTHS), POLICIES[name]
    text = answers_of(made(make(*pair(device)), prompts, 30), 30)
    assert text == full_answers or name == "default"
    for stop in ({text[0][3]}, {text[1][9], text[2][14]}, {text[0][0], text[1][0], text[2][0]}):
        session = made(make(*pair(device)), prompts, 30, stop=stop)
        ends = [min((i for i, token in enumerate(answer) if token in stop), default=29) + 1 for answer in text]
        assert answers_of(session, 30, stop=stop) == [answer[:end] for answer, end in zip(text, ends)]
    assert answers_of(made(make(*pair(device)), prompts, 3), 3) == [answer[:3] for answer in text]
    loop = speculative.generate if name == "full, drafts" else generate
    stop = {text[0][3]}
    short = [answer[: answer.index(text[0][3])] if text[0][3] in answer else answer for answer in text]
    assert loop(make(*pair(device)), prompts, 30, stop) == short  # without the stop token


def test_steps_are_timed():
    timing, session = Timing(), Session(Policy(pair()[0]), random_prompts(30), 5)
    assert timing.first_token is None
    steps = generate_ids(session, Sampler(), 5, timing=timing)
    next(steps)
    assert timing.first_token > 0 and timing.steps == 0
    assert len(list(steps)) == 4 == timing.steps and timing.per_token > 0


# ---- Sampling --------------------------------------------------------------------------------------------------------


def naive_probabilities(logits: list[float], sampler: Sampler) -> list[float]:
    """Softmax at a temperature; of the top_k most likely tokens as few as together have top_p."""
    weights = torch.tensor(logits, dtype=torch.float64).div(sampler.temperature).softmax(-1).tolist()
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    order = order[: sampler.top_k or len(order)]
    mass, kept = sum(weights[i] for i in order), []
    for i in order:
        kept.append(i)
        if sum(weights[j] for j in kept) >= sampler.top_p * mass:
            break
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


@pytest.mark.parametrize("top_k", [0, 1, 5, 400])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_what_is_drawn_from_equals_a_naive_filter(temperature, top_k, top_p, device):
    logits, sampler = 3 * randn(7, 60, device="cpu"), Sampler(temperature, top_k, top_p)
    found = sampler.probabilities(logits.to(device)).cpu()
    torch.testing.assert_close(found, torch.tensor([naive_probabilities(row, sampler) for row in logits.tolist()]))


def test_draws_are_distributed_as_they_should_be():
    """4,000 draws of one row by one generator; 0.04 is five standard deviations. Greedy takes the largest."""
    logits, sampler = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]]), Sampler(1.3, top_k=4)
    generators = sampler.generators(1)
    drawn = torch.tensor([sampler(logits, generators)[0] for _ in range(4000)])
    shares = drawn.bincount(minlength=5) / 4000
    torch.testing.assert_close(shares, sampler.probabilities(logits)[0], atol=0.04, rtol=0)
    assert shares[4] == 0 and Sampler()(torch.cat((logits, logits.flip(-1))), []) == [0, 4]


@pytest.mark.parametrize("name", ["full", "default", "full, drafts", "smallkv, drafts"])
def test_a_prompt_s_answer_depends_on_its_seed_alone(name):
    """Not on its neighbours, and not on the order of the batch."""
    prompts, make = random_prompts(120, 97, 130), POLICIES[name]

    def run(prompts, seed):
        sampler = Sampler(1.0, top_p=0.95, seed=seed)
        return answers_of(made(make(*pair()), prompts, 12, sampler), 12, sampler)

    together = run(prompts, 3)
    assert together == [run([prompt], 3)[0] for prompt in prompts] == run(prompts[::-1], 3)[::-1]
    assert run(prompts, 4) != together == run(prompts, 3)


@pytest.mark.parametrize("change, message", [
    ({"temperature": -1.0}, "temperature -1.0 is not 0"), ({"temperature": 1e-9}, "temperature 1e-09 is not 0"),
    ({"temperature": float("nan")}, "nan is not 0"), ({"top_k": -1}, "top-k -1 is negative"),
    ({"top_p": 0.0}, "top-p 0.0 is outside"), ({"top_p": 1.1}, "top-p 1.1 is outside"),
    ({"seed": -1}, "seed -1 is outside"), ({"seed": 2**63}, "seed 9223372036854775808 is outside"),
])  # fmt: skip
def test_samplers_out_of_range_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**change)


@pytest.mark.parametrize("name", ["full", "default", "slm's cache cut", "smallkv, drafts", *BASELINES])
def test_the_caches_of_a_finished_run_are_given_back(name):
    """At once, not when Python looks for cycles."""
    gc.collect()
    gc.disable()
    try:
        policy = POLICIES[name](*pair())
        (speculative if policy.drafts else decode).generate(policy, random_prompts(120), 6)
        caches = [weakref.ref(cache) for cache in policy.caches.values()]
        del policy
        assert caches and not any(cache() for cache in caches)
    finally:
        gc.enable()
