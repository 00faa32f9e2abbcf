"""Recall tasks in plain English, hidden in real prose: the text on which dropping cache entries hurts.

Where it sits: text -> **training.recall** -> training.data, and the recall task of evaluate.py. The words and wordings,
and which of them only tests use, are in training.words.

A document is consecutive prose with facts ("Margaret keeps the brass key in the tall cupboard.") scattered over it,
then turns: one question with its short answer after the other. Every turn needs another fact, so what matters shifts
while decoding; the kinds count, collect and sum need several facts at once, the other seven kinds one.

The facts of a document come from one *scene*, a handful of people, things and places: they resemble one another, and
more are told than asked for. No two tasks of a document share a key (who or what the question is about).

Every segment of a document begins with a space or a newline, save the first. A byte-level BPE without prefix space
never merges across such a border, so the segments encoded one by one are the encoding of the whole text.
"""

import math
import random
import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from tokenizers import Tokenizer

from training.words import (
    ANSWERS,
    ANY_ORDER,
    DEEDS,
    KEYS,
    KINDS,
    PEOPLE,
    VOCABULARIES,
    WEIGHTS,
    Vocabulary,
    held_out,
    opened,
    plural,
    unseen_words,
    with_article,
    worn,
)

Encode = Callable[[list[str]], list[list[int]]]  # texts -> token ids, one list per text

SLACK = 40  # a prompt may fall this many tokens short of the length asked for
ATTEMPTS = 50  # draws before giving up
MAX_PIECE = 160  # tokens; longer pieces of prose are left out, as facts stand between pieces
CHUNK = 10_000  # pieces encoded at a time: the tokenizer's own records are far larger than the ids kept
RECALL_CHARS = 12_000_000  # of prose between facts; cutting books into sentences takes a second per 2 MB
TOKENS_A_TURN = 36  # of prompt that a question needs, so that the facts fit in
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Limits:
    """How hard the tasks are. A pair is a range, both ends included."""

    people: int = 6  # in a scene; the fewer, the more alike the facts
    goods: int = 7  # in a scene, for collect tasks
    nouns: int = 3  # of every other pool in a scene: "key", "lamp", "cup"
    looks: int = 2  # first words to each noun: "brass key", "old key"
    count: tuple[int, int] = (1, 3)  # people, each in a fact, of a count task
    collect: tuple[int, int] = (2, 2)  # facts of a collect task
    parts: tuple[int, int] = (2, 2)  # facts of a sum task
    amount: tuple[int, int] = (2, 5)  # in one fact of a sum task; from 2, so that the noun is a plural
    digits: tuple[int, int] = (3, 4)  # of a code
    extra: tuple[float, float] = (3, 7)  # facts never asked for, per 1,000 tokens of prompt; at least 2
    fact_share: float = 0.6  # of the prompt at most; the rest is prose


LIMITS = Limits()
DENSE = Limits(fact_share=0.95)  # training documents may be nearly all facts: the more questions, the sooner learnt


class Fact(NamedTuple):
    key: tuple  # the task it belongs to: kind, then what the question is about
    value: str  # what it adds to the answer
    text: str  # the sentence, with a space before it


class Task(NamedTuple):
    key: tuple
    slots: dict
    facts: list[Fact]
    question: str
    answer: str


class Turn(NamedTuple):
    question: str  # "\nQuestion: ...?\nAnswer:"
    answer: str  # " The brass key is in the tall cupboard."
    kind: str
    depth: float  # where the last fact it needs begins, as a share of the prompt's tokens
    key: tuple


@dataclass(frozen=True)
class Document:
    """One document. `segments` are (text, is_answer): prose and facts, then a question and an answer for every turn."""

    segments: list[tuple[str, bool]]
    segment_ids: list[list[int]]
    turns: list[Turn]
    facts: list[Fact]  # in order of mention

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.segments)

    @property
    def prompt(self) -> str:
        """All that comes before the first question."""
        return "".join(text for text, _ in self.segments[: -2 * len(self.turns)])

    @property
    def prompt_ids(self) -> list[int]:
        return [i for ids in self.segment_ids[: -2 * len(self.turns)] for i in ids]

    @property
    def kinds(self) -> list[str]:
        return [turn.kind for turn in self.turns]


def encoder(tokenizer: Tokenizer) -> Encode:
    return lambda texts: [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


# ---- prose ----


class Piece(NamedTuple):
    text: str  # a sentence or a few, with the space or blank line before it
    ids: array
    people: frozenset[str]  # names in it that facts may use too


@dataclass(frozen=True)
class Prose:
    """Real text in pieces between which facts may stand. Built once, used for any number of documents."""

    pieces: list[Piece]
    starts: list[int]  # pieces that begin a paragraph
    lexicon: tuple[list[str], list[str]]  # its words, and those that are always capitalised, less those held out

    @classmethod
    def from_text(cls, text: str, tokenizer: Tokenizer) -> "Prose":
        texts = []
        for paragraph in re.split(r"\n\s*\n", text):
            kept = [piece for piece in _pieces(" ".join(paragraph.split())) if _is_prose(piece)]
            texts += [(" " if i else "\n\n") + piece for i, piece in enumerate(kept)]
        # Neither plurals, which the wordings would double, nor the words that only begin a sentence with a capital.
        words = {word for text in texts for word in re.findall(r"[A-Za-z][a-z]{2,9}", text)} - unseen_words()
        common = sorted(word for word in words if word[0].islower() and word[-1] != "s")
        proper = sorted(w for w in words if w[0].isupper() and w.lower() not in words and w not in PEOPLE)
        encode, names = encoder(tokenizer), frozenset(PEOPLE) | frozenset(proper)
        pieces = []
        for at in range(0, len(texts), CHUNK):
            chunk = texts[at : at + CHUNK]
            for piece, ids in zip(chunk, encode(chunk), strict=True):
                if len(ids) <= MAX_PIECE:
                    pieces.append(Piece(piece, array("i", ids), names.intersection(re.findall(r"[A-Z][a-z]+", piece))))
        return cls(pieces, [i for i, piece in enumerate(pieces) if piece.text[0] == "\n"], (common, proper))

    def take(self, rng: random.Random, encode: Encode, people: set[str], length: int) -> list[tuple[str, list[int]]]:
        """Consecutive pieces of `length` tokens, from a random paragraph on. Left out are those with a name of the
        facts, which might contradict them, and near the end those that are too long for what is left."""
        start, taken = rng.choice(self.starts), []
        for i in range(len(self.pieces)):
            piece = self.pieces[(start + i) % len(self.pieces)]
            if not people.isdisjoint(piece.people):
                continue
            text, ids = piece.text, piece.ids
            if not taken:  # the document begins here: no blank line before it
                text = text.lstrip()
                ids = encode([text])[0]
            if len(ids) <= length:
                taken.append((text, list(ids)))
                length -= len(ids)
                if length <= SLACK:
                    return taken
        raise ValueError(f"the prose ({len(self.pieces)} pieces) is too short: {length} tokens are missing")


def _pieces(paragraph: str) -> list[str]:
    """Sentences; those of one quotation stay together, so that no fact lands in someone's speech."""
    end, title = r"(?:(?<=[.!?])|(?<=[.!?][\"”’]))", r"(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.)(?<!\b[A-Z]\.)"
    pieces, piece = [], ""
    for sentence in re.split(end + title + r" (?=[\"“‘]?[A-Z])", paragraph):
        piece += (" " if piece else "") + sentence
        single = piece.count("‘") - len(re.findall(r"’(?!\w)", piece))  # ’ before a letter is an apostrophe
        if piece.count('"') % 2 == 0 and piece.count("“") <= piece.count("”") and single <= 0:
            pieces.append(piece)
            piece = ""
    return pieces + [piece] * bool(piece)


def _is_prose(piece: str) -> bool:
    """Sentences only, no headings; nothing that could be taken for a fact or a turn; no digits, as codes have them."""
    return (
        bool(re.fullmatch(r"[\"“‘]?[A-Z][^\d\[\]<>|]{18,}[.!?][\"”’]?", piece))
        and not piece.isupper()
        and not re.search(r"Question|Answer|\bcode\b|belongs? to", piece)
    )


# ---- tasks ----


def _listed(things: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return ", ".join(things[:-1]) + " and " * (len(things) > 1) + things[-1]


def _values(
    rng: random.Random, kind: str, slots: dict, scene: dict, test: bool, limits: Limits
) -> tuple[list[str], str]:
    """What each fact of a task says, and the answer they make together."""
    if kind == "count":
        names = rng.sample(scene["who"], rng.randint(*limits.count))
        return names, f"{_listed(names)}, in all {NUMBERS[len(names) - 1]}"
    if kind == "collect":
        goods = [with_article(good) for good in rng.sample(scene["good"], rng.randint(*limits.collect))]
        return goods, _listed(goods)
    if kind == "sum":
        # No amounts are held out: what a test asks for is to find them, not to add what was never added. They differ,
        # as goods and names do: from two equal ones nobody could tell which fact an answer has missed.
        low, high = limits.amount
        amounts = rng.sample(range(low, high + 1), rng.randint(*limits.parts))
        parts = [str(amount) for amount in amounts]
        return parts, f"{' and '.join(parts)}, in all {sum(amounts)}"
    if kind == "code":
        code = ""
        while not code or held_out(*map(int, code)) != test:
            digits = rng.randint(*limits.digits)
            code = str(rng.randrange(10 ** (digits - 1), 10**digits))
        return [code], code
    value = {
        "where": slots["place"],
        "owner": slots["who"],
        "dish": slots["dish"],
        "home": slots["town"],
        "trade": with_article(slots["trade"]),
        "gift": with_article(slots["thing"]),
    }[kind]
    return [value], value


def _task(
    rng: random.Random, kind: str, scene: dict, vocabulary: Vocabulary, words: list[str], limits: Limits,
    near: Task | None = None,
) -> Task:  # fmt: skip
    """One task with its facts. `near`: another of this kind; the new one differs from it in one slot of its key.
    words: what training puts in place of some words of its statements; none for tests."""
    slots = {name: rng.choice(pool) for name, pool in scene.items()}
    slots["who"], slots["whom"] = rng.sample(scene["who"], 2)
    if kind in DEEDS:
        slots["deed"] = rng.choice(DEEDS[kind])
    if near is not None:
        changed = rng.choice(KEYS[kind])
        slots |= {name: near.slots[name] for name in KEYS[kind] if name != changed}
    key = (kind, *(slots[name] for name in KEYS[kind]))
    values, answer = _values(rng, kind, slots, scene, vocabulary.split == "test", limits)
    do, did = slots.get("deed", ("", ""))
    forms = slots | {"do": do, "did": did, "fruits": plural(slots["fruit"]), "units": plural(slots["unit"])}
    wordings = vocabulary.statements[kind]
    chosen = rng.sample(wordings * (len(values) // len(wordings) + 1), len(values))
    chosen = [worn(rng, wording, words) for wording in chosen]
    chosen = [opened(rng, wording, vocabulary.statement_openers) for wording in chosen]
    facts = [Fact(key, v, " " + wording.format(value=v, **forms)) for v, wording in zip(values, chosen, strict=True)]
    question = opened(rng, rng.choice(vocabulary.questions[kind]), vocabulary.question_openers).format(**forms)
    answer = ANSWERS[kind].format(value=answer, **forms)
    return Task(key, slots, facts, f"\nQuestion: {question}\nAnswer:", f" {answer}")


def _tasks(
    rng: random.Random, vocabulary: Vocabulary, lexicon, kinds: tuple[str, ...], turns: int, length: int,
    limits: Limits,
) -> tuple[list[Task], list[Task], set[str]]:
    """The tasks asked, those only told, and the people of the scene. First told are neighbours of those asked."""
    scene = vocabulary.scene(rng, limits.people, limits.goods, limits.nouns, limits.looks, lexicon)
    weights = [WEIGHTS.get(kind, 1.0) for kind in kinds]
    words = lexicon[0] if vocabulary.split == "train" else []
    asked: dict[tuple, Task] = {}
    for _ in range(ATTEMPTS * turns):
        task = _task(rng, rng.choices(kinds, weights)[0], scene, vocabulary, words, limits)
        asked.setdefault(task.key, task)
        if len(asked) == turns:
            break
    else:
        raise ValueError(f"no {turns} different questions of the kinds {', '.join(kinds)} in one scene")
    missing = max(2, round(rng.uniform(*limits.extra) * length / 1000))
    told: dict[tuple, Task] = {}
    for near in [*asked.values(), *[None] * ATTEMPTS]:
        if missing <= 0:
            break
        task = _task(rng, near.key[0] if near else rng.choice(kinds), scene, vocabulary, words, limits, near)
        if task.key in asked or task.key in told or task.slots["who"] == task.slots["whom"]:
            continue
        told[task.key] = task
        missing -= len(task.facts)
    return list(asked.values()), list(told.values()), set(scene["who"])


# ---- documents ----


def make_document(
    rng: random.Random,
    split: str,
    prose: Prose,
    encode: Encode,
    length: int,
    turns: int = 4,
    kinds: tuple[str, ...] = KINDS,
    limits: Limits = LIMITS,
) -> Document:
    """One document of `split`, its prompt of `length` tokens or up to SLACK fewer; the turns come on top."""
    for _ in range(ATTEMPTS):
        asked, told, people = _tasks(rng, VOCABULARIES[split], prose.lexicon, kinds, turns, length, limits)
        owners = [task for task in asked + told for _ in task.facts]
        rng.shuffle(owners)
        upcoming = {task.key: iter(task.facts) for task in asked + told}
        facts = [next(upcoming[task.key]) for task in owners]  # scattered, but each task's own facts in their order
        spoken = [text for task in asked for text in (task.question, task.answer)]
        ids = encode([fact.text for fact in facts] + spoken)
        fact_ids, spoken_ids = ids[: len(facts)], ids[len(facts) :]
        size = sum(map(len, fact_ids))
        if size <= min(limits.fact_share * length, length - SLACK):  # so much prose that a sentence fits
            break
    else:
        raise ValueError(f"length {length} is too small for the facts of {turns} turns")

    pieces = prose.take(rng, encode, people, length - size)
    borders = sorted(rng.choices(range(len(pieces)), k=len(facts)))  # the piece each fact follows
    parts = [(i, None, *piece) for i, piece in enumerate(pieces)]
    parts += [(at + 0.5, f.key, f.text, ids) for at, f, ids in zip(borders, facts, fact_ids, strict=True)]
    parts.sort(key=lambda part: part[0])  # stable: facts after the same piece stay in their order
    begins, position = {}, 0
    for _, key, _, part_ids in parts:
        if key is not None:
            begins[key] = position  # overwritten until the last fact of the task
        position += len(part_ids)
    result = [Turn(task.question, task.answer, task.key[0], begins[task.key] / position, task.key) for task in asked]
    segments = [(text, False) for _, _, text, _ in parts] + [(text, i % 2 == 1) for i, text in enumerate(spoken)]
    return Document(segments, [part_ids for *_, part_ids in parts] + spoken_ids, result, facts)


def document_ids(document: Document) -> tuple[list[int], list[bool]]:
    """The tokens of a document, and which of them belong to answers."""
    ids = [i for ids in document.segment_ids for i in ids]
    mask = [answer for (_, answer), ids in zip(document.segments, document.segment_ids, strict=True) for _ in ids]
    return ids, mask


def exact(answer: str, generated: str, kind: str) -> bool:
    """Whether the generated text begins with the answer to a question of this kind: up to its first newline or full
    stop, case and space aside; the things and parts of ANY_ORDER in any order."""
    first, second = (re.split(r"[\n.]", text.strip())[0].lower().split() for text in (answer, generated))
    if kind in ANY_ORDER:
        first, second = (sorted(word.strip(",") for word in words) for words in (first, second))
    return first == second


@dataclass(frozen=True)
class Recall:
    """A source of recall documents of one split, on its own prose."""

    prose: Prose
    tokenizer: Tokenizer
    split: str
    turns: int = 16  # at most

    @classmethod
    def from_books(cls, books: list[str], tokenizer: Tokenizer, split: str, turns: int = 16) -> "Recall":
        stride = math.ceil(sum(map(len, books)) / RECALL_CHARS)
        return cls(Prose.from_text("\n\n".join(books[::stride]), tokenizer), tokenizer, split, turns)

    def document(self, rng: random.Random, length: int) -> Document:
        """One document with a prompt of `length` tokens; in training of any number of turns that it has room for."""
        turns, limits = max(1, min(self.turns, length // TOKENS_A_TURN)), Limits()
        if self.split == "train":
            turns, limits = rng.randint((turns + 1) // 2, turns), DENSE
        while True:
            try:
                return make_document(rng, self.split, self.prose, encoder(self.tokenizer), length, turns, limits=limits)
            except ValueError:  # the facts of so many turns are longer than the prompt
                if turns == 1:
                    raise
                turns -= 1
