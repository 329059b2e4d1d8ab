"""Benchmark evaluation: scoring and generation requests in any layout, and the tasks of lm-evaluation-harness."""
