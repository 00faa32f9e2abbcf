"""Text that an LLM writes itself: conversations from its own chat template on, for its assistant to learn from.

Where it sits: LLM + pieces of text -> **training.self_text** -> training.data -> training.distill. An assistant has to
look where the LLM looks on what users type, and no file of text has that form. So the LLM plays both parts: the
template's marks are fed, the words between them are sampled. A little over half of the conversations are given a piece
of one of the texts, with a request or with the rest of the user's turn left to the LLM. A model without a template goes
on with pieces of text, or from its end-of-text token.

    texts = write(Writer(llm, text, sources, end, longest=4096, seed=1), path, tokens=1_500_000)

The file has a line of JSON a conversation. Its rounds are a pure function of the seed, so a file that was begun goes
on, and a file that is long enough is only read.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from json import dumps
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from command import read_lines, write_lines
from decode import Policy, Sampler, Session
from model import Decoder
from text import Text

SHORTEST = 256  # tokens of a conversation; its length is drawn evenly in its logarithm
ROUND_TOKENS = 1 << 20  # written together, at most
ROUND_ROWS = 256  # conversations written together, at most
TURN_TOKENS = 512  # after which the other one has the word
GIVEN = 0.55  # share of the conversations that begin with a piece of text
OPEN = 0.3  # share of these in which the LLM writes the rest of the user's turn
PIECE = (0.1, 0.8)  # tokens of a piece as a share of the conversation's, from and to
SAMPLER = Sampler(temperature=0.9)
SYSTEMS = (None, None, "You are a helpful assistant.", "You answer in one sentence.",
           "You are a programmer. Answer with code.")  # fmt: skip
REQUESTS = (
    "Summarize the text above.", "What is the main point of this?", "Who and what is named here? Make a list.",
    "Explain this to a child.", "What could come next?", "Ask three questions about it and answer them.",
    "Say the same in formal words.", "Is anything wrong here?", "Translate the beginning into French.",
    "Which part matters most, and why?",
)  # fmt: skip


@dataclass
class Conversation:
    """One sequence: tokens so far, those to be fed next whatever is sampled, and the marks that end a speaker's turn.

    marks: ids between the user's words and an answer, and between an answer and the user's next words; none for a model
    without a template. answers: where answers begin, as places in `ids`.
    """

    ids: list[int]
    forced: list[int]
    marks: tuple[list[int], list[int]] | None
    answering: bool = False
    answers: list[int] = field(default_factory=list)
    said: int = 0  # tokens of the turn at hand

    def feed(self, sampled: int, stop: frozenset[int]) -> int:
        """The next token: a forced one, the sampled one, or the first mark of the other's turn."""
        if not self.forced and self.marks and (sampled in stop or self.said == TURN_TOKENS):
            self.forced, self.answering, self.said = list(self.marks[self.answering]), not self.answering, 0
        if self.forced:
            self.ids.append(self.forced.pop(0))
            if not self.forced and self.answering:
                self.answers.append(len(self.ids))
        else:
            self.ids.append(sampled)
            self.said += 1
        return self.ids[-1]


def joints(text: Text, system: str | None) -> tuple[str, str, str] | None:
    """What a chat template writes before the user's words, between them and the answer, and between an answer and the
    user's next words. None if it takes no such system prompt, or leaves earlier turns out."""
    words = ("(the first question)", "(the answer)", "(the second question)")
    turns = [{"role": role, "content": said} for role, said in zip(("user", "assistant", "user"), words)]
    try:
        rest = text.render(([{"role": "system", "content": system}] if system else []) + turns, prompt=False)
    except ValueError:
        return None
    found = []
    for said in words:
        before, there, rest = rest.partition(said)
        if not there:
            return None
        found.append(before)
    return tuple(found)


class Writer:
    """Conversations of one LLM. sources: by name, a text as token ids; end: the token that divides texts in them."""

    def __init__(
        self, llm: Decoder, text: Text, sources: Sequence[tuple[str, np.ndarray]], end: int, longest: int, seed: int
    ):  # fmt: skip
        self.llm, self.text, self.sources, self.end, self.seed = llm, text, sources, end, seed
        self.longest = min(longest, llm.config.max_positions)
        known = [joints(text, system) for system in SYSTEMS] if text.template else []
        self.joints = [found for found in known if found]
        if known and not self.joints:
            raise ValueError("the checkpoint's chat template leaves earlier turns out; give --self-text 0")

    def piece(self, rng: random.Random, size: int, source: np.ndarray) -> str:
        start = rng.randrange(max(1, len(source) - size))
        ids = [int(token) for token in source[start : start + size] if token != self.end]
        return self.text.decode(ids).strip()

    def begin(self, rng: random.Random, size: int, source: np.ndarray | None, request: bool) -> Conversation:
        """A conversation's given part: marks, and `size` tokens of a source with or without a request; none: marks."""
        words = self.piece(rng, size, source) if source is not None else ""
        if not self.joints:
            ids = [self.end, *self.text.words(words)]
            return Conversation(ids[:1], ids[1:], None)
        begin, asked, answered = rng.choice(self.joints)
        if request and words:
            wish = rng.choice(REQUESTS)
            words = rng.choice((f"{words}\n\n{wish}", f"{wish}\n\n{words}", f"Text:\n{words}\n\nQuestion: {wish}"))
        marks = self.text.words(asked), self.text.words(answered)
        ids = self.text.words(begin + words + (asked if request and words else ""))
        return Conversation(ids[:1], ids[1:], marks, answering=request and bool(words))

    def plan(self, number: int) -> tuple[int, int]:
        """Tokens of each conversation of a round, and how many conversations it has."""
        low = math.log(min(SHORTEST, self.longest))
        length = round(math.exp(random.Random(f"{self.seed}-{number}").uniform(low, math.log(self.longest))))
        rows = ROUND_ROWS if self.llm.device.type == "cuda" else ROUND_ROWS // 16
        return length, min(rows, max(1, ROUND_TOKENS // length))

    def round(self, number: int, bar: tqdm) -> list[Conversation]:
        length, rows = self.plan(number)
        rng, conversations = random.Random(f"{self.seed}-{number}-words"), []
        for _ in range(rows):
            given = rng.random() < GIVEN and len(self.sources) > 0
            source = rng.choice(self.sources)[1] if given else None
            conversations.append(self.begin(rng, round(length * rng.uniform(*PIECE)), source, rng.random() >= OPEN))
        self.talk(conversations, length, rng.getrandbits(32), bar)
        return conversations

    @torch.inference_mode()
    def talk(self, conversations: list[Conversation], length: int, seed: int, bar: tqdm | None = None) -> None:
        """Carry the conversations on to `length` tokens, a token a step; what is given is fed by steps too, so that all
        are of one length."""
        session = Session(Policy(self.llm), [own.ids for own in conversations], length - 1)
        generator = torch.Generator(self.llm.device).manual_seed(seed)
        logits = session.prefill()
        for step in range(1, length):
            sampled = torch.multinomial(SAMPLER.probabilities(logits), 1, generator=generator)[:, 0].tolist()
            tokens = [own.feed(token, self.text.stop) for own, token in zip(conversations, sampled)]
            if step < length - 1:
                logits = session.step(tokens)
            if bar is not None:
                bar.update(len(conversations))

    def prompts(self, count: int, length: int) -> list[tuple[str, list[int]]]:
        """Prompts to judge an assistant by, (kind, ids), up to where an answer begins and of about `length` tokens:
        `count` conversations that the LLM wrote ("chat"), and as many of each source, a piece with a request."""
        found, rng = [], random.Random(f"{self.seed}-prompts")
        if self.joints:
            chats = [self.begin(rng, length, None, False) for _ in range(count)]
            self.talk(chats, length, rng.getrandbits(32))
            found += [("chat", own.ids[: own.answers[-1]]) for own in chats if own.answers]
        for name, source in self.sources:
            given = [self.begin(rng, length, source, True) for _ in range(count)]
            found += [(name, own.ids + own.forced) for own in given]
        return found


def write(writer: Writer, path: Path, tokens: int) -> list[str]:
    """Texts of at least `tokens` tokens in all: those that the file has, then the rounds that it lacks."""
    lines = read_lines(path, ("round", "tokens", "text"), torn=True)

    def had() -> int:
        return sum(line["tokens"] for line in lines)

    if had() < tokens:
        sizes = Counter(line["round"] for line in lines)
        whole = {number for number, size in sizes.items() if size == writer.plan(number)[1]}  # not one cut short
        lines = [line for line in lines if line["round"] in whole]
        write_lines(path, lines)
    with tqdm(total=max(had(), tokens), initial=had(), desc="the LLM writes", unit="token", unit_scale=True) as bar:
        while had() < tokens:
            number, new = max((line["round"] for line in lines), default=-1) + 1, []
            for own in writer.round(number, bar):
                words = writer.text.tokenizer.decode(own.ids, skip_special_tokens=False)
                new.append({"round": number, "tokens": len(own.ids), "text": words})
            with path.open("a", encoding="utf-8") as file:  # a kill costs this round alone
                file.writelines(dumps(line, ensure_ascii=False) + "\n" for line in new)
            lines += new
    return [line["text"] for line in lines]
