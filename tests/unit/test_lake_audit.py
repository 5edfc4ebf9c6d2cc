"""The audit trail: one chain whoever writes, and no change to it that does not show."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import threading
import time
from datetime import UTC, datetime

import pyarrow as pa
import pytest

from memmc.lake import audit
from memmc.lake.audit import HEAD, HEAD_LOST, Head, append, digest_of, encode, read_head, record_name
from memmc.lake.audit_check import Witness, verify_chain
from memmc.lake.schemas import LABELS
from memmc.lake.storage import Storage
from memmc.lake.tables import Lake

NUM = 12


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage.open(tmp_path / "lake")


@pytest.fixture
def chain(storage) -> Storage:
    for number in range(NUM):
        append(storage, {"action": "ingest", "number": number})
    return storage


def bad(storage, *kept) -> list[int]:
    return [finding.sequence for finding in verify_chain(storage, kept).findings]


def record(storage, sequence) -> dict:
    return json.loads(storage.read(record_name(sequence)))


def put(storage, sequence, content, *, sealed=True) -> None:
    if sealed:
        content = {**content, "digest": digest_of(content)}
    storage.write(record_name(sequence), encode(content))


def test_a_chain_stands(chain):
    verdict = verify_chain(chain)
    assert (verdict.findings, verdict.head, verdict.witnesses) == ([], read_head(chain), 1)
    assert [record(chain, number)["number"] for number in range(1, NUM + 1)] == list(range(NUM))
    assert record(chain, 1)["previous"] == audit.NOTHING
    assert verify_chain(Storage.open(f"{chain.uri}-none")).head == Head()


def test_appending_reads_nothing_of_the_chain(chain, monkeypatch):
    asked: list[str] = []
    read = Storage.read
    monkeypatch.setattr(Storage, "read", lambda self, rel: asked.append(rel) or read(self, rel))
    monkeypatch.setattr(Storage, "list", lambda *_: pytest.fail("the folder was listed"))
    append(chain, {"action": "score"})
    assert set(asked) == {HEAD} and len(asked) == 2


def test_every_changed_byte_is_found(chain):
    """Each bit flip, at each of many places, in first, middle and last record."""
    for sequence in (1, 5, NUM):
        name = record_name(sequence)
        good = chain.read(name)
        for position in range(0, len(good), 7):
            spoilt = bytearray(good)
            spoilt[position] ^= 1 << position % 8
            chain.write(name, bytes(spoilt))
            assert bad(chain)[:1] == [sequence], (sequence, position)
        chain.write(name, good)
    assert bad(chain) == []


@pytest.mark.parametrize("sequence", range(1, NUM + 1))
def test_a_record_replaced_with_its_digest_is_found(chain, sequence):
    put(chain, sequence, {**record(chain, sequence), "number": 99})
    assert bad(chain)[0] in {sequence, sequence + 1}


@pytest.mark.parametrize("sequence", range(1, NUM + 1))
def test_a_deleted_record_is_found(chain, sequence):
    chain.delete(record_name(sequence))
    assert bad(chain)[0] == sequence


def test_exchanged_records_are_found(chain):
    for first in (1, 4, NUM - 1):
        for second in range(first + 1, NUM + 1):
            one, two = chain.read(record_name(first)), chain.read(record_name(second))
            chain.write(record_name(first), two)
            chain.write(record_name(second), one)
            assert bad(chain)[0] == first
            chain.write(record_name(first), one)
            chain.write(record_name(second), two)


@pytest.mark.parametrize("sequence", range(1, NUM + 1))
def test_an_inserted_record_is_found(chain, sequence):
    """Those after it move up by one; numbered and chained anew, they no longer end as the head says."""
    moved = [record(chain, number) for number in range(sequence, NUM + 1)]
    before = record(chain, sequence)["previous"]
    for number, content in enumerate([{"action": "erase", "id": "x"}, *moved], start=sequence):
        body = {**content, "sequence": number, "previous": before}
        body.pop("digest", None)
        put(chain, number, body)
        before = digest_of(body)
    assert bad(chain) == [NUM]  # the head knew another twelfth record


@pytest.mark.parametrize("left", range(NUM))
def test_a_cut_end_is_found(chain, left):
    for number in range(left + 1, NUM + 1):
        chain.delete(record_name(number))
    assert bad(chain) == [left + 1]


def test_a_cut_end_with_its_head_is_found_by_who_knew_it(chain):
    known = read_head(chain)
    assert known is not None
    now = datetime.now(UTC)
    row = {"cohort": "c", "sop_instance_uid": "2.25.1", "label": "normal", "source": "s", "labelled_at": now}
    Lake(chain.uri).append(LABELS, pa.Table.from_pylist([row]))
    assert verify_chain(chain).witnesses == 2
    for number in range(4, NUM + 1):
        chain.delete(record_name(number))
    head = Head(3, record(chain, 3)["digest"])
    chain.write(HEAD, json.dumps({"head": str(head)}).encode())
    (finding,) = verify_chain(chain).findings
    assert finding.sequence == 4 and "commit 1 of table 'labels'" in finding.problem
    for number in range(4, NUM + 2):  # written anew to the same length, so that only digests tell
        head = append(chain, {"action": "ingest", "number": number})
    assert bad(chain) == [NUM]
    assert bad(chain, Witness("kept", known)) == [NUM, NUM]
    assert bad(chain, Witness("kept", head)) == [NUM]


def test_a_head_kept_elsewhere_alone_finds_the_cut(chain):
    """And without it, a chain cut back together with its head passes: that is what such a head is for."""
    kept = Witness("kept", Head(NUM, record(chain, NUM)["digest"]))
    for number in range(4, NUM + 1):
        chain.delete(record_name(number))
    chain.write(HEAD, json.dumps({"head": str(Head(3, record(chain, 3)["digest"]))}).encode())
    assert bad(chain) == []
    assert bad(chain, kept) == [4]


def test_a_lost_or_spoilt_head_shows_and_leaves_a_record(chain):
    for spoil in (lambda: chain.delete(HEAD), lambda: chain.write(HEAD, b"{")):
        spoil()
        assert bad(chain) == [0]
        before = verify_chain(chain).head.sequence
        append(chain, {"action": "score"})
        assert bad(chain) == []
        assert [record(chain, before + step)["action"] for step in (1, 2)] == [HEAD_LOST, "score"]


def test_an_object_that_is_no_record_is_found(chain):
    chain.write(f"{audit.FOLDER}/000000000003.json.bak", b"x")
    assert bad(chain) == [0]


def test_a_lost_answer_of_the_store_makes_no_second_record(chain, monkeypatch):
    """A retried conditional write may be told that the object is there: it is the writer's own."""
    create = Storage.create
    monkeypatch.setattr(Storage, "create", lambda self, rel, data: create(self, rel, data) and False)
    append(chain, {"action": "score"})
    assert (verify_chain(chain).head.sequence, bad(chain)) == (NUM + 1, [])


def write_many(uri: str, count: int) -> None:
    storage = Storage.open(uri)
    for number in range(count):
        append(storage, {"action": "score", "number": number})


def test_eight_processes_stand_in_one_chain(storage):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_many, args=(storage.uri, 25)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8
    verdict = verify_chain(storage)
    assert (verdict.head.sequence, verdict.findings) == (200, [])
    assert len({record(storage, number)["id"] for number in range(1, 201)}) == 200


def test_killed_writers_leave_a_chain(storage):
    """Fifteen writers, each killed in the midst of its work, beside one that goes on."""
    draw = random.Random(3)
    context = multiprocessing.get_context("fork")
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            append(storage, {"action": "ingest"})

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(15):
        process = context.Process(target=write_many, args=(storage.uri, 10_000))
        process.start()
        time.sleep(draw.uniform(0.005, 0.04))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    over.set()
    thread.join()
    append(storage, {"action": "score"})
    verdict = verify_chain(storage)
    assert verdict.findings == [] and verdict.head.sequence > 15
    assert verdict.head == read_head(storage)
