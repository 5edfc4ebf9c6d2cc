"""A step's progress as lines of JSON, so that a caller elsewhere can follow it in the step's log.

One object a line on stderr, told by its first key::

    {"memmc": "stage", "name": "score", "total": 120.0}
    {"memmc": "advance", "done": 40.0, "note": "13 images/s, 6 s left"}
    {"memmc": "message", "text": "10 objects listed, 9 new"}

Nothing else in a log is known to be free of patient data: libraries print what
they like, tracebacks too. A reader passes on these lines alone.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, TextIO

from memmc.pipeline.progress import Progress

VARIABLE = "MEMMC_PROGRESS"
LINES = "lines"
_EVERY_S = 5.0
_LONGEST_TEXT = 500


class ProgressLines:
    """Writes each stage and message, and how far a stage is at most every five seconds."""

    def __init__(self, out: TextIO | None = None, every_s: float = _EVERY_S) -> None:
        self._out, self._every_s = out or sys.stderr, every_s
        self._said = 0.0

    def stage(self, name: str, total: float | None = None) -> None:
        """Begin a stage."""
        self._said = 0.0
        self._write({"memmc": "stage", "name": name, "total": total})

    def advance(self, done: float, note: str = "") -> None:
        """Say how far the stage is, unless that was said a moment ago."""
        if time.monotonic() - self._said >= self._every_s:
            self._said = time.monotonic()
            self._write({"memmc": "advance", "done": done, "note": note})

    def message(self, text: str) -> None:
        """Pass a line on."""
        self._write({"memmc": "message", "text": text})

    def close(self) -> None:
        """Nothing is held open."""

    def _write(self, line: dict[str, Any]) -> None:
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()


def pass_on(line: str, progress: Progress) -> bool:
    """Tell `progress` what a line of a log says; return False for any line that is not of the form above."""
    match json_object(line):
        case {"memmc": "stage", "name": str(name), "total": (int() | float() | None) as total, **rest} if not rest:
            progress.stage(name[:_LONGEST_TEXT], total)
        case {"memmc": "advance", "done": (int() | float()) as done, "note": str(note), **rest} if not rest:
            progress.advance(done, note[:_LONGEST_TEXT])
        case {"memmc": "message", "text": str(text), **rest} if not rest:
            progress.message(text[:_LONGEST_TEXT])
        case _:
            return False
    return True


def json_object(line: str) -> dict[str, Any] | None:
    """Return the JSON object that a whole line is, or None."""
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
