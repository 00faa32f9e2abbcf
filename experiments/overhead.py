"""What an SLM costs beside an LLM, counted from two config.json: appendix A of the paper (Eq. 7-9, Tables 3 and 4).

    python -m experiments.overhead --llm Qwen2-7B --slm Qwen2-0.5B
    python -m experiments.overhead --llm DIR_OR_ID --slm DIR_OR_ID --budget 0.2 --slm-budget 0.4 --slm-layers 20

Where it sits: beside the flow, on floors.py: it reads shapes, of the published models there or of folders and hub ids.
The paper's formulas are missing in the text that this was written from; they stand here as its words and its figures
give them: Eq. 7 (floors.cache_bytes) yields its 5.71 and 21.9 %, the layers' part of Eq. 8 its 14.9; the rest of Eq. 8,
and Eq. 9, are our reading. The latencies of Table 4 are no ratio of shapes: by all signs they were timed, so they are
shown and not reproduced.

A.3 makes the SLM cost less: as the drafter of speculative decoding, where its steps, weights and cache are the drafts'
and SmallKV adds scores alone; with a share of its own cache; stopped early; with both.
"""

import json
import math
import sys
from collections import namedtuple
from dataclasses import replace

import torch

import command
from checkpoint import CheckpointError, read_config, resolve, weight_bytes
from floors import FP32, SHAPES, cache_bytes, cache_ratio, early, product_bytes, step_bytes
from model import Config

BF16 = 2  # bytes of a weight, and of a number of K or V
MODELS = {name: Config.from_hf(raw) for name, raw in SHAPES.items()}
PaperPair = namedtuple("PaperPair", "slm llm latency cache")  # a column of Table 4, ratios of the LLM to the SLM
PAPER_PAIRS = (
    PaperPair("Qwen2-0.5B", "Qwen2-7B", 3.57, 4.67), PaperPair("Qwen2.5-0.5B", "Qwen2.5-14B", 6.52, 16.0),
    PaperPair("Qwen2-7B", "Qwen2-72B", 4.47, 5.71), PaperPair("LLaMA-3.2-1B", "LLaMA-3.1-8B", 3.19, 4.0),
)  # fmt: skip


def shape(name: str) -> Config:
    """A published shape by its name, or config.json of a folder or hub id: nothing else is downloaded."""
    if name in MODELS:
        return MODELS[name]
    try:
        return read_config(resolve(name, files=["config.json"]))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; published shapes here: {', '.join(MODELS)}") from None


# ---- Eq. 8 and 9, and a pair -----------------------------------------------------------------------------------------


def parameters(config: Config) -> int:
    """Of the whole model. Layers are alike, so models of one and of two say it: 80 take seconds to put together."""
    one, two = (weight_bytes(replace(config, layers=n), torch.int8) for n in (1, 2))
    return one + (config.layers - 1) * (two - one)


def decode_flops(config: Config, length: int) -> int:
    """One token on `length` cached ones as the checkpoint really is: two a weight (less a lookup), QK^T and AV."""
    lookup = 0 if config.tied else config.vocab_size * config.hidden_size
    return 2 * (parameters(config) - lookup) + 4 * config.layers * config.query_heads * config.head_dim * length


def layer_flops(config: Config, length: int) -> int:
    """Eq. 8 without its n^2 and vocabulary terms: 24 n h^2 a layer, an MLP 4h wide and no shared KV heads."""
    return config.layers * 24 * length * config.hidden_size**2


def forward_flops(config: Config, length: int) -> int:
    """Eq. 8: L (24 n h^2 + 4 n^2 h) + 2 n h V."""
    more = config.layers * 4 * length**2 * config.hidden_size + 2 * length * config.hidden_size * config.vocab_size
    return layer_flops(config, length) + more


def matching_flops(llm: Config, slm: Config, window: int) -> int:
    """Eq. 9: a product of two membership vectors of `window` tokens for each pair of heads (match.py)."""
    return 2 * window * (llm.layers * llm.query_heads) * (slm.layers * slm.query_heads)


def slm_share(llm: Config, slm: Config, slm_budget: float = 1.0) -> float:
    """K and V of the SLM, cut to a budget, as a share of the LLM's full cache. A.3's best, 20 layers at 0.4: 7.14 %."""
    return slm_budget / cache_ratio(llm, slm)


def added_bytes(llm: Config, slm: Config, slm_budget: float = 1.0, drafting: bool = False) -> dict[str, tuple]:
    """What SmallKV adds in the default setting, (bytes, bytes a token and sequence): `held` on the device, and `moved`
    by a decode step there, where what is written and read counts twice (`step_bytes`)."""
    scores = BF16 * slm.layers * slm.query_heads + FP32 * llm.layers * llm.kv_heads  # newest rows; the LLM's memory
    if drafting:
        return {"held": (0, scores), "moved": (0, 2 * scores)}
    slots = FP32 * slm.layers * slm.kv_heads * slm_budget * (slm_budget < 1)  # of attention gathered, and of positions
    pairs = cache_bytes(slm, 1, 1, BF16) * slm_budget
    return {"held": (BF16 * parameters(slm), pairs + scores + 2 * slots),
            "moved": (product_bytes(slm, BF16, observed=True), pairs + 2 * scores + 3 * slots)}  # fmt: skip


def compare(
    llm: Config, slm: Config, budget: float, lengths: list[int], slm_budget: float = 1.0, drafting: bool = False
) -> dict:  # fmt: skip
    """Every figure of a pair, as JSON types; cache and FLOPs are the LLM's over the SLM's.

    share_of_saving: the SLM's K and V of what the LLM's cache saves. moved_share: bytes that SmallKV adds to a step, of
    the LLM's own with a full cache, one sequence, by length. break_even: tokens (length x batch) from which the bytes
    that the LLM's cache saves are more than those added, held and moved; None: never. ValueError: a budget that saves
    nothing.
    """
    if not 0 < budget < 1:
        raise ValueError(f"--budget {budget} is outside (0, 1): at 1 nothing is saved; the paper's is 0.2")
    added, even, share = added_bytes(llm, slm, slm_budget, drafting), {}, slm_share(llm, slm, slm_budget)
    for kind, (fixed, each) in added.items():
        saved = (1 - budget) * cache_bytes(llm, 1, 1, BF16) - each
        even[kind] = max(1, math.ceil(fixed / saved)) if saved > 0 else None
    fixed, each = added["moved"]
    return {
        "cache": cache_ratio(llm, slm), "slm_share": share, "share_of_saving": share / (1 - budget),
        "layer_flops": layer_flops(llm, 1) / layer_flops(slm, 1),
        "forward_flops": {n: forward_flops(llm, n) / forward_flops(slm, n) for n in lengths},
        "decode_flops": {n: decode_flops(llm, n) / decode_flops(slm, n) for n in lengths},
        "matching_share": matching_flops(llm, slm, 200) / forward_flops(llm, 200), "added": added, "break_even": even,
        "moved_share": {n: (fixed + each * n) / sum(step_bytes(llm, None, 1, n, BF16).values()) for n in lengths},
    }  # fmt: skip


# ---- The command -----------------------------------------------------------------------------------------------------


def run(argv: list[str] | None) -> int:
    """Three tables: the shapes (Table 3), what follows from them (Table 4), and what the SLM adds; the last line is
    JSON."""
    parser = command.Parser("experiments.overhead", description=__doc__.splitlines()[0])
    add, some, count = parser.add_argument, command.number(0, 1, above=True), command.whole(1)
    add("--llm", default="Qwen2-7B", help=f"folder, hub id or one of {', '.join(MODELS)}")
    add("--slm", default="Qwen2-0.5B", help="the same")
    add("--budget", type=some, default=0.2, help="of the LLM's cache (default: 0.2)")
    add("--slm-budget", type=some, default=0.4, help="of the SLM's own cache (default: 0.4)")
    add("--slm-layers", type=count, metavar="N", help="of the SLM (default: 20 of 24, in proportion)")
    add("--length", type=count, nargs="+", default=[2304, 16896], help="(default: Table 2's)")
    args = parser.parse_args(argv)
    llm, slm, budget, lengths = shape(args.llm), shape(args.slm), args.budget, args.length
    layers = max(1, round(slm.layers * 20 / 24)) if args.slm_layers is None else args.slm_layers
    less, fewer = f"{args.slm_budget:g} of its cache", f"{layers} of {slm.layers} layers"
    uses = {name: compare(llm, early(slm, count), budget, lengths, *more) for name, count, *more in (
        ("as it is", None), ("speculative decoding", None, 1.0, True), (less, None, args.slm_budget), (fewer, layers),
        (f"{less}, {fewer}", layers, args.slm_budget))}  # fmt: skip
    fields = "layers", "query_heads", "kv_heads", "head_dim", "hidden_size", "intermediate_size", "vocab_size"
    shapes = [["", args.llm, args.slm], *([field, *(str(getattr(c, field)) for c in (llm, slm))] for field in fields)]
    printed = {(pair.llm, pair.slm): pair for pair in PAPER_PAIRS}
    pairs = {names: compare(*map(shape, names), budget, lengths) for names in {(args.llm, args.slm): 0, **printed}}
    ratios = [["LLM / SLM", "KV cache (Eq. 7)", "the paper's", "latency, the paper's", "FLOPs, layers alone",
               *(f"FLOPs, prompt of {n:,} (Eq. 8)" for n in lengths), *(f"FLOPs, a token on {n:,}" for n in lengths),
               f"SLM's K, V / saved at {budget:g}", "matching (Eq. 9) / a pass of 200"]]  # fmt: skip
    for names, found in pairs.items():
        known = [f"{printed[names].cache:.2f}", f"{printed[names].latency:.2f}"] if names in printed else ["-", "-"]
        flops = [f"{found[kind][n]:.1f}" for kind in ("forward_flops", "decode_flops") for n in lengths]
        ratios.append([" / ".join(names), f"{found['cache']:.2f}", *known, f"{found['layer_flops']:.1f}", *flops,
                       f"{found['share_of_saving']:.1%}", f"{found['matching_share']:.2%}"])  # fmt: skip
    kinds = "held", "moved"
    costs = [[f"{args.slm} beside {args.llm}", "its K, V / LLM's full", f"its K, V / saved at {budget:g}", "held, GB",
              "held, bytes a token", *(f"a step's bytes / LLM's, {n:,}" for n in lengths),
              *(f"break-even length, {kind}" for kind in kinds),
              *(f"break-even batch at {n:,}, {kind}" for kind in kinds for n in lengths)]]  # fmt: skip
    for name, found in uses.items():
        (fixed, each), even = found["added"]["held"], [found["break_even"][kind] for kind in kinds]
        even += [count and math.ceil(count / n) for count in even for n in lengths]
        costs.append([name, f"{found['slm_share']:.2%}", f"{found['share_of_saving']:.2%}", f"{fixed / 1e9:.2f}",
                      f"{each:,.0f}", *(f"{share:.1%}" for share in found["moved_share"].values()),
                      *("never" if count is None else f"{count:,}" for count in even)])  # fmt: skip
    for head, *rows in (shapes, list(zip(*ratios)), list(zip(*costs))):
        print(command.markdown_table(head, rows), end="\n\n")
    pairs = {" / ".join(names): found for names, found in pairs.items()}
    print(json.dumps({**vars(args), "pairs": pairs, "uses": uses}))
    return 0


def main(argv: list[str] | None = None) -> int:
    return command.ended(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
