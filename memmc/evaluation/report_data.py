"""What a report is made of: plain values and arrays, no model, no table.

Every section but the first two may be absent (None, or an empty tuple); the
page then says so instead of leaving it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memmc.evaluation.boxes import BoxFigures
from memmc.evaluation.controls import ControlResult
from memmc.evaluation.metrics import Evaluation, FloatArray, Interval
from memmc.evaluation.operating import RatePoint, SensitivityAt

Label = Literal["normal", "abnormal", "unknown"]
ImageArray = NDArray[np.floating]


@dataclass(frozen=True)
class Provenance:
    """How the report was made.

    Attributes:
        model: "name/version".
        model_digest: 16 hex digits over weights and description.
        dataset_version: version of the `instances` table that the model was trained on.
        preprocess_id: 16 hex digits naming the preparation of pixels.
        config_id: 16 hex digits naming the configuration.
        seeds: seed per step.
        durations_s: wall time per step, s.
        versions: version per package.
        config_text: the whole configuration as text (TOML or JSON).
        tables_read: version of each table that images and labels of the report were read from.
    """

    model: str
    model_digest: str
    dataset_version: int
    preprocess_id: str
    config_id: str
    seeds: Mapping[str, int] = field(default_factory=dict[str, int])
    durations_s: Mapping[str, float] = field(default_factory=dict[str, float])
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    config_text: str | None = None
    tables_read: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class StratumFacts:
    """A stratum whose images are judged by its own held-out normals."""

    stratum: str
    threshold: float
    num_normals: int


@dataclass(frozen=True)
class CalibrationFacts:
    """The thresholds and where they come from.

    Attributes:
        false_positive_rate: the rate that was chosen.
        threshold: pooled: the anomaly score above which an image is flagged whose stratum has none of its own.
        num_normals: held-out normal images of all strata together, behind the pooled threshold.
        map_scale: map value at the top of the colour scale, the same for every image.
        strata: those with a threshold of their own, by name.
    """

    calibration_id: str
    scorer: str
    false_positive_rate: float
    threshold: float
    num_normals: int
    map_scale: float
    strata: tuple[StratumFacts, ...] = ()


@dataclass(frozen=True)
class Case:
    """One image of a gallery.

    Attributes:
        case_id: pseudonymous id, as stored (keyed SOP Instance UID).
        image: (H, W) in [0, 1].
        anomaly_map: (h, w), on the scale of `CalibrationFacts.map_scale`; resampled where its size differs.
        mask: (H, W), true where abnormal, when known.
        score_spread: standard deviation of the score over passes.
    """

    case_id: str
    image: ImageArray
    anomaly_map: ImageArray
    anomaly_score: float
    p_value: float
    is_abnormal: bool
    label: Label
    mask: NDArray[np.bool_] | None = None
    score_spread: float | None = None


@dataclass(frozen=True)
class Reason:
    """Why a scan was flagged.

    Attributes:
        case_id: pseudonymous id, as stored.
        picture: PNG of `memmc explain`.
        p_value: of the scan.
        region_p_value: of its highest region; None where the map shows none.
        shares: the largest parts of the score, by scale, and their shares; empty for a score without such parts.
        nearest: cosine likeness of the most similar patch of a training normal.
    """

    case_id: str
    picture: bytes
    p_value: float
    region_p_value: float | None
    shares: tuple[tuple[str, float], ...]
    nearest: float


@dataclass(frozen=True)
class CaseSelection:
    """Row numbers of the images worth showing, each list in the order of the page."""

    most_abnormal: tuple[int, ...]
    calmest_normals: tuple[int, ...]
    typical_normals: tuple[int, ...]
    missed_abnormals: tuple[int, ...]
    flagged_normals: tuple[int, ...]


@dataclass(frozen=True)
class IngestCount:
    """Objects with one outcome for one reason."""

    outcome: Literal["stored", "duplicate", "excluded", "quarantined"]
    reason: str | None
    count: int


@dataclass(frozen=True)
class MemoryLayer:
    """How one encoder layer uses its memory.

    Attributes:
        layer: from 1.
        attention_mass: share of attention that goes to memory slots, [0, 1].
        slots_used: slots, of all heads, that get more than a negligible share.
        num_slots: slots of all heads.
        entropy: of the attention over the slots of a head, as a share of its maximum: 1 = all alike, 0 = one slot only.
        uniform_mass: attention_mass if slots were like any other token, if known.
    """

    layer: int
    attention_mass: float
    slots_used: int
    num_slots: int
    entropy: float
    uniform_mass: float | None = None


@dataclass(frozen=True)
class ShutOff:
    """The model with a part of it shut off, its score fitted anew on the same normals.

    Attributes:
        loss: AUROC of the whole model minus this one's, on the same images.
        loss_interval: of the loss; patients resampled, the same for both (paired).
    """

    auroc: float
    loss: float
    loss_interval: Interval


@dataclass(frozen=True)
class Ablation:
    """What parts of the model are worth, on a sample of the labelled images.

    Attributes:
        auroc: of the whole model, its score fitted on as many normals as without a part.
        without_memory: memory masked out; None for a model without one.
        last_level_only: all gates but the last level's shut; None for a model with one level.
    """

    num_normal: int
    num_abnormal: int
    auroc: float
    without_memory: ShutOff | None = None
    last_level_only: ShutOff | None = None


@dataclass(frozen=True)
class MemoryHealth:
    """Memory and levels of the model, and what is lost without them.

    Attributes:
        layers: one per encoder layer; empty without slots in the encoder's attention.
        ablation: in AUROC, if measured.
        gates: mean gate of each encoder level the decoder hears, [0, 1]; empty for a single level.
        error: masked error on held-out normals, in standard deviations of the pixels, if measured.
        error_without_memory: the same with the memory masked out, if there is one.
        error_last_level_only: the same with all levels but the last shut off, if there are several.
        bottleneck_slots: slots of a memory behind the last level, of which nothing is measured; 0 = none.
    """

    layers: tuple[MemoryLayer, ...]
    ablation: Ablation | None = None
    gates: tuple[float, ...] = ()
    error: float | None = None
    error_without_memory: float | None = None
    error_last_level_only: float | None = None
    bottleneck_slots: int = 0


@dataclass(frozen=True)
class TrainingCurve:
    """Loss over optimiser steps.

    Attributes:
        steps: (T,) rising.
        losses: (T,) masked reconstruction loss.
        validation_steps: (V,), if measured.
        validation_losses: (V,), if measured.
    """

    steps: ArrayLike
    losses: ArrayLike
    validation_steps: ArrayLike = ()
    validation_losses: ArrayLike = ()


@dataclass(frozen=True)
class GroupResult:
    """The model on one part of the evaluated images.

    Attributes:
        grouping: what divides the images ("lesion", "manufacturer", "view position").
        group: value of this part. For lesions, all normals are compared with the lesion's images.
        num_normal: normal images of the part.
        num_abnormal: abnormal images of the part.
        auroc: None where a class is missing.
        interval: of the AUROC.
        sensitivity: share of abnormals flagged.
        false_positive_rate: share of normals flagged.
    """

    grouping: str
    group: str
    num_normal: int
    num_abnormal: int
    auroc: float | None = None
    interval: Interval | None = None
    sensitivity: float | None = None
    false_positive_rate: float | None = None


@dataclass(frozen=True)
class Localisation:
    """Agreement of maps and lesion masks.

    Attributes:
        num_images: abnormal images with a mask that has a pixel.
        dice: at the calibrated level; None where the calibration names none.
        controls: the same figures, by name, of the maps' values moved elsewhere (`localisation.pixel_figures`).
        num_left_out: masks without a stored pixel, or of images that are not labelled abnormal.
    """

    num_images: int
    pixel_auroc: float
    aupro: float | None = None
    dice: float | None = None
    controls: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict[str, Mapping[str, float | None]])
    num_left_out: int = 0


@dataclass(frozen=True)
class ReportData:
    """Everything on the page.

    Attributes:
        cohort: name of the scored cohort.
        created_at: with a time zone.
        scores: (N,) of all scored images, labelled or not.
        num_flagged: images above the threshold of their stratum.
        num_patients: patients of the scored images.
        evaluation: None where no labels exist or a class is missing.
        controls: of the evaluated images, best first.
        sensitivities: at fixed specificities.
        rates: promised and observed false-positive rates.
        not_scored: instances without a score, by reason code.
        reasons: of the highest flagged scans.
    """

    cohort: str
    created_at: datetime
    provenance: Provenance
    calibration: CalibrationFacts
    scores: FloatArray
    num_flagged: int
    num_patients: int
    title: str = "Anomaly report"
    evaluation: Evaluation | None = None
    controls: tuple[ControlResult, ...] = ()
    localisation: Localisation | None = None
    boxes: BoxFigures | None = None
    groups: tuple[GroupResult, ...] = ()
    sensitivities: tuple[SensitivityAt, ...] = ()
    rates: tuple[RatePoint, ...] = ()
    not_scored: Mapping[str, int] = field(default_factory=dict[str, int])
    reasons: tuple[Reason, ...] = ()
    most_abnormal: tuple[Case, ...] = ()
    calmest_normals: tuple[Case, ...] = ()
    typical_normals: tuple[Case, ...] = ()
    missed_abnormals: tuple[Case, ...] = ()
    flagged_normals: tuple[Case, ...] = ()
    ingest: tuple[IngestCount, ...] = ()
    memory: MemoryHealth | None = None
    training: TrainingCurve | None = None


def select_cases(labels: Sequence[Label], scores: ArrayLike, is_abnormal: ArrayLike, num: int = 6) -> CaseSelection:
    """Choose the rows of each gallery, so that only their pixels need be read.

    Args:
        labels: (N,).
        scores: (N,).
        is_abnormal: (N,), true where flagged.
        num: most rows of one gallery; the most abnormal get one and a half times as many.

    Returns:
        Rows: highest scores; normals with the lowest scores; normals nearest to their median; abnormals that were not
        flagged, lowest first; normals that were, highest first.
    """
    scores_N, flagged_N, labels_N = np.asarray(scores), np.asarray(is_abnormal, dtype=bool), np.asarray(labels)
    rising = np.argsort(scores_N, kind="stable")
    normals = rising[labels_N[rising] == "normal"]
    abnormals = rising[labels_N[rising] == "abnormal"]
    middle = max(0, (len(normals) - num) // 2)
    return CaseSelection(
        most_abnormal=_rows(rising[::-1][: num + num // 2]),
        calmest_normals=_rows(normals[:num]),
        typical_normals=_rows(normals[middle : middle + num]),
        missed_abnormals=_rows(abnormals[~flagged_N[abnormals]][:num]),
        flagged_normals=_rows(normals[flagged_N[normals]][::-1][:num]),
    )


def _rows(indices: NDArray[np.intp]) -> tuple[int, ...]:
    return tuple(int(index) for index in indices)
