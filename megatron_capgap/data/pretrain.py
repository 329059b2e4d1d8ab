"""Packed samples of indexed datasets, read through Megatron-Core's GPTDataset.

Megatron shuffles the documents of a dataset once (by the seed), concatenates them, splits the stream into samples of
`sequence_length` tokens, and shuffles the samples; the last label of a sample is the first token of the next. Samples
span documents, as is usual in pretraining: neither attention nor positions restart at a document. The remainder, fewer
than `sequence_length` + 1 tokens, is read in no epoch. Each dataset is opened for exactly one epoch, so nothing depends
on the number of samples that a run needs; `sampler` repeats the epochs.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megatron_capgap.common.errors import UserError, in_one_line
from megatron_capgap.config.schema import DataConfig
from megatron_capgap.data import indexed
from megatron_capgap.data.batch import MicroBatch, collate
from megatron_capgap.data.sampler import SampleOrder, training_order, validation_order

_FACTS = "facts.json"  # in a dataset's index folder: result of its check
_VALIDATION_SEED = 0  # held-out samples are the same in every run


class PackedTextDataset:
    """Numbered samples of one or several datasets.

    Attributes:
        sequence_length: predicted tokens of a sample, which has one token more.
    """

    def __init__(
        self, prefixes: tuple[str, ...], datasets: list[GPTDataset], order: SampleOrder, sequence_length: int
    ) -> None:
        self.sequence_length = sequence_length
        self._prefixes = prefixes
        self._datasets = datasets
        self._order = order

    def __len__(self) -> int:
        """Number of samples in one epoch of every dataset."""
        return sum(len(dataset) for dataset in self._datasets)

    @property
    def left_out(self) -> int:
        """Tokens that no sample predicts: the remainder of each dataset, less than one sample."""
        predicted = sum(int(dataset.dataset.sequence_lengths.sum()) - 1 for dataset in self._datasets)
        return predicted - len(self) * self.sequence_length

    def tokens(self, k: int) -> np.ndarray:
        """Sample k: int64 [sequence_length + 1]; any k >= 0 in training, k < len(self) in held-out data."""
        place = self._order(k)
        sample = self._datasets[place.dataset][place.sample]
        tokens = np.append(sample["tokens"].numpy(), sample["labels"].numpy()[-1:])
        assert len(tokens) == self.sequence_length + 1
        return tokens

    def micro_batch(self, indices: Sequence[int | None], ids: list[int], device: torch.device) -> MicroBatch:
        """See `batch.TokenDataset.micro_batch`."""
        rows = [None if k is None else self.tokens(k) for k in indices]
        return collate(rows, ids, self.sequence_length, device)

    def source(self, k: int) -> str:
        """Origin of sample k, for messages: "data/train sample 17 (epoch 2)"; epochs count from 1."""
        place = self._order(k)
        return f"{self._prefixes[place.dataset]} sample {place.sample} (epoch {place.epoch + 1})"


def build_indices(data: DataConfig, vocab_size: int, seed: int, cache_dir: Path) -> None:
    """Checks every dataset of `data` and builds the sample indices of `open_training` and `open_validation`.

    One process calls this before any process opens the data. Datasets that an earlier call with the same `cache_dir`
    has checked and built are skipped.

    Raises:
        UserError: a dataset is damaged, too short or has ids beyond the vocabulary, or `cache_dir` is not writable.
    """
    wanted = [(prefix, seed) for prefix in data.train] + [(prefix, _VALIDATION_SEED) for prefix in data.valid]
    missing: dict[tuple[str, int], indexed.Facts] = {}
    for prefix, shuffle in dict.fromkeys(wanted):  # check all before writing anything
        facts_file = _entry(prefix, data.sequence_length, shuffle, cache_dir) / _FACTS
        if not facts_file.is_file() or json.loads(facts_file.read_text())["largest_id"] >= vocab_size:
            missing[prefix, shuffle] = indexed.inspect(prefix, vocab_size, data.sequence_length)
    for (prefix, shuffle), facts in missing.items():
        entry = _entry(prefix, data.sequence_length, shuffle, cache_dir)
        # A killed job leaves only the partial folder; two jobs that share a cache may finish in any order.
        partial = entry.with_name(f"{entry.name}.partial.{os.getpid()}")
        try:
            partial.mkdir(parents=True)
            _open(prefix, data.sequence_length, shuffle, partial)
            (partial / _FACTS).write_text(json.dumps(asdict(facts)))
            if not entry.is_dir():
                partial.rename(entry)
        except OSError as error:
            raise UserError(
                f"{cache_dir} cannot store the sample indices of {prefix} ({error.strerror}): "
                "choose a run_dir that is writable and has space"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def open_training(data: DataConfig, seed: int, cache_dir: Path) -> PackedTextDataset:
    """Opens the endless shuffled blend of data.train; sample k depends only on the seed, k, the datasets and their
    weights.

    Raises:
        UserError: the indices of `build_indices` are not visible on this host.
    """
    datasets = [_open_built(prefix, data.sequence_length, seed, cache_dir) for prefix in data.train]
    order = training_order([len(dataset) for dataset in datasets], data.train_weights, seed)
    return PackedTextDataset(data.train, datasets, order, data.sequence_length)


def open_validation(data: DataConfig, cache_dir: Path) -> PackedTextDataset:
    """Opens every sample of data.valid once: dataset after dataset, each shuffled by Megatron with a fixed seed.

    The first samples are therefore representative of their dataset.

    Raises:
        UserError: as `open_training`.
    """
    datasets = [_open_built(prefix, data.sequence_length, _VALIDATION_SEED, cache_dir) for prefix in data.valid]
    order = validation_order([len(dataset) for dataset in datasets])
    return PackedTextDataset(data.valid, datasets, order, data.sequence_length)


class _NoTokenizer:
    """Placeholder for the tokenizer that GPTDataset requires; no id is padding and none is masked."""

    vocab_size = None
    eod = None
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012 (Megatron reads it as an attribute)


def _entry(prefix: str, sequence_length: int, seed: int, cache_dir: Path) -> Path:
    """Folder of one dataset's indices.

    Its name includes sizes and modification times of the files. Megatron's own file names do not, so a rebuilt dataset
    would reuse the indices of the old one.
    """
    stats = [file.stat() for file in indexed.paths(prefix)]
    identity = [os.path.abspath(prefix), sequence_length, seed, [(s.st_size, s.st_mtime_ns) for s in stats]]
    return cache_dir / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def _open_built(prefix: str, sequence_length: int, seed: int, cache_dir: Path) -> GPTDataset:
    entry = _entry(prefix, sequence_length, seed, cache_dir)
    if not entry.is_dir():  # else GPTDataset would build on this rank
        raise UserError(
            f"{entry} with the sample indices of {prefix} is missing: "
            "put run_dir and the data on a file system that all hosts share, "
            "and do not change the data while a run starts"
        )
    _refuse_pickles(entry)
    return _open(prefix, sequence_length, seed, entry)


def _refuse_pickles(entry: Path) -> None:
    """Rejects pickled arrays: Megatron reads indices with `allow_pickle=True`, which would run code in such a file."""
    for file in entry.glob("*.npy"):
        try:
            np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{file}: is not a numeric array ({in_one_line(error)}); remove {entry}, it is rebuilt"
            ) from None


def _open(prefix: str, sequence_length: int, seed: int, index_dir: Path) -> GPTDataset:
    """Opens one epoch of a dataset; reads its indices from `index_dir`, or builds them there."""
    path = os.path.abspath(prefix)
    config = GPTDatasetConfig(
        random_seed=seed % 2**32,  # the range of NumPy's RandomState
        sequence_length=sequence_length,
        blend=([path], None),
        split="1",
        path_to_cache=str(index_dir),
        tokenizer=_NoTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    tokens = GPTDataset.build_low_level_dataset(path, config)
    sequences = np.arange(GPTDataset.numel_low_level_dataset(tokens), dtype=np.int32)
    return GPTDataset(tokens, path, sequences, None, Split.train, config)
