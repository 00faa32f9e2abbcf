"""A checkpoint, from a folder or a hub id: the decoder in memory.

Where it sits: before everything. config.json and safetensors become a `Decoder` whose products of one input are joined
here, once (its tokenizer: text.py). Every error a user can cause by naming the wrong thing is a `CheckpointError`: one
line with what is wrong, the value and what to do.
"""

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import command
from model import Config, Decoder
from parallel import Team
from quantize import Scheme, checkpoint_names, int4_modules, put_int4

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # in a checkpoint
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


class CheckpointError(ValueError):
    """A model that cannot be used as given."""


# ---- Folders ---------------------------------------------------------------------------------------------------------


def resolve(name: str, files: list[str] = HUB_FILES) -> Path:
    """The folder of a checkpoint: `name` itself if it is one, else that of the hub id `owner/name` or
    `owner/name@revision`, its files downloaded with bars."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    model, _, revision = name.partition("@")
    if Path(model).expanduser().is_dir():
        raise CheckpointError(f"@{revision} needs a hub id, but {model} is a folder; leave it out")
    if name.startswith((".", "/", "~")) or model.count("/") != 1 or folder.suffix in (".safetensors", ".gguf", ".bin"):
        raise CheckpointError(f"no folder {name}; give one with config.json and *.safetensors, or a hub id owner/name")
    from huggingface_hub import errors, snapshot_download  # imported late: it takes a second, and folders need it not

    try:
        return Path(snapshot_download(model, revision=revision or None, allow_patterns=files))
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"hub model {model} has no revision {revision}; see its list of versions") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(f"no hub model {name} and no such folder (a private one needs `hf auth login`)") from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"hub not reachable and {name} is not in the local cache: check the network or give a "
                              f"folder ({cause})") from None  # fmt: skip


def read_json(folder: Path, name: str, required: bool = True) -> dict:
    if not (folder / name).is_file():
        if required:
            raise CheckpointError(f"{folder} has no {name}; is it a Hugging Face checkpoint folder?")
        return {}
    try:
        return command.read_json(folder / name)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def read_config(folder: Path, layers: int | None = None) -> Config:
    """The architecture; with `layers` that of a model which stops after so many of them."""
    raw = read_json(folder, "config.json")
    try:
        config = Config.from_hf(raw)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder}: {error}") from None
    if layers is not None and not 1 <= layers <= config.layers:
        raise CheckpointError(f"{folder}: {layers} layers were asked for; 1 to {config.layers} can run")
    return replace(config, layers=layers or config.layers)


def checkpoint_dtype(folder: Path) -> torch.dtype:
    """The dtype the checkpoint says it is stored in; float32 if it does not say."""
    raw = read_json(folder, "config.json")
    found = raw["dtype"] if raw.get("dtype") is not None else raw.get("torch_dtype")
    if found is None:
        return torch.float32
    name = found.removeprefix("torch.") if isinstance(found, str) else found
    if not isinstance(name, str) or name not in DTYPES:
        raise CheckpointError(f"{folder}: config.json's dtype is {found!r:.60}; supported: {', '.join(DTYPES)}")
    return DTYPES[name]


def read_scheme(folder: Path, quantize: bool = False) -> Scheme | None:
    """How the checkpoint's INT4 weights are stored, or (quantize) are to be made; None: it has and gets none."""
    raw = read_json(folder, "config.json")
    try:
        scheme = Scheme.from_config(raw.get("quantization_config"))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: {error}") from None
    if quantize and scheme:
        raise CheckpointError(f"{folder} is quantised already ({scheme.method}); leave --quantize out for it")
    return Scheme() if quantize else scheme


# ---- Memory ----------------------------------------------------------------------------------------------------------


def empty_decoder(config: Config, scheme: Scheme | None = None, team: Team = Team()) -> Decoder:
    """This rank's part of the model on the meta device. ValueError where heads or INT4 weights do not divide."""
    with torch.device("meta"):
        decoder = team.split(config)
    if scheme is not None:
        put_int4(decoder, scheme)
    return decoder


def own_parameters(decoder: Decoder) -> dict[str, nn.Parameter]:
    """All but a tied output projection, which is the embedding, or a rank's rows of it."""
    tied = decoder.config.tied
    return {name: p for name, p in decoder.named_parameters() if not (tied and name == "lm_head.weight")}


def weight_bytes(config: Config, dtype: torch.dtype, scheme: Scheme | None = None, team: Team = Team()) -> int:
    """Bytes of all weights of this rank's part, from the shapes alone; what is not INT4 is in this dtype."""
    decoder = empty_decoder(config, scheme, team)
    packed = sum(buffer.nbytes for buffer in decoder.buffers())
    return packed + sum(parameter.numel() for parameter in own_parameters(decoder).values()) * dtype.itemsize


def available_bytes(device: torch.device) -> int:
    """Memory that could still be taken: free GPU memory, or what the kernel says is available on the host, of which the
    processes that torchrun started there have equal shares."""
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
        raise CheckpointError(f"does not fit on {device}: {total / 2**30:.2f} GiB needed ({parts}), "
                              f"{available / 2**30:.2f} GiB available; use a smaller batch, fewer tokens, a 16-bit "
                              "--dtype or another --device")  # fmt: skip


# ---- Weights ---------------------------------------------------------------------------------------------------------


def _parts(config: Config, name: str, rows: int) -> dict[str, int]:
    """How many of the output rows of a decoder's tensor or module are each of the checkpoint's, in their order."""
    names, heads = checkpoint_names(name), (config.query_heads, config.kv_heads, config.kv_heads)
    shares = heads if len(names) == 3 else (1,) * len(names)
    return {part: rows * share // sum(shares) for part, share in zip(names, shares)}


def checkpoint_weights(decoder: Decoder) -> dict[str, Tensor]:
    """The decoder's parameters as views, under the checkpoint's own names: joined products split, a tied output
    projection left out. INT4 weights are not among them."""
    weights = {}
    for name, parameter in own_parameters(decoder).items():
        parts = _parts(decoder.config, name, len(parameter))
        weights |= zip(parts, parameter.detach().split(list(parts.values())))
    return weights


def _stored(decoder: Decoder, scheme: Scheme | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint's tensors; of INT4 products as they are stored."""
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint_weights(decoder).items()}
    for name, module in int4_modules(decoder).items():
        for part, rows in _parts(decoder.config, name, module.out_features).items():
            stored = scheme.tensors(module.in_features, rows)
            shapes |= {f"{part}.{leaf}": shape for leaf, shape in stored.items()}
    return shapes


def _shards(folder: Path) -> list[Path]:
    """The files of the weights; where a single one stands beside an index, the single one, as in Transformers."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise CheckpointError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    shards = read_json(folder, index.name).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files")
    outside = [file for file in shards.values() if Path(file).is_absolute() or ".." in Path(file).parts]
    if outside:
        raise CheckpointError(f"{index} names {outside[0]}, which is not in the folder; all shards must be")
    absent = sorted({file for file in shards.values() if not (folder / file).is_file()})
    if absent or not shards:
        raise CheckpointError(f"{index} names shards that are not there: {', '.join(absent) or '(none named)'}")
    return sorted({folder / file for file in shards.values()})


def _skipped(name: str, config: Config, stopped: bool) -> bool:
    """Tensors left out on purpose: RoPE tables of old checkpoints, and the layers after which the model was asked to
    stop."""
    part = name.split(".")  # model.layers.7.mlp.up_proj.weight
    beyond = stopped and part[1:2] == ["layers"] and part[2].isdecimal() and int(part[2]) >= config.layers
    return beyond or name.endswith("rotary_emb.inv_freq")


def _open(folder: Path, config: Config, stopped: bool, stack: ExitStack) -> dict:
    """The checkpoint's tensors by name, each as its open file."""
    found = {}
    for path in _shards(folder):
        try:
            shard = stack.enter_context(safe_open(path, framework="pt"))
            found |= {name: shard for name in shard.keys() if not _skipped(name, config, stopped)}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None
    return found


def _settle_tie(config: Config, found: dict) -> tuple[Config, dict[str, str]]:
    """The config says that the output projection is the embedding. If another one is stored, it counts, as in
    Transformers 5 (merged adapters, extended vocabularies); if only one is, it is both. Afterwards `found` has what is
    to be read. Returns the config, and the names under which tensors stand that are called otherwise."""
    if HEAD not in found:
        return config, {}
    if EMBEDDING not in found:
        found[EMBEDDING] = found.pop(HEAD)
        return config, {EMBEDDING: HEAD}
    if torch.equal(*(found[name].get_tensor(name) for name in (EMBEDDING, HEAD))):
        del found[HEAD]
        return config, {}
    return replace(config, tied=False), {}


def load_decoder(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
    layers: int | None = None, quantize: bool = False, team: Team = Team(),
) -> Decoder:  # fmt: skip
    """Load a checkpoint folder, strictly: every tensor named, none left over, every shape right.

    layers: only the first so many are read and run (appendix A.3: the SLM's attention is all that SmallKV needs of it).
    dtype None keeps the checkpoint's. quantize rounds the layers' products to INT4 on the way; GPTQ and AWQ checkpoints
    are told by their config.json. team: of its ranks each reads its own part. The weights are held once, plus one
    tensor. Raises CheckpointError naming file or tensors.
    """
    folder = Path(folder)
    config, scheme = read_config(folder, layers), read_scheme(folder, quantize)
    dtype = dtype or checkpoint_dtype(folder)
    if scheme is not None and team.size > 1:
        raise CheckpointError(f"{folder}: INT4 weights are not split over {team.size} processes; use one")
    with ExitStack() as stack:
        found, called = _open(folder, config, layers is not None, stack), {}
        if config.tied:
            config, called = _settle_tie(config, found)
        try:
            decoder = empty_decoder(config, scheme, team)
            expected = _stored(empty_decoder(config, scheme), scheme)
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        packed = {name: _parts(config, name, module.out_features) for name, module in int4_modules(decoder).items()}
        # GPTQ tools store a bias of zeros where the model has none.
        spare, problems = {f"{part}.bias" for parts in packed.values() for part in parts} - set(expected), []
        if scheme is None and any(name.endswith(".qweight") for name in found):
            raise CheckpointError(f"{folder} holds INT4 weights (qweight), but its config.json no quantization_config")
        for name, shard in found.items():
            shape = tuple(shard.get_slice(called.get(name, name)).get_shape())
            if name in spare:
                if shard.get_tensor(name).any():
                    problems.append(f"{name} is not zero, and config.json says that there is none")
            elif name not in expected:
                problems.append(f"unexpected tensor {name} {shape}")
            elif shape != expected[name]:
                problems.append(f"tensor {name} has shape {shape}, config.json says {expected[name]}")
        problems += [f"missing tensor {name}" for name in expected if name not in found and not name.endswith(".g_idx")]
        if problems:
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise CheckpointError(f"{folder}: " + "; ".join(problems[:8]) + more)
        for name, empty in own_parameters(decoder).items():
            tensor = torch.empty(empty.shape, device=device, dtype=dtype)
            parts = _parts(decoder.config, name, len(tensor))
            for part, rows in zip(parts, tensor.split(list(parts.values()))):
                rows.copy_(team.part(part, found[part].get_slice(called.get(part, part)), config))
            parent, _, leaf = name.rpartition(".")
            setattr(decoder.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
        for name, parts in packed.items():
            module, ready = decoder.get_submodule(name), []
            try:
                for part, rows in parts.items():
                    names = {leaf: f"{part}.{leaf}" for leaf in scheme.tensors(module.in_features, rows)}
                    tensors = {leaf: found[n].get_tensor(n).to(device) for leaf, n in names.items() if n in found}
                    ready.append(scheme.read(tensors))
                module.fill(ready)
            except ValueError as error:
                raise CheckpointError(f"{folder}: {part}: {error}") from None
    team.tie(decoder)  # assigning has parted them
    return decoder.eval().requires_grad_(False)
