"""Every Triton kernel against its plain PyTorch twin: in Triton's interpreter on a CPU, compiled on a GPU.

Lengths are multiples of nothing, groups are padded, and all that nobody may read is NaN. The twins of attention get
the kernel's 16-bit inputs in fp32. Tolerances: fp32 differs by the order of sums; an output of 16 bits is rounded, and
so are the weights of its values: a few units of bf16's 8 bits or fp16's 11. Probabilities stay fp32 in the kernels.
"""

import itertools

import pytest
import torch

import host_memory
import kernels
import kernels_decode
import kernels_eq6
import kernels_layer
import kernels_move
import kernels_prefill
from host_memory import rows_on_host
from int8_rows import decode, encode, scales_of

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


@pytest.mark.parametrize("lengths, group", cases(
    ((1, 63), 7), ((111, 257), 3), ((2049, 1), 1),
    gpu=[((1, 63), 1), ((1, 63), 3), ((111, 257), 1), ((111, 257), 7), ((2049, 1), 3), ((2049, 1), 7)],
))  # fmt: skip
def test_logits_as_scores_equal_their_twin(lengths, group, device):
    """And 2 ** (score - lse) is the attention row, whatever the anchor; nothing is written beyond a length, nor between
    strided rows."""
    for dtype, head_dim in kinds(device, 32, 64, 128):
        query, key, value, length = full_case(device, dtype, lengths, group, head_dim)
        B, H, S = len(lengths), query.shape[1], key.shape[2]
        tables = [torch.full((B, H, 2, S), torch.nan, device=device) for _ in range(3)]
        lse = [torch.full((B, H), torch.nan, device=device) for _ in range(2)]
        anchors = [20 * randn(B, H, seed=5, device=device) for _ in range(2)]
        inputs, scores, before = floats(query, key, value), [table[:, :, 1] for table in tables], anchors[0].clone()
        kernels_decode.scored_attention_torch(*inputs, length, scores[2], 0.0)
        expected = kernels_decode.scored_attention_torch(*inputs, length, scores[0], 0.0, None, lse[0], anchors[0])
        out = kernels_decode.scored_attention_triton(
            query, key, value, length, scores[1], 0.0, None, lse[1], anchors[1]
        )
        close(out, expected, dtype)
        torch.testing.assert_close(tables[1], tables[0], atol=FINE, rtol=0, equal_nan=True)
        for anchor, log in zip(anchors, lse):
            torch.testing.assert_close(log, lse[0], atol=FINE, rtol=0)
            torch.testing.assert_close(anchor, before + lse[0], atol=FINE, rtol=0)
        for score, total in zip(scores, lse):
            row = torch.exp2(score - total[..., None])
            torch.testing.assert_close(row, scores[2], atol=1e-6, rtol=FINE, equal_nan=True)


def test_a_capacity_of_many_splits_is_merged(device):
    """One sequence: the smallest splits, most of them beyond the length."""
    query, key, value, length = full_case(device, torch.float32, [700], 3, 32, capacity=12000)
    launch = kernels_decode.FULL
    assert kernels_decode.split_size(2, 12000, launch.tile // 32, launch.programs) == 256
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
        for kept in {torch.float32, dtype}:  # the score memory, which may have 16 bits where the model has
            before = randn(2, 2, critical + 9, seed=8, dtype=kept, device=device)  # nobody holds its last tokens
            memories = [before.clone() for _ in range(2)]
            expected = kernels_eq6.tiered_attention_torch(*floats(*case[:3]), *case[3:], memories[0], 0.5)
            close(kernels_eq6.tiered_attention_triton(*case, memories[1], 0.5), expected, dtype)
            last = {torch.float32: FINE, torch.float16: 2**-10, torch.bfloat16: 2**-7}[kept]  # one may be rounded up
            torch.testing.assert_close(memories[1], memories[0], atol=1e-6, rtol=last)
            assert torch.equal(memories[1][..., critical:], before[..., critical:])
        if head_dim == 64:
            close(kernels_eq6.tiered_attention_triton(*case), expected, dtype)


def test_what_the_memory_gets_is_what_the_tokens_weigh(device):
    """And it fades. Where all is critical, a token's weights are its column of full attention, summed over the KV
    head's heads."""
    query, key, value = (randn(2, heads, 40, 32, seed=seed, device=device) for seed, heads in enumerate((6, 2, 2)))
    place = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(n)) for n in range(4)])
    place = place.view(2, 2, 40).to(device)
    pools = [torch.empty_like(kept).scatter_(2, place[..., None].expand_as(kept), kept) for kept in (key, value)]
    position = place.argsort(-1).int()
    rows = kernels.attention_rows(query, key)[:, :, -1]  # (B, H, n)
    for attention in (kernels_eq6.tiered_attention_torch, kernels_eq6.tiered_attention_triton):
        memory = torch.ones(2, 2, 43, device=device)
        attention(query[:, :, -1].contiguous(), *pools, position, memory=memory, decay=0.25)
        torch.testing.assert_close(memory[..., :40] - 0.25, rows.unflatten(1, (2, 3)).sum(2), atol=1e-5, rtol=1e-5)
        assert (memory[..., 40:] == 1).all()


@pytest.mark.parametrize("critical", [1, 111, 2049])
def test_without_a_marginal_tier_a_value_is_at_its_keys_slot(critical, device):
    query, key, _, position, _, _ = tiered_case(device, torch.float32, critical, 0, 3, 32, 5)
    value = randn(*key.shape, seed=7, device=device).masked_fill((position < 0)[..., None], torch.nan)
    expected = kernels_eq6.tiered_attention_torch(query, key, value, position)
    close(kernels_eq6.tiered_attention_triton(query, key, value, position), expected)


# ---- movement -------------------------------------------------------------------------------------------------------


def on_host(tensor, device):
    return rows_on_host(tensor.shape, tensor.dtype, torch.device(device)).copy_(tensor)


@pytest.mark.parametrize("kind", ["managed", "pinned"])
def test_memory_of_the_host_is_indexed_like_the_devices(kind, device, monkeypatch):
    if device == "cuda":
        assert host_memory.kind_of_host("cuda") == "managed"  # Linux: the other kind is for what has no such memory
        monkeypatch.setattr(host_memory, "kind_of_host", lambda device: kind)
    before = torch.cuda.memory_allocated()
    rows = rows_on_host((3, 7, 32), torch.float16, torch.device(device))
    assert rows.shape == (3, 7, 32) and rows.device.type == device and torch.cuda.memory_allocated() == before
    rows.zero_()
    index = torch.tensor([4, 1], device=device)
    rows.view(-1, 32)[index] = 2.0
    assert rows.sum().item() == 128 and (rows[0, index] == 2).all()
    assert torch.equal(rows.cpu()[0, 1], torch.full((32,), 2.0, dtype=torch.float16))


def test_memory_of_the_host_belongs_to_the_device_asked_for():
    """Not to the current one; and it is given back after the kernels that are still at it."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    device = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    rows = rows_on_host((1 << 20, 32), torch.float32, device)
    made = torch.randn(rows.shape, device=device)
    for _ in range(20):
        rows.copy_(made)
    assert rows.device == device and torch.equal(rows, made)
    for _ in range(20):
        made.add_(rows)
    del rows
    assert torch.cuda.current_device() == 0 and made.isfinite().all()


def test_a_row_in_8_bits_is_within_half_a_level(device):
    """Each channel by its own range, wherever that lies; what passes it by more than a quarter is cut off."""
    prompt = randn(3, 40, 16, device=device) * torch.logspace(-1, 1, 16, device=device)
    scales = scales_of(prompt)[:, None]  # (3, 1, 2, 16)
    scale, zero = scales.unbind(2)
    low, high = prompt.amin(1, keepdim=True), prompt.amax(1, keepdim=True)
    assert torch.allclose(scale, (high - low) * 1.25 / 254) and torch.allclose(zero, (high + low) / 2)
    held = encode(prompt, scales)
    assert held.dtype == torch.int8 and held.amax(1).eq(102).all() and held.amin(1).eq(-102).all()  # 127 / 1.25: 101.6
    assert ((decode(held, scales, torch.float32) - prompt).abs() <= 0.5001 * scale).all()
    assert (encode(zero + 2 * (prompt - zero), scales).abs().amax(1) == 127).all()
    factor, offset = torch.ones(16, device=device), torch.zeros(16, device=device)
    factor[[3, 11]], offset[[5, 11]] = 128.0, 100.0  # channels of very large keys are rounded as before
    other = prompt * factor + offset
    scales = scales_of(other)[:, None]
    assert torch.equal(encode(prompt * factor, scales_of(prompt * factor)[:, None]), held)
    error = decode(encode(other, scales), scales, torch.float32) - other
    assert (error.abs() <= 0.501 * scale * factor).all()
    assert encode(prompt, None) is prompt and decode(prompt, None, torch.float32) is prompt
    nothing = torch.zeros(2, 5, 16, device=device)
    assert (encode(nothing, scales_of(nothing)[:, None]) == 0).all()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("head_dim, at_once, large", [
    (32, 512, 1 << 26), (128, 512, 1 << 26), (128, 4, 1 << 26), (32, 4, 16),
])  # fmt: skip
def test_movement_equals_its_twin_to_the_bit(head_dim, at_once, large, int8, device, monkeypatch):
    """Rows gathered from host memory, in one turn or many, by four or eight programs, K and V of the same tokens or
    of others; slots that nothing comes to keep what they had."""
    dtype = torch.int8 if int8 else HALF[device][0]
    monkeypatch.setattr(kernels_move, "BYTES", at_once * head_dim * dtype.itemsize)
    monkeypatch.setattr(kernels_move, "LARGE", large)
    host = on_host((50 * randn(2, 2, 99, 2, head_dim)).to(dtype), device)
    moves = []
    for slots, count in ((17, 41), (40, 0 if at_once == 512 else 160)):
        generator = torch.Generator().manual_seed(slots)
        target = torch.randperm(4 * slots, generator=generator)
        source = target // slots * 99 + torch.randint(99, (4 * slots,), generator=generator)
        beyond = torch.arange(4 * slots) >= count
        ends = (end.masked_fill(beyond, 2**31 - 1) for end in (source, target))
        lists = *ends, torch.tensor(count), torch.tensor(0)
        moves.append(kernels_move.Moves(*(tensor.int().to(device) for tensor in lists)))
    for slots, given in (((17, 40), moves), ((17, 17), moves[:1])):
        before = [(50 * randn(2, 2, count, head_dim, seed=2, device=device)).to(dtype) for count in slots]
        results = []
        for bring in (kernels_move.bring_rows_torch, kernels_move.bring_rows_triton):
            results.append([pool.clone() for pool in before])
            for _ in range(2):  # a launch leaves the lists to the next as it found them
                bring(*results[-1], host, *given)
            assert not any(listed.taken for listed in given)
        for ours, twins, held in zip(*reversed(results), before):
            assert torch.equal(ours, twins)
            assert torch.equal(ours, held) == (slots == (17, 40) and held is before[1] and at_once == 512)


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("at_once", [16, 512])
def test_newest_rows_reach_the_host(tokens, at_once, device, monkeypatch):
    """Of some layers, one token a sequence or a round of them; to the bit, and nothing beside."""
    monkeypatch.setattr(kernels_move, "BYTES", at_once * 32 * 4)
    newest, layers = randn(2, 7, 2, tokens, 2, 32, device=device), slice(2, 6)
    length = torch.tensor([5, 95], dtype=torch.int32, device=device)
    for store in (kernels_move.store_rows_torch, kernels_move.store_rows_triton):
        host = on_host(randn(7, 2, 2, 99, 2, 32, seed=1), device)
        store(newest[:, layers], host[layers], length)
        if device == "cuda":
            torch.cuda.synchronize()
        expected = randn(7, 2, 2, 99, 2, 32, seed=1)
        for kind, (b, at) in itertools.product(range(2), enumerate((4, 94))):
            expected[layers, b, :, at : at + tokens, kind] = newest[kind, layers, b].cpu().transpose(1, 2)
        assert torch.equal(host.cpu(), expected)


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
