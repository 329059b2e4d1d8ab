"""The law of capacity gap: recommends the best teacher for a student from records of runs.

Imports no other package of megatron_capgap.
"""
