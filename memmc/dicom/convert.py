"""One object to one row: the boundary where whatever goes wrong becomes a reason code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from memmc.config import Config, DataConfig, IngestConfig, SelectConfig
from memmc.dicom.decode import check_geometry
from memmc.dicom.deidentify import ATTRIBUTES, Value, deidentify
from memmc.dicom.pixels import Prepared, frames_to_store, prepare
from memmc.dicom.read import Instance, read_instance, silenced
from memmc.dicom.reasons import Outcome, Rejected, outcome_of
from memmc.dicom.select import Verdict, explain, select
from memmc.dicom.text import holds_text
from memmc.dicom.vault import seal_originals

MAX_STORED_BYTES = 256 << 20  # of all frames of one object


@dataclass(frozen=True)
class ConvertPolicy:
    """What a conversion depends on besides the object.

    Attributes:
        data: how pixels are prepared.
        select: which instances are in scope.
        ingest: limits.
        max_date_shift_days: bound of the per-patient date shift, days.
        read_text: whether pixels are searched for burned-in text.
        key: identity key.
        vault_key: public key of the identity vault, X25519, 32 bytes; None where there is none.
    """

    data: DataConfig
    select: SelectConfig
    ingest: IngestConfig
    max_date_shift_days: int
    read_text: bool
    key: bytes = field(repr=False)
    vault_key: bytes | None = None

    @classmethod
    def from_config(cls, config: Config, key: bytes, vault_key: bytes | None = None) -> ConvertPolicy:
        """Take the parts of the configuration that a conversion needs."""
        read_text, shift = config.deid.text == "ocr", config.deid.max_date_shift_days
        return cls(config.data, config.select, config.ingest, shift, read_text, key, vault_key)


@dataclass(frozen=True)
class Converted:
    """What became of one object.

    Attributes:
        outcome: stored, excluded (healthy, out of scope) or quarantined (wrong or risky).
        reason: a code of `memmc.dicom.reasons.REASONS`; None where stored.
        attributes: every name of `ATTRIBUTES`, de-identified; None for what could not be read.
        pixels: little-endian unsigned, shape (frames, height, width, channels) in C-order; None unless stored.
        frames: images in `pixels`: 1, or of a multi-frame object all frames in their order.
        sealed: the originals of a stored object, sealed to the vault's public key; None without a vault.
    """

    outcome: Outcome
    reason: str | None
    attributes: Mapping[str, Value]
    pixels: bytes | None = field(repr=False)
    frames: int = 1
    sealed: bytes | None = field(default=None, repr=False)


def rejected(reason: str, attributes: Mapping[str, Value] | None = None) -> Converted:
    """Return the row of an object that is not stored."""
    return Converted(outcome_of(reason), reason, attributes or dict.fromkeys(ATTRIBUTES), None)


def _ignore(attributes: Mapping[str, Value]) -> None:
    """Do nothing."""


def _refuse_text(image_HW: NDArray[np.uint8]) -> None:
    """Let an image without burned-in text pass.

    Raises:
        Rejected: DEID_TEXT_DETECTED.
    """
    if holds_text(image_HW):
        raise Rejected("DEID_TEXT_DETECTED")


def convert(
    data: bytes | bytearray | memoryview,
    policy: ConvertPolicy,
    before_pixels: Callable[[Mapping[str, Value]], None] = _ignore,
) -> Converted:
    """Convert one object; never raises for what the object holds.

    A decoder can still kill or hang the process, or fill its memory:
    `memmc.dicom.sandbox.Sandbox` is the way to call this on objects from outside.
    Not for several threads at once: the decoders' warnings are held back process-wide meanwhile.

    Args:
        data: the whole object.
        policy: what to do with it.
        before_pixels: called with the de-identified attributes once the header is read and the instance selected,
            before a decoder sees the pixels.
    """
    if len(data) > policy.ingest.max_file_bytes:
        return rejected("FILE_TOO_LARGE")
    attributes: dict[str, Value] = dict.fromkeys(ATTRIBUTES)
    decoding = False
    with silenced():
        try:
            instance = read_instance(data, policy.ingest.max_decoded_bytes)
            attributes.update(deidentify(instance, policy.key, policy.max_date_shift_days))
            select(instance, policy.select)
            geometry = check_geometry(instance, policy.ingest)
            before_pixels(attributes)
            decoding = True
            frames = frames_to_store(geometry, policy.select.frames)
            if len(frames) * policy.data.image_size**2 * policy.data.bits // 8 > MAX_STORED_BYTES:
                raise Rejected("PIX_LIMIT")
            if len(frames) == 1 and geometry.frames > 1:
                attributes["frame_number"] = frames[0] + 1
            inspect = _refuse_text if policy.read_text else None
            image = prepare(instance, geometry, policy.data, frames, inspect)
            return _stored(attributes, image, _sealed(instance, attributes, policy.vault_key))
        except Rejected as rejection:
            return rejected(rejection.reason, attributes)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - the per-instance boundary; codecs panic past Exception
            return rejected(_reason(error, decoding), attributes)


def judge(data: bytes, scope: SelectConfig, ingest: IngestConfig) -> tuple[str | None, list[Verdict]]:
    """Ask the rules of selection of one object, without a decoder; never raises for what the object holds.

    Returns:
        The reason why the object cannot be read, or None, and every rule's answer.
    """
    with silenced():
        try:
            return None, explain(read_instance(data, ingest.max_decoded_bytes), scope)
        except Rejected as rejection:
            return rejection.reason, []
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - the per-instance boundary
            return _reason(error, decoding=False), []


def _reason(error: BaseException, decoding: bool) -> str:
    """Name an error by its kind and place; its text quotes the object and is dropped."""
    if isinstance(error, MemoryError):
        return "PIX_DECODER_OOM" if decoding else "PARSE_MEMORY"
    if isinstance(error, RecursionError) and not decoding:
        return "PARSE_DEPTH"
    return "PIX_DECODE_ERROR" if decoding else "PARSE_ERROR"


def _sealed(instance: Instance, attributes: Mapping[str, Value], vault_key: bytes | None) -> bytes | None:
    if vault_key is None:
        return None
    return seal_originals(instance, str(attributes["sop_instance_uid"]), vault_key)


def _stored(attributes: Mapping[str, Value], image: Prepared, sealed: bytes | None) -> Converted:
    size: dict[str, Value] = {
        "height": image.height,
        "width": image.width,
        "channels": image.channels,
        "bits": image.bits,
    }
    return Converted("stored", None, {**attributes, **size}, image.pixels, image.frames, sealed)
