"""One pass over bytes for thousands of values in every form they may have taken.

The bytes are searched in lower case, so that spellings and hexadecimal digits of
either case are found by one automaton; base64, whose case counts, is compared
once more with the bytes as they are.
"""

from __future__ import annotations

import base64
import html
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from urllib.parse import quote, quote_plus

from ahocorasick_rs import BytesAhoCorasick, Implementation

CHUNK_BYTES: Final = 4 << 20
LEAST_BINARY_BYTES: Final = 6
"""Shorter patterns are not searched in large binary data, where any four bytes occur by chance."""

_LEAST_BASE64 = 6  # characters that do not depend on what stands before and after
_CONTEXT = 64  # bytes after a match that decide whether it is whole
_DFA_BYTES = 256 << 10  # of patterns, up to which the faster and larger automaton is built
_NUMERIC = re.compile(r"[0-9][0-9./:-]*[0-9]")
_HEX = b"0123456789abcdef"
_LEAST_HEX_RUN = 8  # with hexadecimal letters on both sides of a number
_LEAST_HEX_NAME = 16  # with letters on one side: of a digest or of its beginning
_UUID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_UUID_BYTES = 36


@dataclass(frozen=True)
class Match:
    """One identifier in one form.

    Attributes:
        identifier: index of the value.
        encoding: name of the form.
        spelling: the spelling that was found, in the value's own letters. Patient data: never log it.
    """

    identifier: int
    encoding: str
    spelling: str

    def __repr__(self) -> str:
        return f"Match({self.identifier}, {self.encoding})"


@dataclass(frozen=True)
class _Form:
    match: Match
    exact: bytes | None  # the bytes in their own case, where it counts
    whole: bool  # a number: not a part of a longer one


class Searcher:
    """Finds any of many values in bytes.

    Args:
        values: distinct identifiers.
    """

    def __init__(self, values: Iterable[str]) -> None:
        forms: dict[bytes, list[_Form]] = defaultdict(list)
        for number, value in enumerate(values):
            for pattern, form in _forms(number, value):
                if all(known.match != form.match or known.exact != form.exact for known in forms[pattern]):
                    forms[pattern].append(form)
        self._patterns = list(forms)
        self._forms = list(forms.values())
        self.longest = max(map(len, self._patterns), default=0)
        size = sum(map(len, self._patterns))
        implementation = Implementation.DFA if size <= _DFA_BYTES else Implementation.ContiguousNFA
        self._automaton = BytesAhoCorasick(self._patterns, implementation=implementation)

    def search(self, chunks: Iterable[bytes], least_bytes: int = 0) -> set[Match]:
        """Return what stands in the chunks, or across their borders.

        Args:
            chunks: consecutive parts of one run of bytes.
            least_bytes: shorter patterns do not count.
        """
        found: set[Match] = set()
        kept = self.longest + 2 * _CONTEXT
        before = b""
        for chunk in chunks:
            data = before + chunk
            found.update(self._matches(data, len(before) - _CONTEXT, len(data) - _CONTEXT, least_bytes))
            before = data[-kept:]
        found.update(self._matches(before, len(before) - _CONTEXT, len(before), least_bytes))
        return found

    def _matches(self, data: bytes, begin: int, end: int, least_bytes: int) -> Iterator[Match]:
        """Yield the matches that end after `begin` and by `end`.

        Earlier ones were judged before, with what stands to their left; later ones wait for what follows.
        """
        lowered = data.lower()
        for index, start, stop in self._automaton.find_matches_as_indexes(lowered, overlapping=True):
            if not begin < stop <= end or stop - start < least_bytes:
                continue
            for form in self._forms[index]:
                if form.exact is not None and data[start:stop] != form.exact:
                    continue
                if form.whole and not _is_whole(lowered, start, stop):
                    continue
                yield form.match


def _is_whole(data: bytes, start: int, stop: int) -> bool:
    """Say whether a number stands for itself: not inside a longer one, a fraction, or a hexadecimal name."""
    if data[start - 1 : start].isdigit() or data[stop : stop + 1].isdigit():
        return False
    if start >= 2 and data[start - 1 : start] == b"." and data[start - 2 : start - 1].isdigit():
        return b"." in data[start:stop]  # a UID's tail is one, a fraction's digits are not
    low, high = start, stop
    while low > 0 and stop - low < _CONTEXT and data[low - 1] in _HEX:
        low -= 1
    while high < len(data) and high - start < _CONTEXT and data[high] in _HEX:
        high += 1
    if low < start and high > stop:
        return high - low < _LEAST_HEX_RUN
    if (low, high) == (start, stop):
        return True
    # On one side alone the letters may as well be the end of a word, as in "file" or "ACC".
    return high - low < _LEAST_HEX_NAME and not _in_uuid(data, start, stop)


def _in_uuid(data: bytes, start: int, stop: int) -> bool:
    around = data[max(0, start - _UUID_BYTES) : stop + _UUID_BYTES]
    first, last = start - max(0, start - _UUID_BYTES), stop - max(0, start - _UUID_BYTES)
    return any(found.start() <= first and last <= found.end() for found in _UUID.finditer(around))


def spellings(value: str) -> list[str]:
    """Return a value and other ways to write it: the orders of a name's components, the forms of a date."""
    found = {value: None}
    if "^" in value:
        for group in value.split("="):
            parts = [part.strip() for part in group.split("^") if part.strip()]
            found[group.rstrip("^ ")] = None
            if len(parts) >= 2:
                family, given = parts[:2]
                pairs = [(family, given), (given, family)]
                found |= dict.fromkeys(f"{a}{mark}{b}" for a, b in pairs for mark in ("^", " ", ", ", ",", "_"))
                found[" ".join(parts)] = None
    if re.fullmatch(r"[0-9]{8}", value):
        try:
            day = datetime.strptime(value, "%Y%m%d")
        except ValueError:
            return list(found)
        found |= dict.fromkeys(
            day.strftime(form) for form in ("%Y-%m-%d", "%Y/%m/%d", "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y")
        )
    return [text for text in found if len(text) >= 4]


def _forms(number: int, value: str) -> Iterator[tuple[bytes, _Form]]:
    for spelling in spellings(value):
        numeric = _NUMERIC.fullmatch(spelling) is not None
        for name, pattern, exact in _encoded(spelling):
            whole = numeric and name == "text"
            yield (pattern.lower(), _Form(Match(number, name, spelling), pattern if exact else None, whole))


def _encoded(text: str) -> Iterator[tuple[str, bytes, bool]]:
    """Yield the forms of a text: name, bytes, whether their case counts."""
    composed = {unicodedata.normalize(form, text) for form in ("NFC", "NFD")} | {text}
    cased = sorted(variant for one in composed for variant in {one, one.lower(), one.upper(), one.casefold()})
    for variant in cased:
        raw = variant.encode("utf-8", "replace")
        yield "text", raw, False
        yield "utf-16le", variant.encode("utf-16-le", "replace"), False
        yield "utf-16be", variant.encode("utf-16-be", "replace"), False
        if not variant.isascii():
            for charset in ("latin-1", "iso8859-9", "iso8859-2", "shift_jis", "gb18030"):
                encoded = variant.encode(charset, "ignore")
                if encoded.decode(charset) == variant:
                    yield charset, encoded, False
        yield "hex", raw.hex().encode(), False
        escapes = {
            "url": {quote(variant, safe=""), quote(variant), quote_plus(variant), quote(variant, safe="^/:, ")},
            "json": {json.dumps(variant)[1:-1], json.dumps(variant, ensure_ascii=False)[1:-1], repr(variant)[1:-1]},
            "html": {html.escape(variant)},
        }
        for name, written in escapes.items():
            yield from ((name, one.encode("utf-8", "replace"), False) for one in sorted(written - {variant}))
        yield from (("base64", one, True) for one in _base64(raw))


def _base64(raw: bytes) -> Iterator[bytes]:
    """Yield, for each of the three ways the bytes may lie in groups of three, the characters they alone decide."""
    for before in range(3):
        first, last = (0, 2, 3)[before], (before + len(raw)) * 8 // 6
        if last - first < _LEAST_BASE64:
            continue
        for encode in (base64.standard_b64encode, base64.urlsafe_b64encode):
            yield encode(b"\0" * before + raw)[first:last]
