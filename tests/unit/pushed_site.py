"""A hospital's films ingested with a vault, scored by a small random model, and the studies its archive has of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from dicom_instances import dataset, encoded
from watched_lake import SIDE, calibrate, films, random_model, score

from memmc.config import Config, load_config
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake
from memmc.pipeline.ingest import ingest
from memmc.pipeline.models import open_model
from memmc.pipeline.vault import make_keys, read_private_key

FILMS, SICK = 32, 5
SETTINGS = ("lake.uri=lake", "deid.key_file=identity.key", "deid.text=class", f"data.image_size={SIDE}")
SETTINGS += ("deid.vault_uri=vault", "deid.vault_public_key_file=public.pem", "score.scorer=l1")
SETTINGS += (
    "push.side_px=128",
    "calibrate.false_positive_rate=0.1",
    "split.train=0.2",
    "split.calibrate=0.7",
    "split.test=0.1",
)


@dataclass
class PushedSite:
    """Attributes:
    folder: the working directory: lake, vault, keys, `in` with the films, `model`.
    studies: header of each study, as the archive has it, by Study Instance UID.
    images: study and series of each film, by SOP Instance UID.
    """

    folder: Path
    config: Config
    model: str
    key: X25519PrivateKey
    studies: dict[str, dict[str, str]]
    images: dict[str, tuple[str, str]]

    def arguments(self, *more: str) -> list[str]:
        """Return the arguments of `memmc push` on this site."""
        settings = [word for setting in SETTINGS for word in ("--set", setting)]
        return ["push", "--cohort", "cxr", "--model", self.model, "--private-key-file", "private.pem", *settings, *more]

    def with_(self, *overrides: str) -> Config:
        return load_config(overrides=[*SETTINGS, *overrides])


def header(patient: int, study: str) -> dict[str, str]:
    return {
        "PatientName": f"Müßig^Zoë {patient}",
        "PatientID": f"MRN7QUOXX{patient:03d}",
        "PatientBirthDate": "19611224",
        "PatientSex": "F",
        "StudyInstanceUID": study,
        "StudyDate": "20260105",
        "StudyTime": "093015",
        "StudyID": f"S{patient}",
        "AccessionNumber": f"ACC7QUOXX{patient:03d}",
        "ReferringPhysicianName": "Überweiser^Ägidius",
    }


def make(folder: Path) -> PushedSite:
    """Make the site in the working directory `folder`: patients with one film, every fifth with two in one study."""
    (folder / "in").mkdir()
    (folder / "identity.key").write_text("11" * 32)
    (folder / "identity.key").chmod(0o600)
    make_keys(folder / "private.pem", folder / "public.pem", None)
    studies: dict[str, dict[str, str]] = {}
    images: dict[str, tuple[str, str]] = {}
    patient = 0
    labels = ["path,label"]
    for number, image in enumerate(films(np.random.default_rng(0), FILMS)):
        sick = number >= FILMS - SICK
        if sick:
            image[8:28, 4:18] = 1.0
        labels.append(f"{number}.dcm,{'abnormal' if sick else 'normal'}")
        patient += 0 if number % 5 == 1 else 1
        study = f"1.2.840.99999.7.{patient}"
        studies[study] = header(patient, study)
        pixels = (np.kron(image, np.ones((3, 2))) * 4000).astype(np.int64)  # 96 x 64: not square
        made = dataset(
            pixels,
            SpecificCharacterSet="ISO_IR 100",
            **studies[study] | {"SOPInstanceUID": f"{study}.1.{number}", "SeriesInstanceUID": f"{study}.1"},
        )
        images[str(made.SOPInstanceUID)] = (study, f"{study}.1")
        made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
        (folder / "in" / f"{number}.dcm").write_bytes(encoded(made))
    (folder / "labels.csv").write_text("\n".join(labels))
    config = load_config(overrides=list(SETTINGS))
    account = ingest(config, str(folder / "in"), "cxr", labels_file=str(folder / "labels.csv"))
    assert account.stored == FILMS, json.dumps(account.as_dict())
    lake = Lake(config.lake.uri)
    model = random_model(folder / "model", lake.version(INSTANCES), config.preprocess_id)
    opened = open_model(config, folder / ".memmc", model)
    calibrate(config, lake, opened, region_rate=0.3)
    score(config, opened)
    return PushedSite(folder, config, model, read_private_key(folder / "private.pem", None), studies, images)
