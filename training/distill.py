"""Train an assistant for any LLM: an SLM with its tokenizer whose attention is like the LLM's.

Where it sits: LLM + text -> **distill** -> an SLM folder for generate.py --slm. The loss is logit distillation plus the
attention alignment of align.py, both on a few random rows a step.

    python distill.py --llm HuggingFaceTB/SmolLM2-135M-Instruct --text a.txt b.txt.xz --out runs/assistant --compile
    python distill.py similarity --llm pair/llm --slm pair/slm --text a.txt

The default shape suits SmolLM2-135M: as many SLM heads as the LLM has, over few keys, so the cache stays small.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset

from checkpoint import CheckpointError, load_decoder, resolve
from match import SINKS, WINDOW_MIN, score_similarity
from model import Config, Decoder
from overhead import cache_ratio
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
from training.data import Mixture, Recall, Stage, encode_books, freeze_for_workers, load_tokenizer, read_books, windows
from training.loop import (
    STATE,
    Report,
    add_arguments,
    autocast,
    compile_blocks,
    copy_decoder,
    eager,
    initialise,
    options_from,
    save_hf,
    shape_from,
    train,
)
from training.recall import document_ids

HEADS, SIMILARITY = "heads.json", "similarity.json"
KINDS = ("best", "jaccard", "cosine")  # of an LLM head's similarity: the best SLM head, or the one a matcher picks


class Rows(Dataset):
    """data[step] -> the tokens (B, T) of a Mixture and the positions (R,) whose rows are looked at in that step."""

    def __init__(self, mixture: Mixture, length: int, rows: int, seed: int):
        if rows > length - SINKS:
            raise ValueError(f"--rows {rows} does not fit into --seq-length {length} (less {SINKS} sinks)")
        self.mixture, self.length, self.rows, self.seed = mixture, length, rows, seed

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(f"{self.seed}-{step}-rows")
        positions = sorted(rng.sample(range(SINKS, self.length), self.rows))
        return self.mixture[step][0][:, :-1], torch.tensor(positions)


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


def save_similarity(found: dict[str, Tensor], folder: Path, samples: Sequence[list[int]]) -> None:
    """Per layer and head, for a heatmap."""
    content = {"samples": len(samples), "length": len(samples[0]), "sinks_dropped": SINKS}
    content |= {kind: [[round(head, 4) for head in layer] for layer in value.tolist()] for kind, value in found.items()}
    (folder / SIMILARITY).write_text(json.dumps(content) + "\n")


def print_similarity(found: dict[str, Tensor], llm: Config, slm: Config) -> None:
    """A table by layer; the last line is JSON."""
    table = Table("LLM layer", *(f"{kind} {what}" for kind in KINDS for what in ("mean", "worst")))
    for layer in range(llm.layers):
        cells = [f"{value:.3f}" for kind in KINDS for value in (found[kind][layer].mean(), found[kind][layer].min())]
        table.add_row(str(layer), *cells)
    Console().print(table)
    figures = {"cache_ratio": cache_ratio(llm, slm), **figures_of(found)}
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


# ---- training --------------------------------------------------------------------------------------------------------


def make_slm(llm: Decoder, args: argparse.Namespace) -> Decoder:
    """A fresh SLM on the LLM's embedding, or the one that --init names."""
    if args.init:
        slm = load_decoder(args.init, llm.device, torch.float32).requires_grad_(True)
        if slm.config.vocab_size != llm.config.vocab_size:
            raise ValueError(
                f"--init {args.init} has {slm.config.vocab_size} tokens, the LLM {llm.config.vocab_size}; "
                "give an SLM made for this LLM"
            )
        return slm
    like = llm.config
    config = shape_from(args, like.vocab_size, like.max_positions, like.rope["rope_theta"])
    slm = initialise(Decoder(config), args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    embedding = principal_embedding(llm.embed_tokens.weight, slm.config.hidden_size, 0.02, generator)
    slm.embed_tokens.weight.data.copy_(embedding)
    return slm.to(llm.device)


@dataclass
class Pair:
    """What the loss and the evaluation need."""

    llm: Decoder
    slm: Decoder
    alignment: Alignment
    logit_loss: object

    def losses(self, tokens: Tensor, positions: Tensor) -> dict[str, Tensor]:
        device = tokens.device
        with torch.no_grad():
            theirs = capture(self.llm, tokens, positions)
            their_logits = self.llm.lm_head(self.llm.norm(theirs.hidden)[1])  # (B, R, V)
        with autocast(device):
            ours = capture(self.slm, tokens, positions)
            our_logits = self.slm.lm_head(self.slm.norm(ours.hidden)[1])
        return {"logits": self.logit_loss(our_logits, their_logits)} | self.alignment.losses(theirs, ours, positions)


def make_pair(llm: Decoder, slm: Decoder, slots: Tensor, compiled: bool) -> Pair:
    targets = layer_targets(slots, llm.config, slm.config, llm.device)
    if not compiled:
        return Pair(llm, slm, Alignment(targets), logit_loss)
    compile_blocks(llm)
    compile_blocks(slm)
    alignment = Alignment(targets, torch.compile(target_rows), torch.compile(row_losses))
    return Pair(llm, slm, alignment, torch.compile(logit_loss))


def model_card(args: argparse.Namespace, llm: Config, slm: Decoder, report: Report, found: dict[str, Tensor]) -> str:
    size = sum(parameter.numel() for parameter in slm.parameters()) / 1e6
    figures, shape = figures_of(found), slm.config
    rows = "".join(f"| {kind} | {figures[kind]:.4f} | {figures[kind + '_worst']:.4f} |\n" for kind in KINDS)
    start = f" from {Path(args.init).name}" if args.init else ""
    weights = f"rows {args.row_weight}, rows without sinks {args.tail_weight}, column sums {args.sum_weight}"
    return f"""# A SmallKV assistant for {Path(args.llm).name}

Made by `distill.py` of SmallKV: its attention tells which tokens the LLM needs. It is not meant to write text.

- Size: {size:.1f}M parameters; {shape.layers} layers x {shape.query_heads} query heads, {shape.kv_heads} KV heads of
  {shape.head_dim} dimensions, hidden {shape.hidden_size}. Its cache is 1/{cache_ratio(llm, shape):.2f} of the LLM's.
- Data: {", ".join(Path(path).name for path in sorted(args.text))};
  recall documents in {args.recall_share:.0%} of the sequences.
- Training{start}: {report.summary} on {args.device}, batch {args.batch} x {args.seq_length},
  {args.rows} rows a step, seed {args.seed}, peak learning rate {args.lr}.
- Loss weights: {weights}, logits {args.logit_weight}.

Similarity on held-out text: cosine of accumulated scores, the first {SINKS} tokens dropped, mean of {args.eval_samples}
windows of {args.eval_length} tokens.

| SLM head | mean over LLM heads | worst LLM head |
| --- | --- | --- |
{rows}"""


def run(args: argparse.Namespace) -> tuple[Decoder, Report]:
    options, out = options_from(args), Path(args.out)
    folder, device = resolve(args.llm), options.device
    tokenizer, end = load_tokenizer(folder)
    llm = load_decoder(folder, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    if args.eval_length < WINDOW_MIN:
        raise ValueError(f"--eval-length {args.eval_length}: heads are matched on {WINDOW_MIN} tokens or more")
    if args.seq_length > llm.config.max_positions:
        raise ValueError(f"--seq-length {args.seq_length} is more than the LLM's {llm.config.max_positions} positions")
    slm = make_slm(llm, args)

    books, held_out = read_books(args.text)
    if args.eval_text:
        held_out = [text for path in args.eval_text for part in read_books([path]) for text in part]
    recall = Recall.from_books(books, tokenizer, "train") if args.recall_share > 0 else None
    stages = [Stage(args.seq_length, args.steps)]
    prose, step_tokens = encode_books(books, tokenizer, end), args.batch * args.seq_length
    mixture = Mixture(prose, recall, stages, step_tokens, args.recall_share, args.seed, end)
    data = Rows(mixture, args.seq_length, args.rows, args.seed)
    samples = windows(encode_books(held_out, tokenizer, end), args.eval_length, args.eval_samples)
    if args.recall_share > 0:  # as many of the samples are recall documents as of the training sequences
        test = replace(Recall.from_books(held_out, tokenizer, "test"), turns=4)
        for i in range(round(args.recall_share * len(samples))):
            document = test.document(random.Random(f"evaluation-{i}"), args.eval_length)
            samples[i] = document_ids(document)[0][: args.eval_length]

    out.mkdir(parents=True, exist_ok=True)
    known = (out if args.resume else Path(args.init) if args.init else out) / HEADS
    if (args.resume or args.init) and known.is_file():  # an SLM's heads go on learning what they have begun with
        slots = torch.tensor(json.loads(known.read_text())["slots"])
    else:
        tokens, positions = data[0]
        slots = plan_heads(llm, slm.config, tokens[:4].long().to(device), positions.to(device))
    (out / HEADS).write_text(json.dumps({"slots": slots.tolist()}) + "\n")
    pair = make_pair(llm, slm, slots, options.compile)
    size = sum(parameter.numel() for parameter in slm.parameters()) / 1e6
    ratio = cache_ratio(llm.config, slm.config)
    print(
        f"SLM: {size:.2f}M parameters, cache 1/{ratio:.2f} of the LLM's; {len(slots.unique())} of its "
        f"{slm.config.layers * slm.config.query_heads} heads learn from {len(slots)} LLM heads",
        flush=True,
    )
    weights = {"rows": args.row_weight, "tail": args.tail_weight, "sums": args.sum_weight, "logits": args.logit_weight}

    def loss_of(batch: list[Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        parts = pair.losses(batch[0].long(), batch[1])
        return sum(weights[name] * part for name, part in parts.items()), parts

    def evaluate() -> dict[str, float]:
        return figures_of(similarity(llm, copy_decoder(slm, llm.dtype), samples[::4]))

    freeze_for_workers()
    report = train(slm, data, loss_of, evaluate, options, out)
    frozen = copy_decoder(slm, llm.dtype)
    with eager(options):
        found = similarity(llm, frozen, samples)
    save_similarity(found, out, samples)
    save_hf(slm, out, folder, model_card(args, llm.config, slm, report, found))
    if report.step == args.steps:
        (out / STATE).unlink(missing_ok=True)
    print_similarity(found, llm.config, slm.config)
    return slm, report


# ---- command ---------------------------------------------------------------------------------------------------------


def measure(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="distill.py similarity", description="Measure how alike two models attend.")
    parser.add_argument("--llm", required=True, metavar="DIR_OR_ID")
    parser.add_argument("--slm", required=True, metavar="DIR_OR_ID")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    folder = resolve(args.llm)
    tokenizer, end = load_tokenizer(folder)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    llm, slm = load_decoder(folder, args.device, dtype), load_decoder(resolve(args.slm), args.device, dtype)
    if llm.config.vocab_size != slm.config.vocab_size:
        raise CheckpointError(f"--slm has {slm.config.vocab_size} tokens, --llm {llm.config.vocab_size}: not a pair")
    books = [text for path in args.text for part in read_books([path]) for text in part]
    found = similarity(llm, slm, windows(encode_books(books, tokenizer, end), args.length, args.samples))
    print_similarity(found, llm.config, slm.config)


def parse(argv: list[str]) -> argparse.Namespace:
    epilog = "'distill.py similarity --help': only measure a pair."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=epilog)
    parser.add_argument("--llm", required=True, metavar="DIR_OR_ID")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help=".txt or .txt.xz")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--init", metavar="DIR", help="go on from this SLM's weights; its shape counts")
    shape = parser.add_argument_group("SLM")
    for name, default in dict(layers=10, query_heads=32, kv_heads=4, head_dim=32, hidden=256, intermediate=672).items():
        shape.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    data = parser.add_argument_group("data and loss")
    data.add_argument("--seq-length", type=int, default=1024)
    data.add_argument("--batch", type=int, default=32, help="sequences of a step")
    data.add_argument("--rows", type=int, default=64, help="query rows of a step, the same in all its sequences")
    data.add_argument("--recall-share", type=float, default=0.0, help="share of sequences that are recall documents")
    data.add_argument("--row-weight", type=float, default=1.0, help="of the divergence of attention rows")
    data.add_argument("--tail-weight", type=float, default=1.0, help="of the same without the sinks")
    data.add_argument("--sum-weight", type=float, default=5.0, help="of 1 - cosine of column sums")
    data.add_argument("--logit-weight", type=float, default=0.1, help="of the divergence of next-token distributions")
    data.add_argument("--eval-text", nargs="+", metavar="FILE", help="default: the last book of each --text")
    data.add_argument("--eval-length", type=int, default=512, help=f"at least {WINDOW_MIN}")
    data.add_argument("--eval-samples", type=int, default=16, help="at the end; a quarter as many on the way")
    add_arguments(parser, steps=4000, lr=2e-3)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["similarity"]:
            measure(argv[1:])
        else:
            run(parse(argv))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
