"""The SLM's own K and V in 8 bits (`Settings.slm_kv`), and a full cache so: kernels, caches, steps, commands."""

import itertools
import json

import pytest
import torch

import bench
import generate as command
import kernels_decode
import kernels_layer
from backend import TORCH, TRITON
from bench_count import TINY, step_bytes
from conftest import by_slm, check_ledgers, random_prompts, tiny_decoder
from decode import FullPolicy, Session, generate
from evaluate import make_cells
from full_cache import FullCache
from generate import Pair, check_caches_fit
from graph import Step
from int8_rows import decode, encode, per_token, scales_of
from model import Config
from settings import Settings
from smallkv import SmallKV
from speculative import SpeculativeSmallKV
from test_graph import decoders, generate_static
from test_int8 import as_taken
from test_kernels import FINE, HERE, cases, close, full_case, kinds, randn

INT8 = {
    "default": Settings(slm_kv="int8"),
    "scores of the past": by_slm(slm_kv="int8", score_decay=0.5),
    "marginal, refresh": Settings(slm_kv="int8", marginal=True, refresh=2),
    "both": Settings(slm_kv="int8", llm_kv="int8", max_moves=3),
    "paper": Settings.paper(slm_kv="int8"),
}
LENGTHS = (130, 157, 101)
NOWHERE = -128  # no level


# ---- Kernels ---------------------------------------------------------------------------------------------------------


def rounded(rows, length):
    """Levels and scales of random rows (B, G, S, D) that are NaN beyond each length; there any levels stand."""
    parts = [scales_of(rows[b, :, : max(2, n)].nan_to_num()) for b, n in enumerate(length.tolist())]
    scales = torch.stack(parts)  # (B, G, 2, D)
    scales[:, :, 0] = torch.exp2(scales[:, :, 0].log2().round())  # a query of 16 bits takes them in exactly
    return encode(rows.nan_to_num(1e3), per_token(scales)), scales


def int8_case(device, dtype, lengths, group, head_dim):
    """As full_case, in 8 bits: keys stand on a constant a thousand times as large as what tells them apart."""
    query, key, value, length = full_case(device, torch.float32, lengths, group, head_dim)
    (key, key_scale), (value, value_scale) = rounded(key + 1000, length), rounded(value + 1, length)
    return query.to(dtype), key, value, length, (key_scale, value_scale)


def attention_in_fp64(query, levels, length, scales):
    """On what the levels stand for: row (B, H, S) and output (B, H, D), returned in fp32. Logits are some thousands."""
    group, D = query.shape[1] // levels[0].shape[1], query.shape[2]
    key, value = (decode(held, per_token(scale.double()), torch.float64).repeat_interleave(group, 1)
                  for held, scale in zip(levels, scales))  # fmt: skip
    logits = torch.einsum("bhd,bhsd->bhs", query.double(), key) / D**0.5
    unseen = torch.arange(key.shape[2], device=key.device) >= length[:, None, None]
    row = logits.masked_fill(unseen, -torch.inf).softmax(-1)
    return row.float(), torch.einsum("bhs,bhsd->bhd", row, value).float()


@pytest.mark.parametrize("lengths, group", cases(
    ((1, 63), 1), ((111, 257), 7), ((2049, 1), 3),
    gpu=[((1, 63), 3), ((1, 63), 7), ((111, 257), 1), ((111, 257), 3), ((2049, 1), 1), ((2049, 1), 7)],
))  # fmt: skip
def test_attention_on_levels_equals_its_twin(lengths, group):
    """Scores, logits as scores and neither; and all of it is attention on what the levels stand for."""
    device = HERE
    for dtype, head_dim in kinds(device, 32, 64, 128):
        query, key, value, length, scales = int8_case(device, dtype, lengths, group, head_dim)
        B, H, S = len(lengths), query.shape[1], key.shape[2]
        row, truth = attention_in_fp64(as_taken(query, scales[0]), (key, value), length, scales)
        tables = [torch.zeros(B, H, S, device=device) for _ in range(4)]
        logs = [torch.zeros(2, B, H, device=device) for _ in range(2)]
        outs = []
        for module, score, logit, (lse, anchor) in (("torch", *tables[:2], logs[0]), ("triton", *tables[2:], logs[1])):
            scored, plain = (getattr(kernels_decode, f"{kind}_attention_{module}") for kind in ("scored", "decode"))
            inputs = query.float() if module == "torch" else query, key, value, length
            outs += [plain(*inputs, scales), scored(*inputs, score, 0.5, scales=scales),
                     scored(*inputs, logit, 0.0, None, lse, anchor, scales)]  # fmt: skip
            from_logits = torch.exp2(logit - lse[..., None]).where(row > 0, 0)
            for found in (score, from_logits):
                torch.testing.assert_close(found, row, atol=1e-5, rtol=1e-3)
        for out in outs:
            close(out, truth, dtype)
        torch.testing.assert_close(tables[2:], tables[:2], atol=FINE, rtol=FINE)
        torch.testing.assert_close(logs[1], logs[0], atol=FINE, rtol=FINE)


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_cache_write_rounds_as_its_twin(tokens):
    """To the level; on a GPU a rotated key may lie a last bit beside the twin's, and its level one beside."""
    device = HERE
    for dtype, D in kinds(device, 32, 64):
        B, H, G, S = 3, 6, 2, 40
        qkv = randn(B * tokens, (H + 2 * G) * D, dtype=dtype, device=device)
        cos, sin = (randn(S, D // 2, seed=seed, device=device) for seed in (1, 2))
        length = torch.tensor([1, 17, 38], dtype=torch.int32, device=device)
        scales = [scales_of(randn(B, G, 50, D, seed=seed, device=device)) for seed in (3, 4)]
        made = []
        for rope in (kernels_layer.rope_append_torch, kernels_layer.rope_append_triton):
            pools = [torch.zeros(B, G, S, D, dtype=torch.int8, device=device) for _ in range(2)]
            newest = torch.zeros(2, B * tokens, G, D, dtype=torch.int8, device=device)
            rope(qkv, cos, sin, length, None, *pools, newest=newest, tokens=tokens, scales=scales)
            made.append((*pools, newest))
        for ours, twins in zip(*made):
            apart = (ours.int() - twins.int()).abs()
            assert apart.max() <= (device == "cuda") and (apart > 0).float().mean() < 0.01
        exact = torch.zeros(2, B * tokens, G, D, dtype=dtype, device=device)
        pools = [torch.zeros(B, G, S, D, dtype=dtype, device=device) for _ in range(2)]
        kernels_layer.rope_append_torch(qkv, cos, sin, length, None, *pools, newest=exact, tokens=tokens)
        for pool, copied, rows, scale in zip(made[0][:2], made[0][2], exact, scales):
            for b, t in itertools.product(range(B), range(tokens)):
                level = encode(rows[b * tokens + t], scale[b])  # (G, D)
                assert torch.equal(pool[b, :, length[b] - 1 + t], level) and torch.equal(copied[b * tokens + t], level)
            assert (pool != 0).any(-1).sum() <= B * G * tokens and (pool.abs() == 127).any()


def test_what_lies_half_way_is_rounded_as_the_twin_does():
    """Half to even, of numbers that the rotation leaves as they are; and some beyond the last level are among them."""
    B, H, G, D, S = 3, 6, 2, 32, 9
    scales = [torch.rand(B, G, 2, D, generator=torch.Generator().manual_seed(seed)) + 0.01 for seed in (1, 2)]
    level = torch.randint(-300, 300, (2, B, G, D), generator=torch.Generator().manual_seed(0)) / 2
    width, zero = torch.stack(scales).unbind(3)  # (2, B, G, D) each
    rows = (level * width + zero).transpose(0, 1).flatten(1)  # (B, 2G D)
    qkv, scales = torch.cat((torch.ones(B, H * D), rows), 1).to(HERE), tuple(scale.to(HERE) for scale in scales)
    cos, sin = torch.ones(S, D // 2, device=HERE), torch.zeros(S, D // 2, device=HERE)
    length, tables = torch.tensor([1, 5, 9], dtype=torch.int32, device=HERE), []
    for rope in (kernels_layer.rope_append_torch, kernels_layer.rope_append_triton):
        pools = torch.zeros(2, B, G, S, D, dtype=torch.int8, device=HERE)
        rope(qkv, cos, sin, length, None, *pools, scales=scales)
        tables.append(pools.cpu())
    assert torch.equal(tables[1], tables[0])
    for b, n in enumerate((1, 5, 9)):
        held = tables[0][:, b, :, n - 1].float()  # (2, G, D)
        assert ((held - level[:, b].clamp(-127, 127)).abs() <= 0.51).all() and (held.abs() == 127).any()


# ---- Caches and steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [2048, 48])
@pytest.mark.parametrize("name", INT8)
def test_the_slm_reads_its_prompt_exact_and_keeps_levels(name, chunk, device):
    """Prompt: head maps and scores as without; K and V are those rounded. Steps: attention on what the levels say."""
    llm, slm = tiny_decoder(intermediate_size=144, device=device), decoders(device)[1]  # two chunks at once
    prompts = random_prompts(*LENGTHS, 130)  # two of a length in a row come to the SLM together
    prompts = [prompts[i] for i in (0, 3, 1, 2)]
    exact, session = (Session(llm, SmallKV(llm, slm, settings), prompts, 30, chunk)
                      for settings in (Settings(**{**vars(INT8[name]), "slm_kv": "exact"}), INT8[name]))  # fmt: skip
    assert torch.equal(exact.prefill(), session.prefill())
    theirs, cache = exact.policy.slm_cache, session.policy.slm_cache
    assert torch.equal(exact.policy.index, session.policy.index) and torch.equal(theirs.score, cache.score)
    pools = list(zip((theirs.key, theirs.value), (cache.key, cache.value), cache.scale))
    for (made, held, scale), (b, prompt) in itertools.product(pools, enumerate(prompts)):
        rows = made[:, b, :, : len(prompt)]
        assert torch.equal(scale[:, b], scales_of(rows))
        assert torch.equal(held[:, b, :, : len(prompt)], encode(rows, per_token(scale[:, b])))
        held[:, b, :, len(prompt) :] = NOWHERE
    before = cache.scale.clone()
    stand_in = FullCache(slm.config, len(prompts), session.capacity, device, torch.float32)
    for number in range(6):
        for table, held, scale in zip((stand_in.key, stand_in.value), (cache.key, cache.value), cache.scale):
            table.copy_(decode(held, per_token(scale), torch.float32))
        score = cache.score.clone()
        session.step([number] * 4)
        if name == "scores of the past":  # nothing but the row is added
            added = cache.score - 0.5 * score
            for b, n in enumerate(session.lengths):
                ones = torch.ones_like(added[:, b, :, 0])
                torch.testing.assert_close(added[:, b, :, :n].sum(-1), ones, atol=1e-4, rtol=0)
        for table, held, scale in zip((stand_in.key, stand_in.value), (cache.key, cache.value), cache.scale):
            now = decode(held, per_token(scale), torch.float32)
            for b, n in enumerate(session.lengths):
                assert torch.equal(now[:, b, :, : n - 1], table[:, b, :, : n - 1])
                assert (held[:, b, :, n - 1] != NOWHERE).all() and (held[:, b, :, n:] == NOWHERE).all()
    assert torch.equal(cache.scale, before)


@pytest.mark.parametrize("name", INT8)
def test_static_step_makes_the_tokens_of_the_eager_path(name, device):
    """On a GPU captured, with Triton, against the eager path on the CPU: fp32 on both."""
    prompts, cpu, pair = random_prompts(*LENGTHS), decoders("cpu", 32), decoders(device, 32)  # kernels want 32 at least
    expected = generate(cpu[0], SmallKV(*cpu, INT8[name]), prompts, 14)
    session = Session(pair[0], SmallKV(*pair, INT8[name]), prompts, 14)
    assert generate_static(session, 14, TORCH if device == "cpu" else TRITON) == expected


@pytest.mark.parametrize("name", ["default", "marginal, refresh"])
def test_static_step_with_triton(name):
    """Few steps: the interpreter is slow."""
    prompts, new, cpu = random_prompts(120, 101), 6 if HERE == "cuda" else 4, decoders("cpu", head_dim=32)
    expected = generate(cpu[0], SmallKV(*cpu, INT8[name]), prompts, new)
    pair = decoders(HERE, head_dim=32)
    assert generate_static(Session(pair[0], SmallKV(*pair, INT8[name]), prompts, new), new, TRITON) == expected


def test_a_full_cache_in_8_bits(device):
    """The rival: eager and static steps make the same tokens, whose logits are near those of the exact cache."""
    prompts, cpu, llm = random_prompts(*LENGTHS), decoders("cpu", 32)[0], decoders(device, 32)[0]
    expected = generate(cpu, FullPolicy(cpu, int8=True), prompts, 14)
    session = Session(llm, FullPolicy(llm, int8=True), prompts, 14)
    assert generate_static(session, 14, TORCH if device == "cpu" else TRITON) == expected
    sessions = [Session(llm, FullPolicy(llm, int8=kind), prompts, 10) for kind in (False, True)]
    logits, near = [one.prefill() for one in sessions]
    assert torch.equal(logits, near)
    for number in range(8):
        logits, near = [one.step([number] * 3) for one in sessions]
        assert 0 < (near - logits).std() / logits.std() < 0.05


# ---- What it takes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ledgers_count_one_byte_a_number_and_the_scales(dtype, device):
    """What is predicted, eager and static, is what is there."""
    pair = [model.to(dtype) for model in decoders(device)]
    for name in INT8:
        check_ledgers(SmallKV(*pair, INT8[name]), [150, 120], 300)
    session = Session(pair[0], SmallKV(*pair, INT8["default"]), random_prompts(150, 120), 8)
    Step(session, session.prefill().argmax(-1), TORCH)
    ledger = session.policy.predict([150, 120], 158, static=True)["SLM"]
    assert session.policy.slm_cache.ledger() == ledger
    slm = pair[1].config
    numbers = 2 * slm.layers * 2 * slm.kv_heads * slm.head_dim  # of one token
    assert {entry.what: entry.size for entry in ledger[:2]} == {"full K, V": 158 * numbers, "int8 scales": 8 * numbers}
    full = FullPolicy(pair[0], int8=True)
    assert full.make_cache([150, 120], 158).ledger() == full.predict([150, 120], 158)["LLM"]


def test_what_rounding_needs_is_looked_for_before_the_prefill(monkeypatch):
    """generate.py's check knows of the exact K and V of two prompts that are read together, until they are rounded, and
    of one layer of all tokens as a plain step has it: levels, their numbers in fp32, and these in the model's dtype."""
    pair, needs = (tiny_decoder(intermediate_size=144), decoders("cpu")[1]), {}
    monkeypatch.setattr(command, "AT_ONCE", 100)
    for kind in ("exact", "int8"):
        monkeypatch.setattr(command, "check_fits", lambda parts, where, kind=kind: needs.update({kind: parts}))
        check_caches_fit(SmallKV(*pair, Settings(slm_kv=kind)), [130, 101], 150)
    numbers = 2 * 2 * 16  # two prompts, KV heads, head dim
    more = 2 * 2 * numbers * 130 * 4 + numbers * 150 * 3 * 4  # K and V of two layers; K, V and one of them again
    found = [needs[kind]["prefill of the longest prompt"] for kind in ("exact", "int8")]
    assert found[1] - found[0] == more


def test_step_bytes_count_it():
    llm, slm = Config.from_hf(TINY), Config.from_hf({**TINY, "num_attention_heads": 4})
    exact, held = (step_bytes(llm, slm, 3, 100, 2, Settings().sizes(100), False, memory=2, int8=(False, int8))
                   for int8 in (False, True))  # fmt: skip
    assert exact.pop("SLM K, V") == 2 * held.pop("SLM K, V") and exact == held
    assert held.pop("LLM K, V") == 2 * step_bytes(
        llm, slm, 3, 100, 2, Settings().sizes(100), False, memory=2, int8=(True, True))["LLM K, V"]
    full, rival = (step_bytes(llm, None, 3, 100, 2, None, False, int8=(int8, False)) for int8 in (False, True))
    assert full["LLM K, V"] == 2 * rival["LLM K, V"] == 2 * 2 * 2 * 2 * 16 * 3 * 100


def test_equal_bytes_take_less_off_for_it():
    """fp32: a fourth of what the SLM's exact cache takes, and four of the LLM's tokens for one."""
    pair = Pair(decoders("cpu")[0], tiny_decoder(layers=1, heads=4), None)
    methods = ["smallkv", "smallkv:slm_kv=int8", "smallkv:slm_kv=int8,llm_kv=int8"]
    exact, slm, both = make_cells(methods, [0.6], "bytes", pair)
    assert (0.6 - exact.own) == pytest.approx(4 * (0.6 - slm.own)) and 0.05 < exact.own < 0.15
    assert both.own == 1.0 and make_cells(methods[2:], [0.2], "bytes", pair)[0].own == pytest.approx(4 * (0.2 - 0.125))


# ---- Commands --------------------------------------------------------------------------------------------------------


def test_the_commands_know_it(tmp_path, capsys):
    asked = ["--slm-kv", "int8", "--device", "cpu", "--max-new-tokens", "3"]
    assert command.main([*asked, "Where is Dora?"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: slm-kv in 8 bits takes its scales from the")
    assert command.main([*asked, "--json", str(tmp_path / "r.json"), "Dora's home is in Stony Ashby. " * 30]) == 0
    assert "SLM's K, V in 8 bits" in capsys.readouterr().err
    ledger = json.loads((tmp_path / "r.json").read_text())["smallkv"]["report"]["ledger"]
    assert ("SLM", "int8 scales") in [(entry["model"], entry["what"]) for entry in ledger]
    flags = ["--pair", "tiny", "--settings", "2x400+60", "--turnover", "0.1", "--steps", "4", "--device", "cpu",
             "--methods", "full-graph,full-int8-graph,smallkv-eager,smallkv-graph", "--decode-only"]  # fmt: skip
    reports = []
    for kind in ("exact", "int8"):
        assert bench.main([*flags, "--slm-kv", kind]) == 0
        reports.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert [report["slm_kv"] for report in reports] == ["exact", "int8"]
    read = [{row["method"]: row["step_bytes"] for row in report["rows"]} for report in reports]
    assert read[1]["full-graph"]["LLM K, V"] == 4 * read[1]["full-int8-graph"]["LLM K, V"]
    for method in ("smallkv-eager", "smallkv-graph"):
        assert read[0][method]["SLM K, V"] == 4 * read[1][method]["SLM K, V"]


def test_what_does_not_go_together_is_refused():
    pair = decoders("cpu")
    with pytest.raises(ValueError, match="unknown slm-kv 'int4'; supported: exact, int8"):
        Settings(slm_kv="int4")
    with pytest.raises(ValueError, match="whole cache, and SLM budget 0.4 cuts it; leave one of the two out"):
        Settings(slm_kv="int8", slm_budget=0.4)
    with pytest.raises(ValueError, match="slm-kv int8 goes without drafts"):
        SpeculativeSmallKV(*pair, by_slm(slm_kv="int8"), 3)
    for policy, name in ((SmallKV(*pair, INT8["default"]), "slm-kv"), (FullPolicy(pair[0], int8=True), "full cache")):
        with pytest.raises(ValueError, match=f"{name} in 8 bits .* needs 100 tokens; one has 99: leave it exact"):
            Session(pair[0], policy, random_prompts(130, 99), 4)
        assert len(generate(pair[0], policy, random_prompts(100), 4)[0]) == 4
