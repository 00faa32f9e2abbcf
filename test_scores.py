"""The kernels of the scores and of the score memory against their PyTorch twins: as test_kernels.py, to the bit."""

import itertools

import pytest
import torch

import kernels_decode
import kernels_scores
from int8_rows import encode, per_token, scales_of
from test_kernels import HALF, HERE, beyond_is_nan, cases, floats, full_case


@pytest.fixture
def device():
    return HERE


def dyadic(*shape, seed, device):
    """Multiples of 2^-10 below 1: sums and halves of them are exact in any order."""
    return (torch.randint(1 << 10, shape, generator=torch.Generator().manual_seed(seed)) / 1024).to(device)


def score_case(device, lengths, group):
    """Scores of 2 SLM layers x 3 heads with NaN beyond each length, and the heads of 2 LLM layers of 2 KV heads."""
    B, S = len(lengths), max(lengths) + 3
    length = torch.tensor(lengths, dtype=torch.int32, device=device)
    score = dyadic(2, B, 3, S, seed=0, device=device)
    score = score.masked_fill((torch.arange(S, device=device) >= length[:, None])[None, :, None], torch.nan)
    index = torch.randint(6, (B, 2, 2 * group), generator=torch.Generator().manual_seed(1)).to(device)
    return score, index, length


def logit_case(device, lengths, group):
    """Probabilities that are powers of two, and the same as logits and log of the sum: exact either way; NaN beyond."""
    nothing, index, length = score_case(device, lengths, group)
    exponent, lse = (
        torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float().to(device)
        for seed, (low, high, shape) in enumerate(((-11, 1, nothing.shape), (-30, 31, nothing.shape[:3])))
    )
    exponent = exponent.masked_fill(nothing.isnan(), torch.nan)
    return torch.exp2(exponent), exponent + lse[..., None], lse, index, length


CASES = cases(
    ((1, 63), 7), ((109, 45), 1), ((111, 2049), 3), gpu=[((16893, 5), 7), ((2049, 5), 1), ((8200, 1025), 3)]
)


@pytest.mark.parametrize("lengths, group", CASES)
def test_scores_are_summed_as_by_their_twin(lengths, group, device):
    """With and without a memory; and by hand. Beyond a length nothing is written."""
    score, index, length = score_case(device, lengths, group)
    B, S = len(lengths), score.shape[3]
    memory = dyadic(2, B, 2, S, seed=3, device=device)
    for remembered in (None, memory, memory.to(HALF[device][0])):
        totals = [torch.full((2, B, 2, S), torch.nan, device=device) for _ in range(2)]
        for total, add in zip(totals, (kernels_scores.sum_scores_torch, kernels_scores.sum_scores_triton)):
            add(score, index, length, total, None, remembered, 0.5)
        torch.testing.assert_close(*totals, atol=0, rtol=0, equal_nan=True)
        for b, n in enumerate(lengths):
            assert totals[1][:, b, :, n:].isnan().all()
            heads = index[b, 1, group:].tolist()  # of the second layer's second KV head
            expected = sum(score[head // 3, b, head % 3, :n] for head in heads)
            expected = expected if remembered is None else expected + remembered[1, b, 1, :n].float() / 2
            assert torch.equal(totals[1][1, b, 1, :n], expected)


@pytest.mark.parametrize("far, limit", [(0, 0.006), (40, 0.006), (2000, 0.006), (70000, 0.06)])
def test_logits_in_16_bits_are_those_in_32_rounded_near_an_anchor(far, limit, device):
    """Logits far from 0, as of keys with a large constant: after one step the rows are as good as near it, up to what
    fp32 itself rounds there."""
    query, key, value, length = full_case(device, torch.float32, (111, 257), 3, 64)
    key = beyond_is_nan(key / 4, length)
    key[:, :, :, 0] += far * 64**0.5 / 2 / kernels_decode.LOG2_E  # and the query 2 there: logits of `far` more
    query[..., 0] = 2
    rows = torch.full((2, 6, key.shape[2]), torch.nan, device=device)
    kernels_decode.scored_attention_torch(query, key, value, length, rows, 0.0)
    seen = ~rows.isnan()
    for scored in (kernels_decode.scored_attention_torch, kernels_decode.scored_attention_triton):
        score = torch.full(rows.shape, torch.nan, dtype=torch.float16, device=device)
        lse, anchor = torch.zeros(2, *rows.shape[:2], device=device)
        for _ in range(2):
            scored(query, key, value, length, score, 0.0, None, lse, anchor)
            assert torch.isfinite(score[seen]).all() and score[~seen].isnan().all()
        row = torch.exp2(score - lse[..., None])  # half a unit of the tenth bit, for what counts: 2 ** -10 and above
        large = seen & (rows > 2**-10)
        assert large.sum() > 100 and ((row - rows).abs() / rows)[large].max() < limit


def test_logits_are_written_in_whole_lines(device):
    """Where a row is a multiple of 16 long: up to each length they are the twin's; beyond the next 16 nothing is. K and
    V in 16 bits and in 8."""
    for dtype, int8 in itertools.product(HALF[device], (False, True)):
        query, *pools, length = full_case(device, dtype, (111, 257), 3, 64)
        key, value = (torch.nn.functional.pad(pool, (0, 0, 0, -pool.shape[2] % 16), value=torch.nan) for pool in pools)
        scales = (None, None)
        if int8:
            scales = tuple(scales_of(pool.nan_to_num()) for pool in (key, value))
            key, value = (encode(pool.nan_to_num(), per_token(scale)) for pool, scale in zip((key, value), scales))
        shape = 2, 6, key.shape[2]
        scores = [torch.full(shape, 7.0, dtype=torch.float16, device=device) for _ in range(2)]
        logs = [torch.zeros(2, *shape[:2], device=device) for _ in range(2)]
        for score, log, name in zip(scores, logs, ("torch", "triton")):
            attend = getattr(kernels_decode, f"scored_attention_{name}")
            attend(floats(query)[0] if name == "torch" else query, key, value, length, score, 0.0, None, *log, scales)
        for b, n in enumerate(length.tolist()):
            torch.testing.assert_close(scores[1][b, :, :n], scores[0][b, :, :n], atol=2e-2, rtol=2e-3)
            assert (scores[1][b, :, n + -n % 16 :] == 7).all()
        torch.testing.assert_close(logs[1], logs[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("lengths, group", CASES)
def test_a_sum_by_logits_is_the_sum_by_probabilities(lengths, group, half, device):
    """By the twin and by the kernel; the logits are whole numbers, exact in 16 bits too."""
    probability, logit, lse, index, length = logit_case(device, lengths, group)
    logit = logit.half() if half else logit
    totals = [torch.full((2, len(lengths), 2, logit.shape[3]), torch.nan, device=device) for _ in range(3)]
    kernels_scores.sum_scores_torch(probability, index, length, totals[0])
    kernels_scores.sum_scores_torch(logit, index, length, totals[1], lse)
    kernels_scores.sum_scores_triton(logit, index, length, totals[2], lse)
    for total in totals[1:]:
        torch.testing.assert_close(total, totals[0], atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("lengths, group", CASES)
def test_a_memory_fades_as_its_twin_does(lengths, group, device):
    row, index, length = score_case(device, lengths, group)
    for dtype in (torch.float32, HALF[device][0]):
        memories, tier = fade_case(*row.shape[1:4:2], 2, device)
        memories = [memory.to(dtype) for memory in memories]
        for memory, fade in zip(memories, (kernels_scores.sum_scores_torch, kernels_scores.sum_scores_triton)):
            fade(row, index, length, memory, None, memory, 0.5, tier)
        assert torch.equal(*memories)


@pytest.mark.parametrize("lengths, group", CASES)
def test_a_memory_fades_by_logits_as_by_probabilities(lengths, group, device):
    probability, logit, lse, index, length = logit_case(device, lengths, group)
    memories, tier = fade_case(*logit.shape[1:4:2], 4, device)
    for memory, fade, row, log in (
        (memories[0], kernels_scores.sum_scores_torch, probability, None),
        (memories[1], kernels_scores.sum_scores_torch, logit, lse),
        (memories[2], kernels_scores.sum_scores_triton, logit, lse),
        (memories[3], kernels_scores.sum_scores_triton, logit.half(), lse),
    ):
        fade(row, index, length, memory, log, memory, 0.5, tier)
    assert all(torch.equal(memory, memories[0]) for memory in memories[1:])


def test_fading_is_what_a_sum_and_a_plan_do(device):
    """With the tiers as they are: the critical keep theirs, the others have what they would rank by."""
    row, index, length = score_case(device, (109, 45), 3)
    (memory, before), tier = fade_case(2, row.shape[3], 2, device)
    total = torch.zeros_like(memory)
    kernels_scores.sum_scores_torch(row, index, length, total, None, before, 0.5)
    kernels_scores.sum_scores_torch(row, index, length, memory, None, memory, 0.5, tier)
    expected = before.where(tier == kernels_scores.CRITICAL, total)
    for b, n in enumerate((109, 45)):
        assert torch.equal(memory[:, b, :, :n], expected[:, b, :, :n])
        assert torch.equal(memory[:, b, :, n:], before[:, b, :, n:])


def fade_case(B, S, copies, device):
    tier = torch.randint(3, (2, B, 2, S), generator=torch.Generator().manual_seed(2)).to(device, torch.int8)
    return [dyadic(2, B, 2, S, seed=3, device=device) for _ in range(copies)], tier
