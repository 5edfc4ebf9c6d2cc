import signal
import time

import pytest

from flows import calls
from flows.deadline import time_limit
from flows.ray_job import on_cluster, settings_of
from memmc.config import load_config
from memmc.errors import DeadlineError, UsageError
from memmc.pipeline.progress import Silent
from memmc.pipeline.results import IngestResult

CLUSTER = ["ray.address=http://ray:8265", "ray.job_directory=/srv", "lake.uri=s3://bucket/lake"]


def settings(*chosen):
    found = settings_of(load_config(overrides=[*CLUSTER, *chosen]))
    assert found[::2] == ["--set"] * (len(found) // 2)
    return set(found[1::2])


def test_a_job_gets_the_settings_that_differ_and_joins_its_cluster():
    assert settings("train.preset=small", "select.modalities=CR,DX") == {
        "train.preset=small",
        "select.modalities=CR,DX",
        "lake.uri=s3://bucket/lake",
        "ray.address=auto",
    }


def test_what_the_cluster_must_not_show_stays_here():
    private = ["source.uri=/data/DOE^JANE", "source.user=u", "source.password_file=/p", "deid.key_file=/keys/key"]
    found = settings(*private, "source.quiet_seconds=5", "operate.deadline_minutes=9", "operate.window=22:00-06:00")
    assert found == {
        "source.quiet_seconds=5.0",
        "operate.window=22:00-06:00",
        "lake.uri=s3://bucket/lake",
        "ray.address=auto",
    }


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("lake.uri=lake", "relative"),
        ("deid.key_secret=identity", "key_secret"),
        ("tracking.uri=http://user:password@mlflow", "environment"),
    ],
)
def test_what_cannot_go_to_a_cluster_is_refused(wrong, said):
    with pytest.raises(UsageError, match=said):
        settings(wrong)


def test_a_place_kept_from_prefect_is_kept_from_the_cluster():
    config = load_config(overrides=CLUSTER)
    caller = calls.Caller(config, Silent(), {"source": "/data/DOE^JANE"})
    token = calls._CALLER.set(caller)
    try:
        with pytest.raises(UsageError, match="MEMMC_SOURCE__URI") as caught:
            on_cluster(lambda *_: None, "ingest", IngestResult, "a local path", cohort="cxr")(config, Silent())
    finally:
        calls._CALLER.reset(token)
    assert "DOE" not in str(caught.value)


def test_without_a_jobs_api_the_step_runs_here():
    done = []
    step = on_cluster(lambda config, progress: done.append(config), "ingest", IngestResult, cohort="cxr")
    config = load_config(overrides=["ray.address=auto"])
    step(config, Silent())
    assert done == [config]


def test_a_deadline_interrupts_what_waits_and_leaves_the_alarm_as_it_was():
    import prefect.utilities.timeout  # noqa: F401 - takes seconds the first time

    before, began, undone = signal.getsignal(signal.SIGALRM), time.monotonic(), []
    with pytest.raises(DeadlineError, match="deadline_minutes"), time_limit(0.3 / 60):
        try:
            time.sleep(30)
        finally:
            undone.append(True)
    assert time.monotonic() - began < 5
    assert undone
    assert signal.getsignal(signal.SIGALRM) is before


def test_within_the_deadline_nothing_happens_and_other_timeouts_stay_what_they_are():
    with time_limit(1), time_limit(None):
        done = True
    assert done
    with pytest.raises(TimeoutError, match=r"^of its own$"), time_limit(1):
        raise TimeoutError("of its own")
