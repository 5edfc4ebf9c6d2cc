"""Watching a model at work without labels: drift, canaries, silence. Arrays and counts in, findings out."""
