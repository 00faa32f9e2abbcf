"""Every Triton kernel compiles for an A100 (sm_80) and an H100 (sm_90) where there is no GPU.

What the interpreter runs may not compile. As a script this file runs steps with tensors of the kinds used in practice;
each launch of a kernel compiles it for the target instead, with the arguments specialised as Triton specialises them
(None and 1 are constants, multiples of 16 are known to be such). It is a process of its own, because that of the tests
has the interpreter's kernels. A kernel that no launch here reaches fails the test.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes of shared memory that a program may have
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    made = subprocess.run([sys.executable, __file__, str(capability)], env=environment, capture_output=True, text=True)
    print(made.stdout)
    assert made.returncode == 0, made.stdout + made.stderr
    if "no ptxas" in made.stdout:
        pytest.skip("no ptxas here: compiled to LLVM IR, not to machine code")


# ---- The script: launches ------------------------------------------------------------------------------------------


def empty(*shape, dtype=BF16):
    return torch.zeros(shape, dtype=dtype)


def launch_sessions() -> None:
    """Prompts and a step, or a round of drafts, under policies whose models have the heads of Qwen2-7B, Qwen2-0.5B and
    Qwen3-8B; caches for 16,000 and 40,000 positions, which one block of a plan holds and does not hold."""
    from baselines import BASELINES
    from decode import Session
    from model import Config, Decoder
    from smallkv import Settings, SmallKV
    from speculative import RoundSession

    def decoder(kind, hidden, heads, kv_heads, head_dim, dtype=BF16):
        return Decoder(Config.from_hf({
            "model_type": kind, "vocab_size": 97, "hidden_size": hidden, "intermediate_size": 512,
            "num_hidden_layers": 1, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "head_dim": head_dim, "max_position_embeddings": 1 << 20,
        })).to(dtype).requires_grad_(False)  # fmt: skip

    large, small = decoder("qwen2", 3584, 28, 4, 128), decoder("qwen2", 896, 14, 2, 64)
    normed, exact = decoder("qwen3", 4096, 32, 8, 128), decoder("qwen2", 896, 14, 2, 64, FP32)
    for policy, capacity in (
        (SmallKV(large, small, Settings()), 16_000), (SmallKV(exact, exact, Settings.paper()), 16_000),
        (SmallKV(normed, small, Settings(scores="slm", marginal=False), drafts=4), 40_000),
        (BASELINES["h2o"](large, 0.2), 16_000),
    ):  # fmt: skip
        session = (RoundSession if policy.drafts else Session)(policy, [[1] * 130] * 2, capacity)
        session.prefill()
        with torch.inference_mode():
            session.forward()


def launch_quantize() -> None:
    """Qwen2-7B's o_proj, few outputs in splits, and a decode batch on gate and up; with the PTX that a GPU gets."""
    import quantize

    code = quantize.pair_code
    quantize.pair_code = lambda x: code(SimpleNamespace(is_cuda=True, dtype=x.dtype))
    for dtype, M, K, N in ((BF16, 4, 3584, 3584), (torch.float16, 64, 3584, 37888), (FP32, 1, 896, 896)):
        layout = empty(K // 4, N, dtype=torch.int16), empty(K // 128, N), empty(K // 128, N, dtype=torch.uint8)
        quantize.int4_matmul_triton(empty(M, K, dtype=dtype), *layout, empty(N, dtype=dtype))
    quantize.dequantize_triton(*layout, K, dtype)


POINTERS = {BF16: "*bf16", FP32: "*fp32", torch.float16: "*fp16", torch.int32: "*i32", torch.int16: "*i16",
            torch.int8: "*i8", torch.uint8: "*u8"}  # fmt: skip


# ---- The script: compiling -----------------------------------------------------------------------------------------


def main(capability: int) -> None:
    import importlib

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.runtime.jit import JITFunction

    import ops

    target, made = GPUTarget("cuda", capability, 32), {}

    def compiled(kernel, *args, grid, warmup, **options):
        """In place of a launch."""
        given = dict(zip(kernel.arg_names, args))
        given.update((name, options.pop(name)) for name in list(options) if name in kernel.arg_names)
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(kernel.params):
            value = given[parameter.name]
            aligned = value.data_ptr() if torch.is_tensor(value) else value
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                signature[parameter.name], constants[(i,)] = "constexpr", value
                continue
            if torch.is_tensor(value):
                signature[parameter.name] = POINTERS[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if not isinstance(value, float) and aligned % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        sizes = made.setdefault(kernel.__name__, [])
        try:
            binary = compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)
        except RuntimeError as error:
            if "Cannot find ptxas" not in str(error):
                raise
            sizes.append("no ptxas")
            return
        sizes.append(f"{len(binary.asm['cubin']) >> 10} KB")
        if binary.metadata.shared > SHARED[capability]:
            sys.exit(f"{kernel.__name__} takes {binary.metadata.shared} bytes of shared memory: {signature}, {options}")

    ops.FORCE, JITFunction.run = True, compiled
    launch_sessions()
    launch_quantize()
    kernels = set()
    for name in ("ops", "kernels", "scores", "tiers", "quantize"):
        found = vars(importlib.import_module(name)).items()
        kernels |= {n for n, value in found if isinstance(value, JITFunction) and n.endswith("_kernel")}
    missing = sorted(kernels - set(made))
    for name, sizes in made.items():
        print(name, *sizes)
    if missing:
        sys.exit(f"no launch in test_compile.py reaches {', '.join(missing)}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
