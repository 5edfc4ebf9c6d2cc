"""The identity vault: sealed by whoever ingests, opened by the holder of the private key alone."""

from __future__ import annotations

import dataclasses
import json
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from dicom_instances import KEY, dataset, encoded, policy, texture
from typer.testing import CliRunner, Result

from memmc.cli.main import app
from memmc.config import load_config
from memmc.dicom.convert import convert
from memmc.dicom.deidentify import content_key
from memmc.dicom.read import read_instance
from memmc.dicom.sandbox import Sandbox, _checked_seal  # pyright: ignore[reportPrivateUsage]
from memmc.dicom.vault import open_originals, seal_originals
from memmc.errors import ConfigError, IdentityKeyError, UsageError
from memmc.lake.audit_check import verify_chain
from memmc.lake.erasure import erase_rows, find_subject
from memmc.lake.shards import read_shard
from memmc.lake.storage import Storage
from memmc.lake.tables import Lake
from memmc.phi.planes import local_items
from memmc.phi.scan import Scan
from memmc.pipeline import vault as module
from memmc.pipeline.convert_chunk import IngestJob, convert_objects
from memmc.pipeline.ingest import ingest
from memmc.pipeline.labels import StatedLabels
from memmc.pipeline.settle import turn_name
from memmc.pipeline.vault import forget, make_keys, read_private_key, read_public_key, vault_of
from memmc.sources.open import open_source

SETTINGS = ("deid.text=class", "lake.uri=lake", "deid.vault_uri=vault", "deid.vault_public_key_file=public.pem")
PRIVATE = X25519PrivateKey.generate()
PUBLIC = PRIVATE.public_key().public_bytes_raw()
IDENTIFIERS = {"AccessionNumber": "ACC7QUOXX", "PatientID": "MRN7QUOXX", "PatientName": "QUOXX^ANNE"}
OBJECT = encoded(dataset(**IDENTIFIERS))
EXPECTED = {
    "sop_instance_uid": "1.2.3.1",
    "series_uid": "1.2.3.3",
    "study_uid": "1.2.3.2",
    "patient_id": "MRN7QUOXX",
    "accession_number": "ACC7QUOXX",
}


def with_vault(*overrides: str):
    return dataclasses.replace(policy(*overrides), vault_key=PUBLIC)


def test_an_entry_opens_with_the_private_key_and_for_its_own_object_alone() -> None:
    stored = convert(OBJECT, with_vault())
    pseudonym = str(stored.attributes["sop_instance_uid"])
    assert stored.sealed is not None
    assert open_originals(stored.sealed, pseudonym, PRIVATE) == EXPECTED
    assert b"QUOXX" not in stored.sealed
    assert "sealed" not in repr(stored)
    damaged = stored.sealed[:-1] + bytes([stored.sealed[-1] ^ 1])
    for sealed, name, key in (
        (stored.sealed, pseudonym, X25519PrivateKey.generate()),
        (stored.sealed, pseudonym + "1", PRIVATE),
        (damaged, pseudonym, PRIVATE),
        (b"", pseudonym, PRIVATE),
    ):
        with pytest.raises(IdentityKeyError):
            open_originals(sealed, name, key)


def test_the_length_of_an_entry_tells_nothing() -> None:
    sizes = {
        len(seal_originals(read_instance(encoded(dataset(PatientID=identifier))), "2.25.1", PUBLIC))
        for identifier in ("A", "MRN0001", "A" * 64)
    }
    assert len(sizes) == 1


def test_only_stored_objects_are_sealed_and_only_with_a_vault() -> None:
    assert convert(OBJECT, policy()).sealed is None
    assert convert(encoded(dataset(Modality="CT", **IDENTIFIERS)), with_vault()).sealed is None
    with Sandbox(with_vault()) as box:
        answer = box.convert(OBJECT)
        assert answer.sealed is not None
        assert open_originals(answer.sealed, str(answer.attributes["sop_instance_uid"]), PRIVATE) == EXPECTED
    with Sandbox(policy()) as box:
        assert box.convert(OBJECT).sealed is None


def test_a_child_cannot_send_what_is_no_entry() -> None:
    assert _checked_seal("ab" * 300, with_vault()) == b"\xab" * 300
    for found, asked in (("ab", policy()), (None, with_vault()), ("ab" * 5000, with_vault()), ("text", with_vault())):
        with pytest.raises(ValueError):
            _checked_seal(found, asked)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.dcm").write_bytes(OBJECT)
    make_keys(tmp_path / "private.pem", tmp_path / "public.pem", None)
    return tmp_path


def ingested(
    root: Path,
    *overrides: str,
    started: datetime = datetime(2026, 1, 1, tzinfo=UTC),
    erased: frozenset[str] = frozenset(),
) -> list[str]:
    """Do the work of one ingest task; return the pseudonyms of the stored rows."""
    config = load_config(overrides=[*SETTINGS, *overrides])
    found = vault_of(config)
    assert found is not None
    vault, public = found
    source = open_source(str(root / "in"), config.source, {})
    job = IngestJob(
        run="r",
        cohort="c",
        source=source,
        storage=Storage.open("lake"),
        policy=dataclasses.replace(policy(*overrides), vault_key=public),
        split=config.split,
        labels=StatedLabels(),
        preprocess_id=config.preprocess_id,
        started=started,
        vault=vault,
        erased=erased,
    )
    shards = convert_objects(job, source.listing(None, lambda _item: True).objects)
    rows = [row for shard in shards for row in read_shard(job.storage, shard.file.path).to_pylist()]
    return [row["sop_instance_uid"] for row in rows]


def asked(uids: list[str], *options: str) -> Result:
    arguments = ["vault", "resolve", "--uids", "-", "--set", "deid.vault_uri=vault", *options]
    if "--private-key-file" not in options:
        arguments += ["--private-key-file", "private.pem"]
    return CliRunner().invoke(app, arguments, input="\n".join(uids))


def test_from_pseudonym_to_original(here: Path) -> None:
    (uid,) = ingested(here)
    done = asked([uid, uid], "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["originals"], told["missing"]) == ({uid: EXPECTED}, [])
    line = json.loads((here / "vault" / told["audit"]).read_text())["subject"]
    assert (line["asked"], line["found"], line["pseudonyms"]) == (1, 1, [uid])
    assert "QUOXX" not in json.dumps(line)
    half = asked([uid, "2.25.7"])
    assert half.exit_code == 1
    assert json.loads(half.stdout) == {uid: EXPECTED}
    trail = verify_chain(Storage.open(here / "vault"))
    assert (trail.head.sequence, trail.findings) == (2, [])


def test_neither_vault_nor_lake_holds_an_identifier(here: Path) -> None:
    ingested(here)
    scan = Scan([*IDENTIFIERS.values(), "1.2.3.1", "1.2.3.2", "1.2.3.3"], b"k")
    scan.run([*local_items("vault", here / "vault"), *local_items("lake", here / "lake")])
    assert (scan.findings.hits, scan.findings.unread) == ([], 0)
    assert len(scan.findings.files) == 2
    assert (here / "vault").stat().st_mode & 0o077 == 0


def test_frames_have_entries_of_their_own(here: Path) -> None:
    frames = np.stack([texture(seed=number) for number in range(3)])
    item = dataset(**IDENTIFIERS)
    item.NumberOfFrames, item.PixelData = 3, frames.astype("<u2").tobytes()
    (here / "in" / "a.dcm").write_bytes(encoded(item))
    uids = ingested(here, "select.frames=each")
    assert len(set(uids)) == 3
    assert json.loads(asked(uids).stdout) == dict.fromkeys(uids, EXPECTED)


def test_an_entry_written_twice_is_one(here: Path) -> None:
    first, second = ingested(here), ingested(here, started=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=1))
    assert first == second
    entries = [pq.read_table(path) for path in (here / "vault" / "entries").iterdir()]
    assert sum(table.num_rows for table in entries) == 2
    assert list(json.loads(asked(first).stdout)) == first


def test_a_patient_is_forgotten(here: Path) -> None:
    (here / "in" / "b.dcm").write_bytes(encoded(dataset(SOPInstanceUID="1.2.3.9", PatientID="OTHER")))
    ingested(here)
    (here / "in" / "b.dcm").unlink()
    (uid,) = ingested(here)
    config = load_config(overrides=["deid.vault_uri=vault"])
    patient = str(convert(OBJECT, policy()).attributes["patient_key"])
    assert forget(load_config(), "patient_key", patient) == 0
    assert forget(config, "patient_key", patient) == 2
    assert forget(config, "patient_key", patient) == 0
    done = asked([uid], "--json")
    assert (done.exit_code, json.loads(done.stdout)["missing"]) == (1, [uid])
    tables = [pq.read_table(path) for path in (here / "vault" / "entries").iterdir()]
    assert sum(table.num_rows for table in tables) == 1


def claimant(root: Path, name: str = "b.dcm") -> None:
    """Another patient's object under the UID of the first."""
    item = dataset(SOPInstanceUID="1.2.3.1", PatientID="OTHER", AccessionNumber="ACC2")
    (root / "in" / name).write_bytes(encoded(item))


def test_who_claims_a_stored_uid_does_not_get_its_pseudonym(here: Path) -> None:
    config = load_config(overrides=SETTINGS)
    ingest(config, "in", "c")
    claimant(here)
    assert ingest(config, "in", "c").reasons == {"already_ingested": 1, "META_DUP_UID_CONFLICT": 1}
    (uid,) = Lake("lake").read("instances", ["sop_instance_uid"], filter={"outcome": "stored"})["sop_instance_uid"]
    assert json.loads(asked([str(uid)], "--set", "lake.uri=lake").stdout) == {str(uid): EXPECTED}
    (entries,) = [pq.read_table(path) for path in (here / "vault" / "entries").iterdir()]
    assert entries.num_rows == 1


@pytest.mark.parametrize("of_old", [False, True])
def test_a_uid_with_entries_of_two_patients(here: Path, of_old: bool) -> None:
    (uid,) = ingested(here)
    claimant(here, "a.dcm")
    assert ingested(here, started=datetime(2026, 1, 2, tzinfo=UTC)) == [uid]
    for path in (here / "vault" / "entries").iterdir() if of_old else ():
        pq.write_table(pq.read_table(path).drop_columns(["content_key"]), path)
    refused = json.loads(asked([uid], "--json").stdout)
    assert (refused["originals"], refused["missing"], refused["ambiguous"]) == ({}, [uid], [uid])
    (here / "key").write_bytes(KEY)
    (here / "in" / "a.dcm").write_bytes(OBJECT)  # the lake tells which is stored
    ingest(load_config(overrides=["deid.text=class", "lake.uri=lake2", "deid.key_file=key"]), "in", "c")
    assert json.loads(asked([uid], "--set", "lake.uri=lake2").stdout) == {uid: EXPECTED}


def test_two_who_forget_at_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = encoded(dataset(SOPInstanceUID="1.2.3.9", PatientID="OTHER"))
    (here / "in" / "b.dcm").write_bytes(other)
    ingested(here)
    config = load_config(overrides=["deid.vault_uri=vault"])
    mine, second = (str(convert(data, policy()).attributes["patient_key"]) for data in (OBJECT, other))
    meanwhile = threading.Thread(target=forget, args=(config, "patient_key", second))
    real = module._write  # pyright: ignore[reportPrivateUsage]

    def write(vault: Storage, table: pa.Table) -> None:
        if not meanwhile.ident:
            meanwhile.start()
            meanwhile.join(0.3)
        real(vault, table)

    monkeypatch.setattr(module, "_write", write)
    assert forget(config, "patient_key", mine) == 1
    meanwhile.join()
    assert Storage.open("vault").list("entries") == []


def test_what_is_erased_is_sealed_no_more_and_the_others_are(here: Path) -> None:
    other = encoded(dataset(SOPInstanceUID="1.2.3.9", PatientID="OTHER"))
    (here / "in" / "b.dcm").write_bytes(other)
    ingested(here, erased=frozenset({content_key(KEY, OBJECT)}))
    (entries,) = [pq.read_table(path) for path in (here / "vault" / "entries").iterdir()]
    assert entries["patient_key"].to_pylist() == [convert(other, policy()).attributes["patient_key"]]


def test_a_copy_of_an_erased_object_does_not_come_back_into_the_vault(here: Path) -> None:
    config = load_config(overrides=SETTINGS)
    assert ingest(config, "in", "c").stored == 1
    lake, vault = Lake("lake"), Storage.open("vault")
    patient = lake.read("instances", ["patient_key"])["patient_key"][0].as_py()
    assert forget(config, "patient_key", patient) == 1
    erase_rows(lake, "instances", find_subject(lake, "patient_key", patient, None), "erase", turn_name)
    (here / "in" / "copy.dcm").write_bytes(OBJECT)
    again = ingest(config, "in", "c")
    assert (again.stored, again.reasons) == (0, {"already_ingested": 1, "erased": 1})
    assert vault.list("entries") == []


def test_another_key_opens_nothing(here: Path) -> None:
    uids = ingested(here)
    make_keys(here / "other.pem", here / "other-public.pem", None)
    refused = asked(uids, "--private-key-file", "other.pem")
    assert isinstance(refused.exception, IdentityKeyError)
    assert "QUOXX" not in refused.output + str(refused.exception)


def test_keys(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stat.S_IMODE((here / "private.pem").stat().st_mode) == 0o600
    key = read_private_key(here / "private.pem", None)
    assert key.public_key().public_bytes_raw() == read_public_key(here / "public.pem")
    with pytest.raises(UsageError, match="never overwritten"):
        make_keys(here / "private.pem", here / "new.pem", None)
    (here / "private.pem").chmod(0o640)
    with pytest.raises(IdentityKeyError, match="chmod 600"):
        read_private_key(here / "private.pem", None)
    monkeypatch.setenv("MEMMC_VAULT_PASSPHRASE", "correct horse")
    made = ["vault", "init", "--passphrase", "--private-key-file", "locked.pem", "--public-key-file", "p.pem"]
    assert CliRunner().invoke(app, made).exit_code == 0
    assert read_private_key(here / "locked.pem", "correct horse")
    for wrong in ("wrong", None):
        with pytest.raises(IdentityKeyError):
            read_private_key(here / "locked.pem", wrong)
    (here / "text.pem").write_text("no key")
    with pytest.raises(IdentityKeyError):
        read_public_key(here / "text.pem")


@pytest.mark.parametrize(
    "settings",
    [
        ("deid.vault_uri=vault",),
        ("deid.vault_public_key_file=public.pem",),
        ("deid.vault_uri=lake/vault", "deid.vault_public_key_file=public.pem"),
        ("deid.vault_uri=.", "deid.vault_public_key_file=public.pem"),
        ("deid.vault_uri=link/vault", "deid.vault_public_key_file=public.pem"),
        ("deid.vault_uri=s3://b/lake/v", "deid.vault_public_key_file=public.pem", "lake.uri=s3://b/lake"),
    ],
)
def test_a_vault_stands_apart(here: Path, settings: tuple[str, ...]) -> None:
    (here / "lake").mkdir()
    (here / "link").symlink_to(here / "lake")
    with pytest.raises(ConfigError):
        vault_of(load_config(overrides=["lake.uri=lake", *settings]))
    assert vault_of(load_config()) is None
