"""The LLM split over processes against one process: the same logits and tokens, each rank with its own share of bytes.

The processes are forks of this one that meet over gloo, so a test takes seconds; two GPUs, where there are two, meet
over NCCL. The commands run under torchrun itself.
"""

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
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import bench
import generate as command
import parallel
from backend import TORCH, TRITON
from baselines import BASELINES
from checkpoint import load_decoder, weight_bytes
from conftest import random_prompts, tiny_decoder
from decode import FullPolicy, Sampler, Session, Timing, generate_ids, strip_pads
from graph import StaticSession
from model import Decoder
from parallel import COLUMNS, ROWS, Team
from report import make_report
from settings import Settings
from smallkv import SmallKV
from test_generate import PROMPT, write_checkpoint

HERE = Path(__file__).parent
LENGTHS = (130, 63, 97, 157)  # two of them meet the matching window, one while it decodes
SETTINGS = {"default": Settings(), "paper": Settings.paper(), "refresh": Settings(refresh=3, budget=0.1),
            "int8": Settings(llm_kv="int8", slm_kv="int8")}  # fmt: skip


def spread(size: int, tmp_path, work, *args, device="cpu", start="fork") -> list:
    """What `work(team, *args)` returns on each of `size` processes, by rank. One that dies is an error, not a wait."""
    context, store = multiprocessing.get_context(start), tmp_path / "store"
    tasks = [(rank, size, str(store), device, work, args) for rank in range(size)]
    processes = [context.Process(target=_rank, args=task) for task in tasks]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes) and not any(process.exitcode for process in processes):
        time.sleep(0.02)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert codes == [0] * size
    return [torch.load(f"{store}.{rank}", weights_only=False) for rank in range(size)]


def _rank(rank: int, size: int, store: str, device: str, work, args) -> None:
    torch.set_num_threads(1)
    where = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(where)
    parallel.join(dist.FileStore(store, size), rank, size, where)
    torch.save(work(Team(rank, size, where), *args), f"{store}.{rank}")
    dist.barrier()
    parallel.leave(0)


def tiny_shape(**changes) -> Decoder:
    """4 KV heads of 2 query heads each, an MLP that 4 ranks cannot share evenly."""
    return tiny_decoder(**{"heads": 8, "kv_heads": 4, "intermediate_size": 50, **changes})


def shard(team: Team, whole: Decoder) -> Decoder:
    """This rank's part of a decoder that is there as a whole."""
    config = whole.config
    part = team.split(config).requires_grad_(False).eval()
    for name, parameter in part.named_parameters():
        source = whole.lm_head.weight if name == "lm_head.weight" else whole.get_parameter(name)
        parameter.copy_(team.part(name, source, config))
    team.tie(part)
    return part.to(team.device)


# ---- The model -------------------------------------------------------------------------------------------------------


KINDS = {
    "llama": {},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True, "vocab": 96},
    "qwen3, all biases": {"model_type": "qwen3", "attention_bias": True, "mlp_bias": True, "vocab": 100},
    "tied, odd vocabulary": {"tie_word_embeddings": True},
}


def random_biases(decoder: Decoder) -> Decoder:
    generator = torch.Generator().manual_seed(7)
    for parameter in decoder.parameters():
        if parameter.dim() == 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return decoder


def logits_of_a_rank(team: Team, changes: dict) -> tuple:
    part = shard(team, random_biases(tiny_shape(**changes)))
    with torch.inference_mode():
        return part(torch.tensor(random_prompts(9, vocab=90))), sum(p.nbytes for p in unique(part)), part.config


def unique(decoder: Decoder) -> list:
    """Parameters without those that are views of others."""
    held = {p.untyped_storage().data_ptr(): p for p in reversed(list(decoder.parameters()))}
    return list(held.values())


@pytest.mark.parametrize("name", KINDS)
def test_logits_of_every_rank_are_those_of_the_whole(name, tmp_path):
    whole = random_biases(tiny_shape(**KINDS[name]))
    with torch.inference_mode():
        expected = whole(torch.tensor(random_prompts(9, vocab=90)))
    for rank, (logits, held, config) in enumerate(spread(4, tmp_path, logits_of_a_rank, KINDS[name])):
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
        assert (config.query_heads, config.kv_heads, config.head_dim) == (2, 1, 16)
        assert held == weight_bytes(whole.config, torch.float32, team=Team(rank, 4))


def beside_pytorch(team: Team) -> tuple:
    """Logits of our split, and of PyTorch's own, of the same weights."""
    tokens = torch.tensor(random_prompts(9))
    styles = {f"layers.*.self_attn.{name}": ColwiseParallel() for name in ROWS[:3]}
    styles |= {f"layers.*.mlp.{name}": ColwiseParallel() for name in ROWS[3:]}
    styles |= {"layers.*.self_attn.o_proj": RowwiseParallel(), "layers.*.mlp.down_proj": RowwiseParallel()}
    assert {name.rpartition(".")[2] for name in styles} == {*ROWS, *COLUMNS}
    theirs = parallelize_module(tiny_shape(intermediate_size=48), init_device_mesh("cpu", (team.size,)), styles)
    with torch.no_grad():
        return shard(team, tiny_shape(intermediate_size=48))(tokens), theirs(tokens)


def test_the_split_is_that_of_pytorch(tmp_path):
    for ours, theirs in spread(2, tmp_path, beside_pytorch):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [3, 8])
def test_ranks_that_do_not_divide_the_kv_heads(size):
    with pytest.raises(ValueError, match=f"4 KV heads of the LLM cannot .* over {size} .* 1 or 2 or 4"):
        Team(0, size).config(tiny_shape().config)


def test_a_checkpoint_loads_by_parts(tmp_path):
    """Each rank's tensors are the slices of the file's, the parts together the whole; a wrong shape is still found."""
    whole = random_biases(tiny_shape(tie_word_embeddings=True, vocab=96))
    raw = {
        "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 50, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file({f"model.{name}": p for name, p in whole.named_parameters()}, tmp_path / "model.safetensors")
    parts = [load_decoder(tmp_path, team=Team(rank, 4)) for rank in range(4)]
    for name, expected in whole.named_parameters():
        cut = [part.get_parameter(name) for part in parts]
        dim = next((dim for dim, names in enumerate((ROWS, COLUMNS)) if name.split(".")[-2] in names), None)
        if dim is not None:
            assert torch.equal(torch.cat(cut, dim), expected), name
        else:
            assert all(torch.equal(each, expected) for each in cut), name
    assert torch.equal(torch.cat([part.lm_head.weight for part in parts]), whole.embed_tokens.weight)
    for part in parts:  # rows of the embedding, not a copy of them
        assert part.lm_head.weight.untyped_storage().data_ptr() == part.embed_tokens.weight.untyped_storage().data_ptr()


# ---- Tokens ----------------------------------------------------------------------------------------------------------


def pad_left(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    rows = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    return torch.tensor(rows), torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])


def pair(device="cpu", **changes) -> tuple[Decoder, Decoder]:
    shape = {"head_dim": 16, "device": device, **changes}
    return tiny_shape(**shape), tiny_decoder(layers=2, heads=4, kv_heads=2, seed=1, **shape)


def answers(team: Team, name: str, sampler: Sampler, static, changes: dict) -> tuple[list, dict]:
    """The tokens of 14 steps for a left-padded batch, and the report. static: the backend of a static step, or None."""
    llm, slm = pair(team.device or "cpu", **changes)
    llm = shard(team, pair(**changes)[0]) if team.size > 1 else llm
    if name == "full":
        policy = FullPolicy(llm)
    elif name in SETTINGS:
        policy = SmallKV(llm, slm, SETTINGS[name])
    else:
        policy = BASELINES[name](llm, command.Budget(0.2))
    lengths = (130, 101, 157) if name == "int8" else LENGTHS  # shorter ones give no scales
    prompts, timing = strip_pads(*pad_left(random_prompts(*lengths))), Timing()
    session = StaticSession(static, llm, policy, prompts, 14) if static else Session(llm, policy, prompts, 14)
    made = list(generate_ids(session, team.sampler(sampler), 14, timing=timing))
    return made, team.report(make_report(session, timing))


def assert_same(one, ranks) -> None:
    """Tokens on every rank as in one process; bytes of the LLM's cache divided, of the SLM's on each."""
    expected, alone = one
    for made, report in ranks:
        assert made == expected
        size = len(report["ranks"])
        for line, whole, *parts in zip(report["ledger"], alone["ledger"], *report["ranks"]):
            copies = size if whole["model"] == "SLM" else 1
            assert line["bytes"] == copies * whole["bytes"] == sum(part["bytes"] for part in parts)
            assert {part["bytes"] for part in parts} == {copies * whole["bytes"] // size}
        assert report["full_cache_bytes"] == alone["full_cache_bytes"]
        for mine, theirs in zip(report["tokens"], alone["tokens"]):
            assert mine == pytest.approx(theirs)
        assert report["moved"] == alone["moved"]
        if alone["similarity"]:
            assert report["similarity"] == pytest.approx(alone["similarity"], abs=1e-5)


@pytest.mark.parametrize("name, size", [("full", 2), ("full", 4), ("default", 2), ("paper", 4), ("refresh", 2),
                                        ("int8", 2)])  # fmt: skip
def test_tokens_are_those_of_one_process(name, size, tmp_path):
    """Greedy, a left-padded batch of which one sequence meets the matching window while it decodes."""
    given = name, Sampler(), None, {}
    assert_same(answers(Team(), *given), spread(size, tmp_path, answers, *given))


@pytest.mark.parametrize("name", [name for name in BASELINES if name not in parallel.MIXED])
def test_baselines_too(name, tmp_path):
    given = name, Sampler(), None, {}
    assert_same(answers(Team(), *given), spread(2, tmp_path, answers, *given))


@pytest.mark.parametrize("static", [None, TORCH])
def test_sampled_tokens_and_static_steps(static, tmp_path):
    given = "paper", Sampler(temperature=0.8, top_p=0.9, seed=3), static, {}
    assert_same(answers(Team(), *given), spread(2, tmp_path, answers, *given))


def test_methods_that_mix_heads_are_refused():
    Team().check_method("pyramidinfer")
    with pytest.raises(ValueError, match="--method pyramidinfer .* one process"):
        Team(0, 2).check_method("pyramidinfer")
    Team(0, 2).check_method("smallkv", speculate=0)
    with pytest.raises(ValueError, match="--speculate 4 is not built for several processes"):
        Team(0, 2).check_method("smallkv", speculate=4)


def on_a_gpu(team: Team) -> list:
    cases = [("paper", None), ("full", TRITON), ("default", TRITON), ("paper", TRITON), ("int8", TRITON)]
    return [answers(team, name, Sampler(), static, {"head_dim": 32}) for name, static in cases]


def test_two_gpus_make_the_tokens_of_one(tmp_path):
    """NCCL: plain steps, and the Triton step with its all-reduces in a CUDA graph."""
    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")
    ranks = spread(2, tmp_path, on_a_gpu, device="cuda", start="spawn")
    for alone, *parts in zip(on_a_gpu(Team(device=torch.device("cuda", 0))), *ranks):
        assert_same(alone, parts)


# ---- Processes -------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def models(tmp_path):
    """Folders of an LLM with 2 KV heads and of an SLM, as arguments."""
    llm = write_checkpoint(tmp_path / "llm")
    slm = write_checkpoint(tmp_path / "slm", heads=4, head_dim=8, seed=1)
    return ["--llm", str(llm), "--slm", str(slm), "--device", "cpu"]


class Ranks:
    """A command on `size` processes as torchrun would start them, their outputs in files."""

    def __init__(self, size: int, folder: Path, arguments: list[str], change=None, main=command.main):
        """change(rank): what is done in each process before the command."""
        self.folder, port, context = folder, free_port(), multiprocessing.get_context("fork")
        tasks = [(self, rank, size, port, arguments, change, main) for rank in range(size)]
        self.processes = [context.Process(target=Ranks._command, args=task) for task in tasks]
        for process in self.processes:
            process.start()

    def _command(self, rank: int, size: int, port: int, arguments: list[str], change, main) -> None:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ.update({k: str(v) for k, v in {**names, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()})
        parallel.PATIENCE = 0.5
        sys.stdout, sys.stderr = (open(self.folder / f"{kind}{rank}", "w", buffering=1) for kind in ("out", "err"))
        if change:
            change(rank)
        os._exit(parallel.run(lambda: main(arguments)))

    def text(self, kind: str) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"{kind}?")))

    def codes(self) -> list[int]:
        for process in self.processes:
            process.join(30)
            process.kill()
        return [process.exitcode for process in self.processes]


def test_torchrun_prints_the_answer_of_one_process_once(models, tmp_path, capsys):
    """The prompt comes on standard input, which the processes have together."""
    flags = [*models, "--paper", "--max-new-tokens", "20"]
    assert command.main([*flags, PROMPT, "--json", str(tmp_path / "one.json")]) == 0
    expected = capsys.readouterr().out
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*launch, HERE / "generate.py", *flags, "--json", tmp_path / "two.json"], input=PROMPT, capture_output=True,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == expected and ran.stderr.count("backend:") == 1
    assert "on each of 2 processes: " in ran.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text())["smallkv"] for name in ("one", "two"))
    assert one["answers"] == two["answers"] and len(two["report"]["ranks"]) == 2


def test_a_mistake_is_said_once(models, tmp_path):
    for number, (flags, line) in enumerate([
        (["--max-new-tokens", "0"], "error: --max-new-tokens 0 is too small; at least 1"),
        (["--method", "pyramidinfer"],
         "error: --method pyramidinfer takes the mean over all heads of a layer; run it in one process"),
        (["--device", "cuda:1"], "error: --device cuda:1: each process takes a GPU of its own; use auto, cuda or cpu"),
    ]):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        ranks = Ranks(2, folder, [*models, *flags, PROMPT])
        assert ranks.codes() == [2, 2]
        # The second speaks only where nothing has ended it by then, as torchrun does.
        assert (folder / "err0").read_text() == line + "\n" and ranks.text("out") == ""


def test_processes_that_do_not_divide_the_heads(models, tmp_path):
    ranks = Ranks(3, tmp_path, [*models, PROMPT])
    assert ranks.codes() == [2, 2, 2]
    expected = "error: 2 KV heads of the LLM cannot be split over 3 processes; use --nproc-per-node 1 or 2\n"
    assert ranks.text("err") == expected


def test_one_that_fails_says_so_and_nobody_waits(models, tmp_path):
    def fill_the_memory(rank):
        def make_session(*_):
            raise torch.OutOfMemoryError("its GPU is full")

        if rank == 1:
            command.make_session = make_session

    ranks = Ranks(2, tmp_path, [*models, PROMPT], fill_the_memory)
    assert ranks.codes() == [1, 2]
    lines = [line for line in ranks.text("err").splitlines() if not line.startswith("backend")]
    assert lines == ["rank 1: error: out of memory: its GPU is full"]


def test_ctrl_c_stops_all_after_the_same_step(models, tmp_path):
    """Sent twice, as torchrun does; what was there by then is printed, with the report of both."""
    ranks = Ranks(2, tmp_path, [*models, "--max-new-tokens", "600", PROMPT])
    while not ranks.text("out").strip() and ranks.processes[0].is_alive():
        time.sleep(0.01)
    for process in ranks.processes * 2:
        os.kill(process.pid, signal.SIGINT)
    assert ranks.codes() == [130, 130]
    assert "on each of 2 processes" in ranks.text("err") and "interrupted" in ranks.text("err")


def test_the_benchmark_measures_one_rank_s_part(tmp_path, capsys):
    """Rank 0's figures: half of the LLM's bytes a step, all of the SLM's; the turnover is the one asked for."""
    flags = ["--pair", "tiny", "--settings", "2x200+20", "--decode-only", "--steps", "4", "--turnover", "0.1"]
    flags += ["--device", "cpu", "--methods", "full-graph,smallkv-graph"]
    assert bench.main(flags) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    ranks = Ranks(2, tmp_path, flags, main=bench.main)
    assert ranks.codes() == [0, 0], ranks.text("err")
    found = json.loads(ranks.text("out").splitlines()[-1])
    assert found["ranks"] == 2 and len(found["rows"]) == 2
    for part, whole in zip(found["rows"], alone["rows"]):
        assert part["step_bytes"]["LLM K, V"] * 2 == whole["step_bytes"]["LLM K, V"]
        assert part["turnover"] == whole["turnover"]
    assert part["step_bytes"]["SLM K, V"] == whole["step_bytes"]["SLM K, V"]
    ranks = Ranks(2, tmp_path, [*flags, "--largest", "1x200+20"], main=bench.main)
    assert ranks.codes() == [2, 2] and ranks.text("err") == (
        "error: --largest, --speculate and the method transformers are for one process; leave them out under torchrun\n"
    )
