"""Rows that move between the tiers, in Triton: straight out of pinned host memory into slots, and the newest rows back.

Where it sits: slots (kernels_tiers.py) -> **movement** -> LLM, on side streams of the decode step (graph.py). The
kernels read and write pinned memory themselves, so a captured graph moves whatever the tables on the device say
(Algorithm 1, line 9); the bytes arrive as they left. Each function exists twice with one signature, `..._torch` (the
twin) and `..._triton`.

Shapes follow the legend in model.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

STORED = 512  # rows that a program stores at once. There are two, each with all threads of a multiprocessor: one whose
# writes wait for PCIe holds up every other kernel that has a block on it
LONG = 2048  # slots of a KV head from which a list is long


class Movers(NamedTuple):
    """A launch of bring_rows: programs that bring keys (and as many for values), their rows at once, their warps.

    Together 1,024 rows of each are under way, which fills PCIe. Few programs with many rows leave more multiprocessors
    to the LLM's matrix products, whose blocks fill one and wait for it; but a program goes through its KV heads one
    after another, so many short lists need many programs. At 32 x 16,384 with 2 % moved a step took 15.7 ms with the
    long lists' launch, 18.4 with the short ones' (10 %: 20.3, 19.8); at 4 x 16,384 with 10 % 7.72 and 7.94 (H100).
    """

    programs: int
    rows: int
    warps: int


def pick_movers(slots: int) -> Movers:
    return Movers(2, 512, 32) if slots >= LONG else Movers(16, 64, 4)


class Moves(NamedTuple):
    """Rows of one layer and pool that must come from the host: the first count (B, G) of each line of token and slot
    (B, G, N), all int32; the rest of a line is -1."""

    token: Tensor
    slot: Tensor
    count: Tensor

    @classmethod
    def none(cls, position: Tensor) -> "Moves":
        """No moves yet, for a pool with these positions (B, G, N)."""
        empty = torch.full_like(position, -1)
        return cls(empty, empty.clone(), torch.zeros_like(position[..., 0]))


# ---- The twins -------------------------------------------------------------------------------------------------------


def bring_rows_torch(
    key: Tensor, value: Tensor, host_key: Tensor, host_value: Tensor, key_moves: Moves, value_moves: Moves
) -> None:
    """Rows of one layer from the host, (B, G, S, D), into the slots that wait for them, (B, G, slots, D)."""
    for pool, host, moves in ((key, host_key, key_moves), (value, host_value, value_moves)):
        b, g, i = (moves.token >= 0).nonzero(as_tuple=True)
        token, there = moves.token[b, g, i].long().to(host.device), [index.to(host.device) for index in (b, g)]
        pool[b, g, moves.slot[b, g, i].long()] = host[there[0], there[1], token].to(pool.device)


def store_rows_torch(newest: Tensor, host_key: Tensor, host_value: Tensor, length: Tensor) -> None:
    """K and V of T tokens a sequence, newest (2, L, B, T, G, D), to their places on the host, (L, B, G, S, D).

    length (B,) int32 counts up to the first of them. L may be some of the layers, K and V of each contiguous.
    """
    newest = newest.to(host_key.device).transpose(3, 4)  # (2, L, B, G, T, D)
    place = torch.arange(newest.shape[4], device=host_key.device)
    position = length.long().to(host_key.device)[:, None] - 1 + place  # (B, T)
    index = position[None, :, None, :, None].expand(newest.shape[1:])
    for host, rows in zip((host_key, host_value), newest):
        host.scatter_(3, index, rows)


# ---- The kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _bring(
    pool_ptr, host_ptr, token_ptr, slot_ptr, count_ptr, slots, capacity, pairs, PARTS: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Every so many-th of the work's items: a KV head of a sequence, or one of PARTS interleaved parts of its list."""
    dim = tl.arange(0, D)
    for item in range(tl.program_id(0), pairs * PARTS, tl.num_programs(0)):
        pair = item // PARTS
        count = tl.load(count_ptr + pair)
        for at in range((item % PARTS) * ROWS, count, PARTS * ROWS):
            nth = at + tl.arange(0, ROWS)
            coming = nth < count
            token = tl.load(token_ptr + pair * slots + nth, mask=coming, other=0).to(tl.int64)
            slot = tl.load(slot_ptr + pair * slots + nth, mask=coming, other=0).to(tl.int64)
            row = tl.load(host_ptr + (pair * capacity + token)[:, None] * D + dim, mask=coming[:, None])
            tl.store(pool_ptr + (pair * slots + slot)[:, None] * D + dim, row, mask=coming[:, None])


@triton.jit
def _bring_kernel(
    key_ptr, value_ptr, host_key_ptr, host_value_ptr, key_token_ptr, key_slot_ptr, key_count_ptr, value_token_ptr,
    value_slot_ptr, value_count_ptr, key_slots, value_slots, capacity, pairs,
    PARTS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _bring(key_ptr, host_key_ptr, key_token_ptr, key_slot_ptr, key_count_ptr, key_slots, capacity, pairs,
               PARTS, D, ROWS)  # fmt: skip
    else:
        _bring(value_ptr, host_value_ptr, value_token_ptr, value_slot_ptr, value_count_ptr, value_slots, capacity,
               pairs, PARTS, D, ROWS)  # fmt: skip


@triton.jit
def _store(
    host_ptr, newest_ptr, length_ptr, lines, capacity, B: tl.constexpr, G: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, D)
    for at in range(0, lines, ROWS):
        line = at + tl.arange(0, ROWS)  # counts layers, sequences, tokens and KV heads
        inside = line < lines
        sequence = line // (T * G)  # counts over the layers
        position = tl.load(length_ptr + sequence % B, mask=inside, other=1) - 1 + line // G % T
        cell = ((sequence.to(tl.int64) * G + line % G) * capacity + position)[:, None] * D + dim
        row = tl.load(newest_ptr + line[:, None] * D + dim, mask=inside[:, None])
        tl.store(host_ptr + cell, row, mask=inside[:, None])


@triton.jit
def _store_kernel(
    newest_ptr, host_key_ptr, host_value_ptr, length_ptr, half, lines, capacity, B: tl.constexpr, G: tl.constexpr,
    T: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) == 0:
        _store(host_key_ptr, newest_ptr, length_ptr, lines, capacity, B, G, T, D, ROWS)
    else:
        _store(host_value_ptr, newest_ptr + half, length_ptr, lines, capacity, B, G, T, D, ROWS)


# ---- The launchers ---------------------------------------------------------------------------------------------------


def bring_rows_triton(
    key: Tensor, value: Tensor, host_key: Tensor, host_value: Tensor, key_moves: Moves, value_moves: Moves
) -> None:
    B, G, C, D = key.shape
    pairs = B * G
    movers = pick_movers(C)
    _bring_kernel[(movers.programs, 2)](
        key, value, host_key, host_value, *key_moves, *value_moves, C, value.shape[2], host_key.shape[2], pairs,
        PARTS=triton.cdiv(movers.programs, pairs), D=D, ROWS=movers.rows, num_warps=movers.warps, num_stages=1,
    )  # fmt: skip


def store_rows_triton(newest: Tensor, host_key: Tensor, host_value: Tensor, length: Tensor) -> None:
    _, L, B, T, G, D = newest.shape
    assert newest[0].is_contiguous() and host_key.is_contiguous() and host_value.is_contiguous()
    lines = L * B * T * G
    rows = min(STORED, triton.next_power_of_2(lines))
    _store_kernel[(2,)](
        newest, host_key, host_value, length, newest.stride(0), lines, host_key.shape[3], B=B, G=G, T=T, D=D, ROWS=rows,
        num_warps=max(4, rows // 16), num_stages=1,
    )  # fmt: skip
