"""Ranks: launch environment, rendezvous, process groups, collectives, failure detection."""
