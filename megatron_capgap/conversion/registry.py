"""Registry of the families by `model_type`."""

from megatron_capgap.conversion.families import gpt2, gpt_neox, llama, mistral, qwen2, qwen3

FAMILIES = {module.FAMILY.name: module.FAMILY for module in (llama, mistral, qwen2, qwen3, gpt2, gpt_neox)}
