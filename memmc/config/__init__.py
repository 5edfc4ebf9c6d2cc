"""The one configuration tree: every default, unit and bound stands here and nowhere else.

Sources, weakest first: the defaults of the sections, a TOML file, environment variables
(``MEMMC_SECTION__KEY=value``), ``--set section.key=value``. A field that no
source sets takes its value from the preset (`PRESETS`), if that has one.
"""

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
from memmc.config.load import load_config
from memmc.config.monitor import MonitorConfig
from memmc.config.operation import OperateConfig, RayConfig, TrackingConfig
from memmc.config.push import PushConfig
from memmc.config.retrain import PromoteConfig, RetrainConfig
from memmc.config.scoring import CalibrateConfig, EvaluateConfig, ScoreConfig, ScorerName
from memmc.config.training import PRESET_SIDES, PRESETS, ModelConfig, Preset, TrainConfig
from memmc.config.tree import Config, config_hash

__all__ = [
    "PRESETS",
    "PRESET_SIDES",
    "CalibrateConfig",
    "CockpitConfig",
    "Config",
    "DataConfig",
    "DeidConfig",
    "EvaluateConfig",
    "IngestConfig",
    "LakeConfig",
    "ModelConfig",
    "MonitorConfig",
    "OperateConfig",
    "Preset",
    "PromoteConfig",
    "PushConfig",
    "QualityConfig",
    "RayConfig",
    "RetrainConfig",
    "ScoreConfig",
    "ScorerName",
    "SelectConfig",
    "SourceConfig",
    "SplitConfig",
    "TrackingConfig",
    "TrainConfig",
    "config_hash",
    "load_config",
]
