"""evaluate.py and what stands under it: metrics with the official values, prompts to the letter, runs that resume."""

import json
import random
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import evaluate
import metrics
from benchmarks import BBH, GSM8K, TASKS, LongBench, MTBench, Needle, cut_middle
from conftest import random_prompts, tiny_decoder
from decode import FullPolicy, Session
from evaluate import Cell, main, make_batches, make_cells, parse_method
from generate import Pair, load_pair
from recall import exact
from smallkv import Settings, SmallKV
from tables import by_budget, by_group, read_run, show
from tasks import RecallTask, Sample, Wikitext, converse, read_results
from test_generate import write_checkpoint
from test_recall import TEXT

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("pair")
    slm = write_checkpoint(base / "slm", heads=4, head_dim=8, seed=1, positions=2048)
    return write_checkpoint(base / "llm", positions=2048), slm


@pytest.fixture
def pair(folders):
    pair = load_pair(*map(str, folders), "cpu")
    pair.text.template = TEMPLATE
    return pair


# ---- Metrics: (function, answer, truth, official value) --------------------------------------------------------------

F1 = [
    (metrics.qa_f1, "The cat!", "a cat", 1.0),  # articles, case and marks aside
    (metrics.qa_f1, "black cat", "black dog", 0.5),
    (metrics.qa_f1, "a long answer about a cat", "cat", 0.4),  # 1 of 4 words, 1 of 1
    (metrics.qa_f1, "", "cat", 0.0),
    (metrics.qa_f1_zh, "厦门大学。", "厦门大学", 1.0),
    (metrics.qa_f1_zh, "北京大学，清华大学", "清华大学", 2 / 3),
    (metrics.qa_f1_zh, "", "厦门大学", 0.0),
    (metrics.rouge_l, "the cat sat", "the cat sat", 1.0),
    (metrics.rouge_l, "the cat sat", "the cat sat on mat", 0.75),  # LCS 3; 3/3 and 3/5
    (metrics.rouge_l, "sat cat the", "the cat sat", 1 / 3),  # order counts
    (metrics.rouge_l, "", "the cat", 0.0),
    (metrics.rouge_l_zh, "会议讨论了预算", "会议讨论了预算", 1.0),
    (metrics.rouge_l_zh, "", "会议", 0.0),
    (metrics.count, "There are 5", "5", 1.0),
    (metrics.count, "5 or 6", "5", 0.5),
    (metrics.count, "15", "5", 0.0),
    (metrics.count, "none", "5", 0.0),
    (metrics.retrieval, "Paragraph 19", "Paragraph 19", 1.0),
    (metrics.retrieval, "19, 3, 4", "Paragraph 19", 1 / 3),
    (metrics.retrieval, "", "Paragraph 19", 0.0),
    (metrics.retrieval_zh, "段落5", "段落5", 1.0),
    (metrics.retrieval_zh, "段落15", "段落5", 0.0),
    (metrics.code_similarity, "# note\nreturn x", "return x", 1.0),  # comments are stepped over
    (metrics.code_similarity, "\nreturn y\nreturn x", "return x", 0.88),  # indel ratio 14/16, in whole percents
    (metrics.code_similarity, "```", "return x", 0.0),
]


@pytest.mark.parametrize("metric,given,truth,value", F1, ids=lambda v: getattr(v, "__name__", None))
def test_longbench_metrics(metric, given, truth, value):
    assert metric(given, truth) == pytest.approx(value, abs=1e-6)


def test_longbench_classification_and_first_lines():
    classes = ["体育", "教育", "法律、司法", "司法", "法律"]
    assert metrics.classification("教育", "教育", classes) == 1.0
    assert metrics.classification("教育或体育", "教育", classes) == 0.5
    assert metrics.classification("", "教育", classes) == 0.0
    # 法律 is part of the right name, and not removed: it follows 司法, which was (the original's loop does the same)
    assert metrics.classification("法律、司法", "法律、司法", classes) == 0.5
    assert metrics.longbench_score("lsht", "\n体育\n教育", ["体育"], classes) == 1.0  # the first line alone
    assert metrics.longbench_score("triviaqa", "Paris\nQuestion: and Rome", ["London", "paris"], None) == 1.0
    assert metrics.longbench_score("hotpotqa", "Paris\nand Rome", ["paris"], None) == 0.5
    assert metrics.longbench_score("qasper", "x", [], None) == 0.0
    assert set(metrics.LONGBENCH) >= set(metrics.FIRST_LINE) and len(metrics.LONGBENCH) == 21


@pytest.mark.parametrize(
    "given,target,strict,flexible",
    [
        ("6 and 12. The answer is 18.", "18", True, True),
        ("The answer is 1,800.\n\n", "1800", True, True),
        ("So it is $18.00 or 18", "18", False, True),
        ("The answer is 17. No, 18", "18", False, True),  # strict takes the first
        ("The answer is 18", "18", False, True),  # the official pattern eats the last digit where no mark follows
        ("La réponse est -3", "-3", False, True),
        ("", "18", False, False),
    ],
)
def test_gsm8k_metric(given, target, strict, flexible):
    assert metrics.gsm8k_score(given, target) == {"strict": strict, "flexible": flexible}


def test_other_metrics():
    assert metrics.gsm8k_target("16 - 3 = <<16-3=13>>13\n#### 1,300") == "1,300"
    assert metrics.bbh_score("So the answer is (B).", "(B)")
    assert metrics.bbh_score("So the answer is } ] >.\nQ", "} ] >")
    assert not metrics.bbh_score("So the answer is (B), or the answer is (C).", "(C)")
    assert not metrics.bbh_score("the answer is (B)", "(B)")  # the original wants one more character
    assert not metrics.bbh_score("", "(B)")
    assert metrics.needle_score("It is 1234567.", "1234567") and not metrics.needle_score("123456", "1234567")
    ratings = [metrics.judge_rating(text) for text in ("Rating: [[7]]", "[[8.5]] not [3]", "I say [6]", "seven")]
    assert ratings == [7.0, 8.5, 6.0, None]


def test_a_missing_metric_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rouge", None)
    with pytest.raises(ValueError, match="pip install rouge"):
        metrics.rouge_l("a", "a")


# ---- Prompts ---------------------------------------------------------------------------------------------------------


def write_lines(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path):
    """Each data set in a few lines, in the layout of its origin."""
    shots = (("1+1?", "Two. The answer is 2."), ("2+2?", "The answer is 4."))
    write_lines(tmp_path / "gsm8k" / "cot_8shot.jsonl", *({"question": q, "answer": a} for q, a in shots))
    problems = ({"question": f"{i}+3?", "answer": f"#### {i + 3}"} for i in range(9))
    write_lines(tmp_path / "gsm8k" / "test.jsonl", *problems)
    (tmp_path / "bbh" / "cot-prompts").mkdir(parents=True)
    for name in ("navigate", "snarks"):
        text = f"canary\n-----\nDo {name}.\n\nQ: x\nA: Let's think step by step.\nSo the answer is Yes.\n"
        (tmp_path / "bbh" / "cot-prompts" / f"{name}.txt").write_text(text)
    (tmp_path / "bbh" / "tasks").mkdir()
    examples = {"examples": [{"input": "go?", "target": "No"}, {"input": "come?", "target": "Yes"}]}
    (tmp_path / "bbh" / "tasks" / "navigate.json").write_text(json.dumps(examples))
    config = tmp_path / "longbench" / "config"
    config.mkdir(parents=True)
    templates = {"trec": "{context}\n{input}", "qasper": "T: {context}|{input}"}
    (config / "dataset2prompt.json").write_text(json.dumps(templates))
    (config / "dataset2maxlen.json").write_text(json.dumps({"trec": 5, "qasper": 7}))
    row = {"context": "c {x}", "input": "i", "answers": ["a"], "all_classes": None}
    write_lines(tmp_path / "longbench" / "data" / "trec.jsonl", row)
    write_lines(tmp_path / "longbench" / "data" / "qasper.jsonl", {**row, "context": " ".join(map(str, range(300)))})
    write_lines(tmp_path / "longbench" / "minilongbench" / "trec.jsonl", {"prompt": "whole", "answers": ["a"]})
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
        {"question_id": 101, "category": "reasoning", "turns": ["Why?", "And?"]},
    ]
    write_lines(tmp_path / "mt_bench" / "question.jsonl", *questions)
    reference = {"question_id": 101, "choices": [{"turns": ["because", "so"]}]}
    write_lines(tmp_path / "mt_bench" / "reference_answer" / "gpt-4.jsonl", reference)
    plain, told = "[{question}|{answer}]", "[{question}|{answer}|{ref_answer_1}]"
    two = "[{question_1}|{answer_1}|{question_2}|{answer_2}"
    names = {"single-v1": plain, "single-math-v1": told, "single-v1-multi-turn": two + "]",
             "single-math-v1-multi-turn": two + "|{ref_answer_2}]"}  # fmt: skip
    rows = [{"name": name, "system_prompt": "sys " + name, "prompt_template": text} for name, text in names.items()]
    write_lines(tmp_path / "mt_bench" / "judge_prompts.jsonl", *rows)
    (tmp_path / "ruler").mkdir()
    words = "Some special magic {type_needle_v} are hidden.\n{context}\nWhat are all the {type_needle_v} for {query}?"
    niah = {"template": words, "answer_prefix": " The {type_needle_v} for {query} are"}
    (tmp_path / "ruler" / "task_templates.json").write_text(json.dumps({"niah": niah}))
    (tmp_path / "needle").mkdir()
    (tmp_path / "needle" / "PaulGrahamEssays.json").write_text(json.dumps({"text": "One two.\n Three? Four! " * 30}))
    (tmp_path / "wikitext-2").mkdir()
    words = random.Random(0).choices("the quick brown fox jumps over the lazy dog and runs".split(), k=1500)
    (tmp_path / "wikitext-2" / "test.txt").write_text(" ".join(words))
    return tmp_path


def options(data: Path, **more) -> Namespace:
    common = {"limit": None, "seed": 0, "max_new_tokens": None, "subtask": ["all"], "source": "full", "chat": False}
    return Namespace(data=data, **{**common, "max_length": None, **more})


def test_gsm8k_prompt(pair, data):
    first, *rest = GSM8K().samples(options(data), pair.text, 2048)
    assert pair.text.decode(first.prompt) == (
        "Q: 1+1?\n\nA: Two. The answer is 2.\n\nQ: 2+2?\n\nA: The answer is 4.\n\nQ: 0+3?\n\nA:"
    )
    assert (first.facts, first.answer_tokens, len(rest)) == ({"target": "3"}, 256, 8)

    def chosen_by(seed):
        return [sample.id for sample in GSM8K().samples(options(data, limit=3, seed=seed), pair.text, 2048)]

    chosen = [chosen_by(seed) for seed in (0, 1, 1, 2)]
    assert chosen[0] == ["0", "1", "2"] and chosen[1] == chosen[2] != chosen[3]


def test_bbh_prompt_and_missing_tasks(pair, data, capsys):
    first, second = BBH().samples(options(data), pair.text, 2048)
    assert pair.text.decode(first.prompt) == (
        "Do navigate.\n\nQ: x\nA: Let's think step by step.\nSo the answer is Yes.\n\n"
        "Q: go?\nA: Let's think step by step.\n"
    )
    assert (first.group, second.facts) == ("navigate", {"target": "Yes"})
    assert "left out" in (note := capsys.readouterr().err) and "snarks" in note
    for asked, message in ((["snarks"], "no file"), (["nothing"], "unknown sub-task 'nothing'")):
        with pytest.raises(ValueError, match=message):
            BBH().samples(options(data, subtask=asked), pair.text, 2048)


def test_longbench_prompts_and_the_cut_in_the_middle(pair, data):
    qasper, trec = LongBench().samples(options(data, subtask=["qasper", "trec"]), pair.text, 400)
    assert pair.text.decode(trec.prompt) == "c {x}\ni" and (trec.answer_tokens, qasper.answer_tokens) == (5, 7)
    whole = pair.text.encode("T: " + " ".join(map(str, range(300))) + "|i")
    assert len(whole) > 393 >= len(qasper.prompt) > 380
    text = pair.text.decode(qasper.prompt)
    assert text.startswith("T: 0 1 2") and text.endswith("299|i")
    assert text == pair.text.decode(whole[:196]) + pair.text.decode(whole[-196:])  # the halves, nothing else
    (mini,) = LongBench().samples(options(data, subtask=["trec"], source="mini"), pair.text, 400)
    assert pair.text.decode(mini.prompt) == "whole"
    chats = LongBench().samples(options(data, subtask=["qasper", "trec"], chat=True), pair.text, 400)
    assert pair.text.decode(chats[0].prompt).startswith("<user>T: 0") and len(chats[0].prompt) <= 393
    assert chats[1].prompt == trec.prompt  # few-shot sets are never wrapped
    assert cut_middle(pair.text, "short", 50, False) == pair.text.encode("short")


def test_mtbench_turns_make_the_whole_conversation(pair, data):
    sample = MTBench().samples(options(data), pair.text, 2048)[0]
    assert pair.text.decode(sample.prompt) == "<user>Write.</user><assistant>"
    kept = sample.prompt + pair.text.encode("An answer.") + sample.turns[1]
    whole = "<user>Write.</user><assistant>An answer.</assistant><user>Again.</user><assistant>"
    assert pair.text.decode(kept) == whole
    assert sample.turns[0] == []


def test_needle_is_where_it_should_be(pair, data):
    args = options(data, lengths=[300, 600], depths=[0, 50, 100], repeats=2)
    samples = Needle().samples(args, pair.text, 2048)
    assert len(samples) == 12 == len({sample.id for sample in samples})
    for sample in samples:
        text, facts = pair.text.decode(sample.prompt), sample.facts
        key = text.split("for ")[1].split(" is")[0]
        needle = f"One of the special magic numbers for {key} is: {facts['value']}."
        assert text.startswith("A special magic number is hidden.\n")
        assert text.endswith(f"\nWhat is the number for {key}? The number for {key} is")
        hay, _, after = text.split("\n")[1].partition(needle)
        depth = len(hay) / (len(hay) + len(after))
        assert after != text and abs(depth - facts["depth"] / 100) < 0.1
        assert facts["length"] - 60 < len(sample.prompt) + sample.answer_tokens <= facts["length"]


# ---- Conversations and teacher forcing against naive loops -----------------------------------------------------------


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
            if not ended or "\n" not in pair.text.decode([token]):
                ids.append(token)
            else:
                seen.add("newline")
            if ended:
                break
        text = pair.text.decode(answer)
        answers.append(text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))])
    return answers


def test_step_fed_turns_equal_a_full_forward(pair):
    """Prompts and turns of different lengths in one batch; every way for an answer to end occurs."""
    rng = random.Random(4)
    stops = ("\n", *"aeiou")
    pair.text.stop = frozenset(range(120, 150))
    prompts = random_prompts(40, 71, 103, 64, vocab=280)
    turns = [[random_prompts(rng.randint(1, 9), seed=i * 9 + j, vocab=280)[0] for j in range(4)] for i in range(4)]
    turns[2][0] = []
    samples = [Sample(str(i), "", p, t, 6) for i, (p, t) in enumerate(zip(prompts, turns))]
    seen: set = set()
    expected = [naive_conversation(pair, sample, stops, seen) for sample in samples]
    assert seen >= {"stop token", "stop text", "limit"}
    assert converse(pair, FullPolicy(pair.llm), samples, stops) == expected
    full = SmallKV(pair.llm, pair.slm, Settings(budget=1.0))
    assert converse(pair, full, samples, stops) == expected


def test_a_newline_that_ends_an_answer_is_not_fed(pair):
    pair.text.stop = frozenset()
    newline = pair.text.encode("\n")[0]
    pair.llm.lm_head.weight[newline] *= 3  # likely enough to be met
    samples = [Sample(str(i), "", *random_prompts(30 + i, seed=i, vocab=280), [[5], [6, 7]], 30) for i in range(12)]
    seen: set = set()
    expected = [naive_conversation(pair, sample, ("\n",), seen) for sample in samples]
    assert "newline" in seen
    assert converse(pair, FullPolicy(pair.llm), samples, ("\n",)) == expected


@pytest.mark.parametrize("method,budget", [("full", 1.0), ("smallkv", 0.3), ("smallkv-paper", 0.2), ("window", 0.2)])
def test_wikitext_equals_a_naive_teacher_forced_loop(pair, data, method, budget):
    args = options(data, limit=2, prompt=110, steps=5, file="wikitext-2/test.txt")
    samples = Wikitext().samples(args, pair.text, 2048)
    ids = pair.text.encode((data / "wikitext-2" / "test.txt").read_text())
    assert [sample.prompt + sample.turns[0] for sample in samples] == [ids[:115], ids[-116:-1]]
    cell = Cell(method, budget, budget)
    found = Wikitext().run(pair, cell.policy(pair), samples)
    for sample, figures in zip(samples, found):
        text = sample.prompt + sample.turns[0] + sample.facts["targets"][-1:]
        session = Session(pair.llm, cell.policy(pair), [text[:110]], 5)  # one sequence, not two
        session.prefill()
        loss = kl = same = 0.0
        for i in range(110, 115):
            p = pair.llm(torch.tensor([text[: i + 1]]))[0, -1].double().softmax(-1)
            q = session.step([text[i]])[0].double().softmax(-1)
            loss -= q[text[i + 1]].log().item() / 5
            kl += sum((a * (a.log() - b.log())).item() for a, b in zip(p, q)) / 5
            same += float(p.argmax() == q.argmax()) / 5
        expected = {"loss": loss, "score": kl, "agreement": same}
        assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=2e-5)
        assert (kl < 1e-5) == (method == "full") and ("moved" in figures) == (method != "full")


def test_recall_documents_are_fed_whole_and_scored_turn_by_turn(pair, tmp_path):
    (tmp_path / "prose.txt").write_text(TEXT)
    args = options(tmp_path, limit=2, prose=tmp_path / "prose.txt", length=700, turns=3)
    task = RecallTask()
    samples = task.samples(args, pair.text, 2048)
    assert [sample.id for sample in samples] == ["evaluation-0", "evaluation-1"]
    for sample in samples:
        assert 600 < len(sample.prompt) <= 700 and len(sample.turns) == len(sample.facts["turns"])
        for turn in sample.turns:
            asked = pair.text.decode(turn)
            assert asked.startswith("\nQuestion:") and asked.endswith("Answer:")
        answers = [turn["answer"].rstrip(".") for turn in sample.facts["turns"]]
        assert task.score(sample, answers)["score"] == 1.0
        wrong = task.score(sample, [answers[0] + " too", *answers[1:]])
        assert not exact(answers[0], answers[0] + " too") and wrong["score"] == (len(answers) - 1) / len(answers)
        assert task.parts(wrong)[0] == (sample.facts["turns"][0]["kind"], 0.0)
    other = task.samples(Namespace(**{**vars(args), "seed": 1}), pair.text, 2048)
    assert other[0].prompt != samples[0].prompt


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
    llm_ledger, slm_ledger = (cells[-1].policy(pair).predict([length], length)[name] for name in ("LLM", "SLM"))
    full = FullPolicy(llm).predict([length], length)["LLM"][0].size
    taken = sum(e.size for e in llm_ledger if e.what in ("critical K, V", "marginal V")) + slm_ledger[0].size
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


METHODS = ("--method", "full", "smallkv:marginal=yes", "--budget", 0.3, 0.2)


def test_same_arguments_same_files_and_a_killed_run_goes_on(run, tmp_path, monkeypatch):
    code, out, _ = run(tmp_path / "a", *METHODS)
    assert code == 0 and "5 samples" in out and "smallkv:marginal=yes" in out
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
    assert about["versions"]["torch"] == torch.__version__ and about["token_bytes"]["LLM"] == 2 * 2 * 2 * 16 * 4


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
    ours = [line for line in lines if (line["method"], line["budget"]) == ("smallkv:marginal=yes", 0.2)]
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
    method, given = parse_method("smallkv:score_decay=0.5,marginal=yes,matcher=jaccard,budget_tokens=3")
    assert method is evaluate.METHODS["smallkv"]
    assert given == {"score_decay": 0.5, "marginal": True, "matcher": "jaccard", "budget_tokens": 3}
    assert parse_method("full")[1] == {}


@pytest.mark.parametrize(
    "more,message",
    [
        (["--method", "h3o"], "unknown method 'h3o'; supported: full"),
        (["--method", "smallkv:decay=1"], "method 'smallkv:decay=1': "),
        (["--method", "smallkv:marginal"], "'marginal' should look like option=value"),
        (["--method", "smallkv", "--budget", "1.5"], "budget 1.5 is outside (0, 1]"),
        (["--limit", "0"], "--limit 0 and --batch 2 should both be at least 1"),
        (["--prompt", "3"], "--prompt should be at least 100"),
        (["--data", "/nowhere"], "cannot read /nowhere/wikitext-2/test.txt: No such file"),
        (["--steps", "9999"], "too few for 5 samples"),
        (["--slm", ""], "--slm is missing"),
        (["--equal", "bytes", "--budget", "0.3"], "leaves smallkv nothing"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, more, message):
    code, _, err = run(tmp_path / "a", *more)
    assert code == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1


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
