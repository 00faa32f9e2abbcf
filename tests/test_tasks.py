"""metrics.py, tasks.py, benchmarks.py: the official values, prompts to the letter, and naive loops beside every run."""

import json
import random
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import metrics
from benchmarks import BBH, GSM8K, LongBench, MTBench, Needle, cut_middle
from conftest import random_prompts
from decode import Policy, Session
from evaluate import Cell
from generate import Pair, load_pair
from smallkv import Settings, SmallKV
from tasks import RecallTask, Sample, Wikitext, converse, open_session
from test_checkpoint import write_checkpoint
from test_recall import TEXT

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"


def write_pair(base: Path) -> tuple[Path, Path]:
    """Folders of a tiny random LLM and SLM."""
    slm = write_checkpoint(base / "slm", heads=4, head_dim=8, seed=1, max_position_embeddings=2048)
    return write_checkpoint(base / "llm", max_position_embeddings=2048), slm


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


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
    monkeypatch.setitem(sys.modules, "rouge", None)
    with pytest.raises(ValueError, match="pip install rouge"):
        metrics.rouge_l("a", "a")


# ---- Prompts ---------------------------------------------------------------------------------------------------------


def write_lines(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_data(tmp_path: Path) -> Path:
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


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path)


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


def answers_of(pair: Pair, policy, samples: list[Sample], stops: tuple[str, ...]) -> list[list[str]]:
    return converse(open_session(policy, samples), samples, pair.text, stops)


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
    for policy in (Policy(pair.llm), SmallKV(pair.llm, pair.slm, Settings(budget=1.0))):
        assert answers_of(pair, policy, samples, stops) == expected


def test_a_newline_that_ends_an_answer_is_not_fed(pair):
    pair.text.stop = frozenset()
    newline = pair.text.encode("\n")[0]
    pair.llm.lm_head.weight[newline] *= 3  # likely enough to be met
    samples = [Sample(str(i), "", *random_prompts(30 + i, seed=i, vocab=280), [[5], [6, 7]], 30) for i in range(12)]
    seen: set = set()
    expected = [naive_conversation(pair, sample, ("\n",), seen) for sample in samples]
    assert "newline" in seen
    assert answers_of(pair, Policy(pair.llm), samples, ("\n",)) == expected


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
        session = Session(cell.policy(pair), [text[:110]], 5)  # one sequence, not two
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
        assert (kl < 1e-5) == (method == "full") and ("moved" in figures) == method.startswith("smallkv")


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
        assert wrong["score"] == (len(answers) - 1) / len(answers)
        assert task.parts(wrong)[0] == (sample.facts["turns"][0]["kind"], 0.0)
    other = task.samples(Namespace(**{**vars(args), "seed": 1}), pair.text, 2048)
    assert other[0].prompt != samples[0].prompt
