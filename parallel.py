"""Several GPUs: the LLM split by heads over the processes that torchrun started, the SLM copied on each of them.

    torchrun --nproc-per-node 2 generate.py --llm DIR_OR_ID --slm DIR_OR_ID "Once upon a time"

Where it sits: under the commands. `run` wraps a command, `start` makes the `Team`, checkpoint.py loads this rank's part
of the LLM through it, and everything between (caches, head map, plan, decode loop, CUDA graph) runs as in one process:
a rank's decoder is a `Decoder` of fewer heads, and SmallKV chooses tokens for each KV head by itself, so nothing but
activations and tokens crosses between ranks. Not in the paper.

The split is PyTorch's tensor parallelism: query, key, value, gate and up products by output rows (its ColwiseParallel),
the products after them by columns (RowwiseParallel), whose outputs are summed over the ranks: two all-reduces a layer.
The LLM's vocabulary is split where it divides, the logits gathered. The hooks below do that on plain tensors, not on
DTensors: the values are the same (test_parallel.py sets them beside `parallelize_module`), every product would go
through DTensor's dispatch (on a CPU that made a small MLP 6.5 times as slow), and graph.py joins weights as they are.

The SLM is copied because its layers are small: split in two, a 0.5B would read 0.36 GB less a step (0.12 ms of an H100
by bytes, at most half of its 1.3 ms as measured) and wait for 48 more all-reduces of 10 to 20 us, and its scores, which
any head of the LLM may need, would have to be gathered too. No split was timed.
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

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import Config, Decoder

ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # cut by output rows
COLUMNS = ("o_proj", "down_proj")  # cut by input columns; the partial outputs are summed
MIXED = ("pyramidinfer",)  # methods that choose tokens by the mean over all heads of a layer
PATIENCE = 3.0  # seconds a failing rank waits for rank 0 to say it; and between two Ctrl-C that mean "at once"


@dataclass(frozen=True)
class Team:
    """The ranks that share one LLM; by default one process that has it alone."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None  # None: whatever the command was asked for

    # -- the model --

    def config(self, config: Config) -> Config:
        """The architecture of this rank's part. ValueError where the KV heads do not divide."""
        if config.kv_heads % self.size:
            fitting = [str(n) for n in range(1, config.kv_heads + 1) if config.kv_heads % n == 0]
            raise ValueError(
                f"{config.kv_heads} KV heads of the LLM cannot be split over {self.size} processes; "
                f"use --nproc-per-node {' or '.join(fitting)}"
            )
        inner = self._bounds(config.intermediate_size)
        return replace(
            config, query_heads=config.query_heads // self.size, kv_heads=config.kv_heads // self.size,
            intermediate_size=inner.stop - inner.start,
        )  # fmt: skip

    def _bounds(self, size: int) -> slice:
        """This rank's share of `size` rows or columns; shares differ by one where it does not divide."""
        return slice(size * self.rank // self.size, size * (self.rank + 1) // self.size)

    def _splits_vocabulary(self, config: Config) -> bool:
        return self.size > 1 and config.vocab_size % self.size == 0

    def split(self, config: Config) -> Decoder:
        """A decoder that is this rank's part, uninitialised: shapes cut, sums and gathers in place."""
        decoder = Decoder(self.config(config))
        if self.size == 1:
            return decoder
        for layer in decoder.layers:
            layer.self_attn.o_proj.register_forward_hook(_sum)
            layer.mlp.down_proj.register_forward_hook(_sum)
        if self._splits_vocabulary(config):
            decoder.lm_head = nn.Linear(config.hidden_size, config.vocab_size // self.size, bias=False)
            decoder.lm_head.register_forward_hook(_gather)
        self.tie(decoder)
        return decoder

    def tie(self, decoder: Decoder) -> None:
        """Where the output projection is the embedding, make it so: this rank's rows of it, nothing held twice."""
        if decoder.config.tied:
            weight = decoder.embed_tokens.weight
            if self._splits_vocabulary(decoder.config):
                weight = nn.Parameter(weight.data[self._bounds(decoder.config.vocab_size)], requires_grad=False)
            decoder.lm_head.weight = weight

    def part(self, name: str, tensor, config: Config) -> Tensor:
        """This rank's part of a parameter of the whole LLM; `tensor` is sliced, so a safetensors slice reads no more.

        name: the decoder's, `layers.7.mlp.up_proj.weight`. A bias that is added after the sum is kept by rank 0 alone.
        """
        module, _, kind = name.rpartition(".")
        module = module.rpartition(".")[2]
        shape = tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape
        if module in ROWS or (module == "lm_head" and self._splits_vocabulary(config)):
            return tensor[self._bounds(shape[0])]
        if module in COLUMNS and kind == "weight":
            return tensor[:, self._bounds(shape[1])]
        return torch.zeros_like(tensor[:]) if module in COLUMNS and self.rank else tensor[:]

    def check_method(self, method: str, **flags) -> None:
        """ValueError for a method that mixes heads, and for any of these flags that is set: they need one process."""
        if self.size > 1 and method in MIXED:
            raise ValueError(f"--method {method} takes the mean over all heads of a layer; run it in one process")
        for flag, value in flags.items():
            if self.size > 1 and value:
                raise ValueError(f"--{flag} {value} is not built for several processes; leave it out under torchrun")

    # -- what every rank must know alike --

    def from_first(self, work: Callable, *args):
        """What `work` gives on rank 0, on every rank; its ValueError too. For standard input, which is there once."""
        if self.size == 1:
            return work(*args)
        told = [None]
        if self.rank == 0:
            try:
                told = [(work(*args), None)]
            except ValueError as error:
                told = [(None, error)]
        dist.broadcast_object_list(told, 0)
        value, error = told[0]
        if error is not None:
            raise error
        return value

    def sampler(self, sampler):
        """The sampler for a session of this team: rank 0 draws, all take what it drew."""
        return sampler if self.size == 1 else SharedSampler(sampler, self)

    def report(self, report: dict) -> dict:
        """The reports of all ranks as one: bytes and moves are summed, `ranks` holds each rank's own ledger."""
        if self.size == 1:
            return report
        reports: list[dict] = [{}] * self.size
        dist.all_gather_object(reports, report)
        ledgers = [one["ledger"] for one in reports]
        joined = [{**lines[0], "bytes": sum(line["bytes"] for line in lines)} for lines in zip(*ledgers)]
        tokens = [
            {tier: n if tier == "all" else sum(one[tier] for one in same) / self.size for tier, n in same[0].items()}
            for same in zip(*(one["tokens"] for one in reports))
        ]
        out = {**report, "ledger": joined, "tokens": tokens, "ranks": ledgers}
        out["full_cache_bytes"] = sum(one["full_cache_bytes"] for one in reports)
        if report["similarity"]:
            found = [one["similarity"] for one in reports]
            mean, worst = sum(one["mean"] for one in found) / self.size, min(one["worst"] for one in found)
            out["similarity"] = {**report["similarity"], "mean": mean, "worst": worst}
        if report["moved"]:
            keys, values = (sum(one["moved"][kind] for one in reports) for kind in ("keys", "values"))
            out["moved"] = {**report["moved"], "keys": keys, "values": values}
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
    """A sampler whose choice is rank 0's: logits are alike on all ranks, and this way nothing hangs on it.

    Ctrl-C goes the same way: rank 0 notes it and sends it with the next tokens, so that every rank stops after the same
    step (KeyboardInterrupt, as in one process) and none waits for one that has left.
    """

    def __init__(self, sampler, team: Team):
        self.sampler, self.team, self.asked = sampler, team, 0.0  # asked: when Ctrl-C came, 0 if it did not
        signal.signal(signal.SIGINT, signal.SIG_IGN if team.rank else self._ask_to_stop)

    def _ask_to_stop(self, *_) -> None:
        now = time.monotonic()
        if self.asked and now - self.asked > PATIENCE:  # sooner it is the same one: torchrun passes it on twice
            os._exit(130)  # asked again: at once, and torchrun ends the others
        self.asked = self.asked or now

    def generators(self, batch: int) -> list[torch.Generator]:
        return self.sampler.generators(batch)

    def __call__(self, logits: Tensor, generators: list[torch.Generator]) -> list[int]:
        chosen = self.sampler(logits, generators) if self.team.rank == 0 else [0] * len(logits)
        told = torch.tensor([int(self.asked > 0), *chosen], device=self.team.device)
        dist.broadcast(told, 0)
        stop, *tokens = told.tolist()
        if stop:
            raise KeyboardInterrupt
        return tokens


# ---- Processes -------------------------------------------------------------------------------------------------------


def start(device: str = "auto") -> Team:
    """The team of this process: torchrun's, joined here, or this process alone."""
    size, here = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
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
    store, rank, size = next(dist.rendezvous("env://"))
    join(store, rank, size, where)
    return Team(rank, size, where)


def join(store, rank: int, size: int, device: torch.device) -> None:
    """NCCL on GPUs, gloo on CPUs."""
    cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(minutes=30),
        device_id=device if cuda else None,
    )  # fmt: skip
    if not cuda:
        dist.barrier()  # a rank 0 that leaves at once (a wrong flag) takes the store along, which others still read


def run(command: Callable[[], int]) -> int:
    """A command as one process; or as one of torchrun's, where rank 0 alone speaks and a failure is said once.

    A rank that fails says so in the store and leaves at once; torchrun ends the others, which may be waiting for it in
    an all-reduce. What fails on all ranks alike (a wrong flag) is left to rank 0 to print; what fails on another one
    (its GPU is full) that one prints.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return command()
    rank, spoken = int(os.environ["RANK"]), sys.stderr
    if rank:
        sys.stdout, sys.stderr = open(os.devnull, "w"), io.StringIO()
    cause_is_here = True
    try:
        code = command()
    except SystemExit as ended:  # argparse: the same on every rank
        code = ended.code if isinstance(ended.code, int) else 2 if ended.code else 0
    except KeyboardInterrupt:
        code = 130
    except Exception:
        code, cause_is_here = 1, not _heard("failed", 1.0)  # the sum fails too when another rank has gone
        if cause_is_here:
            traceback.print_exc()
    if code == 0 and dist.is_initialized():
        dist.barrier()
    if code not in (0, 130) and cause_is_here:
        for word in ("failed", "told")[: 2 - (rank > 0)]:
            _say(word)
        if rank and not _heard("told", PATIENCE):  # had rank 0 failed alike, torchrun would have ended this one by now
            lines, gap = sys.stderr.getvalue().splitlines(), "\n" if code == 1 else " "
            print(f"rank {rank}:", *(lines if code == 1 else lines[-1:]), sep=gap, file=spoken, flush=True)
    leave(code)


def leave(code: int) -> None:
    """End this process as it is: NCCL is not taken apart, which would wait for every CUDA graph that holds its kernels,
    and for ranks that may be gone."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # the reader of our output may have gone
            stream.flush()
    os._exit(code)


def _say(word: str) -> None:
    if dist.is_initialized():
        dist.distributed_c10d._get_default_store().set(word, "1")


def _heard(word: str, seconds: float) -> bool:
    """Whether a rank has said so by then. Before the ranks have met nothing is heard."""
    end = time.monotonic() + seconds
    try:
        while not (dist.is_initialized() and dist.distributed_c10d._get_default_store().check([word])):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
    except dist.DistError:
        pass  # the store has gone with the process that held it: its owner has had its say
    return True
