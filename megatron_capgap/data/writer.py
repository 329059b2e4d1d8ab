"""Writes Megatron indexed datasets and publishes them under their final names only when complete."""

import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np

from megatron_capgap.common.errors import UserError
from megatron_capgap.data.indexed import inspect

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Megatron warns about kernels that only training needs
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder


class DatasetWriter:
    """Writes PREFIX.partial.bin and .idx, which `publish` renames to PREFIX.bin and PREFIX.idx.

    Attributes:
        prefix: PREFIX of the dataset.
        counts: "documents", "tokens" and "bytes" (of text) so far.
    """

    def __init__(self, prefix: str, vocab_size: int) -> None:
        self.prefix = prefix
        self.counts: Counter[str] = Counter()
        self._partial = f"{prefix}.partial"
        self._vocab_size = vocab_size
        Path(prefix).absolute().parent.mkdir(parents=True, exist_ok=True)
        # uint16 only if the vocabulary fits: NumPy would silently wrap larger ids.
        self._builder = IndexedDatasetBuilder(f"{self._partial}.bin", DType.optimal_dtype(vocab_size))

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Appends one document: int32 [tokens]."""
        self._builder.add_document(ids, [len(ids)])
        self.counts.update(documents=1, tokens=len(ids), bytes=text_bytes)

    def finish(self) -> None:
        """Writes the index, then reads both files back.

        Raises:
            UserError: there is no document, or an id is beyond the vocabulary.
        """
        if not self.counts["documents"]:
            raise UserError(f"{self.prefix} would have no document: give more text or a larger share of --split")
        self._builder.finalize(f"{self._partial}.idx")
        facts = inspect(self._partial, self._vocab_size, None)
        assert (facts.documents, facts.tokens) == (self.counts["documents"], self.counts["tokens"])

    def publish(self) -> None:
        """Renames both files; the old index is removed first, so it never pairs with new tokens."""
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        for ending in (".bin", ".idx"):
            Path(self._partial + ending).replace(self.prefix + ending)

    def discard(self) -> None:
        """Removes the unpublished files."""
        with suppress(OSError):  # on a full disk closing fails again
            self._builder.data_file.close()
        for ending in (".bin", ".idx"):
            Path(self._partial + ending).unlink(missing_ok=True)
