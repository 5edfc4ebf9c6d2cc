"""The command line: verbs, exit statuses, what stands on stdout."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

VERBS = {
    "doctor",
    "demo",
    "ingest",
    "train",
    "calibrate",
    "score",
    "scores",
    "evaluate",
    "report",
    "select",
    "sweep",
    "export",
}
VERBS |= {"lake", "scan-phi", "erase", "vault", "gate", "label", "maps", "explain", "cohort", "compare", "deploy"}
VERBS |= {"drift", "monitor", "push"}
VERBS |= {"promote", "rollback", "decisions", "retrain", "review"}
VERBS |= {"audit", "tracking"}


def memmc(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MEMMC_", "PREFECT_"))}
    command = [sys.executable, "-m", "memmc.cli.main", *arguments]
    return subprocess.run(
        command, cwd=cwd, env={**clean, **env}, capture_output=True, text=True, timeout=120, check=False
    )


def test_help_lists_the_verbs_that_exist(tmp_path):
    done = memmc("--help", cwd=tmp_path)
    assert done.returncode == 0
    commands = done.stdout.split("Commands:")[1]
    assert set(re.findall(r"^  ([\w-]+) ", commands, re.MULTILINE)) == VERBS


def test_the_first_line_comes_without_heavy_imports(tmp_path):
    began = time.monotonic()
    memmc("ingest", "--help", cwd=tmp_path)
    once = time.monotonic() - began
    heavy = (
        "import sys, memmc.cli.main; print(sorted({'torch','ray','mlflow','prefect','deltalake'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert once < 10  # a loaded machine; 0.7 s on an idle one


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["ingest"], 2, "Missing"),
        (["ingest", "x", "--cohort", "Not A Name"], 2, "cohort names"),
        (["train", "--cohort", "c", "--set", "train.sead=1"], 2, "did you mean 'train.seed'"),
        (["train", "--cohort", "c"], 1, "no table 'instances'"),
        (["scores", "--cohort", "c", "--out", "x.xlsx"], 2, ".parquet or .csv"),
        (["ingest", "absent-folder", "--cohort", "c"], 2, ""),
    ],
)
def test_errors_have_their_exit_status_and_say_what_to_do(tmp_path, arguments, status, words):
    done = memmc(*arguments, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_with_json_an_error_is_one_object_on_stdout(tmp_path):
    done = memmc("train", "--cohort", "c", "--json", cwd=tmp_path)
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"] == "DataError"


def test_labels_that_name_nothing_are_refused_before_any_work(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.dcm").write_bytes(b"x")
    (tmp_path / "l.csv").write_text("path,label\nb.dcm,normal\n")
    done = memmc("ingest", "in", "--cohort", "c", "--labels", "l.csv", cwd=tmp_path)
    assert done.returncode == 1
    assert "none of the 1 paths" in done.stderr
    (tmp_path / "l.csv").write_text("path,label\na.dcm,healthy\n")
    done = memmc("ingest", "in", "--cohort", "c", "--labels", "l.csv", cwd=tmp_path)
    assert done.returncode == 2
    assert "line 2" in done.stderr
    assert "healthy" not in done.stderr


def test_a_dry_run_writes_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.dcm").write_bytes(b"x")
    done = memmc("ingest", "in", "--cohort", "c", "--dry-run", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["counts"] == {"objects listed": 1, "already ingested": 0, "new": 1, "labelled": 0}
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_throw_away_key_is_made_said_and_kept_private(tmp_path):
    (tmp_path / "in").mkdir()
    first = memmc("ingest", "in", "--cohort", "c", cwd=tmp_path)
    assert "throw-away identity key" in first.stderr
    key = tmp_path / ".memmc" / "deid.key"
    assert key.stat().st_mode & 0o777 == 0o600
    second = memmc("ingest", "in", "--cohort", "c", "--dry-run", cwd=tmp_path)
    assert "throw-away" not in second.stderr
    other = tmp_path / "other.key"
    other.touch(mode=0o600)
    other.write_text("another-key-that-is-long-enough-to-be-one-0123456789\n")
    refused = memmc("ingest", "in", "--cohort", "c", "--dry-run", "--set", f"deid.key_file={other}", cwd=tmp_path)
    assert refused.returncode == 1
    assert "identity key" in refused.stderr


def test_what_libraries_print_does_not_stand_on_stdout(tmp_path, monkeypatch, capsys):
    from memmc.cli.options import call
    from memmc.pipeline.results import PlanResult

    monkeypatch.chdir(tmp_path)
    with call(None, None, [], as_json=True) as run:
        print("(raylet) a warning of the cluster")
        run.finish(PlanResult({"new": 1}), lambda: "")
    said = capsys.readouterr()
    assert json.loads(said.out) == PlanResult({"new": 1}).as_dict()
    assert "(raylet) a warning" in said.err


def test_the_file_that_memmc_config_names_is_read_where_none_is_given(tmp_path, monkeypatch):
    from memmc.cli.options import call

    monkeypatch.chdir(tmp_path)
    for name, passes in (("site.toml", 8), ("other.toml", 16)):
        (tmp_path / name).write_text(f"[score]\npasses = {passes}\n")
    monkeypatch.setenv("MEMMC_CONFIG", str(tmp_path / "site.toml"))
    with call(None, None, [], as_json=True) as run:
        assert run.config.score.passes == 8
    with call(None, tmp_path / "other.toml", [], as_json=True) as run:
        assert run.config.score.passes == 16
    monkeypatch.setenv("MEMMC_CONFIG", "")
    with call(None, None, [], as_json=True) as run:
        assert run.config.score.passes not in {8, 16}
