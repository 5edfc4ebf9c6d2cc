"""The champion's alias and the history behind it, on a real registry in SQLite."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memmc.config import TrackingConfig
from memmc.errors import ModelError
from memmc.registry.models import CHAMPION, register, resolve
from memmc.registry.promotion import HISTORY_TAG, champion_of, crown, history, reconcile, step_back
from memmc.registry.tracking import open_tracking

numbers = st.lists(st.sampled_from("123456"), max_size=8)


@pytest.fixture(scope="module")
def tracking(tmp_path_factory):
    """One registry for the module: making its database takes seconds; each test has a name of its own in it."""
    return open_tracking(TrackingConfig(), tmp_path_factory.mktemp("r") / ".memmc")


def registered(tracking, tmp_path, name, number):
    folder = tmp_path / f"model-{number}"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes([number]) * 100)
    (folder / "model.json").write_text(json.dumps({"format": 1}))
    return register(tracking, tracking.start_run("memmc/cxr", "train"), folder, name)


def test_crowning_stepping_back_and_crowning_again(tracking, tmp_path):
    name = "memmc-crowned"
    one, two, three = (registered(tracking, tmp_path, name, number) for number in (1, 2, 3))
    assert champion_of(tracking, name) is None
    assert history(tracking, name) == []
    for version in (one, two, three):
        crown(tracking, version)
    assert crown(tracking, three) == ["1", "2", "3"]  # twice is once
    assert step_back(tracking, name) == ("3", "2")
    assert resolve(tracking, name).ref == two.ref
    assert step_back(tracking, name) == ("2", "1")
    with pytest.raises(ModelError, match="first champion"):
        step_back(tracking, name)
    assert resolve(tracking, name).ref == one.ref
    assert crown(tracking, three) == ["1", "3"]
    assert step_back(tracking, name) == ("3", "1")


def test_the_alias_is_right_where_the_history_is_not(tracking, tmp_path):
    """A process that died after the alias, and a hand that moved it, leave a history that lags behind."""
    name = "memmc-lagging"
    for number in (1, 2, 3):
        crown(tracking, registered(tracking, tmp_path, name, number))
    tracking.client.set_registered_model_tag(name, HISTORY_TAG, json.dumps(["1", "2"]))
    assert history(tracking, name) == ["1", "2", "3"]
    tracking.client.set_registered_model_tag(name, HISTORY_TAG, json.dumps(["1", "2", "3"]))
    tracking.client.set_registered_model_alias(name, CHAMPION, "2")
    assert history(tracking, name) == ["1", "2"]
    assert step_back(tracking, name) == ("2", "1")


def test_without_a_champion_there_is_nothing_to_step_back_from(tracking, tmp_path):
    name = "memmc-first"
    registered(tracking, tmp_path, name, 1)
    with pytest.raises(ModelError, match="memmc promote"):
        step_back(tracking, name)


@given(numbers, st.sampled_from("123456"))
def test_a_history_ends_with_the_champion_and_forgets_nothing_before_it(kept, champion):
    found = reconcile(kept, champion)
    assert found[-1] == champion
    assert found[:-1] == kept[: len(found) - 1]
    assert reconcile(found, champion) == found
