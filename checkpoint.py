"""A checkpoint, from a folder or a hub id: the decoder in memory, and its way with words.

Where it sits: before everything, and at both ends of the flow, between which there are only token ids. config.json and
safetensors become a `Decoder` whose products of one input are joined here, once; tokenizer.json, the chat template and
the stop tokens become a `Text`. Every error a user can cause by naming the wrong thing is a `CheckpointError`: one line
with what is wrong, the value and what to do.
"""

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import torch
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor, nn

from model import Config, Decoder
from parallel import Team
from quantize import Scheme, checkpoint_names, int4_modules, put_int4

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
    return DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch."), torch.float32)


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


def _skipped(name: str, config: Config, stopped: bool) -> bool:
    """Tensors left out on purpose: RoPE tables of old checkpoints, the second copy of a tied embedding, and the layers
    after which the model was asked to stop."""
    if name.endswith("rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight"):
        return True
    part = name.split(".")  # model.layers.7.mlp.up_proj.weight
    return stopped and part[1:2] == ["layers"] and part[2].isdecimal() and int(part[2]) >= config.layers


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
    try:
        decoder = empty_decoder(config, scheme, team)
        expected = _stored(empty_decoder(config, scheme), scheme)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    packed = {name: _parts(config, name, module.out_features) for name, module in int4_modules(decoder).items()}
    # GPTQ tools store a bias of zeros where the model has none.
    spare = {f"{part}.bias" for parts in packed.values() for part in parts} - set(expected)
    with ExitStack() as stack:
        found, problems = {}, []
        for path in _shards(folder):
            try:
                shard = stack.enter_context(safe_open(path, framework="pt"))
                for name in shard.keys():
                    if _skipped(name, config, layers is not None):
                        continue
                    found[name], shape = shard, tuple(shard.get_slice(name).get_shape())
                    if name in spare:
                        if shard.get_tensor(name).any():
                            problems.append(f"{name} is not zero, and config.json says that there is none")
                    elif name not in expected:
                        problems.append(f"unexpected tensor {name} {shape}")
                    elif shape != expected[name]:
                        problems.append(f"tensor {name} has shape {shape}, config.json says {expected[name]}")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None
        if scheme is None and any(name.endswith(".qweight") for name in found):
            raise CheckpointError(f"{folder} holds INT4 weights (qweight), but its config.json no quantization_config")
        problems += [f"missing tensor {name}" for name in expected if name not in found and not name.endswith(".g_idx")]
        if problems:
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise CheckpointError(f"{folder}: " + "; ".join(problems[:8]) + more)
        for name, empty in own_parameters(decoder).items():
            tensor = torch.empty(empty.shape, device=device, dtype=dtype)
            parts = _parts(decoder.config, name, len(tensor))
            for part, rows in zip(parts, tensor.split(list(parts.values()))):
                rows.copy_(team.part(part, found[part].get_slice(part), config))
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


# ---- Words -----------------------------------------------------------------------------------------------------------


@dataclass
class Text:
    """One checkpoint's way with words. Made by `Text.load`."""

    tokenizer: Tokenizer
    template: str | None = None  # jinja2 source
    special: dict[str, str] = field(default_factory=dict)  # bos_token and the like, as the template wants them
    stop: frozenset[int] = frozenset()

    @classmethod
    def load(cls, folder: Path) -> "Text":
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises plain Exception
            raise CheckpointError(f"{path} is not a readable tokenizer: {error}") from None
        settings = read_json(folder, "tokenizer_config.json", required=False)
        words = {n: v.get("content") if isinstance(v, dict) else v for n, v in settings.items() if n.endswith("_token")}
        special = {name: word for name, word in words.items() if isinstance(word, str)}
        return cls(tokenizer, _template(folder, settings), special, _stop_tokens(folder))

    def encode(self, text: str) -> list[int]:
        """Raw text, with the special tokens the tokenizer itself adds (LLaMA 3: its begin-of-text)."""
        return self.tokenizer.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def chat(self, message: str) -> list[int]:
        """One user message in the checkpoint's chat template, up to where the answer begins."""
        return self._words(self._render([{"role": "user", "content": message}]))

    def next_turn(self, message: str) -> list[int]:
        """What comes between an answer and the next one: the end of the answer's turn, and another user message. For a
        cache that is kept between turns: the answer's own tokens are in it, so they are not written again."""
        answer = "(the answer stands here)"
        turns = (("user", "?"), ("assistant", answer), ("user", message))
        rendered = self._render([{"role": role, "content": content} for role, content in turns])
        before, found, after = rendered.partition(answer)
        if not found:
            raise ValueError("the checkpoint's chat template leaves answers out, so a second turn cannot follow one")
        return self._words(after)

    def _words(self, rendered: str) -> list[int]:
        return self.tokenizer.encode(rendered, add_special_tokens=False).ids  # the template has written them

    def _render(self, messages: list[dict]) -> str:
        if self.template is None:
            raise ValueError("this checkpoint has no chat template; leave --chat out, or use an instruct checkpoint")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals.update(raise_exception=_raise, strftime_now=lambda form: datetime.now().strftime(form))
        try:
            template = environment.from_string(self.template)
            return template.render(messages=messages, add_generation_prompt=True, **self.special)
        except Exception as error:  # a template is a program: it can fail in any way
            raise ValueError(f"the checkpoint's chat template failed: {error}") from None

    def stream(self) -> "TextStream":
        return TextStream(self)


class TextStream:
    """Text of one answer as its tokens come; holds back bytes that do not make a character yet."""

    def __init__(self, text: Text):
        self.text, self.ids, self.shown = text, [], ""
        self.decoder = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        self.ids.append(token)
        piece = self.decoder.step(self.text.tokenizer, token) or ""
        self.shown += piece
        return piece

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        whole = self.text.decode(self.ids)
        return whole[len(self.shown) :] if whole.startswith(self.shown) else ""


def _raise(message: str) -> None:
    raise TemplateError(message)


def _template(folder: Path, settings: dict) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not UTF-8: {error}") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{folder}: chat_template is a {type(template).__name__}, not text")
    return template


def _stop_tokens(folder: Path) -> frozenset[int]:
    """eos_token_id of generation_config.json, one or a list; config.json's where that file does not say."""
    for name in ("generation_config.json", "config.json"):
        stop = read_json(folder, name, required=False).get("eos_token_id")
        if stop is not None:
            ids = stop if isinstance(stop, list) else [stop]
            if not all(isinstance(index, int) for index in ids):
                raise CheckpointError(f"{folder / name}: eos_token_id is {stop}, not a token id or a list of them")
            return frozenset(ids)
    return frozenset()


def check_same_tokenizer(llm: Text, slm: Text) -> None:
    """SLM and LLM must read the same ids: CheckpointError names the first token or merge in which they differ."""

    def entries(text: Text) -> dict[str, object]:
        tokens = {index: token for token, index in text.tokenizer.get_vocab(with_added_tokens=True).items()}
        merges = enumerate(json.loads(text.tokenizer.to_str())["model"].get("merges", []))
        return {f"id {index}": tokens[index] for index in sorted(tokens)} | {f"merge {n}": merge for n, merge in merges}

    ours, theirs = entries(llm), entries(slm)
    for at in ours | theirs:
        if ours.get(at) != theirs.get(at):
            raise CheckpointError(f"the tokenizers of LLM and SLM differ, first at {at}: LLM {ours.get(at)!r}, "
                                  f"SLM {theirs.get(at)!r}; SmallKV needs two models of one series")  # fmt: skip
