"""The command: an LLM answers with its cache compressed by SmallKV, and a report says what was kept where.

    python generate.py
    python generate.py --llm DIR_OR_ID --slm DIR_OR_ID --budget 0.2 "Once upon a time"
    python generate.py --llm DIR_OR_ID --slm DIR_OR_ID --chat --compare --prompt-file question.txt

With no model named it uses the embedded pair, and with no prompt either it shows what SmallKV is for (demo.py).

Where it sits: on top of everything. It reads the arguments, loads the pair (checkpoint.py, text.py), hands the prompts
to decode.py, and prints: the answer on standard output, all else on standard error.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from tqdm import tqdm

import demo
import parallel
from arguments import add_arguments, check_speculation, input_waits, make_settings, read_prompts
from backend import TORCH, Backend, pick_backend, pick_device
from baselines import BASELINES
from checkpoint import (
    DTYPES,
    CheckpointError,
    check_fits,
    checkpoint_dtype,
    load_decoder,
    read_config,
    read_scheme,
    resolve,
    weight_bytes,
)
from decode import PREFILL_CHUNK, FullPolicy, Sampler, Session, Timing, check_positions, generate_ids
from evicting import Budget
from graph import StaticSession
from graph_speculative import StaticSpeculativeSession
from host_memory import kind_of_host
from int8_rows import AT_ONCE
from kernels import SCORE_BLOCK
from model import Decoder
from overhead import cache_bytes
from quantize import int4_modules
from report import make_report, print_comparison, print_report
from settings import Settings
from smallkv import SmallKV, pool_slots
from speculative import SpeculativeFull, SpeculativeSession, SpeculativeSmallKV, speculate_ids
from text import Text, check_same_tokenizer

PROGRESS_FROM = 2048  # prompt tokens from which the prefill shows a bar


@dataclass
class Pair:
    """A loaded LLM with its text, and the SLM where the method needs one."""

    llm: Decoder
    slm: Decoder | None
    text: Text
    team: parallel.Team = parallel.Team()  # the ranks over which the LLM is split; here alone


@dataclass
class Answer:
    """One method's answers to all prompts: token ids without stop tokens, and whether each met a stop token."""

    tokens: list[list[int]]
    stopped: list[bool]
    report: dict


def load_pair(
    llm: str, slm: str | None, device: str = "auto", dtype: str = "auto", revision: str | None = None,
    slm_revision: str | None = None, slm_layers: int | None = None, team: parallel.Team = parallel.Team(),
    quantize: str | None = None, slm_quantize: str | None = None,
) -> Pair:  # fmt: skip
    """Load both models of a pair, after checking that they belong together and fit. slm None loads the LLM alone.

    slm_layers: the SLM stops after so many layers (appendix A.3, Table 6), the others are not loaded.
    quantize, slm_quantize "int4": the weights are rounded to INT4 (quantize.py; GPTQ and AWQ checkpoints need no word).
    dtype "auto" is the checkpoint's on a GPU, float32 on a CPU, where 16-bit arithmetic is slow.
    """
    where = team.device or pick_device(device)
    names = [(llm, revision)] + ([(slm, slm_revision)] if slm else [])
    folders = [resolve(name, wanted) for name, wanted in names]
    texts = [Text.load(folder) for folder in folders]
    if slm:
        check_same_tokenizer(*texts)
    kind = DTYPES.get(dtype) or (checkpoint_dtype(folders[0]) if where.type == "cuda" else torch.float32)
    stops = [None, slm_layers]  # after which layer each model ends
    configs = [read_config(folder, stop) for folder, stop in zip(folders, stops)]
    top = max(texts[0].tokenizer.get_vocab(with_added_tokens=True).values())
    for role, folder, config in zip(("LLM", "SLM"), folders, configs):
        if top >= config.vocab_size:
            size = config.vocab_size
            raise CheckpointError(f"{folder}: the tokenizer has id {top}, but the {role} only {size} embeddings")
    teams, rounded = [team, parallel.Team()], [quantize, slm_quantize]  # the LLM is split, the SLM copied
    sizes = [weight_bytes(config, kind, read_scheme(folder, q), each)
             for each, folder, config, q in zip(teams, folders, configs, rounded)]  # fmt: skip
    check_fits(dict(zip(("LLM weights", "SLM weights"), sizes)), where)
    decoders = [load_decoder(folder, where, kind, stop, q, each)
                for folder, stop, q, each in zip(folders, stops, rounded, teams)]  # fmt: skip
    return Pair(decoders[0], decoders[1] if slm else None, texts[0], team)


def check_caches_fit(policy, lengths: list[int], capacity: int, backend: Backend = TORCH) -> None:
    """The caches, as the prefill and the steps of this backend hold them, before they are allocated; on a GPU the
    host's share is checked against the host."""
    device = policy.llm.device
    plans, static = [policy.predict(lengths, capacity)], has_static_step(policy, backend)
    if static and type(policy) is SmallKV:
        plans.append(policy.predict(lengths, capacity, static=True))  # what differs takes the place of the prefill's
    on_device, on_host = {}, {}
    for model, entry in ((model, entry) for plan in plans for model, ledger in plan.items() for entry in ledger):
        where, name = on_device if entry.device == device.type else on_host, f"{model} {entry.what}"
        where[name] = max(where.get(name, 0), entry.size)
    prompt = one = cache_bytes(policy.llm.config, max(lengths), 1, policy.llm.dtype.itemsize)
    if device.type == "cuda" and isinstance(policy, SmallKV):  # one is on its way to the host, the next is being made
        prompt *= min(2, len(lengths))
    if isinstance(policy, SmallKV):
        # The piece that is put side by side: some layers, or one (int8_rows.prompt_rows).
        prompt += min(one, max(2 * AT_ONCE * policy.llm.dtype.itemsize, one // policy.llm.config.layers))
        prompt += rounding_bytes(policy, lengths, capacity, plain=not static)
    scored = max(model.config.query_heads for model in policy.models) * SCORE_BLOCK * max(lengths) * 4
    on_device["prefill of the longest prompt"] = prompt + 4 * scored  # logits, their softmax, and copies of both
    if device.type == "cpu":
        check_fits({**on_device, **on_host}, device)
    else:
        check_fits(on_device, device)
        check_fits(on_host, torch.device("cpu"))


def rounding_bytes(policy: SmallKV, lengths: list[int], capacity: int, plain: bool) -> int:
    """What K and V in 8 bits need beside their caches: the SLM's prompts exact until they are rounded, numbers in fp32
    while they are, and in plain steps what the levels of one layer stand for, one of K and V in fp32 too."""
    settings, slm, staged = policy.settings, policy.slm, 0
    if settings.slm_int8:
        together = min(policy.at_once, len(lengths)) if max(lengths) <= PREFILL_CHUNK else 1
        staged = cache_bytes(slm.config, max(lengths), together, slm.dtype.itemsize)
    tokens = pool_slots(settings, min(lengths), capacity)[1] * settings.llm_int8, capacity * settings.slm_int8
    layers = [len(lengths) * model.config.kv_heads * model.config.head_dim * count * (2 * model.dtype.itemsize + 4)
              for model, count in zip((policy.llm, slm), tokens)]  # fmt: skip
    rounding = 2 * 4 * AT_ONCE * (settings.slm_int8 or settings.llm_int8)
    return staged + max(rounding, *layers if plain else (0,))


def make_session(
    pair: Pair, policy, prompts: list[list[int]], new: int, backend: Backend, progress=None
) -> Session:  # fmt: skip
    """With static steps or rounds, one CUDA graph each, where the backend is Triton and the policy has them; else the
    plain ones."""
    static = has_static_step(policy, backend)
    if drafts_of(policy):
        kind = partial(StaticSpeculativeSession, backend) if static else SpeculativeSession
        return kind(pair.llm, policy, prompts, new, progress=progress)
    if static:
        return StaticSession(backend, pair.llm, policy, prompts, new, progress=progress)
    return Session(pair.llm, policy, prompts, new, progress=progress)


def has_static_step(policy, backend: Backend) -> bool:
    """Whether steps are static ones, which are for Triton. graph.py and graph_speculative.py know the full cache and
    SmallKV where `Settings.static`; their kernels three head dims. Rounds of drafts need the whole cache of the SLM
    besides."""
    known = type(policy) in (FullPolicy, SpeculativeFull)
    if type(policy) in (SmallKV, SpeculativeSmallKV):
        known = policy.settings.static and (type(policy) is SmallKV or policy.settings.slm_budget == 1)
    return backend.name == "triton" and known and all(model.config.head_dim in (32, 64, 128) for model in policy.models)


def drafts_of(policy) -> int:
    """How many tokens the SLM drafts a round; 0: none."""
    return policy.drafts if isinstance(policy, (SpeculativeFull, SpeculativeSmallKV)) else 0


def answer(
    pair: Pair, policy, prompts: list[list[int]], max_new_tokens: int, sampler: Sampler, show=None,
    backend: Backend = TORCH,
) -> tuple[Answer, bool]:  # fmt: skip
    """Run one method on all prompts. show(b, token) is called for every new token that is not a stop token.

    Returns the answers and whether Ctrl-C cut them short: then they are what was there by that time.
    """
    lengths = [len(prompt) for prompt in prompts]
    check_positions(policy, lengths, max_new_tokens)
    check_caches_fit(policy, lengths, max(lengths) + max_new_tokens + drafts_of(policy), backend)
    total = sum(lengths)
    bar = tqdm(total=total, desc="prefill", unit="token", leave=False, disable=None if total >= PROGRESS_FROM else True)
    session = make_session(pair, policy, prompts, max_new_tokens, backend, bar.update)
    timing = Timing()
    tokens: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    interrupted = False
    try:
        make_ids = speculate_ids if drafts_of(policy) else generate_ids
        for step in make_ids(session, pair.team.sampler(sampler), max_new_tokens, set(pair.text.stop), timing):
            bar.close()
            for b, token in flat(step):
                if token in pair.text.stop:
                    stopped[b] = True
                    continue
                tokens[b].append(token)
                if show:
                    show(b, token)
    except KeyboardInterrupt:
        interrupted = True
    bar.close()
    return Answer(tokens, stopped, pair.team.report(make_report(session, timing))), interrupted


def flat(step: list) -> list[tuple[int, int]]:
    """(sequence, token) of every new token of a step, which has one or none a sequence, or of a round: a list each."""
    rows = [new if isinstance(new, list) else [new] for new in step]
    return [(b, token) for b, row in enumerate(rows) for token in row if token is not None]


def run_demo(args, settings: Settings) -> int:
    if args.method != "smallkv" or args.chat or args.json or args.backend == "triton" or args.speculate:
        raise ValueError("the demonstration takes the flags of SmallKV alone; give a prompt to use others")
    torch.set_num_threads(1)  # models this small: threads that wait for one another cost more than they bring
    pair = load_pair(args.llm, args.slm, args.device, args.dtype, slm_layers=args.slm_layers, quantize=args.quantize,
                     slm_quantize=args.slm_quantize)  # fmt: skip
    console = Console(stderr=True)
    line = backend_line(pair, SmallKV(pair.llm, pair.slm, settings), TORCH)  # it takes plain steps everywhere
    console.print(line, style="dim", highlight=False, soft_wrap=True)
    demo.show(pair, settings, console)
    return 0


def run(args) -> int:
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} is too small; at least 1")
    settings = make_settings(args)
    sampler = Sampler(args.temperature, args.top_k, args.top_p, args.seed)
    team = parallel.start(args.device)
    if args.llm is None:
        if args.slm:
            raise ValueError("--slm is given without --llm: name both models, or none for the embedded pair")
        args.llm, args.slm = str(demo.PAIR / "llm"), str(demo.PAIR / "slm")
        if not args.prompt and not args.prompt_file and team.size == 1 and not input_waits():
            return run_demo(args, settings)
    texts = team.from_first(read_prompts, args)
    if args.json and team.rank == 0:
        check_writable(Path(args.json))  # before the work, not after it
    if args.compare and args.method not in ("full", "smallkv"):
        raise ValueError(f"--compare sets SmallKV beside the full cache; leave --method {args.method} out")
    two = args.method == "smallkv" or args.compare or bool(args.speculate)
    if two and not args.slm:
        raise ValueError("--slm is missing: SmallKV needs a small model of the same series (or use --method full)")
    check_speculation(args)
    team.check_method(args.method, speculate=args.speculate, quantize=args.quantize)
    console = Console(stderr=True)
    pair = load_pair(
        args.llm, args.slm if two else None, args.device, args.dtype, args.revision, args.slm_revision,
        args.slm_layers, team, args.quantize, args.slm_quantize,
    )
    backend = pick_backend(args.backend, pair.llm.device)
    prompts = [pair.text.chat(text) if args.chat else pair.text.encode(text) for text in texts]
    if not all(prompts):
        raise ValueError("a prompt is empty once tokenised: there is nothing to continue")

    results: dict[str, Answer] = {}
    interrupted = False
    asked = args.method, args.speculate
    methods = {args.method: asked}  # what is shown -> method, drafts
    if args.compare and args.speculate:
        methods = {args.method: (args.method, 0), f"{args.method}, {args.speculate} drafts": asked}
    elif args.compare:
        methods = {"full": ("full", 0), "smallkv": ("smallkv", 0)}
    for name, (method, drafts) in methods.items():
        policy = make_policy(method, pair, settings, drafts, backend)
        console.print(backend_line(pair, policy, backend), style="dim", highlight=False, soft_wrap=True)
        stream = pair.text.stream()
        live = len(prompts) == 1 and not args.compare  # several answers at once cannot be streamed into one column
        show = (lambda b, token: print(stream.push(token), end="", flush=True)) if live else None
        results[name], interrupted = answer(pair, policy, prompts, args.max_new_tokens, sampler, show, backend)
        if live:
            print(stream.finish())
        if interrupted:
            break
    if args.compare and len(results) == 2:
        names = list(results) if args.speculate else ["full cache", "SmallKV"]
        print_comparison(pair.text, *results.values(), Console(), names)
    elif len(prompts) > 1 or args.compare:
        for number, tokens in enumerate(results[name].tokens, 1):
            print(f"--- answer {number}\n{pair.text.decode(tokens)}")
    for name, result in results.items():
        print_report(name, result.report, console)
    if args.json and team.rank == 0:
        write_json(Path(args.json), pair.text, prompts, results)
    if interrupted:
        console.print("interrupted: the answer above is what was there by then", style="yellow")
    return 130 if interrupted else 0


def make_policy(method: str, pair: Pair, settings: Settings, drafts: int = 0, backend: Backend = TORCH):
    """The policy of one --method; a baseline takes the budget from the settings, and the rest means nothing to it."""
    if drafts:
        if method == "full":
            return SpeculativeFull(pair.llm, pair.slm, drafts)
        return SpeculativeSmallKV(pair.llm, pair.slm, settings, drafts, sums=backend.column_sums)
    if method == "full":
        return FullPolicy(pair.llm)
    if method == "smallkv":
        return SmallKV(pair.llm, pair.slm, settings, sums=backend.column_sums)
    return BASELINES[method](pair.llm, Budget(settings.budget, settings.budget_tokens))


def backend_line(pair: Pair, policy, backend: Backend) -> str:
    """What runs, in one line: nothing is chosen silently."""
    device = pair.llm.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    static = has_static_step(policy, backend)
    steps = "Triton kernels in a CUDA graph" if static else f"PyTorch {torch.__version__} attention"
    moving = "none (one tier)"
    if isinstance(policy, SmallKV):
        moving = "side stream" if static or (device.type == "cuda" and policy.settings.prefetch) else "in step"
        moving += f", host rows in {kind_of_host(device)} memory" * (device.type == "cuda")
        rounded = ["LLM's"] * policy.settings.llm_int8 + ["SLM's"] * policy.settings.slm_int8
        moving += f", {' and '.join(rounded)} K, V in 8 bits" * bool(rounded)
    dtype = str(pair.llm.dtype).removeprefix("torch.") + ", INT4 weights" * bool(int4_modules(pair.llm))
    return f"backend: {steps}, {device} ({name}), {dtype}, tier movement {moving}"


def check_writable(path: Path) -> None:
    try:
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None


def write_json(path: Path, text: Text, prompts: list[list[int]], results: dict[str, Answer]) -> None:
    content = {
        name: {
            "answers": [
                {"text": text.decode(ids), "tokens": ids, "prompt_tokens": len(prompt), "stopped": stopped}
                for ids, prompt, stopped in zip(result.tokens, prompts, result.stopped)
            ],
            "report": result.report,
        }
        for name, result in results.items()
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except (CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone, as in `generate.py ... | head`
        sys.stdout = None
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        print(f"error: out of memory: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before the first token", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(parallel.run(main))
