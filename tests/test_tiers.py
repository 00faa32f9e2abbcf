"""The plan against a plain Python ranking, step by step, and the movement of rows, to the bit.

Both versions of a function are held against the same loop: which tokens are in a tier is settled to the last one, which
of the free slots a token takes is left open. Scores beyond a length are NaN.
"""

import itertools

import pytest
import torch

import tiers
from conftest import BF16, FP32, randint, randn, versions


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


def scores_of(kind, B, S, seed):
    """(B, 2, S) on the CPU. ties: 4 values; tiny: a sharp softmax with zeros; negative: three in four are below 0, so
    that fewer compete than there are places."""
    uniform = torch.rand(B, 2, S, generator=torch.Generator().manual_seed(seed))
    if kind == "tiny":
        sharp = (12 * randn(B, 2, S, seed=seed, device="cpu")).softmax(-1)
        sharp[..., ::3] = 0
        return sharp
    plain = {"uniform": uniform, "ties": (4 * uniform).floor() / 4, "negative": uniform - 3 / 4, "zero": 0 * uniform}
    return plain[kind]


def check_plans(device, lengths, kinds, T, split, remembers=True, grow=(), spare=0):
    """One step for each kind of scores, by both versions. split: critical, recent and marginal tokens by length. grow:
    by how many tokens sequences grow after each step (1): the newest, then drafts; the slots of the others are
    freed."""
    grow = grow or [1] * len(kinds)
    B, S = len(lengths), max(lengths) + sum(grow) + T
    sizes = torch.tensor([[part(n) for part in split] for n in range(S + 1)], dtype=torch.int32, device=device)
    critical, _, marginal = sizes.amax(0).tolist()
    slots = critical + T - 1 + spare, marginal + spare if marginal else 0
    states = [State(plan, device, B, S, *slots, T, remembers) for plan in versions(tiers, "plan_tiers", device)]
    length = torch.tensor(lengths, dtype=torch.int32, device=device)
    for step, (kind, more) in enumerate(zip(kinds, grow, strict=True)):
        late = torch.arange(S) >= length.cpu()[:, None, None]
        total = scores_of(kind, B, S, step).masked_fill(late, torch.nan).to(device)
        length = length + more
        for state in states:
            state.step(total, length - more, sizes)
            state.critical.masked_fill_(state.critical >= length[:, None, None] - 1, -1)


CASES = [  # lengths of the first step, kind of scores, T, marginal tier, memory, steps
    ((1, 1), "uniform", 1, False, True, 3), ((1, 63), "ties", 1, True, True, 4), ((3, 2), "ties", 5, True, False, 3),
    ((109, 45), "tiny", 1, True, True, 4), ((111, 130), "negative", 1, True, True, 3),
    ((700, 5), "tiny", 5, False, True, 3), ((111, 257), "ties", 5, True, False, 4),
    ((1030, 77), "uniform", 1, True, True, 2), ((130, 128), "zero", 1, True, True, 2),
]  # fmt: skip


@pytest.mark.parametrize("case, row", [*((case, tiers.ROW) for case in CASES), (CASES[5], 64), (CASES[7], 64)])
def test_plans_step_by_step(case, row, device, monkeypatch):
    """Tokens come and go while the sequences grow; with drafts by as many as were accepted. The kernel's block holds
    the row, or a part of it."""
    monkeypatch.setattr(tiers, "ROW", row)
    lengths, kind, T, middle, remembers, steps = case
    split = lambda n: max(1, n // 5), lambda n: max(1, n // 20), lambda n: n // 5 if middle else 0
    grow = [1, 2, T, 3][:steps] if T > 1 else ()
    check_plans(device, lengths, [kind] * steps, T, split, remembers, grow, spare=2)


@pytest.mark.parametrize("S, T, share", [(tiers.ROW, 5, 0.03), (9000, 1, 0.97), (tiers.ROW + 7000, 1, 0.03)])
def test_plans_of_long_rows(S, T, share, device):
    """The longest that a block holds, one that is critical nearly as a whole, and one of several blocks."""
    split = lambda n: int(share * n), lambda n: n // 100, lambda n: n // 60
    check_plans(device, (S - 2 - T,), ("tiny", "ties"), T, split)


@pytest.mark.parametrize("lengths, steps, split", [
    ((38, 33), 8, lambda n: (8, 3, 20) if 40 <= n < 44 else (n, 3, 0)),  # all stay, but in some steps
    ((10, 11), 4, lambda n: (1 + n % 3, 1 + n % 3, 2)),  # recent tokens alone, or the newest alone
], ids=["all", "recent"])  # fmt: skip
def test_plans_at_the_edges_of_a_budget(lengths, steps, split, device):
    parts = [lambda n, i=i: split(n)[i] for i in range(3)]
    check_plans(device, lengths, ["uniform"] * steps, 1, parts)


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
    for bring in versions(tiers, "bring_rows", device)[device == "cuda" :]:
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
    for store in versions(tiers, "store_rows", device):
        offloaded = torch.zeros(3, 2, 11, 2, 64, dtype=BF16, device=device)
        store(key, value, offloaded, newest, start)
        expected = torch.zeros_like(offloaded)
        for b, g, t in itertools.product((0, 2), range(2), range(T)):
            slot, place = newest[b, g, t], int(start[b]) + t
            expected[b, g, place, 0], expected[b, g, place, 1] = key[b, g, slot], value[b, g, slot]
        assert torch.equal(offloaded, expected)
