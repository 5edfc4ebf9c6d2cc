"""What each step returns: plain values only, so that `--json`, Prefect and tests read the same thing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


class Result:
    """Base of all step results."""

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object of `--json`."""
        return asdict(self)  # type: ignore[call-overload]


@dataclass(frozen=True)
class TooEarly(Result):
    """A step of a new site that has nothing to work on yet, and why."""

    cohort: str
    reason: str


@dataclass(frozen=True)
class IngestResult(Result):
    """Account of one ingest: seen = stored + duplicate + excluded + quarantined.

    Objects that an earlier run has accounted for count as `duplicate` with the
    reason `already_ingested`; they get no second row. `pending` objects are not
    among those seen: something still arrives in their study, a later run takes them.
    """

    seen: int
    stored: int
    duplicate: int
    excluded: int
    quarantined: int
    reasons: dict[str, int]
    version: int
    cohort: str = ""
    run: str = ""
    seconds: float = 0.0
    pending: int = 0


@dataclass(frozen=True)
class TrainResult(Result):
    """A registered model, trained and calibrated; `flags` counts what the quality gate kept out of the cohort."""

    model: str
    model_digest: str
    run: str
    cohort: str
    steps: int
    loss: float
    num_images: int
    dataset_version: int
    preprocess_id: str
    train_seconds: float
    seconds: float
    calibration: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class CalibrationResult(Result):
    """Thresholds from held-out normals.

    Attributes:
        thresholds: per false-positive rate: rate, threshold, low and high of the true rate, or why it was refused.
        strata: the same per stratum, and why the pooled normals judge it where its own do not.
        unjudged: why studies get no verdict, as images do; None where they do.
    """

    calibration_id: str
    model: str
    cohort: str
    scorer: str
    false_positive_rate: float
    threshold: float
    num_normals: int
    num_patients: int
    thresholds: list[dict[str, Any]] = field(default_factory=list)
    strata: list[dict[str, Any]] = field(default_factory=list)
    unjudged: str | None = None


@dataclass(frozen=True)
class ScoreResult(Result):
    """Account of one bulk scoring.

    `scored` counts what this run committed; of what was missing at its start, runs beside it may have scored a part.
    `not_scored` counts the instances whose row says why they have no score; `left` those for which the time was up
    (`operate.window`).
    """

    model: str
    calibration_id: str
    cohort: str
    instances: int
    scored: int
    already_scored: int
    abnormal: int
    version: int
    seconds: float
    images_per_second: float
    not_scored: int = 0
    left: int = 0


@dataclass(frozen=True)
class EvaluationResult(Result):
    """Quality on labelled instances whose patients the model never met.

    Attributes:
        sensitivity_at: at fixed specificities, with intervals.
        rates: promised and observed false-positive rates, with intervals, and what is expected; the data of a
            calibration plot.
        groups: the same model on parts of the images.
        localisation: of maps against lesion masks, and of its controls.
        boxes: of regions against boxes, and of their controls.
        tables_read: version of each table that images and labels were read from.
    """

    auroc: float
    auroc_low: float
    auroc_high: float
    average_precision: float
    controls: dict[str, float]
    num_normal: int
    num_abnormal: int
    model: str
    cohort: str
    calibration_id: str
    scorer: str
    average_precision_low: float
    average_precision_high: float
    false_positive_rate: float
    false_positive_rate_low: float
    false_positive_rate_high: float
    chosen_false_positive_rate: float
    sensitivity: float
    pixel_auroc: float | None = None
    localisation: dict[str, Any] | None = None
    boxes: dict[str, Any] | None = None
    sensitivity_at: list[dict[str, Any]] = field(default_factory=list)
    rates: list[dict[str, Any]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    tables_read: dict[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class LabelResult(Result):
    """Account of a label table: stated = names in it; of them `unknown` name nothing stored in the cohort.

    A name stands for every frame of its object, so `added` + `unchanged` instances may be more than the names.
    """

    cohort: str
    stated: int
    unknown: int
    added: int
    unchanged: int
    labels: dict[str, int]
    version: int


@dataclass(frozen=True)
class CohortResult(Result):
    """A cohort, or a view with its `bases` and `rule`: its stored instances, and their counts by attribute."""

    cohort: str
    bases: list[str]
    rule: dict[str, list[str]]
    created_at: str
    instances: int
    patients: int
    counts: dict[str, dict[str, int]]


@dataclass(frozen=True)
class CohortsResult(Result):
    """All cohorts and views, each as a `CohortResult` without counts by attribute."""

    cohorts: list[dict[str, Any]]


@dataclass(frozen=True)
class GateResult(Result):
    """Account of the quality gate: of `instances`, `gated` were looked at now; `flagged` are kept out, by code."""

    cohort: str
    instances: int
    gated: int
    flagged: int
    flags: dict[str, int]
    gate_id: str
    version: int


@dataclass(frozen=True)
class ReportResult(Result):
    """Where the report lies."""

    report: str
    model: str
    cohort: str


@dataclass(frozen=True)
class ExportResult(Result):
    """Where the exported score rows lie."""

    path: str
    rows: int
    columns: tuple[str, ...]


@dataclass(frozen=True)
class MapsResult(Result):
    """Where the pictures lie."""

    folder: str
    cohort: str
    model: str
    pictures: int


@dataclass(frozen=True)
class PushResult(Result):
    """What went to an archive.

    Attributes:
        archive: its URI, or the folder.
        images: scored images that were chosen; each is in `pushed`, `present` or `failed`.
        pushed: images of which at least one object was sent now; with `--dry-run`, would be.
        present: images all of whose objects the archive had already.
        objects: objects sent.
        reasons: how many images failed by reason code.
        failures: pseudonymous SOP Instance UID -> reason code.
    """

    archive: str
    cohort: str
    model: str
    images: int
    pushed: int
    present: int
    failed: int
    objects: int
    reasons: dict[str, int]
    failures: dict[str, str]


@dataclass(frozen=True)
class WhyResult(Result):
    """What stands behind one score.

    Attributes:
        region: the highest one, as in `scores.regions`; None where the map shows none.
        patch: row and column, from 0, of the patch that is compared: the highest of the region, or of the map.
        memory: slots that the region's tokens attend to most, beside the attention of all tokens.
        nearest: patches of training normals most like it.
        scales: parts of the score, by scale of the residual; they sum to 1.
        levels: mean gate of each encoder level in the decoder.
    """

    sop_instance_uid: str
    cohort: str
    model: str
    calibration_id: str
    anomaly_score: float
    p_value: float
    is_abnormal: bool
    region: dict[str, Any] | None
    patch: dict[str, int]
    memory: list[dict[str, Any]]
    nearest: list[dict[str, Any]]
    scales: list[dict[str, Any]]
    levels: list[float]


@dataclass(frozen=True)
class PackageResult(Result):
    """An exported model; differences are shares of the score scale, by file."""

    folder: str
    model: str
    model_digest: str
    calibration_id: str
    files: list[str]
    scans: int
    score_difference: dict[str, float]


@dataclass(frozen=True)
class PlanResult(Result):
    """What a dry run would do: counts by description."""

    counts: dict[str, int]


@dataclass(frozen=True)
class Check:
    """One line of `memmc doctor`."""

    name: str
    ok: bool
    found: str
    fix: str = ""


@dataclass(frozen=True)
class DoctorResult(Result):
    """What works on this machine."""

    healthy: bool
    checks: list[Check]


@dataclass(frozen=True)
class DemoResult(Result):
    """The whole way, once."""

    ingest: dict[str, Any]
    model: str
    steps: int
    train_seconds: float
    evaluation: dict[str, Any]
    report: str
    seconds: float
