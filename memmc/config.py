"""The one configuration tree: every default, unit and bound stands here and nowhere else.

Sources, weakest first: the defaults below, a TOML file, environment variables
(``MEMMC_SECTION__KEY=value``), ``--set section.key=value``. A field that no
source sets takes its value from the preset (`PRESETS`), if that has one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from memmc.errors import ConfigError

ENV_PREFIX = "MEMMC_"

Preset = Literal["tiny", "small", "base"]
ScorerName = Literal["residual_statistics", "residual_peak", "l1", "mse", "ssim", "ms_ssim", "gms", "pasted_ms_ssim"]

StratumColumn = Literal[
    "modality", "manufacturer", "manufacturer_model", "view_position", "body_part", "laterality", "patient_sex"
]

Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A frozen group of fields that refuses names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


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


class DataConfig(Section):
    """How an instance becomes pixels; these fields hash into `preprocess_id`."""

    image_size: int = Field(default=64, ge=16, le=4096, description="Side of the stored square image, px.")
    bits: Literal[8, 16] = Field(default=16, description="Bits per stored pixel, unsigned little-endian.")
    fit: Literal["stretch", "pad", "crop"] = Field(
        default="stretch",
        description="A non-square image is stretched to the square, padded with black, or centre-cropped.",
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


class SourceConfig(Section):
    """How archives and ZIP files are listed and read. A password may also stand in MEMMC_SOURCE_PASSWORD."""

    user: str | None = Field(default=None, description="User of an Orthanc or DICOMweb server (HTTP Basic).")
    password_file: str | None = Field(default=None, description="File whose first line is that user's password.")
    token_file: str | None = Field(default=None, description="File whose first line is a bearer token, instead.")
    ca_file: str | None = Field(
        default=None, description="PEM certificates that a server's chain must end in; the system's when absent."
    )
    quiet_seconds: float = Field(
        default=60.0, ge=0, description="A study is complete when nothing has arrived for so long, s; 0 takes all."
    )
    connect_seconds: float = Field(default=5.0, gt=0, description="Time to reach a server, s.")
    read_seconds: float = Field(default=20.0, gt=0, description="Time a server may stay silent, s.")
    answer_seconds: float = Field(default=300.0, gt=0, description="Time one whole answer may take, s.")
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
        default=False, description="ZIP files in a folder are walked too; else each is one FILE_ARCHIVE_NESTED object."
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
    timeout_s: float = Field(default=60.0, gt=0, description="Wall time one object may take, s.")
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


class ModelConfig(Section):
    """MemMC-MAE.

    Marks: [abstract] Tian et al. 2023, [MAE] He et al. 2022, [M2] Cornia et al. 2020, [MemAE] Gong et al. 2019,
    [recalled] from the first one's body and not read again, [choice] ours. A plain MAE is `memory_slots = 0,
    cross_attention = false`; one whose latent is MemAE's reading of a memory has `bottleneck_slots` besides.
    """

    patch_size: Positive = Field(default=8, description="Side of a patch, px [choice].")
    mask_ratio: Fraction = Field(default=0.75, description="Share of patches removed [MAE].")
    encoder_dim: Positive = Field(default=192, description="Width D of the encoder, a multiple of 4 [choice].")
    encoder_depth: Positive = Field(default=6, description="Encoder blocks S [choice].")
    encoder_heads: Positive = Field(default=3, description="Heads of the encoder; divide its width [choice].")
    decoder_dim: Positive = Field(default=128, description="Width E of the decoder, a multiple of 4 [choice].")
    decoder_depth: Positive = Field(default=4, description="Decoder blocks [choice].")
    decoder_heads: Positive = Field(default=4, description="Heads of the decoder; divide its width [choice].")
    mlp_ratio: float = Field(default=4.0, gt=0, description="Hidden width of an MLP over the block's width [MAE].")
    memory_slots: int = Field(
        default=16,
        ge=0,
        description="Learned key/value slots per encoder layer and head [abstract, M2]; 0 = none; their number is "
        "[recalled] for `base`, [choice] elsewhere.",
    )
    bottleneck_slots: int = Field(
        default=0,
        ge=0,
        description="The last level is replaced by what it reads from so many slots, the memory of [MemAE]; 0 = off, "
        "as in [abstract].",
    )
    levels: str = Field(
        default="all",
        pattern=r"^(all|last|every_[1-9][0-9]{0,2})$",
        description="Encoder levels the decoder attends to: all [abstract, M2], last, or every_K: the last, and every "
        "K-th before it [choice].",
    )
    cross_attention: bool = Field(
        default=True, description="Multi-level cross-attention [abstract]; off gives the decoder of [MAE]."
    )
    decoder_self_attention: bool = Field(
        default=True, description="Self-attention in the decoder's blocks [M2, MAE]; off is cheaper [choice]."
    )
    gate: Literal["channel", "head", "scalar"] = Field(
        default="channel",
        description="Granularity of the level gates: channel [M2]; head and scalar are cheaper [choice].",
    )
    norm_pix_loss: bool = Field(
        default=False,
        description="Standardise target patches [MAE]; off, since the score needs intensities [recalled].",
    )
    recompute: bool = Field(
        default=False,
        description="While training a block keeps its input alone and computes the rest anew for the backward pass: a "
        "fraction of the memory for a second forward pass, the same numbers [choice].",
    )

    @model_validator(mode="after")
    def _decoder_mixes(self) -> ModelConfig:
        if not (self.cross_attention or self.decoder_self_attention):
            raise ValueError(
                "model.cross_attention and model.decoder_self_attention are both off: no removed patch would see "
                "anything; turn one on"
            )
        return self


PRESETS: Mapping[Preset, Mapping[str, Mapping[str, Any]]] = {
    # A few thousand small steps on a CPU: little batches and a high rate learn most in a few minutes.
    "tiny": {
        "model": {"gate": "head"},
        "train": {"batch_size": 8, "base_lr": 0.016, "ema_decay": 0.99},
    },
    "small": {
        "model": {
            "encoder_dim": 384,
            "encoder_depth": 8,
            "encoder_heads": 6,
            "decoder_dim": 256,
            "decoder_depth": 4,
            "decoder_heads": 8,
            "memory_slots": 40,
        },
    },
    "base": {
        "model": {
            "patch_size": 16,
            "encoder_dim": 768,
            "encoder_depth": 12,
            "encoder_heads": 12,
            "decoder_dim": 512,
            "decoder_depth": 8,
            "decoder_heads": 16,
            "memory_slots": 40,
        },
    },
}
"""Fields, by section, that a preset sets where no other source does."""


class TrainConfig(Section):
    """One training run."""

    preset: Preset = Field(default="tiny", description="Model size; `model.*` fields override it.")
    max_minutes: float = Field(
        default=10.0, gt=0, description="Wall time of the training loop; the schedule ends with it, min."
    )
    max_steps: Positive = Field(
        default=20_000, description="Optimiser steps; whichever of the two bounds comes first ends the run."
    )
    num_workers: Positive = Field(default=2, description="Data-parallel workers.")
    min_workers: int | None = Field(
        default=None,
        ge=1,
        description="Go on with as few workers when nodes are lost, and with more when they come back; no fewer than "
        "num_workers when absent.",
    )
    strategy: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="Each worker holds the whole model, or a share of it (for a model too large for one).",
    )
    accumulate: Positive = Field(default=1, description="Batches per optimiser step.")
    use_gpu: bool | None = Field(default=None, description="One GPU per worker; found out when absent.")
    batch_size: Positive = Field(default=32, description="Images per worker and step.")
    base_lr: float = Field(default=1.5e-3, gt=0, description="Learning rate per 256 images of global batch.")
    weight_decay: float = Field(default=0.05, ge=0, description="[MAE]")
    warmup: Fraction = Field(default=0.05, description="Share of the run spent on linear warm-up.")
    clip_grad_norm: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.999, ge=0, lt=1, description="Decay per step; scored weights are the average.")
    crop_scale: Fraction = Field(default=0.8, description="Smallest area share of the random resized crop.")
    rotate_degrees: float = Field(default=5.0, ge=0, le=45, description="Bound of the random rotation, degrees.")
    cache_bytes: int = Field(
        default=2 << 30, ge=0, description="Each worker keeps all images in memory up to this size, bytes."
    )
    checkpoint_seconds: float = Field(default=60.0, gt=0, description="Time between checkpoints, s.")
    look_seconds: float = Field(
        default=60.0, gt=0, description="Time between two looks at what memory and levels are used for, s."
    )
    validate_share: float = Field(
        default=0.0,
        ge=0,
        le=0.5,
        description="Share of the training patients kept back; looks then measure the masked error on their images, "
        "and how well planted lesions are found in them.",
    )
    select: Literal["last", "val_error", "probe_auroc"] = Field(
        default="last", description="Which averaged weights are registered: the last, or the best by a look's figure."
    )
    patience: int | None = Field(
        default=None, ge=1, description="Looks without a better figure that end the run; none do when absent."
    )
    max_failures: int = Field(
        default=3, ge=0, description="Worker failures survived by restarting from the last checkpoint."
    )
    resume: str = Field(
        default="auto",
        description="Go on with an unfinished run of the same images and settings if there is one (auto), with the one "
        "of this name, or with none (new).",
    )
    warm_start: str | None = Field(
        default=None, description="Model whose averaged weights to start from; random weights when absent."
    )
    hung_seconds: float = Field(
        default=120.0, gt=0, description="A worker without a step for so long is ended and counts as failed, s."
    )
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _elastic_range(self) -> TrainConfig:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError("train.min_workers must not be above train.num_workers")
        return self

    @model_validator(mode="after")
    def _selection_has_figures(self) -> TrainConfig:
        if (self.select != "last" or self.patience is not None) and not self.validate_share:
            raise ValueError("train.select and train.patience need train.validate_share above 0")
        if self.patience is not None and self.select == "last":
            raise ValueError("train.patience needs train.select = val_error or probe_auroc")
        return self


class ScoreConfig(Section):
    """How an image is scored."""

    scorer: ScorerName = Field(
        default="residual_statistics",
        description="All take complementary masks but pasted_ms_ssim, the paper's: random masks (10 passes there), the "
        "predictions pasted into the image, 1 - MS-SSIM averaged over the passes.",
    )
    passes: Positive = Field(
        default=4,
        description="Forward passes per image, a multiple of 1 / (1 - mask_ratio) (complementary masks) [choice].",
    )
    batch_size: int = Field(
        default=0, ge=0, description="Images judged together; found by each actor at its start when 0."
    )
    commit_seconds: float = Field(
        default=30.0, gt=0, description="Time between commits of scores; a kill costs at most what was done since, s."
    )
    rows_per_shard: Positive = Field(
        default=1024, description="Scores written together, at most; large maps lower it further."
    )
    num_actors: Positive = Field(default=2, description="Scoring actors.")
    grid: Positive = Field(default=4, description="Side of the coarse grid of residual features, cells [choice].")
    components: Positive = Field(default=16, description="Principal components of the residual statistics [choice].")


class CalibrateConfig(Section):
    """Thresholds from normals alone."""

    false_positive_rate: Fraction = Field(
        default=0.05, description="Share of normal patients' images to be flagged at most."
    )
    min_normals: Positive = Field(default=20, description="Fewer held-out normal images refuse a calibration.")
    rates: tuple[Fraction, ...] = Field(
        default=(0.01, 0.05, 0.10),
        description="Further false-positive rates whose thresholds, with intervals, are kept beside the chosen one.",
    )
    strata: tuple[StratumColumn, ...] = Field(
        default=("manufacturer", "manufacturer_model", "view_position"),
        description="Columns of `instances`; images that agree in all of them are judged by their own normals.",
    )
    min_stratum_normals: Positive = Field(
        default=100, description="A stratum with fewer held-out normal images is judged by the pooled ones [choice]."
    )
    region_rate: Fraction = Field(
        default=0.05, description="Share of normal images whose map may show a region; it sets the maps' level."
    )


class EvaluateConfig(Section):
    """Evaluation."""

    bootstrap: Positive = Field(default=1000, description="Patient-bootstrap resamplings.")
    confidence: Fraction = 0.95
    seed: int = Field(default=0, ge=0)


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = Field(default=None, description="Tracking server; an SQLite file under .memmc/ when absent.")


class RayConfig(Section):
    """Where the parallel work runs."""

    address: str | None = Field(default=None, description="Cluster to join; a local one is started when absent.")
    num_cpus: int | None = Field(
        default=None, ge=2, description="Logical CPUs of the local cluster; cores + 2 when absent."
    )


class Config(Section):
    """The whole tree."""

    lake: LakeConfig = LakeConfig()
    data: DataConfig = DataConfig()
    deid: DeidConfig = DeidConfig()
    select: SelectConfig = SelectConfig()
    source: SourceConfig = SourceConfig()
    ingest: IngestConfig = IngestConfig()
    split: SplitConfig = SplitConfig()
    quality: QualityConfig = QualityConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    score: ScoreConfig = ScoreConfig()
    calibrate: CalibrateConfig = CalibrateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        """Fill fields that no source sets from the preset."""
        if not isinstance(values, Mapping) or not isinstance(values.get("train", {}), Mapping):
            return values
        filled = dict(values)
        for section, fields in PRESETS.get(values.get("train", {}).get("preset", "tiny"), {}).items():
            if isinstance(filled.get(section, {}), Mapping):
                filled[section] = {**fields, **filled.get(section, {})}
        return filled

    @property
    def preprocess_id(self) -> str:
        """16 hex digits naming the way pixels are prepared; equal ids mean comparable pixels."""
        return config_hash(self.data)

    @property
    def config_id(self) -> str:
        """16 hex digits naming the whole tree but for places (lake, source, tracking, ray, key file)."""
        return config_hash(self, exclude={"lake", "source", "tracking", "ray", "deid"})


def config_hash(section: Section, exclude: set[str] | None = None) -> str:
    """Return 16 hex digits of SHA-256 over the section's canonical JSON."""
    text = json.dumps(section.model_dump(mode="json", exclude=exclude), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_config(
    file: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    overrides: Iterable[str] = (),
) -> Config:
    """Merge the sources and validate them once.

    Args:
        file: TOML file, or None.
        env: environment; only names that start with ``MEMMC_`` and hold ``__`` are read.
        overrides: ``section.key=value`` strings, strongest.

    Raises:
        ConfigError: unreadable file, unknown key (the nearest valid one is named), value out of range.
    """
    tree: dict[str, dict[str, Any]] = {}
    if file is not None:
        for section, fields in _read_toml(Path(file)).items():
            if not isinstance(fields, dict):
                raise ConfigError(
                    f"configuration file: '{section}' stands outside a section; write [section] key = value"
                )
            for key, value in fields.items():
                _place(tree, f"{section}.{key}", value)
    for name, value in sorted((env or {}).items()):
        if name.startswith(ENV_PREFIX) and "__" in name:
            section, _, key = name[len(ENV_PREFIX) :].lower().partition("__")
            _place(tree, f"{section}.{key}", value)
    for item in overrides:
        path, separator, value = item.partition("=")
        if not separator:
            raise ConfigError(f"--set {path}: expected section.key=value")
        _place(tree, path.strip(), value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"configuration file cannot be read ({error.strerror}); check --config") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"configuration file is not TOML: {error}") from None


def _place(tree: dict[str, dict[str, Any]], path: str, value: Any) -> None:
    section, _, key = path.partition(".")
    annotation = Config.model_fields.get(section)
    valid = [f"{s}.{k}" for s, f in Config.model_fields.items() for k in _fields_of(f.annotation)]
    if annotation is None or key not in _fields_of(annotation.annotation):
        near = difflib.get_close_matches(path, valid, n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else f"; sections are {', '.join(Config.model_fields)}"
        raise ConfigError(f"unknown configuration key '{path}'{hint}")
    if isinstance(value, str):
        value = _parse(value, annotation.annotation.model_fields[key].annotation)  # type: ignore[union-attr]
    tree.setdefault(section, {})[key] = value


def _parse(text: str, annotation: Any) -> Any:
    """Turn the text of an environment variable or --set into what the field's type is validated from."""
    accepted = typing.get_args(annotation) or (annotation,)
    if type(None) in accepted and text.strip().lower() in {"none", "null", ""}:
        return None
    if typing.get_origin(annotation) is tuple:
        return [part.strip() for part in text.split(",") if part.strip()]
    if str in accepted or all(isinstance(item, str) for item in accepted):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _fields_of(annotation: Any) -> list[str]:
    return list(annotation.model_fields) if isinstance(annotation, type) and issubclass(annotation, Section) else []


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "configuration"
        lines.append(f"{where}: {item['msg']}")
    return "; ".join(lines)
