"""Optimizer, one step, the loop around it."""
