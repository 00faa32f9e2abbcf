"""Quality: what a method's answers lose against the full cache, for any method at any budget.

    python evaluate.py recall --method full smallkv window --budget 0.2 0.1 --out runs/recall
    python evaluate.py kl --llm DIR --slm DIR --file test.txt --method smallkv smallkv:marginal=yes smallkv-paper h2o
    python evaluate.py table runs/recall runs/kl --markdown

Where it sits: above the flow, like generate.py. samples.py has the tasks that are ours (kl, recall, needle, mtbench);
the paper's other benchmarks (Section 5) run in lm-evaluation-harness (lm-eval; harness.py). Here are methods and
budgets, runs and tables.

A run is a folder: results.jsonl has a line a sample, method and budget; run.json says what made them. The same command
goes on with a run that was killed, and the lines are the same.
"""

import math
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import fields
from datetime import datetime, timezone
from importlib import metadata
from itertools import product
from json import dumps
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import command
from baselines import BASELINES
from checkpoint import DTYPES
from command import number, read_lines, whole
from decode import Policy
from generate import PAIR, Pair, load_pair
from match import WINDOW_MIN
from report import run_line
from samples import TASKS, Sample, load_samples, run_batch
from smallkv import Settings, SmallKV

METHODS = ("full", *BASELINES, "smallkv", "smallkv-paper")
FREE = ("out", "method", "budget", "markdown")  # flags in which the calls that fill one folder may differ
RESULT = ("method", "budget", "sample", "group")  # what every line of results has
FIGURES = {  # of a line of results: what a table calls their mean, and how it shows it
    "loss": ("perplexity", lambda loss: f"{math.exp(loss):.2f}"),
    "agreement": ("agreement", "{:.1%}".format),
    "similarity": ("similarity", "{:.3f}".format),
    "moved_bytes": ("KB moved a step", lambda size: f"{size / 1e3:,.0f}"),
}


# ---- Methods and budgets ---------------------------------------------------------------------------------------------


def parse_spec(spec: str) -> tuple[str, dict]:
    """A method's name and its options: smallkv:score_decay=0.9,marginal=yes. ValueError names what is wrong."""
    (name, _, rest), options, kinds = spec.partition(":"), {}, {}
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; supported: {', '.join(METHODS)}")
    if name.startswith("smallkv"):
        kinds = {f.name: command.field_kind(f) for f in fields(Settings) if f.name[:6] != "budget"}
    for key, _, value in (part.partition("=") for part in rest.split(",") if part):
        if key not in kinds:
            raise ValueError(f"method {spec!r} has no option {key!r}; supported: {', '.join(kinds) or 'none'}")
        try:
            options[key] = {"yes": True, "no": False}[value] if kinds[key] is bool else kinds[key](value)
        except (KeyError, ValueError):
            wanted = "yes or no" if kinds[key] is bool else "a number"
            raise ValueError(f"method {spec!r}: {key} should be {wanted}, not {value!r}") from None
    return name, options


def needs_slm(spec: str) -> bool:
    return parse_spec(spec)[0].startswith("smallkv")


def make_policy_from(spec: str, pair: Pair, budget: float) -> Policy:
    """The policy of a method, keeping this share of the full cache's bytes."""
    name, options = parse_spec(spec)
    if name == "full":
        return Policy(pair.llm)
    if name in BASELINES:
        return BASELINES[name](pair.llm, budget)
    settings = (Settings.paper if name == "smallkv-paper" else Settings)(budget=budget, **options)
    return SmallKV(pair.llm, pair.slm, settings)


def token_bytes(model) -> int:
    """Bytes of K and V of one token in all layers."""
    config = model.config
    return 2 * config.layers * config.kv_heads * config.head_dim * model.dtype.itemsize


def make_cells(args, pair: Pair) -> list[tuple[str, float, float]]:
    """Every method at every budget, and the share of the full cache that the budget leaves the LLM. ValueError for what
    cannot be, before anything runs.

    --equal bytes: the LLM's cache and the SLM's own K and V together take the budget's share of the LLM's full cache,
    so that much is taken off the budget of a method with an SLM. Scores (fp32) are not counted for any method.
    """
    cells = []
    for spec, budget in product(args.method, args.budget):
        budget = 1.0 if parse_spec(spec)[0] == "full" else budget
        policy, taken = make_policy_from(spec, pair, budget), 0.0
        if args.equal == "bytes" and isinstance(policy, SmallKV):
            taken = policy.settings.slm_budget * token_bytes(pair.slm) / token_bytes(pair.llm)
        if taken >= budget:
            raise ValueError(f"--equal bytes: the SLM's own cache is {taken:.1%} of the LLM's full cache, so a budget "
                             f"of {budget:g} leaves {spec} nothing; give more, or --equal budget")  # fmt: skip
        cells.append((spec, budget, budget - taken))
    return list(dict.fromkeys(cells))


def cell_name(spec: str, budget: float) -> str:
    """What files of a method at a budget are called."""
    return re.sub(r"[^\w.@-]+", "-", f"{spec}@{budget:g}")


# ---- A run -----------------------------------------------------------------------------------------------------------


def commit() -> str:
    """The commit this code stands at, with a + where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(args, pair: Pair) -> dict:
    """run.json: what a figure needs beside it; runs has an entry for each call that filled the folder."""
    where, models, cpus = pair.llm.device, {"LLM": pair.llm, "SLM": pair.slm}, Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpus.read_text()) if cpus.is_file() else None
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else cpu[1] if cpu else platform.machine()
    plain, date = (bool, int, float, list, type(None)), datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        "task": args.task,
        "arguments": {k: v if isinstance(v, plain) else str(v) for k, v in vars(args).items() if k != "task"},
        "dtype": str(pair.llm.dtype).removeprefix("torch."),
        "versions": {"python": platform.python_version(), **{n: metadata.version(n) for n in ("torch", "tokenizers")}},
        "machine": {"device": where.type, "name": name, "threads": torch.get_num_threads()},
        "token_bytes": {role: token_bytes(model) for role, model in models.items() if model is not None},
        "runs": [{"command": sys.argv, "commit": commit(), "date": date}],
    }


def open_run(args, pair: Pair) -> Path:
    """The folder of the run, with its run.json. ValueError if it holds a run of other arguments; a note if only the
    code is another."""
    out, about = args.out, describe(args, pair)
    if (out / "run.json").is_file():
        before, given = read_about(out), {"task": args.task, **about["arguments"]}
        for name, old in {"task": before["task"], **before["arguments"]}.items():
            if name not in FREE and given.get(name) != old:
                raise ValueError(f"{out} was run with {name} {old}, not {given.get(name)}; give another --out")
        made, now = {entry["commit"] for entry in before["runs"]}, about["runs"][0]["commit"]
        if made != {now} or now.endswith("+"):
            print(f"note: {out} holds lines of commit {', '.join(sorted(made))}, this is {now}", file=sys.stderr)
        about["runs"] = before["runs"] + about["runs"]
        about["token_bytes"] = before["token_bytes"] | about["token_bytes"]  # a call for baselines loads no SLM
    elif (out / "results.jsonl").is_file():
        raise ValueError(f"{out} has results but no run.json; give another --out")
    command.write_json(command.check_folder(out) / "run.json.part", about)
    return (out / "run.json.part").replace(out / "run.json").parent  # a call that is killed here leaves the old one


def run_cells(task: str, pair: Pair, samples: list[Sample], size: int, cells: list[tuple], path: Path) -> None:
    """What is missing, batch by batch with all cells, a line a sample at the file's end. A batch of which a killed run
    wrote a part runs whole again: the same batch gives the same numbers."""
    done = {(row["method"], row["budget"], row["sample"]) for row in read_lines(path, RESULT, torn=True)}
    if path.is_file():  # cut off what a killed run left of its last line
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    left = sum((spec, budget, sample.id) not in done for sample in samples for spec, budget, _ in cells)
    with tqdm(total=left, desc=task, unit="sample", disable=None) as bar, path.open("a", encoding="utf-8") as file:
        for start, (spec, budget, own) in product(range(0, len(samples), size), cells):
            batch = samples[start : start + size]
            missing = [(spec, budget, sample.id) not in done for sample in batch]
            found = run_batch(task, pair, make_policy_from(spec, pair, own), batch) if any(missing) else []
            for sample, figures, lacking in zip(batch, found, missing):
                line = {"method": spec, "budget": budget, "llm_budget": own, "sample": sample.id, "group": sample.group}
                if lacking:
                    file.write(dumps({**line, **figures}, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(sum(missing))


def write_answers(folder: Path) -> None:
    """model_answer/NAME.jsonl for each method and budget, as FastChat writes them: beside its own in data/mt_bench its
    judge rates them (gen_judgment.py --model-list NAME)."""
    files: dict[str, str] = {}
    for line in read_run(folder)[1]:
        name = cell_name(line["method"], line["budget"])
        row = {"question_id": int(line["sample"]), "answer_id": f"{name}-{line['sample']}", "model_id": name,
               "choices": [{"index": 0, "turns": line["given"]}], "tstamp": time.time()}  # fmt: skip
        files[name] = files.get(name, "") + dumps(row, ensure_ascii=False) + "\n"
    for name, text in files.items():
        command.write_text(command.check_folder(folder / "model_answer") / f"{name}.jsonl", text)


# ---- Tables ----------------------------------------------------------------------------------------------------------


def read_about(folder: Path) -> dict:
    about = command.read_json(folder / "run.json")
    if not {"task", "arguments", "dtype", "machine", "token_bytes", "runs"} <= about.keys():
        raise ValueError(f"{folder / 'run.json'} is not of a run of evaluate.py; give another folder")
    return about


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """run.json and the lines of results of a run's folder; ValueError if there are none."""
    about, lines = read_about(Path(folder)), read_lines(Path(folder) / "results.jsonl", RESULT, torn=True)
    if not lines:
        raise ValueError(f"{folder} has no results yet; give its command once more")
    return about, lines


def scores_of(line: dict) -> list[tuple[str, float]]:
    """(group, score) pairs that a line stands for: recall has one a question, MT-Bench none."""
    if "turns" in line:
        return [(turn["kind"], float(turn["exact"])) for turn in line["turns"]]
    return [(line["group"], line["score"])] if "score" in line else []


def make_table(task: str, lines: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a method at a budget a row, n scores; their mean, those of further figures and of each group."""
    form, cells, rows = ("{:.4f}" if task == "kl" else "{:.1%}").format, {}, []
    for line in lines:
        cells.setdefault((line["method"], line["budget"]), []).append(line)
    groups = {group for line in lines for group, _ in scores_of(line) if group}
    groups = sorted(groups, key=lambda group: ([int(n) for n in re.findall(r"\d+", group)], group))
    # A column: heading, how a mean is shown, the values of a line. Over different benchmarks no mean is taken.
    columns = [(TASKS[task][1], form, lambda line: [x for _, x in scores_of(line)])] if task in TASKS else []
    columns += [(*how, lambda line, n=name: [line[n]] if n in line else []) for name, how in FIGURES.items()]
    columns += [(g, form, lambda line, g=g: [x for own, x in scores_of(line) if own == g]) for g in groups]
    if task == "kl":
        columns += [(f"{g}, similarity", "{:.3f}".format, lambda line, g=g: [line["similarity"]]
                     if line["group"] == g and "similarity" in line else []) for g in groups]  # fmt: skip
    columns = [column for column in columns if any(map(column[2], lines))]
    for (spec, budget), own in cells.items():
        found = [(show, [x for line in own for x in values(line)]) for _, show, values in columns]
        means = [show(sum(values) / len(values)) if values else "-" for show, values in found]
        rows.append([spec, f"{budget:.4g}", f"{sum(len(scores_of(line)) or 1 for line in own)}", *means])
    return ["method", "budget", "n", *(heading for heading, *_ in columns)], rows


def show_tables(folders: list[Path], markdown: bool) -> int:
    """A table for each run: drawn on a terminal, else in markdown."""
    for about, lines in map(read_run, folders):
        given, commits = about["arguments"], dict.fromkeys(entry["commit"] for entry in about["runs"])
        models = [f"{role} {Path(given[role.lower()]).name}" for role in about["token_bytes"]]
        where = [about["machine"]["name"], about["dtype"], "commit " + ", ".join(c[:7] + c[40:] for c in commits)]
        print(", ".join([f"{about['task']} at equal {given['equal']}", *models, *where]))
        header, rows = make_table(about["task"], lines)
        if markdown or not sys.stdout.isatty():
            print(f"\n{command.markdown_table(header, rows)}\n")
            continue
        grid = [header, *rows]
        grid = list(zip(*grid)) if len(header) > len(grid) else grid  # the way that is less wide
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for i, heading in enumerate(grid[0]):
            table.add_column(heading, justify="right" if i else "left", no_wrap=not i)
        for row in grid[1:]:
            table.add_row(*row)
        Console().print(table)
    return 0


# ---- The command -----------------------------------------------------------------------------------------------------


def make_parser() -> command.Parser:
    parser = command.Parser(description=__doc__.partition("\n")[0] + " [Defaults in brackets.]")
    commands = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for task, (*_, help) in {**TASKS, "lm-eval": ("tasks of lm-evaluation-harness",)}.items():
        limit, batch = {"recall": 50}.get(task), 25 if task == "recall" else 8
        every = "all; of a text 8" if task == "kl" else "all"
        add = commands.add_parser(task, help=help, description=help).add_argument
        add("--llm", metavar="NAME", help="folder or hub id (@revision too) of the large model [the embedded]")
        add("--slm", metavar="NAME", help="the same of the small model, of the same series")
        add("--slm-layers", type=whole(1), metavar="N", help="load and run the SLM's first N layers alone")
        add("--device", type=command.device, default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1 [auto]")
        add("--dtype", default="auto", choices=("auto", *DTYPES), help="[auto: as stored, on a CPU float32]")
        add("--quantize", choices=("int4", "int4-both"), help="round weights to INT4: the LLM's, or both models'")
        text = ", ".join(METHODS) + "; with settings as in smallkv:score_decay=0.9,marginal=yes [full smallkv]"
        add("--method", nargs="+", default=["full", "smallkv"], metavar="NAME", help=text)
        text, above = "shares of the full cache's bytes [0.2]", number(0, 1, above=True)
        add("--budget", nargs="+", type=above, default=[0.2], metavar="X", help=text)
        add("--equal", choices=("budget", "bytes"), default="budget", help="bytes: the SLM's K and V are in a budget")
        add("--out", type=Path, default=Path("runs", task), metavar="DIR", help=f"folder of the run [runs/{task}]")
        add("--limit", type=whole(1), default=limit, metavar="N", help=f"samples [{limit or every}]")
        add("--batch", type=whole(1), default=batch, metavar="N", help=f"how many samples run together [{batch}]")
        add("--markdown", action="store_true", help="print the table in markdown")
        if task in ("recall", "needle"):
            add("--seed", type=command.seed, default=0, metavar="N", help="other samples [0]")
        if task in ("kl", "recall", "needle"):
            text = "or prompts: .jsonl with `prompt`, `group` " if task == "kl" else ""
            add("--file", default=str(PAIR / "prose.txt"), help=f"a text {text}[a book the embedded pair has not seen]")
        if task == "kl":
            add("--prompt", type=whole(WINDOW_MIN), default=512, metavar="N", help="tokens prefilled, at most [512]")
            add("--steps", type=whole(2), default=128, metavar="N", help="tokens that are fed one by one [128]")
        if task == "recall":
            add("--length", type=whole(1), default=1000, metavar="N", help="tokens of a document [1000]")
            add("--turns", type=whole(1), default=4, metavar="N", help="questions a document [4]")
        if task == "needle":
            add("--lengths", type=whole(1), nargs="+", default=[512, 1024, 1536], metavar="N", help="in tokens")
            add("--depths", type=whole(0, 100), nargs="+", default=[0, 25, 50, 75, 100], metavar="N", help="in percent")
            add("--repeats", type=whole(1), default=1, metavar="N", help="samples of each depth and length [1]")
            add("--max-new-tokens", type=whole(1), default=32, metavar="N", help="of an answer, at most [32]")
        if task == "mtbench":
            add("--file", required=True, help="FastChat's question.jsonl")
            add("--max-new-tokens", type=whole(1), default=1024, metavar="N", help="of an answer, at most [1024]")
        if task == "lm-eval":
            add("--tasks", nargs="+", required=True, metavar="NAME", help="the harness's tasks, groups and tags")
            add("--data", type=Path, metavar="DIR", help="local files of GSM8K, BBH, LongBench [downloaded]")
        if task in ("kl", "needle", "lm-eval"):
            add("--chat", action="store_true", help="prompts in the checkpoint's chat template")
    add = commands.add_parser("table", help="tables of runs that are there").add_argument
    add("runs", nargs="+", type=Path)
    add("--markdown", action="store_true", help="in markdown")
    return parser


def run(args) -> int:
    if args.task == "table":
        return show_tables(args.runs, args.markdown)
    if args.task == "lm-eval":
        try:
            import harness
        except ImportError as error:
            raise ValueError(f"lm-eval needs more packages ({error}): pip install -r requirements-eval.txt") from None
    needed = any([needs_slm(spec) for spec in args.method])  # a list: every method is looked at
    args.slm = args.slm or (None if args.llm else str(PAIR / "slm"))
    args.llm = args.llm or str(PAIR / "llm")
    if needed and not args.slm:
        raise ValueError("--slm is missing: one of the methods needs a small model of the same series")
    how = str(args.device), args.dtype, args.slm_layers, args.quantize
    pair = load_pair(args.llm, args.slm if needed else None, *how)
    cells = make_cells(args, pair)
    samples = load_samples(args.task, pair, args) if args.task in TASKS else []
    out = open_run(args, pair)
    for line in dict.fromkeys(run_line(pair.llm, make_policy_from(spec, pair, own)) for spec, _, own in cells):
        print(line, file=sys.stderr)
    if args.task == "lm-eval":
        harness.run(args, pair, cells)
    else:
        run_cells(args.task, pair, samples, args.batch, cells, out / "results.jsonl")
    if args.task == "mtbench":
        write_answers(out)
    return show_tables([out], args.markdown)


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    return command.ended(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
