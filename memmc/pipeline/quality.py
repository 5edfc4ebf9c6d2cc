"""The quality gate: which stored instances are kept out of training, calibration and scores, and why.

Rows of `instances` never change, so verdicts live in the table `quality`; of
several rows of one instance the newest holds. A run looks at the pixels of
what the cohort has not gated yet, judges the whole cohort anew from the
thumbnails that the table keeps, and writes the rows that are new or changed.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pyarrow as pa

from memmc.config import Config, QualityConfig, config_hash
from memmc.errors import DataError
from memmc.lake.files import DataFile
from memmc.lake.schemas import INSTANCES, QUALITY, SCHEMAS
from memmc.lake.stream import PIXEL_COLUMNS, SMALL_BLOCK, pixels_to_array, read_rows, stream
from memmc.lake.tables import Lake
from memmc.lake.views import find_view
from memmc.pipeline.audit import recorded
from memmc.pipeline.cluster import ray_cluster
from memmc.pipeline.identity import home_directory
from memmc.pipeline.ingest import check_cohort
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.results import GateResult, PlanResult
from memmc.quality.duplicates import duplicates
from memmc.quality.flags import DUPLICATE, OF_ONE_IMAGE, in_order
from memmc.quality.look import LOOK_FORMAT, look, thumbnails_from_bytes
from memmc.quality.reference import fit_reference

_SEEN = ("sop_instance_uid", "flags", "perceptual_hash", "thumbnail")
_LOOKED_AT = ("sop_instance_uid", "rows", "columns", *PIXEL_COLUMNS)
_FEW = 2000  # images that are sooner read here than a cluster is started
_BATCH, _READERS = 256, 4  # instances looked at together; shards read at the same time

Row = dict[str, Any]


def flags_of(lake: Lake, cohort: str, version: int | None = None) -> dict[str, tuple[str, ...]]:
    """Return SOP Instance UID -> QC_* codes of the flagged instances of a cohort; none that passed or is not gated.

    Args:
        version: of `quality`; the newest when absent.
    """
    newest = _verdicts(lake, cohort, ["sop_instance_uid", "flags", "gated_at"], version)
    return {uid: tuple(row["flags"]) for uid, row in newest.items() if row["flags"]}


def kept_from_scores(lake: Lake, cohort: str, flagged: Mapping[str, tuple[str, ...]] | None = None) -> dict[str, str]:
    """Return SOP Instance UID -> first QC_* code of the instances of a cohort that get no score.

    Whether an image belongs to its cohort is a suspicion, which gives way to a label: somebody has looked at it. What
    shows in the image alone does not. A label never lets an image into training.

    Args:
        flagged: `flags_of` the cohort, where the caller has it.
    """
    flagged = flags_of(lake, cohort) if flagged is None else flagged
    where = {"cohort": cohort, "outcome": "stored", "label": ["normal", "abnormal"]}
    labelled: set[str] = set()
    if flagged:
        labelled |= set(lake.instances_with_labels(["sop_instance_uid"], None, where)["sop_instance_uid"].to_pylist())
    return {
        uid: flags[0] for uid, flags in flagged.items() if uid not in labelled or not OF_ONE_IMAGE.isdisjoint(flags)
    }


def preview(config: Config, cohort: str) -> PlanResult:
    """Say what `gate` would look at."""
    check_cohort(cohort)
    lake = Lake(config.lake.uri)
    rows = _stored(lake, cohort)
    known = _verdicts(lake, cohort, ["sop_instance_uid", "flags", "gated_at", "gate_id"])
    new = _missing(rows, known, gate_id(config.quality))
    return PlanResult(
        {"instances": len(rows), "flagged": sum(bool(row["flags"]) for row in known.values()), "to look at": len(new)}
    )


@recorded(
    "gate",
    lambda done: {"gate_id": done.gate_id, "looked_at": done.gated, "flagged": done.flagged, "version": done.version},
)
def gate(config: Config, cohort: str, *, reference: str | None = None, progress: Progress | None = None) -> GateResult:
    """Flag what should not be learned from: broken, turned, foreign and copied images of a cohort.

    Does nothing when every stored instance has been gated by the rules as they are. The cohorts of a view are gated
    each against its own normals, so that an instance has one verdict whatever views it is in.

    Args:
        reference: a gated cohort whose normals show what images should look like where this one has too few of its
            own (`quality.min_reference`), as that of the model that is to score it.

    Raises:
        DataError: nothing is stored in the cohort.
    """
    check_cohort(cohort)
    progress = progress or Silent()
    lake = Lake(config.lake.uri)
    view = find_view(lake, cohort)
    gated = sum(_gate(config, lake, base, reference, progress) for base in (view.bases if view else (cohort,)))
    rows = _stored(lake, cohort)
    flagged = flags_of(lake, cohort)
    kept = {row["sop_instance_uid"] for row in rows}
    counts = Counter(code for uid, flags in flagged.items() if uid in kept for code in flags)
    return GateResult(
        cohort=cohort,
        instances=len(rows),
        gated=gated,
        flagged=len(flagged.keys() & kept),
        flags=dict(sorted(counts.items())),
        gate_id=gate_id(config.quality),
        version=lake.version(QUALITY),
    )


def _gate(config: Config, lake: Lake, cohort: str, reference: str | None, progress: Progress) -> int:
    """Gate one ingested cohort; return how many instances were looked at."""
    rows = _stored(lake, cohort)
    own = sum(row["label"] == "normal" and row["split"] == "train" for row in rows)
    if reference == cohort or own >= config.quality.min_reference:
        reference = None
    identifier = gate_id(config.quality, reference)
    missing = _missing(rows, _verdicts(lake, cohort, ["sop_instance_uid", "gated_at", "gate_id"]), identifier)
    if missing:
        progress.stage("quality gate", len(missing))
        # Those seen before come first, so that of two copies the one that came first stays.
        rows.sort(key=lambda row: (row["sop_instance_uid"] in missing, row["object_key"]))
        known = _verdicts(lake, cohort, [*_SEEN, "gated_at"])
        looks = {**known, **_look(config, lake, cohort, missing, progress)}
        verdicts = _judge(rows, looks, _like(lake, rows, looks, reference, config.quality), config.quality)
        new = [
            {**looks[row["sop_instance_uid"]], **row, "cohort": cohort, "flags": list(flags)}
            for row, flags in zip(rows, verdicts, strict=True)
            if row["sop_instance_uid"] in missing or tuple(known[row["sop_instance_uid"]]["flags"]) != flags
        ]
        _commit(lake, cohort, identifier, new)
    return len(missing)


def gate_id(rules: QualityConfig, reference: str | None = None) -> str:
    """Return 16 hex digits naming the rules and the way images are looked at, then the reference if there is one."""
    return config_hash(rules)[:14] + f"{LOOK_FORMAT:02x}" + (f" {reference}" if reference else "")


def _stored(lake: Lake, cohort: str) -> list[Row]:
    columns = ["object_key", "sop_instance_uid", "patient_key", "split", "label"]
    rows = lake.instances_with_labels(columns, None, {"cohort": cohort, "outcome": "stored"}).to_pylist()
    if not rows:
        raise DataError(f"cohort '{cohort}' has no stored images; run `memmc ingest SOURCE --cohort {cohort}`")
    return rows


def _verdicts(lake: Lake, cohort: str, columns: list[str], version: int | None = None) -> dict[str, Row]:
    """Return the newest row of each gated instance."""
    if not lake.exists(QUALITY):
        return {}
    rows = lake.read(QUALITY, columns, version, {"cohort": cohort}).sort_by("gated_at")
    return {row["sop_instance_uid"]: row for row in rows.to_pylist()}


def _missing(rows: list[Row], known: dict[str, Row], identifier: str) -> dict[str, str]:
    """Return SOP Instance UID -> object key of what these rules have not looked at, whatever the reference if none."""
    seen = {uid for uid, row in known.items() if identifier in (row["gate_id"], row["gate_id"].split()[0])}
    return {row["sop_instance_uid"]: row["object_key"] for row in rows if row["sop_instance_uid"] not in seen}


def _like(
    lake: Lake, rows: list[Row], looks: dict[str, Row], reference: str | None, rules: QualityConfig
) -> list[tuple[bytes, str]]:
    """Return thumbnail and patient of the cohort's normals, or of the reference's where these are too few."""
    others = _verdicts(lake, reference, [*_SEEN, "gated_at"]) if reference else {}
    if not reference or not others:
        return _normals(rows, looks, rules)
    return _normals([row for row in _stored(lake, reference) if row["sop_instance_uid"] in others], others, rules)


def _normals(rows: list[Row], looks: dict[str, Row], rules: QualityConfig) -> list[tuple[bytes, str]]:
    """Return thumbnail and patient of normals to compare with.

    Of the train share alone, so that held-out normals are treated like every other image.
    """
    sound = [
        row
        for row in rows
        if row["label"] == "normal"
        and row["split"] == "train"
        and not OF_ONE_IMAGE & set(looks[row["sop_instance_uid"]]["flags"])
    ]
    sound.sort(key=lambda row: row["sop_instance_uid"])
    return [(looks[row["sop_instance_uid"]]["thumbnail"], row["patient_key"]) for row in sound[: rules.max_reference]]


def _judge(
    rows: list[Row], looks: dict[str, Row], like: list[tuple[bytes, str]], rules: QualityConfig
) -> list[tuple[str, ...]]:
    """Return the flags of every row: its own, and those that the normals and the rows before it give."""
    own = [looks[row["sop_instance_uid"]] for row in rows]
    found = [set(item["flags"]) & OF_ONE_IMAGE for item in own]
    sound = [number for number, flags in enumerate(found) if not flags]
    patients = [rows[number]["patient_key"] for number in sound]
    thumbnails_NTT = thumbnails_from_bytes([own[number]["thumbnail"] for number in sound])
    if like:
        thumbnails, owners = zip(*like, strict=True)
        reference = fit_reference(thumbnails_from_bytes(list(thumbnails)), owners, rules)
        for number, judged in enumerate(reference.judge(thumbnails_NTT, patients, rules) if reference else ()):
            found[sound[number]] |= judged
    hashes = [own[number]["perceptual_hash"] for number in sound]
    for number in duplicates(hashes, thumbnails_NTT, patients, rules):
        found[sound[number]].add(DUPLICATE)
    return [in_order(flags) for flags in found]


def _look(config: Config, lake: Lake, cohort: str, missing: dict[str, str], progress: Progress) -> dict[str, Row]:
    """Return a look at each missing instance: here for a few, on the cluster for many."""
    files = lake.files(INSTANCES, None, {"outcome": "stored", "cohort": cohort})
    keys = sorted(missing.values())
    found: dict[str, Row] = {}
    if len(missing) <= _FEW:
        tables = _read_here(lake, files, cohort, keys, config.quality)
        _collect(tables, found, progress)
    else:
        with ray_cluster(config, home_directory(), training=False):
            task: Any = partial(_look_at, rules=config.quality)
            rows = stream(
                lake.storage,
                files,
                _LOOKED_AT,
                len(files),
                filter={"cohort": cohort},
                keys=keys,
                at_once=_READERS,
                block_bytes=SMALL_BLOCK,
            )
            looked = rows.map_batches(task, batch_size=_BATCH, batch_format="pyarrow")
            _collect(looked.iter_batches(batch_size=None, batch_format="pyarrow"), found, progress)
    if found.keys() != missing.keys():
        raise DataError(f"{len(missing)} instances were to be gated, {len(found)} were read; run `memmc gate` again")
    return found


def _collect(tables: Any, found: dict[str, Row], progress: Progress) -> None:
    for table in tables:
        found.update((row["sop_instance_uid"], row) for row in table.to_pylist())
        progress.advance(len(found))


def _read_here(
    lake: Lake, files: list[DataFile], cohort: str, keys: list[str], rules: QualityConfig
) -> Iterator[pa.Table]:
    for file in files:
        for rows in read_rows(lake.storage, INSTANCES, file, _LOOKED_AT, {"cohort": cohort}, pa.array(keys)):
            yield _look_at(rows, rules)


def _look_at(rows: pa.Table, rules: QualityConfig) -> pa.Table:
    """Look at instances; they may be of several shapes."""
    looks: list[Row] = []
    shapes = rows.select(PIXEL_COLUMNS[1:]).group_by(list(PIXEL_COLUMNS[1:])).aggregate([]).num_rows
    images = pixels_to_array(rows) if shapes == 1 else None
    for number, row in enumerate(rows.select(("sop_instance_uid", "rows", "columns", "bits")).to_pylist()):
        image_HWC = pixels_to_array(rows.slice(number, 1))[0] if images is None else images[number]
        grey_HW = image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC.mean(axis=-1)
        one = look(grey_HW, 2 ** row["bits"] - 1, row["rows"], row["columns"], rules)
        looks.append({"sop_instance_uid": row["sop_instance_uid"], **vars(one)})
    return pa.Table.from_pylist(looks, schema=pa.schema([SCHEMAS[QUALITY].field(name) for name in _SEEN]))


def _commit(lake: Lake, cohort: str, identifier: str, rows: list[Row]) -> None:
    run, now = f"gate-{cohort}-{uuid.uuid4().hex[:12]}", datetime.now(UTC)
    names = SCHEMAS[QUALITY].names
    whole = [{**row, "gate_id": identifier, "run": run, "gated_at": now} for row in rows]
    table = pa.Table.from_pylist([{name: row[name] for name in names} for row in whole], schema=SCHEMAS[QUALITY])
    counts = Counter(code for row in rows for code in row["flags"])
    lake.append(QUALITY, table, run, {"cohort": cohort, "flags": dict(sorted(counts.items()))})
