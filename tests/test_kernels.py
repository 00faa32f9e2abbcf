"""Every attention against a naive loop in fp64, and each Triton kernel against its plain PyTorch twin.

Lengths are multiples of nothing, groups are padded, and all that may not be read is NaN. Twins get a kernel's 16-bit
inputs in fp32. Tolerances: the rounding of outputs and of the values' weights; logits and sums stay fp32.
"""

import itertools

import pytest
import torch

import kernels
from conftest import FP32, HALF, HERE, close, listed, randn

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")  # where m is 1, in the interpreter
FINE = 1e-4  # logits: exact products of 16-bit numbers, summed in fp32 in another order


# ---- Many queries --------------------------------------------------------------------------------------------------


def prefill_case(queries, keys, group=3, D=16, dtype=FP32, device=HERE, spare=0):
    """Queries (2, H, T, D), K and V (2, 2, S, D) cut out of a larger cache that is NaN beyond."""
    query = 2 * randn(2, 2 * group, queries, D, dtype=dtype, device=device)
    pools = [randn(2, 2, keys + spare, D, seed=seed, dtype=dtype, device=device) for seed in (1, 2)]
    for pool in pools:
        pool[:, :, keys:] = torch.nan
    return query, *(pool[:, :, :keys] for pool in pools)


def naive_rows(query, key):
    """Causal attention rows (B, H, T, S) fp64, one query at a time."""
    (B, H, T, D), (G, S) = query.shape, key.shape[1:3]
    rows = torch.zeros(B, H, T, S, dtype=torch.float64, device=query.device)
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        logits = key[b, h * G // H, : S - T + t + 1].double() @ query[b, h, t].double() / D**0.5
        rows[b, h, t, : len(logits)] = logits.softmax(0)
    return rows


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 9), (5, 9), (9, 9)])
def test_attention_of_many_queries_equals_a_naive_loop(queries, keys, device):
    query, key, value = prefill_case(queries, keys, device=device, spare=4)
    rows = naive_rows(query, key)
    close(kernels.attention_rows(query, key, keys - queries), rows)
    close(kernels.causal_attention(query, key, value), rows.float() @ value.repeat_interleave(3, 1))


@pytest.mark.parametrize("decay", [1.0, 0.9, 0.5, 0.0])
@pytest.mark.parametrize("queries, keys", [(1, 9), (9, 9), (70, 90)])
def test_column_sums_are_weighted_sums_of_rows(queries, keys, decay, device, monkeypatch):
    monkeypatch.setattr(kernels, "SCORE_BLOCK", 4)  # several blocks; with decay 0.5 only 31 queries count
    query, key, _ = prefill_case(queries, keys, device=device)
    rows = naive_rows(query, key)
    expected = sum(decay ** (queries - 1 - t) * rows[:, :, t] for t in range(queries))
    close(kernels.column_sums_torch(query, key, decay), expected)


@pytest.mark.parametrize("queries, keys, decay, group, D, dtype", [
    (1, 1, 0.5, 7, 64, FP32), (63, 63, 1.0, 1, 16, FP32), (111, 257, 1.0, 3, 64, HALF), (70, 150, 0.9, 1, 128, HALF),
    (1, 257, 0.0, 3, 128, FP32), (130, 130, 0.5, 7, 64, HALF),
])  # fmt: skip
def test_column_sums_equal_their_twin(queries, keys, decay, group, D, dtype):
    query, key, _ = prefill_case(queries, keys, group, D, dtype, spare=9)
    expected = kernels.column_sums_torch(query.float(), key.float(), decay)
    for laid in (key, key.transpose(1, 2).contiguous().transpose(1, 2)):  # as a cache has them, and as a product does
        torch.testing.assert_close(kernels.column_sums_triton(query, laid, decay), expected, atol=1e-6, rtol=FINE)


# ---- A few queries: decode -----------------------------------------------------------------------------------------


def full_case(lengths, T, group, D, dtype=FP32, device=HERE, spare=5):
    """A cache whose slot j holds token j, NaN from the last token on that a new one sees."""
    B, G, C = len(lengths), 2, max(lengths) + T - 1 + spare
    length = torch.tensor(lengths, dtype=torch.int32, device=device)
    query = 2 * randn(B, T, G * group, D, dtype=dtype, device=device)
    beyond = torch.arange(C, device=device) >= length[:, None] + T - 1
    key, value = (randn(B, G, C, D, seed=seed, dtype=dtype, device=device) for seed in (1, 2))
    return [query, *(pool.masked_fill(beyond[:, None, :, None], torch.nan) for pool in (key, value)), length]


def slot_case(lengths, held, T, group, D, dtype=FP32, device=HERE, spare=3):
    """`held` older tokens and the T new ones in slots of a pool, in the second KV head a third of the older ones; rows
    of free slots are NaN."""
    tokens, generator = [], torch.Generator().manual_seed(3)
    for n in lengths:
        older = [torch.randperm(n - 1, generator=generator)[:count].tolist() for count in (held, held // 3)]
        tokens.append([[*own, *range(n - 1, n + T - 1)] for own in older])
    slots, (B, G) = listed(tokens, spare, device), (len(lengths), 2)
    N = slots.token.shape[1]
    dead = torch.ones(B, N, dtype=torch.bool, device=device).scatter_(1, slots.slot.long(), slots.token < 0)
    length = torch.tensor(lengths, dtype=torch.int32, device=device)
    query = 2 * randn(B, T, G * group, D, dtype=dtype, device=device)
    pools = (randn(B, N, D, seed=seed, dtype=dtype, device=device) for seed in (1, 2))
    return [query, *(pool.masked_fill(dead[..., None], torch.nan) for pool in pools), length, slots]


def lent_case(query, M, device=HERE):
    """Borrowed weights (B, T, H/G, 2 M) for M tokens of the first KV head and M // 2 of the second; free slots' V is
    NaN; heads that borrow all, half and nothing."""
    (B, T, H, D), generator = query.shape, torch.Generator().manual_seed(5)
    slots = listed([[list(range(M)), list(range(M // 2))] for _ in range(B)], M - M // 2, device, seed=6)
    weight = torch.rand(B, T, H // 2, 2 * M, generator=generator)
    for head in (slice(0, M), slice(M, M + M // 2)):
        weight[..., head] *= 0.5 / weight[..., head].sum(-1, keepdim=True)
    weight[..., M + M // 2 :] = 0
    weight[:, :, 0, :M] = 0  # query head 0
    weight[:, -1, -1, :M] = torch.eye(M)[0]  # m is 1 to the bit
    free = torch.ones(B, 2 * M, dtype=torch.bool, device=device).scatter_(1, slots.slot.long(), slots.token < 0)
    marginal = randn(B, 2 * M, D, seed=6, device=device).masked_fill(free[..., None], torch.nan)
    return [weight.to(device), marginal.to(query.dtype), slots]


def naive_decode(query, key, value, length, slots=None, weight=None, marginal=None, lent=None):
    """Output, and the weight of every token in it, by Eq. 6: one query head of one token at a time. The weights like
    the logits: (B, T, H, S) by token, or (B, T, H/G, N) by place."""
    (B, T, H, D), G = query.shape, 2
    shape = (B, T, H, key.shape[2]) if slots is None else (B, T, H // G, key.shape[1])
    out, share = query.new_zeros(B, T, H, D, dtype=torch.float64), query.new_zeros(shape, dtype=torch.float64)
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        (g, i), end = divmod(h, H // G), length[b] + t
        if slots is None:
            rows, places, line = (key[b, g], value[b, g]), torch.arange(int(end)), share[b, t, h]
            at = places
        else:
            places = torch.arange(*slots.begin[b, g : g + 2].tolist())
            token = slots.token[b].cpu()[places]
            places = places[(token >= 0) & (token < end.cpu())]
            rows, at, line = (key[b], value[b]), slots.slot[b].cpu()[places].long(), share[b, t, i]
        softmax = (rows[0][at].double() @ query[b, t, h].double() / D**0.5).softmax(0)
        borrowed = [] if weight is None else range(*lent.begin[b, g : g + 2].tolist())
        mass = sum(weight[b, t, i, place].double() for place in borrowed)
        line[places] = (1 - mass) * softmax
        out[b, t, h] = line[places] @ rows[1][at].double()
        for place in borrowed:
            out[b, t, h] += weight[b, t, i, place].double() * marginal[b, lent.slot[b, place]].double()
    return out, share


def attend(function, case, lent, with_logits=True):
    """Output, lse, logits; the table of logits was 7 everywhere, and with it a table of lse is given."""
    query, key, value, length, *slots = case
    (B, T, H, _), slots = query.shape, slots[0] if slots else None
    shape = (B, T, H, key.shape[2]) if slots is None else (B, T, H // 2, key.shape[1])
    logits = torch.full(shape, 7.0, device=key.device) if with_logits else None
    table = torch.empty(query.shape[:3], device=key.device) if with_logits else None
    out, lse = function(query, key, value, length, slots, logits, table, *lent)
    assert table is None or lse is table
    return out, lse, logits


def by_query_head(lse, slots):
    """lse (B, T, H) -> like the logits of places, (B, T, H/G, N)."""
    head = slots.heads().clamp(max=1)[:, None, None]
    lse = lse.unflatten(2, (2, -1)).transpose(2, 3)  # (B, T, H/G, G)
    return lse.gather(3, head.expand(*lse.shape[:3], -1))


CASES = [  # lengths, older tokens in slots (None: all, slot j has token j), marginal slots, T, group, D, dtype
    ((1, 63), None, 0, 1, 7, 64, FP32), ((111, 257), None, 0, 1, 3, 128, HALF), ((40, 1), None, 0, 5, 1, 16, FP32),
    ((300, 33), None, 0, 5, 7, 64, HALF), ((90, 17), None, 21, 1, 3, 64, FP32), ((31, 65), 0, 0, 1, 3, 64, FP32),
    ((50, 299), 49, 0, 1, 1, 128, FP32), ((120, 290), 100, 110, 1, 7, 64, HALF), ((130, 41), 40, 1, 5, 3, 16, HALF),
    ((100, 31), 30, 97, 5, 14, 64, FP32), ((60, 59), 8, 300, 5, 1, 128, HALF),
]  # fmt: skip


def make_case(lengths, held, lent_slots, T, group, D, dtype, device=HERE):
    sizes = T, group, D, dtype, device
    case = full_case(lengths, *sizes) if held is None else slot_case(lengths, held, *sizes)
    return case, lent_case(case[0], lent_slots, device) if lent_slots else []


@pytest.mark.parametrize("numbers", [case for case in CASES if case[-1] == FP32])
def test_decode_attention_equals_a_naive_loop(numbers, device):
    """And 2 ** (logit - lse) is what a slot weighs in the output, (1 - m) included; 0 for what is not seen."""
    case, lent = make_case(*numbers, device)
    expected, share = naive_decode(*case[:4], *(case[4:] or [None]), *lent)
    out, lse, logits = attend(kernels.decode_attention_torch, case, lent)
    close(out, expected)
    written = ~logits.eq(7)
    whole = lse[..., None] if len(case) == 4 else by_query_head(lse, case[4])
    close(torch.exp2(logits - whole).where(written, 0), share)
    place = torch.arange(written.shape[-1], device=device)
    last = case[3][:, None] + numbers[3] - 1 if len(case) == 4 else case[4].begin[:, 2:3]  # nothing from here on
    assert torch.equal(written, (place < last)[:, None, None].expand(written.shape))
    close(attend(kernels.decode_attention_torch, case, lent, False)[0], out)


@pytest.mark.parametrize("numbers", CASES)
def test_decode_attention_equals_its_twin(numbers):
    case, lent = make_case(*numbers)
    wide = [[x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in part] for part in (case, lent)]
    expected, found = attend(kernels.decode_attention_torch, *wide), attend(kernels.decode_attention_triton, case, lent)
    close(found[0], expected[0], numbers[-1])
    for ours, twins in zip(found[1:], expected[1:]):
        close(ours, twins, FINE)
    out, lse, _ = attend(kernels.decode_attention_triton, case, lent, with_logits=False)
    assert torch.equal(out, found[0]) and torch.equal(lse, found[1])


@pytest.mark.parametrize("T, group", [(1, 3), (5, 14)])
def test_many_splits_are_merged(T, group, monkeypatch):
    """Splits of two blocks: most of them beyond the length; a head with nearly all slots, whose splits are merged in
    several turns; and a marginal tier shorter than the number of splits."""
    monkeypatch.setattr(kernels, "PROGRAMS", 1 << 20)
    full, slots = full_case([300, 3], T, group, 64, spare=500), slot_case([900, 890], 850, T, group, 64)
    lopsided = listed([[list(range(880)), list(range(n - 1, n + T - 1))] for n in (900, 890)], 300)
    pools = [randn(2, lopsided.token.shape[1], 64, seed=seed) for seed in (1, 2)]
    uneven = [slots[0], *pools, slots[3], lopsided]
    for case, borrowed in ((full, []), (slots, []), (uneven, []), (uneven, lent_case(slots[0], 70))):
        expected, found = (attend(f, case, borrowed) for f in
                           (kernels.decode_attention_torch, kernels.decode_attention_triton))  # fmt: skip
        for ours, twins in zip(found, expected):
            close(ours, twins, FINE)
