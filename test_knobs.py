"""What a plan may be told beyond the paper (split, gate, limit on moves), each against a naive loop or its limits."""

import itertools
from fractions import Fraction

import pytest
import torch

from conftest import by_slm, played, random_prompts, tiny_decoder, window_rows
from decode import Session, generate
from match import match_heads
from settings import Settings, TierSizes
from smallkv import SmallKV


@pytest.fixture(scope="module")
def pair():
    return tiny_decoder(), tiny_decoder(heads=4, head_dim=8, seed=1)


# ---- split -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["2:1:2", "1:1:4", "3:1:1", "6:1:2", "1:0:1", "0.5:2:1"])
def test_a_split_cuts_the_budget_in_exact_shares(split):
    """In whole numbers: bytes by C : R : M/2, the floor below 7.5 %, the ceiling; never more bytes than the budget."""
    c, r, m = (Fraction(part) for part in split.split(":"))
    whole = c + r + m / 2
    for percent, length in itertools.product((5, 7, 10, 20, 50, 90, 100), (100, 137, 1000, 4096)):
        share = Fraction(percent, 100)
        size = Settings(budget=percent / 100, marginal=True, split=split).sizes(length)
        rows = 2 * share * length // 1
        of_critical = max(c / whole * share, min(c / whole * Fraction(75, 1000), Fraction(3, 4) * share))
        recent = max(1, (share - of_critical) * r / (r + m / 2) * length // 1)
        critical = min(max(1, rows // 2), recent + of_critical * length // 1)
        marginal = rows - 2 * critical
        if critical + marginal > length:
            critical = min(length, rows - length)
            marginal = length - critical
        assert size == TierSizes(critical, recent, marginal), (percent, length)
        bare = Settings(budget=percent / 100, split=split).sizes(length)
        assert bare == TierSizes(max(1, rows // 2), max(1, r / whole * share * length // 1), 0)


def test_a_split_without_a_marginal_part_is_a_split_of_two():
    assert Settings(split="3:1:0") != Settings() and Settings(split="3:1:0").sizes(1000) == Settings().sizes(1000)
    assert Settings(split="1:1:0").sizes(1000) == TierSizes(200, 100, 0)


# ---- gate ------------------------------------------------------------------------------------------------------------


def test_a_gate_closes_the_heads_below_it(pair):
    """Both tiers of every step, layer, sequence and KV head against a loop that asks each head by itself."""
    llm, slm = pair
    prompts = random_prompts(140, 96)  # the second meets the matching window while it decodes
    found = match_heads(llm, slm, prompts[0], "cosine", 2.0).similarity.view(2, 2, 3).mean(-1)
    gate = found.median().item() + 1e-6  # closes half of the first sequence's heads
    settings = by_slm(budget=0.3, marginal=True, score_decay=0.5, gate=gate, split="1:1:2")
    session = Session(llm, SmallKV(llm, slm, settings), prompts, 10)
    session.prefill()
    kinds = set()
    for step, b, fed in played(session, prompts, 8):
        n = len(fed)
        if n < 100:
            continue
        heads = match_heads(llm, slm, fed[: max(100, len(prompts[b]))][:200], "cosine", 2.0)
        rows = window_rows(slm, torch.tensor([fed]))  # (8, n, n)
        weight = torch.tensor([0.5 ** (n - 1 - q) for q in range(n)])
        scores = (weight[:, None] * rows).sum(1)[heads.index].view(2, 2, 3, n).sum(2)  # (L, G, n)
        for layer, g in itertools.product(range(2), range(2)):
            closed = heads.similarity[layer].view(2, 3)[g].mean() < gate
            kinds.add(bool(closed))
            size = Settings(budget=0.3, split="1:1:2", marginal=not closed).sizes(n)
            recent = list(range(n - 1, n - 1 - size.recent, -1))
            rest = sorted(set(range(n)) - set(recent), key=lambda j: -scores[layer, g, j].item())
            ranked = recent + rest
            keys, values = (
                {j for j in table[layer, b, g].tolist() if j >= 0}
                for table in (session.cache.key_position, session.cache.value_position)
            )
            assert keys == set(ranked[: size.critical]), (step, b, layer, g)
            assert values == set(ranked[: size.critical + size.marginal]), (step, b, layer, g)
    assert kinds == {True, False}


def test_an_open_gate_is_none_and_a_closed_one_no_marginal_tier(pair):
    prompts = random_prompts(150, 97, 130)
    made = {
        name: generate(pair[0], SmallKV(*pair, Settings(**changes)), prompts, 25)
        for name, changes in {
            "marginal": {"marginal": True}, "open": {"marginal": True, "gate": -1}, "bare": {},
            "closed": {"marginal": True, "gate": 1}, "closed, refresh": {"marginal": True, "gate": 1, "refresh": 3},
            "bare, refresh": {"refresh": 3},
        }.items()
    }  # fmt: skip
    assert made["open"] == made["marginal"] != made["bare"]
    assert made["closed"] == made["bare"]
    assert made["closed, refresh"] == made["bare, refresh"]


# ---- moves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moves, refresh", [(0, 1), (1, 1), (3, 2)])
def test_moves_are_limited_as_in_a_loop_over_sets(pair, moves, refresh):
    """Every KV head by itself: of those who are wanted and not held the best enter, the best of those held stay."""
    llm, slm = pair
    head_map = torch.randint(8, (2, 6), generator=torch.Generator().manual_seed(5))
    settings = by_slm(budget=0.2, max_moves=moves, refresh=refresh, reach=float("inf"))
    prompts = random_prompts(140, 113)
    session = Session(llm, SmallKV(llm, slm, settings, head_map=head_map), prompts, 12)
    session.prefill()
    held, limited = {}, 0
    for step, b, fed in played(session, prompts, 10):
        n = len(fed)
        scores = window_rows(slm, torch.tensor([fed]))[:, -1][head_map].view(2, 2, 3, n).sum(2)  # (L, G, n)
        size = settings.planned(n)
        for place in itertools.product(range(2), range(2)):
            if step % refresh:
                held[b, place] |= {n - 1}
            else:
                order = [n - 1, *range(n - size.recent, n - 1)]
                order += sorted(set(range(n)) - set(order), key=lambda j: (-scores[place][j].item(), j))
                wanted = order[: size.critical]
                if step:
                    enter = [j for j in wanted if j not in held[b, place]][: moves + 1]
                    stay = [j for j in order if j in held[b, place]][: size.critical - len(enter)]
                    limited += set(wanted) != {*enter, *stay}
                    wanted = enter + stay
                held[b, place] = set(wanted)
            found = {j for j in session.cache.key_position[place[0], b, place[1]].tolist() if j >= 0}
            assert found == held[b, place], (step, b, place)
    assert limited  # or nothing was tested


def test_moved_bytes_are_the_rows_that_came_from_the_host(pair):
    """Counted from the slots of two steps: who is new and not the token just made; the first plan does not count."""
    session = Session(pair[0], SmallKV(*pair, Settings(marginal=True)), random_prompts(140, 113), 10)
    session.prefill()
    rows, before = 0, None
    for step in range(6):
        session.step([step, step])
        tables = session.cache.key_position, session.cache.value_position
        now = {
            (kind, layer, b, g, j)
            for kind, table in enumerate(tables)
            for layer, b, g in itertools.product(range(2), range(2), range(2))
            for j in table[layer, b, g].tolist()
            if 0 <= j < session.lengths[b] - 1
        }
        newest = {(k, x, b, g, session.lengths[b] - 1) for k, x, b, g in itertools.product(*[range(2)] * 4)}
        rows += len(now - before) if before is not None else 0
        before = now | newest
    assert rows > 0 and session.cache.moved_bytes() == rows / 5 * 16 * 4 / 2  # steps, head dim, fp32, sequences


# ---- What cannot be used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [({"split": "2:1"}, "split '2:1' is not C:R:M"), ({"split": "a:b:c"}, "split 'a:b:c' is not"),
     ({"split": "0:1:1"}, "split '0:1:1' is not"), ({"split": "1:-1:1"}, "is not C:R:M"), ({"split": 2}, "split 2 is"),
     ({"split": "inf:1:1"}, "split 'inf:1:1'"), ({"split": "1:nan:1"}, "split '1:nan:1'"),
     ({"split": "3:1:0", "marginal": True}, "leaves the marginal tier nothing"),
     ({"gate": 0.8}, "gate 0.8 should be"), ({"gate": 1.5, "marginal": True}, "gate 1.5 should be"),
     ({"max_moves": -1}, "-1 moves"), ({"max_moves": 3, "marginal": True}, "3 moves: a limit"),
     ({"max_moves": 3, "scores": "slm", "saliency_shift": False}, "3 moves: a limit"),
     ({"scores": "llm"}, "unknown scores 'llm'; supported: slm, fused"),
     ({"scores": "fused", "saliency_shift": False}, "fused scores need the SLM's")],
)  # fmt: skip
def test_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**change)
