"""The configuration tree: sources, precedence, refusals, ids."""

import pytest
from pydantic import ValidationError

from memmc.config import Config, load_config
from memmc.errors import ConfigError


def test_sources_override_one_another_in_order(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[train]\nmax_minutes = 3\nseed = 1\n[data]\nbits = 8\n")
    env = {"MEMMC_TRAIN__SEED": "2", "MEMMC_DATA__BITS": "16", "HOME": "/", "MEMMC_UNRELATED": "x"}
    config = load_config(file, env, ["data.bits=8"])
    assert (config.train.max_minutes, config.train.seed, config.data.bits) == (3.0, 2, 8)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("train.max_minute=3", "train.max_minutes"),
        ("lake.url=x", "lake.uri"),
        ("scoring.passes=4", "score.passes"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(override, hint):
    with pytest.raises(ConfigError, match=f"did you mean '{hint}'"):
        load_config(overrides=[override])


def test_unknown_keys_are_refused_in_files_and_environment(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[train]\nlearning_rate = 1\n")
    with pytest.raises(ConfigError, match=r"train\.learning_rate"):
        load_config(file)
    with pytest.raises(ConfigError, match=r"train\.sed"):
        load_config(env={"MEMMC_TRAIN__SED": "1"})


@pytest.mark.parametrize(
    "override", ["train.max_minutes=-1", "data.bits=12", "train.seed=x", "split.train=0.9", "train.seed"]
)
def test_values_out_of_range_are_refused(override):
    with pytest.raises(ConfigError):
        load_config(overrides=[override])


def test_a_file_that_is_not_toml_is_refused(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("train: {}")
    with pytest.raises(ConfigError, match="not TOML"):
        load_config(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "absent.toml")


def test_the_papers_score_has_the_papers_passes_unless_told_otherwise():
    paper = "score.scorer=pasted_ms_ssim"
    assert load_config(overrides=[paper]).score.passes == 10
    assert load_config(overrides=[paper, "score.passes=4"]).score.passes == 4
    assert load_config().score.passes == 4


def test_presets_fill_only_what_no_source_sets():
    config = load_config(overrides=["train.preset=base", "model.memory_slots=7"])
    assert (config.model.encoder_dim, config.model.patch_size, config.model.memory_slots) == (768, 16, 7)


def test_lists_and_absent_values_from_text():
    config = load_config(overrides=["select.modalities=CR, DX", "train.use_gpu=none", "deid.key_file=/k"])
    assert config.select.modalities == ("CR", "DX")
    assert config.train.use_gpu is None
    assert config.deid.key_file == "/k"


def test_the_tree_is_frozen_and_survives_a_round_trip():
    config = load_config(overrides=["train.preset=small"])
    with pytest.raises(ValidationError):
        config.train.seed = 3  # type: ignore[misc]
    assert Config.model_validate(config.model_dump()) == config


def test_preprocess_id_follows_pixels_and_nothing_else():
    base = load_config()
    assert load_config(overrides=["train.seed=9", "lake.uri=elsewhere"]).preprocess_id == base.preprocess_id
    assert load_config(overrides=["data.image_size=128"]).preprocess_id != base.preprocess_id
    assert load_config(overrides=["train.seed=9"]).config_id != base.config_id
    assert load_config(overrides=["lake.uri=elsewhere"]).config_id == base.config_id
