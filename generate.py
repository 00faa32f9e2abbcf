"""The command: an LLM answers with its cache compressed by SmallKV, and a report says what was kept where.

    python generate.py
    python generate.py --llm DIR_OR_ID --slm DIR_OR_ID --budget 0.2 "Once upon a time"
    python generate.py --llm DIR_OR_ID --slm DIR_OR_ID --chat --compare --prompt-file question.txt

With no model named it uses the embedded pair, and with no prompt either it shows what the paper's Section 3 calls
saliency shift: four questions about one text, one after the other on one kept cache, each about another fact.

Where it sits: around everything. It loads the pair (checkpoint.py), hands token ids to decode.py, and prints: answers
on standard output, all else on standard error.
"""

import argparse
import json
import os
import select
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text as Words
from tqdm import tqdm

import checkpoint
import command
import parallel
from baselines import BASELINES
from cache import FullCache, Prompt, TieredCache
from checkpoint import CheckpointError
from decode import NotFinite, Policy, Sampler, Session, Timing, check_positions, generate_ids
from kernels import SCORE_BLOCK
from model import Decoder
from report import make_report, print_comparison, print_report, run_line
from smallkv import Settings, SmallKV
from speculative import DraftedFull, RoundSession, speculate_ids
from text import Text, check_same_tokenizer
from tracing import CRITICAL, Trace, Traced, check_size, page, tiers

PAIR = Path(__file__).parent / "pair"  # the embedded pair and the demonstration's text
PROGRESS_FROM = 2048  # prompt tokens from which the prefill shows a bar
ANSWER_TOKENS = 32  # of an answer of the demonstration, at most


# ---- The pair --------------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """A loaded LLM with its text, the SLM where the method needs one, and the ranks over which the LLM is split."""

    llm: Decoder
    slm: Decoder | None
    text: Text
    team: parallel.Team = parallel.Team()


def load_pair(
    llm: str, slm: str | None, device: str = "auto", dtype: str = "auto", slm_layers: int | None = None,
    quantize: str | None = None, team: parallel.Team = parallel.Team(),
) -> Pair:  # fmt: skip
    """Load both models, after checking that they belong together and fit; slm None loads the LLM alone.

    llm, slm: folders or hub ids, also `owner/name@revision`. dtype "auto": the checkpoint's on a GPU, float32 on a CPU,
    where 16-bit arithmetic is slow. slm_layers: the SLM stops after so many layers (appendix A.3, Table 6). quantize
    "int4" rounds the LLM's weights, "int4-both" the SLM's too. CheckpointError names what cannot be used.
    """
    where = team.device or command.device(device)
    if where.index is not None:
        torch.cuda.set_device(where)  # streams and Triton kernels are the current device's
    folders = [checkpoint.resolve(name) for name in (llm, slm) if name]
    texts = [Text.load(folder) for folder in folders]
    if slm:
        check_same_tokenizer(*texts)
    stored = checkpoint.checkpoint_dtype(folders[0])
    kind = checkpoint.DTYPES.get(dtype, stored if where.type == "cuda" else torch.float32)
    top, needed = max(texts[0].tokenizer.get_vocab(with_added_tokens=True).values()), {}
    hows = (None, bool(quantize), team), (slm_layers, quantize == "int4-both", parallel.Team())
    for role, folder, (layers, rounded, ranks) in zip(("LLM", "SLM"), folders, hows):
        config, scheme = checkpoint.read_config(folder, layers), checkpoint.read_scheme(folder, rounded)
        if top >= config.vocab_size:
            lacking = f"but the {role} only {config.vocab_size} embeddings"
            raise CheckpointError(f"{folder}: the tokenizer has id {top}, {lacking}")
        needed[f"{role} weights"] = checkpoint.weight_bytes(config, kind, scheme, ranks)
    checkpoint.check_fits(needed, where)
    models = [checkpoint.load_decoder(folder, where, kind, *how) for folder, how in zip(folders, hows)]
    return Pair(models[0], models[1] if slm else None, texts[0], team)


def make_policy(method: str, pair: Pair, settings: Settings, drafts: int = 0, traced: bool = False) -> Policy:
    """The policy of one --method; a baseline takes the budget from the settings, and the rest means nothing to it.
    traced: SmallKV for a `Trace`."""
    if method == "smallkv":
        return (Traced if traced else SmallKV)(pair.llm, pair.slm, settings, drafts=drafts)
    if method == "full":
        return DraftedFull(pair.llm, pair.slm, drafts) if drafts else Policy(pair.llm)
    return BASELINES[method](pair.llm, settings.budget, settings.budget_tokens)


def check_caches_fit(policy: Policy, lengths: list[int], capacity: int) -> None:
    """CheckpointError if the caches, and what a prefill needs beside them, do not fit; on a GPU the host's share is
    checked against the host. They are made on the meta device, which allocates nothing."""
    device, longest, needed = policy.llm.device, max(lengths), ({}, {})  # by whether it is the host's
    for (name, cache), model in zip(policy.make_caches(lengths, capacity, "meta").items(), policy.models):
        for line in cache.ledger():
            pinned = line.host and device.type == "cuda"  # PyTorch takes such memory in powers of two
            needed[pinned][f"{name} {line.what}"] = 1 << (line.size - 1).bit_length() if pinned else line.size
        if not isinstance(cache, FullCache):  # a prompt is prefilled elsewhere
            staged = Prompt(model.config, longest, "meta", model.dtype, 1.0)
            tensors = staged.key, staged.value, staged.sums[1.0]
            needed[0][f"{name} longest prompt"] = sum(tensor.nbytes for tensor in tensors)
    if device.type == "cpu":  # attention that is summed by columns: logits, their softmax and two copies, fp32
        heads = max(model.config.query_heads for model in policy.models)
        needed[0]["attention of the prefill"] = 4 * heads * min(SCORE_BLOCK, longest) * longest * 4
    checkpoint.check_fits(needed[0], device)
    checkpoint.check_fits(needed[1], torch.device("cpu"))


def answer(
    pair: Pair, policy: Policy, prompts: list[list[int]], max_new_tokens: int, sampler: Sampler,
    show: Callable[[int], None] | None = None, watch: Trace | None = None,
) -> tuple[dict, KeyboardInterrupt | NotFinite | None]:  # fmt: skip
    """Run one method on all prompts (token ids). show(token) is called for every new token that is not a stop token;
    `watch` is given the session after each step.

    Returns "answers" and "report" as JSON types, and what cut the answers short: Ctrl-C, logits that are not finite.
    """
    lengths, drafts, stop = [len(prompt) for prompt in prompts], policy.drafts, set(pair.text.stop)
    check_positions(policy.models, lengths, max_new_tokens)
    check_caches_fit(policy, lengths, max(lengths) + max_new_tokens + drafts)
    quiet = sum(lengths) < PROGRESS_FROM or None  # None: a bar on a terminal
    bar = tqdm(total=sum(lengths), desc="prefill", unit="token", leave=False, disable=quiet)
    timing, cut = Timing(), None
    answers = [{"text": "", "tokens": [], "prompt_tokens": n, "stopped": False} for n in lengths]
    if drafts:
        session = RoundSession(policy, prompts, max_new_tokens, sampler, stop, progress=bar.update)
        steps = speculate_ids(session, max_new_tokens, stop, timing)
    else:
        session = Session(policy, prompts, max_new_tokens, pair.team.chunk, bar.update)
        steps = generate_ids(session, pair.team.sampler(sampler), max_new_tokens, stop, timing)
    try:
        for step in steps:
            bar.close()
            if watch is not None:
                watch.add(session)
            for own, token in ((own, token) for own, new in zip(answers, step) for token in new):
                own["stopped"] = token in stop
                if token not in stop:
                    own["tokens"].append(token)
                    if show:
                        show(token)
    except (KeyboardInterrupt, NotFinite) as reason:
        cut = reason
    bar.close()
    for own in answers:
        own["text"] = pair.text.decode(own["tokens"])
    return {"answers": answers, "report": pair.team.report(make_report(session, timing))}, cut


def share_of(settings: Settings) -> str:
    return f"{settings.budget:.0%}" if settings.budget_tokens is None else f"{settings.budget_tokens} tokens"


def write_trace(args, pair: Pair, settings: Settings, watch: Trace, ids: list[int]) -> dict:
    """The page of --trace, with H2O beside SmallKV if they are compared; its record. ids: of prompt and answer."""
    h2o = make_policy("h2o", pair, settings) if args.compare else None
    record = watch.record(pair.text, ids, f"SmallKV{' --paper' * args.paper}, {share_of(settings)}", h2o)
    command.write_text(args.trace, page(record))
    return record


# ---- The demonstration -----------------------------------------------------------------------------------------------


def ask(
    pair: Pair, policy: Policy, document: dict, watch: Trace | None = None
) -> tuple[list[tuple[str, int, int]], list[int], dict]:
    """All questions of a document (pair/demo.json), one after the other, answered greedily on one kept cache.

    Of each turn the answer, and how many KV heads have most of its fact in their critical tier: when the question
    begins, and at most during the answer. Then the tokens of all that was read and answered, and the report.
    """
    questions = [pair.text.encode(turn["question"]) for turn in document["turns"]]
    room = sum(map(len, questions)) + ANSWER_TOKENS * len(questions)
    read = pair.text.encode(document["text"])
    session, timing, told = Session(policy, [read[:]], room), Timing(), []
    begin = time.perf_counter()
    session.prefill()
    timing.first_token = time.perf_counter() - begin
    for turn, question in zip(document["turns"], questions):
        ids, holding, feed, (first, end) = [], [], list(question), turn["tokens"]
        while feed:
            read.append(feed.pop(0))
            logits, held = session.step(read[-1:]), torch.zeros(1)
            if watch is not None:
                watch.add(session)
            if isinstance(policy.cache, TieredCache):
                fact = tiers(policy.cache, session.capacity)[..., first:end]  # (L, G, tokens of the fact)
                held = (fact == CRITICAL).sum(-1) > (end - first) / 2
            holding.append(int(held.sum()))
            if not feed and len(ids) < ANSWER_TOKENS and "." not in pair.text.decode(ids):
                ids.append(logits.argmax(-1).item())
                feed.append(ids[-1])
        told.append((pair.text.decode(ids).strip(), holding[0], max(holding[len(question) :])))
    timing.steps = session.steps
    timing.per_token = (time.perf_counter() - begin - timing.first_token) / timing.steps
    return told, read, make_report(session, timing)


def demonstrate(pair: Pair, settings: Settings, args, console: Console) -> None:
    """Full cache, SmallKV, the paper's setting of it and the newest tokens alone: answers side by side on standard
    output, report on `console`, and the page of --trace."""
    document = json.loads((PAIR / "demo.json").read_text(encoding="utf-8"))
    turns, heads = document["turns"], pair.llm.config.layers * pair.llm.config.kv_heads
    budget = {"budget": settings.budget, "budget_tokens": settings.budget_tokens, "offload": settings.offload}
    share, paper = share_of(settings), Settings.paper(**budget)
    runs = {
        "full cache": ("full", settings),
        f"SmallKV, {share}": ("smallkv", settings),
        "the paper's setting": ("smallkv", paper),
        f"the newest {share} alone": ("window", settings),
    }
    if settings == paper:
        del runs[f"SmallKV, {share}"]
    told, reports = [], {}
    for name, (method, own) in runs.items():
        traced = args.trace is not None and method == "smallkv" and not reports  # the first of them
        policy = make_policy(method, pair, own, traced=traced)
        watch = Trace(policy) if traced else None
        answers, read, report = ask(pair, policy, document, watch)
        told.append(answers)
        if method == "smallkv":
            reports[name] = report
        if traced:
            write_trace(args, pair, settings, watch, read)
    right = [[text == turn["answer"] for turn, (text, _, _) in zip(turns, answers)] for answers in told]
    columns = [f"{name}: {sum(found)} right" for name, found in zip(runs, right)]
    title = f"a text of {report['prompt']['tokens']} tokens, then {len(turns)} questions one after the other"
    table = Table("question, fact", *columns, title=title, show_lines=True)
    for i, turn in enumerate(turns):
        question = turn["question"].strip().removesuffix("\nAnswer:").removeprefix("Question: ")
        cells = []
        for name, own, found in zip(runs, told, right):
            text, before, during = own[i]
            held = f"\n{before} -> {during} of {heads} KV heads hold the fact" if name in reports else ""
            cells.append(Words.assemble((text, "green" if found[i] else "red"), (held, "dim")))
        table.add_row(Words.assemble(question, (f"\n{turn['fact']}", "dim")), *cells)
    Console().print(table)
    for name, report in reports.items():
        print_report(name, report, console)


# ---- The command -----------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        description="An LLM answers with its cache compressed by SmallKV; a report follows. [Defaults in brackets.]",
        usage="%(prog)s [--llm NAME --slm NAME] [flags] [prompt ...]",
        formatter_class=partial(argparse.HelpFormatter, max_help_position=30),
    )  # fmt: skip
    add = parser.add_argument_group("models").add_argument
    add("--llm", metavar="NAME", help="folder or hub id (@revision too) of the large model [the embedded]")
    add("--slm", metavar="NAME", help="the same of the small model, of the same series")
    add("--slm-layers", type=command.whole(1), metavar="N", help="load and run the SLM's first N layers alone")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1 [auto]")
    dtypes, methods, ways = ["auto", *checkpoint.DTYPES], ["smallkv", "full", *BASELINES], ["int4", "int4-both"]
    text = ", ".join(dtypes[1:]) + " [auto: as stored, on a CPU float32]"
    add("--dtype", default="auto", choices=dtypes, metavar="NAME", help=text)
    add("--quantize", choices=ways, metavar="NAME", help="round weights to INT4: the LLM's (int4), or both (int4-both)")
    add = parser.add_argument_group("method").add_argument
    add("--method", default="smallkv", choices=methods, metavar="NAME", help=", ".join(methods) + " [smallkv]")
    add("--compare", action="store_true", help="answer with the full cache too, side by side")
    add("--paper", action="store_true", help="the paper's: marginal, scores slm, score decay 1, jaccard, reach inf")
    command.add_fields(add, Settings)
    add = parser.add_argument_group("prompts").add_argument
    add("prompt", nargs="*", help="with none, and no file, standard input is read")
    add("--prompt-file", action="append", default=[], metavar="FILE", help="a file that is one prompt")
    add("--chat", action="store_true", help="put each prompt into the checkpoint's chat template")
    add = parser.add_argument_group("decoding").add_argument
    count, positive = command.whole(0), command.whole(1)
    for flag, kind, metavar, default, text in (
        ("--max-new-tokens", positive, "N", 256, "of each answer, at most"),
        ("--temperature", command.number(0), "X", 0.0, "0 is greedy"),
        ("--top-p", command.number(0, 1, above=True), "X", 1.0, "draw from the likely tokens of this mass"),
        ("--top-k", count, "N", 0, "draw from the N most likely tokens; 0: from all"),
        ("--seed", command.seed, "N", 0, "of the draws"),
        ("--speculate", count, "K", 0, "the SLM drafts K tokens a step; --compare: without, too"),
    ):
        add(flag, type=kind, default=default, metavar=metavar, help=f"{text} [{default}]")
    add("--json", metavar="FILE", help="write answers and report for machines")
    add("--trace", metavar="FILE", help="write a page of every token's tier by step; --compare: H2O's too")
    return parser


def make_settings(args) -> Settings:
    """The method's settings from the flags; --paper gives the paper's, and what is typed beside it still counts."""
    asked = command.typed(args, Settings)
    if args.speculate or args.saliency_shift is False:
        asked = {"scores": "slm", **asked}  # these cannot have fused ones
    return Settings.paper(**asked) if args.paper else Settings(**asked)


def check_arguments(args) -> None:
    """ValueError names flags that do not go together, before anything is loaded."""
    drafts, layers, two = args.speculate, args.slm_layers, args.method in ("full", "smallkv")
    for wrong, message in (
        (args.slm and not args.llm, "--slm is given without --llm: name both models, or none for the embedded pair"),
        (args.compare and not two, f"--compare sets SmallKV beside the full cache; leave --method {args.method} out"),
        (drafts and not two, f"--speculate works with --method full and smallkv, not {args.method}"),
        (drafts and layers is not None, f"--speculate needs the SLM's words, and --slm-layers {layers} stops before "
         "them; leave one of the two out"),
        (args.trace is not None and args.method != "smallkv", "--trace shows the tiers of SmallKV, and --method "
         f"{args.method} has none; leave one of the two out"),
        (args.trace is not None and drafts, f"--trace shows steps of one token; leave --speculate {drafts} out"),
        (args.trace is not None and args.max_new_tokens < 2, "--trace shows decode steps, and the first token takes "
         "none; --max-new-tokens 2 at least"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)


def read_prompts(args) -> list[str]:
    """Prompts from the arguments, from files (one prompt a file), or from standard input (one prompt).

    No prompts if no model is named and nothing was piped in: a terminal, an empty file, a pipe in which nothing is yet.
    """
    prompts, stdin = [], sys.stdin
    for place, prompt in enumerate(args.prompt, 1):
        prompts.append(command.decoded(os.fsencode(prompt), f"prompt {place}"))
    prompts += [command.read_text(name, command.MOST_BYTES) for name in args.prompt_file]
    if not prompts:
        silent = stdin is None or stdin.closed or stdin.isatty()
        if args.llm is None and (silent or not select.select([stdin], [], [], 0.2)[0] or not stdin.buffer.peek(1)):
            return []
        if silent:
            raise ValueError("no prompt: give one as an argument, with --prompt-file, or on standard input")
        content = stdin.buffer.read(command.MOST_BYTES + 1)
        if len(content) > command.MOST_BYTES:
            raise ValueError(f"standard input is larger than {command.MOST_BYTES} bytes; give a shorter text")
        prompts.append(command.decoded(content, "standard input"))
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise ValueError(f"prompt {number} is empty: there is nothing to continue")
    return prompts


def run(args) -> int:
    settings, sampler = make_settings(args), Sampler(args.temperature, args.top_k, args.top_p, args.seed)
    check_arguments(args)
    team, console = parallel.start(args.device), Console(stderr=True)
    settings = team.settings(settings)
    texts = team.from_first(read_prompts, args)
    if not texts and (team.size > 1 or args.method != "smallkv" or args.chat or args.json or args.speculate):
        raise ValueError("no prompt, and the demonstration takes one process and SmallKV's flags alone; give a prompt")
    if args.llm is None:
        args.llm, args.slm = str(PAIR / "llm"), str(PAIR / "slm")
    for path in (args.json, args.trace):
        if path is not None and team.rank == 0:
            command.check_writable(path)
    slm = args.slm if args.method == "smallkv" or args.compare or args.speculate else ""
    if slm is None:
        raise ValueError("--slm is missing: SmallKV needs a small model of the same series (or use --method full)")
    team.check_method(args.method, speculate=args.speculate, quantize=args.quantize, trace=args.trace)
    if not texts:
        torch.set_num_threads(1)  # models this small: threads that wait for one another cost more than they bring
    pair = load_pair(args.llm, slm, args.device, args.dtype, args.slm_layers, args.quantize, team)
    for text in texts:
        pair.text.check_length(text, pair.llm.config.max_positions)
    prompts = [pair.text.chat(text) if args.chat else pair.text.encode(text) for text in texts]
    if not all(prompts):
        raise ValueError("a prompt is empty once tokenised: there is nothing to continue")
    if args.trace is not None and texts:
        if len(prompts) > 1:
            raise ValueError(f"--trace shows one answer, and {len(prompts)} prompts were given; give one")
        check_size(pair.llm, len(prompts[0]) + args.max_new_tokens, args.max_new_tokens - 1)
    drafts = min(args.speculate, max(1, args.max_new_tokens - 2))  # more of them could not count
    runs = {args.method: (args.method, drafts)}  # what is shown -> method, drafts
    if args.compare and drafts:
        runs = {args.method: (args.method, 0), f"{args.method}, {drafts} drafts": runs[args.method]}
    elif args.compare and texts:
        runs = {"full": ("full", 0), "smallkv": ("smallkv", 0)}
    results, cut, watch = {}, None, None
    for name, (method, drafts) in runs.items():
        traced = args.trace is not None and method == "smallkv"
        policy = make_policy(method, pair, settings, drafts, traced)
        watch = Trace(policy) if traced else None
        console.print(run_line(pair.llm, policy), style="dim", highlight=False, soft_wrap=True)
        if not texts:
            demonstrate(pair, settings, args, console)
            return 0
        stream = pair.text.stream()
        live = len(prompts) == 1 and not args.compare  # several answers at once cannot be streamed into one column
        show = (lambda token: print(stream.push(token), end="", flush=True)) if live else None
        results[name], cut = answer(pair, policy, prompts, args.max_new_tokens, sampler, show, watch)
        if live:
            print(stream.finish())
        if cut is not None:
            break
    if len(results) == 2:
        print_comparison(pair.text, results, Console())
    elif not live:
        for number, own in enumerate(results[name]["answers"], 1):
            print(f"--- answer {number}\n{own['text']}")
    for name, result in results.items():
        print_report(name, result["report"], console)
    if watch is not None and watch.states:
        ids = prompts[0] + results["smallkv"]["answers"][0]["tokens"]
        results["smallkv"]["trace"] = write_trace(args, pair, settings, watch, ids)
    elif watch is not None:
        console.print(f"no step was taken, so there is nothing in {args.trace}", style="yellow")
    if args.json and team.rank == 0:
        command.write_json(args.json, results)
    if isinstance(cut, NotFinite):
        raise cut
    if cut is not None:
        console.print("interrupted: the answer above is what was there by then", style="yellow")
    return 130 if cut is not None else 0


def main(argv: list[str] | None = None) -> int:
    return command.ended(lambda: run(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(parallel.run(main))
