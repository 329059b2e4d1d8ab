"""The law of capacity gap: records of runs in, the best teacher for a student out. Knows nothing of the other rooms."""
