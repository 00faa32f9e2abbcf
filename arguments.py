"""What generate.py is asked: its flags, and the prompts and settings that are made of them.

Where it sits: under generate.py, which runs what is read here. `--paper` is the paper's setting (settings.py).
"""

import argparse
import select
import sys
from dataclasses import fields
from pathlib import Path

from backend import NAMES
from baselines import BASELINES
from checkpoint import DTYPES
from match import MATCHERS
from settings import HELD, SCORES, Settings

DTYPE_CHOICES = {"auto": None, **DTYPES}


def input_waits() -> bool:
    """Whether something was piped in. A terminal, an empty file or a pipe in which nothing is yet is nothing."""
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return False
    return bool(select.select([sys.stdin], [], [], 0.2)[0]) and bool(sys.stdin.buffer.peek(1))


def read_prompts(args) -> list[str]:
    """Prompts from the arguments, from files (one prompt a file), or from standard input (one prompt)."""
    prompts = list(args.prompt)
    for name in args.prompt_file:
        try:
            data = Path(name).read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read prompt file {name}: {error.strerror}") from None
        prompts.append(_utf8(data, f"prompt file {name}"))
    if not prompts:
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError("no prompt: give one as an argument, with --prompt-file, or on standard input")
        prompts.append(_utf8(sys.stdin.buffer.read(), "standard input"))
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise ValueError(f"prompt {number} is empty: there is nothing to continue")
    return prompts


def _utf8(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}") from None


def check_speculation(args) -> None:
    """ValueError names what --speculate does not go with, before anything is loaded."""
    if args.speculate < 0:
        raise ValueError(f"--speculate {args.speculate} is negative; 0 drafts nothing, 4 is usual")
    if args.speculate and args.method not in ("full", "smallkv"):
        raise ValueError(f"--speculate works with --method full and smallkv, not {args.method}")
    if args.speculate and args.slm_layers is not None:
        raise ValueError(f"--speculate needs the SLM's words, and --slm-layers {args.slm_layers} stops before them; "
                         "leave one of the two out")  # fmt: skip


def make_settings(args) -> Settings:
    """The method's settings from the arguments; --paper gives the paper's, and what is typed beside it still counts."""
    asked = {field.name: getattr(args, field.name) for field in fields(Settings)}
    asked = {name: value for name, value in asked.items() if value is not None}
    if args.speculate or args.saliency_shift is False:
        asked = {"scores": "slm", **asked}  # these cannot have fused ones
    return Settings.paper(**asked) if args.paper else Settings(**asked)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models = parser.add_argument_group("models")
    models.add_argument("--llm", help="the large model: a folder or a hub id (default: the embedded pair)")
    models.add_argument("--slm", help="the small model of the same series: a folder or a hub id")
    models.add_argument("--slm-layers", type=int, metavar="N", help="run the SLM's first N layers alone (default: all)")
    models.add_argument("--revision", help="hub revision of the LLM")
    models.add_argument("--slm-revision", help="hub revision of the SLM")
    models.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    models.add_argument("--dtype", default="auto", choices=DTYPE_CHOICES, help="auto: as stored, or float32 on CPU")
    models.add_argument("--quantize", choices=("int4",), help="round the LLM's weights to INT4 while loading")
    models.add_argument("--slm-quantize", choices=("int4",), help="the SLM's too")
    models.add_argument("--backend", default="auto", choices=NAMES, help="of the decode steps: plain PyTorch or Triton "
                        "kernels in a CUDA graph; auto (default): triton on CUDA, torch elsewhere")  # fmt: skip
    method = parser.add_argument_group("method")
    method.add_argument("--method", default="smallkv", choices=("full", "smallkv", *BASELINES))
    method.add_argument("--compare", action="store_true", help="answer with the full cache too, side by side")
    method.add_argument("--budget", type=float, help=f"share of the full cache's bytes (default: {Settings.budget})")
    method.add_argument("--budget-tokens", type=int, help="instead: bytes of that many whole tokens")
    method.add_argument("--score-decay", type=float, metavar="D", help="score = D * score + newest row (default: "
                        f"{Settings.score_decay}; 1 is the paper's accumulation)")  # fmt: skip
    method.add_argument("--scores", choices=SCORES, help="what tokens are ranked by: the LLM's own attention where "
                        "it sees a token, elsewhere the SLM's (fused, the default), or the SLM's alone (slm; default "
                        "with --paper, --speculate and --no-saliency-shift)")  # fmt: skip
    method.add_argument("--matcher", choices=MATCHERS, help=f"how heads are matched (default: {Settings.matcher})")
    method.add_argument("--reach", type=float, metavar="X", help="SLM layers an LLM layer is matched with: 1, as "
                        f"deep as it; 2, twice that; inf, all (default: {Settings.reach}, --paper: inf)")  # fmt: skip
    switch = argparse.BooleanOptionalAction
    method.add_argument("--marginal", action=switch, help="marginal compensation (default: "
                        f"{'on' if Settings.marginal else 'off'})")  # fmt: skip
    method.add_argument("--saliency-shift", action=switch, help="rank tokens by the SLM (default)")
    method.add_argument("--prefetch", action=switch, help="move tiers a layer ahead (default)")
    method.add_argument("--refresh", type=int, metavar="R", help="choose the tiers in every R-th step (default: 1)")
    method.add_argument("--max-moves", type=int, metavar="S", help="at most S tokens a KV head enter at a plan")
    method.add_argument("--split", metavar="C:R:M", help="critical : recent : marginal tokens (default: 2:1:2)")
    method.add_argument("--gate", type=float, metavar="X", help="no marginal tier below this similarity of the heads")
    method.add_argument("--slm-budget", type=float, metavar="SHARE", help="of the SLM's own cache that stays, by H2O's "
                        "rule (default: 1, all)")  # fmt: skip
    method.add_argument("--llm-kv", choices=HELD, help="how SmallKV's tiers hold K and V: exact (default), or in one "
                        "byte a number, for prompts of 100 tokens or more")  # fmt: skip
    method.add_argument("--slm-kv", choices=HELD, help="the same of the SLM's own cache (the whole one, no drafts)")
    method.add_argument("--paper", action="store_true", help="the paper's setting: the SLM's scores, "
                        "decay 1, Jaccard over all layers, marginal tier")  # fmt: skip
    prompt = parser.add_argument_group("prompts")
    prompt.add_argument("prompt", nargs="*", help="prompts; with none, and no file, standard input is read")
    prompt.add_argument("--prompt-file", action="append", default=[], metavar="FILE", help="a file that is one prompt")
    prompt.add_argument("--chat", action="store_true", help="put each prompt into the checkpoint's chat template")
    sampling = parser.add_argument_group("decoding")
    sampling.add_argument("--max-new-tokens", type=int, default=256)
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    sampling.add_argument("--top-p", type=float, default=1.0)
    sampling.add_argument("--top-k", type=int, default=0)
    sampling.add_argument("--seed", type=int, default=0)
    sampling.add_argument("--speculate", type=int, default=0, metavar="K", help="the SLM drafts K tokens, the LLM "
                          "verifies them in one forward; --compare: beside the same without (default: 0)")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write answers and report for machines")
