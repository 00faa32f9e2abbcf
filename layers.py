"""A decoder's layers for one token a sequence: joined weights, fused kernels between the matrix products.

Where it sits: inside the decode step with fixed shapes (graph.py, graph_speculative.py), for both models; what attends
is handed in. None of it is the paper's.

Shapes follow the legend in model.py; decode drops the T dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from backend import Backend
from kernels_product import MAX_ROWS
from model import Decoder
from quantize import Int4Linear, join_int4, run_on


class Layers:
    """A decoder's layers for a step: qkv and gate-up as one matrix product each, the rest in fused kernels. With
    up to MAX_ROWS rows gate-up and down are products of our own (kernels_product.py); qkv and o are the library's.

    The joined weights replace the decoder's own, which become views of them: nothing is held twice.
    """

    def __init__(self, decoder: Decoder, capacity: int, backend: Backend):
        self.decoder, self.config, self.backend = decoder, decoder.config, backend
        cos, sin = decoder._rotary(torch.arange(capacity, device=decoder.device)[None], torch.float32)
        half = self.config.head_dim // 2
        self.cos, self.sin = cos[0, 0, :, :half].contiguous(), sin[0, 0, :, :half].contiguous()  # (S, D/2)
        self.qkv, self.both, self.norms = [], [], []
        run_on(decoder, backend)
        for layer in decoder.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self.qkv.append(join([attention.q_proj, attention.k_proj, attention.v_proj]))
            self.both.append(join([mlp.gate_proj, mlp.up_proj]))
            eps, normed = self.config.norm_eps, self.config.qk_norm
            self.norms.append((attention.q_norm.weight, attention.k_norm.weight, eps) if normed else None)
        # Our products are of 16 or 32-bit weights without a bias (`mlp_bias` is that of all three), and no hook sums
        # them over ranks (parallel.py).
        self.plain = all(isinstance(joined, tuple) for joined in self.both) and all(
            type(down) is torch.nn.Linear and down.bias is None and not down._forward_hooks
            for down in (layer.mlp.down_proj for layer in decoder.layers)
        )

    def run(self, tokens: Tensor, attend, output: bool = True) -> Tensor | None:
        """tokens (B,), or (B * T,) in a round of drafts, through all layers and the last norm: (B, hidden).

        output False ends with the last layer's attention, all that is asked of an SLM without drafts: None.

        attend(layer, qkv (B, (H + 2G) D), rope tables, norms of the heads) -> (B, H, D).
        """
        backend, eps = self.backend, self.config.norm_eps
        x, update = F.embedding(tokens, self.decoder.embed_tokens.weight), None  # (B, hidden)
        few = self.plain and len(x) <= MAX_ROWS
        for number, layer in enumerate(self.decoder.layers):
            hidden = backend.add_norm(x, update, layer.input_layernorm.weight, eps)
            out = attend(number, multiply(hidden, self.qkv[number]), (self.cos, self.sin), self.norms[number])
            if not output and number == self.config.layers - 1:
                return None
            update = layer.self_attn.o_proj(out.flatten(1))  # (B, hidden)
            hidden = backend.add_norm(x, update, layer.post_attention_layernorm.weight, eps)
            if few:
                gated = backend.gate_product(hidden, self.both[number][0])  # (B, inner)
                update = backend.split_product(gated, layer.mlp.down_proj.weight)  # (splits, B, hidden)
            else:
                update = layer.mlp.down_proj(backend.gate(multiply(hidden, self.both[number])))
        return backend.add_norm(x, update, self.decoder.norm.weight, eps)


def multiply(x: Tensor, joined: tuple[Tensor, Tensor | None] | Int4Linear) -> Tensor:
    return joined(x) if isinstance(joined, Int4Linear) else F.linear(x, *joined)


def join(linears: list[torch.nn.Module]) -> tuple[Tensor, Tensor | None] | Int4Linear:
    """One weight and bias for several products of the same input; the modules' own become views of them."""
    if all(isinstance(linear, Int4Linear) for linear in linears):
        return join_int4(linears)
    weight = torch.cat([linear.weight.data for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias.data for linear in linears])
    start = 0
    for linear in linears:
        end = start + linear.out_features
        linear.weight.data = weight[start:end]
        if bias is not None:
            linear.bias.data = bias[start:end]
        start = end
    return weight, bias
