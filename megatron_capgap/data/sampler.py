"""Which sample is the k-th of a run: arithmetic on k alone, the same for any layout, number of steps or
restart."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from fractions import Fraction
from hashlib import blake2b
from itertools import accumulate
from math import isqrt, lcm
from typing import NamedTuple

_ROUNDS = 6


class SampleIndex(NamedTuple):
    """Where one sample stands.

    Attributes:
        dataset: number of the dataset in its list.
        sample: number of the sample in that dataset.
        epoch: how often that dataset has been read through before.
    """

    dataset: int
    sample: int
    epoch: int


Order = Callable[[int], SampleIndex]


def training_order(sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> Order:
    """Endless order over a blend; each dataset is shuffled anew in each of its epochs.

    Args:
        sizes: samples in each dataset.
        weights: share of the samples from each dataset; None means in proportion to `sizes`, so that the
        first
            sum(sizes) samples are every sample once.
        seed: decides the shuffles.
    """
    blend = Blend(sizes if weights is None else weights)

    def place(k: int) -> SampleIndex:
        dataset, drawn = blend(k)
        epoch, position = divmod(drawn, sizes[dataset])
        return SampleIndex(dataset, shuffled(position, sizes[dataset], f"{seed} {dataset} {epoch}"), epoch)

    return place


def dp_shard(samples: range, micro_batch: int, data_rank: int, data_size: int) -> list[list[int]]:
    """Numbers of the samples in each micro-batch of one data-parallel rank.

    They are dealt out in runs of `micro_batch`, to rank 0, 1, ..., data_size - 1 and round again: which samples a
    global batch holds does not depend on the layout, only who reads them does.
    """
    deal = micro_batch * data_size
    assert len(samples) % deal == 0, f"{len(samples)} samples over {data_size} ranks of {micro_batch}"
    starts = range(data_rank * micro_batch, len(samples), deal)
    return [list(samples[start : start + micro_batch]) for start in starts]


def validation_order(sizes: Sequence[int]) -> Order:
    """Every sample once, dataset after dataset."""
    ends = list(accumulate(sizes))

    def place(k: int) -> SampleIndex:
        assert 0 <= k < ends[-1], f"{k} is not a held-out sample; there are {ends[-1]}"
        dataset = bisect_left(ends, k + 1)
        return SampleIndex(dataset, k - ends[dataset] + sizes[dataset], 0)

    return place


class Blend:
    """Interleaves datasets by weight: `blend(k)` is (dataset, number of earlier samples of that dataset).

    The datasets, heaviest first, are cut in two where the weights balance best, each side again, down to
    single ones. Of the first k samples that reach such a cut, round(k * left / both) go left and the others
    right. Any k costs a few divisions, and no state is kept.

    After k samples each dataset has had its share of k to within 1/2 (two datasets), 1 (three) or 2 (any
    number). For a cut adds 1/2 at most, what it hands down shrinks with the weights, and a side of more than
    one dataset never holds more than 2/3 of both.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(weight) for weight in weights]
        unit = lcm(*(weight.denominator for weight in exact))
        self._heaviest_first = sorted(range(len(exact)), key=lambda i: -exact[i])
        # In whole numbers nothing is rounded but the shares themselves, at any k.
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
        """Where to cut datasets first..last - 1 so that the heavier side is as light as it can be."""
        both = self._ends[first] + self._ends[last]
        middle = bisect_left(self._ends, (both + 1) // 2, first + 1, last - 1)
        before = middle - 1
        return before if before > first and self._ends[before] + self._ends[middle] > both else middle


def _share(k: int, part: int, whole: int) -> int:
    """k * part / whole, rounded to the nearest integer."""
    return (2 * k * part + whole) // (2 * whole)


def shuffled(position: int, size: int, key: str) -> int:
    """Image of `position` under the permutation of [0, size) that `key` names.

    A Feistel network over pairs of digits in base ceil(sqrt(size)), walked until it lands below `size`. It
    needs no table, which for 10^8 samples would be 800 MB on every rank, and unlike NumPy's generators its
    outcome is fixed by the definition of BLAKE2b, not by a library's version.
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
