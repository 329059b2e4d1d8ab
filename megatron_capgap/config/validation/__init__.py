"""What several keys, or keys and the world size, must agree on."""
