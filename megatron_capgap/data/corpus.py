"""Text corpora: files to documents and token ids on several processes, and training of a vocabulary."""

import io
import json
import signal
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np

from megatron_capgap.common.errors import UserError
from megatron_capgap.data.inputs import size_of
from megatron_capgap.data.jsonl import Block, content_of, read_blocks
from megatron_capgap.data.tokenizer import Tokenizer, open_tokenizer

_VOCABULARY_BYTES = 256 << 20  # sentencepiece keeps several copies of its corpus in memory
_PIECE_OF_LINE = 100_000  # characters; sentencepiece silently drops longer sentences
_KEYS = 5
_SHOWN = 10  # malformed lines reported per kind
_NAMES = 3  # file names in a message


class Source(NamedTuple):
    """Where documents come from.

    Attributes:
        files: file names, or names of datasets of the Hub.
        key: the key of the text in each line, row or record.
        documents: what one document of a plain text is, as in `read_blocks`.
    """

    files: list[str]
    key: str = "text"
    documents: str | None = None

    def blocks(self) -> Iterator[Block]:
        """The lines of all files."""
        return read_blocks(self.files, key=self.key, documents=self.documents)


@dataclass
class Encoded:
    """An encoded block.

    Attributes:
        consumed: as in the block.
        ids: int32, the token ids of all documents, concatenated.
        lengths: tokens of each document.
        numbers: line number of each document, over all files.
        text_bytes: UTF-8 bytes of each document.
        hashes: a hash of 64 bits of each document's text.
        problems: (kind, "FILE:LINE: detail") of each malformed line, in order.
    """

    consumed: int
    ids: np.ndarray
    lengths: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    text_bytes: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)


class Malformed:
    """Malformed lines by kind: the count and the first locations."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, where: str) -> None:
        """Adds a malformed line.

        Args:
            kind: kind of error.
            where: "FILE:LINE: detail".
        """
        self.counts[kind] += 1
        if self.counts[kind] <= _SHOWN:
            self.places[kind].append(where)

    def nothing_read(self, source: Source) -> UserError:
        """The error if no line is valid."""
        files = source.files
        names = ", ".join(files[:_NAMES]) + (f" and {len(files) - _NAMES} more" if len(files) > _NAMES else "")
        problem = "there is no line"
        if self.counts:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
            problem = f"no line could be read ({kinds}; the first is {next(iter(self.places.values()))[0]})"
        fix = f'write lines like {{"{source.key}": "..."}}'
        if set(self.counts) == {f"no {source.key!r}"}:
            fix = f"name the key of the text with --text-key, or {fix}"
        return UserError(f"no document in {names}: {problem}; {fix}")


def parse(line: bytes, text_key: str) -> str:
    """Returns the document in one line.

    Raises:
        ValueError: (kind, detail) of the error.
    """
    if not line.strip():
        raise ValueError("empty", "the line is empty")
    try:
        record = content_of(line)
    except ValueError as problem:
        kind, detail, fix = problem.args
        raise ValueError(
            "not JSON", detail if kind == "not JSON" else f"{kind}{detail and f', {detail}'}: {fix}"
        ) from None
    if not isinstance(record, dict):
        raise ValueError(f"no {text_key!r}", "expected an object with this key")
    if text_key not in record:
        keys = ", ".join(repr(key[:40]) for key in list(record)[:_KEYS])
        raise ValueError(f"no {text_key!r}", f"it has {keys or 'no key'}{' and more' if len(record) > _KEYS else ''}")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{text_key!r} is not a string", f"it is {_words(text)}")
    if not text.strip():
        raise ValueError("empty", f"{text_key!r} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("not Unicode", f"half of a surrogate pair at character {error.start}") from None
    return text


def _words(value: Any) -> str:
    """A short description of a JSON value."""
    return f"of type {type(value).__name__}" if isinstance(value, list | dict) else json.dumps(value)[:40]


def encode_block(block: Block, tokenizer: Tokenizer, text_key: str, begin: int | None, end: int | None) -> Encoded:
    """Encodes every document of a block, with `begin` before and `end` after each unless None."""
    tokens: list[int] = []
    encoded = Encoded(block.consumed, np.empty(0, dtype=np.int32))
    for offset, line in enumerate(block.lines):
        try:
            text = parse(line, text_key)
        except ValueError as problem:
            kind, detail = problem.args
            encoded.problems.append((kind, f"{block.place(offset)}: {detail}"))
            continue
        before = len(tokens)
        if begin is not None:
            tokens.append(begin)
        tokens += tokenizer.encode(text)
        if end is not None:
            tokens.append(end)
        encoded.lengths.append(len(tokens) - before)
        encoded.numbers.append(block.number + offset)
        content = text.encode()
        encoded.text_bytes.append(len(content))
        encoded.hashes.append(int.from_bytes(blake2b(content, digest_size=8).digest(), "big"))
    encoded.ids = np.array(tokens, dtype=np.int32)
    return encoded


def encode_files(
    source: Source, tokenizer_path: str, prepend_bos: bool, append_eos: bool, workers: int
) -> Iterator[Encoded]:
    """Encodes all files; the order does not depend on the number of processes.

    Raises:
        UserError: a file is damaged, or a process was killed.
    """
    blocks = source.blocks()
    setup = (tokenizer_path, source.key, prepend_bos, append_eos)
    if workers == 1:
        _start_worker(*setup)
        yield from map(_encode_in_worker, blocks)
        return
    # Spawn, not fork: the parent may have threads. ProcessPoolExecutor detects a killed process, where
    # multiprocessing.Pool waits forever; the window bounds the memory of blocks read ahead.
    window: deque[Future[Encoded]] = deque()
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_process, setup) as pool:
        try:
            for block in blocks:
                window.append(pool.submit(_encode_in_worker, block))
                if len(window) == 4 * workers:
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a tokenizing process was killed, most likely for lack of memory: use fewer --workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_worker: tuple[Tokenizer, str, int | None, int | None]


def _start_worker(tokenizer_path: str, text_key: str, prepend_bos: bool, append_eos: bool) -> None:
    global _worker
    tokenizer = open_tokenizer(tokenizer_path)
    begin, end = tokenizer.bos if prepend_bos else None, tokenizer.eos if append_eos else None
    _worker = (tokenizer, text_key, begin, end)


def _start_process(*setup: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent handles it
    _start_worker(*setup)


def _encode_in_worker(block: Block) -> Encoded:
    return encode_block(block, *_worker)


def uniform(number: int) -> float:
    """Maps a line number to a fixed, uniformly distributed number in [0, 1)."""
    return int.from_bytes(blake2b(b"%d" % number, digest_size=6).digest(), "big") / 2**48


def train_vocabulary(source: Source, vocab_size: int) -> bytes:
    """Trains a SentencePiece BPE model with byte fallback; the same files give the same bytes.

    Above 256 MB of text, a fixed sample of the lines is used. Spaces are kept, digits are split, and unk, bos and eos
    are 0, 1 and 2, as in LLaMA.

    Raises:
        UserError: no line is valid, the corpus yields fewer than `vocab_size` pieces, or has more characters than that.
    """
    import sentencepiece

    malformed = Malformed()
    share = _VOCABULARY_BYTES / max(1, sum(map(size_of, source.files)))
    model = io.BytesIO()
    sentences = _sentences(source, share, malformed)
    first = next(sentences, None)
    if first is None:
        raise malformed.nothing_read(source)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chain([first], sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            max_sentence_length=4 * _PIECE_OF_LINE,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]
        raise UserError(
            f"a vocabulary of {vocab_size} cannot be trained on this corpus ({reason.strip()}): "
            "choose another --train-tokenizer size or give more text"
        ) from None
    return model.getvalue()


def _sentences(source: Source, share: float, malformed: Malformed) -> Iterator[str]:
    """Yields the text lines of the documents. Malformed lines are skipped; encoding the files reports them."""
    for block in source.blocks():
        for offset, line in enumerate(block.lines):
            if uniform(block.number + offset) >= share:
                continue
            try:
                text = parse(line, source.key)
            except ValueError as problem:
                kind, detail = problem.args
                malformed.add(kind, f"{block.place(offset)}: {detail}")
                continue
            for sentence in text.split("\n"):
                for start in range(0, len(sentence), _PIECE_OF_LINE):
                    yield sentence[start : start + _PIECE_OF_LINE]
