"""The LLM split over processes against one process: the same logits and tokens, each rank with its own share of bytes.
The processes are forks of this one that meet over gloo, or two GPUs' over NCCL."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import generate as command
import parallel
from baselines import BASELINES
from checkpoint import checkpoint_weights, load_decoder, weight_bytes
from conftest import random_prompts, tiny_decoder
from decode import Policy, Sampler, Session, Timing, generate_ids
from model import Decoder
from parallel import COLUMNS, MIXED, ROWS, Team
from smallkv import Settings, SmallKV
from test_checkpoint import WORDS, save_decoder, write_checkpoint

ROOT = Path(__file__).parents[1]
LENGTHS = (130, 63, 97, 157)  # two of them meet the matching window, one while it decodes
SETTINGS = {"default": Settings(uniform=True), "sampled": Settings(uniform=True), "paper": Settings.paper(),
            "three tiers": Settings(uniform=True, marginal=True, budget=0.1)}  # fmt: skip
PROMPT = WORDS.strip()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def join(rank: int, size: int, port: int) -> None:
    """What torchrun tells its processes."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({k: str(v) for k, v in {**names, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()})
    torch.set_num_threads(1)


def spread(size: int, tmp_path, work, *args, device="cpu", start="fork") -> list:
    """What `work(team, *args)` returns on each of `size` processes, by rank. One that dies is an error, not a wait."""
    context, port = multiprocessing.get_context(start), free_port()
    tasks = [(rank, size, port, tmp_path, device, work, args) for rank in range(size)]
    processes = [context.Process(target=_rank, args=task) for task in tasks]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes) and not any(process.exitcode for process in processes):
        time.sleep(0.02)
    assert ended(processes) == [0] * size
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(size)]


def ended(processes: list) -> list[int]:
    """Exit codes; who has not left by now is ended."""
    for process in processes:
        process.terminate()
        process.join()
    return [process.exitcode for process in processes]


def _rank(rank: int, size: int, port: int, folder: Path, device: str, work, args) -> None:
    join(rank, size, port)

    def save() -> int:
        torch.save(work(parallel.start(device), *args), folder / f"{rank}.pt")
        return 0

    parallel.run(save)


def tiny_shape(**changes) -> Decoder:
    """4 KV heads of 2 query heads each, an MLP that 4 ranks cannot share evenly."""
    return tiny_decoder(**{"heads": 8, "kv_heads": 4, "intermediate_size": 50, **changes})


def random_biases(decoder: Decoder) -> Decoder:
    generator = torch.Generator().manual_seed(7)
    for parameter in decoder.parameters():
        if parameter.dim() == 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return decoder


def shard(team: Team, whole: Decoder) -> Decoder:
    """This rank's part of a decoder that is there as a whole."""
    part, weights = team.split(whole.config).requires_grad_(False).eval(), checkpoint_weights(whole)
    for name, tensor in checkpoint_weights(part).items():
        tensor.copy_(team.part(name, weights[name], whole.config))
    team.tie(part)
    return part.to(team.device)


# ---- The model -------------------------------------------------------------------------------------------------------


KINDS = {
    "llama": {},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True, "vocab": 96},
    "qwen3, all biases": {"model_type": "qwen3", "attention_bias": True, "mlp_bias": True, "vocab": 100},
    "tied, odd vocabulary": {"tie_word_embeddings": True},
}


def logits_of_a_rank(team: Team, changes: dict) -> tuple:
    part = shard(team, random_biases(tiny_shape(**changes)))
    with torch.inference_mode():
        return part(torch.tensor(random_prompts(9, vocab=90))), held_bytes(part), part.config


def held_bytes(decoder: Decoder) -> int:
    """Views of one tensor count once."""
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in decoder.parameters()}.values())


@pytest.mark.parametrize("name", KINDS)
def test_logits_of_every_rank_are_those_of_the_whole(name, tmp_path):
    whole = random_biases(tiny_shape(**KINDS[name]))
    with torch.inference_mode():
        expected = whole(torch.tensor(random_prompts(9, vocab=90)))
    for rank, (logits, held, config) in enumerate(spread(4, tmp_path, logits_of_a_rank, KINDS[name])):
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
        assert (config.query_heads, config.kv_heads, config.head_dim) == (2, 1, 16)
        assert held == weight_bytes(whole.config, torch.float32, team=Team(rank, 4))


@pytest.mark.parametrize("size", [3, 8])
def test_ranks_that_do_not_divide_the_kv_heads(size):
    with pytest.raises(ValueError, match=f"4 KV heads of the LLM cannot .* over {size} .* 1 or 2 or 4"):
        Team(0, size).split(tiny_shape().config)


def test_a_checkpoint_loads_by_parts(tmp_path):
    """Each rank's tensors are the slices of the file's, the parts together the whole."""
    whole = random_biases(tiny_shape(tie_word_embeddings=True, vocab=96))
    parts = [load_decoder(save_decoder(whole, tmp_path), team=Team(rank, 4)) for rank in range(4)]
    weights = [checkpoint_weights(part) for part in parts]
    for name, expected in checkpoint_weights(whole).items():
        cut = [each[name] for each in weights]
        dim = next((dim for dim, names in enumerate((ROWS, COLUMNS)) if name.split(".")[-2] in names), None)
        if dim is not None:
            assert torch.equal(torch.cat(cut, dim), expected), name
        else:
            assert all(torch.equal(each, expected) for each in cut), name
    assert torch.equal(torch.cat([part.lm_head.weight for part in parts]), whole.embed_tokens.weight)
    for part in parts:  # rows of the embedding, not a copy of them
        assert part.lm_head.weight.untyped_storage().data_ptr() == part.embed_tokens.weight.untyped_storage().data_ptr()
    with pytest.raises(ValueError, match="INT4 weights are not split over 4 processes; use one"):
        load_decoder(tmp_path, quantize=True, team=Team(0, 4))


# ---- Tokens ----------------------------------------------------------------------------------------------------------


def answers(team: Team, name: str, sampler: Sampler, changes: dict) -> tuple[list, dict]:
    """The tokens of 14 steps for prompts of several lengths, and the report."""
    shape, device = {"head_dim": 16, **changes}, team.device or "cpu"
    llm, slm = tiny_shape(**shape), tiny_decoder(heads=4, kv_heads=2, seed=1, device=device, **shape)
    llm = shard(team, llm) if team.size > 1 else llm.to(device)
    if name in SETTINGS:
        policy = SmallKV(llm, slm, SETTINGS[name])
    else:
        policy = Policy(llm) if name == "full" else BASELINES[name](llm)
    session, timing = Session(policy, random_prompts(*LENGTHS), 14), Timing()
    made = list(generate_ids(session, team.sampler(sampler), 14, timing=timing))
    return made, team.report(command.make_report(session, timing))


def assert_same(one, ranks) -> None:
    """Tokens on every rank as in one process; bytes of the LLM's cache divided, of the SLM's on each."""
    expected, alone = one
    for made, report in ranks:
        assert made == expected
        size = len(report["ranks"])
        for line, whole, *parts in zip(report["ledger"], alone["ledger"], *report["ranks"], strict=True):
            copies = size if whole["model"] == "SLM" else 1
            counts = 160 * (size - 1) * (whole["what"] == "slot tables")  # of each layer, on each rank
            assert line["bytes"] == pytest.approx(copies * whole["bytes"], abs=counts)
            assert {part["bytes"] for part in parts} == {line["bytes"] // size}
        assert report["full_cache_bytes"] == alone["full_cache_bytes"]
        for mine, theirs in zip(report["tokens"], alone["tokens"], strict=True):
            assert mine == pytest.approx(theirs)
        assert report["moved"] == alone["moved"]
        assert report["similarity"] == (alone["similarity"] and pytest.approx(alone["similarity"], abs=1e-5))


@pytest.mark.parametrize("name", ["full", *SETTINGS, *(name for name in BASELINES if name not in MIXED)])
def test_tokens_are_those_of_one_process(name, tmp_path):
    """One sequence meets the matching window while it decodes. The paper's setting is split over four."""
    given = name, Sampler(temperature=0.8, top_p=0.9, seed=3) if name == "sampled" else Sampler(), {}
    assert_same(answers(Team(), *given), spread(4 if name == "paper" else 2, tmp_path, answers, *given))


def test_methods_that_mix_heads_are_refused():
    assert set(MIXED) < set(BASELINES)
    Team().check_method("pyramidinfer")
    with pytest.raises(ValueError, match="--method pyramidinfer .* one process"):
        Team(0, 2).check_method("pyramidinfer")
    Team(0, 2).check_method("smallkv", speculate=0)
    with pytest.raises(ValueError, match="--speculate 4 is not built for several processes"):
        Team(0, 2).check_method("smallkv", speculate=4)


def on_a_gpu(team: Team) -> list:
    return [answers(team, name, Sampler(), {"head_dim": 32}) for name in ("full", "default", "paper")]


def test_two_gpus_make_the_tokens_of_one(tmp_path):
    """NCCL, with the all-reduces of a step in its CUDA graph."""
    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")
    ranks = spread(2, tmp_path, on_a_gpu, device="cuda", start="spawn")
    for alone, *parts in zip(on_a_gpu(Team(device=torch.device("cuda", 0))), *ranks):
        assert_same(alone, parts)


# ---- Processes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path):
    """Folders of an LLM with 2 KV heads and of an SLM, as arguments."""
    llm = write_checkpoint(tmp_path / "llm")
    slm = write_checkpoint(tmp_path / "slm", heads=4, head_dim=8, seed=1)
    return ["--llm", str(llm), "--slm", str(slm), "--device", "cpu"]


class Ranks:
    """The command on `size` processes as torchrun would start them, their outputs in files."""

    def __init__(self, size: int, folder: Path, arguments: list[str], change=None):
        """change(rank): what is done in each process before the command."""
        self.folder, port, context = folder, free_port(), multiprocessing.get_context("fork")
        tasks = [(self, rank, size, port, arguments, change) for rank in range(size)]
        self.processes = [context.Process(target=Ranks._command, args=task) for task in tasks]
        for process in self.processes:
            process.start()

    def _command(self, rank: int, size: int, port: int, arguments: list[str], change) -> None:
        join(rank, size, port)
        parallel.PATIENCE = 0.5
        sys.stdout, sys.stderr = (open(self.folder / f"{kind}{rank}", "w", buffering=1) for kind in ("out", "err"))
        if change:
            change(rank)
        parallel.run(lambda: command.main(arguments))

    def text(self, kind: str) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"{kind}?")))

    def codes(self) -> list[int]:
        """Exit codes by rank; once one has failed the others are ended, as torchrun does: -SIGTERM."""
        end = time.monotonic() + 30
        while any(p.is_alive() for p in self.processes) and time.monotonic() < end:
            if any(p.exitcode for p in self.processes):
                time.sleep(0.1)
                break
            time.sleep(0.01)
        return ended(self.processes)


def test_torchrun_prints_the_answer_of_one_process_once(models, tmp_path, capsys):
    """The prompt comes on standard input, which the processes have together."""
    flags = [*models, "--max-new-tokens", "20"]
    assert command.main([*flags, "--uniform", PROMPT, "--json", str(tmp_path / "one.json")]) == 0
    expected = capsys.readouterr().out
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*launch, ROOT / "generate.py", *flags, "--json", tmp_path / "two.json"], input=PROMPT, capture_output=True,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == expected and ran.stderr.count("runs on cpu") == 1
    one, two = (json.loads((tmp_path / f"{name}.json").read_text())["smallkv"] for name in ("one", "two"))
    assert one["answers"] == two["answers"] and len(two["report"]["ranks"]) == 2


def test_a_mistake_is_said_once(models, tmp_path):
    for size, flags, line in (
        (2, ["--max-new-tokens", "0"], "argument --max-new-tokens: 0 is not a whole number of at least 1"),
        (2, ["--method", "pyramidinfer"],
         "--method pyramidinfer looks at all heads of a layer together; run it in one process"),
        (2, ["--device", "cuda:1"], "--device cuda:1: each process takes a GPU of its own; use auto, cuda or cpu"),
        (3, [], "2 KV heads of the LLM cannot be split over 3 processes; use --nproc-per-node 1 or 2"),
    ):  # fmt: skip
        ranks = Ranks(size, tmp_path, [*models, *flags, PROMPT])
        assert ranks.codes() == [2] + [-signal.SIGTERM] * (size - 1)
        assert ranks.text("err") == f"error: {line}\n" and ranks.text("out") == ""


ERRORS = {"error: out of memory: its GPU is full": torch.OutOfMemoryError("its GPU is full"), "KeyError": KeyError("x")}


@pytest.mark.parametrize("said", ERRORS)
def test_one_that_fails_says_so_and_the_others_end(said, models, tmp_path):
    def fail(rank):
        def allocate(*_):
            raise ERRORS[said]

        if rank == 1:
            SmallKV.allocate = allocate

    ranks = Ranks(2, tmp_path, [*models, PROMPT], fail)
    assert ranks.codes() == [-signal.SIGTERM, 2 if said.startswith("error") else 1]
    lines = [line for line in ranks.text("err").splitlines() if line and not line.startswith("runs on")]
    assert lines[0].startswith("rank 1: ") and said in lines[-1]
    assert len(lines) == 1 or "Traceback (most recent call last)" in lines[0]


def test_ctrl_c_stops_all_after_the_same_step(models, tmp_path):
    """Sent twice, as torchrun does; what was there by then is printed, with the report of both."""
    ranks = Ranks(2, tmp_path, [*models, "--max-new-tokens", "600", PROMPT])
    while not ranks.text("out").strip():
        time.sleep(0.01)
    for process in ranks.processes * 2:
        os.kill(process.pid, signal.SIGINT)
    assert ranks.codes() == [130, 130]
    assert "interrupted" in ranks.text("err")
