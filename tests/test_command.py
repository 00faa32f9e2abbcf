"""What a user types and brings along: flags, text files, results, the end of a command. Each mistake is one line."""

import argparse
import io
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import command


@pytest.mark.parametrize("kind, right, wrong", [
    (command.whole(1), {"1": 1, "4096": 4096}, ["0", "-3", "1.5", "nan", "", "one", "1e3"]),
    (command.whole(0, 8), {"0": 0, "8": 8}, ["9", str(2**70)]),
    (command.number(0), {"0": 0.0, "1e9": 1e9}, ["nan", "inf", "-1", "x"]),
    (command.number(0, 1, above=True), {"1": 1.0, "0.5": 0.5}, ["0", "1.01"]),
    (command.share, {"0": 0.0, "1": 1.0}, ["1.1", "nan", "-0.1"]),
    (command.seed, {"0": 0, str(2**63 - 1): 2**63 - 1}, [str(2**63), "-1"]),
])  # fmt: skip
def test_flags_have_the_numbers_they_can_have(kind, right, wrong, capsys):
    parser = command.Parser()
    parser.add_argument("--x", type=kind)
    assert {text: parser.parse_args([f"--x={text}"]).x for text in right} == right
    for text in wrong:
        with pytest.raises(SystemExit) as left:
            parser.parse_args([f"--x={text}"])
        (line,) = capsys.readouterr().err.splitlines()
        assert left.value.code == 2 and line.startswith("error: argument --x: ")
        assert text in line and " is not a " in line


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert command.device("auto") == command.device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "gpu", "cpu:0", "cuda:", "cuda:x", ""):
        with pytest.raises(ValueError, match="no device" if name in ("cuda", "cuda:0") else "no such device"):
            command.device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert command.device("auto") == torch.device("cuda") and command.device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(argparse.ArgumentTypeError, match="no device cuda:2: PyTorch sees 2 CUDA devices"):
        command.device("cuda:2")


def test_texts_lose_their_byte_order_mark(tmp_path):
    text = "héllo\nworld\ufeff\n"  # one within is a character
    for name, content in (("plain", text.encode()), ("marked", text.encode("utf-8-sig")),
                          ("packed.xz", lzma.compress(text.encode("utf-8-sig")))):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        assert command.read_text(tmp_path / name) == text
    (tmp_path / "rows").write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}\n{"a": ')
    assert command.read_lines(tmp_path / "rows", torn=True) == [{"a": 1}, {"a": 2}]
    assert command.read_lines(tmp_path / "nowhere", torn=True) == []


@pytest.mark.parametrize("name, content, message", [
    ("latin", b"caf\xe9", "latin is not UTF-8: byte 0xe9 at offset 3"),
    ("long", b"x" * 33, "long is larger than 32 bytes"),
    ("bad.xz", b"not packed", "cannot unpack .*bad.xz"),
    ("cut.xz", lzma.compress(b"x" * 9)[:-9], "cannot read .*cut.xz"),
    ("", b"", "Is a directory"), ("nowhere/x", None, "No such file or directory"), ("a\0b", None, "cannot read"),
])  # fmt: skip
def test_texts_that_cannot_be_read_are_named(name, content, message, tmp_path):
    if name and content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        command.read_text(tmp_path / name, 32)


@pytest.mark.parametrize("content, message", [
    ("3", "should hold a JSON object, not 3"), ("[]", r"not \[\]"), ("{", "is not valid JSON"),
    ("[" * 10**5, "is not valid JSON"), ('{"a": ' + "9" * 5000 + "}", "is not valid JSON"),
])  # fmt: skip
def test_json_that_cannot_be_used_is_named(content, message, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"results.json .*{message}|results.json {message}"):
        command.read_json(path)
    path.write_text('{"id": 1}\n' + content + "\n")
    with pytest.raises(ValueError, match="results.json, line 2"):
        command.read_lines(path, torn=True)
    path.write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match="line 1, has no 'score'"):
        command.read_lines(path, ("id", "score"))


def test_files_to_write(tmp_path):
    command.check_writable(tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()
    command.write_json(tmp_path / "new.json", {"é": "\udce9"})
    assert json.loads((tmp_path / "new.json").read_text(encoding="utf-8")) == {"é": "?"}
    command.check_writable(tmp_path / "new.json")
    for path, message in (("", "empty name"), (tmp_path, "Is a directory"), (tmp_path / "no" / "x", "No such file")):
        with pytest.raises(ValueError, match=message):
            command.check_writable(path)
    with pytest.raises(ValueError, match="cannot write /dev/full: No space left"):
        command.write_text("/dev/full", "x")
    with pytest.raises(ValueError, match="cannot make the folder .*new.json: .*; name another"):
        command.check_folder(tmp_path / "new.json")


@pytest.mark.parametrize("encoding, shown", [
    ("utf-8", "café 你".encode()), ("latin-1", b"caf\xe9 ?"), ("ascii", b"caf? ?"),
])  # fmt: skip
def test_an_answer_is_written_whatever_the_encoding_of_the_output(encoding, shown, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert not command.ended(lambda: print("café 你")) and sys.stdout.buffer.getvalue() == shown + b"\n"


@pytest.mark.parametrize("where, line", [
    ("&-", "error: standard output is closed; send the answer somewhere, /dev/null for instance\n"),
    ("/dev/full", "error: standard output: [Errno 28] No space left on device\n"),
])  # fmt: skip
def test_an_output_that_is_not_there_is_an_error(where, line):
    program = "import sys, command; sys.exit(command.ended(lambda: print('x')))"
    shell = "sh", "-c", f'exec "$@" >{where}', "sh", sys.executable, "-c", program
    made = subprocess.run(shell, capture_output=True, text=True, cwd=Path(command.__file__).parent)
    assert (made.returncode, made.stderr) == (2, line)


@pytest.mark.parametrize("error, code, line", [
    (BrokenPipeError(), 1, ""), (KeyboardInterrupt(), 130, "interrupted\n"), (SystemExit(2), 2, ""),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 2, "error: out of memory: CUDA out of memory. Tried\n"),
    (MemoryError(), 2, "error: out of memory\n"), (ValueError("a\nb"), 2, "error: a\n"),
    (FileNotFoundError(2, "No such file", "x.txt"), 2, "error: [Errno 2] No such file: 'x.txt'\n"),
])  # fmt: skip
def test_exit_codes(monkeypatch, capsys, error, code, line):
    def fail():
        raise error

    monkeypatch.setattr(sys, "stdout", io.StringIO())  # given back afterwards
    assert command.ended(fail) == code and capsys.readouterr().err == line


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        command.ended(lambda: 1 // 0)
