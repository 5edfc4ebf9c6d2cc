"""Writes a hospital: a folder tree of simulated radiographs as DICOM, with labels and exact lesion masks beside it.

::

    out_dir/dicom/PATIENT/STUDY/NUMBER.dcm    what a PACS export looks like; opaque numbers
    out_dir/labels.csv                        path (relative to dicom/), label, lesion
    out_dir/masks.csv, out_dir/masks/UID.png  sop_instance_uid, path (relative to out_dir), lesion
    out_dir/manifest.json                     parameters; written last, so its presence means complete
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from memmc.errors import UsageError
from memmc.phantom.lesions import LESION_KINDS, Lesion
from memmc.phantom.objects import PROFILES, Identity, garbage_object, image_object, report_object
from memmc.phantom.radiograph import simulate

FORMAT = 1
SIZE_PX = 256

Fault = Literal["truncated", "empty", "web_page", "garbage", "lateral", "report", "duplicate"]
FAULTS: tuple[Fault, ...] = ("truncated", "empty", "web_page", "garbage", "lateral", "report", "duplicate")

_WEB_PAGE = (
    b"<!DOCTYPE html><html><head><title>Session expired</title></head><body>Please log in again.</body></html>\n"
)


@dataclass(frozen=True)
class HospitalSummary:
    """What stands on disk.

    Attributes:
        dicom_dir: folder to ingest.
        labels_csv: labels by path relative to `dicom_dir`.
        masks_csv: lesion masks by SOP Instance UID.
        num_normal: readable normal radiographs, duplicates not counted.
        num_abnormal: radiographs with a lesion.
        num_broken: files that are unreadable, out of scope or copies.
        num_patients: patients with readable frontal radiographs.
        reused: nothing was written, the folder was complete.
    """

    dicom_dir: Path
    labels_csv: Path
    masks_csv: Path
    num_normal: int
    num_abnormal: int
    num_broken: int
    num_patients: int
    reused: bool


@dataclass(frozen=True)
class Exam:
    """One file to write."""

    path: str
    patient: int
    study: int
    profile: int
    lesion: Lesion | None
    fault: Fault | None


def write_hospital(
    out_dir: Path,
    *,
    num_normal: int,
    num_abnormal: int,
    seed: int = 0,
    num_broken: int = 7,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> HospitalSummary:
    """Write the hospital, or reuse a complete one of the same parameters; equal parameters give equal bytes.

    Args:
        out_dir: folder to make; files appear in it all at once.
        num_normal: normal radiographs; every sixth patient has two.
        num_abnormal: radiographs with a lesion, each of its own patient, the four kinds in equal shares.
        seed: of everything.
        num_broken: files with a fault, the kinds of `FAULTS` in turn; a duplicate needs a normal to copy.
        workers: processes; 1 writes in this one.
        progress: called with (files done, files in all).

    Raises:
        UsageError: the folder holds something else.
    """
    out_dir = Path(out_dir)
    wanted = {"format": FORMAT, "size_px": SIZE_PX, "num_normal": num_normal, "num_abnormal": num_abnormal,
              "num_broken": num_broken, "seed": seed}  # fmt: skip
    exams = plan_exams(num_normal, num_abnormal, num_broken, seed)
    if out_dir.exists() and any(out_dir.iterdir()):
        _expect_manifest(out_dir, wanted)
        return _summary(out_dir, exams, reused=True)
    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "masks").mkdir(parents=True)
    masks: list[str] = [""] * len(exams)
    for done, (index, uid) in enumerate(_write_all(partial, exams, seed, workers), start=1):
        masks[index] = uid
        if progress is not None:
            progress(done, len(exams))
    _copy_duplicates(partial, exams)
    _write_tables(partial, exams, masks)
    (partial / "manifest.json").write_text(json.dumps(wanted, indent=1) + "\n")
    partial.replace(out_dir)
    return _summary(out_dir, exams, reused=False)


def plan_exams(num_normal: int, num_abnormal: int, num_broken: int, seed: int) -> list[Exam]:
    """Return the files of a hospital in an order that tells nothing about their labels."""
    rng = np.random.default_rng([seed, 6])
    # (lesion, fault) of each study, by patient.
    studies: list[list[tuple[Lesion | None, Fault | None]]] = []
    left = num_normal
    while left:
        count = min(left, 2 if len(studies) % 6 == 5 else 1)
        studies.append([(None, None)] * count)
        left -= count
    for i in range(num_abnormal):
        studies.append([(Lesion(LESION_KINDS[i % len(LESION_KINDS)], int(rng.integers(1 << 31))), None)])
    for i in range(num_broken):
        studies.append([(None, FAULTS[i % len(FAULTS)])])
    numbers = rng.permutation(900_000)[: 2 * (num_normal + num_abnormal + num_broken)] + 100_000
    draw = iter(int(number) for number in numbers)
    exams: list[Exam] = []
    for patient, chosen in enumerate(rng.permutation(len(studies))):
        folder = next(draw)
        maker = int(rng.integers(len(PROFILES)))
        for study, (lesion, fault) in enumerate(studies[chosen]):
            path = f"{folder}/{study + 1}/{next(draw)}.dcm"
            exams.append(Exam(path, patient, study, (maker + study) % len(PROFILES), lesion, fault))
    return exams


def _write_all(root: Path, exams: list[Exam], seed: int, workers: int) -> Iterator[tuple[int, str]]:
    """Write every exam; yield its index and, where a mask was written, its SOP Instance UID."""
    if workers <= 1:
        for index, exam in enumerate(exams):
            yield index, _write_exam(root, exam, seed)
        return
    # Not fork: the caller may hold threads.
    context = multiprocessing.get_context("spawn")
    batches = [range(first, min(first + 8, len(exams))) for first in range(0, len(exams), 8)]
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = [pool.submit(_write_batch, root, [(index, exams[index]) for index in batch], seed) for batch in batches]
        for job in as_completed(jobs):
            yield from job.result()


def _write_batch(root: Path, exams: list[tuple[int, Exam]], seed: int) -> list[tuple[int, str]]:
    return [(index, _write_exam(root, exam, seed)) for index, exam in exams]


def _write_exam(root: Path, exam: Exam, seed: int) -> str:
    """Write one file and its mask; return the SOP Instance UID where there is a mask."""
    path = root / "dicom" / exam.path
    path.parent.mkdir(parents=True, exist_ok=True)
    if exam.fault != "duplicate":
        path.write_bytes(exam_bytes(exam, seed, root))
    return Identity(seed, exam.patient, exam.study, "O").uid("instance") if exam.lesion else ""


def exam_bytes(exam: Exam, seed: int, mask_root: Path | None = None) -> bytes:
    """Return the file of an exam; the mask of a lesion goes to `mask_root`/masks."""
    if exam.fault == "empty":
        return b""
    if exam.fault == "web_page":
        return _WEB_PAGE
    anonymous = Identity(seed, exam.patient, exam.study, "O")
    if exam.fault == "garbage":
        return garbage_object(anonymous)
    if exam.fault == "report":
        return report_object(anonymous)
    view = "LL" if exam.fault == "lateral" else "PA"
    patient_seed = seed * 1_000_003 + exam.patient
    radiograph = simulate(patient_seed, exam.study, exam.lesion, SIZE_PX, view)
    identity = Identity(seed, exam.patient, exam.study, radiograph.info["sex"])
    if exam.lesion is not None and mask_root is not None:
        _write_mask(mask_root / "masks" / f"{identity.uid('instance')}.png", radiograph.mask_HW)
    data = image_object(radiograph, identity, PROFILES[exam.profile], view)
    return data[: int(len(data) * 0.6)] if exam.fault == "truncated" else data


def _write_mask(path: Path, mask_HW: npt.NDArray[np.bool_]) -> None:
    from PIL import Image

    Image.fromarray(mask_HW.astype(np.uint8) * np.uint8(255)).save(path)


def _copy_duplicates(root: Path, exams: list[Exam]) -> None:
    """Copy the first normals byte for byte to where the duplicates stand."""
    originals = [exam.path for exam in exams if exam.lesion is None and exam.fault is None]
    copies = [exam.path for exam in exams if exam.fault == "duplicate"]
    for number, copy in enumerate(copies):
        if originals:
            shutil.copyfile(root / "dicom" / originals[number % len(originals)], root / "dicom" / copy)
        else:
            (root / "dicom" / copy).write_bytes(b"")


def _write_tables(root: Path, exams: list[Exam], masks: list[str]) -> None:
    """Write labels.csv and masks.csv."""
    with (root / "labels.csv").open("w", newline="") as handle:
        rows = csv.writer(handle, lineterminator="\n")
        rows.writerow(["path", "label", "lesion"])
        for exam in exams:
            label = "abnormal" if exam.lesion else "normal" if exam.fault in (None, "duplicate") else "unknown"
            rows.writerow([exam.path, label, exam.lesion.kind if exam.lesion else ""])
    with (root / "masks.csv").open("w", newline="") as handle:
        rows = csv.writer(handle, lineterminator="\n")
        rows.writerow(["sop_instance_uid", "path", "lesion"])
        for exam, uid in zip(exams, masks, strict=True):
            if exam.lesion is not None:
                rows.writerow([uid, f"masks/{uid}.png", exam.lesion.kind])


def _expect_manifest(out_dir: Path, wanted: dict[str, int]) -> None:
    try:
        found = json.loads((out_dir / "manifest.json").read_text())
    except (OSError, ValueError):
        found = None
    if found != wanted:
        raise UsageError(
            f"the folder for generated scans holds {'other scans' if found else 'other files'}; "
            "expected an empty folder or scans of the same numbers and seed; delete it or name another"
        )


def _summary(out_dir: Path, exams: list[Exam], *, reused: bool) -> HospitalSummary:
    readable = [exam for exam in exams if exam.fault is None]
    abnormal = sum(exam.lesion is not None for exam in readable)
    return HospitalSummary(
        dicom_dir=out_dir / "dicom",
        labels_csv=out_dir / "labels.csv",
        masks_csv=out_dir / "masks.csv",
        num_normal=len(readable) - abnormal,
        num_abnormal=abnormal,
        num_broken=len(exams) - len(readable),
        num_patients=len({exam.patient for exam in readable}),
        reused=reused,
    )
