"""Quality against budget, and against the bytes that came from the offloaded tier: a picture of evaluate.py's runs.

    python -m experiments.curve runs/fig5-gsm8k --out fig5.png
    python -m experiments.curve runs/fig7-0.5B runs/fig7-7B --out fig7.png      # a line for each run and method

Where it sits: after evaluate.py, whose folders it reads; the curves of Fig. 5, 6 and 7. Runs in one picture are of one
task; a point is the mean of all its lines.
"""

import sys
from pathlib import Path

from command import Parser, check_folder, ended
from evaluate import read_run


def pyplot():
    """matplotlib, for files and not for windows; ValueError if it is not there."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("a picture needs the package matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def curves(lines: list[dict], x: str) -> dict[str, list[tuple[float, float]]]:
    """(x, mean score) of each method at each of its budgets, by x, a figure of the lines that not every method has."""
    cells: dict[tuple[str, float], list[dict]] = {}
    for line in lines:
        if x in line and "score" in line:
            cells.setdefault((line["method"], line["budget"]), []).append(line)
    points: dict[str, list[tuple[float, float]]] = {}
    for (method, _), own in cells.items():
        means = (sum(line[name] for line in own) / len(own) for name in (x, "score"))
        points.setdefault(method, []).append(tuple(means))
    return {method: sorted(found) for method, found in points.items()}


def draw(task: str, runs: dict[str, list[dict]]):
    """A figure: runs by name, the lines of each; a second panel where rows came from the offloaded tier."""
    xs = {"budget": "share of the full cache's bytes", "moved_bytes": "bytes that came, a step and sequence"}
    known = [x for x in xs if any(x in line for lines in runs.values() for line in lines)]
    size = (5.5 * len(known), 4)
    figure, panels = pyplot().subplots(1, len(known), figsize=size, squeeze=False, layout="constrained")
    for axes, x in zip(panels[0], known):
        for name, lines in runs.items():
            for method, points in curves(lines, x).items():
                label = f"{name}: {method}" if len(runs) > 1 else method
                if method != "full":
                    axes.plot(*zip(*points), "o-", markersize=4, linewidth=1, label=label)
                elif task != "kl":  # one point, at 1: a level to compare with
                    axes.axhline(points[0][1], color="black", linestyle="--", linewidth=1, label=label)
        axes.set(xlabel=xs[x], xscale="log", ylabel="KL to the full cache" if task == "kl" else f"{task}: score")
        axes.set_yscale("log" if task == "kl" else "linear")
        axes.legend(fontsize="small")
    return figure


def run(args) -> int:
    read = {folder.resolve().name: read_run(folder) for folder in args.runs}
    tasks = sorted({about["task"] for about, _ in read.values()})
    if len(tasks) > 1:
        raise ValueError(f"runs of {' and '.join(tasks)} have no axis in common; give runs of one task")
    figure = draw(tasks[0], {name: lines for name, (_, lines) in read.items()})
    check_folder(args.out.parent)
    figure.savefig(args.out, dpi=150)
    print(args.out)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of evaluate.py's runs")
    parser.add_argument("--out", type=Path, default=Path("curve.png"), help="the picture (default: curve.png)")
    args = parser.parse_args(argv)
    return ended(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
