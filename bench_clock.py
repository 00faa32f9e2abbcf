"""Time, the machine's ceilings and a profile: what bench.py measures with.

Where it sits: under bench.py. A time without its ceiling says little: bandwidth, PCIe and the matrix rate are measured
on the machine at hand, in the same run.
"""

import statistics
import time

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record

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


def profile(work, path: str) -> None:
    """Three calls of `work` under the torch profiler; the 40 costliest kernels go to the file."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with record(activities=kinds) as found:
        for _ in range(3):
            work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    with open(path, "w", encoding="utf-8") as file:
        file.write(found.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60))
