"""From the lines of finished (or running) evaluations to tables: method by budget, and what each group scored.

Where it sits: after evaluate.py, which writes runs; figures.py draws what is read here. A run is a folder with run.json
(what was run, on what, by which commit) and results.jsonl (one line a sample, method and budget).
"""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import TASKS
from tasks import Task, mean, read_results

CELLS = ("out", "method", "budget", "markdown")  # arguments that may differ between runs shown as one


@dataclass(frozen=True)
class Run:
    """One run as it was written down, or several of the same samples; lines with an error are counted and left out."""

    path: Path
    about: dict  # run.json
    lines: list[dict]
    skipped: int

    @property
    def task(self) -> Task:
        return TASKS[self.about["task"]]

    @property
    def cells(self) -> dict[tuple[str, float], list[dict]]:
        """Lines of each (method, budget), in the order in which they were asked for."""
        cells: dict[tuple[str, float], list[dict]] = {}
        for line in self.lines:
            cells.setdefault((line["method"], line["budget"]), []).append(line)
        return cells

    @property
    def title(self) -> str:
        given = self.about["arguments"]
        samples = {line["sample"] for line in self.lines}
        commits = ", ".join(f"{name[:7]}{'+' * name.endswith('+')}" for name in self.about["commit"].split(", "))
        parts = [self.about["task"], f"{len(samples)} samples", f"equal {given['equal']}"]
        parts += [f"{role} {Path(given[role.lower()]).name}" for role in self.about["token_bytes"]]
        parts += [self.about["hardware"]["device"], self.about["dtype"], f"commit {commits}"]
        return ", ".join(parts) + (f"; {self.skipped} lines left out, see `error` in {self.path}" * bool(self.skipped))


def read_about(path: Path) -> dict:
    """run.json of a run's folder."""
    try:
        return json.loads((path / "run.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} is not a run: cannot read run.json ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path / 'run.json'} is not JSON ({error}); give another folder") from None


def read_run(path: Path) -> Run:
    about = read_about(path)
    if about.get("task") not in TASKS:
        raise ValueError(f"{path / 'run.json'}: unknown task {about.get('task')!r}; supported: {', '.join(TASKS)}")
    rows = TASKS[about["task"]].complete(path, read_results(path / "results.jsonl"))
    kept = [row for row in rows if "error" not in row]
    if not kept:
        raise ValueError(f"{path} has no results yet; run evaluate.py {about['task']} --out {path}")
    return Run(path, about, kept, len(rows) - len(kept))


def merge(runs: list[Run]) -> list[Run]:
    """Runs of the same task, samples and models become one, their methods and budgets side by side."""
    merged: dict[str, Run] = {}
    for run in runs:
        given = {name: value for name, value in run.about["arguments"].items() if name not in CELLS}
        key = json.dumps([run.about["task"], given], sort_keys=True)
        if key not in merged:
            merged[key] = run
            continue
        first = merged[key]
        new = [line for line in run.lines if (line["method"], line["budget"]) not in first.cells]
        both = {**run.about["token_bytes"], **first.about["token_bytes"]}
        commits = dict.fromkeys(f"{first.about['commit']}, {run.about['commit']}".split(", "))
        about = {**first.about, "token_bytes": both, "commit": ", ".join(commits)}
        merged[key] = Run(first.path, about, first.lines + new, first.skipped + run.skipped)
    return list(merged.values())


def show(name: str, value: float) -> str:
    """A figure as tables print it: shares in percent, bytes in KB, KL with three digits after the point (never -0)."""
    if name in ("perplexity", "rating"):
        return f"{value:.2f}"
    if name == "moved_bytes":
        return f"{value / 1e3:,.0f} KB"
    return f"{round(value, 3) + 0.0:.3f}" if name == "KL" else f"{value:.1%}"


def by_budget(run: Run) -> list[list[str]]:
    """Heading and rows: a method a row, a budget a column; further figures of the task in brackets."""
    cells = run.cells
    methods = list(dict.fromkeys(method for method, _ in cells))
    budgets = sorted({budget for _, budget in cells}, reverse=True)
    rows = [["method", *(f"{budget:.4g}" for budget in budgets)]]
    for method in methods:
        row = [method]
        for budget in budgets:
            figures = run.task.summary(cells[method, budget]) if (method, budget) in cells else {}
            shown = [show(name, value) for name, value in figures.items()]
            row.append("-" if not shown else shown[0] + f" ({', '.join(shown[1:])})" * (len(shown) > 1))
        rows.append(row)
    return rows


def by_group(run: Run) -> list[list[str]]:
    """Heading and rows: a group a row, a method at a budget a column; empty if the task has no groups."""
    scores: dict[str, dict[tuple, list[float]]] = {}
    for cell, lines in run.cells.items():
        for group, score in (part for line in lines for part in run.task.parts(line)):
            scores.setdefault(group, {}).setdefault(cell, []).append(score)
    if len(scores) < 2:
        return []
    rows = [["group", *(f"{method} {budget:.4g}" for method, budget in run.cells), "n"]]
    for group in sorted(scores):
        found = [scores[group].get(cell, []) for cell in run.cells]
        shown = [show(run.task.metric, mean(values)) if values else "-" for values in found]
        rows.append([group, *shown, str(max(map(len, found)))])
    return rows


def print_rows(rows: list[list[str]], title: str, markdown: bool) -> None:
    if markdown:
        print(f"{title}\n\n| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
        for row in rows[1:]:
            print(f"| {' | '.join(row)} |")
        print()
        return
    Console().print(title, soft_wrap=True, highlight=False, markup=False)  # a table's own title is broken to its width
    table = Table()
    for i, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if i else "left", no_wrap=not i)
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)


def print_tables(paths: list[Path], markdown: bool) -> None:
    for run in merge([read_run(path) for path in paths]):
        names = list(run.task.summary(run.lines)) or [run.task.metric]
        legend = names[0] + f" ({', '.join(names[1:])})" * (len(names) > 1)
        print_rows(by_budget(run), f"{run.title}\n{legend}", markdown)
        if groups := by_group(run):
            print_rows(groups, f"{run.task.metric} by group", markdown)
