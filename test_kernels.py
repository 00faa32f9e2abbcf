"""Every Triton kernel against its plain PyTorch twin: in Triton's interpreter on a CPU, compiled on a GPU.

Lengths are multiples of nothing, groups are padded, and all that nobody may read is NaN. The twins of attention get
the kernel's 16-bit inputs in fp32. Tolerances: fp32 differs by the order of sums; an output of 16 bits is rounded, and
so are the weights of its values: a few units of bf16's 8 bits or fp16's 11. Probabilities stay fp32 in the kernels.
"""

import itertools

import pytest
import torch

import kernels
import kernels_decode
import kernels_layer
import kernels_move
import kernels_prefill
import kernels_tiers
from smallkv import TierSizes, plan_tiers

HERE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton runs: without a GPU it interprets (conftest.py)
HALF = {"cpu": [torch.float16], "cuda": [torch.bfloat16, torch.float16]}  # the interpreter has no bf16 arithmetic
FINE = 1e-4  # probabilities: exact products of 16-bit numbers, summed in fp32 in another order
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@pytest.fixture
def device():
    return HERE


def cases(*always, gpu=()):
    """Parameters of a test: the interpreter is slow, so the CPU takes `always`, and a GPU the others too."""
    return [*always, *(gpu if HERE == "cuda" else ())]


def close(actual, expected, dtype=torch.float32):
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(actual.float(), expected.float(), atol=bound, rtol=bound)


def randn(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def beyond_is_nan(tensor, length):
    """(B, heads, S, ...) with NaN from each sequence's length on."""
    late = torch.arange(tensor.shape[2], device=tensor.device) >= length[:, None]
    return tensor.masked_fill(late.view(len(length), 1, -1, *[1] * (tensor.dim() - 3)), torch.nan)


def kinds(device, *head_dims):
    """(dtype, head_dim): bf16 at every head dim on a GPU, fp32 and fp16 at the middle one, for compiling takes time; in
    the interpreter fp16 at the middle one, fp32 at the others."""
    narrow = [(dtype, head_dims[1]) for dtype in HALF[device]]
    if device == "cpu":
        return narrow + [(torch.float32, dim) for dim in head_dims[::2]]
    return [(torch.float32, head_dims[1]), *narrow] + [(torch.bfloat16, dim) for dim in head_dims[::2]]


def floats(*tensors):
    return [tensor.float() for tensor in tensors]


# ---- decode attention ------------------------------------------------------------------------------------------------


def full_case(device, dtype, lengths, group, head_dim, capacity=None):
    B, G, S = len(lengths), 2, capacity or max(lengths) + 5
    length = torch.tensor(lengths, dtype=torch.int32, device=device)
    query = 2 * randn(B, G * group, head_dim, dtype=dtype, device=device)
    key = beyond_is_nan(randn(B, G, S, head_dim, seed=1, dtype=dtype, device=device), length)
    value = beyond_is_nan(randn(B, G, S, head_dim, seed=2, dtype=dtype, device=device), length)
    return query, key, value, length


@pytest.mark.parametrize("lengths, group", cases(
    ((1, 63), 1), ((111, 257), 7), ((2049, 1), 3),
    gpu=[((1, 63), 3), ((1, 63), 7), ((111, 257), 1), ((111, 257), 3), ((2049, 1), 1), ((2049, 1), 7)],
))  # fmt: skip
def test_scored_attention_equals_its_twin(lengths, group, device):
    for dtype, head_dim in kinds(device, 32, 64, 128):
        decay, with_row = {32: (0.0, False), 64: (0.5, True), 128: (1.0, False)}[head_dim]
        query, key, value, length = full_case(device, dtype, lengths, group, head_dim)
        B, H, S = len(lengths), query.shape[1], key.shape[2]
        old = torch.full((B, H, S), torch.nan, device=device)  # with decay 0 nobody may read it
        if decay:
            old = beyond_is_nan(randn(B, H, S, seed=3, device=device).abs(), length)
        scores = [old.clone(), old.clone()]
        rows = [torch.full((B, H, S), 7.0, device=device) if with_row else None for _ in range(2)]
        expected = kernels_decode.scored_attention_torch(*floats(query, key, value), length, scores[0], decay, rows[0])
        out = kernels_decode.scored_attention_triton(query, key, value, length, scores[1], decay, rows[1])
        close(out, expected, dtype)
        torch.testing.assert_close(scores[1], scores[0], atol=1e-6, rtol=FINE, equal_nan=True)
        if with_row:
            torch.testing.assert_close(rows[1], rows[0], atol=1e-6, rtol=FINE)
        if head_dim == 64:
            close(kernels_decode.decode_attention_triton(query, key, value, length), expected, dtype)


def test_a_capacity_of_many_splits_is_merged(device):
    """One sequence: the smallest splits, most of them beyond the length."""
    query, key, value, length = full_case(device, torch.float32, [700], 3, 32, capacity=12000)
    assert kernels_decode.split_size(2, 12000, 256, kernels_decode.FULL.programs) == 512
    expected = kernels_decode.decode_attention_torch(query, key, value, length)
    close(kernels_decode.decode_attention_triton(query, key, value, length), expected)


def tiered_case(device, dtype, critical, marginal, group, head_dim, spare):
    """Pools in random order, with NaN in the slots nobody uses and one in three heads borrowing nothing."""
    B, G = 2, 2
    C, N = critical + spare, critical + marginal + spare
    generator = torch.Generator().manual_seed(4)
    query = 2 * randn(B, G * group, head_dim, dtype=dtype, device=device)
    key, value = randn(B, G, C, head_dim, seed=1), randn(B, G, N, head_dim, seed=2)
    position = torch.full((B, G, C), -1, dtype=torch.int32)
    slot = torch.zeros(B, G, C, dtype=torch.int32)
    borrowed = torch.zeros(B, G * group, N)
    for b in range(B):
        for g in range(G):
            key_slot = torch.randperm(C, generator=generator)[:critical]
            value_slot = torch.randperm(N, generator=generator)[: critical + marginal]
            key[b, g, ~torch.isin(torch.arange(C), key_slot)] = torch.nan
            value[b, g, ~torch.isin(torch.arange(N), value_slot)] = torch.nan
            position[b, g, key_slot] = torch.arange(critical, dtype=torch.int32)
            slot[b, g, key_slot] = value_slot[:critical].int()
            lent = torch.rand(group, marginal, generator=generator) / (marginal + 1)
            borrowed[b, g * group : (g + 1) * group, value_slot[critical:]] = lent
    borrowed[:, ::3] = 0
    case = query, key.to(dtype), value.to(dtype), position, slot, borrowed
    return [tensor.to(device) for tensor in case]


@pytest.mark.parametrize("critical, marginal, group", cases(
    (1, 0, 1), (1, 110, 3), (63, 48, 7), (257, 300, 3),
    gpu=[(c, m, g) for c, m in ((1, 0), (1, 110), (63, 48), (257, 0), (257, 300)) for g in (1, 3, 7)],
))  # fmt: skip
def test_tiered_attention_equals_its_twin(critical, marginal, group, device):
    for dtype, head_dim in kinds(device, 32, 64, 128):
        case = tiered_case(device, dtype, critical, marginal, group, head_dim, spare={32: 0, 64: 5, 128: 70}[head_dim])
        query, position = case[0], case[3]
        weights = [torch.full((2, query.shape[1], position.shape[2]), torch.nan, device=device) for _ in range(2)]
        expected = kernels_decode.tiered_attention_torch(*floats(*case[:3]), *case[3:], weight=weights[0])
        close(kernels_decode.tiered_attention_triton(*case, weight=weights[1]), expected, dtype)
        torch.testing.assert_close(weights[1], weights[0], atol=1e-6, rtol=FINE)
        if head_dim == 64:
            close(kernels_decode.tiered_attention_triton(*case), expected, dtype)


@pytest.mark.parametrize("critical", [1, 111, 2049])
def test_without_a_marginal_tier_a_value_is_at_its_keys_slot(critical, device):
    query, key, _, position, _, _ = tiered_case(device, torch.float32, critical, 0, 3, 32, 5)
    value = randn(*key.shape, seed=7, device=device).masked_fill((position < 0)[..., None], torch.nan)
    expected = kernels_decode.tiered_attention_torch(query, key, value, position)
    close(kernels_decode.tiered_attention_triton(query, key, value, position), expected)


# ---- the tiers -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("lengths, group, ties, marginal", cases(
    ((1, 63), 1, True, True), ((1, 63), 7, False, False), ((111, 257), 3, False, True), ((111, 257), 1, True, False),
    ((2049, 5), 3, True, False),
    gpu=[(n, g, t, m) for n in ((1, 63), (111, 257), (2049, 5)) for g in (1, 3, 7) for t in (0, 1) for m in (0, 1)],
))  # fmt: skip
def test_plan_equals_its_twin(lengths, group, ties, marginal, device):
    score, index, length, sizes = plan_case(device, lengths, group, marginal, ties)
    B, S = len(lengths), score.shape[3]
    prior = torch.randint(1 << 10, (B, S), generator=torch.Generator().manual_seed(2)).to(device) / 256
    for added in (None, prior) if group == 3 else (None,):
        tiers = [torch.full((2, B, 2, S), 9, dtype=torch.int8, device=device) for _ in range(2)]
        kernels_tiers.plan_layers_torch(score.nan_to_num(0), index, length, sizes, tiers[0], added)
        kernels_tiers.plan_layers_triton(score, index, length, sizes, tiers[1], added)
        assert torch.equal(*tiers)
        counts = sizes[length.long()][:, None]
        assert ((tiers[1] == kernels_tiers.CRITICAL).sum(-1) == counts[..., 0]).all()
        assert ((tiers[1] == kernels_tiers.MARGINAL).sum(-1) == counts[..., 2]).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_plan_tells_tiny_scores_apart(bits, device, monkeypatch):
    """Rows of a sharp softmax: exponents over their whole range, zeros, and digits of either size."""
    monkeypatch.setattr(kernels_tiers, "BITS", bits)
    _, index, length, sizes = plan_case(device, (391, 700), 1, True, False)
    score = (12 * randn(2, 2, 3, 703)).softmax(-1)
    score[:, :, 0, ::3] = 0
    tiers = [torch.full((2, 2, 2, 703), 9, dtype=torch.int8, device=device) for _ in range(2)]
    for plan, tier in zip((kernels_tiers.plan_layers_torch, kernels_tiers.plan_layers_triton), tiers):
        plan(score.to(device), index, length, sizes, tier)
    assert torch.equal(*tiers)


def test_twin_of_the_plan_is_the_plan_of_the_method(device):
    """plan_tiers of smallkv.py, the reference that ranks by a stable sort, on every tie."""
    lengths = (111, 257)
    score, index, length, sizes = plan_case(device, lengths, 3, True, True)
    score = score.nan_to_num(0)
    tier = torch.empty(2, 2, 2, 260, dtype=torch.int8, device=device)
    kernels_tiers.plan_layers_torch(score, index, length, sizes, tier)
    second = index[:, 1]  # heads of the second layer
    summed = score[second // 3, torch.arange(2, device=device)[:, None], second % 3].view(2, 2, 3, 260).sum(2)
    split = [TierSizes(*sizes[n].tolist()) for n in lengths]
    critical, marginal = plan_tiers(summed, split, list(lengths))
    assert torch.equal(tier[1], (2 * critical + marginal).to(torch.int8))


@pytest.mark.parametrize("moves, ties", cases(
    (0, True), (1, False), (4, True), (1000, False), gpu=[(0, False), (1, True), (4, False), (1000, True)],
))  # fmt: skip
def test_limited_plan_equals_its_twin(moves, ties, device):
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
    kernels_tiers.plan_layers_torch(score.nan_to_num(0), index, length, sizes, tiers[0], held=held, moves=moves)
    kernels_tiers.plan_layers_triton(score, index, length, sizes, tiers[1], held=held, moves=moves)
    assert torch.equal(*tiers)
    for layer, b, g in itertools.product(range(2), repeat=3):
        chosen = set((tiers[1][layer, b, g] > 0).nonzero().flatten().tolist())
        assert len(chosen) == lengths[b] // 5 and lengths[b] - 1 in chosen
        assert len(chosen - set(held[layer, b, g].tolist()) - {lengths[b] - 1}) <= moves


@pytest.mark.parametrize("slots, lengths", [(1, (1, 1)), (52, (111, 257)), (410, (2049, 5))])
def test_slots_equal_their_twin(slots, lengths, device):
    """Some plans one after another on the same pool: positions, rows to come, the newest token's slot, the count."""
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
        moves = [kernels_move.Moves(*(torch.full_like(t, 7) for t in kernels_move.Moves.none(p))) for p in positions]
        newest = [torch.full((2, B, 2), 7, dtype=torch.int32, device=device) for _ in range(2)]
        lowest = 1 + step % 2
        for i, assign in enumerate((kernels_tiers.assign_slots_torch, kernels_tiers.assign_slots_triton)):
            assign(positions[i], tier, lowest, length, moves[i], newest[i], moved[i])
        for pair in (positions, newest, moved, *zip(*moves)):
            assert torch.equal(*pair)


@pytest.mark.parametrize("group", [1, 3])
def test_lent_rows_equal_their_twin(group, device):
    row, index, length, sizes = plan_case(device, (111, 257), group, True, False)
    tier = torch.zeros(2, 2, 2, 260, dtype=torch.int8, device=device)
    kernels_tiers.plan_layers_torch(row.nan_to_num(0), index, length, sizes, tier)
    pools = [torch.full((2, 2, 2, slots), -1, dtype=torch.int32, device=device) for slots in (60, 110)]
    for lowest, position in zip((2, 1), pools):
        unused = [kernels_move.Moves.none(position), torch.empty(2, 2, 2, dtype=torch.int32, device=device)]
        count = torch.zeros(1, dtype=torch.int64, device=device)
        kernels_tiers.assign_slots_torch(position, tier, lowest, length, *unused, count)
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


def pinned(tensor, device):
    return tensor.pin_memory() if device == "cuda" else tensor


@pytest.mark.parametrize("head_dim", [32, 128])
def test_movement_equals_its_twin_to_the_bit(head_dim, device):
    """Rows gathered from (pinned) host memory by the kernel; slots that nothing comes to keep what they had."""
    dtype = HALF[device][0]
    host = [pinned(randn(2, 2, 99, head_dim, seed=seed, dtype=dtype), device) for seed in (0, 1)]
    moves = []
    for slots in (17, 40):
        generator = torch.Generator().manual_seed(slots)
        count = torch.tensor([[0, slots], [5, 16]])
        slot = torch.stack([torch.randperm(slots, generator=generator) for _ in range(4)]).view(2, 2, slots)
        token = torch.randint(99, (2, 2, slots), generator=generator)
        beyond = torch.arange(slots) >= count[..., None]
        lists = token.masked_fill(beyond, -1), slot.masked_fill(beyond, -1), count
        moves.append(kernels_move.Moves(*(tensor.int().to(device) for tensor in lists)))
    results = []
    for bring in (kernels_move.bring_rows_torch, kernels_move.bring_rows_triton):
        pools = [randn(2, 2, slots, head_dim, seed=2, dtype=dtype, device=device) for slots in (17, 40)]
        bring(*pools, *host, *moves)
        results.append(pools)
    for ours, twins in zip(results[1], results[0]):
        assert torch.equal(ours, twins)


@pytest.mark.parametrize("storers", [1, 16])
def test_newest_rows_reach_the_host(storers, device, monkeypatch):
    monkeypatch.setattr(kernels_move, "STORERS", storers)
    newest = randn(2, 7, 2, 2, 32, device=device)
    position = torch.tensor([4, 98], dtype=torch.int32, device=device)
    results = []
    for store in (kernels_move.store_newest_torch, kernels_move.store_newest_triton):
        host = [pinned(randn(7, 2, 2, 99, 32, seed=seed), device) for seed in (1, 2)]
        store(newest, *host, position)
        if device == "cuda":
            torch.cuda.synchronize()
        results.append(host)
    for ours, twins in zip(results[1], results[0]):
        assert torch.equal(ours, twins)
    assert torch.equal(results[1][1][2, 1, 0, 98], newest[1, 2, 1, 0].cpu())


# ---- prefill ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries, keys, decay", cases(
    (1, 1, 0.5), (63, 63, 1.0), (111, 257, 0.9), (1, 257, 0.0),
    gpu=[(q, k, d) for q, k in ((1, 1), (63, 63), (111, 257), (1, 257)) for d in (1.0, 0.9, 0.5, 0.0)],
))  # fmt: skip
def test_column_sums_equal_their_twin(queries, keys, decay, device):
    for dtype, head_dim in kinds(device, 32, 64):
        for group in (1, 3) if keys == 257 else (7,):
            query = 2 * randn(2, 2 * group, queries, head_dim, dtype=dtype, device=device)
            key = randn(2, 2, keys + 9, head_dim, seed=1, dtype=dtype, device=device)
            key[:, :, keys:] = torch.nan
            expected = kernels.column_sums(*floats(query, key[:, :, :keys]), decay)
            sums = kernels_prefill.column_sums_triton(query, key[:, :, :keys], decay)
            torch.testing.assert_close(sums, expected, atol=1e-6, rtol=FINE)


# ---- between the matrix products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 111, 896])
def test_norm_equals_its_twin(size, device):
    for dtype, _ in kinds(device, 32, 64):
        update, weight = (randn(*shape, seed=1, dtype=dtype, device=device) for shape in ((3, size), (size,)))
        for added in (None, update):
            x = [randn(3, size, dtype=dtype, device=device) for _ in range(2)]
            norms = (kernels_layer.add_norm_torch, kernels_layer.add_norm_triton)
            expected, out = (norm(mine, added, weight, 1e-6) for norm, mine in zip(norms, x))
            close(out, expected, dtype)
            close(x[1], x[0], dtype)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("slotted", [False, True])
def test_rope_and_the_cache_write_equal_their_twin(slotted, norm, device):
    for dtype, D in kinds(device, 32, 64):
        B, H, G, S = 3, 6, 2, 40
        qkv = randn(B, (H + 2 * G) * D, dtype=dtype, device=device)
        cos, sin = (randn(S, D // 2, seed=seed, device=device) for seed in (1, 2))
        length = torch.tensor([1, 17, 40], dtype=torch.int32, device=device)
        norms = tuple(1 + randn(D, seed=seed, dtype=dtype, device=device) / 4 for seed in (3, 4)) + (1e-6,)
        slots = [None, None]
        if slotted:
            slots = [
                torch.randint(S, (B, G), generator=torch.Generator().manual_seed(s)).int().to(device) for s in (5, 6)
            ]
        results = []
        for rope in (kernels_layer.rope_append_torch, kernels_layer.rope_append_triton):
            pools = [torch.zeros(B, G, S, D, dtype=dtype, device=device) for _ in range(2)]
            newest = torch.zeros(2, 5, B, G, D, dtype=dtype, device=device)
            query = rope(qkv, cos, sin, length, norms if norm else None, *pools, *slots, newest[:, 3])
            results.append((query, *pools, newest))
        for ours, twins in zip(results[1], results[0]):
            close(ours, twins, dtype)


def test_gate_equals_its_twin(device):
    for dtype, _ in kinds(device, 32, 64):
        both = 3 * randn(3, 2 * 1111, dtype=dtype, device=device)
        close(kernels_layer.gate_triton(both), kernels_layer.gate_torch(both), dtype)
