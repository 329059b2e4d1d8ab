"""Vocabulary-parallel losses over hidden states and LM heads. Plain torch: no Megatron here."""
