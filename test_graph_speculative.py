"""The static round against the eager one (speculative.py): tokens, caches, stop tokens; captured on a GPU."""

import pytest
import torch

from backend import TORCH, TRITON
from conftest import by_slm, random_prompts
from decode import Sampler
from generate import Pair, make_session
from graph_speculative import StaticSpeculativeSession
from settings import Settings
from speculative import SpeculativeFull, SpeculativeSession, SpeculativeSmallKV, speculate_ids
from test_graph import check_tiers
from test_kernels import HERE, cases
from test_speculative import near_pair

LENGTHS = (150, 97, 260)  # one prompt passes the matching window on its way
METHODS = {
    "full": None,
    "default": by_slm(),
    "paper": Settings.paper(),
    "marginal": by_slm(marginal=True, score_decay=0.5),
    "late": by_slm(score_decay=0.9),
    "moves": by_slm(max_moves=1),
}
SAMPLED = Sampler(0.8, top_k=20, top_p=0.9, seed=5)


def policy_of(name, pair, drafts):
    return SpeculativeFull(*pair, drafts) if name == "full" else SpeculativeSmallKV(*pair, METHODS[name], drafts)


def sessions(name, drafts, prompts, count, device, backend, **shape):
    """An eager session on the CPU and a static one on `device`."""
    eager, static = near_pair(**shape), near_pair(device, **shape)
    return (
        SpeculativeSession(eager[0], policy_of(name, eager, drafts), prompts, count),
        StaticSpeculativeSession(backend, static[0], policy_of(name, static, drafts), prompts, count),
    )


def answers_of(session, count, sampler=Sampler(), stop=frozenset()):
    answers = [[] for _ in session.prompts]
    for new in speculate_ids(session, sampler, count, stop):
        for answer, tokens in zip(answers, new):
            answer += tokens
    return answers


def check_same(name, eager, static):
    """What the report counts, too."""
    assert static.lengths == eager.lengths and static.counts == eager.counts and static.begun == eager.begun
    if name != "full":
        assert static.policy.tokens == eager.policy.tokens and static.policy.lengths == eager.policy.lengths
        for count in ("keys_moved", "values_moved", "steps") + ("filled",) * (eager.cache.steps > 1):
            assert getattr(static.cache, count) == getattr(eager.cache, count), count
        assert static.cache.tokens(0) == eager.cache.tokens(0)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("drafts, sampler", [(1, Sampler()), (3, Sampler()), (4, SAMPLED)], ids=["1", "3", "4 sampled"])
def test_static_rounds_make_the_tokens_of_the_eager_ones(name, drafts, sampler, device):
    """A batch whose sequences accept as many as they do; on a GPU captured after two rounds."""
    backend = TORCH if device == "cpu" else TRITON
    eager, static = sessions(name, drafts, random_prompts(*LENGTHS), 24, device, backend)
    expected = answers_of(eager, 24, sampler)
    assert answers_of(static, 24, sampler) == expected
    assert 0 < eager.counts.accepted < eager.counts.drafted
    check_same(name, eager, static)


@pytest.mark.parametrize("name", cases("full", "marginal", gpu=["default", "moves"]))
def test_static_rounds_with_triton(name):
    """Head dim 32; one layer and two rounds on a CPU: the interpreter is slow."""
    count, layers = (12, 2) if HERE == "cuda" else (4, 1)
    eager, static = sessions(name, 1, random_prompts(107, 31), count, HERE, TRITON, head_dim=32, layers=layers)
    assert answers_of(static, count) == answers_of(eager, count)
    check_same(name, eager, static)


def test_an_answer_ends_at_a_stop_token_inside_a_draft(device):
    backend = TORCH if device == "cpu" else TRITON
    prompts = random_prompts(*LENGTHS)
    text = answers_of(sessions("default", 4, prompts, 24, device, backend)[0], 24)
    for stop in ({text[0][3]}, {text[1][9], text[2][14]}):
        eager, static = sessions("default", 4, prompts, 24, device, backend)
        expected = answers_of(eager, 24, stop=stop)
        assert answers_of(static, 24, stop=stop) == expected != text
        check_same("default", eager, static)


@pytest.mark.parametrize("name", METHODS)
@torch.inference_mode()
def test_after_every_round_the_caches_are_those_of_the_eager_session(name, device):
    """Scores, K and V, slots and host; sequences that take fewer drafts than the others, none, or have ended."""
    backend = TORCH if device == "cpu" else TRITON
    pair = sessions(name, 3, random_prompts(*LENGTHS), 40, device, backend)
    newest = [session.prefill().argmax(-1).tolist() for session in pair][0]
    for allowed in ([3, 3, 3], [3, 1, 3], [0, 3, 2], [3, None, 3], [1, None, 0], [3, None, 3], [3, None, 3]):
        answers = [session.round(newest, allowed, Sampler(), Sampler().generators(3)) for session in pair]
        assert answers[0] == answers[1]
        newest = [new[-1] if new else token for new, token in zip(answers[0], newest)]
        eager, static = pair
        check_same(name, eager, static)
        if name != "full":
            if device == "cuda":
                torch.cuda.synchronize()
            for table in ("key_position", "value_position"):
                assert torch.equal(getattr(static.cache, table).cpu(), getattr(eager.cache, table))
            check_tiers(static.static.side)
            held = eager.cache.key_position >= 0
            if METHODS[name].marginal:
                assert torch.equal(static.cache.value_slot.cpu()[held], eager.cache.value_slot[held])
            for table in ("key", "value"):
                where = getattr(eager.cache, f"{table}_position") >= 0
                close(getattr(static.cache, table).cpu()[where], getattr(eager.cache, table)[where])
        for b, n in enumerate(eager.lengths):
            for table in ("key", "value"):
                close(*(getattr(session.policy.slm_cache, table)[:, b, :, :n] for session in pair))
                host = table if name == "full" else f"host_{table}"
                close(*(getattr(session.cache, host)[:, b, :, :n] for session in pair))
        if name != "full":
            close(*(session.policy.slm_cache.score for session in pair))


def close(one, other):
    torch.testing.assert_close(one.cpu(), other.cpu(), atol=1e-5, rtol=1e-4)


def test_a_batch_changes_nothing(device):
    prompts, backend = random_prompts(*LENGTHS), TORCH if device == "cpu" else TRITON
    for sampler in (Sampler(), SAMPLED):
        together = answers_of(sessions("default", 3, prompts, 12, device, backend)[1], 12, sampler)
        for prompt, answer in zip(prompts, together):
            assert answers_of(sessions("default", 3, [prompt], 12, device, backend)[1], 12, sampler) == [answer]


@pytest.mark.parametrize("name", ["full", "default", "marginal"])
@pytest.mark.parametrize("sampler", [Sampler(), SAMPLED], ids=["greedy", "sampled"])
def test_captured_rounds_make_the_tokens_of_the_same_rounds_run_eagerly(name, sampler):
    if not torch.cuda.is_available():
        pytest.skip("a capture needs a GPU")
    prompts, answers = random_prompts(*LENGTHS), []
    for capture in (False, True):
        pair = [model.to(torch.bfloat16) for model in near_pair("cuda", head_dim=32)]
        session = StaticSpeculativeSession(TRITON, pair[0], policy_of(name, pair, 3), prompts, 40)
        given = iter(speculate_ids(session, sampler, 40))
        next(given), next(given)
        session.static.warm = 2 if capture else -1
        answers.append(list(given))
        assert (session.static.graph is not None) == capture
    assert answers[0] == answers[1]


def test_a_round_keeps_its_sampler_and_its_stop_tokens():
    _, session = sessions("full", 2, random_prompts(20), 10, "cpu", TORCH)
    newest = session.prefill().argmax(-1).tolist()
    generators = Sampler().generators(1)
    session.round(newest, [2], Sampler(), generators, {5})
    for sampler, stop in ((Sampler(0.5), {5}), (Sampler(), {6})):
        with pytest.raises(ValueError, match="cannot change its sampler or stop tokens"):
            session.round(newest, [2], sampler, generators, stop)


def test_the_command_takes_static_rounds_where_there_are_any():
    """By backend, head dim and settings; nothing is run."""
    for name, settings, head_dim, backend, static in (
        ("full", None, 32, TRITON, True), ("full", None, 16, TRITON, False), ("full", None, 32, TORCH, False),
        ("smallkv", Settings.paper(), 64, TRITON, True), ("smallkv", by_slm(slm_budget=0.5), 64, TRITON, False),
        ("smallkv", by_slm(marginal=True, gate=0.5), 64, TRITON, False),
    ):  # fmt: skip
        pair = near_pair(head_dim=head_dim)
        policy = SpeculativeFull(*pair, 2) if name == "full" else SpeculativeSmallKV(*pair, settings, 2)
        session = make_session(Pair(*pair, None), policy, random_prompts(30), 10, backend, None)
        assert type(session) is (StaticSpeculativeSession if static else SpeculativeSession)
    cut = SpeculativeSmallKV(*pair, by_slm(slm_budget=0.5), 2)
    session = StaticSpeculativeSession(TORCH, pair[0], cut, random_prompts(30), 10)
    with pytest.raises(ValueError, match="no graph of drafts with 0.5 of the SLM's cache"):
        session.round([1], [2], Sampler(), Sampler().generators(1))
