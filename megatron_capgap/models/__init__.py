"""Megatron-Core language models: construction, initialisation, pipeline schedules, sizes and memory estimates."""
