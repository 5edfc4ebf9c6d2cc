"""Archives that take results: over DICOM's own protocol and over DICOMweb, when they are well and when they are not."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import replace
from datetime import timedelta

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom.sop_class import SecondaryCaptureImageStorage
from small_archive import JSON, Answer, Site, served
from small_authority import LOOPBACK, NOW, Authority
from small_pacs import SmallPacs, listening
from test_results_objects import JUDGED, SHOWN, header

from memmc.config import PushConfig, load_config
from memmc.errors import ConfigError, StorageError, UsageError
from memmc.pipeline.doctor import look_at_archive
from memmc.results import dicomweb
from memmc.results.archive import Archive, NoAnswerError
from memmc.results.dicomweb import encoded
from memmc.results.objects import picture, report
from memmc.results.open import open_archive

STUDY = JUDGED.study_uid
KNOWN = {"PatientName": "Müßig^Zoë", "PatientID": "MRN7QUOXX", "StudyInstanceUID": STUDY, "StudyDate": "20260105"}
OBJECTS = [report(JUDGED, header(**KNOWN)), picture(JUDGED, header(**KNOWN), SHOWN)]
UIDS = [str(each.SOPInstanceUID) for each in OBJECTS]


OPENED: list[Archive] = []


@pytest.fixture(autouse=True)
def _closed():
    """Close what a test has opened: threads of an association would outlive it."""
    yield
    while OPENED:
        OPENED.pop().close()


def archive(uri: str, **settings: object) -> Archive:
    """Open an archive that waits for nothing between tries."""
    made = open_archive(PushConfig.model_validate({"uri": uri, "read_seconds": 2.0, **settings}), {})
    if isinstance(made, dicomweb.DicomWebArchive):
        made = replace(made, delays_s=(0.0,) * len(made.delays_s))
    else:
        made._delays_s = (0.0,) * len(made._delays_s)  # type: ignore[attr-defined] # pyright: ignore
    OPENED.append(made)
    return made


class Web:
    """A DICOMweb server's answers."""

    def __init__(self) -> None:
        self.stored: dict[str, bytes] = {}
        self.refuses: set[str] = set()
        self.failure = 0xC000

    def routes(self, path: str, query: dict[str, str]) -> Answer:
        if path == "/web/studies":
            known = query.get("StudyInstanceUID") in (None, STUDY)
            found = Dataset()
            for keyword, value in KNOWN.items():
                setattr(found, keyword, value)
            return 200, json.dumps([found.to_json_dict()] if known else []).encode(), JSON
        if path == f"/web/studies/{STUDY}/series/{JUDGED.series('sr')}/instances" and UIDS[0] in self.stored:
            return 200, json.dumps([{"00080018": {"vr": "UI", "Value": [UIDS[0]]}}]).encode(), JSON
        return 404, b"", JSON

    def takes(self, path: str, body: bytes, kind: str) -> Answer:
        if path != f"/web/studies/{STUDY}":
            return 404, b"", JSON
        assert kind.startswith('multipart/related; type="application/dicom"; boundary=')
        boundary = b"--" + kind.rpartition("=")[2].encode()
        first, *parts, last = body.split(boundary)
        assert (first, last) == (b"", b"--\r\n")
        done, failed = [], []
        for part in parts:
            head, _, file = part.partition(b"\r\n\r\n")
            assert head == b"\r\nContent-Type: application/dicom"
            made = dcmread(io.BytesIO(file[:-2]))
            name = {"00081155": {"vr": "UI", "Value": [str(made.SOPInstanceUID)]}}
            if made.SOPInstanceUID in self.refuses:
                failed.append({**name, "00081197": {"vr": "US", "Value": [self.failure]}})
            else:
                self.stored[str(made.SOPInstanceUID)] = file[:-2]
                done.append(name)
        answer = {"00081199": {"vr": "SQ", "Value": done}, "00081198": {"vr": "SQ", "Value": failed}}
        return (200 if not failed else 202 if done else 409), json.dumps(answer).encode(), JSON


@pytest.fixture
def pacs():
    with listening(SmallPacs({STUDY: KNOWN}), syntaxes=[ExplicitVRLittleEndian]) as running:
        yield running


@pytest.fixture
def web():
    taking = Web()
    with served(Site(taking.routes, takes=taking.takes)) as site:
        yield site, taking, f"dicomweb+{site.url}/web"


def test_over_dicom_a_study_is_found_and_results_are_stored(pacs):
    place = archive(pacs.place())
    assert place.check() == "a DICOM archive answers"
    (found,) = place.headers(STUDY)
    assert (found.PatientName, found.PatientID, found.AccessionNumber) == ("Müßig^Zoë", "MRN7QUOXX", "")
    assert place.headers("1.2.840.9") == []
    assert place.present(STUDY, JUDGED.series("sr")) == set()
    assert place.send(OBJECTS) == {}
    assert {uid: made.to_json_dict() for uid, made in pacs.objects.items()} == {
        uid: dcmread(io.BytesIO(encoded(made))).to_json_dict() for uid, made in zip(UIDS, OBJECTS, strict=True)
    }
    assert [str(pacs.objects[uid].PatientName) for uid in UIDS] == ["Müßig^Zoë"] * 2
    assert (pacs.objects[UIDS[1]].pixel_array == OBJECTS[1].pixel_array).all()
    assert place.present(STUDY, JUDGED.series("sr")) == {UIDS[0]}
    place.close()


@pytest.mark.parametrize("over", ["dicom", "web"])
def test_answers_about_other_studies_are_passed_over(over, pacs, web):
    """An archive that does not know the key of a search may answer with all it has."""
    other = {**KNOWN, "StudyInstanceUID": "1.2.840.9", "PatientID": "ANOTHER"}
    if over == "dicom":
        pacs.studies = {STUDY: other}
        assert archive(pacs.place()).headers(STUDY) == []
        return
    site, _, uri = web
    sets = [Dataset(), Dataset()]
    for made, values in zip(sets, (other, KNOWN), strict=True):
        for keyword, value in values.items():
            setattr(made, keyword, value)
    site.routes = lambda _path, _query: (200, json.dumps([made.to_json_dict() for made in sets]).encode(), JSON)
    (found,) = archive(uri).headers(STUDY)
    assert found.PatientID == "MRN7QUOXX"
    assert archive(uri).headers("1.2.840.8") == []


def test_doctor_asks_the_archive(pacs):
    config = load_config(overrides=[f"push.uri={pacs.place()}"])
    assert look_at_archive(config) == ("a DICOM archive answers", "")


def test_an_archive_that_speaks_implicit_vr_alone():
    with listening(SmallPacs({STUDY: KNOWN}), syntaxes=[ImplicitVRLittleEndian]) as pacs:
        assert archive(pacs.place()).send(OBJECTS) == {}
        assert str(pacs.objects[UIDS[0]].PatientName) == "Müßig^Zoë"


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("ISO_IR 100", "Müßig^Zoë"),
        ("ISO_IR 192", "Müßig^Zoë"),
        ("ISO_IR 144", "Иванов^Пётр"),
        ("ISO_IR 192", "Yamada^Tarou=山田^太郎"),
        (None, "Yamada^Tarou=山田^太郎"),
    ],
)
@pytest.mark.parametrize("over", ["dicom", "web"])
def test_names_come_in_any_character_set(over, charset, name):
    """In DICOM JSON texts are Unicode, even where (0008,0005) comes with them."""
    known = {**KNOWN, "PatientName": name}
    if over == "dicom":
        with listening(SmallPacs({STUDY: known}, charset=charset or "ISO_IR 192")) as pacs:
            (found,) = archive(pacs.place()).headers(STUDY)
    else:
        answer = Dataset()
        for keyword, value in known.items():
            setattr(answer, keyword, value)
        body = answer.to_json_dict()
        if charset:
            body["00080005"] = {"vr": "CS", "Value": [charset]}
        with served(Site(lambda _path, _query: (200, json.dumps([body]).encode(), JSON))) as site:
            (found,) = archive(f"dicomweb+{site.url}/web").headers(STUDY)
    assert found.PatientName == name
    again = dcmread(io.BytesIO(encoded(report(JUDGED, found))))
    assert str(again.PatientName) == name


def test_a_study_under_two_patients_has_two_headers(pacs):
    pacs.more = [{**KNOWN, "PatientID": "ANOTHER"}]
    assert [found.PatientID for found in archive(pacs.place()).headers(STUDY)] == ["MRN7QUOXX", "ANOTHER"]


@pytest.mark.parametrize(
    ("statuses", "refused"),
    [
        ([0xB000, 0xB007], []),  # stored with a warning
        ([0x0111], []),  # there before
        ([0xA700, 0xA700, 0], []),  # no room, then room
        (["abort"], []),  # gone once
        ([0xA900], [0]),
        ([0, 0xC123], [1]),
        ([0x0122, 0x0122], [0, 1]),
    ],
)
def test_a_dicom_archive_that_does_not_store(pacs, statuses, refused):
    pacs.statuses = list(statuses)
    assert archive(pacs.place()).send(OBJECTS) == {UIDS[index]: "OBJECT_REFUSED" for index in refused}
    absent = {*refused, *(index for index, status in enumerate(statuses) if status == 0x0111)}
    assert pacs.objects.keys() == {uid for index, uid in enumerate(UIDS) if index not in absent}


def test_a_dicom_archive_that_stays_without_room_ends_the_call(pacs):
    pacs.statuses = [0xA700] * 9
    with pytest.raises(StorageError, match=r"does not answer.*\(STORE_TIMEOUT\)"):
        archive(pacs.place(), tries=3).send(OBJECTS)
    assert len(pacs.statuses) == 6


def test_a_dicom_archive_that_will_not_search_is_named(pacs):
    pacs.finds = [0xA900]
    with pytest.raises(StorageError, match=r"refuses to search \(C-FIND status A900\)"):
        archive(pacs.place()).headers(STUDY)
    pacs.finds = [0xA700]
    assert len(archive(pacs.place()).headers(STUDY)) == 1


def test_a_dicom_archive_that_does_not_know_us():
    with listening(SmallPacs({STUDY: KNOWN}), known="MEMMC") as pacs:
        assert archive(pacs.place()).check()
        with pytest.raises(StorageError, match=r"rejects the association; let it know push\.ae_title"):
            archive(pacs.place(), ae_title="STRANGER").check()
        with pytest.raises(StorageError, match="rejects the association"):
            archive(pacs.place().replace("PACS", "OTHER")).check()


def test_a_dicom_archive_that_is_busy_is_asked_again(pacs):
    """A transient rejection (PS3.8 9.3.4), as an archive gives at its limit of associations, is no refusal."""
    pacs.busy = 2
    assert archive(pacs.place(), tries=3).check()
    pacs.busy = 9
    with pytest.raises(NoAnswerError):
        archive(pacs.place(), tries=2).check()


def test_a_dicom_archive_that_takes_no_reports():
    with listening(SmallPacs({STUDY: KNOWN}), storage=[SecondaryCaptureImageStorage]) as pacs:
        place = archive(pacs.place())
        assert place.send(OBJECTS[1:]) == {}
        with pytest.raises(StorageError, match=r"does not take what it is asked.*push\.objects"):
            place.send(OBJECTS)


def test_an_association_that_was_closed_meanwhile_is_opened_anew(pacs):
    place = archive(pacs.place())
    assert place.check()
    place._association.abort()  # type: ignore[attr-defined] # pyright: ignore
    assert place.send(OBJECTS) == {}
    assert len(pacs.objects) == 2


def test_over_tls_the_archives_certificate_counts(tmp_path):
    ours, others = Authority(tmp_path / "ours"), Authority(tmp_path / "others")
    with listening(SmallPacs({STUDY: KNOWN}), tls=ours.server(LOOPBACK, NOW + timedelta(days=1))) as pacs:
        assert archive(pacs.place(tls=True), ca_file=str(ours.file)).send(OBJECTS) == {}
        for wrong in ({"ca_file": str(others.file)}, {}):
            with pytest.raises(StorageError, match=r"push\.ca_file"):
                archive(pacs.place(tls=True), tries=1, **wrong).check()
    assert len(pacs.objects) == 2


def test_over_dicomweb_a_study_is_found_and_results_are_stored(web):
    site, taking, uri = web
    place = archive(uri)
    assert place.check() == "a DICOMweb server answers"
    (found,) = place.headers(STUDY)
    assert (found.PatientName, found.PatientID, found.AccessionNumber) == ("Müßig^Zoë", "MRN7QUOXX", "")
    assert place.headers("1.2.840.9") == []
    assert place.present(STUDY, JUDGED.series("sr")) == set()
    assert place.send(OBJECTS) == {}
    assert taking.stored == {uid: encoded(made) for uid, made in zip(UIDS, OBJECTS, strict=True)}
    assert place.present(STUDY, JUDGED.series("sr")) == {UIDS[0]}
    assert place.place == f"dicomweb+{site.url}/web"


@pytest.mark.parametrize("refused", [[0], [1], [0, 1]])
def test_a_dicomweb_server_that_stores_a_part(web, refused):
    _, taking, uri = web
    taking.refuses = {UIDS[index] for index in refused}
    assert archive(uri).send(OBJECTS) == dict.fromkeys(taking.refuses, "OBJECT_REFUSED")
    assert len(taking.stored) == 2 - len(refused)


def test_what_a_dicomweb_server_had_before_is_there(web):
    _, taking, uri = web
    taking.refuses, taking.failure = {UIDS[0]}, 0x0111
    assert archive(uri).send(OBJECTS) == {}


def test_a_long_series_comes_in_pages(web):
    site, _, uri = web
    names = [{"00080018": {"vr": "UI", "Value": [f"1.2.840.5.{number}"]}} for number in range(250)]

    def routes(_path: str, query: dict[str, str]) -> Answer:
        begin = int(query["offset"])
        return 200, json.dumps(names[begin : begin + 100]).encode(), JSON  # pages of its own, shorter than asked for

    site.routes = routes
    assert len(archive(uri).present(STUDY, "1.2.840.7")) == 250
    site.routes = lambda _path, _query: (200, json.dumps(names * 2).encode(), JSON)
    with pytest.raises(StorageError, match="ignores 'offset'"):
        archive(uri).present(STUDY, "1.2.840.7")


def test_a_wrong_path_is_no_empty_archive(web):
    uri = web[2].replace("/web", "/elsewhere")
    for call in (archive(uri).check, lambda: archive(uri).headers(STUDY), lambda: archive(uri).send(OBJECTS)):
        with pytest.raises(StorageError, match=r"push\.uri names the root"):
            call()


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        ([503, 503], None),
        ([500], None),
        ([503] * 9, "STORE_TIMEOUT"),
        ([401], "STORE_AUTH"),
        ([302], "STORE_AUTH"),
        ([500] * 9, "the archive fails"),
        ([415], r"push\.uri names the root"),
    ],
)
def test_a_dicomweb_server_that_is_not_well(web, faults, told):
    site, taking, uri = web
    site.faults[f"POST /web/studies/{STUDY}"] = list(faults)
    if told is None:
        assert archive(uri).send(OBJECTS) == {}
        assert len(taking.stored) == 2
        return
    with pytest.raises(StorageError, match=told) as caught:
        archive(uri).send(OBJECTS)
    assert STUDY not in str(caught.value)


def test_a_dicomweb_server_that_refuses_the_request_refuses_its_objects(web):
    site, _, uri = web
    site.faults[f"POST /web/studies/{STUDY}"] = [400]
    assert archive(uri).send(OBJECTS) == dict.fromkeys(UIDS, "OBJECT_REFUSED")


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b'{"00081199": 3}', b"[" * 100_000])
def test_what_is_no_dicomweb_answer_ends_the_call(body):
    site = Site(lambda _path, _query: (200, body, JSON), takes=lambda *_: (200, body, JSON))
    with served(site) as running:
        place = archive(f"dicomweb+{running.url}/web")
        for call in (lambda: place.send(OBJECTS), lambda: place.headers(STUDY)):
            with pytest.raises(StorageError, match="answers as no DICOMweb server"):
                call()


@pytest.mark.parametrize("match", [{"0020000D": 3}, {"name": {"vr": "PN"}}])
def test_a_study_that_cannot_be_read_ends_the_call(match):
    site = Site(lambda _path, _query: (200, json.dumps([match]).encode(), JSON))
    with served(site) as running, pytest.raises(StorageError, match="answers as no DICOMweb server"):
        archive(f"dicomweb+{running.url}/web").headers(STUDY)


@pytest.mark.parametrize("uri", ["dicom://PACS@127.0.0.1:1", "dicomweb+http://127.0.0.1:1/web"])
def test_where_nothing_listens(uri):
    with pytest.raises(StorageError, match=r"does not answer.*\(STORE_TIMEOUT\)"):
        archive(uri, tries=2).check()


@pytest.mark.parametrize(
    "uri",
    [
        None,
        "",
        "pacs:104",
        "https://host/dicom-web",
        "dicom://host:104",
        "dicom://PACS@host",
        "dicom://PACS@host:99999",
        "dicom://A-TITLE-THAT-IS-TOO-LONG@host:104",
        "dicomweb+https://user:secret@host/dicom-web",
        "dicomweb+ftp://host/",
    ],
)
def test_what_names_no_archive(uri):
    with pytest.raises(UsageError) as caught:
        open_archive(PushConfig(uri=uri), {})
    assert "push" in str(caught.value) and "secret" not in str(caught.value)


def test_a_file_without_certificates_is_named(tmp_path):
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"push\.ca_file holds no certificate"):
        archive("dicom+tls://PACS@host:104", ca_file=str(tmp_path / "ca.pem"))


def test_credentials_are_the_sections_own(web, tmp_path):
    site, _, uri = web
    (tmp_path / "password").write_text("correct-horse\n")
    archive(uri, user="memmc", password_file=str(tmp_path / "password")).check()
    assert site.asked[-1][1]["Authorization"].startswith("Basic ")
    with pytest.raises(
        ConfigError, match=r"push\.user has no password; set push\.password_file or MEMMC_PUSH_PASSWORD"
    ):
        archive(uri, user="memmc")


def test_no_name_and_no_uid_is_logged(pacs, web, caplog):
    caplog.set_level(logging.DEBUG)
    for uri in (pacs.place(), web[2]):
        place = archive(uri)
        place.check()
        place.headers(STUDY)
        place.send(OBJECTS)
        place.present(STUDY, JUDGED.series("sr"))
        place.close()
    for word in ("Müßig", "MRN7QUOXX", STUDY):
        assert word not in caplog.text
