"""experiments/overhead.py against arithmetic by hand, the paper's published values and the ledgers of real caches."""

import json
import re

import pytest
import torch

from bench import PAIRS
from cache import ScoredCache
from checkpoint import weight_bytes
from evicting import CutCache
from experiments import overhead
from experiments.overhead import MODELS, PAPER_PAIRS
from floors import SHAPES, step_bytes
from model import Config, Decoder
from smallkv import Settings, TierSizes

LLM, SEVEN, HALF = Config.from_hf(PAIRS["tiny"][0]), MODELS["Qwen2-7B"], MODELS["Qwen2-0.5B"]


@pytest.mark.parametrize("pair", PAPER_PAIRS, ids=lambda pair: pair.llm)
def test_the_paper_s_published_values(pair, capsys):
    """Table 4's cache ratios; for Qwen2-72B A.1's 5.71 and 21.9 % and A.2's 14.9; for Qwen2-7B A.3's 7.14 %."""
    assert overhead.main(["--llm", pair.llm, "--slm", pair.slm]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    plain, drafts, *_, best = report["uses"].values()
    assert round(report["pairs"][f"{pair.llm} / {pair.slm}"]["cache"], 2) == pair.cache
    if pair.llm == "Qwen2-72B":
        assert round(plain["share_of_saving"], 3) == 0.219 and round(plain["layer_flops"], 1) == 14.9
    if pair.llm == "Qwen2-7B":
        assert [*report["uses"]][-1] == "0.4 of its cache, 20 of 24 layers" and round(best["slm_share"], 4) == 0.0714
    assert drafts["added"]["held"][0] == drafts["added"]["moved"][0] == 0
    assert min(plain["forward_flops"].values()) > pair.latency  # the latencies are no ratio of FLOPs


@pytest.mark.parametrize("more", [(), (0.4,), (1.0, True)], ids=["whole", "cut", "drafting"])
def test_bytes_added_are_those_of_the_ledgers_and_of_a_step(more):
    """At 30,000 tokens, beside the LLM's K and V; and break-even is where the saving overtakes them."""
    n, bf16, share = 30000, torch.bfloat16, more[0] if more else 1.0
    added = overhead.added_bytes(SEVEN, HALF, *more)
    found = {kind: fixed + each * n for kind, (fixed, each) in added.items()}
    if len(more) < 2:
        slm = CutCache(HALF, 1, n, "meta", bf16, 0.0, share) if more else ScoredCache(HALF, 1, n, "meta", bf16, 0.0)
        small, memory = 4 * 24 * (14 + 2 * len(more)), 4 * 28 * 4 * n  # logs of sums, and where the newest token is
        held = sum(entry.size for entry in slm.ledger()) - small + memory
        assert found["held"] == pytest.approx(held + weight_bytes(HALF, bf16))
        step = step_bytes(SEVEN, HALF, 1, n, 2, TierSizes(n, 1, 0), Settings(slm_budget=share))
        assert found["moved"] == pytest.approx(sum(size for kind, size in step.items() if "LLM" not in kind))
    for kind, tokens in overhead.compare(SEVEN, HALF, 0.2, [n], *more)["break_even"].items():
        fixed, saved = added[kind][0], 0.8 * 2 * 28 * 4 * 128 * 2 - added[kind][1]
        assert saved * tokens >= fixed and (tokens == 1 or saved * (tokens - 1) < fixed)
    assert overhead.compare(HALF, SEVEN, 0.2, [n])["break_even"] == {"held": None, "moved": None}


def test_flops_by_hand():
    assert overhead.forward_flops(HALF, 10) == 24 * (10 * 24 * 896**2 + 4 * 100 * 896) + 2 * 10 * 896 * 151936
    assert overhead.matching_flops(SEVEN, HALF, 200) == 2 * 200 * (28 * 28) * (24 * 14)
    multiplied = sum(p.numel() for name, p in Decoder(LLM).named_parameters() if "embed_tokens" not in name)
    assert overhead.decode_flops(LLM, 50) == 2 * (multiplied + 2 * LLM.layers * LLM.query_heads * LLM.head_dim * 50)


def test_the_calculator_takes_folders_and_names(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({**SHAPES["Qwen2-0.5B"], "num_hidden_layers": 3}))
    assert overhead.main(["--slm", str(tmp_path), "--length", "100"]) == 0  # the config alone is read
    out = capsys.readouterr().out
    assert re.search(r"\| as it is \| speculative decoding \| 0.4 of its cache \| 2 of 3 layers \|", out)
    assert "| break-even length, held |" in out and "| layers | 28 | 3 |" in out


@pytest.mark.parametrize("flags, said", [
    (["--llm", "Qwen9"], "published shapes here: Qwen2-0.5B, "),
    (["--budget", "1"], "--budget 1.0 is outside"),
    (["--slm-budget", "0"], "--slm-budget: 0 is not a number above 0"),
    (["--slm-layers", "25"], "25 layers were asked for; 1 to 24 can run"),
    (["--length", "0"], "--length: 0 is not a whole number of at least 1"),
])  # fmt: skip
def test_mistakes_are_one_line(flags, said, capsys):
    assert overhead.main(flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
