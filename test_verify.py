"""Kernels of a verified round against their twins (odd shapes, as in test_kernels.py), and the twins against loops."""

import pytest
import torch

import kernels_decode
import kernels_eq6
import kernels_layer
import kernels_verify
from test_kernels import HERE, cases, close, floats, kinds, randn, tiered_case


@pytest.fixture
def device():
    return HERE


def verify_case(device, dtype, lengths, group, tokens, head_dim, spare=3):
    """A full cache with NaN beyond each round; lengths are those of the newest token."""
    B, G, S = len(lengths), 2, max(lengths) + tokens - 1 + spare
    length = torch.tensor(lengths, dtype=torch.int32, device=device)
    query = 2 * randn(B, tokens, G * group, head_dim, dtype=dtype, device=device)
    late = (torch.arange(S, device=device) >= length[:, None] - 1 + tokens)[:, None, :, None]
    pools = [randn(B, G, S, head_dim, seed=s, dtype=dtype, device=device).masked_fill(late, torch.nan) for s in (1, 2)]
    return query, *pools, length


SHAPES = cases(
    ((1, 63), 1, 2), ((63, 1), 7, 11), ((257, 1), 7, 1), ((111, 257), 3, 5),
    gpu=[((257, 1), group, tokens) for group in (1, 3, 7) for tokens in (1, 2, 5, 41)],
)  # fmt: skip


@pytest.mark.parametrize("lengths, group, tokens", SHAPES)
def test_verifying_on_a_full_cache_equals_its_twin(lengths, group, tokens, device):
    """7 heads of 11 tokens are more rows than a program takes."""
    for dtype, head_dim in kinds(device, 32, 64, 128):
        query, key, value, length = verify_case(device, dtype, lengths, group, tokens, head_dim)
        expected = kernels_verify.verify_attention_torch(*floats(query, key, value), length)
        close(kernels_verify.verify_attention_triton(query, key, value, length), expected, dtype)
        for t in range(tokens):  # each token as if it were the newest
            alone = kernels_decode.decode_attention_torch(*floats(query[:, t], key, value), length + t)
            close(expected[:, t], alone)


@pytest.mark.parametrize("lengths, group, tokens", SHAPES)
def test_verifying_on_the_tiers_equals_its_twin(lengths, group, tokens, device):
    """lengths: critical and marginal tokens. The newest and its drafts are the last of the critical ones."""
    critical, marginal = lengths[0] + tokens - 1, lengths[1]
    for dtype, head_dim in kinds(device, 32, 64, 128):
        case = tiered_case(device, dtype, critical, marginal, group, head_dim, spare={32: 0, 64: 5, 128: 70}[head_dim])
        _, key, value, position, slot, lent = case
        query = 2 * randn(2, tokens, 2 * group, head_dim, dtype=dtype, device=device)
        length = torch.full((2,), lengths[0], dtype=torch.int32, device=device)
        borrowed = torch.stack([lent / (t + 1) for t in range(tokens)])
        tables = position, slot, borrowed
        expected = kernels_verify.verify_attention_torch(*floats(query, key, value), length, *tables)
        close(kernels_verify.verify_attention_triton(query, key, value, length, *tables), expected, dtype)
        for t in range(tokens):
            seen = position.masked_fill(position >= lengths[0] + t, -1)
            alone = kernels_eq6.tiered_attention_torch(*floats(query[:, t], key, value), seen, slot, borrowed[t])
            close(expected[:, t], alone)
        if head_dim != 64:
            continue
        # Without a marginal tier a value is at its key's slot; empty slots of the V pool hold NaN.
        value = randn(*key.shape, seed=7, dtype=dtype, device=device).masked_fill((position < 0)[..., None], torch.nan)
        expected = kernels_verify.verify_attention_torch(*floats(query, key, value), length, position)
        close(kernels_verify.verify_attention_triton(query, key, value, length, position), expected, dtype)


def test_a_cache_of_many_splits_is_merged(device):
    """One sequence whose capacity is far beyond its length: most splits hold nothing."""
    query, key, value, length = verify_case(device, torch.float32, [700], 3, 5, 32, spare=9000)
    expected = kernels_verify.verify_attention_torch(query, key, value, length)
    close(kernels_verify.verify_attention_triton(query, key, value, length), expected)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("slotted", [False, True])
@pytest.mark.parametrize("tokens", [2, 5])
def test_rope_of_several_tokens_is_that_of_each(tokens, slotted, norm, device):
    """Kernel and twin against one token at a time."""
    for dtype, D in kinds(device, 32, 64):
        B, H, G, S = 3, 6, 2, 40
        qkv = randn(B * tokens, (H + 2 * G) * D, dtype=dtype, device=device)
        cos, sin = (randn(S, D // 2, seed=seed, device=device) for seed in (1, 2))
        length = torch.tensor([1, 17, 40 - tokens], dtype=torch.int32, device=device)
        norms = tuple(1 + randn(D, seed=seed, dtype=dtype, device=device) / 4 for seed in (3, 4)) + (1e-6,)
        norms, slots = norms if norm else None, [None, None]
        if slotted:
            generator = torch.Generator().manual_seed(5)
            free = [torch.randperm(S, generator=generator)[:tokens] for _ in range(2 * B * G)]
            slots = [*torch.stack(free).view(2, B, G, tokens).transpose(2, 3).flatten(1, 2).int().to(device)]
        results = []
        for rope in (kernels_layer.rope_append_torch, kernels_layer.rope_append_triton):
            pools = [torch.zeros(B, G, S, D, dtype=dtype, device=device) for _ in range(2)]
            newest = torch.zeros(2, 5, B * tokens, G, D, dtype=dtype, device=device)
            query = rope(qkv, cos, sin, length, norms, *pools, *slots, newest[:, 3], tokens=tokens)
            results.append((query, *pools, newest))
        pools = [torch.zeros(B, G, S, D, dtype=dtype, device=device) for _ in range(2)]
        newest = torch.zeros(2, 5, B, tokens, G, D, dtype=dtype, device=device)
        query = torch.zeros(B, tokens, H, D, dtype=dtype, device=device)
        for t in range(tokens):
            at = [None if table is None else table.view(B, tokens, G)[:, t].contiguous() for table in slots]
            row, made = qkv.view(B, tokens, -1)[:, t].contiguous(), torch.zeros(2, B, G, D, dtype=dtype, device=device)
            query[:, t] = kernels_layer.rope_append_torch(row, cos, sin, length + t, norms, *pools, *at, made)
            newest[:, 3, :, t] = made
        for expected, twins, ours in zip((query.flatten(0, 1), *pools, newest.flatten(2, 3)), *results):
            assert torch.equal(twins, expected)
            close(ours, twins, dtype)


@pytest.mark.parametrize("slots, tokens", [(7, 1), (7, 2), (300, 5)])
def test_drafts_take_the_slots_left_free(slots, tokens, device):
    """Against a loop, and the kernel against the twin to the bit."""
    L, B, G = 2, 3, 2
    generator = torch.Generator().manual_seed(0)
    length = torch.tensor([90, 5, 41], dtype=torch.int32, device=device)
    position = torch.full((L, B, G, slots), -1, dtype=torch.int32)
    newest = torch.zeros(L, B, G, dtype=torch.int32)
    for i in range(L * B * G):
        held = torch.randperm(slots, generator=generator)[: slots - tokens + 1 - i % 2]
        line, b = position.view(-1, slots)[i], i // G % B
        line[held] = torch.randint(length[b].item() - 1, (len(held),), generator=generator).int()
        line[held[0]], newest.view(-1)[i] = length[b] - 1, held[0]
    results = []
    for admit in (kernels_verify.admit_drafts_torch, kernels_verify.admit_drafts_triton):
        table, where = position.clone().to(device), torch.full((L, B, tokens, G), -7, dtype=torch.int32, device=device)
        admit(table, length, newest.to(device), where)
        results.append((table, where))
    for twins, ours in zip(*results):
        assert torch.equal(ours, twins)
    table, where = (tensor.cpu() for tensor in results[0])
    for layer in range(L):
        for b in range(B):
            for g in range(G):
                free = [slot for slot in range(slots) if position[layer, b, g, slot] < 0][: tokens - 1]
                assert where[layer, b, :, g].tolist() == [newest[layer, b, g].item(), *free]
                expected = position[layer, b, g].clone()
                for nth, slot in enumerate(free):
                    expected[slot] = length[b] + nth
                assert torch.equal(table[layer, b, g], expected)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("lengths, tokens", [((1, 63, 111), 5), ((257, 1100, 40), 2), ((63, 5, 9), 1)])
def test_rows_fold_into_scores_as_in_a_loop(lengths, tokens, decay, device):
    """count 0 changes nothing; what stands in a row beyond its token is not read."""
    L, B, H, S = 2, 3, 3, max(lengths) + tokens + 2
    length = torch.tensor(lengths, dtype=torch.int32, device=device)
    count = torch.tensor([0, tokens, min(2, tokens)], dtype=torch.int32, device=device)
    token, place = torch.arange(S, device=device), torch.arange(tokens, device=device)[:, None]
    rows = randn(L, B, H, tokens, S, device=device).abs()
    rows = rows.masked_fill((token >= length[:, None, None] + place)[None, :, None], 1e9)
    score = randn(L, B, H, S, seed=1, device=device).abs()
    score = score.masked_fill((token >= length[:, None] - 1)[None, :, None], 0)
    for largest in (True, False):
        results = []
        for fold in (kernels_verify.fold_rows_torch, kernels_verify.fold_rows_triton):
            given = score.clone()
            out = torch.full_like(score, 7.0) if largest else given
            fold(given, rows, length, count, decay, out, largest)
            results.append(out)
        torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-6)
        for b, n in enumerate(lengths):
            last, after, stop = score[:, b], [], n - 1 + tokens
            for t in range(count[b]):
                row = rows[:, b, :, t].clone()
                row[..., n + t :] = 0
                last = decay * last + row
                after.append(last)
            expected = torch.stack(after).amax(0) if largest and after else last
            if largest and not after:
                expected = torch.full_like(last, 7.0)
            torch.testing.assert_close(results[0][:, b, :, :stop], expected[..., :stop], atol=1e-6, rtol=1e-6)
            assert (results[0][:, b, :, stop:] == (7.0 if largest else 0.0)).all()
