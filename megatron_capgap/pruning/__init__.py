"""A student out of a teacher: what its parts are worth, which of them stay, and the smaller checkpoint."""
