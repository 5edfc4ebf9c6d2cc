"""The Orthanc client and the HTTP below it, against what a server does rarely."""

import dataclasses
import logging
import pickle

import pytest
from small_archive import Orthanc, Site, name, served, slow

from memmc.config import Config, SourceConfig
from memmc.dicom.read import refused_by_head
from memmc.errors import ConfigError, StorageError, UsageError
from memmc.pipeline.doctor import look_at_source
from memmc.sources import http, orthanc
from memmc.sources import objects as objects_module
from memmc.sources.objects import FetchFailed
from memmc.sources.open import open_source

LIMIT = 1 << 20
SETTINGS = SourceConfig()


@pytest.fixture
def archive(monkeypatch):
    monkeypatch.setattr(http, "RETRY_DELAYS_S", (0.0, 0.0))
    monkeypatch.setattr(orthanc, "PAGE_CHANGES", 3)
    archive = Orthanc()
    site = Site(archive.routes)
    with served(site):
        archive.site = site
        yield archive


def source(archive, settings=SETTINGS, environment=None):
    return open_source(f"orthanc+{archive.site.url}", settings, environment or {})


def everything(_obj) -> bool:
    return True


def numbers(listing) -> list[int]:
    known = {name("instances", number): number for number in range(100)}
    return [known[obj.path] for obj in listing.objects]


def reason(archive, obj, limit=LIMIT, settings=SETTINGS) -> str:
    with pytest.raises(FetchFailed) as caught:
        source(archive, settings).fetch(obj, limit)
    return caught.value.reason


def fill(archive, *wanted: int) -> None:
    for number in wanted:
        archive.receive(number, f"instance {number}".encode())
    archive.wait(61)


def test_only_what_arrived_after_the_cursor_is_listed(archive):
    fill(archive, *range(8))
    first = source(archive).listing(None, everything)
    assert numbers(first) == list(range(8)) and first.whole and first.pending == 0
    assert sum(path == "/changes" for path, _ in archive.site.asked) == 6  # 16 entries, three a page
    fill(archive, 8, 9)
    second = source(archive).listing(first.cursor, everything)
    assert numbers(second) == [8, 9] and not second.whole
    third = source(archive).listing(second.cursor, everything)
    assert numbers(third) == [] and third.cursor == second.cursor


def test_bytes_come_as_they_were_received(archive):
    fill(archive, *range(3))
    place = pickle.loads(pickle.dumps(source(archive)))
    objects = place.listing(None, everything).objects
    assert [place.fetch(obj, LIMIT) for obj in objects] == [b"instance 0", b"instance 1", b"instance 2"]
    assert [obj.size for obj in objects] == [10, 10, 10]
    assert reason(archive, objects[0], 9) == "FILE_TOO_LARGE"


def test_a_large_body_that_is_no_instance_is_given_up_by_its_head(archive, monkeypatch):
    fill(archive, 0)
    place = source(archive)
    (obj,) = place.listing(None, everything).objects
    monkeypatch.setattr(objects_module, "LARGE_BYTES", 5)
    monkeypatch.setattr(http, "LARGE_BYTES", 5)
    with pytest.raises(FetchFailed, match="FILE_NOT_DICOM"):
        place.fetch(obj, LIMIT, refused_by_head)
    assert place.fetch(obj, LIMIT, lambda head: None if head == b"instance 0" else "FILE_EMPTY") == b"instance 0"


@pytest.mark.parametrize("refilled", [1, 9, 20])
def test_a_server_that_was_set_up_anew_is_listed_from_its_beginning(archive, refilled):
    fill(archive, *range(8))
    cursor = source(archive).listing(None, everything).cursor
    archive.changes.clear()
    archive.files.clear()
    fill(archive, *range(40, 40 + refilled))
    listing = source(archive).listing(cursor, everything)
    assert numbers(listing) == list(range(40, 40 + refilled)) and listing.whole


def test_a_cursor_whose_instance_was_deleted_costs_time_and_nothing_else(archive):
    fill(archive, 0)
    archive.changes.pop()  # so that the cursor names the instance, not its series
    cursor = source(archive).listing(None, everything).cursor
    fill(archive, 2, 3)
    assert numbers(source(archive).listing(cursor, everything)) == [2, 3]
    archive.delete(0)
    assert numbers(source(archive).listing(cursor, everything)) == [2, 3]


def test_a_study_in_which_something_still_arrives_is_left_for_later(archive):
    fill(archive, 0, 1, 2)  # study 0; one of two of study 1
    archive.receive(3, b"late")
    fill_later = source(archive).listing(None, everything)
    assert (numbers(fill_later), fill_later.pending) == ([0, 1], 2)
    archive.wait(59)
    assert source(archive).listing(fill_later.cursor, everything).pending == 2
    archive.wait(2)
    listing = source(archive).listing(fill_later.cursor, everything)
    assert (numbers(listing), listing.pending) == ([2, 3], 0)


def test_what_a_cursor_names_is_listed_again(archive):
    fill(archive, *range(4))
    cursor = source(archive).listing(None, everything).cursor
    fill(archive, 4)
    gone = name("instances", 9)
    named = dataclasses.replace(cursor, again=(name("instances", 1), gone))
    listing = source(archive).listing(named, everything)
    assert numbers(listing) == [1, 4] and not listing.whole
    assert listing.cursor not in (None, named) and listing.cursor.again == ()
    assert numbers(source(archive).listing(listing.cursor, everything)) == []
    archive.receive(0, b"sent again")  # of the study of 1, which is not complete now
    waiting = source(archive).listing(named, everything)
    assert (numbers(waiting), waiting.pending, waiting.cursor) == ([4], 2, named)


def test_the_number_of_listed_instances_is_told(archive):
    fill(archive, *range(5))
    told: list[tuple[int, str]] = []
    source(archive).listing(None, everything, lambda done, note: told.append((done, note)))
    assert told == [(number, f"{number} of 5 instances") for number in range(1, 6)]


def test_what_is_accounted_for_is_not_pending(archive):
    fill(archive, 0, 1)
    archive.receive(2, b"x")
    listing = source(archive).listing(None, lambda obj: obj.path != name("instances", 2))
    assert (numbers(listing), listing.pending) == ([0, 1, 2], 0)


def test_without_a_quiet_time_everything_is_taken_at_once(archive):
    archive.receive(0, b"x")
    hasty = SETTINGS.model_copy(update={"quiet_seconds": 0.0})
    listing = source(archive, hasty).listing(None, everything)
    assert (numbers(listing), listing.pending) == ([0], 0)
    assert source(archive, hasty).listing(listing.cursor, everything).objects == []


def test_instances_deleted_meanwhile(archive):
    fill(archive, *range(4))
    place = source(archive)
    archive.site.faults[f"/instances/{name('instances', 1)}"] = [404]
    listing = place.listing(None, everything)
    assert numbers(listing) == [0, 2, 3]
    archive.delete(0)
    assert reason(archive, listing.objects[0]) == "FILE_CHANGED_DURING_READ"
    archive.receive(2, b"overwrites")
    assert reason(archive, listing.objects[1]) == "FILE_CHANGED_DURING_READ"
    again = place.listing(listing.cursor, everything)
    archive.wait(61)
    again = place.listing(listing.cursor, everything)
    assert numbers(again) == [2] and again.objects[0] != listing.objects[1]


def test_a_damaged_or_lost_file_is_not_passed_on(archive):
    fill(archive, 0, 2)
    first, second = source(archive).listing(None, everything).objects
    routes = archive.routes

    def damaged(path, query):
        return (200, b"instance!0", "application/dicom") if path.endswith("/file") else routes(path, query)

    archive.site.routes = damaged
    assert reason(archive, first) == "FILE_CHECKSUM"
    archive.site.routes = routes
    archive.site.faults[f"/instances/{second.path}/file"] = [404]
    assert reason(archive, second) == "FILE_UNREADABLE"
    archive.site.faults[f"/instances/{second.path}/file"] = [500, 500, 500]
    assert reason(archive, second) == "FILE_UNREADABLE"
    assert source(archive).fetch(second, LIMIT) == b"instance 2"


@pytest.mark.parametrize("faults", [[503], [503, 503], ["cut"], ["cut", 429], [500, "cut"]])
def test_passing_faults_are_overcome(archive, faults):
    fill(archive, 0)
    (obj,) = source(archive).listing(None, everything).objects
    archive.site.faults[f"/instances/{obj.path}/file"] = list(faults)
    assert source(archive).fetch(obj, LIMIT) == b"instance 0"


@pytest.mark.parametrize(
    ("fault", "code"),
    [(503, "STORE_TIMEOUT"), ("cut", "STORE_TIMEOUT"), (401, "STORE_AUTH"), (403, "STORE_AUTH"), (302, "STORE_AUTH")],
)
def test_lasting_faults_are_named(archive, fault, code):
    fill(archive, 0)
    (obj,) = source(archive).listing(None, everything).objects
    archive.site.faults[f"/instances/{obj.path}/file"] = [fault] * 3
    assert reason(archive, obj) == code
    archive.site.faults["/changes"] = [fault] * 3
    with pytest.raises(StorageError, match=code):
        source(archive).listing(None, everything)
    assert not any(path == "/elsewhere" for path, _ in archive.site.asked)


def test_silence_and_drip_are_bounded(archive):
    fill(archive, 0)
    archive.files[0] = bytes(1000)
    (obj,) = source(archive).listing(None, everything).objects
    place = f"/instances/{obj.path}/file"
    archive.site.faults[place] = ["hang"] * 3
    impatient = SETTINGS.model_copy(update={"read_seconds": 0.3})
    slow(0.9, 3.0, lambda: reason(archive, obj, settings=impatient))
    archive.site.faults[place] = ["drip"] * 3
    hurried = SETTINGS.model_copy(update={"answer_seconds": 0.3})
    slow(0.9, 3.0, lambda: reason(archive, obj, settings=hurried))


def test_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setattr(http, "RETRY_DELAYS_S", (0.0, 0.0))
    with pytest.raises(StorageError, match="does not answer"):
        open_source("orthanc+http://127.0.0.1:9", SETTINGS, {}).listing(None, everything)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/system", b"<html>"),
        ("/system", b"[]"),
        ("/system", b'{"ApiVersion": 3}'),
        ("/changes", b'{"Changes": 1}'),
        (
            "/changes",
            b'{"Changes": [{"Seq": 1, "ChangeType": "NewInstance", "ID": "../../etc"}], "Last": 1, "Done": true}',
        ),
        ("/tools/now", b"yesterday"),
    ],
)
def test_what_is_no_orthanc_is_refused(archive, path, body):
    fill(archive, 0)
    routes = archive.routes
    archive.site.routes = lambda asked, query: (200, body, "x") if asked == path else routes(asked, query)
    with pytest.raises(StorageError):
        source(archive).listing(None, everything)
    assert not any("etc" in asked for asked, _ in archive.site.asked)


def test_credentials_come_from_a_file_or_the_environment_and_show_nowhere(archive, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    fill(archive, 0)
    (tmp_path / "password").write_text("hunter2\n")
    (tmp_path / "token").write_text("hunter2\n")
    basic = "Basic amFuZTpodW50ZXIy"
    for settings, environment, expected in (
        ({"user": "jane", "password_file": str(tmp_path / "password")}, {}, basic),
        ({"user": "jane"}, {"MEMMC_SOURCE_PASSWORD": "hunter2"}, basic),
        ({"token_file": str(tmp_path / "token")}, {}, "Bearer hunter2"),
    ):
        place = source(archive, SETTINGS.model_copy(update=settings), environment)
        archive.site.asked.clear()
        place.listing(None, everything)
        assert {headers["Authorization"] for _, headers in archive.site.asked} == {expected}
        assert "hunter2" not in repr(place) and expected not in repr(place)
    assert "hunter2" not in caplog.text and name("instances", 0) not in caplog.text
    assert "DOE" not in caplog.text
    with pytest.raises(ConfigError, match="no password"):
        source(archive, SourceConfig(user="jane"))
    for bad in ({"password_file": str(tmp_path / "none")}, {"ca_file": str(tmp_path / "none")}):
        with pytest.raises(ConfigError):
            source(archive, SourceConfig(user="jane", **bad))


@pytest.mark.parametrize("kind", ["orthanc", "dicomweb"])
def test_uris(kind):
    for bad in (
        "http://jane:hunter2@host/",
        "http://jane@host/",
        "https://host/?StudyInstanceUID=1.2",
        "https:///path",
        "http://host:99999/",
    ):
        with pytest.raises(UsageError) as caught:
            open_source(f"{kind}+{bad}", SETTINGS, {})
        assert "hunter2" not in str(caught.value) and "host/" not in str(caught.value)
    for same in ("HTTP://Host:8042", "http://host:8042/", "http://host:8042"):
        assert open_source(f"{kind}+{same}", SETTINGS, {}).uri == f"{kind}+http://host:8042"
    assert open_source(f"{kind}+https://[::1]:1/a/", SETTINGS, {}).uri == f"{kind}+https://[::1]:1/a"


def test_doctor_says_whether_a_source_answers(archive, tmp_path):
    def look(place: str) -> str:
        return look_at_source(Config(), place)[0]

    assert look(f"orthanc+{archive.site.url}") == "Orthanc 1.10.1 answers"
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    assert [look(str(tmp_path / name)) for name in ("empty", "full")] == ["empty", "can be listed"]
    archive.site.faults["/system"] = [401]
    with pytest.raises(StorageError, match=r"source\.user"):
        look(f"orthanc+{archive.site.url}")
    archive.site.routes = lambda *_: (200, b"[]", "application/dicom+json")
    assert "has no study" in look(f"dicomweb+{archive.site.url}")
    with pytest.raises(StorageError, match="no Orthanc"):
        look(f"orthanc+{archive.site.url}")
