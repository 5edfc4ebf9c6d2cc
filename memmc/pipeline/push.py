"""Push: scores go back to the archive that the images came from, as DICOM objects in the images' own studies.

Identity is restored here and nowhere else: the vault opens the original UIDs, and the archive itself says whose study
that is today. What is sent follows from the score alone, so a call that was cut short is made again and sends the rest.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset

from memmc.config import Config
from memmc.dicom.read import silenced
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
from memmc.results.archive import OBJECT_REFUSED, Archive, NoAnswerError, Taker, text_of
from memmc.results.dicomweb import encoded
from memmc.results.folder import Folder
from memmc.results.objects import Judged, Kind, picture, report
from memmc.results.open import open_archive

logger = logging.getLogger(__name__)

NOT_IN_VAULT = "NOT_IN_VAULT"
VAULT_AMBIGUOUS = "VAULT_AMBIGUOUS"
STUDY_ABSENT = "STUDY_ABSENT"
PATIENT_DIFFERS = "PATIENT_DIFFERS"
IMAGE_ABSENT = "IMAGE_ABSENT"
OBJECT_NOT_MADE = "OBJECT_NOT_MADE"
OBJECT_UNANSWERED = "OBJECT_UNANSWERED"
REASONS: Mapping[str, str] = {
    NOT_IN_VAULT: "the vault knows no original; it was ingested without deid.vault_uri, or erased",
    VAULT_AMBIGUOUS: "the vault knows several objects of that pseudonym, and the lake does not tell which is stored",
    STUDY_ABSENT: "the archive has no such study",
    PATIENT_DIFFERS: "the archive names another patient than the image did: merged or corrected since; see to it",
    IMAGE_ABSENT: "the study is there, the image is not in it any more: moved or deleted; see to it",
    OBJECT_NOT_MADE: "no object could be made of it; retired kinds of images have none",
    OBJECT_REFUSED: "the archive would not store it; its log says why",
    OBJECT_UNANSWERED: "the archive answers, but not to this one, several times; its log says why",
}
"""What a reason code means."""

_PATIENT = ("PatientID", "IssuerOfPatientID")
_OF_VAULT = {
    "PatientID": "patient_id",
    "IssuerOfPatientID": "issuer_of_patient_id",
    "AccessionNumber": "accession_number",
}
_UIDS = {"sop_instance_uid", "series_uid", "study_uid"}
_AT_ONCE = 32  # images
_SILENT_IN_A_ROW = 3  # images that an archive did not answer to, before it is taken for full


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
        out: folder that takes the objects in place of the archive, which is asked for names if it is configured.
        dry_run: find out what would be sent, and send nothing.

    Raises:
        DataError: a UID has no score of the model's newest calibration in this cohort.
        UsageError: no vault or no archive is configured.
        StorageError: vault or archive do not answer, or refuse. What was sent before stays, and is not sent again.
    """
    progress = progress or Silent()
    archive, taker = _places(config, out)
    lake = Lake(config.lake.uri)
    opened = open_model(config, home_directory(), model, cohort)
    calibration = newest_calibration(lake, opened)
    scored = score_rows(lake, cohort, opened, calibration["calibration_id"], ("regions",))
    chosen = [uid for uid in wanted(scored, uids, opened, cohort) if not only_abnormal or scored[uid]["is_abnormal"]]
    with ExitStack() as stack:
        stack.enter_context(silenced())
        stack.enter_context(disable_value_validation())  # values are the archive's own
        if archive is not None:
            stack.callback(archive.close)
            archive.check()
        sender = _Sender(archive, taker)
        known = resolve(config, chosen, private_key) if chosen else Resolved({}, [], "")
        zone = ZoneInfo(config.operate.timezone)
        judged = _judged(lake, cohort, scored, known.originals, calibration, opened.digest, zone)
        progress.stage("push", len(chosen))
        plans = _plans(sender, chosen, judged, known, config.push.objects)

        def draw(shown: Sequence[str]) -> dict[str, Picture]:
            return drawn(lake, cohort, shown, scored, calibration, config.push.side_px)

        pushed, objects, failures = _carried_out(sender, plans, judged, None if dry_run else draw, progress)
    return PushResult(
        archive=sender.taker.place,
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


def _carried_out(
    sender: _Sender,
    plans: Iterator[_Plan],
    judged: Mapping[str, Judged],
    draw: Callable[[Sequence[str]], dict[str, Picture]] | None,
    progress: Progress,
) -> tuple[int, int, dict[str, str]]:
    """Send what each image lacks; return how many images and objects went, and why others did not, by image.

    Args:
        draw: makes pictures; None where nothing is to be sent, only counted.
    """
    failures: dict[str, str] = {}
    pushed = objects = done = 0
    while some := list(itertools.islice(plans, _AT_ONCE)):
        shown = [plan.uid for plan in some if "sc" in plan.kinds]
        pictures = draw(shown) if draw and shown else {}
        for plan in some:
            sent, reason = len(plan.kinds), plan.reason
            if plan.kinds and draw:
                sent, reason = sender.send(plan, judged[plan.uid], pictures)
            objects += sent
            if reason:
                failures[plan.uid] = reason
            pushed += bool(plan.kinds) and not reason
        done += len(some)
        progress.advance(done)
    return pushed, objects, failures


def _places(config: Config, out: Path | None) -> tuple[Archive | None, Taker]:
    """Return the archive that is asked about studies, if one is at hand, and what takes the objects."""
    if out is None:
        archive = open_archive(config.push, os.environ)
        return archive, archive
    return open_archive(config.push, os.environ) if config.push.uri else None, Folder(out)


@dataclass(frozen=True)
class _Plan:
    """What an image still lacks in the archive, or why it gets nothing."""

    uid: str
    kinds: tuple[Kind, ...] = ()
    header: Dataset = field(default_factory=Dataset, repr=False)
    reason: str | None = None


class _Sender:
    """Makes and stores objects, and tells an archive that chokes on one image from one that is gone or full.

    Args:
        archive: is asked about studies; None where only a folder is at hand.
        taker: takes the objects.
    """

    def __init__(self, archive: Archive | None, taker: Taker) -> None:
        self.archive, self.taker = archive, taker
        self._silent = 0

    def send(self, plan: _Plan, judged: Judged, pictures: Mapping[str, Picture]) -> tuple[int, str | None]:
        """Send what an image lacks; return how many objects were stored, and why others were not.

        Raises:
            StorageError: the archive is gone, full, or refuses whatever it is sent.
        """
        try:
            made = _objects(plan, judged, pictures)
            for each in made:
                encoded(each)  # what cannot be written must not look like an archive that refuses
        except Exception as error:  # noqa: BLE001 - the boundary of one image; the libraries' texts quote values
            logger.warning("no object could be made of %s (%s)", plan.uid, type(error).__name__)
            return 0, OBJECT_NOT_MADE
        try:
            refused = self.taker.send(made)
        except NoAnswerError:
            self._silent += 1
            if self._silent == _SILENT_IN_A_ROW or self.archive is None:
                raise
            self.archive.check()
            return 0, OBJECT_UNANSWERED
        self._silent = 0
        return len(made) - len(refused), next(iter(refused.values()), None)


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
        if not original.keys() >= _UIDS:
            continue
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
    sender: _Sender, chosen: Sequence[str], judged: Mapping[str, Judged], known: Resolved, kinds: Sequence[Kind]
) -> Iterator[_Plan]:
    """Yield the plan of each image, study by study; the archive is asked about a study when its turn comes."""
    studies: dict[str, list[str]] = defaultdict(list)
    for uid in chosen:
        if uid in judged:
            studies[judged[uid].study_uid].append(uid)
        else:
            yield _Plan(uid, reason=VAULT_AMBIGUOUS if uid in known.ambiguous else NOT_IN_VAULT)
    for study, of_study in studies.items():
        headers, there = _asked(sender.archive, study, {judged[uid].series_uid for uid in of_study})
        series = {judged[uid].series(kind) for uid in of_study for kind in kinds} if headers != [] else set[str]()
        present = set[str]().union(*(sender.taker.present(study, each) for each in sorted(series)))
        for uid in of_study:
            header, reason = _header(headers, known.originals[uid])
            if reason is None and there is not None and judged[uid].sop_instance_uid not in there:
                reason = IMAGE_ABSENT
            lacking: tuple[Kind, ...] = tuple(kind for kind in kinds if judged[uid].uid(kind) not in present)
            yield _Plan(uid, () if reason else lacking, header, reason)


def _asked(
    archive: Archive | None, study: str, series: Collection[str]
) -> tuple[list[Dataset] | None, set[str] | None]:
    """Return what the archive says of a study, and which images it has of the originals' series; None where none is."""
    if archive is None:
        return None, None
    headers = archive.headers(study)
    if not headers:
        return headers, set()
    return headers, set[str]().union(*(archive.present(study, each) for each in sorted(series)))


def _header(headers: list[Dataset] | None, original: Mapping[str, str]) -> tuple[Dataset, str | None]:
    """Return patient and study as the archive has them, or why nothing of this image may be sent to it.

    The vault holds the first value of an attribute alone, so that is what is compared.
    """
    own = Dataset()
    for keyword, name in _OF_VAULT.items():
        setattr(own, keyword, original.get(name, ""))
    if headers is None:  # a folder knows nobody
        return own, None
    if not headers:
        return own, STUDY_ABSENT
    for header in headers:
        patient, issuer = (text_of(header, name).split("\\")[0] for name in _PATIENT)
        known = original.get("issuer_of_patient_id", "")
        if patient != original.get("patient_id", "") or (issuer and known and issuer != known):
            return own, PATIENT_DIFFERS
    return headers[0], None


def _objects(plan: _Plan, judged: Judged, pictures: Mapping[str, Picture]) -> list[Dataset]:
    """Return the objects that an image lacks."""
    made = {
        "sr": lambda: report(judged, plan.header),
        "sc": lambda: picture(judged, plan.header, pictures[plan.uid]),
    }
    return [made[kind]() for kind in plan.kinds]
