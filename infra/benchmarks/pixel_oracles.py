"""Stored values by other people's decoders, for comparison with ours; used by hardness.py and the tests.

An oracle is one way from a file to stored values: pydicom with one of its
plugins, imagecodecs (OpenJPH, OpenJPEG, CharLS, libjpeg of its own), Debian's
gdcmconv and dcmtk. What is not installed is left out.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder

from memmc.config import IngestConfig
from memmc.dicom.decode import PLUGINS, bit_patterns, check_geometry, decode_frame
from memmc.dicom.read import read_instance, silenced

LOSSY = {f"1.2.840.10008.1.2.4.{suffix}" for suffix in ("50", "51", "53", "55", "81", "91", "203")}
_DCMTK = {  # program and options that leave colours as they are
    **{f"1.2.840.10008.1.2.4.{suffix}": ("dcmdjpeg", "+cn") for suffix in ("50", "51", "53", "55", "57", "70")},
    **{f"1.2.840.10008.1.2.4.{suffix}": ("dcmdjpls",) for suffix in ("80", "81")},
    "1.2.840.10008.1.2.5": ("dcmdrle",),
}
_IMAGECODECS = {
    **{f"1.2.840.10008.1.2.4.{suffix}": "jpeg8_decode" for suffix in ("50", "51", "53", "55")},
    **{f"1.2.840.10008.1.2.4.{suffix}": "jpegsof3_decode" for suffix in ("57", "70")},
    **{f"1.2.840.10008.1.2.4.{suffix}": "jpegls_decode" for suffix in ("80", "81")},
    **{f"1.2.840.10008.1.2.4.{suffix}": "jpeg2k_decode" for suffix in ("90", "91")},
    **{f"1.2.840.10008.1.2.4.{suffix}": "htj2k_decode" for suffix in ("201", "202", "203")},
}
_WRAPPING = ("imagecodecs", "1.2.840.10008.1.2.4.203")  # 8-bit HTJ2K
_OURS = {  # what shares a codec with the pinned decoder proves nothing
    "gdcm": ("pydicom gdcm", "gdcmconv"),
    "pillow": ("pydicom pillow",),
    "pyjpegls": ("pydicom pyjpegls",),
    "pylibjpeg": ("pydicom pylibjpeg",),
    "pydicom": ("pydicom pydicom",),
    "": ("pydicom native",),
}


@dataclass(frozen=True)
class Stored:
    """Stored values of all frames, shape (F, H, W) or (F, H, W, 3), and their photometric interpretation."""

    frames: np.ndarray
    photometric: str


@dataclass
class Comparison:
    """What the oracles and we made of one file.

    Attributes:
        transfer_syntax: UID, empty where the file could not be read.
        oracles: those that decode it.
        ours: "decoded", or the reason or error.
        compared: largest absolute difference of stored values, by independent oracle.
    """

    transfer_syntax: str
    oracles: list[str]
    ours: str
    compared: dict[str, int]

    @property
    def lossless(self) -> bool:
        return self.transfer_syntax not in LOSSY


def compare(path: Path) -> Comparison:
    """Decode a file every way there is and compare."""
    with silenced():
        syntax = _transfer_syntax(path)
        found = dict(oracle_decodings(path, syntax))
        try:
            ours = our_decoding(path.read_bytes())
        except Exception as error:  # noqa: BLE001 - a codec or a damaged file; the name is the finding
            return Comparison(syntax, sorted(found), getattr(error, "reason", type(error).__name__), {})
        same = _OURS[PLUGINS.get(syntax, "")]
        differences = {
            name: difference
            for name, stored in found.items()
            if name not in same
            and (difference := _difference(ours, stored, 256 if (name, syntax) == _WRAPPING else 0)) is not None
        }
    return Comparison(syntax, sorted(found), "decoded", differences)


def our_decoding(data: bytes) -> Stored:
    """Decode all frames as ingest does; values above Bits Stored are masked, signs extended."""
    instance = read_instance(data)
    geometry = check_geometry(instance, IngestConfig())
    decoded = [decode_frame(instance, geometry, frame) for frame in range(geometry.frames)]
    frames = np.stack([frame for frame, _ in decoded])
    return Stored(_plain(frames, geometry.bits_stored, geometry.signed), decoded[0][1])


def _plain(frames: np.ndarray, bits_stored: int, signed: bool) -> np.ndarray:
    values = bit_patterns(frames).astype(np.int64) & ((1 << bits_stored) - 1)
    return values - ((values >> (bits_stored - 1)) << bits_stored) if signed else values


def _difference(ours: Stored, theirs: Stored, wraps_at: int) -> int | None:
    """Return the largest difference; None where the oracle converted colours and ours did not, or the reverse.

    An oracle that does not clip lossy overshoot lets it wrap around: 256 is 0, `wraps_at` 256.
    """
    if ours.frames.ndim > 3 and ours.photometric != theirs.photometric:
        return None
    if ours.frames.size != theirs.frames.size:
        return 1 << 16
    difference = np.abs(ours.frames - theirs.frames.reshape(ours.frames.shape))
    return int(np.minimum(difference, wraps_at - difference).max() if wraps_at else difference.max())


def oracle_decodings(path: Path, syntax: str) -> Iterator[tuple[str, Stored]]:
    """Yield the name and the stored values of every oracle that can decode the file."""
    ways: list[tuple[str, Callable[[], Stored]]] = []
    try:
        dataset = pydicom.dcmread(path, force=True)
        plugins = get_decoder(syntax).available_plugins if syntax in PLUGINS else ()
    except Exception:  # noqa: BLE001 - the oracle's parser gives up as it likes
        dataset, plugins = None, ()
    if dataset is not None:
        ways += [(f"pydicom {plugin}", lambda plugin=plugin: _by_pydicom(dataset, plugin)) for plugin in plugins]
        if not plugins:
            ways.append(("pydicom native", lambda: _by_pydicom(dataset, "")))
        ways.append(("imagecodecs", lambda: _by_imagecodecs(dataset, syntax)))
    ways.append(("gdcmconv", lambda: _by_program(path, ["gdcmconv", "--raw"])))
    ways.append(("dcmtk", lambda: _by_program(path, [*_DCMTK.get(syntax, ("dcmconv", "+te"))])))
    for name, way in ways:
        try:
            stored = way()
        except Exception:  # noqa: BLE001 - not this one
            continue
        if stored.frames.size:
            yield name, stored


def _transfer_syntax(path: Path) -> str:
    try:
        dataset = pydicom.dcmread(path, force=True, stop_before_pixels=True)
        return str(dataset.file_meta.get("TransferSyntaxUID", "1.2.840.10008.1.2"))
    except Exception:  # noqa: BLE001 - as above
        return ""


def _stored(dataset: pydicom.Dataset, frames: np.ndarray, photometric: str) -> Stored:
    if int(dataset.get("NumberOfFrames") or 1) == 1:
        frames = frames[np.newaxis]
    return Stored(_plain(frames, int(dataset.BitsStored), bool(dataset.PixelRepresentation)), photometric)


def _by_pydicom(dataset: pydicom.Dataset, plugin: str) -> Stored:
    decoder = get_decoder(dataset.file_meta.TransferSyntaxUID)
    frames, found = decoder.as_array(dataset, raw=True, decoding_plugin=plugin)
    return _stored(dataset, frames, str(found["photometric_interpretation"]))


def _by_imagecodecs(dataset: pydicom.Dataset, syntax: str) -> Stored:
    import imagecodecs

    decode: Any = getattr(imagecodecs, _IMAGECODECS[syntax])
    count = int(dataset.get("NumberOfFrames") or 1)
    streams = list(generate_frames(dataset.PixelData, number_of_frames=count))
    frames = np.stack([decode(stream) for stream in streams])
    photometric = str(dataset.PhotometricInterpretation)
    photometric = "RGB" if photometric in ("YBR_RCT", "YBR_ICT") else photometric
    if photometric == "YBR_FULL_422" or (syntax in LOSSY and photometric.startswith("YBR")):
        raise ValueError("converted to RGB by the codec")
    stored = bool(dataset.PixelRepresentation)
    return Stored(_plain(frames, int(dataset.BitsStored), stored), photometric)


def _by_program(path: Path, command: list[str]) -> Stored:
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(command[0])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.dcm"
        subprocess.run([*command, str(path), str(out)], check=True, capture_output=True, timeout=60)
        dataset = pydicom.dcmread(io.BytesIO(out.read_bytes()), force=True)
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        raise ValueError("still compressed")
    return _by_pydicom(dataset, "")
