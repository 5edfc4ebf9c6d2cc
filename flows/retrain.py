"""The retrain flow: decide, screen, train a challenger, put it through the gates, ask a person, promote."""

# Annotations are evaluated here: Prefect could not resolve them as text when it loads the flow by its path.
from pathlib import Path
from typing import Any

from prefect import flow, pause_flow_run, task
from prefect.artifacts import create_markdown_artifact
from prefect.exceptions import FlowPauseTimeout
from prefect.input import RunInput

from flows.calls import Overrides, call_flow, config_in_force, run_step
from flows.naming import Cohort, artifact_key, run_name
from flows.ray_job import on_cluster, stop_cluster_jobs, submits_jobs
from flows.summary import as_markdown
from flows.tasks import DEAR, ON_STORAGE
from memmc.config import Config
from memmc.errors import GateRefused
from memmc.pipeline.progress import Progress
from memmc.pipeline.results import Result


class Approval(RunInput):
    """What a person says to a challenger that has passed the gates."""

    name: str
    approve: bool = True


def run(config: Config, cohort: str, approve: str | None, *, home: Path, progress: Progress) -> Any:
    """Run the flow in this process; as `memmc.pipeline.retrain.retrain`, with Prefect watching."""
    from memmc.pipeline.retrain import RetrainResult

    parameters = {"cohort": cohort, "approve": approve}
    done = call_flow(lambda: retrain_flow, parameters, config=config, home=home, progress=progress)
    return RetrainResult(**done)


@flow(
    name="retrain",
    flow_run_name=run_name("retrain"),
    persist_result=False,
    result_serializer="json",
    on_cancellation=[stop_cluster_jobs],
)
def retrain_flow(cohort: Cohort, approve: str | None = None, config: Overrides | None = None) -> dict[str, Any]:
    """Train anew if new normals, age or drift ask for it, and promote what passes the gates.

    Args:
        cohort: whose model.
        approve: who agrees beforehand; where `promote.approval` asks for a person and none is named, the flow pauses.
        config: settings that differ from the defaults, by section; never key material.
    """
    done = in_one(cohort, approve, config) if submits_jobs(config_in_force(config)) else None
    plan = done["plan"] if done else decide(cohort, config)
    create_markdown_artifact(as_markdown("Decision", plan), key=artifact_key("retrain", cohort))
    if plan["outcome"] == "wait":
        return {"plan": plan, "trained": None, "verdict": None}
    if done:
        trained, verdict = done["trained"], done["verdict"]
        challenger = verdict["model"]
    else:
        trained = train(cohort, plan, config) if plan["outcome"] == "train" else None
        challenger = trained["model"] if trained else plan["facts"]["pending"]
        verdict = judge(cohort, challenger, approve, config)
    show(cohort, verdict)
    if verdict["outcome"] == "waiting":
        answer = ask(cohort, challenger, config)
        verdict = (judge if answer.approve else decline)(cohort, challenger, answer.name, config)
        show(cohort, verdict)
    if verdict["outcome"] != "promoted":
        raise GateRefused(f"{challenger} is not promoted: {verdict['reason']}")
    return {"plan": plan, "trained": trained, "verdict": verdict}


def show(cohort: str, verdict: dict[str, Any]) -> None:
    """Publish the gates as a table."""
    create_markdown_artifact(gate_table(verdict), key=artifact_key("gates", cohort))


def gate_table(verdict: dict[str, Any]) -> str:
    """Return the verdict and its gates as Markdown."""
    against = f"against {verdict['champion']}" if verdict["champion"] else "without a champion before it"
    lines = [f"## {verdict['model']} {against}: {verdict['outcome']}", "", "| gate | verdict | |", "|---|---|---|"]
    lines += [f"| {gate['name']} | {gate['verdict']} | {gate['why']} |" for gate in verdict["gates"]]
    return "\n".join([*lines, "", verdict["reason"]])


def ask(cohort: str, challenger: str, config: Overrides | None) -> Approval:
    """Pause until a person has answered; the gates stand in the run's artifacts."""
    text = (
        f"**{challenger}** has passed the gates for cohort {cohort}: see this run's artifacts. May it be the champion?"
    )
    hours = config_in_force(config).promote.approval_hours
    try:
        return pause_flow_run(wait_for_input=Approval.with_initial_data(description=text), timeout=round(hours * 3600))
    except FlowPauseTimeout:
        raise GateRefused(
            f"nobody has answered for {hours:g} h; {challenger} still waits: promote --cohort {cohort} --approve NAME"
        ) from None


@task(name="retrain-on-cluster", **DEAR)
def in_one(cohort: str, approve: str | None, config: Overrides | None) -> dict[str, Any]:
    """Decide, train and judge as one Ray job, whose next try finds what the first has decided and trained."""

    def step(resolved: Config, progress: Progress) -> Result | None:
        from memmc.pipeline.retrain import RetrainResult, retrain

        def here(config: Config, progress: Progress) -> RetrainResult:
            return retrain(config, cohort, approve=approve, progress=progress)

        return on_cluster(here, "retrain", RetrainResult, cohort=cohort, approve=approve)(resolved, progress)

    return run_step(f"retrain-{cohort}", config, step)


@task(name="decide-retraining", **ON_STORAGE)
def decide(cohort: str, config: Overrides | None) -> dict[str, Any]:
    """Screen new normals, look for drift, decide; a second try decides anew."""

    def step(resolved: Config, progress: Progress) -> Result:
        from memmc.pipeline.retrain import plan_retrain

        return plan_retrain(resolved, cohort, progress=progress)

    return run_step(f"retrain-{cohort}", config, step)


@task(name="train-challenger", **DEAR)
def train(cohort: str, plan: dict[str, Any], config: Overrides | None) -> dict[str, Any]:
    """Train, calibrate and register a challenger."""

    def step(resolved: Config, progress: Progress) -> Result:
        from memmc.pipeline.retrain import RetrainPlan, train_challenger

        return train_challenger(resolved, cohort, RetrainPlan(**plan), progress=progress)

    return run_step(f"train-{cohort}", config, step)


@task(name="judge-challenger", **ON_STORAGE)
def judge(cohort: str, challenger: str, approve: str | None, config: Overrides | None) -> dict[str, Any]:
    """Put the challenger through the gates; promote it if it passes and nobody has to agree first."""

    def step(resolved: Config, progress: Progress) -> Result | None:
        from memmc.pipeline.promote import PromoteResult
        from memmc.pipeline.retrain import judge_challenger

        def here(config: Config, progress: Progress) -> PromoteResult:
            return judge_challenger(config, cohort, challenger, approve=approve, progress=progress)

        judged = on_cluster(here, "promote", PromoteResult, challenger, cohort=cohort, approve=approve)
        return judged(resolved, progress)

    return run_step(f"promote-{cohort}", config, step)


@task(name="decline-challenger", **ON_STORAGE)
def decline(cohort: str, challenger: str, name: str, config: Overrides | None) -> dict[str, Any]:
    """Keep that a person said no."""

    def step(resolved: Config, _progress: Progress) -> Result:
        from memmc.pipeline.promote import decline

        return decline(resolved, cohort, challenger, name)

    return run_step(f"promote-{cohort}", config, step)
