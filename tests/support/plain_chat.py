"""Finetuning written out on LLaMAs of transformers in float64: every conversation by itself, in no row with others."""

from collections.abc import Iterator
from hashlib import blake2b
from math import sqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from megatron_capgap.config.loader import load
from megatron_capgap.config.schema import Config, ModelShape, ObjectiveConfig
from megatron_capgap.data.chat_template import open_template
from megatron_capgap.data.conversation_dataset import ConversationDataset
from megatron_capgap.data.conversation_packing import Example, PackedConversationDataset
from megatron_capgap.data.tokenizer import open_tokenizer
from tests.support import dense, plain_steps, runs
from tests.support.pool import WorkerPool


def rows_of(config: Config) -> PackedConversationDataset:
    """The training rows that a run of this configuration has read."""
    tokenizer = open_tokenizer(config.data.tokenizer)
    template = open_template(config.finetune.template, tokenizer, config.data.tokenizer)
    found = ConversationDataset(config.data, tokenizer, template, Path(config.run_dir) / "data_cache")
    return found.open_training(config.seed, packed=config.finetune.packed)


def noise(config: Config, sample: int, width: int) -> Tensor:
    """What NEFTune adds to a row, before it is divided by the root of each conversation's size: `[s, h]`."""
    digest = blake2b(str(sample).encode(), key=f"{config.seed} neftune".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") // 2)
    drawn = torch.rand(config.data.sequence_length, width, generator=generator)
    return config.finetune.neftune_alpha * (2 * drawn - 1).double()


def alone(
    config: Config, sequence: PackedConversationDataset, sample: int, width: int
) -> Iterator[tuple[Example, Tensor]]:
    """Each conversation of a row with the noise on it, `[n, h]`."""
    start, drawn = 0, noise(config, sample, width)
    for example in sequence.conversations(sample):
        yield example, drawn[start : start + len(example)] / sqrt(len(example) * width)
        start += len(example)


def sums(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM | None, example: Example, added: Tensor, heat: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and divergence of the assistant's words in one conversation, added up."""
    tokens, learned = torch.from_numpy(example.tokens)[None], torch.from_numpy(example.in_loss)
    embedded = student.model.embed_tokens(tokens[:, :-1]) + added
    logits = student(inputs_embeds=embedded).logits[0, learned]
    cross_entropy = F.cross_entropy(logits, tokens[0, 1:][learned], reduction="sum")
    if teacher is None:
        return cross_entropy, torch.zeros(())
    with torch.no_grad():
        taught = (teacher(tokens[:, :-1]).logits[0, learned] / heat).log_softmax(-1)
    return cross_entropy, heat**2 * (taught.exp() * (taught - (logits / heat).log_softmax(-1))).sum()


def steps(pool: WorkerPool, raw: dict[str, Any], student: Path) -> list[dict[str, float]]:
    """The run that a configuration means, of a tiny student's checkpoint; entries as in metrics.jsonl.

    Args:
        raw: of a run that has been made, since its conversations are read as they were encoded.
        student: its checkpoint.
    """
    config = load(runs.write_config(raw), [], "finetune").config
    source = dense.Source(ModelShape(**runs.STUDENT), config.seed, student)
    model = dense.llama(source.shape, pool.run(dense.megatron_weights, source, world=1)[0])
    teacher = None
    if config.teacher is not None:
        source = dense.Source(ModelShape(**runs.TEACHER), config.seed, Path(config.teacher.checkpoint))
        teacher = dense.llama(source.shape, pool.run(dense.megatron_weights, source, world=1)[0])
    sequence, batch, objective = rows_of(config), config.train.global_batch, config.objective
    width = model.config.hidden_size
    assert batch is not None and config.train.steps is not None

    def measure(step: int) -> tuple[dict[str, Tensor], int]:
        found, tokens = [], 0
        for sample in range(step * batch, (step + 1) * batch):
            for example, added in alone(config, sequence, sample, width):
                found.append(sums(model, teacher, example, added, objective.temperature))
                tokens += int(example.in_loss.sum())
        cross_entropy, divergence = (sum(parts) / tokens for parts in zip(*found, strict=True))
        return _parts(cross_entropy, divergence, objective if teacher is not None else None), tokens

    return plain_steps.train(config, config.train.steps, list(model.parameters()), measure)


def _parts(cross_entropy: Tensor, divergence: Tensor, objective: ObjectiveConfig | None) -> dict[str, Tensor]:
    if objective is None:
        return {"loss": cross_entropy, "cross_entropy": cross_entropy}
    total = objective.divergence_weight * divergence + objective.cross_entropy_weight * cross_entropy
    return {"loss": total, "cross_entropy": cross_entropy, "divergence": divergence}
