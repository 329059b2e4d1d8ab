"""Sample order: maps k to the k-th sample of a run, independent of layout, number of steps and restarts."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from fractions import Fraction
from hashlib import blake2b
from itertools import accumulate
from math import isqrt, lcm
from typing import NamedTuple

_ROUNDS = 6


class SampleIndex(NamedTuple):
    """Location of one sample.

    Attributes:
        dataset: index of the dataset.
        sample: index of the sample in that dataset.
        epoch: epoch of that dataset, from 0.
    """

    dataset: int
    sample: int
    epoch: int


SampleOrder = Callable[[int], SampleIndex]


def training_order(sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> SampleOrder:
    """Endless order over a blend of datasets; each dataset is reshuffled in each of its epochs.

    Args:
        sizes: samples in each dataset.
        weights: share of each dataset; None means in proportion to `sizes`, so the first sum(sizes) samples are every
            sample once.
        seed: seed of the shuffles.
    """
    blend = Blend(sizes if weights is None else weights)

    def place(k: int) -> SampleIndex:
        dataset, drawn = blend(k)
        epoch, position = divmod(drawn, sizes[dataset])
        return SampleIndex(dataset, shuffled(position, sizes[dataset], f"{seed} {dataset} {epoch}"), epoch)

    return place


def dp_shard(samples: range, micro_batch: int, data_rank: int, data_size: int) -> list[list[int]]:
    """Sample numbers of each micro-batch of one data-parallel rank.

    Blocks of `micro_batch` consecutive samples go to ranks 0, 1, ..., data_size - 1 in turn. The samples of a global
    batch do not depend on the layout; only their assignment to ranks does.
    """
    stride = micro_batch * data_size
    assert len(samples) % stride == 0, f"{len(samples)} samples over {data_size} ranks of {micro_batch}"
    starts = range(data_rank * micro_batch, len(samples), stride)
    return [list(samples[start : start + micro_batch]) for start in starts]


def validation_order(sizes: Sequence[int]) -> SampleOrder:
    """Every sample once, dataset after dataset."""
    ends = list(accumulate(sizes))

    def place(k: int) -> SampleIndex:
        assert 0 <= k < ends[-1], f"{k} is not a held-out sample; there are {ends[-1]}"
        dataset = bisect_left(ends, k + 1)
        return SampleIndex(dataset, k - ends[dataset] + sizes[dataset], 0)

    return place


class Blend:
    """Interleaves datasets by weight: `blend(k)` is (dataset, number of earlier samples of that dataset).

    The datasets, heaviest first, form a binary tree: each node splits its datasets where the weights balance best. Of
    the first k samples that reach a node, round(k * left / both) go left and the others right. Any k costs a few
    divisions, without state.

    After k samples, the count of each dataset differs from its share of k by at most 1/2 (two datasets), 1 (three) or 2
    (any number): a node adds at most 1/2, the error passed down shrinks with the weights, and a side of more than one
    dataset has at most 2/3 of the weight of both.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(weight) for weight in weights]
        unit = lcm(*(weight.denominator for weight in exact))
        self._heaviest_first = sorted(range(len(exact)), key=lambda i: -exact[i])
        # In integers, only the shares themselves are rounded, at any k.
        self._ends = [0, *accumulate(int(exact[i] * unit) for i in self._heaviest_first)]

    def __call__(self, k: int) -> tuple[int, int]:
        first, last = 0, len(self._heaviest_first)
        while last - first > 1:
            middle = self._balance(first, last)
            left, both = self._ends[middle] - self._ends[first], self._ends[last] - self._ends[first]
            taken, next_taken = (_share(n, left, both) for n in (k, k + 1))
            if next_taken > taken:
                last, k = middle, taken
            else:
                first, k = middle, k - taken
        return self._heaviest_first[first], k

    def _balance(self, first: int, last: int) -> int:
        """Split point of datasets first..last - 1 that minimises the weight of the heavier side."""
        both = self._ends[first] + self._ends[last]
        middle = bisect_left(self._ends, (both + 1) // 2, first + 1, last - 1)
        before = middle - 1
        return before if before > first and self._ends[before] + self._ends[middle] > both else middle


def _share(k: int, part: int, whole: int) -> int:
    """k * part / whole, rounded to the nearest integer."""
    return (2 * k * part + whole) // (2 * whole)


def shuffled(position: int, size: int, key: str) -> int:
    """Image of `position` under the permutation of [0, size) that `key` names.

    A Feistel network over pairs of digits in base ceil(sqrt(size)), iterated until the result is below `size`
    (cycle walking). It needs no table, which for 10^8 samples would take 800 MB on every rank, and unlike NumPy's
    generators its result does not depend on a library version.
    """
    base = isqrt(size - 1) + 1 if size > 1 else 1
    secret = key.encode()
    while True:
        left, right = divmod(position, base)
        for turn in range(_ROUNDS):
            digest = blake2b(b"%d %d" % (turn, right), key=secret, digest_size=8).digest()
            left, right = right, (left + int.from_bytes(digest, "big")) % base
        position = left * base + right
        if position < size:
            return position
