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
BYTES = 1 << 17  # that a mover takes at once: 256 rows of 512 bytes; a thousand rows under way fill PCIe
# More do not come faster, and their requests fill the L2 cache's queues, in which everybody else's wait: with 16 for
# the first layer, which the LLM waits for, a norm of the SLM took 90 us instead of 2, and the step 0.15 ms longer.
MOVERS = 4
MORE, LARGE = 8, 1 << 26  # instead, for a pool of more bytes than LARGE, whose moves outlast a layer
TURNS = tl.constexpr(4)  # of BYTES at most in a share, at whose beginning the rows' names are waited for


class Moves(NamedTuple):
    """Rows of one layer and pool that must come from the host: the first count () of the lists source and target
    (B * G * N), all int32. Rows of the host's table count b, g, token, those of the pool b, g, slot; in any order.
    taken () int32: 0; movers count there while they take rows from the lists."""

    source: Tensor
    target: Tensor
    count: Tensor
    taken: Tensor

    @classmethod
    def none(cls, position: Tensor) -> "Moves":
        """No moves yet, for the pools of all layers, positions (L, B, G, N): each table gets L in front."""
        empty = torch.zeros_like(position).flatten(1)
        return cls(empty, empty.clone(), *(torch.zeros_like(empty[:, 0]) for _ in range(2)))

    @property
    def lists(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a plan writes and a mover reads: source, target, count."""
        return self[:3]

    def of(self, layers: int | slice) -> "Moves":
        return Moves(*(table[layers] for table in self))


# ---- The twins -------------------------------------------------------------------------------------------------------


def bring_rows_torch(
    key: Tensor, value: Tensor, host: Tensor, moves: Moves, value_moves: Moves | None = None
) -> None:
    """Rows of one layer from the host, (B, G, S', 2, D), into the slots that wait for them, (B, G, slots, D).

    moves: of keys; value_moves: of values; None: a token's K and V come together.
    """
    for pool, kind, (source, target, count) in (key, 0, moves.lists), (value, 1, (value_moves or moves).lists):
        pool.view(-1, pool.shape[-1])[target[:count].long()] = host.flatten(0, 2)[source[:count].long(), kind]


def store_rows_torch(newest: Tensor, host: Tensor, length: Tensor) -> None:
    """K and V of T tokens a sequence, newest (2, L, B, T, G, D), to their places on the host, (L, B, G, S', 2, D).

    length (B,) int32 counts up to the first of them. L may be some of the layers, K and V of each contiguous.
    """
    rows = newest.permute(1, 2, 4, 3, 0, 5)  # (L, B, G, T, 2, D)
    position = length.long()[:, None] - 1 + torch.arange(rows.shape[3], device=rows.device)  # (B, T)
    host.scatter_(3, position[None, :, None, :, None, None].expand(rows.shape), rows)


# ---- The kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _named(list_ptr, at, count, ROWS: tl.constexpr):
    """The rows of a list from `at` on."""
    nth = at + tl.arange(0, ROWS)
    return tl.load(list_ptr + nth, mask=nth < count, other=0)


@triton.jit
def _bring(
    pool_ptr, value_ptr, host_ptr, source_ptr, target_ptr, count, taken_ptr, D: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """Rows of D numbers into a pool; BOTH: K and V of each token, rows of 2 D, into the pool and that of the values.

    Half of the list is shared out evenly, of the rest a program takes a share when it is through with its last: beside
    the models some multiprocessors get their rows in two fifths of the time of others, and all would wait for these.
    """
    # WIDTH numbers a thread, where they come from and where they go: else threads would have to exchange them.
    dim, programs = tl.max_contiguous(tl.arange(0, 2 * D if BOTH else D), WIDTH), tl.num_programs(0)
    size = ROWS * tl.maximum(1, count // (2 * programs * ROWS))
    share = ROWS * tl.maximum(1, tl.minimum(TURNS, count // (8 * programs * ROWS)))
    even = programs * size
    shares = tl.minimum(programs, tl.cdiv(count, size)) + tl.cdiv(tl.maximum(0, count - even), share)
    begin = tl.program_id(0) * size
    while begin < count:
        end = tl.minimum(begin + size, count)
        source, taken = _named(source_ptr, begin, end, ROWS), 0
        for at in range(begin, end, ROWS):
            inside = (at + tl.arange(0, ROWS) < end)[:, None]
            row = tl.load(host_ptr + source.to(tl.int64)[:, None] * 2 * D + dim, mask=inside)
            source = _named(source_ptr, at + ROWS, end, ROWS)  # while the rows are on their way
            target = _named(target_ptr, at, end, ROWS).to(tl.int64)[:, None] * D
            if at == begin:
                # After each share one asks for the next: who is the last to ask leaves a 0 to the next launch.
                taken = tl.atomic_add(taken_ptr, 1, sem="relaxed")
                tl.store(taken_ptr, 0, mask=taken + 1 == shares)
            if BOTH:
                tl.store(pool_ptr + target + dim, row, mask=inside & (dim < D))
                tl.store(value_ptr + target + dim - D, row, mask=inside & (dim >= D))
            else:
                tl.store(pool_ptr + target + dim, row, mask=inside)
        begin, size = even + taken * share, share


@triton.jit
def _bring_kernel(
    key_ptr, value_ptr, host_ptr, key_source_ptr, key_target_ptr, key_count_ptr, key_taken_ptr, value_source_ptr,
    value_target_ptr, value_count_ptr, value_taken_ptr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    BOTH: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _bring(key_ptr, value_ptr, host_ptr, key_source_ptr, key_target_ptr, tl.load(key_count_ptr), key_taken_ptr, D,
               ROWS, WIDTH, BOTH)  # fmt: skip
    elif not BOTH:
        _bring(value_ptr, value_ptr, host_ptr + D, value_source_ptr, value_target_ptr, tl.load(value_count_ptr),
               value_taken_ptr, D, ROWS, WIDTH, BOTH)  # fmt: skip


@triton.jit
def _store_kernel(
    newest_ptr, host_ptr, length_ptr, half, lines, host_rows,
    B: tl.constexpr, G: tl.constexpr, T: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program 0: keys, program 1: values."""
    kind, dim = tl.program_id(0), tl.arange(0, D)
    for at in range(0, lines, ROWS):
        line = at + tl.arange(0, ROWS)  # counts layers, sequences, tokens and KV heads
        inside = line < lines
        sequence = line // (T * G)  # counts over the layers
        position = tl.load(length_ptr + sequence % B, mask=inside, other=1) - 1 + line // G % T
        pair = sequence.to(tl.int64) * G + line % G
        row = tl.load(newest_ptr + kind * half + line[:, None] * D + dim, mask=inside[:, None])
        place = (pair * host_rows + position) * 2 + kind
        tl.store(host_ptr + place[:, None] * D + dim, row, mask=inside[:, None])


# ---- The launchers ---------------------------------------------------------------------------------------------------


def rows_at_once(size: int) -> int:
    """BYTES of them, a power of two as their size is."""
    return BYTES // size


def bring_rows_triton(
    key: Tensor, value: Tensor, host: Tensor, moves: Moves, value_moves: Moves | None = None
) -> None:
    assert all(tensor.is_contiguous() for tensor in (key, value, host)) and key.dtype == host.dtype
    assert value_moves is not None or key.shape == value.shape, "K and V that come together have the same slots"
    programs = MORE if key.nbytes > LARGE else MOVERS
    both, D = value_moves is None, key.shape[3]
    _bring_kernel[(programs, 1) if both else (programs // 2, 2)](
        key, value, host, *moves, *(value_moves or moves), D=D, ROWS=rows_at_once((1 + both) * D * key.itemsize),
        WIDTH=16 // key.itemsize, BOTH=both, num_warps=32, num_stages=1,
    )  # fmt: skip


def store_rows_triton(newest: Tensor, host: Tensor, length: Tensor) -> None:
    _, L, B, T, G, D = newest.shape
    assert newest[0].is_contiguous() and host.is_contiguous() and newest.dtype == host.dtype
    lines, most = L * B * T * G, rows_at_once(D * newest.itemsize)
    rows = min(most, triton.next_power_of_2(lines))
    _store_kernel[(2,)](
        newest, host, length, newest.stride(0), lines, host.shape[3], B=B, G=G, T=T, D=D,
        ROWS=rows, num_warps=max(4, 32 * rows // most), num_stages=1,
    )  # fmt: skip
