"""Memory of the host that the GPU addresses by itself: where the offloaded tier lies.

Where it sits: under the cache (cache.py), whose rows it holds; the movement (kernels_move.py) reads and writes it.

`rows_on_host` returns an ordinary tensor of the model's device, so any kernel, PyTorch's too, can index it, also inside
a captured graph; its bytes are in the host's memory all the same. The kind of it is "managed" where the driver supports
that (Linux): pages that are told to stay on the host and are mapped for the GPU. Elsewhere it is "pinned". Scattered
rows of 256 bytes, read by a kernel while products keep the GPU's own memory busy, on an H100 behind PCIe 5, GB/s:

|                             | one row of 50 | one row of 250 |
| --------------------------- | ------------- | -------------- |
| managed                     | 42            | 29             |
| pinned, with PyTorch or not | 31            | 10             |

(Alone: 48 and 40, 47 and 24; by a script outside the repository, commit b0b89af. `bench_kernels.py` times the managed
kind.) And it is allocated in a tenth of the time, and not rounded up to a power of two as PyTorch's pinned tensors are.

Managed memory lies in pieces of 2 MiB. Rows written at one step are at the same place of every KV head: where heads
lie a multiple of some KiB apart, these rows fall on a few lines of the host's cache, and 4,096 of them took 10 ms
instead of 0.04. So a KV head has an odd number of rows (`host_rows`).

Shapes follow the legend in model.py.
"""

import ctypes
import math
import sys

import torch
from torch import Tensor

CONCURRENT_MANAGED_ACCESS = 89  # numbers of cuda.h
ATTACH_GLOBAL = 1
PREFERRED_LOCATION, ACCESSED_BY, HOST = 3, 5, -1
PORTABLE_MAPPED = 1 | 2
OUT_OF_MEMORY = 2


def host_rows(capacity: int) -> int:
    """Rows of one KV head on the host: the next odd number."""
    return capacity | 1


def kind_of_host(device: str | torch.device) -> str:
    """What the host's rows lie in, for a model on this device: "host" (a CPU), "managed" or "pinned"."""
    device = torch.device(device)
    if device.type != "cuda":
        return "host"
    torch.cuda.init()
    can = ctypes.c_int()
    number = torch.cuda.current_device() if device.index is None else device.index
    _call("cuDeviceGetAttribute", ctypes.byref(can), CONCURRENT_MANAGED_ACCESS, number)
    return "managed" if can.value else "pinned"


def rows_on_host(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of `device`, of any contents, whose bytes lie in the host's memory and are given back with it.

    torch.OutOfMemoryError if the driver says so; where it promises more than the host has, Linux may end the process
    when the memory is written to: who asks for much looks first (generate.check_caches_fit). RuntimeError names another
    failed call.
    """
    kind = kind_of_host(device)
    if kind == "host":
        return torch.empty(shape, dtype=dtype)
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # now the driver has a context
        held = _HostBytes(math.prod(shape) * dtype.itemsize, kind, torch.cuda.current_device())
        flat = torch.as_tensor(held, device=device)
    if flat.data_ptr() != held.address:
        raise RuntimeError(f"host memory at {held.address:#x} was copied to {device} instead of being addressed there")
    return flat.view(dtype).view(shape)


class _HostBytes:
    """Owns the bytes as long as a tensor on them lives; speaks the protocol by which PyTorch takes over an array."""

    def __init__(self, size: int, kind: str, number: int):
        where = ctypes.c_uint64()
        self.device, self._free = number, "cuMemFree_v2" if kind == "managed" else "cuMemFreeHost"
        if kind == "managed":
            _call("cuMemAllocManaged", ctypes.byref(where), ctypes.c_size_t(size), ATTACH_GLOBAL)
        else:
            _call("cuMemHostAlloc", ctypes.byref(where), ctypes.c_size_t(size), PORTABLE_MAPPED)
        self.address = where.value
        if kind == "managed":
            _call("cuMemAdvise", where, ctypes.c_size_t(size), PREFERRED_LOCATION, HOST)
        # Written once by the host: before that there are no pages to map.
        torch.frombuffer((ctypes.c_ubyte * size).from_address(self.address), dtype=torch.uint8).zero_()
        if kind == "managed":
            _call("cuMemAdvise", where, ctypes.c_size_t(size), ACCESSED_BY, number)
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (self.address, False), "version": 3,
        }  # fmt: skip

    def __del__(self):
        if not hasattr(self, "address") or sys.is_finalizing():  # at exit the driver gives everything back
            return
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()  # a kernel may still be at it
            _call(self._free, ctypes.c_uint64(self.address))


def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments) -> None:
    if error := _driver()[name](*arguments):
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(error, ctypes.byref(text))
        kind = torch.OutOfMemoryError if error == OUT_OF_MEMORY else RuntimeError
        raise kind(f"{name} failed: {(text.value or b'unknown error').decode()} ({error})")
