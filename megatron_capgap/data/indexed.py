"""Checks a Megatron indexed dataset on disk: PREFIX.idx, and PREFIX.bin against it.

PREFIX.idx, little-endian: 9 bytes magic, u64 version, u8 dtype code, u64 number of sequences, u64 number of document
marks, then i32 length of each sequence, i64 byte offset of each sequence, i64 first sequence of each document followed
by the number of sequences. PREFIX.bin holds the ids of the sequences, concatenated.

Megatron maps both files without these checks; there an inconsistent pair fails only when the bad part is read.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from megatron_capgap.common.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = dict(
    enumerate(
        (np.uint8, np.int8, np.int16, np.int32, np.int64, np.float64, np.float32, np.uint16),
        start=1,
    )
)
_CHUNK = 1 << 20  # items; small enough for a core's cache, large enough to hide Python
_REBUILD = "create it again with tools/prepare_data.py, or copy both files again"


@dataclass(frozen=True)
class Facts:
    """Properties of one indexed dataset.

    Attributes:
        prefix: PREFIX of PREFIX.bin and PREFIX.idx.
        tokens: ids in PREFIX.bin.
        documents: number of documents.
        dtype: name of the stored integer type, for example "uint16".
        largest_id: largest token id.
        bytes: total size of both files.
    """

    prefix: str
    tokens: int
    documents: int
    dtype: str
    largest_id: int
    bytes: int


@dataclass(frozen=True)
class _Index:
    """The memory-mapped arrays of PREFIX.idx: lengths int32 [n], offsets int64 [n], documents int64 [d + 1]."""

    dtype: np.dtype
    lengths: np.ndarray
    offsets: np.ndarray
    documents: np.ndarray


def paths(prefix: str) -> tuple[Path, Path]:
    """Paths of PREFIX.bin and PREFIX.idx.

    Raises:
        UserError: the prefix is the name of one of the files, or a file is missing.
    """
    if prefix.endswith((".bin", ".idx")):
        raise UserError(f"dataset {prefix}: give the prefix without {prefix[-4:]}: {prefix[:-4]}")
    files = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for file in files:
        if not file.is_file():
            raise UserError(f"dataset {prefix}: {file} does not exist: {_advice(prefix, files)}")
    return files


def inspect(prefix: str, vocab_size: int | None, sequence_length: int | None) -> Facts:
    """Reads all of PREFIX.idx and PREFIX.bin and checks their consistency, the ids, and that one sample fits.

    Files of two datasets with the same total number of tokens cannot be told from a matching pair.

    Args:
        prefix: PREFIX of both files.
        vocab_size: exclusive upper limit of ids; None only checks that no id is negative.
        sequence_length: the dataset must have at least this many tokens plus one; None requires one token.

    Raises:
        UserError: the first error, with file, value and fix.
    """
    bin_file, idx_file = paths(prefix)
    index = _read_index(idx_file)
    tokens = _check_index(idx_file, index)
    size = bin_file.stat().st_size
    expected = tokens * index.dtype.itemsize
    if size != expected:
        kind = "it is truncated" if size < expected else "it belongs to another .idx"
        raise UserError(
            f"{bin_file} has {size} bytes, {idx_file} expects {expected} ({tokens} {index.dtype}): {kind}; {_REBUILD}"
        )
    needed = 1 if sequence_length is None else sequence_length + 1
    if tokens < needed:
        raise UserError(
            f"{bin_file} has {tokens} tokens, one sample needs {needed}: "
            "give more text, or a smaller data.sequence_length"
        )
    return Facts(
        prefix=prefix,
        tokens=tokens,
        documents=len(index.documents) - 1,
        dtype=str(index.dtype),
        largest_id=_scan(bin_file, index, vocab_size),
        bytes=size + idx_file.stat().st_size,
    )


def _advice(prefix: str, files: tuple[Path, Path]) -> str:
    """The fix for a missing file of a dataset."""
    if any(file.is_file() for file in files):
        return f"a dataset is two files; {_REBUILD}"
    there = sorted(str(file)[: -len(".idx")] for file in Path(prefix).parent.glob("*.idx"))
    near = get_close_matches(str(Path(prefix)), there, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else "create it with tools/prepare_data.py --out"


def _read_index(file: Path) -> _Index:
    """Maps the arrays of PREFIX.idx after checking its header and its size."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if not header.startswith(_MAGIC):
        raise UserError(f"{file} is not a Megatron index (it begins with {header[:9]!r}): {_REBUILD}")
    if len(header) < _HEADER.size:
        raise UserError(f"{file} has {size} bytes, its header alone has {_HEADER.size}: it is truncated; {_REBUILD}")
    _, version, code, sequences, marks = _HEADER.unpack(header)
    if version != 1:
        raise UserError(f"{file} has format version {version}, Megatron-Core reads 1: {_REBUILD}")
    if not np.issubdtype(_DTYPES.get(code, np.void), np.integer):
        raise UserError(f"{file} has dtype code {code}, which is not an integer type: {_REBUILD}")
    promised = _HEADER.size + 12 * sequences + 8 * marks
    if size != promised:
        raise UserError(
            f"{file} has {size} bytes, its header implies {promised} "
            f"({sequences} sequences, {marks} document marks): {_REBUILD}"
        )
    if not sequences or not marks:
        raise UserError(f"{file} lists no documents: {_REBUILD}")
    content = np.memmap(file, mode="r", dtype=np.uint8)
    starts = np.cumsum([_HEADER.size, 4 * sequences, 8 * sequences])
    return _Index(
        dtype=np.dtype(_DTYPES[code]),
        lengths=content[starts[0] : starts[1]].view(np.int32),
        offsets=content[starts[1] : starts[2]].view(np.int64),
        documents=content[starts[2] :].view(np.int64),
    )


def _check_index(file: Path, index: _Index) -> int:
    """Checks that lengths, offsets and document marks are consistent; returns the number of tokens."""
    tokens = 0
    for part in _parts(len(index.lengths)):
        lengths = index.lengths[part]
        ends = tokens + np.cumsum(lengths, dtype=np.int64)
        if lengths.min() < 0:
            bad = part.start + int(np.argmax(lengths < 0))
            raise UserError(f"{file}: sequence {bad} has length {index.lengths[bad]}: the file is damaged; {_REBUILD}")
        wrong = index.offsets[part] != (ends - lengths) * index.dtype.itemsize
        if wrong.any():
            bad = part.start + int(np.argmax(wrong))
            raise UserError(
                f"{file}: sequence {bad} begins at byte {index.offsets[bad]}, which contradicts the lengths before it: "
                f"the file is damaged; {_REBUILD}"
            )
        tokens = int(ends[-1])
    marks = index.documents
    if marks[0] != 0 or marks[-1] != len(index.lengths) or (marks[1:] < marks[:-1]).any():
        raise UserError(
            f"{file}: document marks run from {marks[0]} to {marks[-1]} over {len(index.lengths)} sequences: "
            f"the file is damaged; {_REBUILD}"
        )
    return tokens


def _scan(file: Path, index: _Index, vocab_size: int | None) -> int:
    """Checks that every id of PREFIX.bin is in [0, vocab_size); returns the largest."""
    signed = np.issubdtype(index.dtype, np.signedinteger)
    limit = np.iinfo(index.dtype).max + 1 if vocab_size is None else vocab_size
    # Viewed as unsigned, a negative id is larger than every valid one: one pass finds both errors.
    ids = np.memmap(file, mode="r", dtype=index.dtype).view(index.dtype.str.replace("i", "u"))
    largest = 0
    for part in _parts(len(ids)):
        found = int(ids[part].max())
        if found >= limit:
            position = part.start + int(np.argmax(ids[part] >= limit))
            token = int(ids[position : position + 1].view(index.dtype)[0])
            sequence = int(np.searchsorted(index.offsets, position * index.dtype.itemsize, side="right")) - 1
            document = int(np.searchsorted(index.documents, sequence, side="right")) - 1
            reason = "negative" if signed and token < 0 else f"not below the vocabulary size {vocab_size}"
            raise UserError(
                f"{file}: token {position} (document {document}) is {token}, {reason}: "
                "use the tokenizer of this dataset, or create the dataset again"
            )
        largest = max(largest, found)
    return largest


def _parts(length: int) -> Iterator[slice]:
    """Splits [0, length) into slices of at most _CHUNK."""
    return (slice(start, min(start + _CHUNK, length)) for start in range(0, length, _CHUNK))
