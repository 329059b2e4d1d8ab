"""Tests: `unit` in one process, `distributed` on gloo workers, `end_to_end` through the commands."""
