"""Which sequences are duplicates of others."""
