"""Why an object was not stored: the closed list of reason codes, and the one exception that carries them.

A code is all that ever leaves the reading of an object: no text of a decoder,
no attribute value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Outcome = Literal["stored", "excluded", "quarantined"]

REASONS: Mapping[str, str] = {
    "FILE_EMPTY": "zero bytes",
    "FILE_TOO_LARGE": "larger than ingest.max_file_bytes",
    "FILE_NOT_DICOM": "neither a DICOM file (PS3.10 section 7.1) nor a bare data set",
    "FILE_PREAMBLE_EXEC": "the 128-byte preamble makes the file executable as well",
    "FILE_ARCHIVE_NESTED": "a compressed archive; unpack it first",
    "FILE_DICOMDIR": "a media directory (PS3.3 F.1); the instances it lists are read on their own",
    "PARSE_LENGTH": "a length field contradicts the bytes around it",
    "PARSE_TRUNCATED": "the object ends inside an element",
    "PARSE_DEPTH": "sequences nested deeper than 64",
    "PARSE_ELEMENTS": "more than 50,000 elements before the pixels",
    "PARSE_HEADER_SIZE": "more than 32 MiB before the pixels",
    "PARSE_TRAILING": "more than 1 MiB after the pixels",
    "PARSE_INFLATE": "the deflated data set does not inflate",
    "PARSE_INFLATE_LIMIT": "the deflated data set inflates beyond the limit",
    "PARSE_BAD_VR": "an unknown value representation",
    "PARSE_TS_UNKNOWN": "missing, private or unsupported transfer syntax",
    "PARSE_TS_MISMATCH": "the data set is not encoded as its transfer syntax says",
    "PARSE_ERROR": "the header could not be read",
    "PARSE_CRASH": "the reading process died on the header, twice",
    "PARSE_TIMEOUT": "the header took longer than ingest.timeout_s, twice",
    "PARSE_MEMORY": "the header took more than ingest.memory_bytes, twice",
    "META_MISSING_TYPE1": "an attribute without which the object means nothing is absent or empty",
    "META_UID_INVALID": "a UID is not one (PS3.5 section 9)",
    "META_SOP_CLASS_UNSUPPORTED": "not an image class: report, waveform, segmentation, whole slide, private",
    "META_MODALITY_OUT_OF_SCOPE": "Modality (0008,0060) is absent or not one of select.modalities",
    "META_MULTIFRAME_UNSUPPORTED": "more than one frame, see select.frames",
    "META_NO_PIXELS": "an image class without Pixel Data (7FE0,0010)",
    "META_DIMENSIONS": "Rows, Columns, Samples per Pixel or Number of Frames out of range, or, where data.fit keeps "
    "proportions, pixels that are not square",
    "META_BITS": "Bits Allocated, Bits Stored, High Bit or Pixel Representation out of range",
    "SELECT_BODY_PART": "Body Part Examined (0018,0015) is not one of select.body_parts",
    "SELECT_VIEW": "View Position (0018,5101) is not one of select.views",
    "SELECT_MANUFACTURER": "Manufacturer (0008,0070) is not one of select.manufacturers",
    "SELECT_SIZE": "smaller than select.min_side_px",
    "SELECT_LATERAL_VIEW": "a lateral projection, see select.lateral_views",
    "SELECT_SECONDARY_CAPTURE": "a Secondary Capture object, see select.secondary_capture",
    "SELECT_DERIVED": "Image Type (0008,0008) says DERIVED\\SECONDARY, see select.derived",
    "SELECT_FOR_PROCESSING": "detector data that is not meant to be viewed (PS3.3 C.8.11.1.1.1)",
    "DEID_BURNED_IN_FLAG": "flagged as, or of a kind that is likely to be, carrying burned-in text",
    "DEID_TEXT_DETECTED": "the pixels show text that is not a mark of side or technique, see deid.text",
    "PIX_LENGTH": "native Pixel Data is not as long as the header says",
    "PIX_LIMIT": "would decode to more than ingest.max_decoded_bytes, or its frames be stored in more than 256 MiB",
    "PIX_CODESTREAM_MISMATCH": "the compressed stream and the header disagree on size, samples or process",
    "PIX_DECODE_ERROR": "the decoder refused the pixels",
    "PIX_DECODER_CRASH": "the decoder died, twice",
    "PIX_DECODER_TIMEOUT": "the pixels took longer than ingest.timeout_s, twice",
    "PIX_DECODER_OOM": "the pixels took more than ingest.memory_bytes, twice",
    "PIX_RANGE": "decoded values need more than Bits Stored",
    "PIX_PHOTOMETRIC_UNSUPPORTED": "unknown photometric interpretation, or one that contradicts the samples",
    "PIX_LUT_INVALID": "a lookup table or rescale that maps to nothing",
    "PIX_FLOAT_UNSUPPORTED": "float pixel data",
}
"""Code to meaning; the only codes an object can get in this package."""

EXCLUDED: frozenset[str] = frozenset(
    {
        "FILE_DICOMDIR",
        "META_SOP_CLASS_UNSUPPORTED",
        "META_MODALITY_OUT_OF_SCOPE",
        "META_MULTIFRAME_UNSUPPORTED",
        "SELECT_BODY_PART",
        "SELECT_VIEW",
        "SELECT_MANUFACTURER",
        "SELECT_SIZE",
        "SELECT_LATERAL_VIEW",
        "SELECT_SECONDARY_CAPTURE",
        "SELECT_DERIVED",
        "SELECT_FOR_PROCESSING",
    }
)
"""Healthy objects out of scope; any other reason means something is wrong or risky: quarantined."""

OVERLOADED: frozenset[str] = frozenset({"PARSE_TIMEOUT", "PARSE_MEMORY", "PIX_DECODER_TIMEOUT", "PIX_DECODER_OOM"})
"""Reasons that a loaded machine may give a healthy object; a later ingest tries it again."""


class Rejected(Exception):
    """An object cannot be stored. Internal to this package; carries a code and nothing else.

    Attributes:
        reason: a key of `REASONS`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def outcome_of(reason: str | None) -> Outcome:
    """Return the outcome that goes with a reason; None means stored."""
    if reason is None:
        return "stored"
    return "excluded" if reason in EXCLUDED else "quarantined"
