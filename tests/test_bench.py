"""bench.py and floors.py: what they count against a count by hand or on real tensors; and the whole command on the tiny
pair."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
from baselines import BASELINES
from bench import Setting, make_policy, make_session, random_decoder, table
from cache import FullCache, ScoredCache
from evicting import CutCache
from experiments.overhead import MODELS, parameters
from floors import early, prefill_flops, product_bytes, products, step_bytes
from match import match_heads
from model import Config, Decoder
from quantize import int4_modules
from smallkv import Settings, TierSizes

CPU, FP32 = torch.device("cpu"), torch.float32
LLM, SLM = (Config.from_hf(raw) for raw in bench.PAIRS["tiny"])
HALF = MODELS["Qwen2-0.5B"]


@pytest.fixture
def models():
    return [random_decoder(config, CPU, FP32) for config in (LLM, SLM)]


def ledger_of(cache) -> dict[str, int]:
    return {entry.what: entry.size for entry in cache.ledger()}


def call(capsys, *flags) -> tuple[list[str], dict]:
    """A measurement of the tiny pair on the CPU: its lines, and the report of the last one."""
    assert bench.main(["--pair", "tiny", "--device", "cpu", "--table", *map(str, flags)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return lines, json.loads(lines[-1])


# ---- What is counted -------------------------------------------------------------------------------------------------


def test_shapes_are_those_of_the_checkpoints():
    """Parameters as published, in billions; and the products of the layers are those of the decoder."""
    published = {"Qwen2-7B": 7.62, "Qwen2-0.5B": 0.49, "Qwen2-72B": 72.71, "Qwen2.5-14B": 14.77, "LLaMA-3.1-8B": 8.03,
                 "LLaMA-3.2-1B": 1.24}  # fmt: skip
    for name, size in published.items():
        assert parameters(MODELS[name]) / 1e9 == pytest.approx(size, abs=0.006)
    for config in (LLM, SLM, HALF):
        with torch.device("meta"):
            sizes = [p.numel() for p in Decoder(config).layers.parameters() if p.dim() == 2]
        assert product_bytes(config, 1) == sum(sizes)
        assert product_bytes(config, 2, observed=True) == 2 * sum(sizes[:-3])  # nothing after the last attention


def test_bytes_of_a_step_are_those_of_the_caches(models):
    full = step_bytes(LLM, None, 3, 100, 4)
    assert full["LLM K, V"] == ledger_of(FullCache(LLM, 3, 100, "meta", FP32))["full K, V"]
    assert full["LLM weights"] == sum(p.nbytes for p in models[0].parameters() if p.dim() == 2) - 4 * 97 * 96
    sizes, decayed = TierSizes(15, 5, 10), Settings(scores="slm", score_decay=0.5)
    tiered = step_bytes(LLM, SLM, 3, 100, 4, sizes)
    assert tiered["LLM K, V"] == full["LLM K, V"] * 20 / 100  # 15 whole tokens and 10 halves
    scored, memory = ledger_of(ScoredCache(SLM, 3, 100, "meta", FP32, 0.0)), 3 * 2 * 2 * 100 * 4  # layers, KV heads
    assert tiered["SLM K, V"] == scored["full K, V"]
    logs = 3 * 2 * 4 * 4  # of the sums of the rows: too few to count
    assert tiered["scores"] == 2 * (scored["scores"] - logs + memory)  # written and read
    both = ledger_of(ScoredCache(SLM, 3, 100, "meta", FP32, 0.5))["scores"] - logs
    assert step_bytes(LLM, SLM, 3, 100, 4, sizes, decayed)["scores"] == 2 * both
    assert tiered["SLM weights"] == product_bytes(SLM, 4, observed=True)
    drafted = step_bytes(LLM, SLM, 3, 100, 4, sizes, decayed, drafts=2)
    assert drafted["SLM K, V"] == 3 * tiered["SLM K, V"] and drafted["LLM K, V"] == tiered["LLM K, V"]
    assert drafted["SLM weights"] == tiered["SLM weights"] + 2 * (product_bytes(SLM, 4) + 4 * 97 * 64)
    rows = ledger_of(ScoredCache(SLM, 3, 100, "meta", FP32, 0.5, rows=3))["scores"] - 3 * logs
    assert drafted["scores"] == 2 * rows
    assert "scores" not in step_bytes(LLM, SLM, 3, 100, 4, drafts=2)  # the full cache's drafts have none


def test_bytes_of_models_that_are_made_smaller():
    """An SLM with one layer and 40 % of its cache; INT4 weights."""
    less = step_bytes(LLM, early(SLM, 1), 3, 100, 4, TierSizes(15, 5, 10), Settings(slm_budget=0.4))
    cut, gathered = ledger_of(CutCache(early(SLM, 1), 3, 100, "meta", FP32, 0.0, 0.4)), 3 * 2 * 40 * 4
    assert less["SLM K, V"] == cut["kept K, V"] and less["SLM slots"] == 3 * gathered
    assert cut["scores"] - gathered == 3 * 4 * (100 + 1) * 4  # logits, logs of sums
    first = products(SLM)[0]
    assert less["SLM weights"] == 4 * first[0] * first[1]  # q, k and v, all that is asked of a single layer
    decoder = random_decoder(LLM, CPU, FP32, int4=True)
    held = sum(m.packed.nbytes + m.scale.nbytes + m.zero.nbytes for m in int4_modules(decoder).values())
    assert step_bytes(LLM, None, 3, 100, 4, int4=(True, False))["LLM weights"] == held + 4 * 97 * 96


def test_flops_of_a_prefill_are_counted_by_torch():
    """torch's own counter over a plain forward; attention there is not halved by causality, so it is taken twice."""
    n = 64
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        Decoder(LLM)(torch.zeros(1, n, dtype=torch.long), logits="last")
    square = 2 * 2 * LLM.layers * LLM.query_heads * LLM.head_dim * n * n
    found = prefill_flops(LLM, None, 1, n) - square * (n + 1) // (2 * n)
    assert counter.get_total_flops() in (found, found + square)  # where the counter knows this attention


def test_the_table_sets_the_memory_beside_pcie():
    """A step of 3 ms of memory and 5 ms of PCIe lasts at least 5; one that failed says why."""
    row = {
        "setting": "1x1+1", "method": "smallkv", "turnover": 0.1, "tpot_s": 0.006, "tpot_p10_p90": [0.006, 0.006],
        "step_bytes": {"all": 3000}, "pcie_bytes_step": 500, "tokens_s": 1.0, "ttft_s": None, "peak_bytes": None,
        "ledger_bytes": 2e9, "prefill_flops": 1, "tokens_round": 1.0,
    }  # fmt: skip
    rates = {"copy_bytes_s": 1e6, "pcie_bytes_s": 1e5, "matrix_flops_s": 1}
    failed = {"setting": "1x1+1", "method": "full", "error": "out of memory"}
    lines = table({"rows": [row, failed], "ceilings": rates, "speculate": 0}).splitlines()
    cells = lines[2].split(" | ")
    assert cells[4:6] == ["3.00", "2.00"] and cells[8] == "5.00" and cells[-1] == "- (2.00) |"
    assert "out of memory" in lines[3]


# ---- What is measured ------------------------------------------------------------------------------------------------


def test_the_transformers_rival_has_the_same_weights(models):
    models[0].raw = bench.PAIRS["tiny"][0]
    session = make_session(make_policy("transformers", models, Settings(), 0), Setting(2, 40, 2), 0, 64)
    tokens = torch.tensor(session.prompts)
    torch.testing.assert_close(session.prefill(), models[0](tokens)[:, -1])
    after = torch.cat((tokens, tokens[:, :1]), 1)
    torch.testing.assert_close(session.step(tokens[:, 0]), models[0](after)[:, -1])


@pytest.mark.parametrize("extra", [[], ["--decode-only"], ["--no-marginal", "--score-decay", 0.9, "--scores", "slm"],
                                   ["--quantize", "int4-both"], ["--decode-only", "--reach", "inf"],
                                   ["--slm-layers", 1, "--slm-budget", 0.4, "--decode-only"],
                                   ["--slm-layers", 1, "--slm-budget", 0.4, "--offload", "none"]],
                         ids=lambda flags: "".join(map(str, flags)) or "default")  # fmt: skip
def test_the_command_measures_every_method(extra, capsys):
    """Rows, table and the last line; turnover and bytes over PCIe that are counted are those asked for."""
    command = ["--settings", "2x400+60", "--turnover", "0.02,0.2", "--steps", 9, "--methods", "full,smallkv", *extra]
    lines, report = call(capsys, *command)
    rows = report["rows"]
    assert [row["method"] for row in rows] == ["full", "smallkv", "smallkv"]
    assert sum(line.startswith("| 2x400+60 |") for line in lines) == 3
    settings = Settings(**{name: report[name] for name in ("marginal", "score_decay", "scores", "slm_budget")})
    for row in rows[1:]:
        size = settings.sizes(row["length"])
        assert row["turnover"] == pytest.approx(row["turnover_asked"], abs=2.5 / size.critical)
        slm = early(SLM, report["slm_layers"])
        both = (report["quantize"] is not None,) * 2
        assert row["step_bytes"] == step_bytes(LLM, slm, 2, row["length"], 4, size, settings, both)
        assert row["prefill_flops"] == prefill_flops(LLM, slm, 2, 400)
    if report["offload"] == "none":
        assert row["pcie_bytes_step"] == 0
    elif not report["marginal"]:
        heads = 2 * LLM.layers * LLM.kv_heads  # of both sequences
        assert row["pcie_bytes_step"] == pytest.approx(2 * 16 * 4 * heads * size.critical * row["turnover"])
    for row in rows:
        assert (row["ttft_s"] is None) == (row["paper_throughput"] is None) == ("--decode-only" in extra)
        on_device = sum(entry["size"] for entry in row["ledger"] if not entry["host"])
        slm_weights = report["weights"][1] * (row["method"] == "smallkv")
        assert row["ledger_bytes"] == on_device + report["weights"][0] + slm_weights
    if "--decode-only" not in extra:
        ttft, tpot = rows[0]["ttft_s"], rows[0]["tpot_s"]
        assert rows[0]["paper_throughput"] == pytest.approx(460 / (ttft + 60 * tpot))  # of one sequence


@pytest.mark.parametrize("filled", [False, True])
def test_a_prefill_that_is_timed_matches_heads(filled, models):
    """Random heads within reach stand in for the matching where caches are filled, and nowhere else."""
    policy = make_policy("smallkv", models, Settings(), 0, filled)
    session = make_session(policy, Setting(2, 120, 4), 0, 50)
    bench.fill(session) if filled else session.prefill()
    for b, prompt in enumerate(session.prompts):
        index = match_heads(*models, prompt, "cosine", 2.0).index
        assert torch.equal(policy.maps[b].index, index) != filled
        assert torch.equal(policy.index[:, b], policy.maps[b].index)
    assert session.step([1, 2]).isfinite().all()


@pytest.mark.parametrize("acceptance", [0.0, 0.6, 1.0])
def test_rounds_of_drafts_are_measured_with_the_acceptance_asked_for(acceptance, capsys):
    _, report = call(capsys, "--settings", "2x400+200", "--turnover", "0.02,0.2", "--steps", 12, "--speculate", 3,
                     "--acceptance", acceptance, "--decode-only")  # fmt: skip
    assert [row["method"] for row in report["rows"]] == ["full", "smallkv", "smallkv"]
    for row in report["rows"]:
        expected = 1 + sum(acceptance**draft for draft in (1, 2, 3))
        assert row["tokens_round"] == pytest.approx(expected, rel=0.35 if 0 < acceptance < 1 else 1e-9)
        assert row["tokens_s"] == pytest.approx(2 / row["tpot_s"])
    for row in report["rows"][1:]:
        size = Settings(scores="slm").sizes(row["length"], 3)
        close = 0.2 * row["turnover_asked"] + 4 / size.critical
        assert row["turnover"] == pytest.approx(row["turnover_asked"], abs=close)


def test_methods_that_evict_are_prefilled_and_read_what_they_keep(capsys):
    methods = [*BASELINES, "transformers"]
    lines, report = call(capsys, "--settings", "2x400+60", "--steps", 4, "--budget", 0.1, "--decode-only", "--prefill",
                         "2x120+20", "--methods", ",".join(methods))  # fmt: skip
    full = step_bytes(LLM, None, 2, 400, 4)
    for row, method in zip(report["rows"], methods, strict=True):
        share = 1 if method in ("oracle", "oracle-shared", "transformers") else 10
        assert row["method"] == method and row["turnover"] is None and row["pcie_bytes_step"] == 0
        assert (row["ttft_s"] is None) == (method == "transformers")
        assert row["step_bytes"]["LLM weights"] == full["LLM weights"]
        if method not in ("snapkv", "pyramidinfer"):  # these have rules of their own
            assert row["step_bytes"]["LLM K, V"] == full["LLM K, V"] / 400 * (row["length"] // share)
        assert row["prefill_flops"] == prefill_flops(LLM, None, 2, 400)


@pytest.mark.parametrize("flags, said", [
    (["--slm-layers", "3"], "3 layers were asked for; 1 to 2 can run"),
    (["--slm-budget", "0"], "SLM budget 0.0 is outside (0, 1]"),
    (["--methods", "h3o"], "unknown method h3o; supported: full, smallkv, h2o"),
    (["--speculate", "2", "--methods", "full,h2o"], "--speculate is for --methods full,smallkv"),
    (["--quantize", "int4", "--methods", "transformers"], "--quantize has no Transformers beside it"),
    (["--acceptance", "1.5"], "--acceptance: 1.5 is not a number of at least 0"),
    (["--settings", "2x100+5"], "--settings 2x100+5 leaves no steps to time; 6 new tokens at least"),
    (["--settings", "0x16+4"], "'0x16+4' should read BATCHxPROMPT+NEW"),
    (["--steps", "0"], "--steps: 0 is not a whole"),
    (["--turnover", "0.1,nan"], "--turnover: nan is not a number"), (["--chunk", "0"], "--chunk: 0 is not a whole"),
    (["--device", "cuda:77"], "no device cuda:77"),
])  # fmt: skip
def test_mistakes_are_one_line(flags, said, capsys):
    flags = ["--pair", "tiny", *(["--device", "cpu"] * ("--device" not in flags)), *flags]
    assert bench.main(flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_models_that_do_not_fit_are_named(monkeypatch, capsys):
    monkeypatch.setattr("checkpoint.available_bytes", lambda device: 1 << 30)
    assert bench.main(["--device", "cpu", "--settings", "1x16+8"]) == 2
    assert "does not fit on cpu: 30.21 GiB needed (LLM weights 28.37, SLM weights 1.84)" in capsys.readouterr().err
