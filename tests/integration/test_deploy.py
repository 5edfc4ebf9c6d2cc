"""A real Prefect server becomes equal to the deployment file, keeps what is not ours, runs it, and its alerts arrive.

Server and worker are those of the stack (infra/stack), on ports of their own.
"""

import http.server
import json
import re
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
from ruamel.yaml import YAML

from memmc.phantom.hospital import write_hospital

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "infra" / "stack"))
from services import POOL, StackError, basic  # noqa: E402
from stack import USER, Stack  # noqa: E402

pytestmark = pytest.mark.slow

ALERTS = {f"memmc-alert-{name}" for name in ("alarm", "failed", "late", "silent", "never-monitored")}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Site:
    """A stack's server and worker, and a copy of the deployment files to change."""

    def __init__(self, stack):
        self.stack = stack
        self.files = stack.folder / "files"
        self.files.mkdir()
        for name in ("prefect.yaml", "automations.yaml"):
            shutil.copy(ROOT / "infra" / name, self.files / name)

    def memmc(self, *words, status=0):
        command = [sys.executable, "-m", "memmc.cli.main", *words, "--json"]
        done = subprocess.run(
            command,
            env=self.stack.client_environment,
            cwd=self.stack.work,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == status, done.stderr[-3000:]
        return json.loads(done.stdout)

    def deploy(self, *words, status=0):
        return self.memmc("deploy", "--file", str(self.files / "prefect.yaml"), *words, status=status)

    def api(self, path, body=None, method=None):
        method = method or ("GET" if body is None else "POST")
        url = self.stack.url("prefect", f"/api/{path}")
        for _ in range(30):  # SQLite is locked for a moment; Prefect's own client asks again too
            answer = httpx.request(method, url, headers=basic(USER, self.stack.password), json=body, timeout=90)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(1)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def deployments(self):
        flows = {each["id"]: each["name"] for each in self.api("flows/filter", {})}
        return {f"{flows[each['flow_id']]}/{each['name']}": each for each in self.api("deployments/filter", {})}

    def automations(self):
        return {each["name"]: each for each in self.api("automations/filter", {})}

    def edit(self, name, change):
        yaml = YAML(typ="safe")
        content = yaml.load((self.files / name).read_text())
        change(content)
        with (self.files / name).open("w") as file:
            yaml.dump(content, file)

    def run(self, deployment, parameters=None, timeout_s=400):
        """Run a deployment through the worker; return its run when it has ended."""
        made = self.api(
            f"deployments/{self.deployments()[deployment]['id']}/create_flow_run", {"parameters": parameters or {}}
        )
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            run = self.api(f"flow_runs/{made['id']}")
            if run["state_type"] in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}:
                return run
            time.sleep(1)
        raise AssertionError(self.stack.keeper.log("worker").read_text()[-4000:])

    def artifacts(self, run):
        found = self.api("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
        return {each["key"]: each for each in found}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    for name in ("PREFECT", "MLFLOW", "RAY", "DASHBOARD"):
        patch.setenv(f"MEMMC_STACK_{name}_PORT", str(free_port()))
    patch.setenv("PREFECT_WORKER_QUERY_SECONDS", "2")
    stack = Stack(tmp_path_factory.mktemp("s"))
    try:
        stack.keeper.start(stack.services["prefect"])
        stack.keeper.wait(stack.services["prefect"])
        yield Site(stack)
    finally:
        stack.down()
        patch.undo()


def scheduled(deployment):
    return {each["slug"]: (each["schedule"]["cron"], each["schedule"]["timezone"]) for each in deployment["schedules"]}


def test_a_dry_run_changes_nothing(site):
    result = site.deploy("--dry-run")
    assert not result["applied"]
    assert {change["action"] for change in result["changes"]} == {"create"}
    assert site.deployments() == {}
    assert site.api("work_pools/filter", {}) == []


def test_the_server_is_the_file_and_the_second_time_nothing_changes(site):
    first, second = site.deploy(), site.deploy()
    assert second["changes"] == []
    assert second["unchanged"] == len(first["changes"]) > 5
    assert set(first["waiting"]) == ALERTS
    content = YAML(typ="safe").load((site.files / "prefect.yaml").read_text())
    there = site.deployments()
    wanted = {f"{each['entrypoint'].split('.')[1]}/{each['name']}": each for each in content["deployments"]}
    assert set(there) == set(wanted)
    for name, each in wanted.items():
        found = there[name]
        assert scheduled(found) == {s["slug"]: (s["cron"], s["timezone"]) for s in each.get("schedules", [])}
        assert set(found["tags"]) == set(each["tags"])
        assert found["parameters"] == each.get("parameters", {})
        assert found["global_concurrency_limit"]["limit"] == each["concurrency_limit"]["limit"]
        assert found["concurrency_options"]["collision_strategy"] == each["concurrency_limit"]["collision_strategy"]
        assert (found["work_pool_name"], found["entrypoint"]) == (POOL, each["entrypoint"])
        assert found["enforce_parameter_schema"]
    listed = subprocess.run(
        [sys.executable, "-m", "prefect", "deployment", "ls"],
        env=site.stack.client_environment | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(re.findall(r"[a-z]+/[a-z-]+", listed.stdout)) == set(wanted)


def test_a_pause_made_by_a_person_stays(site):
    found = site.deployments()["ingest/arrivals"]
    schedule = found["schedules"][0]["id"]
    site.api(f"deployments/{found['id']}/schedules/{schedule}", {"active": False}, "PATCH")
    assert site.deploy()["changes"] == []
    site.edit("prefect.yaml", lambda content: content["deployments"][0].__setitem__("description", "Another"))
    assert [change["name"] for change in site.deploy()["changes"]] == ["ingest/arrivals"]
    assert not site.deployments()["ingest/arrivals"]["schedules"][0]["active"]
    site.edit("prefect.yaml", lambda content: content["deployments"][0]["schedules"][0].__setitem__("active", True))
    (change,) = site.deploy()["changes"]
    assert change["fields"] == {"schedules.every-quarter.active": [False, True]}
    assert site.deployments()["ingest/arrivals"]["schedules"][0]["active"]


def test_what_left_the_file_is_removed_and_what_is_not_ours_stays(site):
    flow = site.api("flows/", {"name": "theirs"}, "POST")["id"]
    site.api("deployments/", {"name": "nightly", "flow_id": flow, "tags": ["other"]}, "POST")
    theirs = {"name": "theirs", "trigger": TRIGGER, "actions": [{"type": "do-nothing"}]}
    site.api("automations/", theirs, "POST")

    def shorten(content):
        content["deployments"] = [each for each in content["deployments"] if each["name"] != "daily"]
        (score,) = (each for each in content["deployments"] if each["name"] == "weekly-report")
        assert score["schedules"].pop()["slug"] == "monday-morning"
        del score["concurrency_limit"]

    site.edit("prefect.yaml", shorten)
    site.edit("automations.yaml", lambda content: content["automations"].pop(0))
    kept = (site.files / "automations.yaml").read_text(), (site.files / "prefect.yaml").read_text()
    changes = {(change["action"], change["name"]) for change in site.deploy()["changes"]}
    assert changes == {("update", "score/weekly-report"), ("delete", "status/daily"), ("delete", "memmc-crash-zombies")}
    assert not scheduled(site.deployments()["score/weekly-report"])
    assert site.deployments()["score/weekly-report"]["global_concurrency_limit"] is None
    assert {"theirs/nightly"} <= site.deployments().keys() and "status/daily" not in site.deployments()
    assert {"theirs", "memmc-resume-crashed"} <= site.automations().keys()
    assert "memmc-crash-zombies" not in site.automations()
    assert site.deploy()["changes"] == []
    assert kept == ((site.files / "automations.yaml").read_text(), (site.files / "prefect.yaml").read_text())


def test_a_wrong_file_changes_nothing(site):
    before = site.deployments()
    good = (site.files / "prefect.yaml").read_text()

    def spoil(content):
        content["deployments"][0]["description"] = "never seen"
        content["deployments"][-1]["concurency_limit"] = 2

    site.edit("prefect.yaml", spoil)
    refused = site.deploy(status=2)
    assert refused["error"] == "ConfigError" and "concurency_limit" in refused["message"]
    assert site.deployments() == before
    (site.files / "prefect.yaml").write_text(good)


TRIGGER = {"type": "event", "posture": "Reactive", "expect": ["memmc.alarm.*"], "threshold": 1, "within": 0}


class Mailbox(socketserver.StreamRequestHandler):
    """As much of an SMTP server as takes one letter after another."""

    letters: ClassVar[list[str]] = []

    def handle(self):
        self.wfile.write(b"220 here\r\n")
        letter = None
        for line in self.rfile:
            if letter is not None and line != b".\r\n":
                letter += line
                continue
            if letter is not None:
                self.letters.append(letter.decode())
                letter, answer = None, b"250 kept\r\n"
            elif line.upper().startswith(b"DATA"):
                letter, answer = b"", b"354 go on\r\n"
            else:
                answer = b"250 well\r\n"
            self.wfile.write(answer)


class Ear(http.server.BaseHTTPRequestHandler):
    """A webhook."""

    heard: ClassVar[list[str]] = []

    def do_POST(self):
        self.heard.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def recipients():
    servers = http.server.HTTPServer(("127.0.0.1", 0), Ear), socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mailbox)
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield [server.server_address[1] for server in servers]
    for server in servers:
        server.shutdown()
        server.server_close()


def test_an_alarm_arrives_by_webhook_and_by_mail(site, recipients):
    webhook, mail = recipients
    make = (
        "from prefect.blocks.notifications import SlackWebhook\n"
        f"SlackWebhook(url='json://127.0.0.1:{webhook}/').save('memmc-webhook')\n"
        f"SlackWebhook(url='mailto://127.0.0.1:{mail}?from=a@b.example&to=c@d.example&mode=insecure').save('memmc-mail')"
    )
    subprocess.run([sys.executable, "-c", make], env=site.stack.client_environment, check=True)
    result = site.deploy()
    assert {change["name"] for change in result["changes"]} == ALERTS
    assert result["waiting"] == {}
    event = {
        "id": "11111111-1111-4111-8111-111111111111",
        "occurred": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "event": "memmc.alarm.drift",
        "resource": {"prefect.resource.id": "memmc.cohort.cxr"},
        "payload": {"cohort": "cxr", "found": "scores moved by 0.4"},
    }
    site.api("events", [event], "POST")
    end = time.monotonic() + 60
    while not (Ear.heard and Mailbox.letters) and time.monotonic() < end:
        time.sleep(0.3)
    for (message,) in (Ear.heard, Mailbox.letters):
        assert "memmc.alarm.drift" in message and "scores moved by 0.4" in message
    assert site.deploy()["changes"] == []


@pytest.fixture(scope="module")
def worker(site):
    """A worker whose configuration names the source, and the lake, on this machine and without Ray's Jobs API."""
    hospital = site.stack.work / "hospital"
    write_hospital(hospital, num_normal=8, num_abnormal=2, num_broken=2, seed=3)
    settings = f'[lake]\nuri = "{site.stack.work / "lake"}"\n[data]\nimage_size = 32\n'
    (site.stack.work / "memmc.toml").write_text(settings)
    site.stack._secret("deid.key", "0" * 64)
    service = site.stack.services["worker"]
    assert site.stack.keeper.start(service)
    site.stack.keeper.wait(service)
    assert not site.stack.keeper.start(service)  # what runs is not started again


def test_a_deployment_runs_through_a_worker_and_shows_no_place(site, worker):
    shutil.copy(ROOT / "infra" / "prefect.yaml", site.files / "prefect.yaml")
    site.deploy()
    run = site.run("ingest/arrivals")
    assert run["state_type"] == "COMPLETED", run["state"]
    assert re.fullmatch(r"ingest-cxr-v\d+-\d{8}-\d{4}", run["name"])
    assert run["parameters"]["cohort"] == "cxr"
    assert "hospital" not in json.dumps(run)
    rows = json.loads(site.artifacts(run)["ingest-cxr"]["data"])
    counts = {row[""]: row["objects"] for row in rows}
    assert counts["seen"] == sum(counts[name] for name in ("stored", "duplicate", "excluded", "quarantined")) > 10
    assert counts["quarantined"] > 0
    checked = site.run("maintenance/weekly")
    assert checked["state_type"] == "COMPLETED", checked["state"]
    status = site.run("status/daily")
    assert status["state_type"] == "COMPLETED", status["state"]
    page = site.artifacts(status)["status"]["data"]
    assert "All well." in page and f"| cxr | {counts['stored']} |" in page and run["name"] in page


def test_a_damaged_lake_is_not_swept_and_the_run_fails(site, worker):
    shard = next((site.stack.work / "lake" / "instances").rglob("*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    run = site.run("maintenance/weekly")
    assert run["state_type"] == "FAILED"
    assert set(site.artifacts(run)) >= {"maintenance-tables", "maintenance-damages"}
    assert "maintenance-freed" not in site.artifacts(run)


def test_a_port_that_is_taken_is_said(tmp_path, monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        monkeypatch.setenv("MEMMC_STACK_PREFECT_PORT", str(listener.getsockname()[1]))
        stack = Stack(tmp_path / "s")
        with pytest.raises(StackError, match="MEMMC_STACK_PREFECT_PORT"):
            stack.keeper.start(stack.services["prefect"])


def test_the_tracking_server_of_the_stack_asks_for_the_password(site):
    service = site.stack.services["mlflow"]
    site.stack.keeper.start(service)
    site.stack.keeper.wait(service)
    url = site.stack.url("mlflow", "/api/2.0/mlflow/experiments/search")
    asked = {"json": {"max_results": 1}, "timeout": 60}
    assert httpx.post(url, **asked).status_code == httpx.codes.UNAUTHORIZED
    named = httpx.post(url, **asked, headers=basic(USER, site.stack.password))
    assert [each["name"] for each in named.json()["experiments"]] == ["Default"]
