"""When to raise an alarm about a model at work."""

from __future__ import annotations

from pydantic import Field

from memmc.config.section import Fraction, Positive, Section


class MonitorConfig(Section):
    """Drift, canaries, golden set, silence; what they cost and catch: infra/benchmarks/drift_power.py."""

    window_days: float = Field(
        default=7.0, gt=0, description="Instances this recent are the window, without --since, days."
    )
    min_window: Positive = Field(default=20, description="A window of fewer patients is not tested for drift.")
    max_images: int = Field(
        default=500, ge=50, description="Images of the window, and of the baseline, looked at at most."
    )
    min_stratum: Positive = Field(
        default=8, description="A scanner with fewer images on either side has no test of its own."
    )
    false_alarm_rate: Fraction = Field(
        default=0.01, description="Probability that a window in which nothing has changed alarms for drift."
    )
    min_effect: Fraction = Field(
        default=0.10, description="Smaller changes are no drift however certain they are; share of images that differ."
    )
    min_flagged_change: Fraction = Field(default=0.05, description="The same for the share of images that are flagged.")
    uniform_above: Fraction = Field(
        default=0.2, description="Only p-values above this are asked to be uniform; abnormal images lie below."
    )
    resamplings: int = Field(
        default=9_999, ge=999, description="Permutations behind a p-value; more than 25 scanners want more."
    )
    seed: int = Field(default=0, ge=0, description="Of permutations, of images drawn and of canaries planted.")
    canary_scans: Positive = Field(default=24, description="Recent normal scans that lesions are planted into.")
    canary_sizes: tuple[Fraction, ...] = Field(
        default=(0.08, 0.14, 0.20), description="Diameters of planted lesions, shares of the image's side."
    )
    canary_contrasts: tuple[float, ...] = Field(
        default=(0.25, 0.5, 1.0), description="Brightness of planted lesions, shares of the image's 10 - 90 % range."
    )
    max_sensitivity_drop: Fraction = Field(
        default=0.10, description="Fall of the canaries' sensitivity below that at promotion that alarms, if certain."
    )
    golden_scans: Positive = Field(default=20, description="Fixed instances scored anew with each batch.")
    golden_tolerance: float = Field(
        default=1e-3, gt=0, description="Difference of a golden score that alarms, share of the score or its scale."
    )
    max_silence_hours: float = Field(default=72.0, gt=0, description="Longer without new instances alarms, h.")
    max_backlog_hours: float = Field(default=24.0, gt=0, description="An instance unscored for longer alarms, h.")
    max_model_age_days: float = Field(default=365.0, gt=0, description="An older champion alarms, days.")
    quarantine_factor: float = Field(
        default=2.0, gt=1, description="Rise of the quarantined share over that of before that alarms, if certain."
    )
