"""What a reader of the report must not overlook, said in words by fixed rules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from memmc.evaluation.controls import CONTROL_TITLES
from memmc.evaluation.metrics import Interval
from memmc.evaluation.report_data import Ablation, ReportData, ShutOff

FEW_ABNORMAL = 30  # images
FEW_CALIBRATION_NORMALS = 100  # images
QUARANTINE_SHARE = 0.05
IDLE_MEMORY = 0.01  # attention mass


@dataclass(frozen=True)
class Finding:
    """One sentence or two for the top of the page.

    Attributes:
        level: good, caution (limits what may be concluded) or problem (something is probably wrong).
    """

    level: Literal["good", "caution", "problem"]
    title: str
    text: str


def findings(data: ReportData) -> list[Finding]:
    """Return what stands out in a report, problems first."""
    found = [*_separation(data), *_false_positives(data), *_memory(data), *_data(data)]
    return sorted(found, key=lambda finding: ("problem", "caution", "good").index(finding.level))


def interval_text(interval: Interval) -> str:
    """Return "0.71 to 0.82", with three decimals."""
    return f"{interval.low:.3f} to {interval.high:.3f}"


def _separation(data: ReportData) -> Iterator[Finding]:
    evaluation = data.evaluation
    if evaluation is None:
        yield Finding(
            "caution",
            "Not evaluated",
            "No labels of both kinds: the scores rank scans, and how well they do is unknown.",
        )
        return
    if evaluation.auroc < 0.5:
        yield Finding(
            "problem", "Scores point the wrong way", "Abnormal scans score lower than normal ones: AUROC is below 0.5."
        )
    if evaluation.num_abnormal < FEW_ABNORMAL or evaluation.num_normal < FEW_ABNORMAL:
        yield Finding(
            "caution",
            "Few images",
            f"{evaluation.num_normal} normal and {evaluation.num_abnormal} abnormal images: the intervals are wide.",
        )
    if evaluation.auroc_interval.high - evaluation.auroc_interval.low < 1e-9:
        yield Finding(
            "caution",
            "Interval without width",
            "No resampling of these patients changes the AUROC. That is a sign of few or easy images, not certainty.",
        )
    yield _against_controls(data)


def _against_controls(data: ReportData) -> Finding:
    if not data.controls:
        return Finding(
            "caution",
            "No controls",
            "The controls without a model were not run: a trivial feature of the images might do as well.",
        )
    best = max(data.controls, key=lambda control: control.auroc)
    title = CONTROL_TITLES.get(best.name, best.name)
    lead = f"The best control without a model is {title} with AUROC {best.auroc:.3f}"
    gain = f"{best.gain:+.3f} ({interval_text(best.gain_interval)})"
    if best.gain <= 0:
        return Finding(
            "problem",
            "Does not beat a control",
            f"{lead}; the model's gain is {gain}. The scores may follow the view or the scanner rather than disease.",
        )
    if best.gain_interval.low <= 0:
        return Finding("caution", "Lead over controls uncertain", f"{lead}; the model's gain is {gain}.")
    return Finding("good", "Beats every control", f"{lead}; the model's gain is {gain}.")


def _false_positives(data: ReportData) -> Iterator[Finding]:
    chosen, calibration = data.calibration.false_positive_rate, data.calibration
    if calibration.num_normals < FEW_CALIBRATION_NORMALS:
        threshold = "pooled threshold" if calibration.strata else "threshold"
        yield Finding(
            "caution",
            "Few calibration scans",
            f"The {threshold} rests on {calibration.num_normals} held-out normal "
            f"images; its p-values cannot fall below {1 / (calibration.num_normals + 1):.3f}.",
        )
    point = next((item for item in data.rates if math.isclose(item.nominal, chosen)), None)
    if point is None:
        return
    text = (
        f"{point.observed:.1%} of {point.num_normal} normal images are flagged, {chosen:.1%} chosen; a threshold set "
        f"on {calibration.num_normals} normals flags {point.expected.low:.1%} to {point.expected.high:.1%} of so many "
        "others like them."
    )
    if not point.holds:
        yield Finding(
            "problem", "More false alarms than chosen", f"{text} These normals differ from those of the calibration."
        )
    elif point.observed < point.expected.low - 1e-12:
        yield Finding("caution", "Fewer false alarms than chosen", f"{text} A fresh calibration may find more.")
    else:
        yield Finding("good", "False alarms as chosen", text)


def _memory(data: ReportData) -> Iterator[Finding]:
    if data.memory is None:
        return
    layers = data.memory.layers
    idle = [layer.layer for layer in layers if layer.attention_mass < IDLE_MEMORY]
    if layers and len(idle) == len(layers):
        yield Finding(
            "caution", "Memory is ignored", f"No layer gives its memory more than {IDLE_MEMORY:.0%} of the attention."
        )
    ablation = data.memory.ablation
    if ablation is not None and ablation.without_memory is not None:
        yield _ablation("Memory", "the memory", ablation, ablation.without_memory)
    if ablation is not None and ablation.last_level_only is not None:
        yield _ablation("Hearing all levels", "all levels", ablation, ablation.last_level_only)


def _ablation(what: str, part: str, ablation: Ablation, shut: ShutOff) -> Finding:
    text = (
        f"On {ablation.num_normal} + {ablation.num_abnormal} images AUROC is {ablation.auroc:.3f} with {part} and "
        f"{shut.auroc:.3f} without, difference {shut.loss:+.3f} ({interval_text(shut.loss_interval)})."
    )
    if shut.loss_interval.high < 0:
        return Finding("problem", f"{what} harms", text)
    if shut.loss_interval.low <= 0:
        return Finding("caution", f"{what} adds nothing measurable", text)
    return Finding("good", f"{what} contributes", text)


def _data(data: ReportData) -> Iterator[Finding]:
    seen = sum(row.count for row in data.ingest)
    quarantined = sum(row.count for row in data.ingest if row.outcome == "quarantined")
    if seen and quarantined / seen > QUARANTINE_SHARE:
        yield Finding(
            "caution",
            "Many objects quarantined",
            f"{quarantined:,} of {seen:,} objects ({quarantined / seen:.1%}) could not be used; "
            "the reasons stand below.",
        )
