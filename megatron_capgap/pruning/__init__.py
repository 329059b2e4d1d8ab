"""Structured pruning of a teacher into a student: importance scores, pruning plan, and the student's checkpoint."""
