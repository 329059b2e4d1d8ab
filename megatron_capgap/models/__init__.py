"""Language models as Megatron-Core builds them, and what they weigh."""
