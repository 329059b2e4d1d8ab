"""Imported first by the workers' parent: the CPU device comes before Megatron-Core, as in a run."""

from megatron_capgap.devices import choose

choose("cpu", 0)
