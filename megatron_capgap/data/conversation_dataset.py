"""Conversations of jsonl files as samples: encoded once into arrays that every rank memory-maps.

A restarted run reads the same tokens as before, even if the template renders today's date.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_capgap.common.errors import UserError, in_one_line
from megatron_capgap.config.schema import DataConfig
from megatron_capgap.data import conversation_packing
from megatron_capgap.data.chat_template import Template
from megatron_capgap.data.conversation_files import read_conversations
from megatron_capgap.data.conversation_packing import Example, PackedConversationDataset
from megatron_capgap.data.tokenizer import Tokenizer

_CUT = "cut.json"  # in the cache folder of a list of files: the `PackingCounts`
_ARRAYS = {"tokens": np.int32, "learned": np.bool_, "ends": np.int64}
_HELD_OUT_ORDER = 0  # seed: held-out rows have the same order in every run


class _Examples(Sequence[Example]):
    """Conversations stored back to back in memory-mapped arrays."""

    def __init__(self, folder: Path) -> None:
        self._tokens, self._in_loss, self._ends = (_array(folder / f"{name}.npy") for name in _ARRAYS)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def largest(self) -> int:
        """Largest token id."""
        return int(self._tokens.max())

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = int(self._ends[index - 1]) if index else 0, int(self._ends[index])
        return Example(np.array(self._tokens[start:end], dtype=np.int64), np.array(self._in_loss[start + 1 : end]))


class ConversationDataset:
    """The conversations of a configuration, encoded with one template.

    Args:
        data: the files and the sequence_length of rows.
        tokenizer: opened from data.tokenizer.
        template: the chat template.
        cache_dir: folder of the cached arrays.
    """

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, template: Template, cache_dir: Path) -> None:
        self._data, self._tokenizer, self._template, self._cache_dir = data, tokenizer, template, cache_dir

    def build(self, vocab: int) -> list[str]:
        """Reads and encodes what the cache lacks. One process calls this before any process opens the data.

        Args:
            vocab: exclusive upper limit of ids.

        Returns:
            Messages about conversations that did not fit, or whose answers start within a token.

        Raises:
            UserError: a file is missing or has other content, no conversation fits into a row, an id is not in the
                model's vocabulary, or the cache cannot be written.
        """
        missing = {}
        for files in self._lists():  # read all before writing anything
            if self._folder(files).is_dir():
                # The cache may come from a model with more rows.
                self._check_ids(files, _Examples(self._folder(files)).largest, vocab)
            else:
                conversations = [conversation for file in files for conversation in read_conversations(file)]
                missing[files] = conversation_packing.encode(conversations, self._template, self._data.sequence_length)
        for files, (examples, _) in missing.items():
            self._check_ids(files, max(int(example.tokens.max()) for example in examples), vocab)
        for files, (examples, cut) in missing.items():
            self._write(self._folder(files), examples, cut)
        return [line for files in self._lists() for line in self._truncation_messages(files)]

    def open_training(self, seed: int, *, packed: bool) -> PackedConversationDataset:
        """Endless rows of data.train, reshuffled in each epoch; see `PackedConversationDataset`.

        Raises:
            UserError: the output of `build` is not visible on this host.
        """
        return PackedConversationDataset(self._open(self._data.train), self._data.sequence_length, seed, packed=packed)

    def open_validation(self, *, packed: bool) -> PackedConversationDataset:
        """Every row of data.valid once, in a fixed shuffled order, so that the first rows are a representative sample.

        Raises:
            UserError: as `open_training`.
        """
        examples, length = self._open(self._data.valid), self._data.sequence_length
        return PackedConversationDataset(examples, length, _HELD_OUT_ORDER, packed=packed)

    def _lists(self) -> Iterator[tuple[str, ...]]:
        return (files for files in dict.fromkeys((self._data.train, self._data.valid)) if files)

    def _folder(self, files: tuple[str, ...]) -> Path:
        """Cache folder of a list of files; its name is a hash of everything that determines the content."""
        content = {
            "files": [_identity(Path(file)) for file in files],
            "tokenizer": [self._tokenizer.fingerprint, _identity(Path(self._data.tokenizer))],
            "template": self._template.jinja,
            "sequence_length": self._data.sequence_length,
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return self._cache_dir / f"conversations_{digest[:16]}"

    def _write(self, folder: Path, examples: Sequence[Example], cut: conversation_packing.PackingCounts) -> None:
        """Writes the arrays to a partial folder and renames it: a killed job leaves only the partial folder, and two
        jobs that share a cache may finish in any order."""
        nothing = np.zeros(1, dtype=np.bool_)
        arrays = {
            "tokens": np.concatenate([example.tokens for example in examples]),
            "learned": np.concatenate([part for example in examples for part in (nothing, example.in_loss)]),
            "ends": np.cumsum([len(example.tokens) for example in examples]),
        }
        partial = folder.with_name(f"{folder.name}.partial.{os.getpid()}")
        try:
            partial.mkdir(parents=True)
            for name, dtype in _ARRAYS.items():
                np.save(partial / f"{name}.npy", arrays[name].astype(dtype), allow_pickle=False)
            (partial / _CUT).write_text(json.dumps({**vars(cut), "kept": len(examples)}))
            if not folder.is_dir():
                partial.rename(folder)
        except OSError as error:
            raise UserError(
                f"{self._cache_dir} cannot store the encoded conversations ({error.strerror}): "
                "choose a run_dir that is writable and has space"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _check_ids(self, files: tuple[str, ...], largest: int, vocab: int) -> None:
        if largest >= vocab:
            raise UserError(
                f"{', '.join(files)}: contain the token {self._tokenizer.pieces()[largest]!r} ({largest}), which has "
                f"no row in the model's vocab of {vocab}; use the model's own tokenizer and template, or other texts"
            )

    def _truncation_messages(self, files: tuple[str, ...]) -> Iterator[str]:
        cut = json.loads((self._folder(files) / _CUT).read_text())
        if cut["shortened"] or cut["dropped"]:
            yield (
                f"{', '.join(files)}: of {cut['kept'] + cut['dropped']} conversations {cut['shortened']} were "
                f"truncated, {cut['dropped']} were dropped: no assistant text within data.sequence_length "
                f"{self._data.sequence_length}"
            )
        if cut.get("joined"):  # caches of earlier versions lack it
            yield (
                f"{', '.join(files)}: in {cut['joined']} of {cut['kept']} conversations a token spans the start of an "
                "answer, so generation starts from different ids than training; use a template "
                "whose prompt ends with a special token or a newline"
            )

    def _open(self, files: tuple[str, ...]) -> _Examples:
        folder = self._folder(files)
        if not folder.is_dir():
            raise UserError(
                f"{folder} with the conversations of {', '.join(files)} is missing: put run_dir and the data on a "
                "file system that all hosts share, and do not change the data while a run starts"
            )
        return _Examples(folder)


def _identity(path: Path) -> list[object]:
    """Path, sizes and modification times that identify a file, or the files of a folder."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [(str(file), file.stat()) for file in files if file.is_file()]
    return [os.path.abspath(path), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)]


def _array(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: is not a numeric array ({in_one_line(error)}); remove {file.parent}, it is rebuilt"
        ) from None
