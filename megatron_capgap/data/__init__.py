"""Tokenizers, indexed datasets, sample order and micro-batches."""
