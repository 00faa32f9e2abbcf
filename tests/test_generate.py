"""The command, as a user meets it: answers, report, the demonstration, and one clear line for every mistake."""

import io
import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import generate as program
from baselines import BASELINES
from checkpoint import weight_bytes
from conftest import tiny_decoder
from decode import Policy, Session, Timing, generate
from smallkv import Settings, SmallKV
from speculative import RoundSession
from test_checkpoint import WORDS, write_checkpoint
from text import Text

ROOT = Path(__file__).parents[1]
PROMPT = WORDS.strip()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base = tmp_path_factory.mktemp("pair")
    shape = {"max_position_embeddings": 1024}
    return write_checkpoint(base / "llm", **shape), write_checkpoint(base / "slm", heads=4, head_dim=8, seed=1, **shape)


@pytest.fixture(scope="module")
def loaded(pair):
    return program.load_pair(*map(str, pair), "cpu")


@pytest.fixture
def copied(pair, tmp_path):
    """A folder of the LLM's files to change."""
    return Path(shutil.copytree(pair[0], tmp_path / "llm"))


@pytest.fixture
def run(pair, capsys):
    """Call the command on the pair; returns (exit code, standard output, standard error)."""

    def call(*arguments, llm=pair[0], slm=pair[1]):
        models = ["--llm", str(llm)] + (["--slm", str(slm)] if slm else [])
        code = program.main([*models, "--device", "cpu", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def results(run, tmp_path):
    """Call the command with --json; returns its content, standard output and standard error."""

    def call(*arguments, **models):
        code, out, err = run(*arguments, "--json", tmp_path / "r.json", **models)
        assert code == 0, err
        return json.loads((tmp_path / "r.json").read_text()), out, err

    return call


def expected_answer(loaded, prompt: str, count: int, settings: Settings = Settings()) -> str:
    policy = SmallKV(loaded.llm, loaded.slm, settings)
    return loaded.text.decode(generate(policy, [loaded.text.encode(prompt)], count, set(loaded.text.stop))[0])


# ---- Flags -----------------------------------------------------------------------------------------------------------


def test_flags_fit_on_one_screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    parser = program.make_parser()
    flags = {action.dest for action in parser._actions if action.option_strings} - {"help"}
    lines = parser.format_help().splitlines()
    assert len(flags) <= 30 and len(lines) <= 50 and max(map(len, lines)) <= 100
    assert {field.name for field in fields(Settings)} <= flags


def test_settings_are_what_was_typed():
    def settings(*flags):
        return program.make_settings(program.make_parser().parse_args(flags))

    assert settings() == Settings()
    assert settings("--paper") == Settings.paper()
    assert settings("--paper", "--reach", "2", "--no-marginal") == Settings.paper(reach=2.0, marginal=False)
    assert settings("--reach", "inf", "--budget-tokens", "64") == Settings(reach=float("inf"), budget_tokens=64)
    assert settings("--no-saliency-shift") == Settings(saliency_shift=False, scores="slm")
    assert settings("--speculate", "2", "--score-decay", "0") == Settings(scores="slm", score_decay=0.0)


# ---- Answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["cpu", "none"])
def test_streams_the_answer_and_reports(loaded, results, offload):
    settings = Settings(budget=0.2, offload=offload)
    found, out, err = results(PROMPT, "--budget", 0.2, "--offload", offload, "--max-new-tokens", 30)
    assert out == expected_answer(loaded, PROMPT, 30, settings) + "\n"
    for piece in ("runs on cpu", "float32: plain PyTorch", "critical K, V", "head similarity", "moved", "TTFT", "TPOT"):
        assert piece in err, piece
    prompt, report = found["smallkv"]["answers"][0]["prompt_tokens"], found["smallkv"]["report"]
    assert report["prompt"] == {"tokens": prompt, "chunk": prompt} and report["decode_steps"] == 29
    size = settings.sizes(prompt + 29)  # the last token was sampled and not fed
    tokens = report["tokens"][0]  # counted in the slots
    assert (tokens["critical"], tokens["marginal"], tokens["all"]) == (size.critical, size.marginal, prompt + 29)
    predicted = SmallKV(loaded.llm, loaded.slm, settings).ledgers([prompt], prompt + 30)
    assert report["ledger"] == [
        {"model": model, "what": entry.what, "device": "host" if entry.host else "cpu", "bytes": entry.size}
        for model, entries in predicted.items() for entry in entries
    ]  # fmt: skip
    assert any(entry["device"] == "host" for entry in report["ledger"]) == (offload == "cpu")
    full = Policy(loaded.llm).ledgers([prompt], prompt + 30)["LLM"]
    assert report["full_cache_bytes"] == sum(entry.size for entry in full)


@pytest.mark.parametrize("drafts", [0, 3])
def test_moved_counts_all_plans_but_the_first(loaded, drafts):
    prompts = [loaded.text.encode(PROMPT), loaded.text.encode(PROMPT)[:120]]
    policy = program.make_policy("smallkv", loaded, Settings(scores="slm", marginal=True), drafts)
    session = RoundSession(policy, prompts, 24) if drafts else Session(policy, prompts, 24)
    session.prefill()
    totals = []
    for step in range(4):
        session.round([step, 2], [3, 3]) if drafts else session.step([step, 2])
        totals.append(policy.cache.moved.sum(0))
        critical, marginal = (totals[-1] - totals[0]).tolist()
        size = (2 * critical + marginal) * 16 * 4  # head_dim, fp32
        expected = {"critical": critical, "marginal": marginal, "bytes": size, "steps": step}
        assert program.make_report(session, Timing())["moved"] == expected
    assert critical > 0 and marginal > 0


def test_prompts_come_from_arguments_files_and_standard_input(loaded, run, tmp_path, monkeypatch):
    """A byte order mark is no part of a prompt."""
    file, other = tmp_path / "prompt.txt", "the lazy dog " * 40
    file.write_text(PROMPT, encoding="utf-8-sig")
    answer = expected_answer(loaded, PROMPT, 8)
    assert run("--prompt-file", file, "--max-new-tokens", 8)[1] == answer + "\n"
    for mark in (b"", b"\xef\xbb\xbf"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(mark + PROMPT.encode())))
        assert run("--max-new-tokens", 8)[1] == answer + "\n"
    both = f"--- answer 1\n{answer}\n--- answer 2\n{expected_answer(loaded, other, 8)}\n"
    assert run(PROMPT, other, "--max-new-tokens", 8)[:2] == (0, both)


def test_compare_shows_where_they_part(results):
    options = PROMPT, "--compare", "--max-new-tokens", 20
    found, out, _ = results(*options, "--budget", 0.05)
    full, small = (found[name]["answers"][0]["tokens"] for name in ("full", "smallkv"))
    parting = [one == other for one, other in zip(full, small)].index(False)
    assert f"they part at token {parting + 1}:" in out
    assert "the same 20 tokens" in results(*options, "--budget", 1.0)[1]


def test_full_method_needs_no_slm_and_stops_at_any_stop_token(loaded, run, copied):
    ids = generate(Policy(loaded.llm), [loaded.text.encode(PROMPT)], 12)[0]
    options = PROMPT, "--method", "full", "--max-new-tokens", 12
    assert run(*options, slm=None)[:2] == (0, loaded.text.decode(ids) + "\n")
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids[5], 0]}))
    assert run(*options, llm=copied, slm=None)[1] == loaded.text.decode(ids[: ids.index(ids[5])]) + "\n"


def test_chat_renders_the_checkpoints_template(loaded, results):
    found, _, err = results("the dog", "--chat", "--max-new-tokens", 2)
    assert found["smallkv"]["answers"][0]["prompt_tokens"] == len(loaded.text.chat("the dog"))
    assert "heads not matched: fewer than 100 tokens, so nothing was evicted either" in err


def test_readme_example(pair, capsys, monkeypatch):
    """The README's Python example, with the tiny pair in place of its names: heads too small for the kernels."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = [block.split("```")[0] for block in readme.split("```python\n")[1:] if "load_pair" in block]
    assert len(code.strip().splitlines()) <= 10
    exec(code.replace('"pair/llm"', repr(str(pair[0]))).replace('"pair/slm"', repr(str(pair[1]))), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("name, calls, made", [("step", 5, 5), ("prefill", 1, 0)])
def test_ctrl_c_keeps_what_was_generated(name, calls, made, loaded, run, monkeypatch):
    plain, before = getattr(Session, name), [None] * (calls - 1)

    def interrupted(self, *given):
        if not before:
            raise KeyboardInterrupt
        before.pop()
        return plain(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Session, name, interrupted)
        code, out, err = run(PROMPT, "--max-new-tokens", 20)
    assert (code, out) == (130, (expected_answer(loaded, PROMPT, made) if made else "") + "\n")
    assert "interrupted" in err and ("TTFT" in err) == bool(made) != ("ended in the prefill" in err)


@pytest.mark.parametrize("drafts", [0, 2])
def test_logits_that_are_not_finite_end_an_answer_and_keep_what_there_was(drafts, loaded, run, monkeypatch, tmp_path):
    session, calls = RoundSession if drafts else Session, []
    attend = session.attend

    def spoilt(self, *given):
        calls.append(given)
        return attend(self, *given) * (1 if len(calls) < 3 else torch.inf)

    monkeypatch.setattr(session, "attend", spoilt)
    options = PROMPT, "--budget", 1, "--max-new-tokens", 20, "--speculate", drafts, "--json", tmp_path / "r.json"
    code, out, err = run(*options)
    monkeypatch.undo()
    (kept,) = json.loads((tmp_path / "r.json").read_text())["smallkv"]["answers"]
    right = expected_answer(loaded, PROMPT, len(kept["tokens"]), Settings(budget=1.0))
    assert code == 2 and out == right + "\n" and kept["text"] == right and 3 <= len(kept["tokens"]) < 20
    assert err.splitlines()[-1].startswith("error: the model's logits are NaN or infinite: its weights are damaged")


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_damaged_weights_are_named(temperature, run, copied):
    tensors = load_file(copied / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, copied / "model.safetensors")
    code, out, err = run(PROMPT, "--temperature", temperature, llm=copied)
    assert (code, out) == (2, "\n") and "Traceback" not in err
    assert "error: the model's logits are NaN or infinite" in err


def test_drafts_are_bounded_by_what_can_be_used(results):
    options = PROMPT, "--budget", 1, "--max-new-tokens", 4
    drafted, alone = results(*options, "--speculate", 3_000_000)[0]["smallkv"], results(*options)[0]["smallkv"]
    assert drafted["answers"] == alone["answers"] and drafted["report"]["speculation"]["drafts"] == 2


def test_a_run_that_fails_leaves_no_file(run, tmp_path):
    for flags in ((PROMPT, "--device", "cuda:99"), ("x " * 2000,)):
        assert run(*flags, "--json", tmp_path / "r.json")[0] == 2 and not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("method", BASELINES)
def test_every_baseline_answers_one_prompt_and_several(method, results):
    """Without an SLM; a batch gives the answers of the prompts alone, and the report says what became of the tokens."""
    options = ("--method", method, "--budget", 0.3, "--max-new-tokens", 12)
    prompts = (PROMPT, "the quick brown fox")
    alone = [results(prompt, *options, slm=None)[0][method]["answers"][0]["tokens"] for prompt in prompts]
    found, _, err = results(*prompts, *options, slm=None)
    assert [answer["tokens"] for answer in found[method]["answers"]] == alone
    for tokens in found[method]["report"]["tokens"]:
        assert sum(count for tier, count in tokens.items() if tier != "all") == pytest.approx(tokens["all"])
    assert ("dropped" in err) == ("oracle" not in method) and "no third tier" in err and "TPOT" in err


@pytest.mark.parametrize("method", ["full", "smallkv"])
def test_drafts_are_shown_beside_the_same_method_without(method, run, results):
    options = ("--max-new-tokens", 12, "--method", method, "--budget", 1.0)
    alone = results(PROMPT, *options)[0][method]["answers"][0]["tokens"]
    both, _, err = results(PROMPT, *options, "--speculate", 3, "--compare")
    assert [result["answers"][0]["tokens"] for result in both.values()] == [alone, alone]
    plain, drafted = (result["report"] for result in both.values())
    assert list(both) == [method, f"{method}, 3 drafts"] and plain["speculation"] is None and "drafts: " in err
    found = drafted["speculation"]
    assert found["drafts"] == 3 and found["acceptance"] == found["accepted"] / found["drafted"]
    assert found["tokens_per_step"] == pytest.approx((len(alone) - 1) / drafted["decode_steps"])
    assert {entry["model"] for entry in drafted["ledger"]} == {"LLM", "SLM"}
    _, out, err = run(PROMPT, "x", *options, "--speculate", 3, "--temperature", 0.8)
    assert "--- answer 2" in out and "tokens per step and sequence" in err


def test_a_smaller_slm(results):
    """Fewer layers and a cut cache together, in the ledger: a layer of two, and slots for two fifths of the tokens."""
    found = results(PROMPT, "--slm-layers", 1, "--slm-budget", 0.4, "--max-new-tokens", 8)[0]["smallkv"]
    (kept,) = [entry["bytes"] for entry in found["report"]["ledger"] if entry["what"] == "kept K, V"]
    capacity = found["answers"][0]["prompt_tokens"] + 8
    assert kept == 2 * 1 * 2 * 8 * 4 * int(0.4 * capacity)


def test_heads_that_do_not_match_are_named():
    report = {
        "tokens": [{"critical": 1, "marginal": 1, "offloaded": 2, "all": 4}], "ledger": [], "full_cache_bytes": 1,
        "moved": None, "speculation": None, "prompt": {"tokens": 4, "chunk": 4}, "ttft_s": 1.0, "tpot_ms": None,
    }  # fmt: skip
    cases = (0.9, 0.9, False, False), (0.9, 0.95, True, False), (0.84, 0.84, False, True)
    for mean, anywhere, reach, unlike in cases:
        similarity = {"mean": mean, "worst": 0.5, "mean_anywhere": anywhere, "worst_anywhere": 0.5}
        console = Console(file=io.StringIO(), width=300)
        program.print_report("smallkv", {**report, "similarity": similarity}, console)
        shown = console.file.getvalue()
        assert ("--reach inf may answer better" in shown) == reach
        assert ("below 0.85 this SLM does not look at this text as the LLM does" in shown) == unlike


def test_comparison_shows_brackets_and_backslashes_as_they_are(loaded):
    text, console = loaded.text, Console(file=io.StringIO(), width=200)
    answers = {end: {"answers": [{"tokens": text.encode(r"\[x = 2\] [/b] C:\ " + end)}]} for end in ("fox", "dog")}
    program.print_comparison(text, answers, console)
    shown = console.file.getvalue()
    assert shown.count(r"\[x = 2\] [/b] C:\ ") == 2 and "they part at token" in shown


# ---- The demonstration -----------------------------------------------------------------------------------------------


def test_the_demonstrations_facts_are_where_they_are_said_to_be():
    text = Text.load(program.PAIR / "llm")
    document = json.loads((program.PAIR / "demo.json").read_text(encoding="utf-8"))
    ids = text.encode(document["text"])
    assert len(ids) == 967
    for turn in document["turns"]:
        assert text.decode(ids[slice(*turn["tokens"])]).strip() == turn["fact"]


def test_bare_command_demonstrates(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setenv("COLUMNS", "250")
    assert program.main([]) == 0
    out, err = capsys.readouterr()
    for piece in ("full cache: 4 right", "SmallKV, 20%: 4 right", "the paper's setting: 1 right",
                  "the newest 20% alone: 0 right", "2 -> 7 of 40 KV heads hold the fact"):  # fmt: skip
        assert piece in out, piece
    for piece in ("critical: K, V", "marginal: V alone", "offloaded: K, V", "marginal V", "160 (15%)", "111 (10%)"):
        assert piece in err, piece
    assert not list(tmp_path.iterdir())
    assert program.main(["--speculate", "2"]) == 2
    assert "the demonstration takes one process and SmallKV's flags alone" in capsys.readouterr().err
    assert program.main(["--paper", "--trace", "page.html"]) == 0
    out, page = capsys.readouterr().out, (tmp_path / "page.html").read_text()
    assert "SmallKV, 20%" not in out and "the paper's setting: 1 right" in out
    record = json.loads(page.partition('id="record">')[2].partition("</script>")[0])
    assert record["prompt"] == 967 and len(record["tokens"]) == 967 + record["steps"]


# ---- Mistakes --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, message", [
    (["--budget", 0, "x"], "budget 0.0 is outside (0, 1]"),
    (["--scores", "fused", "--no-saliency-shift", "x"], "fused scores need the SLM's: without saliency shift"),
    (["--max-new-tokens", 0, "x"], "argument --max-new-tokens: 0 is not a whole number of at least 1"),
    (["--temperature", "nan", "x"], "--temperature: nan is not a number of at least 0"),
    (["--temperature", 1e9, "x"], "temperature 1000000000.0 is not 0 (greedy) nor between"),
    (["--seed", 2**70, "x"], "--seed: 1180591620717411303424 is not a whole number from 0 to 9223372036854775807"),
    (["--top-p", 0, "x"], "--top-p: 0 is not a number above 0 and at most 1"),
    (["--slm-layers", 0, "x"], "--slm-layers: 0 is not a whole number of at least 1"),
    (["--budget", "lots", "x"], "argument --budget: invalid float value: 'lots'"),
    (["--paper\nx"], "unrecognized arguments: --paper x"),
    ([""], "prompt 1 is empty"),
    (["x", " \n"], "prompt 2 is empty"),
    (["x " * 10**6], "a prompt of 2000000 characters has more than"),
    (["x " * 2000, "--max-new-tokens", 10], "longer than the 1024 positions"),
    (["x", "--max-new-tokens", 10**9], "longer than the 1024 positions"),
    (["--prompt-file", "nowhere.txt"], "cannot read nowhere.txt: No such file or directory"),
    (["--prompt-file", "/dev/zero"], "/dev/zero is larger than 67108864 bytes; give a shorter text"),
    (["caf\udce9 x"], "prompt 1 is not UTF-8: byte 0xe9 at offset 3"),
    (["x", "--json", ""], "an empty name was given for a file to write"),
    (["x", "--json", "/dev/full", "--max-new-tokens", 2], "cannot write /dev/full: No space left on device"),
    (["x", "--device", "cuda:7"], "no device cuda:7: PyTorch sees"),
    (["x", "--json", "/nowhere/r.json"], "cannot write /nowhere/r.json: No such file or directory"),
    (["x", "--compare", "--method", "snapkv"], "leave --method snapkv out"),
    (["x", "--speculate", -1], "--speculate: -1 is not a whole number of at least 0"),
    (["x", "--speculate", 2, "--method", "h2o"], "--speculate works with --method full and smallkv, not h2o"),
    (["x", "--speculate", 2, "--slm-layers", 1], "--speculate needs the SLM's words, and --slm-layers 1 stops before"),
    (["x", "--speculate", 2, "--scores", "fused"], "drafts need scores slm"),
    (["x", "--trace", ""], "an empty name was given for a file to write"),
    (["x", "--trace", "/nowhere/page.html"], "cannot write /nowhere/page.html: No such file or directory"),
    (["x", "--trace", "/dev/full", "--max-new-tokens", 3], "cannot write /dev/full: No space left on device"),
    (["x", "--trace", "p.html", "--method", "h2o"], "--trace shows the tiers of SmallKV, and --method h2o has none"),
    (["x", "--trace", "p.html", "--speculate", 2], "--trace shows steps of one token; leave --speculate 2 out"),
    (["x", "--trace", "p.html", "--max-new-tokens", 1], "--trace shows decode steps, and the first token takes none"),
    (["x", "y", "--trace", "p.html"], "--trace shows one answer, and 2 prompts were given; give one"),
])  # fmt: skip
def test_mistakes_get_one_line_and_exit_code_2(run, arguments, message):
    code, _, err = run(*arguments)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and message in last and "Traceback" not in err


@pytest.mark.parametrize("flags", [(), ("--method", "full", "--speculate", 2), ("--method", "full", "--compare")])
def test_slm_is_asked_for(run, flags):
    code, _, err = run("x", *flags, slm=None)
    assert code == 2 and "--slm is missing" in err


def test_models_that_do_not_belong_together(pair, run, tmp_path):
    """But the larger embedding may have padding rows, as Qwen2.5's: its best id may be one, and is never sampled."""
    other = write_checkpoint(tmp_path / "other", text="completely different words about stones and rivers " * 9)
    small, large = (write_checkpoint(tmp_path / f"{vocab}", vocab=vocab) for vocab in (270, 600))
    for folder in (small, large):
        shutil.copy(pair[0] / "tokenizer.json", folder)
    for slm, message in ((other, "tokenizers of LLM and SLM differ, first at id"),
                         (small, "the tokenizer has id 279, but the SLM only 270 embeddings")):  # fmt: skip
        code, _, err = run("x", slm=slm)
        assert code == 2 and message in err
    code, _, err = run(PROMPT, "--max-new-tokens", 30, llm=large)
    assert code == 0, err


def test_a_model_that_does_not_fit(run, monkeypatch):
    weights = 2 * weight_bytes(tiny_decoder(vocab=280).config, torch.float32)  # more than those of both models
    for available, named in ((1 << 12, "LLM weights"), (weights, "LLM offloaded K, V")):
        monkeypatch.setattr("checkpoint.available_bytes", lambda device: available)
        code, _, err = run(PROMPT, "--max-new-tokens", 700)
        assert code == 2 and "does not fit on cpu" in err and "GiB available" in err and named in err


@pytest.mark.parametrize("offload", ["cpu", "none"])
def test_device_and_host_are_checked_apart(loaded, monkeypatch, offload):
    asked = {}
    policy = SmallKV(loaded.llm, loaded.slm, Settings(offload=offload))
    monkeypatch.setattr("checkpoint.check_fits", lambda needed, device: asked.update({device.type: needed}))
    on_gpu = SimpleNamespace(llm=SimpleNamespace(device=torch.device("cuda")), models=policy.models,
                             make_caches=policy.make_caches)  # fmt: skip
    program.check_caches_fit(on_gpu, [200, 120], 300)
    for model, entries in policy.ledgers([200, 120], 300).items():
        for entry in entries:
            size = 1 << (entry.size - 1).bit_length() if entry.host else entry.size  # pinned: powers of two
            assert asked["cpu" if entry.host else "cuda"][f"{model} {entry.what}"] == size
    assert set(asked["cpu"]) == ({"LLM offloaded K, V"} if offload == "cpu" else set())
    config = loaded.llm.config
    rows = config.layers * 200 * 4 * (2 * config.kv_heads * config.head_dim + config.query_heads)
    assert asked["cuda"]["LLM longest prompt"] == rows and "SLM longest prompt" not in asked["cuda"]
