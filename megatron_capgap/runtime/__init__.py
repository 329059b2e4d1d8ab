"""Runtime services: logging, metrics, run lock, library set-up."""
