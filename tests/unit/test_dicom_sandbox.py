"""A decoder may crash, hang, fill the memory or lie; the caller gets a row in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dicom_instances import dataset, encoded, policy, texture

from memmc.dicom.convert import convert
from memmc.dicom.sandbox import Sandbox, _Lost  # pyright: ignore[reportPrivateUsage]
from memmc.dicom.worker import OBJECTS_PER_WORKER
from memmc.errors import MemmcError

GOOD = encoded(dataset())


class Misbehaving(Sandbox):
    child_module = "dicom_crashing_child"


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Misbehaving(policy("ingest.timeout_s=2", "ingest.memory_bytes=2147483648")) as sandbox:
        yield sandbox


def order(words: str) -> bytes:
    return words.encode().ljust(32) + GOOD


def worker_of(box: Sandbox) -> int:
    return int(box.convert(order("environment")).attributes["width"] or 0)


def test_same_answer_as_in_process() -> None:
    with Sandbox(policy()) as box:
        for data in (GOOD, b"", b"text", encoded(dataset(Modality="CT")), encoded(dataset(texture(9, 2000)))):
            assert box.convert(data) == convert(data, policy())


@pytest.mark.parametrize("word", ["abort", "segfault", "exit"])
def test_a_crash_costs_one_object(box: Sandbox, word: str) -> None:
    parse, pixels = box.convert(order(word)), box.convert(order(f"{word} pixels"))
    assert (parse.outcome, parse.reason) == ("quarantined", "PARSE_CRASH")
    assert (pixels.outcome, pixels.reason) == ("quarantined", "PIX_DECODER_CRASH")
    assert parse.attributes["patient_key"] is None
    assert pixels.attributes["patient_key"] == convert(GOOD, policy()).attributes["patient_key"]
    assert box.convert(GOOD).outcome == "stored"


def test_a_crashing_object_is_tried_twice_and_the_restart_is_quick(box: Sandbox) -> None:
    attempts: list[int] = []
    original = box._attempt  # pyright: ignore[reportPrivateUsage]
    box._attempt = lambda data: attempts.append(1) or original(data)  # type: ignore[method-assign]
    try:
        start = time.monotonic()
        box.convert(order("abort"))
        assert box.convert(GOOD).outcome == "stored"
        assert time.monotonic() - start < 2
    finally:
        del box._attempt
    assert len(attempts) == 3


@pytest.mark.parametrize("words", ["memory pixels", "time"])
def test_what_may_pass_is_tried_again_in_a_fresh_worker(box: Sandbox, words: str) -> None:
    workers: list[int] = []
    original = box._attempt  # pyright: ignore[reportPrivateUsage]

    def attempt(data: bytes) -> object:
        workers.append(int(original(order("environment")).attributes["width"] or 0))  # type: ignore[union-attr]
        return _Lost("TIMEOUT", None, None) if words == "time" and len(workers) == 1 else original(data)

    box._attempt = attempt  # type: ignore[method-assign,assignment]
    try:
        answer = box.convert(GOOD if words == "time" else order(words))
    finally:
        del box._attempt
    assert len(workers) == 2
    assert (answer.reason, len(set(workers))) == ((None, 1) if words == "time" else ("PIX_DECODER_OOM", 2))


@pytest.mark.slow
def test_a_hang_ends_in_time(box: Sandbox) -> None:
    for words, reason in (("hang", "PARSE_TIMEOUT"), ("hang pixels", "PIX_DECODER_TIMEOUT")):
        start = time.monotonic()
        assert box.convert(order(words)).reason == reason
        assert time.monotonic() - start < 20
    assert box.convert(GOOD).outcome == "stored"


def test_memory_is_limited(box: Sandbox) -> None:
    before = worker_of(box)
    assert box.convert(order("memory pixels")).reason == "PIX_DECODER_OOM"
    assert worker_of(box) != before  # a fresh heap
    assert box.convert(order("environment")).attributes["channels"] == 2048


@pytest.mark.slow
def test_answers_are_checked(box: Sandbox) -> None:
    assert box.convert(order("leak")).reason == "PARSE_CRASH"
    assert box.convert(order("garbage")).outcome == "quarantined"
    assert box.convert(GOOD).outcome == "stored"


def test_a_worker_that_has_grown_is_not_kept(box: Sandbox) -> None:
    before = worker_of(box)
    assert worker_of(box) == before
    assert box.convert(order("grown")).reason == "FILE_NOT_DICOM"
    assert worker_of(box) != before


def test_processor_time_is_limited_object_by_object(box: Sandbox) -> None:
    left = {box.convert(order("environment")).attributes["columns"] for _ in range(3)}
    assert left <= {1, 2}  # of ingest.timeout_s = 2
    with Misbehaving(policy()) as patient:
        assert patient.convert(order("environment")).attributes["columns"] in (30, 31)
    assert _Lost("CRASH", None, signal.SIGXCPU, keeper_lives=True).reason == "PARSE_TIMEOUT"


@pytest.mark.slow
def test_an_endless_calculation_ends_by_its_processor_time() -> None:
    program = "from memmc.dicom.worker import _limit_processor\n_limit_processor(1)\nwhile True: pass"
    ended = subprocess.run([sys.executable, "-c", program], check=False, timeout=300)
    assert ended.returncode == -signal.SIGXCPU


def test_decoders_cannot_print(box: Sandbox, capfd: pytest.CaptureFixture[str]) -> None:
    assert box.convert(order("print")).outcome == "stored"
    assert "SMITH" not in "".join(capfd.readouterr())


def test_the_child_holds_no_secret_and_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with Misbehaving(policy()) as box:
        known = box.convert(order("environment")).attributes
        assert (known["bits"], known["rows"]) == (0, 0)
        process = int(known["width"] or 0)
        for name in ("cmdline", "environ"):
            held = Path(f"/proc/{process}/{name}").read_bytes()
            assert policy().key not in held
            assert policy().key.hex().encode() not in held


@pytest.mark.slow
def test_worker_is_recycled(monkeypatch: pytest.MonkeyPatch) -> None:
    with Misbehaving(policy()) as box:
        first = worker_of(box)
        for _ in range(OBJECTS_PER_WORKER - 1):
            assert box.convert(b"text").reason == "FILE_NOT_DICOM"
        assert worker_of(box) != first


def test_threads_take_turns(box: Sandbox) -> None:
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda: results.extend(box.convert(GOOD).outcome for _ in range(5))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["stored"] * 20


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def gone(process: int) -> bool:
    deadline = time.monotonic() + 5
    while alive(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(process)


@pytest.mark.slow
def test_close_leaves_nothing_behind() -> None:
    box = Misbehaving(policy())
    worker = worker_of(box)
    assert alive(worker)
    box.close()
    assert gone(worker)
    assert box.convert(GOOD).outcome == "stored"
    box.close()
    box.close()


@pytest.mark.slow
def test_the_child_dies_with_its_parent() -> None:
    script = (
        "import sys, os; from test_dicom_sandbox import *\n"
        "box = Misbehaving(policy()); print(worker_of(box), flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert gone(worker)


def test_a_child_that_cannot_start_is_an_error() -> None:
    class Broken(Sandbox):
        child_module = "no_such_module"

    with pytest.raises(MemmcError, match="does not start"):
        Broken(policy()).convert(GOOD)
