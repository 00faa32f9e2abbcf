"""hub.py with a stub in the network's place: the published forms become the very files they were made from."""

import io
import json
import urllib.request
import zipfile
from pathlib import Path

import huggingface_hub
import pytest

import hub
from benchmarks import TASKS
from evaluate import main
from test_tasks import write_data, write_pair

parquet = pytest.importorskip("pyarrow.parquet")
YAML = """
task: gsm8k_cot
fewshot_config:
  sampler: first_n
  samples:
"""


def as_parquet(rows: list[dict]) -> bytes:
    import pyarrow

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def published(data: Path, source: str) -> bytes:
    """What stands at a source, made from a folder of data by the inverse of what hub.py does."""
    name = source.rsplit("/", 1)[1]
    if "wikitext" in source:
        split = "test" if "test-" in name else "valid"
        lines = (data / "wikitext-2" / f"{split}.txt").read_text().splitlines(keepends=True)
        return as_parquet([{"text": line if line.strip() else ""} for line in lines])
    if "openai/gsm8k" in source:
        return as_parquet(read_rows(data / "gsm8k" / "test.jsonl"))
    if name == "gsm8k-cot.yaml":
        shots = read_rows(data / "gsm8k" / "cot_8shot.jsonl")
        rows = (f"  - question: {json.dumps(r['question'])}\n    target: {json.dumps(r['answer'])}\n" for r in shots)
        return (YAML + "".join(rows)).encode()
    if "lukaemon/bbh" in source:
        path = data / "bbh" / "tasks" / f"{source.split('/')[2]}.json"
        return as_parquet(json.loads(path.read_text())["examples"])
    if name == "data.zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("data/", b"")
            for path in (data / "longbench" / "data").glob("*.jsonl"):
                archive.writestr(f"data/{path.name}", path.read_bytes())
        return buffer.getvalue()
    if name == "constants.py":
        return f"'''RULER'''\nTASKS = {json.loads((data / 'ruler' / 'task_templates.json').read_text())!r}\n".encode()
    return next(data.rglob(name)).read_bytes()


@pytest.fixture
def data(tmp_path):
    data = write_data(tmp_path / "data")
    for split in ("test", "valid"):  # lines as the tokenised form has them, empty ones too
        (data / "wikitext-2" / f"{split}.txt").write_text(f" \n = A {split} = \n \n Some words , and a “ sign . \n" * 3)
    return data


@pytest.fixture
def network(data, tmp_path, monkeypatch):
    """The hub and the web, serving what `data` holds; every call is written down."""
    calls = []

    def serve(source):
        calls.append(source)
        try:
            return published(data, source)
        except (StopIteration, FileNotFoundError):  # write_data makes few of the sub-tasks
            return published(data, source.replace(source.split("/")[2], "navigate")) if "lukaemon" in source else b"x\n"

    def download(repository, path, repo_type):
        assert repo_type == "dataset"
        file = tmp_path / "downloaded"
        file.write_bytes(serve(f"{repository}/{path}"))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(serve(url)))
    return calls


SAME = {
    "wikitext": ["wikitext-2/test.txt", "wikitext-2/valid.txt"],
    "gsm8k": ["gsm8k/test.jsonl", "gsm8k/cot_8shot.jsonl"],
    "bbh": ["bbh/tasks/navigate.json", "bbh/cot-prompts/navigate.txt"],
    "longbench": ["longbench/config/dataset2prompt.json", "longbench/config/dataset2maxlen.json"],
    "mtbench": ["mt_bench/question.jsonl", "mt_bench/reference_answer/gpt-4.jsonl", "mt_bench/judge_prompts.jsonl"],
    "needle": ["needle/PaulGrahamEssays.json", "ruler/task_templates.json"],
}


def content(path: Path):
    """What a file says, whatever the spaces in its JSON."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    return read_rows(path) if path.suffix == ".jsonl" else path.read_text()


@pytest.mark.parametrize("task", SAME)
def test_what_is_published_becomes_the_folder(task, data, network, tmp_path):
    folder = hub.fetch("hub", task, tmp_path / "cache")
    assert network and set(hub.SOURCES) == set(TASKS) - {"recall"} == set(SAME)
    unpacked = [f"longbench/data/{p.name}" for p in (data / "longbench" / "data").glob("*.jsonl")]
    for name in SAME[task] + unpacked * (task == "longbench"):
        assert content(folder / name) == content(data / name), name
    asked = len(network)
    assert asked == len(hub.SOURCES[task])
    hub.fetch("hub", task, tmp_path / "cache")
    assert len(network) == asked  # nothing is fetched twice
    assert not list(folder.rglob("*.part"))


def test_a_hub_data_set_that_is_a_folder(data, monkeypatch, tmp_path):
    given = []

    def snapshot(repository, **options):
        given.append((repository, options))
        return str(data)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert hub.fetch("owner/sets@v1", "needle") == data
    patterns = ["needle/PaulGrahamEssays.json", "ruler/*"]
    assert given == [("owner/sets", {"repo_type": "dataset", "revision": "v1", "allow_patterns": patterns})]
    assert hub.fetch(data, "needle") == data and hub.fetch("hub", "recall") is None and len(given) == 1
    for missing in ("../nowhere", "/a/b", "~/x", "a/b/c"):
        assert hub.fetch(missing, "needle") == Path(missing) and len(given) == 1


def test_the_command_runs_on_what_was_fetched(data, network, tmp_path, monkeypatch, capsys):
    llm, slm = write_pair(tmp_path)
    monkeypatch.setattr(hub.fetch, "__defaults__", (tmp_path / "cache",))
    lines = []
    for source in ("hub", data):
        out = tmp_path / f"run{len(lines)}"
        words = ["gsm8k", "--llm", llm, "--slm", slm, "--device", "cpu", "--data", source, "--method", "full"]
        words += ["--out", out, "--max-new-tokens", 3, "--limit", 1]
        assert main([str(word) for word in words]) == 0, capsys.readouterr().err
        lines.append((out / "results.jsonl").read_text())
    assert lines[0] == lines[1]
    assert json.loads((tmp_path / "run0" / "run.json").read_text())["arguments"]["data"] == "hub"


def test_offline_is_one_line(data, tmp_path, monkeypatch, capsys):
    def nothing(*given, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand much more")

    llm, slm = write_pair(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", nothing)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    monkeypatch.setattr(hub.fetch, "__defaults__", (tmp_path / "cache",))
    for source, what in (("hub", "openai/gsm8k/main/test-00000-of-00001.parquet"), ("owner/sets", "owner/sets")):
        words = ["gsm8k", "--llm", llm, "--slm", slm, "--device", "cpu", "--data", source, "--out", tmp_path / "run"]
        assert main([str(word) for word in words]) == 2
        expected = f"error: cannot fetch {what} (no connection); check the network, or name a folder with --data\n"
        assert capsys.readouterr().err == expected
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
