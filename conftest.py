"""Shared by all tests: tiny random decoders, the devices at hand, and poisoned memory.

Where it sits: pytest loads it before any test, so before the modules that define Triton kernels.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():  # read when a kernel is defined: before the modules that define them
    os.environ["TRITON_INTERPRET"] = "1"

import bench_shapes  # noqa: E402
import cache  # noqa: E402
import host_memory  # noqa: E402
from match import seen_window  # noqa: E402
from model import Config, Decoder  # noqa: E402
from settings import Settings  # noqa: E402

torch.set_num_threads(1)  # the models here are tiny: threads that wait for each other cost more than they bring

with torch.device("meta"):  # lists what a device context rules over at its first use: the true torch.empty, not ours
    torch.empty(0)

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Every `torch.empty` of floats comes filled with NaN: whoever reads a hole in a tier must show it. So do the rows
    of the host; in 8 bits both are -128, which no number is rounded to."""
    empty, rows_on_host = torch.empty, host_memory.rows_on_host

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        if tensor.is_floating_point() and not tensor.is_meta:
            tensor.fill_(torch.nan)
        elif tensor.dtype == torch.int8:
            tensor.fill_(-128)
        return tensor

    def poisoned_rows(shape, dtype, device):
        return rows_on_host(shape, dtype, device).fill_(torch.nan if dtype.is_floating_point else -128)

    monkeypatch.setattr(torch, "empty", poisoned)
    for module in (cache, bench_shapes):
        monkeypatch.setattr(module, "rows_on_host", poisoned_rows)


def tiny_decoder(layers=2, heads=6, kv_heads=2, head_dim=16, seed=0, device="cpu", vocab=97, **changes) -> Decoder:
    """A random LLaMA-type decoder whose attention is far from uniform, so that tiers matter."""
    raw = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": head_dim, "max_position_embeddings": 4096, **changes,
    }  # fmt: skip
    decoder = Decoder(Config.from_hf(raw)).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return decoder.to(device)


def random_prompts(*lengths: int, seed: int = 0, vocab: int = 97) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]


def window_rows(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """Attention matrices of every head on a whole text: (1, W) -> (L * H, W, W) fp32."""
    return seen_window(decoder, tokens).rows(slice(None))


def played(session, prompts, steps):
    """Feed fixed tokens to a prefilled session of two prompts; after each step yield (step, b, all tokens of b)."""
    fed = [list(prompt) for prompt in prompts]
    for step in range(steps):
        tokens = [(11 * step + 3) % 97, (7 * step + 5) % 97]
        session.step(tokens)
        for b, token in enumerate(tokens):
            fed[b].append(token)
            yield step, b, fed[b]


def check_ledgers(policy, lengths, capacity):
    """Predicted from shapes = measured on the tensors, line by line; and no cache tensor is missing from it."""
    cache = policy.make_cache(lengths, capacity)
    predicted = policy.predict(lengths, capacity)
    assert predicted["LLM"] == cache.ledger()
    assert predicted["SLM"] == policy.slm_cache.ledger()
    for owner in (cache, policy.slm_cache):
        held = sum(value.nbytes for value in vars(owner).values() if torch.is_tensor(value))
        assert held == sum(entry.size for entry in owner.ledger())


def by_slm(**changes) -> Settings:
    """Settings that rank by the SLM's newest row alone: what drafts and a ranking without saliency shift start from."""
    return Settings(**{"scores": "slm", "score_decay": 0.0, **changes})
