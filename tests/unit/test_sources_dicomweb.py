"""The DICOMweb client against what servers do rarely."""

import json
import pickle
import re
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_archive import JSON, Site, served

from memmc.config import SourceConfig
from memmc.errors import StorageError
from memmc.sources import dicomweb, http
from memmc.sources.dicomweb import only_part
from memmc.sources.objects import FetchFailed
from memmc.sources.open import open_source

LIMIT = 1 << 20
SETTINGS = SourceConfig(quiet_seconds=0)
QIDO = "application/dicom+json"


class Web:
    """QIDO-RS and WADO-RS over a few studies; study s holds instances s.1, s.2, ..."""

    def __init__(self) -> None:
        self.studies: dict[str, int] = {}
        self.modality = dict.fromkeys(map(str, range(99)), "DX")
        self.most = 1000  # results per page, whatever is asked for
        self.counts = True
        self.offset = True
        self.envelope = ('multipart/related; type="application/dicom"; boundary=xYz', "--xYz", "--xYz--")

    def routes(self, path: str, query: dict[str, str]):
        if path == "/web/studies":
            wanted = query.get("ModalitiesInStudy")
            return self.page([self.study(s) for s in self.studies if wanted in (None, self.modality[s])], query)
        if match := re.fullmatch(r"/web/studies/1\.2\.(\d+)/instances", path):
            study = match[1]
            if study not in self.studies:
                return 404, b"", JSON
            return self.page([self.instance(study, n + 1) for n in range(self.studies[study])], query)
        if match := re.fullmatch(r"/web/studies/1\.2\.(\d+)/series/1\.3\.\1/instances/1\.2\.\1\.(\d+)", path):
            kind, begin, end = self.envelope
            part = f"{begin}\r\nContent-Type: application/dicom\r\n\r\nfile {match[2]}\r\n{end}\r\n"
            return 200, part.encode(), kind
        return 404, b"", JSON

    def page(self, results: list, query: dict[str, str]):
        first = int(query["offset"]) if self.offset and "offset" in query else 0
        page = results[first : first + min(int(query["limit"]), self.most)]
        return (200, json.dumps(page).encode(), QIDO) if page else (204, b"", "")

    def study(self, study: str) -> dict:
        count = {"00201208": {"vr": "IS", "Value": [self.studies[study]]}} if self.counts else {}
        return {"0020000D": {"vr": "UI", "Value": [f"1.2.{study}"]}, "00100010": {"vr": "PN"}, **count}

    def instance(self, study: str, number: int) -> dict:
        return {
            "0020000E": {"vr": "UI", "Value": [f"1.3.{study}"]},
            "00080018": {"vr": "UI", "Value": [f"1.2.{study}.{number}"]},
        }


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setattr(http, "RETRY_DELAYS_S", (0.0, 0.0))
    monkeypatch.setattr(dicomweb, "PAGE_RESULTS", 4)
    web = Web()
    site = Site(web.routes)
    with served(site):
        web.site = site
        yield web


def source(web, **settings):
    return open_source(f"dicomweb+{web.site.url}/web/", SETTINGS.model_copy(update=settings), {})


def everything(_obj) -> bool:
    return True


def paths(listing) -> list[str]:
    return [obj.path for obj in listing.objects]


def expected(studies: dict[str, int]) -> list[str]:
    return [f"1.2.{s}/1.3.{s}/1.2.{s}.{n + 1}" for s, count in studies.items() for n in range(count)]


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("most", [1000, 3, 1])
def test_all_pages_are_listed(web, counts, most):
    web.studies = {str(number): number % 3 * 3 for number in range(6)}
    web.counts, web.most = counts, most
    listing = source(web).listing(None, everything)
    assert paths(listing) == expected(web.studies)
    assert (listing.whole, listing.pending, listing.cursor) == (True, 0, None)


def test_studies_are_asked_for_side_by_side_in_their_order_and_told(web):
    web.studies = {str(number): 2 for number in range(12)}
    four = threading.Barrier(4)

    def together(path, query):
        if path.endswith("/instances"):
            four.wait(10)
        return web.routes(path, query)

    web.site.routes = together
    told: list[tuple[int, str]] = []
    listing = source(web).listing(None, everything, lambda done, note: told.append((done, note)))
    assert paths(listing) == expected(web.studies)
    assert told == [(number, f"{number} of 12 studies") for number in range(1, 13)]


def test_a_study_that_is_refused_ends_the_listing(web):
    web.studies = {str(number): 2 for number in range(12)}
    web.site.faults["/web/studies/1.2.5/instances"] = [403]
    told: list[int] = []
    with pytest.raises(StorageError, match="STORE_AUTH"):
        source(web).listing(None, everything, lambda done, _note: told.append(done))
    assert told == [1, 2, 3, 4, 5]


def test_a_server_that_ignores_offset_is_refused_before_anything_is_missed(web):
    web.studies, web.offset, web.counts = {"1": 3}, False, False
    assert paths(source(web).listing(None, everything)) == expected(web.studies)
    web.studies = {"1": 9}
    with pytest.raises(StorageError, match="offset"):
        source(web).listing(None, everything)


def test_modalities_and_dates_narrow_the_listing(web):
    web.studies = {"1": 1, "2": 1, "3": 1}
    web.modality |= {"2": "CT", "3": "CR"}
    assert paths(source(web, modalities=("DX", "CR")).listing(None, everything)) == expected({"1": 1, "3": 1})
    asked: list[dict[str, str]] = []
    routes = web.routes

    def record(path, query):
        asked.append(query)
        return routes(path, query)

    web.site.routes = record
    source(web, study_dates="20260101-").listing(None, everything)
    assert asked[0]["StudyDate"] == "20260101-"
    with pytest.raises(ValueError, match="study_dates"):
        SourceConfig(study_dates="yesterday")


def test_a_study_that_grows_while_it_is_watched_is_left_for_later(web, monkeypatch):
    web.studies = {"1": 2, "2": 2, "3": 2}

    def arrive(seconds: float) -> None:
        assert seconds == 30
        web.studies["2"] += 1
        del web.studies["3"]

    monkeypatch.setattr(dicomweb.time, "sleep", arrive)
    listing = source(web, quiet_seconds=30).listing(None, everything)
    assert (paths(listing), listing.pending) == (expected({"1": 2}), 4)


def test_studies_without_new_instances_are_not_watched(web, monkeypatch):
    web.studies = {"1": 2}
    monkeypatch.setattr(dicomweb.time, "sleep", lambda _: pytest.fail("waited"))
    assert len(source(web, quiet_seconds=30).listing(None, lambda _: False).objects) == 2


def test_a_study_deleted_while_it_is_listed(web):
    web.studies = {"1": 2, "2": 2}
    web.site.faults["/web/studies/1.2.1/instances"] = [404]
    assert paths(source(web).listing(None, everything)) == expected({"2": 2})


def test_uids_that_are_none_go_into_no_url(web):
    web.studies = {"1": 1}
    web.instance = lambda *_: {"0020000E": {"Value": ["1.3"]}, "00080018": {"Value": ["../../x"]}}
    (obj,) = source(web).listing(None, everything).objects
    assert obj.problem == "FILE_PATH_ESCAPE"
    with pytest.raises(FetchFailed, match="FILE_PATH_ESCAPE"):
        source(web).fetch(obj, LIMIT)
    web.study = lambda *_: {"0020000D": {"Value": ["1.2/../.."]}}
    with pytest.raises(StorageError):
        source(web).listing(None, everything)


@pytest.mark.parametrize("body", [b"<html>", b"{}", b"[1]"])
def test_what_is_no_dicomweb_is_refused(web, body):
    web.site.routes = lambda *_: (200, body, JSON)
    with pytest.raises(StorageError):
        source(web).listing(None, everything)


def test_instances_are_taken_out_of_their_envelope(web):
    web.studies = {"1": 3}
    place = pickle.loads(pickle.dumps(source(web)))
    objects = place.listing(None, everything).objects
    assert [place.fetch(obj, LIMIT) for obj in objects] == [b"file 1", b"file 2", b"file 3"]
    assert web.site.asked[-1][1]["Accept"] == 'multipart/related; type="application/dicom"; transfer-syntax=*'
    web.envelope = ('multipart/related; boundary="x Y"; type="application/dicom"', "preamble\r\n--x Y", "--x Y--")
    assert place.fetch(objects[0], LIMIT) == b"file 1"
    for envelope in (
        ("multipart/related", "--x", "--x--"),
        ("multipart/related; boundary=x", "--y", "--y--"),
        ("multipart/related; boundary=x", "--x", "--x"),
        ("multipart/related; boundary=x", "--x\r\n\r\nanother\r\n--x", "--x--"),
    ):
        web.envelope = envelope
        with pytest.raises(FetchFailed, match="FILE_UNREADABLE") as caught:
            place.fetch(objects[0], LIMIT)
        assert caught.value.retriable


@pytest.mark.parametrize(
    ("fault", "code"),
    [(404, "FILE_CHANGED_DURING_READ"), (400, "FILE_UNREADABLE"), (401, "STORE_AUTH"), (503, "STORE_TIMEOUT")],
)
def test_faults_are_named(web, fault, code):
    web.studies = {"1": 1}
    (obj,) = source(web).listing(None, everything).objects
    web.site.faults[f"/web/studies/1.2.1/series/1.3.1/instances/{obj.path.rpartition('/')[2]}"] = [fault] * 3
    with pytest.raises(FetchFailed, match=code):
        source(web).fetch(obj, LIMIT)


def test_a_body_that_is_too_long_is_given_up(web):
    web.studies = {"1": 1}
    (obj,) = source(web).listing(None, everything).objects
    web.site.routes = lambda *_: (200, bytes(1 << 20), "application/dicom")
    with pytest.raises(FetchFailed, match="FILE_TOO_LARGE"):
        source(web).fetch(obj, 1 << 16)
    assert len(source(web).fetch(obj, 1 << 20)) == 1 << 20


@given(st.binary(max_size=300), st.text("abcXYZ019-_'", min_size=1, max_size=40))
def test_any_bytes_survive_their_envelope(content, boundary):
    boundary = f"b{boundary}"
    if f"\r\n--{boundary}".encode() not in content:
        body = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode() + content
        body += f"\r\n--{boundary}--".encode()
        assert only_part(body, f"multipart/related; boundary={boundary}") == content
        for cut in (len(body) - 1, len(body) // 2):
            with pytest.raises(FetchFailed):
                only_part(body[:cut], f"multipart/related; boundary={boundary}")
