"""What a step leaves in the audit trail, and what `memmc audit` says of it."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime

import pyarrow as pa
import pydicom
import pytest
from fhir.resources.R4B.auditevent import AuditEvent
from pydicom.sr.codedict import codes
from typer.testing import CliRunner

import memmc
from memmc.cli.main import app
from memmc.config import Config, load_config
from memmc.errors import DataError, GateRefused, IntegrityError, UsageError
from memmc.lake.audit import HEAD, HEAD_LOST, record_name
from memmc.lake.schemas import INSTANCES
from memmc.lake.storage import Storage
from memmc.lake.tables import Lake
from memmc.pipeline import audit_fhir
from memmc.pipeline.audit import acting, head_of, note, recorded
from memmc.pipeline.audit_trail import export_trail, verify_trail
from memmc.pipeline.relabel import relabel

UID = "2.25.77"


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMMC_ACTOR", raising=False)
    return load_config(overrides=["lake.uri=lake"])


def trail(config) -> list[dict]:
    storage = Storage.open(config.lake.uri)
    names = [name for name in storage.list("_audit") if name != HEAD]
    return [json.loads(storage.read(name)) for name in names]


def asked(*arguments, status=0):
    done = CliRunner().invoke(app, ["audit", *arguments, "--lake", "lake"])
    assert done.exit_code == status, done.output
    return done.stdout


def test_a_record_says_who_what_when_and_with_which_version(config, monkeypatch):
    began = datetime.now(UTC).isoformat()
    note(config, "promote", outcome="refused", model="memmc-cxr/3", figures={"auroc": 0.8}, to="champion")
    (record,) = trail(config)
    assert (record["action"], record["outcome"]) == ("promote", "refused")
    assert record["subject"] == {"model": "memmc-cxr/3", "figures": {"auroc": 0.8}, "to": "champion"}
    assert began[:19] <= record["at"][:19] <= datetime.now(UTC).isoformat() and record["at"].endswith("Z")
    assert (record["actor_basis"], record["actor_verified_by"]) == ("os-user", None)
    assert record["software"]["version"] == memmc.__version__
    assert record["software"]["commit"] is None or re.fullmatch("[0-9a-f]{40}", record["software"]["commit"])
    with acting("nightly", "deployment"):
        note(config, "ingest")
        monkeypatch.setenv("MEMMC_ACTOR", "anna")
        note(config, "ingest")
    monkeypatch.setenv("MEMMC_ACTOR_VERIFIED_BY", "sso")
    note(config, "ingest")
    names = [(item["actor"], item["actor_basis"], item["actor_verified_by"]) for item in trail(config)[1:]]
    assert names == [("nightly", "deployment", None), ("anna", "stated", None), ("anna", "stated", "sso")]


@pytest.mark.parametrize(
    "value", ["/data/doe", "s3://bucket/x", "DOE^ANNA", "a\\b", "~/x", ["/x"], {"k": {"/x": 1}}, "../x", "Müller"]
)
def test_what_may_name_a_patient_or_a_place_is_refused(config, value):
    with pytest.raises(ValueError, match="'seen' looks like") as caught:
        note(config, "ingest", seen=value)
    assert str(value) not in str(caught.value)
    assert trail(config) == []


def test_a_subject_stays_small(config):
    with pytest.raises(ValueError, match="longer"):
        note(config, "ingest", uids=[UID] * 5000)


@recorded("score", lambda done: done)
def step(config, cohort, *, raises=None, result=None, dry_run=False):
    """A step as the pipeline's are."""
    if raises is not None:
        raise raises
    return result


@recorded("train", lambda done: {"images": done})
def outer(config, cohort):
    step(config, cohort, result={"scored": 1})
    return 5


def test_outcomes_of_a_step(config):
    step(config, "c", result={"scored": 1})
    for error in (GateRefused("no"), DataError("QUOXX"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            step(config, "c", raises=error)
    with pytest.raises(UsageError):
        step(config, "c", raises=UsageError("wrong call"))
    step(config, "c", result={"scored": 1}, dry_run=True)
    step(config, "c", result=None)
    with pytest.raises(DataError):
        step(config, "Doe^Anna", raises=DataError("x"))
    outer(config, cohort="d")
    found = [(record["action"], record["outcome"], record["subject"]) for record in trail(config)]
    assert found == [
        ("score", "ok", {"cohort": "c", "scored": 1}),
        ("score", "refused", {"cohort": "c", "error": "GateRefused"}),
        ("score", "failed", {"cohort": "c", "error": "DataError"}),
        ("score", "failed", {"cohort": "c", "error": "KeyboardInterrupt"}),
        ("score", "failed", {"error": "DataError"}),
        ("train", "ok", {"cohort": "d", "images": 5}),
    ]
    assert "QUOXX" not in json.dumps(trail(config))


def test_a_failure_in_a_mistyped_place_makes_no_lake(config, tmp_path):
    with pytest.raises(DataError):
        step(config, "c", raises=DataError("no instances"))
    assert not (tmp_path / "lake").exists()


def test_a_failure_that_cannot_be_recorded_stays_the_failure(config, monkeypatch, caplog):
    note(config, "ingest")

    def full(*_):
        raise memmc.errors.StorageError("full")

    monkeypatch.setattr(Storage, "create", full)
    with pytest.raises(GateRefused, match="mine"):
        step(config, "c", raises=GateRefused("mine"))
    assert "could not be recorded" in caplog.text


def test_a_real_step_leaves_its_record(config, tmp_path):
    lake = Lake(config.lake.uri)
    row = {"cohort": "c", "object_key": "1", "source_ref": "", "outcome": "stored", "split": "train"}
    row |= {"content_key": "x", "size_bytes": 1, "sop_instance_uid": UID, "label": "unknown", "ingest_run": "r"}
    lake.append(INSTANCES, pa.Table.from_pylist([{**row, "ingested_at": datetime(2026, 1, 1, tzinfo=UTC)}]), "ingest")
    (tmp_path / "labels.csv").write_text(f"sop_instance_uid,label\n{UID},normal\n")
    relabel(config, "c", tmp_path / "labels.csv", dry_run=True)
    assert trail(config) == []
    relabel(config, "c", tmp_path / "labels.csv")
    (record,) = trail(config)
    assert (record["action"], record["subject"]["labels"]) == ("label", {"normal": 1})


def test_verify_says_which_record_and_ends_with_1(config, tmp_path):
    with pytest.raises(DataError, match="nothing was ever recorded"):  # a mistyped place does not pass as intact
        verify_trail(config)
    for number in range(5):
        note(config, "score", scored=number)
    kept = head_of(config)
    good = json.loads(asked("verify", "--head", kept, "--json"))
    assert (good["intact"], good["records"], good["head"], good["first_bad"]) == (True, 5, kept, None)
    with pytest.raises(UsageError, match="NUMBER:DIGEST"):
        verify_trail(config, ["5:abc"])
    name = tmp_path / "lake" / record_name(3)
    name.write_text(name.read_text().replace('"scored":2', '"scored":3'))
    spoilt = json.loads(asked("verify", "--json", status=1))
    assert (spoilt["intact"], spoilt["first_bad"]) == (False, 3)
    assert "first at record 3" in asked("verify", status=1)
    with pytest.raises(IntegrityError, match="record 3"):
        export_trail(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_exports_hold_every_record_and_are_recorded(config, tmp_path):
    for number in range(3):
        note(config, "score", scored=number)
    lines = asked("export").splitlines()
    assert [json.loads(line) for line in lines] == trail(config)[:3]
    told = json.loads(asked("export", "--out", "trail.jsonl", "--json"))
    assert told["records"] == len((tmp_path / "trail.jsonl").read_text().splitlines()) == 4
    assert [record["action"] for record in trail(config)[3:]] == ["audit-export"] * 2
    assert json.loads(asked("verify", "--head", told["head"], "--json"))["intact"]


def fhir_lines(config, *actions) -> list[dict]:
    for action in actions:
        note(config, action, cohort="cxr", scored=3, models=["m/1"], uid=UID, calibration_id="")
    with pytest.raises(GateRefused):
        step(config, "c", raises=GateRefused("no"))
    return [json.loads(line) for line in asked("export", "--format", "fhir").splitlines()]


def test_fhir_events_are_valid(config):
    """Against an independent model of the resource: required elements, types, codes of bound value sets."""
    actions = [*audit_fhir._KINDS, "train", "promote", HEAD_LOST]
    events = fhir_lines(config, *actions)
    assert len(events) == len(actions) + 1
    for event in events:
        parsed = AuditEvent.model_validate(event)
        assert parsed.source and parsed.recorded and parsed.type
        assert event["action"] in set("CRUDE") and event["outcome"] in {"0", "4", "8", "12"}
        assert sum(agent["requestor"] for agent in event["agent"]) == 1
        assert event["type"]["system"] == audit_fhir.DCM
        for entity in event["entity"]:
            assert entity["type"]["code"] in {"1", "2", "3", "4"}
            assert all(set(detail) == {"type", "valueString"} and detail["valueString"] for detail in entity["detail"])
    assert events[-1]["outcome"] == "4" and events[-1]["outcomeDesc"] == "GateRefused"
    assert "not authenticated" in events[0]["agent"][0]["name"]
    for broken in ("type", "recorded", "agent", "source"):
        with pytest.raises(ValueError):
            AuditEvent.model_validate({name: value for name, value in events[0].items() if name != broken})


def test_codes_are_those_of_the_standard():
    """PS3.16 CID 400 Audit Event ID, as pydicom's dictionary has it."""
    known = {(code.value, code.meaning) for code in (getattr(codes.cid400, name) for name in codes.cid400.dir())}
    assert {("110107", "Import"), ("110106", "Export")} <= known, pydicom.__version__
    for code, meaning, _ in (*audit_fhir._KINDS.values(), audit_fhir._ACTIVITY):
        assert (code, meaning) in known
