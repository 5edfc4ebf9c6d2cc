"""How a step is tried again: one set of a task's options for all flows."""

from __future__ import annotations

from typing import Any

from prefect.cache_policies import NO_CACHE

from flows.calls import RETRY_DELAYS_S, is_transient

ON_STORAGE: dict[str, Any] = {
    "retries": len(RETRY_DELAYS_S),
    "retry_delay_seconds": RETRY_DELAYS_S,
    "retry_condition_fn": is_transient,
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "result_serializer": "json",
}
"""Another try when a place could not be reached; nothing is cached or kept."""

DEAR: dict[str, Any] = {**ON_STORAGE, "retries": 1, "retry_delay_seconds": RETRY_DELAYS_S[:1]}
"""One more try at most: a worker that dies is Ray's to restart, and a second training is dear."""
