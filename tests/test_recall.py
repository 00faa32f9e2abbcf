"""Tests of recall.py and recall_words.py. The tokenizer is trained here on a small built-in text."""

import random
from collections import Counter

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import recall
import recall_words as rw
from recall import KINDS, SLACK, Limits, Prose, document_ids, encoder, exact, make_document

WEATHER = ("rain", "wind", "snow", "fog", "sun", "frost", "storm", "heat", "moon", "dark")
SCENERY = ("hills", "fields", "roofs", "river", "harbour", "market place", "long road", "woods", "sea", "low meadows")
EFFECT = ("nobody wished to go out", "the birds were silent", "we were glad of it", "the children sang for joy")
TEXT = "\n\n".join(
    f"The {weather} lay upon the {scenery}, and {EFFECT[(i + j) % 4]}. It had been so since the spring. "
    f"“What a day!” said the old man. “I never saw the {scenery} like this.” There was no answer."
    for i, weather in enumerate(WEATHER)
    for j, scenery in enumerate(SCENERY)
)
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
SINGLES = {"who": rw.PEOPLE, "good": rw.GOODS, "fruit": rw.FRUITS, "unit": rw.UNITS, "trade": rw.TRADES}
PAIRS = ("thing", "place", "animal", "door", "dish", "town")


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    wordings = [w for table in (rw.STATEMENTS, rw.QUESTIONS) for group in table.values() for w in group]
    tokenizer.train_from_iterator([TEXT, "\nQuestion: \nAnswer:", *wordings, " ".join(rw.PEOPLE)], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def make(tokenizer):
    prose, encode = Prose.from_text(TEXT, tokenizer), encoder(tokenizer)
    return lambda seed, split="train", length=900, **more: make_document(
        random.Random(seed), split, prose, encode, length, **more
    )


@pytest.fixture(scope="module")
def documents(make):
    return {split: [make(seed, split) for seed in range(60)] for split in rw.VOCABULARIES}


def words_of(text):
    return {"".join(c for c in word if c.isalpha()) for word in text.replace("'s", " ").split()}


def said(document):
    """Facts, questions and answers: the document without its prose."""
    return [fact.text for fact in document.facts] + [part for turn in document.turns for part in turn[:2]]


# ---- the split ----


def test_pools_are_large_and_without_duplicates():
    places = [noun for nouns in rw.PLACES.values() for noun in nouns.split()]
    assert len(rw.PEOPLE) >= 200
    assert len(rw.OBJECTS) + len(rw.GOODS) >= 150
    assert len(places) >= 100
    assert len(rw.LOOKS + rw.PLACE_LOOKS + rw.COATS) >= 60
    assert len(rw.ANIMALS) >= 60
    assert len(rw.FRUITS + rw.FLAVOURS) >= 60
    for pool in (*SINGLES.values(), rw.LOOKS, rw.OBJECTS, rw.PLACE_LOOKS, places, rw.COATS, rw.ANIMALS, rw.TOWNS):
        assert len(pool) == len(set(pool))


@pytest.mark.parametrize("name", [*SINGLES, *PAIRS])
def test_train_and_test_words_are_disjoint(name):
    train, test = ({w for row in rw.VOCABULARIES[s].pools[name] for w in row} for s in ("train", "test"))
    assert train and test and not train & test
    if name in SINGLES:
        assert train | test == set(SINGLES[name])
        assert 0.15 < len(test) / len(SINGLES[name]) < 0.25
    else:  # combinations are new, but mostly of words that training has seen
        seen = {word for phrase in train for word in phrase.split()}
        assert sum(all(word in seen for word in phrase.split()) for phrase in test) > 0.5 * len(test)


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_test_wordings_are_disjoint(kind):
    for table, name in ((rw.STATEMENTS, "statements"), (rw.QUESTIONS, "questions")):
        train, test = (set(getattr(rw.VOCABULARIES[s], name)[kind]) for s in ("train", "test"))
        assert len(set(table[kind])) == len(table[kind])
        assert not train & test and train | test == set(table[kind])
        assert len(test) / len(table[kind]) == 0.2


def test_training_documents_say_nothing_held_out(documents):
    held_out = {w for name in SINGLES for row in rw.VOCABULARIES["test"].pools[name] for w in row}
    held_out |= {rw.plural(rw.FRUITS[i]) for i in range(4, len(rw.FRUITS), 5)}
    held_out |= {rw.plural(rw.UNITS[i]) for i in range(4, len(rw.UNITS), 5)}
    for document in documents["train"]:
        for text in said(document):
            assert not words_of(text) & held_out, text


def test_test_documents_name_only_unseen_people(documents):
    known = {name for (name,) in rw.VOCABULARIES["train"].pools["who"]}
    for document in documents["test"]:
        for text in said(document):
            assert not words_of(text) & known, text


def differing(text: str, other: str) -> float:
    """In how many words two texts differ; infinitely many if one is longer."""
    words, others = text.split(), other.split()
    return sum(a != b for a, b in zip(words, others)) if len(words) == len(others) else float("inf")


def test_documents_use_the_values_and_wordings_of_their_split(documents):
    for split, vocabulary in rw.VOCABULARIES.items():
        phrases = {name: {w for row in rows for w in row} for name, rows in vocabulary.pools.items()}
        for document in documents[split]:
            for fact in document.facts:
                kind, slots = fact.key[0], dict(zip(rw.KEYS[fact.key[0]], fact.key[1:], strict=True))
                pool = {"where": "place", "dish": "dish", "home": "town", "owner": "who"}.get(kind)
                if split == "test":  # in training the prose's own words take the place of most
                    assert all(slots[name] in phrases[name] for name in slots if name in phrases)
                    assert pool is None or fact.value in phrases[pool]
                if kind == "code":
                    assert rw.held_out(*map(int, fact.value)) == (split == "test")
                slots["did"], slots["units"] = slots.get("deed", ("", ""))[1], rw.plural(slots.get("unit", ""))
                slots["fruits"] = rw.plural(slots.get("fruit", ""))
                wordings = list(vocabulary.statements[kind])
                for opener in vocabulary.statement_openers:
                    wordings += [f"{opener} {w[0].lower()}{w[1:]}" for w in vocabulary.statements[kind]]
                texts = {
                    " " + wording.format(**{"who": name, **slots, "value": fact.value})
                    for wording in wordings
                    for name in ([*rw.PEOPLE, *words_of(fact.text)] if kind == "where" else ["nobody"])
                }
                worn = 1 if split == "train" else 0  # words that training may have changed
                assert any(differing(fact.text, text) <= worn for text in texts)


# ---- answers ----


def test_every_answer_follows_from_the_facts(documents):
    for document in documents["train"] + documents["test"]:
        for turn in document.turns:
            values = [fact.value for fact in document.facts if fact.key == turn.key]
            slots = dict(zip(rw.KEYS[turn.kind], turn.key[1:], strict=True))
            if turn.kind == "count":
                assert len(set(values)) == len(values) <= 3
                names = {1: "{}", 2: "{} and {}", 3: "{}, {} and {}"}[len(values)].format(*values)
                expected = f"{names}, in all {NUMBERS[len(values)]}"
            elif turn.kind == "collect":
                assert 2 <= len(values) <= 4
                expected = {2: "{} and {}", 3: "{}, {} and {}", 4: "{}, {}, {} and {}"}[len(values)].format(*values)
            elif turn.kind == "sum":
                assert len(values) == 2 and values[0] != values[1]
                expected = f"{values[0]} and {values[1]}, in all {sum(map(int, values))}"
            else:
                (expected,) = values
            assert expected not in turn.question
            said_again = {"who": "", "did": "", **slots, "value": expected, "units": rw.plural(slots.get("unit", ""))}
            said_again["did"] = slots.get("deed", ("", ""))[1]
            said_again["fruits"] = rw.plural(slots.get("fruit", ""))
            assert turn.answer == " " + rw.ANSWERS[turn.kind].format(**said_again)


def test_facts_stand_in_the_prompt_in_their_order(documents):
    for document in documents["train"]:
        at = 0
        for fact in document.facts:
            at = document.prompt.index(fact.text, at) + len(fact.text)
            assert fact.value in fact.text


def test_counts_agree_with_the_bare_text(make):  # the test split, where no wording is worn
    for seed in range(20):
        document = make(seed, "test", kinds=("count",))
        for turn in document.turns:
            _, (_, did), fruit = turn.key
            told = document.prompt.count(f"he {rw.plural(fruit)} were {did} by ")
            assert turn.answer.endswith(f", in all {NUMBERS[told]}.")


def test_no_question_is_ambiguous(documents):
    for document in documents["train"] + documents["test"]:
        assert len({turn.key for turn in document.turns}) == len({turn.question for turn in document.turns}) == 4
        per_key = Counter(fact.key for fact in document.facts)
        assert all(n == 1 for key, n in per_key.items() if key[0] not in ("count", "collect", "sum"))
        assert set(per_key) > {turn.key for turn in document.turns}  # more is told than asked
        assert len(document.facts) > len(document.turns)


def test_all_kinds_occur_and_can_be_chosen(documents, make):
    assert {kind for document in documents["train"] for kind in document.kinds} == set(KINDS)
    assert set(make(0, kinds=("sum", "where")).kinds) <= {"sum", "where"}
    with pytest.raises(ValueError, match="dish"):
        make(0, kinds=("dish",), turns=9)


# ---- documents ----


@pytest.mark.parametrize("length", [450, 900, 1800])
def test_prompt_length(make, length):
    for seed in range(10):
        document = make(seed, "test", length)
        assert length - SLACK <= len(document.prompt_ids) <= length


def test_too_little_room_or_prose_is_an_error(make, tokenizer):
    with pytest.raises(ValueError, match="too small"):
        make(0, length=60)
    prose = Prose.from_text("\n\n".join(TEXT.split("\n\n")[:2]), tokenizer)
    with pytest.raises(ValueError, match="too short"):
        make_document(random.Random(0), "train", prose, encoder(tokenizer), 900)


def test_segments_are_the_text_and_its_encoding(documents, tokenizer):
    for document in documents["train"][:20] + documents["test"][:20]:
        ids, mask = document_ids(document)
        assert ids == tokenizer.encode(document.text).ids
        assert document.text == document.prompt + "".join(turn.question + turn.answer for turn in document.turns)
        answers = tokenizer.decode([i for i, is_answer in zip(ids, mask, strict=True) if is_answer])
        assert answers == "".join(turn.answer for turn in document.turns)
        assert [text for text, is_answer in document.segments if is_answer] == [t.answer for t in document.turns]
        for turn in document.turns:
            assert turn.question.startswith("\nQuestion: ") and turn.question.endswith("?\nAnswer:")


def test_depth_is_where_the_last_needed_fact_begins(documents, tokenizer):
    for document in documents["train"][:10]:
        for turn in document.turns:
            last = [fact for fact in document.facts if fact.key == turn.key][-1]
            before = tokenizer.encode(document.prompt[: document.prompt.index(last.text)]).ids
            assert turn.depth == len(before) / len(document.prompt_ids)


def test_same_seed_same_document(make):
    assert make(3) == make(3)
    assert make(3).text != make(4).text
    assert make(3).facts != make(3, "test").facts


def test_limits(make):
    limits = Limits(count=(2, 2), extra=(12, 12))
    document = make(5, kinds=("count",), limits=limits)
    assert all(turn.answer.endswith(" two.") for turn in document.turns)
    assert len(document.facts) >= 4 * 2 + 11  # 12 per 1,000 tokens


# ---- prose ----


def test_prose_leaves_out_headings_digits_and_facts(tokenizer):
    text = (
        "CHAPTER I.\n\nIt was a cold and windy night. The code of the door was lost. Then came 12 men on foot. "
        "Mr. Smith sat down by the fire.\n\nTHE END OF THE STORY.\n\n"
        "“Come in. Sit down here,” said he. It was already late."
    )
    assert [piece.text for piece in Prose.from_text(text, tokenizer).pieces] == [
        "\n\nIt was a cold and windy night.",
        " Mr. Smith sat down by the fire.",
        "\n\n“Come in. Sit down here,” said he.",
        " It was already late.",
    ]


def test_prose_does_not_name_the_people_of_the_facts(tokenizer):
    text = TEXT + "".join(f"\n\n{name} came home late and hungry." for name in rw.PEOPLE)
    prose, encode = Prose.from_text(text, tokenizer), encoder(tokenizer)
    for seed in range(10):
        document = make_document(random.Random(seed), "train", prose, encode, 900)
        people = {name for text in said(document) for name in words_of(text)} & set(rw.PEOPLE)
        assert not any(f"{name} came home" in document.prompt for name in people)


def test_grammar():
    assert [rw.with_article(w) for w in ("plum", "apple", "ivory key")] == ["a plum", "an apple", "an ivory key"]
    forms = [rw.plural(w) for w in ("plum", "cherry", "peach", "radish", "potato", "grape")]
    assert forms == ["plums", "cherries", "peaches", "radishes", "potatoes", "grapes"]


@pytest.mark.parametrize(
    "generated, right",
    [
        (" in the tall cupboard.", True),
        ("In the  Tall cupboard", True),
        (" in the tall cupboard.\nQuestion: Who", True),
        (" in the tall cupboard\nand more", True),
        (" in the tall cupboard and more.", False),
        (" in the tall", False),
        ("", False),
        (".", False),
        ("\n", False),
    ],
)
def test_exact(generated, right):
    assert exact(" in the tall cupboard.", generated, "where") is right


def test_exact_takes_lists_in_any_order():
    for kind, right in (("count", True), ("collect", True), ("sum", True), ("gift", False)):
        assert exact(" Ann lost a hat and a map.", "Ann lost a map and a hat.", kind) is right
        assert not exact(" Ann lost a hat and a map.", "Ann lost a map and a map.", kind)
        assert not exact(" Ann lost a hat and a map.", "Ann lost a hat.", kind)


def test_command_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "prose.txt"
    path.write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["recall.py", "--length", "300", "--split", "test", "--text", str(path)])
    recall.main()
    assert capsys.readouterr().out.count("\nQuestion: ") == 4
