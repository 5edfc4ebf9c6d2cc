"""How a step tells its caller how far it is: bars on a terminal, artifacts in Prefect, nothing in a library call."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the course of a step. Texts hold counts and ids only, never patient data."""

    def stage(self, name: str, total: float | None = None) -> None:
        """Begin a stage of `total` units; None when the total is not known."""
        ...

    def advance(self, done: float, note: str = "") -> None:
        """`done` units of the current stage are finished in all; `note` is a short remark beside the bar."""
        ...

    def message(self, text: str) -> None:
        """One line that stays on screen or in the log."""
        ...


class Silent:
    """Tells nobody."""

    def stage(self, name: str, total: float | None = None) -> None:
        """Ignore."""

    def advance(self, done: float, note: str = "") -> None:
        """Ignore."""

    def message(self, text: str) -> None:
        """Ignore."""
