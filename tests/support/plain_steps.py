"""Plain steps on a model of transformers in float64: what a run of the parallel stack must agree with."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from megatron_capgap.config.schema import Config, Objective
from tests.support.dense import samples
from tests.support.pool import WorkerPool


def steps(
    pool: WorkerPool, config: Config, student: PreTrainedModel, taught: PreTrainedModel | None
) -> list[dict[str, float]]:
    """A run written out: AdamW with clipping, one global batch at a time; entries as in metrics.jsonl."""
    torch.set_num_threads(1)
    batch, wanted = config.train.global_batch, config.optimizer
    assert batch is not None
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": wanted.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=wanted.lr, betas=wanted.betas, eps=wanted.epsilon)
    entries = []
    for step in range(config.train.steps or 0):
        cache = Path(config.run_dir) / "data_cache"
        rows = pool.run(samples, config.data, config.seed, cache, step * batch, batch, world=1)[0]
        optimizer.zero_grad()
        parts = loss(student, taught, rows, config.objective)
        parts["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), wanted.clip_norm)
        optimizer.step()
        numbers = {name: part.item() for name, part in parts.items()}
        entries.append({"step": step + 1, **numbers, "grad_norm": norm.item(), "tokens": rows[:, 1:].numel()})
    return entries


def loss(
    student: PreTrainedModel, teacher: PreTrainedModel | None, rows: Tensor, objective: Objective
) -> dict[str, Tensor]:
    """Means over all tokens of `rows`, `[b, s + 1]`; with a teacher the divergence is its forward KL."""
    tokens, labels = rows[:, :-1], rows[:, 1:]
    logits = student(tokens).logits
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    if teacher is None:
        return {"loss": cross_entropy, "cross_entropy": cross_entropy}
    assert objective.divergence == "forward_kl"
    heat = objective.temperature
    with torch.no_grad():
        taught = (teacher(tokens).logits / heat).log_softmax(-1)
    learned = (logits / heat).log_softmax(-1)
    divergence = heat**2 * (taught.exp() * (taught - learned)).sum(-1).mean()
    total = objective.divergence_weight * divergence + objective.cross_entropy_weight * cross_entropy
    return {"loss": total, "cross_entropy": cross_entropy, "divergence": divergence}
