"""Text files to training sequences: books, the tokenizer, and the mixture of prose and recall documents.

Where it sits: text -> **training.data** -> training.pretrain and training.distill. Books (.txt or .txt.xz) are divided
by a line <|endoftext|>; the last book of every file is held out. `Mixture` makes the batch of a step when it is asked
for:

    kept, held_out = read_books(["a.txt", "b.txt.xz"])
    data = Mixture(encode_books(kept, tokenizer, end), recall, stages, batch_tokens=131072, share=0.7, seed=1, end=end)
    tokens, answers = data[0]  # (B, T + 1) each
"""

import math
import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset

from command import read_text
from text import Text
from training.recall import TOKENS_A_TURN, Recall, document_ids

END = "<|endoftext|>"  # divides books in the text files; the only special token of our own tokenizer
SHORTEST = 120  # tokens of a recall document's prompt
TURN_ROOM = 44  # tokens that a question and its answer may take
TOKENIZER_DOCUMENTS = 200  # recall documents that a tokenizer is trained on, beside the books
ECHO_SHARE = 0.05  # sequences that are random tokens said again and again: copying is learnt from them first


# ---- text ------------------------------------------------------------------------------------------------------------


def read_books(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Books to train on and books held out: the last of every file, or the last tenth of a file that is one book."""
    kept, held_out = [], []
    for path in map(Path, paths):
        books = [book.strip() for book in f"\n{read_text(path)}\n".split(f"\n{END}\n") if book.strip()]
        if not books:
            raise ValueError(f"{path} holds no text")
        if len(books) == 1:
            cut = len(books[0]) * 9 // 10
            books = [books[0][:cut], books[0][cut:]]
        kept += books[:-1]
        held_out.append(books[-1])
    return kept, held_out


def train_tokenizer(books: list[str], vocab: int) -> Tokenizer:
    """Byte-level BPE on the beginnings of all books and on recall documents; every digit is a token."""
    samples = [book[:20_000] for book in books]
    draft = _bpe(samples, vocab)  # recall documents are measured in tokens, so making some takes a tokenizer
    recall = Recall.from_books(books[:4], draft, "train")
    told = [recall.document(random.Random(f"tokenizer-{i}"), 400).text for i in range(TOKENIZER_DOCUMENTS)]
    return _bpe(samples + told, vocab)


def _bpe(texts: list[str], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_each(books: list[str], tokenizer: Tokenizer, end: int) -> list[np.ndarray]:
    """Each book as an array of token ids with `end` behind it."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.int32
    parts = []
    for at in range(0, len(books), 32):  # the tokenizer's own records are far larger than the ids
        for encoding in tokenizer.encode_batch_fast(books[at : at + 32], add_special_tokens=False):
            parts.append(np.array([*encoding.ids, end], dtype=dtype))
    return parts


def encode_books(books: list[str], tokenizer: Tokenizer, end: int) -> np.ndarray:
    """All books as one array."""
    return np.concatenate(encode_each(books, tokenizer, end))


def open_tokenizer(path: Path) -> Tokenizer:
    read_text(path)  # for its errors
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises plain Exception
        raise ValueError(f"{path} is not a readable tokenizer: {error}") from None


def load_text(folder: Path) -> tuple[Text, int]:
    """A checkpoint's way with words, and the token that divides texts: END, else the least that ends an answer, else
    0."""
    text = Text.load(folder)
    end = text.tokenizer.token_to_id(END)
    return text, min(text.stop, default=0) if end is None else end


def windows(tokens: np.ndarray, length: int, count: int) -> list[list[int]]:
    """Windows spread evenly over a text."""
    if len(tokens) < length:
        raise ValueError(f"the text has {len(tokens)} tokens, fewer than one window of {length}; give more text")
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    return [tokens[start : start + length].tolist() for start in starts]


# ---- training data ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    length: int  # tokens of a sequence
    end: int  # the first step that is not in it


def parse_stages(text: str, steps: int) -> list[Stage]:
    """'512:0.4,2048:0.6' -> sequence lengths by share of the steps."""
    stages, total = [], 0.0
    try:
        for part in text.split(","):
            length, share = part.split(":")
            if not 0 < float(share) <= 1:
                raise ValueError
            total += float(share)
            stages.append(Stage(int(length), round(total * steps)))
    except ValueError:
        raise ValueError(f"--stages {text!r} should look like 512:0.4,2048:0.6 (length:share of the steps)") from None
    if abs(total - 1) > 1e-6 or any(stage.length < 8 for stage in stages):
        raise ValueError(f"--stages {text!r}: the shares should add up to 1 and lengths be at least 8")
    return stages


class Mixture(Dataset):
    """data[step] -> tokens (B, T + 1) int32 and answers (B, T + 1) bool, a pure function of seed and step.

    A sequence is, with probability `share`, recall documents one after the other (a few of them, ECHO_SHARE, random
    tokens said again and again instead), with probability `own_share` conversations of training.self_text, the first
    from its beginning on, else a slice of the prose.
    """

    def __init__(self, prose: np.ndarray, recall: Recall | None, stages: list[Stage], batch_tokens: int, share: float,
                 seed: int, end: int, own: Sequence[np.ndarray] = (), own_share: float = 0.0):  # fmt: skip
        self.prose, self.recall, self.stages, self.batch_tokens = prose, recall, stages, batch_tokens
        self.share, self.seed, self.end = share, seed, end
        self.own, self.own_share = sorted(own, key=len), own_share if len(own) else 0.0
        self.own_sizes = [len(one) for one in self.own]
        self.vocab = recall.tokenizer.get_vocab_size() if recall else 0
        longest = max(stage.length for stage in stages) + 1
        if len(prose) <= longest:
            raise ValueError(f"the text has {len(prose)} tokens, too few for sequences of {longest}; give more --text")
        if batch_tokens < longest - 1:
            raise ValueError(f"a step of {batch_tokens} tokens does not hold one sequence of {longest - 1}")

    def __len__(self) -> int:
        return self.stages[-1].end

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        length = next(stage.length for stage in self.stages if step < stage.end)
        rows = self.batch_tokens // length
        tokens, answers = np.empty((rows, length + 1), np.int32), np.zeros((rows, length + 1), bool)
        for row in range(rows):
            rng = random.Random(f"{self.seed}-{step}-{row}")
            filled, draw = 0, rng.random()
            if draw < ECHO_SHARE * self.share:
                filled = self._echo(rng, tokens[row])
            elif draw < self.share:
                filled = self._documents(rng, tokens[row], answers[row])
            elif draw >= 1 - self.own_share:
                filled = self._conversations(rng, tokens[row])
            self._slice(rng, tokens[row, filled:])
        return torch.from_numpy(tokens), torch.from_numpy(answers)

    def _slice(self, rng: random.Random, out: np.ndarray) -> None:
        start = rng.randrange(len(self.prose) - len(out))
        out[:] = self.prose[start : start + len(out)]

    def _conversations(self, rng: random.Random, tokens: np.ndarray) -> int:
        """The first is at least half as long as the sequence, if there are such."""
        least, filled = bisect_left(self.own_sizes, len(tokens) // 2), 0
        while filled < len(tokens):
            one = self.own[rng.randrange(least if least < len(self.own) else 0, len(self.own))][: len(tokens) - filled]
            tokens[filled : filled + len(one)] = one
            filled, least = filled + len(one), 0
        return filled

    def _echo(self, rng: random.Random, tokens: np.ndarray) -> int:
        block = np.random.default_rng(rng.getrandbits(32)).integers(self.vocab, size=rng.randint(16, len(tokens) // 2))
        tokens[:] = np.resize(block, len(tokens))
        return len(tokens)

    def _documents(self, rng: random.Random, tokens: np.ndarray, answers: np.ndarray) -> int:
        """Documents of log-uniform lengths until none fits any more; returns how many tokens were filled."""
        filled = 0
        while True:
            room = len(tokens) - filled - 1  # for a prompt, and for turns as many as it has room for
            room = max(room - TURN_ROOM * self.recall.turns, int(room / (1 + TURN_ROOM / TOKENS_A_TURN)))
            if room < SHORTEST:
                return filled
            length = round(math.exp(rng.uniform(math.log(SHORTEST), math.log(room))))
            ids, mask = document_ids(self.recall.document(rng, length))
            ids, mask = ids[: len(tokens) - filled - 1], mask[: len(tokens) - filled - 1]
            end = filled + len(ids)
            tokens[filled:end], answers[filled:end], tokens[end] = ids, mask, self.end
            filled = end + 1
