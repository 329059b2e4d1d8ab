"""Shapes of the models whose training steps are measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_capgap.config.schema import ModelShape

# Llama 3.1 8B, Llama 3.2 3B and 1B.
B8 = ModelShape(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256, rope_theta=500000.0)
B3 = replace(B8, layers=28, hidden=3072, heads=24, ffn=8192, tied_embeddings=True)
B1 = replace(B8, layers=16, hidden=2048, ffn=8192, tied_embeddings=True)
# One tensor-parallel rank's share of Llama 3.1 70B under tensor parallelism 8.
B70_TP8 = replace(B8, layers=80, hidden=8192, heads=8, kv_heads=1, head_dim=128, ffn=3584)
TINY = ModelShape(layers=3, hidden=32, heads=4, kv_heads=2, ffn=48, vocab=96)


@dataclass(frozen=True)
class Case:
    """A student and its teacher, with all their layers; measured at two depths, extrapolated to all layers."""

    name: str
    teacher: ModelShape
    student: ModelShape
    depths: tuple[int, int]
    """Layers of both models in the two measurements."""
    length: int = 4096
    """Tokens of a sequence."""
    micro_batch: int = 2
    """Sequences of a forward pass."""
    micro_batches: int = 4
    """Forward passes of an optimizer step."""

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.length * self.micro_batch * self.micro_batches


CASES = (Case("8B to 3B", B8, B3, (2, 4)), Case("3B to 1B", B3, B1, (3, 6)))
TINY_CASES = (
    Case("tiny", TINY, replace(TINY, hidden=16, ffn=32, tied_embeddings=True), (1, 2), length=32, micro_batches=2),
)
