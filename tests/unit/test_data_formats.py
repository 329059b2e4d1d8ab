"""One corpus in every format is read as the same documents, and damaged, mixed and foreign files are refused."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from pyarrow import parquet

from megatron_capgap.common.errors import UserError
from megatron_capgap.data import inputs, jsonl, plain_text
from megatron_capgap.data.conversation_files import read_conversations
from megatron_capgap.data.json_values import json_values
from tests.support import corpus
from tools import prepare_blend, prepare_data

TEXTS = [*corpus.texts(40), "caf\u00e9 \u2603\U0001f642", 'a "quoted" [text], {with} braces\\', "two\nlines"]
ROWS = [{"n": number, "text": text} for number, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def table(rows: list[dict[str, Any]]) -> Any:
    return pyarrow.Table.from_pylist(rows)


def write_parquet(file: Path) -> None:
    parquet.write_table(table(ROWS), file, row_group_size=7)


def write_arrow(file: Path) -> None:
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, table(ROWS).schema) as writer:
        writer.write_table(table(ROWS), max_chunksize=9)


def write_stream(file: Path) -> None:
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table(ROWS).schema) as writer:
        writer.write_table(table(ROWS), max_chunksize=9)


def write(content: bytes) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(content)


FORMATS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": write(LINES),
    "a.jsonl.gz": write(gzip.compress(LINES[:3000]) + gzip.compress(LINES[3000:])),
    "a.jsonl.bz2": write(bz2.compress(LINES)),
    "a.jsonl.xz": write(lzma.compress(LINES)),
    "a.jsonl.zst": write(zstandard.compress(LINES[:3000]) + zstandard.compress(LINES[3000:])),
    "array.json": write(json.dumps(ROWS).encode()),
    "pretty.json": write(json.dumps(ROWS, indent=2).encode()),
    "spread.json": write("\n".join(json.dumps(row, indent=1) for row in ROWS).encode()),
    "one_line.json": write(" ".join(json.dumps(row) for row in ROWS).encode()),
    "commas.jsonl": write(LINES.replace(b"}\n", b"},\n")),
    "bom.json": write(b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
    "array.json.zst": write(zstandard.compress(json.dumps(ROWS, indent=2).encode())),
    "a.parquet": write_parquet,
    "a.arrow": write_arrow,
    "stream.arrow": write_stream,
    "wrong_ending.txt": write(LINES),
    "wrong_ending.jsonl": write_parquet,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    corpus.save_sentencepiece(tmp_path / "t.model")
    return tmp_path


def texts(*files: str, **how: Any) -> list[str]:
    blocks = jsonl.read_blocks(list(files), key=how.pop("key", "text"), **how)
    return [json.loads(line)["text"] for block in blocks for line in block.lines]


def run(*arguments: str) -> int:
    return prepare_data.main(["--tokenizer", "t.model", "--out", "out/d", "--workers", "1", "--force", *arguments])


def documents(here: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(here / "out/d"))
    return [dataset[i].tolist() for i in range(len(dataset))]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(
    here: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jsonl, "_BLOCK_BYTES", 700)  # several blocks
    FORMATS[name](here / name)
    assert texts(name) == TEXTS
    (here / "plain.jsonl").write_bytes(LINES)
    contents = []
    for file in (name, "plain.jsonl"):
        assert run("--input", file) == 0
        contents.append([(here / f"out/d.{ending}").read_bytes() for ending in ("bin", "idx")])
    assert contents[0] == contents[1]
    assert f"{len(TEXTS)} documents, " in capsys.readouterr().out


def test_the_report_counts_copies_and_the_longest(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus.write_jsonl(here / "a.jsonl", ["one", "two " * 30, "one", "one"])
    assert run("--input", "a.jsonl") == 0
    most = max(map(len, documents(here)))
    assert f"longest document: {most} tokens; copies of an earlier document: 2 (50.0%)" in (capsys.readouterr().out)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst"])
@pytest.mark.parametrize("cut", [0.5, 0.97])
def test_a_truncated_compressed_file_is_never_a_shorter_corpus(
    here: Path, name: str, cut: float, capsys: pytest.CaptureFixture[str]
) -> None:
    FORMATS[name](here / name)
    content = (here / name).read_bytes()
    (here / name).write_bytes(content[: int(cut * len(content))])
    assert run("--input", name) == 2
    assert capsys.readouterr().err.startswith(f"prepare_data: error: {name} is damaged after line ")
    assert not list((here / "out").glob("*"))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "array.json", "pretty.json"])
def test_a_truncated_table_or_array_is_refused(here: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    FORMATS[name](here / name)
    content = (here / name).read_bytes()
    (here / name).write_bytes(content[: 2 * len(content) // 3])
    assert run("--input", name) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"prepare_data: error: {name}: ")
    assert "is a damaged file in" in message or "is not JSON (" in message
    assert not list((here / "out").glob("*"))


@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.parquet", "a.arrow"])
def test_a_wrong_key_names_those_that_are_there(here: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    FORMATS[name](here / name)
    assert run("--input", name, "--text-key", "content") == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert "'content'" in message and "n" in message and "text" in message and "--text-key" in message


def test_a_place_says_what_is_counted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "good"}, {"text": None}, {"text": " "}]
    (here / "a.json").write_text(json.dumps(rows))
    parquet.write_table(table(rows), here / "a.parquet")
    assert run("--input", "a.json", "a.parquet") == 0
    output = capsys.readouterr().err
    for place in ("a.json: record 2: it is null", "a.json: record 3: ", "a.parquet: row 2: it is null"):
        assert place in output


def test_a_large_broken_array_is_refused_at_once(here: Path) -> None:
    def chunks() -> Any:
        yield '[{"text": "x"}, {"text" "y"}' + " " * 100
        raise AssertionError("reads on")

    values = json_values(chunks())
    assert next(values) == {"text": "x"}
    with pytest.raises(ValueError, match="Expecting ':' delimiter"):
        next(values)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(st.dictionaries(st.text(), VALUES, max_size=4), max_size=5),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.integers(1, 40),
)
def test_values_are_those_of_json(rows: list[Any], indent: int | None, array: bool, size: int) -> None:
    between = "\n" if indent else " "
    text = json.dumps(rows, indent=indent) if array else between.join(json.dumps(row, indent=indent) for row in rows)
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert list(json_values(pieces)) == rows


PLAIN = "The first,\nof two lines.\n\n\n  The second.  \n \t\nThe third\n"


@pytest.mark.parametrize(
    "documents, expected",
    [
        ("file", [PLAIN.strip("\n")]),
        ("line", ["The first,", "of two lines.", "  The second.  ", "The third"]),
        ("blank-line", ["The first,\nof two lines.", "  The second.  ", "The third"]),
        (None, [PLAIN.strip("\n")]),
    ],
)
def test_plain_text(here: Path, documents: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "_BLOCK_BYTES", 12)
    (here / "a.txt").write_text(PLAIN)
    (here / "b.txt.gz").write_bytes(gzip.compress(PLAIN.encode()))
    assert texts("a.txt", "b.txt.gz", documents=documents) == 2 * expected


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"caf\xe9\n", "a.txt:1: not UTF-8 (byte 0xe9 at column 4): convert the file"),
        (b"good\n\x01\x02\n", "a.txt:2: not text but binary data (0x01): leave the file out"),
        (b"long\n" * 30, "a.txt: the document before line 21 has more than 0 MiB: say what a document is"),
    ],
)
def test_plain_text_that_is_refused(here: Path, content: bytes, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_text, "_MOST_BYTES", 100)
    (here / "a.txt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        texts("a.txt")
    assert str(caught.value).startswith(expected)


def test_folders_and_patterns_are_read_in_natural_order(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("part-10.jsonl", "part-2.jsonl.gz", "sub/part-1.json", ".hidden/a.jsonl", "README.md", "x.bin"):
        (here / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        row = json.dumps({"text": name}).encode()
        (here / "data" / name).write_bytes(gzip.compress(row) if name.endswith(".gz") else row)
    expected = ["data/part-2.jsonl.gz", "data/part-10.jsonl", "data/sub/part-1.json"]
    assert inputs.expand(["data"]) == expected
    assert inputs.expand(["data/part-*"]) == expected[:2]
    assert inputs.expand(["data/**/*.json"]) == expected[2:]
    assert run("--input", "data") == 0
    assert "3 documents" in capsys.readouterr().out


def test_saved_datasets(here: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk("saved", num_shards=3)
    assert texts(*inputs.expand(["saved"])) == TEXTS
    whole.select([3, 1]).save_to_disk("some")
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk("splits")
    assert texts(*inputs.expand(["splits/test"])) == TEXTS
    Path("saved/data-00001-of-00003.arrow").unlink()
    for folder, expected in {
        "splits": "holds the splits of a dataset: choose among splits/train, splits/test",
        "saved": "saved/data-00001-of-00003.arrow does not exist: copy the whole folder again",
    }.items():
        with pytest.raises(UserError, match=expected):
            inputs.expand([folder])
    if json.loads(Path("some/state.json").read_text()).get("_indices_files"):
        with pytest.raises(UserError, match="flatten_indices"):
            inputs.expand(["some"])
    else:
        assert texts(*inputs.expand(["some"])) == [TEXTS[3], TEXTS[1]]


def test_a_dataset_by_name(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder has the layout of a repository of the Hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (here / "repository").mkdir()
    write_parquet(here / "repository/train-00000-of-00001.parquet")
    assert texts("hf:./repository") == TEXTS
    assert texts("hf:./repository:train") == TEXTS
    for name, key, expected in (
        ("hf:./repository:test", "text", "cannot be read"),
        ("hf:./nowhere", "text", "cannot be read"),
        ("hf:./repository", "content", "has no column 'content': its columns are n, text"),
    ):
        with pytest.raises(UserError) as caught:
            texts(name, key=key)
        assert str(caught.value).startswith(name) and expected in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given, expected",
    [
        ("nothing.jsonl", "--input nothing.jsonl does not exist"),
        ("*.nothing", "--input *.nothing: no file matches"),
        ("empty", "--input empty: no file in this folder ends in .jsonl"),
    ],
)
def test_inputs_that_are_not_there(here: Path, given: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "empty").mkdir()
    assert run("--input", given) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"prepare_data: error: {expected}")


def test_bos_as_the_tokenizer_wants_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(corpus.save_byte_level(here / "folder"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    recipe = json.loads((folder / "tokenizer.json").read_text())
    eos = config["eos_token"]
    number = next(token["id"] for token in recipe["added_tokens"] if token["content"] == eos)
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": eos}))
    corpus.write_jsonl(here / "a.jsonl", ["the cat"])

    def first(*arguments: str) -> bool:
        assert run("--input", "a.jsonl", "--tokenizer", str(folder), *arguments) == 0
        return documents(here)[0][0] == number

    assert not first() and first("--bos")
    step = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": eos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {eos: {"id": eos, "ids": [number], "tokens": [eos]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(recipe | {"post_processor": step}))
    capsys.readouterr()
    assert first() and not first("--no-bos")
    assert f"documents begin with bos ({number})" in capsys.readouterr().err


def test_conversations_are_read_from_arrays_and_tables(here: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    rows = [{"messages": turns}, {"messages": [*turns, *turns]}]
    (here / "a.json").write_text(json.dumps(rows, indent=2))
    parquet.write_table(table(rows), here / "a.parquet")
    (here / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [conversation.messages for conversation in read_conversations("a.jsonl")]
    for name in ("a.json", "a.parquet"):
        assert [conversation.messages for conversation in read_conversations(name)] == expected
    (here / "a.json").write_text(json.dumps([*rows, {"messages": turns[:1]}]))
    with pytest.raises(UserError, match=r"a\.json: record 3: does not end with an assistant message"):
        read_conversations("a.json")


def test_max_tokens_stops_after_the_document_that_reaches_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "a.jsonl").write_bytes(LINES)
    assert run("--input", "a.jsonl") == 0
    lengths = list(map(len, documents(here)))
    assert run("--input", "a.jsonl", "--max-tokens", str(sum(lengths[:5]) - 1)) == 0
    assert list(map(len, documents(here))) == lengths[:5]
    assert run("--input", "a.jsonl", "--max-tokens", "1B") == 0
    assert list(map(len, documents(here))) == lengths
    assert "fewer than --max-tokens 1000000000" in capsys.readouterr().err


def test_a_blend(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    (here / "a.jsonl").write_bytes(LINES)
    (here / "b").mkdir()
    parquet.write_table(table([{"content": text} for text in TEXTS]), here / "b/b.parquet")
    (here / "blend.yaml").write_text("web: {input: a.jsonl, tokens: 300}\ncode: {input: [b], text_key: content}\n")
    words = ["--blend", "blend.yaml", "--tokenizer", "t.model", "--out", "out/mix", "--split", "0.8,0.2"]
    assert prepare_blend.main([*words, "--workers", "1"]) == 0
    data = yaml.safe_load((here / "out/mix.yaml").read_text())["data"]
    assert data["train"] == ["out/mix_web_train", "out/mix_code_train"]
    assert data["valid"] == ["out/mix_web_valid", "out/mix_code_valid"]
    assert sum(data["train_weights"]) == pytest.approx(1, abs=1e-5) and data["train_weights"][0] < 0.5
    assert all(Path(f"{prefix}.bin").is_file() for prefix in data["train"] + data["valid"])
    capsys.readouterr()
    for content, expected in {
        "web: {input: a.jsonl, token: 3}": "web.token is not a key: valid keys: input, text_key, documents, tokens",
        "web: a.jsonl": "web has no input",
        "[": "cannot be read",
        "web: {input: c.jsonl}": "--input c.jsonl does not exist",
        "web: {input: a.jsonl}": "exists already",
    }.items():
        (here / "blend.yaml").write_text(content)
        assert prepare_blend.main(words) == 2
        (message,) = capsys.readouterr().err.splitlines()
        assert message.startswith("prepare_blend: error: ") and expected in message
