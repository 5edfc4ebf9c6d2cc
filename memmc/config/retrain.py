"""When a model is trained anew, and what it must show before it takes the champion's place."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from memmc.config.section import Fraction, Positive, Section


class PromoteConfig(Section):
    """Gates between a trained model and the alias `champion`."""

    confidence: Fraction = Field(
        default=0.95, description="Of every interval that a gate looks at; a loss is refused when it is this certain."
    )
    max_auroc_loss: float = Field(
        default=0.02,
        ge=0,
        lt=1,
        description="Accepted loss in AUROC on labelled studies against the champion [choice].",
    )
    min_auroc: Fraction = Field(
        default=0.55, description="Least AUROC of a model that has no champion before it [choice]."
    )
    min_labelled: Positive = Field(
        default=10, description="Labelled studies of each class without which AUROC is not judged [choice]."
    )
    max_sensitivity_loss: float = Field(
        default=0.05, ge=0, lt=1, description="Accepted loss in sensitivity to planted lesions [choice]."
    )
    min_sensitivity: float = Field(
        default=0.10,
        ge=0,
        lt=1,
        description="Least sensitivity to planted lesions, beside a champion too: a model that flags no more than a "
        "share of normals finds nothing [choice].",
    )
    probes: Positive = Field(default=200, description="Held-out normal images that get a planted lesion, at most.")
    min_probes: Positive = Field(
        default=20,
        description="Held-out normal images without which planted lesions and false positives are not judged [choice].",
    )
    min_slots_used: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Least share of memory slots in use in the layer that uses its memory best [choice].",
    )
    max_error_ratio: float = Field(
        default=0.9,
        gt=0,
        description="Masked error over that of guessing the mean grey everywhere; a model that has learned "
        "no more than the mean stands at 1 [choice].",
    )
    max_changed: Fraction = Field(
        default=0.20, description="Share of studies that may change side from the champion's verdict [choice]."
    )
    parity: tuple[Literal["torch", "onnx"], ...] = Field(
        default=("torch",), description="Export formats that must score as the lake does; none when empty."
    )
    max_slowdown: float = Field(
        default=1.5, ge=1, description="Accepted scoring time over the champion's, measured in turns on this machine."
    )
    approval: Literal["none", "person"] = Field(
        default="none", description="Whether a named person must agree before the alias moves."
    )
    two_people: bool = Field(
        default=True, description="Whoever began the training run may not approve it (with promote.approval = person)."
    )
    approval_hours: float = Field(
        default=72.0, gt=0, description="Time a flow that a command started waits for that person, h."
    )


class RetrainConfig(Section):
    """When `memmc retrain` trains, and which new normals it believes."""

    min_new_patients: Positive = Field(
        default=200, description="New normal patients in the training share that are reason enough [choice]."
    )
    min_new_share: Fraction = Field(
        default=0.20, description="The same as a share of the patients the champion learned from [choice]."
    )
    max_age_days: float = Field(
        default=180.0, gt=0, description="Age of the champion's training that is reason enough, days [choice]."
    )
    on_drift: bool = Field(default=True, description="Whether drift of the cohort is reason enough.")
    cooldown_days: float = Field(
        default=7.0, ge=0, description="No training sooner after the last one, whatever the reason, days [choice]."
    )
    start: Literal["champion", "scratch"] = Field(
        default="champion", description="Begin with the champion's weights, or with random ones."
    )
    screen: bool = Field(
        default=True, description="Whether the champion looks at new normals first; suspects wait for a person."
    )
    screen_p_value: Fraction = Field(
        default=0.01,
        description="A new normal whose p-value is at most this, or the smallest that the champion's calibration can "
        "tell, is suspect; about this share of true normals is, too [choice].",
    )
