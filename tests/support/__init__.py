"""What tests share: the worker pool and dense references."""
