"""What of a map is kept beside it: its regions with their p-values, and where the passes disagreed.

A region is a connected part above the calibration's level, which at most
`calibrate.region_rate` of normal images reach anywhere. Its p-value compares its
peak with the highest value of each held-out normal's map: the chance that a
normal image shows a region as high anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memmc.dicom.geometry import Box, Fit, Geometry
from memmc.lake.schemas import SCHEMAS, SCORES
from memmc.scoring.calibration import p_values
from memmc.scoring.maps import encode_map, regions

GEOMETRY_COLUMNS = ("rows", "columns")
MAX_REGIONS = 20


@dataclass(frozen=True)
class RegionJudge:
    """What makes regions of maps.

    Attributes:
        level: map value above which a region stands out.
        normal_peaks: highest map value of each held-out normal.
        fit: how images were fitted to the square; None where the configuration at hand is not the pixels' own.
    """

    level: float
    normal_peaks: tuple[float, ...]
    fit: Fit | None = None

    def of_map(
        self, anomaly_map_HW: NDArray[np.floating], rows: int | None, columns: int | None
    ) -> list[dict[str, Any]]:
        """Return the regions of one map as rows of `scores.regions`, highest peak first.

        Args:
            anomaly_map_HW: of the stored pixels' size; judged as it is stored, in float16.
            rows, columns: of the original image.
        """
        stored_HW = anomaly_map_HW.astype(np.float16).astype(np.float64)
        above = np.nextafter(self.level, np.inf)  # the level itself is still calm
        found = regions(stored_HW, above, max_regions=MAX_REGIONS)
        values = p_values([region.peak for region in found], self.normal_peaks)
        side = anomaly_map_HW.shape[0]
        square = anomaly_map_HW.shape == (side, side)
        geometry = Geometry(rows, columns, side, self.fit) if rows and columns and self.fit and square else None
        result: list[dict[str, Any]] = []
        for region, p_value in zip(found, values.tolist(), strict=True):
            box = Box(region.x_px, region.y_px, region.width_px, region.height_px)
            image = geometry.to_image(box) if geometry else None
            result.append(
                {
                    **{name: getattr(region, name) for name in ("x_px", "y_px", "width_px", "height_px", "area_px")},
                    "peak": region.peak,
                    "p_value": p_value,
                    **{f"image_{name}": getattr(image, name) for name in Box.__annotations__ if image is not None},
                }
            )
        return result


def region_judge(calibration: dict[str, Any], fit: Fit | None) -> RegionJudge | None:
    """Return the judge a row of `calibrations` describes; None for one made before levels were kept."""
    if calibration.get("map_level") is None or not calibration.get("normal_peaks"):
        return None
    return RegionJudge(float(calibration["map_level"]), tuple(calibration["normal_peaks"]), fit)


def map_columns(
    rows: pa.Table, maps_BHW: NDArray[np.float32], variance_BCHW: Any, judge: RegionJudge | None
) -> dict[str, pa.Array]:
    """Return the columns `uncertainty_map` and, where there is a judge, `regions` of a batch.

    Args:
        rows: the instances; `GEOMETRY_COLUMNS` are read where present.
        maps_BHW: anomaly maps.
        variance_BCHW: of the reconstruction over passes, a tensor, grey values squared.
        judge: makes the regions.
    """
    deviation_BHW: NDArray[np.float32] = variance_BCHW.mean(1).sqrt().float().cpu().numpy()
    columns = {"uncertainty_map": pa.array([encode_map(item) for item in deviation_BHW], pa.binary())}
    if judge is not None:
        sizes: list[Sequence[int | None]] = [
            rows[name].to_pylist() if name in rows.column_names else [None] * rows.num_rows for name in GEOMETRY_COLUMNS
        ]
        found = [judge.of_map(item, *size) for item, *size in zip(maps_BHW, *sizes, strict=True)]
        columns["regions"] = pa.array(found, SCHEMAS[SCORES].field("regions").type)
    return columns
