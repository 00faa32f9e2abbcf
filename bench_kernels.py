"""Every kernel of a decode step alone, at the real shapes, against the bytes that it must read and write.

    python bench_kernels.py --markdown
    python bench_kernels.py --settings 4x16384+512 --only plan_layers,assign_slots

Where it sits: beside bench.py, which times whole steps; bench_cases.py is the table of what is timed. The kernels are
those of the default settings (fused scores), of the marginal tier its attention and slots, and of steps without a plan
(`--refresh`) the sum of their scores; then the layers of each model as a step runs them, with an attention that does
nothing and with the real one. Random weights, caches and head map; all sequences in the middle of their answer.

A time is the median over replays of one CUDA graph, divided by the calls in it. The calls rotate over copies of their
inputs, so that weights and caches come from memory and not from the L2 cache; "inputs MB" is what they rotate over.
Where that is less than the L2 cache (50 MB on an H100: norms, RoPE) the inputs are found in it, as in a step, where
they have just been written. "floor" is what is read and written on the device over the copy bandwidth measured in the
run, or what crosses PCIe over its rate, if that takes longer. What a kernel keeps for itself (the logits of attention,
lists of slots) is not counted, nor are activations between the kernels of a whole model.

On a CPU the twins run (with `--backend triton` and TRITON_INTERPRET=1 the kernels, in the interpreter): for tests, the
times say nothing.
"""

import argparse
import json
import math
import statistics
import sys
import traceback
from collections.abc import Callable

import torch
import triton

import kernels_layer
from backend import NAMES, TRITON, pick_backend, pick_device
from bench_cases import CASES
from bench_clock import Clock, ceilings
from bench_count import PAIRS, Setting, pair_configs
from bench_int4 import CACHE
from bench_shapes import Call, Shape
from kernels_product import MAX_ROWS
from match import WINDOW_MIN
from model import Decoder
from settings import Settings
from tables import print_rows

CALLS = 64  # in one graph, at most
GRAPH_SECONDS = 2e-3  # that a graph should last: its start costs microseconds


def copies(size: int) -> int:
    """Of a call's inputs, so that what one has read is gone from the cache before it comes again."""
    return max(1, min(CALLS, math.ceil(2 * CACHE / size)))


def measure(at: Shape, make: Callable[[Shape], Call], clock: Clock, rates: dict[str, float], repeats: int) -> dict:
    first = make(at)
    floor = max(first.size / rates["copy_bytes_s"], first.pcie / rates["pcie_bytes_s"])
    cuda = clock.device.type == "cuda"
    calls = [first] + [make(at) for _ in range(copies(first.size + first.pcie) - 1 if cuda else 0)]
    rounds = max(1, min(CALLS // len(calls), int(GRAPH_SECONDS / floor / len(calls)))) if cuda else 1

    def work():
        for _ in range(rounds):
            for call in calls:
                call.work()

    clock.laps(work, 1)  # kernels are compiled at their first call
    if cuda:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        clock.laps(graph.replay, 2)
    taken = statistics.median(clock.laps(graph.replay if cuda else work, repeats))
    seconds = taken / rounds / len(calls) / first.launches
    return {"us": 1e6 * seconds, "floor_us": 1e6 * floor, "ratio": seconds / floor, "bytes": first.size,
            "pcie_bytes": first.pcie, "input_bytes": len(calls) * first.size, "calls": rounds * len(calls),
            "layers": first.layers}  # fmt: skip


def table(rows: list[dict]) -> list[list[str]]:
    lines = [["kernel", "what", "us", "floor us", "x floor", "MB", "over PCIe, MB", "inputs MB"]]
    for row in rows:
        if "error" in row:
            lines.append([row["kernel"], row["case"], row["error"], *["-"] * 5])
            continue
        many = f", {row['layers']} layers" * (row["kernel"] in ("plan_layers", "assign_slots"))
        lines.append([
            row["kernel"], row["case"] + many, f"{row['us']:.2f}", f"{row['floor_us']:.2f}", f"{row['ratio']:.2f}",
            f"{row['bytes'] / 1e6:.2f}", f"{row['pcie_bytes'] / 1e6:.2f}" if row["pcie_bytes"] else "-",
            f"{row['input_bytes'] / 1e6:.0f}",
        ])  # fmt: skip
    return lines


@torch.no_grad()
def run(args) -> int:
    device = pick_device(args.device)
    clock, cuda = Clock(device), device.type == "cuda"
    interpreted = not isinstance(kernels_layer._norm_kernel, triton.JITFunction)
    backend = TRITON if args.backend == "triton" and interpreted else pick_backend(args.backend, device)
    Settings(args.budget)  # its error comes before any work
    configs, rates = pair_configs(args.pair)[1], ceilings(clock)
    decoders: dict[str, Decoder] = {}
    rows = []
    name = torch.cuda.get_device_name() if cuda else "CPU"
    about = {"device": name, "torch": torch.__version__, "backend": backend.name, "pair": args.pair,
             "budget": args.budget, "ceilings": rates}  # fmt: skip
    print(f"{name}, PyTorch {torch.__version__}, {backend.name}, copy {rates['copy_bytes_s'] / 1e12:.2f} TB/s, "
          f"PCIe {rates['pcie_bytes_s'] / 1e9:.0f} GB/s", flush=True)  # fmt: skip
    for setting in args.settings:
        at = Shape(setting, configs, decoders, backend, device, args.budget)
        for kernel in args.only:
            for case, make in CASES[kernel].items():
                row = {"setting": setting.name, "kernel": kernel, "case": case}
                try:
                    row.update(measure(at, make, clock, rates, args.repeats))
                except Exception as error:  # a card without the memory, a kernel it refuses: the others go on
                    if not isinstance(error, torch.OutOfMemoryError):
                        traceback.print_exc()
                    row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
                at.held.clear()
                if cuda:
                    torch.cuda.empty_cache()
                rows.append(row)
                print(f"{setting.name} {kernel} ({case}): {row.get('error') or format(row['us'], '.2f')}", flush=True)
        mine = [row for row in rows if row["setting"] == setting.name]
        print_rows(table(mine), f"{args.pair}, {setting.name}, budget {args.budget:g}, {name}", args.markdown)
    print(json.dumps({**about, "rows": rows}))
    return int(any("error" in row for row in rows))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--pair", choices=PAIRS, default="qwen2-7b")
    parser.add_argument("--settings", type=Setting.many, default=Setting.many("4x16384+512,64x2048+256,32x16384+256"),
                        help="BATCHxPROMPT+NEW, separated by commas")  # fmt: skip
    parser.add_argument("--only", type=lambda names: names.split(","), default=list(CASES), metavar="NAME,...",
                        help=f"of {', '.join(CASES)}")  # fmt: skip
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=20, help="replays of which a time is the median")
    parser.add_argument("--backend", choices=NAMES, default="auto")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--markdown", action="store_true", help="tables in markdown")
    args = parser.parse_args(argv)
    for kernel in args.only:
        if kernel not in CASES:
            parser.error(f"unknown kernel {kernel!r}; supported: {', '.join(CASES)}")
    for setting in args.settings:
        if not (1 <= setting.batch <= MAX_ROWS and setting.prompt >= WINDOW_MIN and setting.new >= 1):
            parser.error(f"--settings {setting.name}: 1 to {MAX_ROWS} sequences (more have other products), a prompt "
                         f"of at least {WINDOW_MIN} tokens (a shorter one stays whole) and a new token")  # fmt: skip
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: at least 1")
    try:
        return run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
