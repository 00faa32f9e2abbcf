"""What each command of experiments.py does with its arguments: samples, measurement, files, table, picture.

Where it sits: under experiments.py, which says what the paper ran; quality comes from evaluate.py, attention from
measures.py, ratios of shapes from overhead.py. `args` has the common flags of experiments.py and what the experiment
adds to them.
"""

import argparse
import html
import json
import shlex
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

import distill
import figures
import measures
import overhead
from benchmarks import TASKS
from checkpoint import read_config, resolve, weight_bytes
from evaluate import Cell, describe, make_cells, make_parser, parse_method, positions, run_task, too_long
from generate import Pair, load_pair
from hub import fetch
from tables import Run, print_rows, read_run, show
from tasks import Sample, Task, converse, mean, open_session

# ---- what commands share ---------------------------------------------------------------------------------------------


def task_arguments(args, slm: str, out: Path, flags: list[str] = ()) -> argparse.Namespace:
    """The arguments as evaluate.py's parser reads them: its task takes the samples, its flags go through."""
    given = {"llm": args.llm, "slm": slm, "device": args.device, "dtype": args.dtype, "data": args.data,
             "limit": args.limit, "seed": args.seed, "out": out}  # fmt: skip
    common = [str(part) for name, value in given.items() if value is not None for part in (f"--{name}", value)]
    line = [args.task, *common, *flags, *args.rest]
    if flags:
        print(f"$ python evaluate.py {shlex.join(line)}", flush=True)
    return make_parser().parse_args(line)


def load(args, slm: str) -> tuple[Pair, Task, list[Sample], argparse.Namespace]:
    """A pair and the task's samples for it, one by one: no budget, no batch."""
    given = task_arguments(args, slm, args.out)
    given.data = fetch(given.data, args.task)
    pair = load_pair(args.llm, slm, args.device, args.dtype)
    samples = TASKS[args.task].samples(given, pair.text, positions(pair))
    if not samples:
        raise ValueError(f"{args.task}: no samples; look at --limit and --data")
    return pair, TASKS[args.task], samples, given


def texts(args, pair: Pair, samples: list[Sample]) -> list[list[int]]:
    """The samples as texts of at most --tokens tokens: the prompt and what is first fed after it."""
    if args.tokens < measures.WINDOW_MIN:
        raise ValueError(f"--tokens {args.tokens} is too few: heads are matched on at least {measures.WINDOW_MIN}")
    length = min(args.tokens, positions(pair))
    return [(sample.prompt + sample.turns[0])[:length] for sample in samples]


class Rows:
    """rows.jsonl as it grows, so that a run that is stopped keeps what it measured; and experiment.json: by which
    command, of what, on what."""

    def __init__(self, args, pair: Pair | None = None, given: argparse.Namespace | None = None):
        about = {"experiment": args.name, "command": sys.argv, "date": datetime.now(timezone.utc).isoformat()}
        if pair is not None:
            about |= describe(given, pair)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "experiment.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        self.path, self.rows = args.out / "rows.jsonl", []
        self.path.write_text("")

    def add(self, row: dict) -> None:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def mean(self, name: str, **where) -> float | None:
        """Mean of one figure over the rows that have it, of those that are as `where` says."""
        chosen = [row for row in self.rows if all(row[key] == value for key, value in where.items())]
        values = [row[name] for row in chosen if name in row]
        return mean(values) if values else None


def progress(args, items: list):
    return tqdm(items, desc=args.name, unit="text", disable=None)


def title(args, what: str, count: int | None = None) -> str:
    models = ", ".join(["LLM " + Path(args.llm).name, *("SLM " + Path(slm).name for slm in args.slm)])
    return f"{args.name}: {what}; {models}, {args.task}" + f", texts: {count}" * (count is not None)


def draw(args, name: str, make: Callable) -> None:
    """make(plt) -> figure, saved beside the rows; without matplotlib the numbers stay and a note says so."""
    try:
        plt = figures.pyplot()
    except ValueError as error:
        print(f"note: no picture: {error}", file=sys.stderr)
        return
    figure = make(plt)
    figure.savefig(args.out / f"{name}.png", dpi=150)
    plt.close(figure)
    print(args.out / f"{name}.png")


def curves(series: dict[str, list[tuple[float, float]]], x: str, y: str, marker: str = "", log: str = "") -> Callable:
    """What `draw` takes: a line for each name."""

    def make(plt):
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for name, points in series.items():
            axes.plot(*zip(*points), marker=marker, markersize=4, linewidth=1, label=name)
        axes.set(xlabel=x, ylabel=y, **{f"{axis}scale": "log" for axis in log})
        axes.legend(fontsize="small")
        return figure

    return make


def one_slm(args) -> str:
    if len(args.slm) > 1:
        raise ValueError(f"{args.name} takes one --slm, not {len(args.slm)}")
    return args.slm[0]


# ---- attention -------------------------------------------------------------------------------------------------------


def fig1b(args) -> None:
    pair, _, samples, given = load(args, one_slm(args))
    rows, ids = Rows(args, pair, given), texts(args, pair, samples)
    for sample, text, budget in progress(args, [(*both, b) for both in zip(samples, ids) for b in args.budget]):
        found = measures.saliency_shift(pair.llm, pair.slm, text, budget)
        rows.add({"text": sample.id, "budget": budget, **found})
    names = ["two_drops", "h2o", "h2o_heavy", "slm"]
    series, table = {}, [["Jaccard with the global view", *(f"{budget:g}" for budget in args.budget)]]
    for name in names:
        values = [rows.mean(name, budget=budget) for budget in args.budget]
        table.append([name, *("-" if value is None else f"{value:.3f}" for value in values)])
        series[name] = [(budget, value) for budget, value in zip(args.budget, values) if value is not None]
    print_rows(table, title(args, "important tokens, real drop against global view", len(samples)), args.markdown)
    label = "Jaccard with the global view"
    draw(args, args.name, curves({k: v for k, v in series.items() if v}, "budget", label, "o"))


def fig1c(args) -> None:
    pair, _, samples, given = load(args, one_slm(args))
    rows, example = Rows(args, pair, given), None
    for sample, ids in progress(args, list(zip(samples, texts(args, pair, samples)))):
        row = {"text": sample.id}
        for matcher in ("jaccard", "cosine"):
            row[matcher], found = measures.typical_heads(pair.llm, pair.slm, ids, matcher)
            example = example or found
        rows.add(row)
    table = [["text", "jaccard matcher", "cosine matcher"]]
    table += [[row["text"], *(f"{row[kind]:.3f}" for kind in ("jaccard", "cosine"))] for row in rows.rows]
    table.append(["mean", *(f"{rows.mean(kind):.3f}" for kind in ("jaccard", "cosine"))])
    rows.add({"example": example})
    print_rows(table, title(args, "cosine of accumulated scores of matched heads"), args.markdown)
    series = {f"{kind.upper()} layer {example[at]}, head {example[head]}": list(enumerate(example[kind]))
              for kind, at, head in (("llm", "layer", "head"), ("slm", "slm_layer", "slm_head"))}  # fmt: skip
    draw(args, args.name, curves(series, "token", "accumulated attention", log="y"))


def fig2(args) -> None:
    pair, _, samples, given = load(args, one_slm(args))
    rows, first = Rows(args, pair, given), None
    for sample, ids in progress(args, list(zip(samples, texts(args, pair, samples)))):
        shares, curve = measures.mass_by_rank(pair.llm, ids)
        rows.add({"text": sample.id, **shares})
        first = first or curve
    table = [["tokens ranked", "top 5 %", "5-10 %", "10-15 %", "rest", "top 5 / 5-10", "5-10 / 10-15"]]
    for kind in ("all_heads", "each_head"):
        bands = [mean(values) for values in zip(*(row[kind] for row in rows.rows))]
        ratios = [f"{one / other:.2f}" for one, other in zip(bands, bands[1:3])]
        table.append([kind, *(f"{share:.1%}" for share in bands), *ratios])
    print_rows(table, title(args, "share of attention by rank of the token", len(samples)), args.markdown)
    points = [(rank / len(first), share) for rank, share in enumerate(first, 1)]
    draw(args, args.name, curves({samples[0].id: points}, "rank, share of the tokens", "share of attention", log="y"))
    compare_quality(args, args.out / "dropped")


def heatmap(args) -> None:
    pair, _, samples, given = load(args, one_slm(args))
    rows, ids, found = Rows(args, pair, given), texts(args, pair, samples), []
    for sample, text in progress(args, list(zip(samples, ids))):
        measures.check_length(text)
        found.append(distill.similarity(pair.llm, pair.slm, [text]))
        rows.add({"text": sample.id, **{kind: heads.tolist() for kind, heads in found[-1].items()}})
    stacked = {kind: torch.stack([one[kind] for one in found]) for kind in distill.KINDS}  # (texts, L, H) each
    distill.save_similarity({kind: heads.mean(0) for kind, heads in stacked.items()}, args.out, ids)
    table = [["SLM head", "mean", "worst", "above 0.9", "above 0.8", "below 0.5"]]
    for kind, heads in stacked.items():  # shares are of heads on one text each, as in the paper
        shares = [(heads > 0.9), (heads > 0.8), (heads < 0.5)]
        table.append([kind, f"{heads.mean():.3f}", f"{heads.min():.3f}", *(f"{s.float().mean():.1%}" for s in shares)])
    print_rows(table, title(args, "similarity of LLM heads to SLM heads", len(ids)), args.markdown)
    path = args.out / distill.SIMILARITY
    print(path)
    draw(args, args.name, lambda plt: figures.draw_similarity(path, plt))


def fig9(args) -> None:
    rows, series = None, {}
    for slm in args.slm:
        pair, _, samples, given = load(args, slm)
        rows = rows or Rows(args, pair, given)
        for i, (sample, ids) in enumerate(zip(samples, texts(args, pair, samples))):
            llm, other = measures.all_heads(pair.llm, ids), measures.all_heads(pair.slm, ids)
            rows.add({"slm": slm, "text": sample.id, "cosine": measures.cosine(llm, other).item()})
            if i == 0:
                series |= {"LLM": list(enumerate(llm.tolist())), Path(slm).name: list(enumerate(other.tolist()))}
    table = [["SLM", "cosine with the LLM"], *([slm, f"{rows.mean('cosine', slm=slm):.4f}"] for slm in args.slm)]
    print_rows(table, title(args, "attention of each token across all heads", len(samples)), args.markdown)
    draw(args, args.name, curves(series, "token", "accumulated attention, mean over heads", log="y"))


def similarities(args) -> None:
    rows, names = None, distill.KINDS
    for slm in args.slm:
        pair, _, samples, given = load(args, slm)
        rows = rows or Rows(args, pair, given)
        for sample, ids in progress(args, list(zip(samples, texts(args, pair, samples)))):
            measures.check_length(ids)
            found = distill.similarity(pair.llm, pair.slm, [ids])
            rows.add({"slm": slm, "text": sample.id, **{kind: found[kind].mean().item() for kind in names}})
    table = [["SLM", "best head", "jaccard match", "cosine match"]]
    table += [[slm, *(f"{rows.mean(kind, slm=slm):.3f}" for kind in names)] for slm in args.slm]
    print_rows(table, title(args, "mean similarity of heads", len(samples)), args.markdown)


def table9(args) -> None:
    pair, task, samples, given = load(args, one_slm(args))
    rows, window = Rows(args, pair, given), positions(pair)
    for sample in progress(args, samples):
        if reason := too_long(sample, window):
            raise ValueError(f"sample {sample.id}: {reason}; give another --length or --limit")
        ids, ends = measures.conversation(pair, sample, task.stops)
        values = measures.turn_similarity(pair.llm, pair.slm, ids, ends)
        names = ["global", "prompt", *(f"turn {i}" for i in range(1, len(ends)))]
        rows.add({"text": sample.id, "tokens": len(ids), **dict(zip(names, values))})
    names = list(dict.fromkeys(name for row in rows.rows for name in row))[2:]
    print_rows([["", *names], ["similarity", *(f"{rows.mean(name):.3f}" for name in names)]],
               title(args, "matched heads, turn by turn", len(samples)), args.markdown)  # fmt: skip


# ---- quality ---------------------------------------------------------------------------------------------------------


def evaluated(args, slm: str, out: Path, more: list[str] = ()) -> Run:
    """evaluate.py with the command's methods and budgets, and more flags of it; the run that it wrote."""
    flags = ["--method", *args.method, "--budget", *map(str, args.budget), *more, *["--markdown"] * args.markdown]
    run_task(task_arguments(args, slm, out, flags))
    return read_run(out)


def compare_quality(args, out: Path | None = None) -> Run:
    """Methods by budgets: Fig. 1d, 2 (right), 5, 6 and Table 1."""
    run = evaluated(args, one_slm(args), out or args.out)
    draw(args, f"{args.name}-quality", lambda plt: figures.draw_budgets(run, plt))
    return run


def frontier(args) -> None:
    """Methods by budgets, and their scores against the bytes that moved."""
    run = compare_quality(args)
    for budget, found in figures.movement(run).items():
        best = figures.frontier(found, run.task.metric == "KL")
        print(f"{budget:g}, on the frontier, by bytes moved: {', '.join(best)}")
    draw(args, args.name, lambda plt: figures.draw_frontier(run, plt))


def fig7(args) -> None:
    if len(args.method) > 1 or not parse_method(args.method[0])[0].needs_slm:
        raise ValueError(f"fig7 takes one method that has an SLM, not {' '.join(args.method)}")
    rows, series = Rows(args), {}
    for number, slm in enumerate(args.slm):
        run = evaluated(args, slm, args.out / f"{number}-{Path(slm).resolve().name}")
        llm_shape, shape = (read_config(resolve(name)) for name in (args.llm, slm))
        cells = {budget: lines for (_, budget), lines in run.cells.items() if budget in args.budget}
        scores = [(budget, run.task.summary(cells[budget])[run.task.metric]) for budget in args.budget]
        rows.add({"slm": slm, "parameters": weight_bytes(shape, torch.int8),  # a byte each: their number
                  "cache": 1 / overhead.cache_ratio(llm_shape, shape), "metric": run.task.metric,
                  "similarity": mean([line["similarity"] for line in run.lines]), "scores": scores})  # fmt: skip
        series[slm] = scores
    table = [["SLM", "parameters", "its cache", "similarity", *(f"{budget:g}" for budget in args.budget)]]
    for row in rows.rows:
        shown = [f"{row['parameters'] / 1e6:.1f} M", f"{row['cache']:.1%}", f"{row['similarity']:.3f}"]
        table.append([row["slm"], *shown, *(show(row["metric"], score) for _, score in row["scores"])])
    print_rows(table, title(args, f"{row['metric']} by SLM"), args.markdown)
    draw(args, args.name, curves(series, "budget", row["metric"], "o"))


def case_study(args) -> None:
    if len(args.budget) > 1:
        raise ValueError(f"fig10 takes one --budget, not {len(args.budget)}")
    pair, task, samples, given = load(args, one_slm(args))
    if not 0 <= args.sample < len(samples):
        raise ValueError(f"--sample {args.sample} is none of the {len(samples)} samples; raise --limit")
    sample = samples[args.sample]
    if reason := too_long(sample, positions(pair)):
        raise ValueError(f"sample {sample.id}: {reason}; give another --sample or --max-new-tokens")
    cells, written = make_cells(args.method, args.budget, "budget", pair), Rows(args, pair, given)
    for cell in cells:
        written.add(answered(pair, task, sample, cell))
    rows = written.rows
    asked = [pair.text.decode(turn) for turn in sample.turns]
    about = title(args, f"sample {sample.id}, {len(sample.prompt)} tokens, budget {args.budget[0]:g}")
    heading = ["method", "score", *(f"answer {i}" for i in range(1, len(asked) + 1))]
    shown = [[row["method"], f"{row['score']:.2f}", *map(repr, row["answers"])] for row in rows]
    if args.markdown:
        print_rows([heading, *shown], about, True)
    else:
        table = Table(*heading, show_lines=True)
        table.columns[0].no_wrap = True
        for line in shown:
            table.add_row(*map(Text, line))  # an answer may look like rich's markup
        Console().print(about, soft_wrap=True, highlight=False, markup=False)
        Console().print(table)
    page = args.out / "index.html"
    page.write_text(case_page(about, pair.text.decode(sample.prompt), asked, sample.facts, rows), encoding="utf-8")
    print(page)


def answered(pair: Pair, task: Task, sample: Sample, cell: Cell) -> dict:
    """One sample under one method: its answers, and what the task says of them."""
    answers = converse(open_session(cell.policy(pair), [sample]), [sample], pair.text, task.stops)[0]
    score = task.score(sample, answers)["score"]
    return {"method": cell.method, "budget": cell.budget, "answers": answers, "score": score}


def case_page(about: str, prompt: str, asked: list[str], facts: dict, rows: list[dict]) -> str:
    """The case study as one HTML page: the prompt, then a column a method and a row a turn."""

    def cell(tag: str, text: str) -> str:
        return f"<{tag}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", f"{row['method']} ({row['score']:.2f})") for row in rows)
    body = "".join(
        "<tr>" + cell("th", question) + "".join(cell("td", row["answers"][turn]) for row in rows) + "</tr>\n"
        for turn, question in enumerate(asked)
    )
    style = "body{font:15px sans-serif;margin:2em}td,th{border:1px solid #aaa;padding:.5em;vertical-align:top;"
    style += "text-align:left;white-space:pre-wrap}table{border-collapse:collapse}pre{white-space:pre-wrap}"
    known = html.escape(json.dumps(facts, ensure_ascii=False, indent=1))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{cell("title", about)}<style>{style}</style>\n'
        f"{cell('h1', about)}\n<table><tr><th></th>{head}</tr>\n{body}</table>\n"
        f"<h2>What was to be answered</h2><pre>{known}</pre><h2>Prompt</h2>{cell('pre', prompt)}\n</html>\n"
    )
