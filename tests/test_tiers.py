"""The plan against a plain Python ranking (naive.py), step by step.

Both versions of the plan are held against the same loop: which tokens are in a tier is settled to the last one, which
of the free slots a token takes is left open. Scores beyond a length are NaN.
"""

import itertools

import pytest
import torch

import tiers
from conftest import listed, randn, versions
from naive import naive_tiers


class State:
    """The tables of one layer, 2 KV heads: empty slots and a memory."""

    def __init__(self, plan, device, B, S, C, M, T, remembers, shared):
        self.plan, self.host_rows, self.T, self.shared = plan, S + 3, T, shared
        table = {"dtype": torch.int32, "device": device}
        self.critical = listed([[[], []]] * B, 2 * C, device)
        self.marginal = listed([[[], []]] * B, 2 * M, device, seed=4) if M else None
        self.newest = torch.full((B, 2, T), 7, **table)
        self.memory = randn(B, 2, S, seed=9, device=device) if remembers else None
        self.mark = torch.zeros(B, 2, S, dtype=torch.int8, device=device)
        self.levels = torch.zeros(B, 2, tiers.LEVELS, **table)
        self.rows, self.count = torch.full((2, 2, 2 * B * max(C, M)), -9, **table), torch.zeros(2, **table)

    def held(self, slots):
        """Of each sequence and KV head slot -> token."""
        slot, token, begin = (table.tolist() for table in slots)
        for b, places in enumerate(begin):
            assert sorted(slot[b]) == list(range(len(slot[b]))) and set(token[b][places[2] :]) <= {-1}
            assert places[0] == 0 and places[-1] == len(slot[b])
        return [[dict(zip(slot[b][i:j], token[b][i:j])) for i, j in itertools.pairwise(places[:-1])]
                for b, places in enumerate(begin)]  # fmt: skip

    def step(self, total, length, sizes):
        """Plan once, and hold every table against the naive plan."""
        lists = [self.critical, self.marginal]
        before = [None if slots is None else self.held(slots) for slots in lists]
        kept, memory = total.clone(), None if self.memory is None else self.memory.clone()
        self.count.zero_()
        self.plan(total, length, sizes, self.shared, *lists, self.memory, self.newest, self.rows, self.count, self.mark,
                  self.levels, self.host_rows)  # fmt: skip
        assert torch.equal(kept.nan_to_num(-7), total.nan_to_num(-7))
        assert not self.mark.any() and not self.levels.any()
        after = [None if slots is None else self.held(slots) for slots in lists]
        listed_rows = [[], []]
        for b, n in enumerate(length.tolist()):
            wanted = naive_tiers(total[b, :, :n].tolist(), tuple(sizes[n].tolist()), self.shared)
            for g, tier in itertools.product(range(2), range(2)):
                if lists[tier] is None:
                    continue
                then, now, drafts = before[tier][b][g], after[tier][b][g], set(range(n, n + self.T - 1))
                assert sorted(now.values()) == sorted(wanted[g][tier] | (set() if tier else drafts))
                stay = {slot: t for slot, t in then.items() if t in wanted[g][tier] and t != n - 1}
                assert stay.items() <= now.items()  # who stays, stays there
                row, N = (2 * b + g) * self.host_rows, lists[tier].slot.shape[1]
                listed_rows[tier] += [(row + t, b * N + slot) for slot, t in now.items()
                                      if t < n - 1 and slot not in stay]  # fmt: skip
                if tier == 0:
                    assert [now[slot] for slot in self.newest[b, g].tolist()] == [n - 1, *sorted(drafts)]
                    assert list(now.values())[-self.T :] == [n - 1, *sorted(drafts)]
                    if memory is not None:
                        expected = memory[b, g].clone()
                        others = torch.tensor(sorted(set(range(n)) - wanted[g][0]), dtype=torch.long)
                        expected[others] = total[b, g][others]
                        assert torch.equal(self.memory[b, g].nan_to_num(-7), expected.nan_to_num(-7))
        for tier, expected in enumerate(listed_rows):
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


def check_plans(device, lengths, kinds, T, split, remembers=True, grow=(), spare=0, shared=True):
    """One step for each kind of scores, by both versions, the second KV head's twice as large. split: critical, recent
    and marginal tokens by length. grow: by how many tokens sequences grow after each step (1): the newest, then drafts;
    the slots of the others are freed."""
    grow = grow or [1] * len(kinds)
    B, S = len(lengths), max(lengths) + sum(grow) + T
    sizes = torch.tensor([[part(n) for part in split] for n in range(S + 1)], dtype=torch.int32, device=device)
    critical, _, marginal = sizes.amax(0).tolist()
    slots = critical + T - 1 + spare, marginal + spare if marginal else 0
    plans = versions(tiers, "plan_tiers", device)
    states = [State(plan, device, B, S, *slots, T, remembers, shared) for plan in plans]
    length = torch.tensor(lengths, dtype=torch.int32, device=device)
    for step, (kind, more) in enumerate(zip(kinds, grow, strict=True)):
        late = torch.arange(S) >= length.cpu()[:, None, None]
        total = scores_of(kind, B, S, step) * torch.tensor([1.0, 2.0])[:, None]
        total = total.masked_fill(late, torch.nan).to(device)
        length = length + more
        for state in states:
            state.step(total, length - more, sizes)
            token = state.critical.token
            token.masked_fill_(token >= length[:, None] - 1, -1)


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
    for shared in (True, False):
        check_plans(device, lengths, [kind] * steps, T, split, remembers, grow, spare=2, shared=shared)


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
