"""The plan against a plain Python ranking, step by step, and the movement of rows, to the bit.

Both versions of a function are held against the same loop: which tokens are in a tier is settled to the last one, which
of the free slots a token takes is left open. Scores beyond a length are NaN.
"""

import itertools

import pytest
import torch

import tiers
from conftest import BF16, FP32, HERE, randint, randn


def naive_tiers(scores: list[float], size: tuple[int, int, int]) -> tuple[set[int], set[int]]:
    """Critical and marginal tokens of one KV head. The newest token ranks first, then the recent ones, then by score;
    equals by position; a score below 0 is never taken."""
    n, (critical, recent, marginal) = len(scores), size

    def rank(token):
        if token == n - 1:
            return -3, 0.0, token
        return (-2, 0.0, token) if token >= n - recent else (-1, -scores[token], token)

    order = sorted((j for j in range(n) if rank(j)[0] < -1 or scores[j] >= 0), key=rank)
    return set(order[:critical]), set(order[critical : critical + marginal])


class State:
    """The tables of one layer, 2 KV heads: empty slots and a memory."""

    def __init__(self, plan, device, B, S, C, M, T, remembers):
        self.plan, self.host_rows, self.T = plan, S + 3, T
        table = {"dtype": torch.int32, "device": device}
        self.critical = torch.full((B, 2, C), -1, **table)
        self.marginal = torch.full((B, 2, M), -1, **table) if M else None
        self.newest = torch.full((B, 2, T), 7, **table)
        self.memory = randn(B, 2, S, seed=9, device=device) if remembers else None
        self.mark = torch.zeros(B, 2, S, dtype=torch.int8, device=device)
        self.rows, self.count = torch.full((2, 2, 2 * B * max(C, M)), -9, **table), torch.zeros(2, **table)

    def step(self, total, length, sizes):
        """Plan once, and hold every table against the naive plan."""
        before = [None if x is None else x.clone() for x in (self.critical, self.marginal, self.memory)]
        kept = total.clone()
        self.count.zero_()
        self.plan(total, length, sizes, self.critical, self.marginal, self.memory, self.newest, self.rows, self.count,
                  self.mark, self.host_rows)  # fmt: skip
        assert torch.equal(kept.nan_to_num(-7), total.nan_to_num(-7))
        listed = [[], []]
        for (b, n), g in itertools.product(enumerate(length.tolist()), range(2)):
            wanted = naive_tiers(total[b, g, :n].tolist(), tuple(sizes[n].tolist()))
            drafts = set(range(n, n + self.T - 1))
            for tier, (then, table) in enumerate(zip(before, (self.critical, self.marginal))):
                if table is None:
                    continue
                then, now = then[b, g].tolist(), table[b, g].tolist()
                assert sorted(t for t in now if t >= 0) == sorted(wanted[tier] | (set() if tier else drafts))
                assert all(now[slot] == t for slot, t in enumerate(then) if t in wanted[tier])  # who stays, stays there
                pair, C = 2 * b + g, len(now)
                listed[tier] += [(pair * self.host_rows + t, pair * C + slot) for slot, t in enumerate(now)
                                 if 0 <= t < n - 1 and t != then[slot]]  # fmt: skip
            where = self.critical[b, g, self.newest[b, g].long()].tolist()
            assert where == [n - 1, *sorted(drafts)]
            if self.memory is not None:
                expected = before[2][b, g].clone()
                others = torch.tensor(sorted(set(range(n)) - wanted[0]), dtype=torch.long)
                expected[others] = total[b, g][others]
                assert torch.equal(self.memory[b, g].nan_to_num(-7), expected.nan_to_num(-7))
        for tier, expected in enumerate(listed):
            assert self.count[tier] == len(expected)
            assert sorted(zip(*self.rows[tier, :, : len(expected)].tolist())) == sorted(expected)


def states(device, *shape, **options):
    """One for the twin, and one for the kernel where it runs."""
    plans = tiers.plan_tiers_torch, tiers.plan_tiers_triton
    return [State(plan, device, *shape, **options) for plan in plans[: 1 + (device == HERE)]]


def by_length(S, device, critical, recent, marginal):
    """Sizes (S + 1, 3) by functions of the length."""
    rows = [(critical(n), recent(n), marginal(n)) for n in range(S + 1)]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def scores_of(kind, B, S, seed):
    """(B, 2, S) on the CPU. ties: 4 values; tiny: a sharp softmax with zeros; negative: two in three are below 0."""
    uniform = torch.rand(B, 2, S, generator=torch.Generator().manual_seed(seed))
    if kind == "ties":
        return (4 * uniform).floor() / 4
    if kind == "tiny":
        sharp = (12 * randn(B, 2, S, seed=seed, device="cpu")).softmax(-1)
        sharp[..., ::3] = 0
        return sharp
    return uniform - 2 / 3 if kind == "negative" else uniform


def fifth(n):
    return max(1, n // 5)


CASES = [  # lengths of the first step, kind of scores, T, marginal tier, memory, steps
    ((1, 1), "uniform", 1, False, True, 3), ((1, 63), "ties", 1, True, True, 4), ((3, 2), "ties", 5, True, False, 3),
    ((109, 45), "tiny", 1, True, True, 4), ((111, 130), "negative", 1, True, True, 3),
    ((700, 5), "tiny", 5, False, True, 3), ((111, 257), "ties", 5, True, False, 4),
    ((1030, 77), "uniform", 1, True, True, 2), ((130, 128), "zero", 1, True, True, 2),
]  # fmt: skip


@pytest.mark.parametrize("case, row", [*((case, tiers.ROW) for case in CASES), (CASES[5], 64), (CASES[7], 64)])
def test_plans_step_by_step(case, row, device, monkeypatch):
    """Tokens come and go while the sequences grow; with drafts by as many as were accepted, the others' slots freed.
    The kernel's block holds the row, or a part of it."""
    monkeypatch.setattr(tiers, "ROW", row)
    lengths, kind, T, middle, remembers, steps = case
    grow = [1, 2, T, 3][:steps] if T > 1 else [1] * steps
    B, S = len(lengths), max(lengths) + sum(grow) + T
    sizes = by_length(S, device, fifth, lambda n: max(1, n // 20), lambda n: n // 5 if middle else 0)
    slots = sizes.amax(0)
    ends = states(device, B, S, slots[0].item() + T + 1, slots[2].item() + 1 if middle else 0, T, remembers=remembers)
    length = torch.tensor(lengths, dtype=torch.int32, device=device)
    for step, more in enumerate(grow):
        total = scores_of(kind, B, S, step) * (0 if kind == "zero" else 1)
        total = total.masked_fill(torch.arange(S) >= length.cpu()[:, None, None], torch.nan).to(device)
        for state in ends:
            state.step(total, length, sizes)
            state.critical.masked_fill_(state.critical >= (length + more)[:, None, None] - 1, -1)
        length = length + more


@pytest.mark.parametrize("S, T, share", [(tiers.ROW, 5, 0.03), (9000, 1, 0.97), (tiers.ROW + 7000, 1, 0.03)])
def test_plans_of_long_rows(S, T, share, device):
    """The longest that a block holds, one that is critical nearly as a whole, and one of several blocks."""
    sizes = by_length(S, device, lambda n: int(share * n), lambda n: n // 100, lambda n: n // 60)
    ends = states(device, 1, S, int(share * S) + T, S // 60, T, remembers=True)
    length = torch.tensor([S - T], dtype=torch.int32, device=device)
    for step, kind in enumerate(("tiny", "ties")):
        total = scores_of(kind, 1, S, step).masked_fill(torch.arange(S) >= S - T + step, torch.nan).to(device)
        for state in ends:
            state.step(total, length + step, sizes)
            state.critical.masked_fill_(state.critical >= (length + step)[:, None, None], -1)


def test_a_budget_that_pays_for_all_keeps_all(device):
    """Before and after some steps of a small one, in which there is a marginal tier."""
    small = range(40, 44)
    sizes = by_length(60, device, lambda n: 8 if n in small else n, lambda n: 3, lambda n: 20 if n in small else 0)
    for state in states(device, 2, 60, 60, 20, 1, remembers=True):
        for n in range(38, 46):
            total = scores_of("uniform", 2, 60, n).to(device)
            state.step(total, torch.tensor([n, n - 5], dtype=torch.int32, device=device), sizes)


def test_fewer_competitors_than_places(device):
    """All scores but two are below 0: the tiers have the recent tokens and these two."""
    total = torch.full((1, 2, 30), -1.0)
    total[0, 0, 4], total[0, 1, 9], total[0, :, 11] = 0.0, 0.3, 0.5
    sizes = by_length(30, device, lambda n: 4, lambda n: 3, lambda n: 5)
    length = torch.tensor([20], dtype=torch.int32, device=device)
    for state in states(device, 1, 30, 9, 6, 1, remembers=False):
        state.step(total.to(device), length, sizes)
        tokens = [[sorted(t for t in row if t >= 0) for row in table[0].tolist()] for table in
                  (state.critical, state.marginal)]  # fmt: skip
        assert tokens == [[[11, 17, 18, 19]] * 2, [[4], [9]]]


def test_no_places_but_for_recent_tokens(device):
    """One is the newest alone."""
    sizes = by_length(30, device, lambda n: 1 + n % 3, lambda n: 1 + n % 3, lambda n: 2)
    for state in states(device, 2, 30, 4, 2, 1, remembers=True):
        for n in range(10, 14):
            length = torch.tensor([n, n + 1], dtype=torch.int32, device=device)
            state.step(scores_of("uniform", 2, 30, n).to(device), length, sizes)


def test_a_layer_of_a_cache_is_planned_in_place(kernels_on):
    """Tables and lists are the layer's own, whatever stands before and behind them."""
    whole = torch.full((3, 2, 2, 9), -1, dtype=torch.int32, device=HERE)
    newest = torch.zeros(3, 2, 2, 1, dtype=torch.int32, device=HERE)
    sizes = by_length(40, HERE, lambda n: 6, lambda n: 2, lambda n: 0)
    length = torch.tensor([30, 12], dtype=torch.int32, device=HERE)
    total = scores_of("uniform", 2, 40, 0).to(HERE)
    rows, count = (torch.zeros(3, 2, *shape, dtype=torch.int32, device=HERE) for shape in ((2, 36), ()))
    mark = torch.zeros(2, 2, 40, dtype=torch.int8, device=HERE)
    tiers.plan_tiers(total, length, sizes, whole[1], None, None, newest[1], rows[1], count[1], mark, 41)
    assert count[1].tolist() == [20, 0] and (whole[1] >= 0).sum() == 24 and (whole[::2] == -1).all()
    assert not mark.any() and not any(table[::2].any() for table in (newest, rows, count))


# ---- Movement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D, dtype, count, bytes_at_once", [
    (16, FP32, 41, 1 << 17), (64, BF16, 0, 1 << 17), (128, BF16, 57, 1 << 11), (64, FP32, 60, 1 << 11),
    (128, FP32, 1, 1 << 17),
])  # fmt: skip
def test_rows_arrive_to_the_bit(D, dtype, count, bytes_at_once, device, monkeypatch):
    """K and V, and V alone; in one turn of a program or in many; slots that nothing comes to keep what they had."""
    monkeypatch.setattr(tiers, "BRING_BYTES", bytes_at_once)
    host = randn(2, 2, 99, 2, D, dtype=dtype, device="cpu")
    target = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    rows = torch.stack((target // 15 * 99 + randint(0, 99, (60,), 2, "cpu"), target)).int()
    rows[:, count:] = 0 if count == 0 else 2**31 - 1  # beyond the count nothing is looked up
    before = [randn(2, 2, 15, D, seed=seed, dtype=dtype, device="cpu") for seed in (3, 4)]
    expected = [pool.clone() for pool in before]
    for source, slot in rows[:, :count].T.tolist():
        for kind, pool in enumerate(expected):
            pool.view(-1, D)[slot] = host[source // 198, source // 99 % 2, source % 99, kind]
    offloaded = host.pin_memory() if device == "cuda" else host
    listed, how_many = rows.to(device), torch.tensor(count, dtype=torch.int32, device=device)
    for bring in (tiers.bring_rows_torch, tiers.bring_rows_triton)[device == "cuda" : 1 + (device == HERE)]:
        for both in (True, False):
            key, value = (pool.to(device, copy=True) for pool in before)
            bring(key if both else None, value, offloaded, listed, how_many)
            assert torch.equal(value.cpu(), expected[1]) and torch.equal(key.cpu(), (expected if both else before)[0])


@pytest.mark.parametrize("T", [1, 5])
def test_newest_rows_are_stored(T, device):
    """Each to its position, and nothing else; sequences whose first step is to come store nothing."""
    key, value = (randn(3, 2, 9, 64, seed=seed, dtype=BF16, device=device) for seed in (0, 1))
    newest = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(s))[:T] for s in range(6)])
    newest = newest.view(3, 2, T).int().to(device)
    start = torch.tensor([4, -1, 0], dtype=torch.int32, device=device)
    for store in (tiers.store_rows_torch, tiers.store_rows_triton)[: 1 + (device == HERE)]:
        offloaded = torch.zeros(3, 2, 11, 2, 64, dtype=BF16, device=device)
        store(key, value, offloaded, newest, start)
        expected = torch.zeros_like(offloaded)
        for b, g, t in itertools.product((0, 2), range(2), range(T)):
            slot, place = newest[b, g, t], int(start[b]) + t
            expected[b, g, place, 0], expected[b, g, place, 1] = key[b, g, slot], value[b, g, slot]
        assert torch.equal(offloaded, expected)
