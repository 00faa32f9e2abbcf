"""What recall documents may say: word pools, wordings, and the rule that holds some of them out for tests.

Where it sits: words.json -> **training.words** -> training.recall, which draws the documents. The words are data; one
rule, `held_out`, splits them: person names, single words and wordings are held out as a whole, two-word values ("brass
key") as combinations, mostly of words that training has seen. In words.json a kind's statements say what the question
asks for last, so that a reader finds one by the other, and an answer says again what it is about before the value.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

_DATA = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))
POOLS = {name: " ".join(lines).split() for name, lines in _DATA["pools"].items()}
PLACES = {at: " ".join(lines).split() for at, lines in _DATA["places"].items()}  # preposition -> nouns
PEOPLE = POOLS["people"]
DEEDS = {kind: [tuple(deed) for deed in deeds] for kind, deeds in _DATA["deeds"].items()}  # (plain form, past)
KEYS = {kind: tuple(slots) for kind, slots in _DATA["keys"].items()}  # the slots that say what a task is about
STATEMENTS = {kind: tuple(wordings) for kind, wordings in _DATA["statements"].items()}
QUESTIONS = {kind: tuple(wordings) for kind, wordings in _DATA["questions"].items()}
ANSWERS = _DATA["answers"]
SINGLES = {"who": "people", "good": "goods", "fruit": "fruits", "unit": "units", "trade": "trades"}  # slot -> pool
KINDS = tuple(KEYS)
WEIGHTS = {"count": 0.5}  # of a kind among the questions; 1 for the others
ANY_ORDER = ("count", "collect", "sum")  # right in any order: "a hat and a map", "3 and 4, in all 7"
# In training only, so that copying and the question's sense are learnt, and not the pools and the wordings:
BORROWED = 0.8  # share of words taken from the prose instead
FIRST_BORROWED = 0.5  # the same of the first words of a pair
COINED = 0.25  # share of the words taken from the prose to which the end of another is added: "gardenher"
WORN = 0.15  # share of statements with one of their own words, names aside, taken from the prose instead
OPENED = 0.25  # share of statements and questions that begin with one of these


def held_out(*places: int) -> bool:
    """The rule of the split. A word alone is held out at every fifth place of its pool; words together if their places
    sum to such a number, or if one of them is the last of twenty. The digits of a code count as places."""
    return sum(places) % 5 == 4 or (len(places) > 1 and any(place % 20 == 19 for place in places))


def words(pool: list[str] | tuple[str, ...], split: str) -> tuple[str, ...]:
    return tuple(word for i, word in enumerate(pool) if held_out(i) == (split == "test"))


def pairs(firsts: list[str], nouns: list[str], split: str) -> tuple[tuple[str, ...], ...]:
    """Combinations, one row per noun: ("brass key", "old key", ...). A noun is a pattern, its {} the first word."""
    rows = [
        tuple(noun.format(first) for i, first in enumerate(firsts) if held_out(i, j) == (split == "test"))
        for j, noun in enumerate(nouns)
    ]
    return tuple(row for row in rows if row)  # a held-out noun has no combination in training


def worn(rng: random.Random, wording: str, words: Sequence[str]) -> str:
    """The wording with one of its words changed for one of `words`, once in a while."""
    own = [i for i, word in enumerate(wording.split()) if word.isalpha()]
    if not words or not own or rng.random() >= WORN:
        return wording
    changed = wording.split()
    changed[rng.choice(own)] = rng.choice(words)
    return " ".join(changed)


def opened(rng: random.Random, wording: str, openers: tuple[str, ...]) -> str:
    """The wording, after one of the openers once in a while."""
    if not openers or rng.random() >= OPENED:
        return wording
    return f"{rng.choice(openers)} {wording[0].lower()}{wording[1:]}"  # "{who}", a name to come, has no lower case


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def plural(noun: str) -> str:
    if noun.endswith("y"):
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("ch", "sh", "to", "go")) else "s")


def unseen_words() -> frozenset[str]:
    """Every word, and plural, that is held out as a whole."""
    single = {word for pool in SINGLES.values() for word in words(POOLS[pool], "test")}
    return frozenset(single | {plural(word) for word in single})


class Vocabulary:
    """What the documents of one split may say: rows of every pool, and the wordings of every kind."""

    def __init__(self, split: str):
        self.split = split
        patterns = {
            "thing": ("looks", ["{} " + noun for noun in POOLS["objects"]]),
            "place": ("place_looks", [f"{at} the {{}} {noun}" for at, nouns in PLACES.items() for noun in nouns]),
            "animal": ("coats", ["{} " + noun for noun in POOLS["animals"]]),
            "door": ("sides", ["{} " + noun for noun in POOLS["doors"]]),
            "dish": ("flavours", ["{} " + noun for noun in POOLS["dishes"]]),
            "town": ("town_firsts", ["in {} " + noun for noun in POOLS["towns"]]),
        }
        self.pools = {name: pairs(POOLS[firsts], nouns, split) for name, (firsts, nouns) in patterns.items()}
        for name, pool in SINGLES.items():
            self.pools[name] = tuple((word,) for word in words(POOLS[pool], split))
        self.statements = {kind: words(wordings, split) for kind, wordings in STATEMENTS.items()}
        self.questions = {kind: words(wordings, split) for kind, wordings in QUESTIONS.items()}
        self.unseen = unseen_words()
        self.statement_openers = _DATA["statement_openers"] if split == "train" else ()
        self.question_openers = _DATA["question_openers"] if split == "train" else ()

    def scene(
        self, rng: random.Random, people: int, goods: int, nouns: int, looks: int, lexicon: Sequence[Sequence[str]]
    ) -> dict[str, list[str]]:  # fmt: skip
        """The few words that one document is about: so many people, goods, and nouns with `looks` first words each.

        lexicon: words and capitalised words of the prose. In training they take the place of most words: of single
        ones, of the last one of a pair ("brass yesterday"), and of some first ones ("never yesterday"). Some go on with
        the end of another: who has read a known word must see whether it ends there ("Joseph", "Josephine").
        """
        sizes = {"who": people, "good": goods}
        made, used = {}, set(self.unseen)

        def borrow(share: float, instead_of: str) -> str:
            """A word of the prose, or the one there is; no word for two things in one scene."""
            source = lexicon[instead_of[0].isupper()]
            if self.split == "train" and source and rng.random() < share:
                word = rng.choice(source)
                if rng.random() < COINED:
                    tail = rng.choice(source).lower()
                    word += tail[len(tail) // 2 :]
                if word not in used:
                    used.add(word)
                    return word
            return instead_of

        for name, rows in self.pools.items():
            chosen = [list(rng.sample(row, min(looks, len(row)))) for row in rng.sample(rows, sizes.get(name, nouns))]
            for row in chosen:
                last = row[0].split()[-1]
                noun = borrow(BORROWED, last)
                row[:] = [phrase.removesuffix(last) + noun for phrase in row]
                if " " in row[0]:
                    for i, phrase in enumerate(row):
                        *start, first, noun = phrase.split()
                        row[i] = " ".join([*start, borrow(FIRST_BORROWED, first), noun])
            made[name] = [word for row in chosen for word in row]
        return made


VOCABULARIES = {split: Vocabulary(split) for split in ("train", "test")}
