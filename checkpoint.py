"""From a folder or a hub id to a Decoder in memory: config.json, safetensors, the check that it fits.

Where it sits: before everything; generate.py and the other commands call `load_decoder` twice, for SLM and LLM.
Every error a user can cause by naming the wrong thing is a `CheckpointError`: one line with what is wrong, the value
and what to do.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from model import Config, Decoder
from parallel import Team

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


class CheckpointError(ValueError):
    """A model that cannot be used as given."""


def resolve(name: str, revision: str | None = None, files: list[str] = HUB_FILES) -> Path:
    """The folder of a checkpoint: `name` itself if it is one, else that hub id, its files downloaded with bars."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision:
            raise CheckpointError(f"--revision {revision} needs a hub id, but {name} is a folder")
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or folder.suffix in (".safetensors", ".gguf", ".bin"):
        raise CheckpointError(f"no folder {name}; give one with config.json and *.safetensors, or a hub id owner/name")
    from huggingface_hub import errors, snapshot_download  # imported late: it takes a second, and folders need it not

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"hub model {name} has no revision {revision}; see its list of versions") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(f"no hub model {name} and no such folder (a private one needs `hf auth login`)") from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"hub not reachable and {name} is not in the local cache: check the network or give a folder ({cause})"
        ) from None


def read_json(folder: Path, name: str, required: bool = True) -> dict:
    path = folder / name
    if not path.is_file():
        if required:
            raise CheckpointError(f"{folder} has no {name}; is it a Hugging Face checkpoint folder?")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not a {type(content).__name__}")
    return content


def read_config(folder: Path, layers: int | None = None) -> Config:
    """The architecture; with `layers` that of a model which stops after so many of them."""
    try:
        config = Config.from_hf(read_json(folder, "config.json"))
        if layers is None:
            return config
        if not 1 <= layers <= config.layers:
            raise CheckpointError(f"{folder}: {layers} layers were asked for; 1 to {config.layers} can run")
        return replace(config, layers=layers)
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder}: {error}") from None


def checkpoint_dtype(folder: Path) -> torch.dtype:
    """The dtype the checkpoint says it is stored in; float32 if it does not say."""
    raw = read_json(folder, "config.json")
    return DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch."), torch.float32)


def weight_bytes(config: Config, dtype: torch.dtype) -> int:
    """Bytes of all parameters in this dtype, from the shapes alone."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(config).parameters()) * dtype.itemsize


def available_bytes(device: torch.device) -> int:
    """Memory that could still be taken: free GPU memory, or what the kernel says is available on the host.

    The processes that torchrun started on one host share that alike.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 2**63  # not Linux: no cheap answer, so no check


def check_fits(needed: dict[str, int], device: torch.device, available: int | None = None) -> None:
    """Raise CheckpointError if the named byte counts do not fit together on `device`; says what is needed and there."""
    available = available_bytes(device) if available is None else available
    total = sum(needed.values())
    if total > available:
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in needed.items())
        raise CheckpointError(
            f"does not fit on {device}: {total / 2**30:.2f} GiB needed ({parts}), {available / 2**30:.2f} GiB "
            "available; use a smaller batch, fewer tokens, a 16-bit --dtype or another --device"
        )


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(folder, index.name).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
            raise CheckpointError(f"{index} has no weight_map from tensors to files")
        files = sorted({folder / file for file in shards.values()})
        absent = [file.name for file in files if not file.is_file()]
        if absent or not files:
            raise CheckpointError(f"{index} names shards that are not there: {', '.join(absent) or '(none named)'}")
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise CheckpointError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")


def _checkpoint_name(name: str) -> str:
    """Decoder name -> checkpoint name: a leading `model.` for all but `lm_head.weight`."""
    return name if name == "lm_head.weight" else f"model.{name}"


def _skipped(name: str, config: Config, stopped: bool) -> bool:
    """Tensors left out on purpose: RoPE tables of old checkpoints, the second copy of a tied embedding, and the layers
    after which the model was asked to stop."""
    if name.endswith("rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight"):
        return True
    part = name.split(".")  # model.layers.7.mlp.up_proj.weight
    return stopped and part[1:2] == ["layers"] and part[2].isdecimal() and int(part[2]) >= config.layers


def load_decoder(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, layers: int | None = None,
    team: Team = Team(),
) -> Decoder:  # fmt: skip
    """Load a checkpoint folder, strictly: every tensor named, none left over, every shape right.

    layers: only the first so many are read and run (appendix A.3: the SLM's attention is all that SmallKV needs of it).
    dtype None keeps the checkpoint's. The parameters are made on the meta device and replaced tensor by tensor, so the
    weights are held once, plus one tensor. team: of its ranks each reads its own part. Raises CheckpointError naming
    file or tensors.
    """
    folder = Path(folder)
    config = read_config(folder, layers)
    dtype = dtype or checkpoint_dtype(folder)
    with torch.device("meta"):
        whole, decoder = Decoder(config), team.split(config)
    own_name = {_checkpoint_name(name): name for name, _ in whole.named_parameters()}
    expected = {_checkpoint_name(name): tuple(parameter.shape) for name, parameter in whole.named_parameters()}
    seen: set[str] = set()
    problems: list[str] = []
    for path in _shards(folder):
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():
                    if _skipped(name, config, layers is not None):
                        continue
                    shape = tuple(shard.get_slice(name).get_shape())
                    if name not in expected:
                        problems.append(f"unexpected tensor {name} {shape}")
                    elif shape != expected[name]:
                        problems.append(f"tensor {name} has shape {shape}, config.json says {expected[name]}")
                    else:
                        part = team.part(own_name[name], shard.get_slice(name), config)
                        _assign(decoder, own_name[name], part.to(device=device, dtype=dtype))
                    seen.add(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file, truncated or corrupt: {error}") from None
    problems += [f"missing tensor {name}" for name in expected if name not in seen]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{folder}: " + "; ".join(problems[:8]) + more)
    team.tie(decoder)  # assigning has parted them
    return decoder.eval().requires_grad_(False)


def _assign(decoder: Decoder, name: str, tensor: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(decoder.get_submodule(parent), leaf, torch.nn.Parameter(tensor, requires_grad=False))
