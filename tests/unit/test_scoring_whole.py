"""The exportable scorer computes what the lake's scorer computes."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import scored_model
import torch

from memmc.config import ScoreConfig, ScorerName
from memmc.errors import DataError, GateRefused
from memmc.scoring.exported import Calibrated, Scores, compare, ids_for, lake_scores, require_parity
from memmc.scoring.scorer import make_scorer
from memmc.scoring.whole import WholeScorer, head_of


def whole_scores(loaded, judged: Calibrated, stored: np.ndarray, ids: np.ndarray, bits: int) -> Scores:
    module = WholeScorer(loaded, judged.scorer, judged.normal_scores, judged.threshold, bits).eval()
    with torch.inference_mode():
        return Scores(*(tensor.numpy() for tensor in module(torch.from_numpy(stored), torch.from_numpy(ids))))


@pytest.mark.parametrize("scorer", [name for name in get_args(ScorerName) if name != "pasted_ms_ssim"])
@pytest.mark.parametrize(("bits", "channels", "size"), [(16, 1, 32), (8, 3, 32), (16, 1, 80)])
def test_it_scores_as_the_lake_does(scorer: str, bits: int, channels: int, size: int) -> None:
    loaded = scored_model.model(size, channels)
    judged = scored_model.calibrated(loaded, scored_model.pixels(24, size, channels, bits), scorer)
    stored = scored_model.pixels(9, size, channels, bits, seed=1)
    ids = ids_for(loaded, scored_model.uids(9), scored_model.PASSES)
    parity = compare(whole_scores(loaded, judged, stored, ids, bits), lake_scores(loaded, judged, stored, ids), judged)
    require_parity("the module", parity)
    assert parity.score < 2e-5
    assert parity.verdicts == 0
    assert parity.p_value <= 1 / 25 + 1e-9  # a tie may fall to the other side


def test_other_weights_masks_or_a_nan_are_refused() -> None:
    loaded = scored_model.model()
    judged = scored_model.calibrated(loaded, scored_model.pixels(24))
    stored, ids = scored_model.pixels(9, seed=1), ids_for(loaded, scored_model.uids(9), scored_model.PASSES)
    expected = lake_scores(loaded, judged, stored, ids)
    same = whole_scores(loaded, judged, stored, ids, 16)
    require_parity("same", compare(same, expected, judged))
    with pytest.raises(GateRefused, match="nothing was exported"):
        other = whole_scores(scored_model.model(seed=1), judged, stored, ids, 16)
        require_parity("weights", compare(other, expected, judged))
    with pytest.raises(GateRefused, match="9 scans"):
        other = whole_scores(loaded, judged, stored, np.roll(ids, 1, axis=0), 16)
        require_parity("masks", compare(other, expected, judged))
    broken = replace(same, anomaly_score_B=np.full(9, np.nan))
    with pytest.raises(GateRefused):
        require_parity("nan", compare(broken, expected, judged))


def test_a_visible_patchs_prediction_cannot_reach_the_score() -> None:
    """What a pass says of a patch it could see is discarded, even where it is not a number."""
    loaded = scored_model.model()
    judged = scored_model.calibrated(loaded, scored_model.pixels(24))
    stored, ids = scored_model.pixels(4, seed=1), ids_for(loaded, scored_model.uids(4), scored_model.PASSES)
    before = whole_scores(loaded, judged, stored, ids, 16)
    predict = loaded.model.predict

    def poisoned(images_BCHW: torch.Tensor, ids_keep_BGK: torch.Tensor) -> torch.Tensor:
        pred = predict(images_BCHW, ids_keep_BGK)
        return pred.scatter(2, ids_keep_BGK[..., None].expand(-1, -1, -1, pred.shape[-1]), float("nan"))

    loaded.model.predict = poisoned  # type: ignore[method-assign]
    after = whole_scores(loaded, judged, stored, ids, 16)
    np.testing.assert_array_equal(after.anomaly_score_B, before.anomaly_score_B)


def test_the_papers_score_has_no_exportable_form() -> None:
    paper = make_scorer(ScoreConfig(scorer="pasted_ms_ssim", passes=10))
    assert head_of(paper) is None
    with pytest.raises(DataError, match=r"no exportable form; calibrate with another score\.scorer"):
        WholeScorer(scored_model.model(), paper, (1.0,), 1.0, 16)
    assert head_of(make_scorer(ScoreConfig(scorer="ms_ssim"))) is not None


def test_a_scorer_without_a_fit_has_no_exportable_form() -> None:
    with pytest.raises(DataError, match="not fitted"):
        WholeScorer(scored_model.model(), make_scorer(ScoreConfig()), (1.0,), 1.0, 16)
