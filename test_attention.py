"""The plain PyTorch attention of kernels.py against naive loops: one dot product at a time."""

import itertools

import pytest
import torch

import kernels


def random_attention(batch=2, heads=6, kv_heads=2, queries=5, keys=9, head_dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, queries, head_dim), (batch, kv_heads, keys, head_dim), (batch, kv_heads, keys, head_dim)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def naive_rows(query, key):
    """Causal attention rows (B, H, T, S), one dot product at a time."""
    B, H, T, D = query.shape
    G, S = key.shape[1], key.shape[2]
    rows = torch.zeros(B, H, T, S)
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        last = S - T + t
        logits = [torch.dot(query[b, h, t], key[b, h * G // H, j]) / D**0.5 for j in range(last + 1)]
        rows[b, h, t, : last + 1] = torch.stack(logits).softmax(0)
    return rows


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 9), (5, 9), (9, 9)])
def test_attention_equals_naive_loop(queries, keys):
    query, key, value = random_attention(queries=queries, keys=keys)
    rows = naive_rows(query, key)
    torch.testing.assert_close(kernels.attention_rows(query, key, keys - queries), rows)
    expected = rows @ value.repeat_interleave(3, 1)
    torch.testing.assert_close(kernels.causal_attention(query, key, value), expected)


@pytest.mark.parametrize("decay", [1.0, 0.9, 0.5, 0.0])
@pytest.mark.parametrize("queries, keys", [(1, 9), (5, 9), (9, 9)])
def test_column_sums_equal_weighted_rows(queries, keys, decay, monkeypatch):
    monkeypatch.setattr(kernels, "SCORE_BLOCK", 4)  # several blocks, the first one short
    query, key, _ = random_attention(queries=queries, keys=keys)
    rows = naive_rows(query, key)
    expected = sum(decay ** (queries - 1 - t) * rows[:, :, t] for t in range(queries))
    torch.testing.assert_close(kernels.column_sums(query, key, decay), expected)


def test_full_step_ignores_what_is_beyond_each_length():
    query, key, value = random_attention(queries=1, keys=9)
    key[:, :, 7:] = torch.nan
    value[:, :, 7:] = 0
    out, rows = kernels.full_attention_step(query, key, value, torch.tensor([6, 3]))
    for b, length in ((0, 7), (1, 4)):
        expected = naive_rows(query[b : b + 1], key[b : b + 1, :, :length])
        torch.testing.assert_close(rows[b, :, :length], expected[0, :, 0])
        assert not rows[b, :, length:].any()
        values = value[b : b + 1, :, :length].repeat_interleave(3, 1)
        torch.testing.assert_close(out[b : b + 1], expected @ values)


@pytest.mark.parametrize("critical, marginal", [(1, 0), (1, 8), (4, 3), (9, 0), (5, 4)])
def test_tiered_attention_equals_equation_6(critical, marginal):
    """A naive loop over Eq. 6, on pools in random order with NaN in the slots nobody uses."""
    query, key, value = random_attention(queries=1)
    B, H, _, D = query.shape
    G, share, spare = 2, 3, 2
    generator = torch.Generator().manual_seed(1)
    lent = torch.rand(B, H, marginal, generator=generator) / (marginal + 1)
    key_pool = torch.full((B, G, critical + spare, D), torch.nan)
    value_pool = torch.full((B, G, critical + marginal + spare, D), torch.nan)
    used = torch.zeros(B, G, critical + spare, dtype=torch.bool)
    slots = torch.zeros(B, G, critical + spare, dtype=torch.long)
    borrowed = torch.zeros(B, H, critical + marginal + spare)
    expected = torch.zeros(B, H, 1, D)
    for b, g in itertools.product(range(B), range(G)):
        key_slot = torch.randperm(critical + spare, generator=generator)[:critical]
        value_slot = torch.randperm(critical + marginal + spare, generator=generator)[: critical + marginal]
        key_pool[b, g, key_slot] = key[b, g, :critical]
        value_pool[b, g, value_slot] = value[b, g, : critical + marginal]
        used[b, g, key_slot] = True
        slots[b, g, key_slot] = value_slot[:critical]
        for h in range(g * share, (g + 1) * share):
            borrowed[b, h, value_slot[critical:]] = lent[b, h]
            softmax = torch.stack([query[b, h, 0] @ key[b, g, j] / D**0.5 for j in range(critical)]).softmax(0)
            mass = lent[b, h].sum()
            expected[b, h, 0] = (1 - mass) * softmax @ value[b, g, :critical]
            expected[b, h, 0] += lent[b, h] @ value[b, g, critical : critical + marginal]
    out, weight = kernels.tiered_attention(query, key_pool, value_pool, used, slots, borrowed)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weight.sum(-1), torch.ones(B, H))
