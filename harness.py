"""Public benchmarks through lm-evaluation-harness (lm_eval): its tasks and scores, our sessions.

    python evaluate.py lm-eval --tasks gsm8k_cot bbh_cot_fewshot --llm DIR --slm DIR --method full smallkv --budget 0.2
    python evaluate.py lm-eval --tasks longbench_trec longbench_multi_news --data DATA --chat ...

Where it sits: above evaluate.py, in place of samples.py: the harness makes prompts and scores, a method answers. The
paper's GSM8K, BBH and LongBench (Section 5.1) are its gsm8k_cot, bbh_cot_fewshot and longbench_*. A sub-task is a
column of the table; no mean is taken over BBH's (the harness's own mean is weighted by size). It needs
requirements-eval.txt; without --data the harness downloads its sets.
"""

from itertools import groupby
from pathlib import Path

import lm_eval
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from tqdm import tqdm

import command
from evaluate import RESULT, cell_name, make_policy_from
from generate import Pair
from samples import Sample, converse, open_session, without_middle

# As LongBench asks: prompts that show how it is done, and code, stand outside of a chat.
NEVER_CHAT = ("longbench_fewshot_tasks", "longbench_code_tasks")
LOST = {  # what the harness's LongBench templates lost at their end, or between context and question
    "triviaqa": ("{{context}}\n{{", "{{context}}\n\n{{"), "samsum": ("{{context}}\n{{", "{{context}}\n\n{{"),
    "passage_count": " ", "passage_retrieval_en": " ", "lcc": "\n", "repobench-p": "\n",
}  # fmt: skip


# ---- The model -------------------------------------------------------------------------------------------------------


class SmallKVModel(TemplateLM):
    """What the harness calls a model: one method at one budget. Greedy."""

    def __init__(self, pair: Pair, spec: str, budget: float, batch: int = 8):
        super().__init__()
        self.pair, self.spec, self.budget, self.batch, self.text = pair, spec, budget, batch, pair.text
        self.most = min(model.config.max_positions for model in (pair.llm, pair.slm) if model is not None)

    @property
    def eot_token_id(self) -> int:
        return min(self.text.stop)

    @property
    def tokenizer_name(self) -> str:
        return "smallkv"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if add_special_tokens is None:  # a chat template has written the begin-of-text token already
            begin = self.text.special.get("bos_token")
            add_special_tokens = not (begin and string.startswith(begin))
        return self.text.words(string, add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.text.template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        return self.text.render(chat_history, add_generation_prompt)

    def cut(self, ids: list[int], room: int) -> list[int]:
        """A prompt beside `room` tokens of answer: one that is too long loses its middle, as in LongBench."""
        most = self.most - room
        if most < 2:
            raise ValueError(f"an answer of {room} tokens leaves no room for a prompt in {self.most} positions")
        return without_middle(ids, most)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Answers without the stop string that ended them; batches of prompts of like length."""
        samples, answers = [], [""] * len(requests)
        for i, request in enumerate(requests):
            context, options = request.args
            options = normalize_gen_kwargs(options, 256)
            ids = self.cut(self.tok_encode(context), options["max_gen_toks"])
            facts = {"stops": tuple(stop for stop in options["until"] if stop)}
            samples.append(Sample(str(i), "", ids, answer_tokens=options["max_gen_toks"], facts=facts))
        samples.sort(key=lambda sample: (sample.facts["stops"], sample.answer_tokens, -len(sample.prompt)))
        with tqdm(total=len(samples), desc=f"{self.spec} {self.budget:g}", disable=disable_tqdm or None) as bar:
            for (stops, _), same in groupby(samples, lambda s: (s.facts["stops"], s.answer_tokens)):
                same = list(same)
                for batch in (same[at : at + self.batch] for at in range(0, len(same), self.batch)):
                    session = open_session(make_policy_from(self.spec, self.pair, self.budget), batch)
                    for sample, (answer,) in zip(batch, converse(session, batch, self.text, stops)):
                        answers[int(sample.id)] = answer
                        self.cache_hook.add_partial("generate_until", requests[int(sample.id)].args, answer)
                    bar.update(len(batch))
        return answers

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """The context is prefilled, the continuation fed by steps: only these see the compressed cache."""
        found = []
        for strings, context, wanted in tqdm(requests, disable=disable_tqdm or None):
            sample = Sample("", "", self.cut(context, len(wanted)), [wanted])
            session = open_session(make_policy_from(self.spec, self.pair, self.budget), [sample])
            rows = [session.prefill().clone(), *(session.step([token]).clone() for token in wanted[:-1])]
            logits = torch.cat(rows).float().log_softmax(-1).cpu()  # (n, V)
            picked = logits.gather(-1, torch.tensor(wanted)[:, None]).sum().item()
            found.append((picked, logits.argmax(-1).tolist() == wanted))
            self.cache_hook.add_partial("loglikelihood", strings, found[-1])
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        raise ValueError("perplexity of whole texts is not asked through the harness; use evaluate.py kl --file TEXT")


# ---- Tasks -----------------------------------------------------------------------------------------------------------


def leaves(manager: TaskManager, names: list[str]) -> list[str]:
    """The tasks that groups and tags stand for. ValueError names one that the harness does not know."""
    found = []
    for name in names:
        entry = manager.task_index.get(name)
        if entry is None:
            raise ValueError(f"unknown task {name!r}; `lm_eval ls tasks` prints those that the harness has")
        inner = sorted(entry.tags) if entry.kind is Kind.TAG else (entry.cfg or {}).get("task")
        if isinstance(inner, list):
            found += leaves(manager, [one if isinstance(one, str) else one["task"] for one in inner])
        else:
            found.append(name)
    return list(dict.fromkeys(found))


def official(docs):
    """LongBench's own files say `input` where the harness's templates say `question`."""
    return docs.rename_column("input", "question") if "input" in docs.column_names else docs


def task_spec(manager: TaskManager, name: str, data: Path | None) -> str | dict:
    """A task as the harness takes it; with a data folder its file there in place of the download: gsm8k/test.jsonl,
    bbh/tasks/NAME.json, longbench/data/NAME.jsonl, as these sets are published."""
    changed, kind = {}, name.partition("_")[0]
    own = name.removeprefix("longbench_")
    if kind == "longbench" and own in LOST:
        text, lost = manager.task_index[name].cfg["doc_to_text"], LOST[own]
        # An expression, as a template loses white space at its end.
        changed["doc_to_text"] = text.replace(*lost) if isinstance(lost, tuple) else text + "{{" + repr(lost) + "}}"
    if data is not None:
        files = {"gsm8k": data / "gsm8k" / "test.jsonl", "longbench": data / "longbench" / "data" / f"{own}.jsonl",
                 "bbh": data / "bbh" / "tasks" / f"{name.rpartition('fewshot_')[2]}.json"}  # fmt: skip
        if kind not in files:
            raise ValueError(f"--data has files for gsm8k, bbh and longbench, not for {name}; leave it out there")
        if not files[kind].is_file():
            raise ValueError(f"no file {files[kind]} for task {name}; name the folder that has it with --data")
        found = {"data_files": {"test": str(files[kind])}, **({"field": "examples"} if kind == "bbh" else {})}
        changed |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": found}
        if kind == "longbench":
            changed["process_docs"] = official
    return {"task": name, **changed} if changed else name


def run(args, pair: Pair, cells: list[tuple[str, float, float]]) -> None:
    """cells: of evaluate.make_cells. results.jsonl gets a line a sample, task, method and budget, METHOD@BUDGET.json
    the harness's own figures. What was answered before a call was killed is in cache/METHOD@BUDGET and is not asked
    again."""
    manager, path = TaskManager(), args.out / "results.jsonl"
    names = leaves(manager, args.tasks)
    specs = {False: [], True: []}  # by whether they are asked in a chat
    for name in names:
        chat = args.chat and not set(NEVER_CHAT) & manager.task_index[name].tags
        specs[chat].append(task_spec(manager, name, args.data))
    for spec, budget, own in cells:
        model, name, lines, figures = SmallKVModel(pair, spec, own, args.batch), cell_name(spec, budget), [], {}
        for chat, tasks in specs.items():
            if tasks:
                found = lm_eval.simple_evaluate(
                    model, tasks=[{"group": "asked", "task": tasks}], limit=args.limit,
                    use_cache=str(args.out / "cache" / f"{name}-{int(chat)}"),
                    apply_chat_template=chat, task_manager=manager, bootstrap_iters=0,
                )  # fmt: skip
                figures |= found["results"]
                lines += [line for task, rows in found["samples"].items() for line in _lines(task, rows)]
        about = {"method": spec, "budget": budget, "llm_budget": own}
        before = command.read_lines(path, RESULT, torn=True)
        others = [row for row in before if (row["method"], row["budget"]) != (spec, budget)]
        command.write_lines(path, [*others, *({**about, **line} for line in lines)])
        command.write_json(args.out / f"{name}.json", figures)


def _lines(task: str, rows: list[dict]) -> list[dict]:
    """Logged samples of a task as lines of results; a task may have several ways to read an answer."""
    lines, several = [], len({row["filter"] for row in rows}) > 1
    for row in rows:
        metric = next(name for name in ("score", *row["metrics"]) if name in row)
        group = f"{task}, {row['filter']}" if several else task
        lines.append({"sample": f"{task}-{row['doc_id']}", "group": group, "score": float(row[metric]),
                      "metric": metric, "given": row["filtered_resps"]})  # fmt: skip
    return lines
