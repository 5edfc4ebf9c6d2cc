"""A folder that takes results, for a look or for a gateway that picks them up."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pydicom.dataset import Dataset

from memmc.errors import StorageError
from memmc.results.dicomweb import encoded


class Folder:
    """A `memmc.results.archive.Taker` of files that their owner alone may read, named by SOP Instance UID."""

    def __init__(self, path: Path) -> None:
        self.place, self._path = str(path), path
        self._there = {file.stem for file in path.glob("*.dcm")}

    def present(self, study_uid: str, series_uid: str) -> set[str]:
        """Return what is there, of whatever series; see `Taker.present`."""
        return self._there

    def send(self, objects: Sequence[Dataset]) -> dict[str, str]:
        """Write each aside and rename it; see `Taker.send`."""
        try:
            self._path.mkdir(parents=True, exist_ok=True, mode=0o700)
            for each in objects:
                part = self._path / f"{each.SOPInstanceUID}.part"
                part.unlink(missing_ok=True)
                with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                    out.write(encoded(each))
                part.rename(self._path / f"{each.SOPInstanceUID}.dcm")
                self._there.add(str(each.SOPInstanceUID))
        except OSError as error:
            raise StorageError(f"objects cannot be written ({error.strerror}); check --out") from None
        return {}
