"""The architectures that are converted: one file each, one row each in `conversion.registry`."""
