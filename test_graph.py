"""The static step against the eager path (decode.Session): the same tokens, with either backend, captured on a GPU."""

import math
from functools import partial

import pytest
import torch

from backend import TORCH, TRITON
from conftest import random_prompts, tiny_decoder
from decode import FullPolicy, Sampler, Session, generate, generate_ids
from graph import StaticSession, Step
from graph_sides import ScoredSide, plan_groups
from kernels_scores import CRITICAL
from settings import Settings
from smallkv import SmallKV

SETTINGS = {
    "default": Settings(),
    "newest row": Settings(scores="slm", score_decay=0.0),
    "newest row, refresh": Settings(scores="slm", score_decay=0.0, refresh=3),
    "newest row, moves, refresh": Settings(scores="slm", score_decay=0.0, max_moves=2, refresh=3),
    "paper": Settings.paper(),
    "marginal": Settings(marginal=True, score_decay=0.5),
    "all of it": Settings(budget=1.0, marginal=True),
    "split": Settings(marginal=True, split="1:1:6"),
    "moves": Settings(max_moves=1),
    "moves, refresh": Settings(max_moves=1, refresh=3),
    "sums, moves": Settings(score_decay=1.0, max_moves=2),
    "marginal, refresh": Settings(score_decay=0.9, marginal=True, refresh=3),
}
LENGTHS = (130, 63, 97, 157)  # two of them meet the matching window, one while it decodes


def generate_static(session, max_new_tokens, backend):
    """Answers (B lists of tokens) of a new session by the static step, captured on CUDA; no token stops them."""
    step = Step(session, session.prefill().argmax(-1), backend)
    made = [step.tokens.tolist()]
    for number in range(max_new_tokens - 1):
        if number == step.warm and session.llm.device.type == "cuda":
            step.capture()
        step.run()
        made.append(step.tokens.tolist())
    return [list(answer) for answer in zip(*made)]


def decoders(device, head_dim=16, **changes):
    llm = tiny_decoder(head_dim=head_dim, device=device, **changes)
    return llm, tiny_decoder(heads=4, head_dim=head_dim, seed=1, device=device, **changes)


@pytest.mark.parametrize("name", SETTINGS)
def test_static_step_makes_the_tokens_of_the_eager_path(name, device):
    """On a GPU the static step is captured, and the eager path runs on the CPU: fp32 on both."""
    prompts = random_prompts(*LENGTHS)
    cpu = decoders("cpu")
    expected = generate(cpu[0], SmallKV(*cpu, SETTINGS[name]), prompts, 14)
    pair = decoders(device)
    session = Session(pair[0], SmallKV(*pair, SETTINGS[name]), prompts, 14)
    assert generate_static(session, 14, TORCH if device == "cpu" else TRITON) == expected


@pytest.mark.parametrize("name, backend", [
    ("default", "torch"), ("sums, moves", "torch"), ("moves, refresh", "torch"), ("marginal, refresh", "torch"),
    ("default", "triton"), ("moves, refresh", "triton"), ("marginal, refresh", "triton"),
])  # fmt: skip
def test_fused_scores_have_the_memory_of_the_eager_path(name, backend, device):
    """After every step: the same tokens in the tiers, the same memory of all of them, and the SLM's newest row."""
    triton = backend == "triton"
    if triton and device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU there")
    prompts, new = (random_prompts(120, 97), 6) if triton else (random_prompts(*LENGTHS), 12)
    sessions = []
    for where in ("cpu", device):
        pair = decoders(where, head_dim=32 if triton else 16)
        policy = SmallKV(*pair, SETTINGS[name], sums=(TRITON if triton and where != "cpu" else TORCH).column_sums)
        sessions.append(Session(pair[0], policy, prompts, new))
    eager, session = sessions
    tokens = eager.prefill().argmax(-1).tolist()
    step = Step(session, session.prefill().argmax(-1), TRITON if triton or device == "cuda" else TORCH)
    for number in range(new - 1):
        assert step.tokens.tolist() == tokens
        if number == step.warm and device == "cuda":
            step.capture()
        step.run()
        tokens = eager.step(tokens).argmax(-1).tolist()
        torch.testing.assert_close(session.cache.score.cpu(), eager.cache.score, atol=1e-5, rtol=1e-4)
        check_tiers(step.side)
        for table in ("key_position", "value_position"):
            held, expected = (getattr(one.cache, table).cpu().sort(-1).values for one in (session, eager))
            assert torch.equal(held, expected)
        row, lse = session.policy.slm_cache.score.cpu(), step.scored.lse
        assert (lse is None) == SETTINGS[name].marginal  # logits, where nobody borrows them
        if lse is not None:
            row = torch.exp2(row - lse.cpu()[..., None])
        for b, n in enumerate(session.lengths):
            pair = (table[:, b, :, :n] for table in (row, eager.policy.slm_cache.score))
            torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-4)
    assert (eager.cache.score.amin(-1) == 0).any() and (eager.cache.score.amax(-1) > 0.1).all()


def check_tiers(side):
    """Critical in the tiers are the tokens in K slots, all of them and nobody else: the next plan relies on it."""
    position = side.cache.key_position
    tier = side.tier.gather(-1, position.long().clamp(min=0))
    assert (tier[position >= 0] == CRITICAL).all()
    assert torch.equal((side.tier == CRITICAL).sum(-1), (position >= 0).sum(-1))


@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
@pytest.mark.parametrize("reach", [1.0, 2.0, math.inf])
def test_the_slm_runs_beside_the_llm(reach, late, device, monkeypatch):
    """More layers than two, so that the LLM begins before the SLM is through; on a GPU with rows that come late too."""
    if late and device == "cpu":
        pytest.skip("nothing is late on one thread")
    sizes = {"layers": 6}, {"layers": 4, "heads": 4, "seed": 1}
    attend = ScoredSide.attend

    def attend_late(*call):
        torch.cuda._sleep(500_000)  # cycles, a third of a millisecond
        return attend(*call)

    if late:
        monkeypatch.setattr(ScoredSide, "attend", attend_late)
    prompts, settings = random_prompts(*LENGTHS), Settings(reach=reach)
    cpu = [tiny_decoder(**size) for size in sizes]
    expected = generate(cpu[0], SmallKV(*cpu, settings), prompts, 14)
    pair = [tiny_decoder(device=device, **size) for size in sizes]
    session = Session(pair[0], SmallKV(*pair, settings), prompts, 14)
    assert generate_static(session, 14, TORCH if device == "cpu" else TRITON) == expected


@pytest.mark.parametrize("name", ["default", "marginal", "newest row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ledger_of_the_static_step_is_as_predicted(name, dtype, device):
    """A 16-bit SLM's logits take as many bits, and are its rows all the same; attention that is lent stays fp32."""
    pair = [model.to(dtype) for model in decoders(device)]
    session = Session(pair[0], SmallKV(*pair, SETTINGS[name]), random_prompts(150, 120), 8)
    step = Step(session, session.prefill().argmax(-1), TORCH)
    cache, logits = session.policy.slm_cache, name != "marginal"
    predicted = session.policy.predict([150, 120], 158, static=True)
    assert (cache.ledger(), session.cache.ledger()) == (predicted["SLM"], predicted["LLM"])
    if name != "newest row":
        assert session.cache.score.dtype == (torch.float32 if dtype == torch.float32 else torch.bfloat16)
    held = [value for value in vars(cache).values() if torch.is_tensor(value)]
    assert sum(tensor.nbytes for tensor in held) == sum(entry.size for entry in cache.ledger())
    assert cache.score.dtype == (torch.float16 if logits and dtype == torch.bfloat16 else torch.float32)
    step.run()
    if logits:  # the first step has an anchor of its own
        assert step.scored.lse.abs().max() < 1e-5 and step.scored.anchor.abs().max() > 0.1
    step.run()
    if logits:
        row = torch.exp2(cache.score - step.scored.lse[..., None])
        for b, n in enumerate(session.lengths):
            torch.testing.assert_close(row[:, b, :, :n].sum(-1), torch.ones_like(row[:, b, :, 0]), atol=4e-3, rtol=0)


def test_plans_share_a_launch_where_they_need_the_same_layers():
    assert plan_groups([1, 2, 2, 2, 3, 3, 3, 3, 3], 2) == [slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 6),
                                                           slice(6, 8), slice(8, 9)]  # fmt: skip
    assert plan_groups([4] * 5, 8) == [slice(0, 5)]


@pytest.mark.parametrize("name", ["full", "default", "marginal"])
def test_static_session_is_a_session(name, device):
    """The same sampled tokens and the same counts for the report."""
    prompts, sampler = random_prompts(*LENGTHS), Sampler(temperature=0.7, seed=3)
    sessions = []
    for where, kind in (("cpu", Session), (device, partial(StaticSession, TORCH if device == "cpu" else TRITON))):
        pair = decoders(where)
        policy = FullPolicy(pair[0]) if name == "full" else SmallKV(*pair, SETTINGS[name])
        session = kind(pair[0], policy, prompts, 12)
        sessions.append((session, list(generate_ids(session, sampler, 12))))
    (plain, expected), (static, made) = sessions
    assert made == expected and static.lengths == plain.lengths
    if name != "full":
        for count in ("keys_moved", "values_moved", "steps", "filled"):
            assert getattr(static.cache, count) == getattr(plain.cache, count)
        assert static.cache.tokens(0) == plain.cache.tokens(0)


@pytest.mark.parametrize("name", ["default", "marginal"])
def test_static_step_with_triton(name):
    """Head dim 32, a pair of KV heads with three query heads each; few steps: the interpreter is slow."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompts, new = random_prompts(120, 97), 6 if device == "cuda" else 4
    cpu = decoders("cpu", head_dim=32)
    expected = generate(cpu[0], SmallKV(*cpu, SETTINGS[name]), prompts, new)
    pair = decoders(device, head_dim=32)
    assert generate_static(Session(pair[0], SmallKV(*pair, SETTINGS[name]), prompts, new), new, TRITON) == expected


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_static_full_cache_makes_the_tokens_of_the_eager_path(model_type, device):
    prompts = random_prompts(70, 33, 5)
    cpu = tiny_decoder(model_type=model_type)
    expected = generate(cpu, FullPolicy(cpu), prompts, 8)
    llm = tiny_decoder(model_type=model_type, device=device)
    llm.load_state_dict(cpu.state_dict())  # the biases, which tiny_decoder leaves as they come
    session = Session(llm, FullPolicy(llm), prompts, 8)
    assert generate_static(session, 8, TORCH if device == "cpu" else TRITON) == expected


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_a_prefill_with_triton_leaves_the_same_scores(decay):
    """Chunks of a prefill through the column-sum kernel, against the same through its twin."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scores = []
    for backend in (TORCH, TRITON):
        pair = decoders(device, head_dim=32)
        policy = SmallKV(*pair, Settings(score_decay=decay), sums=backend.column_sums)
        Session(pair[0], policy, random_prompts(130), 4, chunk=80).prefill()
        scores.append(policy.slm_cache.score)
    torch.testing.assert_close(*scores, atol=1e-5, rtol=1e-4)


def test_captured_step_makes_the_tokens_of_the_same_step_run_eagerly():
    if not torch.cuda.is_available():
        pytest.skip("a capture needs a GPU")
    prompts = random_prompts(*LENGTHS)
    answers = []
    for capture in (False, True):
        pair = [model.to(torch.bfloat16) for model in decoders("cuda", head_dim=32)]
        session = Session(pair[0], SmallKV(*pair, SETTINGS["marginal"]), prompts, 24)
        step = Step(session, session.prefill().argmax(-1), TRITON)
        made = []
        for number in range(23):
            if capture and number == 2:
                step.capture()
            step.run()
            made.append(step.tokens.tolist())
        answers.append(made)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("moves", [1, 3, 1000])
def test_moves_are_limited_and_the_rest_is_as_before(moves, device):
    """At most `moves` rows a KV head and step after the first; with room for all, the tokens of the unlimited step."""
    prompts = random_prompts(150, 120)
    backend = TORCH if device == "cpu" else TRITON
    made = {}
    for limit in (None, moves):
        pair = decoders(device)
        session = Session(pair[0], SmallKV(*pair, Settings(max_moves=limit)), prompts, 12)
        step = Step(session, session.prefill().argmax(-1), backend)
        made[limit], before = [], 0
        for number in range(10):
            step.run()
            moved, before = step.side.moved[0].item() - before, step.side.moved[0].item()
            if number and limit is not None:
                assert moved <= limit * 2 * 2 * 2  # layers, sequences, KV heads
            made[limit].append(step.tokens.tolist())
        assert before > 0
    assert moves < 1000 or made[None] == made[moves]


def test_gumbel_noise_samples_and_no_noise_is_greedy(device):
    """The token is the largest of logits / temperature + noise; with zero noise the greedy one."""
    prompts = random_prompts(40, 20)
    llm = tiny_decoder(device=device)
    session = Session(llm, FullPolicy(llm), prompts, 8)
    step = Step(session, session.prefill().argmax(-1), TORCH if device == "cpu" else TRITON, temperature=0.7)
    for number in range(4):
        if number % 2:
            step.noise.exponential_(generator=torch.Generator(device).manual_seed(number)).log_().neg_()
        else:
            step.noise.zero_()
        step.run()
        expected = (step.logits.float() / 0.7 + step.noise).argmax(-1).tolist()
        assert step.tokens.tolist() == expected
        if number % 2 == 0:
            assert expected == Sampler()(step.logits, [])


def test_the_same_weights_serve_both_paths(device):
    """Joining the weights changes nothing for the eager path, and holds nothing twice."""
    llm = tiny_decoder(device=device)
    tokens = torch.tensor(random_prompts(20), device=device)
    before = llm(tokens)
    session = Session(llm, FullPolicy(llm), random_prompts(20), 4)
    step = Step(session, session.prefill().argmax(-1), TORCH)
    assert torch.equal(llm(tokens), before)
    for layer, (weight, _) in zip(llm.layers, step.llm.qkv):
        assert layer.self_attn.k_proj.weight.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("backend, marginal, scores", [
    ("torch", False, "fused"), ("torch", True, "fused"), ("triton", True, "fused"), ("triton", False, "slm"),
])  # fmt: skip
def test_a_plan_every_third_step_makes_the_tokens_of_the_eager_path(marginal, backend, scores, device):
    """And in between nobody leaves, nothing comes from the host, and the newest token is held."""
    triton = backend == "triton"
    if triton and device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU there")
    prompts, new = (random_prompts(120, 97), 6) if triton else (random_prompts(*LENGTHS), 14)
    settings = Settings(marginal=marginal, scores=scores, score_decay=0.5, refresh=3)
    size = 32 if triton else 16
    cpu = decoders("cpu", head_dim=size)
    expected = generate(cpu[0], SmallKV(*cpu, settings), prompts, new)
    pair = decoders(device, head_dim=size)
    session = Session(pair[0], SmallKV(*pair, settings), prompts, new)
    step = Step(session, session.prefill().argmax(-1), TRITON if triton or device == "cuda" else TORCH)
    made, held, moved = [step.tokens.tolist()], None, None
    for number in range(new - 1):
        if number == step.warm and device == "cuda":
            step.capture()
        step.run()
        made.append(step.tokens.tolist())
        positions = step.side.cache.key_position.flatten(0, 2).tolist()
        held, before = [set(line) - {-1} for line in positions], held
        check_tiers(step.side)
        moved, moved_before = step.side.moved.tolist(), moved
        if number % 3:
            came = [now - old for now, old in zip(held, before)]
            newest = [length - 1 for length in session.lengths]
            assert [len(tokens) for tokens in came] == [1] * len(came)
            assert set().union(*came) == set(newest) and all(old < now for now, old in zip(held, before))
            assert moved == moved_before
    assert [list(answer) for answer in zip(*made)] == expected
