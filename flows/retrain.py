"""The retrain flow: decide, screen, train a challenger, put it through the gates, ask a person, promote."""

# Annotations are evaluated here: Prefect could not resolve them as text when it loads the flow by its path.
from pathlib import Path
from typing import Any

from prefect import flow, pause_flow_run, task
from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event
from prefect.exceptions import FlowPauseTimeout
from prefect.input import RunInput

from flows.alerts import waiting_of
from flows.calls import Overrides, call_flow, config_in_force, has_caller, keep_result, run_step
from flows.naming import Cohort, Person, artifact_key, run_name
from flows.ray_job import on_cluster, stop_cluster_jobs, submits_jobs
from flows.summary import as_markdown
from flows.tasks import DEAR, ON_STORAGE
from memmc.config import Config
from memmc.errors import GateRefused
from memmc.pipeline.progress import Progress
from memmc.pipeline.results import Result


class Approval(RunInput):
    """What a person says to a challenger that has passed the gates."""

    name: Person
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

    Where `promote.approval` asks for a person and none is named, a flow that a command started pauses until somebody
    has answered. A deployed run ends instead and says who waits: the slot of its concurrency limit is given away when
    it pauses, and its process is ended as soon as it wants to keep it.

    Args:
        cohort: whose model.
        approve: who agrees beforehand.
        config: settings that differ from the defaults, by section; never key material.
    """
    early = {} if has_caller() else look_for_normals(cohort, config)
    done = in_one(cohort, approve, config) if not early and submits_jobs(config_in_force(config)) else None
    plan = early or (done["plan"] if done else decide(cohort, config))
    create_markdown_artifact(as_markdown("Decision", plan), key=artifact_key("retrain", cohort))
    found: dict[str, Any] = {"plan": plan, "trained": None, "verdict": None}
    if plan["outcome"] == "wait":
        return found
    if done:
        found |= {"trained": done["trained"], "verdict": done["verdict"]}
    else:
        found["trained"] = train(cohort, plan, config) if plan["outcome"] == "train" else None
        challenger = found["trained"]["model"] if found["trained"] else plan["challenger"]
        found["verdict"] = judge(cohort, challenger, approve, config)
    show(cohort, found["verdict"])
    if found["verdict"]["outcome"] == "waiting":
        if not has_caller():
            tell(cohort, found["verdict"])
            return found
        answer = ask(cohort, found["verdict"]["model"], config)
        found["verdict"] = settle(cohort, found["verdict"]["model"], answer.name, answer.approve, config)
    return promoted_or_refused(found["verdict"], found)


def promoted_or_refused(verdict: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Return what a flow has found, unless its challenger is refused."""
    if verdict["outcome"] != "promoted":
        keep_result(found)
        raise GateRefused(f"{verdict['model']} is not promoted: {verdict['reason']}")
    return found


def settle(cohort: str, challenger: str, name: str, approve: bool, config: Overrides | None) -> dict[str, Any]:
    """Act on a person's answer."""
    verdict = (judge if approve else decline)(cohort, challenger, name, config)
    show(cohort, verdict)
    return verdict


def tell(cohort: str, verdict: dict[str, Any]) -> None:
    """Emit an event that an automation sends to people."""
    event, payload = waiting_of(verdict)
    emit_event(event, resource={"prefect.resource.id": f"memmc.cohort.{cohort}"}, payload=payload)


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


@task(name="look-for-normals", **ON_STORAGE)
def look_for_normals(cohort: str, config: Overrides | None) -> dict[str, Any]:
    """Return a plan to wait where nothing is labelled yet, as on a new site; an empty one elsewhere."""

    def step(resolved: Config, progress: Progress) -> Result | None:
        from memmc.pipeline.retrain import RetrainPlan, no_normals_yet

        reason = no_normals_yet(resolved, cohort)
        if reason is None:
            return None
        progress.message(reason)
        return RetrainPlan(cohort, "wait", reason, {}, None, None)

    return run_step(f"retrain-{cohort}", config, step)


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
