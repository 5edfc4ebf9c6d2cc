"""`make stack`: a Prefect server, a process worker, an MLflow server and a Ray cluster of two nodes on one machine.

    python infra/stack/stack.py up [--no-runs] | down | status

All listen on loopback and ask for a password, or Ray for a token, made at the first start. State lies under
.memmc/stack. Ports: MEMMC_STACK_PREFECT_PORT (4200), MEMMC_STACK_MLFLOW_PORT (5000), MEMMC_STACK_RAY_PORT (6379),
MEMMC_STACK_DASHBOARD_PORT (8265), MEMMC_STACK_AGENT_PORT (52365 and the next). `up` on a stack that
is up starts what is missing.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
from pathlib import Path

from services import HOST, POOL, Keeper, Service, StackError, ask, basic, port_of, python

ROOT = Path(__file__).parents[2]
USER = "memmc"
ORDER = ("prefect", "mlflow", "ray", "ray-node", "worker")
_LONGEST_RAY_FOLDER = 40  # a Unix socket's path may hold 107 bytes; Ray puts up to 63 below
_QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Stack:
    """Places, ports, secrets and services of the one stack of a working directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.work = self.folder / "work"
        self.work.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.keeper = Keeper(self.folder)
        self.fresh = not (self.folder / "password").exists()
        self.password = self._secret("password", secrets.token_urlsafe(12))
        self._secret("ray_token", secrets.token_hex(32))
        self.ports = {
            "prefect": port_of("PREFECT", 4200),
            "mlflow": port_of("MLFLOW", 5000),
            "ray": port_of("RAY", 6379),
            "dashboard": port_of("DASHBOARD", 8265),
            "agent": port_of("AGENT", 52365),  # and the next one, for the second node
        }

    def url(self, name: str, path: str = "") -> str:
        """Return the address of a service."""
        return f"http://{HOST}:{self.ports[name]}{path}"

    @property
    def client_environment(self) -> dict[str, str]:
        """Environment of the worker and of whoever talks to the stack."""
        return self._base | {
            "PREFECT_API_URL": self.url("prefect", "/api"),
            "PREFECT_API_AUTH_STRING": f"{USER}:{self.password}",
            "PREFECT_HOME": str(self.folder / "prefect-client"),
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "MEMMC_CONFIG": str(self.work / "memmc.toml"),
            **self._cluster_environment,
        }

    @property
    def services(self) -> dict[str, Service]:
        """All services by name, in the order in which they are started."""
        made = [self._prefect(), self._mlflow(), self._ray(), self._ray_node(), self._worker()]
        return {service.name: service for service in made}

    @property
    def _base(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MEMMC_", "MLFLOW_", "RAY_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
        return kept | _QUIET | {"PATH": path, "PYTHONPATH": str(ROOT)}

    @property
    def _cluster_environment(self) -> dict[str, str]:
        """What a step needs wherever it runs: the token, the tracking server's password, source and key."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "ray_token"),
            "RAY_worker_niceness": "0",
            "RAY_DATA_USE_DATASOURCE_V2": "0",
            "MLFLOW_TRACKING_USERNAME": USER,
            "MLFLOW_TRACKING_PASSWORD": self.password,
            "MEMMC_SOURCE__URI": str(self.work / "hospital" / "dicom"),
            "MEMMC_SOURCE__LABELS_FILE": str(self.work / "hospital" / "labels.csv"),
            "MEMMC_DEID__KEY_FILE": str(self.folder / "deid.key"),
        }

    def _prefect(self) -> Service:
        port = self.ports["prefect"]
        environment = self._base | {
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_SERVER_API_AUTH_STRING": f"{USER}:{self.password}",
            "PREFECT_API_AUTH_STRING": f"{USER}:{self.password}",
            "PREFECT_SERVER_UI_API_URL": self.url("prefect", "/api"),
            "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "15",
        }
        command = python("prefect", "server", "start", "--host", HOST, "--port", str(port))
        return Service(
            "prefect", command, environment, lambda: ask(self.url("prefect", "/api/health")) is True, {"prefect": port}
        )

    def _mlflow(self) -> Service:
        port = self.ports["mlflow"]
        auth = self.folder / "mlflow-auth.ini"
        if not auth.exists():
            lines = [
                "[mlflow]",
                "default_permission = NO_PERMISSIONS",
                f"database_uri = sqlite:///{self.folder / 'mlflow-users.db'}",
                f"admin_username = {USER}",
                f"admin_password = {self.password}",
            ]
            _write_private(auth, "\n".join(lines))
        environment = self._base | {
            "MLFLOW_AUTH_CONFIG_PATH": str(auth),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self._secret("mlflow_key", secrets.token_hex(32)),
        }
        command = python(
            *("mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1", "--app-name", "basic-auth"),
            *("--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"),
            *("--artifacts-destination", str(self.folder / "mlartifacts")),
        )
        return Service(
            "mlflow", command, environment, lambda: ask(self.url("mlflow", "/health")) == "OK", {"mlflow": port}
        )

    def _ray(self) -> Service:
        common = ("--head", f"--port={self.ports['ray']}", f"--temp-dir={self._ray_folder()}")
        dashboard = ("--dashboard-host", HOST, "--dashboard-port", str(self.ports["dashboard"]))
        return self._ray_start("ray", (*common, *dashboard, "--include-dashboard=true"), 1)

    def _ray_node(self) -> Service:
        return self._ray_start("ray-node", ("--address", f"{HOST}:{self.ports['ray']}"), 2)

    def _ray_start(self, name: str, arguments: tuple[str, ...], nodes: int) -> Service:
        command = python(
            *("ray.scripts.scripts", "start", *arguments, "--block", "--disable-usage-stats", "--num-cpus=3"),
            *(f"--node-ip-address={HOST}", f"--object-store-memory={1 << 29}"),
            f"--dashboard-agent-listen-port={self.ports['agent'] + nodes - 1}",  # Ray's own is the same for every node
        )
        ports = {each: self.ports[each] for each in ("ray", "dashboard", "agent")} if nodes == 1 else {}
        return Service(name, command, self._base | self._cluster_environment, lambda: self._nodes() >= nodes, ports)

    def _worker(self) -> Service:
        command = python("prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", "memmc-stack")
        return Service("worker", command, self.client_environment, self._worker_online)

    def _nodes(self) -> int:
        token = {"Authorization": f"Bearer {(self.folder / 'ray_token').read_text()}"}
        answer = ask(self.url("dashboard", "/nodes?view=summary"), token)
        summary = answer["data"]["summary"] if isinstance(answer, dict) else []
        return sum(node.get("raylet", {}).get("state") == "ALIVE" for node in summary)

    def _worker_online(self) -> bool:
        where = self.url("prefect", f"/api/work_pools/{urllib.parse.quote(POOL)}/workers/filter")
        found = ask(where, basic(USER, self.password), {})
        return isinstance(found, list) and any(each["status"] == "ONLINE" for each in found)

    def _ray_folder(self) -> Path:
        """Return Ray's folder: in the stack's where its path is short enough, else a temporary one, remembered."""
        inside = self.folder / "ray"
        if len(str(inside)) <= _LONGEST_RAY_FOLDER:
            return inside
        return Path(self._secret("ray_folder", tempfile.mkdtemp(prefix="memmc-")))

    def _secret(self, name: str, value: str) -> str:
        """Return what stands in a private file; `value`, which is kept, where there is none yet."""
        path = self.folder / name
        if not path.exists():
            _write_private(path, value)
        return path.read_text()

    def up(self) -> None:
        """Start what does not run, wait until all is well, deploy."""
        self._secret("deid.key", secrets.token_hex(32))
        self._configure()
        services = self.services
        for name in ("prefect", "mlflow", "ray"):
            self._start(services[name])
        for name in ("prefect", "mlflow", "ray"):
            self._await(services[name])
        self._start(services["ray-node"])
        self.command("memmc", "deploy", "--file", str(ROOT / "infra" / "prefect.yaml"))
        self._start(services["worker"])
        for name in ("ray-node", "worker"):
            self._await(services[name])
        print(f"Prefect  {self.url('prefect')}\nMLflow   {self.url('mlflow')}\nRay      {self.url('dashboard')}")
        shown = self.password if self.fresh else f"in {self.folder / 'password'}"
        print(f"user {USER}, password {shown} (Prefect asks for {USER}:PASSWORD); Ray's token: {self.folder}/ray_token")

    def down(self) -> None:
        """Stop everything, the last started first; the state stays."""
        for name in reversed(ORDER):
            print(f"{name}: {'stopped' if self.keeper.stop(name) else 'did not run'}")
        remembered = self.folder / "ray_folder"
        if remembered.exists():
            shutil.rmtree(remembered.read_text(), ignore_errors=True)
            remembered.unlink()

    def status(self) -> bool:
        """Print what runs; say whether all is well."""
        well = {name: service.well() for name, service in self.services.items()}
        for name, good in well.items():
            print(f"{name:<10} {'well' if good else 'not up'}   {self.keeper.log(name)}")
        return all(well.values())

    def command(self, *words: str) -> None:
        """Run a command as a client of the stack, in its working directory.

        Raises:
            StackError: it failed.
        """
        done = subprocess.run(words, env=self.client_environment, cwd=self.work, check=False)
        if done.returncode:
            raise StackError(f"`{' '.join(words)}` ended with {done.returncode}")

    def _start(self, service: Service) -> None:
        print(f"{service.name}: {'starting' if self.keeper.start(service) else 'runs already'}", flush=True)

    def _await(self, service: Service) -> None:
        self.keeper.wait(service)
        print(f"{service.name}: well", flush=True)

    def _configure(self) -> None:
        """Write the worker's configuration: the demo's, on this stack's servers."""
        settings = {
            "lake": {"uri": str(self.work / "lake")},
            "tracking": {"uri": self.url("mlflow")},
            "ray": {
                "address": self.url("dashboard"),
                "job_directory": str(self.work),
                "job_command": str(Path(sys.executable).parent / "memmc"),
            },
            "cockpit": {"pixels": True},  # the scans are generated
            "train": {"max_minutes": float(os.environ.get("MEMMC_STACK_TRAIN_MINUTES", "1.5"))},
            "model": {"decoder_depth": 2},
            "split": {"train": 0.64, "calibrate": 0.18, "test": 0.18},
            "calibrate": {"false_positive_rate": 0.10},
        }
        lines: list[str] = []
        for section, fields in settings.items():
            lines += [f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in fields.items()), ""]
        _write_private(self.work / "memmc.toml", "\n".join(lines))


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def main() -> int:
    """Do as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["up", "down", "status"])
    parser.add_argument("--no-runs", action="store_true", help="start and deploy, run nothing")
    chosen = parser.parse_args()
    stack = Stack(Path(".memmc") / "stack")
    try:
        if chosen.action == "down":
            stack.down()
        elif chosen.action == "status":
            return 0 if stack.status() else 1
        else:
            stack.up()
            if not chosen.no_runs:
                stack.command(sys.executable, str(Path(__file__).with_name("steps.py")), str(stack.work))
    except StackError as error:
        print(f"stack: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
