"""Who may agree to a promotion, and what a name is."""

from __future__ import annotations

import re

from memmc.config import PromoteConfig
from memmc.errors import GateRefused, UsageError

PERSON = r"^[^\W_][\w .@-]{0,63}$"
"""A name: letters and digits of any script; Prefect's form asks for the same."""


def check_name(name: str) -> None:
    """Refuse what is no name.

    Raises:
        UsageError: saying what makes one.
    """
    if not re.fullmatch(PERSON, name):
        raise UsageError("a name here is at most 64 letters, digits, spaces, '.', '_', '@' and '-' (--approve NAME)")


def check_approver(rules: PromoteConfig, approver: str | None, author: str | None) -> None:
    """Refuse a name that is none, and with `promote.two_people` the one who began the training.

    Raises:
        UsageError: letters, digits, space, '.', '_', '@' and '-' make a name.
        GateRefused: it takes two people.
    """
    if approver is None:
        return
    check_name(approver)
    if rules.approval != "person" or not rules.two_people:
        return
    if author is None:
        raise GateRefused(
            "nobody knows who began this model's training, so that nobody can be told from them; train it again, or "
            "set promote.two_people=false"
        )
    if approver.strip().casefold() == author.strip().casefold():
        raise GateRefused(f"{author} began the training of this model; another person must approve it")
