"""What both trainers share: optimizer, schedule, the loop with stop and resume, the log, the checkpoint folder.

Where it sits: training.pretrain (an LLM from scratch) and training.distill (an assistant for an LLM) bring data and a
loss; `train` below does the rest and `save_hf` writes what checkpoint.load_decoder reads:

    report = train(decoder, data, loss_of, evaluate, args)   # --out/state.pt, --out/log.jsonl
    save_hf(decoder, folder, tokenizer, card)

Nothing here draws random numbers while training: there is no dropout, and the data of a step is a pure function of
seed and step. So weights, optimizer and a step count are all the state there is, and a run that was stopped and resumed
ends with the same bits.
"""

import argparse
import gc
import json
import math
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import command
from checkpoint import checkpoint_weights, read_json
from command import number, read_lines, whole, write_json, write_text
from model import Block, Config, Decoder
from training.data import END

STATE, LOG = "state.pt", "log.jsonl"
FREE = {"out", "init", "tokenizer", "self_text_file", "resume", "stop_after_minutes", "device", "workers", "compile",
        "log_every", "eval_every"}  # flags in which the calls of one run may differ  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Report:
    """How a call of `train` ended; `seconds` counts the calls before it that were resumed."""

    step: int
    seconds: float
    tokens: int
    figures: dict[str, float]  # of the last evaluation

    @property
    def summary(self) -> str:
        return f"{self.step} steps, {self.tokens / 1e6:.1f}M tokens, {self.seconds / 60:.1f} minutes"


def add_shape(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Flags of the model's shape, each with its default."""
    group = parser.add_argument_group("model")
    for name, default in defaults.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=whole(1), default=default, metavar="N")


def add_arguments(parser: argparse.ArgumentParser, steps: int, lr: float) -> None:
    """What both trainers are given, and the flags that `train` reads, with this trainer's defaults."""
    cuda, add = torch.cuda.is_available(), parser.add_argument
    add("--text", nargs="+", required=True, metavar="FILE", help=".txt or .txt.xz")
    add("--out", required=True, metavar="DIR")
    add("--init", metavar="DIR", help="start from this checkpoint's weights; its shape counts")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=whole(1), default=steps, help="steps of the whole run, which the schedule refers to")
    add("--lr", type=number(0, above=True), default=lr, help="peak learning rate")
    add("--warmup", type=command.share, default=0.02, help="share of the steps in which the rate rises")
    add("--seed", type=command.seed, default=1)
    add("--device", type=command.device, default="auto")
    workers = max(1, min(14, (os.cpu_count() or 1) - 2)) if cuda else 0
    add("--workers", type=whole(0, 256), default=workers, help="processes that make the data")
    add("--log-every", type=whole(1), default=20, metavar="STEPS")
    add("--eval-every", type=whole(1), default=500, metavar="STEPS", help="evaluate and save the state")
    add("--stop-after-minutes", type=number(0), metavar="M", help="save the state and end; --resume goes on")
    add("--resume", action="store_true", help=f"go on from {STATE} in --out")
    add("--compile", action="store_true", help="torch.compile: a slow start, then faster")


# ---- model and optimizer ---------------------------------------------------------------------------------------------


def fresh_decoder(args: argparse.Namespace, vocab: int, max_positions: int, rope_theta: float) -> Decoder:
    """The LLaMA-type, tied model of --layers, --hidden and the other shape flags, on the CPU: weights normal with std
    0.02, what adds to the residual stream scaled by 1/sqrt(2L), norms 1, biases 0."""
    if args.head_dim % 2:
        raise ValueError(f"--head-dim {args.head_dim} is odd: RoPE turns pairs of dimensions; give an even one")
    raw = dict(model_type="llama", vocab_size=vocab, max_position_embeddings=max_positions, rms_norm_eps=1e-5)
    raw |= dict(rope_theta=rope_theta, tie_word_embeddings=True, head_dim=args.head_dim)
    raw |= dict(hidden_size=args.hidden, intermediate_size=args.intermediate, num_hidden_layers=args.layers)
    raw |= dict(num_attention_heads=args.query_heads, num_key_value_heads=args.kv_heads)
    return initialise(Decoder(Config.from_hf(raw)), args.seed)


def initialise(decoder: Decoder, seed: int) -> Decoder:
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device starts alike
    for name, parameter in decoder.named_parameters():
        if parameter.dim() < 2:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * decoder.config.layers) if residual else 0.02
            nn.init.normal_(parameter, std=std, generator=generator)
    return decoder


def parameter_count(decoder: Decoder) -> int:
    return sum(parameter.numel() for parameter in decoder.parameters())


def make_optimizer(decoder: Decoder, lr: float) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    parameters = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": 0.1},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=decoder.device.type == "cuda")


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak; a function of step / steps."""
    done = (step + 1) / args.steps
    if done < args.warmup:
        return args.lr * done / args.warmup
    part = (done - args.warmup) / max(1 - args.warmup, 1e-9)
    return args.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * part)))


def autocast(device: torch.device) -> torch.autocast:
    """bf16 arithmetic over fp32 weights on the GPU; plain fp32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def compile_blocks(decoder: Decoder) -> None:
    """torch.compile block by block: blocks of one shape share the compiled code, so it costs seconds and not a minute.

    An `observe` callback has to be marked with torch.compiler.disable, and gets the layer's number as a tensor.
    """
    for module in decoder.modules():
        if isinstance(module, Block):
            # As an int it would be a constant in the code, and every layer a compilation of its own.
            module.self_attn.layer = torch.tensor(module.self_attn.layer)
            module.compile(dynamic=False)


@contextmanager
def eager(args: argparse.Namespace, *decoders: Decoder) -> Iterator[None]:
    """Leave out compiled code, and give layers their plain numbers back: the shapes of an evaluation would each be
    compiled, and caches know layers by number."""
    if not args.compile:
        yield
        return
    layers = [module.self_attn for own in decoders for module in own.modules() if isinstance(module, Block)]
    marks = [attention.layer for attention in layers]
    for attention, mark in zip(layers, marks):
        attention.layer = int(mark)
    with torch.compiler.set_stance("force_eager"):
        yield
    for attention, mark in zip(layers, marks):
        attention.layer = mark


def copy_decoder(decoder: Decoder, dtype: torch.dtype) -> Decoder:
    """A frozen copy in another dtype, not compiled: what the saved checkpoint will be, for evaluation on the way."""
    with torch.device("meta"):
        copy = Decoder(decoder.config)
    weights = {name: tensor.detach().to(dtype, copy=True) for name, tensor in decoder.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    if decoder.config.tied:
        copy.lm_head.weight = copy.embed_tokens.weight
    return copy.eval().requires_grad_(False)


# ---- the loop --------------------------------------------------------------------------------------------------------


def save_state(args: argparse.Namespace, decoder: Decoder, optimizer, step: int, seconds: float, tokens: int) -> None:
    folder, state = Path(args.out), {"model": decoder.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"step": step, "seconds": seconds, "tokens": tokens, "flags": learning_flags(args)}
    torch.save(state, folder / f"{STATE}.part")
    os.replace(folder / f"{STATE}.part", folder / STATE)  # a stop while writing leaves the older state whole


def learning_flags(args: argparse.Namespace) -> dict[str, str]:
    """The flags that a run which goes on must share with the one that began it."""
    return {name: str(value) for name, value in vars(args).items() if name not in FREE}


def load_state(args: argparse.Namespace, decoder: Decoder, optimizer) -> tuple[int, float, int]:
    """Fill both with what `save_state` wrote; the step, the seconds and the tokens so far. ValueError in one line."""
    path = Path(args.out) / STATE
    if not path.is_file():
        raise ValueError(f"--resume: there is no {path}; leave --resume out to start from the beginning")
    try:
        state = torch.load(path, map_location=decoder.device, weights_only=True)
        names = ("model", "optimizer", "flags", "step", "seconds", "tokens")
        model, moments, flags, *counts = (state[name] for name in names)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, IndexError):
        raise ValueError(f"--resume: {path} is damaged; remove it and start from the beginning") from None
    for name, now in learning_flags(args).items():
        if (before := flags.get(name)) != now:
            flag = name.replace("_", "-")
            raise ValueError(f"--resume: {path} is of a run with --{flag} {before}, not {now}; give the same again")
    try:
        decoder.load_state_dict(model)
        optimizer.load_state_dict(moments)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--resume: {path} is of another model: {str(error).splitlines()[0]}") from None
    return tuple(counts)


class Log:
    """log.jsonl: one record every --log-every steps; an evaluation is a record of its own with `eval` in it."""

    def __init__(self, path: Path, start: int):
        # A run that was killed may have logged steps after the state it resumes from, the last of them in part.
        kept = [line for line in read_lines(path, ("step",), torn=True) if line["step"] <= start] if start else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.path = path

    def write(self, **record) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def freeze_for_workers() -> None:
    """Before data workers are forked: keep the garbage collector off what they share, and the tokenizer's threads off
    a fork that they do not survive."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.collect()
    gc.freeze()


Loss = Callable[[list[Tensor], int], tuple[Tensor, dict[str, Tensor]]]  # batch, step -> loss, its parts for the log


def train(
    decoder: Decoder,
    data: Dataset,
    loss_of: Loss,
    evaluate: Callable[[], dict],
    args: argparse.Namespace,
) -> Report:
    """Train `decoder` (fp32, on args.device) up to args.steps, or until the time is over.

    data[step] is the whole batch of a step, a tuple of tensors, the first of them (B, T) tokens. evaluate() returns
    figures for the log; it runs every eval_every steps and at the end.
    """
    folder, device, begin = command.check_folder(args.out), args.device, time.monotonic()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # the few fp32 products (attention rows) go to the tensor cores
    optimizer = make_optimizer(decoder, args.lr)
    start, before, tokens = load_state(args, decoder, optimizer) if args.resume else (0, 0.0, 0)
    freeze_for_workers()
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=range(start, args.steps),
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if args.workers else None,
        multiprocessing_context="fork" if args.workers else None,  # shares the text instead of sending it
    )
    log, figures, names, window = Log(folder / LOG, start), {}, [], []
    mark_time, mark_tokens, step = begin, tokens, start - 1
    decoder.train()
    pause = 1.0 if sys.stderr.isatty() else 30.0  # a log file wants a line now and then
    bar = tqdm(total=args.steps, initial=start, unit="step", dynamic_ncols=True, mininterval=pause)
    for step, batch in enumerate(loader, start):
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = [tensor.to(device, non_blocking=True) for tensor in batch]
        loss, parts = loss_of(batch, step)
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        tokens += batch[0].numel()
        names = ["loss", *parts]
        window.append(torch.stack([loss.detach(), *(part.detach() for part in parts.values())]))  # no wait for the GPU
        done = step + 1 == args.steps
        over = args.stop_after_minutes is not None and time.monotonic() - begin > 60 * args.stop_after_minutes
        bar.update()
        if done or over or (step + 1) % args.log_every == 0:
            means = dict(zip(names, torch.stack(window).mean(0).tolist()))
            window = []
            if not math.isfinite(means["loss"]):
                raise ValueError(f"the loss is {means['loss']} at step {step + 1}; try a lower --lr than {args.lr}")
            now = time.monotonic()
            rate = (tokens - mark_tokens) / (now - mark_time)
            mark_time, mark_tokens = now, tokens
            speed = dict(tokens=tokens, tokens_per_s=round(rate), seconds=before + now - begin)
            log.write(step=step + 1, **means, lr=lr, **speed)
            bar.set_postfix(loss=f"{means['loss']:.3f}", lr=f"{lr:.1e}", tok_s=f"{rate:.3g}", refresh=False)
        if done or over or (step + 1) % args.eval_every == 0:
            figures = evaluate()
            seconds = before + time.monotonic() - begin
            log.write(step=step + 1, seconds=seconds, eval=figures)
            bar.write(f"step {step + 1}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
            save_state(args, decoder, optimizer, step + 1, seconds, tokens)
            mark_time = time.monotonic()  # the time of an evaluation is not the trainer's
        if over:
            break
    bar.close()
    return Report(step + 1, before + time.monotonic() - begin, tokens, figures)


# ---- the checkpoint folder -------------------------------------------------------------------------------------------


def config_to_hf(config: Config, special: dict) -> dict:
    """The config.json that Config.from_hf, and Transformers, read back as this config; `special` are token ids."""
    rope = {name: value for name, value in config.rope.items() if name != "rope_theta"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.query_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tied,
        "torch_dtype": "bfloat16",
        **special,
    }


def write_tokenizer(tokenizer: Tokenizer | Path, folder: Path) -> None:
    """The tokenizer's files: our own with END as its one special token, or those of another checkpoint folder."""
    if isinstance(tokenizer, Path):
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)
        return
    end = tokenizer.token_to_id(END)
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    names = {"bos_token": END, "eos_token": END, "pad_token": END}
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    write_json(folder / "generation_config.json", ids)


def save_hf(decoder: Decoder, folder: Path, tokenizer: Tokenizer | Path, card: str) -> None:
    """Write a Hugging Face folder: weights in bf16 under their usual names, a tied embedding once, the model card."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, folder)
    known = read_json(folder, "generation_config.json", required=False)
    special = {name: known[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in known}
    write_json(folder / "config.json", config_to_hf(decoder.config, special))
    made = checkpoint_weights(decoder)
    weights = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in made.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_text(folder / "README.md", card)
