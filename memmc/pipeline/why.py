"""Why: what stands behind the score of one scan, as data and as a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memmc.config import Config
from memmc.errors import DataError, StorageError
from memmc.lake.tables import Lake
from memmc.pipeline.audit import recorded
from memmc.pipeline.identity import home_directory
from memmc.pipeline.images import read_images
from memmc.pipeline.models import OpenModel, open_model
from memmc.pipeline.patch_index import PatchIndex, patch_index, position
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.results import WhyResult
from memmc.pipeline.select import newest_calibration, score_rows
from memmc.scoring.maps import decode_map

if TYPE_CHECKING:
    from memmc.model.artifact import LoadedModel


@dataclass(frozen=True)
class Place:
    """Patches of an image: true in `mask_L`; `peak_patch` holds the highest mean map value among them."""

    mask_L: NDArray[np.bool_]
    peak_patch: int


@recorded(
    "explain",
    lambda done: {
        "model": done.model,
        "calibration_id": done.calibration_id,
        "sop_instance_uid": done.sop_instance_uid,
    },
)
def why(
    config: Config,
    cohort: str,
    uid: str,
    model: str | None = None,
    *,
    picture: Path | None = None,
    progress: Progress | None = None,
) -> WhyResult:
    """Explain the score of one instance: its highest region, or the peak of its map where there is none.

    The first call for a model makes the index of patches of its training normals, in the lake's table `patches`.

    Args:
        uid: pseudonymous SOP Instance UID.
        picture: PNG to write.

    Raises:
        DataError: the instance has no score of the model's newest calibration.
        StorageError: the picture cannot be written.
    """
    lake = Lake(config.lake.uri)
    opened = open_model(config, home_directory(), model, cohort)
    explainer = Explainer.open(config, lake, opened, progress or Silent())
    found = explainer.explain(cohort, uid)
    if picture is not None:
        _write(picture, explainer.picture(found))
    return found.result


@dataclass(frozen=True)
class Explained:
    """An explanation and what its picture shows: the scan (H, W, C), what was expected, and the map, (H, W) each.

    What was expected is what the score judged, the mean over passes; `pasted_ms_ssim` keeps in each pass the patches
    that it could see.
    """

    result: WhyResult
    image_HWC: NDArray[np.floating]
    expected_HW: NDArray[np.floating]
    anomaly_map_HW: NDArray[np.floating]


@dataclass(frozen=True)
class Explainer:
    """A model, its newest calibration and its index of normal patches, opened once for any number of scans."""

    config: Config
    lake: Lake
    model: OpenModel
    calibration: dict[str, Any]
    index: PatchIndex
    loaded: LoadedModel

    @classmethod
    def open(cls, config: Config, lake: Lake, model: OpenModel, progress: Progress) -> Explainer:
        """Open what explanations need.

        Raises:
            DataError: the model is not calibrated, or its training normals are gone.
        """
        from memmc.model.artifact import load_model

        calibration, index = newest_calibration(lake, model), patch_index(lake, model, progress)
        progress.stage("explain")
        return cls(config, lake, model, calibration, index, load_model(model.folder))

    def explain(self, cohort: str, uid: str) -> Explained:
        """Explain the score of one instance.

        Raises:
            DataError: the instance has no score of the calibration.
        """
        import torch

        from memmc.model.memory_usage import gate_means
        from memmc.scoring.early_stop import StopRule
        from memmc.scoring.exported import ids_for
        from memmc.scoring.masks import predict
        from memmc.scoring.scorer import scorer_from_bytes
        from memmc.scoring.why import patch_features, scale_shares, slot_uses

        loaded, calibration = self.loaded, self.calibration
        scored = self._scored(cohort, uid)
        anomaly_map = decode_map(scored["anomaly_map"], scored["map_height"], scored["map_width"])
        regions = scored["regions"] or []
        place = place_of(anomaly_map, regions[0] if regions else None, loaded.model.patch_size)
        passes = calibration["passes"] or self.config.score.passes
        image_HWC = read_images(self.lake, cohort, [uid])[0]
        images = torch.from_numpy(image_HWC[None]).permute(0, 3, 1, 2).contiguous()
        mean, std = loaded.info.pixel_mean, loaded.info.pixel_std
        standardised = (images - mean) / std
        used, name = scored["passes_used"], calibration["scorer"]
        judged = predict(name, loaded.model, loaded.digest, [uid], standardised, passes, used).rescale(mean, std)
        rule, state = StopRule.from_row(calibration["early_stop"]), calibration["scorer_state"]
        scorer = scorer_from_bytes(rule.scorer_state(used, state) if rule else state)
        shares = scale_shares(scorer, scorer.features(images, judged), images.shape[2])
        # Whatever masks were scored: in these each patch is visible in some pass, so that every place can be asked.
        ids = torch.from_numpy(ids_for(loaded, [uid], passes))
        features_LD = patch_features(loaded.model, standardised, ids)[0].numpy()
        uses = slot_uses(loaded.model, standardised[0], ids[0], torch.from_numpy(place.mask_L))
        result = WhyResult(
            sop_instance_uid=uid,
            cohort=cohort,
            model=self.model.ref,
            calibration_id=calibration["calibration_id"],
            anomaly_score=scored["anomaly_score"],
            p_value=scored["p_value"],
            is_abnormal=scored["is_abnormal"],
            region=regions[0] if regions else None,
            patch=position(place.peak_patch, loaded.model.num_patches),
            memory=[asdict(use) for use in uses],
            nearest=self.index.nearest(features_LD[place.peak_patch]),
            scales=[asdict(share) for share in shares],
            levels=gate_means(loaded.model, standardised.expand(len(ids[0]), -1, -1, -1), ids[0]),
        )
        return Explained(result, image_HWC, judged.mean_BCHW[0].mean(0).numpy(), anomaly_map)

    def picture(self, found: Explained) -> bytes:
        """Return an explanation as a PNG."""
        from memmc.evaluation.why_figure import why_png

        uids = [item["sop_instance_uid"] for item in found.result.nearest]
        neighbours = read_images(self.lake, self.model.cohort, uids)
        return why_png(
            found.result.as_dict(),
            found.image_HWC.mean(-1),
            found.expected_HW,
            found.anomaly_map_HW,
            self.calibration["map_scale"],
            [item.mean(-1) for item in neighbours],
            self.loaded.model.patch_size,
        )

    def _scored(self, cohort: str, uid: str) -> dict[str, Any]:
        columns = ("anomaly_map", "map_height", "map_width", "regions", "passes_used")
        rows = score_rows(self.lake, cohort, self.model, self.calibration["calibration_id"], columns, uids=[uid])
        if uid not in rows:
            raise DataError(
                f"that instance has no score of {self.model.ref} in cohort '{cohort}'; run `memmc score` first"
            )
        return rows[uid]


def _write(picture: Path, page: bytes) -> None:
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(page)
    except OSError as error:
        raise StorageError(f"the picture cannot be written ({error.strerror}); check --out") from None


def place_of(anomaly_map_HW: NDArray[np.floating], region: dict[str, Any] | None, patch_size: int) -> Place:
    """Return the patches a region's box touches; without one, the patch with the highest mean map value alone.

    Args:
        anomaly_map_HW: of the model's image size.
        region: as in `scores.regions`.
        patch_size: px.
    """
    rows, columns = (size // patch_size for size in anomaly_map_HW.shape)
    mean_RC = anomaly_map_HW.reshape(rows, patch_size, columns, patch_size).mean((1, 3))
    inside_RC = np.zeros((rows, columns), bool)
    if region is None:
        inside_RC[np.unravel_index(int(mean_RC.argmax()), mean_RC.shape)] = True
    else:
        top, left = region["y_px"] // patch_size, region["x_px"] // patch_size
        bottom = -(-(region["y_px"] + region["height_px"]) // patch_size)
        right = -(-(region["x_px"] + region["width_px"]) // patch_size)
        inside_RC[top:bottom, left:right] = True
    peak = int(np.where(inside_RC, mean_RC, -np.inf).argmax())
    return Place(inside_RC.ravel(), peak)
