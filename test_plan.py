"""The kernels of the plan and of the slots against their PyTorch twins: as test_kernels.py, equal to the last token."""

import itertools
from functools import partial

import pytest
import torch

import kernels_move
import kernels_plan
import kernels_scores
import kernels_tiers
from settings import TierSizes
from smallkv import plan_tiers
from test_kernels import HERE, cases, randn


@pytest.fixture
def device():
    return HERE


@pytest.fixture
def rank(monkeypatch):
    """rank(long, ...) runs the kernel; with `long`, as if the row were too long for registers."""

    def run(long, *args, **options):
        monkeypatch.setattr(kernels_plan, "ROW", 0 if long else 32768)
        kernels_plan.plan_layers_triton(*args, **options)

    return run


def dyadic(*shape, seed, device):
    """Multiples of 2^-10 below 1: sums and halves of them are exact in any order."""
    return (torch.randint(1 << 10, shape, generator=torch.Generator().manual_seed(seed)) / 1024).to(device)


# ---- the plan --------------------------------------------------------------------------------------------------------


def plan_case(device, lengths, group, marginal, ties):
    """Scores of 2 SLM layers x 3 heads with NaN beyond each length, heads of 2 LLM layers, sizes of a fifth or one."""
    B, S = len(lengths), max(lengths) + 3
    length = torch.tensor(lengths, dtype=torch.int32, device=device)
    steps = 4 if ties else 1 << 16  # multiples of a power of two: sums are exact in any order
    score = torch.randint(steps, (2, B, 3, S), generator=torch.Generator().manual_seed(0)) / steps
    late = torch.arange(S) >= torch.tensor(lengths)[:, None]
    score = score.masked_fill(late[None, :, None], torch.nan).to(device)
    index = torch.randint(6, (B, 2, 2 * group), generator=torch.Generator().manual_seed(1)).to(device)
    # The twin sorts, and torch sorts NaN first: it gets 0 beyond the length, the kernel its NaN.
    rows = [(max(1, n // 5), max(1, n // 20), n // 5 if marginal else 0) for n in range(S + 1)]
    return score, index, length, torch.tensor(rows, dtype=torch.int32, device=device)


@pytest.mark.parametrize("lengths, group, ties, marginal, long", cases(
    ((1, 63), 1, True, True, False), ((1, 63), 7, False, False, True), ((109, 45), 3, False, True, False),
    ((111, 257), 3, False, True, True), ((111, 257), 1, True, False, False), ((2049, 5), 1, True, False, True),
    ((2049, 5), 3, True, False, False), ((4100, 77), 1, True, True, False),
    gpu=[*itertools.product([(1, 1), (1, 63), (109, 45), (111, 257), (2049, 5)], (1, 3, 7), *[(False, True)] * 3),
         *itertools.product([(4093, 7), (8190, 7), (16893, 7), (32765, 7)], [3], *[(False, True)] * 2, [False])],
))  # fmt: skip
def test_plan_equals_its_twin(lengths, group, ties, marginal, long, rank, device):
    score, index, length, sizes = plan_case(device, lengths, group, marginal, ties)
    B, S = len(lengths), score.shape[3]
    prior = torch.randint(1 << 10, (B, S), generator=torch.Generator().manual_seed(2)).to(device) / 256
    for added in (None, prior) if group == 3 else (None,):
        tiers = [torch.full((2, B, 2, S), 9, dtype=torch.int8, device=device) for _ in range(2)]
        kernels_plan.plan_layers_torch(score.nan_to_num(0), index, length, sizes, tiers[0], added)
        rank(long, score, index, length, sizes, tiers[1], added)
        assert torch.equal(*tiers)
        counts = sizes[length.long()][:, None]
        assert ((tiers[1] == kernels_scores.CRITICAL).sum(-1) == counts[..., 0]).all()
        assert ((tiers[1] == kernels_scores.MARGINAL).sum(-1) == counts[..., 2]).all()


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_plan_tells_tiny_scores_apart(bits, rank, device, monkeypatch):
    """Rows of a sharp softmax: exponents over their whole range, zeros, and in a long row digits of either size."""
    monkeypatch.setattr(kernels_plan, "BITS", bits)
    _, index, length, sizes = plan_case(device, (391, 700), 1, True, False)
    score = (12 * randn(2, 2, 3, 703)).softmax(-1)
    score[:, :, 0, ::3] = 0
    tiers = [torch.full((2, 2, 2, 703), 9, dtype=torch.int8, device=device) for _ in range(2)]
    kernels_plan.plan_layers_torch(score.to(device), index, length, sizes, tiers[0])
    rank(bits is not None, score.to(device), index, length, sizes, tiers[1])
    assert torch.equal(*tiers)


@pytest.mark.parametrize("lengths, group, moves, added, long", cases(
    ((1, 63), 3, None, False, False), ((109, 45), 1, None, True, False), ((111, 257), 3, 2, False, False),
    ((111, 257), 3, None, True, True), ((109, 45), 1, 5, False, True),
    gpu=itertools.product([(1, 63), (109, 45), (111, 257), (2049, 5)], (1, 7), (None, 2), (False, True), (False, True)),
))  # fmt: skip
def test_plan_with_a_memory_equals_its_twin(lengths, group, moves, added, long, rank, device):
    """Who is critical, and what is remembered of everyone: to the bit, 0 beyond the length."""
    score, index, length, sizes = plan_case(device, lengths, group, moves is None, ties=False)
    B, S = len(lengths), score.shape[3]
    prior = dyadic(B, S, seed=2, device=device) if added else None
    recent = sizes[length.long()][:, 1].max().item() + 8
    held = torch.full((2, B, 2, recent + 40), -1, dtype=torch.int32, device=device)
    before = length[:, None, None] - 2 - torch.arange(recent, device=device)  # recent tokens are held: all came in turn
    held[..., 7 : 7 + recent] = before.clamp(min=-1)
    late = torch.arange(S, device=device) >= length[:, None, None]
    tiers, memories = [], []
    for plan in (kernels_plan.plan_layers_torch, partial(rank, long)):
        tier = torch.full((2, B, 2, S), 9, dtype=torch.int8, device=device)
        memory = dyadic(2, B, 2, S, seed=3, device=device).masked_fill(late, 0)
        given = score.nan_to_num(0) if plan is kernels_plan.plan_layers_torch else score
        plan(given, index, length, sizes, tier, prior, held, moves, memory, 0.5)
        tiers.append(tier), memories.append(memory)
    assert torch.equal(*tiers) and torch.equal(*memories)
    assert (memories[1].masked_select(late) == 0).all() and (memories[1] > 0).any()


@pytest.mark.parametrize("lengths, group", cases(
    ((1, 63), 7), ((109, 45), 1), ((111, 2049), 3), gpu=[((16893, 5), 7), ((2049, 5), 1)],
))  # fmt: skip
def test_a_memory_fades_as_its_twin_does(lengths, group, device):
    row, index, length, sizes = plan_case(device, lengths, group, True, False)
    B, S = len(lengths), row.shape[3]
    tier = torch.randint(3, (2, B, 2, S), generator=torch.Generator().manual_seed(2)).to(device, torch.int8)
    memories = [dyadic(2, B, 2, S, seed=3, device=device) for _ in range(2)]
    kernels_scores.fade_memory_torch(row.nan_to_num(0), index, length, tier, memories[0], 0.5)
    kernels_scores.fade_memory_triton(row, index, length, tier, memories[1], 0.5)
    assert torch.equal(*memories)


def logit_case(device, B, S, length):
    """Probabilities that are powers of two, and the same as logits and log of the sum: exact either way; NaN beyond."""
    exponent, lse = (
        torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float().to(device)
        for seed, (low, high, shape) in enumerate(((-11, 1, (2, B, 3, S)), (-30, 31, (2, B, 3))))
    )
    exponent = exponent.masked_fill((torch.arange(S, device=device) >= length[:, None])[None, :, None], torch.nan)
    return torch.exp2(exponent), exponent + lse[..., None], lse


@pytest.mark.parametrize("lengths, group, moves, fused, long", cases(
    ((1, 63), 7, None, True, False), ((111, 257), 3, None, False, True), ((109, 45), 3, 2, True, True),
    ((111, 257), 1, 3, True, False), ((2049, 5), 3, None, False, False),
    gpu=itertools.product([(1, 63), (111, 257), (2049, 5)], (1, 3, 7), (None, 2), (False, True), (False, True)),
))  # fmt: skip
def test_plan_by_logits_is_the_plan_by_probabilities(lengths, group, moves, fused, long, rank, device):
    """By the twin and by the kernel: tiers and memory to the bit."""
    _, index, length, sizes = plan_case(device, lengths, group, moves is None, False)
    B, S = len(lengths), max(lengths) + 3
    probability, logit, lse = logit_case(device, B, S, length)
    slots = sizes[length.long()][:, 1].max().item() + 8  # recent tokens are held: all came in turn
    held = (length[:, None, None] - 2 - torch.arange(slots, dtype=torch.int32, device=device)).clamp(min=-1)
    held = held.expand(2, B, 2, slots).contiguous()
    late = torch.arange(S, device=device) >= length[:, None, None]
    results = []
    for plan, score, log in (
        (kernels_plan.plan_layers_torch, probability, None),
        (kernels_plan.plan_layers_torch, logit, lse),
        (partial(rank, long), logit, lse),
    ):
        tier = torch.full((2, B, 2, S), 9, dtype=torch.int8, device=device)
        memory = dyadic(2, B, 2, S, seed=3, device=device).masked_fill(late, 0) if fused else None
        plan(score, index, length, sizes, tier, None, held, moves, memory, 0.5, log)
        results.append((tier, memory if fused else tier))
    for tier, memory in results[1:]:
        assert torch.equal(tier, results[0][0]) and torch.equal(memory, results[0][1])


@pytest.mark.parametrize("lengths, group", cases(
    ((1, 63), 7), ((109, 45), 1), ((111, 2049), 3), gpu=[((16893, 5), 7), ((2049, 5), 1)],
))  # fmt: skip
def test_a_memory_fades_by_logits_as_by_probabilities(lengths, group, device):
    _, index, length, _ = plan_case(device, lengths, group, True, False)
    B, S = len(lengths), max(lengths) + 3
    probability, logit, lse = logit_case(device, B, S, length)
    tier = torch.randint(3, (2, B, 2, S), generator=torch.Generator().manual_seed(2)).to(device, torch.int8)
    memories = [dyadic(2, B, 2, S, seed=3, device=device) for _ in range(3)]
    kernels_scores.fade_memory_torch(probability, index, length, tier, memories[0], 0.5)
    kernels_scores.fade_memory_torch(logit, index, length, tier, memories[1], 0.5, lse)
    kernels_scores.fade_memory_triton(logit, index, length, tier, memories[2], 0.5, lse)
    assert torch.equal(memories[1], memories[0]) and torch.equal(memories[2], memories[0])


def test_twin_of_the_plan_is_the_plan_of_the_method(device):
    """plan_tiers of smallkv.py, the reference that ranks by a stable sort, on every tie."""
    lengths = (111, 257)
    score, index, length, sizes = plan_case(device, lengths, 3, True, True)
    score = score.nan_to_num(0)
    tier = torch.empty(2, 2, 2, 260, dtype=torch.int8, device=device)
    kernels_plan.plan_layers_torch(score, index, length, sizes, tier)
    second = index[:, 1]  # heads of the second layer
    summed = score[second // 3, torch.arange(2, device=device)[:, None], second % 3].view(2, 2, 3, 260).sum(2)
    split = [TierSizes(*sizes[n].tolist()) for n in lengths]
    critical, marginal = plan_tiers(summed, split, list(lengths))
    assert torch.equal(tier[1], (2 * critical + marginal).to(torch.int8))


@pytest.mark.parametrize("moves, ties, long", cases(
    (0, True, False), (1, False, True), (4, True, False), (4, True, True), (1000, False, False),
    gpu=list(itertools.product((0, 1, 4, 1000), (False, True), (False, True))),
))  # fmt: skip
def test_limited_plan_equals_its_twin(moves, ties, long, rank, device):
    """And it does what it says: no more enter than allowed, the newest token does, the places are full."""
    lengths = (111, 257)
    score, index, length, sizes = plan_case(device, lengths, 3, False, ties)
    held = torch.full((2, 2, 2, 60), -1, dtype=torch.int32)
    for layer, b, g in itertools.product(range(2), repeat=3):
        n, generator = lengths[b], torch.Generator().manual_seed(4 * layer + 2 * b + g)
        names = torch.randperm(n - 1, generator=generator)[: n // 5]
        held[layer, b, g, torch.randperm(60, generator=generator)[: n // 5]] = names.int()
    held = held.to(device)
    tiers = [torch.full((2, 2, 2, 260), 9, dtype=torch.int8, device=device) for _ in range(2)]
    kernels_plan.plan_layers_torch(score.nan_to_num(0), index, length, sizes, tiers[0], held=held, moves=moves)
    rank(long, score, index, length, sizes, tiers[1], held=held, moves=moves)
    assert torch.equal(*tiers)
    for layer, b, g in itertools.product(range(2), repeat=3):
        chosen = set((tiers[1][layer, b, g] > 0).nonzero().flatten().tolist())
        assert len(chosen) == lengths[b] // 5 and lengths[b] - 1 in chosen
        assert len(chosen - set(held[layer, b, g].tolist()) - {lengths[b] - 1}) <= moves


@pytest.mark.parametrize("slots, lengths, tokens", cases(
    (1, (1, 1), None), (52, (111, 257), 64), (410, (2049, 5), None),
    gpu=[(52, (101, 45), 16), (3400, (16885, 77), None)],
))  # fmt: skip
def test_slots_equal_their_twin(slots, lengths, tokens, device, monkeypatch):
    """Some plans one after another on the same pool: positions, rows to come, the newest token's slot, the count; with
    `tokens` at a time."""
    monkeypatch.setattr(kernels_tiers, "TOKENS", tokens or kernels_tiers.TOKENS)
    B, S = 2, max(lengths) + 11
    generator = torch.Generator().manual_seed(0)
    positions = [torch.full((2, B, 2, slots), -1, dtype=torch.int32, device=device) for _ in range(2)]
    moved = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2)]
    for step in range(6 if slots < 400 else 2):
        length = torch.tensor(lengths, dtype=torch.int32) + step
        tier = torch.zeros(2, B, 2, S, dtype=torch.int8)
        for layer, b, g in itertools.product(range(2), range(B), range(2)):
            n = length[b].item()
            chosen = torch.randperm(n, generator=generator)[: min(n, slots) - 1]
            tier[layer, b, g, chosen] = 1 + (torch.rand(len(chosen), generator=generator) < 0.5).to(torch.int8)
            tier[layer, b, g, n - 1] = 2
        tier, length = tier.to(device), length.to(device)
        moves = [kernels_move.Moves.none(position) for position in positions]
        newest = [torch.full((2, B, 2), 7, dtype=torch.int32, device=device) for _ in range(2)]
        lowest = 1 + step % 2
        for i, assign in enumerate((kernels_tiers.assign_slots_torch, kernels_tiers.assign_slots_triton)):
            assign(positions[i], tier, lowest, length, tier.shape[3] + 3, moves[i], newest[i], moved[i])
        for pair in (positions, newest, moved, [each.count for each in moves]):
            assert torch.equal(*pair)
        came = [set(zip(*(table[:count].tolist() for table in (each.source[layer], each.target[layer]))))
                  for each in moves for layer, count in enumerate(each.count.tolist())]  # fmt: skip
        assert came[:2] == came[2:] and [len(rows) for rows in came[:2]] == moves[0].count.tolist()


@pytest.mark.parametrize("group", [1, 3])
def test_lent_rows_equal_their_twin(group, device):
    row, index, length, sizes = plan_case(device, (111, 257), group, True, False)
    tier = torch.zeros(2, 2, 2, 260, dtype=torch.int8, device=device)
    kernels_plan.plan_layers_torch(row.nan_to_num(0), index, length, sizes, tier)
    pools = [torch.full((2, 2, 2, slots), -1, dtype=torch.int32, device=device) for slots in (60, 110)]
    for lowest, position in zip((2, 1), pools):
        unused = [kernels_move.Moves.none(position), torch.empty(2, 2, 2, dtype=torch.int32, device=device)]
        count = torch.zeros(1, dtype=torch.int64, device=device)
        kernels_tiers.assign_slots_torch(position, tier, lowest, length, tier.shape[3], *unused, count)
    results = []
    for lend, source in ((kernels_tiers.lend_rows_torch, row.nan_to_num(0)), (kernels_tiers.lend_rows_triton, row)):
        value_slot = torch.full_like(pools[0], 9)
        borrowed = torch.full((2, 2, 2 * group, 110), torch.nan, device=device)
        lend(source, index, tier, *pools, value_slot, borrowed)
        results.append((value_slot, borrowed))
    for ours, twins in zip(results[1], results[0]):
        assert torch.equal(ours, twins)
    assert (borrowed > 0).any()
    at = pools[1].gather(-1, value_slot.long())
    assert torch.equal(at.where(pools[0] >= 0, -1), pools[0])


def test_the_newest_token_takes_a_free_slot(device):
    position = torch.tensor([3, -1, 8, -1], dtype=torch.int32, device=device).repeat(2, 2, 2, 1)
    slot = torch.full((2, 2, 2), 7, dtype=torch.int32, device=device)
    length = torch.tensor([10, 12], dtype=torch.int32, device=device)
    kernels_tiers.admit_newest(position, length, slot)
    assert (position.gather(-1, slot.long()[..., None])[..., 0] == (length - 1)[:, None]).all()
    assert ((position == 3).sum(-1) == 1).all() and ((position == 8).sum(-1) == 1).all()
    assert ((position == -1).sum(-1) == 1).all()
