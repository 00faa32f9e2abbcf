"""How fast, against the floor: TTFT, TPOT, tokens per second, memory and movement, at the real shapes, random weights.

    python bench.py --pair qwen2-7b --settings 64x2048+256,4x16384+512 --decode-only --table
    python bench.py overhead --llm Qwen2-7B --slm Qwen2-0.5B          # calculated, not measured: bench_overhead.py

Where it sits: on top of graph.py and decode.py, beside generate.py. Methods run one after another in one process on the
same weights. Beside every time stands its floor: for TPOT the bytes that a step must read over the measured copy
bandwidth, for TTFT the operations of the prefill over the measured matrix rate. Under torchrun the LLM is split over
the processes (parallel.py), and all of it is one rank's.

With random weights the plan is noise. `--turnover 0.1` drives it: a prior that outweighs every score ranks the tokens
on a ring that is turned each step, so that a tenth of the critical set leaves and another comes from the host. What
moved is counted, and printed as counted. `--decode-only` fills the caches with random K and V instead of prefilling
(methods that evict are prefilled all the same: what they keep comes from there), and takes random heads of the SLM as
matched ones; a prefill that is timed matches them itself.

`--slm-layers` and `--slm-budget` make the SLM cost less (appendix A.3), `--slm-kv int8` its cache; its floor and its
bytes are then those of what is left of it. `--llm-kv int8` halves the LLM's tiers; the method full-int8-graph is what a
full cache in 8 bits does.

`--refresh r` plans in every r-th step: the turnover is that of a plan, the bytes over PCIe are those of a mean step,
and a time is the mean over the r steps from plan to plan (the median of such means). What a plan finds changed after r
steps is for evaluate.py to say: more than after one, and less than r times that.

`--speculate K` times rounds of K drafts instead of steps: bench_speculative.py.
"""

import argparse
import gc
import json
import sys
import time

import torch

import bench_overhead
import bench_speculative
import parallel
from backend import NAMES, TORCH, pick_backend, pick_device
from bench_clock import Clock, ceilings, profile, random_decoder
from bench_count import PAIRS, Setting, pair_configs, table
from bench_sessions import (
    RIVALS,
    DrivenStep,
    fill,
    largest,
    make_session,
    moved_rows,
    ring_shift,
    row,
    tiers,
    weights_of,
)
from bench_transformers import time_transformers
from decode import Session
from graph import Step
from model import Decoder
from settings import HELD, SCORES, Settings

METHODS = ("transformers", "full-eager", "full-graph", "full-int8-graph", "smallkv-eager", "smallkv-graph",
           *(f"{name}-eager" for name in RIVALS), "h2o-published")  # fmt: skip
STEPS = {"eager": 5, "graph": 30}  # timed steps


# ---- Measuring -------------------------------------------------------------------------------------------------------


def measure(method: str, models, setting: Setting, settings: Settings, args, clock: Clock) -> list[dict]:
    """One method in one setting: a row for each turnover (one for the full cache)."""
    cuda = clock.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    prefilled = not args.decode_only or setting.name in args.prefill or method.partition("-")[0] in RIVALS
    if method == "transformers":
        return [transformers_row(models, setting, clock, prefilled)]
    backend = pick_backend(args.backend, clock.device)
    path = backend if method.endswith("graph") else TORCH
    if prefilled:  # kernels are compiled and chosen at their first call
        one = Setting(1, setting.prompt, 2)
        clock.once(make_session(method, models, one, settings, args.chunk, path).prefill)
        if args.profile:
            again = make_session(method, models, one, settings, args.chunk, path)
            profile(again.prefill, f"{args.profile}.{method}.{setting.name}.prefill.txt", 1)
            del again
    session = make_session(method, models, setting, settings, args.chunk, path, filled=not prefilled)
    logits: list[torch.Tensor] = []
    ttft = clock.once(lambda: logits.append(session.prefill())) if prefilled else None
    tokens = logits[0].argmax(-1) if prefilled else fill(session)
    peak_prefill = torch.cuda.max_memory_allocated() if cuda else 0
    step = None
    if method.endswith("graph"):
        step = DrivenStep(session, tokens, backend)
        if step.slm is not None:
            step.driven = session.policy.driven
        work = step.run
    else:
        state = {"tokens": tokens.tolist()}

        def work():
            state["tokens"] = session.step(state["tokens"]).argmax(-1).tolist()

    first_fill = clock.once(work)  # the pools are filled: bytes of the first plan over PCIe, and compilation
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    cycle = settings.refresh if method.startswith("smallkv") else 1  # steps from plan to plan
    for _ in range(cycle):
        work()
    if step is not None and cuda:
        step.capture()

    def lap():
        for _ in range(cycle):
            work()

    laps_wanted = max(1, min(STEPS["graph" if method.endswith("graph") else "eager"], args.steps) // cycle)
    count = laps_wanted * cycle
    rows = []
    for turnover in args.turnover if method.startswith("smallkv") else [None]:
        if turnover is not None:
            session.policy.driven.shift.fill_(ring_shift(turnover, session))
        clock.laps(lap, 2)
        before = moved_rows(method, session, step) if turnover is not None else (0, 0)
        length = session.lengths[0] + count // 2
        laps = [seconds / cycle for seconds in clock.laps(lap, laps_wanted)]
        moved = [0, 0]
        if turnover is not None:
            after = moved_rows(method, session, step)
            moved = [(end - start) / count for start, end in zip(before, after)]
        if args.profile and step is not None:
            profile(lap, f"{args.profile}.{method}.{setting.name}.txt")
        rows.append(row(method, models, setting, settings, length, laps, ttft, turnover, moved))
        held = session_bytes(session, step)
        rows[-1].update(
            first_step_s=first_fill, predicted_bytes=held, tiers=tiers(session),
            peak_bytes=torch.cuda.max_memory_allocated() - idle_bytes(method, models) if cuda else None,
            peak_prefill_bytes=peak_prefill - idle_bytes(method, models) if cuda and prefilled else None,
        )  # fmt: skip
    return rows


def idle_bytes(method: str, models) -> int:
    """The SLM's weights stay where they are while the full cache is measured: not its own."""
    return 0 if method.startswith("smallkv") else weights_of(models[1])


def session_bytes(session: Session, step: Step | None) -> int:
    """What the device should hold in a step: weights, ledgers, the step's own tables and its logits."""
    device = session.llm.device.type
    total = sum(entry["size"] for entry in tiers(session) if entry["device"] == device)
    total += sum(weights_of(model) for model in session.policy.models)
    if step is not None and step.slm is not None:
        held = {tensor.data_ptr(): tensor.nbytes for side in (step.side, step.scored) for tensor in side.tensors()}
        total += sum(held.values())  # a table that both sides name counts once
    batch, llm = len(session.prompts), session.llm.config
    total += 2 * batch * llm.vocab_size * session.llm.dtype.itemsize  # logits, of the step run eagerly and captured
    return total


def transformers_row(models: list[Decoder], setting: Setting, clock: Clock, prefilled: bool) -> dict:
    ttft, laps, length = time_transformers(models[0], setting, clock, prefilled)
    out = row("transformers", (models[0],) * 2, setting, Settings(), length, laps, ttft, None, [0, 0])
    peak = torch.cuda.max_memory_allocated() - weights_of(models[1]) if clock.device.type == "cuda" else None
    nothing = dict.fromkeys(("predicted_bytes", "first_step_s", "peak_prefill_bytes"))
    return out | {"peak_bytes": peak, "tiers": [], **nothing}


def run(args) -> int:
    team = parallel.start(args.device)
    if team.size > 1 and (args.quantize or args.slm_quantize):
        raise ValueError("--quantize int4 is for one process; leave it out under torchrun")
    if team.size > 1 and (args.largest or args.speculate or "transformers" in args.methods):
        raise ValueError("--largest, --speculate and the method transformers are for one process; leave them out under "
                         "torchrun")  # fmt: skip
    device = team.device or pick_device(args.device)
    clock, dtype = Clock(device), torch.bfloat16 if device.type == "cuda" else torch.float32
    backend = pick_backend(args.backend, device)
    scores = args.scores or ("slm" if args.speculate else Settings.scores)
    settings = Settings(args.budget, score_decay=args.score_decay, scores=scores, marginal=args.marginal,
                        refresh=args.refresh, max_moves=args.max_moves, slm_budget=args.slm_budget,
                        reach=args.reach, llm_kv=args.llm_kv, slm_kv=args.slm_kv)  # fmt: skip
    raws, configs = pair_configs(args.pair, args.slm_layers)
    rounded = args.quantize, args.slm_quantize
    models = [random_decoder(config, device, dtype, kind == "int4", each)
              for config, kind, each in zip(configs, rounded, (team, parallel.Team()))]  # fmt: skip
    models[0].raw = raws[0]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    report = {"device": name, "torch": torch.__version__, "backend": backend.name, "pair": args.pair,
              "quantize": rounded, "weights": [weights_of(model) for model in models],
              "dtype": str(dtype), "budget": args.budget, "marginal": args.marginal, "score_decay": args.score_decay,
              "scores": scores, "max_moves": args.max_moves, "refresh": args.refresh,
              "reach": str(args.reach), "llm_kv": args.llm_kv, "slm_kv": args.slm_kv,  # JSON has no inf
              "slm_layers": configs[1].layers, "slm_budget": args.slm_budget, "decode_only": args.decode_only,
              "ranks": team.size, "speculate": args.speculate, "ceilings": ceilings(clock), "rows": []}  # fmt: skip
    slm = f"SLM of {configs[1].layers} layers with {args.slm_budget:.0%} of its cache"
    slm += " in 8 bits" * settings.slm_int8
    print(f"backend: {backend.name}, {team.size} x {name}, {dtype}, {slm}, ceilings {report['ceilings']}", flush=True)
    work = [(setting, method) for setting in args.settings for method in args.methods]
    for setting in args.largest:
        work += [(largest(method, models, setting.prompt, setting.new, settings), method) for method in args.methods]
    measured = bench_speculative.measure if args.speculate else measure
    for setting, method in work:
        begin = time.perf_counter()
        try:
            found = measured(method, models, setting, settings, args, clock)
        except torch.OutOfMemoryError as error:
            found = [{"method": method, "setting": setting.name, "error": str(error).splitlines()[0][:120]}]
        report["rows"] += found
        for line in found:
            tpot = f"{1e3 * line['tpot_s']:.2f} ms" if "tpot_s" in line else line["error"]
            spent = time.perf_counter() - begin
            print(f"{setting.name} {method} {line.get('turnover')}: {tpot} ({spent:.1f} s spent)", flush=True)
    if args.table:
        print(table(report))
    print(json.dumps(report))
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["overhead"]:
        return bench_overhead.main(argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--pair", choices=PAIRS, default="qwen2-7b")
    parser.add_argument("--settings", type=Setting.many, default=Setting.many("64x2048+256,4x16384+512,32x16384+256"),
                        help="BATCHxPROMPT+NEW, separated by commas")  # fmt: skip
    parser.add_argument("--largest", type=Setting.many, default=[], metavar="1xPROMPT+NEW",
                        help="the largest batch that fits, for each method")  # fmt: skip
    parser.add_argument("--methods", type=lambda names: names.split(","), default=["full-graph", "smallkv-graph"],
                        help=f"of {', '.join(METHODS)}, separated by commas")  # fmt: skip
    parser.add_argument("--backend", choices=NAMES, default="auto", help="of the graph methods")
    parser.add_argument("--quantize", choices=("int4",), help="INT4 weights of the LLM, made in the packed layout")
    parser.add_argument("--slm-quantize", choices=("int4",), help="the same of the SLM")
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--score-decay", type=float, default=Settings.score_decay)
    parser.add_argument("--scores", choices=SCORES, help=f"default: {Settings.scores}, slm with --speculate")
    parser.add_argument("--marginal", action="store_true")
    parser.add_argument("--max-moves", type=int, help="tokens that may enter a head's critical set at a plan")
    parser.add_argument("--reach", type=float, default=Settings.reach, help="of the LLM's layers into the SLM's; inf: "
                        "into all, so that the SLM runs before the LLM and not beside it")  # fmt: skip
    parser.add_argument("--llm-kv", choices=HELD, default=Settings.llm_kv,
                        help="how SmallKV's tiers hold K and V: exact, or in one byte a number")  # fmt: skip
    parser.add_argument("--slm-kv", choices=HELD, default=Settings.slm_kv, help="the same of the SLM's own")
    parser.add_argument("--refresh", type=int, default=1, help="plan in every so many steps")
    parser.add_argument("--slm-layers", type=int, metavar="N", help="the SLM's first N layers alone (A.3)")
    parser.add_argument("--slm-budget", type=float, default=1.0, metavar="SHARE",
                        help="of the SLM's own cache that stays, by H2O's rule (A.3)")  # fmt: skip
    parser.add_argument(
        "--speculate", type=int, default=0, metavar="K", help="rounds of K drafts, of the graph methods"
    )
    parser.add_argument("--acceptance", type=float, default=0.7, help="with it: the chance that a draft is accepted")
    parser.add_argument("--turnover", type=lambda shares: [float(share) for share in shares.split(",")],
                        default=[0.1], help="share of the critical set that a plan changes; or several")  # fmt: skip
    parser.add_argument("--decode-only", action="store_true", help="random caches instead of a prefill")
    parser.add_argument("--prefill", type=lambda names: names.split(","), default=[],
                        help="with --decode-only: settings that are prefilled all the same")  # fmt: skip
    parser.add_argument("--chunk", type=int, default=2048, help="prompt tokens that go through a model at once")
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", metavar="PREFIX", help="write PREFIX.METHOD.SETTING.txt")
    parser.add_argument("--table", action="store_true", help="print the table in markdown")
    args = parser.parse_args(argv)
    unknown = [method for method in args.methods if method not in METHODS]
    if unknown:
        parser.error(f"unknown method {unknown[0]!r}; supported: {', '.join(METHODS)}")
    if args.speculate < 0 or not 0 <= args.acceptance <= 1:
        parser.error(f"--speculate {args.speculate} --acceptance {args.acceptance}: drafts are counted, chances 0 to 1")
    if args.speculate and (args.refresh > 1 or args.largest or set(args.methods) - {"full-graph", "smallkv-graph"}):
        parser.error("--speculate is for --methods full-graph,smallkv-graph alone, without --refresh and --largest")
    if args.quantize and "transformers" in args.methods:
        parser.error("--quantize int4 has no Transformers to be set beside; leave transformers out of --methods")
    try:
        return run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(parallel.run(main))
