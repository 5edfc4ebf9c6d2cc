"""The hours in which bulk work may run: it begins inside them and stops at their end."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

from memmc.config import OperateConfig


@dataclass(frozen=True)
class Window:
    """Hours of every day, from `opens` until before `closes`; over midnight where that is the earlier time."""

    opens: time
    closes: time
    zone: ZoneInfo

    @classmethod
    def of(cls, operate: OperateConfig) -> Window | None:
        """Return the window that is set, or None."""
        if operate.window is None:
            return None
        opens, closes = (time.fromisoformat(part) for part in operate.window.split("-"))
        return cls(opens, closes, ZoneInfo(operate.timezone))

    def left_s(self, now: datetime) -> float:
        """Return how long the window stays open, s; 0 where it is closed.

        Args:
            now: with a time zone.
        """
        local = now.astimezone(self.zone)
        early, late = local.time() < self.closes, local.time() >= self.opens
        if not (early and late if self.opens < self.closes else early or late):
            return 0.0
        day = local.date() if early else local.date() + timedelta(days=1)
        end = datetime.combine(day, self.closes, self.zone)
        return max(0.0, (end.astimezone(UTC) - now.astimezone(UTC)).total_seconds())


class Shift:
    """Says when a run has to stop: at the end of the window it began in, even if the next has opened by then."""

    def __init__(self, window: Window | None) -> None:
        self._end = None if window is None else datetime.now(UTC) + timedelta(seconds=window.left_s(datetime.now(UTC)))

    def over(self) -> bool:
        """Return whether the time is up; never without a window."""
        return self._end is not None and datetime.now(UTC) >= self._end
