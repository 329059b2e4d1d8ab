"""The architectures that are converted: one file and one row each."""

from megatron_capgap.conversion.families import llama

FAMILIES = {module.FAMILY.name: module.FAMILY for module in (llama,)}
