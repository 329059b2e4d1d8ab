"""Stages: one file per command, and their common start-up."""
