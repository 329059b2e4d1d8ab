"""Arithmetic about runs that have not started: GPUs, step times, levers on memory, layouts. No torch."""
