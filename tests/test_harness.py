"""The adapter of lm-evaluation-harness: its answers are decode.generate's, its lines have the harness's scores."""

import json
from argparse import Namespace
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval", reason="public benchmarks run where requirements-eval.txt is installed")

import harness
from decode import generate
from evaluate import make_cells, make_policy_from
from generate import load_pair
from harness import SmallKVModel, leaves, task_spec
from test_checkpoint import write_checkpoint

WORDS = ("the quick brown fox jumps over ", "the lazy dog runs far away from ", "by the old grey house ")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base, shape = tmp_path_factory.mktemp("pair"), {"max_position_embeddings": 512}
    llm, slm = write_checkpoint(base / "llm", **shape), write_checkpoint(base / "slm", heads=4, head_dim=8, **shape)
    return load_pair(str(llm), str(slm), "cpu")


def asked(context, **options):
    return SimpleNamespace(args=(context, {"until": [], "max_gen_toks": 12, **options}))


@pytest.mark.parametrize("spec", ["full", "smallkv", "smallkv:marginal=no", "h2o"])
def test_answers_are_those_of_the_command(spec, pair):
    """In the order of the requests, whatever the batches; of a prompt that is too long the middle is left out."""
    contexts = [WORDS[i % 3] * (4 + 3 * i) for i in range(5)] + [WORDS[0] * 200]
    model = SmallKVModel(pair, spec, 0.3, batch=2)
    found = model.generate_until([asked(context) for context in contexts], disable_tqdm=True)
    for context, answer in zip(contexts, found):
        ids, most = pair.text.encode(context), 512 - 12
        ids = ids if len(ids) <= most else ids[: most // 2] + ids[-(most // 2) :]
        (expected,) = generate(make_policy_from(spec, pair, 0.3), [ids], 12, set(pair.text.stop))
        assert answer == pair.text.decode(expected)
    stop = found[0][3]
    (cut,) = model.generate_until([asked(contexts[0], until=[stop])], disable_tqdm=True)
    assert cut == found[0].partition(stop)[0]


def test_groups_and_tags_stand_for_their_tasks_and_local_files_are_found(tmp_path):
    manager = harness.TaskManager()
    assert set(leaves(manager, ["longbench_code_tasks"])) == {"longbench_lcc", "longbench_repobench-p"}
    assert len(leaves(manager, ["bbh_cot_fewshot", "gsm8k_cot"])) == 28
    with pytest.raises(ValueError, match="unknown task 'gsm9k'"):
        leaves(manager, ["gsm9k"])
    with pytest.raises(ValueError, match="no file .*gsm8k/test.jsonl for task gsm8k_cot"):
        task_spec(manager, "gsm8k_cot", tmp_path)
    text = task_spec(manager, "longbench_triviaqa", None)["doc_to_text"]
    assert "{{context}}\n\n{{question}}" in text
    assert task_spec(manager, "longbench_lcc", None)["doc_to_text"].endswith("{{'\\n'}}")


def test_a_local_task_has_the_harness_s_scores_and_a_killed_call_goes_on(pair, tmp_path, monkeypatch):
    rows = [{"question": f"What is {n} and {n}?", "answer": f"so #### {2 * n}"} for n in (2, 5)]
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "out").mkdir()
    args = Namespace(tasks=["gsm8k_cot"], chat=False, data=tmp_path, out=tmp_path / "out", limit=2, batch=2,
                     method=["full", "h2o"], budget=[0.3], equal="budget")  # fmt: skip
    calls, answers = [], iter(["4.\n", "The answer is 11.", "no", "The answer is 10."])

    def told(self, requests, disable_tqdm=False):
        calls.append((self.spec, len(requests)))
        return [next(answers) for _ in requests]

    monkeypatch.setattr(SmallKVModel, "generate_until", told)
    harness.run(args, pair, make_cells(args, pair))
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    for spec, name in (("full", "full@1"), ("h2o", "h2o@0.3")):
        figures = json.loads((tmp_path / "out" / f"{name}.json").read_text())["gsm8k_cot"]
        for way in ("strict-match", "flexible-extract"):
            own = [line["score"] for line in lines if (line["method"], line["group"]) == (spec, f"gsm8k_cot, {way}")]
            assert len(own) == 2 and sum(own) / 2 == figures[f"exact_match,{way}"]
    assert sum(line["score"] for line in lines) > 0 and calls == [("full", 2), ("h2o", 2)]
    harness.run(args, pair, make_cells(args, pair))  # all is in the cache of each method
    assert len(calls) == 2
    again = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert sorted(map(str, again)) == sorted(map(str, lines))
