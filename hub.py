"""Where the benchmarks' files come from when --data names no folder: fetched once, laid out as benchmarks.py reads.

    python evaluate.py gsm8k --data hub                 # each data set from where it is published
    python evaluate.py gsm8k --data owner/name          # a hub data set that is such a folder (@revision after it)

Where it sits: before benchmarks.py; evaluate.py and studies.py ask `fetch` for a folder and know no more. Questions are
on the hub; worked examples, prompt templates and judge prompts are not, and come from their repositories. Nothing is
fetched twice: a file that is there is taken as it is.
"""

import ast
import io
import json
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

CACHE = Path("~/.cache/smallkv-data")  # of --data hub; the hub's own cache keeps what it downloads, too
GITHUB = "https://raw.githubusercontent.com/"
BBH = (
    "boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies "
    "geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects "
    "logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting "
    "penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks "
    "sports_understanding temporal_sequences tracking_shuffled_objects_five_objects "
    "tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting"
).split()
FOLDERS = {  # what a task reads, below the folder of the data
    "wikitext": ("wikitext-2/*",), "gsm8k": ("gsm8k/*",), "bbh": ("bbh/*",), "longbench": ("longbench/*",),
    "mtbench": ("mt_bench/*",), "needle": ("needle/PaulGrahamEssays.json", "ruler/*"),
}  # fmt: skip


# ---- What arrives, as the files that benchmarks.py reads: bytes -> {name: bytes} -------------------------------------


def rows(content: bytes) -> list[dict]:
    """The rows of a parquet file."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError("--data hub needs the package pyarrow, which is not here: pip install pyarrow") from None
    return parquet.read_table(io.BytesIO(content)).to_pylist()


def as_lines(found: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found).encode()


def as_text(content: bytes) -> bytes:
    """wikitext: a row a line with its end; an empty line, " \\n" in the original, has lost its own there."""
    return "".join(row["text"] or " \n" for row in rows(content)).encode()


def as_examples(content: bytes) -> bytes:
    return json.dumps({"examples": rows(content)}, ensure_ascii=False).encode()


def as_shots(content: bytes) -> bytes:
    """The worked examples of lm-evaluation-harness's task file."""
    import yaml  # huggingface-hub brings it

    samples = yaml.safe_load(content)["fewshot_config"]["samples"]
    return as_lines([{"question": row["question"], "answer": row["target"]} for row in samples])


def as_templates(content: bytes) -> bytes:
    """RULER's constants.py has them in one dictionary of literals."""
    tree = ast.parse(content)
    found = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "TASKS")
    return json.dumps(ast.literal_eval(next(found))).encode()


def members(content: bytes) -> dict[str, bytes]:
    """LongBench's archive: data/*.jsonl."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [name for name in archive.namelist() if name.endswith(".jsonl")]
        return {f"longbench/data/{Path(name).name}": archive.read(name) for name in names}


# ---- Where from: a task -> (file below the folder, source, what makes it) --------------------------------------------
# A source is a URL or "owner/name/path" of a hub data set. No maker: the file as it is; no file: the maker names them.


def wikitext(split: str) -> str:
    return f"Salesforce/wikitext/wikitext-2-v1/{split}-00000-of-00001.parquet"


HARNESS, FASTCHAT = f"{GITHUB}EleutherAI/lm-evaluation-harness/main/", f"{GITHUB}lm-sys/FastChat/main/"
JUDGE, LONG = f"{FASTCHAT}fastchat/llm_judge/data/", f"{GITHUB}THUDM/LongBench/main/LongBench/config/"
SOURCES: dict[str, list[tuple[str | None, str, Callable | None]]] = {
    "wikitext": [("wikitext-2/test.txt", wikitext("test"), as_text),
                 ("wikitext-2/valid.txt", wikitext("validation"), as_text)],
    "gsm8k": [("gsm8k/test.jsonl", "openai/gsm8k/main/test-00000-of-00001.parquet", lambda c: as_lines(rows(c))),
              ("gsm8k/cot_8shot.jsonl", f"{HARNESS}lm_eval/tasks/gsm8k/gsm8k-cot.yaml", as_shots)],
    "bbh": [(f"bbh/tasks/{name}.json", f"lukaemon/bbh/{name}/test-00000-of-00001.parquet", as_examples) for name in BBH]
    + [(f"bbh/cot-prompts/{name}.txt", f"{GITHUB}suzgunmirac/BIG-Bench-Hard/main/cot-prompts/{name}.txt", None)
       for name in BBH],
    "longbench": [(None, "THUDM/LongBench/data.zip", members),
                  *((f"longbench/config/{name}.json", f"{LONG}{name}.json", None)
                    for name in ("dataset2prompt", "dataset2maxlen"))],
    "mtbench": [("mt_bench/question.jsonl", f"{JUDGE}mt_bench/question.jsonl", None),
                ("mt_bench/reference_answer/gpt-4.jsonl", f"{JUDGE}mt_bench/reference_answer/gpt-4.jsonl", None),
                ("mt_bench/judge_prompts.jsonl", f"{JUDGE}judge_prompts.jsonl", None)],
    "needle": [("needle/PaulGrahamEssays.json", f"{GITHUB}ByteDance-Seed/ShadowKV/main/data/ruler/synthetic/json/"
                "PaulGrahamEssays.json", None),
               ("ruler/task_templates.json", f"{GITHUB}NVIDIA/RULER/main/scripts/data/synthetic/constants.py",
                as_templates)],
}  # fmt: skip


# ---- Fetching --------------------------------------------------------------------------------------------------------


def fetch(data: str | Path | None, task: str, cache: Path = CACHE) -> Path | None:
    """The folder of a task's data: `data` itself if it is one, else downloaded; None: the task needs none. ValueError
    if it needs some and `data` is None."""
    if task not in SOURCES:
        return None
    if data is None:
        needed = f"{task} reads files; name a folder with {FOLDERS[task][0]}, or hub to fetch them"
        raise ValueError(f"--data is missing: {needed}")
    name = str(data)
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    if name == "hub":
        return published(task, cache.expanduser())
    owner = name.partition("/")[0]
    if name.count("/") != 1 or owner in ("", ".", "..", "~"):
        return Path(name)  # a folder that is missing: whoever reads it says which file
    from huggingface_hub import snapshot_download  # imported late: it takes a second, and folders need it not

    repository, _, revision = name.partition("@")
    options = {"repo_type": "dataset", "revision": revision or None, "allow_patterns": list(FOLDERS[task])}
    return Path(tried(name, lambda: snapshot_download(repository, **options)))


def tried(what: str, work: Callable):
    """What `work` returns; ValueError says in one line what could not be fetched and why."""
    try:
        return work()
    except OSError as error:  # the hub's errors and urllib's are OSErrors
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"cannot fetch {what} ({cause}); check the network, or name a folder with --data") from None


def published(task: str, folder: Path) -> Path:
    """Everything that a task reads, from where it is published, below `folder`."""
    for file, source, make in SOURCES[task]:
        mark = folder / (file or f"{FOLDERS[task][0].partition('/')[0]}/data/.complete")
        if mark.is_file():
            continue
        content = tried(source, lambda: read(source))
        files = make(content) if file is None else {file: make(content) if make else content}
        for name, made in files.items():
            write(folder / name, made)
        if file is None:
            write(mark, b"")
    return folder


def read(source: str) -> bytes:
    if source.startswith("https://"):
        with urllib.request.urlopen(source, timeout=60) as reply:
            return reply.read()
    from huggingface_hub import hf_hub_download

    owner, name, path = source.split("/", 2)
    return Path(hf_hub_download(f"{owner}/{name}", path, repo_type="dataset")).read_bytes()


def write(path: Path, content: bytes) -> None:
    """All of it or nothing: a fetch that is killed leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)
