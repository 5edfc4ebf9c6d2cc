"""Anomaly scores and maps from masked reconstructions; Ray only in `bulk`."""
