"""The report of a lake, made in this process."""

from __future__ import annotations

import judged_lake

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
