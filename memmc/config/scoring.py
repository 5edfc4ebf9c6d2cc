"""Scores, their calibration and their evaluation."""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import Field, model_validator

from memmc.config.section import Fraction, Positive, Section

ScorerName = Literal[
    "residual_whole_or_peak",
    "residual_statistics",
    "residual_peak",
    "l1",
    "mse",
    "ssim",
    "ms_ssim",
    "gms",
    "pasted_ms_ssim",
]

StratumColumn = Literal[
    "modality", "manufacturer", "manufacturer_model", "view_position", "body_part", "laterality", "patient_sex"
]

PAPER_PASSES = 10
"""Random masks per image in Tian et al., arXiv:2203.11725."""


class ScoreConfig(Section):
    """How an image is scored."""

    scorer: ScorerName = Field(
        default="residual_whole_or_peak",
        description="residual_statistics judges the whole image, residual_peak its oddest place, the default the more "
        "unusual of the two. All take complementary masks but pasted_ms_ssim, the paper's: random masks, the "
        "predictions pasted into the image, 1 - MS-SSIM averaged over the passes.",
    )
    passes: Positive = Field(
        default=4,
        description="Forward passes per image, a multiple of 1 / (1 - mask_ratio) (complementary masks) [choice]; "
        "with pasted_ms_ssim 10, as in the paper, unless given.",
    )
    early_stop: float = Field(
        default=0.0,
        ge=0,
        le=0.2,
        description="End the passes of an image when its verdict is certain; of normals at most this share may get "
        "another verdict than all passes give. Fixed by calibration; 0 = every image gets all passes.",
    )
    batch_size: int = Field(
        default=0, ge=0, description="Images judged together; found by each actor at its start when 0."
    )
    commit_seconds: float = Field(
        default=30.0, gt=0, description="Time between commits of scores; a kill costs at most what was done since, s."
    )
    rows_per_shard: Positive = Field(
        default=1024, description="Scores written together, at most; large maps lower it further."
    )
    num_actors: Positive = Field(default=2, description="Scoring actors.")
    grid: Positive = Field(default=8, description="Side of the coarse grid of residual features, cells [choice].")
    components: Positive = Field(default=16, description="Principal components of the residual statistics [choice].")

    @model_validator(mode="before")
    @classmethod
    def _passes_of_the_paper(cls, given: Any) -> Any:
        if isinstance(given, dict) and cast(dict[str, Any], given).get("scorer") == "pasted_ms_ssim":
            return {"passes": PAPER_PASSES, **cast(dict[str, Any], given)}
        return given

    @model_validator(mode="after")
    def _paper_mode_is_whole(self) -> ScoreConfig:
        if self.early_stop and self.scorer == "pasted_ms_ssim":
            raise ValueError("score.early_stop needs complementary masks; score.scorer = pasted_ms_ssim has none")
        return self


class CalibrateConfig(Section):
    """Thresholds from normals alone."""

    false_positive_rate: Fraction = Field(
        default=0.05, description="Share of normal patients' images to be flagged at most."
    )
    min_normals: Positive = Field(default=20, description="Fewer held-out normal images refuse a calibration.")
    rates: tuple[Fraction, ...] = Field(
        default=(0.01, 0.05, 0.10),
        description="Further false-positive rates whose thresholds, with intervals, are kept beside the chosen one.",
    )
    strata: tuple[StratumColumn, ...] = Field(
        default=("manufacturer", "manufacturer_model", "view_position"),
        description="Columns of `instances`; images that agree in all of them are judged by their own normals.",
    )
    min_stratum_normals: Positive = Field(
        default=100, description="A stratum with fewer held-out normal images is judged by the pooled ones [choice]."
    )
    region_rate: Fraction = Field(
        default=0.05, description="Share of normal images whose map may show a region; it sets the maps' level."
    )


class EvaluateConfig(Section):
    """Evaluation."""

    bootstrap: Positive = Field(default=1000, description="Patient-bootstrap resamplings.")
    confidence: Fraction = 0.95
    seed: int = Field(default=0, ge=0)
    ablation_images: int = Field(
        default=48,
        ge=0,
        description="Labelled images of each kind on which the report measures the model without its memory and with "
        "its last level alone; 0 = not measured.",
    )
