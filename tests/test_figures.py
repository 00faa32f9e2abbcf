"""figures.py: what is drawn equals the files it was read from; and every picture is made."""

import json
import math

import pytest

import figures
from tables import merge, read_run


def write_run(path, task, cells, equal="budget", **facts):
    """A run's folder by hand; cells: {(method, budget): [figures of a sample, ...]}."""
    path.mkdir()
    about = {"task": task, "arguments": {"llm": "llm", "slm": "slm", "equal": equal}, "commit": "0" * 40}
    about |= {"dtype": "float32", "hardware": {"device": "cpu"}, "token_bytes": {"LLM": 2, "SLM": 1}}
    (path / "run.json").write_text(json.dumps(about))
    lines = [
        {"method": method, "budget": budget, "sample": str(i), "group": "", **sample}
        for (method, budget), samples in cells.items()
        for i, sample in enumerate(samples)
    ]
    (path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def wikitext(tmp_path):
    def sample(score):
        return {"score": score, "loss": 1.0, "agreement": 0.5}

    cells = {("full", 1.0): [sample(0)], ("smallkv", 0.2): [sample(1), sample(2)], ("smallkv", 0.1): [sample(4)]}
    return write_run(tmp_path / "wikitext", "wikitext", cells)


@pytest.fixture
def needle(tmp_path):
    def sample(depth, length, score):
        return {"depth": depth, "length": length, "score": score}

    found = [sample(50, 512, 1.0), sample(0, 512, 0.0), sample(50, 256, 1.0), sample(50, 256, 0.0)]
    return write_run(tmp_path / "needle", "needle", {("full", 1.0): found, ("window", 0.2): found[:2]}, "bytes")


def test_curves_are_the_means_by_budget_of_runs_of_the_same_samples(wikitext, tmp_path):
    sample = {"score": 7, "loss": 1.0, "agreement": 0.5}
    cells = {("window", 0.3): [sample], ("smallkv", 0.1): [sample]}
    paths = [wikitext, write_run(tmp_path / "more", "wikitext", cells)]
    paths.append(write_run(tmp_path / "bytes", "wikitext", cells, "bytes"))
    one, other = merge([read_run(path) for path in paths])
    assert figures.curves(one) == {  # what two runs have is the first one's
        "full": [(1.0, 0.0)], "smallkv": [(0.1, 4.0), (0.2, 1.5)], "window": [(0.3, 7.0)],
    }  # fmt: skip
    assert figures.curves(other) == {"window": [(0.3, 7.0)], "smallkv": [(0.1, 7.0)]}
    assert one.title == "wikitext, 2 samples, equal budget, LLM llm, SLM slm, cpu, float32, commit 0000000"


def test_grid_has_a_row_a_depth_and_a_column_a_length(needle):
    lengths, depths, scores = figures.grid(read_run(needle).cells["full", 1.0])
    assert (lengths, depths) == ([256, 512], [0, 50])
    assert math.isnan(scores[0][0]) and [scores[0][1], *scores[1]] == [0.0, 0.5, 1.0]


def test_the_frontier_is_what_nothing_beats_in_both(tmp_path):
    def sample(score, moved=None):
        return {"score": score, "loss": 1.0, "agreement": 0.5, **({} if moved is None else {"moved_bytes": moved})}

    cells = {
        ("full", 1.0): [sample(0)], ("h2o", 0.2): [sample(3)], ("a", 0.2): [sample(2, 500), sample(4, 700)],
        ("oracle", 0.2): [sample(0.5)], ("b", 0.2): [sample(1, 900)], ("c", 0.2): [sample(1, 1900)],
        ("a", 0.1): [sample(5, 100)],
    }  # fmt: skip
    run = read_run(write_run(tmp_path / "w", "wikitext", cells))
    found = figures.movement(run)
    assert found == {0.2: {"h2o": (0, 3), "a": (600, 3), "b": (900, 1), "c": (1900, 1)}, 0.1: {"a": (100, 5)}}
    assert figures.frontier(found[0.2], lower=True) == ["h2o", "b"]
    assert figures.frontier(found[0.2], lower=False) == ["h2o"]
    by_brute_force = [  # of equal points the first would count; there are none here
        one for one in found[0.2] if not any(
            other != one and all(x <= y for x, y in zip(found[0.2][other], found[0.2][one])) for other in found[0.2]
        )
    ]  # fmt: skip
    assert by_brute_force == ["h2o", "b"]
    assert figures.main([str(tmp_path / "w"), "--out", str(tmp_path / "p")]) == 0
    assert {path.stem for path in (tmp_path / "p").iterdir()} == {"w-budget", "w-budget-frontier"}


@pytest.fixture
def log(tmp_path):
    rows = [
        {"step": 50, "loss": 3.0, "lr": 0.1, "seconds": 1.0},
        {"step": 100, "loss": 2.0, "lr": 0.1, "seconds": 2.0},
        {"step": 100, "seconds": 2.5, "eval": {"prose_loss": 2.5, "exact": 0.5}},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "log.jsonl"


def test_a_log_is_split_into_panels(log):
    assert figures.split_log(log) == {
        "training": {"loss": ([50, 100], [3.0, 2.0])},
        "evaluation, loss": {"prose_loss": ([100], [2.5])},
        "evaluation, share": {"exact": ([100], [0.5])},
    }


def test_every_picture_is_made(wikitext, needle, log, tmp_path, capsys):
    similarity = tmp_path / "similarity.json"
    similarity.write_text(json.dumps({"best": [[0.9, 0.8], [0.7, 0.6]], "cosine": [[0.9, 0.8], [0.7, 0.5]]}))
    out = tmp_path / "pictures"
    assert figures.main([str(path) for path in (wikitext, needle, similarity, log, "--out", out)]) == 0
    names = {"wikitext-budget", "needle-bytes", "needle-bytes-grid"}
    names |= {f"{tmp_path.name}-similarity", f"{tmp_path.name}-log"}
    assert {path.stem for path in out.iterdir()} == names
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in out.iterdir())
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_what_is_no_run_is_named(tmp_path, capsys):
    empty = tmp_path / "x-similarity.json"
    empty.write_text("{}")
    for path, message in ((tmp_path, "is neither a run's folder nor"), (empty, "none of best")):
        assert figures.main([str(path)]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
