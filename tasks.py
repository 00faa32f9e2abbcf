"""What a task is, how a batch answers it, and the two tasks that are ours: recall and wikitext-2.

Where it sits: samples -> **task** -> decode.Session under a policy -> figures of each sample -> evaluate.py, which
writes them down. The paper's benchmarks (Section 5.1) and the needle are in benchmarks.py.

`converse` is how every task but wikitext runs: the prompt is prefilled, then for each turn some tokens are fed through
decode steps and the answer is generated greedily, on one kept cache. A batch keeps in step, one token a sequence, while
each sequence is at its own place in its own conversation.
"""

import json
import math
import random
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from corpus import Recall, read_text
from decode import Session, Timing
from generate import PAIR, Pair, check_caches_fit
from match import WINDOW_MIN
from recall import exact
from report import make_report
from smallkv import SmallKV
from text import Text

PROSE = PAIR / "prose.txt"  # a book that the embedded pair has not seen
ANSWER_TOKENS = 32  # of a recall answer; the longest right ones have about 25
STOP_TAIL = 8  # tokens that a stop string is looked for in: none is longer


@dataclass(frozen=True)
class Sample:
    """One sample as token ids. turns: what is fed before each answer (the first may be empty: it follows the prompt).

    answer_tokens: the most that one answer may take. facts: what the score needs.
    """

    id: str
    group: str  # what tables tell apart: kind, sub-task, category
    prompt: list[int]
    turns: list[list[int]] = field(default_factory=lambda: [[]])
    answer_tokens: int = 0
    facts: dict = field(default_factory=dict)

    @property
    def new_tokens(self) -> int:
        """The most that may come after the prompt."""
        return sum(map(len, self.turns)) + self.answer_tokens * len(self.turns)


class Task:
    """A task: its samples, how they are run, and what the figures of many samples make together."""

    name: str
    help: str
    metric: str  # what tables call the mean of `score`
    further: tuple[str, ...] = ()  # figures whose means tables show beside it
    macro = False  # the mean over groups of their means, not over samples
    stops: tuple[str, ...] = ()  # an answer ends before the first of these
    default_limit: int | None = None
    default_batch = 8
    fixed_limit = False  # a run may not go on with another --limit: the samples depend on it

    def add_arguments(self, parser) -> None:
        """Flags of this task alone."""

    def samples(self, args, text: Text, window: int) -> list[Sample]:
        """The samples, the same for one seed; `window` is how many positions the LLM has."""
        raise NotImplementedError

    def score(self, sample: Sample, answers: list[str]) -> dict:
        """Figures of one sample as JSON types; `score` is the one that tables show."""
        raise NotImplementedError

    def run(self, pair: Pair, policy, samples: list[Sample]) -> list[dict]:
        """Figures of a batch under one policy."""
        session = open_session(policy, samples)
        answers = converse(session, samples, pair.text, self.stops)
        moved = _movement(session)
        known = [{**moved, **_similarity(policy, b)} for b in range(len(samples))]
        return [{**self.score(s, a), **more} for s, a, more in zip(samples, answers, known)]

    def finish(self, args, samples: list[Sample], out: Path) -> None:
        """After a run: what else belongs into its folder."""

    def complete(self, path: Path, rows: list[dict]) -> list[dict]:
        """Lines of results with what was added to the run's folder later, as a judge's scores are."""
        return rows

    def parts(self, line: dict) -> list[tuple[str, float]]:
        """(group, score) pairs that one line of results stands for."""
        return [(line["group"], line["score"])]

    def summary(self, lines: list[dict]) -> dict[str, float]:
        """What many lines make together, the metric of the table first."""
        by_group: dict[str, list[float]] = {}
        for group, score in (part for line in lines for part in self.parts(line)):
            by_group.setdefault(group, []).append(score)
        scores = [score for group in by_group.values() for score in group]
        if not scores:
            return {}
        if self.macro:
            scores = [mean(group) for group in by_group.values()]
        further = (*self.further, "moved_bytes")
        known = {name: [line[name] for line in lines if name in line] for name in further}
        return {self.metric: mean(scores), **{name: mean(values) for name, values in known.items() if values}}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _similarity(policy, b: int) -> dict:
    """Mean similarity of the matched heads of sequence b, where the policy matches any."""
    found = policy.maps[b] if policy.maps else None
    return {} if found is None else {"similarity": found.similarity.mean().item()}


def _movement(session: Session, critical: float = 0.0) -> dict:
    """What came from the offloaded tier, where there is one; the first plan, which fills the slots, does not count.

    moved_bytes: a step and sequence, mean of the batch. moved, if `critical` is given, the critical tokens of all
    steps: how many of these came, as a share.
    """
    rows, config = make_report(session, Timing())["moved"], session.llm.config
    if rows is None:
        return {}
    share = {"moved": rows["critical"] / (critical * config.layers * config.kv_heads)} if critical else {}
    return {**share, "moved_bytes": rows["bytes"] / max(1, rows["steps"]) / len(session.prompts)}


# ---- conversations ---------------------------------------------------------------------------------------------------


class _Voice:
    """One sequence of a batch: what it is fed next, and the answers it has given."""

    def __init__(self, sample: Sample, text: Text, stops: tuple[str, ...]):
        self.text, self.stops, self.limit = text, stops, sample.answer_tokens
        self.turns = deque(sample.turns)
        self.fed = deque(self.turns.popleft())
        self.ids: list[int] = []  # of the answer that is being given
        self.answers: list[str] = []
        self.done = False

    def next(self, likeliest: int) -> int:
        """The token to feed, when the model has just found `likeliest` the most likely one."""
        if self.fed:
            return self.fed.popleft()
        if self.done:
            return likeliest  # it keeps its place in the batch, and its tokens go nowhere
        stopped = likeliest in self.text.stop
        if not stopped:
            self.ids.append(likeliest)
            tail = self.text.decode(self.ids[-STOP_TAIL:])
            if not any(stop in tail for stop in self.stops) and len(self.ids) < self.limit:
                return likeliest
        answer = self.text.decode(self.ids)
        ends = [at for at in (answer.find(stop) for stop in self.stops) if at >= 0]
        self.answers.append(answer[: min(ends, default=len(answer))])
        self.ids, self.done = [], not self.turns
        if self.done:
            return likeliest
        self.fed.extend(self.turns.popleft())
        # The next turn brings its own newline and end-of-turn marks; all else of the answer stays in the cache.
        ended_by_mark = stopped or "\n" in self.text.decode([likeliest])
        return self.fed.popleft() if ended_by_mark else likeliest


def open_session(policy, samples: list[Sample]) -> Session:
    """A session of a batch with room for its turns and answers. CheckpointError if its caches do not fit."""
    prompts = [sample.prompt for sample in samples]
    room = max(sample.new_tokens for sample in samples)
    check_caches_fit(policy, [len(prompt) for prompt in prompts], max(map(len, prompts)) + room)
    return Session(policy, prompts, room)


@torch.inference_mode()
def converse(
    session: Session, samples: list[Sample], text: Text, stops: tuple[str, ...] = ()
) -> list[list[str]]:  # fmt: skip
    """The answers of each sample, one a turn, without what ended them. Greedy: the paper's setting."""
    voices = [_Voice(sample, text, stops) for sample in samples]
    logits = session.prefill()
    while True:
        tokens = [voice.next(token) for voice, token in zip(voices, logits.argmax(-1).tolist())]
        if all(voice.done for voice in voices):
            return [voice.answers for voice in voices]
        logits = session.step(tokens)


# ---- recall ----------------------------------------------------------------------------------------------------------


class RecallTask(Task):
    """The embedded pair's own: facts hidden in prose that the pair has not seen, asked for turn by turn (recall.py).

    Words, wordings and people are the test split's; the document is prefilled, the questions are decode steps.
    """

    name, metric, stops = "recall", "exact", (".", "\n")
    help = "held-out recall documents: every turn's answer must be right"
    default_limit, default_batch = 50, 25  # its models are small: a step of 25 takes little longer than one of 8

    def add_arguments(self, parser) -> None:
        parser.add_argument("--prose", type=Path, default=PROSE, help="held-out text (.txt or .txt.xz)")
        parser.add_argument("--length", type=int, default=1000, help="tokens of a document (default: 1000)")
        parser.add_argument("--turns", type=int, default=4, help="questions a document (default: 4)")

    def samples(self, args, text: Text, window: int) -> list[Sample]:
        if args.turns < 1 or args.length < 1:
            raise ValueError(f"--turns {args.turns} and --length {args.length} should both be at least 1")
        source = Recall.from_books([read_text(args.prose)], text.tokenizer, "test", args.turns)
        samples = []
        for i in range(args.limit):
            seed = f"evaluation-{i}" if args.seed == 0 else f"evaluation-{args.seed}-{i}"
            document = source.document(random.Random(seed), args.length)
            asked = document.segment_ids[-2 * len(document.turns) :: 2]
            turns = [{"kind": t.kind, "depth": t.depth, "answer": t.answer} for t in document.turns]
            samples.append(Sample(seed, "", document.prompt_ids, asked, ANSWER_TOKENS, {"turns": turns}))
        return samples

    def score(self, sample: Sample, answers: list[str]) -> dict:
        turns = [
            {**turn, "given": given, "exact": exact(turn["answer"], given, turn["kind"])}
            for turn, given in zip(sample.facts["turns"], answers, strict=True)
        ]
        return {"score": sum(turn["exact"] for turn in turns) / len(turns), "turns": turns}

    def parts(self, line: dict) -> list[tuple[str, float]]:
        return [(turn["kind"], float(turn["exact"])) for turn in line["turns"]]


# ---- wikitext-2 ------------------------------------------------------------------------------------------------------


class Wikitext(Task):
    """Teacher forcing: `--prompt` tokens are prefilled, `--steps` more are fed one by one.

    At every step the prediction is compared with the full cache's on the same tokens: loss of the true next token,
    KL(full || method), agreement of the most likely token. moved: critical tokens that come from the offloaded tier a
    step, as a share of the critical ones.
    """

    name, metric, further, fixed_limit = "wikitext", "KL", ("agreement", "moved"), True
    help = "perplexity and KL to the full cache on wikitext-2, teacher-forced"
    default_limit = 8

    def add_arguments(self, parser) -> None:
        parser.add_argument("--prompt", type=int, default=512, help="tokens that are prefilled (default: 512)")
        parser.add_argument("--steps", type=int, default=128, help="tokens that are fed one by one (default: 128)")
        parser.add_argument("--file", default="wikitext-2/test.txt", help="text inside --data")

    def samples(self, args, text: Text, window: int) -> list[Sample]:
        """Windows spread evenly over the file."""
        if args.prompt < WINDOW_MIN or args.steps < 2:
            raise ValueError(f"--prompt should be at least {WINDOW_MIN} and --steps at least 2")
        path, length = Path(args.data) / args.file, args.prompt + args.steps + 1
        ids = text.encode(read_text_file(path))
        if len(ids) < args.limit * length:
            raise ValueError(f"{path} has {len(ids)} tokens, too few for {args.limit} samples of {length}")
        stride = (len(ids) - length) // max(1, args.limit - 1)
        starts = [i * stride for i in range(args.limit)]
        return [
            Sample(f"{at}", "", ids[at : at + args.prompt], [ids[at + args.prompt : at + length - 1]], 0,
                   {"targets": ids[at + args.prompt + 1 : at + length]})
            for at in starts
        ]  # fmt: skip

    @torch.inference_mode()
    def run(self, pair: Pair, policy, samples: list[Sample]) -> list[dict]:
        steps = len(samples[0].turns[0])
        given = [sample.turns[0] for sample in samples]
        session = open_session(policy, samples)
        session.prefill()
        full = self.full_logits(pair, samples)  # (B, steps, V)
        sums = torch.zeros(3, len(samples), dtype=torch.float64)  # loss, KL, agreement of each sample
        critical = 0.0  # slots in use, mean over layers and KV heads, summed over sequences and steps but the first
        for i in range(steps):
            logits = session.step([tokens[i] for tokens in given]).float()  # (B, V), gone with the next step
            reference = full[:, i, : logits.shape[-1]].log_softmax(-1)
            target = torch.tensor([sample.facts["targets"][i] for sample in samples], device=logits.device)
            predicted = logits.log_softmax(-1)
            sums[0] += F.nll_loss(predicted, target, reduction="none").cpu()
            sums[1] += F.kl_div(predicted, reference, log_target=True, reduction="none").sum(-1).cpu()
            sums[2] += (predicted.argmax(-1) == reference.argmax(-1)).cpu()
            if i and isinstance(policy, SmallKV):
                critical += sum(policy.cache.tokens(b)["critical"] for b in range(len(samples)))
        moved = _movement(session, critical)
        return [
            {"score": kl, "loss": loss, "agreement": same, **moved, **_similarity(policy, b)}
            for b, (loss, kl, same) in enumerate((sums / steps).T.tolist())
        ]

    @staticmethod
    def full_logits(pair: Pair, samples: list[Sample]) -> torch.Tensor:
        """The full cache's predictions after each teacher-forced token: (B, steps, V) fp32."""
        rows = []
        for sample in samples:
            ids = torch.tensor([sample.prompt + sample.turns[0]], device=pair.llm.device)
            rows.append(pair.llm(ids)[0, len(sample.prompt) :].float())
        return torch.stack(rows)

    def summary(self, lines: list[dict]) -> dict[str, float]:
        figures = super().summary(lines)
        perplexity = {"perplexity": math.exp(mean([line["loss"] for line in lines]))}
        return {self.metric: figures.pop(self.metric), **perplexity, **figures}


# ---- files -----------------------------------------------------------------------------------------------------------


def read_text_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; name the folder of the data with --data") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None


def read_json_file(path: Path) -> dict:
    try:
        content = json.loads(read_text_file(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, not a {type(content).__name__}")
    return content


def read_lines(path: Path, needed: tuple[str, ...]) -> list[dict]:
    """The objects of a .jsonl file, each with at least the keys `needed`; ValueError names the line that is not so."""
    rows = []
    for number, line in enumerate(read_text_file(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); mend or remove the line") from None
        missing = [key for key in needed if not isinstance(row, dict) or key not in row]
        if missing:
            raise ValueError(f"{path}, line {number}: no {', '.join(map(repr, missing))}; mend or remove the line")
        rows.append(row)
    return rows


def read_results(path: Path) -> list[dict]:
    """Whole lines of a results.jsonl; a last one that a killed run left unfinished does not count."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); remove the line and run again") from None
    return rows


def pick(rows: list, limit: int | None, seed: int) -> list:
    """The first `limit` rows; with a seed other than 0, that many at random."""
    count = len(rows) if limit is None else min(limit, len(rows))
    return rows[:count] if seed == 0 else random.Random(seed).sample(rows, count)
