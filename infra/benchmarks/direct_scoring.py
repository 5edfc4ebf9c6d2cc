"""Score grey images with a lake's model in this process, by the code that fills the lake; for the other benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memmc.config import Config, load_config
from memmc.dicom.resample import WHITE, resample
from memmc.lake.tables import Lake
from memmc.model.artifact import LoadedModel, load_model
from memmc.pipeline.identity import home_directory
from memmc.pipeline.models import fit_of, open_model
from memmc.pipeline.select import newest_calibration
from memmc.scoring.exported import Calibrated, Scores, ids_for, lake_scores
from memmc.scoring.regions import RegionJudge, region_judge
from memmc.scoring.scorer import scorer_from_bytes

BATCH = 32


@dataclass(frozen=True)
class DirectScorer:
    """A model, its newest calibration and what makes regions."""

    config: Config
    ref: str
    loaded: LoadedModel
    calibrated: Calibrated
    judge: RegionJudge
    passes: int
    bits: int

    def stored(self, grey_HW: NDArray[np.floating]) -> NDArray[Any]:
        """Return the image (S, S, 1), from [0, 1] to the pixels the lake would store."""
        levels_HW = np.rint(np.clip(grey_HW, 0, 1) * WHITE).astype(np.float64)
        height, width = levels_HW.shape
        square = resample(lambda top, bottom: levels_HW[top:bottom], height, width, self.config.data)
        top = 2**self.bits - 1
        return np.rint(square / WHITE * top).astype(np.uint8 if self.bits == 8 else np.uint16)[..., None]

    def score(self, pixels_BHWC: NDArray[Any], prefix: str) -> Scores:
        """Return the scores; instance i is masked as `<prefix><i>` would be."""
        parts: list[Scores] = []
        for start in range(0, len(pixels_BHWC), BATCH):
            some = pixels_BHWC[start : start + BATCH]
            ids = ids_for(self.loaded, [f"{prefix}{start + index}" for index in range(len(some))], self.passes)
            parts.append(lake_scores(self.loaded, self.calibrated, some, ids))
        return Scores(*(np.concatenate([getattr(part, name) for part in parts]) for name in Scores.__annotations__))


def open_scorer(lake_uri: str, model: str | None, settings: list[str]) -> DirectScorer:
    """Open the model; `settings` must hold the `data.*` that its pixels were made with."""
    config, lake = load_config(overrides=[*settings, f"lake.uri={lake_uri}"]), Lake(lake_uri)
    opened = open_model(config, home_directory(), model)
    fit = fit_of(config, opened)
    if fit is None:
        raise SystemExit(f"{opened.ref} was made with other data.* settings; give them with --set")
    row = newest_calibration(lake, opened)
    if row["early_stop"] is not None:
        raise SystemExit("the calibration ends passes early; run `memmc calibrate --set score.early_stop=0`")
    judge = region_judge(row, fit)
    if judge is None:
        raise SystemExit("the calibration holds no level; run `memmc calibrate` again")
    judged = Calibrated(
        scorer_from_bytes(row["scorer_state"]), tuple(row["normal_scores"]), row["threshold"], row["map_scale"]
    )
    passes = row["passes"] or config.score.passes
    return DirectScorer(config, opened.ref, load_model(opened.folder), judged, judge, passes, config.data.bits)
