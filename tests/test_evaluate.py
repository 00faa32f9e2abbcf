"""evaluate.py and tables.py: runs that resume, equal bytes, tables, and one clear line for every mistake."""

import json
import shutil
from importlib import metadata

import pytest
import torch

import evaluate
from benchmarks import TASKS
from conftest import tiny_decoder
from decode import Policy
from evaluate import main, make_batches, make_cells, parse_method
from generate import Pair
from tables import by_budget, by_group, read_run, show
from tasks import Sample, Wikitext, read_results
from test_tasks import TEMPLATE, write_data, write_lines, write_pair


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path)


# ---- Equal bytes -----------------------------------------------------------------------------------------------------


def test_equal_bytes_leave_the_llm_what_the_slm_does_not_take():
    shape = {"heads": 6, "kv_heads": 2}
    llm, slm = tiny_decoder(layers=10, head_dim=16, **shape), tiny_decoder(layers=2, head_dim=8, **shape)
    pair = Pair(llm, slm, None)
    cells = make_cells(["full", "window", "smallkv"], [0.5, 0.3], "bytes", pair)
    assert [(c.method, c.budget, round(c.own, 9)) for c in cells] == [
        ("full", 1.0, 1.0), ("window", 0.5, 0.5), ("window", 0.3, 0.3), ("smallkv", 0.5, 0.4), ("smallkv", 0.3, 0.2),
    ]  # fmt: skip
    assert [c.own for c in make_cells(["smallkv"], [0.3], "budget", pair)] == [0.3]
    length = 1000  # against the caches' own ledgers
    ledgers = cells[-1].policy(pair).ledgers([length], length)
    full = Policy(llm).ledgers([length], length)["LLM"][0].size
    taken = sum(e.size for e in ledgers["LLM"] if e.what in ("critical K, V", "marginal V")) + ledgers["SLM"][0].size
    assert taken == 0.3 * full
    with pytest.raises(ValueError, match=r"SLM's own cache is 10.0% .* leaves smallkv nothing"):
        make_cells(["smallkv"], [0.1], "bytes", pair)
    assert make_cells(["window"], [0.1], "bytes", pair)[0].own == 0.1


# ---- Runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(folders, data, capsys):
    """Call the command on wikitext; returns (exit code, standard output, standard error)."""

    def call(out, *more, task="wikitext", llm=folders[0]):
        small = ["--prompt", 100, "--steps", 3, "--limit", 5, "--batch", 2] if task == "wikitext" else []
        models = ["--llm", llm, "--slm", folders[1], "--device", "cpu", "--data", data]
        code = main([str(a) for a in (task, *models, *small, "--out", out, *more)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


METHODS = ("--method", "full", "smallkv:marginal=no", "--budget", 0.3, 0.2)


def test_same_arguments_same_files_and_a_killed_run_goes_on(run, tmp_path, monkeypatch):
    code, out, _ = run(tmp_path / "a", *METHODS)
    assert code == 0 and "5 samples" in out and "smallkv:marginal=no" in out
    whole = (tmp_path / "a" / "results.jsonl").read_bytes()
    assert whole.count(b"\n") == 15
    run(tmp_path / "b", *METHODS)
    assert (tmp_path / "b" / "results.jsonl").read_bytes() == whole
    real, calls = Wikitext.run, []

    def killed(self, *arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(Wikitext, "run", killed)
    assert run(tmp_path / "c", *METHODS)[0] == 130
    part = (tmp_path / "c" / "results.jsonl").read_bytes()
    assert 0 < len(part) < len(whole)
    (tmp_path / "c" / "results.jsonl").write_bytes(part + whole[len(part) :][:25])  # a line that was being written
    monkeypatch.setattr(Wikitext, "run", real)
    assert run(tmp_path / "c", *METHODS)[0] == 0
    assert (tmp_path / "c" / "results.jsonl").read_bytes() == whole
    one_missing = whole.split(b"\n")
    (tmp_path / "c" / "results.jsonl").write_bytes(b"\n".join(one_missing[:3] + one_missing[4:]))  # within a batch
    assert run(tmp_path / "c", *METHODS)[0] == 0
    assert sorted((tmp_path / "c" / "results.jsonl").read_bytes().split(b"\n")) == sorted(one_missing)
    about = json.loads((tmp_path / "c" / "run.json").read_text())
    assert len(about["invocations"]) == 3 and about["invocations"][0]["seconds"] is None
    assert about["versions"]["torch"] == metadata.version("torch") and about["token_bytes"]["LLM"] == 2 * 2 * 2 * 16 * 4


def test_more_methods_and_budgets_join_a_run(run, tmp_path):
    run(tmp_path / "a", "--method", "full")
    assert run(tmp_path / "a", "--method", "window", "--budget", 0.5)[0] == 0
    cells = read_run(tmp_path / "a").cells
    assert {cell: len(lines) for cell, lines in cells.items()} == {("full", 1.0): 5, ("window", 0.5): 5}


def test_the_table_shows_the_means(run, tmp_path):
    run(tmp_path / "a", *METHODS)
    lines = read_results(tmp_path / "a" / "results.jsonl")
    heading, full, smallkv = by_budget(read_run(tmp_path / "a"))
    assert heading == ["method", "1", "0.3", "0.2"] and full[2:] == ["-", "-"] and smallkv[1] == "-"
    ours = [line for line in lines if (line["method"], line["budget"]) == ("smallkv:marginal=no", 0.2)]
    kl, loss = (sum(line[name] for line in ours) / 5 for name in ("score", "loss"))
    assert smallkv[3].startswith(f"{kl:.3f} ({torch.tensor(loss).exp():.2f}, ")
    code, out, _ = run(tmp_path / "a", *METHODS, "--markdown")
    assert code == 0 and "| method | 1 | 0.3 | 0.2 |\n| --- | --- | --- | --- |" in out
    assert show("exact", 0.125) == "12.5%" and show("rating", 7.125) == "7.12"


def test_bbh_is_the_mean_over_tasks():
    task = TASKS["bbh"]
    lines = [{"group": "a", "score": 1.0}, {"group": "b", "score": 0.0}, {"group": "b", "score": 1.0}]
    assert task.summary(lines) == {"exact match": 0.75}
    assert TASKS["needle"].summary(lines) == {"found": pytest.approx(2 / 3)}


def test_mtbench_writes_judge_prompts_and_reads_replies(run, folders, data, tmp_path):
    llm = tmp_path / "chat"
    shutil.copytree(folders[0], llm)
    (llm / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    out = tmp_path / "a"
    code, shown, _ = run(out, "--method", "full", "--max-new-tokens", 4, task="mtbench", llm=llm)
    assert code == 0 and "│ full   │ - │" in shown
    line = read_results(out / "results.jsonl")[1]
    prompts = [json.loads(row) for row in (out / "judge_prompts.jsonl").read_text().splitlines()]
    assert [row["id"] for row in prompts] == [f"full 1 {q} turn {t}" for q in (81, 101) for t in (1, 2)]
    first, second = line["given"]
    assert (prompts[2]["system"], prompts[2]["prompt"]) == ("sys single-math-v1", f"[Why?|{first}|because]")
    assert prompts[3]["prompt"] == f"[Why?|{first}|And?|{second}|so]"
    assert prompts[1]["system"] == "sys single-v1-multi-turn"
    replies = [(prompts[0], "Good. [[8]]"), (prompts[2], "[[5]]"), (prompts[3], "[[6.5]]"), (prompts[1], "no rating")]
    write_lines(out / "judge_replies.jsonl", *({"id": row["id"], "reply": reply} for row, reply in replies))
    assert by_budget(read_run(out)) == [["method", "1"], ["full", "6.50"]]
    assert by_group(read_run(out))[1:] == [["reasoning", "5.75", "2"], ["writing", "8.00", "1"]]


def test_batches_and_samples_that_are_too_long(run, data, tmp_path):
    def sample(prompt, new):
        return Sample(f"{prompt}+{new}", "", [0] * prompt, answer_tokens=new)

    long, wide = sample(90, 10), sample(10, 80)  # each fits 100 positions, both together do not
    assert make_batches([long, long, long, wide], 2, 100) == [[long, long], [long], [wide]]
    write_lines(data / "gsm8k" / "test.jsonl", *({"question": q, "answer": "#### 1"} for q in ("1", "2 " * 999, "3")))
    code, out, err = run(tmp_path / "a", "--method", "full", "--max-new-tokens", 3, task="gsm8k")
    assert code == 0 and "1 of 3 samples are longer than the window and left out" in err and "2 samples" in out
    lines = read_results(tmp_path / "a" / "results.jsonl")
    assert sorted((line["sample"], "error" in line) for line in lines) == [("0", False), ("1", True), ("2", False)]
    assert run(tmp_path / "a", "--method", "full", "--max-new-tokens", 3, task="gsm8k")[0] == 0
    assert read_results(tmp_path / "a" / "results.jsonl") == lines


# ---- What cannot be used is one clear line ---------------------------------------------------------------------------


def test_method_options():
    method, given = parse_method("smallkv:score_decay=0.5,marginal=no,matcher=jaccard,budget_tokens=3")
    assert method is evaluate.METHODS["smallkv"]
    assert given == {"score_decay": 0.5, "marginal": False, "matcher": "jaccard", "budget_tokens": 3}
    assert parse_method("full")[1] == {}


@pytest.mark.parametrize(
    "more,message",
    [
        (["--method", "h3o"], "unknown method 'h3o'; supported: full"),
        (["--method", "smallkv:decay=1"], "method 'smallkv:decay=1': "),
        (["--method", "smallkv:scores=both"], "unknown scores 'both'; supported: slm, fused"),
        (["--method", "fused"], "unknown method 'fused'; supported: full"),
        (["--method", "smallkv:marginal"], "'marginal' should look like option=value"),
        (["--method", "smallkv", "--budget", "1.5"], "budget 1.5 is outside (0, 1]"),
        (["--limit", "0"], "--limit 0 and --batch 2 should both be at least 1"),
        (["--prompt", "3"], "--prompt should be at least 100"),
        (["--data", "/nowhere"], "cannot read /nowhere/wikitext-2/test.txt: No such file"),
        (["--steps", "9999"], "too few for 5 samples"),
        (["--slm", ""], "--slm is missing"),
        (["--equal", "bytes", "--budget", "0.3"], "leaves smallkv nothing"),
        (["--method", "h2o", "--budget", "0"], "budget 0.0 is outside (0, 1]"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, more, message):
    code, _, err = run(tmp_path / "a", *more)
    assert code == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1


def test_files_are_asked_for_where_a_task_reads_them(folders, tmp_path, capsys):
    for task, folder in (("wikitext", "wikitext-2/*"), ("bbh", "bbh/*")):
        assert main([task, "--llm", str(folders[0]), "--method", "full", "--out", str(tmp_path / "a")]) == 2
        assert capsys.readouterr().err == (
            f"error: --data is missing: {task} reads files; name a folder with {folder}, or hub to fetch them\n"
        )


def test_a_run_does_not_go_on_with_other_arguments(run, tmp_path):
    out = tmp_path / "a"
    run(out, "--method", "full")
    for more, message in ((["--steps", 2], "was run with --steps 3, not 2"), (["--limit", 4], "with --limit 5, not 4")):
        code, _, err = run(out, "--method", "full", *more)
        assert code == 2 and message in err
    code, _, err = run(out, "--method", "full", task="gsm8k")
    assert code == 2 and "is a run of wikitext, not gsm8k" in err
    assert len(read_results(out / "results.jsonl")) == 5  # nothing lost of what was done
    (out / "results.jsonl").write_text("{}x\n" + (out / "results.jsonl").read_text())
    code, _, err = run(out, "--method", "full")
    assert code == 2 and "results.jsonl, line 1: not JSON" in err


def test_malformed_data_names_its_line(run, data, tmp_path):
    path = data / "gsm8k" / "test.jsonl"
    for line, message in (('{"question": 1', "line 2: not JSON"), ('{"question": "x"}', "line 2: no 'answer'")):
        path.write_text('{"question": "x", "answer": "#### 1"}\n' + line)
        code, _, err = run(tmp_path / "a", "--method", "full", task="gsm8k")
        assert code == 2 and f"{path}, {message}" in err and err.count("\n") == 1
    assert main(["table", str(tmp_path / "none")]) == 2
    with pytest.raises(SystemExit):  # argparse: exit 2 and the list of tasks
        main(["nothing"])
