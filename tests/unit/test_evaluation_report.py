"""The report: true numbers, nothing from outside, nothing that runs, every absence said."""

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from simulated_report import demo_report

from memmc.errors import StorageError
from memmc.evaluation import figures
from memmc.evaluation.findings import findings
from memmc.evaluation.metrics import Interval
from memmc.evaluation.report import render_report, write_report
from memmc.evaluation.report_data import (
    Ablation,
    GroupResult,
    IngestCount,
    MemoryHealth,
    MemoryLayer,
    Reason,
    ReportData,
    ShutOff,
    StratumFacts,
    select_cases,
)

HOSTILE = "<script>alert(1)</script>\"' onload=x {{ 7*7 }} $x^2$ & https://evil.example/x.png"


class Page(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.by_id: dict[str, str] = {}
        self.text = ""
        self._open_id: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._open_id = dict(attrs).get("id")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open_id:
            self.by_id[self._open_id] = data.strip()
            self._open_id = None


@pytest.fixture(scope="module")
def demo() -> ReportData:
    return demo_report()


@pytest.fixture(scope="module")
def html(demo: ReportData) -> str:
    return render_report(demo)


def bare(demo: ReportData) -> ReportData:
    return ReportData(demo.cohort, demo.created_at, demo.provenance, demo.calibration, demo.scores, 3, 150)


def test_losses_without_memory_and_levels_stand_in_the_report(demo: ReportData) -> None:
    page = render_report(demo)
    for text in ("without the memory 0.213", "hearing the last encoder level alone 0.307", "0.41, 0.52, 0.63"):
        assert text in " ".join(page.split())
    assert "without the memory 0.801 (difference +0.028, 0.004 – 0.051)" in " ".join(page.split())
    single = dataclasses.replace(demo.memory, gates=())
    assert "last encoder level alone" not in render_report(dataclasses.replace(demo, memory=single))


def test_levels_stand_in_the_report_of_a_model_without_memory(demo: ReportData) -> None:
    def said(memory: MemoryHealth) -> str:
        return " ".join(Page(render_report(dataclasses.replace(demo, memory=memory))).text.split())

    shut = ShutOff(0.801, 0.028, Interval(0.004, 0.051))
    levels = MemoryHealth(
        (),
        Ablation(48, 48, 0.829, last_level_only=shut),
        gates=(0.41, 0.52, 0.63),
        error=0.211,
        error_last_level_only=0.307,
    )
    text = said(levels)
    for part in (
        "No memory slots in the attention of the encoder.",
        "whole model 0.829; hearing the last level alone 0.801 (difference +0.028, 0.004 – 0.051).",
        "Masked error on held-out normals 0.211; hearing the last encoder level alone 0.307.",
        "Mean gate of each level, first to last: 0.41, 0.52, 0.63.",
    ):
        assert part in text
    assert "without the memory" not in text
    assert "Not measured, or a model" not in text
    unmeasured = said(dataclasses.replace(levels, ablation=None))
    assert "AUROC hearing the last level alone: not measured." in unmeasured
    both = said(dataclasses.replace(demo.memory, ablation=None))
    assert "AUROC without the memory and hearing the last level alone: not measured." in both


def test_a_memory_that_is_not_measured_is_named(demo: ReportData) -> None:
    text = Page(render_report(dataclasses.replace(demo, memory=MemoryHealth((), bottleneck_slots=6)))).text
    assert "A memory of 6 slots behind the last encoder level: its use is not measured." in text
    assert "Masked error" not in text


def test_headline_numbers_are_the_inputs(demo: ReportData, html: str) -> None:
    page, evaluation = Page(html), demo.evaluation
    assert evaluation is not None
    assert page.by_id["auroc"] == f"{evaluation.auroc:.3f}"
    assert page.by_id["average-precision"] == f"{evaluation.average_precision:.3f}"
    assert page.by_id["false-positive-rate"] == f"{evaluation.false_positive_rate:.1%}"
    assert page.by_id["sensitivity"] == f"{evaluation.sensitivity:.1%}"
    assert page.by_id["num-scored"] == "300"
    assert f"{evaluation.auroc_interval.low:.3f} – {evaluation.auroc_interval.high:.3f}" in page.text
    for control in demo.controls:
        assert f"{control.auroc:.3f}" in page.text
        assert f"{control.gain:+.3f}" in page.text
    for row in demo.ingest:
        assert f"{row.count:,}" in page.text
    assert f"{sum(row.count for row in demo.ingest):,} objects seen" in page.text
    for value in (
        "0.871",
        "0.702",
        "4f0c2a9be17d55a3",
        "9d1b6a0e3c44f821",
        "cal-20260301-0930",
        "30 min 03 s",
        "0.801",
        "48.5% if even",
    ):
        assert value in page.text
    assert "21.6 at 5.0% false positives, from 412 normals" in page.text


def test_every_case_is_shown_with_score_p_value_and_id(demo: ReportData, html: str) -> None:
    page = Page(html)
    galleries = (demo.most_abnormal, demo.calmest_normals, demo.typical_normals, demo.missed_abnormals)
    for case in [case for gallery in galleries for case in gallery] + list(demo.flagged_normals):
        assert case.case_id in page.text
        assert f"{case.anomaly_score:#.4g}" in page.text
        assert f"{case.p_value:.4f}" in page.text
    assert len(demo.most_abnormal) == 9


def test_nothing_comes_from_elsewhere_and_nothing_runs(html: str) -> None:
    page = Page(html)
    assert not {"script", "iframe", "object", "embed", "link", "base", "form", "image"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in {"src", "href", "xlink:href", "srcset", "action", "data"}:
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:60])
    assert "http://" not in html
    assert "https://" not in html
    assert not re.search(r"@import|url\((?!#)", html)
    assert "default-src 'none'" in html
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for _, name, value in page.attributes:
        for target in re.findall(r"url\(#([^)]+)\)", value) + ([value[1:]] if name == "href" else []):
            assert target in ids


def test_the_file_is_small_and_written_whole(demo: ReportData, tmp_path: Path) -> None:
    path = write_report(demo, tmp_path / "new" / "report.html")
    assert path.stat().st_size < 3_000_000
    assert "Research software, not a medical device" in path.read_text(encoding="utf-8")
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="output folder"):
        write_report(demo, tmp_path / "file" / "report.html")


def test_the_same_data_gives_the_same_page(demo: ReportData, html: str) -> None:
    assert render_report(demo) == html


def test_hostile_strings_are_text(demo: ReportData) -> None:
    data = dataclasses.replace(
        demo,
        title=HOSTILE,
        cohort=HOSTILE,
        provenance=dataclasses.replace(
            demo.provenance, model=HOSTILE, config_text=HOSTILE, versions={HOSTILE: HOSTILE}
        ),
        calibration=dataclasses.replace(demo.calibration, scorer=HOSTILE),
        most_abnormal=(dataclasses.replace(demo.most_abnormal[0], case_id=HOSTILE),),
        groups=(GroupResult(HOSTILE, HOSTILE, 1, 1),),
        ingest=(IngestCount("excluded", HOSTILE, 3), IngestCount("quarantined", r"$\frac{", 1)),
        controls=(dataclasses.replace(demo.controls[0], name=HOSTILE),),
    )
    text = render_report(data)
    page = Page(text)
    assert "script" not in page.tags
    assert "<script" not in text
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) >= 8
    assert "{{ 7*7 }}" in page.text


def test_absent_sections_say_so(demo: ReportData) -> None:
    text = Page(render_report(bare(demo))).text
    for said in (
        "no labels: not evaluated",
        "No labels: not evaluated.",
        "no lesion masks, not measured",
        "No scans were given.",
        "No labels: misses are not known.",
        "No groups",
        "No account of the ingest was given.",
        "Not measured, or a model with neither memory nor several levels.",
        "No training curve was given.",
    ):
        assert said in text
    assert "AUROC without the memory" not in text
    only_labels = dataclasses.replace(bare(demo), evaluation=demo.evaluation)
    text = Page(render_report(only_labels)).text
    assert "Controls without a model: not run." in text
    assert "No abnormal scan was missed." in text
    dense = dataclasses.replace(demo.provenance, seeds={}, durations_s={}, versions={}, config_text=None)
    text = Page(render_report(dataclasses.replace(bare(demo), provenance=dense, scores=np.zeros(0)))).text
    for said in ("Seedsnot given", "The full configuration was not given."):
        assert said in text


def test_findings_name_what_is_wrong(demo: ReportData) -> None:
    assert demo.evaluation is not None
    assert demo.memory is not None
    titles = {finding.title for finding in findings(demo)}
    assert {"Beats every control", "False alarms as chosen", "Memory contributes"} <= titles
    better = dataclasses.replace(demo.controls[0], auroc=0.99, gain=-0.1, gain_interval=Interval(-0.2, -0.05))
    close = dataclasses.replace(demo.controls[0], gain=0.01, gain_interval=Interval(-0.02, 0.04))

    def problems(**changes: object) -> set[str]:
        return {finding.title for finding in findings(dataclasses.replace(demo, **changes))} - titles

    assert problems(controls=(better,)) == {"Does not beat a control"}
    assert problems(controls=(close,)) == {"Lead over controls uncertain"}
    assert problems(controls=()) == {"No controls"}
    assert "Not evaluated" in problems(evaluation=None)
    calibration = dataclasses.replace(demo.calibration, num_normals=19)
    assert problems(calibration=calibration) == {"Few calibration scans"}
    (point,) = demo.rates
    assert problems(rates=(dataclasses.replace(point, observed=0.11),)) == {"More false alarms than chosen"}
    assert problems(rates=(dataclasses.replace(point, observed=0.01),)) == {"Fewer false alarms than chosen"}
    assert not problems(rates=(dataclasses.replace(point, interval=Interval(0.06, 0.12), observed=0.09),))
    unsure, worse = (ShutOff(0.8, 0.01, Interval(-0.01, 0.03)), ShutOff(0.9, -0.1, Interval(-0.2, -0.05)))
    idle = MemoryHealth((MemoryLayer(1, 0.001, 1, 16, 0.1),), Ablation(48, 48, 0.81, unsure))
    assert problems(memory=idle) == {"Memory is ignored", "Memory adds nothing measurable"}
    harmful = MemoryHealth(demo.memory.layers, Ablation(48, 48, 0.8, worse, unsure))
    assert problems(memory=harmful) == {"Memory harms", "Hearing all levels adds nothing measurable"}
    levels_only = MemoryHealth((), Ablation(48, 48, 0.8, last_level_only=unsure), gates=(0.4, 0.6))
    assert problems(memory=levels_only) == {"Hearing all levels adds nothing measurable"}
    assert problems(ingest=(IngestCount("stored", None, 9), IngestCount("quarantined", "x", 1))) == {
        "Many objects quarantined"
    }
    assert findings(dataclasses.replace(demo, controls=(better,)))[0].level == "problem"


def test_selection_of_cases() -> None:
    labels = ["normal"] * 5 + ["abnormal"] * 3 + ["unknown"]
    scores = [0.5, 0.1, 0.9, 0.3, 0.2, 0.95, 0.15, 0.6, 0.99]
    chosen = select_cases(labels, scores, np.array(scores) >= 0.55, 2)
    assert chosen.most_abnormal == (8, 5, 2)
    assert chosen.calmest_normals == (1, 4)
    assert chosen.typical_normals == (4, 3)
    assert chosen.missed_abnormals == (6,)
    assert chosen.flagged_normals == (2,)
    empty = select_cases([], [], [], 4)
    assert empty.most_abnormal == empty.typical_normals == ()


def decode(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))


def test_heat_maps_share_one_scale_and_a_cold_map_leaves_the_image() -> None:
    image = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    cold = decode(figures.overlay_png(image, np.zeros((64, 64)), 1.0))
    assert (cold == decode(figures.image_png(image))[..., None]).all()
    grey = np.full((32, 32), 0.5)
    half = decode(figures.overlay_png(grey, np.full((32, 32), 0.4), 0.8))
    assert (half == decode(figures.overlay_png(grey, np.full((32, 32), 2.0), 4.0))).all()
    top = decode(figures.overlay_png(grey, np.full((32, 32), 0.8), 0.8))
    assert (top == decode(figures.overlay_png(grey, np.full((32, 32), 99.0), 0.8))).all()
    luminance = [
        decode(figures.overlay_png(grey * 0.6, np.full((32, 32), v), 1.0))[0, 0] @ [0.2126, 0.7152, 0.0722]
        for v in (0.5, 0.75, 1.0)
    ]
    assert luminance == sorted(luminance)
    assert luminance[2] > luminance[0] + 60


def test_large_images_are_reduced_and_maps_fitted() -> None:
    image = np.random.default_rng(0).random((600, 300))
    assert decode(figures.image_png(image)).shape == (256, 128)
    assert decode(figures.overlay_png(image, np.zeros((8, 8)), 1.0)).shape == (256, 128, 3)


def test_mask_outline_is_its_border() -> None:
    mask = np.zeros((5, 6), dtype=bool)
    mask[1:3, 2:5] = True
    segments = re.findall(r"M(\d+) (\d+)([hv])1", figures.mask_outline(mask))
    assert len(segments) == 2 * (2 + 3)
    assert {("2", "1", "h"), ("4", "3", "h"), ("2", "1", "v"), ("5", "2", "v")} <= set(segments)
    full = figures.mask_outline(np.ones((3, 3), dtype=bool))
    assert full.count("M") == 12


def test_charts_stand_odd_data() -> None:
    assert "<svg" in figures.histogram_figure({"all scans": [1.0]}, 1.0)
    assert "<svg" in figures.training_figure([1], [float("nan")])
    assert "<svg" in figures.training_figure(np.arange(100), np.geomspace(10, 0.01, 100))
    assert "<svg" in figures.ingest_figure([("stored", "stored", 0)])
    for chart in (figures.histogram_figure({"normal": [1.0, 2.0], "abnormal": [3.0]}, 2.5),):
        assert "var(--normal)" in chart
        assert "var(--abnormal)" in chart
        assert "DejaVu" not in chart


def test_the_highest_flagged_are_explained():
    reason = Reason(
        HOSTILE, b"\x89PNG", 0.004, 0.02, (("broad residual", 0.61), ("residual of about 3 px", 0.22)), 0.913
    )
    page = render_report(
        dataclasses.replace(demo_report(), reasons=(reason, dataclasses.replace(reason, region_p_value=None)))
    )
    assert page.count("data:image/png;base64,iVBORw==") == 2
    assert "highest region p = 0.02" in page and "no region stands out" in page
    assert "broad residual 61%, residual of about 3 px 22% of the score" in page and "nearest normal patch 0.91" in page
    assert "<script>" not in page
    assert "No scan was flagged, or nothing is kept" in render_report(demo_report())
    whole = render_report(dataclasses.replace(demo_report(), reasons=(dataclasses.replace(reason, shares=()),)))
    assert "of the score;" not in whole  # a score without parts


def test_a_pooled_threshold_is_called_so_and_strata_have_theirs(demo: ReportData, html: str) -> None:
    assert "pooled" not in html.lower()
    own = (StratumFacts("manufacturer=A", 11.5, 120), StratumFacts("manufacturer=B", 13.25, 140))
    calibration = dataclasses.replace(demo.calibration, strata=own, num_normals=60)
    page = render_report(dataclasses.replace(demo, calibration=calibration))
    text = Page(page).text
    for said in ("Pooled threshold", "The pooled threshold is drawn", "manufacturer=A", "13.25 from 140 normals"):
        assert said in text
    assert "with the pooled threshold" in page
    assert "The pooled threshold rests on 60" in text


def test_the_page_names_the_versions_that_were_read_and_that_of_training(demo: ReportData) -> None:
    provenance = dataclasses.replace(demo.provenance, tables_read={"instances": 31, "labels": 4})
    text = Page(render_report(dataclasses.replace(demo, provenance=provenance))).text
    assert "version 12 of instances" in text
    assert "instances at version 31, labels at version 4" in text


def test_masks_that_were_left_out_are_counted(html: str) -> None:
    assert "7 masks that mark no stored pixel, or an image not labelled abnormal, are left out" in Page(html).text
