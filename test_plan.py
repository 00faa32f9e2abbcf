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
from test_kernels import HALF, HERE, cases, randn
from test_scores import dyadic, score_case


@pytest.fixture
def device():
    return HERE


@pytest.fixture
def rank(monkeypatch):
    """rank(long, ...) runs the kernel; with `long`, as if the row were too long for registers. Up to 4,096 tokens three
    programs take turns with the rows, unless in a hurry."""
    monkeypatch.setattr(kernels_plan, "PROGRAMS", 3)
    monkeypatch.setattr(kernels_plan, "WHOLE", kernels_plan.row_warps(4096))

    def run(long, total, *args, **options):
        monkeypatch.setattr(kernels_plan, "ROW", 0 if long else 32768)
        kernels_plan.plan_layers_triton(total, *args, **options)

    return run


def tiers_of(held, S):
    """The tiers of a last plan, (L, B, G, S): who is held (L, B, G, C) was critical."""
    tier = torch.full((*held.shape[:3], S + 1), 1, dtype=torch.int8, device=held.device)
    return tier.scatter_(-1, held.long().where(held >= 0, S), kernels_scores.CRITICAL)[..., :S].contiguous()


# ---- the plan --------------------------------------------------------------------------------------------------------


def plan_case(device, lengths, marginal, ties):
    """Scores of 2 layers of 2 KV heads, NaN beyond each length; sizes of a fifth or one."""
    B, S = len(lengths), max(lengths) + 3
    length = torch.tensor(lengths, dtype=torch.int32, device=device)
    steps = 4 if ties else 1 << 16
    total = torch.randint(steps, (2, B, 2, S), generator=torch.Generator().manual_seed(0)) / steps
    late = torch.arange(S) >= torch.tensor(lengths)[:, None, None]
    rows = [(max(1, n // 5), max(1, n // 20), n // 5 if marginal else 0) for n in range(S + 1)]
    return total.masked_fill(late, torch.nan).to(device), length, torch.tensor(rows, dtype=torch.int32, device=device)


@pytest.mark.parametrize("lengths, ties, marginal, long", cases(
    ((1, 63), True, True, False), ((1, 63), False, False, True), ((109, 45), False, True, False),
    ((111, 257), False, True, True), ((111, 257), True, False, False), ((2049, 5), True, False, True),
    ((2049, 5), True, False, False), ((4100, 77), True, True, False),
    gpu=[*itertools.product([(1, 1), (1, 63), (109, 45), (111, 257), (2049, 5)], *[(False, True)] * 3),
         *itertools.product([(4093, 7), (8190, 7), (16893, 7), (32765, 7)], *[(False, True)] * 2, [False])],
))  # fmt: skip
def test_plan_equals_its_twin(lengths, ties, marginal, long, rank, device):
    total, length, sizes = plan_case(device, lengths, marginal, ties)
    prior = dyadic(len(lengths), total.shape[3], seed=2, device=device) * 4
    # Hints: below all scores, about right, above them all, nonsense; the second plan has the first one's.
    cut = torch.tensor([0, 0x3F000000, 0x7F800001, -5], dtype=torch.int32, device=device)
    cut = cut.repeat(len(lengths)).view(2, len(lengths), 2)
    for added in (None, prior):
        tiers = [torch.full(total.shape, 9, dtype=torch.int8, device=device) for _ in range(2)]
        kernels_plan.plan_layers_torch(total, length, sizes, tiers[0], prior=added)
        rank(long, total, length, sizes, tiers[1], prior=added, hurry=added is not None, cut=cut)
        assert torch.equal(*tiers)
        counts = sizes[length.long()][:, None]
        assert ((tiers[1] == kernels_scores.CRITICAL).sum(-1) == counts[..., 0]).all()
        assert ((tiers[1] == kernels_scores.MARGINAL).sum(-1) == counts[..., 2]).all()


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_plan_tells_tiny_scores_apart(bits, rank, device, monkeypatch):
    """Rows of a sharp softmax: exponents over their whole range, zeros, and in a long row digits of either size."""
    monkeypatch.setattr(kernels_plan, "BITS", bits)
    _, length, sizes = plan_case(device, (391, 700), True, False)
    total = (12 * randn(2, 2, 2, 703)).softmax(-1)
    total[:, :, 0, ::3] = 0
    tiers = [torch.full(total.shape, 9, dtype=torch.int8, device=device) for _ in range(2)]
    kernels_plan.plan_layers_torch(total.to(device), length, sizes, tiers[0])
    rank(bits is not None, total.to(device), length, sizes, tiers[1])
    assert torch.equal(*tiers)


@pytest.mark.parametrize("lengths, moves, added, long", cases(
    ((1, 63), None, False, False), ((109, 45), None, True, False), ((111, 257), 2, False, False),
    ((111, 257), None, True, True), ((109, 45), 5, False, True),
    gpu=itertools.product([(1, 63), (109, 45), (111, 257), (2049, 5), (16893, 77)], (None, 2), *[(False, True)] * 2),
))  # fmt: skip
def test_plan_with_a_memory_equals_its_twin(lengths, moves, added, long, rank, device):
    """Who is critical, and what is remembered of everyone else, in 32 bits and in 16: to the bit; of the critical, and
    beyond the length, what it was."""
    total, length, sizes = plan_case(device, lengths, moves is None, ties=False)
    B, S = len(lengths), total.shape[3]
    recent = sizes[length.long()][:, 1].max().item() + 8
    held = torch.full((2, B, 2, recent + 40), -1, dtype=torch.int32, device=device)
    before = length[:, None, None] - 2 - torch.arange(recent, device=device)  # recent tokens are held: all came in turn
    held[..., 7 : 7 + recent] = before.clamp(min=-1)
    prior = dyadic(B, S, seed=2, device=device) if added else None
    begun = dyadic(2, B, 2, S, seed=3, device=device)
    late = torch.arange(S, device=device) >= length[:, None, None]
    for dtype in (torch.float32, HALF[device][0]):
        tiers, memories = [], []
        for plan in (kernels_plan.plan_layers_torch, partial(rank, long)):
            tier, memory = tiers_of(held, S), begun.to(dtype, copy=True)
            plan(total, length, sizes, tier, held, moves, memory, None, prior)
            tiers.append(tier), memories.append(memory)
        assert torch.equal(*tiers) and torch.equal(*memories)
        as_it_was = (tiers[1] == kernels_scores.CRITICAL) | late
        assert torch.equal(memories[1], begun.where(as_it_was, total).to(dtype))


@pytest.mark.parametrize("lengths, moves, fused, long", cases(
    ((1, 63), None, True, False), ((111, 257), None, True, False), ((109, 45), 3, True, False),
    ((111, 257), None, True, True), ((109, 45), 3, False, True), ((1100, 257), None, True, False),
    gpu=itertools.product([(1, 63), (111, 257), (2049, 5), (8300, 70), (16885, 70)], (None, 2), *[(False, True)] * 2),
))  # fmt: skip
def test_plan_with_slots_is_the_plan_and_then_the_slots(lengths, moves, fused, long, rank, device):
    """Some steps one after another, in one launch each, against the two twins: tiers, memory, who is held, how many
    come; which of the free slots a token takes is left open."""
    total, length, sizes = plan_case(device, lengths, not fused and moves is None, ties=False)
    total, sizes = torch.nn.functional.pad(total.nan_to_num(0), (0, 3)), torch.cat((sizes, sizes[-1:].expand(3, 3)))
    B, S, C = len(lengths), total.shape[3], sizes[:, 0].max().item() + 7
    ends = [plans(B, S, C, device) for _ in range(2)]
    prior = dyadic(B, S, seed=2, device=device) if fused else None
    for step in range(4):
        total = total.roll(step * 7, -1)
        counts, names = [], []
        for (held, tier, memory, moved), plan in zip(ends, (kernels_plan.plan_layers_torch, partial(rank, long))):
            listed, newest = kernels_move.Moves.none(held), torch.full((2, B, 2), 7, dtype=torch.int32, device=device)
            slots, others, before = (S + 3, listed, newest, moved), memory if fused else None, held.clone()
            twin = not counts
            plan(total, length, sizes, tier, held, moves if step else None, others, None if twin else slots, prior)
            if twin:
                kernels_tiers.assign_slots_torch(held, tier, kernels_scores.CRITICAL, length, *slots)
            check_slots(before, held, tier, length, *slots[:3])
            counts.append(listed.count), names.append(held.sort(-1).values)
        assert torch.equal(*counts) and torch.equal(*names)
        for one, other in list(zip(*ends))[1:]:
            assert torch.equal(one, other)
        length = length + 1


def check_slots(before, held, tier, length, host_rows, moves, newest):
    """The critical have a slot each, who had one keeps it, the newest token is where it is said to be, and the rows of
    all others that came are listed."""
    stays = (before >= 0) & (tier.gather(-1, before.long().clamp(min=0)) == kernels_scores.CRITICAL)
    assert torch.equal(held[stays], before[stays])
    C, last = held.shape[3], length[:, None].expand(newest.shape) - 1
    assert torch.equal(held.gather(-1, newest.long()[..., None])[..., 0], last)
    for layer, count in enumerate(moves.count.tolist()):
        expected = []
        for pair, (now, then, end) in enumerate(zip(*(table.tolist() for table in (
            held[layer].flatten(0, 1), before[layer].flatten(0, 1), last[layer].flatten())))):  # fmt: skip
            assert len(set(now) - {-1}) == C - now.count(-1) == (tier[layer].flatten(0, 1)[pair] == 2).sum()
            expected += [(pair * host_rows + token, pair * C + slot) for slot, token in enumerate(now)
                         if token not in (then[slot], end, -1)]  # fmt: skip
        listed = zip(moves.source[layer, :count].tolist(), moves.target[layer, :count].tolist())
        assert sorted(listed) == sorted(expected) and len(expected) == count


def plans(B, S, slots, device):
    """Empty slots, tiers of nobody, a memory of nothing, and nothing moved."""
    held = torch.full((2, B, 2, slots), -1, dtype=torch.int32, device=device)
    tier = torch.zeros(2, B, 2, S, dtype=torch.int8, device=device)
    return held, tier, torch.zeros(2, B, 2, S, device=device), torch.zeros(1, dtype=torch.int64, device=device)


def test_twin_of_the_plan_is_the_plan_of_the_method(device):
    """plan_tiers of smallkv.py, the reference that ranks by a stable sort, on every tie."""
    lengths = (111, 257)
    total, length, sizes = plan_case(device, lengths, True, True)
    tier = torch.empty(2, 2, 2, 260, dtype=torch.int8, device=device)
    kernels_plan.plan_layers_torch(total, length, sizes, tier)
    split = [TierSizes(*sizes[n].tolist()) for n in lengths]
    critical, marginal = plan_tiers(total[1].nan_to_num(0), split, list(lengths))
    assert torch.equal(tier[1], (2 * critical + marginal).to(torch.int8))


@pytest.mark.parametrize("moves, ties, long", cases(
    (0, True, False), (1, False, True), (4, True, False), (4, True, True), (1000, False, False),
    gpu=list(itertools.product((0, 1, 4, 1000), (False, True), (False, True))),
))  # fmt: skip
def test_limited_plan_equals_its_twin(moves, ties, long, rank, device):
    """And it does what it says: no more enter than allowed, the newest token does, the places are full."""
    lengths = (111, 257)
    total, length, sizes = plan_case(device, lengths, False, ties)
    held = torch.full((2, 2, 2, 60), -1, dtype=torch.int32)
    for layer, b, g in itertools.product(range(2), repeat=3):
        n, generator = lengths[b], torch.Generator().manual_seed(4 * layer + 2 * b + g)
        names = torch.randperm(n - 1, generator=generator)[: n // 5]
        held[layer, b, g, torch.randperm(60, generator=generator)[: n // 5]] = names.int()
    held = held.to(device)
    tiers = [tiers_of(held, 260) for _ in range(2)]
    kernels_plan.plan_layers_torch(total, length, sizes, tiers[0], held, moves)
    rank(long, total, length, sizes, tiers[1], held, moves)
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
    row, index, length = score_case(device, (111, 257), group)
    total, _, sizes = plan_case(device, (111, 257), True, False)
    tier = torch.zeros(2, 2, 2, 260, dtype=torch.int8, device=device)
    kernels_plan.plan_layers_torch(total, length, sizes, tier)
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
