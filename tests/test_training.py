"""Tests of training/: recall documents, data, the loop, pretraining, alignment, distillation. Tiny shapes, CPU."""

import hashlib
import json
import lzma
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from torch.utils.data import DataLoader

from checkpoint import checkpoint_weights, load_decoder
from command import read_json, read_lines
from conftest import tiny_decoder
from kernels import attention_rows
from match import SINKS
from model import Config, Decoder
from samples import answered
from text import Text
from training import align, data, distill, prepare_smollm2, pretrain, self_text, words
from training.data import END, Mixture, Stage, encode_books, parse_stages, read_books
from training.loop import copy_decoder, initialise, learning_rate, parameter_count, save_hf
from training.recall import SLACK, Prose, Recall, document_ids, encoder, exact, make_document

PAIR = Path(__file__).parents[1] / "pair"
PLAIN = """river mountain window letter garden evening silence winter village summer morning shadow forest kitchen
captain journey harbour silver question candle weather corner distance narrow ancient gentle strange heavy quiet
crossed watched carried followed remembered opened reached forgot wandered listened beyond beneath toward without
""".split()
SHORT = self_text.SHORTEST
NUMBERS = {1: "one", 2: "two", 3: "three"}


def make_book(seed: int, paragraphs: int = 60) -> str:
    rng = random.Random(seed)

    def sentence() -> str:
        return " ".join(rng.choices(PLAIN, k=rng.randint(6, 12))).capitalize() + "."

    return "\n\n".join(" ".join(sentence() for _ in range(5)) for _ in range(paragraphs))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "books.txt"
    path.write_text(f"\n{END}\n".join(make_book(seed) for seed in range(4)))
    return str(path)


def pretrain_args(text: str, out: Path, *more: str):
    shape = "--hidden 32 --layers 2 --query-heads 4 --kv-heads 2 --head-dim 8 --intermediate 64 --vocab 600"
    size = "--max-positions 512 --stages 256:0.5,384:0.5 --batch-tokens 768 --steps 20 --log-every 5 --eval-every 10"
    flags = f"{shape} {size} --eval-documents 2 --eval-length 300 --device cpu --workers 0".split()
    return pretrain.parse(["--text", text, "--out", str(out), *flags, *more])


@pytest.fixture(scope="module")
def llm_run(text, tmp_path_factory):
    """A tiny LLM: its folder, and the trained decoder that was saved there."""
    out = tmp_path_factory.mktemp("pair") / "llm"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TOKENIZER_DOCUMENTS", 20)
        decoder, _ = pretrain.run(pretrain_args(text, out))
    return out, decoder


def distill_args(llm: Path, text: str, out: Path, *more: str):
    shape = "--layers 2 --query-heads 4 --kv-heads 1 --head-dim 8 --hidden 24 --intermediate 48"
    size = "--seq-length 96 --batch-tokens 192 --rows 12 --steps 6 --log-every 1 --eval-every 3 --eval-length 100"
    flags = f"{shape} {size} --eval-samples 2 --device cpu --workers 0".split()
    return distill.parse(["--llm", str(llm), "--text", text, "--out", str(out), *flags, *more])


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_lines(folder / "log.jsonl") if "loss" in record]


def sharp_decoder(seed: int, **changes) -> Decoder:
    """Random weights large enough that attention is far from uniform."""
    raw = dict(model_type="llama", vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    raw |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    decoder = initialise(Decoder(Config.from_hf(raw | changes)), seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 2:
                parameter.mul_(12)
    return decoder


# ---- recall documents ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources() -> dict[str, Recall]:
    tokenizer, books = Tokenizer.from_file(str(PAIR / "llm" / "tokenizer.json")), [make_book(seed) for seed in range(3)]
    return {split: Recall.from_books(books, tokenizer, split, 4) for split in words.VOCABULARIES}


@pytest.fixture(scope="module")
def documents(sources):
    return {split: [source.document(random.Random(n), 900) for n in range(40)] for split, source in sources.items()}


def said(document) -> list[str]:
    """Facts, questions and answers: the document without its prose."""
    return [fact.text for fact in document.facts] + [part for turn in document.turns for part in turn[:2]]


def words_of(text: str) -> set[str]:
    return {"".join(c for c in word if c.isalpha()) for word in text.replace("'s", " ").split()}


@pytest.mark.parametrize("split, seed, length, digest", [
    ("train", 0, 200, "ceccd232121b1368"),
    ("train", 7, 1000, "57e924bbb9f53026"),
    ("test", 0, 200, "2d31772fa57457cb"),
    ("test", 1, 400, "9d98e5202f98c1da"),
    ("test", 7, 1000, "8c72d4ecd6fc53cc"),
])  # fmt: skip
def test_a_seed_gives_the_document_that_it_always_gave(sources, split, seed, length, digest):
    """The pair was trained on such documents, and docs/RESULTS.md measured on them: other words would change both."""
    document = replace(sources[split], turns=16).document(random.Random(seed), length)
    content = json.dumps([document.text, *document_ids(document), document.turns])
    assert hashlib.sha256(content.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("name", words.VOCABULARIES["test"].pools)
def test_train_and_test_words_are_disjoint(name):
    train, test = ({w for row in words.VOCABULARIES[s].pools[name] for w in row} for s in ("train", "test"))
    assert train and test and not train & test
    if name in words.SINGLES:
        assert train | test == set(words.POOLS[words.SINGLES[name]]) and 0.15 < len(test) / len(train | test) < 0.25
    else:  # combinations are new, but mostly of words that training has seen
        seen = {word for phrase in train for word in phrase.split()}
        assert sum(all(word in seen for word in phrase.split()) for phrase in test) > 0.5 * len(test)


@pytest.mark.parametrize("kind", words.KINDS)
def test_train_and_test_wordings_are_disjoint(kind):
    for table, name in ((words.STATEMENTS, "statements"), (words.QUESTIONS, "questions")):
        train, test = (set(getattr(words.VOCABULARIES[s], name)[kind]) for s in ("train", "test"))
        assert not train & test and train | test == set(table[kind])
        assert len(set(table[kind])) == len(table[kind]) == 5 * len(test)


def test_documents_say_nothing_of_the_other_split(documents):
    known = {name for (name,) in words.VOCABULARIES["train"].pools["who"]}
    for split, others in (("train", words.unseen_words()), ("test", known)):
        assert not [t for document in documents[split] for t in said(document) if words_of(t) & others]


def test_every_answer_follows_from_the_facts(documents):
    for document in documents["train"] + documents["test"]:
        at = 0
        for fact in document.facts:  # they stand in the prompt, in their order
            at = document.prompt.index(fact.text, at) + len(fact.text)
        per_key = Counter(fact.key for fact in document.facts)
        assert all(n == 1 for key, n in per_key.items() if key[0] not in words.ANY_ORDER)
        assert set(per_key) > {turn.key for turn in document.turns}  # more is told than asked
        assert len({turn.key for turn in document.turns}) == len({turn.question for turn in document.turns})
        for turn in document.turns:
            values = [fact.value for fact in document.facts if fact.key == turn.key]
            slots = dict(zip(words.KEYS[turn.kind], turn.key[1:], strict=True))
            listed = {1: "{}", 2: "{} and {}", 3: "{}, {} and {}"}[len(values)].format(*values)
            tail = {"count": f", in all {NUMBERS[len(values)]}"}.get(turn.kind, "")
            tail = f", in all {sum(map(int, values))}" if turn.kind == "sum" else tail
            forms = {"who": "", **slots, "did": slots.get("deed", ("", ""))[1], "value": listed + tail}
            forms |= {"units": words.plural(slots.get("unit", "")), "fruits": words.plural(slots.get("fruit", ""))}
            assert turn.answer == " " + words.ANSWERS[turn.kind].format(**forms)
            assert listed + tail not in turn.question


def test_segments_are_the_text_and_its_encoding(documents, sources):
    tokenizer = sources["test"].tokenizer
    for document in documents["train"][:10] + documents["test"][:10]:
        ids, mask = document_ids(document)
        assert ids == tokenizer.encode(document.text).ids and 900 - SLACK <= len(document.prompt_ids) <= 900
        answers = tokenizer.decode([i for i, is_answer in zip(ids, mask, strict=True) if is_answer])
        assert answers == "".join(turn.answer for turn in document.turns)
        for turn in document.turns:  # depth: where the last fact that it needs begins
            last = [fact for fact in document.facts if fact.key == turn.key][-1]
            before = tokenizer.encode(document.prompt[: document.prompt.index(last.text)]).ids
            assert turn.depth == len(before) / len(document.prompt_ids)


def test_prose_leaves_out_what_could_be_taken_for_a_fact(sources):
    tokenizer = sources["test"].tokenizer
    text = (
        "CHAPTER I.\n\nIt was a cold and windy night. The code of the door was lost. Then came 12 men on foot. "
        "Mr. Smith sat down by the fire.\n\nTHE END OF THE STORY.\n\n"
        "“Come in. Sit down here,” said he. It was already late."
    )
    prose = Prose.from_text(text, tokenizer)
    assert [piece.text for piece in prose.pieces] == [
        "\n\nIt was a cold and windy night.", " Mr. Smith sat down by the fire.",
        "\n\n“Come in. Sit down here,” said he.", " It was already late.",
    ]  # fmt: skip
    for length, message in ((60, "too small"), (900, "too short")):
        with pytest.raises(ValueError, match=message):
            make_document(random.Random(0), "train", prose, encoder(tokenizer), length)
    named = make_book(0) + "".join(f"\n\n{name} came home late and hungry." for name in words.PEOPLE)
    prose = Prose.from_text(named, tokenizer)
    for seed in range(5):
        document = make_document(random.Random(seed), "train", prose, encoder(tokenizer), 900)
        people = {name for part in said(document) for name in words_of(part)} & set(words.PEOPLE)
        assert not [name for name in people if f"{name} came home" in document.prompt]


@pytest.mark.parametrize("generated, right", [
    (" in the tall cupboard.", True), ("In the  Tall cupboard", True), (" in the tall cupboard.\nQuestion: Who", True),
    (" in the tall cupboard\nand more", True), (" in the tall cupboard and more.", False), (" in the tall", False),
    ("", False), (".", False),
])  # fmt: skip
def test_exact(generated, right):
    assert exact(" in the tall cupboard.", generated, "where") is right
    for kind in ("count", "gift"):  # lists are right in any order
        assert exact(" Ann lost a hat and a map.", "Ann lost a map and a hat.", kind) is (kind == "count")


# ---- data ------------------------------------------------------------------------------------------------------------


def test_books_from_plain_and_packed_text(text, tmp_path):
    packed, marked, one = tmp_path / "books.txt.xz", tmp_path / "marked.txt", tmp_path / "one.txt"
    packed.write_bytes(lzma.compress(Path(text).read_bytes()))
    marked.write_bytes(b"\xef\xbb\xbf" + Path(text).read_bytes())
    assert read_books([text]) == read_books([str(packed)]) == read_books([str(marked)])
    assert [len(books) for books in read_books([text])] == [3, 1]
    one.write_text("a" * 100)
    assert [len(part) for books in read_books([str(one)]) for part in books] == [90, 10]


def test_stages():
    assert parse_stages("512:0.4,2048:0.6", 100) == [Stage(512, 40), Stage(2048, 100)]
    for wrong in ("512", "512:0.5", "x:1", "512:nan", "512:-1,64:2"):
        with pytest.raises(ValueError, match="--stages"):
            parse_stages(wrong, 100)


@pytest.fixture(scope="module")
def mixture(llm_run, text) -> Mixture:
    tokenizer, (kept, _) = Tokenizer.from_file(str(llm_run[0] / "tokenizer.json")), read_books([text])
    recall, stages = Recall.from_books(kept, tokenizer, "train"), [Stage(256, 3), Stage(512, 6)]
    return Mixture(encode_books(kept, tokenizer, 0), recall, stages, 1024, share=0.7, seed=5, end=0)


def test_data_of_a_step_does_not_depend_on_workers_or_start(mixture):
    def steps(workers, start):
        how = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
        return list(DataLoader(mixture, None, sampler=range(start, 6), **how))

    plain, shared, late = steps(0, 0), steps(2, 0), steps(2, 4)
    assert [tokens.shape for tokens, _ in plain] == [(4, 257)] * 3 + [(2, 513)] * 3
    for ours, theirs in [*zip(plain, shared, strict=True), *zip(plain[4:], late, strict=True)]:
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_documents_fit_and_their_answers_are_marked(mixture):
    tokenizer, marked = mixture.recall.tokenizer, 0
    for row, mask in zip(*mixture[4], strict=True):
        starts = (mask & ~F.pad(mask, (1, 0))[:-1]).nonzero().flatten().tolist()
        marked += len(starts)
        for start in starts:  # every answer stands complete, after its question
            end = start + int((~mask[start:]).nonzero()[0])
            assert tokenizer.decode(row[:start].tolist()).endswith("Answer:")
            assert tokenizer.decode(row[start:end].tolist()).endswith(".")
    assert marked
    sample = "The code of the upper safe is 4711.\nQuestion: What?"  # digits are tokens, the text comes back
    ids = tokenizer.encode(sample).ids
    assert tokenizer.decode(ids) == sample and [tokenizer.decode([i]) for i in ids].count("1") == 2


# ---- pretraining and the loop ----------------------------------------------------------------------------------------


def test_learning_rate_rises_then_falls_to_a_tenth(text, tmp_path):
    args = pretrain_args(text, tmp_path, "--steps", "1000", "--warmup", "0.1", "--lr", "1")
    rates = [learning_rate(step, args) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and rates[99] == pytest.approx(1.0) and rates[-1] == pytest.approx(0.1)
    assert rates == sorted(rates[:99]) + sorted(rates[99:], reverse=True)


def test_pretraining_lowers_the_loss_and_its_folder_gives_the_trained_logits(llm_run):
    folder, decoder = llm_run
    found = losses(folder)
    assert found[-1] < found[0] - 0.2, found
    loaded, copy = load_decoder(folder), copy_decoder(decoder, torch.bfloat16)
    assert loaded.config == decoder.config and loaded.dtype == torch.bfloat16
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    tokens = torch.randint(600, (2, 40), generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded(tokens), copy(tokens))
    assert not (folder / "state.pt").exists() and (folder / "README.md").read_text().count("prose_loss") == 2


@pytest.mark.parametrize("trainer", ["pretrain", "distill"])
def test_stop_and_resume_equals_not_stopping(trainer, llm_run, text, tmp_path, capsys):
    def run(out, *more):
        if trainer == "distill":
            return distill.run(distill_args(llm_run[0], text, out, *more))
        known = () if "--resume" in more else ("--tokenizer", str(llm_run[0] / "tokenizer.json"))
        few = ("--steps", "6", "--log-every", "1", "--eval-every", "2")
        return pretrain.run(pretrain_args(text, out, *few, *known, *more))

    parts, whole = tmp_path / "parts", tmp_path / "whole"
    straight, report = run(whole)
    _, stopped = run(parts, "--stop-after-minutes", "0")
    assert (stopped.step, report.step) == (1, 6)
    with (parts / "log.jsonl").open("a") as file:  # as a run that was killed leaves it
        file.write('{"step": 2, "loss": 7}\n{"step": 3, "lo')
    state = (parts / "state.pt").read_bytes()
    for damaged in (b"", b"no state", state[:3000], state[:-3000]):
        (parts / "state.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match="state.pt is damaged"):
            run(parts, "--resume")
    (parts / "state.pt").write_bytes(state)
    with pytest.raises(ValueError, match="is of a run with --lr 0.002, not 0.1"):
        run(parts, "--resume", "--lr", "0.1")
    resumed, report = run(parts, "--resume")
    assert report.step == 6 and losses(parts) == losses(whole)
    for (name, ours), theirs in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_mean_of_checkpoints(tmp_path, capsys):
    folders = [tmp_path / name for name in ("one", "two", "wide")]
    for seed, folder in enumerate(folders):
        save_hf(tiny_decoder(seed=seed, heads=8 if folder.name == "wide" else 4), folder, tmp_path, "card")
    assert pretrain.main(["average", *map(str, folders[:2]), "--out", str(tmp_path / "mean")]) == 0
    one, two, mean = (load_file(folder / "model.safetensors") for folder in (*folders[:2], tmp_path / "mean"))
    for name in one:
        assert torch.equal(mean[name], ((one[name].float() + two[name].float()) / 2).bfloat16())
    assert pretrain.main(["average", *map(str, folders), "--out", str(tmp_path / "no")]) == 2
    assert "another shape" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_answer_rate_of_a_model_that_knows_the_text(mixture):
    class Oracle:
        """Its hidden state is the next token; from the third document on it is one off."""

        device, norm, lm_head = "cpu", staticmethod(lambda x: (None, x)), torch.nn.Identity()

        def __call__(self, tokens, logits):
            following = tokens.roll(-1, 1)
            following[2:] = (following[2:] + 1) % 600
            return F.one_hot(following, 600)

    known = [mixture.recall.document(random.Random(i), 400) for i in range(2)]
    assert pretrain.answer_rates(Oracle(), known)["exact"] == 1
    assert pretrain.answer_rates(Oracle(), known * 2)["exact"] == 0.5


def test_weighted_loss_counts_answers():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator, requires_grad=True)
    targets = torch.randint(7, (2, 5), generator=generator)
    answers = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    each = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    naive = (8 * each[answers].sum() + each[~answers].sum()) / (8 * 2 + 8)
    loss, answer, prose = pretrain.weighted_loss(logits, targets, answers, 8.0)
    for ours, theirs in ((answer, each[answers].mean()), (prose, each[~answers].mean()), (loss, naive)):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, naive)))


# ---- alignment -------------------------------------------------------------------------------------------------------


def all_rows(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """(B, L, H, T, T), the naive way."""
    rows = []
    decoder(tokens, logits="none", observe=lambda layer, query, key: rows.append(attention_rows(query, key)))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("slm_heads", [6, 2], ids=["one-each", "clusters"])
def test_losses_and_gradients_equal_those_of_the_naive_full_matrices(slm_heads):
    llm = sharp_decoder(1)  # 3 layers x 4 heads
    slm = sharp_decoder(2, num_hidden_layers=2, num_attention_heads=slm_heads, num_key_value_heads=2, head_dim=4)
    tokens = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(3))
    positions = torch.tensor([4, 9, 17, 38, 39])
    slots = align.plan_heads(llm, slm.config, tokens, positions)
    found = distill.make_losses(llm, slm, slots, compiled=False)(tokens, positions)

    rows = all_rows(llm, tokens).flatten(1, 2)[:, :, positions].double().detach()  # (B, L * H, R, T)
    ours = all_rows(slm, tokens).flatten(1, 2)[:, :, positions].double()
    naive = {"rows": [], "tail": [], "sums": []}
    seen = (torch.arange(40) <= positions[:, None]).double()
    for slot in slots.unique():
        members = (slots == slot).nonzero().flatten()
        target, own = rows[:, members].mean(1), ours[:, slot] + 1e-300 * (1 - seen)  # the log of a future key
        naive["rows"].append((torch.xlogy(target, target) - torch.xlogy(target, own)).sum(-1).mean())
        mass = target[..., SINKS:].sum(-1, keepdim=True)
        rest, own_rest = target[..., SINKS:] / mass, own[..., SINKS:] / own[..., SINKS:].sum(-1, keepdim=True)
        divergence = (torch.xlogy(rest, rest) - torch.xlogy(rest, own_rest)).sum(-1)
        naive["tail"].append((mass[..., 0] * divergence).mean() / (mass.mean() + align.MASS_FLOOR))
        for head in members:
            theirs = rows[:, head].sum(-2)[:, SINKS:]
            naive["sums"].append((1 - F.cosine_similarity(theirs, own.sum(-2)[:, SINKS:], dim=-1)).mean())
    logits = [model(tokens)[:, positions].double().log_softmax(-1) for model in (llm, slm)]
    naive["logits"] = [(logits[0].exp().detach() * (logits[0].detach() - logits[1])).sum(-1).mean()]
    weight = slm.layers[0].self_attn.qkv_proj.weight
    for name, values in naive.items():
        expected = torch.stack(values).mean()
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-5, msg=name)
        grads = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (found[name], expected)]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4 * grads[1].abs().max().item(), msg=name)


def test_a_copy_of_the_llm_has_similarity_one_and_no_loss():
    llm = sharp_decoder(1)
    slm = copy_decoder(llm, torch.float32)
    tokens = torch.randint(50, (2, 60), generator=torch.Generator().manual_seed(3))
    positions = torch.tensor([4, 20, 33, 59])
    slots = align.plan_heads(llm, slm.config, tokens, positions)
    assert slots.tolist() == list(range(12))
    for name, value in distill.make_losses(llm, slm, slots, compiled=False)(tokens, positions).items():
        assert abs(float(value)) < 1e-5, (name, value)
    sample = torch.randint(50, (128,), generator=torch.Generator().manual_seed(4)).tolist()
    found = distill.similarity(llm, slm, [sample])
    assert all(value.min() > 0.9999 for value in found.values()), found


def test_clusters_are_found():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 200, generator=generator)
    planted = torch.tensor([0, 0, 1, 0, 1, 2, 2, 3, 2, 3, 4, 4, 3, 4])  # numbered by mean depth
    features = centres[planted] + 0.3 * torch.randn(14, 200, generator=generator)
    assert align.cluster_heads(features, 5).tolist() == planted.tolist()


@pytest.mark.parametrize("heads", [270, 320, 300, 41])
def test_slots_are_distinct_ordered_by_depth_and_even(heads):
    slm = sharp_decoder(0, num_hidden_layers=10, num_attention_heads=32, num_key_value_heads=4).config
    slots = align.deal_slots(torch.arange(heads), slm)
    assert torch.equal(slots, slots.unique()) and int(slots.max()) < 320
    in_group = torch.bincount(slots // 8, minlength=40)
    assert int(in_group.max() - in_group.min()) <= 1


def test_principal_embedding_keeps_what_it_can():
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(90, 6, generator=generator) @ torch.randn(6, 40, generator=generator)  # rank 6
    small = align.principal_embedding(flat, 6, 0.02, generator)
    centred = flat - flat.mean(0)
    scale = small.norm() / centred.norm()
    torch.testing.assert_close(small @ small.T / scale**2, centred @ centred.T, rtol=1e-3, atol=1e-2)
    assert align.principal_embedding(flat, 48, 0.02, generator).shape == (90, 48)


# ---- distillation ----------------------------------------------------------------------------------------------------


def test_distilling_raises_the_similarity(llm_run, text, tmp_path):
    llm = sharp_decoder(1, vocab_size=600, num_hidden_layers=1)  # the tiny trained one attends evenly: too easy
    folder, out = tmp_path / "sharp", tmp_path / "slm"
    save_hf(llm, folder, llm_run[0], "")
    size = "--steps 80 --lr 1e-2 --batch-tokens 384 --rows 48 --hidden 32 --query-heads 8 --kv-heads 2"
    size += " --recall-share 0.5"
    _, report = distill.run(distill_args(folder, text, out, *size.split()))
    found = losses(out)
    assert sum(found[-5:]) < 0.6 * sum(found[:5]), found
    assert 0.9 < report.figures["best"] <= 1 and report.figures["best_worst"] <= report.figures["best"]

    once = ("--init", str(out), "--lr", "1e-9", "--steps", "1")
    again, _ = distill.run(distill_args(folder, text, tmp_path / "more", *once))
    name, saved = "model.layers.1.self_attn.q_proj.weight", load_file(out / "model.safetensors")
    torch.testing.assert_close(checkpoint_weights(again)[name], saved[name].float(), atol=1e-6, rtol=0)
    assert read_json(tmp_path / "more" / "heads.json") == read_json(out / "heads.json")


def test_a_trainer_that_is_through_exits_with_0(llm_run, text, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TOKENIZER_DOCUMENTS", 20)
    once = "--steps", "1", "--eval-every", "1"
    for trainer, args in ((distill, distill_args(llm_run[0], text, tmp_path / "slm", *once)),
                          (pretrain, pretrain_args(text, tmp_path / "llm", *once))):  # fmt: skip
        monkeypatch.setattr(trainer, "parse", lambda argv, args=args: args)
        assert trainer.main([]) == 0


# ---- what the LLM writes itself --------------------------------------------------------------------------------------

TEMPLATE = """{% for m in messages %}<|endoftext|>{{ m.role }}
{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|endoftext|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def chatty(llm_run, tmp_path_factory):
    """The tiny LLM's folder with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "llm"
    shutil.copytree(llm_run[0], folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def writer(folder: Path, text: str, seed: int = 1) -> self_text.Writer:
    own, end = data.load_text(folder)
    books = encode_books(read_books([text])[0], own.tokenizer, end)
    return self_text.Writer(load_decoder(folder, "cpu", torch.float32), own, [("books", books)], end, 300, seed)


@pytest.mark.parametrize("given", [False, True])
def test_a_conversation_is_what_the_template_makes_of_its_words(chatty, text, given):
    source = writer(chatty, text)
    system = next(one for one in self_text.SYSTEMS if one)
    source.joints = [self_text.joints(source.text, system)]
    own = source.begin(random.Random(0), 20, source.sources[0][1] if given else None, True)
    said = ["the river", "a mountain letter", "evening", "silence now", "go"][given:]
    sampled = [token for turn in said for token in [*source.text.words(turn), min(source.text.stop)]]
    while sampled or own.forced:  # what is sampled while marks are fed is not looked at
        own.feed(-1 if own.forced else sampled.pop(0), source.text.stop)
    roles = ("user", "assistant", "user", "assistant", "user")[given:]
    turns = [{"role": role, "content": turn} for role, turn in zip(roles, said)]
    first = [{"role": "system", "content": system}] + [{"role": "user", "content": "GIVEN"}] * given
    rest = source.text.words(source.text.render(first + turns).partition("GIVEN")[2 if given else 0])
    assert own.ids[-len(rest) :] == rest and (given or own.ids == rest)
    ends = [at for at in range(len(own.ids) + 1) if source.text.decode(own.ids[:at]).endswith("assistant\n")]
    assert own.answers == ends and len(ends) == 3


def test_a_turn_that_does_not_end_is_ended(chatty, text, monkeypatch):
    monkeypatch.setattr(self_text, "TURN_TOKENS", 5)
    source = writer(chatty, text)
    own = source.begin(random.Random(0), 0, None, False)
    for _ in range(80):
        own.feed(7, frozenset())
    user, assistant = own.marks
    turns = [7] * 5 + [*user, *[7] * 5, *assistant, *[7] * 5] * 2
    assert own.ids[own.answers[0] - len(user) - 5 :][: len(turns)] == turns


def test_written_text_is_of_the_seed_alone_and_goes_on(chatty, text, tmp_path, monkeypatch):
    monkeypatch.setattr(self_text, "ROUND_ROWS", 32)  # two conversations a round on a CPU
    whole, parts, other = (tmp_path / name for name in ("whole", "parts", "other"))
    texts = self_text.write(writer(chatty, text), whole, 1500)
    lines = read_lines(whole)
    assert sum(line["tokens"] for line in lines) >= 1500 and [line["text"] for line in lines] == texts
    assert all(SHORT <= line["tokens"] <= 300 for line in lines)
    begun = self_text.write(writer(chatty, text), parts, 500)
    assert len(begun) < len(texts) and begun == texts[: len(begun)]
    parts.write_bytes(parts.read_bytes() + whole.read_bytes()[len(parts.read_bytes()) :][:700])  # a round cut short
    assert self_text.write(writer(chatty, text), parts, 1500) == texts and parts.read_bytes() == whole.read_bytes()
    assert self_text.write(writer(chatty, text, seed=2), other, 500)[0] != texts[0]
    assert self_text.write(writer(chatty, text, seed=2), parts, 1000) == texts  # long enough: only read


def test_what_the_llm_writes_is_drawn_from_its_distribution(chatty, text):
    """The tokens of a batch equal those of a loop of full passes with the same draws."""
    source = writer(chatty, text)
    many = [source.begin(random.Random(i), 10, None, False) for i in range(3)]
    naive = [source.begin(random.Random(i), 10, None, False) for i in range(3)]
    source.talk(many, 60, seed=4)
    generator = torch.Generator().manual_seed(4)
    for _ in range(59):
        rows = torch.stack([source.llm(torch.tensor([own.ids]))[0, -1] for own in naive])
        draws = torch.multinomial(self_text.SAMPLER.probabilities(rows), 1, generator=generator)[:, 0].tolist()
        for own, token in zip(naive, draws):
            own.feed(token, source.text.stop)
    assert [own.ids for own in many] == [own.ids for own in naive]


def test_sequences_begin_with_a_conversation(mixture):
    own = [np.full(n, n, np.int32) for n in (10, 100, 300, 400)]
    mixed = Mixture(mixture.prose, None, [Stage(256, 20)], 1024, 0.0, 1, 0, own, 0.5)
    tokens = torch.cat([mixed[step][0] for step in range(20)])
    first = [int(row[0]) for row in tokens if (row == row[0]).all()]  # of these lengths they fill the row
    assert 25 < len(first) < 55 and {300, 400} == set(first)  # of 80 rows, and never a short one first


def test_distilling_on_self_text(chatty, llm_run, text, tmp_path):
    more = ("--self-text", "400", "--seq-length", "120", "96", "--batch-tokens", "240")
    runs = [distill.run(distill_args(chatty, text, tmp_path / name, *more))[1] for name in ("one", "two")]
    kept = [(tmp_path / name / "self_text.jsonl").read_bytes() for name in ("one", "two")]
    assert kept[0] == kept[1] and losses(tmp_path / "one") == losses(tmp_path / "two")
    assert runs[0].tokens == 3 * (2 * 120 + 2 * 96)
    card = (tmp_path / "one" / "README.md").read_text()
    assert "| chat |" in card and "| books |" in card and runs[0].figures["prompts_kl"] >= 0
    plain = distill_args(llm_run[0], text, tmp_path / "plain", "--self-text", "400")  # without a template
    distill.run(plain)
    assert "| chat |" not in (tmp_path / "plain" / "README.md").read_text()
    assert len(read_lines(tmp_path / "plain" / "self_text.jsonl")) >= 4
    figures = distill.judge(*(load_decoder(chatty, "cpu", torch.float32) for _ in range(2)), Text.load(chatty),
                            answered(load_decoder(chatty, "cpu", torch.float32), [[5] * 150], ["x"], 4, 1))  # fmt: skip
    assert figures["x"]["similarity"] == pytest.approx(1) and figures["all"] == figures["x"]


# ---- what a user gets wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module, flags, message", [
    (pretrain, "--text nowhere.txt", "cannot read nowhere.txt"),
    (pretrain, "--stages 64:0.5", "--stages"),
    (pretrain, "--resume", "--resume: there is no"),
    (pretrain, "--steps 0", "--steps: 0 is not"),
    (pretrain, "--batch-tokens 100", "does not hold one sequence"),
    (pretrain, "--recall-share nan", "--recall-share: nan is not"),
    (pretrain, "--head-dim 7", "--head-dim 7 is odd"),
    (pretrain, "--tokenizer {text}", "not a readable tokenizer"),
    (pretrain, "--max-positions 256", "longer than the 256 positions"),
    (pretrain, "--out {text}", "cannot make the folder"),
    (distill, "--out {text}", "cannot make the folder"),
    (distill, "--llm ./nowhere", "no folder ./nowhere"),
    (distill, "--resume", "--resume: there is no"),
    (distill, "--rows 95", "--rows 95"),
    (distill, "--rows 0", "--rows: 0 is not"),
    (distill, "--head-dim 7", "--head-dim 7 is odd"),
    (distill, f"--seed {2**70}", "--seed"),
    (distill, "--eval-length 50", "--eval-length: 50 is not"),
    (distill, "--query-heads 3 --kv-heads 2", "not a multiple"),
    (distill, "--seq-length 96 1024", "512 positions"),
    (distill, "--self-share 0.7 --recall-share 0.5 --self-text 300", "are more than all"),
    (distill, "--device cuda:99", "no device cuda:99"),
])  # fmt: skip
def test_a_mistake_is_one_line(module, flags, message, llm_run, text, tmp_path, capsys):
    flags, llm = flags.format(text=text).split(), str(llm_run[0])
    common = ["--text", text, "--device", "cpu", "--llm", llm]
    if module is distill:
        flags = [*common, "--out", str(tmp_path), "--workers", "0", "--seq-length", "96", *flags]
    else:
        known = ["--tokenizer", llm + "/tokenizer.json"] * ("--resume" not in flags)
        small = "--stages 256:1 --batch-tokens 256 --eval-length 300 --max-positions 512 --workers 0".split()
        flags = [*common[:4], "--out", str(tmp_path), *known, *small, *flags]
    try:
        code = module.main(flags)
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err.strip()
    assert code == 2 and error.startswith("error: ") and message in error and "\n" not in error


def test_a_gguf_file_becomes_the_checkpoint_that_it_was_made_of(tmp_path):
    """Written here as llama.cpp does: rows of query and key interleaved for its RoPE."""
    gguf, _ = pytest.importorskip("gguf"), pytest.importorskip("accelerate")
    source, out = tmp_path / "tiny.gguf", tmp_path / "out"
    out.mkdir()
    tokens = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "12"]
    decoder = tiny_decoder(heads=4, head_dim=8, vocab=len(tokens), tie_word_embeddings=True, rms_norm_eps=1e-5)
    config, writer = decoder.config, gguf.GGUFWriter(source, "llama")
    for name, value in dict(context_length=config.max_positions, embedding_length=32, block_count=config.layers,
                            feed_forward_length=48, head_count=4, head_count_kv=2, vocab_size=len(tokens),
                            layer_norm_rms_eps=1e-5, rope_freq_base=1e4, rope_dimension_count=8).items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    for size in ("add_key_length", "add_value_length"):
        getattr(writer, size)(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["a b", "1 2"])
    for kind in ("bos", "eos", "pad"):
        getattr(writer, f"add_{kind}_token_id")(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm", "q_proj": "attn_q",
             "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
    for name, weight in checkpoint_weights(decoder).items():
        parts = name.split(".")
        if parts[-2] in ("q_proj", "k_proj"):
            heads = len(weight) // config.head_dim
            weight = weight.view(heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)
        block = f"blk.{parts[2]}." if parts[1] == "layers" else ""
        writer.add_tensor(f"{block}{names[parts[-2]]}.weight", weight.bfloat16().float().contiguous().numpy())
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()

    assert prepare_smollm2.convert(source, out) == parameter_count(decoder)
    made, own = load_decoder(out), checkpoint_weights(decoder)
    assert made.config == config
    for name, weight in checkpoint_weights(made).items():
        assert torch.equal(weight, own[name].bfloat16()), name
    text = Text.load(out)
    assert text.decode(text.encode("ab  12\n3")) == "ab  12\n3" and text.stop == {0}
    assert [text.tokenizer.id_to_token(i) for i in text.encode("ab12")] == ["ab", "1", "2"]
