"""What is asked of a method, and how a batch answers it: samples, conversations, figures of each sample.

Where it sits: a text or a data file -> **samples** (token ids) -> decode.Session under a policy -> figures, which
evaluate.py writes down. Here is what Section 5 measures and no library has: KL and perplexity on a text or along the
full cache's answers to prompts, facts in a text asked for one by one (recall), the needle over depth and length,
MT-Bench's two turns on one kept cache.

Shapes follow the legend in model.py.
"""

import random
import re
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import cycle, islice, product

import torch
import torch.nn.functional as F
from tqdm import tqdm

from command import read_json, read_lines, read_text
from decode import Policy, Session, Timing, check_positions, generate
from generate import Pair, check_caches_fit
from model import Decoder
from report import make_report
from training.recall import Recall, exact

WINDOWS = 8  # samples of a text, if no number is given
RECALL_TOKENS = 32  # of an answer; the longest right ones have about 25
STOP_TAIL = 8  # newest tokens of an answer in which a stop string is looked for
NEEDLE = "The secret number of the {key} is {value}."
QUESTION = "A secret number stands somewhere in this text:\n\n{text}\n\nWhat is the secret number of the {key}?"
ANSWER = " The secret number of the {key} is"
LOOKS = ("amber", "broken", "distant", "gentle", "hollow", "marble", "quiet", "silver")
THINGS = ("anchor", "bridge", "candle", "lantern", "meadow", "orchard", "pebble", "window")


# ---- Samples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One sample as token ids. group: what tables tell apart. turns: what is fed before each answer (empty: the answer
    follows what is there). answer_tokens: of one answer, at most. facts: what the score needs."""

    id: str
    group: str
    prompt: list[int]
    turns: list[list[int]] = field(default_factory=lambda: [[]])
    answer_tokens: int = 0
    facts: dict = field(default_factory=dict)

    @property
    def new_tokens(self) -> int:
        """The most that may come after the prompt."""
        return sum(map(len, self.turns)) + self.answer_tokens * len(self.turns)


def kl_samples(args, pair: Pair) -> list[Sample]:
    """Windows spread evenly over the file: --prompt tokens to prefill, --steps to feed; targets, what follows each."""
    if args.file.endswith(".jsonl"):
        return prompt_samples(args, pair)
    if args.chat:
        raise ValueError(f"--chat is for prompts, a file of JSON lines, and {args.file} is a text; leave it out")
    ids, length, count = pair.text.encode(read_text(args.file)), args.prompt + args.steps + 1, args.limit or WINDOWS
    if len(ids) < count * length:
        raise ValueError(f"{args.file} has {len(ids)} tokens, too few for --limit {count} samples of {length}")
    starts = [i * ((len(ids) - length) // max(1, count - 1)) for i in range(count)]
    cuts = [(at, at + args.prompt, at + length - 1) for at in starts]
    return [Sample(f"{a}", "", ids[a:b], [ids[b:c]], facts={"targets": ids[b + 1 : c + 1]}) for a, b, c in cuts]


def prompt_samples(args, pair: Pair) -> list[Sample]:
    """Lines of JSON with a `prompt`, and a `group` for a column of its own: what is fed is the full cache's own greedy
    answer of --steps tokens, which does not end at a stop token. A prompt of more than --prompt tokens loses its
    middle."""
    prompts, rows = [], read_lines(args.file, ("prompt",))[: args.limit]
    if not rows:
        raise ValueError(f"{args.file} has no prompts")
    for number, row in enumerate(rows, 1):
        if not isinstance(row["prompt"], str) or not row["prompt"].strip():
            raise ValueError(f"{args.file}: prompt {number} is {row['prompt']!r:.40}, not a text")
        ids = without_middle(pair.text.encode(row["prompt"]), args.prompt)
        prompts.append(pair.text.chat(pair.text.decode(ids)) if args.chat else ids)
    return answered(pair.llm, prompts, [str(row.get("group", "")) for row in rows], args.steps, args.batch)


def without_middle(ids: list[int], most: int) -> list[int]:
    """A prompt of at most `most` tokens: one that is too long loses its middle, as in LongBench."""
    return ids if len(ids) <= most else ids[: most // 2] + ids[len(ids) - (most - most // 2) :]


def answered(llm: Decoder, prompts: list[list[int]], groups: list[str], steps: int, size: int) -> list[Sample]:
    """Samples that follow the full cache's own greedy answers, `steps` tokens after the first, in batches of `size`."""
    check_positions((llm,), list(map(len, prompts)), steps + 1)
    answers = []
    for at in tqdm(range(0, len(prompts), size), desc="the full cache's answers", unit="batch", disable=None):
        answers += generate(Policy(llm), prompts[at : at + size], steps + 1)
    both = zip(prompts, groups, answers)
    return [Sample(f"{i}", group, prompt, [ids[:-1]], facts={"targets": ids[1:]})
            for i, (prompt, group, ids) in enumerate(both)]  # fmt: skip


def recall_samples(args, pair: Pair) -> list[Sample]:
    """Facts hidden in prose that the embedded pair has not seen, with held-out words and people; a question a turn."""
    source, samples = Recall.from_books([read_text(args.file)], pair.text.tokenizer, "test", args.turns), []
    for i in range(args.limit):
        name = f"evaluation-{args.seed}-{i}" if args.seed else f"evaluation-{i}"
        document = source.document(random.Random(name), args.length)
        asked = document.segment_ids[-2 * len(document.turns) :: 2]
        turns = [{"kind": turn.kind, "depth": turn.depth, "answer": turn.answer} for turn in document.turns]
        samples.append(Sample(name, "", document.prompt_ids, asked, RECALL_TOKENS, {"turns": turns}))
    return samples


def needle_samples(args, pair: Pair) -> list[Sample]:
    """A number in one sentence among a text's own, at every depth of every length (of prompt and answer together)."""
    words = read_json(args.file).get("text") if args.file.endswith(".json") else read_text(args.file)
    if not isinstance(words, str) or not words.strip():
        raise ValueError(f"{args.file} has no text to hide a number in; a .json file should have it under the key text")
    sentences, samples = re.split(r"(?<=[.!?]) ", " ".join(words.split())), []
    for length, depth, i in product(args.lengths, args.depths, range(args.repeats)):
        rng, room = random.Random(f"{args.seed}-{length}-{depth}-{i}"), length - args.max_new_tokens
        key, value = f"{rng.choice(LOOKS)} {rng.choice(THINGS)}", str(rng.randint(10**6, 10**7 - 1))
        start, begun = rng.randrange(len(sentences)), ANSWER.format(key=key)

        def prompt(count: int) -> list[int]:
            hay = list(islice(cycle(sentences), start, start + count))
            hay.insert(count * depth // 100, NEEDLE.format(key=key, value=value))
            question = QUESTION.format(text=" ".join(hay), key=key)
            if args.chat:
                return pair.text.chat(question) + pair.text.words(begun.lstrip())
            return pair.text.encode(question + begun)

        count = bisect_right(range(room + 1), room, key=lambda count: len(prompt(count))) - 1  # sentences that fit
        if count < 0:
            raise ValueError(f"--lengths {length} leaves {room} tokens for a prompt, not enough for the question")
        name, facts = f"{length}-{depth}-{i}", {"length": length, "depth": depth, "value": value}
        samples.append(Sample(name, f"{length} {depth}%", prompt(count), [[]], args.max_new_tokens, facts))
    return samples


def mtbench_samples(args, pair: Pair) -> list[Sample]:
    """FastChat's question.jsonl: a question, and the next one after its answer."""
    samples = []
    for row in read_lines(args.file, ("question_id", "category", "turns"))[: args.limit]:
        name, asked = row["question_id"], row["turns"]
        if not isinstance(name, int) or not isinstance(asked, list) or not asked or {*map(type, asked)} != {str}:
            raise ValueError(f"{args.file}: question {name!r} needs a number and turns of text, not {asked!r:.40}")
        turns = [[], *map(pair.text.next_turn, asked[1:])]
        facts = {"questions": asked}
        samples.append(Sample(f"{name}", row["category"], pair.text.chat(asked[0]), turns, args.max_new_tokens, facts))
    return samples


# A task: how its samples are made, what the mean of its scores is called, which strings end an answer, what it is.
TASKS = {
    "kl": (kl_samples, "KL", (), "KL to the full cache and perplexity on a text, or along its answers to prompts"),
    "recall": (recall_samples, "right", (".", "\n"), "facts in a text, asked for one by one: the embedded pair's task"),
    "needle": (needle_samples, "found", (), "a number hidden in a text, over depth and length"),
    "mtbench": (mtbench_samples, "", (), "MT-Bench's answers on one kept cache, for FastChat's judge"),
}


def load_samples(task: str, pair: Pair, args) -> list[Sample]:
    """The samples of a task, the same for the same flags. ValueError if one is longer than the models' positions."""
    samples = TASKS[task][0](args, pair)[: args.limit]
    most = min(model.config.max_positions for model in (pair.llm, pair.slm) if model is not None)
    for sample in samples:
        if (total := len(sample.prompt) + sample.new_tokens) > most:
            raise ValueError(f"sample {sample.id} of {task} needs {total} positions, and the models have {most}")
    return samples


# ---- A batch ---------------------------------------------------------------------------------------------------------


def _voice(sample: Sample, text, stops: tuple[str, ...], answers: list[str]):
    """One sequence of a conversation: is sent the token that the model finds the most likely, yields the one to feed;
    its answers go into `answers`, without what ended them."""
    added = text.tokenizer.get_added_tokens_decoder().items()
    marks = {*text.stop, *(i for i, token in added if token.special and token.content in stops)}
    likeliest, fed = (yield), True
    for turn in sample.turns:
        if not fed:  # what is recorded of an answer is in the context of the next turn
            likeliest = yield likeliest
        for token in turn:
            likeliest = yield token
        ids: list[int] = []
        while likeliest not in marks:
            ids.append(likeliest)
            tail = text.decode(ids[-STOP_TAIL:])
            if len(ids) == sample.answer_tokens or any(stop in tail for stop in stops):
                break
            likeliest = yield likeliest
        # A turn brings its own end-of-turn marks, and the newline that is a stop string.
        fed = likeliest in marks or "\n" in stops and text.decode([likeliest]).lstrip(" ").startswith("\n")
        answer = text.decode(ids)
        answers.append(answer[: min((answer.find(stop) for stop in stops if stop in answer), default=len(answer))])
    while True:  # it keeps its place in the batch, and its tokens go nowhere
        likeliest = yield likeliest


@torch.inference_mode()
def converse(session: Session, samples: list[Sample], text, stops: tuple[str, ...] = ()) -> list[list[str]]:
    """The answers of each sample, one a turn. Greedy: the paper's setting.

    The prompts are prefilled; turns and answers go through decode steps on one kept cache. The batch keeps in step, one
    token a sequence, while each sequence is at its own place in its own conversation.
    """
    answers: list[list[str]] = [[] for _ in samples]
    voices = [_voice(sample, text, stops, own) for sample, own in zip(samples, answers)]
    for voice in voices:
        next(voice)
    logits = session.prefill()
    while True:
        tokens = [voice.send(token) for voice, token in zip(voices, logits.argmax(-1).tolist())]
        if all(len(own) == len(sample.turns) for sample, own in zip(samples, answers)):
            return answers
        logits = session.step(tokens)


@torch.inference_mode()
def teacher_force(session: Session, samples: list[Sample]) -> list[dict]:
    """Of each sample, means over its steps: score, KL(full || method) of the next token in nats; loss of the true one;
    agreement of the most likely one. The full cache's predictions are one forward pass over the same tokens."""
    llm, turns = session.llm, [sample.turns[0] for sample in samples]
    session.prefill()
    whole = [torch.tensor([sample.prompt + sample.turns[0]], device=llm.device) for sample in samples]
    full = torch.stack([llm(ids)[0, -len(turns[0]) :].float() for ids in whole])  # (B, steps, V)
    sums = torch.zeros(3, len(samples), dtype=torch.float64)
    for i in range(len(turns[0])):
        predicted = session.step([tokens[i] for tokens in turns]).float().log_softmax(-1)  # (B, V)
        reference = full[:, i, : predicted.shape[-1]].log_softmax(-1)
        target = torch.tensor([sample.facts["targets"][i] for sample in samples], device=llm.device)
        sums[0] += F.kl_div(predicted, reference, log_target=True, reduction="none").sum(-1).cpu()
        sums[1] += F.nll_loss(predicted, target, reduction="none").cpu()
        sums[2] += (predicted.argmax(-1) == reference.argmax(-1)).cpu()
    return [{"score": kl, "loss": loss, "agreement": same} for kl, loss, same in (sums / len(turns[0])).T.tolist()]


def score(task: str, sample: Sample, answers: list[str]) -> dict:
    """Figures of one sample as JSON types; MT-Bench's answers have no score here, a judge rates them."""
    if task == "recall":
        turns = [{**turn, "given": given, "exact": exact(turn["answer"], given, turn["kind"])}
                 for turn, given in zip(sample.facts["turns"], answers, strict=True)]  # fmt: skip
        return {"score": sum(turn["exact"] for turn in turns) / len(turns), "turns": turns}
    found = {"score": float(sample.facts["value"] in answers[0])} if task == "needle" else {}
    return {**found, **sample.facts, "given": answers}


def open_session(policy: Policy, samples: list[Sample]) -> Session:
    """A session of a batch with room for its turns and answers. CheckpointError if its caches do not fit."""
    prompts, room = [sample.prompt for sample in samples], max(sample.new_tokens for sample in samples)
    check_caches_fit(policy, [len(prompt) for prompt in prompts], max(map(len, prompts)) + room)
    return Session(policy, prompts, room)


def run_batch(task: str, pair: Pair, policy: Policy, samples: list[Sample]) -> list[dict]:
    """Figures of each sample. Of SmallKV's also moved_bytes, what comes from the offloaded tier in a step for a
    sequence (mean of the batch; the first plan, which fills the slots, does not count), and similarity, the mean of the
    matched heads'."""
    session = open_session(policy, samples)
    if task == "kl":
        figures = teacher_force(session, samples)
    else:
        answers = converse(session, samples, pair.text, TASKS[task][2])
        figures = [score(task, *both) for both in zip(samples, answers)]
    if rows := make_report(session, Timing())["moved"]:
        for own, found in zip(figures, policy.maps):
            own["moved_bytes"] = rows["bytes"] / max(1, rows["steps"]) / len(samples)
            own.update({"similarity": found.similarity.mean().item()} if found else {})
    return figures
