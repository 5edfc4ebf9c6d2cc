"""Search files: every view of every file, the names too, on all cores."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from memmc.cores import cores
from memmc.phi.containers import Unreadable, View, is_sqlite, sqlite_views, views
from memmc.phi.patterns import Match, Searcher
from memmc.phi.planes import Item

MOST_HITS = 10_000  # that are listed; more are counted


@dataclass(frozen=True, order=True)
class Hit:
    """One identifier in one place.

    Attributes:
        plane: where it lies.
        file: relative to the plane; a digest where the name itself holds an identifier.
        inside: which part of the file.
        encoding: in which form.
        identifier: keyed digest of the value.
        number: its place among the values searched for, 1-based.
    """

    plane: str
    file: str
    inside: str
    encoding: str
    identifier: str
    number: int


@dataclass
class Findings:
    """What a search found.

    Attributes:
        hits: distinct, up to `MOST_HITS`.
        num_hits: all of them.
        shifted_dates: values of the column of shifted dates that equal a date searched for.
        unread: files that could not be opened or unpacked.
        files: files by plane.
        sizes: bytes by plane, as they lie.
    """

    hits: list[Hit] = field(default_factory=list[Hit])
    num_hits: int = 0
    shifted_dates: int = 0
    unread: int = 0
    files: Counter[str] = field(default_factory=Counter[str])
    sizes: Counter[str] = field(default_factory=Counter[str])


class Scan:
    """Searches items for values.

    Args:
        values: identifiers.
        key: of the digests that stand for them.
    """

    def __init__(self, values: Iterable[str], key: bytes) -> None:
        self._values = list(values)
        self._key = key
        self._searcher = Searcher(self._values)
        self._known: set[Hit] = set()
        self.findings = Findings()

    def run(self, items: Iterable[Item], advance: Callable[[float], None] = lambda _done: None) -> None:
        """Search every item; `advance` gets the bytes done in all.

        Raises:
            StorageError: an S3 object cannot be read.
        """
        done = 0
        with ThreadPoolExecutor(cores(), thread_name_prefix="scan-phi") as pool:
            waiting: list[tuple[Item, Future[_OfFile]]] = []
            for item in items:
                waiting.append((item, pool.submit(self._item, item)))
                if len(waiting) >= 64:
                    done = self._collect(waiting.pop(0), done, advance)
            for entry in waiting:
                done = self._collect(entry, done, advance)
        self.findings.hits.sort()

    def text(self, plane: str, name: str, data: bytes) -> None:
        """Search bytes that are no file, such as a server's answer."""
        self.findings.files[plane] += 1
        self.findings.sizes[plane] += len(data)
        self._add(plane, name, "text", self._searcher.search([data]))

    def _collect(self, entry: tuple[Item, Future[_OfFile]], done: int, advance: Callable[[float], None]) -> int:
        item, future = entry
        found = future.result()
        self.findings.files[item.plane] += 1
        self.findings.sizes[item.plane] += found.size
        self.findings.unread += found.unread
        self.findings.shifted_dates += found.shifted_dates
        name = self._shown(item.name, found.in_name)
        self._add(item.plane, name, "name", found.in_name)
        for inside, matches in found.matches:
            self._add(item.plane, name, inside, matches)
        advance(done + found.size)
        return done + found.size

    def _add(self, plane: str, name: str, inside: str, matches: Iterable[Match]) -> None:
        for match in sorted(matches, key=lambda one: (one.identifier, one.encoding)):
            hit = Hit(plane, name, inside, match.encoding, self._digest(match), match.identifier + 1)
            if hit not in self._known:
                self._known.add(hit)
                self.findings.num_hits += 1
                if len(self.findings.hits) < MOST_HITS:
                    self.findings.hits.append(hit)

    def _digest(self, match: Match) -> str:
        value = self._values[match.identifier].encode("utf-8", "replace")
        return hmac.digest(self._key, value, "sha256").hex()[:16]

    def _shown(self, name: str, in_name: set[Match]) -> str:
        raw = os.fsencode(name)
        if in_name:
            return f"(name withheld {hashlib.sha256(self._key + raw).hexdigest()[:16]})"
        return raw.decode("utf-8", "backslashreplace")

    def _item(self, item: Item) -> _OfFile:
        """Search one item, in a thread of its own."""
        found = _OfFile(self._searcher.search([os.fsencode(item.name)]))
        try:
            if item.storage is not None:
                self._file(io.BytesIO(item.storage.read(item.name)), found)
            elif item.path is not None:
                self._local(item.path, found)
        except FileNotFoundError:  # gone since it was listed
            pass
        except (Unreadable, OSError):
            found.unread += 1
        return found

    def _local(self, path: Path, found: _OfFile) -> None:
        with path.open("rb") as file:
            self._file(file, found)
        if is_sqlite(path):
            self._views(sqlite_views(path), found)

    def _file(self, file: IO[bytes], found: _OfFile) -> None:
        found.size = file.seek(0, os.SEEK_END)
        self._views(views(file), found)

    def _views(self, several: Iterator[View], found: _OfFile) -> None:
        with contextlib.closing(several):  # type: ignore[type-var]
            for view in several:
                matches = self._searcher.search(view.chunks, view.least_bytes)
                moved = {match for match in matches if match.spelling in view.shifted_dates}
                found.shifted_dates += len(moved)
                if matches - moved:
                    found.matches.append((view.inside, matches - moved))


@dataclass
class _OfFile:
    in_name: set[Match]
    matches: list[tuple[str, set[Match]]] = field(default_factory=list[tuple[str, set[Match]]])
    shifted_dates: int = 0
    unread: int = 0
    size: int = 0
