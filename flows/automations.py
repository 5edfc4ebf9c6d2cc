"""Automations as code: what Prefect's API takes, but that blocks and deployments are named and not numbered.

An action with `block: TYPE/NAME` or `deployment: FLOW/NAME` gets the id that the server gave it. A notification whose
block has not been made waits; the rest of its automation does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from flows.calls import refuse_credentials
from flows.deployment_file import OWNED
from memmc.errors import ConfigError

if TYPE_CHECKING:
    from prefect.events.schemas.automations import AutomationCore

_NOBODY = UUID(int=0)


@dataclass(frozen=True)
class Resolved:
    """An automation for the server, and the blocks that its left-out actions wait for."""

    wanted: AutomationCore | None
    waits_for: list[str]


def check_automation(written: Mapping[str, Any]) -> None:
    """Check an automation without a server.

    Raises:
        ConfigError: an unknown key, or a name that has not the form asked for.
        UsageError: it shows credentials.
    """
    refuse_credentials(dict(written))
    resolve_automation(written, lambda _: _NOBODY, lambda _: _NOBODY)


def resolve_automation(
    written: Mapping[str, Any], block_id: Callable[[str], UUID | None], deployment_id: Callable[[str], UUID]
) -> Resolved:
    """Put ids in the place of names, and the tag that says whose it is.

    Args:
        block_id: of `TYPE/NAME`; None where there is none.
        deployment_id: of `FLOW/NAME`.

    Raises:
        ConfigError: as `check_automation`.
    """
    from prefect.events.schemas.automations import AutomationCore
    from pydantic import ValidationError

    name, actions, waits_for = written.get("name"), list[dict[str, Any]](), list[str]()
    for action in written.get("actions", []):
        given = dict(action)
        if "block" in given:
            found = block_id(_two_names(name, given["block"]))
            if found is None:
                waits_for.append(given["block"])
                continue
            given["block_document_id"] = str(found)
            del given["block"]
        if "deployment" in given:
            given |= {"source": "selected", "deployment_id": str(deployment_id(_two_names(name, given["deployment"])))}
            del given["deployment"]
        actions.append(given)
    if not actions:
        return Resolved(None, waits_for)
    complete = {**written, "actions": actions, "tags": sorted({OWNED, *written.get("tags", [])})}
    try:
        wanted = AutomationCore.model_validate(complete)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(f"automation '{name}': {where}: {problem['msg']}") from None
    unknown = _unknown(complete, wanted.model_dump(mode="json"))
    if unknown:
        raise ConfigError(f"automation '{name}': Prefect knows no key '{unknown}'")
    return Resolved(wanted, waits_for)


def _two_names(automation: Any, value: Any) -> str:
    if not isinstance(value, str) or value.count("/") != 1:
        raise ConfigError(f"automation '{automation}': expected TYPE/NAME of a block or FLOW/NAME of a deployment")
    return value


def _unknown(written: Any, known: Any, path: str = "") -> str | None:
    """Return the first key that was written and passed over, since Prefect's models do not refuse any."""
    if isinstance(written, Mapping) and isinstance(known, Mapping):
        free = path.rpartition(".")[2] in {"match", "match_related", "parameters", "job_variables"}
        for key, value in written.items():
            if key not in known and not free:
                return f"{path}.{key}".lstrip(".")
            found = _unknown(value, known.get(key), f"{path}.{key}")
            if found:
                return found
    elif isinstance(written, list) and isinstance(known, list):
        for number, (one, other) in enumerate(zip(written, known, strict=False)):
            found = _unknown(one, other, f"{path}.{number}")
            if found:
                return found
    return None
