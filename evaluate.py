"""What a method costs in quality, measured: every figure beside the full cache on the same tokens.

Where it sits: above everything, like generate.py; it drives `decode.Session` with given tokens instead of its own.

    python evaluate.py wikitext --llm DIR --slm DIR --data ../shared/data --budgets 0.2,0.1 --decays 1,0.5

`wikitext`: the model reads `--prompt` tokens, then `--steps` more one by one (teacher forcing). At every step the
prediction under the method is compared with the full cache's: perplexity of the true next token, KL(full || method),
agreement of the most likely token. One table row a setting; `--json FILE` keeps every figure.
"""

import argparse
import dataclasses
import itertools
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tqdm import tqdm

from checkpoint import CheckpointError
from decode import Session
from generate import DTYPE_CHOICES, check_writable, load_pair
from match import MATCHERS, WINDOW_MIN
from model import Decoder
from smallkv import Settings, SmallKV


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting's figures. moved: rows of K brought in per step, as a share of the critical set."""

    budget: float
    score_decay: float
    marginal: bool
    saliency_shift: bool
    matcher: str
    perplexity: float
    kl: float
    top1: float
    moved: float
    similarity: float
    seconds: float


def read_windows(path: Path, tokenizer: Tokenizer, length: int, samples: int) -> list[list[int]]:
    """`samples` windows of `length` token ids, spread evenly over a text file."""
    try:
        ids = tokenizer.encode(path.read_text(encoding="utf-8")).ids
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; name its folder with --data") from None
    if len(ids) < samples * length:
        raise ValueError(f"{path} has {len(ids)} tokens, too few for {samples} samples of {length}")
    stride = (len(ids) - length) // max(1, samples - 1)
    return [ids[i * stride : i * stride + length] for i in range(samples)]


@torch.inference_mode()
def full_logits(llm: Decoder, windows: list[list[int]], prompt: int) -> torch.Tensor:
    """The full cache's predictions after each teacher-forced token: (B, steps, V) fp32."""
    rows = [llm(torch.tensor([window[:-1]], device=llm.device))[0, prompt:] for window in windows]
    return torch.stack(rows).float()


def measure(llm: Decoder, slm: Decoder, settings: Settings, windows: list[list[int]], prompt: int, full) -> Row:
    """Teacher-force the windows under one setting, and compare with the full cache's logits (B, steps, V)."""
    begin = time.perf_counter()
    policy = SmallKV(llm, slm, settings)
    steps = full.shape[1]
    session = Session(llm, policy, [window[:prompt] for window in windows], steps)
    session.prefill()
    loss = kl = top1 = 0.0
    for i in range(steps):
        logits = session.step([window[prompt + i] for window in windows]).float()  # (B, V)
        target = torch.tensor([window[prompt + i + 1] for window in windows], device=logits.device)
        loss += F.cross_entropy(logits, target).item() / steps
        reference = full[:, i].log_softmax(-1)
        kl += F.kl_div(logits.log_softmax(-1), reference, log_target=True, reduction="batchmean").item() / steps
        top1 += (logits.argmax(-1) == reference.argmax(-1)).float().mean().item() / steps
        if i == 0:
            first_moves = session.cache.keys_moved  # the first plan fills the slots: not a movement of the steady state
    heads = len(windows) * llm.config.layers * llm.config.kv_heads
    critical = sum(settings.sizes(prompt + i).critical for i in range(2, steps + 1)) * heads
    moved = (session.cache.keys_moved - first_moves) / critical
    similarity = torch.stack([m.similarity for m in policy.maps]).mean().item()
    chosen = (settings.budget, settings.score_decay, settings.marginal, settings.saliency_shift, settings.matcher)
    return Row(*chosen, math.exp(loss), kl, top1, moved, similarity, time.perf_counter() - begin)


def grid(args) -> list[Settings]:
    """Every combination asked for; without saliency shift only the LLM's own scores matter, and both halves show."""
    unknown = [name for name in args.variants.split(",") if name not in VARIANTS]
    if unknown:
        raise ValueError(f"unknown variant {unknown[0]!r}; supported: {', '.join(VARIANTS)}")
    halves = [tuple(name.split("+")) for name in args.variants.split(",")]
    settings = []
    for budget, decay, half in itertools.product(_floats(args.budgets), _floats(args.decays), halves):
        marginal, shift = "no-marginal" not in half, "no-saliency-shift" not in half
        settings.append(Settings(budget, None, decay, args.matcher, marginal, shift))
    return settings


def _floats(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{text!r} is not a list of numbers; write it like 0.2,0.1") from None


VARIANTS = ("both", "no-marginal", "no-saliency-shift", "no-marginal+no-saliency-shift")
HEADINGS = ("budget", "matcher", "decay", "marginal", "shift", "perplexity", "KL to full", "top-1", "moved")


def cells(row: Row) -> list[str]:
    halves = ["yes" if half else "no" for half in (row.marginal, row.saliency_shift)]
    figures = [f"{row.perplexity:.2f}", f"{row.kl:.3f}", f"{row.top1:.3f}", f"{row.moved:.1%}"]
    return [f"{row.budget:.0%}", row.matcher, f"{row.score_decay:g}", *halves, *figures]


def print_table(rows: list[Row], title: str, console: Console) -> None:
    table = Table(*HEADINGS, title=title)
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)


def print_markdown(rows: list[Row], title: str) -> None:
    print(f"{title}\n\n| {' | '.join(HEADINGS)} |\n|{' --- |' * len(HEADINGS)}")
    for row in rows:
        print(f"| {' | '.join(cells(row))} |")


def run_wikitext(args) -> None:
    settings = grid(args)
    if args.prompt < WINDOW_MIN or args.steps < 2 or args.samples < 1:
        raise ValueError(f"--prompt should be at least {WINDOW_MIN}, --steps at least 2 and --samples at least 1")
    if args.json:
        check_writable(Path(args.json))
    pair = load_pair(args.llm, args.slm, args.device, args.dtype)
    llm, slm, device = pair.llm, pair.slm, pair.llm.device
    length = args.prompt + args.steps + 1
    windows = read_windows(Path(args.data) / "wikitext-2" / "test.txt", pair.text.tokenizer, length, args.samples)
    full = full_logits(llm, windows, args.prompt)
    targets = torch.tensor([window[args.prompt + 1 :] for window in windows], device=full.device)
    perplexity = F.cross_entropy(full.flatten(0, 1), targets.flatten()).exp().item()
    rows = []
    for setting in tqdm(settings, desc="settings", unit="setting", disable=None):
        rows.append(measure(llm, slm, setting, windows, args.prompt, full))
        if args.json:  # after every setting: a run that is stopped keeps what it has
            content = {"arguments": vars(args), "full_perplexity": perplexity, "rows": [vars(row) for row in rows]}
            Path(args.json).write_text(json.dumps(content, indent=1) + "\n")
    title = f"wikitext-2 test, prompt {args.prompt}, {args.steps} steps, {args.samples} sequences, {llm.dtype}, "
    title += f"{device}: full cache perplexity {perplexity:.3f}, head similarity {rows[0].similarity:.3f}"
    if args.markdown:
        print_markdown(rows, title)
    else:
        print_table(rows, title, Console())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tasks = parser.add_subparsers(dest="task", required=True)
    task = tasks.add_parser("wikitext", help="perplexity and KL to the full cache, teacher-forced")
    task.add_argument("--llm", required=True, help="folder or hub id")
    task.add_argument("--slm", required=True, help="folder or hub id")
    task.add_argument("--data", default="../shared/data", help="folder that holds wikitext-2/test.txt")
    task.add_argument("--budgets", default="0.5,0.2,0.1,0.05")
    task.add_argument("--decays", default="1,0.9,0.5,0")
    task.add_argument("--variants", default="both,no-marginal", help=f"of {', '.join(VARIANTS)}")
    task.add_argument("--matcher", default=Settings.matcher, choices=MATCHERS)
    task.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    task.add_argument("--prompt", type=int, default=512)
    task.add_argument("--steps", type=int, default=128)
    task.add_argument("--samples", type=int, default=8)
    task.add_argument("--device", default="auto")
    task.add_argument("--dtype", default="auto", choices=DTYPE_CHOICES)
    task.add_argument("--json", help="write every figure here")
    args = parser.parse_args(argv)
    try:
        run_wikitext(args)
    except (CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
