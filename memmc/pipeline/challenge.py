"""What the gates look at: challenger and champion on the same held-out images of a cohort."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memmc.config import Config
from memmc.errors import DataError, GateRefused, MissingClassError
from memmc.evaluation import gates
from memmc.evaluation.comparison import AurocDifference
from memmc.evaluation.gates import Area, Gate
from memmc.evaluation.metrics import Interval, auroc, patient_bootstrap
from memmc.lake.tables import Lake
from memmc.pipeline.compare import CompareResult, compare
from memmc.pipeline.images import read_pixels
from memmc.pipeline.models import OpenModel
from memmc.pipeline.package import write_package
from memmc.pipeline.progress import Progress
from memmc.pipeline.quality import flags_of
from memmc.pipeline.score import score_all
from memmc.pipeline.select import met_patients, newest_calibration, one_a_patient, score_rows, unmet
from memmc.scoring.calibration import observed_rate_interval
from memmc.scoring.strata import judge_of

if TYPE_CHECKING:
    from memmc.pipeline.probing import Judged

_PARITY_IMAGES = 16
_FEWEST = 4  # images without which not even an export can be tried


@dataclass(frozen=True)
class Case:
    """A challenger before the gates.

    Attributes:
        cohort: whose images judge.
        champion: None where there is none to compare with.
        why_alone: why a champion that is there cannot be compared with.
    """

    cohort: str
    challenger: OpenModel
    champion: OpenModel | None
    why_alone: str = ""

    @property
    def models(self) -> list[OpenModel]:
        """Challenger first."""
        return [self.challenger, *([self.champion] if self.champion else [])]


def measure(config: Config, lake: Lake, case: Case, progress: Progress) -> list[Gate]:
    """Return every gate, measured.

    Images that a model has not scored yet are scored, and their scores kept.

    Raises:
        DataError: hardly any held-out normals, a model is not calibrated, or scores are missing and `operate.window` is
            closed.
        PreprocessMismatch: the cohort's pixels were prepared otherwise than the models'.
    """
    rules = config.promote
    ref = case.challenger.ref
    progress.message(f"{ref} against {case.champion.ref}" if case.champion else f"{ref}, no champion {case.why_alone}")
    compared = _compare(config, case, progress)
    if compared is None:
        score_all(config, case.cohort, ref, progress=progress)
    rows = held_out_normals(lake, case)
    return [
        gates.labelled_gate(_alone(config, lake, case), _difference(compared), rules),
        _false_positives(config, lake, case, rows),
        gates.migration_gate(
            compared.num_flagged if compared else 0,
            compared.num_cleared if compared else 0,
            compared.num_studies if compared else 0,
            rules,
            unjudged=compared.unjudged if compared else "no champion has judged these studies",
        ),
        *_probe(config, lake, case, rows[: rules.probes], progress),
    ]


def held_out_normals(lake: Lake, case: Case) -> list[dict[str, Any]]:
    """Return the normals of patients that neither model met and the quality gate lets pass, in a drawn order.

    Raises:
        DataError: fewer than an export can be tried on.
    """
    columns = ["sop_instance_uid", "patient_key", "preprocess_id"]
    for model in case.models:
        columns += [name for name in newest_calibration(lake, model)["strata_columns"] or () if name not in columns]
    where = {"cohort": case.cohort, "outcome": "stored", "label": "normal"}
    met = set[str]().union(*(met_patients(lake, model) for model in case.models))
    flagged = flags_of(lake, case.cohort)
    stored = lake.instances_with_labels(columns, None, where).to_pylist()
    rows = [row for row in stored if row["patient_key"] not in met and row["sop_instance_uid"] not in flagged]
    if len(rows) < _FEWEST:
        raise DataError(
            f"cohort '{case.cohort}' has {len(rows)} normal images of patients that the models have not met, at least "
            f"{_FEWEST} are needed; raise split.test, or name a cohort of other patients"
        )
    case.challenger.require({str(row["preprocess_id"]) for row in rows})
    return sorted(rows, key=lambda row: row["sop_instance_uid"])  # keyed, so their order is a draw


def _compare(config: Config, case: Case, progress: Progress) -> CompareResult | None:
    if case.champion is None:
        return None
    settings = config.evaluate.model_copy(update={"confidence": config.promote.confidence})
    with_confidence = config.model_copy(update={"evaluate": settings})
    return compare(with_confidence, case.champion.ref, case.challenger.ref, case.cohort, progress=progress)


def _difference(compared: CompareResult | None) -> AurocDifference | None:
    if compared is None or compared.quality is None:
        return None
    values: dict[str, Any] = {**compared.quality, "interval": Interval(**compared.quality["interval"])}
    return AurocDifference(**values)


def _alone(config: Config, lake: Lake, case: Case) -> Area | None:
    """Return the challenger's AUROC on labelled images of patients it has not met."""
    calibration = newest_calibration(lake, case.challenger)["calibration_id"]
    try:
        known = unmet(lake, case.challenger, case.cohort)
    except MissingClassError:
        return None
    scores = score_rows(lake, case.cohort, case.challenger, calibration)
    rows = [row for row in known if row["sop_instance_uid"] in scores]
    labels = [row["label"] == "abnormal" for row in rows]
    if not any(labels) or all(labels):
        return None
    values = [float(scores[row["sop_instance_uid"]]["anomaly_score"]) for row in rows]
    patients = [row["patient_key"] for row in rows]
    settings = config.evaluate
    interval = patient_bootstrap(
        labels, values, patients, auroc, settings.bootstrap, config.promote.confidence, settings.seed
    )
    return Area(auroc(labels, values), interval, len(labels) - sum(labels), sum(labels))


def _false_positives(config: Config, lake: Lake, case: Case, rows: Sequence[dict[str, Any]]) -> Gate:
    calibration = newest_calibration(lake, case.challenger)
    scores = score_rows(lake, case.cohort, case.challenger, calibration["calibration_id"])
    mine = [scores[row["sop_instance_uid"]] for row in one_a_patient(rows) if row["sop_instance_uid"] in scores]
    rate, confidence = calibration["false_positive_rate"], config.promote.confidence
    fewest = judge_of(calibration).fewest_normals([row["stratum"] for row in mine], rate)
    promised = observed_rate_interval(fewest, rate, max(len(mine), 1), confidence)
    flagged = sum(bool(row["is_abnormal"]) for row in mine)
    return gates.false_positive_gate(flagged, len(mine), promised, rate, config.promote)


def _probe(config: Config, lake: Lake, case: Case, rows: Sequence[dict[str, Any]], progress: Progress) -> list[Gate]:
    """Return the gates that are measured in this process: planted lesions, learning, memory, speed, parity."""
    from memmc.pipeline import probing

    rules, settings = config.promote, config.evaluate
    progress.stage("planted lesions", len(rows))
    rate = newest_calibration(lake, case.challenger)["false_positive_rate"]
    judged = [probing.Judged.open(config, lake, model, rate) for model in case.models]
    images = probing.read_normals(lake, case.cohort, rows)
    lesions = probing.planted(images, config.monitor)
    found = [item.flags(lesions, rows) for item in judged]
    seconds = probing.seconds_in_turns(judged, images, [row["sop_instance_uid"] for row in rows])
    return [
        gates.sensitivity_gate(
            found[0],
            found[1] if len(found) > 1 else None,
            [row["patient_key"] for row in rows],
            rules,
            resamplings=settings.bootstrap,
            seed=settings.seed,
        ),
        gates.learning_gate(*probing.hidden_errors(judged[0], images), rules),
        gates.memory_gate(probing.slots_used(judged[0], images), rules),
        gates.speed_gate(seconds[0], seconds[1] if len(seconds) > 1 else None, probing.timed(images), rules),
        _parity(config, lake, case, judged[0], rows[:_PARITY_IMAGES], progress),
    ]


def _parity(
    config: Config, lake: Lake, case: Case, judged: Judged, rows: Sequence[dict[str, Any]], progress: Progress
) -> Gate:
    from memmc.scoring.exported import SCORE_TOLERANCE
    from memmc.scoring.whole import head_of

    formats = config.promote.parity
    if not formats:
        return gates.parity_gate({}, SCORE_TOLERANCE, None)
    if head_of(judged.scorer) is None:
        why = f"scorer {judged.scorer.name} has no exportable form, promote.parity asks for {', '.join(formats)}"
        return gates.parity_gate({}, SCORE_TOLERANCE, None, why)
    if judged.calibration["early_stop"] is not None:
        why = "the calibration ends passes early (score.early_stop), which an exported scorer cannot"
        return gates.parity_gate({}, SCORE_TOLERANCE, None, why)
    uids = [row["sop_instance_uid"] for row in rows]
    pixels = read_pixels(lake, case.cohort, uids)
    calibration = dict(judged.calibration)
    with tempfile.TemporaryDirectory(prefix="memmc-parity-") as folder:
        try:
            written = write_package(
                case.challenger, calibration, judged.passes, pixels, uids, Path(folder, "export"), formats, progress
            )
        except GateRefused as refused:
            return gates.parity_gate({}, SCORE_TOLERANCE, str(refused))
    return gates.parity_gate(written.score_difference, SCORE_TOLERANCE, None)
