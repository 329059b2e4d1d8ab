"""Supported architectures: one module each, registered in `conversion.registry`."""
