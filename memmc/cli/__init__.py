"""The `memmc` command."""
