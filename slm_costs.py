"""What is lost where the SLM costs less, by a smaller cache or fewer layers: Tables 5 and 6 (A.3), for experiments.py.

Where it sits: beside studies.py, whose samples, files and tables it uses; answers are evaluate.py's, what a smaller
cache of the SLM loses of its attention measures.py's. What is saved: `bench.py overhead`. `args` as in studies.py.
"""

import argparse

import measures
import overhead
from checkpoint import read_config, resolve
from evaluate import parse_method
from smallkv import Settings
from studies import Rows, curves, draw, evaluated, load, mean, one_slm, progress, show, texts, title
from tables import print_rows

KEPT_LAYERS = (1, 5 / 6, 2 / 3, 1 / 2, 1 / 3)  # shares of the SLM's layers that Table 6 stops at

def one_budget(args) -> float:
    if len(args.budget) > 1:
        raise ValueError(f"{args.name} takes one --budget, the LLM's, not {len(args.budget)}")
    return args.budget[0]


def kept_share(args, layers: int | None = None, slm_budget: float = 1.0) -> float:
    """The SLM's K and V as a share of the LLM's full cache."""
    llm, slm = (read_config(resolve(name)) for name in (args.llm, args.slm[0]))
    return overhead.slm_share(llm, overhead.early(slm, layers or slm.layers), slm_budget)


def with_slm(args) -> list[str]:
    """The methods that have an SLM; ValueError if there is none."""
    chosen = [text for text in args.method if parse_method(text)[0].needs_slm]
    if not chosen:
        raise ValueError(f"{args.name} needs a method that has an SLM, not {' '.join(args.method)}")
    return chosen


def scores_of(run, text: str, budget: float) -> str:
    task = run.task
    lines = next(lines for (method, at), lines in run.cells.items() if method == text and at in (budget, 1.0))
    return show(task.metric, task.summary(lines)[task.metric])


def table5(args) -> None:
    """What a smaller cache of the SLM loses: of its attention, measured on texts, and of the LLM's answers."""
    budget, methods = one_budget(args), with_slm(args)
    for share in args.slm_budget:
        Settings(slm_budget=share)  # for its errors, before anything is run
    pair, _, samples, given = load(args, one_slm(args))
    rows, ids = Rows(args, pair, given), texts(args, pair, samples)
    for sample, text, share in progress(args, [(*both, s) for both in zip(samples, ids) for s in args.slm_budget]):
        found = measures.cut_view(pair.llm, pair.slm, text, share, budget)
        rows.add({"text": sample.id, "slm_budget": share, **found})

    def at(text: str, share: float) -> str:
        return f"{text}{',' if ':' in text else ':'}slm_budget={share:g}"

    every = [at(text, share) for text in methods for share in args.slm_budget]
    every += [text for text in args.method if text not in methods]
    changed = argparse.Namespace(**{**vars(args), "method": every})
    run = evaluated(changed, one_slm(args), args.out / "answers")
    table = [["SLM's cache", "of the LLM's", "similarity", "Jaccard", *(f"{m}, {run.task.metric}" for m in methods)]]
    for share in args.slm_budget:
        attention = [f"{rows.mean(kind, slm_budget=share):.3f}" for kind in ("similarity", "jaccard")]
        scores = [scores_of(run, at(text, share), budget) for text in methods]
        table.append([f"{share:.0%}", f"{kept_share(args, slm_budget=share):.1%}", *attention, *scores])
    for text in every[len(methods) * len(args.slm_budget) :]:
        table.append([text, "-", "-", "-", scores_of(run, text, budget), *["-"] * (len(methods) - 1)])
    print_rows(table, title(args, f"a smaller cache of the SLM, LLM at {budget:g}", len(samples)), args.markdown)
    print("similarity: cosine of accumulated scores of matched heads, without the first tokens; Jaccard: of the LLM's "
          "important tokens with those that the SLM names; half of a text prefilled, half step by step")  # fmt: skip
    series = {kind: [(share, rows.mean(kind, slm_budget=share)) for share in args.slm_budget]
              for kind in ("similarity", "jaccard")}  # fmt: skip
    draw(args, args.name, curves(series, "SLM's cache", "with the LLM's attention", "o"))


def table6(args) -> None:
    """An SLM that stops early: similarity of the heads that are left, and the LLM's answers."""
    budget, methods, slm = one_budget(args), with_slm(args), one_slm(args)
    whole = read_config(resolve(slm)).layers
    stops = args.layers or sorted({max(1, round(share * whole)) for share in KEPT_LAYERS}, reverse=True)
    shares = [kept_share(args, layers) for layers in stops]  # for its errors, before anything is run
    rows, rivals = Rows(args), [text for text in args.method if text not in methods]
    table = []
    for number, (layers, share) in enumerate(zip(stops, shares)):
        chosen = methods + rivals * (number == 0)  # a method without an SLM does not change with its layers
        changed = argparse.Namespace(**{**vars(args), "method": chosen})
        run = evaluated(changed, slm, args.out / f"layers-{layers}", ["--slm-layers", str(layers)])
        similarity = mean([line["similarity"] for line in run.lines if "similarity" in line])
        scores = {text: scores_of(run, text, budget) for text in chosen}
        rows.add({"layers": layers, "slm_share": share, "similarity": similarity, "scores": scores})
        table.append([f"{layers} of {whole}", f"{share:.1%}", f"{similarity:.3f}", *(scores[text] for text in methods)])
    for text in rivals:
        table.append([text, "-", "-", rows.rows[0]["scores"][text], *["-"] * (len(methods) - 1)])
    heading = ["SLM's layers", "its cache of the LLM's", "similarity", *(f"{m}, {run.task.metric}" for m in methods)]
    print_rows([heading, *table], title(args, f"an SLM that stops early, LLM at {budget:g}"), args.markdown)
    print("similarity: cosine of matched heads on the window they are matched on")
    points = {"similarity": [(row["layers"], row["similarity"]) for row in rows.rows]}
    draw(args, args.name, curves(points, "layers of the SLM", "similarity of matched heads", "o"))
