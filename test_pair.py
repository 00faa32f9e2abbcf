"""The embedded pair as it is shipped: what it answers, what SmallKV keeps of that, and the bare command."""

import json
import random

import pytest
import torch

import demo
import evaluate
import generate as command
from baselines import Window
from decode import FullPolicy, Session, generate
from distill import figures_of, similarity
from evicting import Budget
from recall import document_ids
from settings import Settings
from smallkv import SmallKV
from tasks import read_results


@pytest.fixture(scope="module")
def pair():
    return command.load_pair(str(demo.PAIR / "llm"), str(demo.PAIR / "slm"), "cpu")


@pytest.fixture(scope="module")
def document(pair):
    return demo.sample_document(pair.text.tokenizer)


@pytest.fixture(scope="module")
def first_prompt(document):
    """The document and its first question."""
    return document.prompt_ids + document.segment_ids[-2 * len(document.turns)]


def test_the_answer_to_a_fixed_prompt(pair):
    prompt = (
        "Judith has a house in Long Ashby. The old pump stood still. The code of the south gate is 4071. Giles gave "
        "Judith a grey bell.\nQuestion: Which code opens the south gate?\nAnswer:"
    )
    answer = generate(pair.llm, FullPolicy(pair.llm), [pair.text.encode(prompt)], 16)[0]
    assert pair.text.decode(answer).split("\n")[0] == " The code of the south gate is 4071."


def test_the_whole_budget_is_the_full_cache(pair, first_prompt):
    policies = [FullPolicy(pair.llm), SmallKV(pair.llm, pair.slm, Settings(budget=1.0))]
    full, whole = (generate(pair.llm, policy, [first_prompt], 24)[0] for policy in policies)
    assert whole == full


def test_smallkv_answers_what_a_window_has_lost(pair, document):
    full, _ = demo.ask(pair, FullPolicy(pair.llm), document)
    small, report = demo.ask(pair, SmallKV(pair.llm, pair.slm, Settings(budget=0.2)), document)
    window, _ = demo.ask(pair, Window(pair.llm, Budget(0.2)), document)
    assert [told.answer for told in full] == [turn.answer.strip() for turn in document.turns]
    assert [told.answer for told in small] == [told.answer for told in full]
    assert not any(told.right for told in window)
    assert sum(after > before for before, after in (told.heads for told in small)) >= 3  # they came back for it
    tokens = report["tokens"][0]
    assert tokens["critical"] == pytest.approx(0.2 * tokens["all"], rel=0.02)


def test_positions_of_facts_are_their_tokens(pair, document):
    ids, positions = document.prompt_ids, demo.fact_positions(document)
    assert set(positions) == {fact.key for fact in document.facts}
    for key, at in positions.items():
        facts = "".join(fact.text for fact in document.facts if fact.key == key)
        assert pair.text.decode([ids[i] for i in at]).strip() == facts.strip()


def test_heads_attend_alike_on_held_out_text(pair):
    source = demo.Recall.from_books([demo.read_text(demo.PAIR / "prose.txt")], pair.text.tokenizer, "test", 4)
    documents = [source.document(random.Random(seed), 512) for seed in (1, 2)]
    samples = [document_ids(document)[0][:512] for document in documents]
    figures = figures_of(similarity(pair.llm, pair.slm, samples))
    assert figures["best"] > 0.95 and figures["jaccard"] > 0.90
    shipped = json.loads((demo.PAIR / "slm" / "similarity.json").read_text())
    means = {kind: torch.tensor(shipped[kind]).mean().item() for kind in ("best", "jaccard")}
    assert means["best"] > 0.95 and means["jaccard"] > 0.90


def test_an_slm_that_stops_early_matches_and_keeps_only_what_runs(pair, first_prompt):
    short = command.load_pair(str(demo.PAIR / "llm"), str(demo.PAIR / "slm"), "cpu", slm_layers=2).slm
    sessions = [Session(pair.llm, SmallKV(pair.llm, slm, Settings()), [first_prompt], 1) for slm in (pair.slm, short)]
    for session in sessions:
        session.prefill()
    whole, early = (session.policy for session in sessions)
    assert torch.equal(early.slm_cache.score, whole.slm_cache.score[:2])
    assert early.slm_cache.key.nbytes == whole.slm_cache.key.nbytes / 2
    assert early.index.max() < 2 * short.config.query_heads <= whole.index.max()


def test_the_pair_is_small_and_its_slm_smaller(pair):
    weights = [path.stat().st_size for path in demo.PAIR.glob("*/*.safetensors")]
    assert len(weights) == 2 and sum(weights) < 32e6
    sizes = [c.layers * c.kv_heads * c.head_dim for c in (pair.llm.config, pair.slm.config)]
    assert sizes[0] == 5 * sizes[1]


def test_the_bare_command_shows_the_comparison(monkeypatch, capsys):
    monkeypatch.setattr(command, "input_waits", lambda: False)
    assert command.main([]) == 0
    out = capsys.readouterr().out
    assert "right answers: full cache 4 of 4, SmallKV 4 of 4, window 0 of 4" in out


@pytest.mark.parametrize("flags", [["--slm", "x"], ["--method", "h2o"], ["--chat"]])
def test_what_the_demonstration_does_not_take_is_one_line(flags, monkeypatch, capsys):
    monkeypatch.setattr(command, "input_waits", lambda: False)
    assert command.main(flags) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("content, waits", [(b"", False), (b"hello", True)])
def test_only_what_was_piped_in_is_a_prompt(content, waits, monkeypatch, tmp_path):
    path = tmp_path / "in"
    path.write_bytes(content)
    with path.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert command.input_waits() is waits


def test_recall_of_fifty_documents(tmp_path):
    """`evaluate.py recall --limit 50` for SmallKV, two questions each, so that it takes less than two minutes beside
    another test: as many right answers as when this was written, give or take two."""
    flags = ["--limit", "50", "--turns", "2", "--method", "smallkv", "--device", "cpu", "--out", str(tmp_path)]
    assert evaluate.main(["recall", *flags]) == 0
    answers = [turn["exact"] for line in read_results(tmp_path / "results.jsonl") for turn in line["turns"]]
    assert len(answers) == 100 and abs(sum(answers) - 92) <= 2
