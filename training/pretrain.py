"""Train the embedded LLM from scratch: a small decoder that recalls facts from a long text.

Where it sits: text -> **training.pretrain** -> pair/llm -> training.distill -> pair/slm. Training data is plain prose
mixed with recall documents (train split only), each sequence one or the other.

    python -m training.pretrain --text books/*.txt --out pair/llm --compile
    python -m training.pretrain average runs/stage-5 runs/stage-6 --out pair/llm

Books (.txt or .txt.xz) are divided by a line <|endoftext|>. The last book of every file is held out. The first step is
a byte-level BPE tokenizer, unless --tokenizer names one.
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

import command
from checkpoint import load_decoder, resolve
from command import number, read_text, whole
from model import Decoder
from training.data import END, Mixture, encode_books, open_tokenizer, parse_stages, read_books, train_tokenizer
from training.loop import (
    STATE,
    Report,
    add_arguments,
    add_shape,
    autocast,
    compile_blocks,
    copy_decoder,
    fresh_decoder,
    parameter_count,
    save_hf,
    train,
    write_tokenizer,
)
from training.recall import Document, Recall, document_ids

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
    """The one that --tokenizer names, or of the run that goes on, or of --init, or a new one."""
    folder = args.out if args.resume else args.init
    path = Path(args.tokenizer) if args.tokenizer else Path(folder) / "tokenizer.json" if folder else None
    if path is None:
        return train_tokenizer(books, args.vocab)
    if args.resume and not path.is_file():
        raise ValueError(f"--resume: there is no {path}; leave --resume out to start from the beginning")
    tokenizer = open_tokenizer(path)
    if tokenizer.token_to_id(END) is None:
        raise ValueError(f"{path} has no token {END}; give one that training.pretrain made")
    return tokenizer


def model_card(args: argparse.Namespace, decoder: Decoder, report: Report) -> str:
    figures = "".join(f"| {name} | {value:.4f} |\n" for name, value in report.figures.items())
    return f"""# SmallKV's embedded LLM

A demonstration model of {parameter_count(decoder) / 1e6:.1f}M parameters that answers questions about the text before
them, trained from scratch by `training.pretrain` of SmallKV. It is not good for anything else.

- Data: English prose ({len(args.text)} files: {", ".join(sorted(Path(path).name for path in args.text))})
  and recall documents made by `training.recall` (train split, {args.recall_share:.0%} of the sequences).
- Training: {report.summary} on {args.device}, sequence lengths {args.stages}, {args.batch_tokens} tokens a step,
  seed {args.seed}, peak learning rate {args.lr}, answer tokens weighted {args.answer_weight:g} times.

Held out, after training. "exact": the share of answers with every token right, teacher-forced, in {args.eval_documents}
documents of the test split with prompts of {args.eval_length} tokens; below it the same by kind. "prose_loss": nats a
token on held-out books.

| figure | value |
| --- | --- |
{figures}"""


def run(args: argparse.Namespace) -> tuple[Decoder, Report]:
    stages, device, out = parse_stages(args.stages, args.steps), args.device, command.check_folder(args.out)
    books, held_out = read_books(args.text)
    tokenizer = choose_tokenizer(args, books)
    end, vocab = tokenizer.token_to_id(END), tokenizer.get_vocab_size()
    recall = Recall.from_books(books, tokenizer, "train", args.turns)
    prose, test_prose = encode_books(books, tokenizer, end), encode_books(held_out, tokenizer, end)
    data = Mixture(prose, recall, stages, args.batch_tokens, args.recall_share, args.seed, end)
    test = replace(Recall.from_books(held_out, tokenizer, "test"), turns=4)
    documents = [test.document(random.Random(f"evaluation-{i}"), args.eval_length) for i in range(args.eval_documents)]
    if args.init:
        decoder = load_decoder(resolve(args.init), device, torch.float32).requires_grad_(True)
        if decoder.config.vocab_size != vocab:
            raise ValueError(f"--init {args.init} was trained with another tokenizer; give its tokenizer.json")
    else:
        decoder = fresh_decoder(args, vocab, args.max_positions, args.rope_theta).to(device)
    longest = max(args.eval_length, *(stage.length for stage in stages))
    if longest > decoder.config.max_positions:
        raise ValueError(f"sequences of {longest} tokens are longer than the {decoder.config.max_positions} positions "
                         "that the model has; see --stages, --eval-length and --max-positions")  # fmt: skip
    write_tokenizer(tokenizer, out)
    size = f"{parameter_count(decoder) / 1e6:.2f}M parameters, {len(prose) / 1e6:.1f}M tokens of prose"
    print(size, file=sys.stderr, flush=True)
    criterion = weighted_loss
    if args.compile:
        compile_blocks(decoder)
        criterion = torch.compile(weighted_loss, dynamic=False)

    def loss_of(batch: list[Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, answers = batch[0].long(), batch[1]
        with autocast(device):
            logits = decoder(tokens[:, :-1])
            loss, answer, text = criterion(logits, tokens[:, 1:], answers[:, 1:], args.answer_weight)
        return loss, {"answer": answer, "text": text}

    def evaluate() -> dict[str, float]:
        frozen = copy_decoder(decoder, torch.bfloat16 if device.type == "cuda" else torch.float32)
        loss = prose_loss(frozen, test_prose, min(1024, decoder.config.max_positions))
        return {"prose_loss": loss, **answer_rates(frozen, documents)}

    report = train(decoder, data, loss_of, evaluate, args)
    save_hf(decoder, out, tokenizer, model_card(args, decoder, report))
    if report.step >= args.steps:
        (out / STATE).unlink(missing_ok=True)
    print(f"{out}: {report.summary}")
    return decoder, report


def average(args: argparse.Namespace) -> None:
    """The mean of checkpoints' weights, and the other files of the last one."""
    folders = [resolve(folder) for folder in args.folders]
    decoders = [load_decoder(folder, "cpu", torch.float32) for folder in folders]
    for folder, decoder in zip(folders, decoders):
        if decoder.config != decoders[0].config:
            raise ValueError(f"{folder} has another shape than {folders[0]}: only one shape has a mean")
    states = [decoder.state_dict() for decoder in decoders]
    mean = {name: sum(state[name] for state in states) / len(states) for name in states[0]}
    decoders[-1].load_state_dict(mean)
    save_hf(decoders[-1], command.check_folder(args.out), folders[-1], read_text(folders[-1] / "README.md"))


def parse(argv: list[str]) -> argparse.Namespace:
    if argv[:1] == ["average"]:
        parser = command.Parser(prog="training.pretrain average", description=average.__doc__)
        parser.add_argument("folders", nargs="+", metavar="DIR", help="of one shape")
        parser.add_argument("--out", required=True, metavar="DIR")
        return parser.parse_args(argv[1:])
    parser = command.Parser(prog="training.pretrain", description=__doc__.partition("\n")[0],
                            epilog="'training.pretrain average --help': the mean of checkpoints.",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json made here before, else one is trained")
    add_shape(parser, hidden=320, layers=8, query_heads=10, kv_heads=5, head_dim=32, intermediate=896,
              max_positions=2048)  # fmt: skip
    data = parser.add_argument_group("data")
    data.add_argument("--vocab", type=whole(300, 1 << 20), default=4096, help="tokens of a new tokenizer")
    data.add_argument("--rope-theta", type=number(1), default=10000.0)
    data.add_argument("--stages", default="512:0.4,2048:0.6", help="sequence lengths and their share of the steps")
    data.add_argument("--batch-tokens", type=whole(1), default=131072, help="tokens of a step")
    data.add_argument("--recall-share", type=command.share, default=0.7, help="of the sequences: recall documents")
    data.add_argument("--turns", type=whole(1), default=16, help="questions of a recall document at most")
    data.add_argument("--answer-weight", type=number(0), default=8.0, help="of an answer's token; 1: as any other")
    data.add_argument("--eval-documents", type=whole(1), default=128, help="held out, of at most 4 questions each")
    data.add_argument("--eval-length", type=whole(1), default=1000)
    add_arguments(parser, steps=4000, lr=2e-3)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)

    def work() -> int:
        average(args) if "folders" in args else run(args)
        return 0

    return command.ended(work)


if __name__ == "__main__":
    sys.exit(main())
