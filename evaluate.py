"""What a method costs in quality: one harness for every task, method and budget.

    python evaluate.py recall --method full smallkv window --budget 0.2 0.1 --out runs/recall
    python evaluate.py wikitext --llm DIR --slm DIR --data DIR --method smallkv smallkv-paper smallkv:marginal=no \
        smallkv-paper:marginal=no,saliency_shift=no --budget 0.2 0.1 --out runs/wikitext
    python evaluate.py table runs/recall runs/wikitext --markdown

Where it sits: above everything, like generate.py. tasks.py and benchmarks.py make the samples and score the answers,
tables.py reads what is written here: DIR/results.jsonl, one line a sample, method and budget, and DIR/run.json. A run
that was killed goes on where it was; the same arguments give the same lines.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

from baselines import BASELINES
from benchmarks import TASKS
from checkpoint import DTYPES, CheckpointError
from decode import Policy
from generate import PAIR, Pair, load_pair
from hub import fetch
from model import Config
from overhead import cache_bytes
from report import run_line
from smallkv import Settings, SmallKV
from tables import CELLS, print_tables, read_about
from tasks import Sample, Task, read_results

HOME = Path(__file__).parent
FREE = (*CELLS, "limit")  # a run may go on with other values of these


@dataclass(frozen=True)
class Method:
    """How a policy is made. needs_slm: it keeps a second model's cache. budgets: it compresses at all."""

    make: Callable  # (pair, budget, **options) -> policy
    needs_slm: bool = False
    budgets: bool = True


# A method is one line. What follows a colon in --method (name:option=value,option=value) are its options.
METHODS = {
    "full": Method(lambda pair, budget, **options: Policy(pair.llm, **options), budgets=False),
    **{
        name: Method(lambda pair, budget, kind=kind, **options: kind(pair.llm, budget, **options))
        for name, kind in BASELINES.items()
    },
    "smallkv": Method(lambda pair, budget, **o: SmallKV(pair.llm, pair.slm, Settings(budget=budget, **o)), True),
    "smallkv-paper": Method(
        lambda pair, budget, **o: SmallKV(pair.llm, pair.slm, Settings.paper(budget=budget, **o)), True
    ),
}


@dataclass(frozen=True)
class Cell:
    """A method at a budget. budget: as asked for. own: the share of tokens that is left of it for the LLM's cache."""

    method: str
    budget: float
    own: float

    def policy(self, pair: Pair):
        method, options = parse_method(self.method)
        try:
            return method.make(pair, self.own, **options)
        except TypeError as error:
            raise ValueError(f"method {self.method!r}: {error}") from None


# ---- methods and budgets ---------------------------------------------------------------------------------------------


def parse_method(text: str) -> tuple[Method, dict]:
    """'smallkv:score_decay=0.5,marginal=no' -> the method and its options."""
    name, _, rest = text.partition(":")
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; supported: {', '.join(METHODS)}")
    options = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"method {text!r}: {part!r} should look like option=value")
        options[key] = _value(value)
    return METHODS[name], options


def _value(text: str) -> bool | int | float | str:
    if text in ("yes", "no"):
        return text == "yes"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def token_bytes(config: Config, dtype: torch.dtype) -> int:
    """Bytes of K and V of one token in all layers."""
    return cache_bytes(config, 1, 1, dtype.itemsize)


def make_cells(methods: list[str], budgets: list[float], equal: str, pair: Pair) -> list[Cell]:
    """Every method at every budget.

    equal "bytes": LLM's cache and SLM's own K and V together take the budget's share of the full LLM cache, so that
    much is taken off the budget of a method with an SLM. The scores (fp32) are not counted for any method.
    """
    full = token_bytes(pair.llm.config, pair.llm.dtype)
    cells = []
    for text in methods:
        method, options = parse_method(text)
        for budget in budgets if method.budgets else [1.0]:
            own = budget
            if equal == "bytes" and method.needs_slm:
                slm = token_bytes(pair.slm.config, pair.slm.dtype)
                share = options.get("slm_budget", 1.0) * slm / full  # of its own cache that the SLM keeps
                own = budget - share
                if own <= 0:
                    raise ValueError(
                        f"--equal bytes: the SLM's own cache is {share:.1%} of the LLM's full cache, so a budget of "
                        f"{budget:g} leaves {text} nothing; ask for more than {share:.4g}, or --equal budget"
                    )
            cell = Cell(text, budget, own)
            cell.policy(pair)  # for its errors, before anything is run
            cells.append(cell)
    return list(dict.fromkeys(cells))


# ---- running ---------------------------------------------------------------------------------------------------------


def make_batches(samples: list[Sample], size: int, window: int) -> list[list[Sample]]:
    """At most `size` samples each, in order; cut where the longest prompt and the longest answer would not fit."""
    batches: list[list[Sample]] = []
    for sample in samples:
        wider = [*batches[-1], sample] if batches else []
        room = max((len(s.prompt) for s in wider), default=0) + max((s.new_tokens for s in wider), default=0)
        if wider and len(wider) <= size and room <= window:
            batches[-1] = wider
        else:
            batches.append([sample])
    return batches


def positions(pair: Pair) -> int:
    """The window: what all models in use can address."""
    return min(model.config.max_positions for model in (pair.llm, pair.slm) if model is not None)


def too_long(sample: Sample, window: int) -> str | None:
    total = len(sample.prompt) + sample.new_tokens
    if total <= window:
        return None
    return f"{len(sample.prompt)} tokens and up to {sample.new_tokens} new ones are more than the {window} positions"


class Results:
    """results.jsonl: what is there already, and more at its end, a batch at a time."""

    def __init__(self, path: Path):
        self.path = path
        rows = read_results(path)
        self.done = {(row["method"], row["budget"], row["sample"]) for row in rows}
        if path.is_file():  # cut off what a killed run left of its last line
            whole = path.read_bytes().rfind(b"\n") + 1
            os.truncate(path, whole)

    def missing(self, cell: Cell, samples: list[Sample]) -> list[Sample]:
        return [sample for sample in samples if (cell.method, cell.budget, sample.id) not in self.done]

    def add(self, cell: Cell, sample: Sample, figures: dict) -> None:
        head = {"method": cell.method, "budget": cell.budget, "llm_budget": cell.own}
        line = {**head, "sample": sample.id, "group": sample.group, **figures}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.done.add((cell.method, cell.budget, sample.id))


def evaluate(
    pair: Pair, task: Task, samples: list[Sample], cells: list[Cell], batch: int, results: Results
) -> dict:  # fmt: skip
    """Run what is missing, batch by batch with all cells; returns the seconds of every cell."""
    window = positions(pair)
    unfit = [sample for sample in samples if too_long(sample, window)]
    for sample in unfit:
        for cell in cells:
            if results.missing(cell, [sample]):
                results.add(cell, sample, {"error": too_long(sample, window)})
    if unfit:
        print(f"{len(unfit)} of {len(samples)} samples are longer than the window and left out; the first, "
              f"{unfit[0].id}: {too_long(unfit[0], window)}", file=sys.stderr)  # fmt: skip
    batches = make_batches([sample for sample in samples if not too_long(sample, window)], batch, window)
    todo = sum(len(results.missing(cell, samples)) for cell in cells)
    seconds = {f"{cell.method} {cell.budget:g}": 0.0 for cell in cells}
    with tqdm(total=todo, desc=task.name, unit="sample", disable=None) as bar:
        for group in batches:
            for cell in cells:
                missing = {sample.id for sample in results.missing(cell, group)}
                if not missing:
                    continue
                begin = time.perf_counter()
                # The whole batch once more, where a killed run wrote a part: the same batch gives the same numbers.
                for sample, figures in zip(group, task.run(pair, cell.policy(pair), group), strict=True):
                    if sample.id in missing:
                        results.add(cell, sample, figures)
                seconds[f"{cell.method} {cell.budget:g}"] += time.perf_counter() - begin
                bar.update(len(missing))
    return seconds


# ---- run.json --------------------------------------------------------------------------------------------------------


def commit() -> str:
    """The commit this code stands at, with a + where files differ from it."""
    try:
        git = ["git", "-C", str(HOME)]
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
        return found + "+" * bool(changed.stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware(device: torch.device) -> dict:
    cpu = platform.processor() or platform.machine()
    names = Path("/proc/cpuinfo")
    if names.is_file():
        found = [line.partition(":")[2].strip() for line in names.read_text().splitlines() if "model name" in line]
        cpu = found[0] if found else cpu
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return {"device": device.type, "name": name, "cpu": cpu, "threads": torch.get_num_threads()}


def describe(args, pair: Pair) -> dict:
    """run.json: all that a figure needs beside it."""
    about = {
        "task": args.task,
        "arguments": {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items() if key != "task"},
        "commit": commit(),
        "dtype": str(pair.llm.dtype).removeprefix("torch."),
        "versions": {name: metadata.version(name) for name in ("torch", "tokenizers", "numpy")},
        "hardware": hardware(pair.llm.device),
        "token_bytes": {"LLM": token_bytes(pair.llm.config, pair.llm.dtype)},
        "invocations": [],
    }
    about["versions"]["python"] = platform.python_version()
    if pair.slm is not None:
        about["token_bytes"]["SLM"] = token_bytes(pair.slm.config, pair.slm.dtype)
    return about


def check_same(out: Path, task: Task, before: dict, now: dict) -> None:
    """ValueError if the folder holds a run of other arguments; a note if only the code is another."""
    if before["task"] != now["task"]:
        raise ValueError(f"{out} is a run of {before['task']}, not {now['task']}; give another --out")
    free = [name for name in FREE if not (name == "limit" and task.fixed_limit)]
    for name, value in now["arguments"].items():
        if name not in free and before["arguments"].get(name) != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{out} was run with {flag} {before['arguments'].get(name)}, not {value}; give another --out"
            )
    if now["commit"] not in before["commit"].split(", ") or now["commit"].endswith("+"):  # +: files differ from it
        print(f"note: {out} holds lines of commit {before['commit']}, this is {now['commit']}", file=sys.stderr)


def write_about(out: Path, about: dict) -> None:
    part = out / "run.json.part"
    part.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(out / "run.json")  # a run that is killed here keeps the old one


# ---- the command -----------------------------------------------------------------------------------------------------


def run_task(args) -> None:
    task, out = TASKS[args.task], args.out
    if args.limit is not None and args.limit < 1 or args.batch < 1:
        raise ValueError(f"--limit {args.limit} and --batch {args.batch} should both be at least 1")
    needs_slm = any([parse_method(text)[0].needs_slm for text in args.method])
    if needs_slm and not args.slm:
        raise ValueError("--slm is missing: one of the methods needs a small model of the same series")
    before = read_about(out) if (out / "run.json").is_file() else None
    if before is None and (out / "results.jsonl").is_file():
        raise ValueError(f"{out} has results but no run.json; give another --out")
    data = fetch(args.data, task.name)
    slm = args.slm if needs_slm else None
    pair = load_pair(args.llm, slm, args.device, args.dtype, args.slm_layers, args.quantize)
    about = describe(args, pair)
    if before:
        check_same(out, task, before, about)
        about["invocations"] = before["invocations"]
        about["commit"] = ", ".join(dict.fromkeys([*before["commit"].split(", "), about["commit"]]))
    cells = make_cells(args.method, args.budget, args.equal, pair)
    args.data = data
    samples = task.samples(args, pair.text, pair.llm.config.max_positions)
    if not samples:
        raise ValueError(f"{args.task}: no samples; look at --limit and --data")
    try:
        out.mkdir(parents=True, exist_ok=True)
        results = Results(out / "results.jsonl")
        this = {"command": sys.argv, "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "seconds": None}
        about["invocations"].append(this)
        write_about(out, about)
        for line in dict.fromkeys(run_line(pair.llm, cell.policy(pair)) for cell in cells):
            print(line, file=sys.stderr)
        this["seconds"] = evaluate(pair, task, samples, cells, args.batch, results)
        task.finish(args, samples, out)
        write_about(out, about)
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}; give another --out") from None
    print_tables([out], args.markdown)


def add_common(parser: argparse.ArgumentParser, task: Task) -> None:
    models = parser.add_argument_group("models")
    models.add_argument("--llm", default=str(PAIR / "llm"), help="folder or hub id, @revision too (default: pair/llm)")
    models.add_argument("--slm", default=str(PAIR / "slm"), help="the same (default: pair/slm)")
    models.add_argument("--slm-layers", type=int, metavar="N", help="run the SLM's first N layers alone (default: all)")
    models.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    dtypes = ("auto", *DTYPES)
    models.add_argument("--dtype", default="auto", choices=dtypes, help="auto: as stored, or float32 on CPU")
    models.add_argument("--quantize", choices=("int4", "int4-both"), help="round the LLM's weights to INT4 while "
                        "loading (int4), or both models' (int4-both)")  # fmt: skip
    what = parser.add_argument_group("methods")
    names = ", ".join(METHODS)
    what.add_argument("--method", nargs="+", default=["full", "smallkv"], help=f"of {names}; with options after a "
                      "colon, as in smallkv:score_decay=0.5,marginal=no (default: full smallkv)")  # fmt: skip
    what.add_argument("--budget", nargs="+", type=float, default=[0.2], help="shares of the full cache's bytes")
    what.add_argument("--equal", choices=("budget", "bytes"), default="budget",
                      help="bytes: the SLM's own cache is part of the budget")  # fmt: skip
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, default=Path("runs") / task.name, help=f"folder (default: runs/{task.name})")
    limit = "all" if task.default_limit is None else task.default_limit
    run.add_argument("--limit", type=int, default=task.default_limit, help=f"samples, of each sub-task where there are "
                     f"any (default: {limit})")  # fmt: skip
    run.add_argument("--batch", type=int, default=task.default_batch, help="samples that run together (default: "
                     f"{task.default_batch})")  # fmt: skip
    run.add_argument("--seed", type=int, default=0, help="another choice of samples (default: 0)")
    run.add_argument("--data", help="folder of the data sets; or hub, or a hub data set that is such a folder: see "
                     "hub.py (recall needs none)")  # fmt: skip
    run.add_argument("--markdown", action="store_true", help="print the table as Markdown")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for task in TASKS.values():
        own = commands.add_parser(task.name, help=task.help, description=task.help, allow_abbrev=False)
        add_common(own, task)
        task.add_arguments(own.add_argument_group(task.name))
    table = commands.add_parser("table", help="tables of runs that are there", allow_abbrev=False)
    table.add_argument("runs", nargs="+", type=Path)
    table.add_argument("--markdown", action="store_true", help="as Markdown")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        if args.task == "table":
            print_tables(args.runs, args.markdown)
        else:
            run_task(args)
    except (CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory, lower --batch: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
