"""Damaged .bin/.idx pairs, one damage at a time. (A foreign .bin of the same size looks like a good one.)"""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_capgap.common.errors import UserError
from megatron_capgap.data import indexed
from tests.support import corpus

LENGTHS = [5, 1, 0, 17, 40, 8]
N = len(LENGTHS)
TOKENS = sum(LENGTHS)
HEADER = 34  # bytes before the sequence lengths


def documents(vocab_size: int = 100, lengths: list[int] = LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, n).tolist() for n in lengths]


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return corpus.write_dataset(tmp_path / "data.v1", documents())


def patch(file: str, offset: int, new: bytes) -> None:
    content = bytearray(Path(file).read_bytes())
    content[offset : offset + len(new)] = new
    Path(file).write_bytes(content)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_facts(tmp_path: Path, dtype: type) -> None:
    content = documents()
    prefix = corpus.write_dataset(tmp_path / "d", content, dtype)
    facts = indexed.inspect(prefix, vocab_size=100, sequence_length=16)
    sizes = sum(Path(f"{prefix}.{ending}").stat().st_size for ending in ("bin", "idx"))
    expected = (
        prefix,
        TOKENS,
        len(LENGTHS),
        np.dtype(dtype).name,
        max(max(d, default=0) for d in content),
        sizes,
    )
    assert (
        facts.prefix,
        facts.tokens,
        facts.documents,
        facts.dtype,
        facts.largest_id,
        facts.bytes,
    ) == expected


@pytest.mark.parametrize("size", [0, 1, 2, TOKENS, 2 * TOKENS - 2, 2 * TOKENS - 1, 2 * TOKENS + 2])
def test_bin_of_another_size(prefix: str, size: int) -> None:
    file = Path(f"{prefix}.bin")
    file.write_bytes((file.read_bytes() * 2)[:size])
    with pytest.raises(UserError, match=rf"{file} has {size} bytes, .*expects {2 * TOKENS}"):
        indexed.inspect(prefix, None, None)


def test_every_truncated_index_is_noticed(prefix: str) -> None:
    file = Path(f"{prefix}.idx")
    content = file.read_bytes()
    for size in range(len(content)):
        file.write_bytes(content[:size])
        with pytest.raises(UserError, match=str(file)):
            indexed.inspect(prefix, None, None)


def test_index_longer_than_it_says(prefix: str) -> None:
    with Path(f"{prefix}.idx").open("ab") as file:
        file.write(bytes(N))  # as a multimodal dataset has it
    with pytest.raises(UserError, match="its header implies"):
        indexed.inspect(prefix, None, None)


def test_index_of_another_corpus(prefix: str, tmp_path: Path) -> None:
    other = corpus.write_dataset(tmp_path / "other", documents(lengths=[9, 9]))
    Path(f"{other}.idx").replace(f"{prefix}.idx")
    with pytest.raises(UserError, match="it belongs to another"):
        indexed.inspect(prefix, None, None)


DAMAGES: list[tuple[str, int, bytes, str]] = [
    ("magic", 0, b"GGUF", "is not a Megatron index"),
    ("version", 9, struct.pack("<Q", 2), "format version 2"),
    ("float dtype", 17, b"\x06", "dtype code 6"),
    ("unknown dtype", 17, b"\x63", "dtype code 99"),
    ("wider dtype", 17, b"\x04", "begins at byte"),
    ("sequence count", 18, struct.pack("<Q", N + 1), "its header implies"),
    ("huge count", 18, struct.pack("<Q", 2**60), "its header implies"),
    ("negative length", HEADER + 8, struct.pack("<i", -3), "sequence 2 has length -3"),
    ("changed length", HEADER + 12, struct.pack("<i", 16), "sequence 4 begins at byte"),
    ("first offset", HEADER + 4 * N, struct.pack("<q", 2), "sequence 0 begins at byte 2"),
    ("later offset", HEADER + 4 * N + 32, struct.pack("<q", 0), "sequence 4 begins at byte 0"),
    ("first mark", HEADER + 12 * N, struct.pack("<q", 1), "document marks run from 1"),
    ("last mark", HEADER + 20 * N, struct.pack("<q", N - 1), f"to {N - 1} over {N} sequences"),
    ("unordered marks", HEADER + 12 * N + 16, struct.pack("<q", 5), "document marks"),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage[0])
def test_damaged_index(prefix: str, damage: tuple[str, int, bytes, str]) -> None:
    _, offset, new, expected = damage
    patch(f"{prefix}.idx", offset, new)
    with pytest.raises(UserError, match=expected) as error:
        indexed.inspect(prefix, None, None)
    assert f"{prefix}.idx" in str(error.value) and "\n" not in str(error.value)


def test_index_without_documents(tmp_path: Path) -> None:
    prefix = corpus.write_dataset(tmp_path / "d", [])
    with pytest.raises(UserError, match="lists no documents"):
        indexed.inspect(prefix, None, None)


@pytest.mark.parametrize(
    ("dtype", "token", "expected"), [(np.uint16, 100, "is 100, not below"), (np.int32, -1, "is -1, negative")]
)
def test_id_beyond_the_vocabulary(tmp_path: Path, dtype: type, token: int, expected: str) -> None:
    prefix = corpus.write_dataset(tmp_path / "d", documents(), dtype)
    assert indexed.inspect(prefix, 100, None).largest_id < 100
    position = 5 + 1 + 0 + 16  # the last token of document 3
    patch(f"{prefix}.bin", position * np.dtype(dtype).itemsize, np.array(token, dtype).tobytes())
    with pytest.raises(UserError, match=rf"d\.bin: token {position} \(document 3\) {expected}"):
        indexed.inspect(prefix, 100, None)


def test_id_in_a_later_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "_CHUNK", 4)  # several chunks of lengths and of ids
    prefix = corpus.write_dataset(tmp_path / "d", documents())
    indexed.inspect(prefix, 100, None)
    patch(f"{prefix}.bin", 2 * (TOKENS - 1), b"\xff\xff")
    with pytest.raises(UserError, match=rf"token {TOKENS - 1} \(document 5\) is 65535"):
        indexed.inspect(prefix, 100, None)
    patch(f"{prefix}.idx", HEADER + 4 * N + 40, struct.pack("<q", 0))
    with pytest.raises(UserError, match="sequence 5 begins at byte 0"):
        indexed.inspect(prefix, 100, None)


def test_too_short_for_one_sample(prefix: str) -> None:
    indexed.inspect(prefix, None, TOKENS - 1)
    with pytest.raises(UserError, match=rf"has {TOKENS} tokens, one sample needs {TOKENS + 1}"):
        indexed.inspect(prefix, None, TOKENS)


def missing_idx(prefix: str) -> str:
    Path(f"{prefix}.idx").unlink()
    return prefix


@pytest.mark.parametrize(
    ("spell", "expected"),
    [
        (lambda prefix: f"{prefix}.bin", r"give the prefix without \.bin"),
        (lambda prefix: f"{prefix}.idx", r"give the prefix without \.idx"),
        (lambda prefix: f"{prefix}0", r"v10\.bin does not exist: did you mean .*data\.v1\?"),
        (lambda prefix: f"{prefix}/x", r"does not exist: create it with tools/prepare_data\.py"),
        (missing_idx, r"v1\.idx does not exist: a dataset is two files"),
    ],
)
def test_prefixes_that_name_no_dataset(prefix: str, spell: Callable[[str], str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        indexed.inspect(spell(prefix), None, None)
