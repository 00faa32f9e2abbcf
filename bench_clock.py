"""Time, the machine's ceilings, a profile and random weights: what bench.py measures with.

Where it sits: under bench.py. A time without its ceiling says little: bandwidth, PCIe and the matrix rate are measured
on the machine at hand, in the same run.
"""

import statistics
import time

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record

from int8_rows import LEVELS
from model import Config, Decoder
from parallel import Team
from quantize import Scheme, int4_modules, put_int4

GIB = 1 << 30


class Clock:
    """Times on the device with events, on the host where there is no device."""

    def __init__(self, device: torch.device):
        self.device = device

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def laps(self, work, count: int) -> list[float]:
        """Seconds of each of `count` calls, back to back: the next is launched before the last has ended."""
        if self.device.type != "cuda":
            marks = [time.perf_counter()]
            for _ in range(count):
                work()
                marks.append(time.perf_counter())
            return [end - start for start, end in zip(marks, marks[1:])]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            work()
            event.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in zip(events, events[1:])]

    def once(self, work) -> float:
        self.synchronize()
        begin = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - begin


def draw(table: torch.Tensor) -> torch.Tensor:
    """Random numbers in place: normal ones, or in 8 bits any level of K and V (int8_rows.py)."""
    return table.normal_() if table.is_floating_point() else table.random_(-LEVELS, LEVELS + 1)


def ceilings(clock: Clock) -> dict[str, float]:
    """What this machine reaches: copy bandwidth (read + written), PCIe, and the bf16 matrix rate."""
    cuda = clock.device.type == "cuda"
    size, side = (GIB, 8192) if cuda else (1 << 22, 128)
    source = torch.randint(255, (size,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    host = torch.empty(size // 4, dtype=torch.uint8, pin_memory=cuda)
    matrix = torch.randn(side, side, device=clock.device, dtype=torch.bfloat16 if cuda else torch.float32)

    def rate(work, amount):
        clock.laps(work, 3)
        return amount / statistics.median(clock.laps(work, 10))

    return {
        "copy_bytes_s": rate(lambda: target.copy_(source), 2 * size),
        "pcie_bytes_s": rate(lambda: target[: size // 4].copy_(host, non_blocking=True), size // 4),
        "matrix_flops_s": rate(lambda: matrix @ matrix, 2 * side**3),
    }


def profile(work, path: str, calls: int = 3) -> None:
    """`calls` of `work` under the torch profiler; the 40 costliest kernels go to the file."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with record(activities=kinds) as found:
        for _ in range(calls):
            work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    with open(path, "w", encoding="utf-8") as file:
        file.write(found.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60))


def random_decoder(
    config: Config, device: torch.device, dtype: torch.dtype, int4: bool = False, team: Team = Team()
) -> Decoder:
    """int4: the layers' products are made as INT4, so that a model fits whose 16-bit weights do not. team: this rank's
    part of an LLM; the ranks' parts are the same numbers, which costs no time."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            decoder = team.split(config).requires_grad_(False).eval()
        if int4:
            put_int4(decoder, Scheme())
        decoder.requires_grad_(False).to_empty(device=device)
    finally:
        torch.set_default_dtype(before)
    team.tie(decoder)  # moving has parted them
    for name, parameter in decoder.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_("norm" in name)  # biases are 0
    for module in int4_modules(decoder).values():
        module.packed.random_(-(2**15), 2**15)
        module.scale.fill_(0.02 / 4.6)  # the spread of 16 levels in a row is 4.6
        module.zero.fill_(8)
    return decoder
