"""The planner: numbers in place of checkpoints, memory, time, levers and the search, against arithmetic of its own."""

import json
import re
import time
from pathlib import Path

import pytest
import yaml

from megatron_capgap.cli import main
from megatron_capgap.config.catalogue import MODELS
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.models import size
from megatron_capgap.planning.schedule import Schedule
from tests.support.processes import ROOT
from tools import catalogue

BASE = {
    "student": {"model": "llama-3.1-8b"},
    "teacher": {"model": "llama-3.1-70b"},
    "data": {"sequence_length": 4096},
    "train": {"steps": 1000, "global_batch": 1024},
    "precision": {"compute": "bf16"},
}
GIB = 1 << 30


@pytest.fixture
def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs the command line on a configuration: exit code, standard output, standard error."""

    def run(stage: str, config: dict, *words: str) -> tuple[int, str, str]:
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(config))
        code = main([stage, "--config", str(file), *words])
        return code, *capsys.readouterr()

    return run


def merged(config: dict, changes: dict) -> dict:
    keys = {**config, **changes}
    both = {key for key in changes if isinstance(config.get(key), dict) and isinstance(changes[key], dict)}
    return {key: merged(config[key], changes[key]) if key in both else value for key, value in keys.items()}


def first_of(text: str) -> dict:
    """The YAML lines of the first layout."""
    return yaml.safe_load(text[text.index("\nstudent:\n") :])


def table(text: str, title: str) -> dict[str, float]:
    lines = text[text.index(title) :].splitlines()[1:]
    rows = {}
    for line in lines:
        found = re.match(r"  ([a-z0-9 ]+?) +([\d,]+\.\d)(?:$|  )", line)
        if not found:
            break
        rows[found[1]] = float(found[2].replace(",", ""))
    return rows


def published_bytes(student: dict, teacher: dict, layout: dict, micro_batch: int, ranks: int, full: bool) -> float:
    """Weights in bf16, fp32 gradients, fp32 optimizer sharded over data-parallel ranks, and the activations of a layer
    by the method of arXiv 2205.05198 (section 4) for LLaMA's layer: what each matrix product and norm reads. Without
    pipeline; the teacher resident in the same number of shards as given."""
    h, f, kv, layers, vocab, s = 4096, 14336, 1024, 32, 128256, 4096
    t = layout["tensor"]
    weights = layers * (2 * h * h + 2 * h * kv + 3 * h * f + 2 * h) + 2 * vocab * h + h
    held = weights / t
    data = ranks / t
    # Norms' inputs 2h, products' inputs 2h, q and k and v, the attention's output, gate and up, and their product.
    layer = 2 * s * micro_batch * (2 * h + 2 * h + (h + 2 * kv) + h + 3 * f) / t
    kept = layers * layer if not full else layers * 2 * s * micro_batch * h / t + layer
    hidden, hf, hkv = 8192, 28672, 1024
    large = 80 * (2 * hidden * hidden + 2 * hidden * hkv + 3 * hidden * hf + 2 * hidden) + 2 * vocab * hidden + hidden
    shards = teacher["tensor"] * teacher["pipeline"]
    states = 1024 * s * hidden * 2 / data / t  # of the student's part of a global batch
    return held * (2 + 4) + 12 * held / data + kept + 2 * (large / shards) + states


def test_eight_from_seventy_billion_on_256_gpus_agrees_with_arithmetic(plan) -> None:
    """Weights, gradients, optimizer and activations, with and without recomputation, within 5%."""
    layout, teacher = {"tensor": 4, "sequence": True}, {"tensor": 8, "pipeline": 1, "sequence": True}
    for micro_batch, full in ((2, False), (4, False), (2, True)):
        student = {"layout": layout, **({"recompute": {"what": "full"}} if full else {})}
        changes = {"student": student, "teacher": {"layout": teacher}, "train": {"micro_batch": micro_batch}}
        code, out, err = plan("distill", merged(BASE, changes), "--gpu", "h200", "--check-world", "256")
        assert (code, err) == (0, "")
        found = float(re.search(r"^fits: ([\d.]+) GiB", out, re.M)[1])
        expected = published_bytes({}, teacher, layout, micro_batch, 256, full) / GIB
        # The loss's chunk of logits, its gradients and the widest layer's backward pass are not in the formula.
        rows = table(out, "memory of the fullest rank")
        beside = (rows["loss"] + rows["backward pass"]) / 1024
        assert found - beside == pytest.approx(expected, rel=0.05)


def test_rows_add_up(plan) -> None:
    layout = {"tensor": 4, "pipeline": 2, "virtual_pipeline": 2, "sequence": True}
    changes = {"student": {"layout": layout}, "teacher": {"layout": {"tensor": 8, "sequence": True}}}
    words = ("--gpu=h100-80", "--check-world=64", "--gpu-hour-price=2", "--utilisation=0.5")
    code, out, _ = plan("distill", merged(BASE, changes), *words)
    assert code == 0
    for title in ("memory of the fullest rank", "predicted time of a step"):
        *parts, total = table(out, title).values()
        assert len(parts) >= 5 and sum(parts) == pytest.approx(total, abs=1e-6)
    step = table(out, "predicted time of a step")["total"] / 1000
    days, hours, cost = re.search(r"([\d.]+) days, ([\d,.]+) GPU-hours, cost ([\d,.]+) at 2", out).groups()
    hours = float(hours.replace(",", ""))
    assert hours == pytest.approx(1000 * step * 64 / 3600, rel=1e-3)
    assert float(days) == pytest.approx(hours / 64 / 24, rel=0.01)
    assert float(cost.replace(",", "")) == pytest.approx(2 * hours, rel=1e-3)


@pytest.mark.parametrize(
    ("stage", "ranks", "gpu", "changes"),
    [
        ("distill", 256, "h100-80", {}),
        ("distill", 96, "a100-80", {"train": {"global_batch": 960}}),
        ("distill", 12, "h200", {"train": {"global_batch": 480}}),
        ("distill", 1000, "h200", {"train": {"global_batch": None}}),
        ("adapt", 8, "40", {"student": {"model": "qwen3-4b"}, "teacher": None}),
        ("finetune", 16, "h100-80", {"student": {"model": "pythia-1b"}, "teacher": {"model": "pythia-6.9b"},
                                     "data": {"sequence_length": 2048}}),
        ("prune", 16, "h200", {"student": None, "teacher": {"model": "qwen2.5-7b"}, "prune": {"sparsity": 0.5}}),
        ("evaluate", 4, "24", {"student": {"model": "gpt2-xl"}, "teacher": None, "data": {"sequence_length": 1024}}),
    ],
)  # fmt: skip
def test_the_first_layout_passes_check_and_fits(plan, stage: str, ranks: int, gpu: str, changes: dict) -> None:
    config = {key: value for key, value in merged(BASE, changes).items() if value is not None}
    code, out, err = plan(stage, config, f"--plan={ranks}", f"--gpu={gpu}")
    assert (code, err) == (0, "")
    chosen = merged(config, first_of(out))
    code, out, err = plan(stage, chosen, "--check", f"--check-world={ranks}", f"--gpu={gpu}")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("fits: ")


def test_four_thousand_gpus_in_less_than_ten_seconds(plan) -> None:
    began = time.process_time()
    code, out, _ = plan("distill", BASE, "--plan", "4096", "--gpu", "h100-80")
    assert code == 0 and time.process_time() - began < 10
    assert len(re.findall(r"^[1-5] ", out, re.M)) == 5


def test_levers_come_in_order_with_their_memory(plan) -> None:
    config = merged(BASE, {"teacher": None, "train": {"micro_batch": 4}})
    del config["teacher"]
    code, out, _ = plan("adapt", config, "--gpu", "80", "--check-world", "8")
    assert code == 0
    rows = re.findall(r"^  ((?:student|train)\.\S+: .*?) +([\d,.]+) GiB  (fits|does not fit)$", out, re.M)
    names = [name for name, _, _ in rows]
    expected = ["recompute: {what: mlp}", "recompute: {what: full}", "micro_batch: 1", "layout: {tensor: 2"]
    assert all(part in name for part, name in zip(expected, names, strict=False))
    assert out.splitlines()[-1].startswith("does not fit: ")
    _name, nbytes, _ = rows[1]
    code, out, _ = plan("adapt", config, "--gpu", "80", "--check-world", "8", "--student.recompute={what: full}")
    assert f"{nbytes} GiB on the fullest rank" in out.splitlines()[-1]


def test_nothing_fits_names_the_nearest(plan) -> None:
    code, out, _ = plan("distill", merged(BASE, {"train": {"global_batch": 16}}), "--plan", "2", "--gpu", "24")
    assert code == 0
    assert re.match(r"does not fit on 2 GPUs; the nearest: student .* are missing of", out.splitlines()[-1])
    code, out, _ = plan("distill", BASE, "--plan", "1000", "--gpu", "h200")
    assert "no layout of 1000 GPUs divides train.global_batch 1024" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "b300"], "--gpu: b300 given; valid values: h100-80, h200, a100-80"),
        (["--gpu", "-4"], "--gpu: -4 given"),
        (["--gpu", "nan"], "--gpu: nan given"),
        (["--plan", "0"], "--plan: 0 given; expected the number of GPUs, an integer > 0"),
        (["--plan", "many"], "--plan: many given"),
        (["--utilisation", "40"], "--utilisation: 40 given; expected a number > 0 and <= 1, for example 0.4"),
        (["--gpu-hour-price", "free"], "--gpu-hour-price: free given; expected a number > 0"),
        (["--utilisation", "0.4"], "--utilisation: no GPU is given; add --gpu h100-80"),
        (["--gpu=h200", "--teacher.model=llama-3.1-71b"], "did you mean llama-3.1-70b?"),
        (["--teacher.checkpoint=runs/one", "--check"], "teacher: both of checkpoint and model set"),
    ],
)
def test_bad_values_are_one_line(plan, words: list[str], message: str) -> None:
    code, out, err = plan("distill", BASE, *words)
    assert (code, out) == (2, "") and message in err


def test_a_run_needs_the_teacher_s_weights(plan) -> None:
    config = merged(BASE, {"run_dir": "run", "data": {"tokenizer": "t", "train": ["a"]}})
    code, _, err = plan("distill", config)
    assert code == 2
    (line,) = err.splitlines()
    assert "teacher.model: numbers stand in for a teacher in --check and --plan only" in line


def test_numbers_need_neither_tokenizer_nor_data(plan) -> None:
    config = merged(BASE, {"run_dir": "run", "data": {"tokenizer": "none", "train": ["none"]}})
    code, out, err = plan("distill", config, "--check-world", "8")
    assert (code, err) == (0, "")
    assert "capacity gap T/S" in out and "none does not exist here" in out


def test_a_config_json_is_enough(plan, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    numbers = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    content = {"model_type": "llama", "intermediate_size": 28672, "vocab_size": 128256, **numbers}
    (folder / "config.json").write_text(json.dumps({**content, "max_position_embeddings": 131072}))
    expected = plan("distill", BASE, "--gpu=h200", "--check-world=8")[1]
    for key in ("model", "checkpoint"):
        config = {**BASE, "teacher": {key: str(folder)}}
        assert plan("distill", config, "--gpu=h200", "--check-world=8")[1] == expected


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("llama-3.2-1b", 1_235_814_400),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
        ("mistral-7b-v0.1", 7_241_732_096),
        ("gpt2", 124_439_808),
        ("pythia-1b", 1_011_781_632),
    ],
)
def test_the_catalogue_has_the_published_numbers_of_parameters(name: str, parameters: int) -> None:
    assert size.parameters(ModelShape(**MODELS[name])) == parameters


def test_both_catalogues_agree() -> None:
    for name, model in catalogue.read_models(ROOT / "tools" / "catalogue.yaml").items():
        found = MODELS.get(name.replace("/", "-"))
        if found is not None:
            for key, value in model.items():
                assert found[key] == value, (name, key)


@pytest.mark.parametrize("virtual", [1, 2])
def test_the_closed_form_is_the_simulated_schedule(virtual: int) -> None:
    case = Schedule(4, 16, 1.0, 2.0, virtual=virtual, last=0.7)
    assert case.seconds == pytest.approx(case.simulated(), rel=1e-9 if virtual == 1 else 0.03)
