"""Rows that move between the tiers, in Triton: straight out of the host's memory into slots, and the newest rows back.

Where it sits: slots (kernels_tiers.py) -> **movement** -> LLM, on side streams of the decode step (graph.py). The
kernels read and write that memory themselves (host_memory.py), so a captured graph moves whatever the tables on the
device say (Algorithm 1, line 9); the bytes arrive as they left, levels too (int8_rows.py). Each function exists twice
with one signature, `..._torch` (the twin, through which the plain steps of cache.py store their rows too) and
`..._triton`.

Shapes follow the legend in model.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# A mover has as many threads as a block can, and all registers of a multiprocessor: few whole ones are less of a loss
# than many halves, as a product's blocks fill one and wait for it, and whatever shares one with rows that wait for PCIe
# waits too.
BYTES = 1 << 17  # that a mover moves at once: 512 rows of 256 bytes; a thousand under way fill PCIe
MOVERS = 2  # that bring keys, and as many for values
MORE, LARGE = 4, 1 << 26  # instead, for a pool of more bytes than LARGE, whose moves outlast a layer
FIRST = 8  # instead, for the first layer of a step: the LLM waits for it, and nobody else has work


class Moves(NamedTuple):
    """Rows of one layer and pool that must come from the host: the first count () of the lists source and target
    (B * G * N), all int32. Rows of the host's table count b, g, token, those of the pool b, g, slot; in any order."""

    source: Tensor
    target: Tensor
    count: Tensor

    @classmethod
    def none(cls, position: Tensor) -> "Moves":
        """No moves yet, for the pools of all layers, positions (L, B, G, N): each table gets L in front."""
        empty = torch.zeros_like(position).flatten(1)
        return cls(empty, empty.clone(), torch.zeros_like(empty[:, 0]))

    def of(self, layers: int | slice) -> "Moves":
        return Moves(*(table[layers] for table in self))


# ---- The twins -------------------------------------------------------------------------------------------------------


def bring_rows_torch(
    key: Tensor, value: Tensor, host_key: Tensor, host_value: Tensor, key_moves: Moves, value_moves: Moves,
    first: bool = False,
) -> None:  # fmt: skip
    """Rows of one layer from the host, (B, G, S', D), into the slots that wait for them, (B, G, slots, D).

    first: of the step, for which the LLM waits.
    """
    for pool, host, moves in (key, host_key, key_moves), (value, host_value, value_moves):
        source, target = (table[: moves.count].long() for table in (moves.source, moves.target))
        pool.view(-1, pool.shape[-1])[target] = host.flatten(0, 2)[source]


def store_rows_torch(newest: Tensor, host_key: Tensor, host_value: Tensor, length: Tensor) -> None:
    """K and V of T tokens a sequence, newest (2, L, B, T, G, D), to their places on the host, (L, B, G, S', D).

    length (B,) int32 counts up to the first of them. L may be some of the layers, K and V of each contiguous.
    """
    newest = newest.transpose(3, 4)  # (2, L, B, G, T, D)
    position = length.long()[:, None] - 1 + torch.arange(newest.shape[4], device=newest.device)  # (B, T)
    index = position[None, :, None, :, None].expand(newest.shape[1:])
    for host, rows in zip((host_key, host_value), newest):
        host.scatter_(3, index, rows)


# ---- The kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _bring(
    pool_ptr, host_ptr, source_ptr, target_ptr, count, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    # WIDTH numbers a thread, where they come from and where they go: else threads would have to exchange them.
    dim = tl.max_contiguous(tl.arange(0, D), WIDTH)
    for at in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        nth = at + tl.arange(0, ROWS)
        source = tl.load(source_ptr + nth, mask=nth < count, other=0)
        row = tl.load(host_ptr + source.to(tl.int64)[:, None] * D + dim, mask=(nth < count)[:, None])
        target = tl.load(target_ptr + nth, mask=nth < count, other=0)
        tl.store(pool_ptr + target.to(tl.int64)[:, None] * D + dim, row, mask=(nth < count)[:, None])


@triton.jit
def _bring_kernel(
    key_ptr, value_ptr, host_key_ptr, host_value_ptr, key_source_ptr, key_target_ptr, key_count_ptr, value_source_ptr,
    value_target_ptr, value_count_ptr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _bring(key_ptr, host_key_ptr, key_source_ptr, key_target_ptr, tl.load(key_count_ptr), D, ROWS, WIDTH)
    else:
        _bring(value_ptr, host_value_ptr, value_source_ptr, value_target_ptr, tl.load(value_count_ptr), D, ROWS, WIDTH)


@triton.jit
def _store(
    host_ptr, newest_ptr, length_ptr, lines, host_rows, B: tl.constexpr, G: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, D)
    for at in range(0, lines, ROWS):
        line = at + tl.arange(0, ROWS)  # counts layers, sequences, tokens and KV heads
        inside = line < lines
        sequence = line // (T * G)  # counts over the layers
        position = tl.load(length_ptr + sequence % B, mask=inside, other=1) - 1 + line // G % T
        pair = sequence.to(tl.int64) * G + line % G
        row = tl.load(newest_ptr + line[:, None] * D + dim, mask=inside[:, None])
        tl.store(host_ptr + (pair * host_rows + position)[:, None] * D + dim, row, mask=inside[:, None])


@triton.jit
def _store_kernel(
    newest_ptr, host_key_ptr, host_value_ptr, length_ptr, half, lines, host_rows,
    B: tl.constexpr, G: tl.constexpr, T: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) == 0:
        _store(host_key_ptr, newest_ptr, length_ptr, lines, host_rows, B, G, T, D, ROWS)
    else:
        _store(host_value_ptr, newest_ptr + half, length_ptr, lines, host_rows, B, G, T, D, ROWS)


# ---- The launchers ---------------------------------------------------------------------------------------------------


def rows_at_once(table: Tensor) -> int:
    """BYTES of them, a power of two as D is; rows (..., D)."""
    return BYTES // (table.shape[-1] * table.itemsize)


def bring_rows_triton(
    key: Tensor, value: Tensor, host_key: Tensor, host_value: Tensor, key_moves: Moves, value_moves: Moves,
    first: bool = False,
) -> None:  # fmt: skip
    assert all(tensor.is_contiguous() for tensor in (key, value, host_key, host_value)) and key.dtype == host_key.dtype
    programs = FIRST if first else MORE if key.nbytes > LARGE else MOVERS
    _bring_kernel[(programs, 2)](
        key, value, host_key, host_value, *key_moves, *value_moves, D=key.shape[3], ROWS=rows_at_once(key),
        WIDTH=16 // key.itemsize, num_warps=32, num_stages=1,
    )  # fmt: skip


def store_rows_triton(newest: Tensor, host_key: Tensor, host_value: Tensor, length: Tensor) -> None:
    _, L, B, T, G, D = newest.shape
    assert all(tensor.is_contiguous() for tensor in (newest[0], host_key, host_value))
    assert newest.dtype == host_key.dtype
    lines, most = L * B * T * G, rows_at_once(newest)
    rows = min(most, triton.next_power_of_2(lines))
    _store_kernel[(2,)](
        newest, host_key, host_value, length, newest.stride(0), lines, host_key.shape[3], B=B, G=G, T=T, D=D,
        ROWS=rows, num_warps=max(4, 32 * rows // most), num_stages=1,
    )  # fmt: skip
