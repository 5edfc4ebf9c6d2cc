"""Results on their way back: each to its own study and patient, once, whatever happens on the way."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from pushed_site import FILMS, PushedSite, make
from pydicom import dcmread
from pydicom.dataset import Dataset
from small_pacs import SmallPacs, listening
from typer.testing import CliRunner, Result

from memmc.cli.main import app
from memmc.config import load_config
from memmc.errors import DataError, IdentityKeyError, StorageError, UsageError
from memmc.lake.audit_check import verify_chain
from memmc.lake.storage import Storage
from memmc.lake.tables import Lake
from memmc.phi.planes import local_items
from memmc.phi.scan import Scan
from memmc.pipeline import push as module
from memmc.pipeline.push import push
from memmc.pipeline.vault import forget, make_keys, resolve
from memmc.results.archive import HEADER
from memmc.results.objects import Judged, report

IDENTIFIERS = ("Müßig", "QUOXX", "Überweiser", "1.2.840.99999.7")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PushedSite]:
    """One site for all tests; none of them changes its lake but by audit records."""
    before = Path.cwd()
    folder = tmp_path_factory.mktemp("site")
    os.chdir(folder)
    yield make(folder)
    os.chdir(before)


@pytest.fixture
def pacs(site: PushedSite) -> Iterator[SmallPacs]:
    known = {uid: dict(header) for uid, header in site.studies.items()}
    with listening(SmallPacs(known, images=dict(site.images))) as running:
        yield running


def scores(*columns: str) -> dict[str, dict]:
    rows = Lake("lake").read("scores", ["sop_instance_uid", *columns]).to_pylist()
    return {row["sop_instance_uid"]: row for row in rows}


def called(site: PushedSite, *arguments: str) -> Result:
    return CliRunner().invoke(app, site.arguments(*arguments))


def records() -> list[dict]:
    """The audit records of pushes, oldest first."""
    told = [json.loads(file.read_text()) for file in sorted(Path("lake/_audit").glob("**/*.json"))]
    return [record for record in told if record.get("action") == "push"]


def test_every_image_gets_its_objects_in_its_own_study_and_a_second_call_sends_none(site, pacs):
    done = push(site.with_(f"push.uri={pacs.place()}"), "cxr", site.key, site.model)
    assert (done.images, done.pushed, done.present, done.failed, done.objects) == (FILMS, FILMS, 0, 0, 2 * FILMS)
    originals = {str(film.SOPInstanceUID): film for film in map(dcmread, Path("in").glob("*.dcm"))}
    seen = set()
    for made in pacs.objects.values():
        if made.Modality == "OT":
            source = str(made.SourceImageSequence[0].ReferencedSOPInstanceUID)
        else:
            (study,) = made.CurrentRequestedProcedureEvidenceSequence
            source = str(study.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
        film = originals[source]
        for keyword in ("StudyInstanceUID", "PatientID", "PatientName", "AccessionNumber", "PatientBirthDate"):
            assert str(made.get(keyword)) == str(site.studies[film.StudyInstanceUID].get(keyword, "")), keyword
        seen.add((source, made.Modality))
    assert len(seen) == 2 * FILMS
    assert len({made.SeriesInstanceUID for made in pacs.objects.values()}) == 2 * len(site.studies)
    again = push(site.with_(f"push.uri={pacs.place()}"), "cxr", site.key, site.model)
    assert (again.pushed, again.present, again.objects) == (0, FILMS, 0)
    lost = next(uid for uid, made in pacs.objects.items() if made.Modality == "SR")
    del pacs.objects[lost]
    third = push(site.with_(f"push.uri={pacs.place()}"), "cxr", site.key, site.model)
    assert (third.pushed, third.present, third.objects) == (1, FILMS - 1, 1)
    assert lost in pacs.objects


def test_a_call_that_is_cut_short_is_finished_by_the_next(site, pacs):
    pacs.statuses = [0] * 31 + [0xA700] * 2 * 3  # three images in a row: the archive is full
    config = site.with_(f"push.uri={pacs.place()}", "push.tries=2")
    with pytest.raises(StorageError, match="what is there already is not sent twice"):
        push(config, "cxr", site.key, site.model)
    assert len(pacs.objects) == 31
    assert records()[-1]["outcome"] == "failed"
    assert not pacs.statuses
    done = push(config, "cxr", site.key, site.model)
    assert (done.objects, done.pushed + done.present) == (2 * FILMS - 31, FILMS)
    assert len(pacs.objects) == 2 * FILMS
    assert records()[-1]["subject"]["objects"] == done.objects


def test_another_patient_an_absent_study_and_a_refusal_are_told_apart(site, pacs):
    studies = list(pacs.studies)
    pacs.studies[studies[0]]["PatientID"] = "MRN-OF-SOMEBODY-ELSE"
    pacs.studies[studies[1]] |= {"IssuerOfPatientID": "OTHER"}  # the films name no issuer: nothing to differ from
    del pacs.studies[studies[2]]
    pacs.statuses = [0xC000]
    done = called(site, "--to", pacs.place(), "--json")
    assert done.exit_code == 1, done.output
    told = json.loads(done.stdout)
    sizes = {
        study: sum(str(dcmread(file).StudyInstanceUID) == study for file in Path("in").glob("*.dcm"))
        for study in studies
    }
    expected = {"PATIENT_DIFFERS": sizes[studies[0]], "STUDY_ABSENT": sizes[studies[2]], "OBJECT_REFUSED": 1}
    assert told["reasons"] == expected
    assert told["failed"] == len(told["failures"]) == sum(expected.values())
    assert told["pushed"] == FILMS - told["failed"]
    assert told["failures"].keys() <= scores().keys()
    for word in ("SOMEBODY", *IDENTIFIERS):
        assert word not in done.output
    assert not {studies[0], studies[2]} & {made.StudyInstanceUID for made in pacs.objects.values()}
    spoken = called(site, "--to", pacs.place(), "--dry-run")
    assert "PATIENT_DIFFERS: the archive names another patient" in spoken.output


def test_one_image_that_the_archive_chokes_on_stops_no_other(site, pacs, monkeypatch):
    """Whatever is wrong with it, a later call must get past it too."""
    first = sorted(scores())[0]
    known = resolve(site.with_(), [first], site.key).originals[first]["sop_instance_uid"]
    push(site.with_(f"push.uri={pacs.place()}"), "cxr", site.key, site.model, uids=[first])
    pacs.chokes = {uid for uid, made in pacs.objects.items() if made.Modality == "SR"}
    pacs.objects.clear()
    config = site.with_(f"push.uri={pacs.place()}", "push.tries=2")
    for pushed in (FILMS - 1, 0):
        done = push(config, "cxr", site.key, site.model)
        assert (done.failures, done.pushed) == ({first: "OBJECT_UNANSWERED"}, pushed)
    pacs.chokes = set()

    def broken(judged: Judged, header: Dataset) -> Dataset:
        if judged.sop_instance_uid == known:
            raise KeyError(f"No IOD found for {known} of Müßig^Zoë")
        return report(judged, header)

    monkeypatch.setattr(module, "report", broken)
    done = push(config, "cxr", site.key, site.model)
    assert (done.failures, done.present) == ({first: "OBJECT_NOT_MADE"}, FILMS - 1)


def test_each_image_is_held_against_the_archive_by_itself(site, pacs):
    """Two films of one study, of which the archive has moved one; then the study under two patients."""
    study = next(uid for uid in site.studies if sum(place[0] == uid for place in site.images.values()) == 2)
    originals = resolve(site.with_(), sorted(scores()), site.key).originals
    moved, kept = (uid for uid, one in originals.items() if one["study_uid"] == study)
    config = site.with_(f"push.uri={pacs.place()}")
    del pacs.images[originals[moved]["sop_instance_uid"]]
    done = push(config, "cxr", site.key, site.model, uids=[moved, kept], dry_run=True)
    assert done.failures == {moved: "IMAGE_ABSENT"}
    assert (done.pushed, done.objects) == (1, 2)
    pacs.images = dict(site.images)
    for header, refused in (
        ([{**site.studies[study], "PatientID": "ANOTHER"}], {moved, kept}),  # the archive has it under two patients
        ([], set()),
    ):
        pacs.more = header
        done = push(config, "cxr", site.key, site.model, uids=[moved, kept], dry_run=True)
        assert done.failures == dict.fromkeys(refused, "PATIENT_DIFFERS")


@pytest.mark.parametrize(
    ("told", "original", "reason"),
    [
        ({}, {}, None),
        ({"PatientID": "2"}, {}, "PATIENT_DIFFERS"),
        ({"PatientID": ""}, {}, "PATIENT_DIFFERS"),
        ({"PatientID": "1\\7"}, {}, None),  # the vault holds the first value
        ({"IssuerOfPatientID": "A"}, {}, None),
        ({"IssuerOfPatientID": "A"}, {"issuer_of_patient_id": "A"}, None),
        ({"IssuerOfPatientID": "A"}, {"issuer_of_patient_id": "B"}, "PATIENT_DIFFERS"),
        (None, {}, "STUDY_ABSENT"),
    ],
)
def test_whose_study_it_is(told, original, reason):
    headers = []
    if told is not None:
        found = Dataset()
        for keyword, value in {**dict.fromkeys(HEADER, ""), "PatientID": "1", **told}.items():
            setattr(found, keyword, value)
        headers = [found]
    _, why = module._header(headers, {"patient_id": "1", **original})  # pyright: ignore[reportPrivateUsage]
    assert why == reason


def test_what_the_vault_does_not_know_is_not_sent(site, pacs, tmp_path):
    shutil.copytree("vault", tmp_path / "vault")
    config = site.with_(f"push.uri={pacs.place()}", f"deid.vault_uri={tmp_path / 'vault'}")
    gone = next(iter(scores("study_uid").values()))["study_uid"]
    lost = {uid for uid, row in scores("study_uid").items() if row["study_uid"] == gone}
    assert forget(config, "study_uid", gone) == len(lost) > 0
    done = push(config, "cxr", site.key, site.model)
    assert done.failures == dict.fromkeys(lost, "NOT_IN_VAULT")
    assert (done.pushed, len(pacs.objects)) == (FILMS - len(lost), 2 * (FILMS - len(lost)))


def test_only_what_is_abnormal(site, pacs):
    abnormal = {uid for uid, row in scores("is_abnormal").items() if row["is_abnormal"]}
    assert 0 < len(abnormal) < FILMS
    done = push(
        site.with_(f"push.uri={pacs.place()}", "push.objects=sr"), "cxr", site.key, site.model, only_abnormal=True
    )
    assert (done.images, done.objects) == (len(abnormal), len(abnormal))
    assert {made.Modality for made in pacs.objects.values()} == {"SR"}
    verdicts = {item.ConceptCodeSequence[0].CodeMeaning for made in pacs.objects.values() for item in whole(made)}
    assert verdicts == {"Abnormal"}
    regions = sum(bool(row["regions"]) for uid, row in scores("regions").items() if uid in abnormal)
    assert regions > 0
    outlined = sum("SCOORD" in str(made) for made in pacs.objects.values())
    assert outlined == regions


def whole(made) -> list:
    """The verdicts in a report."""
    groups = [item for top in made.ContentSequence if top.ValueType == "CONTAINER" for item in top.ContentSequence]
    items = [item for group in groups for item in group.ContentSequence]
    return [item for item in items if item.ConceptNameCodeSequence[0].CodeValue == "verdict"]


def test_times_are_the_hospitals(site, pacs):
    uid = sorted(scores())[0]
    push(site.with_(f"push.uri={pacs.place()}", "operate.timezone=Asia/Tokyo"), "cxr", site.key, site.model, uids=[uid])
    assert {(made.ContentDate, made.ContentTime) for made in pacs.objects.values()} == {("20260105", "090000")}


def test_a_dry_run_sends_nothing_and_says_what_it_would(site, pacs):
    before = len(records())
    opened = len(list(Path("vault/_audit").glob("**/*.json")))
    done = called(site, "--to", pacs.place(), "--dry-run")
    assert done.exit_code == 0, done.output
    assert f"{2 * FILMS} objects of {FILMS} images would be sent" in done.output
    assert not pacs.objects
    assert len(records()) == before
    assert len(list(Path("vault/_audit").glob("**/*.json"))) > opened  # originals were opened all the same


@pytest.mark.parametrize("asked", [True, False])
def test_a_folder_takes_them_too(site, pacs, tmp_path, asked):
    config = site.with_(*([f"push.uri={pacs.place()}"] if asked else []))
    folder = tmp_path / "results"
    done = push(config, "cxr", site.key, site.model, out=folder)
    files = list(folder.iterdir())
    assert (done.pushed, len(files), done.archive) == (FILMS, 2 * FILMS, str(folder))
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for file in files:
        made = dcmread(file)
        known = site.studies[made.StudyInstanceUID]
        assert (made.PatientID, made.AccessionNumber) == (known["PatientID"], known["AccessionNumber"])
        assert str(made.PatientName) == (known["PatientName"] if asked else "")
        assert not any(word in file.name for word in IDENTIFIERS)
    again = push(config, "cxr", site.key, site.model, out=folder)
    assert (again.present, again.objects) == (FILMS, 0)
    assert not pacs.objects


def test_some_by_name(site, pacs, tmp_path):
    wanted = sorted(scores())[:3]
    (tmp_path / "uids").write_text("\n".join(wanted))
    done = called(site, "--to", pacs.place(), "--uids", str(tmp_path / "uids"), "--json")
    assert (done.exit_code, json.loads(done.stdout)["pushed"]) == (0, 3)
    with pytest.raises(DataError, match="1 of 1 instances have no score"):
        push(site.with_(f"push.uri={pacs.place()}"), "cxr", site.key, site.model, uids=["2.25.7"])


def test_wrong_calls(site, pacs, tmp_path):
    nowhere = called(site).exception
    assert isinstance(nowhere, UsageError)
    assert str(nowhere).startswith("no archive is named; give --to")
    make_keys(tmp_path / "other.pem", tmp_path / "other-public.pem", None)
    arguments = site.arguments("--to", pacs.place(), "--private-key-file", str(tmp_path / "other.pem"))
    other = CliRunner().invoke(app, arguments).exception
    assert isinstance(other, IdentityKeyError)
    assert "does not open with this private key" in str(other)
    with pytest.raises(UsageError, match="no vault is configured"):
        push(load_config(overrides=[f"push.uri={pacs.place()}"]), "cxr", site.key, site.model)
    assert not pacs.objects


def test_no_identifier_is_left_behind(site, pacs, caplog):
    caplog.set_level("DEBUG")
    done = called(site, "--to", pacs.place(), "--json")
    assert done.exit_code == 0, done.output
    values = {value for header in site.studies.values() for value in header.values() if len(value) > 5}
    scan = Scan([*(values - {"19611224", "20260105", "093015"}), *site.images], b"k")
    scan.run([*local_items("lake", site.folder / "lake"), *local_items("home", site.folder / ".memmc")])
    assert (scan.findings.hits, scan.findings.unread) == ([], 0)
    assert len(scan.findings.files) == 2
    said = (done.output + caplog.text).splitlines()
    assert [line for line in said if any(word in line for word in IDENTIFIERS)] == []
    assert verify_chain(Storage.open("lake")).findings == []
