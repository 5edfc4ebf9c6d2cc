"""Why an object is or is not in scope: the rules of selection, asked of one file, without a lake."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

from memmc.config import Config
from memmc.dicom.convert import judge
from memmc.dicom.reasons import REASONS, outcome_of
from memmc.errors import UsageError
from memmc.pipeline.results import Result


@dataclass(frozen=True)
class RuleAnswer:
    """One rule, asked of one object.

    Attributes:
        name: the rule's.
        passed: whether the object does not break it.
        states: what has to hold.
        setting: the configuration field it follows and its value; empty where it follows none.
        values: the attributes it read, in closed vocabularies; never patient data.
        reason: code of the rule that was broken.
    """

    name: str
    passed: bool
    states: str
    setting: str
    values: dict[str, str]
    reason: str | None


@dataclass(frozen=True)
class Explanation(Result):
    """What selection says of one object; ingest may still refuse its pixels.

    Attributes:
        outcome: `in scope`, `excluded` or `quarantined`.
        reason: code of the first rule that was broken, or of what the reader refused.
        meaning: the code in words.
        rules: in the order they are asked; none where the object could not be read.
    """

    outcome: str
    reason: str | None
    meaning: str
    rules: list[RuleAnswer]


def explain_file(config: Config, path: Path) -> Explanation:
    """Ask every rule of one file; nothing is written and no decoder runs.

    Raises:
        UsageError: not a regular file, or unreadable.
    """
    data = _read(path, config.ingest.max_file_bytes)
    if data is None:
        return _refused("FILE_TOO_LARGE")
    unreadable, verdicts = judge(data, config.select, config.ingest)
    if unreadable is not None:
        return _refused(unreadable)
    rules = [
        RuleAnswer(
            name=verdict.rule.name,
            passed=verdict.reason is None,
            states=verdict.rule.states,
            setting=_setting(config, verdict.rule.setting),
            values=dict(verdict.values),
            reason=verdict.reason,
        )
        for verdict in verdicts
    ]
    reason = next((rule.reason for rule in rules if rule.reason is not None), None)
    if reason is None:
        return Explanation("in scope", None, "no rule objects", rules)
    return Explanation(outcome_of(reason), reason, REASONS[reason], rules)


def _refused(reason: str) -> Explanation:
    return Explanation(outcome_of(reason), reason, REASONS[reason], [])


def _read(path: Path, max_bytes: int) -> bytes | None:
    """Return the file, None where it is too large."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UsageError("FILE is not a regular file; name one DICOM object")
        return None if found.st_size > max_bytes else path.read_bytes()
    except OSError as error:
        raise UsageError(f"FILE cannot be read ({error.strerror}); name one DICOM object") from None


def _setting(config: Config, name: str) -> str:
    if not name:
        return ""
    value = getattr(config.select, name)
    return f"select.{name}={','.join(value) or 'any' if isinstance(value, tuple) else value}"
