"""What a run is made of: the schema, the strict loader, the checks. No torch here."""
