"""Words to token ids and back: the checkpoint's tokenizer, chat template and stop tokens.

Where it sits: at both ends of the flow; between them there are only token ids. The tokenizer is `tokenizers` reading
the checkpoint's tokenizer.json, the chat template is `jinja2` rendering the checkpoint's own.
"""

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from checkpoint import CheckpointError, read_json


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
        special = {}
        for name, value in settings.items():
            value = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(value, str):
                special[name] = value
        return cls(tokenizer, _template(folder, settings), special, _stop_tokens(folder))

    def encode(self, text: str) -> list[int]:
        """Raw text, with the special tokens the tokenizer itself adds (LLaMA 3: its begin-of-text)."""
        return self.tokenizer.encode(text).ids

    def chat(self, message: str) -> list[int]:
        """One user message in the checkpoint's chat template, up to where the answer begins."""
        return self._words(self._render([{"role": "user", "content": message}]))

    def next_turn(self, message: str) -> list[int]:
        """What comes between an answer and the next one: the end of the answer's turn, and another user message.

        For a cache that is kept between turns: the answer's own tokens are in it, so they are not written again.
        """
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
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self.template).render(
                messages=messages, add_generation_prompt=True, **self.special
            )
        except Exception as error:  # a template is a program: it can fail in any way
            raise ValueError(f"the checkpoint's chat template failed: {error}") from None

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

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
    """SLM and LLM must read the same ids: CheckpointError names the first token where their vocabularies differ."""
    ours = {index: token for token, index in llm.tokenizer.get_vocab(with_added_tokens=True).items()}
    theirs = {index: token for token, index in slm.tokenizer.get_vocab(with_added_tokens=True).items()}
    for index in range(max(max(ours), max(theirs)) + 1):
        if ours.get(index) != theirs.get(index):
            raise CheckpointError(
                f"the tokenizers of LLM and SLM differ, first at id {index}: LLM {ours.get(index)!r}, "
                f"SLM {theirs.get(index)!r}; SmallKV needs two models of one series"
            )
    merges = [json.loads(text.tokenizer.to_str())["model"].get("merges", []) for text in (llm, slm)]
    for rank, (one, other) in enumerate(zip(*merges)):
        if one != other:
            raise CheckpointError(f"the tokenizers differ, first at merge {rank}: LLM {one}, SLM {other}")
    if len(merges[0]) != len(merges[1]):
        raise CheckpointError(f"the tokenizers differ: LLM has {len(merges[0])} merges, SLM {len(merges[1])}")
