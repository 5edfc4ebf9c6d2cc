"""A deployed run whose process, server or user fails it: on a real Prefect server, worker and Ray cluster."""

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from operation_plant import POOL, Plant, until

from memmc.config import RayConfig, load_config
from memmc.lake.schemas import INSTANCES, SCORES
from memmc.lake.tables import Lake
from memmc.pipeline.cluster_job import _Client
from memmc.pipeline.prefect_server import look_at_server
from memmc.pipeline.score import score
from memmc.pipeline.window import Shift

pytestmark = pytest.mark.slow

CRASHED_WITHIN_S = 120
FREED_WITHIN_S = 60
COHORT = "killed"
COPIES = 8  # of the hospital, so that its ingest is at work for as long as the other runs begin


@pytest.fixture(scope="module")
def lake(workspace, tmp_path_factory):
    """The workspace's lake, in which nothing has been scored yet."""
    return unscored_copy(workspace.root / "lake", tmp_path_factory.mktemp("lake"))


def unscored_copy(lake, folder):
    shutil.copytree(lake, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / SCORES, ignore_errors=True)
    return folder


@pytest.fixture(scope="module")
def plant(workspace, lake, ray_head, tmp_path_factory):
    """A server with the project's automations; a worker that submits to the Ray cluster."""
    source = tmp_path_factory.mktemp("source")
    for number in range(COPIES):
        shutil.copytree(workspace.hospital.dicom_dir, source / str(number))
    settings = {
        "MEMMC_LAKE__URI": str(lake),
        "MEMMC_RAY__ADDRESS": ray_head.url,
        "MEMMC_RAY__JOB_DIRECTORY": str(workspace.root),
        "MEMMC_RAY__JOB_COMMAND": str(Path(sys.executable).parent / "memmc"),
        "MEMMC_SOURCE__URI": str(source),
    }
    plant = Plant(tmp_path_factory.mktemp("plant"), workspace.root, settings)
    try:
        plant.start_server()
        plant.apply_automations()
        yield plant
    finally:
        plant.stop()


class Flows:
    """Deployments of the flows, their runs and their jobs, as the server and the cluster tell them."""

    def __init__(self, plant, client, cluster):
        from flows.ingest import ingest_flow
        from flows.score import score_flow
        from flows.train import train_flow

        self.client, self.cluster = client, cluster
        self.score = plant.deploy(client, score_flow, "flows.score.score_flow", ["memmc"])
        self.ingest = plant.deploy(client, ingest_flow, "flows.ingest.ingest_flow", ["memmc"])
        self.foreign = plant.deploy(client, score_flow, "flows.score.score_flow", [], name="foreign")
        self.train = plant.deploy(client, train_flow, "flows.train.train_flow", ["memmc"])

    def run(self, deployment, **parameters):
        return self.client.create_flow_run_from_deployment(deployment, parameters=parameters).id

    def state(self, run):
        return self.client.read_flow_run(run).state.type.value

    def crashed_at(self, run):
        states = self.client.read_flow_run_states(run)
        return next((state.timestamp for state in states if state.is_crashed()), None)

    def shown(self, run):
        """Keys of a run's artifacts."""
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

        found = self.client.read_artifacts(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])))
        return {artifact.key for artifact in found}

    def jobs(self, run=""):
        return [job for job in self.cluster.jobs() if job.startswith(f"memmc-{run}")]

    def actors(self):
        """Actors at work, by id; not the two without a CPU that Ray Data keeps for a whole cluster, detached."""
        from ray.util.state import list_actors

        address = self.cluster.ray.get_address()
        found = list_actors(address=address, filters=[("state", "=", "ALIVE")], detail=True, limit=1000)
        return {actor.actor_id: actor.class_name for actor in found if not actor.is_detached}


@pytest.fixture(scope="module")
def flows(plant):
    before = dict(os.environ)
    os.environ.update({name: value for name, value in plant.environment.items() if name.startswith("PREFECT_")})
    from prefect.client.orchestration import SyncPrefectClient

    with SyncPrefectClient(plant.url) as client:
        plant.prefect("work-pool", "create", POOL, "--type", "process")
        yield Flows(plant, client, _Client(RayConfig(address=plant.environment["MEMMC_RAY__ADDRESS"])))
    os.environ.clear()
    os.environ.update(before)


def scores_of(folder):
    lake = Lake(str(folder))
    if not lake.exists(SCORES):
        return []
    rows = lake.read(SCORES, ["sop_instance_uid", "run", "anomaly_score"])
    return [row for row in rows.to_pylist() if row["anomaly_score"] is not None]


def closed_window():
    now = datetime.now(UTC)
    return f"{now + timedelta(hours=2):%H:%M}-{now + timedelta(hours=3):%H:%M}"


@dataclass(frozen=True)
class Killed:
    """Runs whose processes, and the worker above them, were killed together; another worker is there since."""

    there: UUID  # its step is a Ray job
    here: UUID  # its step runs in the flow's process
    foreign: UUID  # without our tag
    at: datetime
    version: int


@pytest.fixture(scope="module")
def killed(plant, flows, lake):
    version = Lake(str(lake)).version(INSTANCES)
    plant.start_worker()
    there = flows.run(flows.score, cohort="cxr")
    here = flows.run(flows.ingest, cohort=COHORT, config={"ray": {"address": None}})
    foreign = flows.run(flows.foreign, cohort="cxr", config={"operate": {"window": closed_window()}})
    until(lambda: flows.jobs(there) and flows.jobs(foreign) and flows.state(here) == "RUNNING", 300, "all are at work")
    plant.kill(plant.worker)
    at = datetime.now(UTC)
    plant.start_worker()
    return Killed(there, here, foreign, at, version)


def test_a_cancelled_run_frees_its_workers(flows, killed):
    """Meanwhile the heartbeats of the killed runs are missed."""
    from prefect.states import Cancelling

    until(lambda: flows.cluster.status(f"memmc-{killed.there}-score-1") == "SUCCEEDED", 180, "a job outlives its flow")
    before = set(flows.actors())
    run = flows.run(flows.train, cohort="cxr", config={"train": {"max_minutes": 10.0, "resume": "new"}})
    until(lambda: any("TrainWorker" in name for name in flows.actors().values()), 300, "training begins")
    flows.client.set_flow_run_state(run, Cancelling())
    began = time.monotonic()
    until(lambda: set(flows.actors()) <= before, FREED_WITHIN_S, "the cluster is free")
    print(f"cluster free {time.monotonic() - began:.0f} s after the cancellation")
    until(lambda: flows.state(run) == "CANCELLED", FREED_WITHIN_S, "the run is cancelled")
    assert flows.cluster.status(f"memmc-{run}-train-1") == "STOPPED"
    assert len(flows.jobs(run)) == 1


def test_killed_runs_go_on_and_do_nothing_twice(flows, killed, lake, workspace):
    for run in (killed.there, killed.here):
        crashed = until(lambda run=run: flows.crashed_at(run), CRASHED_WITHIN_S, "marked crashed")
        print(f"marked crashed {(crashed - killed.at).total_seconds():.0f} s after the kill")
        assert (crashed - killed.at).total_seconds() <= CRASHED_WITHIN_S
    for run in (killed.there, killed.here):
        until(lambda run=run: flows.state(run) == "COMPLETED", 300, "taken up again")
        assert flows.client.read_flow_run(run).run_count == 2
    assert flows.jobs(killed.there) == [f"memmc-{killed.there}-score-1"]
    assert "score-cxr-most-abnormal" in flows.shown(killed.there)  # also of what was scored before the crash
    rows = scores_of(lake)
    assert len(rows) == len({row["sop_instance_uid"] for row in rows}) > 0
    assert len({row["run"] for row in rows}) == 1
    stored = Lake(str(lake)).read(INSTANCES, ["object_key"], filter={"cohort": COHORT})["object_key"].to_pylist()
    assert len(stored) == len(set(stored)) == COPIES * workspace.ingested.seen
    assert Lake(str(lake)).version(INSTANCES) == killed.version + 1
    assert flows.state(killed.foreign) == "RUNNING"  # not ours to judge; without automations a killed run stays so


def test_a_server_that_goes_away_costs_no_work(plant, flows):
    if plant.worker is None:
        plant.start_worker()
    score_now = ("score", "--cohort", "cxr", "--json")
    known = set(flows.jobs())
    patient = flows.run(flows.score, cohort="cxr")
    until(lambda: flows.jobs(patient), 180, "one is at work")
    impatient = at_work_at_once(plant, flows, score_now, known | set(flows.jobs(patient)))
    plant.kill(plant.server)
    began = time.monotonic()
    late = plant.memmc(*score_now)
    said, _ = late.communicate(timeout=60)
    print(f"with no server at the start: exit {late.returncode} after {time.monotonic() - began:.0f} s")
    assert late.returncode == 1 and "PREFECT_API_URL" in said
    assert time.monotonic() - began < 30
    said, _ = impatient.communicate(timeout=120)
    assert impatient.returncode == 1 and "PREFECT_API_URL" in said
    time.sleep(max(0.0, 30 - (time.monotonic() - began)))
    plant.start_server()
    until(lambda: flows.state(patient) == "COMPLETED", 120, "the run outlasts the server's absence")
    assert flows.client.read_flow_run(patient).run_count == 1
    again = plant.memmc(*score_now)
    said, _ = again.communicate(timeout=180)
    assert again.returncode == 0
    assert json.loads(said)["scored"] == 0


def at_work_at_once(plant, flows, words, others):
    """Return a process that asks the server once and no more, when its job is there.

    A busy SQLite may refuse that one question before any work has begun; such a process is followed by another.
    """
    started = []

    def job():
        found = set(flows.jobs()) - others
        if not found and (not started or started[-1].poll() is not None):
            started.append(plant.memmc(*words, PREFECT_CLIENT_MAX_RETRIES="0"))
        return found

    until(job, 180, "one that does not ask again is at work")
    return started[-1]


def test_more_workers_than_sqlite_bears_are_seen(plant, flows):
    for number in range(3):
        flows.client.send_worker_heartbeat(POOL, f"extra-{number}", heartbeat_interval_seconds=30)
    found = look_at_server(plant.url, plant.environment)
    assert found.workers >= 3
    assert "PostgreSQL" in found.fix()


def test_scoring_stops_at_the_end_of_its_hours_and_goes_on_the_next_time(inside, tmp_path, monkeypatch):
    lake = unscored_copy(inside.root / "lake", tmp_path / "lake")
    closed = load_config(overrides=[f"lake.uri={lake}", f"operate.window={closed_window()}"])
    idle = score(closed, "cxr")
    assert idle.scored == 0 < idle.left

    small = ["score.rows_per_shard=16", "score.batch_size=16", "score.commit_seconds=0.001"]
    few = load_config(overrides=[f"lake.uri={lake}", *small])
    with monkeypatch.context() as hours:  # over as soon as something is committed
        hours.setattr(Shift, "over", lambda self: bool(scores_of(lake)))
        cut = score(few, "cxr")
    assert cut.scored and cut.left
    rest = score(few, "cxr")
    assert (rest.scored, rest.left) == (cut.left, 0)
    rows = scores_of(lake)
    assert len(rows) == len({row["sop_instance_uid"] for row in rows}) == cut.scored + rest.scored
