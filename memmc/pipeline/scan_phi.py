"""Search for identifiers in everything the pipeline wrote, after proving that the search finds what is there."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memmc.config import Config
from memmc.dicom.deidentify import derive_key
from memmc.errors import DataError, UsageError
from memmc.phi.identifiers import Identifiers, from_dicom, from_file, joined
from memmc.phi.planes import Item, api_pages, place_items, state_items
from memmc.phi.scan import Scan
from memmc.phi.selftest import LEAKS, self_test
from memmc.pipeline.audit import recorded
from memmc.pipeline.identity import held_key, home_directory
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.results import Result


@dataclass(frozen=True)
class ScanResult(Result):
    """What a search found; clean when it works, found nothing and could read everything.

    Attributes:
        identifiers: values that were searched for.
        skipped_short: values left out, as they would be found by chance: under 4 characters, numbers under 5 digits.
        skipped_generic: values left out, as they are words of the closed vocabularies that ingest writes.
        unread_headers: objects of `--dicom` that could not be read.
        planes: files and bytes by plane.
        num_hits: identifiers found, once per file, part and form.
        hits: where, in which form, and which (keyed digest, place in the list); never the value.
        shifted_dates: dates in the column of shifted dates that equal one searched for, which chance brings about.
        unread: files that could not be opened or unpacked.
        planted: leaks of the self-test.
        found: those of them that were found.
        missed: kinds of those that were not.
        seconds: wall time.
    """

    identifiers: int
    skipped_short: int
    skipped_generic: int
    unread_headers: int
    planes: dict[str, dict[str, int]]
    num_hits: int
    hits: list[dict[str, Any]]
    shifted_dates: int
    unread: int
    planted: int
    found: int
    missed: list[str]
    seconds: float

    @property
    def clean(self) -> bool:
        """True when nothing was found by a search that works and read everything."""
        return not (self.num_hits or self.unread or self.missed)


def identifiers_of(files: Sequence[Path], folders: Sequence[Path]) -> Identifiers:
    """Return the values of lists and of the headers of original objects.

    Raises:
        UsageError: neither is given, or one cannot be read.
    """
    if not files and not folders:
        raise UsageError("nothing to search for; give --identifiers FILE or --dicom FOLDER (or --self-test alone)")
    return joined([*(from_file(file) for file in files), *(from_dicom(folder) for folder in folders)])


@recorded(
    "scan-phi",
    lambda done: (
        {"identifiers": done.identifiers, "hits": done.num_hits, "unread": done.unread, "clean": done.clean}
        if "lake" in done.planes
        else None
    ),
)
def scan_phi(
    config: Config,
    identifiers: Identifiers,
    *,
    paths: Sequence[str] = (),
    prefect_api: str | None = None,
    everything: bool = True,
    progress: Progress | None = None,
) -> ScanResult:
    """Search the lake, the embedded state and any further places.

    Args:
        identifiers: what to search for.
        paths: further folders, files or s3:// prefixes.
        prefect_api: URL of a running Prefect API to read as well.
        everything: False for the self-test alone.

    Raises:
        StorageError: a place cannot be listed or a server not reached.
        DataError: the self-test failed, so that nothing can be said.
    """
    began = time.monotonic()
    progress = progress or Silent()
    progress.stage("self-test")
    found = self_test(identifiers.values)
    missed = [leak for leak in LEAKS if leak not in found]
    if missed:
        raise DataError(
            f"the self-test found {len(found)} of {len(LEAKS)} planted leaks (missed: {', '.join(missed)}), so a scan "
            "would prove nothing; report this with 'memmc doctor --json'"
        )
    home = home_directory()
    key = held_key(config, home)
    scan = Scan(identifiers.values, derive_key(key, "scan") if key else secrets.token_bytes(32))
    if everything:
        progress.stage("list")
        items = list(_items(config, home, paths))
        progress.stage("scan", float(sum(item.size for item in items)) or None)
        scan.run(items, progress.advance)
        if prefect_api:
            progress.stage("prefect api")
            for collection, page in api_pages(prefect_api):
                scan.text("prefect-api", collection, page)
    findings = scan.findings
    return ScanResult(
        identifiers=len(identifiers.values),
        skipped_short=identifiers.short,
        skipped_generic=identifiers.generic,
        unread_headers=identifiers.unread,
        planes={name: {"files": count, "bytes": findings.sizes[name]} for name, count in findings.files.items()},
        num_hits=findings.num_hits,
        hits=[asdict(hit) for hit in findings.hits],
        shifted_dates=findings.shifted_dates,
        unread=findings.unread,
        planted=len(LEAKS),
        found=len(found),
        missed=missed,
        seconds=round(time.monotonic() - began, 2),
    )


def _items(config: Config, home: Path, paths: Sequence[str]) -> Iterator[Item]:
    yield from place_items("lake", config.lake.uri)
    yield from state_items(home)
    for number, path in enumerate(paths, 1):
        if "://" not in path and not Path(path).exists():
            raise UsageError(f"--path number {number} is not there; a scan of nothing proves nothing")
        yield from place_items(f"path {number}", path)
