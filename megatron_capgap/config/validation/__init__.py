"""Constraints between keys, and between keys and the world size."""
