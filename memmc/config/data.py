"""How objects become rows: the lake, pixels, identities, sources, limits, splits, the quality gate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from memmc.config.section import Fraction, Positive, Section, ServerSection


class LakeConfig(Section):
    """Where the tables live."""

    uri: str = Field(default="lake", description="Root of all tables: a local path, file:// or s3:// URI.")
    vacuum_hours: int = Field(
        default=24,
        ge=6,
        le=24 * 3650,
        description="Files that no version of this time refers to, and older than it, may be deleted, h; the minimum "
        "leaves room for clocks that differ.",
    )
    keep_checkpoints_days: int = Field(
        default=30,
        ge=1,
        le=3650,
        description="Checkpoints of a training run are kept so long after its last beat, days.",
    )


class DataConfig(Section):
    """How an instance becomes pixels; these fields hash into `preprocess_id`."""

    image_size: int = Field(default=64, ge=16, le=4096, description="Side of the stored square image, px.")
    bits: Literal[8, 16] = Field(default=16, description="Bits per stored pixel, unsigned little-endian.")
    fit: Literal["stretch", "pad", "crop"] = Field(
        default="stretch",
        description="A non-square image is stretched to the square, padded with black, or centre-cropped; the latter "
        "two keep proportions, and quarantine what has pixels that are not square.",
    )
    window: Literal["first", "full"] = Field(
        default="first",
        description="Grey range: the object's VOI LUT, before a window, and the first of several (PS3.3 C.11.2), or "
        "the full stored range.",
    )


class DeidConfig(Section):
    """De-identification (PS3.15 Annex E, default-deny)."""

    key_file: str | None = Field(
        default=None,
        description="File with the identity key, at least 32 bytes, mode 0600; MEMMC_DEID_KEY in the environment goes "
        "before it, and a throw-away key is made when there is neither.",
    )
    key_secret: str | None = Field(
        default=None,
        description="Prefect Secret block that holds the identity key, for flows; its value is never a parameter.",
    )
    vault_uri: str | None = Field(
        default=None,
        description="Identity vault, outside the lake: a folder or s3:// prefix for the sealed originals of what is "
        "stored; none is kept when absent.",
    )
    vault_public_key_file: str | None = Field(
        default=None, description="Key the originals are sealed to (memmc vault init); goes with vault_uri."
    )
    max_date_shift_days: int = Field(
        default=365, ge=1, le=3650, description="Bound of the per-patient date shift, days."
    )
    text: Literal["ocr", "class"] = Field(
        default="ocr",
        description="Burned-in text: read the pixels and quarantine what shows more than marks of side and technique, "
        "or go by what the header says alone (select.burned_in_annotation).",
    )


class SelectConfig(Section):
    """Which instances are in scope; everything else is `excluded` with a reason."""

    modalities: tuple[str, ...] = Field(
        default=("CR", "DX", "DR", "RG"),
        description="Accepted (0008,0060) Modality values; UNKNOWN for images without one.",
    )
    body_parts: tuple[str, ...] = Field(
        default=(),
        description="Accepted (0018,0015) Body Part Examined terms (PS3.16 Annex L); any when empty. "
        "UNKNOWN stands for objects that say nothing, OTHER for terms that are none.",
    )
    views: tuple[str, ...] = Field(
        default=(), description="Accepted (0018,5101) View Position terms; any when empty. UNKNOWN and OTHER as above."
    )
    manufacturers: tuple[str, ...] = Field(
        default=(), description="Accepted (0008,0070) Manufacturer names; any when empty. UNKNOWN and OTHER as above."
    )
    min_side_px: int = Field(
        default=1, ge=1, description="Smaller (0028,0010) Rows or (0028,0011) Columns are excluded, px."
    )
    frames: Literal["each", "middle", "refuse"] = Field(
        default="refuse",
        description="Multi-frame objects: every frame becomes a row, the middle one stands for the object, or none.",
    )
    secondary_capture: bool = Field(
        default=False, description="Accept Secondary Capture objects of an accepted modality."
    )
    derived: bool = Field(
        default=False, description="Accept (0008,0008) Image Type DERIVED\\SECONDARY: reformatted or processed images."
    )
    lateral_views: bool = Field(default=False, description="Accept lateral (0018,5101) View Position values.")
    burned_in_annotation: Literal["refuse", "accept"] = Field(
        default="refuse", description="What to do when (0028,0301) Burned In Annotation is YES."
    )


class SourceConfig(ServerSection):
    """How archives and ZIP files are listed and read. A password may also stand in MEMMC_SOURCE_PASSWORD."""

    uri: str | None = Field(
        default=None,
        description="What a scheduled ingest lists; not a parameter of its flow, since Prefect would show it.",
    )
    labels_file: str | None = Field(
        default=None, description="CSV of labels that go with `uri`: columns path (or SOPInstanceUID) and label."
    )
    quiet_seconds: float = Field(
        default=60.0, ge=0, description="A study is complete when nothing has arrived for so long, s; 0 takes all."
    )
    modalities: tuple[str, ...] = Field(
        default=(),
        description="DICOMweb: only studies with one of these Modalities in Study (0008,0061); all if empty.",
    )
    study_dates: str | None = Field(
        default=None,
        pattern=r"^(\d{8}(-(\d{8})?)?|-\d{8})$",
        description="DICOMweb: studies of this Study Date (0008,0020) or range, YYYYMMDD-YYYYMMDD, open ends allowed.",
    )
    open_archives: bool = Field(
        default=False,
        description="ZIP files in a folder are walked too; else each is one FILE_ARCHIVE_NESTED object. Not on S3.",
    )
    archive_members: Positive = Field(default=100_000, description="Bound on the members of one ZIP file.")
    archive_bytes: Positive = Field(default=64 << 30, description="Bound on what one ZIP file inflates to, bytes.")
    archive_ratio: Positive = Field(
        default=200, description="Bound on inflated over compressed size of a ZIP member of more than 16 MiB."
    )


class IngestConfig(Section):
    """Limits on untrusted objects and the shape of the work."""

    max_file_bytes: int = Field(default=2 << 30, ge=1, description="Larger objects are quarantined, bytes.")
    max_decoded_bytes: int = Field(
        default=2 << 30, ge=1, description="Bound on rows x columns x samples x frames, bytes."
    )
    max_rows: int = Field(default=16_384, ge=1, description="Bound on (0028,0010) Rows and (0028,0011) Columns, px.")
    memory_bytes: int = Field(default=3 << 30, ge=1 << 28, description="Address space of a decoding process, bytes.")
    timeout_s: float = Field(
        default=60.0, gt=0, description="Wall time one object may take, s; of processor time it gets half."
    )
    max_quarantined: float = Field(
        default=0.25,
        gt=0,
        le=1,
        description="An ingest of at least 200 new objects that quarantines a larger share of them ends with an error, "
        "once their rows are committed; 1 never.",
    )
    objects_per_task: int | None = Field(
        default=None,
        ge=1,
        description="Objects one task converts into one set of shards; chosen from the count when absent.",
    )


class SplitConfig(Section):
    """Shares of patients, by keyed hash, so that a patient never moves."""

    train: Fraction = 0.75
    calibrate: Fraction = 0.15
    test: Fraction = 0.10

    @model_validator(mode="after")
    def _sum_to_one(self) -> SplitConfig:
        if abs(self.train + self.calibrate + self.test - 1.0) > 1e-9:
            raise ValueError("split.train + split.calibrate + split.test must be 1")
        return self


class QualityConfig(Section):
    """The gate before training: stored images that are flagged QC_* and kept out (infra/benchmarks/quality_gate.py)."""

    min_side_px: int = Field(
        default=96, ge=1, description="Fewer (0028,0010) Rows or (0028,0011) Columns than this are flagged, px."
    )
    max_saturated: Fraction = Field(
        default=0.7, description="Share of pixels at the darkest, or at the brightest, level that is still accepted."
    )
    min_reference: int = Field(
        default=50, ge=10, description="With fewer normals to compare with, orientation and body part are not judged."
    )
    max_reference: Positive = Field(default=5000, description="Normals the comparison is fitted on at most.")
    components: Positive = Field(default=32, description="Principal components of the normals' thumbnails.")
    orientation_ratio: float = Field(
        default=1.65, gt=1, description="An image that fits so many times better turned or inverted is flagged."
    )
    max_tail: float = Field(
        default=4.5,
        gt=0,
        description="Accepted distance from the normals, in spreads of their own distances beyond the median.",
    )
    duplicate_bits: int = Field(
        default=7, ge=0, le=64, description="Hash bits in which two pictures that are the same may differ."
    )
    duplicate_correlation: Fraction = Field(
        default=0.98,
        description="Correlation of two thumbnails, less the cohort's mean, from which on they show the same picture.",
    )
