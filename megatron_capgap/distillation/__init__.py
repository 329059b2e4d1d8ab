"""The teacher: a forward-only input to the student's training."""
