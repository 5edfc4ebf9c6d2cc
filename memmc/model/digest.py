"""The name of a model's content; needs no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from memmc.errors import ModelError

WEIGHTS_FILE = "model.safetensors"
INFO_FILE = "model.json"


def model_digest(folder: str | Path) -> str:
    """Return 16 hex digits of SHA-256 over both files of a model folder, weights first.

    Raises:
        ModelError: a file is missing or cannot be read.
    """
    digest = hashlib.sha256()
    for name in (WEIGHTS_FILE, INFO_FILE):
        try:
            with Path(folder, name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ModelError(
                f"a model folder without a readable {name} ({error.strerror}); expected {WEIGHTS_FILE} and {INFO_FILE}"
            ) from None
    return digest.hexdigest()[:16]
