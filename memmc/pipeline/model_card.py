"""The model card: what a model is for, what it learned from, how it was judged and where it ends.

It stands in the model's run as ``card/model_card.md`` and ``.json``, and as the description of its version in the
registry. Each evaluation is added to it; a later calibration takes the place of the one before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from memmc import __version__
from memmc.config import Config
from memmc.errors import StorageError
from memmc.pipeline.audit import head_of
from memmc.pipeline.models import OpenModel
from memmc.pipeline.results import CalibrationResult, EvaluationResult
from memmc.registry.tracking import Tracking

FOLDER, NAME = "card", "model_card"
FORMAT = 1
_FIGURES = (
    "auroc",
    "auroc_low",
    "auroc_high",
    "average_precision",
    "sensitivity",
    "false_positive_rate",
    "chosen_false_positive_rate",
    "num_normal",
    "num_abnormal",
    "calibration_id",
)
_USE = {
    "purpose": "Finds radiographs that are unlike the normal ones it learned from, with a score, a p-value and a map.",
    "users": "Researchers who can judge the images themselves.",
    "not_for": "Diagnosis, triage or any other decision about a patient: research software, not a medical device.",
}
_LIMITS = (
    "It knows what is usual in its cohort, not what is disease: rare and harmless looks abnormal, common disease does "
    "not.",
    "Images of another body part, view, scanner or preparation than its cohort's are outside of what it was judged on.",
    "A threshold keeps its false-positive rate only on patients like those it was calibrated on.",
)


def build_card(
    config: Config,
    model: OpenModel,
    data: Mapping[str, Any],
    figures: Mapping[str, Any],
    calibration: CalibrationResult,
) -> dict[str, Any]:
    """Return the card of a model that was trained and calibrated just now.

    Args:
        config: it was trained with.
        model: the registered one.
        data: counts of what it learned from.
        figures: what training measured at its end.
        calibration: its thresholds.
    """
    info = model.info
    return {
        "format": FORMAT,
        "model": model.ref,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "intended_use": _USE,
        "data": {"cohort": model.cohort, "dataset_version": model.dataset_version, **data},
        "training": {
            "preset": config.train.preset,
            **{name: info[name] for name in ("image_size", "channels", "steps", "train_seconds", "seed")},
            **{name: value for name, value in figures.items() if isinstance(value, int | float)},
        },
        "calibration": calibration.as_dict(),
        "evaluations": {},
        "limits": _limits(calibration),
        "stamps": {
            "model_digest": model.digest,
            "preprocess_id": model.preprocess_id,
            "config_id": config.config_id,
            "calibration_id": calibration.calibration_id,
            "memmc": __version__,
            "audit_head": head_of(config),
        },
    }


def publish_card(tracking: Tracking, model: OpenModel, card: Mapping[str, Any]) -> None:
    """Write the card into the model's run, and as the description of its version."""
    if model.run_id is None:
        return
    text = as_markdown(card)
    written = {f"{NAME}.md": text, f"{NAME}.json": json.dumps(card, indent=1, sort_keys=True)}
    tracking.log_text(model.run_id, written, FOLDER)
    name, _, version = model.ref.rpartition("/")
    tracking.describe_version(model.run_id, name, version, text)


def add_evaluation(tracking: Tracking, model: OpenModel, measured: EvaluationResult) -> bool:
    """Add an evaluation to a model's card, in place of an older one on the same cohort; False where there is no card.

    Raises:
        StorageError: the store cannot be reached.
    """
    card = read_card(tracking, model)
    if card is None:
        return False
    found = {name: getattr(measured, name) for name in _FIGURES}
    found |= {"controls": measured.controls, "measured_at": datetime.now(UTC).isoformat(timespec="seconds")}
    publish_card(tracking, model, {**card, "evaluations": {**card["evaluations"], measured.cohort: found}})
    _sent(tracking)
    return True


def set_calibration(tracking: Tracking, model: OpenModel, calibration: CalibrationResult) -> bool:
    """Show another calibration on a model's card, in place of the one before; False where there is no card.

    Evaluations stay, each with the calibration that it was measured with.

    Raises:
        StorageError: the store cannot be reached.
    """
    card = read_card(tracking, model)
    if card is None:
        return False
    changed = {"calibration": calibration.as_dict(), "limits": _limits(calibration)}
    changed["stamps"] = {**card["stamps"], "calibration_id": calibration.calibration_id}
    publish_card(tracking, model, {**card, **changed})
    _sent(tracking)
    return True


def _limits(calibration: CalibrationResult) -> list[str]:
    refused = [f"{item['stratum']}: {item['refused']}" for item in calibration.strata if item.get("refused")]
    return [*_LIMITS, *(f"No threshold of its own for {text}" for text in refused)]


def _sent(tracking: Tracking) -> None:
    if not tracking.flush():
        raise StorageError(f"the tracking store {tracking.place} does not answer; the card is sent when it does")


def read_card(tracking: Tracking, model: OpenModel) -> dict[str, Any] | None:
    """Return a model's card, or None where its run has none.

    Raises:
        StorageError: the store cannot be reached.
    """
    if model.run_id is None:
        return None
    text = tracking.read_text(model.run_id, f"{FOLDER}/{NAME}.json")
    return None if text is None else json.loads(text)


def as_markdown(card: Mapping[str, Any]) -> str:
    """Return the card for a reader."""
    use, data, calibration = card["intended_use"], card["data"], card["calibration"]
    lines = [
        f"# {card['model']}",
        f"> {use['not_for']}",
        "## Intended use",
        f"{use['purpose']} For: {use['users']}",
        "## Data",
        *_rows(data),
        "## Training",
        *_rows(card["training"]),
        "## Thresholds",
        f"Calibration {calibration['calibration_id']}, scorer {calibration['scorer']}: {calibration['num_normals']} "
        f"held-out normal images of {calibration['num_patients']} patients.",
        "| false-positive rate | threshold |",
        "|---|---|",
        *(f"| {item['rate']} | {_shown(item.get('threshold'))} |" for item in calibration["thresholds"]),
        "## Figures",
        *_evaluations(card["evaluations"]),
        "## Limits",
        *(f"- {text}" for text in card["limits"]),
        "## Stamps",
        *_rows(card["stamps"]),
    ]
    spaced = [f"\n{line}\n" if line.startswith("#") else line for line in lines]
    return "\n".join(spaced).strip() + "\n"


def _evaluations(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not evaluations:
        return ["Not measured on labelled images yet: `memmc evaluate` adds them here."]
    return [
        f"- {cohort}: AUROC {found['auroc']:.3f} ({found['auroc_low']:.3f} to {found['auroc_high']:.3f}), sensitivity "
        f"{found['sensitivity']:.3f} at an observed false-positive rate of {found['false_positive_rate']:.3f} "
        f"(promised {found['chosen_false_positive_rate']}); {found['num_normal']} normal and "
        f"{found['num_abnormal']} abnormal images of patients it never met"
        for cohort, found in sorted(evaluations.items())
    ]


def _rows(values: Mapping[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {_shown(value)} |" for name, value in values.items())]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items()) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
