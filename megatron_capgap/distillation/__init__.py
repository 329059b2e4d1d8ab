"""The teacher's forward pass, and the transfer of its hidden states to the student's ranks."""
