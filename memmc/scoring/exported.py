"""The exported scorer: written by torch.export and as ONNX, read back, and held against the lake's scorer.

An export is a folder with `program.pt2` (torch.export), `model.onnx` and `export.json`, which says what goes in,
what comes out, how masks are made and how far the files were from the lake's own scores when they were written.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from memmc.errors import GateRefused, UsageError
from memmc.model.artifact import LoadedModel
from memmc.scoring.calibration import p_values
from memmc.scoring.masks import mask_ids, reconstruct
from memmc.scoring.scorer import Scorer
from memmc.scoring.whole import WholeScorer

Format = Literal["torch", "onnx"]
Run = Callable[[NDArray[Any], NDArray[np.int64]], "Scores"]

FILES: dict[Format, str] = {"torch": "program.pt2", "onnx": "model.onnx"}
INFO_FILE = "export.json"
INPUTS = ("pixels", "ids_keep")
OUTPUTS = ("anomaly_score", "p_value", "is_abnormal", "anomaly_map")
EXAMPLE_IMAGES = 3  # of the traced call; any other number than 1 will do
SCORE_TOLERANCE = 1e-4
MAP_TOLERANCE = 1e-3
MASK_RECIPE = (
    "ids_keep[b, g] are the patches pass g of image b shows, ascending. For round r: seed = SHA-256 of "
    "'<model_digest>\\0<sop_instance_uid>\\0<r>'; keys = SHAKE-256(seed), 8 bytes little-endian per patch; ring = "
    "stable argsort of keys; group g of G takes num_keep places of the ring from floor(g * num_patches / G). Rounds "
    "follow each other. memmc.scoring.masks.mask_ids makes them."
)


@dataclass(frozen=True)
class Scores:
    """Scores of B images as arrays; see `memmc.scoring.whole.WholeScorer.forward`."""

    anomaly_score_B: NDArray[np.float64]
    p_value_B: NDArray[np.float64]
    is_abnormal_B: NDArray[np.bool_]
    anomaly_map_BHW: NDArray[np.float32]


@dataclass(frozen=True)
class Parity:
    """How far an exported file is from the lake's scorer.

    Attributes:
        scans: images compared.
        score: largest difference, as a share of the lake's score or, where that is smaller, of the score scale.
        p_value: largest difference.
        verdicts: images called otherwise.
        map_mean, map_max: mean and largest difference of a map pixel, as a share of the map scale.
    """

    scans: int
    score: float
    p_value: float
    verdicts: int
    map_mean: float
    map_max: float


@dataclass(frozen=True)
class Calibrated:
    """A scorer and the calibration it is judged by.

    Attributes:
        scorer: fitted.
        normal_scores: of the held-out normals.
        threshold: score above which an image is abnormal.
        map_scale: top of the colour scale.
    """

    scorer: Scorer
    normal_scores: tuple[float, ...]
    threshold: float
    map_scale: float

    @property
    def score_scale(self) -> float:
        """The score of a typical normal image, by which differences are measured: the median magnitude."""
        return max(float(np.median(np.abs(self.normal_scores))), 1e-12)


def lake_scores(
    loaded: LoadedModel, calibrated: Calibrated, pixels_BHWC: NDArray[Any], ids_keep_BPK: NDArray[np.int64]
) -> Scores:
    """Return what scoring into the lake computes, by the code that does it."""
    mean, std = loaded.info.pixel_mean, loaded.info.pixel_std
    white = np.float32(np.iinfo(pixels_BHWC.dtype).max)
    images_BCHW = torch.from_numpy(pixels_BHWC.astype(np.float32) / white).permute(0, 3, 1, 2).contiguous()
    with torch.inference_mode():
        reconstruction = reconstruct(loaded.model, (images_BCHW - mean) / std, torch.from_numpy(ids_keep_BPK))
    scored = calibrated.scorer.score(images_BCHW, reconstruction.rescale(mean, std))
    return Scores(
        scored.anomaly_score_B,
        p_values(scored.anomaly_score_B, calibrated.normal_scores),
        scored.anomaly_score_B > calibrated.threshold,
        scored.anomaly_map_BHW,
    )


def ids_for(loaded: LoadedModel, sop_instance_uids: Sequence[str], passes: int) -> NDArray[np.int64]:
    """Return the masks (B, P, K) that the lake's scorer gives these instances."""
    model = loaded.model
    return mask_ids(loaded.digest, sop_instance_uids, model.num_patches, model.num_keep, passes).numpy()


def write_files(
    whole: WholeScorer,
    pixels_BHWC: NDArray[Any],
    ids_keep_BPK: NDArray[np.int64],
    folder: Path,
    formats: Sequence[Format],
) -> None:
    """Trace the scorer once and write it in each format.

    Args:
        pixels_BHWC, ids_keep_BPK: examples, at least `EXAMPLE_IMAGES` of them; the batch stays free, all else is fixed.

    Raises:
        UsageError: ONNX without the packages that write it.
    """
    if "onnx" in formats:
        _require_onnx()
    example = tuple(torch.from_numpy(array[:EXAMPLE_IMAGES].copy()) for array in (pixels_BHWC, ids_keep_BPK))
    batch = torch.export.Dim("batch", min=1)
    with _quiet():
        program = torch.export.export(whole.eval(), example, dynamic_shapes=({0: batch}, {0: batch}))
        if "torch" in formats:
            torch.export.save(program, folder / FILES["torch"])
        if "onnx" in formats:
            model = torch.onnx.export(
                program, dynamo=True, input_names=INPUTS, output_names=OUTPUTS, verbose=False, external_data=False
            )
            assert model is not None
            model.save(folder / FILES["onnx"], external_data=False)


def open_torch(file: Path) -> Run:
    """Return a function that runs a torch.export program."""
    with _quiet():
        module = torch.export.load(file).module()

    def run(pixels_BHWC: NDArray[Any], ids_keep_BPK: NDArray[np.int64]) -> Scores:
        with torch.inference_mode():
            output = module(torch.from_numpy(pixels_BHWC), torch.from_numpy(ids_keep_BPK))
        return Scores(*(tensor.numpy() for tensor in output))

    return run


def open_onnx(file: Path, threads: int = 0) -> Run:
    """Return a function that runs an ONNX file on the CPU; `threads` 0 leaves the number to ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(pixels_BHWC: NDArray[Any], ids_keep_BPK: NDArray[np.int64]) -> Scores:
        values: Any = session.run(list(OUTPUTS), dict(zip(INPUTS, (pixels_BHWC, ids_keep_BPK), strict=True)))
        return Scores(*values)

    return run


OPENERS: dict[Format, Callable[[Path], Run]] = {"torch": open_torch, "onnx": open_onnx}


def compare(found: Scores, expected: Scores, calibrated: Calibrated) -> Parity:
    """Return how far two sets of scores are apart."""
    difference_BHW = np.abs(found.anomaly_map_BHW - expected.anomaly_map_BHW) / calibrated.map_scale
    scale_B = np.maximum(np.abs(expected.anomaly_score_B), calibrated.score_scale)
    score_B = np.abs(found.anomaly_score_B - expected.anomaly_score_B) / scale_B
    return Parity(
        scans=len(score_B),
        score=float(score_B.max()),
        p_value=float(np.abs(found.p_value_B - expected.p_value_B).max()),
        verdicts=int((found.is_abnormal_B != expected.is_abnormal_B).sum()),
        map_mean=float(difference_BHW.mean()),
        map_max=float(difference_BHW.max()),
    )


def require_parity(name: str, parity: Parity) -> None:
    """Refuse a file that scores otherwise than the lake.

    A map's pixels pass through float16 as in the lake, where two nearby float32 values may round apart: its mean
    difference is judged, the largest is reported.

    Raises:
        GateRefused: a difference above the tolerance, or one that is no number.
    """
    if not (parity.score <= SCORE_TOLERANCE and parity.map_mean <= MAP_TOLERANCE):
        raise GateRefused(
            f"{name} differs from the lake's scorer on {parity.scans} scans by {parity.score:.2g} of the score "
            f"and {parity.map_mean:.2g} of the map scale; at most {SCORE_TOLERANCE:g} and {MAP_TOLERANCE:g} "
            "are accepted, so nothing was exported"
        )


def sha256_of(file: Path) -> str:
    """Return the hex digest of a file."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def input_output(pixels_BHWC: NDArray[Any], ids_keep_BPK: NDArray[np.int64]) -> dict[str, Any]:
    """Return the description of inputs and outputs that `export.json` holds."""
    _, height, width, channels = pixels_BHWC.shape
    _, passes, kept = ids_keep_BPK.shape
    vector = ["batch"]
    return {
        "inputs": {
            "pixels": {
                "dtype": str(pixels_BHWC.dtype),
                "shape": ["batch", height, width, channels],
                "meaning": "stored pixels of the lake (instances.pixels), prepared as preprocess_id says",
            },
            "ids_keep": {"dtype": "int64", "shape": ["batch", passes, kept], "meaning": MASK_RECIPE},
        },
        "outputs": {
            "anomaly_score": {"dtype": "float64", "shape": vector, "meaning": "higher is more abnormal"},
            "p_value": {"dtype": "float64", "shape": vector, "meaning": "conformal, against held-out normals"},
            "is_abnormal": {"dtype": "bool", "shape": vector, "meaning": "score above the threshold"},
            "anomaly_map": {
                "dtype": "float32",
                "shape": ["batch", height, width],
                "meaning": "0 to map_scale is shown",
            },
        },
    }


def versions(formats: Sequence[Format]) -> dict[str, str]:
    """Return the versions of the packages an export was made with."""
    names = ("memmc", "torch", "onnxruntime", *(("onnx", "onnxscript") if "onnx" in formats else ()))
    return {name: metadata.version(name) for name in names}


def _require_onnx() -> None:
    missing: list[str] = []
    for name in ("onnx", "onnxscript"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise UsageError(f"writing ONNX needs {' and '.join(missing)}; pip install 'memmc[export]', or --format torch")


@contextmanager
def _quiet() -> Generator[None]:
    """Keep the exporter's remarks on operators that are not used here off stderr."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
