"""How many cores this process may use."""

from __future__ import annotations


def cores() -> int:
    """Return the cores that affinity and the container's CPU limit leave to this process, at least 1.

    `os.cpu_count` counts those of the host: a pod that may use four of 64 would start 64 threads.
    """
    from joblib import cpu_count

    return cpu_count()
