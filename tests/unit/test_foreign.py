"""Checkpoints of other programs on Megatron-Core: one line that says what they are, wherever one is named."""

from pathlib import Path

import pytest

from megatron_capgap.checkpoint import foreign, run_directory
from megatron_capgap.common.errors import UserError
from megatron_capgap.conversion.hf_folder import open_hf_folder

FOLDERS = {
    "several": ["latest_checkpointed_iteration.txt", "iter_0000010/.metadata", "iter_0000010/__0_0.distcp"],
    "without its pointer": ["iter_0000010/.metadata", "iter_0000010/metadata.json"],
    "one": [".metadata", "metadata.json", "__0_0.distcp"],
    "one without index": ["metadata.json", "__0_0.distcp"],
    "one of pickles": ["mp_rank_00/model_optim_rng.pt"],
}


def filled(folder: Path, files: list[str]) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize("kind", FOLDERS)
def test_one_line_says_what_it_is_and_what_to_do(tmp_path: Path, kind: str) -> None:
    folder, first = filled(tmp_path, FOLDERS[kind]), FOLDERS[kind][0].split("/model_optim")[0]
    for use in (run_directory.locate, lambda name: open_hf_folder(Path(name))):
        with pytest.raises(UserError) as raised:
            use(str(folder))
        said = str(raised.value)
        assert said.startswith(
            f"{folder}: is a checkpoint of Megatron-LM or of another program on Megatron-Core (it has "
        )
        assert "with tools/convert_hf.py import" in said and "\n" not in said
    if kind != "one without index":
        assert f"(it has {first})" in said


@pytest.mark.parametrize(
    "files",
    [
        [],
        ["config.json", "model.safetensors"],
        ["checkpoints/step_1/.metadata"],
        [".metadata", "contents.json", "__0_0.distcp"],  # ours, whose capgap.json is lost
    ],
)
def test_what_it_does_not_speak_of(tmp_path: Path, files: list[str]) -> None:
    foreign.refuse(filled(tmp_path, files))
