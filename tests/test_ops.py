"""Norm, RoPE with append, gate: each Triton kernel against its plain PyTorch twin, on shapes that fill no block.

The twins are held against Transformers in test_checkpoint.py, and what they append against naive.py in test_smallkv.py.
On a GPU the kernels are compiled, on a CPU they are interpreted (conftest.py). Pools come full of NaN: what is compared
with NaN equal to NaN is also what was not written.
"""

import inspect

import pytest
import torch

import kernels
import ops
import scores
import tiers
from conftest import FP32, HALF, HERE, close, randn
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
