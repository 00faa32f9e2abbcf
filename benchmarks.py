"""The benchmarks that come as files (Section 5.1): GSM8K, BBH, MT-Bench, LongBench, and the needle; and all tasks.

Where it sits: beside tasks.py, which says what a task is; metrics.py has the official metrics. Prompts are the official
ones, decoding is greedy as in the paper. --data names a folder with gsm8k/, bbh/, mt_bench/, longbench/, needle/ and
ruler/ in the layout of their origins.
"""

import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import metrics
from tasks import (
    RecallTask,
    Sample,
    Task,
    Wikitext,
    pick,
    read_json_file,
    read_lines,
    read_results,
    read_text_file,
)
from text import Text


class FileTask(Task):
    """One answer to one prompt."""

    answer_tokens: int | None  # at most, unless --max-new-tokens says otherwise

    def add_arguments(self, parser) -> None:
        official = self.answer_tokens or "the data set's own"
        parser.add_argument("--max-new-tokens", type=int, help=f"of an answer at most (default: {official})")

    def room(self, args, official: int | None = None) -> int:
        if args.max_new_tokens is not None and args.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {args.max_new_tokens} is too small; at least 1")
        return args.max_new_tokens or official or self.answer_tokens


def choose(asked: list[str], known: list[str], path: Callable[[str], Path]) -> list[str]:
    """The sub-tasks asked for; of all, those whose file is there, with a line on standard error for the others."""
    if unknown := [name for name in asked if name not in known and asked != ["all"]]:
        raise ValueError(f"unknown sub-task {unknown[0]!r}; supported: all, {', '.join(known)}")
    names = known if asked == ["all"] else asked
    missing = [name for name in names if not path(name).is_file()]
    if missing and (asked != ["all"] or missing == names):
        raise ValueError(f"no file {path(missing[0])}; name the folder of the data with --data")
    if missing:
        print(f"left out, no file in {path(missing[0]).parent}: {', '.join(missing)}", file=sys.stderr)
    return [name for name in names if name not in missing]


# ---- GSM8K -----------------------------------------------------------------------------------------------------------


class GSM8K(FileTask):
    """Grade-school problems, eight worked examples before each (Wei et al. 2022), as gsm8k_cot of lm-evaluation-harness
    had them: answers end at the next "Q:"."""

    name, metric, further, answer_tokens = "gsm8k", "strict", ("flexible",), 256
    help = "grade-school maths, 8-shot chain of thought"
    stops = ("Q:", "</s>", "<|im_end|>")

    def samples(self, args, text: Text, window: int) -> list[Sample]:
        folder = Path(args.data) / "gsm8k"
        shots = read_lines(folder / "cot_8shot.jsonl", ("question", "answer"))
        head = "".join(f"Q: {shot['question']}\n\nA: {shot['answer']}\n\n" for shot in shots)
        rows = list(enumerate(read_lines(folder / "test.jsonl", ("question", "answer"))))
        return [
            Sample(f"{i}", "", text.encode(f"{head}Q: {row['question']}\n\nA:"), answer_tokens=self.room(args),
                   facts={"target": metrics.gsm8k_target(row["answer"])})
            for i, row in pick(rows, args.limit, args.seed)
        ]  # fmt: skip

    def score(self, sample: Sample, answers: list[str]) -> dict:
        found = metrics.gsm8k_score(answers[0], sample.facts["target"])
        return {"score": float(found["strict"]), **found, **sample.facts, "given": answers[0]}


# ---- BBH -------------------------------------------------------------------------------------------------------------


class BBH(FileTask):
    """27 tasks that are hard for language models, three worked examples before each question (Suzgun et al. 2022); the
    score is the mean over tasks. Read and stopped as bbh_cot_fewshot of lm-evaluation-harness does it."""

    name, metric, macro, answer_tokens = "bbh", "exact match", True, 1024
    help = "BIG-Bench Hard, 3-shot chain of thought, 27 tasks"
    stops = ("</s>", "Q", "\n\n")

    def add_arguments(self, parser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--subtask", nargs="+", default=["all"], help="some of the 27 (default: all)")

    def samples(self, args, text: Text, window: int) -> list[Sample]:
        folder = Path(args.data) / "bbh"
        samples = []
        known = sorted(path.stem for path in (folder / "cot-prompts").glob("*.txt"))
        if not known:
            raise ValueError(f"no prompts in {folder / 'cot-prompts'}; name the folder of the data with --data")
        for name in choose(args.subtask, known, lambda name: folder / "tasks" / f"{name}.json"):
            shots = read_text_file(folder / "cot-prompts" / f"{name}.txt").partition("-----\n")[2].rstrip()
            path = folder / "tasks" / f"{name}.json"
            rows = read_json_file(path).get("examples", [])
            if not rows or any(not {"input", "target"} <= row.keys() for row in rows):
                raise ValueError(f"{path}: `examples` should be a list of objects with input and target")
            for i, row in pick(list(enumerate(rows)), args.limit, args.seed):
                prompt = f"{shots}\n\nQ: {row['input']}\nA: Let's think step by step.\n"
                facts = {"target": row["target"]}
                samples.append(Sample(f"{name}-{i}", name, text.encode(prompt), facts=facts,
                                      answer_tokens=self.room(args)))  # fmt: skip
        return samples

    def score(self, sample: Sample, answers: list[str]) -> dict:
        right = metrics.bbh_score(answers[0], sample.facts["target"])
        return {"score": float(right), **sample.facts, "given": answers[0]}


# ---- LongBench -------------------------------------------------------------------------------------------------------


class LongBench(FileTask):
    """21 sets of long texts with questions (Bai et al. 2024), cut in the middle to what the models can hold; the score
    is the mean over sets.

    --source full: longbench/data/*.jsonl, the original format; mini: longbench/minilongbench/*.jsonl, a choice of its
    samples with whole prompts (MiniLongBench). The original forbids samsum to begin with a newline; this does not.
    """

    name, metric, macro, answer_tokens = "longbench", "score", True, None
    help = "LongBench: long texts with questions, the official metric of each set"
    unwrapped = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")  # never in a chat template

    def add_arguments(self, parser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--subtask", nargs="+", default=["all"], help="some of the 21 (default: all)")
        parser.add_argument("--source", choices=("full", "mini"), default="full", help="which files (default: full)")
        parser.add_argument("--max-length", type=int, help="tokens of a prompt (default: what the models can hold)")
        parser.add_argument("--chat", action="store_true", help="in the checkpoint's chat template, where official")

    def samples(self, args, text: Text, window: int) -> list[Sample]:
        folder = Path(args.data) / "longbench"
        templates = read_json_file(folder / "config" / "dataset2prompt.json")
        longest = read_json_file(folder / "config" / "dataset2maxlen.json")
        files = folder / ("data" if args.source == "full" else "minilongbench")
        samples = []
        for name in choose(args.subtask, list(metrics.LONGBENCH), lambda name: files / f"{name}.jsonl"):
            needed = ("context", "input", "answers") if args.source == "full" else ("prompt", "answers")
            rows = list(enumerate(read_lines(files / f"{name}.jsonl", needed)))
            room = self.room(args, longest[name])
            if (args.max_length or window) <= room:
                raise ValueError(f"answers of {room} tokens leave no room in {args.max_length or window} positions")
            for i, row in pick(rows, args.limit, args.seed):
                prompt = row["prompt"] if args.source == "mini" else templates[name].format(**row)
                ids = cut_middle(text, prompt, min(args.max_length or window, window - room),
                                 chat=args.chat and name not in self.unwrapped)  # fmt: skip
                facts = {"answers": row["answers"], "classes": row.get("all_classes")}
                samples.append(Sample(f"{name}-{i}", name, ids, facts=facts, answer_tokens=room))
        return samples

    def score(self, sample: Sample, answers: list[str]) -> dict:
        facts = sample.facts
        score = metrics.longbench_score(sample.group, answers[0], facts["answers"], facts["classes"])
        return {"score": score, "answers": facts["answers"], "given": answers[0]}


def cut_middle(text: Text, prompt: str, length: int, chat: bool) -> list[int]:
    """The prompt as at most `length` tokens: its first and last halves. The cut text is tokenised anew, as in the
    original, and wrapped if `chat`; what that adds is taken off the halves."""

    def wrapped(words: str) -> list[int]:
        return text.chat(words) if chat else text.encode(words)

    bare = text.encode(prompt)
    ids, half = wrapped(prompt), length // 2
    while len(ids) > length:
        if half < 1:
            raise ValueError(f"--max-length {length} leaves no room for a prompt")
        ids = wrapped(text.decode(bare[:half]) + text.decode(bare[-half:]))
        half -= max(1, (len(ids) - length + 1) // 2)
    return ids


# ---- MT-Bench --------------------------------------------------------------------------------------------------------


class MTBench(FileTask):
    """80 questions and a second one after each answer (Zheng et al. 2023); the cache is kept between the turns.

    A judge rates the answers, so the score comes in two steps: a run writes judge_prompts.jsonl (id, system, prompt:
    FastChat's single-answer prompts, with reference answers for maths, reasoning and coding); put the judge's replies
    into judge_replies.jsonl beside it (id, reply: text with [[7]]), and `evaluate.py table` shows the mean rating.
    """

    name, metric, answer_tokens = "mtbench", "rating", 1024
    help = "MT-Bench: two turns on one cache; judge prompts are written, a judge's replies read"
    referenced = ("math", "reasoning", "coding")

    def samples(self, args, text: Text, window: int) -> list[Sample]:
        questions = read_lines(Path(args.data) / "mt_bench" / "question.jsonl", ("question_id", "category", "turns"))
        return [
            Sample(f"{row['question_id']}", row["category"], text.chat(row["turns"][0]),
                   [[], text.next_turn(row["turns"][1])], self.room(args), {"questions": row["turns"]})
            for row in pick(questions, args.limit, args.seed)
        ]  # fmt: skip

    def score(self, sample: Sample, answers: list[str]) -> dict:
        return {**sample.facts, "given": answers}

    def finish(self, args, samples: list[Sample], out: Path) -> None:
        folder = Path(args.data) / "mt_bench"
        prompts = {row["name"]: row for row in read_lines(folder / "judge_prompts.jsonl", ("name", "prompt_template"))}
        references = {
            f"{row['question_id']}": row["choices"][0]["turns"]
            for row in read_lines(folder / "reference_answer" / "gpt-4.jsonl", ("question_id", "choices"))
        }
        with (out / "judge_prompts.jsonl").open("w", encoding="utf-8") as file:
            for line in read_results(out / "results.jsonl"):
                for turn in (1, 2) if "error" not in line else ():
                    judge, words = self.judge(line, turn, prompts, references)
                    row = {"id": judge_id(line, turn), "system": judge["system_prompt"], "prompt": words}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def judge(self, line: dict, turn: int, prompts: dict, references: dict) -> tuple[dict, str]:
        """The judge's prompt for one turn: which of FastChat's, and its words."""
        told = line["group"] in self.referenced
        judge = prompts[f"single{'-math' * told}-v1{'-multi-turn' * (turn == 2)}"]
        questions, given = line["questions"], line["given"]
        words = {"question": questions[0], "answer": given[0]}
        words |= {"question_1": questions[0], "question_2": questions[1], "answer_1": given[0], "answer_2": given[1]}
        if told:
            words |= {f"ref_answer_{i}": answer for i, answer in enumerate(references[line["sample"]], 1)}
        return judge, judge["prompt_template"].format(**words)

    def complete(self, path: Path, rows: list[dict]) -> list[dict]:
        file = path / "judge_replies.jsonl"
        replies = read_lines(file, ("id", "reply")) if file.is_file() else []
        ratings = {row["id"]: metrics.judge_rating(row["reply"]) for row in replies}
        for line in rows:
            found = (ratings.get(judge_id(line, turn)) for turn in (1, 2))
            line["ratings"] = [rating for rating in found if rating is not None]
        return rows

    def parts(self, line: dict) -> list[tuple[str, float]]:
        return [(line["group"], rating) for rating in line["ratings"]]


def judge_id(line: dict, turn: int) -> str:
    return f"{line['method']} {line['budget']:g} {line['sample']} turn {turn}"


# ---- Needle ----------------------------------------------------------------------------------------------------------

LOOKS = ("amber", "broken", "distant", "gentle", "hollow", "marble", "quiet", "silver")
THINGS = ("anchor", "bridge", "candle", "lantern", "meadow", "orchard", "pebble", "window")


class Needle(FileTask):
    """A number in one sentence among Paul Graham's essays, at every depth of every length: RULER's niah_single_2 with
    depths that are chosen, and its score (the number is in the answer). RULER lets a model write 128 tokens; 32 hold
    the number."""

    name, metric, answer_tokens = "needle", "found", 32
    help = "needle in a haystack: depth x length"

    def add_arguments(self, parser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 1536], help="of prompt and answer")
        parser.add_argument("--depths", type=int, nargs="+", default=[0, 25, 50, 75, 100], help="in percent")
        parser.add_argument("--repeats", type=int, default=1, help="samples of each depth and length (default: 1)")
        parser.add_argument("--chat", action="store_true", help="in the checkpoint's chat template")

    def samples(self, args, text: Text, window: int) -> list[Sample]:
        if any(not 0 <= depth <= 100 for depth in args.depths):
            raise ValueError(f"--depths {args.depths} should be percents, from 0 to 100")
        template = read_json_file(Path(args.data) / "ruler" / "task_templates.json")["niah"]
        essays = read_json_file(Path(args.data) / "needle" / "PaulGrahamEssays.json")["text"]
        sentences = re.split(r"(?<=[.!?]) ", " ".join(essays.split()))
        samples = []
        for length in args.lengths:
            for depth in args.depths:
                for i in range(args.repeats):
                    rng = random.Random(f"{args.seed}-{length}-{depth}-{i}")
                    ids, value = self.hide(rng, sentences, template, text, length - self.room(args), depth, args.chat)
                    facts = {"length": length, "depth": depth, "value": value}
                    group = f"length {length:6,}, depth {depth:3} %"
                    name = f"{length}-{depth}-{i}"
                    samples.append(Sample(name, group, ids, facts=facts, answer_tokens=self.room(args)))
        return pick(samples, args.limit, args.seed)

    def hide(self, rng, sentences: list[str], template: dict, text: Text, length: int, depth: int, chat: bool):
        """A prompt of at most `length` tokens with as many sentences as there is room for; and the number in it."""
        key, value = f"{rng.choice(LOOKS)}-{rng.choice(THINGS)}", str(rng.randint(10**6, 10**7 - 1))
        needle = f"One of the special magic numbers for {key} is: {value}."
        start = rng.randrange(len(sentences))
        words = template["template"].replace("Some", "A").replace("are all", "is").replace("are", "is")
        prefix = template["answer_prefix"].replace("are", "is").format(type_needle_v="number", query=key)

        def prompt(count: int) -> list[int]:
            hay = [sentences[(start + i) % len(sentences)] for i in range(count)]
            hay.insert(int(count * depth / 100), needle)
            question = words.format(type_needle_v="number", context=" ".join(hay), query=key)
            if not chat:
                return text.encode(question + prefix)
            return text.chat(question) + text.tokenizer.encode(prefix.lstrip(), add_special_tokens=False).ids

        least, most = 0, length  # a sentence has at least one token
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if len(prompt(middle)) <= length else (least, middle - 1)
        if len(ids := prompt(least)) > length:
            raise ValueError(f"--lengths: the question alone has {len(ids)} tokens, more than {length}")
        return ids, value

    def score(self, sample: Sample, answers: list[str]) -> dict:
        found = metrics.needle_score(answers[0], sample.facts["value"])
        return {"score": float(found), **sample.facts, "given": answers[0]}


TASKS: dict[str, Task] = {
    task.name: task for task in (RecallTask(), Wikitext(), Needle(), GSM8K(), BBH(), LongBench(), MTBench())
}
