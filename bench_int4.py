"""How fast the INT4 product is against the bytes it must read, at one layer's shapes: ours, PyTorch's own, and 16 bits.

    python bench_int4.py --pair qwen2-72b --rows 1,4,16,64

Where it sits: beside bench.py, which times whole steps. Random weights, made packed; several copies of each product, so
that none is found in the cache of the step before, and on a GPU one CUDA graph over all of them. "share" is the bytes
of weights, scales and zeros over the time, of the copy bandwidth measured in the run.

PyTorch's own is `torch._weight_int4pack_mm` (its weights random in its own packed shape). Int4Linear does not call it:
it knows bf16 alone (Qwen's GPTQ files are fp16), no short last group, and zeros only after they were multiplied with
their scale and rounded to bf16; and its packed order is made for that one kernel: dequantising for a prefill would have
to undo it, so it would be a second layout beside ours.
"""

import argparse
import statistics
import sys

import torch
import torch.nn.functional as F

from backend import NAMES, pick_backend, pick_device
from bench_clock import Clock, ceilings
from bench_count import PAIRS, layer_products, pair_configs
from quantize import GROUP, int4_bytes

CACHE = 256 << 20  # bytes of copies that leave nothing in a cache between two calls


def ours(backend, K: int, N: int, device):
    groups = -(-K // GROUP)
    packed = torch.randint(-(2**15), 2**15, (groups * GROUP // 4, N), dtype=torch.int16, device=device)
    scale = torch.full((groups, N), 0.004, dtype=torch.bfloat16, device=device)
    zero = torch.full((groups, N), 8, dtype=torch.uint8, device=device)
    return lambda x: backend.int4_matmul(x, packed, scale, zero)


def pytorchs(backend, K: int, N: int, device):
    """None where it cannot: it wants CUDA, whole groups, and K a multiple of what its tiles hold."""
    if device.type != "cuda" or K % GROUP or N % 8:
        return None
    packed = torch.randint(2**31 - 1, (N // 8, K // 128, 32, 4), dtype=torch.int32, device=device)
    both = torch.full((K // GROUP, N, 2), 0.004, dtype=torch.bfloat16, device=device)
    return lambda x: torch._weight_int4pack_mm(x.bfloat16(), packed, GROUP, both)


def sixteen_bits(backend, K: int, N: int, device):
    weight = torch.full((N, K), 0.01, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)
    return lambda x: F.linear(x, weight)


def seconds(make, backend, K: int, N: int, rows: int, clock: Clock) -> float | None:
    """One product, the mean over its copies, the median over passes."""
    device = clock.device
    first = make(backend, K, N, device)
    if first is None:
        return None
    copies = [first] + [make(backend, K, N, device) for _ in range(min(15, CACHE // (K * N // 2)))]
    x = torch.randn(rows, K, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)

    def work():
        for product in copies:
            product(x)

    clock.laps(work, 2)
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return statistics.median(clock.laps(graph.replay, 15)) / len(copies)
    return statistics.median(clock.laps(work, 3)) / len(copies)


@torch.inference_mode()
def run(args) -> int:
    clock = Clock(pick_device(args.device))
    backend = pick_backend(args.backend, clock.device)
    copy = ceilings(clock)["copy_bytes_s"]
    name = torch.cuda.get_device_name() if clock.device.type == "cuda" else "CPU"
    print(f"{args.pair}, {name}, PyTorch {torch.__version__}, {backend.name}, copy {copy / 1e12:.2f} TB/s\n")
    print("| inputs x outputs | rows | us | share of copy | PyTorch's int4, us | 16 bits, us |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for K, N in layer_products(pair_configs(args.pair)[1][0]):
        for rows in args.rows:
            times = [seconds(make, backend, K, N, rows, clock) for make in (ours, pytorchs, sixteen_bits)]
            cells = ["-" if time is None else f"{1e6 * time:.1f}" for time in times]
            cells.insert(1, f"{int4_bytes(K, N) / times[0] / copy:.0%}")
            print(f"| {K} x {N} | {rows} | {' | '.join(cells)} |", flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--pair", choices=PAIRS, default="qwen2-72b")
    parser.add_argument("--rows", type=lambda rows: [int(row) for row in rows.split(",")], default=[1, 4, 16, 64])
    parser.add_argument("--backend", choices=NAMES, default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if not all(1 <= rows <= 64 for rows in args.rows):
        parser.error(f"--rows {args.rows}: from 1 to 64; more rows are dequantised and multiplied")
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
