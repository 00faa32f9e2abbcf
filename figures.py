"""Pictures of what was measured: quality against budget, the needle's grid, head similarity, training curves.

    python figures.py runs/recall runs/wikitext pair/slm/similarity.json pair/slm/log.jsonl --out pictures

Where it sits: after evaluate.py, pretrain.py and distill.py, whose files it reads; nothing is computed here but means.

- a run's folder: the score of each method by budget (the paper's Fig. 5), one picture for all runs of the same samples
  and models; where rows came from the offloaded tier, the score against the bytes that moved a step, too, and of a
  needle run a grid of depth and length
- similarity.json of distill.py: similarity of every LLM head (the paper's Fig. 8)
- log.jsonl of a training run: losses, and what its evaluations found
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from tables import Run, merge, read_run
from tasks import mean, read_json_file, read_lines

BOOKKEEPING = ("step", "seconds", "lr", "tokens", "tokens_per_s")  # of log.jsonl: not drawn
BOUNDS = ("full", "oracle")  # they hold every key: what nothing reaches, not what is compared by bytes moved
SIMILARITY_KEYS = ("best", "jaccard", "cosine")  # the best SLM head, and what each matcher finds


def pyplot():
    """matplotlib, for files and not for windows; only figures need it."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("figures need the package matplotlib, which is not here: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


# ---- runs ------------------------------------------------------------------------------------------------------------


def curves(run: Run) -> dict[str, list[tuple[float, float]]]:
    """(budget, score) points of each method, by budget."""
    points: dict[str, list[tuple[float, float]]] = {}
    for (method, budget), lines in run.cells.items():
        if figures := run.task.summary(lines):
            points.setdefault(method, []).append((budget, figures[run.task.metric]))
    return {method: sorted(found) for method, found in points.items()}


def draw_budgets(run: Run, plt):
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    task, ticks = run.task, set()
    for method, points in curves(run).items():
        budgets, scores = zip(*points)
        if budgets != (1.0,):
            axes.plot(budgets, scores, marker="o", markersize=4, label=method)
            ticks |= set(budgets)
        elif task.metric != "KL":  # the full cache: a line to compare with; its KL to itself is 0
            axes.axhline(scores[0], color="black", linestyle="--", linewidth=1, label=method)
    axes.set_xscale("log")
    ticks = sorted(ticks)
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.minorticks_off()
    if task.metric == "KL":
        axes.set_yscale("log")
    equal = run.about["arguments"]["equal"]
    axes.set_xlabel("share of the full cache's bytes" + ", the SLM's own included" * (equal == "bytes"))
    axes.set_ylabel(f"{task.name}: {task.metric}" + " to the full cache" * (task.metric == "KL"))
    axes.legend(fontsize="small")
    return figure


def movement(run: Run) -> dict[float, dict[str, tuple[float, float]]]:
    """At each budget (bytes moved a step and sequence, score) of the methods but BOUNDS; 0 where nothing moves."""
    found: dict[float, dict[str, tuple[float, float]]] = {}
    for (method, budget), lines in run.cells.items():
        if method not in BOUNDS and (figures := run.task.summary(lines)):
            found.setdefault(budget, {})[method] = (figures.get("moved_bytes", 0.0), figures[run.task.metric])
    return dict(sorted(found.items(), reverse=True))


def frontier(points: dict[str, tuple[float, float]], lower: bool) -> list[str]:
    """The methods that no other beats in one of the two without being worse in the other, by bytes moved."""
    sign = 1 if lower else -1
    order = sorted(points, key=lambda method: (points[method][0], sign * points[method][1]))
    best, kept = float("inf"), []
    for method in order:
        if sign * points[method][1] < best:
            best = sign * points[method][1]
            kept.append(method)
    return kept


def draw_frontier(run: Run, plt):
    """A panel a budget: every method a point, a line through those that are on the frontier; the oracle is a level."""
    found, task = movement(run), run.task
    size = {"figsize": (1 + 4.5 * len(found), 4.5), "squeeze": False, "sharey": True, "layout": "constrained"}
    figure, panels = plt.subplots(1, len(found), **size)
    methods = list(dict.fromkeys(method for points in found.values() for method in points))
    marks = {method: ("os^Dv"[i // 10 % 5], f"C{i % 10}") for i, method in enumerate(methods)}
    for axes, (budget, points) in zip(panels[0], found.items()):
        kept = [points[method] for method in frontier(points, task.metric == "KL")]
        axes.plot(*zip(*kept), color="lightgrey", drawstyle="steps-post", zorder=0)
        for method, (moved, score) in points.items():
            marker, color = marks[method]
            axes.plot(moved, score, marker=marker, color=color, linestyle="", markersize=5, label=method)
        if exact := run.cells.get(("oracle", budget)):
            axes.axhline(task.summary(exact)[task.metric], color="black", linestyle="--", linewidth=1, label="oracle")
        axes.set_xscale("symlog", linthresh=1e3)
        most = max(moved for moved, _ in points.values())
        axes.set_xticks([0, *(10**power for power in range(3, 12) if 10**power <= 2 * most)])
        axes.set_xlim(-200, max(2e3, 1.5 * most))
        axes.minorticks_off()
        axes.set_title(f"budget {budget:.3g}", fontsize="small")
        axes.set_xlabel("bytes from the offloaded tier, a step and sequence")
    if task.metric == "KL":
        panels[0][0].set_yscale("log")
    panels[0][0].set_ylabel(f"{task.name}: {task.metric}" + " to the full cache" * (task.metric == "KL"))
    figure.legend(*panels[0][0].get_legend_handles_labels(), fontsize="x-small", loc="outside right")
    return figure


def grid(lines: list[dict]) -> tuple[list[int], list[int], list[list[float]]]:
    """Lengths, depths and the mean score at each depth (row) and length; NaN where there is no sample."""
    lengths, depths = (sorted({line[name] for line in lines}) for name in ("length", "depth"))
    found: dict[tuple[int, int], list[float]] = {}
    for line in lines:
        found.setdefault((line["depth"], line["length"]), []).append(line["score"])
    nothing = [float("nan")]
    return lengths, depths, [[mean(found.get((depth, length), nothing)) for length in lengths] for depth in depths]


def draw_needle(run: Run, plt):
    cells = run.cells
    figure, panels = plt.subplots(
        1, len(cells), figsize=(1 + 2.6 * len(cells), 3), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, ((method, budget), lines) in zip(panels[0], cells.items()):
        lengths, depths, scores = grid(lines)
        image = axes.imshow(scores, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(lengths)), lengths, rotation=45)
        axes.set_yticks(range(len(depths)), depths)
        axes.set_title(f"{method} {budget:.3g}", fontsize="small")
        axes.set_xlabel("tokens")
    panels[0][0].set_ylabel("depth in percent")
    figure.colorbar(image, ax=panels[0], label="found")
    return figure


# ---- training --------------------------------------------------------------------------------------------------------


def draw_similarity(path: Path, plt):
    content = read_json_file(path)
    kinds = [kind for kind in SIMILARITY_KEYS if kind in content]
    if not kinds:
        raise ValueError(f"{path} has none of {', '.join(SIMILARITY_KEYS)}; give a similarity.json of distill.py")
    figure, panels = plt.subplots(
        1, len(kinds), figsize=(1 + 3 * len(kinds), 4), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, kind in zip(panels[0], kinds):
        image = axes.imshow(content[kind], vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_title(f"{kind}: mean {mean([head for layer in content[kind] for head in layer]):.3f}")
        axes.set_xlabel("LLM head")
        axes.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(plt.MaxNLocator(integer=True))
    panels[0][0].set_ylabel("LLM layer")
    figure.colorbar(image, ax=panels[0], label="cosine of attention")
    return figure


def split_log(path: Path) -> dict[str, dict]:
    """log.jsonl -> its panels: what training logged, losses of its evaluations, shares of its evaluations (exact
    answers, similarity). Of each figure (steps, values)."""
    panels = {"training": {}, "evaluation, loss": {}, "evaluation, share": {}}
    for row in read_lines(path, ("step",)):
        found = row.get("eval", {name: row[name] for name in row if name not in BOOKKEEPING})
        for name, value in found.items():
            kind = "training" if "eval" not in row else f"evaluation, {'loss' if 'loss' in name else 'share'}"
            steps, values = panels[kind].setdefault(name, ([], []))
            steps.append(row["step"])
            values.append(value)
    return {kind: panel for kind, panel in panels.items() if panel}


def draw_log(path: Path, plt):
    parts = split_log(path)
    if not parts:
        raise ValueError(f"{path} has no figures yet")
    size = {"figsize": (6 * len(parts), 4), "squeeze": False, "layout": "constrained"}
    figure, panels = plt.subplots(1, len(parts), **size)
    for axes, (kind, part) in zip(panels[0], parts.items()):
        axes.set_title(kind)
        for name, (steps, values) in part.items():
            axes.plot(steps, values, label=name, marker="." * (len(steps) < 30) or None)
        axes.set_xlabel("step")
        axes.legend(fontsize="x-small", ncols=2)
    return figure


# ---- the command -----------------------------------------------------------------------------------------------------


def pictures(paths: list[Path], plt) -> Iterator[tuple[str, object]]:
    """(name, figure) of everything that was given."""
    runs = []
    for path in paths:
        if path.name.endswith("similarity.json"):
            yield f"{path.resolve().parent.name}-similarity", draw_similarity(path, plt)
        elif path.suffix == ".jsonl":
            yield f"{path.resolve().parent.name}-log", draw_log(path, plt)
        elif (path / "run.json").is_file():
            runs.append(read_run(path))
        else:
            raise ValueError(f"{path} is neither a run's folder nor a similarity.json or log.jsonl")
    for run in merge(runs):
        name = f"{run.path.resolve().name}-{run.about['arguments']['equal']}"
        yield name, draw_budgets(run, plt)
        if any("moved_bytes" in line for line in run.lines):
            yield f"{name}-frontier", draw_frontier(run, plt)
        if run.task.name == "needle":
            yield f"{name}-grid", draw_needle(run, plt)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("paths", nargs="+", type=Path, help="runs, similarity.json, log.jsonl")
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="folder (default: pictures)")
    args = parser.parse_args(argv)
    try:
        plt = pyplot()
        made = list(pictures(args.paths, plt))
        args.out.mkdir(parents=True, exist_ok=True)
        for name, figure in made:
            figure.savefig(args.out / f"{name}.png", dpi=150)
            plt.close(figure)
            print(args.out / f"{name}.png")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
