"""Streaming, bit-exact conversion between Hugging Face folders and Megatron's distributed checkpoints."""
