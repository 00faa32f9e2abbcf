"""Norm, RoPE with append, gate: each Triton kernel against its plain PyTorch twin, on shapes that fill no block. And
the movement of rows, to the bit.

The twins are held against Transformers in test_checkpoint.py, and what they append against naive.py in test_smallkv.py.
On a GPU the kernels are compiled, on a CPU they are interpreted (conftest.py). Pools come full of NaN: what is compared
with NaN equal to NaN is also what was not written.
"""

import inspect
import itertools

import pytest
import torch

import kernels
import ops
import scores
import tiers
from conftest import BF16, FP32, HALF, HERE, close, randint, randn, versions
from ops import Rope


@pytest.mark.parametrize("size", [16, 111, 896, 2049])
@pytest.mark.parametrize("dtype", [FP32, HALF])
def test_norm_equals_its_twin(size, dtype):
    x, update, weight = (randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(((2, 3, size),) * 2 + ((size,),)))
    for added in (None, update):
        expected = ops.add_norm_torch(x.clone(), added, weight, 1e-6)
        ours = x.clone()
        found = ops.add_norm_triton(ours, added, weight, 1e-6)
        assert torch.equal(found[0], expected[0]) and found[0] is ours  # the sum is in x's place, rounded alike
        close(found[1], expected[1], dtype)


@pytest.mark.parametrize("shape", [(1, 2 * 17), (2, 3, 2 * 1111), (3, 1, 2 * 1024)])
@pytest.mark.parametrize("dtype", [FP32, HALF])
def test_gate_equals_its_twin(shape, dtype):
    both = 3 * randn(*shape, dtype=dtype)
    close(ops.gate_triton(both), ops.gate_torch(both), dtype)


@pytest.mark.parametrize("normed, T, group, D, dtype", [
    (False, 1, 1, 64, FP32), (True, 5, 3, 128, FP32), (False, 5, 7, 16, HALF), (True, 1, 7, 64, HALF),
    (True, 5, 1, 64, HALF), (False, 1, 3, 128, HALF),
])  # fmt: skip
def test_rope_and_append_equal_their_twin(normed, T, group, D, dtype):
    """3 sequences at positions far apart, 2 KV heads; K and V go to the position, or to a slot."""
    B, G, S = 3, 2, 40
    qkv, angle = randn(B, T, (G * group + 2 * G) * D, dtype=dtype), 9 * randn(B, T, D // 2, seed=1)
    norms = tuple(1 + randn(D, seed=seed, dtype=dtype) / 4 for seed in (2, 3)) + (1e-6,)
    rope = Rope(1.3 * angle.cos(), 1.3 * angle.sin(), norms if normed else None)
    position = (torch.tensor([0, 17, S - T])[:, None] + torch.arange(T)).int().to(HERE)
    slot = torch.stack([torch.randperm(22, generator=torch.Generator().manual_seed(i))[: G * T] for i in range(B)])
    for shape, where in (((B, G, S, D), None), ((B, 22, D), slot.view(B, G, T).int().to(HERE))):
        results = []
        for append in (ops.rope_append_torch, ops.rope_append_triton):
            pools = [torch.empty(shape, device=HERE, dtype=dtype) for _ in "kv"]
            results.append((append(qkv, rope, *pools, position, where), *pools))
        for ours, twins in zip(results[1], results[0]):
            close(ours, twins, dtype)


# ---- Movement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D, dtype, count, bytes_at_once", [
    (16, FP32, 41, 1 << 17), (64, BF16, 0, 1 << 17), (128, BF16, 57, 1 << 11), (64, FP32, 60, 1 << 11),
    (128, FP32, 1, 1 << 17),
])  # fmt: skip
def test_rows_arrive_to_the_bit(D, dtype, count, bytes_at_once, device, monkeypatch):
    """K and V, and V alone; in one turn of a program or in many; slots that nothing comes to keep what they had."""
    monkeypatch.setattr(ops, "BRING_BYTES", bytes_at_once)
    host = randn(2, 2, 99, 2, D, dtype=dtype, device="cpu")
    target = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    rows = torch.stack((target // 15 * 99 + randint(0, 99, (60,), 2, "cpu"), target)).int()
    rows[:, count:] = 0 if count == 0 else 2**31 - 1  # beyond the count nothing is looked up
    before = [randn(2, 30, D, seed=seed, dtype=dtype, device="cpu") for seed in (3, 4)]
    expected = [pool.clone() for pool in before]
    for source, slot in rows[:, :count].T.tolist():
        for kind, pool in enumerate(expected):
            pool.view(-1, D)[slot] = host[source // 198, source // 99 % 2, source % 99, kind]
    offloaded = host.pin_memory() if device == "cuda" else host
    wanted, how_many = rows.to(device), torch.tensor(count, dtype=torch.int32, device=device)
    for bring in versions(ops, "bring_rows", device)[device == "cuda" :]:
        for both in (True, False):
            key, value = (pool.to(device, copy=True) for pool in before)
            bring(key if both else None, value, offloaded, wanted, how_many)
            assert torch.equal(value.cpu(), expected[1]) and torch.equal(key.cpu(), (expected if both else before)[0])


@pytest.mark.parametrize("T", [1, 5])
def test_newest_rows_are_stored(T, device):
    """Each to its position, and nothing else; sequences whose first step is to come store nothing."""
    key, value = (randn(3, 18, 64, seed=seed, dtype=BF16, device=device) for seed in (0, 1))
    newest = torch.stack([torch.randperm(18, generator=torch.Generator().manual_seed(s))[: 2 * T] for s in range(3)])
    newest = newest.view(3, 2, T).int().to(device)
    start = torch.tensor([4, -1, 0], dtype=torch.int32, device=device)
    for store in versions(ops, "store_rows", device):
        offloaded = torch.zeros(3, 2, 11, 2, 64, dtype=BF16, device=device)
        store(key, value, offloaded, newest, start)
        expected = torch.zeros_like(offloaded)
        for b, g, t in itertools.product((0, 2), range(2), range(T)):
            slot, place = newest[b, g, t], int(start[b]) + t
            expected[b, g, place, 0], expected[b, g, place, 1] = key[b, slot], value[b, slot]
        assert torch.equal(offloaded, expected)


# ---- Which version runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module, name", [
    (ops, "add_norm"), (ops, "rope_append"), (ops, "gate"), (kernels, "column_sums"), (kernels, "decode_attention"),
    (scores, "add_weights"), (scores, "add_held"), (scores, "rank_scores"), (scores, "matched_rows"),
    (tiers, "plan_tiers"), (ops, "bring_rows"), (ops, "store_rows"),
])  # fmt: skip
def test_both_versions_are_given_what_was_given(module, name, monkeypatch):
    ran, function = [], getattr(module, name)
    for kind in ("torch", "triton"):
        monkeypatch.setattr(module, f"{name}_{kind}", lambda *given, kind=kind: ran.append((kind, given)))
    given = tuple(range(len(inspect.signature(function).parameters)))
    for forced in (False, True):
        monkeypatch.setattr(ops, "FORCE", forced)
        function(*given)
    assert ran == [("torch", given), ("triton", given)]


def test_which_version_runs(device):
    """On a CPU plain PyTorch; on a GPU a kernel, but where a gradient is asked for."""
    x, weight = randn(2, 3, 32, device=device), torch.ones(32, device=device)
    assert ops.use_triton(x) == (device == "cuda") and not ops.use_triton(x.clone().requires_grad_())
    with torch.no_grad():
        assert ops.use_triton(x.clone().requires_grad_()) == (device == "cuda")
    ours = x.clone().requires_grad_()
    ops.gate(ops.add_norm(ours, x, weight, 1e-6)[1]).sum().backward()
    assert ours.grad.abs().sum() > 0
