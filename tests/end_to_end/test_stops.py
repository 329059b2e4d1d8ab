"""Where a text ends: generate.py and the exported folder have the same ids, whatever files stand by a tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_capgap.data.tokenizer import open_tokenizer
from tests.support import runs, tokenizer_zoo
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures
from tools import convert_hf, generate


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tokenizer_zoo.build(tmp_path_factory.mktemp("zoo"))


@pytest.mark.parametrize(
    "config, generation, expected, left_out",
    [
        ({"eos_token_id": 5}, {"eos_token_id": 5}, [2, 5], None),
        ({"eos_token_id": [7, 8]}, {"eos_token_id": None}, 2, None),
        ({"eos_token_id": 2}, {"eos_token_id": [9, 2]}, [2, 9], None),
        ({"eos_token_id": [7, 8]}, None, [2, 7, 8], None),
        ({"eos_token_id": None}, {"do_sample": True}, 2, None),
        ({}, {"eos_token_id": [9, -1, 999999]}, [2, 9], "-1, 999999"),
    ],
)
def test_an_export_lists_every_end_and_no_other(
    pool: WorkerPool,
    fixtures: Fixtures,
    zoo: dict[str, Path],
    tmp_path: Path,
    config: dict[str, Any],
    generation: dict[str, Any] | None,
    expected: int | list[int],
    left_out: str | None,
) -> None:
    tokenizer, run_dir, hf = tmp_path / "tokenizer", tmp_path / "run", tmp_path / "hf"
    shutil.copytree(zoo["prepend"], tokenizer)  # its eos is 2
    (tokenizer / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    if generation is not None:
        (tokenizer / "generation_config.json").write_text(json.dumps(generation))
    vocab = open_tokenizer(str(tokenizer)).vocab_size
    changes = {"train__steps": 1, "student__model__vocab": vocab, "data__valid": None}
    runs.train(pool, "adapt", runs.adapt_config(fixtures, run_dir, **changes, data__tokenizer=str(tokenizer)))
    words = ["export", "--checkpoint", str(run_dir), "--out", str(hf)]
    (rank,) = pool.run(convert_hf.main, words, world=1, initialise=False, capture=True)
    assert rank.value == 0, rank
    for file in ("config.json", "generation_config.json"):
        found = json.loads((hf / file).read_text())["eos_token_id"]
        assert sorted(found if isinstance(found, list) else [found]) == sorted(
            expected if isinstance(expected, list) else [expected]
        ), file
    assert json.loads((hf / "generation_config.json").read_text()).items() >= (
        {key: value for key, value in (generation or {}).items() if key != "eos_token_id"}.items()
    )
    assert open_tokenizer(str(hf)).stops == set(expected if isinstance(expected, list) else [expected])
    if left_out is not None:
        said = f"eos_token_id {left_out}: no such token in the model's vocab of {vocab}, so it ends no text"
        assert said in rank.stdout and said in (hf / "README.md").read_text()
        words = ["--checkpoint", str(run_dir), "--tokenizer", str(tokenizer), "--prompt", "the", "--device", "cpu"]
        (rank,) = pool.run(generate.main, [*words, "--max-new-tokens", "2"], world=1, initialise=False, capture=True)
        assert rank.value == 0 and said in rank.stderr, rank
