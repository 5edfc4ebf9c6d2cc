"""Which instances a step works on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from memmc.config import Config
from memmc.errors import DataError, MissingClassError
from memmc.lake.schemas import CALIBRATIONS, INSTANCES, LABELS, QUALITY, REVIEWS
from memmc.lake.tables import Lake
from memmc.lake.views import expand
from memmc.pipeline.identity import home_directory
from memmc.pipeline.models import OpenModel, open_model
from memmc.pipeline.pins import Pins, absent
from memmc.pipeline.quality import flags_of, kept_from_scores
from memmc.quality.flags import DUPLICATE

_MET_SPLITS = ("train", "calibrate")


def normals(
    lake: Lake, cohort: str, split: str, version: int | None = None, pins: Pins | None = None
) -> list[dict[str, Any]]:
    """Return the rows of `normal_table`; for a share that is small, such as the held-out one."""
    return normal_table(lake, cohort, split, version, pins).to_pylist()


def normal_table(lake: Lake, cohort: str, split: str, version: int | None = None, pins: Pins | None = None) -> pa.Table:
    """Return the stored normal instances of a cohort's split that may be learned from, without pixels, by column.

    The quality gate lets them pass, and none of the training share waits under review. Held-out normals stay until
    a person has rejected them, whereupon they are normal no longer: a threshold that was set without the normals a
    model finds odd would flag more than it promises.

    Args:
        version: of `instances`; the newest when absent.
        pins: of the tables beside it; the newest when absent.

    Raises:
        DataError: there is none; the message says what there is.
    """
    pins = pins or Pins()
    columns = ["object_key", "sop_instance_uid", "patient_key", "preprocess_id", "height", "width", "channels", "bits"]
    columns += ["pixel_mean", "pixel_std", "label"]
    where = {"cohort": cohort, "outcome": "stored", "split": split}
    if absent(pins.labels):
        stored = lake.read(INSTANCES, columns, version, where)
    else:
        stored = lake.instances_with_labels(columns, version, where, pins.labels)
    found = stored.filter(pc.field("label") == "normal")
    kept_out = {} if absent(pins.quality) else dict(flags_of(lake, cohort, pins.quality))
    if split == "train":
        kept_out |= dict.fromkeys(under_review(lake, cohort, pins.reviews), ())
    uids = found["sop_instance_uid"]
    out = pc.call_function("is_in", [uids], pc.SetLookupOptions(value_set=pa.array(sorted(kept_out), uids.type)))
    rows = found.filter(pc.call_function("invert", [out]))
    if found.num_rows and not rows.num_rows:
        raise DataError(
            f"the quality gate or a review keeps out all {found.num_rows} normal images of cohort '{cohort}' in its "
            f"{split} share; see `memmc gate --cohort {cohort}`, `memmc review list` and the settings quality.*"
        )
    if not rows.num_rows:
        raise DataError(
            f"cohort '{cohort}' has no normal images in its {split} share ({stored.num_rows} of any label); "
            "ingest with --label normal or --labels FILE.csv"
        )
    return rows


def under_review(lake: Lake, cohort: str, version: int | None = None) -> set[str]:
    """Return the SOP Instance UIDs that are suspect or rejected: not to be learned from.

    Args:
        version: of `reviews`; the newest when absent.
    """
    return {uid for uid, row in newest_reviews(lake, cohort, version).items() if row["state"] != "accepted"}


def newest_reviews(lake: Lake, cohort: str, version: int | None = None) -> dict[str, dict[str, Any]]:
    """Return the newest row of each instance in `reviews`, by SOP Instance UID."""
    if absent(version) or not lake.exists(REVIEWS):
        return {}
    rows = lake.read(REVIEWS, None, version, {"cohort": cohort}).sort_by("reviewed_at").to_pylist()
    return {row["sop_instance_uid"]: row for row in rows}


def one_preparation(rows: list[dict[str, Any]] | pa.Table) -> dict[str, Any]:
    """Return the shape, bits and `preprocess_id` all rows share.

    Raises:
        DataError: they do not share them.
    """
    names = ("preprocess_id", "height", "width", "channels", "bits")
    if not isinstance(rows, list):
        rows = rows.group_by(list(names)).aggregate([]).to_pylist()
    kinds = {tuple(row[name] for name in names) for row in rows}
    if len(kinds) > 1:
        raise DataError(
            f"the cohort holds images prepared in {len(kinds)} ways ({sorted({str(kind[0]) for kind in kinds})}); "
            "ingest them again into one cohort with the same data.* settings"
        )
    return dict(zip(names, kinds.pop(), strict=True))


def met_patients(lake: Lake, model: OpenModel) -> set[str]:
    """Return the patients that a model, or one that it began from, learned, and those that it was calibrated on.

    Whatever their images are called by now. What a model of another lake learned there is not here: of a cohort with
    the same name, the newest version stands for it.
    """
    newest = lake.version(INSTANCES)
    line = model.learned_from
    shares = [(model.cohort, line.pop(model.cohort), _MET_SPLITS)]
    shares += [(cohort, version, ("train",)) for cohort, version in line.items()]
    shares += [(cohort, version, ("calibrate",)) for cohort, version in calibrated_on(lake, model)]
    met = set[str]()
    for cohort, version, splits in shares:
        rows = ever_normal(lake, cohort, min(version, newest), splits, ["patient_key"])
        met |= set(rows["patient_key"].to_pylist())
    return met


def one_a_patient(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first row of each patient, in order; one without a patient stands for itself."""
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        first.setdefault(row["patient_key"] or row["sop_instance_uid"], row)
    return list(first.values())


def calibrated_on(lake: Lake, model: OpenModel) -> list[tuple[str, int]]:
    """Return cohort and version of `instances` of every calibration of a model, each once."""
    if not lake.exists(CALIBRATIONS):
        return []
    rows = lake.read(CALIBRATIONS, ["cohort", "dataset_version"], filter={"model_digest": model.digest}).to_pylist()
    return sorted({(row["cohort"], row["dataset_version"]) for row in rows})


def ever_normal(lake: Lake, cohort: str, version: int, splits: Collection[str], columns: list[str]) -> pa.Table:
    """Return the stored rows of splits that anybody ever called normal, at ingest or since.

    An image that was learned as normal stays known to the model after a reviewer has called it abnormal. A view's rule
    on labels is left out for the same reason.
    """
    where = expand(lake, INSTANCES, {"cohort": cohort, "outcome": "stored", "split": tuple(splits)}, labels=True)
    where.pop("label", None)
    rows = lake.read(INSTANCES, list(dict.fromkeys([*columns, "sop_instance_uid", "label"])), version, where)
    said = pa.array([], pa.string())
    if lake.exists(LABELS):
        opinions = lake.read(LABELS, ["sop_instance_uid"], filter={"cohort": where["cohort"], "label": "normal"})
        said = opinions["sop_instance_uid"].combine_chunks()
    by_hand = pc.field("sop_instance_uid").isin(said)
    return rows.filter((pc.field("label") == "normal") | by_hand).select(columns)


def unmet(lake: Lake, model: OpenModel, cohort: str) -> list[dict[str, Any]]:
    """Return the labelled instances of a cohort whose patient the model never met, and that can be scored.

    Of copies of one image under several patients the first alone is among them: the model may have learned it.

    Raises:
        MissingClassError: one of the two classes is missing; nothing can be measured.
    """
    columns = ["object_key", "sop_instance_uid", "patient_key", "label", "manufacturer", "view_position", "patient_sex"]
    columns += ["patient_age_years"]
    columns += ["preprocess_id", "height", "width", "channels", "bits"]
    stored = lake.instances_with_labels(columns, None, {"cohort": cohort, "outcome": "stored"}).to_pylist()
    met = met_patients(lake, model)
    flagged = flags_of(lake, cohort)
    left_out = kept_from_scores(lake, cohort, flagged).keys() | copies(flagged)
    known = [row for row in stored if row["label"] != "unknown" and row["sop_instance_uid"] not in left_out]
    rows = [row for row in known if row["patient_key"] not in met]
    found = {label: sum(row["label"] == label for row in rows) for label in ("normal", "abnormal")}
    if not all(found.values()):
        raise MissingClassError(
            f"cohort '{cohort}' has {found['normal']} normal and {found['abnormal']} abnormal images of patients that "
            f"{model.ref} has not met; both are needed: ingest labelled scans of other patients"
        )
    return rows


def copies(flagged: Mapping[str, Collection[str]]) -> set[str]:
    """Return, of flags by SOP Instance UID, the images that another patient of the cohort had before."""
    return {uid for uid, flags in flagged.items() if DUPLICATE in flags}


def versions_read(lake: Lake) -> dict[str, int]:
    """Return the newest version of each table that says what is measured on."""
    return {table: lake.version(table) for table in (INSTANCES, LABELS, QUALITY) if lake.exists(table)}


def calibrations(lake: Lake, model: OpenModel) -> list[dict[str, Any]]:
    """Return the calibrations of a model, oldest first, with their scorer's state."""
    if not lake.exists("calibrations"):
        return []
    columns = ["calibration_id", "cohort", "dataset_version", "preprocess_id", "scorer", "false_positive_rate"]
    columns += ["threshold", "num_normals", "normal_scores", "map_scale", "scorer_state", "created_at"]
    columns += ["passes", "strata_columns", "strata", "study_p_values", "map_level", "normal_peaks", "early_stop"]
    table = lake.read("calibrations", columns, filter={"model_digest": model.digest})
    return sorted(table.to_pylist(), key=lambda row: row["created_at"])


def newest_calibration(lake: Lake, model: OpenModel) -> dict[str, Any]:
    """Return the calibration scores are judged by.

    Raises:
        DataError: the model has none.
    """
    found = calibrations(lake, model)
    if not found:
        raise DataError(f"model {model.ref} is not calibrated; run `memmc calibrate --model {model.ref}`")
    return found[-1]


def score_rows(
    lake: Lake,
    cohort: str,
    model: OpenModel,
    calibration_id: str | None,
    columns: tuple[str, ...] = (),
    *,
    uids: Collection[str] | None = None,
    preferred: str | None = None,
    without_score: bool = False,
) -> dict[str, dict[str, Any]]:
    """Return the newest score row of each instance, by SOP Instance UID.

    Args:
        columns: besides those of every call; with large ones, such as maps, name the instances.
        uids: of the instances that are wanted; all when absent.
        preferred: a calibration whose scores go before newer ones of others, where `calibration_id` is None.
        without_score: also the rows that say why an instance has no score, where it has none.
    """
    if not lake.exists("scores"):
        return {}
    names = ["sop_instance_uid", "patient_key", "anomaly_score", "p_value", "is_abnormal", "score_spread", "model"]
    names += ["dataset_version", "preprocess_id", "calibration_id", "scored_at", "study_uid"]
    names += ["stratum", "not_scored", *columns]
    where: dict[str, Any] = {"cohort": cohort, "model_digest": model.digest}
    if calibration_id is not None:
        where["calibration_id"] = calibration_id
    if uids is not None:
        where["sop_instance_uid"] = tuple(uids)
    rows = sorted(
        lake.read("scores", names, filter=where).to_pylist(),
        key=lambda row: (row["not_scored"] is None, row["calibration_id"] == preferred, row["scored_at"]),
    )
    return {row["sop_instance_uid"]: row for row in rows if without_score or row["not_scored"] is None}


def scored_instances(config: Config, lake: Lake, cohort: str, reference: str | None) -> list[dict[str, Any]]:
    """Return a cohort's score rows, those without a score included, joined to label, split and sealed source path.

    Of an instance that several calibrations have scored, the row of the newest calibration.
    """
    model = open_model(config, home_directory(), reference, cohort)
    newest = newest_calibration(lake, model)["calibration_id"]
    scores = score_rows(lake, cohort, model, None, preferred=newest, without_score=True)
    columns = ["sop_instance_uid", "label", "split", "source_ref", "outcome"]
    where: dict[str, Any] = {"cohort": cohort, "outcome": ("stored", "excluded", "quarantined")}
    instances = lake.instances_with_labels(columns, None, where).to_pylist()
    # The stored object of a UID stands for it, whatever else came under the same UID.
    of_uid = {row["sop_instance_uid"]: row for row in sorted(instances, key=lambda row: row["outcome"] == "stored")}
    return [{**of_uid[uid], **row} for uid, row in scores.items() if uid in of_uid]
