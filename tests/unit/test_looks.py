"""Files that are no JSON lines: what each reader says of them, and that files of JSON lines are never taken for one."""

import bz2
import gzip
import json
import lzma
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_capgap.common.errors import UserError
from megatron_capgap.data import jsonl, vocab_merge
from megatron_capgap.data.conversation_files import read_conversations
from megatron_capgap.data.corpus import parse
from megatron_capgap.data.file_kinds import START_BYTES, kind_of_bytes, kind_of_lines
from megatron_capgap.data.prompts import read_prompts
from tests.support import corpus
from tools import prepare_data

ROWS = {
    "corpus": {"text": "the cat"},
    "conversations": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]},
    "prompts": {"prompt": "the cat"},
}
TAR = b"data.jsonl".ljust(257, b"\0") + b"ustar\x0000" + bytes(300)
KINDS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "parquet": (lambda row: b"PAR1\x15\x04", "is a damaged file in parquet format (Parquet file size is 6 bytes"),
    "zstd skippable": (lambda row: b"\x50\x2a\x4d\x18\4\0\0\0abcd\x28\xb5\x2f\xfd", "is compressed with zstd or lz4: "),
    "lz4": (lambda row: b"\x04\x22\x4d\x18\x64\x40\xa7", "is compressed with lz4: decompress it with lz4 -d"),
    "7z": (lambda row: b"7z\xbc\xaf\x27\x1c\x00\x04", "is a 7z archive: unpack it with 7z x"),
    "tar": (lambda row: TAR, "is a tar archive: unpack it with tar -xf"),
    "tar in gzip": (lambda row: gzip.compress(TAR), "is compressed, and its content is a tar archive: unpack it"),
    "sqlite": (lambda row: b"SQLite format 3\0" + bytes(50), "is an SQLite database: write its texts as jsonl"),
    "pickle": (lambda row: pickle.dumps([json.loads(row)]), "is a Python pickle: write its texts as jsonl"),
    "safetensors": (lambda row: b"\x48\0\0\0\0\0\0\0" + b'{"weight":{}}', "is a safetensors file with weights"),
    "megatron": (lambda row: b"MMIDIDX\0\0" + bytes(30), "is the index of a Megatron dataset"),
    "lfs": (
        lambda row: b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n",
        "is a git-lfs pointer instead of the file: fetch the file with git lfs pull",
    ),
    "gzip in gzip": (lambda row: gzip.compress(gzip.compress(row)), "is compressed twice: decompress it once"),
    "xz in bzip2": (lambda row: bz2.compress(lzma.compress(row)), "is compressed twice: decompress it once"),
    "parquet in gzip": (lambda row: gzip.compress(b"PAR1xxxx"), "is compressed, and its content is a parquet file"),
    "utf-16": (lambda row: row.decode().encode("utf-16"), "is text in UTF-16: convert it, as with iconv -f UTF-16 -t"),
    "utf-16-le": (
        lambda row: row.decode().encode("utf-16-le"),
        "is text in UTF-16: convert it, as with iconv -f UTF-16LE",
    ),
    "utf-16-be": (
        lambda row: row.decode().encode("utf-16-be"),
        "is text in UTF-16: convert it, as with iconv -f UTF-16BE",
    ),
    "utf-32": (lambda row: row.decode().encode("utf-32"), "is text in UTF-32: convert it, as with iconv -f UTF-32 -t"),
    "utf-32-le": (
        lambda row: row.decode().encode("utf-32-le"),
        "is text in UTF-32: convert it, as with iconv -f UTF-32LE",
    ),
    "utf-32-be": (
        lambda row: row.decode().encode("utf-32-be"),
        "is text in UTF-32: convert it, as with iconv -f UTF-32BE",
    ),
    "utf-16 in gzip": (
        lambda row: gzip.compress(row.decode().encode("utf-16")),
        "is compressed, and its content is text in UTF-16: convert it",
    ),
    "NUL bytes": (
        lambda row: bytes(100) + b"\n",
        "is not text, it begins with NUL bytes, as an incompletely written file",
    ),
    "binary": (lambda row: b"q\x01\x02\xfe\xffabc\n\x03", "is not text but binary data (0x01 among its first bytes)"),
    "csv": (lambda row: b"text,label\nabc,1\n", "is a table with commas (CSV) between its columns: write it as jsonl"),
    "csv of pandas": (lambda row: b',text,"a label"\n0,"abc, def",1\n', "is a table with commas (CSV)"),
    "csv in latin-1": (lambda row: b"text,caf\xe9\nabc,1\n", "is a table with commas (CSV)"),
    "tsv": (lambda row: b"text\tlabel\nabc\t1\n", "is a table with tabs (TSV) between its columns"),
    "html": (lambda row: b"<!DOCTYPE html><html>", "is a web page or XML: write its texts as jsonl"),
    "text": (
        lambda row: b"Once upon a time, there was a cat.\n",
        "is not JSON, it begins with 'Once upon a time, there was a '",
    ),
    "yaml": (lambda row: b"- text: abc\n", "is not JSON, it begins with '- text: abc': write one JSON object a line"),
    "carriage returns": (
        lambda row: b"one line\ranother line\r",
        "is text with bare carriage returns as line ends: ",
    ),
    "single quotes": (lambda row: row.replace(b'"', b"'"), "is not JSON, its strings are in single quotes as Python"),
}


def refused(reader: str, file: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a reader says of a file that it refuses."""
    if reader == "corpus":
        corpus.save_sentencepiece(file.parent / "t.model")
        out = file.parent / "out"
        arguments = ["--input", str(file), "--tokenizer", str(file.parent / "t.model"), "--out", str(out / "d")]
        assert prepare_data.main([*arguments, "--workers", "1"]) == 2
        assert not out.exists() or not list(out.iterdir())
        return capsys.readouterr().err.removeprefix("prepare_data: error: ").rstrip("\n")
    with pytest.raises(UserError) as caught:
        (read_conversations if reader == "conversations" else read_prompts)(str(file))
    return str(caught.value)


@pytest.mark.parametrize("reader", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_says_what_a_file_is(
    tmp_path: Path, reader: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, expected = KINDS[kind]
    file = tmp_path / "given.jsonl"
    file.write_bytes(make((json.dumps(ROWS[reader]) + "\n").encode()))
    said = refused(reader, file, capsys)
    assert said.startswith(f"{file}: {expected}") and "\n" not in said


def test_the_old_format_of_lzma_is_read_too(tmp_path: Path) -> None:
    file = tmp_path / "given.lzma"
    file.write_bytes(lzma.compress(b'{"prompt": "the cat"}\n' * 3, format=lzma.FORMAT_ALONE))
    assert read_prompts(str(file)) == ["the cat"] * 3


@pytest.mark.parametrize("reader", ROWS)
@pytest.mark.parametrize(
    "line, expected",
    [
        (b"caf\xe9", "not UTF-8"),
        (bytes(100), "a NUL byte at column 1, as in an incompletely written file"),
        (b'{"x": ' + b"9" * 5000 + b"}", "an integer of more than 4300 digits"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ],
    ids=["latin-1", "NUL", "digits", "deep"],
)
def test_a_line_among_good_ones(
    tmp_path: Path, reader: str, line: bytes, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = (json.dumps(ROWS[reader]) + "\n").encode()
    file = tmp_path / "given.jsonl"
    file.write_bytes(row + line + b"\n" + row)
    if reader != "corpus":
        said = refused(reader, file, capsys)
        assert said.startswith(f"{file}:2: ") and expected in said and "\n" not in said
        return
    (block,) = jsonl.read_blocks([str(file)])
    assert block.lines == [row, line + b"\n", row], "one bad line is no reason to refuse a corpus"
    with pytest.raises(ValueError) as caught:
        parse(line, "text")
    assert expected in str(caught.value)
    if line[0]:
        file.write_bytes(line + b"\n" + row)
        assert len(next(jsonl.read_blocks([str(file)])).lines) == 2, "nor is it where it is the first"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    rows=st.lists(st.dictionaries(st.text(), VALUES), min_size=1, max_size=5),
    ascii_alone=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_json_lines_are_never_taken_for_something_else(rows: list[Any], ascii_alone: bool, end: str) -> None:
    content = "".join(json.dumps(row, ensure_ascii=ascii_alone) + end for row in rows).encode(errors="replace")
    assert kind_of_bytes(content[:START_BYTES]) is None
    assert kind_of_lines("file", content.splitlines(keepends=True) if end == "\n" else content.split(b"\n")) is None


def test_plain_text_may_look_like_a_table(tmp_path: Path) -> None:
    """A vocabulary is counted on text of any shape."""
    file = tmp_path / "plain.txt"
    file.write_text("text,label\n'single', quotes\n<p>\n")
    assert list(vocab_merge._documents(str(file))) == ["text,label", "'single', quotes", "<p>"]
