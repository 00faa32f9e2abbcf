"""Shared by all tests: tiny random decoders, the devices at hand, poisoned memory, kernels on a CPU.

Where it sits: pytest loads it before any test, so before the modules that define Triton kernels.
"""

import itertools
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # wherever pytest is started from

if not torch.cuda.is_available():  # read when a kernel is defined: before the modules that define them
    os.environ["TRITON_INTERPRET"] = "1"

import ops  # noqa: E402
from decode import Policy, generate  # noqa: E402
from model import Config, Decoder  # noqa: E402

torch.set_num_threads(1)  # the models here are tiny: threads that wait for each other cost more than they bring

with torch.device("meta"):  # lists what a device context rules over at its first use: the true torch.empty, not ours
    torch.empty(0)

LENGTHS = 150, 97, 210  # of prompts: one is shorter than the matching window and passes it as it grows, one is longer
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
HERE = DEVICES[-1]  # where Triton runs: compiled on a GPU, in the interpreter on a CPU
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
HALF = BF16 if HERE == "cuda" else FP16  # the interpreter rounds nothing to bf16 and multiplies its bits
TOLERANCE = {FP32: 1e-5, FP16: 4e-3, BF16: 2e-2}  # fp32: another order of sums; 8 or 11 bits: some are rounded twice


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def on_gpu():
    if not torch.cuda.is_available():
        pytest.skip("a CUDA device is needed")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """New memory comes filled with NaN, int8 with -128: a hole in a tier that is read shows in the result."""

    def poison(make):
        def poisoned(*size, **options):
            tensor = make(*size, **options)
            if tensor.is_floating_point() and not tensor.is_meta:
                tensor.fill_(torch.nan)
            elif tensor.dtype == torch.int8:
                tensor.fill_(-128)
            return tensor

        return poisoned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture(scope="session")
def full_answers():
    """30 tokens of the full cache's answers to prompts of `LENGTHS`, by `tiny_decoder()`."""
    return generate(Policy(tiny_decoder()), random_prompts(*LENGTHS), 30)


@pytest.fixture
def kernels_on(monkeypatch):
    """Triton everywhere: in the interpreter on a CPU; on a GPU's machine the kernels run on the GPU anyway."""
    if HERE == "cpu":
        monkeypatch.setattr(ops, "FORCE", True)


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


def pair(device="cpu") -> tuple[Decoder, Decoder]:
    """An LLM, and an SLM with other heads."""
    return tiny_decoder(device=device), tiny_decoder(heads=4, seed=1, device=device)


def random_prompts(*lengths: int, seed: int = 0, vocab: int = 97) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]


def randn(*shape, seed=0, dtype=FP32, device=HERE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def randint(low, high, shape, seed=0, device=HERE) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(device, torch.int32)


def listed(tokens, spare, device=HERE, seed=3):
    """A list of slots in a random order: tokens[b][g], the tokens of each KV head; `spare` places are free, or more."""
    B, G, generator = len(tokens), len(tokens[0]), torch.Generator().manual_seed(seed)
    N = max(sum(map(len, own)) for own in tokens) + spare
    slot = torch.stack([torch.randperm(N, generator=generator) for _ in range(B)]).int()
    token, begin = torch.full((B, N), -1, dtype=torch.int32), torch.full((B, G + 2), N, dtype=torch.int32)
    for b, own in enumerate(tokens):
        held = [token for head in own for token in head]
        token[b, : len(held)] = torch.tensor(held, dtype=torch.int32)
        begin[b, :-1] = torch.tensor([0, *itertools.accumulate(map(len, own))])
    return ops.Slots(*(table.to(device) for table in (slot, token, begin)))


def close(actual, expected, bound=1e-5):
    """Equal up to a bound, or to the rounding of a dtype; NaN only where NaN is expected."""
    bound = TOLERANCE.get(bound, bound)
    actual, expected = (x.detach().float().cpu() for x in (actual, expected))
    torch.testing.assert_close(actual, expected, atol=bound, rtol=max(bound, 1e-4), equal_nan=True)


def versions(module, name: str, device: str) -> list:
    """The plain twin of a function, and its kernel where it runs."""
    return [getattr(module, f"{name}_{kind}") for kind in ("torch", "triton")[: 1 + (device == HERE)]]
