"""Score some images in this process, as `score` would; nothing is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memmc.config import Config
from memmc.lake.files import read_file
from memmc.lake.schemas import INSTANCES
from memmc.lake.stream import pixels_to_array, read_rows
from memmc.lake.tables import Lake
from memmc.pipeline.models import OpenModel
from memmc.pipeline.observed import with_only
from memmc.scoring.actor import Reconstructor, ScoringJob, model_files
from memmc.scoring.bulk import score_columns
from memmc.scoring.early_stop import StopRule
from memmc.scoring.strata import judge_of

_TOGETHER = 32  # images through the model at once
_KEPT = ["sop_instance_uid", "anomaly_score", "p_value", "is_abnormal"]


def scoring_job(
    config: Config, model: OpenModel, calibration: Mapping[str, Any], *, use_gpu: bool, fixed: Mapping[str, Any]
) -> ScoringJob:
    """Return what an actor needs to score as a calibration says; without regions.

    Args:
        config: `score.*`, of which the calibration overrules scorer and passes.
        model: opened.
        calibration: a row of `calibrations`.
        use_gpu: whether each actor has a GPU.
        fixed: columns that all score rows share.
    """
    settings = {"scorer": calibration["scorer"]}
    settings |= {"passes": calibration["passes"]} if calibration["passes"] else {}
    return ScoringJob(
        model_files=model_files(model.folder),
        score=config.score.model_copy(update=settings),
        use_gpu=use_gpu,
        scorer_state=calibration["scorer_state"],
        judge=judge_of(calibration),
        fixed=dict(fixed),
        stop=StopRule.from_row(calibration["early_stop"]),
    )


class Rescorer:
    """A model and its calibration at hand in this process."""

    def __init__(self, config: Config, model: OpenModel, calibration: Mapping[str, Any]) -> None:
        import torch

        here = {"batch_size": _TOGETHER, "num_actors": 1}
        alone = config.model_copy(update={"score": config.score.model_copy(update=here)})
        self._actor = Reconstructor(scoring_job(alone, model, calibration, use_gpu=torch.cuda.is_available(), fixed={}))
        self._columns = score_columns(tuple(calibration["strata_columns"] or ()))

    def read(self, lake: Lake, cohort: str, uids: Sequence[str]) -> pa.Table:
        """Return instances with their pixels, in the order of the UIDs."""
        wanted = set(uids)
        where = lake.where(INSTANCES, {"cohort": cohort})
        parts: list[pa.Table] = []
        for file in lake.files(INSTANCES, None, {"cohort": cohort, "outcome": "stored"}):
            # A look at the names spares the pixels of shards that hold none of these.
            names = read_file(lake.storage, INSTANCES, file, ["sop_instance_uid"])
            if not wanted.isdisjoint(names["sop_instance_uid"].to_pylist()):
                for rows in read_rows(lake.storage, INSTANCES, file, self._columns, where):
                    parts.append(with_only(rows, "sop_instance_uid", uids))
        rows = pa.concat_tables(parts)
        place = {uid: index for index, uid in enumerate(rows["sop_instance_uid"].to_pylist())}
        return rows.take([place[uid] for uid in uids])

    def score(self, rows: pa.Table) -> list[dict[str, Any]]:
        """Return UID, score, p-value and verdict of each row."""
        return self._actor(rows).select(_KEPT).to_pylist()


def grey_images(rows: pa.Table) -> NDArray[np.float32]:
    """Return images_NHWC in [0, 1]."""
    pixels_NHWC = pixels_to_array(rows)
    return pixels_NHWC.astype(np.float32) / np.float32(np.iinfo(pixels_NHWC.dtype).max)


def with_pixels(rows: pa.Table, images_NHWC: NDArray[np.float32]) -> pa.Table:
    """Return the rows with other pixels of the same shape, rounded as they are stored."""
    white, kind = (255, "u1") if rows["bits"][0].as_py() == 8 else (65535, "<u2")
    stored = np.rint(images_NHWC.clip(0, 1) * white).astype(kind)
    pixels = pa.array([image.tobytes() for image in stored], pa.binary())
    return rows.set_column(rows.column_names.index("pixels"), "pixels", pixels)
