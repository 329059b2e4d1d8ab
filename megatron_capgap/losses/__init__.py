"""Vocabulary-parallel distillation and language-model losses over hidden states and LM heads, in plain torch.

Entry points: `distillation_loss` and `language_model_loss`. Both apply the LM heads themselves, one chunk of tokens at
a time, so the full logits are never materialised. Divergences are the rows of a table in `divergences.py`.
"""

from megatron_capgap.losses.fused import Loss, distillation_loss, language_model_loss
from megatron_capgap.losses.objective import DistillationObjective
from megatron_capgap.losses.teacher_outputs import TeacherHidden, TeacherLogits, TeacherTopK
from megatron_capgap.losses.token_scores import token_scores

__all__ = [
    "DistillationObjective",
    "Loss",
    "TeacherHidden",
    "TeacherLogits",
    "TeacherTopK",
    "distillation_loss",
    "language_model_loss",
    "token_scores",
]
