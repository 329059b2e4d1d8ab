"""tools/prepare_data.py on real files: against a plain loop, on bad input, and on a full disk."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_capgap.data import corpus as rooms_corpus
from megatron_capgap.data import jsonl
from megatron_capgap.data.indexed import inspect
from megatron_capgap.data.tokenizer import open_tokenizer
from tests.support import corpus
from tests.support.processes import cpu_seconds
from tools import prepare_data

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with t.model and a.jsonl; also the working directory."""
    monkeypatch.chdir(tmp_path)
    corpus.save_sentencepiece(tmp_path / "t.model")
    corpus.write_jsonl(tmp_path / "a.jsonl", corpus.texts(50))
    return tmp_path


def run(*arguments: str) -> int:
    return prepare_data.main(["--input", "a.jsonl", "--tokenizer", "t.model", "--out", "out/d", *arguments])


def read(prefix: str) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset[i].tolist() for i in range(len(dataset))]


def made(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_the_same_as_a_plain_loop(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    tokenizer = open_tokenizer("t.model")
    expected = [[*tokenizer.encode(text), tokenizer.eos] for text in corpus.texts(50)]
    assert read("out/d") == expected
    corpus.write_dataset(here / "plain", expected)
    for ending in (".bin", ".idx"):
        assert (here / f"out/d{ending}").read_bytes() == (here / f"plain{ending}").read_bytes()
    tokens, size = sum(map(len, expected)), sum(len(text.encode()) for text in corpus.texts(50))
    assert f"50 documents, {tokens} tokens, {size} bytes of text, {tokens / size:.4f} tokens per byte" in (
        capsys.readouterr().out
    )
    assert made(here / "out") == ["d.bin", "d.idx"]


def test_a_byte_level_folder_and_no_eos(here: Path) -> None:
    path = corpus.save_byte_level(here / "folder")
    assert run("--tokenizer", path, "--no-bos", "--no-eos") == 0
    assert "".join(open_tokenizer(path).decode(ids) for ids in read("out/d")) == "".join(corpus.texts(50))


def test_a_large_vocabulary_is_stored_in_int32(here: Path) -> None:
    words = {f"w{i}": i for i in range(70_000)} | {"</s>": 70_000}
    recipe = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }
    (here / "words").mkdir()
    (here / "words/tokenizer.json").write_text(json.dumps(recipe))
    (here / "words/tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    corpus.write_jsonl(here / "a.jsonl", ["w65536 w69999"])
    assert run("--tokenizer", "words") == 0
    assert read("out/d") == [[65536, 69999, 70_000]]
    assert inspect("out/d", 70_001, None).dtype == "int32"


def test_processes_and_gzip_do_not_change_the_output(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "_BLOCK_BYTES", 50_000)  # more blocks than wait at a time
    texts = corpus.texts(6000, words=120)
    corpus.write_jsonl(here / "a.jsonl", texts[:2500])
    with gzip.open(here / "b.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in texts[2500:])
    corpus.write_jsonl(here / "all.jsonl", texts)
    files = ("--input", "a.jsonl", "b.jsonl.gz", "--split", "0.8,0.1,0.1")
    assert (here / "a.jsonl").stat().st_size > 1 << 20  # two processes have work
    assert run(*files, "--workers", "2", "--out", "two") == 0
    assert run(*files, "--workers", "1", "--out", "one") == 0
    assert run("--input", "all.jsonl", "--split", "0.8,0.1,0.1", "--workers", "1", "--out", "joined") == 0
    for name in ("train", "valid", "test"):
        for ending in ("bin", "idx"):
            contents = {(here / f"{out}_{name}.{ending}").read_bytes() for out in ("one", "two", "joined")}
            assert len(contents) == 1


def test_split_holds_each_document_once_and_is_stable(here: Path) -> None:
    texts = [f"document {i}" for i in range(1000)]
    corpus.write_jsonl(here / "a.jsonl", texts)
    assert run("--split", "0.9,0.1") == 0
    tokenizer = open_tokenizer("t.model")
    train, valid = ([tokenizer.decode(ids) for ids in read(f"out/d_{name}")] for name in ("train", "valid"))
    assert sorted(train + valid) == sorted(texts) and not set(train) & set(valid)
    assert 70 < len(valid) < 130
    # A document stays where it was when others are added behind it, or a line before it is broken.
    corpus.write_jsonl(here / "a.jsonl", ["", *texts[1:], "one more"])
    assert run("--split", "0.9,0.1", "--force") == 0
    after = {tokenizer.decode(ids) for ids in read("out/d_valid")}
    assert after - {"one more"} == set(valid) - {"document 0"}


BAD_LINES = {
    "{broken": "not JSON",
    '{"text": "\xff': "not JSON",
    "": "empty",
    '{"text": " \\n"}': "empty",
    '["text"]': "no 'text'",
    '{"body": "x"}': "no 'text'",
    '{"text": 5}': "'text' is not a string",
    '{"text": "half \\ud83d"}': "not Unicode",
}


def test_malformed_lines_are_counted_and_placed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [*BAD_LINES, *(["{"] * 12), '{"text": "good"}']
    (here / "a.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    assert run() == 0
    output = capsys.readouterr().err
    assert len(read("out/d")) == 1
    assert "14 line(s) skipped: not JSON" in output and "  and 4 more" in output
    assert output.count("a.jsonl:") == 10 + 2 + 2 + 1 + 1
    for number, kind in enumerate(BAD_LINES.values(), start=1):
        assert output.index(f"skipped: {kind}") < output.index(f"  a.jsonl:{number}: ")


def test_places_are_right_beyond_the_first_block(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jsonl, "_BLOCK_BYTES", 100)
    with (here / "a.jsonl").open("a") as file:
        file.write("{\n")
    assert run("--workers", "1", "--input", "a.jsonl", "a.jsonl") == 0
    assert capsys.readouterr().err.count("  a.jsonl:51: ") == 2


@pytest.mark.parametrize(("line", "kind"), BAD_LINES.items())
def test_strict_stops_at_the_first(here: Path, line: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "a.jsonl").write_bytes(f'{{"text": "good"}}\n{line}\n{{\n'.encode("latin-1"))
    assert run("--strict") == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("prepare_data: error: a.jsonl:2: ") and f"({kind})" in message
    assert made(here / "out") == []


@pytest.mark.parametrize("key", ["text", "score"])
def test_a_number_of_too_many_digits_is_a_malformed_line(
    here: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """More than Python makes an int of."""
    (here / "a.jsonl").write_text(f'{{"text": "good"}}\n{{"text": "good", "{key}": {"9" * 5000}}}\n')
    assert run("--strict") == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("prepare_data: error: a.jsonl:2: ") and "(not JSON)" in message
    assert run() == 0
    assert "1 line(s) skipped: not JSON\n  a.jsonl:2: an integer of more than 4300 digits" in capsys.readouterr().err
    assert len(read("out/d")) == 1


def test_text_key(here: Path) -> None:
    (here / "a.jsonl").write_text(json.dumps({"body": "hello", "text": 1}))
    assert run("--text-key", "body") == 0
    assert len(read("out/d")) == 1


def test_training_a_tokenizer(here: Path) -> None:
    for out in ("one", "two"):
        assert run("--train-tokenizer", "350", "--tokenizer", f"{out}.model", "--out", out) == 0
    assert (here / "one.model").read_bytes() == (here / "two.model").read_bytes()
    tokenizer = open_tokenizer("one.model")
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (350, 1, 2)
    text = "  def f(x):\n\treturn  2024  \u2603\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode(ids) for ids in read("one")] == corpus.texts(50)


def test_trained_digits_stand_alone(here: Path) -> None:
    corpus.write_jsonl(here / "a.jsonl", ["2024 " * 900, *corpus.texts(50)])
    assert run("--train-tokenizer", "350", "--tokenizer", "new.model") == 0
    tokenizer = open_tokenizer("new.model")
    assert [tokenizer.decode([token]) for token in tokenizer.encode("2024")][-4:] == ["2", "0", "2", "4"]


def test_training_reads_a_fixed_sample_of_a_large_corpus(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (here / "a.jsonl").stat().st_size
    monkeypatch.setattr(rooms_corpus, "_VOCABULARY_BYTES", size // 2)
    half = rooms_corpus.train_vocabulary(rooms_corpus.Source(["a.jsonl"]), 350)
    kept = [text for number, text in enumerate(corpus.texts(50)) if rooms_corpus.uniform(number) < 0.5]
    assert 15 < len(kept) < 35
    corpus.write_jsonl(here / "kept.jsonl", kept)
    monkeypatch.setattr(rooms_corpus, "_VOCABULARY_BYTES", 1 << 30)
    assert half == rooms_corpus.train_vocabulary(rooms_corpus.Source(["kept.jsonl"]), 350)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--train-tokenizer", "90000", "--force"],
            "a vocabulary of 90000 cannot be trained on this corpus (Vocabulary",
        ),
        (
            ["--train-tokenizer", "100", "--force"],
            "a vocabulary of 100 cannot be trained on this corpus (Vocabulary",
        ),
        (["--train-tokenizer", "350"], "t.model exists already"),
        (["--tokenizer", "nothing"], "tokenizer nothing does not exist"),
        (["--input", "a.jsonl", "b.jsonl"], "--input b.jsonl does not exist"),
        (["--input", "damaged.jsonl.gz"], "damaged.jsonl.gz is damaged after line"),
        (["--input", "corrupt.jsonl.gz"], "corrupt.jsonl.gz is damaged after line"),
        (["--input", "table.jsonl"], "table.jsonl: is a damaged file in parquet format ("),
        (["--input", "empty.jsonl"], "no document in empty.jsonl: there is no line"),
        (
            ["--input", "latin.jsonl"],
            "(3 not JSON; the first is latin.jsonl:1: not UTF-8, byte 0xe9 at column 14: convert",
        ),
        (["--input", "latin.jsonl", "--split", "0.5,0.5"], "no document in latin.jsonl: no line could be read (3 not"),
        (
            ["--input", "latin.jsonl", "--train-tokenizer", "350", "--force"],
            "no document in latin.jsonl: no line could",
        ),
        (
            ["--text-key", "body"],
            "(50 no 'body'; the first is a.jsonl:1: it has 'text'); name the key of the text with",
        ),
        (["--input", "a.jsonl", "table.csv"], "table.csv: is a table with commas (CSV)"),
        (["--split", "0.999999,0.000001"], "out/d_valid would have no document"),
        (["--out", "old"], "old.bin exists already"),
        (["--out", "out/d.bin"], "pass a prefix without extension"),
        (["--out", "a.jsonl/d"], "cannot be created in"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    here: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = gzip.compress((here / "a.jsonl").read_bytes())
    (here / "damaged.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (here / "corrupt.jsonl.gz").write_bytes(packed[:900] + bytes(9) + packed[909:])
    (here / "table.jsonl").write_bytes(b"PAR1\x15\x04")
    (here / "empty.jsonl").write_text("")
    (here / "latin.jsonl").write_bytes('{"text": "caf\u00e9"}\n'.encode("latin-1") * 3)
    (here / "table.csv").write_text("text,label\nabc,1\n")
    corpus.write_dataset(here / "old", [[1, 2]])
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert run(*arguments) == 2
    messages = [line for line in capsys.readouterr().err.splitlines() if "training a vocabulary" not in line]
    assert len(messages) == 1 and messages[0].startswith("prepare_data: error: ") and expected in messages[0]
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def test_a_tokenizer_without_eos(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(corpus.save_byte_level(here / "folder"))
    (path / "tokenizer_config.json").write_text("{}")
    assert run("--tokenizer", str(path)) == 2
    assert "has no eos to end documents: use a tokenizer with eos, or --no-eos" in capsys.readouterr().err


def test_force_replaces(here: Path) -> None:
    assert run() == 0
    corpus.write_jsonl(here / "a.jsonl", ["another"])
    assert run() == 2
    assert len(read("out/d")) == 50
    assert run("--force") == 0
    assert len(read("out/d")) == 1


@pytest.mark.parametrize("value", ["1", "0.5,0.6", "0.5,0.5,0,0", "1.0,0.0", "a,b"])
def test_shares_that_do_not_add_up(here: Path, value: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("--split", value)


def test_a_full_disk_is_one_line(here: Path) -> None:
    """RLIMIT_FSIZE fails a write as a full disk does."""
    corpus.write_jsonl(here / "a.jsonl", corpus.texts(2000))
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from tools import prepare_data\n"
        "sys.exit(prepare_data.main(sys.argv[1:]))"
    )
    arguments = ["--input", "a.jsonl", "--tokenizer", "t.model", "--out", "out/d", "--workers", "1"]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (2, "prepare_data: error: out/d: File too large\n")
    assert made(here / "out") == []


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['prepare_data', '--help']; import runpy\n"
        "try: runpy.run_path('tools/prepare_data.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'megatron', 'numpy', 'sentencepiece', 'tokenizers', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    began = cpu_seconds()
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--train-tokenizer" in result.stdout
    assert cpu_seconds() - began < 1


def test_plain_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 5.0, 10.0, 11.0, 25.0])
    monkeypatch.setattr(prepare_data.time, "monotonic", lambda: next(clock))
    show = prepare_data.plain_progress(4_000_000)
    for consumed in (500_000, 1_000_000, 1_100_000, 2_000_000):
        show(consumed)
    assert capsys.readouterr().err.splitlines() == [
        "prepare_data: 25% of 4.0 MB, 0.10 MB/s, 30 s left",
        "prepare_data: 50% of 4.0 MB, 0.08 MB/s, 25 s left",
    ]


def test_uniform_is_even() -> None:
    values = np.array([rooms_corpus.uniform(number) for number in range(4000)])
    assert np.histogram(values, bins=10, range=(0, 1))[0].min() > 320  # 400 each, +- 4 sigma
