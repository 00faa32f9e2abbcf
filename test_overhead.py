"""The overhead calculator against arithmetic by hand, the paper's published values, and the ledgers of real caches."""

import json
import re

import pytest
import torch

import bench
from bench_count import layer_parameters
from bench_overhead import Use, break_even, costs, shape, token_bytes, uses, weights
from cache import TieredCache
from checkpoint import weight_bytes
from full_cache import ScoredCache
from overhead import MODELS, PAPER_PAIRS
from settings import Settings
from smallkv import pool_slots
from test_generate import write_checkpoint

SEVEN, HALF = MODELS["Qwen2-7B"], MODELS["Qwen2-0.5B"]


def call(capsys, *flags: str) -> tuple[int, str, str]:
    code = bench.main(["overhead", *flags])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("pair", PAPER_PAIRS, ids=lambda pair: pair.llm)
def test_the_paper_s_published_values(pair, capsys):
    """Table 4's cache ratios; for Qwen2-72B A.1's 5.71 and 21.9 % and A.2's 14.9; for Qwen2-7B A.3's 7.14 %."""
    found = json.loads(call(capsys, "--llm", pair.llm, "--slm", pair.slm, "--json")[1])
    assert round(found["ratios"]["cache"], 2) == pair.cache
    plain, drafts, *_, best = found["lines"]
    if pair.llm == "Qwen2-72B":
        assert round(plain["saved_share"], 3) == 0.219 and round(found["ratios"]["layer_flops"], 1) == 14.9
    if pair.llm == "Qwen2-7B":
        assert best["use"] == "0.4 of its cache, 20 of 24 layers" and round(best["cache_share"], 4) == 0.0714
    assert drafts["weights"] == {"held": 0, "read": 0} and set(drafts["flop_share"].values()) == {0}


def test_a_pair_by_hand():
    """Qwen2-7B with Qwen2-0.5B at 20 %: every number written out."""
    plain, _, kept, fewer, best = uses(HALF, 0.4, 20)
    kv = 2 * 24 * 2 * 64 * 2  # K and V, layers, KV heads, head dim, bytes
    assert token_bytes(plain, 2) == {"K, V": kv, "scores": 24 * 14 * 4}
    assert token_bytes(kept, 2) == {"K, V": 0.4 * kv, "scores": pytest.approx(0.4 * 24 * (14 + 2) * 4)}
    assert token_bytes(fewer, 2) == {"K, V": kv * 20 // 24, "scores": 20 * 14 * 4}
    layer = 896 * 64 * (14 + 14 + 2 + 2) + 3 * 896 * 4864
    assert weights(plain, 2)["read"] == 2 * 24 * layer and weights(best, 2)["read"] == 2 * 20 * layer
    saved = 0.8 * 2 * 28 * 4 * 128 * 2 - (kv + 24 * 14 * 4)
    found = costs(SEVEN, plain, 0.2, [1000])
    assert found["break_even_tokens"]["read"] == -(-2 * 24 * layer // saved)
    assert found["break_even_batch"]["read"][1000] == 23  # 22,196 tokens
    big = 28 * (3584 * 128 * (28 + 28 + 4 + 4) + 3 * 3584 * 18944) + 152064 * 3584  # and the output projection
    own = 2 * 24 * layer + (kv + 24 * 14 * 4) * 1000
    assert found["read_share"][1000] == pytest.approx(own / (2 * big + 2 * 28 * 4 * 128 * 2 * 1000))
    flops = 2 * 24 * layer + 4 * 24 * 14 * 64 * 1000
    biases, norms = 28 * (28 + 8) * 128, (2 * 28 + 1) * 3584
    assert found["flop_share"][1000] == pytest.approx(flops / (2 * (big + biases + norms) + 4 * 28 * 28 * 128 * 1000))


@pytest.mark.parametrize("name", ["held", "read"])
def test_break_even_is_where_the_saving_overtakes_the_cost(name):
    for use in uses(HALF, 0.4, 20):
        tokens = break_even(SEVEN, use, 0.2, 2)[name]

        def pays(n):
            saved = 0.8 * 2 * SEVEN.layers * SEVEN.kv_heads * SEVEN.head_dim * 2 * n
            return saved >= weights(use, 2)[name] + sum(token_bytes(use, 2).values()) * n

        assert pays(tokens) and (tokens == 1 or not pays(tokens - 1))
    assert break_even(HALF, Use("larger than the LLM", SEVEN), 0.2, 2) == {"held": None, "read": None}


def test_bytes_are_those_of_the_ledgers():
    """What both caches of a real setting hold at 30,000 tokens, with and without SmallKV, around the break-even."""
    use, n, dtype = uses(HALF, 0.4, 20)[0], 30000, torch.bfloat16
    slm = sum(entry.size for entry in ScoredCache.predict(HALF, 1, n, "cuda", dtype))
    assert slm == sum(token_bytes(use, 2).values()) * n
    assert weights(use, 2)["held"] == weight_bytes(HALF, dtype)
    assert weights(use, 4)["read"] == 4 * layer_parameters(HALF)
    slots = pool_slots(Settings(budget=0.2), n, n)
    pools = {entry.what: entry.size for entry in TieredCache.predict(SEVEN, 1, n, *slots, "cuda", dtype)}
    assert pools["critical K, V"] == 2 * SEVEN.layers * SEVEN.kv_heads * SEVEN.head_dim * 2 * n // 5


def test_the_command_takes_folders_and_names(tmp_path, capsys):
    llm = write_checkpoint(tmp_path / "llm", layers=3)
    (llm / "model.safetensors").unlink()  # the config alone is read
    code, out, _ = call(capsys, "--llm", "Qwen2-7B", "--slm", str(llm), "--markdown", "--length", "100")
    assert code == 0 and "| the SLM | as it is | speculative decoding | 0.4 of its cache | 2 of 3 layers |" in out
    assert "| break-even length, held |" in out and "| batch at 100, read |" in out
    assert shape(str(llm)).layers == 3


@pytest.mark.parametrize("flags, message", [
    (["--llm", "Qwen9"], "no folder Qwen9; .* published shapes here: Qwen2-0.5B, "),
    (["--budget", "1"], "--budget 1.0 is outside"),
    (["--slm-budget", "0"], "--slm-budget 0.0 is outside"),
    (["--slm-layers", "25"], "25 layers were asked for; 1 to 24 can run"),
    (["--length", "0"], "--length: at least one context"),
    (["--value-bytes", "0"], "--value-bytes 0 is too small"),
])  # fmt: skip
def test_mistakes_are_one_line(flags, message, capsys):
    code, out, err = call(capsys, "--llm", "Qwen2-7B", "--slm", "Qwen2-0.5B", *flags)
    assert code == 2 and not out and err.count("\n") == 1
    assert re.search(message, err)
