"""experiments/: what is measured equals loops over dense attention matrices; every command, and README.md's."""

import itertools
import json
import math
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate
from conftest import random_prompts, tiny_decoder
from experiments import attention, curve
from generate import PAIR, Pair
from match import MATCHERS, SINKS, match_heads
from naive import Evicting, matrices, top

N = 120  # tokens of a text here


@pytest.fixture(scope="module")
def pair():
    return Pair(tiny_decoder(), tiny_decoder(layers=3, heads=4, head_dim=8, seed=1), None)


@pytest.fixture(scope="module")
def ids():
    return random_prompts(N, seed=3)[0]


# ---- Fig. 1b ---------------------------------------------------------------------------------------------------------


def best(scores, count):
    """The `count` tokens of largest score as a set."""
    return set(top(scores if isinstance(scores, dict) else dict(enumerate(scores)), count))


def drop_once(held, n, kept):
    """At the middle of the text every KV head forgets all but its heaviest tokens."""
    return top(held, kept) if n == N // 2 + 1 else list(held)


def mean_jaccard(sets, others):
    return sum(len(one & two) / len(one | two) for one, two in zip(sets, others)) / len(sets)


@pytest.mark.parametrize("budget", [0.445, 0.16])  # 53 and 19 tokens, 26 and 9 of the first half
def test_saliency_shift_equals_a_loop_over_queries(pair, ids, budget):
    llm, slm = pair.llm, pair.slm
    kept, rows = int(budget * N), llm.config.layers * llm.config.kv_heads
    naive = Evicting(llm, ids[: N // 2], lambda n: int(budget * (N // 2)), drop_once)
    for token in ids[N // 2 :]:
        naive.step(token)
    chosen = match_heads(llm, slm, ids, "jaccard").index.flatten()
    both = matrices(llm, ids), matrices(slm, ids)[chosen]
    whole, borrowed = (x.sum(1).view(rows, -1, N).sum(1).tolist() for x in both)
    important, left, lent = ([best(scores, kept) for scores in kind] for kind in (whole, naive.held.values(), borrowed))
    expected = {"real drop": mean_jaccard(left, important), "matched heads": mean_jaccard(lent, important)}
    assert max(expected.values()) < 1  # or nothing would be tested
    assert attention.saliency_shift(pair, ids, budget) == pytest.approx(expected, abs=1e-6)
    same = Pair(llm, llm, None)
    assert attention.saliency_shift(same, ids, 1.0) == {"real drop": 1.0, "matched heads": 1.0}


# ---- Fig. 1c, 2, 8, 9, Table 9 ---------------------------------------------------------------------------------------


def naive_cosine(one, other):
    one, other = one[SINKS:].tolist(), other[SINKS:].tolist()
    dot = sum(a * b for a, b in zip(one, other))
    return dot / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


def test_similarities_equal_cosines_of_dense_sums(pair, ids):
    rows, others = matrices(pair.llm, ids), matrices(pair.slm, ids)
    every = [[naive_cosine(one, other) for other in others.sum(1)] for one in rows.sum(1)]
    found = {row["matcher"]: row for row in attention.fig1c(pair, [ids], None)}
    heads = {row["head"]: row for row in attention.fig8(pair, [ids], None)}
    expected = {"best": [max(line) for line in every]}
    for matcher in MATCHERS:
        chosen = match_heads(pair.llm, pair.slm, ids, matcher).index.flatten().tolist()
        expected[matcher] = [line[head] for line, head in zip(every, chosen)]
        assert found[matcher]["cosine"] == pytest.approx(sum(expected[matcher]) / len(every), abs=1e-5)
        head = expected[matcher].index(sorted(expected[matcher])[len(every) // 2])
        curves = [matrix.sum(0).tolist() for matrix in (rows[head], others[chosen[head]])]
        assert list(found[matcher]["curves"].values()) == [pytest.approx(one, abs=1e-4) for one in curves]
        names = "LLM layer {}, head {}".format(*divmod(head, pair.llm.config.query_heads))
        assert next(iter(found[matcher]["curves"])) == names
    for kind, values in expected.items():
        assert sum(heads[kind]["heads"], []) == pytest.approx(values, abs=1e-5)
        assert heads[kind]["above 0.8"] == pytest.approx(sum(value > 0.8 for value in values) / len(values))
        assert heads[kind]["worst"] == pytest.approx(min(values), abs=1e-5)
    across = next(attention.fig9(pair, [ids], None))
    assert across["cosine"] == pytest.approx(naive_cosine(rows.sum(1).mean(0), others.sum(1).mean(0)), abs=1e-5)


def test_a_turn_s_similarity_is_that_of_its_own_queries(pair, ids):
    chosen = match_heads(pair.llm, pair.slm, ids, "jaccard").index.flatten()
    attention_of = matrices(pair.llm, ids), matrices(pair.slm, ids)[chosen]
    expected = []
    for start, end in ((0, N), (0, 80), (80, 101), (101, N)):
        both = [matrix[:, start:end, :end].sum(1) for matrix in attention_of]
        expected.append(sum(map(naive_cosine, *both)) / len(chosen))
    assert attention.turn_similarity(pair, ids, [80, 101, N]) == pytest.approx(expected, abs=1e-4)


def test_bands_equal_sorting_by_hand(pair, ids):
    scores = matrices(pair.llm, ids).sum(1).tolist()  # (L * H) lists

    def bands(values):
        ranked = sorted(values, reverse=True)
        return [sum(ranked[start:end]) / sum(values) for start, end in itertools.pairwise((0, 6, 12, 18, N))]

    together, apart = attention.fig2(pair, [ids], None)
    assert [together[name] for name in attention.BANDS] == pytest.approx(bands([*map(sum, zip(*scores))]), abs=1e-5)
    each = [sum(band) / len(scores) for band in zip(*map(bands, scores))]
    assert [apart[name] for name in attention.BANDS] == pytest.approx(each, abs=1e-5)


def test_a_dialogue_holds_the_full_cache_s_answers(pair):
    letters = SimpleNamespace(stop={7}, encode=lambda words: [ord(letter) % 97 for letter in words])
    talk = Pair(pair.llm, None, letters)
    pieces = [talk.text.encode(words) for words in ("a prompt of some words", "and a turn", "one more")]
    expected, ends = list(pieces[0]), [len(pieces[0])]
    for turn in pieces[1:]:
        expected += turn
        for _ in range(5):
            token = talk.llm(torch.tensor([expected]))[0, -1].argmax().item()
            if token == 7:
                break
            expected.append(token)
        ends.append(len(expected))
    assert attention.dialogue(talk, pieces, 5) == (expected, ends)


# ---- The commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, capsys):
    """Run a command into tmp_path: (exit code, standard output, standard error)."""

    def call(*line):
        code = attention.main([str(part) for part in line] + ["--out", str(tmp_path / "out")])
        return code, *capsys.readouterr()

    return call


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", attention.STUDIES)
def test_every_command_writes_rows_a_table_and_the_paper_s_picture(command, tmp_path, name):
    own = ("--answer-tokens", 4) if name == "table9" else ("--tokens", 110)
    code, out, err = command(name, "--limit", 2, "--device", "cpu", *own)
    assert code == 0, err
    about, rows = json.loads((tmp_path / "out" / "run.json").read_text()), rows_of(tmp_path / "out")
    assert about["task"] == name and about["runs"][0]["commit"]
    assert {row["text"] for row in rows} == set(range(1 if name == "table9" else 2))
    assert (tmp_path / "out" / f"{name}.png").exists() == name.startswith("fig")
    header, _, *lines = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    for line in lines:  # every number of the table is the mean of its rows
        cells = dict(zip(header, line, strict=True))
        keys = {key for key, value in rows[0].items() if isinstance(value, str) or key == "budget"} - {"text"}
        members = [row for row in rows if all(str(row[key]) == cells[key] for key in keys)]
        for figure in set(header) - keys:
            assert float(cells[figure]) == pytest.approx(sum(row[figure] for row in members) / len(members), abs=6e-4)


def test_several_slms_prompts_and_short_texts(command, tmp_path):
    file, words = tmp_path / "prompts.jsonl", "the bell of the mill by the sea rang twice before the rain came down "
    lines = [{"deep": {"words": text}} for text in (words * 9, "too short", [words * 5, words * 4])]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    slms = PAIR / "slm", PAIR / "llm"
    code, out, err = command("table7", "--slm", *slms, "--prompts", file, "--field", "deep.words", "--device", "cpu")
    assert code == 0 and "left out: 1 of 3 texts" in err
    rows = rows_of(tmp_path / "out")
    assert [row["SLM"] for row in rows] == [str(slms[0])] * 6 + [str(slms[1])] * 6
    assert rows[6]["mean"] == pytest.approx(1) and out.count(str(slms[1])) == 3  # the LLM as its own SLM
    file.write_text(json.dumps({"prompt": "too short"}) + "\n")
    code, _, err = command("table9", "--prompts", file, "--device", "cpu")
    assert code == 2 and "left out: a dialogue" in err and "error: no text of at least 100 tokens" in err


MISTAKES = {
    "0 is not a whole number of at least 1": ("fig1b", "--limit", 0),
    "50 is not a whole number of at least 100": ("fig1b", "--tokens", 50),
    "1.5 is not a number above 0 and at most 1": ("fig1b", "--budget", 1.5),
    "cannot read nothing.txt": ("fig8", "--file", "nothing.txt"),
    "no text, nor a list of texts, at 'prompt'": ("fig8", "--prompts", PAIR / "slm" / "log.jsonl"),
    "no folder nothing": ("fig8", "--llm", "nothing"),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line(command, capsys, words):
    try:
        code, _, err = command(*MISTAKES[words])
    except SystemExit as exit:
        code, err = exit.code, capsys.readouterr().err
    assert code == 2 and words in err and err.count("\n") == 1, err


# ---- README.md -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lines():
    """Every command line of experiments/README.md as bash calls it, loops and variables expanded."""
    text = (Path(attention.__file__).parent / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    shown = 'python() { printf "%q " "$@"; echo; }; find() { :; }; lm-eval() { :; }\n'
    script = shown + code.replace("> bbh.jsonl", "")
    done = subprocess.run(["bash", "-uc", script], capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_every_line_of_the_readme_is_understood(lines):
    parsers = {"attention": attention.make_parser(), "evaluate.py": evaluate.make_parser()}
    seen = set()
    for line in lines:
        module, *flags = line if line[0] != "-m" else [line[1].rpartition(".")[2], *line[2:]]
        if module == "curve":
            continue
        args = parsers[module].parse_args(flags)  # exits at what it does not know
        seen.add(args.task if module == "attention" else module)
        for spec in getattr(args, "method", []):
            evaluate.parse_spec(spec)
    assert seen == {"evaluate.py", *attention.STUDIES}


def test_grids_on_the_embedded_pair_run(lines, tmp_path, capsys, monkeypatch):
    """Two samples each, short ones, at one budget; and a curve's points are the means of its run's lines."""
    monkeypatch.chdir(PAIR.parent)
    own = [line for line in lines if line[0] == "evaluate.py" and line[1] in ("recall", "kl")]
    small = {"recall": ["--length", "220", "--turns", "1"], "kl": ["--prompt", "110", "--steps", "3"]}
    for number, (_, task, *flags) in enumerate(own):
        more = [*small[task], *"--budget 0.3 --limit 2 --device cpu --out".split(), str(tmp_path / f"{number}")]
        if "Qwen" not in " ".join(flags):
            assert evaluate.main([task, *flags, *more]) == 0, capsys.readouterr().err
    runs = [folder for folder in tmp_path.iterdir() if evaluate.read_run(folder)[0]["task"] == "recall"]
    assert curve.main([*map(str, runs), "--out", str(tmp_path / "curve.png")]) == 0
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    for folder in tmp_path.glob("[0-9]*"):
        for method, points in curve.curves(found := evaluate.read_run(folder)[1], "budget").items():
            for budget, score in points:
                scores = [line["score"] for line in found if (line["method"], line["budget"]) == (method, budget)]
                assert len(scores) == 2 and score == pytest.approx(sum(scores) / 2)
