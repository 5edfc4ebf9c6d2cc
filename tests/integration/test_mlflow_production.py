"""MLflow as a hospital runs it: PostgreSQL behind the server, artifacts in S3, clients with keys to neither."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from test_lake_s3 import bucket, environment, moto  # noqa: F401

from memmc import s3
from memmc.config import TrackingConfig
from memmc.errors import ModelError
from memmc.registry.lineage import TrainingInput, images_digest, log_input
from memmc.registry.models import download, register, resolve
from memmc.registry.tracking import open_tracking

sys.path.insert(0, str(Path(__file__).parents[2] / "infra" / "benchmarks"))
from tracking_outage import MlflowServer

pytestmark = pytest.mark.slow

PORT = 1  # names the socket only: the database listens on no port


def tool(name: str) -> str | None:
    found = shutil.which(name) or next((str(path) for path in Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), None)
    return found if found is None else str(Path(found).resolve())


@pytest.fixture
def database():
    """A PostgreSQL of its own that listens on a socket alone; it refuses to run as root, so then another user does."""
    initdb, pg_ctl = tool("initdb"), tool("pg_ctl")
    if initdb is None or pg_ctl is None or importlib.util.find_spec("psycopg2") is None:
        pytest.skip("no PostgreSQL here: install postgresql and memmc[postgres]")
    as_other = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    folder = tempfile.mkdtemp(prefix="pg", dir="/tmp")  # a socket's path may have 107 characters
    if as_other:
        shutil.chown(folder, "postgres")
    data = f"{folder}/data"

    def run(*command: str) -> None:
        subprocess.run([*as_other, *command], check=True, stdout=subprocess.DEVNULL, cwd=folder, timeout=300)

    try:
        run(initdb, "-D", data, "-U", "mlflow", "--auth", "trust", "--no-sync")
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c port={PORT} -c fsync=off"
        run(pg_ctl, "-D", data, "-w", "-t", "120", "-l", f"{folder}/log", "-o", options, "start")
        try:
            yield f"postgresql://mlflow@/postgres?host={folder}&port={PORT}"
        finally:
            run(pg_ctl, "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_postgresql_and_s3_behind_the_server(database, bucket, moto, monkeypatch, tmp_path):  # noqa: F811
    keys = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    environment = keys | {"MLFLOW_S3_ENDPOINT_URL": moto, "AWS_DEFAULT_REGION": "us-east-1"}  # noqa: F811
    server = MlflowServer(tmp_path, database, f"s3://{bucket}/artifacts", environment)
    client = s3.client()
    try:
        server.start()
        for name in keys:
            monkeypatch.delenv(name)  # from here on this process is a client
        tracking = open_tracking(TrackingConfig(uri=server.url), tmp_path / ".memmc")
        run = tracking.start_run("memmc/cxr", "train-1")
        digest = images_digest(["a"])
        log_input(tracking, run, TrainingInput("cxr", 3, digest, 1, 1, {"preprocess_id": "p"}))
        tracking.log_metrics(run, [(step, {"loss": 1.0 / (step + 1)}) for step in range(1200)])
        tracking.log_text(run, {"model_card.md": "# card"}, "card")
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(os.urandom(100_000))
        (folder / "model.json").write_text('{"format": 1}')
        version = register(tracking, run, folder, "memmc-cxr", {"cohort": "cxr"})
        tracking.describe_version(run, "memmc-cxr", version.version, "# card")
        tracking.end_run(run)
        assert (tracking.waiting, tracking.lost) == (0, 0)
        assert len(tracking.metric_history(run, "loss")) == 1200
        assert tracking.read_text(run, "card/model_card.md") == "# card"
        assert tracking.client.get_run(run).inputs.dataset_inputs[0].dataset.digest == digest
        assert tracking.client.get_model_version("memmc-cxr", version.version).description == "# card"
        fetched = download(tracking, resolve(tracking, "memmc-cxr"))
        assert (fetched / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()

        stored = [item["Key"] for item in client.list_objects_v2(Bucket=bucket)["Contents"]]
        (weights,) = [key for key in stored if key.endswith("model.safetensors")]
        client.put_object(Bucket=bucket, Key=weights.replace("model.safetensors", "MLmodel"), Body=b"flavors:\n")
        other = open_tracking(TrackingConfig(uri=server.url), tmp_path / "other" / ".memmc")
        with pytest.raises(ModelError, match="MLmodel"):
            download(other, resolve(other, "memmc-cxr"))
    finally:
        server.kill()
