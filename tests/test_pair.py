"""The embedded pair as it is shipped: what it answers, how alike its models attend, how many right answers SmallKV has.

The demonstration on it is in test_generate.py.
"""

import json
import random

import pytest
import torch

import evaluate
from command import read_lines, read_text
from decode import Policy, generate
from generate import PAIR, load_pair
from training.distill import figures_of, similarity
from training.recall import Recall, document_ids


@pytest.fixture(scope="module")
def pair():
    return load_pair(str(PAIR / "llm"), str(PAIR / "slm"), "cpu")


def test_the_answer_to_a_fixed_prompt(pair):
    prompt = (
        "Judith has a house in Long Ashby. The old pump stood still. The code of the south gate is 4071. Giles gave "
        "Judith a grey bell.\nQuestion: Which code opens the south gate?\nAnswer:"
    )
    answer = generate(Policy(pair.llm), [pair.text.encode(prompt)], 16)[0]
    assert pair.text.decode(answer).split("\n")[0] == " The code of the south gate is 4071."


def test_heads_attend_alike_on_held_out_text(pair):
    source = Recall.from_books([read_text(PAIR / "prose.txt")], pair.text.tokenizer, "test", 4)
    sample = document_ids(source.document(random.Random(1), 512))[0][:512]
    figures = figures_of(similarity(pair.llm, pair.slm, [sample]))
    assert figures["best"] > 0.95 and figures["jaccard"] > 0.90
    shipped = json.loads((PAIR / "slm" / "similarity.json").read_text())
    means = {kind: torch.tensor(shipped[kind]).mean().item() for kind in ("best", "jaccard")}
    assert means["best"] > 0.95 and means["jaccard"] > 0.90


def test_the_pair_is_small_and_its_slm_smaller(pair):
    weights = [(PAIR / name / "model.safetensors").stat().st_size for name in ("llm", "slm")]
    assert sum(weights) < 32e6
    sizes = [c.layers * c.kv_heads * c.head_dim for c in (pair.llm.config, pair.slm.config)]
    assert sizes[0] == 5 * sizes[1]


def test_recall_of_a_batch_of_documents(tmp_path):
    """One batch of `evaluate.py recall` for SmallKV, two questions each: as many right answers as the full cache has,
    give or take one."""
    flags = ["--limit", "25", "--turns", "2", "--method", "smallkv", "--device", "cpu", "--out", str(tmp_path)]
    assert evaluate.main(["recall", *flags]) == 0
    answers = [turn["exact"] for line in read_lines(tmp_path / "results.jsonl") for turn in line["turns"]]
    assert len(answers) == 50 and abs(sum(answers) - 46) <= 1, sum(answers)
