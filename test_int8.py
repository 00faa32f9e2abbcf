"""The LLM's K and V in 8 bits (`Settings.llm_kv`): what lies where, and attention on it, on every path of a step."""

import gc
import json
from dataclasses import replace

import pytest
import torch

import bench
import generate as command
import kernels_eq6
import kernels_verify
from backend import TORCH, TRITON
from conftest import by_slm, check_ledgers, random_prompts
from decode import FullPolicy, Session, generate
from graph_speculative import StaticSpeculativeSession
from host_memory import host_rows
from int8_rows import QUERY_LEVELS, decode, encode, into_query, per_token, rounded_query, scales_of
from model import Span
from settings import Settings
from smallkv import SmallKV
from speculative import SpeculativeSession, SpeculativeSmallKV
from test_graph import decoders, generate_static
from test_graph_speculative import answers_of
from test_kernels import FINE, HERE, cases, close, kinds, randn, tiered_case
from test_speculative import near_pair

INT8 = {
    "default": Settings(llm_kv="int8"),
    "marginal": Settings(llm_kv="int8", marginal=True),
    "refresh, moves": Settings(llm_kv="int8", refresh=3, max_moves=2),
    "no prefetch": Settings(llm_kv="int8", prefetch=False),
    "no shift": by_slm(llm_kv="int8", saliency_shift=False, marginal=True),
}
LENGTHS = (130, 157, 101)


def on_levels(pools, device):
    """Pools (B, G, slots, D) in 8 bits: levels, -128 where there is NaN; scales, which a query of 16 bits takes in
    exactly; and what the levels stand for, fp32."""
    held = [torch.where(pool.isnan(), -128.0, (40 * pool).clamp(-127, 127)).to(torch.int8) for pool in pools]
    B, G, _, D = pools[0].shape
    scales = [randn(B, G, 2, D, seed=seed, device=device) for seed in (11, 12)]
    for scale in scales:
        scale[:, :, 0] = torch.exp2(scale[:, :, 0].round() - 6)
    return held, tuple(scales), [decode(rows, per_token(scale), torch.float32) for rows, scale in zip(held, scales)]


def as_taken(query, key_scale):
    """A query (B, H, D) in fp32 as a decode step's kernels see it: rounded after K's scales (B, G, 2, D) went in."""
    rounded = rounded_query(query.float()[:, None], key_scale)[:, 0]
    return (rounded.unflatten(1, (key_scale.shape[1], -1)) / key_scale[:, :, :1]).flatten(1, 2)


def test_a_query_is_rounded_to_15_bits(device):
    """Of its largest number, after K's scales: no number moves by more than half a unit, and some do by nearly that; a
    query of zeros stays one."""
    query, scale = randn(3, 1, 6, 64, device=device), randn(3, 2, 2, 64, seed=1, device=device)
    query[1, 0, 2] = 0
    exact, rounded = into_query(query, scale).double(), rounded_query(query, scale).double()
    unit = exact.abs().amax(-1, keepdim=True) / QUERY_LEVELS
    apart = ((rounded - exact).abs() / unit).nan_to_num()
    assert 0.49 < apart.max() < 0.51 and torch.equal(rounded[1, 0, 2], exact[1, 0, 2])


@pytest.mark.parametrize("tokens", [None, 1, 5])
@pytest.mark.parametrize("critical, marginal, group", cases(
    (1, 110, 3), (63, 48, 7), (257, 0, 1), gpu=[(1, 0, 1), (257, 300, 3), (257, 0, 7)]))  # fmt: skip
def test_attention_on_the_tiers_levels_equals_its_twin(critical, marginal, group, tokens):
    """One token, or a round of them that is verified; and it is attention on what the levels stand for."""
    for dtype, head_dim in kinds(HERE, 32, 64, 128):
        spare = {32: 0, 64: 5, 128: 70}[head_dim]
        query, *pools, position, slot, borrowed = tiered_case(
            HERE, dtype, critical + (tokens or 1) - 1, marginal, group, head_dim, spare)
        held, scales, exact = on_levels(pools, HERE)
        tables, memories = (position, slot, borrowed), [torch.ones(2, 2, critical + 9, device=HERE) for _ in range(3)]
        if tokens:
            query = 2 * randn(2, tokens, 2 * group, head_dim, dtype=dtype, device=HERE)
            length = torch.full((2,), critical, dtype=torch.int32, device=HERE)
            tables = length, position, slot, torch.stack([borrowed / (t + 1) for t in range(tokens)])
            attentions = kernels_verify.verify_attention_torch, kernels_verify.verify_attention_triton
        else:
            attentions = kernels_eq6.tiered_attention_torch, kernels_eq6.tiered_attention_triton
        more = [() if tokens else (memory, 0.5) for memory in memories]
        taken = query.float() if tokens else as_taken(query, scales[0])
        truth = attentions[0](taken, *exact, *tables, *more[0])
        twin = attentions[0](query.float(), *held, *tables, *more[1], scales=scales)
        close(twin, truth)
        close(attentions[1](query, *held, *tables, *more[2], scales=scales), twin, dtype)
        for memory in memories[1:]:
            torch.testing.assert_close(memory, memories[0], atol=1e-5, rtol=FINE)


@pytest.mark.parametrize("name", INT8)
def test_all_tiers_have_the_levels_of_the_full_cache(name, device):
    """After every step: a prompt's rows are those of the full cache rounded, and what is in a pool is what the host
    has of the same token."""
    llm, slm = decoders(device)
    prompts = random_prompts(*LENGTHS)
    session, full = (Session(llm, policy, prompts, 30) for policy in (SmallKV(llm, slm, INT8[name]), FullPolicy(llm)))
    assert torch.equal(session.prefill(), full.prefill())
    cache = session.cache
    cache.finish_loading()
    tables = (cache.host_key, cache.scale[0], full.cache.key), (cache.host_value, cache.scale[1], full.cache.value)
    for (held, scale, made), (b, n) in ((table, place) for table in tables for place in enumerate(LENGTHS)):
        prompt = made[:, b, :, :n]  # (L, G, n, D)
        assert torch.equal(scale[:, b], scales_of(prompt))
        assert torch.equal(held[:, b, :, :n], encode(prompt, per_token(scale[:, b])))
    for number in range(24):
        session.step([number, 2 * number, 3 * number])
        pools = (cache.key, cache.key_position, cache.host_key), (cache.value, cache.value_position, cache.host_value)
        for kind, (pool, position, held) in enumerate(pools):
            for b, n in enumerate(session.lengths):
                rows, token = pool[:, b], position[:, b].long()  # (L, G, slots, D), (L, G, slots)
                level = held[:, b].gather(2, token.clamp(min=0)[..., None].expand_as(rows))
                written = (token >= 0) & (token < n - 1)  # the newest goes to the host a step later
                assert torch.equal(rows[written], level[written])
                assert (token[written] >= LENGTHS[b]).any() == (n > LENGTHS[b] + 1)
                made = rows[token == n - 1].unflatten(0, (*cache.newest.shape[1:2], -1))  # (L, G, D)
                assert torch.equal(made, cache.newest[kind, :, b])


@pytest.mark.parametrize("name", ["default", "marginal", "refresh, moves"])
def test_static_step_makes_the_tokens_of_the_eager_path(name, device):
    """On a GPU captured, with Triton, against the eager path on the CPU: fp32 on both."""
    prompts = random_prompts(*LENGTHS)
    cpu, pair = decoders("cpu", 32), decoders(device, 32)  # kernels want 32 at least
    expected = generate(cpu[0], SmallKV(*cpu, INT8[name]), prompts, 14)
    session = Session(pair[0], SmallKV(*pair, INT8[name]), prompts, 14)
    assert generate_static(session, 14, TORCH if device == "cpu" else TRITON) == expected


def test_attention_hardly_sees_the_rounding(device):
    """The whole budget, fixed tokens: logits beside those of the full cache."""
    pair, prompts = decoders(device), random_prompts(*LENGTHS)
    sessions = [Session(pair[0], policy, prompts, 10)
                for policy in (FullPolicy(pair[0]), SmallKV(*pair, Settings(budget=1.0, llm_kv="int8")))]  # fmt: skip
    expected, rounded = [session.prefill() for session in sessions]
    assert torch.equal(expected, rounded)
    for number in range(8):
        expected, rounded = [session.step([number] * 3) for session in sessions]
        error = (rounded - expected).std() / expected.std()
        assert 0 < error < 0.05, error


def test_drafts_on_all_levels_make_the_tokens_of_none(device):
    pair, prompts, settings = near_pair(device), random_prompts(*LENGTHS), by_slm(llm_kv="int8", budget=1.0)
    session = SpeculativeSession(pair[0], SpeculativeSmallKV(*pair, settings, 3), prompts, 24)
    assert answers_of(session, 24) == generate(pair[0], SmallKV(*pair, settings), prompts, 24)


@pytest.mark.parametrize("drafts, marginal", [(1, False), (3, False), (3, True)])
@torch.inference_mode()
def test_rounds_with_drafts_keep_the_roundings(drafts, marginal, device):
    """Eager rounds and static ones: the same answers and levels; of each kept token the rounding of what is held."""
    prompts, backend = random_prompts(*LENGTHS), TORCH if device == "cpu" else TRITON
    settings, pair = by_slm(llm_kv="int8", marginal=marginal), near_pair(device)
    policies = [SpeculativeSmallKV(*pair, settings, drafts) for _ in range(2)]
    eager = SpeculativeSession(pair[0], policies[0], prompts, 24)
    static = StaticSpeculativeSession(backend, pair[0], policies[1], prompts, 24)
    assert answers_of(static, 24) == answers_of(eager, 24)
    for session in (eager, static):
        cache = session.cache
        if device == "cuda":
            torch.cuda.synchronize()
        for b, n in enumerate(session.lengths):
            token = cache.key_position[:, b].long()  # (L, G, slots)
            level = cache.host_key[:, b].gather(2, token.clamp(min=0)[..., None].expand_as(cache.key[:, b]))
            held = (token >= 0) & (token < n - 1)
            assert torch.equal(cache.key[:, b][held], level[held]) and (token[held] >= LENGTHS[b]).any()
    for b, n in enumerate(eager.lengths):
        both = [session.cache.host_key[:, b, :, : n - 1] for session in (eager, static)]
        assert (both[0] != both[1]).float().mean() < 0.01  # a last bit may tip a number that lies half way


def test_a_later_outlier_is_cut_and_harms_no_other_channel(device):
    """Of a token that is made in a step: its level is the last one, in the slot and in what goes to the host."""
    (llm, slm), prompts = decoders(device), random_prompts(*LENGTHS)
    session = Session(llm, SmallKV(llm, slm, INT8["default"]), prompts, 10)
    session.prefill()
    session.step([1, 2, 3])
    cache, span = session.cache, Span.step([n for n in LENGTHS], device)
    rows = torch.zeros(2, 3, 2, 1, 16, device=device)
    rows[0, 2, 1, 0, 5] = 1e4
    key, value = cache._put(1, *rows, span)
    expected = [encode(row, per_token(scale)) for row, scale in zip(rows, cache.scales(1))]
    assert torch.equal(key, expected[0]) and torch.equal(value, expected[1])
    others = encode(torch.zeros_like(rows[0]), per_token(cache.scale[0, 1]))
    assert key[2, 1, 0, 5] == 127 and (key == others).sum() == 95


def test_a_capture_is_not_disturbed_by_a_session_that_is_gone():
    """Its memory on the host is given back, which waits for the device: not while a graph is recorded."""
    if not torch.cuda.is_available():
        pytest.skip("captures need a GPU")
    pair, prompts = decoders("cuda"), random_prompts(*LENGTHS)
    expected = generate(pair[0], SmallKV(*pair, Settings()), prompts, 8)
    older = Session(pair[0], SmallKV(*pair, Settings()), prompts, 8)
    generate_static(older, 8, TRITON)
    older.itself = older
    session, before = Session(pair[0], SmallKV(*pair, Settings()), prompts, 8), gc.get_threshold()
    del older
    try:
        gc.set_threshold(1)
        assert generate_static(session, 8, TRITON) == expected
    finally:
        gc.set_threshold(*before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ledger_counts_one_byte_a_number_and_the_scales(dtype, device):
    pair = [model.to(dtype) for model in decoders(device)]
    policy = SmallKV(*pair, INT8["marginal"])
    check_ledgers(policy, [150, 120], 300)
    check_ledgers(SpeculativeSmallKV(*pair, by_slm(llm_kv="int8"), 3), [150, 120], 300)
    ledgers = [SmallKV(*pair, replace(INT8["marginal"], llm_kv=kind)).predict([150, 120], 300)["LLM"]
               for kind in ("int8", "exact")]  # fmt: skip
    host = [sum(entry.size for entry in ledger if entry.device == "host") for ledger in ledgers]
    assert host[0] * dtype.itemsize == host[1] == 2 * 2 * 2 * 2 * host_rows(300) * 16 * dtype.itemsize
    scales = [entry.size for entry in ledgers[0] if entry.what == "int8 scales"]
    assert scales == [2 * 2 * 2 * 2 * 2 * 16 * 4]


def test_what_moves_is_counted_in_bytes_of_the_host(device):
    pair, prompts, moved = decoders(device), random_prompts(*LENGTHS), []
    for kind in ("exact", "int8"):
        session = Session(pair[0], SmallKV(*pair, Settings(llm_kv=kind)), prompts, 12)
        session.prefill()
        for number in range(6):
            session.step([number] * 3)
        rows = session.cache.keys_moved + session.cache.values_moved - session.cache.filled
        moved.append(session.cache.moved_bytes() / rows)
    assert moved[0] == pytest.approx(4 * moved[1])  # fp32


def test_the_commands_know_it(tmp_path, capsys):
    """The embedded pair: named in one line, a quarter of fp32's bytes counted; a short prompt is one line, too."""
    assert command.main(["--llm-kv", "int8", "--device", "cpu", "--max-new-tokens", "2", "Where is Dora?"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: llm-kv in 8 bits takes its scales from the")
    asked = ["--llm-kv", "int8", "--device", "cpu", "--max-new-tokens", "3", "--json", str(tmp_path / "r.json")]
    assert command.main([*asked, "Dora's home is in Stony Ashby. " * 30]) == 0
    assert "in 8 bits" in capsys.readouterr().err
    ledger = json.loads((tmp_path / "r.json").read_text())["smallkv"]["report"]["ledger"]
    assert any(entry["what"] == "int8 scales" for entry in ledger)
    bytes_of = {}
    for kind in ("exact", "int8"):
        flags = ["--pair", "tiny", "--settings", "2x400+60", "--turnover", "0.1", "--steps", "4", "--device", "cpu",
                 "--methods", "smallkv-eager,smallkv-graph", "--decode-only", "--llm-kv", kind]  # fmt: skip
        assert bench.main(flags) == 0
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert report["llm_kv"] == kind
        bytes_of[kind] = [row["pcie_bytes_step"] for row in report["rows"]]
    assert bytes_of["exact"] == [4 * size for size in bytes_of["int8"]] and bytes_of["int8"][0] > 0


def test_short_prompts_and_other_names_are_refused():
    pair = decoders("cpu")
    with pytest.raises(ValueError, match="unknown llm-kv 'int4'; supported: exact, int8"):
        Settings(llm_kv="int4")
    policy = SmallKV(*pair, INT8["default"])
    with pytest.raises(ValueError, match="needs 100 tokens; one has 99: leave it exact"):
        Session(pair[0], policy, random_prompts(130, 99), 4)
    assert len(generate(pair[0], policy, random_prompts(100), 4)[0]) == 4
