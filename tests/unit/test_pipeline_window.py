from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from watched_lake import batch, later, make

from memmc.config import OperateConfig
from memmc.errors import DataError
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake
from memmc.pipeline import review
from memmc.pipeline.assess import assess
from memmc.pipeline.challenge import Case, measure
from memmc.pipeline.compare import compare
from memmc.pipeline.identity import home_directory
from memmc.pipeline.models import open_model
from memmc.pipeline.progress import Silent
from memmc.pipeline.report import report
from memmc.pipeline.score import score
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
def half_scored(tmp_path_factory):
    """A lake whose last 20 instances have no score, at an hour at which none may be scored; and the model's folder."""
    root = tmp_path_factory.mktemp("closed")
    config, folder = make(root, 60)
    Lake(config.lake.uri).append(INSTANCES, batch(2, 20, later(7), label="abnormal", split="test"))
    hours = [f"{datetime.now(UTC) + timedelta(hours=ahead):%H:%M}" for ahead in (2, 3)]
    return root, config.model_copy(update={"operate": OperateConfig(window="-".join(hours))}), folder


@pytest.mark.parametrize("step", ["assess", "report", "compare", "measure", "screen"])
def test_what_judges_by_scores_does_not_judge_by_part_of_them(half_scored, monkeypatch, step):
    root, config, folder = half_scored
    monkeypatch.chdir(root)
    lake, model = Lake(config.lake.uri), open_model(config, home_directory(), folder)
    version = ModelVersion("memmc-cxr", "1", digest=model.digest)
    monkeypatch.setattr(review, "champion_of", lambda *_given: version)
    monkeypatch.setattr(review, "open_model", lambda *_given: open_model(config, home_directory(), folder))
    if step == "screen":
        from memmc.pipeline import score as scoring

        monkeypatch.setattr(scoring, "open_model", lambda *_given: model)
    steps = {
        "assess": lambda: assess(config, lake, model, "cxr", None, Silent()),
        "report": lambda: report(config, "cxr", folder, out=str(root / "r.html")),
        "compare": lambda: compare(config, folder, folder, "cxr"),
        "measure": lambda: measure(config, lake, Case("cxr", model, None), Silent()),
        "screen": lambda: review.screen(config, "cxr"),
    }
    with pytest.raises(DataError, match=r"operate.window \(.*\) is closed and 20 of 80 instances .* run this again"):
        steps[step]()


def test_scoring_alone_ends_well_outside_of_its_hours(half_scored, monkeypatch):
    root, config, folder = half_scored
    monkeypatch.chdir(root)
    assert score(config, "cxr", folder).left == 20
