"""What waits for a tracking store that does not answer: entries in a file, in order, until each is delivered.

A spool is a folder: ``entries.jsonl`` holds one JSON object a line, ``sent`` the number of bytes that are delivered,
``files/`` copies of artifacts. The process that writes it holds a lock on it; what a killed process left, another one
takes over. A line that was cut by the kill is dropped: its writer never knew it as written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ENTRIES, SENT, FILES = "entries.jsonl", "sent", "files"
VALUES_AT_ONCE = 900  # MLflow takes at most 1000 metrics in one call


class Spool:
    """One spool, open and locked; not for several threads at once.

    Attributes:
        folder: the spool's own.
        waiting: values and artifacts that are not delivered, by their entries' `count`.
    """

    def __init__(self, folder: Path) -> None:
        """Open a spool, new or left behind.

        Raises:
            BlockingIOError: another process holds it.
            OSError: the folder cannot be written.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / ENTRIES).open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (folder / ENTRIES).exists():  # its owner has delivered all and removed it just now
                raise BlockingIOError
        except OSError:
            self._file.close()
            raise
        self._drop_cut_line()
        self._sent = int((folder / SENT).read_text()) if (folder / SENT).exists() else 0
        self.waiting = 0
        self._file.seek(self._sent)
        for line in self._file:
            self.waiting += int(json.loads(line)["count"])

    @classmethod
    def begin(cls, parent: Path, name: str) -> Spool:
        """Make a new spool whose name begins with `name`."""
        return cls(parent / f"{name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one entry to the end.

        Args:
            entry: JSON values; `count` says how many values or artifacts it holds.

        Raises:
            OSError: the disk is full or cannot be written; nothing of the entry stays.
        """
        end = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), end)
            raise
        self.waiting += int(entry["count"])

    def next(self) -> tuple[dict[str, Any], int] | None:
        """Return the first entry that is not delivered, and where it ends; None when there is none.

        Entries with `values` of the same run that follow each other come as one, so that an outage is made up for in
        few calls.
        """
        self._file.seek(self._sent)
        line = self._file.readline()
        if not line:
            return None
        found, end = json.loads(line), self._sent + len(line)
        while "values" in found and (line := self._file.readline()):
            more = json.loads(line)
            if "values" not in more or more["run"] != found["run"] or found["count"] + more["count"] > VALUES_AT_ONCE:
                break
            found["values"] += more["values"]
            found["count"] += more["count"]
            end += len(line)
        return found, end

    def delivered(self, entry: Mapping[str, Any], end: int) -> None:
        """Go on to the entry after the one that ends there."""
        aside = self.folder / f"{SENT}.tmp"
        aside.write_text(str(end))
        aside.replace(self.folder / SENT)
        self._sent = end
        self.waiting -= int(entry["count"])
        if entry.get("file"):
            shutil.rmtree(self.folder / FILES / str(entry["file"]), ignore_errors=True)

    def keep(self, source: Path) -> str:
        """Copy a file, or the contents of a folder, so that it may go; return the name of the copy's folder.

        Raises:
            OSError: it cannot be read, or the copy not be written.
        """
        name = uuid.uuid4().hex
        target = self.folder / FILES / name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            target.mkdir(parents=True)
            shutil.copy2(source, target / source.name)
        return name

    def persist(self) -> None:
        """Make what waits survive a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the spool; remove it when all is delivered."""
        if not self.waiting:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._file.close()

    def _drop_cut_line(self) -> None:
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        whole = sum(len(line) for line in self._file if line.endswith(b"\n"))
        if whole < size:
            os.ftruncate(self._file.fileno(), whole)


def left_behind(parent: Path) -> list[Path]:
    """Return the folders of spools under `parent`, oldest first; some may be held by processes at work."""
    if not parent.is_dir():
        return []
    found = [path for path in parent.iterdir() if (path / ENTRIES).is_file()]
    return sorted(found, key=lambda path: (path / ENTRIES).stat().st_mtime)
