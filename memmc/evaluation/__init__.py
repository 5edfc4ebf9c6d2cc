"""Metrics with intervals, no-model controls, and the HTML report."""
