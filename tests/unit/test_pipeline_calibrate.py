"""How many held-out normals a calibration asks for, what helps when there are fewer, and where it scores them."""

from __future__ import annotations

from pathlib import Path

import pytest
from drawn_normals import normal_rows

from memmc.config import load_config
from memmc.errors import GateRefused
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake
from memmc.pipeline.calibrate import calibrate_model, require_normals
from memmc.pipeline.models import OpenModel
from memmc.pipeline.progress import Silent


def test_what_helps_is_said_by_whose_normals_they_are(tmp_path: Path) -> None:
    """A model's own cohort is read at the version it was trained on, whatever has come since; another at its newest."""
    config = load_config(overrides=[f"lake.uri={tmp_path / 'lake'}"])
    lake = Lake(config.lake.uri)
    version = lake.append(INSTANCES, normal_rows(1, 10, "calibrate"))
    lake.append(INSTANCES, normal_rows(2, 30, "calibrate"))
    lake.append(INSTANCES, normal_rows(3, 12, "calibrate", cohort="hand"))
    model = OpenModel(
        "memmc-cxr/1", "d" * 16, tmp_path, {"cohort": "cxr", "dataset_version": version, "preprocess_id": "p"}
    )
    own = rf"^10 held-out normal images, at least 20 are needed; train again .*--resume new: memmc-cxr/1 .* {version}\)"
    with pytest.raises(GateRefused, match=own):
        calibrate_model(config, None, lake, model, "cxr", Silent())
    with pytest.raises(GateRefused, match=r"^12 held-out .*; ingest more normals into cohort 'hand', or lower"):
        calibrate_model(config, None, lake, model, "hand", Silent())


@pytest.mark.parametrize(
    ("count", "overrides", "stages", "least", "ways"),
    [
        (19, (), 0, 20, "lower calibrate.min_normals"),
        (18, (), 0, 20, "lower calibrate.min_normals and raise calibrate.false_positive_rate"),
        (98, ("calibrate.false_positive_rate=0.01",), 0, 99, "raise calibrate.false_positive_rate"),
        (38, ("score.early_stop=0.05",), 1, 39, "set score.early_stop=0"),
        (78, ("score.early_stop=0.05",), 2, 79, "set score.early_stop=0"),
    ],
)
def test_one_normal_fewer_than_every_setting_needs_is_refused(
    count: int, overrides: tuple[str, ...], stages: int, least: int, ways: str
) -> None:
    config = load_config(overrides=overrides)
    with pytest.raises(GateRefused) as refused:
        require_normals(config, count, "find more", early_stages=stages)
    assert str(refused.value) == (f"{count} held-out normal images, at least {least} are needed; find more, or {ways}")
    require_normals(config, least, "find more", early_stages=stages)
