"""Train an assistant for any LLM: an SLM with its tokenizer whose attention is like the LLM's.

Where it sits: LLM + text -> **training.distill** -> an SLM folder for generate.py --slm. The loss is logit distillation
plus the attention alignment of training.align, both on a few random rows a step. Most of what it learns from the LLM
writes itself (training.self_text): an assistant that has only read books does not look at a chat as the LLM does.

    python -m training.distill --llm HuggingFaceTB/SmolLM2-135M-Instruct --text a.txt b.txt.xz --out runs/assistant
    python -m training.distill ... --out runs/assistant --resume              # goes on where it was stopped

Give text of the kind that the LLM will read, some megabytes of it, a file for each kind (prose, encyclopedia, code); on
a GPU add --compile. Every --eval-every steps the state is saved and the assistant judged: how alike its heads are on
held-out text, and on held-out prompts of every kind what SmallKV with it loses against the full cache. At the end these
are tables and, with what the assistant is made of, its README.md. The default shape suits SmolLM2-135M: as many SLM
heads as the LLM has, over few keys, so that the SLM's cache stays small. If the LLM has more heads than the SLM, those
that look alike share one.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset

import command
from baselines import BASELINES
from checkpoint import CheckpointError, load_decoder, read_config, resolve
from command import number, read_json, whole, write_json
from floors import cache_ratio
from generate import Pair
from match import SINKS, WINDOW_MIN, score_similarity
from model import Config, Decoder
from samples import Sample, answered, run_batch
from smallkv import Settings, SmallKV
from text import Text
from training.align import (
    Alignment,
    capture,
    layer_targets,
    logit_loss,
    plan_heads,
    principal_embedding,
    row_losses,
    target_rows,
)
from training.data import Mixture, Stage, encode_books, encode_each, load_text, read_books, windows
from training.loop import (
    STATE,
    Report,
    add_arguments,
    add_shape,
    autocast,
    compile_blocks,
    copy_decoder,
    eager,
    fresh_decoder,
    parameter_count,
    save_hf,
    train,
)
from training.recall import Recall, document_ids
from training.self_text import Writer, write

HEADS, SELF_TEXT = "heads.json", "self_text.jsonl"
LENGTHS = (256, 1024, 4096)  # tokens of a sequence: the matching window, a question, a document
SELF_TOKENS = 1_500_000
JUDGED = 0.2  # the budget at which an assistant is judged
JUDGED_PROMPTS, JUDGED_PROMPT, JUDGED_STEPS = 4, 800, 32  # prompts of each kind, their tokens, tokens of an answer
JUDGED_TOGETHER = 8  # prompts in a batch
KINDS = ("best", "jaccard", "cosine")  # of an LLM head's similarity: the best SLM head, or the one a matcher picks


class Rows(Dataset):
    """data[step] -> the tokens (B, T) of a Mixture and the positions (R,) whose rows are looked at in that step."""

    def __init__(self, mixture: Mixture, rows: int, seed: int):
        shortest = min(stage.length for stage in mixture.stages)
        if rows > shortest - SINKS:
            raise ValueError(f"--rows {rows} does not fit into --seq-length {shortest} (less {SINKS} sinks)")
        self.mixture, self.rows, self.seed = mixture, rows, seed

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rng, tokens = random.Random(f"{self.seed}-{step}-rows"), self.mixture[step][0][:, :-1]
        positions = sorted(rng.sample(range(SINKS, tokens.shape[1]), self.rows))
        return tokens, torch.tensor(positions)


# ---- similarity ------------------------------------------------------------------------------------------------------


def similarity(llm: Decoder, slm: Decoder, samples: Sequence[list[int]]) -> dict[str, Tensor]:
    """Mean over the samples of every LLM head's similarity, (L, H) for each of KINDS."""
    found = {kind: [] for kind in KINDS}
    for sample in samples:
        best, jaccard = score_similarity(llm, slm, sample, "jaccard")
        for kind, value in zip(KINDS, (best, jaccard, score_similarity(llm, slm, sample, "cosine")[1])):
            found[kind].append(value.float().cpu())
    return {kind: torch.stack(values).mean(0) for kind, values in found.items()}


def figures_of(found: dict[str, Tensor]) -> dict[str, float]:
    """Mean over the heads, and the worst head."""
    means = {kind: value.mean().item() for kind, value in found.items()}
    return means | {f"{kind}_worst": value.min().item() for kind, value in found.items()}


def print_similarity(found: dict[str, Tensor], llm: Config, slm: Config) -> None:
    """A table by layer; the last line is JSON."""
    table = Table("LLM layer", *(f"{kind} {what}" for kind in KINDS for what in ("mean", "worst")))
    for layer in range(llm.layers):
        cells = [f"{value:.3f}" for kind in KINDS for value in (found[kind][layer].mean(), found[kind][layer].min())]
        table.add_row(str(layer), *cells)
    Console().print(table)
    figures = {"cache_ratio": cache_ratio(llm, slm), **figures_of(found)}
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


# ---- where it is used ------------------------------------------------------------------------------------------------


def judge(llm: Decoder, slm: Decoder, text: Text, samples: list[Sample], oracle: bool = False) -> dict[str, dict]:
    """By kind of prompt and over "all", means over the samples (samples.answered) at a budget of JUDGED: similarity of
    the matched heads, KL(full || SmallKV) along the full cache's answer and agreement; oracle: exact top-k's KL too."""
    pair, found = Pair(llm, slm, text), []
    for at in range(0, len(samples), JUDGED_TOGETHER):
        batch = samples[at : at + JUDGED_TOGETHER]
        figures = run_batch("kl", pair, SmallKV(llm, slm, Settings(budget=JUDGED)), batch)
        exact = run_batch("kl", pair, BASELINES["oracle"](llm, JUDGED), batch) if oracle else [{}] * len(batch)
        for own, best in zip(figures, exact):
            row = {"similarity": own.get("similarity"), "kl": own["score"], "agreement": own["agreement"]}
            found.append(row | ({"oracle": best["score"]} if best else {}))
    groups = {"all": found}
    for sample, own in zip(samples, found):
        groups.setdefault(sample.group, []).append(own)
    means = {}
    for name, rows in groups.items():
        columns = {key: [row[key] for row in rows if row[key] is not None] for key in rows[0]}
        means[name] = {key: sum(values) / len(values) for key, values in columns.items() if values}
    return means


def judged_rows(found: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what `judge` found."""
    names = {"similarity": "head similarity", "kl": "KL", "agreement": "agreement", "oracle": "exact top-k's KL"}
    names = {key: heading for key, heading in names.items() if key in found["all"]}
    rows = [[kind, *(f"{own[key]:.4f}" if key in own else "-" for key in names)] for kind, own in found.items()]
    return ["prompts", *names.values()], rows


def print_judged(found: dict[str, dict]) -> None:
    header, rows = judged_rows(found)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


# ---- training --------------------------------------------------------------------------------------------------------


def make_slm(llm: Decoder, args: argparse.Namespace) -> Decoder:
    """A fresh SLM on the LLM's embedding, or the one that --init names."""
    if args.init:
        slm = load_decoder(resolve(args.init), llm.device, torch.float32).requires_grad_(True)
        check_vocabularies(llm, slm)
        return slm
    like = llm.config
    slm = fresh_decoder(args, like.vocab_size, like.max_positions, like.rope["rope_theta"])
    generator = torch.Generator().manual_seed(args.seed)
    embedding = principal_embedding(llm.embed_tokens.weight, slm.config.hidden_size, 0.02, generator)
    slm.embed_tokens.weight.data.copy_(embedding)
    return slm.to(llm.device)


def check_vocabularies(llm: Decoder, slm: Decoder) -> None:
    sizes = slm.config.vocab_size, llm.config.vocab_size
    if sizes[0] != sizes[1]:
        raise CheckpointError(f"the SLM has {sizes[0]} tokens, the LLM {sizes[1]}: give an SLM made for this LLM")


def known_slots(path: Path, llm: Config, slm: Config) -> Tensor:
    """The SLM head of each LLM head as an earlier run wrote them, so that they go on learning what they began with."""
    slots = read_json(path).get("slots")
    heads, places = llm.layers * llm.query_heads, slm.layers * slm.query_heads
    known = isinstance(slots, list) and len(slots) == heads
    if not known or not all(isinstance(slot, int) and 0 <= slot < places for slot in slots):
        raise ValueError(f"{path} is not of this pair: {heads} LLM heads, {places} SLM heads; remove it or start anew")
    return torch.tensor(slots)


@dataclass
class Losses:
    """What a step needs of the pair: its two models, who learns what, and functions that may be compiled."""

    llm: Decoder
    slm: Decoder
    alignment: Alignment
    logit_loss: object = logit_loss

    def __call__(self, tokens: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Tokens (B, T) and positions (R,) -> the parts of the loss: logits, rows, tail, sums."""
        with torch.no_grad():
            theirs = capture(self.llm, tokens, positions)
            their_logits = self.llm.lm_head(self.llm.norm(theirs.hidden)[1])  # (B, R, V)
        with autocast(tokens.device):
            ours = capture(self.slm, tokens, positions)
            our_logits = self.slm.lm_head(self.slm.norm(ours.hidden)[1])
        return {"logits": self.logit_loss(our_logits, their_logits)} | self.alignment.losses(theirs, ours, positions)


def make_losses(llm: Decoder, slm: Decoder, slots: Tensor, compiled: bool) -> Losses:
    targets = layer_targets(slots, llm.config, slm.config, llm.device)
    if not compiled:
        return Losses(llm, slm, Alignment(targets))
    compile_blocks(llm)
    compile_blocks(slm)
    alignment = Alignment(targets, torch.compile(target_rows), torch.compile(row_losses))
    return Losses(llm, slm, alignment, torch.compile(logit_loss))


def model_card(
    args: argparse.Namespace, llm: Config, slm: Decoder, report: Report, found: dict[str, Tensor],
    judged: dict[str, dict],
) -> str:  # fmt: skip
    figures, shape = figures_of(found), slm.config
    rows = "".join(f"| {kind} | {figures[kind]:.4f} | {figures[kind + '_worst']:.4f} |\n" for kind in KINDS)
    start = f" from {Path(args.init).name}" if args.init else ""
    weights = f"rows {args.row_weight}, rows without sinks {args.tail_weight}, column sums {args.sum_weight}"
    return f"""# A SmallKV assistant for {Path(args.llm).name}

Made by `training.distill` of SmallKV: its attention tells which tokens the LLM needs. It is not meant to write text.

- Size: {parameter_count(slm) / 1e6:.1f}M parameters; {shape.layers} layers x {shape.query_heads} query heads,
  {shape.kv_heads} KV heads of {shape.head_dim} dimensions, hidden {shape.hidden_size}. Its cache is
  1/{cache_ratio(llm, shape):.2f} of the LLM's.
- Data: {", ".join(Path(path).name for path in sorted(args.text))};
  conversations that the LLM wrote itself ({args.self_text:,} tokens) in {args.self_share:.0%} of the sequences,
  recall documents in {args.recall_share:.0%}.
- Training{start}: {report.summary} on {args.device}, {args.batch_tokens:,} tokens a step in sequences of
  {", ".join(map(str, args.seq_length))}, {args.rows} rows a step, seed {args.seed}, peak learning rate {args.lr}.
- Loss weights: {weights}, logits {args.logit_weight}.

Similarity on held-out text: cosine of accumulated scores, the first {SINKS} tokens dropped, mean of {args.eval_samples}
windows of {args.eval_length} tokens.

| SLM head | mean over LLM heads | worst LLM head |
| --- | --- | --- |
{rows}
Held-out prompts of about {JUDGED_PROMPT} tokens, each with {JUDGED_STEPS} tokens of the full cache's own greedy answer:
similarity of the matched heads, KL(full cache || SmallKV) in nats at a budget of {JUDGED:.0%}, beside exact top-k's.

{command.markdown_table(*judged_rows(judged))}
"""


def learning_text(args: argparse.Namespace, llm: Decoder, text: Text, end: int) -> tuple[Rows, list, list[Sample]]:
    """The training data, the held-out windows, and the held-out prompts with the full cache's answers."""
    tokenizer, kept, held_out = text.tokenizer, [], []
    for path in map(Path, args.text):
        name, (books, last) = path.name.partition(".")[0], read_books([path])
        kept.append((name, books, encode_books(books, tokenizer, end)))
        held_out.append((name, last, encode_books(last, tokenizer, end)))
    if args.eval_text:
        parts = [(path.name.partition(".")[0], sum(read_books([path]), [])) for path in map(Path, args.eval_text)]
        held_out = [(name, books, encode_books(books, tokenizer, end)) for name, books in parts]
    books, held_out_books = (sum((own for _, own, _ in parts), []) for parts in (kept, held_out))
    prose, held_out_prose = (np.concatenate([ids for *_, ids in parts]) for parts in (kept, held_out))
    windowed = windows(held_out_prose, args.eval_length, args.eval_samples)
    recall = None
    if args.recall_share > 0:  # as many of the windows are recall documents as of the training sequences
        recall = Recall.from_books(books, tokenizer, "train")
        test = replace(Recall.from_books(held_out_books, tokenizer, "test"), turns=4)
        for i in range(round(args.recall_share * len(windowed))):
            document = test.document(random.Random(f"evaluation-{i}"), args.eval_length)
            windowed[i] = document_ids(document)[0][: args.eval_length]
    stages = [Stage(args.seq_length[step % len(args.seq_length)], step + 1) for step in range(args.steps)]
    longest = max(args.seq_length)

    def rows(*own) -> Rows:
        mixed = Mixture(prose, recall, stages, args.batch_tokens, args.recall_share, args.seed, end, *own)
        return Rows(mixed, args.rows, args.seed)

    data = rows()  # what cannot be is said before the LLM writes for minutes
    if args.self_text:
        sources = distinct(kept)
        path = Path(args.self_text_file or Path(args.out) / SELF_TEXT)
        told = write(Writer(llm, text, sources, end, longest, args.seed), path, args.self_text)
        data = rows(encode_each(told, tokenizer, end), args.self_share)
    unseen = Writer(llm, text, distinct(held_out), end, longest, args.seed)
    prompts = unseen.prompts(JUDGED_PROMPTS, min(JUDGED_PROMPT, longest, llm.config.max_positions // 2))
    asked = answered(llm, [ids for _, ids in prompts], [kind for kind, _ in prompts], JUDGED_STEPS, JUDGED_TOGETHER)
    return data, windowed, asked


def distinct(parts: list[tuple[str, list[str], np.ndarray]]) -> list[tuple[str, np.ndarray]]:
    """Sources of a Writer: a file that was given several times, to weigh more among the sequences, counts once."""
    return list({name: (name, ids) for name, _, ids in parts}.values())


def check_flags(args: argparse.Namespace, llm: Config, chats: bool) -> None:
    """Fill in --seq-length and --self-text where nothing was given; ValueError for what cannot be, before the LLM
    writes for minutes."""
    if args.self_text is None:
        args.self_text = SELF_TOKENS if chats else 0
    args.self_share = args.self_share if args.self_text else 0.0
    if args.self_share + args.recall_share > 1:
        raise ValueError(f"--self-share {args.self_share:g} and --recall-share {args.recall_share:g} are more than all "
                         "of the sequences; lower one of them")  # fmt: skip
    if args.seq_length is None:
        args.seq_length = [n for n in LENGTHS if n <= llm.max_positions] or [llm.max_positions]
    for flag, length in (("--seq-length", max(args.seq_length)), ("--eval-length", args.eval_length)):
        if length > llm.max_positions:
            raise ValueError(f"{flag} {length} is more than the LLM's {llm.max_positions} positions")


def run(args: argparse.Namespace) -> tuple[Decoder, Report]:
    folder, out, device = resolve(args.llm), command.check_folder(args.out), args.device
    if args.resume and not (out / STATE).is_file():
        raise ValueError(f"--resume: there is no {out / STATE}; leave --resume out to start from the beginning")
    text, end = load_text(folder)
    check_flags(args, read_config(folder), text.template is not None)
    llm = load_decoder(folder, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    slm = make_slm(llm, args)
    data, samples, asked = learning_text(args, llm, text, end)
    known = (out if args.resume else Path(args.init) if args.init else out) / HEADS
    if (args.resume or args.init) and known.is_file():
        slots = known_slots(known, llm.config, slm.config)
    else:
        tokens, positions = data[0]
        slots = plan_heads(llm, slm.config, tokens[:4].long().to(device), positions.to(device))
    write_json(out / HEADS, {"slots": slots.tolist()})
    losses = make_losses(llm, slm, slots, args.compile)
    print(
        f"SLM: {parameter_count(slm) / 1e6:.2f}M parameters, cache 1/{cache_ratio(llm.config, slm.config):.2f} of the "
        f"LLM's; {len(slots.unique())} of its {slm.config.layers * slm.config.query_heads} heads learn from "
        f"{len(slots)} LLM heads", file=sys.stderr, flush=True,
    )  # fmt: skip
    weights = {"rows": args.row_weight, "tail": args.tail_weight, "sums": args.sum_weight, "logits": args.logit_weight}

    def loss_of(batch: list[Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        parts = losses(batch[0].long(), batch[1])
        return sum(weights[name] * part for name, part in parts.items()), parts

    def evaluate() -> dict[str, float]:
        frozen = copy_decoder(slm, llm.dtype)
        with eager(args, llm):
            own = {f"prompts_{name}": value for name, value in judge(llm, frozen, text, asked)["all"].items()}
            return figures_of(similarity(llm, frozen, samples[::4])) | own

    report = train(slm, data, loss_of, evaluate, args)
    frozen = copy_decoder(slm, llm.dtype)
    with eager(args, llm):
        found, judged = similarity(llm, frozen, samples), judge(llm, frozen, text, asked, oracle=True)
    save_hf(slm, out, folder, model_card(args, llm.config, slm, report, found, judged))
    if report.step >= args.steps:
        (out / STATE).unlink(missing_ok=True)
    print_judged(judged)
    print_similarity(found, llm.config, slm.config)
    return slm, report


# ---- command ---------------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    parser = command.Parser(prog="training.distill", description=__doc__.partition("\n")[0],
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    parser.add_argument("--llm", required=True, metavar="NAME", help="folder or hub id of the LLM")
    add_shape(parser, layers=10, query_heads=32, kv_heads=4, head_dim=32, hidden=256, intermediate=672)
    add = parser.add_argument_group("data and loss").add_argument
    lengths = "of the sequences, a step of each in turn; up to what the assistant will serve"
    add("--seq-length", nargs="+", type=whole(8), metavar="N", help=f"{lengths} (default: {LENGTHS})")
    add("--batch-tokens", type=whole(1), default=32768, help="tokens of a step")
    add("--self-text", type=whole(0), metavar="TOKENS", help="of conversations that the LLM writes to learn from "
        f"(default: {SELF_TOKENS:,} with a chat template, else 0)")  # fmt: skip
    add("--self-text-file", metavar="FILE", help=f"where they are kept and looked for ({SELF_TEXT} in --out)")
    add("--self-share", type=command.share, default=0.7, help="share of sequences that are such conversations")
    add("--rows", type=whole(1), default=64, help="query rows of a step, the same in all its sequences")
    add("--recall-share", type=command.share, default=0.0, help="share of sequences that are recall documents")
    add("--row-weight", type=number(0), default=1.0, help="of the divergence of attention rows")
    add("--tail-weight", type=number(0), default=1.0, help="of the same without the sinks")
    add("--sum-weight", type=number(0), default=5.0, help="of 1 - cosine of column sums")
    add("--logit-weight", type=number(0), default=0.1, help="of the divergence of next-token distributions")
    add("--eval-text", nargs="+", metavar="FILE", help="held-out text, else the last book of each --text")
    add("--eval-length", type=whole(WINDOW_MIN), default=512, help="tokens of a held-out window")
    add("--eval-samples", type=whole(1), default=16, help="windows at the end; a quarter as many on the way")
    add_arguments(parser, steps=4000, lr=2e-3)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    return command.ended(lambda: run(args) and 0)


if __name__ == "__main__":
    sys.exit(main())
