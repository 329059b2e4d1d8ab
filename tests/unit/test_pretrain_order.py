"""The order of samples, by itself and over real datasets read through Megatron-Core."""

import os
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_capgap.common.errors import UserError
from megatron_capgap.config.schema import DataConfig
from megatron_capgap.data.pretrain import build_indices, open_training, open_validation
from megatron_capgap.data.sampler import Blend, shuffled, training_order, validation_order
from tests.support import corpus
from tests.support.pool import WorkerPool

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=8)
WEIGHTS = st.lists(st.floats(1e-4, 10, allow_nan=False), min_size=1, max_size=8)
SEQUENCE = 8
VOCAB = 10_000


@given(size=st.integers(1, 400), key=st.text(max_size=9))
def test_shuffled_is_a_permutation(size: int, key: str) -> None:
    assert sorted(shuffled(i, size, key) for i in range(size)) == list(range(size))


def test_shuffles_are_even_and_fixed() -> None:
    seen = Counter(tuple(shuffled(i, 4, str(key)) for i in range(4)) for key in range(4800))
    assert len(seen) == 24 and min(seen.values()) > 140 and max(seen.values()) < 260  # 200 each, +- 4.3 sigma
    neighbours = [abs(shuffled(i + 1, 10**6, "k") - shuffled(i, 10**6, "k")) for i in range(2000)]
    assert 310_000 < np.mean(neighbours) < 357_000  # a third of the size, +- 4.3 sigma
    # Resuming a run under another version must not change its data.
    assert [shuffled(i, 12, "1234 0 0") for i in range(12)] == [11, 6, 4, 3, 5, 7, 0, 2, 8, 10, 9, 1]


@given(weights=WEIGHTS)
def test_blend_keeps_every_share(weights: list[float]) -> None:
    blend, counts, total = Blend(weights), Counter(), sum(weights)
    bound = {1: 0.0, 2: 0.5, 3: 1.0}.get(len(weights), 2.0)
    for k in range(300):
        dataset, drawn = blend(k)
        assert drawn == counts[dataset]  # nothing skipped, nothing twice
        counts[dataset] += 1
        for i, weight in enumerate(weights):
            assert abs(counts[i] - (k + 1) * weight / total) <= bound + 1e-6


@pytest.mark.parametrize("weights", [[1] * 10, [5, 4, 3, 2, 1, 1, 1], [0.9] + [0.001] * 100, [2**-i for i in range(9)]])
def test_usual_blends_stay_within_one_sample(weights: list[float]) -> None:
    blend, counts = Blend(weights), np.zeros(len(weights))
    shares = np.array(weights) / sum(weights)
    for k in range(3000):
        counts[blend(k)[0]] += 1
        assert np.abs(counts - (k + 1) * shares).max() <= 1


def test_a_blend_does_not_depend_on_the_order_of_its_list() -> None:
    one, other = Blend([0.1, 0.5, 0.15, 0.25]), Blend([0.5, 0.25, 0.15, 0.1])
    names, other_names = "abcd", "bdca"
    assert [names[one(k)[0]] for k in range(200)] == [other_names[other(k)[0]] for k in range(200)]


@given(sizes=SIZES, seed=st.integers(0, 2**70))
def test_without_weights_one_pass_holds_every_sample_once(sizes: list[int], seed: int) -> None:
    order = training_order(sizes, None, seed)
    everything = sorted((dataset, sample) for dataset, size in enumerate(sizes) for sample in range(size))
    for epoch in range(2):
        places = [order(k) for k in range(epoch * sum(sizes), (epoch + 1) * sum(sizes))]
        assert sorted(place[:2] for place in places) == everything
        assert {place.epoch for place in places} == {epoch}
    assert [validation_order(sizes)(k)[:2] for k in range(sum(sizes))] == everything


@given(data=st.data(), weights=WEIGHTS, seed=st.integers(0, 9))
def test_each_epoch_of_each_dataset_holds_every_sample_once(
    data: st.DataObject, weights: list[float], seed: int
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=len(weights), max_size=len(weights)))
    order = training_order(sizes, weights, seed)
    seen: Counter[tuple[int, int, int]] = Counter(order(k) for k in range(400))
    assert set(seen.values()) == {1}
    for dataset, size in enumerate(sizes):
        drawn = sum(place[0] == dataset for place in seen)
        complete = [(dataset, sample, epoch) for epoch in range(drawn // size) for sample in range(size)]
        assert all(place in seen for place in complete)


def test_order_depends_on_the_seed_and_the_epoch() -> None:
    first, second = training_order([50], None, 1), training_order([50], None, 2)
    epochs = [[order(k).sample for k in range(start, start + 50)] for order in (first, second) for start in (0, 50)]
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_late_sample_is_found_at_once() -> None:
    order = training_order([10**8, 3 * 10**7, 17], [0.7, 0.29, 0.01], 0)
    began = time.process_time()
    late = [order(10**9 + k) for k in range(1000)]
    assert time.process_time() - began < 1
    assert len(set(late)) == 1000


def numbered(start: int, lengths: list[int]) -> list[list[int]]:
    """Documents in which every token is another number."""
    ends = np.cumsum(lengths) + start
    return [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    lengths = np.random.default_rng(0).integers(1, 40, 30).tolist()
    train = [
        corpus.write_dataset(tmp_path / "data" / "a", numbered(0, lengths)),
        corpus.write_dataset(tmp_path / "data" / "b", numbered(5000, lengths[:11])),
    ]
    valid = corpus.write_dataset(tmp_path / "data" / "c", numbered(8000, [7, 1, 30, 5, 12]))
    return DataConfig(tokenizer="", train=tuple(train), valid=(valid,), sequence_length=SEQUENCE)


def tokens_of(prefix: str) -> int:
    return Path(f"{prefix}.bin").stat().st_size // 2


def test_an_epoch_reads_each_token_once(data: DataConfig, tmp_path: Path) -> None:
    build_indices(data, VOCAB, 5, tmp_path / "cache")
    train = open_training(data, 5, tmp_path / "cache")
    samples = [(tokens_of(prefix) - 1) // SEQUENCE for prefix in data.train]
    assert len(train) == sum(samples)
    epoch = np.stack([train.tokens(k) for k in range(len(train))])
    assert epoch.shape == (len(train), SEQUENCE + 1) and epoch.dtype == np.int64
    labels = epoch[:, 1:].ravel().tolist()
    assert len(set(labels)) == len(labels) == sum(samples) * SEQUENCE
    # The end of a sample's labels is the beginning of the next: only each dataset's tail is never predicted.
    chained = set(epoch[:, 0].tolist()) & set(epoch[:, -1].tolist())
    assert len(chained) == len(train) - len(data.train)
    again = np.stack([train.tokens(k) for k in range(len(train), 2 * len(train))])
    assert sorted(map(tuple, again)) == sorted(map(tuple, epoch)) and not np.array_equal(again, epoch)


def test_samples_run_through_whole_documents(data: DataConfig, tmp_path: Path) -> None:
    build_indices(data, VOCAB, 0, tmp_path / "cache")
    valid = open_validation(data, tmp_path / "cache")
    assert len(valid) == (55 - 1) // SEQUENCE
    starts = set(np.cumsum([8000, 7, 1, 30, 5]).tolist())
    for k in range(len(valid)):
        for before, here in pairwise(valid.tokens(k).tolist()):
            assert here == before + 1 or here in starts
    with pytest.raises(AssertionError):
        valid.tokens(len(valid))


def test_sources_name_the_dataset(data: DataConfig, tmp_path: Path) -> None:
    build_indices(data, VOCAB, 5, tmp_path)
    train, valid = open_training(data, 5, tmp_path), open_validation(data, tmp_path)
    assert valid.source(2) == f"{data.valid[0]} sample 2 (epoch 1)"
    sources = [train.source(k) for k in range(len(train))]
    assert len(set(sources)) == len(train)
    assert train.source(len(train)).endswith("(epoch 2)")


def test_a_dataset_made_anew_gets_new_indices(data: DataConfig, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    build_indices(data, VOCAB, 5, cache)
    before = {file: file.stat().st_mtime_ns for file in cache.rglob("*")}
    build_indices(data, VOCAB, 5, cache)
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*")} == before  # nothing is built twice
    (cache / f"{'0' * 16}.partial.1").mkdir()  # what a killed job leaves
    corpus.write_dataset(tmp_path / "data" / "a", numbered(1000, [9] * 9))
    with pytest.raises(UserError, match="is missing: put run_dir"):
        open_training(data, 5, cache)
    build_indices(data, VOCAB, 5, cache)
    train = open_training(data, 5, cache)
    assert len(train) == 80 // SEQUENCE + (tokens_of(data.train[1]) - 1) // SEQUENCE


def test_nothing_is_written_beside_the_data(data: DataConfig, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    build_indices(data, VOCAB, 5, tmp_path / "cache")
    open_training(data, 5, tmp_path / "cache")
    assert [file for file in sorted(tmp_path.rglob("*")) if "cache" not in file.parts] == before


def test_a_bad_dataset_is_refused_also_after_a_good_start(data: DataConfig, tmp_path: Path) -> None:
    build_indices(data, VOCAB, 5, tmp_path / "cache")
    with pytest.raises(UserError, match=r"a\.bin: token \d+ \(document \d+\) is 100, not below"):
        build_indices(data, 100, 5, tmp_path / "cache")
    bin_file = Path(f"{data.train[1]}.bin")
    bin_file.write_bytes(bin_file.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"b\.bin has \d+ bytes"):
        build_indices(data, VOCAB, 5, tmp_path / "cache")


def test_a_cache_that_cannot_be_written(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="cache cannot store the sample indices of"):
        build_indices(data, VOCAB, 5, tmp_path / "cache")


def read_on_a_rank(data: DataConfig, cache: Path) -> list[list[int]]:
    if dist.get_rank() == 0:
        build_indices(data, VOCAB, 5, cache)
    dist.barrier()
    train = open_training(data, 5, cache)
    return [train.tokens(k).tolist() for k in range(len(train))]


def test_every_rank_reads_the_same_samples(pool: WorkerPool, data: DataConfig, tmp_path: Path) -> None:
    first, second = pool.run(read_on_a_rank, data, tmp_path / "cache", world=2)
    alone = tmp_path / "alone"
    build_indices(data, VOCAB, 5, alone)
    train = open_training(data, 5, alone)
    assert first == second == [train.tokens(k).tolist() for k in range(len(train))]
    assert len(os.listdir(tmp_path / "cache")) == 3
