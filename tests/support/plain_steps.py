"""Plain steps on models of transformers in float64: what a run of the parallel stack must agree with."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from megatron_capgap.config.schema import Config, DataConfig, LayerPair, ObjectiveConfig
from tests.support.pool import WorkerPool

Weights = dict[str, Tensor]


def samples(data: DataConfig, seed: int, cache_dir: Path, first: int, count: int) -> Tensor:
    """Runs in a worker: consecutive training samples, int64 `[count, sequence_length + 1]`."""
    from megatron_capgap.data import pretrain

    sequence = pretrain.open_training(data, seed, cache_dir)
    return torch.stack([torch.from_numpy(sequence.tokens(k)) for k in range(first, first + count)])


def run_model(model: PreTrainedModel, tokens: Tensor, objective: ObjectiveConfig) -> tuple[Tensor, list[Tensor]]:
    """Logits `[b, s, v]`, and what comes out of each layer, `[b, s, h]`, where the objective matches any."""
    outputs: list[Tensor] = []

    def keep(layer: torch.nn.Module, _: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    layers = model.model.layers if objective.matching else ()
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    logits = model(tokens).logits
    for hook in hooks:
        hook.remove()
    return logits, outputs


def matching(learned: list[Tensor], taught: list[Tensor], pairs: Sequence[LayerPair], maps: Weights) -> Tensor:
    """The weighted distances of the pairs of layers, mean over all tokens, added up."""
    total = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        student, teacher = learned[pair.student_layer - 1], taught[pair.teacher_layer - 1]
        if maps:
            student = student @ maps[pair.name].t()
        if pair.kind == "mse":
            distance = ((student - teacher) ** 2).sum(-1) / teacher.shape[-1]
        else:
            distance = 1 - (student * teacher).sum(-1) / (student.norm(dim=-1) * teacher.norm(dim=-1))
        total = total + pair.weight * distance.mean()
    return total


def loss(
    student: PreTrainedModel, teacher: PreTrainedModel | None, rows: Tensor, objective: ObjectiveConfig, maps: Weights
) -> dict[str, Tensor]:
    """Means over all tokens of `rows`, `[b, s + 1]`; with a teacher the divergence is its forward KL."""
    tokens, labels = rows[:, :-1], rows[:, 1:]
    logits, states = run_model(student, tokens, objective)
    if teacher is not None:  # columns that only one of them has do not count
        common = min(model.get_output_embeddings().out_features for model in (student, teacher))
        logits = logits[..., :common]
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    if teacher is None:
        return {"loss": cross_entropy, "cross_entropy": cross_entropy}
    assert objective.divergence == "forward_kl"
    heat = objective.temperature
    with torch.no_grad():
        logits_of_teacher, states_of_teacher = run_model(teacher, tokens, objective)
        taught = (logits_of_teacher[..., :common] / heat).log_softmax(-1)
    learned = (logits / heat).log_softmax(-1)
    divergence = heat**2 * (taught.exp() * (taught - learned)).sum(-1).mean()
    total = objective.divergence_weight * divergence + objective.cross_entropy_weight * cross_entropy
    parts = {"cross_entropy": cross_entropy, "divergence": divergence}
    if objective.matching:
        parts["matching"] = matching(states, states_of_teacher, objective.matching, maps)
        total = total + parts["matching"]
    return {"loss": total, **parts}


def steps(
    pool: WorkerPool,
    config: Config,
    student: PreTrainedModel,
    taught: PreTrainedModel | None,
    maps: Weights | None = None,
) -> list[dict[str, float]]:
    """A run written out: AdamW with clipping, one global batch at a time; entries as in metrics.jsonl.

    Args:
        config: of a run that has been made, since its indices of samples are read.
        student, taught: the models; the student is trained.
        maps: `[h_teacher, h_student]` for each matched pair by its name, where widths differ; trained too.
    """
    batch, maps = config.train.global_batch, maps or {}
    assert batch is not None
    cache = Path(config.run_dir) / "data_cache"

    def measure(step: int) -> tuple[dict[str, Tensor], int]:
        rows = pool.run(samples, config.data, config.seed, cache, step * batch, batch, world=1)[0]
        return loss(student, taught, rows, config.objective, maps), rows[:, 1:].numel()

    return train(config, config.train.steps or 0, [*student.parameters(), *maps.values()], measure)


def train(
    config: Config, count: int, trained: Sequence[Tensor], measure: Callable[[int], tuple[dict[str, Tensor], int]]
) -> list[dict[str, float]]:
    """AdamW with clipping at a constant rate; entries as in metrics.jsonl.

    Args:
        config: its section optimizer is read.
        count: steps.
        trained: parameters.
        measure: from a step, counted from 0, to the means over its tokens, `loss` among them, and their number.
    """
    torch.set_num_threads(1)
    wanted = config.optimizer
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": wanted.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=wanted.lr, betas=wanted.betas, eps=wanted.epsilon)
    entries = []
    for step in range(count):
        optimizer.zero_grad()
        parts, tokens = measure(step)
        parts["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, wanted.clip_norm)
        optimizer.step()
        numbers = {name: part.item() for name, part in parts.items()}
        entries.append({"step": step + 1, **numbers, "grad_norm": norm.item(), "tokens": tokens})
    return entries
