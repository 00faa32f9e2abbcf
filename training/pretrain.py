"""Train the embedded LLM from scratch: a small decoder that recalls facts from a long text.

Where it sits: text -> **pretrain** -> pair/llm -> distill.py -> pair/slm. Training data is plain prose mixed with the
documents of recall.py (train split only), each sequence one or the other; `Mixture` makes both on the fly.

    python pretrain.py --text books/*.txt --out pair/llm --compile
    python pretrain.py average runs/stage-5 runs/stage-6 --out pair/llm

Books (.txt or .txt.xz) are divided by a line <|endoftext|>. The last book of every file is held out. The first step is
a byte-level BPE tokenizer, unless --tokenizer names one; --tokenizer-only stops after it, which needs no GPU.
"""

import argparse
import random
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from checkpoint import load_decoder
from model import Decoder
from training.data import (
    END,
    Mixture,
    Recall,
    encode_books,
    freeze_for_workers,
    parse_stages,
    read_books,
    train_tokenizer,
)
from training.loop import (
    STATE,
    Report,
    add_arguments,
    autocast,
    compile_blocks,
    copy_decoder,
    initialise,
    options_from,
    save_hf,
    shape_from,
    train,
    write_tokenizer,
)
from training.recall import Document, document_ids

TINY = dict(hidden=32, layers=2, query_heads=4, kv_heads=2, head_dim=8, intermediate=64, vocab=800, steps=20)
TINY |= dict(max_positions=512, stages="256:0.5,384:0.5", batch_tokens=768, log_every=5, eval_every=10, workers=0)
TINY |= dict(eval_documents=2, eval_length=300)


# ---- loss and evaluation ---------------------------------------------------------------------------------------------


def weighted_loss(logits: Tensor, targets: Tensor, answers: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy (B, T, V) x (B, T) with answer tokens counted `weight` times; also its two parts unweighted."""
    each = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    answer = answers.flatten().float()
    weights = 1 + (weight - 1) * answer
    answer_loss = (each * answer).sum() / answer.sum().clamp(min=1)
    text_loss = (each * (1 - answer)).sum() / (1 - answer).sum()
    return (each * weights).sum() / weights.sum(), answer_loss, text_loss


@torch.inference_mode()
def answer_rates(decoder: Decoder, documents: list[Document], batch: int = 16) -> dict[str, float]:
    """Share of answers whose every token is the most likely one, the answers before it given: per kind and in all."""
    hits = defaultdict(list)
    for at in range(0, len(documents), batch):
        some = documents[at : at + batch]
        ids = [document_ids(document)[0] for document in some]
        tokens = torch.zeros(len(some), max(map(len, ids)), dtype=torch.long)  # padded on the right, unseen
        for row, row_ids in enumerate(ids):
            tokens[row, : len(row_ids)] = torch.tensor(row_ids)
        tokens = tokens.to(decoder.device)
        hidden = decoder(tokens, logits="none")
        for row, document in enumerate(some):
            position, kinds = 0, iter(document.kinds)
            for (_, is_answer), segment in zip(document.segments, document.segment_ids, strict=True):
                end = position + len(segment)
                if is_answer:
                    normed = decoder.norm(hidden[row, position - 1 : end - 1])[1]  # (answer, hidden)
                    logits = decoder.lm_head(normed)
                    hits[next(kinds)].append((logits.argmax(-1) == tokens[row, position:end]).all())
                position = end
    rates = {kind: torch.stack(found).float().mean().item() for kind, found in sorted(hits.items())}
    return {"exact": torch.stack(sum(hits.values(), [])).float().mean().item(), **rates}


@torch.inference_mode()
def prose_loss(decoder: Decoder, prose: np.ndarray, length: int, slices: int = 16) -> float:
    """Mean cross-entropy on slices spread evenly over a text."""
    length = min(length, len(prose) - 1)
    starts = np.linspace(0, len(prose) - length - 1, slices).astype(int)
    losses = []
    for start in starts:
        tokens = torch.from_numpy(prose[start : start + length + 1].astype(np.int64))[None].to(decoder.device)
        losses.append(F.cross_entropy(decoder(tokens[:, :-1])[0].float(), tokens[0, 1:]))
    return torch.stack(losses).mean().item()


# ---- command ---------------------------------------------------------------------------------------------------------


def choose_tokenizer(args: argparse.Namespace, books: list[str]) -> Tokenizer:
    """The one that --tokenizer names, or of the run that goes on, or a new one."""
    folder = args.out if args.resume else args.init
    path = Path(args.tokenizer) if args.tokenizer else Path(folder) / "tokenizer.json" if folder else None
    if path is None:
        return train_tokenizer(books, args.vocab)
    if not path.is_file():
        raise ValueError(f"there is no {path}" + "; leave --resume out to start from the beginning" * args.resume)
    tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.token_to_id(END) is None:
        raise ValueError(f"{path} has no token {END}; give one that pretrain.py made")
    return tokenizer


def model_card(args: argparse.Namespace, decoder: Decoder, report: Report) -> str:
    parameters = sum(parameter.numel() for parameter in decoder.parameters())
    figures = "".join(f"| {name} | {value:.4f} |\n" for name, value in report.figures.items())
    return f"""# SmallKV's embedded LLM

A demonstration model of {parameters / 1e6:.1f}M parameters that answers questions about the text before them, trained
from scratch by `pretrain.py` of this repository. It is not good for anything else.

- Data: public-domain English prose ({len(args.text)} files: {", ".join(sorted(Path(path).name for path in args.text))})
  and recall documents made by `recall.py` (train split, {args.recall_share:.0%} of the sequences).
- Training: {report.summary} on {args.device}, sequence lengths {args.stages}, {args.batch_tokens} tokens a step,
  seed {args.seed}, peak learning rate {args.lr}, answer tokens weighted {args.answer_weight:g} times.

Held out, after training. "exact": the share of answers with every token right, teacher-forced, in {args.eval_documents}
documents of the test split with prompts of {args.eval_length} tokens; below it the same by kind. "prose_loss": nats a
token on held-out books.

| figure | value |
| --- | --- |
{figures}"""


def run(args: argparse.Namespace) -> tuple[Decoder, Report] | None:
    options, out = options_from(args), Path(args.out)
    stages = parse_stages(args.stages, args.steps)
    out.mkdir(parents=True, exist_ok=True)
    books, held_out = read_books(args.text)
    tokenizer = choose_tokenizer(args, books)
    write_tokenizer(tokenizer, out)
    if args.tokenizer_only:
        return None
    end = tokenizer.token_to_id(END)
    recall = Recall.from_books(books, tokenizer, "train", args.turns)
    test = replace(Recall.from_books(held_out, tokenizer, "test"), turns=4)
    documents = [test.document(random.Random(f"evaluation-{i}"), args.eval_length) for i in range(args.eval_documents)]
    data = Mixture(
        encode_books(books, tokenizer, end), recall, stages, args.batch_tokens, args.recall_share, args.seed, end
    )
    test_prose = encode_books(held_out, tokenizer, end)

    if args.init:
        decoder = load_decoder(args.init, options.device, torch.float32).requires_grad_(True)
        if decoder.config.vocab_size != tokenizer.get_vocab_size():
            raise ValueError(f"--init {args.init} was trained with another tokenizer")
    else:
        config = shape_from(args, tokenizer.get_vocab_size(), args.max_positions, args.rope_theta)
        decoder = initialise(Decoder(config), args.seed).to(options.device)
    parameters = sum(parameter.numel() for parameter in decoder.parameters())
    print(f"{parameters / 1e6:.2f}M parameters, {len(data.prose) / 1e6:.1f}M tokens of prose", flush=True)
    criterion = weighted_loss
    if options.compile:
        compile_blocks(decoder)
        criterion = torch.compile(weighted_loss, dynamic=False)

    def loss_of(batch: list[Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, answers = batch[0].long(), batch[1]
        with autocast(options.device):
            logits = decoder(tokens[:, :-1])
            loss, answer, text = criterion(logits, tokens[:, 1:], answers[:, 1:], args.answer_weight)
        return loss, {"answer": answer, "text": text}

    def evaluate() -> dict[str, float]:
        frozen = copy_decoder(decoder, torch.bfloat16 if options.device.type == "cuda" else torch.float32)
        loss = prose_loss(frozen, test_prose, min(1024, args.max_positions))
        return {"prose_loss": loss, **answer_rates(frozen, documents)}

    freeze_for_workers()
    report = train(decoder, data, loss_of, evaluate, options, out)
    save_hf(decoder, out, tokenizer, model_card(args, decoder, report))
    if report.step == args.steps:
        (out / STATE).unlink(missing_ok=True)
    print(f"{out}: {report.summary}", flush=True)
    return decoder, report


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help=".txt or .txt.xz")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json made here before; default: train one")
    parser.add_argument("--tokenizer-only", action="store_true", help="write the tokenizer to --out and stop")
    parser.add_argument("--init", metavar="DIR", help="start from this checkpoint's weights; its shape counts")
    parser.add_argument("--tiny", action="store_true", help="a shape and a run of seconds on a CPU, for tests")
    shape = parser.add_argument_group("model")
    for name, default in dict(vocab=4096, hidden=320, layers=8, query_heads=10, kv_heads=5, head_dim=32,
                              intermediate=896, max_positions=2048).items():  # fmt: skip
        shape.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    shape.add_argument("--rope-theta", type=float, default=10000.0)
    data = parser.add_argument_group("data")
    data.add_argument("--stages", default="512:0.4,2048:0.6", help="sequence lengths and their share of the steps")
    data.add_argument("--batch-tokens", type=int, default=131072, help="tokens of a step")
    data.add_argument("--recall-share", type=float, default=0.7, help="share of sequences that are recall documents")
    data.add_argument("--turns", type=int, default=16, help="questions of a recall document at most")
    data.add_argument("--answer-weight", type=float, default=8.0)
    data.add_argument("--eval-documents", type=int, default=128, help="held-out recall documents, of 4 questions each")
    data.add_argument("--eval-length", type=int, default=1000)
    add_arguments(parser, steps=4000, lr=2e-3)
    args = parser.parse_args(argv)
    if args.tiny:  # what the user typed stays
        untouched = [name for name in TINY if getattr(args, name) == parser.get_default(name)]
        vars(args).update({name: TINY[name] for name in untouched})
    return args


def average(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="pretrain.py average", description="The mean of checkpoints' weights: two "
                                     "ends of one training miss different things.")  # fmt: skip
    parser.add_argument("folders", nargs="+", metavar="DIR", help="of one shape; the last one's other files are copied")
    parser.add_argument("--out", required=True, metavar="DIR")
    args = parser.parse_args(argv)
    decoders = [load_decoder(folder, "cpu", torch.float32) for folder in args.folders]
    for folder, decoder in zip(args.folders, decoders):
        if decoder.config != decoders[0].config:
            raise ValueError(f"{folder} has another shape than {args.folders[0]}: only one shape has a mean")
    states = [decoder.state_dict() for decoder in decoders]
    mean = {name: sum(state[name] for state in states) / len(states) for name in states[0]}
    decoders[-1].load_state_dict(mean)
    folder, out = Path(args.folders[-1]), Path(args.out)
    save_hf(decoders[-1], out, folder, (folder / "README.md").read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["average"]:
            average(argv[1:])
        else:
            run(parse(argv))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
