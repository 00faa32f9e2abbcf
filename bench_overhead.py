"""The overhead calculator of appendix A, `bench.py overhead`: what an SLM costs beside an LLM, and when it pays.

    python bench.py overhead --llm Qwen2-7B --slm Qwen2-0.5B
    python bench.py overhead --llm DIR_OR_ID --slm DIR_OR_ID --budget 0.2 --slm-budget 0.4 --slm-layers 20

Where it sits: under bench.py, on the formulas of overhead.py (Eq. 7-9) and bench_count.py. It reads two config.json, of
folders, hub ids or the published shapes in shapes.py, loads no weights and runs nothing. A.3 names three ways to make
the SLM cheaper; each is a line, and so is the paper's best combination, 40 % of the SLM's cache and 20 of 24 layers:

- speculative decoding: the SLM is there to draft, its steps, weights and cache are the drafts'. What SmallKV adds are
  the scores.
- `--slm-budget`: the SLM keeps a share of its own cache (and of the scores, which lie beside it).
- `--slm-layers`: the SLM stops early. It goes with the second, not with drafts, which need its last layer.

Bytes are K, V and weights of `--value-bytes` each and fp32 scores, without the memory of fused ones. Held: what lies on
the device. Read: what a decode step cannot avoid to read there; rows that come over PCIe travel beside it and are not
in it. Break-even: where the bytes of the LLM's cache that SmallKV saves exceed what the SLM adds.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass

from bench_count import layer_parameters, step_bytes
from checkpoint import CheckpointError, read_config, resolve
from model import Config
from overhead import (
    MODELS,
    PAPER_PAIRS,
    cache_bytes,
    compare,
    decode_flops,
    early,
    parameters,
    share_of_saving,
    slm_share,
)
from tables import print_rows

FP32 = 4


@dataclass(frozen=True)
class Use:
    """One way to run the SLM: its shape, after which layer it stops, the share of its cache it keeps, or as drafter."""

    name: str
    slm: Config
    budget: float = 1.0
    drafts: bool = False


def uses(slm: Config, slm_budget: float, layers: int) -> list[Use]:
    """The SLM as it is, with each reduction of A.3, and with the two that go together without drafts."""
    if not 0 < slm_budget <= 1:
        raise ValueError(f"--slm-budget {slm_budget} is outside (0, 1]; the paper's best is 0.4")
    stopped, kept, fewer = early(slm, layers), f"{slm_budget:g} of its cache", f"{layers} of {slm.layers} layers"
    return [
        Use("as it is", slm), Use("speculative decoding", slm, drafts=True), Use(kept, slm, slm_budget),
        Use(fewer, stopped), Use(f"{kept}, {fewer}", stopped, slm_budget),
    ]  # fmt: skip


def token_bytes(use: Use, value_bytes: int) -> dict[str, float]:
    """Bytes that the SLM adds for each token of each sequence: its K and V, and the scores.

    With a budget the scores lie by slot, and attention gathered by KV head, for the eviction, lies beside them.
    """
    slm, evicts = use.slm, use.budget < 1
    scores = FP32 * slm.layers * (slm.query_heads + evicts * slm.kv_heads) * use.budget
    return {"K, V": 0 if use.drafts else cache_bytes(slm, 1, 1, value_bytes) * use.budget, "scores": scores}


def weights(use: Use, value_bytes: int) -> dict[str, int]:
    """Bytes of the SLM's weights: held, all that is loaded; read in a step, the layers' products; no logits."""
    if use.drafts:
        return {"held": 0, "read": 0}
    return {
        "held": parameters(use.slm) * value_bytes,
        "read": value_bytes * layer_parameters(use.slm),
    }


def step_flops(use: Use, length: int) -> float:
    """One token through the SLM on `length` cached ones, no logits; 0 where the drafts have paid."""
    slm = use.slm
    attention = 4 * slm.layers * slm.query_heads * slm.head_dim * length * use.budget
    return 0 if use.drafts else 2 * layer_parameters(slm) + attention


def break_even(llm: Config, use: Use, budget: float, value_bytes: int) -> dict[str, int | None]:
    """Tokens (length x batch) from which the LLM's cache saves more than the SLM adds, held and read; None: never."""
    added = sum(token_bytes(use, value_bytes).values())
    saved = (1 - budget) * cache_bytes(llm, 1, 1, value_bytes) - added
    fixed = weights(use, value_bytes)
    return {kind: max(1, math.ceil(size / saved)) if saved > 0 else None for kind, size in fixed.items()}


def costs(llm: Config, use: Use, budget: float, lengths: list[int], value_bytes: int = 2) -> dict:
    """The figures of one line, as JSON types.

    cache_share: the SLM's K and V of the LLM's full K and V; saved_share: of what the LLM's saves. read_share and
    flop_share: of the LLM's own step with a full cache, one sequence, at each length.
    """
    added, fixed = sum(token_bytes(use, value_bytes).values()), weights(use, value_bytes)
    whole = {n: sum(step_bytes(llm, use.slm, 1, n, value_bytes, None, False).values()) for n in lengths}
    tokens = break_even(llm, use, budget, value_bytes)
    return {
        "use": use.name,
        "cache_share": slm_share(llm, use.slm, use.budget),
        "saved_share": share_of_saving(llm, use.slm, budget) * use.budget,
        "weights": fixed,
        "token_bytes": added,
        "read_share": {n: (fixed["read"] + added * n) / whole[n] for n in lengths},
        "flop_share": {n: step_flops(use, n) / decode_flops(llm, n) for n in lengths},
        "break_even_tokens": tokens,
        "break_even_batch": {
            kind: {n: count and math.ceil(count / n) for n in lengths} for kind, count in tokens.items()
        },
    }


# ---- The command -----------------------------------------------------------------------------------------------------


def shape(name: str) -> Config:
    """A published shape by its name, or config.json of a folder or hub id: nothing else is downloaded."""
    if name in MODELS:
        return MODELS[name]
    try:
        return read_config(resolve(name, files=["config.json"]))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; published shapes here: {', '.join(MODELS)}") from None


def print_costs(args, ratios: dict, lines: list[dict]) -> None:
    lengths = args.length
    table = [["LLM to SLM", "here", "paper"]]
    printed = {(pair.llm, pair.slm): pair for pair in PAPER_PAIRS}.get((args.llm, args.slm))
    table.append(["KV cache (Eq. 7)", f"{ratios['cache']:.2f}", f"{printed.cache:.2f}" if printed else "-"])
    table.append(["FLOPs, layers alone", f"{ratios['layer_flops']:.1f}", "-"])
    table += [[f"FLOPs, prompt of {n:,} (Eq. 8)", f"{ratios['forward_flops'][n]:.1f}", "-"] for n in lengths]
    table += [[f"FLOPs, a token on {n:,}", f"{ratios['decode_flops'][n]:.1f}", "-"] for n in lengths]
    table.append(["latency (timed, by all signs)", "-", f"{printed.latency:.2f}" if printed else "-"])
    table.append(["matching (Eq. 9) / a pass of 200", f"{ratios['matching_share']:.2%}", "-"])
    print_rows(table, f"{args.slm} beside {args.llm}", args.markdown)

    def whole(count: int | None) -> str:
        return "never" if count is None else f"{count:,}"

    columns = [["the SLM", "its K, V / LLM's full", f"... / saved at {args.budget:g}", "weights held, GB",
                "bytes a token", *(f"step's bytes / LLM's full, {n:,}" for n in lengths),
                *(f"step's FLOPs / LLM's, {n:,}" for n in lengths),
                *(f"break-even length, {kind}" for kind in ("held", "read")),
                *(f"batch at {n:,}, {kind}" for kind in ("held", "read") for n in lengths)]]  # fmt: skip
    for line in lines:
        drafts = line["weights"]["held"] == 0
        shares = [f"{line[kind]:.2%}" + " (drafter's)" * drafts for kind in ("cache_share", "saved_share")]
        cells = [line["use"], *shares, f"{line['weights']['held'] / 1e9:.2f}", f"{line['token_bytes']:,.0f}"]
        cells += [f"{line[kind][n]:.1%}" for kind in ("read_share", "flop_share") for n in lengths]
        cells += [whole(line["break_even_tokens"][kind]) for kind in ("held", "read")]
        cells += [whole(line["break_even_batch"][kind][n]) for kind in ("held", "read") for n in lengths]
        columns.append(cells)
    title = f"what the SLM adds, and from where SmallKV at {args.budget:g} saves more (length for a batch of 1)"
    print_rows([list(row) for row in zip(*columns)], title, args.markdown)


def run(args) -> int:
    llm, slm = shape(args.llm), shape(args.slm)
    if args.value_bytes < 1:
        raise ValueError(f"--value-bytes {args.value_bytes} is too small; 2 is bf16")
    layers = max(1, round(slm.layers * 20 / 24)) if args.slm_layers is None else args.slm_layers
    ratios = compare(llm, slm, args.budget, args.length)
    lines = [costs(llm, use, args.budget, args.length, args.value_bytes) for use in uses(slm, args.slm_budget, layers)]
    if args.json:
        print(json.dumps({"llm": args.llm, "slm": args.slm, "budget": args.budget, "ratios": ratios, "lines": lines}))
    else:
        print_costs(args, ratios, lines)
    return 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("bench.py overhead", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--llm", required=True, help=f"folder, hub id or one of {', '.join(MODELS)}")
    parser.add_argument("--slm", required=True, help="the same")
    parser.add_argument("--budget", type=float, default=0.2, help="of the LLM's cache (default: 0.2)")
    parser.add_argument("--slm-budget", type=float, default=0.4, help="of the SLM's own cache (default: 0.4)")
    parser.add_argument("--slm-layers", type=int, metavar="N", help="of the SLM (default: 20 of 24, in proportion)")
    parser.add_argument("--length", type=int, nargs="+", default=[2304, 16896], help="(default: Table 2's)")
    parser.add_argument("--value-bytes", type=int, default=2, help="of a weight, and of a value of K or V (default: 2)")
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead")
    try:
        return run(parser.parse_args(argv))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
