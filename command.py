"""What all commands share: the types of flags, a user's files, a run's files, and how a command ends.

Where it sits: outside the flow, around `generate.py`, `bench.py`, `evaluate.py` and the trainer. What a user typed or
brought along is checked here, once: every mistake is one line on standard error, `error: ...` with what is wrong, the
value and what to do, and exit code 2.
"""

import argparse
import json
import lzma
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import get_args

import torch

MOST_BYTES = 1 << 26  # of a prompt: 64 MiB are more than any model reads
SEEDS = 2**63 - 1  # the largest


# ---- Flags -----------------------------------------------------------------------------------------------------------


class Mistake(argparse.ArgumentTypeError, ValueError):
    """A value that a flag cannot have, said in full; for those who call from Python a ValueError."""


class Parser(argparse.ArgumentParser):
    """Flags are typed in full; a mistake is one line."""

    def __init__(self, *args, **options):
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str):
        print("error:", message.replace("\n", " "), file=sys.stderr)
        sys.exit(2)


def _flag_type(kind: type, fits: Callable, expected: str) -> Callable[[str], int | float]:
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise Mistake(f"{text!r} is not {expected}") from None
        if not fits(value):
            raise Mistake(f"{text} is not {expected}")
        return value

    return parse


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of a flag: a whole number from `least` to `most`."""
    expected = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"
    return _flag_type(int, lambda n: least <= n and (most is None or n <= most), expected)


def number(least: float, most: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """The type of a flag: a finite number from `least` (above: that itself left out) to `most`."""
    expected = f"a number {'above' if above else 'of at least'} {least:g}"
    expected += f" and at most {most:g}" * (most < math.inf)

    def fits(x):
        return math.isfinite(x) and (x > least if above else x >= least) and x <= most

    return _flag_type(float, fits, expected)


share = number(0, 1)
seed = whole(0, SEEDS)


def device(name: str) -> torch.device:
    """The type of --device: `auto` is CUDA where there is one, else the CPU."""
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count()
    if kind not in ("auto", "cpu", "cuda") or ":" in name and not (kind == "cuda" and index.isdecimal()):
        raise Mistake(f"no such device {name!r}; use auto, cpu, cuda or cuda:0")
    if kind == "cuda" and int(index or 0) >= count:
        raise Mistake(f"no device {name}: PyTorch sees {count} CUDA devices here; use --device cpu")
    return torch.device(("cuda" if count else "cpu") if kind == "auto" else name)


def field_kind(field: Field) -> type:
    """What a dataclass's field holds: of `int | None`, int."""
    return next(iter(get_args(field.type)), field.type)


def add_fields(add: Callable, record: type) -> None:
    """A flag for every field of a dataclass, with the help in its metadata; `typed` has those that were given."""
    for field in fields(record):
        kind = field_kind(field)
        how = {"type": kind, "metavar": {int: "N", float: "X", str: "NAME"}.get(kind)}
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else how
        shown = ("off", "on")[field.default] if kind is bool else field.default
        text = field.metadata["help"] + f" [{shown}]" * (shown is not None)
        add("--" + field.name.replace("_", "-"), default=None, help=text, **how)


def typed(args: argparse.Namespace, record: type) -> dict:
    given = {field.name: getattr(args, field.name) for field in fields(record)}
    return {name: value for name, value in given.items() if value is not None}


# ---- A user's files --------------------------------------------------------------------------------------------------


def decoded(content: bytes, source: str) -> str:
    """UTF-8 text without the byte order mark that some editors put first."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"{error.object[error.start]:#04x} at offset {error.start}"
        raise ValueError(f"{source} is not UTF-8: byte {byte}; convert it") from None


def read_text(path: str | Path, most: int | None = None) -> str:
    """A text file of at most so many bytes, .xz unpacked. ValueError names the file and what is wrong with it."""
    path = Path(path)
    try:
        with (lzma.open(path) if path.suffix == ".xz" else path.open("rb")) as file:
            content = file.read(-1 if most is None else most + 1)
    except lzma.LZMAError as error:
        raise ValueError(f"cannot unpack {path}: {error}") from None
    except (OSError, EOFError, ValueError) as error:  # ValueError: a name with a null byte
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if most is not None and len(content) > most:
        raise ValueError(f"{path} is larger than {most} bytes; give a shorter text")
    return decoded(content, str(path))


def parsed(text: str, source: str, kind: type = dict):
    """JSON text that holds a `kind`; ValueError names the source otherwise."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError too: a number of thousands of digits
        raise ValueError(f"{source} is not valid JSON: {str(error).partition(chr(10))[0]}") from None
    if not isinstance(content, kind):
        wanted = "object" if kind is dict else kind.__name__
        raise ValueError(f"{source} should hold a JSON {wanted}, not {content!r:.40}")
    return content


def read_json(path: str | Path) -> dict:
    return parsed(read_text(path), str(path))


def read_lines(path: str | Path, needed: tuple[str, ...] = (), torn: bool = False) -> list[dict]:
    """The objects of a file of JSON lines, each with at least the keys `needed`; ValueError names the line that is not
    so. torn: a last line without its end, which a killed run leaves, does not count; and no file is none."""
    if torn and not Path(path).exists():
        return []
    lines, rows = read_text(path).split("\n"), []
    for place, line in enumerate(lines[:-1] if torn else lines, 1):
        if line.strip():
            rows.append(parsed(line, f"{path}, line {place},"))
            missing = [key for key in needed if key not in rows[-1]]
            if missing:
                raise ValueError(f"{path}, line {place}, has no {', '.join(map(repr, missing))}; mend or remove it")
    return rows


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """What README.md and docs/ show, and what commands print where there is no terminal."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


# ---- A run's files ---------------------------------------------------------------------------------------------------


def check_writable(path: str | Path) -> None:
    """ValueError for a file that cannot be written, before the work and not after it; nothing is left behind."""
    if not str(path):
        raise ValueError("an empty name was given for a file to write; name one")
    path = Path(path)
    there = path.exists()
    try:
        path.open("a").close()
        if not there:
            path.unlink()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


def check_folder(path: str | Path) -> Path:
    """The folder, made if it is not there; ValueError if it cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {path}: {error.strerror}; name another") from None
    return Path(path)


def write_text(path: str | Path, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None


def write_json(path: str | Path, content) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_lines(path: str | Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# ---- How a command ends ----------------------------------------------------------------------------------------------


def ended(work: Callable[[], int]) -> int:
    """The exit code of a command: its own; 2, a mistake or too little memory; 130, Ctrl-C; 1, the reader has gone.

    Characters that the output's encoding lacks are replaced, as an answer is worth more than its quotation marks.
    """
    if sys.stdout is None:
        print("error: standard output is closed; send the answer somewhere, /dev/null for instance", file=sys.stderr)
        return 2
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = work()
        sys.stdout.flush()
        return code
    except SystemExit as left:  # argparse: --help, or a mistake in the flags
        return left.code or 0
    except BrokenPipeError:  # as in `generate.py ... | head`
        sys.stdout = None
        return 1
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
        if isinstance(error, RuntimeError) and not memory:
            raise
        nameless = isinstance(error, OSError) and error.filename is None
        about = "out of memory" * memory, "standard output" * nameless, str(error).partition("\n")[0]
        print("error:", ": ".join(filter(None, about)), file=sys.stderr)
        if nameless:  # what is still in its buffer cannot be written either
            sys.stdout = None
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
