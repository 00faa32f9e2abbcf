"""The static step with a cut SLM cache (`--slm-budget`): kernels against twins, steps against the eager ones."""

import itertools
from functools import partial

import pytest
import torch

import kernels_frugal
from backend import TORCH, TRITON
from conftest import random_prompts
from decode import Sampler, Session, Timing, generate, generate_ids
from frugal import kept_tokens
from generate import has_static_step
from graph import StaticSession, Step
from report import make_report
from settings import Settings
from smallkv import SmallKV
from test_graph import LENGTHS, decoders, generate_static
from test_kernels import FINE, HERE, close, floats, kinds, randn

SETTINGS = {
    "default": Settings(slm_budget=0.4),
    "decay 1": Settings(slm_budget=0.1, score_decay=1.0),
    "marginal": Settings(slm_budget=0.4, marginal=True),
    "paper": Settings.paper(slm_budget=0.4),
    "refresh": Settings(slm_budget=0.4, score_decay=0.5, refresh=3),
    "refresh, marginal": Settings(slm_budget=0.3, score_decay=0.5, refresh=3, marginal=True),
    "moves": Settings(slm_budget=0.4, max_moves=1),
}


def slots_case(slots, held, group, capacity, heads=2, seed=0, layers=None):
    """position (B, G, N) with `held` random tokens in random slots, heavy 0 elsewhere, score 0 for what is not held."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layers or 1, 2, heads)
    position = torch.full((*shape, slots), -1, dtype=torch.int32)
    heavy, score = torch.zeros(*shape, slots), torch.zeros(*shape, group, capacity)
    for line in itertools.product(*map(range, shape)):
        where = torch.randperm(slots, generator=generator)[:held]
        position[line][where] = torch.randperm(capacity - 1, generator=generator)[:held].int()
        heavy[line][where] = torch.rand(held, generator=generator)
        score[line][:, position[line][where].long()] = torch.rand(group, held, generator=generator)
    score = score.flatten(2, 3)
    return [tensor.to(HERE) if layers else tensor[0].to(HERE) for tensor in (position, heavy, score)]


# ---- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots, held, group", [(1, 1, 1), (7, 4, 3), (63, 63, 7), (111, 60, 1), (600, 599, 3)])
def test_slot_attention_equals_its_twin(slots, held, group):
    """K and V of free slots are NaN, and so are the scores of positions that nobody holds: they stay as they are."""
    for dtype, head_dim in kinds(HERE, 32, 64, 128):
        decay, with_row = {32: (0.0, False), 64: (0.5, True), 128: (1.0, True)}[head_dim]
        position, heavy, score = slots_case(slots, held, group, slots + 9)
        B, G, N = position.shape
        free = (position < 0)[..., None]
        query = 2 * randn(B, G * group, head_dim, dtype=dtype, device=HERE)
        shape = B, G, N, head_dim
        pools = [randn(*shape, seed=n, dtype=dtype, device=HERE).masked_fill(free, torch.nan) for n in (1, 2)]
        score = score.where(score > 0, torch.nan) if decay else torch.full_like(score, torch.nan)
        (gathered, scores), (other, others) = [(heavy.clone(), score.clone()) for _ in range(2)]
        row, rows = [torch.full_like(score, 7.0) if with_row else None for _ in range(2)]
        expected = kernels_frugal.slot_attention_torch(*floats(query, *pools), position, gathered, scores, decay, row)
        out = kernels_frugal.slot_attention_triton(query, *pools, position, other, others, decay, rows)
        close(out, expected, dtype)
        for mine, theirs in ((other, gathered), (others, scores)) + ((rows, row),) * with_row:
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=FINE, equal_nan=True)
        torch.testing.assert_close((gathered - heavy).sum(-1), torch.full((B, G), float(group), device=HERE))


@pytest.mark.parametrize("leaving", [0, 1, 5, None])
@pytest.mark.parametrize("slots, group", [(1, 1), (7, 3), (63, 7), (111, 1), (2500, 3)])
def test_make_room_equals_its_twin(slots, group, leaving):
    """Equal weights among them: of these the last slot leaves. None: a step without a plan."""
    capacity, held = slots + 20, slots - 1 if leaving is None else slots
    if slots == 1 and leaving is None:
        held = 0
    position, heavy, score = slots_case(slots, held, group, capacity, seed=slots, layers=3)
    heavy = (4 * heavy).round()  # ties
    stay = max(1, held + 1 - (leaving or 0))  # the newest among them
    if leaving == 0:  # a slot must be free
        position[..., 0], heavy[..., 0], stay = -1, 0, held
    length = torch.tensor([capacity, capacity - 3], dtype=torch.int32, device=HERE)
    position[:, 1].masked_fill_(position[:, 1] >= capacity - 4, -1)  # nobody is newer than the newest
    kept = None if leaving is None else torch.full((capacity + 1,), stay, dtype=torch.int32, device=HERE)
    results = []
    for function in (kernels_frugal.make_room_torch, kernels_frugal.make_room_triton):
        tables = [tensor.clone() for tensor in (position, heavy, score, 2 * score)]
        slot = torch.full(position.shape[:3], -7, dtype=torch.int32, device=HERE)
        row = tables[3] if group > 1 else None
        function(*tables[:3], row, length, kept, slot)
        results.append((*tables, slot))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results))
    after, _, scores, _, slot = results[0]
    assert torch.equal(after.gather(-1, slot[..., None].long())[..., 0], (length - 1)[:, None].expand_as(slot))
    if leaving is not None:
        assert ((after >= 0).sum(-1) <= stay).all() and ((after >= 0).sum(-1)[:, 0] == stay).all()
        gone = (position >= 0).sum(-1) + 1 - (after >= 0).sum(-1)
        assert gone.max() == min(leaving, held)
        assert torch.equal(((score != scores).sum(-1) > 0).unflatten(2, (2, -1)).any(-1), gone > 0)


# ---- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_static_step_makes_the_tokens_of_the_eager_path(name, device):
    """On a GPU the static step is captured, and the eager path runs on the CPU: fp32 on both."""
    prompts, settings = random_prompts(*LENGTHS), SETTINGS[name]
    cpu = decoders("cpu")
    expected = generate(cpu[0], SmallKV(*cpu, settings), prompts, 14)
    pair = decoders(device)
    session = Session(pair[0], SmallKV(*pair, settings), prompts, 14)
    assert generate_static(session, 14, TORCH if device == "cpu" else TRITON) == expected


@pytest.mark.parametrize("name", SETTINGS)
@torch.inference_mode()
def test_static_step_keeps_and_scores_what_the_eager_path_does(name):
    """Slot for slot, over a dozen steps: positions, K, V, what was gathered; scores and rows of heads by position."""
    prompts, settings, sessions = random_prompts(*LENGTHS), SETTINGS[name], []
    for _ in range(2):
        pair = decoders("cpu")
        sessions.append(Session(pair[0], SmallKV(*pair, settings), prompts, 14))
    plain, static = sessions
    tokens, step = plain.prefill().argmax(-1), Step(static, static.prefill().argmax(-1), TORCH)
    heads = torch.arange(8).expand(len(prompts), -1)
    for _ in range(12):
        tokens = plain.step(tokens.tolist()).argmax(-1)
        step.run()
        mine, theirs = static.policy.slm_cache, plain.policy.slm_cache
        assert torch.equal(mine.position, theirs.position) and torch.equal(step.tokens, tokens)
        assert [mine.tokens(b) for b in range(4)] == [theirs.tokens(b) for b in range(4)]
        held = (mine.position >= 0)[..., None]
        for pool in ("key", "value"):
            torch.testing.assert_close(getattr(mine, pool).where(held, 0), getattr(theirs, pool).where(held, 0))
        torch.testing.assert_close(mine.heavy, theirs.heavy)
        for table in ("score", "row") if settings.marginal else ("score",):
            end = max(static.lengths)
            found, expected = (cache.of_heads(getattr(cache, table), heads, end) for cache in (mine, theirs))
            torch.testing.assert_close(found, expected)
            assert torch.equal(found == 0, expected == 0)


@pytest.mark.parametrize("name", ["default", "refresh, marginal"])
def test_static_session_is_a_session(name, device):
    """What generate.py runs and reports: the same sampled tokens, tiers and rows moved; bytes as foretold."""
    prompts, sampler, settings = random_prompts(*LENGTHS), Sampler(temperature=0.7, seed=3), SETTINGS[name]
    sessions = []
    for where, kind in (("cpu", Session), (device, partial(StaticSession, TORCH if device == "cpu" else TRITON))):
        pair = decoders(where, head_dim=32)
        assert has_static_step(SmallKV(*pair, settings), TRITON)
        session = kind(pair[0], SmallKV(*pair, settings), prompts, 12)
        sessions.append((session, list(generate_ids(session, sampler, 12))))
    (plain, expected), (static, made) = sessions
    assert made == expected
    reports = [make_report(session, Timing()) for session in (plain, static)]
    assert all(reports[0][what] == reports[1][what] for what in ("tokens", "moved"))
    foretold = static.policy.predict(list(LENGTHS), static.capacity, static=True)["SLM"]
    held = [entry for entry in reports[1]["ledger"] if entry["model"] == "SLM"]
    assert [(entry["what"], entry["bytes"]) for entry in held] == [(entry.what, entry.size) for entry in foretold]


@pytest.mark.parametrize("name", ["default", "refresh, marginal"])
def test_static_step_with_triton(name):
    """Head dim 32, a pair of KV heads with two query heads each; few steps: the interpreter is slow."""
    settings, prompts, new = SETTINGS[name], random_prompts(120, 97), 6 if HERE == "cuda" else 5
    cpu = decoders("cpu", head_dim=32)
    expected = generate(cpu[0], SmallKV(*cpu, settings), prompts, new)
    pair = decoders(HERE, head_dim=32)
    assert generate_static(Session(pair[0], SmallKV(*pair, settings), prompts, new), new, TRITON) == expected


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "refresh, marginal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ledger_of_the_static_step_is_what_is_allocated(name, dtype, device):
    """The cache's by prediction and on its tensors; what the side holds beside it, on the side."""
    settings, prompts = SETTINGS[name], random_prompts(150, 120)
    pair = [model.to(dtype) for model in decoders(device)]
    session = Session(pair[0], SmallKV(*pair, settings), prompts, 8)
    step = Step(session, session.prefill().argmax(-1), TORCH)
    cache, side = session.policy.slm_cache, step.scored
    assert cache.ledger() == session.policy.predict([150, 120], 158, static=True)["SLM"]
    held = [value for value in vars(cache).values() if torch.is_tensor(value)]
    assert sum(tensor.nbytes for tensor in held) == sum(entry.size for entry in cache.ledger())
    known = {tensor.data_ptr() for tensor in (*held, *side.tensors(), step.length)}
    assert {value.data_ptr() for value in vars(side).values() if torch.is_tensor(value)} <= known
    assert cache.key.shape[3] == kept_tokens(settings.slm_budget, 158) + settings.refresh - 1
    assert cache.score.shape == (2, 2, 4, 158)
