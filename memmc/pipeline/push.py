"""Push: scores go back to the archive that the images came from, as DICOM objects in the images' own studies.

Identity is restored here and nowhere else: the vault opens the original UIDs, and the archive itself says whose study
that is today. What is sent follows from the score alone, so a call that was cut short is made again and sends the rest.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset

from memmc.config import Config
from memmc.errors import StorageError
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake
from memmc.pipeline.audit import recorded
from memmc.pipeline.identity import home_directory
from memmc.pipeline.maps import Picture, drawn, wanted
from memmc.pipeline.models import open_model
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.results import PushResult
from memmc.pipeline.select import newest_calibration, score_rows
from memmc.pipeline.vault import Resolved, resolve
from memmc.results.archive import OBJECT_REFUSED, Archive
from memmc.results.dicomweb import encoded
from memmc.results.objects import Judged, Kind, picture, report
from memmc.results.open import open_archive

NOT_IN_VAULT = "NOT_IN_VAULT"
VAULT_AMBIGUOUS = "VAULT_AMBIGUOUS"
STUDY_ABSENT = "STUDY_ABSENT"
PATIENT_DIFFERS = "PATIENT_DIFFERS"
REASONS: Mapping[str, str] = {
    NOT_IN_VAULT: "the vault knows no original; it was ingested without deid.vault_uri, or erased",
    VAULT_AMBIGUOUS: "the vault knows several objects of that pseudonym",
    STUDY_ABSENT: "the archive has no such study",
    PATIENT_DIFFERS: "the archive names another patient than the image did: merged or corrected since; see to it",
    OBJECT_REFUSED: "the archive would not store it; its log says why",
}
"""What a reason code means."""

_OF_VAULT = {"PatientID": "patient_id", "IssuerOfPatientID": "issuer_of_patient_id"}
_AT_ONCE = 32  # images


class FolderArchive:
    """A folder of DICOM files, for a look or for a gateway that takes them; a `memmc.results.archive.Archive`.

    It knows no patient: headers are what the vault holds. Where an archive is named, that one is asked.
    """

    def __init__(self, folder: Path, asked: Archive | None) -> None:
        self.place, self._folder, self._asked = str(folder), folder, asked

    def check(self) -> str:
        """See `Archive.check`."""
        return "a folder"

    def study(self, study_uid: str) -> Dataset | None:
        """See `Archive.study`."""
        return self._asked.study(study_uid) if self._asked else Dataset()

    def present(self, study_uid: str, series_uid: str) -> set[str]:
        """See `Archive.present`."""
        return {file.stem for file in self._folder.glob("*.dcm")}

    def send(self, objects: Sequence[Dataset]) -> dict[str, str]:
        """Write files that their owner alone may read; see `Archive.send`."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for each in objects:
                part = self._folder / f"{each.SOPInstanceUID}.part"
                part.unlink(missing_ok=True)
                with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                    out.write(encoded(each))
                part.rename(part.with_suffix(".dcm"))
        except OSError as error:
            raise StorageError(f"objects cannot be written ({error.strerror}); check --out") from None
        return {}

    def close(self) -> None:
        """See `Archive.close`."""
        if self._asked:
            self._asked.close()


@recorded(
    "push",
    lambda done: {
        "model": done.model,
        "images": done.images,
        "pushed": done.pushed,
        "present": done.present,
        "failed": done.failed,
        "objects": done.objects,
    },
)
def push(
    config: Config,
    cohort: str,
    private_key: X25519PrivateKey,
    model: str | None = None,
    *,
    uids: Sequence[str] | None = None,
    only_abnormal: bool = False,
    out: Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PushResult:
    """Send a report and a picture of each scored image to the archive of `push.uri`.

    Args:
        private_key: opens the vault; that leaves a record in the vault's audit trail, also with `dry_run`.
        uids: pseudonymous SOP Instance UIDs; all scored instances when absent.
        only_abnormal: those alone whose verdict is abnormal.
        out: folder that takes the objects in place of the archive.
        dry_run: find out what would be sent, and send nothing.

    Raises:
        DataError: a UID has no score of the model's newest calibration in this cohort.
        UsageError: no vault or no archive is configured.
        StorageError: vault or archive do not answer, or refuse. What was sent before stays, and is not sent again.
    """
    progress = progress or Silent()
    archive = _archive(config, out)
    lake = Lake(config.lake.uri)
    opened = open_model(config, home_directory(), model, cohort)
    calibration = newest_calibration(lake, opened)
    scored = score_rows(lake, cohort, opened, calibration["calibration_id"], ("regions",))
    chosen = [uid for uid in wanted(scored, uids, opened, cohort) if not only_abnormal or scored[uid]["is_abnormal"]]
    failures: dict[str, str] = {}
    pushed = objects = done = 0
    with closing(archive), disable_value_validation():  # values are the archive's own, and its warnings would show them
        archive.check()
        known = resolve(config, chosen, private_key) if chosen else Resolved({}, [], "")
        zone = ZoneInfo(config.operate.timezone)
        judged = _judged(lake, cohort, scored, known.originals, calibration, opened.digest, zone)
        progress.stage("push", len(chosen))
        plans = _plans(archive, chosen, judged, known, config.push.objects)
        while some := list(itertools.islice(plans, _AT_ONCE)):
            shown = [] if dry_run else [plan.uid for plan in some if "sc" in plan.kinds]
            pictures = drawn(lake, cohort, shown, scored, calibration, config.push.side_px) if shown else {}
            for plan in some:
                sent, reason = len(plan.kinds), plan.reason
                if plan.kinds and not dry_run:
                    made = _objects(plan, judged[plan.uid], pictures)
                    refused = archive.send(made)
                    sent, reason = len(made) - len(refused), next(iter(refused.values()), None)
                objects += sent
                if reason:
                    failures[plan.uid] = reason
                pushed += bool(plan.kinds) and not reason
            done += len(some)
            progress.advance(done)
    return PushResult(
        archive=archive.place,
        cohort=cohort,
        model=opened.ref,
        images=len(chosen),
        pushed=pushed,
        present=len(chosen) - pushed - len(failures),
        failed=len(failures),
        objects=objects,
        reasons=dict(Counter(failures.values())),
        failures=failures,
    )


@dataclass(frozen=True)
class _Plan:
    """What an image still lacks in the archive, or why it gets nothing."""

    uid: str
    kinds: tuple[Kind, ...] = ()
    header: Dataset = field(default_factory=Dataset, repr=False)
    reason: str | None = None


def _archive(config: Config, out: Path | None) -> Archive:
    if out is None:
        return open_archive(config.push, os.environ)
    return FolderArchive(out, open_archive(config.push, os.environ) if config.push.uri else None)


def _judged(
    lake: Lake,
    cohort: str,
    scored: Mapping[str, Mapping[str, Any]],
    originals: Mapping[str, Mapping[str, str]],
    calibration: Mapping[str, Any],
    digest: str,
    zone: ZoneInfo,
) -> dict[str, Judged]:
    """Return what was said of each image whose originals are known, in the archive's terms."""
    if not originals:
        return {}
    columns = ["sop_instance_uid", "sop_class_uid", "rows", "columns", "frame_number", "lossy"]
    where: dict[str, Any] = {"cohort": cohort, "outcome": "stored", "sop_instance_uid": tuple(originals)}
    judged: dict[str, Judged] = {}
    for image in lake.read(INSTANCES, columns, filter=where).to_pylist():
        score, original = scored[image["sop_instance_uid"]], originals[image["sop_instance_uid"]]
        judged[image["sop_instance_uid"]] = Judged(
            sop_instance_uid=original["sop_instance_uid"],
            sop_class_uid=image["sop_class_uid"],
            series_uid=original["series_uid"],
            study_uid=original["study_uid"],
            frame=image["frame_number"],
            rows=image["rows"],
            columns=image["columns"],
            lossy=bool(image["lossy"]),
            anomaly_score=score["anomaly_score"],
            p_value=score["p_value"],
            is_abnormal=score["is_abnormal"],
            rate=calibration["false_positive_rate"],
            regions=score["regions"] or [],
            model=score["model"],
            model_digest=digest,
            calibration_id=score["calibration_id"],
            preprocess_id=score["preprocess_id"],
            dataset_version=score["dataset_version"],
            scored_at=score["scored_at"].astimezone(zone),
        )
    return judged


def _plans(
    archive: Archive, chosen: Sequence[str], judged: Mapping[str, Judged], known: Resolved, kinds: Sequence[Kind]
) -> Iterator[_Plan]:
    """Yield the plan of each image, study by study; the archive is asked about a study when its turn comes."""
    studies: dict[str, list[str]] = defaultdict(list)
    for uid in chosen:
        if uid in judged:
            studies[judged[uid].study_uid].append(uid)
        else:
            yield _Plan(uid, reason=VAULT_AMBIGUOUS if uid in known.ambiguous else NOT_IN_VAULT)
    for study, of_study in studies.items():
        header, reason = _header(archive.study(study), known.originals[of_study[0]])
        if reason:
            yield from (_Plan(uid, reason=reason) for uid in of_study)
            continue
        series = {judged[uid].series(kind) for uid in of_study for kind in kinds}
        present = set[str]().union(*(archive.present(study, each) for each in sorted(series)))
        for uid in of_study:
            lacking: tuple[Kind, ...] = tuple(kind for kind in kinds if judged[uid].uid(kind) not in present)
            yield _Plan(uid, lacking, header)


def _header(found: Dataset | None, original: Mapping[str, str]) -> tuple[Dataset, str | None]:
    """Return patient and study as the archive has them, or why nothing may be sent to that study."""
    own = Dataset()
    for keyword, name in (*_OF_VAULT.items(), ("AccessionNumber", "accession_number")):
        setattr(own, keyword, original.get(name, ""))
    if found is None:
        return own, STUDY_ABSENT
    if "PatientID" not in found:  # a folder knows nobody
        return own, None
    same = found.PatientID == own.PatientID
    if found.IssuerOfPatientID and own.IssuerOfPatientID:
        same = same and found.IssuerOfPatientID == own.IssuerOfPatientID
    return found, None if same else PATIENT_DIFFERS


def _objects(plan: _Plan, judged: Judged, pictures: Mapping[str, Picture]) -> list[Dataset]:
    """Return the objects that an image lacks."""
    made = {
        "sr": lambda: report(judged, plan.header),
        "sc": lambda: picture(judged, plan.header, pictures[plan.uid]),
    }
    return [made[kind]() for kind in plan.kinds]
