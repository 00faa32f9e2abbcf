"""experiments.py and what is under it: measurements against naive ones, and every command."""

import json
import math
import shlex

import pytest
import torch

import experiments
import measures
import studies
from baselines import Evicting
from conftest import random_prompts, tiny_decoder
from decode import Policy
from evaluate import METHODS
from generate import load_pair
from match import SINKS, WINDOW_MAX, match_heads, seen_window
from ops import rotate
from tasks import Sample
from test_tasks import answers_of, write_data, write_pair

N = 120  # tokens of a text here


@pytest.fixture(scope="module")
def models():
    return tiny_decoder(), tiny_decoder(layers=3, heads=4, head_dim=8, seed=1)


@pytest.fixture(scope="module")
def ids():
    return random_prompts(N, seed=3)[0]


def dense(model, ids):
    """All attention matrices, (L * H, n, n)."""
    return seen_window(model, torch.tensor([ids])).rows(slice(None))


# ---- Fig. 1b ---------------------------------------------------------------------------------------------------------


class NaiveDrops:
    """The whole text in one pass, query by query over dense rows; who was dropped is masked from then on."""

    def __init__(self, llm, half: int, budget: float, every_step: bool):
        self.config, self.half, self.kept, self.every_step = llm.config, half, Evicting(llm, budget).kept, every_step
        self.held, self.score = [], []  # of each layer: (G, n) bool, (G, n)

    def attend(self, layer, qkv, rope, span):
        heads = rotate(qkv, rope, self.config.kv_heads, self.config.head_dim)
        query, key, value = (x.transpose(1, 2) for x in heads)
        _, H, n, D = query.shape
        G = key.shape[1]
        held, score, out = torch.ones(G, n, dtype=torch.bool), torch.zeros(G, n), torch.zeros_like(query)
        for q in range(n):
            if self.every_step and q >= self.half:
                size = self.kept(q + 1)
                for g in range(G):
                    recent = [j for j in range(q) if held[g, j] and j > q - (size - size // 2)]
                    others = [j for j in range(q) if held[g, j] and j not in recent]
                    others.sort(key=lambda j: -score[g, j].item())
                    stay = recent + others[: size - 1 - len(recent)]
                    held[g, :q] = torch.tensor([j in stay for j in range(q)])
            elif q == self.half:
                for g in range(G):
                    stay = sorted(range(q), key=lambda j: -score[g, j].item())[: self.kept(q)]
                    held[g, :q] = torch.tensor([j in stay for j in range(q)])
            for h in range(H):
                g = h // (H // G)
                logits = key[0, g, : q + 1] @ query[0, h, q] * D**-0.5
                row = logits.masked_fill(~held[g, : q + 1], -torch.inf).softmax(-1)
                out[0, h, q] = row @ value[0, g, : q + 1]
                score[g, : q + 1] += row
        self.held.append(held)
        self.score.append(score)
        return out.transpose(1, 2)


def naive_jaccard(sets, others):
    return sum(len(one & two) / len(one | two) for one, two in zip(sets, others)) / len(sets)


def best(scores, count):
    """The `count` largest of each row as a set, (heads, n)."""
    return [set(sorted(range(len(row)), key=lambda j: -row[j])[:count]) for row in scores.tolist()]


@pytest.mark.parametrize("budget", [0.445, 0.16])  # 53 and 19 tokens: odd, and the newest query matters
def test_saliency_shift_equals_a_loop_over_dense_rows(models, ids, budget):
    llm, slm = models
    kept, G = Evicting(llm, budget).kept(N), llm.config.kv_heads
    rows = dense(llm, ids)
    scores = rows.sum(1).view(llm.config.layers * G, -1, N).sum(1)  # every KV head's accumulated scores
    twice = NaiveDrops(llm, N // 2, budget, False)
    llm(torch.tensor([ids]), cache=twice)
    second = torch.cat(twice.score).masked_fill(~torch.cat(twice.held), -torch.inf)
    h2o = NaiveDrops(llm, N // 2, budget, True)
    llm(torch.tensor([ids]), cache=h2o)
    before = rows[:, :-1].sum(1).view(llm.config.layers * G, -1, N).sum(1)
    recent = set(range(N - (kept - kept // 2), N))
    before[:, sorted(recent)] = torch.inf
    stays, real = best(before, kept), [set(row.nonzero()[:, 0].tolist()) for row in torch.cat(h2o.held)]
    chosen = match_heads(llm, slm, ids[:WINDOW_MAX], "jaccard").index.flatten()
    borrowed = dense(slm, ids).sum(1)[chosen].view(llm.config.layers * G, -1, N).sum(1)
    expected = {
        "two_drops": naive_jaccard(best(second, kept), best(scores, kept)),
        "h2o": naive_jaccard(real, stays),
        "h2o_heavy": naive_jaccard([s - recent for s in real], [s - recent for s in stays]),
        "slm": naive_jaccard(best(borrowed, kept), best(scores, kept)),
    }
    assert expected["two_drops"] < 1 and expected["h2o"] < 1  # or nothing would be tested
    assert measures.saliency_shift(llm, slm, ids, budget) == pytest.approx(expected, abs=1e-6)


def test_nothing_shifts_where_nothing_is_dropped_or_the_slm_is_the_llm(models, ids):
    llm, _ = models
    found = measures.saliency_shift(llm, llm, ids, 1.0)
    assert found["two_drops"] == found["h2o"] == found["h2o_heavy"] == found["slm"] == 1.0


# ---- Fig. 2, 1c, 9, Table 9 ------------------------------------------------------------------------------------------


def test_mass_by_rank_equals_sorting_by_hand(models, ids):
    llm, _ = models
    scores = dense(llm, ids).sum(1).tolist()  # (L * H) lists
    edges = [0, 6, 12, 18, N]  # 5, 10, 15 % of 120

    def bands(values):
        ranked = sorted(values, reverse=True)
        return [sum(ranked[start:end]) / sum(values) for start, end in zip(edges, edges[1:])]

    found, curve = measures.mass_by_rank(llm, ids)
    together = [sum(column) for column in zip(*scores)]
    assert found["all_heads"] == pytest.approx(bands(together), abs=1e-5)
    apart = [bands(head) for head in scores]
    assert found["each_head"] == pytest.approx([sum(band) / len(apart) for band in zip(*apart)], abs=1e-5)
    assert curve == pytest.approx([value / sum(together) for value in sorted(together, reverse=True)], abs=1e-6)


def naive_cosine(one, other):
    one, other = one[SINKS:].tolist(), other[SINKS:].tolist()
    dot = sum(a * b for a, b in zip(one, other))
    return dot / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


def test_similarities_equal_cosines_of_dense_sums(models, ids):
    llm, slm = models
    chosen = match_heads(llm, slm, ids, "jaccard").index.flatten().tolist()
    rows, others = dense(llm, ids), dense(slm, ids)[chosen]
    expected = [naive_cosine(one, two) for one, two in zip(rows.sum(1), others.sum(1))]
    found, example = measures.typical_heads(llm, slm, ids, "jaccard")
    assert found == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    head = expected.index(sorted(expected)[len(expected) // 2])
    assert (example["layer"], example["head"]) == divmod(head, llm.config.query_heads)
    assert (example["slm_layer"], example["slm_head"]) == divmod(chosen[head], slm.config.query_heads)
    assert example["slm"] == pytest.approx(others[head].sum(0).tolist(), abs=1e-4)
    assert measures.all_heads(llm, ids).tolist() == pytest.approx(rows.sum(1).mean(0).tolist(), abs=1e-4)
    ends, start, turns = [80, 101, N], 0, []
    for end in ends:  # a turn: its own queries on all tokens so far
        both = [matrix[:, start:end, :end].sum(1) for matrix in (rows, others)]
        turns.append(sum(naive_cosine(one, two) for one, two in zip(*both)) / len(rows))
        start = end
    assert measures.turn_similarity(llm, slm, ids, ends) == pytest.approx([found, *turns], abs=1e-4)


def test_a_conversation_is_prompt_turns_and_the_full_caches_answers(folders):
    pair = load_pair(*map(str, folders), "cpu")
    sample = Sample("0", "", pair.text.encode("a prompt of some words"), [pair.text.encode(t) for t in ("x", "yz")], 4)
    found, ends = measures.conversation(pair, sample, ())
    answers = answers_of(pair, Policy(pair.llm), [sample], ())[0]
    written = list(sample.prompt)
    for turn, answer, end in zip(sample.turns, answers, ends[1:]):
        written += turn + pair.text.encode(answer)
        assert len(written) == end
    assert found == written and ends[0] == len(sample.prompt)


# ---- The commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def command(folders, tmp_path, capsys):
    """Run a command on the tiny pair: (exit code, standard output, standard error)."""
    data = write_data(tmp_path / "data")

    def call(name, *more, slm=(folders[1],)):
        out = ("--out", tmp_path / "out") if "--out" not in more else ()
        line = [name, "--llm", folders[0], "--slm", *slm, "--device", "cpu", "--data", data, *out, *more]
        code = experiments.main([str(part) for part in line])
        return code, *capsys.readouterr()

    return call


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


SMALL = ("--task", "wikitext", "--prompt", 110, "--steps", 3, "--limit", 2)
ATTENTION = {
    "fig1b": ("--budget", 0.3), "fig1c": (), "fig8": (), "fig9": (), "table7": (), "table8": (), "table9": (),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_commands_write_rows_and_pictures(command, tmp_path, name):
    more = ATTENTION[name]
    code, out, err = command(name, *SMALL, *more)
    assert code == 0, err
    about = json.loads((tmp_path / "out" / "experiment.json").read_text())
    assert about["experiment"] == name and about["task"] == "wikitext" and about["commit"]
    assert len(rows_of(tmp_path / "out")) == 2 + (name == "fig1c") and name in out
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == (set() if name.startswith("table") else {f"{name}.png"})


def test_fig8_writes_what_figures_draws(command, tmp_path):
    command("fig8", *SMALL)
    content = json.loads((tmp_path / "out" / "similarity.json").read_text())
    rows = rows_of(tmp_path / "out")
    for kind in ("best", "jaccard", "cosine"):
        expected = (torch.tensor(rows[0][kind]) + torch.tensor(rows[1][kind])) / 2
        assert torch.allclose(torch.tensor(content[kind]), expected, atol=1e-4)


def test_a_run_that_is_stopped_keeps_its_rows(command, tmp_path, monkeypatch):
    real, calls = measures.mass_by_rank, []

    def stopped(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(measures, "mass_by_rank", stopped)
    code, _, err = command("fig2", *SMALL)
    assert code == 130 and err == "interrupted\n" and len(rows_of(tmp_path / "out")) == 1


def test_quality_commands_are_evaluate_s_runs(command, folders, tmp_path):
    code, out, err = command("fig2", *SMALL)
    assert code == 0, err
    assert "$ python evaluate.py wikitext" in out and "oracle" in out
    lines = (tmp_path / "out" / "dropped" / "results.jsonl").read_text().splitlines()
    found = {(row["method"], row["budget"]) for row in map(json.loads, lines)}
    assert found == {("full", 1.0), *((name, budget) for name in ("h2o", "oracle") for budget in (0.15, 0.05))}
    code, out, err = command("fig7", *SMALL, "--budget", 0.3, "--out", tmp_path / "scaling", slm=folders[::-1])
    assert code == 0, err
    rows = rows_of(tmp_path / "scaling")
    assert [row["slm"] for row in rows] == [str(folder) for folder in folders[::-1]]
    for number, row in enumerate(rows):
        path = next((tmp_path / "scaling").glob(f"{number}-*")) / "results.jsonl"
        scores = [json.loads(line)["score"] for line in path.read_text().splitlines()]
        assert row["scores"] == [[0.3, sum(scores) / len(scores)]]
    assert rows[1]["similarity"] == pytest.approx(1) and rows[1]["cache"] == 1  # the LLM as its own SLM


def test_the_frontier_names_what_nothing_beats(command, tmp_path):
    code, out, err = command("frontier", *SMALL, "--method", "window", "smallkv", "oracle", "--budget", 0.3)
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    kl = {name: sum(line["score"] for line in lines if line["method"] == name) for name in ("window", "smallkv")}
    expected = ["window", "smallkv"] if kl["smallkv"] < kl["window"] else ["window"]  # a window moves nothing
    assert f"0.3, on the frontier, by bytes moved: {', '.join(expected)}\n" in out
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"frontier.png", "frontier-quality.png"}


def test_table5_and_6_show_what_a_smaller_slm_loses(command, tmp_path):
    code, out, err = command("table5", *SMALL, "--slm-budget", 1, 0.3, "--markdown")
    assert code == 0, err
    rows = rows_of(tmp_path / "out")
    assert [row["slm_budget"] for row in rows] == [1, 0.3] * 2
    lines = (tmp_path / "out" / "answers" / "results.jsonl").read_text().splitlines()
    scores = {row["method"]: [] for row in map(json.loads, lines)}
    assert list(scores) == ["smallkv:slm_budget=1", "smallkv:slm_budget=0.3"] and "| 30% |" in out
    code, out, err = command("table6", *SMALL, "--layers", 2, 1, "--markdown", "--out", tmp_path / "stops")
    assert code == 0, err
    rows = rows_of(tmp_path / "stops")
    assert [(row["layers"], list(row["scores"])) for row in rows] == [(2, ["smallkv", "h2o"]), (1, ["smallkv"])]
    assert rows[0]["slm_share"] == 2 * rows[1]["slm_share"] and "| 1 of 2 |" in out and "| h2o |" in out


def test_the_case_study_shows_every_answer(command, tmp_path):
    more = ("--task", "bbh", "--subtask", "navigate", "--limit", 1, "--max-new-tokens", 4, "--budget", 0.5)
    code, out, err = command("fig10", *more, "--method", "full", "h2o", "smallkv")
    assert code == 0, err
    rows, page = rows_of(tmp_path / "out"), (tmp_path / "out" / "index.html").read_text()
    assert [row["method"] for row in rows] == ["full", "h2o", "smallkv"]
    for row in rows:
        assert studies.html.escape(row["answers"][0]) in page and row["method"] in out
    row = {"method": "m", "score": 0, "answers": ["<td>&"]}
    hostile = studies.case_page("<b>", "<i>", ["<u>"], {"x": "<s>"}, [row])
    assert "<td>&lt;td&gt;&amp;</td>" in hostile and not any(tag in hostile for tag in ("<b>", "<i>", "<u>", "<s>"))


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_every_command_for_the_paper_s_pair_is_understood(name, capsys):
    assert experiments.main([name, "--about"]) == 0
    out = capsys.readouterr().out
    experiment = experiments.EXPERIMENTS[name]
    for shown in experiment.commands:
        assert f"$ {shown}" in out
        loop = shown.partition("; do ")[2].partition(";")[0]
        tasks = shown.partition(" in ")[2].partition(";")[0].split() if loop else [""]
        for task in tasks:
            words = shlex.split((loop or shown).replace("$task", task))
            assert words[:3] == ["python", "experiments.py", name]
            args = experiments.parse(words[2:])
            given = studies.task_arguments(args, args.slm[0], args.out)  # evaluate.py's parser exits at what it rejects
            assert not task or given.task == task
            for method in getattr(args, "method", []):
                assert method.partition(":")[0] in METHODS


MISTAKES = {
    "--limit 0 should be": ("fig1b", "--limit", 0),
    "--tokens 50 is too few": ("fig1b", *SMALL, "--tokens", 50),
    "at least 100": ("fig1c", "--task", "gsm8k", "--limit", 1),
    "budget 1.5 is outside": ("fig1b", *SMALL, "--budget", 1.5),
    "unknown method 'h3o'": ("fig6", *SMALL, "--method", "h3o"),
    "fig7 takes one method": ("fig7", *SMALL, "--method", "h2o"),
    "fig10 takes one --budget": ("fig10", *SMALL, "--budget", 0.2, 0.1),
    "--sample 9 is none": ("fig10", *SMALL, "--sample", 9),
    "cannot read": ("fig8", *SMALL, "--file", "nothing.txt"),
    "SLM budget 2.0 is outside": ("table5", *SMALL, "--slm-budget", 2),
    "9 layers were asked for": ("table6", *SMALL, "--layers", 9),
    "table6 needs a method that has an SLM": ("table6", *SMALL, "--method", "h2o"),
    "give another --out": ("fig1c", *SMALL, "--out", "/proc/nothing"),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line(command, words):
    code, _, err = command(*MISTAKES[words])
    assert code == 2 and words in err and err.strip().count("\n") == 0, err


def test_one_slm_where_one_is_meant(command, folders):
    code, _, err = command("fig1b", *SMALL, slm=folders)
    assert code == 2 and err == "error: fig1b takes one --slm, not 2\n"


def test_the_list_names_every_command(capsys):
    assert experiments.main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(f"│ {name} " in out for name in experiments.EXPERIMENTS)
