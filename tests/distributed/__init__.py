"""Several gloo processes, from the shared pool."""
