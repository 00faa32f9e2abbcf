"""Loading, against Transformers on tiny random checkpoints; words at both ends; what cannot be used is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import checkpoint
from checkpoint import CheckpointError, checkpoint_weights, load_decoder, resolve, weight_bytes
from conftest import tiny_decoder
from model import Decoder
from test_model import LLAMA3, SMALL, YARN, transformers
from text import Text, check_same_tokenizer

FAMILIES = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-yarn-mscale": ("Llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": {**YARN, "factor": 2.5, "beta_fast": 16.0, "truncate": False}}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen3-tied-multihead": ("Qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
}


def make_checkpoint(folder: Path, family: str, shard: str = "1GB"):
    """A tiny random Transformers model and its checkpoint folder; biases and norms are random too."""
    kind, changes = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder, max_shard_size=shard)
    return model


# ---- The decoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, tmp_path, device):
    """And the weights under the checkpoint's names are those of the file."""
    reference = make_checkpoint(tmp_path, family).to(device)
    decoder = load_decoder(tmp_path, device, torch.float32)
    tokens = torch.randint(61, (2, 50), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        difference = (decoder(tokens) - reference(tokens).logits).abs().max().item()
    assert difference < 1e-4, f"largest difference of logits {difference}"
    weights, stored = checkpoint_weights(decoder), load_file(tmp_path / "model.safetensors")
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[name].cpu(), stored[name]) for name in stored)


def test_sharded_equals_single_and_dtype_is_converted(tmp_path):
    make_checkpoint(tmp_path / "one", "qwen2")
    make_checkpoint(tmp_path / "many", "qwen2", shard="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = load_decoder(tmp_path / "one"), load_decoder(tmp_path / "many")
    gone = sorted((tmp_path / "many").glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        load_decoder(tmp_path / "many")
    for (name, a), b in zip(one.named_parameters(), many.parameters()):
        assert torch.equal(a, b), name
    half = load_decoder(tmp_path / "one", dtype=torch.bfloat16)
    for (name, a), b in zip(one.named_parameters(), half.parameters()):
        assert torch.equal(a.bfloat16(), b), name
    assert half.lm_head.weight is half.embed_tokens.weight  # tied: one tensor, not two
    assert weight_bytes(half.config, torch.bfloat16) == sum(p.nbytes for p in half.parameters())
    assert checkpoint.checkpoint_dtype(tmp_path / "one") == one.dtype == torch.float32


def test_the_first_layers_alone_equal_those_of_the_whole_model(tmp_path):
    make_checkpoint(tmp_path, "qwen2")
    tokens = torch.arange(12)[None]
    seen = {}
    for layers in (None, 1):
        decoder, seen[layers] = load_decoder(tmp_path, layers=layers), []
        decoder(tokens, logits="none", observe=lambda layer, query, key: seen[layers].append((query, key)))
        assert weight_bytes(decoder.config, torch.float32) == sum(p.nbytes for p in decoder.parameters())
    assert len(seen[1]) == 1 < len(seen[None])
    assert all(torch.equal(short, whole) for short, whole in zip(seen[1][0], seen[None][0]))
    for layers in (0, 99):
        with pytest.raises(CheckpointError, match=f"{layers} layers were asked for; 1 to 2 can run"):
            load_decoder(tmp_path, layers=layers)


@pytest.mark.parametrize("stored", ["the same", "another", "alone", "a larger one"])
def test_an_output_projection_stored_beside_a_tie(stored, tmp_path):
    """As in Transformers 5: one that differs counts; one that stands alone is the embedding too."""
    make_checkpoint(tmp_path, "llama-tied")
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"

    def edit(tensors):
        tensors[head] = tensors[embedding] + (stored == "another")
        if stored == "alone":
            del tensors[embedding]
        if stored == "a larger one":
            tensors[head] = torch.cat([tensors[head]] * 2)

    edit_weights(tmp_path, edit)
    if stored == "a larger one":
        with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \(122, 48\)"):
            load_decoder(tmp_path)
        return
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(decoder.lm_head.weight, tensors[head])
    assert torch.equal(decoder.embed_tokens.weight, tensors.get(embedding, tensors[head]))
    assert (decoder.lm_head.weight is decoder.embed_tokens.weight) == (stored != "another") == decoder.config.tied
    if stored != "alone":
        reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        tokens = torch.arange(30)[None]
        torch.testing.assert_close(decoder(tokens), reference(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shards", [True, False])
def test_a_single_file_wins_over_an_index_beside_it(shards, tmp_path):
    """As in Transformers; the index is of another model, and its shards may be gone."""
    make_checkpoint(tmp_path / "llm", "qwen2")
    make_checkpoint(tmp_path / "other", "qwen2", shard="10KB")
    for path in (tmp_path / "other").glob("model*" if shards else "*.index.json"):
        path.rename(tmp_path / "llm" / path.name)
    stored = load_file(tmp_path / "llm" / "model.safetensors")
    loaded = checkpoint_weights(load_decoder(tmp_path / "llm"))
    assert all(torch.equal(weight, stored[name]) for name, weight in loaded.items())


# ---- What cannot be loaded -------------------------------------------------------------------------------------------


def edit_config(folder: Path, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


def edit_weights(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def make_index(folder: Path, file: str) -> None:
    """In place of the single file."""
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    names = load_file(folder.parent / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: file for name in names}}))


Q0 = "model.layers.0.self_attn.q_proj.weight"
DAMAGE = {
    "unknown model_type 'mamba'.*supported: llama, qwen2, qwen3": lambda f: edit_config(f, model_type="mamba"),
    "unknown rope type 'longrope'.*yarn": lambda f: edit_config(f, rope_parameters={"rope_type": "longrope"}),
    "sliding-window.*4096": lambda f: edit_config(f, use_sliding_window=True, sliding_window=4096),
    "sliding-window": lambda f: edit_config(f, layer_types=["full_attention", "sliding_attention"]),
    "dtype is 'float8'; supported: float32, bfloat16, float16": lambda f: edit_config(f, dtype="float8"),
    "hidden_act 'gelu'": lambda f: edit_config(f, hidden_act="gelu"),
    "not valid JSON": lambda f: (f / "config.json").write_text("{"),
    r"should hold a JSON object, not \[\]": lambda f: (f / "config.json").write_text("[]"),
    "no config.json": lambda f: (f / "config.json").unlink(),
    "config.json is not valid JSON: maximum recursion": lambda f: (f / "config.json").write_text("[" * 10**5),
    "x.safetensors, which is not in the folder": lambda f: make_index(f, "../x.safetensors"),
    f"missing tensor {Q0}": lambda f: edit_weights(f, lambda t: t.pop(Q0)),
    "unexpected tensor extra": lambda f: edit_weights(f, lambda t: t.update(extra=t[Q0] + 1)),
    rf"{Q0} has shape \(47, 48\).*\(48, 48\)": lambda f: edit_weights(f, lambda t: t.update({Q0: t[Q0][1:].clone()})),
    "neither model.safetensors nor": lambda f: (f / "model.safetensors").unlink(),
    "model.safetensors is not a readable safetensors file": lambda f: (f / "model.safetensors").open("ab").write(b"x"),
    "not a readable safetensors file": lambda f: (f / "model.safetensors").write_bytes(b"\0" * 50),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_checkpoints_are_named(message, tmp_path):
    make_checkpoint(tmp_path, "llama")
    DAMAGE[message](tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_decoder(tmp_path)


def test_hub_ids_and_names_that_cannot_be_resolved(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision))
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("some/model") == resolve("some/model@v1") == resolve(str(tmp_path)) == tmp_path
    assert asked == [("some/model", None), ("some/model", "v1")]
    for name, message in (("./nowhere", "no folder ./nowhere"), ("a/b/c", "no folder a/b/c"),
                          ("some/model.gguf", "no folder some/model.gguf"),
                          (f"{tmp_path}@main", "@main needs a hub id, but .* is a folder")):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            resolve(name)

    def unreachable(*args, **options):
        raise OSError("Connection refused")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match="hub not reachable and some/model@v1 .*Connection refused"):
        resolve("some/model@v1")


def test_what_does_not_fit_says_what_is_needed_and_there():
    room = torch.device("cpu"), 5 << 29
    with pytest.raises(CheckpointError, match=r"3.00 GiB needed \(weights 2.00, cache 1.00\), 2.50 GiB available"):
        checkpoint.check_fits({"weights": 2 << 30, "cache": 1 << 30}, *room)
    checkpoint.check_fits({"weights": 2 << 30}, *room)


# ---- Words -----------------------------------------------------------------------------------------------------------

WORDS = "the quick brown fox jumps over the lazy dog and runs far away from the old grey house by the sea " * 4
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<bot>{% endif %}"


def save_decoder(decoder: Decoder, folder: Path) -> Path:
    """The weights of a LLaMA-type decoder and its config.json."""
    config = decoder.config
    folder.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in checkpoint_weights(decoder).items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "model_type": config.model_type, "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.layers,
        "num_attention_heads": config.query_heads, "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions, "tie_word_embeddings": config.tied, "torch_dtype": "float32",
    }))  # fmt: skip
    return folder


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
WITHOUT_UNKNOWN = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "decoder": None,
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
    "model": {"type": "WordLevel", "vocab": {"known": 0}, "unk_token": "<unk>"},
}  # fmt: skip


def write_checkpoint(folder: Path, vocab: int = 280, text: str = WORDS, **shape) -> Path:
    """A tiny random checkpoint in Hugging Face layout, with a byte-level tokenizer."""
    save_decoder(tiny_decoder(vocab=vocab, **shape), folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<end>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0]}))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "llm")


def test_chat_renders_the_checkpoint_s_template(folder):
    text = Text.load(folder)
    assert text.chat("the dog") == text.tokenizer.encode("<user>the dog</><bot>").ids
    assert text.next_turn("the fox") == text.tokenizer.encode("</><user>the fox</><bot>").ids
    assert text.stop == {0} and text.special == {"eos_token": "<end>"}


def test_a_template_sees_what_transformers_gives_it(folder):
    """tools and documents are None; {% generation %} marks and changes nothing; special tokens of either file."""
    template = (
        "{{ bos_token }}{% if tools is not none or documents is not none %}tools{% endif %}{% for m in messages %}"
        "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    (folder / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf" + template.encode())
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "<old>"}))
    text = Text.load(folder)
    special = {"bos_token": "<s>", "eos_token": "<end>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=text.tokenizer, chat_template=template, **special)
    message = [{"role": "user", "content": "the dog"}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert rendered == "<s>the dog<end><bot>" and text.chat("the dog") == text.encode(rendered)


def test_truncation_and_padding_of_a_tokenizer_are_left_out(folder):
    long, text = "the quick brown fox " * 50, Text.load(folder)
    text.tokenizer.enable_truncation(16)
    text.tokenizer.enable_padding(length=300)
    text.tokenizer.save(str(folder / "tokenizer.json"))
    text.tokenizer.no_truncation(), text.tokenizer.no_padding()
    for words in (long, "fox"):
        assert Text.load(folder).encode(words) == text.encode(words)


def test_a_prompt_that_cannot_fit_is_refused_by_its_beginning(folder, monkeypatch):
    text, seen, encode = Text.load(folder), [], Text.encode
    monkeypatch.setattr(Text, "encode", lambda self, words: seen.append(len(words)) or encode(self, words))
    text.check_length("the fox " * 100, 200)
    with pytest.raises(ValueError, match="a prompt of 8000000 characters has more than .* positions of the model"):
        text.check_length("the fox " * 10**6, 200)
    assert sum(seen) < 20_000


def test_streamed_pieces_make_the_text(folder):
    """Even across characters, and of a run of bytes that is no character, as LLaMA 2's tokenizer decodes it: nothing is
    raised, no tail is lost, and no replacement is shown before it is one."""
    words = [*(f"<0x{byte:02X}>" for byte in range(256)), "\u2581cat", "\u2581the", "s"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    bytewise, own, fox = Text(tokenizer), Text.load(folder), "the café — naïve 🦊 fox"
    for text, ids, shown in (
        (bytewise, [10, 0xE4, 256], "\n\ufffd cat"), (bytewise, [256, 10, 0xE4, 0xBD, 0xA0, 258], "cat\n\u4f60s"),
        (bytewise, [257, 0xE4], "the\ufffd"), (bytewise, [0xF0, 0x9F, 0xA6], "\ufffd" * 3),
        (bytewise, [257, 256], "the cat"), (own, own.encode(fox), fox), (own, own.encode("🦊")[:2], "\ufffd"),
    ):  # fmt: skip
        stream = text.stream()
        pieces = [stream.push(token) for token in ids] + [stream.finish()]
        assert "".join(pieces) == shown and not any("\ufffd" in piece for piece in pieces[:2])


@pytest.mark.parametrize("file, content, message", [
    ("tokenizer_config.json", {"chat_template": {"a": 1}}, "chat_template is a dict, not text"),
    ("tokenizer_config.json", {"chat_template": "{{ messages + 1 }}"}, "chat template failed"),
    ("tokenizer_config.json", {"chat_template": "{{ raise_exception('no') }}"}, "chat template failed: no"),
    ("tokenizer_config.json", {"chat_template": "{{ raise_exception('a\\nb') }}"}, "chat template failed: a b$"),
    ("tokenizer_config.json", {"chat_template": LOOP}, "chat template failed: it ran for more than 5 s"),
    ("tokenizer_config.json", {}, "no chat template"),
    ("tokenizer.json", WITHOUT_UNKNOWN, "tokenizer cannot encode the prompt: .*UNK"),
    ("tokenizer.json", {**WITHOUT_UNKNOWN, "model": {**WITHOUT_UNKNOWN["model"], "vocab": {}}}, "an empty vocab"),
    ("generation_config.json", {"eos_token_id": True}, "eos_token_id is True, not a token id"),
    ("generation_config.json", {"eos_token_id": "<end>"}, "eos_token_id is '<end>', not a token id"),
    ("generation_config.json", {"eos_token_id": [1, 10**30]}, "eos_token_id is .*, not a token id"),
    ("tokenizer.json", {"model": 1}, "tokenizer.json is not a readable tokenizer"),
])  # fmt: skip
def test_odd_files_are_named(file, content, message, folder):
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Text.load(folder).chat("hello")


def test_different_tokenizers_are_named(folder, tmp_path):
    llm, same = Text.load(folder), check_same_tokenizer
    same(llm, Text.load(folder))
    other = write_checkpoint(tmp_path / "other", text="completely different words about stones and rivers " * 9)
    with pytest.raises(CheckpointError, match="tokenizers of LLM and SLM differ, first at id 257: LLM 'he', SLM 'er'"):
        same(llm, Text.load(other))
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["merges"].reverse()
    (other / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="differ, first at merge 0: LLM"):
        same(llm, Text.load(other))
