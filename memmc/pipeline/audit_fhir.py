"""Records of the audit trail as FHIR R4 AuditEvent resources (https://hl7.org/fhir/R4/auditevent.html).

Kinds of events are those of DICOM's audit messages (PS3.15 A.5.3, codes of PS3.16 CID 400), so that an Audit Record
Repository of IHE's ATNA profile can file them; what was done stands in `subtype`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

DCM = "http://dicom.nema.org/resources/ontology/DCM"
TERMINOLOGY = "http://terminology.hl7.org/CodeSystem"
_OWN = "urn:memmc"

_ACTIVITY = ("110100", "Application Activity", "E")
_KINDS = {  # action -> code and meaning of PS3.16 CID 400, and whether it creates, reads, updates, deletes or executes
    "ingest": ("110107", "Import", "C"),
    "label": ("110103", "DICOM Instances Accessed", "U"),
    "explain": ("110103", "DICOM Instances Accessed", "R"),
    "erase": ("110105", "DICOM Study Deleted", "D"),
    "scores": ("110106", "Export", "R"),
    "maps": ("110106", "Export", "R"),
    "report": ("110106", "Export", "R"),
    "export": ("110106", "Export", "R"),
    "push": ("110106", "Export", "R"),
    "vault-resolve": ("110110", "Patient Record", "R"),
    "audit-export": ("110101", "Audit Log Used", "R"),
}
_OUTCOMES = {"ok": "0", "refused": "4", "failed": "8"}  # success, minor failure, serious failure


def audit_event(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return one record as an AuditEvent.

    `agent.name` says whether the actor's name was proven; the record's place in the chain is an entity of its own.
    """
    code, meaning, way = _KINDS.get(record["action"], _ACTIVITY)
    subject: dict[str, Any] = dict(record.get("subject") or {})
    error = subject.pop("error", None)
    action = {"system": f"{_OWN}:action", "code": record["action"]}
    event = {
        "resourceType": "AuditEvent",
        "id": record["id"],
        "type": {"system": DCM, "code": code, "display": meaning},
        "subtype": [action],
        "action": way,
        "recorded": record["at"],
        "outcome": _OUTCOMES[record["outcome"]],
        "agent": [_person(record), _program(record)],
        "source": {
            "observer": {"identifier": {"system": f"{_OWN}:host", "value": record["host"]}},
            "type": [{"system": f"{TERMINOLOGY}/security-source-type", "code": "4", "display": "Application Server"}],
        },
        "entity": [_entity("subject", record["action"], subject), _entity("record", record["digest"], _place(record))],
    }
    return {**event, "outcomeDesc": error} if error else event


def _person(record: Mapping[str, Any]) -> dict[str, Any]:
    verified = record["actor_verified_by"]
    known = f"verified by {verified}" if verified else f"{record['actor_basis']}, not authenticated"
    return {
        "who": {"identifier": {"system": f"{_OWN}:actor", "value": record["actor"]}},
        "name": f"{record['actor']} ({known})",
        "requestor": True,
        "network": {"address": record["host"], "type": "1"},  # 1: machine name
    }


def _program(record: Mapping[str, Any]) -> dict[str, Any]:
    software = record["software"]
    commit = (
        f", commit {software['commit']}{' with changes' if software['dirty'] else ''}" if software["commit"] else ""
    )
    return {
        "type": {"coding": [{"system": DCM, "code": "110150", "display": "Application"}]},
        "who": {"display": f"memmc {software['version']}{commit}"},
        "requestor": False,
    }


def _entity(kind: str, value: str, details: Mapping[str, Any]) -> dict[str, Any]:
    entity = {
        "what": {"identifier": {"system": f"{_OWN}:{kind}", "value": value}},
        "type": {"system": f"{TERMINOLOGY}/audit-entity-type", "code": "2", "display": "System Object"},
        "role": {"system": f"{TERMINOLOGY}/object-role", "code": "20", "display": "Job"},
    }
    written = [{"type": name, "valueString": _text(found)} for name, found in details.items()]
    return {**entity, "detail": written} if written else entity


def _place(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("sequence", "previous", "digest")}


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, sort_keys=True)
