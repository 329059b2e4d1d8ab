"""Configuration: schema, strict loader, validation. Imports no torch."""
