"""MemMC-MAE as a distributed pipeline: normal scans in, anomaly scores and maps out."""

__version__ = "0.1.0"
