"""The report of a lake, made in this process."""

from __future__ import annotations

import judged_lake
import pytest
from watched_lake import START, batch

from memmc.errors import DataError
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake
from memmc.pipeline import report as module
from memmc.pipeline.report import report


def test_a_report_explains_the_highest_by_the_papers_score(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ("score.scorer=pasted_ms_ssim", "score.passes=10", "calibrate.false_positive_rate=0.3")
    config, model = judged_lake.judged(tmp_path, *settings)
    report(config, "cxr", str(model.folder), out=str(tmp_path / "r.html"))
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("explanation of a flagged scan") == 3
    assert "likeness of the nearest normal patch" in page
    assert "of the score;" not in page  # this score has no parts
    assert "Mean gate of each level" in page
    assert f"instances at version {Lake(config.lake.uri).version(INSTANCES)}" in page


def test_a_failure_to_measure_is_not_called_a_lack_of_labels(tmp_path, monkeypatch):
    """Labelled images that were prepared in two ways."""
    monkeypatch.chdir(tmp_path)
    config, model = judged_lake.unscored(tmp_path)
    rows = batch(5, 6, START, label="abnormal", split="test")
    index = rows.column_names.index("preprocess_id")
    Lake(config.lake.uri).append(INSTANCES, rows.set_column(index, "preprocess_id", [["q"] * 6]))
    monkeypatch.setattr(module, "open_model", lambda *_given: model)
    with pytest.raises(DataError, match="prepared in 2 ways"):
        report(config, "cxr", str(model.folder), out=str(tmp_path / "r.html"))
    assert not (tmp_path / "r.html").exists()
