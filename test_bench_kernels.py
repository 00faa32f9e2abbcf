"""What bench_kernels.py counts, against the tensors that a kernel is given; what its calls do; the command itself."""

import contextlib
import dataclasses
import inspect
import json

import pytest
import torch

import bench_kernels
from backend import TORCH
from bench_cases import CASES
from bench_count import PAIRS, Setting, pair_configs
from bench_shapes import Call, Shape
from model import Decoder

TINY = ["--pair", "tiny", "--settings", "2x120+8", "--device", "cpu", "--markdown", "--repeats", "1"]
FULL = Setting(3, 120, 1)  # one new token: every position is seen, every slot is filled, each tensor is used whole


def shape(setting: Setting, backend=TORCH) -> Shape:
    return Shape(setting, pair_configs("tiny")[1], {}, backend, torch.device("cpu"), 0.2)


def tensors(value) -> list[torch.Tensor]:
    if torch.is_tensor(value):
        return [value]
    return [tensor for part in value for tensor in tensors(part)] if isinstance(value, tuple) else []


def given(kernel: str, case: str) -> tuple[Call, dict[str, list[torch.Tensor]]]:
    """A call at FULL; the tensors that its first launch is given, by the twin's names, and `out`: what it returns."""
    found = {}

    def spy(*args, **named):
        out = getattr(TORCH, kernel)(*args, **named)
        if not found:
            bound = inspect.signature(getattr(TORCH, kernel)).bind(*args, **named).arguments
            found.update({name: tensors(value) for name, value in bound.items()}, out=tensors(out))
        return out

    call = CASES[kernel][case](shape(FULL, dataclasses.replace(TORCH, **{kernel: spy})))
    call.work()
    return call, found


# kernel, case, tensors that are written and not read, tensors that are read and written
USES = [
    ("decode_attention", "LLM, full cache", ["out"], []),
    ("scored_attention", "SLM, logits", ["out", "score", "lse"], ["anchor"]),
    ("decode_attention", "LLM, full cache, in 8 bits", ["out"], []),
    ("scored_attention", "SLM, logits, in 8 bits", ["out", "score", "lse"], ["anchor"]),
    ("scored_attention", "SLM, decay 0", ["out", "score"], []),
    ("scored_attention", "SLM, decay 0.5", ["out"], ["score"]),
    ("tiered_attention", "LLM", ["out"], []),
    ("tiered_attention", "LLM, marginal", ["out"], []),
    ("add_norm", "LLM, after o", ["out"], ["x"]),
    ("add_norm", "SLM, after down", ["out"], ["x"]),
    ("gate_product", "LLM", ["out"], []),
    ("split_product", "SLM", ["out"], []),
]


@pytest.mark.parametrize("kernel, case, written, both", USES, ids=[f"{use[0]}, {use[1]}" for use in USES])
def test_bytes_are_those_of_the_tensors(kernel, case, written, both):
    call, found = given(kernel, case)
    distinct = {tensor.data_ptr(): tensor for name in found if name not in written for tensor in found[name]}
    naive = sum(tensor.nbytes for tensor in distinct.values())
    naive += sum(tensor.nbytes for name in (*written, *both) for tensor in found[name])
    assert call.size == naive and call.pcie == 0


def test_bytes_of_the_scores_are_those_of_the_matched_rows():
    for case in CASES["sum_scores"]:
        call, found = given("sum_scores", case)
        index, memory = (found[name][0] for name in ("index", "memory"))
        rows = {(b, head) for b in range(3) for head in index[b].flatten().tolist()}
        naive = 4 * 121 * len(rows) + index.nbytes + found["length"][0].nbytes + found["lse"][0].nbytes
        naive += memory.nbytes + sum(tier.nbytes for tier in found.get("tier", []))
        assert call.size == naive + found["total"][0].nbytes and call.layers == len(memory)


def test_bytes_of_a_plan_are_those_of_its_tables():
    """The slots are read and written, the rows that come are listed."""
    for case in CASES["plan_layers"]:
        call, found = given("plan_layers", case)
        total, length, tier, held, memory = (found[name][0] for name in ("total", "length", "tier", "held", "memory"))
        source, target, count, _, newest, moved = found["slots"]
        naive = total.nbytes + length.nbytes + 12 + count.nbytes + newest.nbytes  # 12: a line of the table of sizes
        naive += 2 * sum(table.nbytes for table in (tier, held, moved, found["cut"][0]))
        naive += memory.nbytes - memory.itemsize * newest.numel() * shape(FULL).critical  # theirs changes in attention
        moving = len(tier) * 3 * 2 * round(0.1 * shape(FULL).critical)  # layers, sequences, KV heads
        assert call.size == naive + 2 * 4 * moving and call.layers == len(tier)


def test_bytes_of_what_is_written_in_places():
    """One row of each head into a pool, one number for each slot that holds a token."""
    for case in ("LLM", "LLM, marginal"):
        plain, (call, found) = given("tiered_attention", case)[0], given("tiered_attention", f"{case}, memory")
        assert call.size == plain.size + 2 * 4 * int((found["key_position"][0] >= 0).sum())
    call, found = given("store_rows", "some layers")
    assert call.pcie == found["newest"][0].nbytes == 2 * 4 * 3 * 2 * 16 * 4  # K, V, layers, sequences, heads, D, fp32
    assert call.size == found["newest"][0].nbytes + found["length"][0].nbytes
    for case in CASES["rope_append"]:
        call, found = given("rope_append", case)
        rows = 2 * 3 * 2 * 16 * (1 if "8 bits" in case else 4)  # a key and a value for each KV head
        rows += found["out"][0].nbytes + sum(scale.nbytes for scale in found["scales"])
        tables = 2 * 8 * 4 + found["length"][0].nbytes  # cos and sin of one position
        slots = found["key_slot"][0].nbytes + found["newest"][0].nbytes if "LLM" in case else 0
        assert call.size == found["qkv"][0].nbytes + rows + tables + slots


def test_bytes_of_the_layers_are_those_of_the_weights_and_the_cache():
    for number, of in enumerate(("llm", "slm")):
        config = pair_configs("tiny")[1][number]
        weights = 4 * sum(part.numel() for part in Decoder(config).layers.parameters() if part.dim() == 2)
        cached = 2 * 2 * 3 * 2 * 121 * 16 * 4  # K, V, layers, sequences, heads, tokens, D, fp32
        at = shape(FULL)
        sizes = {case.split()[-1]: make(at).size for case, make in CASES[f"{of}_layers"].items()}
        if of == "slm":  # ends with the last layer's attention
            weights -= 4 * sum(p.numel() for n, p in Decoder(config).layers[-1].named_parameters()
                               if p.dim() == 2 and n.split(".")[-2] not in ("q_proj", "k_proj", "v_proj"))  # fmt: skip
        assert sizes.pop("none") == weights
        if of == "slm":
            assert sizes == {"scored": weights + cached + 2 * 3 * 4 * 121 * 4}  # layers, sequences, query heads
        else:
            slots = 2 * 3 * 2 * at.critical  # layers, sequences, heads
            assert sizes == {"full": weights + cached, "tiers": weights + slots * (2 * 16 * 4 + 4 + 2 * 4)}
    for of, number in (("qkv", 0), ("o", 1)):
        call = CASES[of]["LLM, the library's"](at)
        inputs, outputs = ((32, 160), (96, 32))[number]
        assert call.size == 4 * (3 * inputs + inputs * outputs + (number == 0) * outputs + 3 * outputs)


@pytest.mark.parametrize("share", CASES["bring_rows"])
def test_rows_that_come_are_those_counted(share):
    """Host memory is NaN here, or -128 (conftest.py): each row that came is seen in the pool."""
    at = shape(Setting(2, 400, 8))
    call = CASES["bring_rows"][share](at)
    call.work()
    int8 = "8 bits" in share
    key, value = at.held["pools" + ", in 8 bits" * int8]
    rows = round(float(share.split()[0]) / 100 * at.critical)
    for pool in (key, value):
        came = pool.eq(-128) if int8 else pool.isnan()
        assert came.all(-1).sum(-1).tolist() == [[rows] * 2] * 2
    assert call.pcie == 2 * came.sum().item() * pool.itemsize
    alone = CASES["bring_rows"][share.split(",")[0]](at).size
    if "beside" in share:
        assert call.size == alone + sum(CASES[name]["LLM"](at).size for name in ("gate_product", "split_product"))
    else:  # sequences, heads: where from and to; the count
        assert call.size == 2 * came.sum().item() * pool.itemsize + (2 * 2 * 2 * rows + 1) * 4


@pytest.mark.parametrize("kernel", ["plan_layers", "assign_slots"])
def test_every_launch_of_the_slots_finds_a_tenth_that_enters(kernel):
    """To one critical set and back; the newest token is in both, with no row to come."""
    at = shape(Setting(2, 400, 8))
    calls = []

    def spy(*args, **named):
        position, moved = (args[4], args[7][3]) if kernel == "plan_layers" else (args[0], args[7])
        before = moved.item()
        getattr(TORCH, kernel)(*args, **named)
        calls.append(moved.item() - before)
        assert (position >= 0).sum(-1).eq(at.critical).all() and (position == at.tokens - 1).sum(-1).eq(1).all()

    at.backend = dataclasses.replace(TORCH, **{kernel: spy})
    call = CASES[kernel]["10 % enter"](at)
    call.work(), call.work()
    lists = call.layers * 2 * 2  # layers, sequences, heads
    assert calls == [lists * (at.critical - 1), *[lists * round(0.1 * at.critical)] * 3] and call.launches == 2


def test_copies_leave_nothing_in_a_cache():
    assert [bench_kernels.copies(size) for size in (1, 100 << 20, 256 << 20, 1 << 30)] == [64, 6, 2, 1]


def test_a_time_is_that_of_one_launch(monkeypatch):
    """A graph of 1 s over 64 copies of two launches each; a large call has one copy, several times in its graph."""
    done = []

    class Clock:
        device = torch.device("cuda")

        def laps(self, work, count):
            return [work() or 1.0 for _ in range(count)]

    class Graph:
        def replay(self):
            done.append("replay")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    rates = {"copy_bytes_s": 1e12, "pcie_bytes_s": 1e9}
    for size, copies, rounds in ((1000, 64, 1), (600 << 20, 1, 3)):
        done.clear()
        call = Call(lambda: done.append("call"), [size], [], pcie=10, launches=2, layers=7)
        row = bench_kernels.measure(None, lambda at: call, Clock(), rates, 5)
        assert done.count("call") == 2 * rounds * copies and done[-7:] == ["replay"] * 7  # compiled, then captured
        assert row["us"] == pytest.approx(1e6 / rounds / copies / 2) and row["calls"] == rounds * copies
        assert row["floor_us"] == pytest.approx(max(size / 1e6, 10 / 1e3)) and row["input_bytes"] == copies * size


def test_the_command_times_every_kernel(capsys):
    assert bench_kernels.main(TINY) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    cases = [(kernel, case) for kernel in CASES for case in CASES[kernel]]
    assert [(row["kernel"], row["case"]) for row in report["rows"]] == cases
    shown = [line.split(" | ") for line in lines if line.startswith("| ")][2:]
    assert len(shown) == len(cases)
    for row, cells in zip(report["rows"], shown):
        copy, pcie = (report["ceilings"][name] for name in ("copy_bytes_s", "pcie_bytes_s"))
        assert row["us"] > 0 and row["bytes"] > 0 and row["setting"] == "2x120+8"
        assert row["floor_us"] == pytest.approx(1e6 * max(row["bytes"] / copy, row["pcie_bytes"] / pcie))
        assert row["ratio"] == pytest.approx(row["us"] / row["floor_us"])
        assert [cells[0], cells[2]] == [f"| {row['kernel']}", f"{row['us']:.2f}"]


def test_the_kernels_run_where_triton_does(device, capsys, monkeypatch):
    """In the interpreter on a CPU, on a GPU compiled and in graphs; heads of 32, the smallest that the kernels take."""
    monkeypatch.setitem(PAIRS, "tiny", tuple({**raw, "head_dim": 32} for raw in PAIRS["tiny"]))
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU there")
    only = ["--only", "tiered_attention,assign_slots,store_rows,add_norm,rope_append", "--backend", "triton"]
    assert bench_kernels.main([*TINY, *only, "--device", device]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["backend"] == "triton" and len(report["rows"]) == 6 + 2 + 1 + 4 + 4


def test_a_kernel_that_fails_is_a_row(monkeypatch, capsys):
    def fails(at):
        raise RuntimeError("no such\nthing")

    monkeypatch.setitem(CASES, "decode_attention", {"LLM": fails})
    assert bench_kernels.main([*TINY, "--only", "decode_attention,store_rows"]) == 1
    out = capsys.readouterr().out
    assert "| decode_attention | LLM | RuntimeError: no such |" in out
    failed, timed = json.loads(out.splitlines()[-1])["rows"]
    assert failed["error"] == "RuntimeError: no such" and timed["us"] > 0


@pytest.mark.parametrize("flags, said", [
    (["--only", "plan_layers,plans"], "unknown kernel 'plans'; supported: decode_attention, "),
    (["--settings", "65x2048+256"], "--settings 65x2048+256: 1 to 64 sequences"),
    (["--settings", "1x99+8"], "a prompt of at least 100 tokens"),
    (["--settings", "1x200"], "argument --settings"),
    (["--repeats", "0"], "--repeats 0: at least 1"),
])  # fmt: skip
def test_bad_flags_are_one_clear_line(flags, said, capsys):
    with pytest.raises(SystemExit) as ended:
        bench_kernels.main([*TINY, *flags])
    assert ended.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_a_budget_that_cannot_be_is_named(capsys):
    assert bench_kernels.main([*TINY, "--budget", "2"]) == 2
    assert (
        capsys.readouterr().err == "error: budget 2.0 is outside (0, 1]; 0.2 keeps a fifth of the full cache's bytes\n"
    )
