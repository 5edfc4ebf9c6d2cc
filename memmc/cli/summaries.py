"""What a verb prints for a person when it is done."""

from __future__ import annotations

from memmc.pipeline.results import (
    CalibrationResult,
    DemoResult,
    DoctorResult,
    EvaluationResult,
    IngestResult,
    PlanResult,
    ScoreResult,
    TrainResult,
)


def ingest(result: IngestResult) -> str:
    """Counts by outcome, then by reason."""
    lines = [
        f"{result.seen} objects: {result.stored} stored, {result.duplicate} duplicate, {result.excluded} excluded, "
        f"{result.quarantined} quarantined (table version {result.version}, {result.seconds:.0f} s)"
    ]
    lines += [f"  {count:6d}  {reason}" for reason, count in sorted(result.reasons.items(), key=lambda item: -item[1])]
    if result.pending:
        lines.append(f"  {result.pending:6d}  left for a later run: something still arrives in their study")
    return "\n".join(lines)


def train(result: TrainResult) -> str:
    """The model and how it came to be."""
    lines = [
        f"{result.model} ({result.model_digest}): {result.steps} steps on {result.num_images} normal images, "
        f"loss {result.loss:.4f}, {result.train_seconds / 60:.1f} min"
    ]
    if result.flags:
        kept_out = ", ".join(f"{count} {flag}" for flag, count in result.flags.items())
        lines.append(f"the quality gate keeps images of the cohort out: {kept_out}")
    if result.calibration:
        lines.append(calibrate(CalibrationResult(**result.calibration)))
    return "\n".join(lines)


def calibrate(result: CalibrationResult) -> str:
    """The threshold and what it stands on; then the other rates, and the strata with normals of their own."""
    lines = [
        f"calibrated on {result.num_normals} normal images of {result.num_patients} patients: {result.scorer} above "
        f"{result.threshold:.4g} is abnormal at a false-positive rate of {result.false_positive_rate:.1%}"
    ]
    lines += [
        f"  {item['rate']:6.1%}  above {item['threshold']:.4g}  (true rate {item['low']:.1%} - {item['high']:.1%})"
        for item in result.thresholds
        if item["refused"] is None
    ]
    lines += [
        f"  {stratum['stratum']}: {stratum['refused'] or 'its own ' + str(stratum['num_normals']) + ' normal images'}"
        for stratum in result.strata
    ]
    return "\n".join(lines)


def score(result: ScoreResult) -> str:
    """Counts and rate."""
    without = f", {result.not_scored} without a score (`memmc scores` says why)" if result.not_scored else ""
    without += f", {result.left} left for a later run: operate.window is closed" if result.left else ""
    return (
        f"{result.instances} instances: {result.scored} scored, {result.already_scored} already scored "
        f"by {result.model}{without}; {result.abnormal} abnormal ({result.images_per_second:.0f} images/s)"
    )


def evaluate(result: EvaluationResult) -> str:
    """Quality beside the controls."""
    lines = [
        f"{result.model} on {result.num_normal} normal and {result.num_abnormal} abnormal images of unseen patients",
        f"  AUROC              {result.auroc:.3f}  ({result.auroc_low:.3f} - {result.auroc_high:.3f})",
        f"  average precision  {result.average_precision:.3f}  "
        f"({result.average_precision_low:.3f} - {result.average_precision_high:.3f})",
        f"  false positives    {result.false_positive_rate:.1%}  "
        f"({result.false_positive_rate_low:.1%} - {result.false_positive_rate_high:.1%}), "
        f"chosen {result.chosen_false_positive_rate:.1%}; sensitivity {result.sensitivity:.1%}",
    ]
    lines += [
        f"  at specificity {item['specificity']:.0%}  sensitivity {item['sensitivity']:.1%}  "
        f"({item['interval']['low']:.1%} - {item['interval']['high']:.1%})"
        for item in result.sensitivity_at
    ]
    if result.pixel_auroc is not None:
        lines.append(f"  pixel AUROC        {result.pixel_auroc:.3f}")
    if result.boxes is not None:
        lines.append(
            f"  top region         finds a box in {result.boxes['hit_rate']:.1%} of images; a random box of its size "
            f"{result.boxes['hit_rate_random_box']:.1%}, one in the middle {result.boxes['hit_rate_centre_prior']:.1%}"
        )
    lines += [f"  without a model    {value:.3f}  {name}" for name, value in sorted(result.controls.items())]
    return "\n".join(lines)


def plan(result: PlanResult) -> str:
    """What a dry run found."""
    return "\n".join(f"  {count:8d}  {what}" for what, count in result.counts.items())


def doctor(result: DoctorResult) -> str:
    """One line a check; the fix below each that failed."""
    lines: list[str] = []
    for check in result.checks:
        lines.append(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<22} {check.found}")
        if not check.ok:
            lines.append(f"      fix: {check.fix}")
    return "\n".join(lines)


def demo(result: DemoResult) -> str:
    """Five lines, the report's path last."""
    quality, account = result.evaluation, result.ingest
    return "\n".join(
        [
            f"ingest    {account['seen']} objects: {account['stored']} stored, {account['duplicate']} duplicate, "
            f"{account['excluded']} excluded, {account['quarantined']} quarantined",
            f"train     {result.model}: {result.steps} steps in {result.train_seconds:.0f} s",
            f"detect    AUROC {quality['auroc']:.3f} ({quality['auroc_low']:.3f} - {quality['auroc_high']:.3f}), "
            f"best control {max(quality['controls'].values()):.3f}; pixel AUROC {quality['pixel_auroc']:.3f}",
            f"threshold chosen false-positive rate {quality['chosen_false_positive_rate']:.0%}, observed "
            f"{quality['false_positive_rate']:.1%}, sensitivity {quality['sensitivity']:.0%}",
            f"report    {result.report}   ({result.seconds:.0f} s in all)",
        ]
    )
