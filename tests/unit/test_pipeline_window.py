from datetime import UTC, datetime, timedelta

import judged_lake
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from watched_lake import batch, later

from memmc.config import OperateConfig
from memmc.errors import DataError
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake
from memmc.pipeline import compare as comparing
from memmc.pipeline import report as reporting
from memmc.pipeline import review
from memmc.pipeline import score as scoring
from memmc.pipeline.assess import assess
from memmc.pipeline.challenge import Case, measure
from memmc.pipeline.progress import Silent
from memmc.pipeline.window import Shift, Window
from memmc.registry.models import ModelVersion


def window(text, zone="UTC"):
    return Window.of(OperateConfig(window=text, timezone=zone))


def at(text):
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("now", "left_h"),
    [
        ("2026-11-24T21:59:59", 0),
        ("2026-11-24T22:00:00", 8),
        ("2026-11-24T23:30:00", 6.5),
        ("2026-11-25T00:00:00", 6),
        ("2026-11-25T05:00:00", 1),
        ("2026-11-25T06:00:00", 0),
        ("2026-11-25T12:00:00", 0),
    ],
)
def test_a_window_over_midnight(now, left_h):
    assert window("22:00-06:00").left_s(at(now)) == left_h * 3600


@pytest.mark.parametrize(("now", "left_h"), [("08:59:59", 0), ("09:00:00", 3), ("11:00:00", 1), ("12:00:00", 0)])
def test_a_window_within_a_day(now, left_h):
    assert window("09:00-12:00").left_s(at(f"2026-11-24T{now}")) == left_h * 3600


@pytest.mark.parametrize(
    ("night", "hours"),
    [("2026-10-24", 9), ("2026-03-28", 7), ("2026-11-24", 8)],  # clocks go back, go forward, stay
)
def test_the_night_of_another_zone_is_as_long_as_its_clocks_make_it(night, hours):
    opened = datetime.fromisoformat(f"{night}T22:00:00").replace(tzinfo=window("22:00-06:00", "Europe/Berlin").zone)
    assert window("22:00-06:00", "Europe/Berlin").left_s(opened) == hours * 3600


@settings(deadline=None)
@given(st.datetimes(datetime(2026, 1, 1), datetime(2027, 1, 1)), st.integers(0, 1439), st.integers(1, 1439))
def test_open_for_its_length_and_closed_for_the_rest(now, begin, length):
    def clock(minute):
        return f"{minute // 60 % 24:02d}:{minute % 60:02d}"

    found = window(f"{clock(begin)}-{clock(begin + length)}").left_s(now.replace(tzinfo=UTC))
    since = (now - now.replace(hour=0, minute=0, second=0, microsecond=0)) / timedelta(seconds=1) - begin * 60
    since %= 86400
    assert found == pytest.approx(max(0.0, length * 60 - since), abs=1e-3)


def test_a_shift_ends_with_its_window_and_without_one_never():
    now = datetime.now(UTC)
    opened = f"{now - timedelta(hours=1):%H:%M}-{now + timedelta(hours=1):%H:%M}"
    closed = f"{now + timedelta(hours=1):%H:%M}-{now + timedelta(hours=2):%H:%M}"
    assert not Shift(window(opened)).over()
    assert Shift(window(closed)).over()
    assert Window.of(OperateConfig()) is None
    assert not Shift(None).over()


@pytest.fixture(scope="module")
def without_scores(tmp_path_factory):
    """A lake of both labels without a score, at an hour at which none may be made."""
    root = tmp_path_factory.mktemp("closed")
    config, model = judged_lake.unscored(root)
    Lake(config.lake.uri).append(INSTANCES, batch(2, 20, later(7), label="abnormal", split="test"))
    hours = [f"{datetime.now(UTC) + timedelta(hours=ahead):%H:%M}" for ahead in (2, 3)]
    return root, config.model_copy(update={"operate": OperateConfig(window="-".join(hours))}), model


@pytest.fixture
def closed(without_scores, monkeypatch):
    """The same, its model found under any name in every step."""
    root, config, model = without_scores
    monkeypatch.chdir(root)
    version = ModelVersion("memmc-cxr", "1", digest=model.digest)
    monkeypatch.setattr(review, "champion_of", lambda *_given: version)
    monkeypatch.setattr(review, "tracking_of", lambda *_given: None)
    for step in (scoring, reporting, comparing, review):
        monkeypatch.setattr(step, "open_model", lambda *_given: model)
    return config, model


@pytest.mark.parametrize("step", ["assess", "report", "compare", "measure", "screen"])
def test_what_judges_by_scores_does_not_judge_without_them(closed, tmp_path, step):
    config, model = closed
    lake = Lake(config.lake.uri)
    steps = {
        "assess": lambda: assess(config, lake, model, "cxr", None, Silent()),
        "report": lambda: reporting.report(config, "cxr", model.ref, out=str(tmp_path / "r.html")),
        "compare": lambda: comparing.compare(config, model.ref, model.ref, "cxr"),
        "measure": lambda: measure(config, lake, Case("cxr", model, None), Silent()),
        "screen": lambda: review.screen(config, "cxr"),
    }
    with pytest.raises(DataError, match=r"operate.window \(.*\) is closed and 80 of 80 instances .* run this again"):
        steps[step]()


def test_scoring_alone_ends_well_outside_of_its_hours(closed):
    config, model = closed
    assert scoring.score(config, "cxr", model.ref).left == 80
