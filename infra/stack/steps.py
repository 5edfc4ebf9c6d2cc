"""The demo's way through the deployments of a stack: generated scans, then one run after another, all to be green."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from prefect.deployments import run_deployment

from memmc.cores import cores
from memmc.phantom.hospital import write_hospital

_NORMAL, _ABNORMAL, _BROKEN, _SEED = 240, 48, 7, 2026
_TRIES = 3  # a run beside one of the schedule is cancelled, as the deployment asks
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("ingest/arrivals", {}),
    ("train/on-demand", {}),
    ("score/new-scans", {"evaluate": True, "report": True}),
    ("monitor/watch", {}),
    ("retrain/when-due", {}),
    ("maintenance/weekly", {}),
    ("status/daily", {}),
]


def run(deployment: str, parameters: dict[str, Any]) -> bool:
    """Run a deployment to its end; say whether it completed."""
    for _ in range(_TRIES):
        began = time.monotonic()
        found = run_deployment(name=deployment, parameters=parameters, timeout=None, poll_interval=2)
        state = found.state
        print(f"{deployment}: {found.name} {state.name}, {time.monotonic() - began:.0f} s", flush=True)
        if state.is_completed():
            return True
        if "GateRefused" in (state.message or ""):
            print(f"  {state.message}\n  a gate at work; MEMMC_STACK_TRAIN_MINUTES (1.5) lets the model learn more")
            return True
        if not state.is_cancelled():
            print(f"  {state.message}\n  see {os.environ['PREFECT_API_URL'][:-4]}/runs/flow-run/{found.id}")
            return False
        time.sleep(20)
    return False


def main() -> int:
    """Generate, then run every deployment in turn."""
    work = Path(sys.argv[1])
    write_hospital(
        work / "hospital", num_normal=_NORMAL, num_abnormal=_ABNORMAL, num_broken=_BROKEN, seed=_SEED, workers=cores()
    )
    return 0 if all(run(*each) for each in RUNS) else 1


if __name__ == "__main__":
    sys.exit(main())
