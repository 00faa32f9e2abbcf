"""The paper's experiments, each as one command that runs on any pair.

    python experiments.py list
    python experiments.py fig1b                                       # on the embedded pair
    python experiments.py fig6 --task wikitext --data hub --llm models/smollm2 --slm models/smollm2-assistant --limit 4
    python experiments.py fig7 --slm pair/slm pair/llm --batch 10     # flags of evaluate.py's task go through

Where it sits: above everything. A command says what the paper ran and prints the command for the paper's own pair, then
measures here what studies.py or slm_costs.py does (`--about`: only the first two). The folder --out gets rows.jsonl and
experiment.json (or evaluate.py's results.jsonl and run.json) and the pictures. Figures in the texts below are the
paper's.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import slm_costs
import studies
from benchmarks import TASKS
from checkpoint import CheckpointError
from generate import PAIR

BUDGETS = [0.5, 0.3, 0.2, 0.1, 0.05]
OURS, BOTH_OFF = "smallkv-paper", "smallkv-paper:marginal=no,saliency_shift=no"
RIVALS = ["full", "h2o", "pyramidinfer", OURS, "smallkv"]
FRONTIER = [
    "oracle", "h2o", "smallkv", *(f"smallkv:score_decay={decay}" for decay in (0.25, 0.75, 0.9)), OURS,
    *(f"smallkv:scores=slm,score_decay={decay}" for decay in (0, 0.25, 0.5, 0.75, 0.9, 1)),
    "smallkv:matcher=jaccard", "smallkv:marginal=no",
]  # fmt: skip
ABLATION = ["full", OURS, f"{OURS}:marginal=no", f"{OURS}:saliency_shift=no", BOTH_OFF]
SEVEN = "--llm Qwen/Qwen2-7B-Instruct --slm Qwen/Qwen2-0.5B-Instruct"
FOURTEEN = "--llm Qwen/Qwen2.5-14B-Instruct --slm Qwen/Qwen2.5-0.5B-Instruct"
LLAMA = "--llm meta-llama/Llama-3.1-8B-Instruct --slm meta-llama/Llama-3.2-1B-Instruct"
LONGBENCH = ("narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique qmsum multi_news gov_report triviaqa trec "
             "samsum lcc repobench-p")  # fmt: skip
NO_72B = ("Not run here: Qwen2-72B with Qwen2-7B; with the checkpoint at hand: the same command with "
          "--llm Qwen/Qwen2-72B-Instruct-GPTQ-Int4 --slm Qwen/Qwen2-7B-Instruct.")  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """ran: what the paper did. commands: the same here, on its own pair. limits: what cannot be had, in one line each.

    own: flags beside the common ones, {flag: options of add_argument}. several: more than one --slm makes sense.
    """

    ran: str
    commands: tuple[str, ...]
    run: Callable
    samples: int = 2  # --limit, where none is given
    limits: tuple[str, ...] = ()
    own: tuple[tuple[str, dict], ...] = ()
    several: bool = False


TOKENS = ("--tokens", {"type": int, "default": 512, "help": "of a text at most (default: 512)"})


def budget_flag(default: list[float]) -> tuple[str, dict]:
    shown = " ".join(map(str, default))
    return "--budget", {"nargs": "+", "type": float, "default": default, "help": f"shares (default: {shown})"}


def method_flag(default: list[str]) -> tuple[str, dict]:
    return "--method", {"nargs": "+", "default": default, "help": f"as in evaluate.py (default: {' '.join(default)})"}


def quality(task: str, models: str, name: str, slms: str = "") -> str:
    """The command that runs one of ours on a pair of the paper."""
    out = f"runs/{name}-{task}"
    return f"python experiments.py {name} --task {task} --data hub {models}{slms} --limit 1000000 --out {out}"


def on_wikitext(name: str, models: str = SEVEN) -> str:
    return f"python experiments.py {name} --task wikitext --data hub --limit 200 {models}"


def on_three(models: str) -> str:
    return f"for task in gsm8k bbh mtbench; do {quality('$task', models, 'fig5')}; done"


EXPERIMENTS = {
    "fig1b": Experiment(
        "Qwen2-7B on wikitext-2: a cache that is compressed twice, dropping for real, against the global view of an "
        "uncompressed one, at each budget. Jaccard of the important tokens fell from 0.77 to 0.55.",
        (on_wikitext("fig1b"),), studies.fig1b, own=(TOKENS, budget_flag(BUDGETS)),
    ),
    "fig1c": Experiment(
        "Accumulated attention of one head of Qwen2-7B and of its match in Qwen2-0.5B by token, wikitext-2; the mean "
        "cosine over all matched heads was 0.947.",
        (on_wikitext("fig1c"),), studies.fig1c, own=(TOKENS,),
    ),
    "fig1d": Experiment(
        "Six downstream tasks (not named in the text) at 10 %: Qwen2-7B with saliency-shift compensation by "
        "Qwen2-0.5B against none, no marginal tier in either.",
        tuple(quality(task, SEVEN, "fig1d") for task in ("bbh", "gsm8k", "longbench")), studies.compare_quality,
        samples=20, own=(method_flag(["full", f"{OURS}:marginal=no", BOTH_OFF]), budget_flag([0.1])),
    ),
    "fig2": Experiment(
        "Qwen2.5-14B on BBH: tokens ranked by attention accumulated over all heads. The top 5 % had 7 times what 5-10 "
        "% had, these 1.34 times what 10-15 % had; yet H2O without the 5-15 % band fell from 0.482 to 0.148.",
        (quality("bbh", FOURTEEN, "fig2"),), studies.fig2, samples=10,
        own=(TOKENS, method_flag(["full", "h2o", "oracle"]), budget_flag([0.15, 0.05])),
    ),
    "table1": Experiment(
        "LongBench at budgets 0.3, 0.1 and 0.05: SmallKV, H2O and PyramidInfer beside the full cache, 14 of its sets.",
        (f"{quality('longbench', SEVEN, 'table1')} --chat --subtask {LONGBENCH}",), studies.compare_quality, samples=20,
        own=(method_flag(RIVALS), budget_flag([0.3, 0.1, 0.05])),
    ),
    "fig5": Experiment(
        "GSM8K, BBH and MT-Bench, four pairs, budgets from 100 % to 5 %: SmallKV, H2O, PyramidInfer, full cache.",
        tuple(on_three(models) for models in (SEVEN, FOURTEEN, LLAMA)), studies.compare_quality, samples=20,
        limits=(NO_72B,), own=(method_flag(RIVALS), budget_flag(BUDGETS)),
    ),
    "frontier": Experiment(
        "Nothing: it is beyond the paper. Quality against the bytes that the offloaded tier gives a step, for every "
        "choice that trades one for the other: score memory, fused scores, matcher, marginal tier.",
        (on_wikitext("frontier"),), studies.frontier, samples=8, own=(method_flag(FRONTIER), budget_flag([0.2, 0.1])),
    ),
    "fig6": Experiment(
        "The ablation on BBH, Qwen2-7B with Qwen2-0.5B: SmallKV, without the marginal tier, without both. The command "
        "adds the fourth, without saliency shift alone.",
        (quality("bbh", SEVEN, "fig6"),), studies.compare_quality, samples=20,
        own=(method_flag(ABLATION), budget_flag(BUDGETS)),
    ),
    "fig7": Experiment(
        "Qwen2.5-14B on BBH with an SLM of 0.5B, 1.5B, 3B and 7B: larger ones gave 4.9, 6.8 and 8.5 % more on average.",
        (quality("bbh", FOURTEEN, "fig7", "".join(f" Qwen/Qwen2.5-{size}B-Instruct" for size in ("1.5", "3", "7"))),),
        studies.fig7, samples=20, several=True, own=(method_flag([OURS]), budget_flag(BUDGETS)),
    ),
    "table5": Experiment(
        "A.3: the SLM's own cache at 20, 40, 60, 80 and 100 %, Qwen2-7B at 20 % with Qwen2-0.5B on BBH: 0.287, 0.442, "
        "0.462, 0.464 and 0.436; H2O at 30 %, the bytes of both caches at 40 %: 0.38.",
        (quality("bbh", SEVEN, "table5"),), slm_costs.table5, samples=20,
        own=(TOKENS, method_flag(["smallkv"]), budget_flag([0.2]),
             ("--slm-budget", {"nargs": "+", "type": float, "default": [1.0, 0.8, 0.6, 0.4, 0.2],
                               "help": "shares of the SLM's own cache (default: 1 0.8 0.6 0.4 0.2)"})),
    ),
    "table6": Experiment(
        "A.3: the SLM stops after 24 (all), 20, 18, 16 and 12 layers, Qwen2-7B at 20 % with Qwen2-0.5B on BBH: 0.436, "
        "0.436, 0.390, 0.359 and 0.335; H2O at 20 %: 0.318.",
        (f"{quality('bbh', SEVEN, 'table6')} --method smallkv-paper h2o --layers 24 20 18 16 12",), slm_costs.table6,
        samples=20,
        own=(method_flag(["smallkv", "h2o"]), budget_flag([0.2]),
             ("--layers", {"nargs": "+", "type": int, "help": "of the SLM (default: 1, 5/6, 2/3, 1/2, 1/3 of them)"})),
    ),
    "table7": Experiment(
        "Similarity of matched heads, the first tokens left out, of 6 pairs on BBH, GSM8K and MMLU: 0.83 to 0.98.",
        tuple(f"python experiments.py table7 --data hub --task {task} {SEVEN}" for task in ("bbh", "gsm8k"))
        + (f"python experiments.py table7 --data hub --task bbh {FOURTEEN} Qwen/Qwen2.5-1.5B-Instruct",
           "python experiments.py table7 --data hub --task bbh --llm Qwen/Qwen3-8B --slm Qwen/Qwen3-0.6B"),
        studies.similarities, several=True, own=(TOKENS,), limits=("Not here: MMLU, which is no task of evaluate.py.",),
    ),
    "table8": Experiment(
        "The same for larger SLMs, for LLaMA and across series, all on BBH: 0.81 to 0.98, across series 0.56.",
        (f"python experiments.py table8 --data hub --task bbh {FOURTEEN} Qwen/Qwen2.5-3B-Instruct "
         "Qwen/Qwen2.5-7B-Instruct", f"python experiments.py table8 --data hub --task bbh {LLAMA}"),
        studies.similarities, several=True, own=(TOKENS,),
        limits=(NO_72B, "Not here: LLaMA with Qwen, whose tokenizers differ, so that tokens do not correspond."),
    ),
    "table9": Experiment(
        "Similarity over the turns of a dialogue, heads matched once: from 0.822 down to 0.782 by turn 5.",
        (f"python experiments.py table9 --task mtbench --data hub {SEVEN} --limit 80",), studies.table9,
    ),
    "fig8": Experiment(
        "Similarity of every head of Qwen2-7B to its match in Qwen2-0.5B on 200 contexts of wikitext-2, a heatmap: "
        "78.22 % above 0.9, 96.21 % above 0.8, 0.02 % below 0.5.",
        (on_wikitext("fig8"),), studies.heatmap, own=(TOKENS,),
    ),
    "fig9": Experiment(
        "Accumulated attention of each token across all heads, wikitext-2: cosine of Qwen2-7B with Qwen2-0.5B 0.9622, "
        "with Llama3-1B 0.6917.",
        (on_wikitext("fig9"),), studies.fig9, several=True, own=(TOKENS,),
        limits=("Not here: LLaMA with Qwen, whose tokenizers differ, so that tokens do not correspond.",),
    ),
    "fig10": Experiment(
        "One BBH prompt (sorting words), Qwen2-7B at 10 %: what full cache, H2O, PyramidInfer and SmallKV say.",
        (f"python experiments.py fig10 --task bbh --data hub --subtask word_sorting {SEVEN}",), studies.case_study,
        samples=1, own=(method_flag(RIVALS), budget_flag([0.1]),
             ("--sample", {"type": int, "default": 0, "help": "which of the samples (default: 0)"})),
    ),
}  # fmt: skip


def print_list() -> None:
    table = Table("command", "what the paper ran", show_lines=True)
    for name, experiment in EXPERIMENTS.items():
        table.add_row(name, experiment.ran)
    Console().print(table, markup=False)
    print("Table 2 is bench.py, Tables 3 and 4 are bench.py overhead.")


def add_common(parser: argparse.ArgumentParser, name: str, experiment: Experiment) -> None:
    count = "one or more, " * experiment.several
    parser.add_argument("--about", action="store_true", help="what the paper ran and by which command; run nothing")
    parser.add_argument("--llm", default=str(PAIR / "llm"), help="folder or hub id (default: pair/llm)")
    parser.add_argument("--slm", nargs="+", default=[str(PAIR / "slm")], help=f"{count}(default: pair/slm)")
    parser.add_argument("--task", choices=list(TASKS), default="recall", help="whose samples (default: recall)")
    limit = experiment.samples
    parser.add_argument("--limit", type=int, default=limit, help=f"samples, of each sub-task (default: {limit})")
    parser.add_argument("--seed", type=int, default=0, help="another choice of samples")
    parser.add_argument("--data", help="as in evaluate.py")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument("--dtype", default="auto", help="as in evaluate.py (default: auto)")
    parser.add_argument("--out", type=Path, default=Path("runs") / name, help=f"folder (default: runs/{name})")
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    for flag, options in experiment.own:
        parser.add_argument(flag, **options)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="name", required=True, metavar="EXPERIMENT")
    commands.add_parser("list", help="what there is")
    for name, experiment in EXPERIMENTS.items():
        short = experiment.ran.split(":")[0].replace("%", "%%")  # argparse formats a help, and no description
        own = commands.add_parser(name, help=short, description=experiment.ran, allow_abbrev=False,
                                  epilog="Other flags go to the task: evaluate.py TASK --help.")  # fmt: skip
        add_common(own, name, experiment)
    args, args.rest = parser.parse_known_args(argv)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.name == "list":
        print_list()
        return 0
    experiment = EXPERIMENTS[args.name]
    print(f"{args.name}. {experiment.ran}", *(f"  $ {command}" for command in experiment.commands), sep="\n")
    print(*experiment.limits, sep="\n", end="\n" * bool(experiment.limits))
    if args.about:
        return 0
    try:
        if args.limit < 1:
            raise ValueError(f"--limit {args.limit} should be at least 1")
        experiment.run(args)
    except (CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write to {args.out}: {error.strerror}; give another --out", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory, lower --batch or --tokens: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
