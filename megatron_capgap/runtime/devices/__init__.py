"""The only place that knows the difference between a CPU and a GPU."""
