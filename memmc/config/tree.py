"""The whole tree, and the ids that are made of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from memmc.config.cockpit import CockpitConfig
from memmc.config.data import (
    DataConfig,
    DeidConfig,
    IngestConfig,
    LakeConfig,
    QualityConfig,
    SelectConfig,
    SourceConfig,
    SplitConfig,
)
from memmc.config.monitor import MonitorConfig
from memmc.config.operation import OperateConfig, RayConfig, TrackingConfig
from memmc.config.push import PushConfig
from memmc.config.retrain import PromoteConfig, RetrainConfig
from memmc.config.scoring import CalibrateConfig, EvaluateConfig, ScoreConfig
from memmc.config.section import Section
from memmc.config.training import PRESETS, ModelConfig, TrainConfig


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
    promote: PromoteConfig = PromoteConfig()
    retrain: RetrainConfig = RetrainConfig()
    monitor: MonitorConfig = MonitorConfig()
    push: PushConfig = PushConfig()
    cockpit: CockpitConfig = CockpitConfig()
    tracking: TrackingConfig = TrackingConfig()
    ray: RayConfig = RayConfig()
    operate: OperateConfig = OperateConfig()

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
        """16 hex digits naming the whole tree but for places (lake, source, tracking, ray, key file) and operation."""
        places = {"lake", "source", "push", "tracking", "ray", "deid"}
        return config_hash(self, exclude=places | {"cockpit", "monitor", "operate", "promote", "retrain"})


def config_hash(section: Section, exclude: set[str] | None = None) -> str:
    """Return 16 hex digits of SHA-256 over the section's canonical JSON."""
    text = json.dumps(section.model_dump(mode="json", exclude=exclude), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
