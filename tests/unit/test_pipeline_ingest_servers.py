"""Ingests from a server that fails on some of its objects: none is lost, none holds up the others."""

from __future__ import annotations

import re

import pytest
from dicom_instances import dataset, encoded
from small_archive import Orthanc, Site, name, served

from memmc.config import Config, load_config
from memmc.errors import StorageError
from memmc.lake.tables import Lake
from memmc.pipeline import convert_all
from memmc.pipeline.ingest import ingest, preview
from memmc.pipeline.progress import Silent
from memmc.pipeline.results import IngestResult
from memmc.sources import http

STATUS = {"FILE_UNREADABLE": 404, "STORE_AUTH": 403, "STORE_TIMEOUT": 503}  # of the file alone; its entry is there


@pytest.fixture
def archive(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(convert_all, "ray_cluster", lambda *_, **__: pytest.fail("a cluster was started"))
    monkeypatch.setattr(http, "RETRY_DELAYS_S", (0.0, 0.0))
    archive = Orthanc()
    site = Site(archive.routes)
    with served(site):
        archive.site = site
        yield archive


def receive(archive, *wanted: int) -> None:
    for number in wanted:
        archive.receive(number, encoded(dataset(SOPInstanceUID=f"1.2.3.{number}")))
    archive.wait(61)


def fail(archive, reason: str, *wanted: int) -> None:
    """Let the files of instances fail until `mend`."""
    places = {f"/instances/{name('instances', number)}/file" for number in wanted}

    def damaged(path, query):
        status, body, kind = archive.routes(path, query)
        return status, body[:-1] + b"!" if path in places else body, kind

    if reason == "FILE_CHECKSUM":
        archive.site.routes = damaged
    else:
        archive.site.faults.update({place: [STATUS[reason]] * 99 for place in places})


def mend(archive) -> None:
    archive.site.faults.clear()
    archive.site.routes = archive.routes


def settings() -> Config:
    return load_config(overrides=["deid.text=class"])


def source(archive) -> str:
    return f"orthanc+{archive.site.url}"


def take(archive) -> IngestResult:
    archive.site.asked.clear()
    return ingest(settings(), source(archive), "c")


def described(archive) -> set[str]:
    """The instances that the last ingest asked about."""
    return {path for path, _ in archive.site.asked if re.fullmatch(r"/instances/[^/]+", path)}


def entry(number: int) -> str:
    return f"/instances/{name('instances', number)}"


@pytest.mark.parametrize("reason", [*STATUS, "FILE_CHECKSUM"])
def test_an_instance_that_cannot_be_fetched_is_tried_again_until_it_can(archive, reason):
    receive(archive, *range(4))
    fail(archive, reason, 1)
    first = take(archive)
    assert (first.seen, first.stored, first.reasons) == (4, 3, {reason: 1})
    receive(archive, 4)
    second = take(archive)
    assert (second.seen, second.stored, second.reasons) == (2, 1, {reason: 1})
    assert described(archive) == {entry(1), entry(4)}  # and nothing that is accounted for
    same = take(archive)  # nothing learnt, so nothing committed
    assert (same.seen, same.quarantined, same.version) == (1, 1, second.version)
    counts = {"objects listed": 1, "already ingested": 0, "new": 1, "labelled": 0}
    assert preview(settings(), source(archive), "c").counts == counts
    mend(archive)
    healed = take(archive)
    assert (healed.seen, healed.stored, healed.version) == (1, 1, second.version + 1)
    receive(archive, 5)
    assert take(archive).stored == 1
    last = take(archive)
    assert (last.seen, described(archive)) == (0, set())
    outcomes = Lake("lake").read("instances", ["outcome"])["outcome"].to_pylist()
    assert (outcomes.count("stored"), outcomes.count("quarantined"), len(outcomes)) == (6, 1, 7)


@pytest.mark.parametrize("reason", ["FILE_UNREADABLE", "STORE_TIMEOUT"])
def test_instances_that_stay_lost_do_not_stop_what_comes_after_them(archive, reason):
    receive(archive, *range(13))
    fail(archive, reason, 0, 4, 8)  # less than a quarter, no two in a row
    first = take(archive)
    assert (first.stored, first.reasons) == (10, {reason: 3})
    for number in (13, 14):
        receive(archive, number)
        later = take(archive)  # of the three, in a row now, and one new instance
        assert (later.seen, later.stored, later.quarantined) == (4, 1, 3)
    mend(archive)
    assert take(archive).stored == 3


@pytest.mark.parametrize("reason", ["STORE_AUTH", "STORE_TIMEOUT"])  # by their share, and by three in a row
def test_a_server_that_gives_no_file_ends_the_run_and_nothing_is_committed(archive, reason):
    receive(archive, *range(4))
    fail(archive, reason, *range(4))
    with pytest.raises(StorageError, match=reason):
        take(archive)
    assert not Lake("lake").exists("instances")
    mend(archive)
    assert take(archive).stored == 4


def test_the_course_of_the_listing_is_shown(archive):
    class Noted(Silent):
        def __init__(self) -> None:
            self.heard: list[tuple[str, float, str]] = []
            self.name = ""

        def stage(self, name: str, total: float | None = None) -> None:
            self.name = name

        def advance(self, done: float, note: str = "") -> None:
            self.heard.append((self.name, done, note))

    receive(archive, *range(3))
    noted = Noted()
    ingest(settings(), source(archive), "c", progress=noted)
    assert [item for item in noted.heard if item[0] == "list"] == [
        ("list", number, f"{number} of 3 instances") for number in range(1, 4)
    ]
