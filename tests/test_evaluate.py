"""evaluate.py and samples.py: figures against naive loops, runs that go on, equal bytes, one line for every mistake."""

import json
import random
import sys
from argparse import Namespace

import pytest
import torch

import samples as tasks
from command import read_lines
from conftest import random_prompts, tiny_decoder
from decode import Policy, Session
from evaluate import main, make_cells, make_policy_from, make_table, parse_spec, read_run
from generate import PAIR, Pair, load_pair
from samples import Sample, converse, load_samples, open_session, run_batch, score
from smallkv import Settings, SmallKV
from test_checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny random LLM and SLM."""
    base, length = tmp_path_factory.mktemp("pair"), {"max_position_embeddings": 2048}
    slm = write_checkpoint(base / "slm", heads=4, head_dim=8, seed=1, **length)
    return write_checkpoint(base / "llm", **length), slm


@pytest.fixture
def pair(folders):
    return load_pair(*map(str, folders), "cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    words = "the quick brown fox jumps over the lazy dog and runs. Far away from the old house? No! By the sea".split()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(words, k=1500)))
    return path


# ---- KL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method,budget", [("full", 1.0), ("smallkv", 0.3), ("smallkv-paper", 0.2), ("window", 0.2)])
def test_kl_equals_a_naive_teacher_forced_loop(pair, text, method, budget):
    args = Namespace(file=str(text), prompt=110, steps=5, limit=2, chat=False)
    samples, ids = load_samples("kl", pair, args), pair.text.encode(text.read_text())
    assert [sample.prompt + sample.turns[0] for sample in samples] == [ids[:115], ids[-116:-1]]
    found = run_batch("kl", pair, make_policy_from(method, pair, budget), samples)
    for sample, figures in zip(samples, found):
        whole = sample.prompt + sample.turns[0] + sample.facts["targets"][-1:]
        session = Session(make_policy_from(method, pair, budget), [whole[:110]], 5)  # one sequence, not two
        session.prefill()
        kl = loss = same = 0.0
        for i in range(110, 115):
            p = pair.llm(torch.tensor([whole[: i + 1]]))[0, -1].double().softmax(-1)
            q = session.step([whole[i]])[0].double().softmax(-1)
            kl += sum((a * (a.log() - b.log())).item() for a, b in zip(p, q)) / 5
            loss -= q[whole[i + 1]].log().item() / 5
            same += float(p.argmax() == q.argmax()) / 5
        expected = {"score": kl, "loss": loss, "agreement": same}
        assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=2e-5)
        ours = {"moved_bytes", "similarity"} if method.startswith("smallkv") else set()
        assert (kl < 1e-5) == (method == "full") and figures.keys() - expected.keys() == ours


def test_kl_on_prompts_follows_the_full_cache_s_own_answers(pair, text, tmp_path):
    words, file = text.read_text().split(), tmp_path / "prompts.jsonl"
    rows = [{"prompt": " ".join(words[:140]), "group": "long"}, {"prompt": " ".join(words[200:230])}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = Namespace(file=str(file), prompt=110, steps=6, limit=None, batch=2, chat=False)
    samples = load_samples("kl", pair, args)
    ids = [pair.text.encode(row["prompt"]) for row in rows]
    assert len(ids[0]) > 110 > len(ids[1])
    assert [sample.prompt for sample in samples] == [ids[0][:55] + ids[0][-55:], ids[1]]
    assert [sample.group for sample in samples] == ["long", ""]
    for sample in samples:
        whole = list(sample.prompt)
        for _ in range(7):  # greedy, a whole forward pass for every token
            whole.append(pair.llm(torch.tensor([whole]))[0, -1].argmax().item())
        assert (sample.turns[0], sample.facts["targets"]) == (whole[-7:-1], whole[-6:])
    full = run_batch("kl", pair, Policy(pair.llm), samples)
    assert all(own["agreement"] == 1 and own["score"] < 1e-5 for own in full)
    pair.text.template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    chat = load_samples("kl", pair, Namespace(**{**vars(args), "chat": True, "limit": 1}))
    assert [sample.prompt for sample in chat] == [pair.text.chat(pair.text.decode(samples[0].prompt))]
    with pytest.raises(ValueError, match="--chat is for prompts, a file of JSON lines"):
        load_samples("kl", pair, Namespace(**{**vars(args), "chat": True, "file": str(text)}))
    file.write_text("\n")
    with pytest.raises(ValueError, match="has no prompts"):
        load_samples("kl", pair, args)
    for wrong, message in (({"prompt": " "}, "prompt 1 is ' ', not a text"), ({"text": "a"}, "has no 'prompt'"),
                           ({"prompt": 3}, "prompt 1 is 3, not a text")):  # fmt: skip
        file.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            load_samples("kl", pair, args)


# ---- Conversations ---------------------------------------------------------------------------------------------------


def naive_conversation(pair: Pair, sample: Sample, stops: tuple[str, ...], seen: set) -> list[str]:
    """A whole forward pass for every token, no cache."""
    ids, answers = list(sample.prompt), []
    for feed in sample.turns:
        ids += feed
        answer = []
        while True:
            token = pair.llm(torch.tensor([ids]))[0, -1].argmax().item()
            if token in pair.text.stop:
                seen.add("stop token")
                break
            answer.append(token)
            ended = any(stop in pair.text.decode(answer) for stop in stops)
            seen.update({"stop text"} if ended else {"limit"} if len(answer) == sample.answer_tokens else ())
            ended = ended or len(answer) == sample.answer_tokens
            if ended and "\n" in stops and pair.text.decode([token]).startswith("\n"):
                seen.add("newline")
            else:  # what is recorded is in the context of the next turn
                ids.append(token)
                seen.update({"fed newline"} if ended and "\n" in pair.text.decode([token]) else ())
            if ended:
                break
        told = pair.text.decode(answer)
        answers.append(told[: min([told.find(stop) for stop in stops if stop in told], default=len(told))])
    return answers


def test_conversations_equal_full_forward_passes(pair):
    """Prompts and turns of different lengths in one batch; every way for an answer to end occurs."""
    rng, stops, seen = random.Random(4), ("\n", *"aeiou"), set()
    pair.text.stop = frozenset(range(120, 150))
    prompts = random_prompts(40, 71, 103, 64, vocab=280)
    turns = [[random_prompts(rng.randint(1, 9), seed=i * 9 + j, vocab=280)[0] for j in range(4)] for i in range(4)]
    turns[2][0] = []
    samples = [Sample(str(i), "", p, t, 6) for i, (p, t) in enumerate(zip(prompts, turns))]
    expected = [naive_conversation(pair, sample, stops, seen) for sample in samples]
    assert seen >= {"stop token", "stop text", "limit"}
    for policy in (Policy(pair.llm), SmallKV(pair.llm, pair.slm, Settings(budget=1.0))):
        assert converse(open_session(policy, samples), samples, pair.text, stops) == expected


def test_a_newline_that_ends_an_answer_is_not_fed(pair):
    pair.text.stop, seen = frozenset(), set()
    pair.llm.lm_head.weight[pair.text.encode("\n")[0]] *= 3  # likely enough to be met
    samples = [Sample(str(i), "", *random_prompts(30 + i, seed=i, vocab=280), [[5], [6, 7]], 30) for i in range(12)]
    expected = [naive_conversation(pair, sample, ("\n",), seen) for sample in samples]
    assert "newline" in seen
    assert converse(open_session(Policy(pair.llm), samples), samples, pair.text, ("\n",)) == expected


def test_a_newline_on_which_an_answer_is_cut_at_its_limit_is_fed(pair):
    """As MT-Bench's answers are, which no stop string ends."""
    pair.text.stop, seen = frozenset(), set()
    pair.llm.lm_head.weight[pair.text.encode("\n")[0]] *= 3
    samples = [Sample(str(i), "", *random_prompts(30 + i, seed=i, vocab=280), [[5], [6, 7]], 3) for i in range(12)]
    expected = [naive_conversation(pair, sample, (), seen) for sample in samples]
    assert "fed newline" in seen
    assert converse(open_session(Policy(pair.llm), samples), samples, pair.text) == expected


def test_a_stop_string_can_be_a_special_token(pair):
    """Special tokens are not in the text of an answer; here another one ends it than the checkpoint's own."""
    pair.llm.lm_head.weight[0] *= 3
    samples = [Sample(str(i), "", *random_prompts(30 + i, seed=i, vocab=280), [[5], [6, 7]], 30) for i in range(12)]
    pair.text.stop, seen = frozenset({0}), set()
    expected = [naive_conversation(pair, sample, (), seen) for sample in samples]
    pair.text.stop = frozenset()
    assert "stop token" in seen
    assert converse(open_session(Policy(pair.llm), samples), samples, pair.text, ("<end>",)) == expected


# ---- Samples and scores ----------------------------------------------------------------------------------------------


def test_recall_is_scored_question_by_question(pair):
    args = Namespace(limit=2, file=str(PAIR / "prose.txt"), length=700, turns=3, seed=0)
    samples = load_samples("recall", pair, args)
    assert [sample.id for sample in samples] == ["evaluation-0", "evaluation-1"]
    for sample in samples:
        facts = sample.facts["turns"]
        assert 600 < len(sample.prompt) <= 700 and len(sample.turns) == len(facts)
        asked = [pair.text.decode(turn) for turn in sample.turns]
        assert all(words.startswith("\nQuestion:") and words.endswith("Answer:") for words in asked)
        answers = [turn["answer"].rstrip(".") for turn in facts]
        assert score("recall", sample, answers)["score"] == 1.0
        wrong = score("recall", sample, [answers[0] + " too", *answers[1:]])
        assert wrong["score"] == (len(answers) - 1) / len(answers)
        assert [turn["exact"] for turn in wrong["turns"]] == [False, *[True] * (len(answers) - 1)]
    args.seed = 1
    assert load_samples("recall", pair, args)[0].prompt != samples[0].prompt


@pytest.mark.parametrize("chat", [False, True])
def test_the_needle_lies_where_it_should_and_its_number_is_the_score(pair, tmp_path, chat):
    (file := tmp_path / "hay.txt").write_text("One two.\n Three? Four! " * 30)
    args = Namespace(file=str(file), lengths=[400, 700], depths=[0, 50, 100], repeats=2, seed=0, limit=None, chat=chat,
                     max_new_tokens=20)  # fmt: skip
    samples = load_samples("needle", pair, args)
    assert len(samples) == 12 == len({sample.id for sample in samples})
    for sample in samples:
        words, facts = pair.text.decode(sample.prompt), sample.facts
        key = words.split("The secret number of the ")[1].split(" is")[0]
        assert words.startswith("<user>A secret" if chat else "A secret")
        assert words.endswith(("?</><bot>" if chat else "? ") + f"The secret number of the {key} is")
        hay, _, after = words.split("\n\n")[1].partition(f"The secret number of the {key} is {facts['value']}.")
        assert abs(len(hay) / (len(hay) + len(after)) - facts["depth"] / 100) < 0.1
        assert facts["length"] - 10 < len(sample.prompt) + sample.answer_tokens <= facts["length"]
        assert score("needle", sample, [f" {facts['value']}."])["score"] == 1.0
        assert score("needle", sample, [f" {int(facts['value']) + 1}."])["score"] == 0.0
    (tmp_path / "hay.json").write_text(json.dumps({"text": file.read_text()}))
    args.file = str(tmp_path / "hay.json")
    assert load_samples("needle", pair, args) == samples


def test_mtbench_turns_make_the_whole_conversation_and_the_lines_are_fastchat_s(call, pair, tmp_path):
    turns = ["Write.", "Again.", "Once more."]
    questions = [{"question_id": number, "category": "writing", "turns": turns} for number in (81, 9)]
    file = tmp_path / "question.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in questions))
    sample = load_samples("mtbench", pair, Namespace(file=str(file), max_new_tokens=4, limit=None))[0]
    kept = [sample.prompt, pair.text.encode("An answer."), sample.turns[1], pair.text.encode("So."), sample.turns[2]]
    whole = "<user>Write.</><bot>An answer.</><user>Again.</><bot>So.</><user>Once more.</><bot>"
    assert pair.text.decode(sum(kept, [])) == whole and sample.turns[0] == []
    code, out, _ = call("mtbench", "--file", file, "--max-new-tokens", 4, "--method", "full", "smallkv:marginal=no")
    assert code == 0 and "| smallkv:marginal=no | 0.2 | 2 |" in out
    given = [line["given"] for line in read_run(tmp_path / "run")[1] if line["method"] == "full"]
    names = {path.stem: read_lines(path) for path in (tmp_path / "run" / "model_answer").iterdir()}
    assert names.keys() == {"full@1", "smallkv-marginal-no@0.2"}
    for row, question, turns in zip(names["full@1"], questions, given, strict=True):
        assert row.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert (row["question_id"], row["model_id"]) == (question["question_id"], "full@1") and len(turns) == 3
        assert row["choices"] == [{"index": 0, "turns": turns}]


# ---- Equal bytes -----------------------------------------------------------------------------------------------------


def test_equal_bytes_leave_the_llm_what_the_slm_does_not_take():
    shape = {"heads": 6, "kv_heads": 2}
    pair = Pair(tiny_decoder(layers=10, head_dim=16, **shape), tiny_decoder(layers=2, head_dim=8, **shape), None)
    args = Namespace(method=["full", "window", "smallkv"], budget=[0.5, 0.3], equal="bytes")
    cells = make_cells(args, pair)
    assert [(spec, budget, round(own, 9)) for spec, budget, own in cells] == [
        ("full", 1.0, 1.0), ("window", 0.5, 0.5), ("window", 0.3, 0.3), ("smallkv", 0.5, 0.4), ("smallkv", 0.3, 0.2),
    ]  # fmt: skip
    ledgers = make_policy_from("smallkv", pair, cells[-1][2]).ledgers([1000], 1000)  # against the caches' own figures
    full = Policy(pair.llm).ledgers([1000], 1000)["LLM"][0].size
    taken = sum(e.size for e in ledgers["LLM"] if e.what in ("critical K, V", "marginal V")) + ledgers["SLM"][0].size
    assert taken == 0.3 * full
    args.method, args.budget = ["smallkv:slm_budget=0.5"], [0.1]
    assert make_cells(args, pair)[0][2] == pytest.approx(0.05)
    args.method = ["smallkv"]
    with pytest.raises(ValueError, match=r"SLM's own cache is 10.0% .* leaves smallkv nothing"):
        make_cells(args, pair)


# ---- Runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def call(folders, text, tmp_path, capsys):
    """The command on the tiny pair, into tmp_path / "run": (exit code, standard output, standard error)."""

    def run(task, *more, out=tmp_path / "run"):
        small = ["--file", text, "--prompt", 100, "--steps", 3, "--limit", 5, "--batch", 2] if task == "kl" else []
        models = ["--llm", folders[0], "--slm", folders[1], "--device", "cpu", "--out", out]
        try:
            code = main([str(a) for a in (task, *models, *small, *more)])
        except SystemExit as error:  # argparse
            code = error.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


METHODS = ("--method", "full", "smallkv:marginal=no", "--budget", 0.3, 0.2)


def test_a_killed_run_goes_on_and_its_lines_are_those_of_an_uninterrupted_one(call, tmp_path, monkeypatch):
    assert call("kl", *METHODS, out=tmp_path / "a")[0] == 0
    whole, path = (tmp_path / "a" / "results.jsonl").read_bytes(), tmp_path / "b" / "results.jsonl"
    assert whole.count(b"\n") == 15
    calls, real = [], tasks.teacher_force

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(tasks, "teacher_force", killed)
    assert call("kl", *METHODS, out=tmp_path / "b")[0] == 130
    part = path.read_bytes()
    assert 0 < len(part) < len(whole) and whole.startswith(part)
    path.write_bytes(whole[: len(part) + 25])  # with a line that was being written
    assert call("kl", *METHODS, out=tmp_path / "b")[0] == 0 and path.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3] + lines[4:]))  # one is missing within a batch
    assert call("kl", *METHODS, out=tmp_path / "b")[0] == 0
    assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(lines)
    about = json.loads((tmp_path / "b" / "run.json").read_text())
    assert len(about["runs"]) == 3 and about["token_bytes"] == {"LLM": 2 * 2 * 2 * 16 * 4, "SLM": 2 * 2 * 2 * 8 * 4}


def test_more_methods_join_a_run_and_the_table_has_the_means(call, tmp_path):
    call("kl", *METHODS)
    code, out, _ = call("kl", "--method", "window", "--budget", 0.5)
    lines = read_run(tmp_path / "run")[1]
    ours = [line for line in lines if (line["method"], line["budget"]) == ("smallkv:marginal=no", 0.2)]
    kl, loss, same = (sum(line[name] for line in ours) / 5 for name in ("score", "loss", "agreement"))
    assert code == 0 and "SLM slm" in out
    assert f"| smallkv:marginal=no | 0.2 | 5 | {kl:.4f} | {torch.tensor(loss).exp():.2f} | {same:.1%} |" in out
    assert "| window | 0.5 | 5 |" in out and "| method | budget | n | KL | perplexity | agreement |" in out
    assert main(["table", str(tmp_path / "run"), "--markdown"]) == 0


def test_a_table_has_a_column_a_group_and_of_recall_the_mean_over_questions():
    head = {"method": "full", "budget": 1.0, "group": ""}
    turns = [{"kind": "b", "exact": True}, {"kind": "b", "exact": False}, {"kind": "a", "exact": True}]
    lines = [{**head, "turns": turns, "score": 2 / 3}, {**head, "turns": turns[:1], "score": 1.0}]
    header, rows = make_table("recall", lines)
    assert header == ["method", "budget", "n", "right", "a", "b"]
    assert rows == [["full", "1", "4", "75.0%", "100.0%", "66.7%"]]
    lines = [{**head, "group": f"{n} {d}%", "score": float(n < 1000)} for n in (1024, 512) for d in (100, 50)]
    header, rows = make_table("needle", lines)
    assert header[3:] == ["found", "512 50%", "512 100%", "1024 50%", "1024 100%"]
    assert rows[0][3:] == ["50.0%", "100.0%", "100.0%", "0.0%", "0.0%"]
    found = (("b", 1, 0.5), ("a", 2, 1), ("b", 3, 0.7))
    lines = [{**head, "group": group, "score": kl, "similarity": same} for group, kl, same in found]
    header, rows = make_table("kl", [*lines, {**head, "method": "h2o", "group": "a", "score": 4}])
    assert header[3:] == ["KL", "similarity", "a", "b", "a, similarity", "b, similarity"]
    assert [row[3:] for row in rows] == [["2.0000", "0.733", "2.0000", "2.0000", "1.000", "0.600"],
                                         ["4.0000", "-", "4.0000", "-", "-", "-"]]  # fmt: skip


# ---- What cannot be used is one line ---------------------------------------------------------------------------------


def test_methods_have_options():
    options = {"score_decay": 0.5, "marginal": False, "reach": float("inf"), "scores": "slm"}
    assert parse_spec("smallkv:score_decay=0.5,marginal=no,reach=inf,scores=slm") == ("smallkv", options)
    assert parse_spec("full") == ("full", {})


@pytest.mark.parametrize(
    "more,message",
    [
        (["--method", "h3o"], "unknown method 'h3o'; supported: full"),
        (["--method", "smallkv:decay=1"], "method 'smallkv:decay=1' has no option 'decay'; supported: scores"),
        (["--method", "h2o:marginal=no"], "method 'h2o:marginal=no' has no option 'marginal'; supported: none"),
        (["--method", "smallkv:marginal"], "method 'smallkv:marginal': marginal should be yes or no, not ''"),
        (["--method", "smallkv:score_decay=x"], "score_decay should be a number, not 'x'"),
        (["--method", "smallkv:scores=both"], "unknown scores 'both'; supported: slm, fused"),
        (["--budget", "1.5"], "argument --budget: 1.5 is not a number above 0 and at most 1"),
        (["--budget", "0"], "argument --budget: 0 is not a number above 0"),
        (["--limit", "0"], "argument --limit: 0 is not a whole number of at least 1"),
        (["--prompt", "3"], "argument --prompt: 3 is not a whole number of at least 100"),
        (["--steps", "9999"], "too few for --limit 5 samples of"),
        (["--prompt", "2046", "--limit", "1"], "sample 0 of kl needs 2049 positions, and the models have 2048"),
        (["--file", "/nowhere"], "cannot read /nowhere: No such file or directory"),
        (["--slm", ""], "--slm is missing"),
        (["--equal", "bytes"], "leaves smallkv nothing"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(call, tmp_path, more, message):
    code, _, err = call("kl", *more)
    assert code == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_other_arguments(call, tmp_path, monkeypatch):
    call("kl", "--method", "full")
    before = (tmp_path / "run" / "results.jsonl").read_text()
    for task, more, message in (("kl", ["--steps", 2], "was run with steps 3, not 2; give another --out"),
                                ("recall", [], "was run with task kl, not recall")):  # fmt: skip
        code, _, err = call(task, "--method", "full", *more)
        assert code == 2 and message in err and err.count("\n") == 1
    monkeypatch.setattr("evaluate.commit", lambda: "f" * 40)
    assert "this is ffff" in call("kl", "--method", "full")[2]
    assert (tmp_path / "run" / "results.jsonl").read_text() == before
    (tmp_path / "run" / "results.jsonl").write_text("{}x\n" + before)
    assert "results.jsonl, line 1, is not valid JSON" in call("kl", "--method", "full")[2]
    (tmp_path / "run" / "run.json").unlink()
    assert "has results but no run.json" in call("kl", "--method", "full")[2]


def test_files_that_are_no_questions_or_no_haystack_are_named(call, tmp_path):
    file = tmp_path / "q.json"
    for content, task, message in (
        ('{"question_id": 1', "mtbench", "q.json, line 1, is not valid JSON"),
        ('{"question_id": 1, "category": "x"}', "mtbench", "q.json, line 1, has no 'turns'"),
        ('{"question_id": 1, "category": "x", "turns": []}', "mtbench", "question 1 needs a number and turns of text"),
        ('{"words": "x"}', "needle", "has no text to hide a number in"),
        ('{"text": "One."}', "needle", "--lengths 40 leaves 8 tokens for a prompt"),
    ):
        file.write_text(content)
        more = ["--lengths", 40] if task == "needle" else []
        code, _, err = call(task, "--method", "full", "--file", file, *more)
        assert code == 2 and message in err and err.count("\n") == 1
    assert main(["table", str(tmp_path / "none")]) == 2


def test_lm_eval_names_the_packages_that_are_missing(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "harness", None)
    code, _, err = call("lm-eval", "--tasks", "gsm8k_cot")
    assert code == 2 and "pip install -r requirements-eval.txt" in err and err.count("\n") == 1
