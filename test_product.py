"""The products of kernels_product.py against their twins, and a decoder's layers against its modules called one by one.

Rows and weights are drawn so that outputs are about 1. Kernel and twin get the same 16-bit inputs, the twin in fp32.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import kernels_layer
import kernels_product
from backend import TORCH, TRITON
from conftest import tiny_decoder
from kernels_product import MAX_ROWS
from layers import Layers
from test_kernels import FINE, HALF, HERE, cases, close, randn


@pytest.fixture
def device():
    return HERE


def product_case(rows, N, K, dtype, device):
    """x (rows, K) and weight (N, K)."""
    weight = randn(N, K, seed=1, device=device).div(K**0.5)
    return randn(rows, K, dtype=dtype, device=device), weight.to(dtype)


@pytest.mark.parametrize("rows, N, K", cases(
    (1, 37, 111), (9, 48, 300), (20, 70, 300), (33, 20, 111), (64, 33, 64),
    gpu=[(rows, 4864, 896) for rows in (4, 16, 32, 64)] + [(rows, 1000, 3584) for rows in (4, 32, 64)],
))  # fmt: skip
def test_gate_product_equals_its_twin(rows, N, K, device):
    """The kernel rounds four numbers to its dtype: gate, up, silu and the output. An output may be off by what these
    four make of it, and by the order of fp32 sums."""
    for dtype in (torch.float32, *HALF[device]):
        x, weight = product_case(rows, 2 * N, K, dtype, device)
        out = kernels_product.gate_product_triton(x, weight)
        assert out.shape == (rows, N) and out.dtype == dtype
        gate, up = F.linear(x.float(), weight.float()).chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        silu, slope = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))  # and its derivative
        rounding = torch.finfo(dtype).eps / 2 * ((gate * slope).abs() + 3 * silu.abs()) * up.abs()
        expected = kernels_product.gate_product_torch(x.float(), weight.float())
        off = (out.float() - expected).abs() - 1.05 * rounding  # 1.05: roundings of what is rounded already
        assert off.max() < 5e-5  # the order of sums, in products of two numbers up to 5


@pytest.mark.parametrize("rows, N, K", cases(
    (1, 37, 111), (9, 48, 1100), (33, 70, 600), (64, 33, 64),
    gpu=[(rows, 896, 4864) for rows in (4, 16, 32, 64)] + [(rows, 3584, 18944) for rows in (4, 32, 64)],
))  # fmt: skip
def test_split_product_equals_its_twin(rows, N, K, device):
    """Nothing is rounded: exact products of 16-bit numbers and fp32 sums in another order."""
    for dtype in (torch.float32, *HALF[device]):
        x, weight = product_case(rows, N, K, dtype, device)
        expected = kernels_product.split_product_torch(x.float(), weight.float())
        parts = kernels_product.split_product_triton(x, weight)
        assert parts.dtype == torch.float32 and parts.shape[1:] == (rows, N)
        assert (len(parts) > 1) == (K > 128 or (dtype == torch.float32 and K > 32))
        torch.testing.assert_close(parts.sum(0), expected.sum(0), atol=FINE, rtol=FINE)


@pytest.mark.parametrize("splits", [1, 3, 8])
def test_norm_adds_up_the_parts_of_an_update(splits, device):
    for dtype in (torch.float32, *HALF[device]):
        x, norm = randn(3, 111, dtype=dtype, device=device), 1 + randn(111, seed=1, dtype=dtype, device=device) / 4
        update = randn(splits, 3, 111, seed=2, device=device)
        rows = [x.clone(), x.clone()]
        expected = kernels_layer.add_norm_torch(rows[0], update, norm, 1e-6)
        close(kernels_layer.add_norm_triton(rows[1], update, norm, 1e-6), expected, dtype)
        close(rows[1], rows[0], dtype)
        assert not torch.equal(rows[1], x)


# ---- in a decoder ----------------------------------------------------------------------------------------------------


def layer_case(kind, device):
    """A decoder with biases and norms that count."""
    changes = {"attention_bias": True, "mlp_bias": True} if kind == "bias" else {}
    decoder = tiny_decoder(model_type="qwen2" if kind == "qwen2" else "llama", device=device, **changes)
    for number, parameter in enumerate(decoder.parameters()):
        if parameter.dim() == 1:
            parameter.copy_(1 + randn(len(parameter), seed=number, device=device) / 4)
    if kind == "hook":  # as parallel.py sums over the ranks
        for layer in decoder.layers:
            layer.mlp.down_proj.register_forward_hook(lambda module, inputs, out: 2 * out)
    return decoder


def module_by_module(decoder, tokens):
    """What `Layers.run` makes where the output of attention is the query: the decoder's modules, one after another."""
    x = decoder.embed_tokens(tokens)
    for layer in decoder.layers:
        x = x + layer.self_attn.o_proj(layer.self_attn.q_proj(layer.input_layernorm(x)))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return decoder.norm(x)


@pytest.mark.parametrize("kind, rows, own", [
    ("llama", 3, True), ("qwen2", MAX_ROWS, True), ("llama", MAX_ROWS + 1, False), ("bias", 3, False),
    ("hook", 3, False),
])  # fmt: skip
@pytest.mark.parametrize("backend", [TORCH, TRITON], ids=["torch", "triton"])
def test_layers_are_the_modules_of_the_decoder(backend, kind, rows, own, device):
    """With our products or, where there are many rows, a bias or a hook, without them."""
    decoder, tokens, made = layer_case(kind, device), torch.arange(rows, device=device) % 97, []

    def gate_product(x, weight):
        made.append(len(x))
        return backend.gate_product(x, weight)

    def attend(layer, qkv, rope, norms):
        return qkv.unflatten(1, (-1, decoder.config.head_dim))[:, : decoder.config.query_heads].contiguous()

    with torch.inference_mode():
        expected = module_by_module(decoder, tokens)
        out = Layers(decoder, 8, replace(backend, gate_product=gate_product)).run(tokens, attend)
    assert made == ([rows] * len(decoder.layers) if own else [])
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
