"""Several GPUs: the LLM split by heads over the processes that torchrun started, the SLM copied on each of them.

    torchrun --nproc-per-node 2 generate.py --llm DIR_OR_ID --slm DIR_OR_ID "Once upon a time"

Where it sits: under the commands. `run` wraps a command, `start` makes the `Team`, checkpoint.py loads this rank's part
of the LLM through it, and all between (caches, head map, plans, steps) runs as in one process: a rank's LLM is a
`Decoder` of fewer heads, and SmallKV chooses tokens for each KV head by itself, so nothing but activations and tokens
crosses between ranks. Not in the paper.

The split is tensor parallelism: query, key, value, gate and up by output rows, the products after them by input
columns, their outputs summed over the ranks: two all-reduces a layer, in hooks on plain modules. The vocabulary is
split where it divides, and the logits gathered. The SLM is copied: its layers are small beside their all-reduces, and
its scores, which any head of the LLM may need, would have to be gathered.
"""

import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from statistics import mean

import torch
import torch.distributed as dist
from torch import Tensor, nn

from decode import NotFinite
from model import Config, Decoder
from quantize import JOINED

ROWS = (*JOINED["qkv_proj"], *JOINED["gate_up_proj"])  # cut by output rows
COLUMNS = ("o_proj", "down_proj")  # cut by input columns; the partial outputs are summed
MIXED = ("pyramidinfer", "oracle-shared")  # methods that choose tokens by all heads of a layer together
PATIENCE = 1.0  # seconds in which torchrun has ended the other ranks of one that failed


@dataclass(frozen=True)
class Team:
    """The ranks that share one LLM; by default one process that has it alone."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None  # None: whatever the command was asked for

    @property
    def chunk(self) -> int | None:
        """Prompt tokens at once (decode.Session): ranks must agree, and their free memory differs; None: by memory."""
        return 2048 if self.size > 1 else None

    def settings(self, settings):
        """SmallKV's settings as this team can have them: the heads of a layer lie on several ranks, which do not know
        one another's scores, so each head has as many slots."""
        return replace(settings, uniform=True) if self.size > 1 else settings

    def share(self, size: int) -> slice:
        """This rank's of `size` rows or columns; shares differ by one where it does not divide."""
        return slice(size * self.rank // self.size, size * (self.rank + 1) // self.size)

    def split(self, config: Config) -> Decoder:
        """This rank's part of an LLM, uninitialised: fewer heads, sums and gathers in place. ValueError where the KV
        heads do not divide."""
        heads, inner, vocab = config.kv_heads, self.share(config.intermediate_size), config.vocab_size
        if heads % self.size:
            fitting = " or ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise ValueError(f"{heads} KV heads of the LLM cannot be split over {self.size} processes; "
                             f"use --nproc-per-node {fitting}")  # fmt: skip
        decoder = Decoder(replace(config, query_heads=config.query_heads // self.size, kv_heads=heads // self.size,
                                  intermediate_size=inner.stop - inner.start))  # fmt: skip
        if self.size > 1:
            for layer in decoder.layers:
                for product in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    product.register_forward_hook(_sum)
            if vocab % self.size == 0:
                decoder.lm_head = nn.Linear(config.hidden_size, vocab // self.size, bias=False)
                decoder.lm_head.register_forward_hook(_gather)
        self.tie(decoder)
        return decoder

    def tie(self, decoder: Decoder) -> None:
        """Where the output projection is the embedding, make it so: this rank's rows of it, nothing held twice."""
        if decoder.config.tied:
            weight = decoder.embed_tokens.weight
            if decoder.lm_head.out_features < len(weight):
                weight = nn.Parameter(weight.data[self.share(len(weight))], requires_grad=False)
            decoder.lm_head.weight = weight

    def part(self, name: str, tensor, config: Config) -> Tensor:
        """This rank's part of a tensor of the checkpoint; `tensor` is sliced, so a safetensors slice reads no more.

        name: `model.layers.7.mlp.up_proj.weight`. A bias that is added after the sum is kept by rank 0 alone.
        """
        module, kind = name.split(".")[-2:]
        rows, *columns = tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape
        if module in ROWS or (module == "lm_head" and config.vocab_size % self.size == 0):
            return tensor[self.share(rows)]
        if module in COLUMNS and kind == "weight":
            return tensor[:, self.share(*columns)]
        return torch.zeros(rows) if module in COLUMNS and self.rank else tensor[:]

    def check_method(self, method: str, **flags) -> None:
        """ValueError for a method that mixes heads, and for any of these flags that is set: they need one process."""
        if self.size > 1 and method in MIXED:
            raise ValueError(f"--method {method} looks at all heads of a layer together; run it in one process")
        for flag, value in flags.items():
            if self.size > 1 and value:
                raise ValueError(f"--{flag} {value} is not built for several processes; leave it out under torchrun")

    def from_first(self, work: Callable, *args):
        """What `work` gives on rank 0, on every rank. For standard input, which is there once."""
        told = [work(*args) if self.rank == 0 else None]
        if self.size > 1:
            dist.broadcast_object_list(told, 0)
        return told[0]

    def sampler(self, sampler):
        """The sampler for a session of this team: rank 0 draws, all take what it drew."""
        return sampler if self.size == 1 else SharedSampler(sampler, self)

    def report(self, report: dict) -> dict:
        """The reports of all ranks (report.make_report) as one: bytes and rows are summed, tokens of a KV head are
        means, and `ranks` holds each rank's own ledger."""
        if self.size == 1:
            return report
        every = [report] * self.size
        dist.all_gather_object(every, report)
        out = {**report, "ranks": [one["ledger"] for one in every]}
        out["ledger"] = [{**lines[0], "bytes": sum(line["bytes"] for line in lines)} for lines in zip(*out["ranks"])]
        out["full_cache_bytes"] = sum(one["full_cache_bytes"] for one in every)
        out["tokens"] = [{tier: mean(one[tier] for one in same) for tier in same[0]}
                         for same in zip(*(one["tokens"] for one in every))]  # fmt: skip
        if report["similarity"]:
            found = [one["similarity"] for one in every]
            out["similarity"] = {k: (mean if "mean" in k else min)(one[k] for one in found) for k in found[0]}
        if report["moved"]:
            found = [one["moved"] for one in every]
            out["moved"] = {k: (min if k == "steps" else sum)(one[k] for one in found) for k in found[0]}
        return out


def _sum(module: nn.Module, inputs, out: Tensor) -> Tensor:
    """Each rank's heads (or MLP columns) gave a part of the output: (B, T, hidden) summed over the ranks, in place."""
    dist.all_reduce(out)
    return out


def _gather(module: nn.Module, inputs, out: Tensor) -> Tensor:
    """Logits (..., V / ranks) of this rank's vocabulary -> (..., V) on every rank."""
    parts = out.new_empty(dist.get_world_size(), *out.shape)
    dist.all_gather(list(parts.unbind()), out.contiguous())
    return parts.movedim(0, -2).flatten(-2)


class SharedSampler:
    """A sampler whose choice is rank 0's, so that nothing hangs on logits being alike on all ranks to the last bit.

    Ctrl-C goes the same way: rank 0 notes it and sends it with the next tokens, so that every rank stops after the same
    step (KeyboardInterrupt, as in one process) and none waits for one that has left. So do logits that are not finite.
    """

    def __init__(self, sampler, team: Team):
        self.sampler, self.team, self.generators, self.asked = sampler, team, sampler.generators, False
        signal.signal(signal.SIGINT, self._ask_to_stop)

    def _ask_to_stop(self, *_) -> None:
        self.asked = True

    def __call__(self, logits: Tensor, generators: list[torch.Generator]) -> list[int]:
        chosen, broken = [0] * len(logits), False
        try:
            chosen = self.sampler(logits, generators) if self.team.rank == 0 else chosen
        except NotFinite:
            broken = True
        told = torch.tensor([self.asked, broken, *chosen], device=self.team.device)
        dist.broadcast(told, 0)
        stop, broken, *tokens = told.tolist()
        if stop:
            raise KeyboardInterrupt
        if broken:
            raise NotFinite
        return tokens


# ---- Processes -------------------------------------------------------------------------------------------------------


def start(device: str = "auto") -> Team:
    """The team of this process: torchrun's, joined here (NCCL on GPUs, gloo on CPUs), or this process alone."""
    size, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if size == 1:
        return Team()
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {device}: each process takes a GPU of its own; use auto, cuda or cpu")
    count = torch.cuda.device_count()
    cuda = device == "cuda" or (device == "auto" and count > 0)
    if cuda and here > count:
        raise ValueError(f"{here} processes need as many GPUs, PyTorch sees {count}; lower --nproc-per-node")
    where = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(where)
    name, own = ("nccl", where) if cuda else ("gloo", None)
    dist.init_process_group(name, device_id=own, timeout=timedelta(minutes=30))  # a prompt may be typed into rank 0
    return Team(dist.get_rank(), size, where)


def run(command: Callable[[], int]) -> int:
    """A command as one process; or as one of torchrun's, where rank 0 alone speaks and a failure is said once.

    torchrun ends the other ranks of one that has failed and left. So what is wrong on all ranks is said by rank 0, the
    first to speak; what is wrong on another by that one, after it has waited for rank 0; and a rank whose collective
    broke because another left is ended before it says so. Processes end as they are: taking NCCL apart would wait for
    CUDA graphs that hold its kernels, and for ranks that have gone.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return command()
    rank, spoken, said = int(os.environ["RANK"]), sys.stderr, ""
    if rank:
        sys.stdout, sys.stderr = open(os.devnull, "w"), io.StringIO()
    try:
        code = command()
        if code == 0 and dist.is_initialized():
            dist.barrier()
    except SystemExit as ended:  # argparse: the same on every rank
        code = 2 if ended.code else 0
    except KeyboardInterrupt:
        code = 130
    except Exception:
        code, said = 1, traceback.format_exc()
    if code not in (0, 130):
        time.sleep(PATIENCE * ((rank > 0) + (code == 1)))
        if rank:
            said = f"rank {rank}: {said or sys.stderr.getvalue().splitlines()[-1]}\n"
        spoken.write(said)
    for stream in (sys.stdout, spoken):
        if stream is not None:  # the reader of our output may have gone
            stream.flush()
    os._exit(code)
