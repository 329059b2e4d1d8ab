"""Shared by all folders: user errors and atomic file writes."""
