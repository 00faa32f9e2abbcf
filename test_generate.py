"""The command, as a user meets it: answers, report, and one clear line for every mistake."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import generate as command
from baselines import BASELINES
from checkpoint import weight_bytes
from conftest import by_slm, tiny_decoder
from decode import FullPolicy, Session, generate
from full_cache import FullCache
from report import first_difference, print_comparison
from settings import Settings
from smallkv import SmallKV
from text import Text

WORDS = "the quick brown fox jumps over the lazy dog and runs far away from the old grey house by the sea " * 4
PROMPT = WORDS.strip()
TEMPLATE = "{% for m in messages %}<user>{{ m['content'] }}</user>{% endfor %}{% if add_generation_prompt %}<bot>"
TEMPLATE += "{% endif %}"


def write_checkpoint(folder: Path, vocab: int = 280, positions: int = 1024, text: str = WORDS, **shape) -> Path:
    """A tiny random checkpoint in Hugging Face layout, with a byte-level tokenizer."""
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    decoder = tiny_decoder(vocab=vocab, max_position_embeddings=positions, **shape)
    tensors = {name if name == "lm_head.weight" else f"model.{name}": t for name, t in decoder.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    config = decoder.config
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": config.layers, "num_attention_heads": config.query_heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, "max_position_embeddings": positions,
        "torch_dtype": "float32",
    }))  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<end>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0]}))
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base = tmp_path_factory.mktemp("pair")
    return write_checkpoint(base / "llm"), write_checkpoint(base / "slm", heads=4, head_dim=8, seed=1)


@pytest.fixture
def run(pair, capsys):
    """Call the command on the pair; returns (exit code, standard output, standard error)."""

    def call(*arguments, llm=pair[0], slm=pair[1]):
        models = ["--llm", str(llm)] + (["--slm", str(slm)] if slm else [])
        code = command.main([*models, "--device", "cpu", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def expected_answer(pair, prompt: str, count: int, settings: Settings | None = None) -> str:
    loaded = command.load_pair(str(pair[0]), str(pair[1]), "cpu")
    policy = SmallKV(loaded.llm, loaded.slm, settings) if settings else FullPolicy(loaded.llm)
    ids = loaded.text.encode(prompt)
    return loaded.text.decode(generate(loaded.llm, policy, [ids], count, set(loaded.text.stop))[0])


# ---- Answers ---------------------------------------------------------------------------------------------------------


def test_streams_the_answer_and_reports(pair, run, tmp_path):
    code, out, err = run(PROMPT, "--budget", 0.2, "--max-new-tokens", 30, "--json", tmp_path / "r.json")
    assert code == 0
    assert out == expected_answer(pair, PROMPT, 30, Settings(budget=0.2)) + "\n"
    for piece in ("backend: PyTorch", "critical K, V", "host K, V", "head similarity", "TTFT", "TPOT"):
        assert piece in err, piece
    report = json.loads((tmp_path / "r.json").read_text())["smallkv"]
    length = report["answers"][0]["prompt_tokens"] + 29  # the last token was sampled and not fed
    size = Settings(budget=0.2).sizes(length)
    tokens = report["report"]["tokens"][0]  # counted in the slots
    assert (tokens["critical"], tokens["marginal"], tokens["all"]) == (size.critical, size.marginal, length)
    full = FullCache.predict(tiny_decoder().config, 1, length + 1, "cpu", torch.float32)[0].size
    assert report["report"]["full_cache_bytes"] == full
    assert report["report"]["moved"]["keys"] > 0


def test_prompts_come_from_arguments_files_and_standard_input(pair, run, tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    answer = expected_answer(pair, PROMPT, 8, Settings())
    assert run("--prompt-file", file, "--max-new-tokens", 8)[1] == answer + "\n"
    stdin = io.TextIOWrapper(io.BytesIO(PROMPT.encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run("--max-new-tokens", 8)[1] == answer + "\n"
    code, out, _ = run(PROMPT, "the lazy dog " * 40, "--max-new-tokens", 8)
    other = expected_answer(pair, "the lazy dog " * 40, 8, Settings())
    assert code == 0 and out == f"--- answer 1\n{answer}\n--- answer 2\n{other}\n"


def test_full_method_needs_no_slm(pair, run):
    code, out, err = run(PROMPT, "--method", "full", "--max-new-tokens", 8, slm=None)
    assert (code, out) == (0, expected_answer(pair, PROMPT, 8) + "\n")


def test_compare_shows_where_they_part(pair, run, tmp_path):
    code, out, _ = run(PROMPT, "--compare", "--budget", 0.05, "--max-new-tokens", 20, "--json", tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    full, small = (result[name]["answers"][0]["tokens"] for name in ("full", "smallkv"))
    parting = first_difference(full, small)
    assert code == 0 and parting is not None and f"they part at token {parting + 1}:" in out
    code, out, _ = run(PROMPT, "--compare", "--budget", 1.0, "--max-new-tokens", 20)
    assert "the same 20 tokens" in out


def test_paper_is_the_papers_setting(pair, run):
    _, out, _ = run(PROMPT, "--paper", "--budget", 0.1, "--max-new-tokens", 20)
    assert out == expected_answer(pair, PROMPT, 20, Settings.paper(budget=0.1)) + "\n"
    _, out, _ = run(PROMPT, "--no-saliency-shift", "--no-marginal", "--max-new-tokens", 20)
    assert out == expected_answer(pair, PROMPT, 20, by_slm(saliency_shift=False, score_decay=0.5)) + "\n"


def test_stops_at_any_stop_token(pair, run, tmp_path):
    loaded = command.load_pair(str(pair[0]), None, "cpu")
    ids = generate(loaded.llm, FullPolicy(loaded.llm), [loaded.text.encode(PROMPT)], 12)[0]
    stops = [ids[5], 0]
    folder = tmp_path / "llm"
    folder.mkdir()
    for file in pair[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    _, out, _ = run(PROMPT, "--method", "full", "--max-new-tokens", 12, llm=folder)
    assert out == loaded.text.decode(ids[: ids.index(ids[5])]) + "\n"


def test_chat_renders_the_checkpoints_template(pair):
    text = Text.load(pair[0])
    assert text.chat("the dog") == text.tokenizer.encode("<user>the dog</user><bot>").ids


def test_streamed_pieces_make_the_text_even_across_characters(pair):
    text = Text.load(pair[0])
    words = "the fox – naïve 漢字 🦊 runs"
    stream = text.stream()
    pieces = [stream.push(token) for token in text.encode(words)]
    assert "".join(pieces) == words and stream.finish() == ""
    assert not any("\ufffd" in piece for piece in pieces)


def test_ten_lines_of_the_readme(pair, monkeypatch, capsys):
    """The README's Python example, with the tiny pair in place of its names."""
    readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    (code,) = [block.split("```")[0] for block in readme.split("```python\n")[1:] if "load_pair" in block]
    assert len(code.strip().splitlines()) <= 10
    code = code.replace('"pair/llm"', repr(str(pair[0]))).replace('"pair/slm"', repr(str(pair[1])))
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_ctrl_c_keeps_what_was_generated(pair, run, monkeypatch):
    step, calls = Session.step, []

    def interrupted(self, tokens):
        calls.append(tokens)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(self, tokens)

    monkeypatch.setattr(Session, "step", interrupted)
    code, out, err = run(PROMPT, "--max-new-tokens", 20)
    monkeypatch.setattr(Session, "step", step)
    assert (code, out) == (130, expected_answer(pair, PROMPT, 5, Settings()) + "\n")
    assert "interrupted" in err and "TTFT" in err


# ---- Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--budget", 0, "x"], "budget 0.0 is outside (0, 1]"),
        (["--budget", 1.01, "x"], "budget 1.01 is outside (0, 1]"),
        (["--budget", "nan", "x"], "budget nan is outside (0, 1]"),
        (["--score-decay", 2, "x"], "score decay 2.0 is outside [0, 1]"),
        (["--max-new-tokens", 0, "x"], "--max-new-tokens 0"),
        (["--temperature", -1, "x"], "temperature -1.0"),
        (["--temperature", "nan", "x"], "temperature nan"),
        (["--seed", 2**64, "x"], "seed 18446744073709551616 is outside"),
        (["x", "--max-new-tokens", 10**9], "longer than the 1024 positions"),
        (["--top-p", 0, "x"], "top-p 0.0"),
        ([""], "prompt 1 is empty"),
        (["x", " \n"], "prompt 2 is empty"),
        (["x " * 2000, "--max-new-tokens", 10], "longer than the 1024 positions"),
        (["x", "--max-new-tokens", 1024], "longer than the 1024 positions"),
        (["--prompt-file", "nowhere.txt"], "cannot read prompt file nowhere.txt: No such file"),
        (["x", "--device", "cuda:7"], "no device cuda:7: PyTorch sees"),
        (["x", "--device", "abacus"], "no such device 'abacus'"),
        (["x", "--device", "meta"], "device 'meta' is not supported"),
        (["x", "--json", "/nowhere/r.json", "--max-new-tokens", 1], "cannot write /nowhere/r.json"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(run, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2
    assert message in err and err.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err


@pytest.mark.parametrize("flags", [(), ("--method", "full", "--speculate", 2)])
def test_slm_is_asked_for(run, flags):
    code, _, err = run("x", *flags, slm=None)
    assert code == 2 and "--slm is missing" in err


def test_a_prompt_file_that_is_not_utf8(run, tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    code, _, err = run("--prompt-file", tmp_path / "latin.txt")
    assert code == 2 and "is not UTF-8: byte 0xe9 at offset 3" in err


def test_no_template_for_chat(pair, run, tmp_path):
    folder = tmp_path / "llm"
    folder.mkdir()
    for file in pair[0].iterdir():
        if file.name != "tokenizer_config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    code, _, err = run("x", "--chat", llm=folder)
    assert code == 2 and "no chat template" in err


def test_different_tokenizers_are_named(run, tmp_path):
    other = write_checkpoint(tmp_path / "other", text="completely different words about stones and rivers " * 9)
    code, _, err = run("x", slm=other)
    assert code == 2 and "tokenizers of LLM and SLM differ, first at id" in err


def test_padding_rows_of_the_larger_embedding_are_never_sampled(pair, run, tmp_path):
    """As in Qwen2.5: the LLM has more embeddings than the SLM and the tokenizer. Its best id may be one of those."""
    folder = write_checkpoint(tmp_path / "llm", vocab=600)
    (folder / "tokenizer.json").write_bytes((pair[0] / "tokenizer.json").read_bytes())
    code, _, err = run(PROMPT, "--max-new-tokens", 30, llm=folder)
    assert code == 0, err


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("generation_config.json", {"eos_token_id": [[1]]}, "eos_token_id is [[1]]"),
        ("tokenizer_config.json", {"chat_template": {"a": 1}}, "chat_template is a dict, not text"),
        ("tokenizer_config.json", {"chat_template": "{{ messages + 1 }}"}, "chat template failed"),
        ("model.safetensors.index.json", {"weight_map": None}, "has no weight_map"),
        ("config.json", {"model_type": "llama", "vocab_size": "280"}, "config.json lacks"),
    ],
)
def test_odd_checkpoint_files(pair, run, tmp_path, file, content, message):
    folder = tmp_path / "llm"
    folder.mkdir()
    for source in pair[0].iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    (folder / file).write_text(json.dumps(content))
    code, _, err = run("x", "--chat", "--max-new-tokens", 2, llm=folder)
    assert code == 2 and message in err and "Traceback" not in err


def test_comparison_shows_brackets_and_backslashes_as_they_are(pair):
    text = Text.load(pair[0])
    one, other = (text.encode(r"\[x = 2\] [/b] C:\ " + end) for end in ("fox", "dog"))
    console = Console(file=io.StringIO(), width=200)
    full, small = (command.Answer([ids], [False], {}) for ids in (one, other))
    print_comparison(text, full, small, console)
    shown = console.file.getvalue()
    assert shown.count(r"\[x = 2\] [/b] C:\ ") == 2 and "they part at token" in shown


def test_interrupted_in_the_prefill_says_so(run, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "prefill", interrupted)
    code, out, err = run(PROMPT)
    assert (code, out) == (130, "\n") and "ended in the prefill" in err and "TTFT" not in err


def test_an_slm_with_too_few_embeddings(pair, run, tmp_path):
    folder = write_checkpoint(tmp_path / "slm", vocab=270)
    (folder / "tokenizer.json").write_bytes((pair[0] / "tokenizer.json").read_bytes())
    code, _, err = run("x", slm=folder)
    assert code == 2 and "the tokenizer has id 279, but the SLM only 270 embeddings" in err


def test_a_model_that_does_not_fit(run, monkeypatch):
    weights = 2 * weight_bytes(tiny_decoder(vocab=280).config, torch.float32)  # more than those of both models
    for available, named in ((1 << 12, "LLM weights"), (weights, "LLM host K, V")):
        monkeypatch.setattr("checkpoint.available_bytes", lambda device: available)
        code, _, err = run(PROMPT, "--max-new-tokens", 700)
        assert code == 2 and "does not fit on cpu" in err and "GiB available" in err and named in err


def test_unreachable_hub(run, monkeypatch):
    import huggingface_hub

    def unreachable(*arguments, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    code, _, err = run("x", llm="nobody/nothing")
    assert code == 2 and "hub not reachable and nobody/nothing is not in the local cache" in err


@pytest.mark.parametrize("method", BASELINES)
def test_every_baseline_answers_one_prompt_and_several(method, run, tmp_path):
    """Without an SLM; a batch gives the answers of the prompts alone, and the report says what became of the tokens."""
    options = ("--method", method, "--budget", 0.3, "--max-new-tokens", 12, "--json", tmp_path / "r.json")
    alone = []
    for prompt in (PROMPT, "the quick brown fox"):
        code, out, err = run(prompt, *options, slm=None)
        report = json.loads((tmp_path / "r.json").read_text())[method]
        assert code == 0 and "tier movement none (one tier)" in err and "TPOT" in err
        assert out.strip() == report["answers"][0]["text"].strip()
        alone.append(report["answers"][0]["tokens"])
    code, _, err = run(PROMPT, "the quick brown fox", *options, slm=None)
    both = json.loads((tmp_path / "r.json").read_text())[method]
    assert code == 0 and [answer["tokens"] for answer in both["answers"]] == alone
    for tokens in both["report"]["tokens"]:
        assert sum(count for tier, count in tokens.items() if tier != "all") == pytest.approx(tokens["all"])
    assert ("dropped" in err) == (method != "oracle")


def test_fused_scores_are_kept_beside_both_caches(pair, run, tmp_path):
    code, _, err = run(PROMPT, "--scores", "fused", "--score-decay", 0.5, "--max-new-tokens", 8, "--json",
                       tmp_path / "r.json")  # fmt: skip
    report = json.loads((tmp_path / "r.json").read_text())["smallkv"]["report"]
    assert code == 0 and {entry["model"] for entry in report["ledger"]} == {"LLM", "SLM"}
    assert sum(entry["what"] == "scores" for entry in report["ledger"]) == 2
    code, _, err = run(PROMPT, "--scores", "fused", "--no-saliency-shift")
    assert code == 2 and err.splitlines()[-1].startswith("error: fused scores need the SLM's: without saliency shift")


@pytest.mark.parametrize("method", ["full", "smallkv"])
def test_drafts_are_shown_beside_the_same_method_without(method, run, tmp_path):
    options = ("--max-new-tokens", 12, "--method", method, "--budget", 1.0, "--json", tmp_path / "r.json")
    code, out, err = run(PROMPT, *options)
    alone = json.loads((tmp_path / "r.json").read_text())[method]["answers"][0]["tokens"]
    code, out, err = run(PROMPT, *options, "--speculate", 3, "--compare")
    both = json.loads((tmp_path / "r.json").read_text())
    assert code == 0 and f"the same {len(alone)} tokens" in out and "drafts: " in err, err
    assert [result["answers"][0]["tokens"] for result in both.values()] == [alone, alone]
    plain, drafted = (result["report"] for result in both.values())
    assert list(both) == [method, f"{method}, 3 drafts"] and plain["speculation"] is None
    found = drafted["speculation"]
    assert found["drafts"] == 3 and found["acceptance"] == found["accepted"] / found["drafted"]
    assert found["tokens_per_step"] == pytest.approx((len(alone) - 1) / drafted["decode_steps"])
    assert {entry["model"] for entry in drafted["ledger"]} == {"LLM", "SLM"}
    code, out, err = run(PROMPT, "x", *options, "--speculate", 3, "--temperature", 0.8)
    assert code == 0 and "--- answer 2" in out and "tokens per step and sequence" in err


def test_a_smaller_slm(run, tmp_path):
    """Fewer layers and a cut cache together, in the ledger: a layer of two, and slots for two fifths of the tokens."""
    options = ("--slm-layers", 1, "--slm-budget", 0.4, "--max-new-tokens", 8, "--json", tmp_path / "r.json")
    code, _, err = run(PROMPT, *options)
    result = json.loads((tmp_path / "r.json").read_text())["smallkv"]
    (kept,) = [entry["bytes"] for entry in result["report"]["ledger"] if entry["what"] == "kept K, V"]
    capacity = result["answers"][0]["prompt_tokens"] + 8
    assert code == 0 and kept == 2 * 1 * 2 * 8 * 4 * int(0.4 * capacity) and "kept K, V" in err


@pytest.mark.parametrize("arguments, message", [
    (("--speculate", -1), "--speculate -1 is negative"),
    (("--speculate", 2, "--method", "h2o"), "--speculate works with --method full and smallkv, not h2o"),
    (("--speculate", 2, "--slm-layers", 1), "--speculate needs the SLM's words, and --slm-layers 1 stops before them"),
    (("--speculate", 2, "--refresh", 2), "a plan every 2 steps: with drafts there is one a round"),
    (("--speculate", 2, "--no-saliency-shift"), "drafts need saliency shift"),
    (("--speculate", 2, "--scores", "fused"), "drafts need scores slm"),
    (("--slm-budget", 0), "SLM budget 0.0 is outside (0, 1]"),
])  # fmt: skip
def test_what_a_smaller_slm_and_drafts_do_not_go_with(run, arguments, message):
    code, _, err = run(PROMPT, *arguments)
    assert code == 2 and err.strip().splitlines()[-1].startswith(f"error: {message}"), err


def test_baselines_name_bad_input(run):
    code, _, err = run(PROMPT, "--method", "h2o", "--budget", 1.5, slm=None)
    assert (code, err.count("\n")) == (2, 1) and "budget 1.5 is outside" in err
    code, _, err = run(PROMPT, "--method", "snapkv", "--compare")
    assert (code, err.count("\n")) == (2, 1) and "leave --method snapkv out" in err
