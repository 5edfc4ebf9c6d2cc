"""Prefect flows: order, retries, artifacts. No numerics."""
