"""A checkpoint's way with words: tokenizer, chat template, stop tokens, and text as its tokens come.

Where it sits: at both ends of the flow, between which there are only token ids. tokenizer.json, tokenizer_config.json
and generation_config.json of a folder become a `Text`. Everything a user can bring along fails in one line.
"""

import ctypes
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

import command
from checkpoint import CheckpointError, read_json

TEMPLATE_SECONDS = 5.0  # a chat template takes thousandths


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
            raise CheckpointError(f"{path} is not a readable tokenizer: {_line(error)}") from None
        if not tokenizer.get_vocab_size(with_added_tokens=True):
            raise CheckpointError(f"{path} has an empty vocabulary; is it the tokenizer of this model?")
        tokenizer.no_truncation()  # of the training that it was saved in
        tokenizer.no_padding()
        settings, special = read_json(folder, "tokenizer_config.json", required=False), {}
        for known in (read_json(folder, "special_tokens_map.json", required=False), settings):
            named = {name: word for name, word in known.items() if name.endswith("_token")}
            words = {name: word.get("content") if isinstance(word, dict) else word for name, word in named.items()}
            special |= {name: word for name, word in words.items() if isinstance(word, str)}
        return cls(tokenizer, _template(folder, settings), special, _stop_tokens(folder))

    def encode(self, text: str) -> list[int]:
        """Raw text, with the special tokens the tokenizer itself adds (LLaMA 3: its begin-of-text)."""
        return self.words(text, special=True)

    def check_length(self, text: str, positions: int) -> None:
        """ValueError for a text of more tokens than a model has positions; a long one is not tokenised as a whole."""
        size = 16 * positions  # characters of the beginning that is looked at
        while size < len(text):
            count = len(self.encode(text[:size]))
            if count > positions + 1:  # the cut may have parted a token
                raise ValueError(f"a prompt of {len(text)} characters has more than {count - 1} tokens, longer than "
                                 f"the {positions} positions of the model; shorten the prompt")  # fmt: skip
            size *= 4

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def chat(self, message: str) -> list[int]:
        """One user message in the checkpoint's chat template, up to where the answer begins."""
        return self.words(self.render([{"role": "user", "content": message}]))

    def next_turn(self, message: str) -> list[int]:
        """What comes between an answer and the next one: the end of the answer's turn, and another user message. For a
        cache that is kept between turns: the answer's own tokens are in it, so they are not written again."""
        answer = "(the answer stands here)"
        turns = (("user", "?"), ("assistant", answer), ("user", message))
        rendered = self.render([{"role": role, "content": content} for role, content in turns])
        before, found, after = rendered.partition(answer)
        if not found:
            raise ValueError("the checkpoint's chat template leaves answers out, so a second turn cannot follow one")
        return self.words(after)

    def words(self, text: str, special: bool = False) -> list[int]:
        """special: with the tokens that the tokenizer adds; a chat template has written its own."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=special).ids
        except Exception as error:  # the Rust library raises plain Exception: no unknown token, for one
            raise ValueError(f"the checkpoint's tokenizer cannot encode the prompt: {_line(error)}") from None

    def render(self, messages: list[dict], prompt: bool = True) -> str:
        """Messages in the chat template and, with prompt, what an answer begins with. As Transformers renders it: the
        same names are defined, `{% generation %}` is a block like any other."""
        if self.template is None:
            raise ValueError("this checkpoint has no chat template; leave --chat out, or use an instruct checkpoint")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals.update(raise_exception=_raise, strftime_now=lambda form: datetime.now().strftime(form))
        known = {"tools": None, "documents": None, "add_generation_prompt": prompt, **self.special}
        try:
            template = environment.from_string(self.template)
            return _within(TEMPLATE_SECONDS, lambda: template.render(messages=messages, **known))
        except Exception as error:  # a template is a program: it can fail in any way
            raise ValueError(f"the checkpoint's chat template failed: {_line(error)}") from None

    def stream(self) -> "TextStream":
        return TextStream(self)


class TextStream:
    """Text of one answer as its tokens come; holds back bytes that do not make a character yet.

    A token's text can depend on those before it, so the text since the last whole characters but one is decoded again.
    """

    def __init__(self, text: Text):
        self.text, self.ids, self.before, self.shown = text, [], 0, 0  # tokens [before, shown) are decoded for context

    def push(self, token: int) -> str:
        self.ids.append(token)
        piece = self.finish()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self.before, self.shown = self.shown, len(self.ids)
        return piece

    def finish(self) -> str:
        """What is held back, once no more tokens come."""
        context = self.text.decode(self.ids[self.before : self.shown])
        return self.text.decode(self.ids[self.before :])[len(context) :]


class Generation(Extension):
    """`{% generation %}`, which marks an assistant's words for training: its body is rendered as it is."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _within(seconds: float, work: Callable[[], str]) -> str:
    """What `work` gives in a thread of its own; TimeoutError is raised here, and there, if it takes longer."""
    told = []

    def run():
        try:
            told.append((work(), None))
        except BaseException as error:
            told.append(("", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not told:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(TimeoutError))
        raise TimeoutError(f"it ran for more than {seconds:.0f} s")
    if told[0][1]:
        raise told[0][1]
    return told[0][0]


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _raise(message: str) -> None:
    raise TemplateError(message)


def _template(folder: Path, settings: dict) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        try:
            return command.read_text(folder / "chat_template.jinja")
        except ValueError as error:
            raise CheckpointError(str(error)) from None
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
            if not all(type(index) is int and -1 <= index < 1 << 24 for index in ids):  # -1 is written for none
                shown = f"eos_token_id is {stop!r:.60}, not a token id or a list of them"
                raise CheckpointError(f"{folder / name}: {shown}")
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
