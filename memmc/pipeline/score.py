"""Score: every stored instance of a cohort, once per model and calibration; the others get a row that says why not."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from memmc.config import Config
from memmc.errors import DataError
from memmc.lake.schemas import SCORES
from memmc.lake.shards import ShardFile, write_shard
from memmc.lake.tables import Lake
from memmc.lake.vacuum import lease
from memmc.lake.views import find_view, members
from memmc.pipeline.audit import recorded
from memmc.pipeline.cluster import ray_cluster
from memmc.pipeline.identity import home_directory
from memmc.pipeline.models import OpenModel, fit_of, open_model
from memmc.pipeline.placement import place_scoring
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.quality import gate
from memmc.pipeline.results import PlanResult, ScoreResult
from memmc.pipeline.score_ledger import ScoreLedger
from memmc.pipeline.score_plan import ScorePlan, Unit, plan_scores
from memmc.pipeline.select import newest_calibration
from memmc.pipeline.window import Shift, Window
from memmc.scoring.actor import ScoringJob, complete, model_files
from memmc.scoring.bulk import score_columns, score_shards, stream_to_actors
from memmc.scoring.early_stop import StopRule
from memmc.scoring.regions import region_judge
from memmc.scoring.strata import judge_of

_ROWS_PER_LEG = 50_000  # after which a run looks at what others have scored meanwhile


def preview(
    config: Config, cohort: str, model: str | None = None, *, since: str | None = None, limit: int | None = None
) -> PlanResult:
    """Say what `score` would score."""
    lake = Lake(config.lake.uri)
    opened = open_model(config, home_directory(), model, cohort)
    calibration = newest_calibration(lake, opened)
    counts = Counter[str]()
    for base, only in _shares(lake, cohort):
        left = None if limit is None else limit - counts["to score"]
        plan = plan_scores(lake, base, _ledger(lake, base, opened, calibration), since, left, only)
        counts["instances"] += plan.stored
        counts["already scored"] += plan.scored
        counts["to score"] += plan.to_score
        counts["rows that say why there is no score"] += plan.not_scored.num_rows
    return PlanResult(dict(counts))


@recorded(
    "score",
    lambda done: {
        "model": done.model,
        "calibration_id": done.calibration_id,
        "scored": done.scored,
        "abnormal": done.abnormal,
        "version": done.version,
    },
)
def score(
    config: Config,
    cohort: str,
    model: str | None = None,
    *,
    since: str | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> ScoreResult:
    """Score the instances of a cohort that the model's newest calibration has not scored yet.

    What has not been gated is gated first; a flagged image gets no score, and a row that says why.

    A killed run leaves whole commits or nothing; the next run scores what is missing. Runs at the same time leave each
    instance one score (`score_ledger`). At the end of `operate.window` a run commits what it has and stops.

    Args:
        cohort: whose instances. Those of a view are scored as what they are, instances of the cohorts it is made of, so
            that none is scored again under another name.
        model: the champion when absent.
        since: a date or a version of `instances`; see `score_plan.plan_scores`.
        limit: at most so many instances.
        progress: told of images done, their rate and the time left.

    Raises:
        DataError: nothing stored in the cohort, or the model is not calibrated.
        PreprocessMismatch: the cohort's pixels were prepared otherwise than the model's.
        UsageError: `since` is neither a date nor a version.
    """
    began = time.monotonic()
    progress = progress or Silent()
    home = home_directory()
    lake = Lake(config.lake.uri)
    opened = open_model(config, home, model, cohort)
    calibration = newest_calibration(lake, opened)
    shift = Shift(Window.of(config.operate))
    if not shift.over():
        gate(config, cohort, reference=opened.cohort, progress=progress)
    done: list[_Run] = []
    for base, only in _shares(lake, cohort):
        left = None if limit is None else limit - sum(run.scored for run in done)
        ledger = _ledger(lake, base, opened, calibration)
        plan = plan_scores(lake, base, ledger, since, left, only)
        opened.require({str(plan.preparation["preprocess_id"])})
        run = _Run(config, lake, opened, calibration, base, plan, ledger, progress, only, shift)
        done.append(run)
        if shift.over():
            continue
        with lease(lake, run.name):
            run.explain()
            if plan.units:
                with ray_cluster(config, home, training=False) as ray:
                    progress.stage("score", plan.to_score)
                    run.score(ray)
    return _result(lake, cohort, opened, calibration, done, time.monotonic() - began)


def score_all(config: Config, cohort: str, model: str, *, progress: Progress | None = None) -> ScoreResult:
    """Score as `score` does, and refuse to go on with a part: for steps that judge by the scores of a whole cohort.

    Raises:
        DataError: as `score`; or `operate.window` is closed and instances are left without a score.
    """
    done = score(config, cohort, model, progress=progress)
    if done.left:
        raise DataError(
            f"operate.window ({config.operate.window}) is closed and {done.left} of {done.instances} instances of "
            f"cohort '{cohort}' have no score of {done.model} yet; run this again in its hours"
        )
    return done


def _shares(lake: Lake, cohort: str) -> list[tuple[str, frozenset[str] | None]]:
    """Return the ingested cohorts behind a name, each with the SOP Instance UIDs that are meant, None for all.

    Raises:
        DataError: a view in which nothing is stored any more.
    """
    view = find_view(lake, cohort)
    if view is None:
        return [(cohort, None)]
    found = members(lake, view)
    shares = [(base, frozenset(uid for uid, of in found.items() if of == base)) for base in view.bases]
    if not found:
        raise DataError(f"nothing that is stored fits the rule of view '{cohort}'; see `memmc cohort show {cohort}`")
    return [(base, uids) for base, uids in shares if uids]


def _result(
    lake: Lake, cohort: str, opened: OpenModel, calibration: dict[str, Any], done: list[_Run], seconds: float
) -> ScoreResult:
    """Return the account of the runs of one call, one run per ingested cohort."""
    return ScoreResult(
        model=opened.ref,
        calibration_id=calibration["calibration_id"],
        cohort=cohort,
        instances=sum(run.plan.stored for run in done),
        scored=sum(run.scored for run in done),
        already_scored=sum(run.plan.scored for run in done),
        abnormal=sum(run.ledger.abnormal_among(run.only) for run in done),
        version=lake.version(SCORES) if lake.exists(SCORES) else -1,
        seconds=round(seconds, 2),
        images_per_second=round(max(run.rate for run in done), 1),
        not_scored=sum(len(_of(run.ledger.not_scored - run.ledger.scored, run.only)) for run in done),
        left=sum(run.left for run in done),
    )


def _of(uids: set[str], only: frozenset[str] | None) -> set[str]:
    return uids if only is None else uids & only


def _ledger(lake: Lake, cohort: str, model: OpenModel, calibration: dict[str, Any]) -> ScoreLedger:
    return ScoreLedger(lake, cohort, model.digest, calibration["calibration_id"])


@dataclass
class _Run:
    """One scoring run: its shards, its commits, its pace."""

    config: Config
    lake: Lake
    model: OpenModel
    calibration: dict[str, Any]
    cohort: str
    plan: ScorePlan
    ledger: ScoreLedger
    progress: Progress
    only: frozenset[str] | None = None
    shift: Shift = field(default_factory=lambda: Shift(None))
    scored: int = 0
    rate: float = 0.0
    _step: int = 0
    _done: int = 0
    name: str = ""
    _began: float = 0.0
    _waiting: list[ShardFile] = field(default_factory=list[ShardFile])

    def __post_init__(self) -> None:
        self.name = f"score-{self.cohort}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"

    @property
    def left(self) -> int:
        """Instances of the plan that are still without a score."""
        return self.plan.to_score - self._done

    def explain(self) -> None:
        """Commit a row for each instance that gets no score."""
        rows = self.plan.not_scored
        if rows.num_rows:
            columns: dict[str, pa.Array] = {name: rows[name].combine_chunks() for name in rows.column_names}
            self._waiting.append(
                write_shard(self.lake.storage, SCORES, complete(columns, rows.num_rows, self._fixed()))
            )
            self._commit()

    def score(self, ray: Any) -> None:
        """Score the plan's units, some at a time, beginning at another place than other runs probably do.

        Raises:
            DataError: instances came back neither scored by this run nor known to be scored by another.
        """
        units, leg = list(self.plan.units), list[Unit]()
        start = uuid.uuid4().int % len(units)
        self._began = time.monotonic()
        for unit in [*units[start:], *units[:start]]:
            leg.append(unit)
            if sum(len(item.keys) for item in leg) >= _ROWS_PER_LEG:
                self._score(ray, leg)
                leg = []
        if leg:
            self._score(ray, leg)
        if self.left and self.shift.over():
            self.progress.message(f"operate.window has ended; {self.left} instances are left for a later run")
        elif self.left:
            raise DataError(
                f"{self.plan.to_score} instances were to be scored, {self._done} were; "
                "run `memmc score` again for the rest"
            )

    def _score(self, ray: Any, leg: list[Unit]) -> None:
        keys = self._keys(leg)
        if not keys or self.shift.over():
            return
        job = self._job(ray)
        files = [unit.file for unit in leg]
        columns = score_columns(job.judge.columns if job.judge else ())
        dataset = stream_to_actors(self.lake.storage, files, columns, keys, job)
        map_bytes = 4 * self.plan.preparation["height"] * self.plan.preparation["width"]
        committed = time.monotonic()
        for shard in score_shards(ray, dataset, job, self.lake.storage, map_bytes):
            self._waiting.append(shard)
            self._tell(shard.num_rows)
            if time.monotonic() - committed >= self.config.score.commit_seconds:
                self._commit()
                committed = time.monotonic()
            if self.shift.over():
                break
        self._commit()

    def _keys(self, leg: list[Unit]) -> list[str]:
        """Return the keys of a leg, less those that another run has scored since the plan was made."""
        keys = [key for unit in leg for key in unit.keys.to_pylist()]
        if not self.ledger.refresh():
            return keys
        fresh = plan_scores(self.lake, self.cohort, self.ledger, only=self.only)
        missing = {key for unit in fresh.units for key in unit.keys.to_pylist()}
        left = [key for key in keys if key in missing]
        self._tell(len(keys) - len(left))
        return left

    def _commit(self) -> None:
        if not self._waiting:
            return
        self._step += 1
        added = self.ledger.commit(self._waiting, self.name, self._step)
        self._waiting = []
        self.scored += added.scored if added else 0

    def _tell(self, count: int) -> None:
        self._done += count
        self.rate = self._done / max(time.monotonic() - self._began, 1e-6)
        left = (self.plan.to_score - self._done) / max(self.rate, 1e-6)
        self.progress.advance(self._done, f"{self.rate:.0f} images/s, {left:.0f} s left")

    def _job(self, ray: Any) -> ScoringJob:
        settings = {"scorer": self.calibration["scorer"]}
        settings |= {"passes": self.calibration["passes"]} if self.calibration["passes"] else {}
        score, use_gpu = place_scoring(ray, self.config.score.model_copy(update=settings))
        return ScoringJob(
            model_files=model_files(self.model.folder),
            score=score,
            use_gpu=use_gpu,
            scorer_state=self.calibration["scorer_state"],
            judge=judge_of(self.calibration),
            fixed=self._fixed(),
            stop=StopRule.from_row(self.calibration["early_stop"]),
            regions=region_judge(self.calibration, fit_of(self.config, self.model)),
        )

    def _fixed(self) -> dict[str, Any]:
        return {
            "cohort": self.cohort,
            "model": self.model.ref,
            "model_digest": self.model.digest,
            "calibration_id": self.calibration["calibration_id"],
            "dataset_version": self.plan.version,
            "preprocess_id": self.model.preprocess_id,
            "scorer": self.calibration["scorer"],
            "run": self.name,
            "scored_at": datetime.now(UTC),
        }
