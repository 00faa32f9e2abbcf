"""Scores against naive loops over heads and tokens, and each Triton kernel against its twin, to the bit.

Weights, scores and memories are multiples of powers of two: sums of them are exact in any order. What lies beyond a
length, or in a free slot, is NaN.
"""

import itertools

import pytest
import torch

import scores
from conftest import HERE, listed, randint, versions


def dyadic(*shape, seed, device=HERE):
    """Multiples of 2 ** -10 below 1."""
    return randint(0, 1 << 10, shape, seed, device) / 1024


def power_rows(*shape, seed, device=HERE):
    """Logits and lse of attention rows whose weights are powers of two."""
    exponent, lse = randint(-11, 1, shape, seed, device), randint(-30, 31, shape[:-1], seed + 1, device)
    return (exponent + lse[..., None]).float(), lse.float()


def places(B, G, slots, tokens, held, device=HERE):
    """A list of G * slots places: `held` of the tokens in the first KV head, half as many in each after it, among them
    one place without a token."""
    generator, own = torch.Generator().manual_seed(4), []
    for _ in range(B):
        own.append([[-1, *torch.randperm(tokens, generator=generator)[: held >> g].tolist()] for g in range(G)])
    return listed(own, G * slots - sum(len(head) for head in own[0]), device)


def head_of(slots, b, place):
    return sum(place >= end for end in slots.begin[b, 1:-1].tolist())


# ---- add_weights, add_held -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("tokens, rows", [(1, 6), (37, 6), (2049, 2)])
def test_a_row_goes_into_a_table(tokens, rows, decay, device):
    """Lengths of all rows, and of every third (the layers of a batch); 0 leaves a row as it is."""
    B = 6
    logits, lse = power_rows(B, rows, tokens, seed=0, device=device)
    before = dyadic(B, rows, tokens, seed=2, device=device)
    weight = torch.exp2(logits - lse[..., None])
    for ends in ([tokens, 0, tokens // 2], [tokens, 0, 1, tokens // 2, 1, tokens]):
        expected, row = decay * before + weight, logits.clone()
        for b, end in enumerate(ends * (B // len(ends))):
            expected[b, :, end:], row[b, :, end:] = before[b, :, end:], torch.nan
        length = torch.tensor(ends, dtype=torch.int32, device=device)
        for add in versions(scores, "add_weights", device):
            table = before.clone()
            add(table, row, lse, decay, length)
            assert torch.equal(table, expected)


@pytest.mark.parametrize("slots, tokens, held, group, G", [
    (7, 30, 1, 3, 2), (45, 60, 40, 1, 3), (1030, 1100, 1025, 7, 2), (9, 30, 8, 4, 1),
])  # fmt: skip
def test_a_row_of_places_goes_into_a_table_by_token(slots, tokens, held, group, G, device):
    """The sum over the query heads of the place's KV head; what is in no slot stays as it is, NaN too."""
    B, listed_slots = 2, places(2, G, slots, tokens, held, device)
    logits = randint(-8, 1, (B, group, G * slots), 0, device).float()  # weights 2 ** -11 to 1
    lse = randint(0, 4, (B, G * group), 1, device).float()
    before, expected = (dyadic(B, G, tokens + 3, seed=2, device=device) for _ in range(2))
    before[..., tokens:] = expected[..., tokens:] = torch.nan
    for b, place in itertools.product(range(B), range(G * slots)):
        token, g = listed_slots.token[b, place], head_of(listed_slots, b, place)
        if token >= 0:
            weight = torch.exp2(logits[b, :, place] - lse[b, g * group : (g + 1) * group]).sum()
            expected[b, g, token] = before[b, g, token] / 2 + weight
        else:
            logits[b, :, place] = torch.nan
    for add in versions(scores, "add_held", device):
        table = before.clone()
        add(table, logits, lse, 0.5, listed_slots)
        assert torch.equal(table.nan_to_num(-7), expected.nan_to_num(-7))


# ---- rank_scores, matched_rows -------------------------------------------------------------------------------------


def slm_case(T, lengths, group, device=HERE, spare=3):
    """T rows of an SLM of 2 layers of 3 heads, its score table, a memory of 2 KV heads, the matched heads; NaN beyond
    each length."""
    B, S = len(lengths), max(lengths) + spare
    logits, lse = power_rows(T, 2, B, 3, S, seed=0, device=device)
    score, memory = dyadic(2, B, 3, S, seed=2, device=device), dyadic(B, 2, S, seed=3, device=device)
    length = torch.tensor(lengths, dtype=torch.int32, device=device)
    late = torch.arange(S, device=device) >= length[:, None, None]  # (B, 1, S)
    logits, score, memory = (x.masked_fill(late, torch.nan) for x in (logits, score, memory))
    return logits, lse, score, memory, randint(0, 6, (B, 2 * group), 4, device), length


def naive_rank(logits, lse, score, memory, index, length, decay, allowed):
    """One query head at a time; (B, 2, S), NaN beyond the lengths."""
    (T, _, B, _, S), H = logits.shape, index.shape[1]
    total = torch.full((B, 2, S), torch.nan, device=logits.device)
    for b, g in itertools.product(range(B), range(2)):
        n = length[b].item()
        total[b, g, :n] = 0.0 if memory is None else decay * memory[b, g, :n]
        for head in index[b, g * H // 2 : (g + 1) * H // 2].tolist():
            layer, h, after = head // 3, head % 3, []
            running = None if score is None else score[layer, b, h, :n]
            for t in range(T):
                row = torch.exp2(logits[t, layer, b, h, :n] - lse[t, layer, b, h])
                running = row if score is None else decay * running + row
                if allowed is None or t <= allowed[b]:
                    after.append(running)
            total[b, g, :n] += torch.stack(after).amax(0)
    return total


@pytest.mark.parametrize("T, lengths, group", [(1, (1, 63), 7), (1, (1300, 5), 3), (5, (45, 109), 1), (5, (8, 30), 7)])
def test_tokens_rank_by_their_matched_heads(T, lengths, group, device):
    """By the newest row alone and by a score; with and without the LLM's memory; with drafts that count and that do
    not."""
    logits, lse, score, memory, index, length = slm_case(T, lengths, group, device)
    counted = torch.tensor([0, T - 1], dtype=torch.int32, device=device)
    for past, own, allowed in itertools.product((None, score), (None, memory), (None, counted)[: 1 + (T > 1)]):
        expected = naive_rank(logits, lse, past, own, index, length, 0.5, allowed)
        for rank in versions(scores, "rank_scores", device):
            total = rank(logits, lse, past, index, 0.5, length, 2, own, allowed)
            total = total.masked_fill(torch.arange(total.shape[2], device=device) >= length[:, None, None], torch.nan)
            assert torch.equal(total.nan_to_num(-7), expected.nan_to_num(-7))


@pytest.mark.parametrize("T, lengths, group, slots, held", [
    (1, (63, 40), 7, 1, 1), (1, (1300, 1100), 3, 1027, 1025), (5, (45, 109), 1, 33, 20), (5, (31, 30), 7, 9, 0),
])  # fmt: skip
def test_marginal_slots_borrow_the_newest_rows(T, lengths, group, slots, held, device):
    """Of the matched head, at the place's token; 0 where there is none."""
    logits, lse, _, _, index, _ = slm_case(T, lengths, group, device)
    listed_slots = places(2, 2, slots + 1, min(lengths), held, device)
    expected = torch.zeros(2, T, group, 2 * slots + 2, device=device)
    for b, place, i in itertools.product(range(2), range(2 * slots + 2), range(group)):
        token = listed_slots.token[b, place]
        if token >= 0:
            h = head_of(listed_slots, b, place) * group + i
            at = index[b, h] // 3, b, index[b, h] % 3
            for t in range(T):
                expected[b, t, i, place] = torch.exp2(logits[t][at][token] - lse[t][at])
    for borrow in versions(scores, "matched_rows", device):
        out = torch.full_like(expected, torch.nan)
        borrow(logits, lse, index, listed_slots, out)
        assert torch.equal(out, expected)
