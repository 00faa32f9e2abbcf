"""The decoder and the loader, against Transformers on tiny random checkpoints and against one full pass."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint import CheckpointError, check_fits, load_decoder, read_config, resolve, weight_bytes
from conftest import tiny_decoder
from decode import FullPolicy, generate
from full_cache import FullCache
from model import Config, Span

transformers = pytest.importorskip("transformers", reason="the oracle of these tests; see requirements-dev.txt")

SMALL = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 10000.0}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
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


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, tmp_path, device):
    reference = make_checkpoint(tmp_path, family).to(device)
    decoder = load_decoder(tmp_path, device, torch.float32)
    tokens = torch.randint(61, (2, 50), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        difference = (decoder(tokens) - reference(tokens).logits).abs().max().item()
    assert difference < 1e-4, f"largest difference of logits {difference}"


def test_config_spelled_as_in_transformers_4(tmp_path):
    make_checkpoint(tmp_path, "llama-llama3")
    expected = read_config(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = {"type" if key == "rope_type" else key: value for key, value in rope.items()}
    assert Config.from_hf(raw) == expected


def test_yarn_opens_the_positions_that_it_was_turned_on_for():
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    base = {**SMALL, "model_type": "qwen2"}
    assert Config.from_hf({**base, "rope_scaling": yarn}).max_positions == 256
    assert Config.from_hf(base).max_positions == 64


@pytest.mark.parametrize("name, value", [("vocab_size", "280"), ("num_attention_heads", 0), ("head_dim", -1)])
def test_numbers_of_the_config_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name} {value!r} should be above 0"):
        Config.from_hf({**SMALL, "model_type": "llama", name: value})


def test_sharded_equals_single_and_dtype_is_converted(tmp_path):
    make_checkpoint(tmp_path / "one", "qwen2")
    make_checkpoint(tmp_path / "many", "qwen2", shard="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = load_decoder(tmp_path / "one"), load_decoder(tmp_path / "many")
    for (name, a), b in zip(one.named_parameters(), many.parameters()):
        assert torch.equal(a, b), name
    half = load_decoder(tmp_path / "one", dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in half.parameters())
    assert half.lm_head.weight is half.embed_tokens.weight  # tied: one tensor, not two
    assert weight_bytes(half.config, torch.bfloat16) == sum(p.nbytes for p in half.parameters())


def test_every_token_by_itself_equals_one_pass(device):
    decoder = tiny_decoder(device=device)
    tokens = torch.randint(97, (1, 40), generator=torch.Generator().manual_seed(2)).to(device)
    expected = decoder(tokens)[0]
    cache = FullCache(decoder.config, 1, 40, device, torch.float32)
    steps = [decoder(tokens[:, i : i + 1], Span.step([i], device), cache)[0, 0] for i in range(40)]
    torch.testing.assert_close(torch.stack(steps), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 39, 40])
def test_prefill_in_chunks_equals_one_pass(chunk):
    decoder = tiny_decoder()
    tokens = torch.randint(97, (1, 40), generator=torch.Generator().manual_seed(3))
    cache = FullCache(decoder.config, 1, 40, "cpu", torch.float32)
    parts = []
    for start in range(0, 40, chunk):
        end = min(40, start + chunk)
        parts.append(decoder(tokens[:, start:end], Span.block(start, end, "cpu"), cache))
    torch.testing.assert_close(torch.cat(parts, 1), decoder(tokens), atol=1e-5, rtol=1e-4)


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


# ---- What cannot be loaded -------------------------------------------------------------------------------------------


def edit_config(folder: Path, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


def edit_weights(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: edit_config(f, model_type="mamba"), "unknown model_type 'mamba'.*supported: llama, qwen2, qwen3"),
        (lambda f: edit_config(f, rope_parameters={"rope_type": "longrope"}), "unknown rope type 'longrope'.*yarn"),
        (lambda f: edit_config(f, use_sliding_window=True, sliding_window=4096), "sliding-window.*4096"),
        (lambda f: edit_config(f, layer_types=["full_attention", "sliding_attention"]), "sliding-window"),
        (lambda f: edit_config(f, hidden_act="gelu"), "hidden_act 'gelu'"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: edit_weights(f, lambda t: t.pop(Q0)), f"missing tensor {Q0}"),
        (lambda f: edit_weights(f, lambda t: t.update(extra=t[Q0].clone())), "unexpected tensor extra"),
        (lambda f: edit_weights(f, lambda t: t.update({Q0: t[Q0][:-1].clone()})),
         rf"{Q0} has shape \(47, 48\).*\(48, 48\)"),
        (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda f: truncate(f / "model.safetensors"), "model.safetensors is not a readable safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 50), "not a readable safetensors file"),
    ],
    ids=range(13),
)
def test_damaged_checkpoints_are_named(tmp_path, damage, message):
    make_checkpoint(tmp_path, "llama")
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_decoder(tmp_path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_missing_shard_is_named(tmp_path):
    make_checkpoint(tmp_path, "llama", shard="10KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        load_decoder(tmp_path)


def test_names_that_cannot_be_resolved(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="no folder ./nowhere"):
        resolve("./nowhere")
    with pytest.raises(CheckpointError, match="--revision main needs a hub id"):
        resolve(str(tmp_path), "main")
    import huggingface_hub

    def unreachable(*args, **options):
        raise OSError("Connection refused")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match="hub not reachable and some/model .*Connection refused"):
        resolve("some/model")


def test_what_does_not_fit_says_what_is_needed_and_there():
    with pytest.raises(CheckpointError, match=r"3.00 GiB needed \(weights 2.00, cache 1.00\), 2.50 GiB available"):
        check_fits({"weights": 2 << 30, "cache": 1 << 30}, torch.device("cpu"), available=5 << 29)
    check_fits({"weights": 2 << 30}, torch.device("cpu"), available=5 << 29)


# ---- The real thing --------------------------------------------------------------------------------------------------

SMOLLM2 = Path(__file__).parent / "models" / "smollm2"


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="needs `python prepare_smollm2.py models` (93 MB from PyPI)")
def test_greedy_tokens_of_smollm2_equal_transformers(device):
    from text import Text

    text = Text.load(SMOLLM2)
    reference = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).to(device)
    decoder = load_decoder(SMOLLM2, device, torch.float32)
    questions = ["What is the capital of France?", "Write a haiku about the sea.", "Explain photosynthesis to a child."]
    prompts = [text.chat(question) for question in questions]
    ours = generate(decoder, FullPolicy(decoder), prompts, 64)
    for prompt, answer in zip(prompts, ours):
        ids = torch.tensor([prompt], device=device)
        theirs = reference.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert answer == theirs[0, len(prompt) :].tolist()
