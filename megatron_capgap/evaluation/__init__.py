"""Benchmarks: requests scored by a model in any layout, and the tasks of lm-evaluation-harness on top."""
