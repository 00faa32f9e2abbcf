"""What bench.py counts, against a count by hand or on real tensors; and the whole command on the tiny pair."""

import json

import pytest
import torch

import bench
import bench_int4
import bench_sessions
from backend import TORCH
from bench_count import (
    PAIRS,
    Setting,
    layer_parameters,
    layer_products,
    pair_configs,
    paper_throughput,
    prefill_flops,
    step_bytes,
    table,
)
from bench_transformers import make_transformers
from conftest import random_prompts
from decode import Session
from frugal import FrugalCache
from full_cache import FullCache
from graph import Step
from match import match_heads
from model import Decoder
from quantize import Int4Linear
from settings import Settings, TierSizes
from smallkv import SmallKV


@pytest.mark.parametrize("name", PAIRS)
def test_parameters_are_those_of_the_decoder(name):
    for config in pair_configs(name)[1]:
        with torch.device("meta"):
            decoder = Decoder(config)
        weights = [p for part, p in decoder.layers.named_parameters() if p.dim() == 2]
        assert layer_parameters(config) == sum(weight.numel() for weight in weights)


def test_shapes_are_those_of_the_checkpoints():
    """Parameters as published: 7.62 and 0.49 (Qwen2), 14.8 (Qwen2.5), 8.03 and 1.24 (LLaMA) billion."""
    published = {"qwen2-7b": (7.62, 0.49), "qwen2-72b": (72.71, 7.62), "qwen2.5-14b": (14.77, 0.49),
                 "llama3.1-8b": (8.03, 1.24)}  # fmt: skip
    for name, sizes in published.items():
        for config, size in zip(pair_configs(name)[1], sizes):
            with torch.device("meta"):
                total = sum(parameter.numel() for parameter in Decoder(config).parameters())
            assert total / 1e9 == pytest.approx(size, abs=0.006)


def test_the_transformers_rival_has_the_same_weights():
    raws, configs = pair_configs("tiny")
    llm = bench.random_decoder(configs[0], torch.device("cpu"), torch.float32)
    llm.raw = raws[0]
    tokens = torch.randint(97, (2, 40))
    torch.testing.assert_close(make_transformers(llm, llm.device)(input_ids=tokens).logits, llm(tokens))


def test_a_table_that_both_sides_of_a_step_name_is_counted_once():
    """The logs of the sums beside the SLM's logits: the SLM's side writes them, the LLM's reads them."""
    models = [bench.random_decoder(config, torch.device("cpu"), torch.float32) for config in pair_configs("tiny")[1]]
    session = Session(models[0], SmallKV(*models, Settings()), random_prompts(130, 120), 4)
    step = Step(session, session.prefill().argmax(-1), TORCH)
    whole, lse = bench.session_bytes(session, step), step.scored.lse
    in_caches = {tensor.untyped_storage().data_ptr() for cache in (session.cache, session.policy.slm_cache)
                 for tensor in vars(cache).values() if torch.is_tensor(tensor)}  # fmt: skip
    assert all(tensor.untyped_storage().data_ptr() not in in_caches for tensor in step.side.tensors())
    step.scored.lse = step.side.lse = None
    both = lse.nbytes + step.scored.anchor.nbytes
    assert whole - bench.session_bytes(session, step) == both == 2 * 4 * 2 * 2 * 4  # layers, batch, heads


def test_bytes_of_a_step_are_those_of_the_caches():
    llm, slm = pair_configs("tiny")[1]
    full = step_bytes(llm, slm, 3, 100, 4, None, False)
    assert full["LLM K, V"] == FullCache.predict(llm, 3, 100, "cpu", torch.float32)[0].size
    assert full["LLM weights"] == 4 * (layer_parameters(llm) + 97 * 32)
    tiered = step_bytes(llm, slm, 3, 100, 4, TierSizes(15, 5, 10), True)
    assert tiered["LLM K, V"] == full["LLM K, V"] * 20 // 100  # 15 whole tokens and 10 halves
    assert tiered["scores"] == 3 * 2 * 4 * 100 * 4
    fused = step_bytes(llm, slm, 3, 100, 4, TierSizes(15, 5, 10), True, memory=4)
    assert fused == {**tiered, "scores": tiered["scores"] + 3 * 2 * 2 * 100 * 4}  # 2 layers of 2 KV heads
    narrow, wide = (step_bytes(llm, slm, 3, 100, size, TierSizes(15, 5, 0), False, memory=size, logits=True)["scores"]
                    for size in (2, 4))  # fmt: skip
    assert wide == fused["scores"] and narrow == wide // 2
    packed = [module for module in bench.random_decoder(llm, torch.device("cpu"), torch.float32, True).layers.modules()]
    held = sum(module.packed.nbytes + module.scale.nbytes + module.zero.nbytes for module in packed
               if isinstance(module, Int4Linear))  # fmt: skip
    int4 = step_bytes(llm, slm, 3, 100, 4, None, False, int4=(True, False))
    assert int4 == {**full, "LLM weights": held + 4 * 97 * 32}
    whole = FullCache.predict(slm, 3, 100, "cpu", torch.float32)[0].size
    assert tiered["SLM K, V"] == whole
    llm, slm = pair_configs("tiny", slm_layers=1)[1]
    less = step_bytes(llm, slm, 3, 100, 4, TierSizes(15, 5, 10), True, slm_budget=0.4)
    entries = {entry.what: entry.size for entry in FrugalCache.predict(slm, 3, 100, "cpu", torch.float32, share=0.4)}
    assert less["SLM K, V"] == entries["kept K, V"] == whole // 2 * 40 // 100
    assert less["scores"] + less["SLM slots"] == entries["scores"] + entries["slot tables"] == 3 * 40 * (4 + 2 + 2) * 4
    first, _, _, _ = layer_products(slm)  # q, k and v, all that is asked of a single layer
    assert less["SLM weights"] == 4 * first[0] * first[1] and less["LLM K, V"] == tiered["LLM K, V"]
    assert tiered["SLM weights"] == 4 * layer_parameters(slm) + less["SLM weights"]  # the whole layer before it
    drafting = step_bytes(llm, slm, 3, 100, 4, TierSizes(15, 5, 10), True, drafts=True)
    assert drafting["SLM weights"] == 4 * layer_parameters(slm)
    assert "SLM K, V" not in full


def test_flops_of_a_prefill_are_counted_by_torch():
    """torch's own counter over a plain forward; attention there is not halved by causality, so it is taken twice."""
    from torch.utils.flop_counter import FlopCounterMode

    config = pair_configs("tiny")[1][0]
    decoder, n = Decoder(config), 64
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        decoder(torch.zeros(1, n, dtype=torch.long), logits="last")
    square = 2 * 2 * config.layers * config.query_heads * config.head_dim * n * n
    triangle = square * (n + 1) // (2 * n)
    assert counter.get_total_flops() in (
        prefill_flops(config, None, 1, n) - triangle + square,
        prefill_flops(config, None, 1, n) - triangle,  # where the counter does not know this attention
    )


def test_paper_throughput_is_one_sequence():
    """All its tokens over all its time; the batch of 64 does not count."""
    assert paper_throughput(Setting(64, 2048, 256), 2.0, 0.03) == pytest.approx(2304 / (2.0 + 256 * 0.03))


def test_the_ring_moves_what_it_is_asked_to():
    """Ranks stay a permutation above every score, and `shift` of them change sides at any cut."""
    driven = bench_sessions.Driven(2, 50, "cpu")
    driven.shift.fill_(7)
    top = [set(driven.rank[0].topk(20).indices.tolist())]
    for _ in range(9):
        rank = driven.turn()
        assert sorted(rank[1].tolist()) == list(range(8, 58))
        top.append(set(rank[0].topk(20).indices.tolist()))
        assert len(top[-1] - top[-2]) == 7


@pytest.mark.parametrize("extra", [[], ["--decode-only"], ["--marginal", "--score-decay", "0.5"], ["--refresh", "3"],
                                   ["--scores", "fused", "--score-decay", "0.5", "--decode-only"],
                                   ["--quantize", "int4", "--slm-quantize", "int4"]])  # fmt: skip
def test_the_command_measures_every_method(extra, capsys):
    """Rows, table and the last line; the turnover that is counted is the one asked for."""
    command = ["--pair", "tiny", "--settings", "2x400+60", "--turnover", "0.02,0.2", "--steps", "9", "--table",
               "--device", "cpu", "--methods", "full-eager,full-graph,smallkv-graph"]  # fmt: skip
    assert bench.main(command + extra) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert [row["method"] for row in report["rows"]] == ["full-eager", "full-graph", *["smallkv-graph"] * 2]
    for row in report["rows"][2:]:
        size = Settings(0.2, marginal=report["marginal"], refresh=report["refresh"]).planned(row["length"])
        assert row["turnover"] == pytest.approx(row["turnover_asked"], abs=2.5 / size.critical)
    assert sum(line.startswith("| 2x400+60 |") for line in lines) == 4
    row_bytes = 16 * 4 * 2 * 2 * 2 * size.critical  # of the tokens that a plan moves: D, fp32, layers, sequences, heads
    if not report["marginal"]:
        assert row["pcie_bytes_step"] * report["refresh"] == pytest.approx(2 * row_bytes * row["turnover"])
    assert (report["rows"][0]["ttft_s"] is None) == ("--decode-only" in extra)


@pytest.mark.parametrize("filled", [False, True])
def test_a_prefill_that_is_timed_matches_heads(filled):
    """Random heads stand in for the matching where caches are filled, and nowhere else."""
    models = [bench.random_decoder(config, torch.device("cpu"), torch.float32) for config in pair_configs("tiny")[1]]
    settings = Settings()
    session = bench_sessions.make_session("smallkv-graph", models, Setting(2, 120, 4), settings, 50, TORCH, filled)
    bench_sessions.fill(session) if filled else session.prefill()
    for b, prompt in enumerate(session.prompts):
        index = match_heads(*models, prompt, settings.matcher, settings.reach).index
        assert torch.equal(session.policy.maps[b].index, index) != filled


@pytest.mark.parametrize("filled", [[], ["--decode-only"]])
@pytest.mark.parametrize("marginal", [[], ["--marginal"]])
def test_an_slm_that_costs_less_is_counted_so(filled, marginal, capsys):
    """Turnover as asked, though the SLM has dropped most tokens; bytes are those of its layers and of its share."""
    command = ["--pair", "tiny", "--settings", "2x400+60", "--turnover", "0.1", "--steps", "4", "--device", "cpu",
               "--methods", "smallkv-eager,smallkv-graph", "--slm-layers", "1", "--slm-budget", "0.4"]  # fmt: skip
    assert bench.main(command + filled + marginal) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["slm_layers"], report["slm_budget"]) == (1, 0.4)
    llm, slm = pair_configs("tiny", slm_layers=1)[1]
    for row, static in zip(report["rows"], (False, True)):
        settings = Settings(0.2, marginal=report["marginal"])
        assert row["turnover"] == pytest.approx(0.1, abs=2.5 / settings.sizes(row["length"]).critical)
        shape = slm, 2, 460, "cpu", torch.float32, report["marginal"], 0.4, 1, static
        held = [vars(entry) | {"model": "SLM"} for entry in FrugalCache.predict(*shape)]
        assert [tier for tier in row["tiers"] if tier["model"] == "SLM"] == held
        size = settings.sizes(row["length"])
        read = step_bytes(llm, slm, 2, row["length"], 4, size, report["marginal"], memory=4, slm_budget=0.4)
        assert row["step_bytes"] == read and read["SLM K, V"] == 2 * 2 * 2 * 16 * 4 * int(0.4 * row["length"])
        assert row["prefill_flops"] == prefill_flops(llm, slm, 2, 400)
    eager, graph = (row["predicted_bytes"] for row in report["rows"])
    rows = (1 + report["marginal"]) * 2 * 4 * 4  # of the scores of one token in both sequences
    assert graph - eager > rows * (460 - 184)  # by position, and the step's own tables


@pytest.mark.parametrize("flags, said", [(["--slm-layers", "3"], "3 layers were asked for; 1 to 2 can run"),
                                         (["--slm-budget", "0"], "SLM budget 0.0 is outside (0, 1]")])  # fmt: skip
def test_an_slm_that_cannot_be_is_named(flags, said, capsys):
    assert bench.main(["--pair", "tiny", "--device", "cpu", *flags]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("acceptance", ["0", "0.6", "1"])
def test_rounds_of_drafts_are_measured_with_the_acceptance_asked_for(acceptance, capsys):
    command = ["--pair", "tiny", "--settings", "2x400+200", "--turnover", "0.02,0.2", "--steps", "12", "--table",
               "--device", "cpu", "--speculate", "3", "--acceptance", acceptance, "--decode-only"]  # fmt: skip
    assert bench.main(command) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["method"].split(",")[0] for row in report["rows"]] == ["full-graph", *["smallkv-graph"] * 2]
    chance = float(acceptance)
    for row in report["rows"]:
        expected = 1 + sum(chance**draft for draft in (1, 2, 3))
        assert row["tokens_round"] == pytest.approx(expected, rel=0.3 if 0 < chance < 1 else 1e-9)
        assert row["tpot_s"] == pytest.approx(row["round_s"] / row["tokens_round"])
    for row in report["rows"][1:]:
        size = Settings(0.2, refresh=4).planned(row["length"])
        assert row["turnover"] == pytest.approx(
            row["turnover_asked"], abs=0.2 * row["turnover_asked"] + 4 / size.critical
        )
    with pytest.raises(SystemExit):
        bench.main(["--speculate", "2", "--methods", "full-eager"])
    assert "--speculate is for --methods full-graph,smallkv-graph alone" in capsys.readouterr().err


def test_methods_that_evict_are_prefilled_and_read_what_they_keep(capsys):
    methods = [f"{name}-eager" for name in bench_sessions.RIVALS] + ["h2o-published"]
    command = ["--pair", "tiny", "--settings", "2x400+60", "--steps", "4", "--table", "--device", "cpu",
               "--budget", "0.1", "--decode-only", "--methods", ",".join(methods)]  # fmt: skip
    assert bench.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(lines[-1])["rows"]
    assert [row["method"] for row in rows] == methods and sum(line.startswith("| 2x400+60 |") for line in lines) == 5
    full = step_bytes(*pair_configs("tiny")[1], 2, 400, 4, None, False)
    for row in rows:
        assert row["ttft_s"] > 0 and row["turnover"] is None and row["pcie_bytes_step"] == 0
        assert row["step_bytes"].keys() == full.keys() and row["step_bytes"]["LLM weights"] == full["LLM weights"]
        assert row["step_bytes"]["LLM K, V"] == full["LLM K, V"] // 400 * (row["length"] // 10)
        assert row["prefill_flops"] == prefill_flops(pair_configs("tiny")[1][0], None, 2, 400)
        kept = sum(tier["size"] for tier in row["tiers"] if tier["what"] == "kept K, V")
        if row["method"] in ("h2o-eager", "h2o-published", "streaming-eager"):  # the others have rules of their own
            assert kept == full["LLM K, V"] // 400 * 46  # a tenth of the capacity


def test_the_table_sets_the_memory_beside_pcie():
    """A step of 3 ms of memory and 5 ms of PCIe lasts at least 5."""
    row = {
        "setting": "1x1+1", "method": "smallkv-graph", "turnover": 0.1, "tpot_s": 0.006, "tpot_p10_p90": [0.006, 0.006],
        "step_bytes": {"all": 3000}, "pcie_bytes_step": 500, "tokens_s": 1.0, "ttft_s": None, "peak_bytes": None,
        "predicted_bytes": None,
    }  # fmt: skip
    cells = table({"rows": [row], "ceilings": {"copy_bytes_s": 1e6, "pcie_bytes_s": 1e5}}).splitlines()[-1].split(" | ")
    assert cells[4:6] == ["3.00", "2.00"] and cells[8] == "5.00"


def test_int4_products_are_timed_at_the_shapes_of_a_layer(capsys):
    assert bench_int4.main(["--pair", "tiny", "--rows", "1,3", "--device", "cpu"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[:2] for line in lines[2::2]] == [
        [f"| {inputs} x {outputs}", "1"] for inputs, outputs in ((32, 160), (96, 32), (32, 96), (48, 32))
    ]
