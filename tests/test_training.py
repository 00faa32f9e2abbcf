"""Tests of corpus.py, training.py, pretrain.py, align.py and distill.py: tiny shapes, text made here, CPU."""

import json
import lzma
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

import align
import corpus
import distill
import pretrain
from checkpoint import checkpoint_weights, load_decoder
from conftest import tiny_decoder
from corpus import END, Mixture, Recall, Stage, encode_books, parse_stages, read_books
from kernels import attention_rows
from match import SINKS
from model import Config, Decoder
from recall import document_ids
from training import copy_decoder, initialise, learning_rate, save_hf

WORDS = """river mountain window letter garden evening silence winter village summer morning shadow forest kitchen
captain journey harbour silver question candle weather corner distance narrow ancient gentle strange heavy quiet
crossed watched carried followed remembered opened reached forgot wandered listened beyond beneath toward without
""".split()


def make_book(seed: int, paragraphs: int = 60) -> str:
    rng = random.Random(seed)

    def sentence() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(6, 12))).capitalize() + "."

    return "\n\n".join(" ".join(sentence() for _ in range(5)) for _ in range(paragraphs))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "books.txt"
    path.write_text(f"\n{END}\n".join(make_book(seed) for seed in range(4)))
    return str(path)


def pretrain_args(text: str, out: Path, *more: str):
    return pretrain.parse(["--text", text, "--out", str(out), "--tiny", "--device", "cpu", "--vocab", "600", *more])


@pytest.fixture(scope="module")
def llm_run(text, tmp_path_factory):
    """A tiny LLM: its folder, and the trained decoder that was saved there."""
    out = tmp_path_factory.mktemp("pair") / "llm"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "TOKENIZER_DOCUMENTS", 20)
        decoder, _ = pretrain.run(pretrain_args(text, out))
    return out, decoder


def distill_args(llm: Path, text: str, out: Path, *more: str):
    shape = "--layers 2 --query-heads 4 --kv-heads 1 --head-dim 8 --hidden 24 --intermediate 48"
    size = "--seq-length 96 --batch 2 --rows 12 --steps 6 --log-every 1 --eval-every 3 --eval-length 100"
    flags = f"{shape} {size} --eval-samples 2 --device cpu --workers 0".split()
    return distill.parse(["--llm", str(llm), "--text", text, "--out", str(out), *flags, *more])


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def tiny_config(**changes) -> Config:
    raw = dict(model_type="llama", vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    raw |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    return Config.from_hf(raw | changes)


def sharp_decoder(seed: int, **changes) -> Decoder:
    """Random weights large enough that attention is far from uniform."""
    decoder = initialise(Decoder(tiny_config(**changes)), seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 2:
                parameter.mul_(12)
    return decoder


# ---- corpus ----------------------------------------------------------------------------------------------------------


def test_books_from_plain_and_packed_text(text, tmp_path):
    packed = tmp_path / "books.txt.xz"
    packed.write_bytes(lzma.compress(Path(text).read_bytes()))
    assert read_books([text]) == read_books([str(packed)])
    kept, held_out = read_books([text])
    assert (len(kept), len(held_out)) == (3, 1)
    (tmp_path / "one.txt").write_text("a" * 100)
    assert [len(part) for books in read_books([str(tmp_path / "one.txt")]) for part in books] == [90, 10]


def test_tokenizer_splits_digits_and_returns_the_text(llm_run):
    tokenizer = Tokenizer.from_file(str(llm_run[0] / "tokenizer.json"))
    sample = "The code of the upper safe is 4711.\nQuestion: What?"
    ids = tokenizer.encode(sample).ids
    assert tokenizer.decode(ids) == sample
    assert [tokenizer.decode([i]) for i in ids].count("1") == 2
    assert tokenizer.token_to_id(END) == 0 and tokenizer.get_vocab_size() == 600


@pytest.fixture(scope="module")
def mixture(llm_run, text) -> Mixture:
    tokenizer = Tokenizer.from_file(str(llm_run[0] / "tokenizer.json"))
    kept, _ = read_books([text])
    recall = Recall.from_books(kept, tokenizer, "train")
    stages = [Stage(256, 3), Stage(512, 6)]
    return Mixture(encode_books(kept, tokenizer, 0), recall, stages, 1024, share=0.7, seed=5, end=0)


def test_data_of_a_step_does_not_depend_on_workers_or_start(mixture):
    def steps(workers, start):
        context = "fork" if workers else None
        loader = DataLoader(
            mixture, None, sampler=range(start, 6), num_workers=workers, multiprocessing_context=context
        )
        return list(loader)

    plain, shared, late = steps(0, 0), steps(2, 0), steps(2, 4)
    assert [tokens.shape for tokens, _ in plain] == [(4, 257)] * 3 + [(2, 513)] * 3
    for ours, theirs in [*zip(plain, shared, strict=True), *zip(plain[4:], late, strict=True)]:
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_documents_fit_and_their_answers_are_marked(mixture, llm_run):
    tokenizer = Tokenizer.from_file(str(llm_run[0] / "tokenizer.json"))
    tokens, answers = mixture[4]
    marked = 0
    for row, mask in zip(tokens, answers, strict=True):
        starts = (mask & ~F.pad(mask, (1, 0))[:-1]).nonzero().flatten().tolist()
        marked += len(starts)
        for start in starts:  # every answer stands complete, after its question
            assert tokenizer.decode(row[:start].tolist()).endswith("Answer:")
            end = start + int((~mask[start:]).nonzero()[0])
            assert tokenizer.decode(row[start:end].tolist()).endswith(".")
    assert marked


def test_stages():
    assert parse_stages("512:0.4,2048:0.6", 100) == [Stage(512, 40), Stage(2048, 100)]
    for wrong in ("512", "512:0.5", "x:1"):
        with pytest.raises(ValueError, match="--stages"):
            parse_stages(wrong, 100)


# ---- training --------------------------------------------------------------------------------------------------------


def test_learning_rate_rises_then_falls_to_a_tenth(text, tmp_path):
    options = pretrain.options_from(pretrain_args(text, tmp_path, "--steps", "1000", "--warmup", "0.1", "--lr", "1"))
    rates = [learning_rate(step, options) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and rates[99] == pytest.approx(1.0) and rates[-1] == pytest.approx(0.1)
    assert rates == sorted(rates[:99]) + sorted(rates[99:], reverse=True)


def test_pretraining_lowers_the_loss(llm_run):
    found = losses(llm_run[0])
    assert found[-1] < found[0] - 0.2, found


def test_saved_folder_gives_the_trained_models_logits(llm_run):
    folder, decoder = llm_run
    loaded, copy = load_decoder(folder), copy_decoder(decoder, torch.bfloat16)
    assert loaded.config == decoder.config and loaded.dtype == torch.bfloat16
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    tokens = torch.randint(600, (2, 40), generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded(tokens), copy(tokens))
    assert not (folder / "state.pt").exists() and (folder / "README.md").read_text().count("prose_loss") == 2


@pytest.mark.parametrize("trainer", ["pretrain", "distill"])
def test_stop_and_resume_equals_not_stopping(trainer, llm_run, text, tmp_path):
    def run(out, *more):
        if trainer == "distill":
            return distill.run(distill_args(llm_run[0], text, out, *more))
        tokenizer = str(llm_run[0] / "tokenizer.json")
        few = ("--steps", "6", "--log-every", "1", "--eval-every", "2")
        known = () if "--resume" in more else ("--tokenizer", tokenizer)
        return pretrain.run(pretrain_args(text, out, *few, *known, *more))

    whole, report = run(tmp_path / "whole")
    _, stopped = run(tmp_path / "parts", "--stop-after-minutes", "0")
    assert (stopped.step, report.step) == (1, 6) and (tmp_path / "parts" / "state.pt").exists()
    resumed, report = run(tmp_path / "parts", "--resume")
    assert report.step == 6
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for (name, ours), theirs in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_mean_of_checkpoints(tmp_path, capsys):
    folders = [tmp_path / name for name in ("one", "two", "wide")]
    for seed, folder in enumerate(folders):
        decoder = tiny_decoder(seed=seed, heads=8 if folder.name == "wide" else 4)
        save_hf(decoder, folder, tmp_path, "card")
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

    documents = [mixture.recall.document(random.Random(i), 400) for i in range(2)]
    assert pretrain.answer_rates(Oracle(), documents)["exact"] == 1
    assert pretrain.answer_rates(Oracle(), documents * 2)["exact"] == 0.5


def test_weighted_loss_counts_answers(mixture):
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2, 5, 7, generator=generator), torch.randint(7, (2, 5), generator=generator)
    answers = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    each = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    loss, answer, prose = pretrain.weighted_loss(logits, targets, answers, 8.0)
    torch.testing.assert_close(answer, each[answers].mean())
    torch.testing.assert_close(prose, each[~answers].mean())
    torch.testing.assert_close(loss, (8 * each[answers].sum() + each[~answers].sum()) / (8 * 2 + 8))


# ---- alignment -------------------------------------------------------------------------------------------------------


def all_rows(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """(B, L, H, T, T), the naive way."""
    rows = []
    decoder(tokens, logits="none", observe=lambda layer, query, key: rows.append(attention_rows(query, key)))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("slm_heads", [6, 2], ids=["one-each", "clusters"])
def test_losses_equal_the_naive_full_matrices(slm_heads):
    llm = sharp_decoder(1)  # 3 layers x 4 heads
    slm = sharp_decoder(2, num_hidden_layers=2, num_attention_heads=slm_heads, num_key_value_heads=2, head_dim=4)
    tokens = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(3))
    positions = torch.tensor([4, 9, 17, 38, 39])
    slots = align.plan_heads(llm, slm.config, tokens, positions)
    pair = distill.make_pair(llm, slm, slots, compiled=False)
    found = pair.losses(tokens, positions)

    rows = all_rows(llm, tokens).flatten(1, 2)[:, :, positions].double()  # (B, L * H, R, T)
    ours = all_rows(slm, tokens).flatten(1, 2)[:, :, positions].double()
    whole, tails, sums = [], [], []
    for slot in slots.unique():
        members = (slots == slot).nonzero().flatten()
        target, own = rows[:, members].mean(1), ours[:, slot]
        whole.append((torch.xlogy(target, target) - torch.xlogy(target, own)).sum(-1).mean())
        mass = target[..., SINKS:].sum(-1, keepdim=True)
        rest, own_rest = target[..., SINKS:] / mass, own[..., SINKS:] / own[..., SINKS:].sum(-1, keepdim=True)
        divergence = (torch.xlogy(rest, rest) - torch.xlogy(rest, own_rest)).sum(-1)
        tails.append((mass[..., 0] * divergence).mean() / (mass.mean() + align.MASS_FLOOR))
        for head in members:
            theirs = rows[:, head].sum(-2)[:, SINKS:]
            sums.append((1 - F.cosine_similarity(theirs, own.sum(-2)[:, SINKS:], dim=-1)).mean())
    for name, naive in (("rows", whole), ("tail", tails), ("sums", sums)):
        torch.testing.assert_close(found[name].double(), torch.stack(naive).mean(), rtol=1e-4, atol=1e-5, msg=name)
    logits = [model(tokens)[:, positions].double().log_softmax(-1) for model in (llm, slm)]
    kl = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean()
    torch.testing.assert_close(found["logits"].double(), kl, rtol=1e-4, atol=1e-5)


def test_a_copy_of_the_llm_has_similarity_one_and_no_loss():
    llm = sharp_decoder(1)
    slm = copy_decoder(llm, torch.float32)
    tokens = torch.randint(50, (2, 60), generator=torch.Generator().manual_seed(3))
    positions = torch.tensor([4, 20, 33, 59])
    slots = align.plan_heads(llm, slm.config, tokens, positions)
    assert slots.tolist() == list(range(12))
    for name, value in distill.make_pair(llm, slm, slots, compiled=False).losses(tokens, positions).items():
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
    slm = tiny_config(num_hidden_layers=10, num_attention_heads=32, num_key_value_heads=4)
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
    wide = align.principal_embedding(flat, 48, 0.02, generator)
    assert wide.shape == (90, 48) and small.std() == pytest.approx(0.02, rel=1e-3)


# ---- distill ---------------------------------------------------------------------------------------------------------


def test_distilling_raises_the_similarity(llm_run, text, tmp_path):
    llm = sharp_decoder(1, vocab_size=600, num_hidden_layers=1)  # the tiny trained one attends evenly: too easy
    folder = tmp_path / "sharp"
    distill.save_hf(llm, folder, llm_run[0], "")
    size = "--steps 80 --lr 1e-2 --batch 4 --rows 48 --hidden 32 --query-heads 8 --kv-heads 2 --recall-share 0.5"
    args = distill_args(folder, text, tmp_path / "slm", *size.split())
    _, report = distill.run(args)
    found = losses(tmp_path / "slm")
    assert sum(found[-5:]) < 0.6 * sum(found[:5]), found
    saved = json.loads((tmp_path / "slm" / "similarity.json").read_text())
    assert np.shape(saved["best"]) == (1, 4) and np.mean(saved["best"]) > 0.9, saved["best"]
    assert report.figures["best"] <= 1 and report.figures["best_worst"] <= report.figures["best"]

    once = ("--init", str(tmp_path / "slm"), "--lr", "1e-9", "--steps", "1")
    slm_again, _ = distill.run(distill_args(folder, text, tmp_path / "more", *once))
    name, saved = "model.layers.1.self_attn.q_proj.weight", load_file(tmp_path / "slm" / "model.safetensors")
    torch.testing.assert_close(checkpoint_weights(slm_again)[name], saved[name].float(), atol=1e-6, rtol=0)
    assert (tmp_path / "more" / "heads.json").read_text() == (tmp_path / "slm" / "heads.json").read_text()


def test_similarity_command_prints_json_last(llm_run, text, capsys):
    pair = ["--llm", str(llm_run[0]), "--slm", str(llm_run[0]), "--device", "cpu"]
    assert distill.main(["similarity", *pair, "--text", text, "--length", "128", "--samples", "1"]) == 0
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last["cache_ratio"] == 1 and last["best"] > 0.999 and last["jaccard_worst"] > 0.99


@pytest.mark.parametrize(
    "command, flags, message",
    [
        (pretrain, ["--text", "nowhere.txt"], "no text file nowhere.txt"),
        (pretrain, ["--stages", "64:0.5"], "--stages"),
        (pretrain, ["--resume"], "--resume: there is no"),
        (pretrain, ["--steps", "0"], "--steps 0"),
        (pretrain, ["--batch-tokens", "100"], "does not hold one sequence"),
        (distill, ["--llm", "./nowhere"], "no folder ./nowhere"),
        (distill, ["--rows", "95"], "--rows 95"),
        (distill, ["--eval-length", "50"], "--eval-length 50"),
        (distill, ["--query-heads", "3", "--kv-heads", "2"], "not a multiple"),
        (distill, ["--seq-length", "4096"], "512 positions"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(command, flags, message, llm_run, text, tmp_path, capsys):
    common = ["--text", text, "--out", str(tmp_path), "--device", "cpu", "--workers", "0"]
    if command is distill:
        common += ["--llm", str(llm_run[0]), "--seq-length", "96"]
    else:
        common += ["--tiny", "--tokenizer", str(llm_run[0] / "tokenizer.json")]
    assert command.main(common + flags) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error


def test_recall_documents_are_of_the_split_asked_for(mixture):
    test = replace(mixture.recall, split="test")
    shared = mixture.recall.document(random.Random(1), 500), test.document(random.Random(1), 500)
    assert document_ids(shared[0])[0] != document_ids(shared[1])[0]
