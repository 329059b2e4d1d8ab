"""The door in and out: Hugging Face folders to Megatron's distributed checkpoints and back, bit by bit, by pieces."""
