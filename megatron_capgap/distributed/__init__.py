"""Ranks: how they start, find each other, form groups, and notice that one is gone."""
