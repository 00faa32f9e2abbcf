"""From a folder or a hub id to a Decoder in memory: config.json, safetensors, the check that it fits.

Where it sits: before everything; generate.py and the other commands call `load_decoder` twice, for SLM and LLM.
Every error a user can cause by naming the wrong thing is a `CheckpointError`: one line with what is wrong, the value
and what to do.
"""

import json
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from model import Config, Decoder
from parallel import Team
from quantize import Scheme, int4_modules, put_int4

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


def read_scheme(folder: Path, quantize: str | None = None) -> Scheme | None:
    """How the checkpoint's INT4 weights are stored, or (quantize "int4") are to be made; None: it has and gets none."""
    try:
        scheme = Scheme.from_config(read_json(folder, "config.json").get("quantization_config"))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: {error}") from None
    if quantize and scheme:
        raise CheckpointError(f"{folder} is quantised already ({scheme.method}); leave --quantize {quantize} out")
    return Scheme() if quantize else scheme


def weight_bytes(config: Config, dtype: torch.dtype, scheme: Scheme | None = None, team: Team = Team()) -> int:
    """Bytes of all weights of this rank's part, from the shapes alone; what is not INT4 is in this dtype."""
    decoder = _empty_decoder(config, scheme, team)
    packed = sum(buffer.nbytes for buffer in decoder.buffers())
    # A tied output projection is the embedding, or a part of it: a view
    counted = [p.numel() for name, p in decoder.named_parameters() if not (config.tied and name == "lm_head.weight")]
    return packed + sum(counted) * dtype.itemsize


def _empty_decoder(config: Config, scheme: Scheme | None, team: Team = Team()) -> Decoder:
    with torch.device("meta"):
        decoder = team.split(config)
    if scheme is not None:
        put_int4(decoder, scheme)
    return decoder


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


def _expected(decoder: Decoder, scheme: Scheme | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint's tensors; of INT4 products as they are stored."""
    shapes = {_checkpoint_name(name): tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    for name, module in int4_modules(decoder).items():
        stored = scheme.tensors(module.in_features, module.out_features)
        shapes |= {f"{_checkpoint_name(name)}.{leaf}": shape for leaf, shape in stored.items()}
    return shapes


def load_decoder(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
    layers: int | None = None, quantize: str | None = None, team: Team = Team(),
) -> Decoder:  # fmt: skip
    """Load a checkpoint folder, strictly: every tensor named, none left over, every shape right.

    layers: only the first so many are read and run (appendix A.3: the SLM's attention is all that SmallKV needs of it).
    dtype None keeps the checkpoint's. quantize "int4" rounds the layers' products to INT4 on the way; GPTQ and AWQ
    checkpoints are told by their config.json. The parameters are made on the meta device and replaced tensor by tensor,
    so the weights are held once, plus one tensor. team: of its ranks each reads its own part. Raises CheckpointError
    naming file or tensors.
    """
    folder = Path(folder)
    config, scheme = read_config(folder, layers), read_scheme(folder, quantize)
    dtype = dtype or checkpoint_dtype(folder)
    if scheme is not None and team.size > 1:
        raise CheckpointError(f"{folder}: INT4 weights are not split over {team.size} processes; use one")
    whole = _empty_decoder(config, scheme)
    with torch.device("meta"):
        decoder = whole if scheme is not None else team.split(config)
    modules = int4_modules(decoder)
    try:
        expected = _expected(whole, scheme)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    spare = {f"{_checkpoint_name(name)}.bias" for name in modules} - set(expected)
    with ExitStack() as stack:
        found, problems = {}, []
        for path in _shards(folder):
            try:
                shard = stack.enter_context(safe_open(path, framework="pt"))
                for name in shard.keys():
                    if _skipped(name, config, layers is not None):
                        continue
                    found[name], shape = shard, tuple(shard.get_slice(name).get_shape())
                    if name in spare:  # GPTQ tools store a bias of zeros where the model has none
                        if shard.get_tensor(name).any():
                            problems.append(f"{name} is not zero, and config.json says that there is none")
                    elif name not in expected:
                        problems.append(f"unexpected tensor {name} {shape}")
                    elif shape != expected[name]:
                        problems.append(f"tensor {name} has shape {shape}, config.json says {expected[name]}")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} is not a readable safetensors file, truncated or corrupt: {error}"
                ) from None
        if scheme is None and any(name.endswith(".qweight") for name in found):
            raise CheckpointError(f"{folder} holds INT4 weights (qweight), but its config.json no quantization_config")
        problems += [f"missing tensor {name}" for name in expected if name not in found and not name.endswith(".g_idx")]
        if problems:
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise CheckpointError(f"{folder}: " + "; ".join(problems[:8]) + more)
        for name, _ in list(whole.named_parameters()):
            stored = found[_checkpoint_name(name)].get_slice(_checkpoint_name(name))
            _assign(decoder, name, team.part(name, stored, config).to(device=device, dtype=dtype))
        for name, module in modules.items():
            stored = scheme.tensors(module.in_features, module.out_features)
            names = {leaf: f"{_checkpoint_name(name)}.{leaf}" for leaf in stored}
            tensors = {leaf: found[n].get_tensor(n).to(device) for leaf, n in names.items() if n in found}
            try:
                scheme.read(module, tensors)
            except ValueError as error:
                raise CheckpointError(f"{folder}: {_checkpoint_name(name)}: {error}") from None
    team.tie(decoder)  # assigning has parted them
    return decoder.eval().requires_grad_(False)


def _assign(decoder: Decoder, name: str, tensor: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(decoder.get_submodule(parent), leaf, torch.nn.Parameter(tensor, requires_grad=False))
