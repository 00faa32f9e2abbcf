"""Every Triton kernel compiles for an A100 (sm_80) and an H100 (sm_90) where there is no GPU.

What the interpreter runs may not compile. As a script this file calls the functions that launch kernels, with tensors
of the kinds used in practice; each launch compiles its kernel for the target instead, with the arguments specialised as
Triton specialises them (None and 1 are constants, multiples of 16 are known to be such). It is a process of its own,
because that of the tests has the interpreter's kernels. A kernel that no launch here reaches fails the test.
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


def launch_ops(ops) -> None:
    """Qwen2-7B's heads in bf16 with slots, Qwen3's with norms, fp32 with neither."""
    for dtype, update in ((BF16, True), (FP32, False)):
        x = empty(4, 1, 3584, dtype=dtype)
        ops.add_norm_triton(x, x.clone() if update else None, x[0, 0].clone(), 1e-6)
        ops.gate_triton(empty(4, 1, 2 * 18944, dtype=dtype))
    for dtype, H, G, D, T, slots, norms in ((BF16, 28, 4, 128, 1, 3301, False), (BF16, 32, 8, 128, 5, 16416, True),
                                            (FP32, 14, 2, 64, 1, None, False)):  # fmt: skip
        weight = empty(D, dtype=dtype)
        rope = ops.Rope(*(empty(2, T, D // 2, dtype=FP32) for _ in range(2)), (weight, weight, 1e-6) if norms else None)
        pools = [empty(2, G, slots or 4096, D, dtype=dtype) for _ in "kv"]
        slot = None if slots is None else empty(2, G, T, dtype=torch.int32)
        qkv, position = empty(2, T, (H + 2 * G) * D, dtype=dtype), empty(2, T, dtype=torch.int32)
        ops.rope_append_triton(qkv, rope, *pools, position, slot)


def launch_kernels(kernels) -> None:
    for dtype, H, G, D, decay in ((BF16, 28, 4, 128, 0.5), (FP32, 14, 2, 64, 1.0)):
        kernels.column_sums_triton(empty(1, H, 512, D, dtype=dtype), empty(1, G, 1024, D, dtype=dtype), decay)
    for dtype, H, G, D, T, tiers in ((BF16, 28, 4, 128, 1, True), (BF16, 32, 8, 128, 5, False),
                                     (BF16, 14, 2, 64, 1, False), (FP32, 14, 2, 64, 1, True)):  # fmt: skip
        C, M, length = 3301, 1640, torch.ones(4, dtype=torch.int32)
        query, pools = empty(4, T, H, D, dtype=dtype), [empty(4, G, C, D, dtype=dtype) for _ in "kv"]
        row = (None, None) if T > 1 else (empty(4, T, H, C, dtype=FP32), empty(4, T, H, dtype=FP32))
        position = empty(4, G, C, dtype=torch.int32) if tiers else None
        lent = [empty(4, T, H, M, dtype=FP32), empty(4, G, M, D, dtype=dtype)] if tiers else []
        kernels.decode_attention_triton(query, *pools, length, position, *row, *lent)


def launch_scores(scores) -> None:
    """Fused scores with the LLM's memory; the SLM's score with drafts."""
    length, slots = torch.ones(4, dtype=torch.int32), empty(4, 4, 410, dtype=torch.int32)
    row = empty(4, 28, 410, dtype=FP32), empty(4, 28, dtype=FP32)
    for tokens, decay, position in ((2048, 0.5, slots), (410, 1.0, None)):
        scores.add_weights_triton(empty(4, 4, tokens, dtype=FP32), *row, decay, None, position)
    row = empty(96, 14, 2048, dtype=FP32), empty(96, 14, dtype=FP32)
    scores.add_weights_triton(row[0].clone(), *row, 0.5, length)
    index, memory = empty(4, 28, dtype=torch.int32), empty(4, 4, 2048, dtype=FP32)
    for T, score in ((1, None), (5, empty(24, 4, 14, 2048, dtype=FP32))):
        rows = empty(T, 24, 4, 14, 2048, dtype=FP32), empty(T, 24, 4, 14, dtype=FP32)
        added = (memory, None) if score is None else (None, length)
        scores.rank_scores_triton(*rows, score, index, 0.5, length, 4, *added)
        scores.matched_rows_triton(*rows, index, slots, empty(4, T, 28, 410, dtype=FP32))


def launch_tiers(tiers) -> None:
    for S, T, marginal in ((16893, 1, True), (40000, 5, False)):
        total, sizes = empty(4, 4, S, dtype=FP32), empty(S + 1, 3, dtype=torch.int32)
        tables = [empty(4, 4, slots, dtype=torch.int32) for slots in (S // 6, S // 10, T)]
        middle, memory = (tables[1], total.clone()) if marginal else (None, None)
        length = torch.ones(4, dtype=torch.int32)
        rows, count = empty(2, 2, 16 * (S // 6), dtype=torch.int32), empty(2, dtype=torch.int32)
        mark = empty(4, 4, S, dtype=torch.int8)
        tiers.plan_tiers_triton(total, length, sizes, tables[0], middle, memory, tables[2], rows, count, mark, S | 1)
    for dtype, D, both in ((BF16, 128, True), (BF16, 128, False), (FP32, 64, True)):
        pools = [empty(4, 4, 70, D, dtype=dtype) for _ in range(2)]
        offloaded = empty(4, 4, 701, 2, D, dtype=dtype)
        tiers.bring_rows_triton(pools[0] if both else None, pools[1], offloaded, rows[0], count[0])
        tiers.store_rows_triton(*pools, offloaded, empty(4, 4, 5, dtype=torch.int32), length)


def launch_quantize(quantize) -> None:
    """Qwen2-7B's o_proj, few outputs in splits, and a decode batch on gate and up; with the PTX that a GPU gets."""
    code = quantize.pair_code
    quantize.pair_code = lambda x: code(SimpleNamespace(is_cuda=True, dtype=x.dtype))
    for dtype, M, K, N in ((BF16, 4, 3584, 3584), (torch.float16, 64, 3584, 37888), (FP32, 1, 896, 896)):
        layout = empty(K // 4, N, dtype=torch.int16), empty(K // 128, N), empty(K // 128, N, dtype=torch.uint8)
        quantize.int4_matmul_triton(empty(M, K, dtype=dtype), *layout, empty(N, dtype=dtype))
    quantize.dequantize_triton(*layout, K, dtype)


LAUNCHES = {"ops": launch_ops, "kernels": launch_kernels, "scores": launch_scores, "tiers": launch_tiers,
            "quantize": launch_quantize}  # fmt: skip
POINTERS = {BF16: "*bf16", FP32: "*fp32", torch.float16: "*fp16", torch.int32: "*i32", torch.int16: "*i16",
            torch.int8: "*i8", torch.uint8: "*u8"}  # fmt: skip


# ---- The script: compiling -----------------------------------------------------------------------------------------


def main(capability: int) -> None:
    import importlib

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.runtime.jit import JITFunction

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

    JITFunction.run = compiled
    missing = []
    for name, launch in LAUNCHES.items():
        module = importlib.import_module(name)
        kernels = {n for n, value in vars(module).items() if isinstance(value, JITFunction) and n.endswith("_kernel")}
        own = {n for n in kernels if getattr(module, n).fn.__module__ == name}
        launch(module)
        missing += sorted(own - set(made))
    for name, sizes in made.items():
        print(name, *sizes)
    if missing:
        sys.exit(f"no launch in test_compile.py reaches {', '.join(missing)}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
