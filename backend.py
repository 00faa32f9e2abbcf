"""Which functions do the work of a decode step: plain PyTorch or Triton. Chosen once, named in one line, never silent.

Where it sits: handed to the static steps (graph.py, layers.py and their kin) and to the benchmarks, which call a kernel
only through it. Both have the same functions with the same signatures; the tests hold them against each other.

Shapes follow the legend in model.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

import kernels
import kernels_decode
import kernels_eq6
import kernels_frugal
import kernels_int4
import kernels_layer
import kernels_move
import kernels_plan
import kernels_prefill
import kernels_product
import kernels_scores
import kernels_tiers
import kernels_verify

NAMES = ("auto", "torch", "triton")


@dataclass(frozen=True)
class Backend:
    """name, and one function for each piece of work; kernels_*.py say what each of them does."""

    name: str
    decode_attention: Callable
    scored_attention: Callable
    tiered_attention: Callable
    slot_attention: Callable
    make_room: Callable
    sum_scores: Callable
    plan_layers: Callable
    assign_slots: Callable
    lend_rows: Callable
    bring_rows: Callable
    store_rows: Callable
    add_norm: Callable
    rope_append: Callable
    gate: Callable
    gate_product: Callable
    split_product: Callable
    verify_attention: Callable
    admit_drafts: Callable
    fold_rows: Callable
    int4_matmul: Callable
    dequantize: Callable
    column_sums: Callable


TORCH = Backend(
    "torch",
    decode_attention=kernels_decode.decode_attention_torch,
    scored_attention=kernels_decode.scored_attention_torch,
    tiered_attention=kernels_eq6.tiered_attention_torch,
    slot_attention=kernels_frugal.slot_attention_torch,
    make_room=kernels_frugal.make_room_torch,
    sum_scores=kernels_scores.sum_scores_torch,
    plan_layers=kernels_plan.plan_layers_torch,
    assign_slots=kernels_tiers.assign_slots_torch,
    lend_rows=kernels_tiers.lend_rows_torch,
    bring_rows=kernels_move.bring_rows_torch,
    store_rows=kernels_move.store_rows_torch,
    add_norm=kernels_layer.add_norm_torch,
    rope_append=kernels_layer.rope_append_torch,
    gate=kernels_layer.gate_torch,
    gate_product=kernels_product.gate_product_torch,
    split_product=kernels_product.split_product_torch,
    verify_attention=kernels_verify.verify_attention_torch,
    admit_drafts=kernels_verify.admit_drafts_torch,
    fold_rows=kernels_verify.fold_rows_torch,
    int4_matmul=kernels_int4.int4_matmul_torch,
    dequantize=kernels_int4.dequantize_torch,
    column_sums=kernels.column_sums,
)

TRITON = Backend(
    "triton",
    decode_attention=kernels_decode.decode_attention_triton,
    scored_attention=kernels_decode.scored_attention_triton,
    tiered_attention=kernels_eq6.tiered_attention_triton,
    slot_attention=kernels_frugal.slot_attention_triton,
    make_room=kernels_frugal.make_room_triton,
    sum_scores=kernels_scores.sum_scores_triton,
    plan_layers=kernels_plan.plan_layers_triton,
    assign_slots=kernels_tiers.assign_slots_triton,
    lend_rows=kernels_tiers.lend_rows_triton,
    bring_rows=kernels_move.bring_rows_triton,
    store_rows=kernels_move.store_rows_triton,
    add_norm=kernels_layer.add_norm_triton,
    rope_append=kernels_layer.rope_append_triton,
    gate=kernels_layer.gate_triton,
    gate_product=kernels_product.gate_product_triton,
    split_product=kernels_product.split_product_triton,
    verify_attention=kernels_verify.verify_attention_triton,
    admit_drafts=kernels_verify.admit_drafts_triton,
    fold_rows=kernels_verify.fold_rows_triton,
    int4_matmul=kernels_int4.int4_matmul_triton,
    dequantize=kernels_int4.dequantize_triton,
    column_sums=kernels_prefill.column_sums_triton,
)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. ValueError names a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"no such device {name!r}; use auto, cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:0")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"no device {name}: PyTorch sees {count} CUDA devices here; use --device cpu")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # streams and kernels of ours are the current device's
    return device


def pick_backend(name: str, device: torch.device) -> Backend:
    """`auto` is Triton on CUDA and PyTorch elsewhere. ValueError names a choice that cannot run."""
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; supported: {', '.join(NAMES)}")
    if name == "triton" and device.type != "cuda":
        raise ValueError(f"backend triton needs a CUDA device, not {device}; use --backend torch")
    return TRITON if name == "triton" or (name == "auto" and device.type == "cuda") else TORCH
