"""The products of kernels_product.py against their twins, and a layer with them against the layer without.

Weights and rows are drawn so that outputs are about 1. The twin gets 16-bit inputs in fp32; the residual it passes on
is compared in its own dtype, for it is rounded in both.
"""

import pytest
import torch

import graph
import kernels_layer
import kernels_product
from backend import TORCH, TRITON
from conftest import random_prompts, tiny_decoder
from decode import FullPolicy, Session
from graph import Layers, Step
from test_kernels import HALF, HERE, cases, close, randn


@pytest.fixture
def device():
    return HERE


def product_case(rows, N, K, dtype, splits, device):
    """x, update, norm, eps, weight, bias; both as they are and in fp32."""
    x, norm = randn(rows, K, dtype=dtype, device=device), 1 + randn(K, seed=1, dtype=dtype, device=device) / 4
    update = randn(splits, rows, K, seed=2, device=device) if splits else None
    weight = randn(N, K, seed=3, device=device).div(K**0.5).to(dtype)
    return x, update, norm, 1e-6, weight, randn(N, seed=4, dtype=dtype, device=device)


def widened(case):
    """A copy of it in fp32."""
    return [value.to(torch.float32, copy=True) if torch.is_tensor(value) else value for value in case]


@pytest.mark.parametrize("rows, N, K, splits", cases(
    (1, 37, 111, 0), (5, 48, 300, 3), (8, 16, 64, 1), (9, 37, 300, 2), (33, 20, 111, 1), (64, 33, 64, 0),
    gpu=[(4, 1152, 896, 4), (8, 1152, 896, 8), (16, 1152, 896, 4), (64, 1152, 896, 4), (3, 37, 111, 4)],
))  # fmt: skip
@pytest.mark.parametrize("gate", [False, True])
def test_normed_product_equals_its_twin(gate, rows, N, K, splits, device):
    """With the norm inside (few rows, not fp16) and before it; the residual comes out of both."""
    name = "norm_gate" if gate else "norm_product"
    for dtype in (torch.float32, *HALF[device]):
        for with_bias in (True, False):
            *case, bias = product_case(rows, 2 * N if gate else N, K, dtype, splits, device)
            bias = bias if with_bias else None
            expected, _ = getattr(kernels_product, f"{name}_torch")(*widened((*case, bias)))
            x, update, norm, eps, _ = case
            total = x.clone()
            kernels_layer.add_norm_torch(total, update, norm, eps)
            case[0] = x.clone()
            out, summed = getattr(kernels_product, f"{name}_triton")(*case, bias)
            assert out.shape == (rows, N) and out.dtype == dtype
            close(out, expected, dtype)
            close(summed, total, dtype)


@pytest.mark.parametrize("rows, N, K", cases(
    (1, 37, 111), (5, 48, 600), (33, 20, 600), (64, 33, 64),
    gpu=[(4, 896, 4864), (4, 896, 896), (16, 896, 4864), (64, 896, 4864)],
))  # fmt: skip
def test_product_in_parts_equals_its_twin(rows, N, K, device):
    for dtype in (torch.float32, *HALF[device]):
        for with_bias in (True, False):
            x, _, _, _, weight, bias = product_case(rows, N, K, dtype, 0, device)
            given = x, weight, bias if with_bias else None
            expected = kernels_product.product_torch(*widened(given))
            parts = kernels_product.product_triton(*given)
            assert parts.dtype == torch.float32 and parts.shape[1:] == (rows, N)
            assert K != 600 or dtype != torch.float32 or len(parts) > 1
            torch.testing.assert_close(parts.sum(0), expected.sum(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("splits", [1, 3])
def test_norm_adds_up_the_parts_of_an_update(splits, device):
    for dtype in (torch.float32, *HALF[device]):
        x, update, norm, eps, *_ = product_case(3, 16, 111, dtype, splits, device)
        rows = [x.clone(), x.clone()]
        expected = kernels_layer.add_norm_torch(rows[0], update, norm, eps)
        close(kernels_layer.add_norm_triton(rows[1], update, norm, eps), expected, dtype)
        close(rows[1], rows[0], dtype)
        assert not torch.equal(rows[1], x)


def hidden_states(decoder, backend, device):
    """A decode step through the layers of this decoder, three sequences on 20 cached tokens."""
    session = Session(decoder, FullPolicy(decoder), random_prompts(20, 11, 7), 4)
    step = Step(session, session.prefill().argmax(-1), backend)
    step.length += 1
    with torch.inference_mode():
        return step.llm.run(step.tokens, step.side.attend)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_layers_give_the_same_with_fused_products_and_without(model_type, device, monkeypatch):
    backend = TORCH if device == "cpu" and model_type == "llama" else TRITON
    made = []
    for rows in (64, 0):
        monkeypatch.setattr(kernels_product, "MAX_ROWS", rows)
        decoder = tiny_decoder(model_type=model_type, head_dim=32, device=device)
        for number, parameter in enumerate(decoder.parameters()):  # biases and norms that count
            if parameter.dim() == 1:
                parameter.copy_(1 + randn(len(parameter), seed=number, device=device) / 4)
        ran = []
        monkeypatch.setattr(Layers, "_run_fused", lambda *args, run=Layers._run_fused: ran.append(1) or run(*args))
        made.append(hidden_states(decoder, backend, device))
        monkeypatch.undo()
        assert len(ran) == (rows > 0)
    torch.testing.assert_close(*made, atol=1e-4, rtol=1e-4)


def test_a_hook_on_a_product_is_heard(device):
    """parallel.py sums o_proj and down_proj over the ranks in hooks: such a decoder calls its own modules."""
    made = []
    for hooked in (True, False):
        decoder = tiny_decoder(device=device)
        for layer in decoder.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                if hooked:
                    linear.register_forward_hook(lambda module, inputs, out: 2 * out)
                else:
                    linear.weight *= 2
        assert graph.Layers(decoder, 8, TORCH).plain is not hooked
        made.append(hidden_states(decoder, TORCH, device))
    torch.testing.assert_close(*made, atol=1e-4, rtol=1e-4)
