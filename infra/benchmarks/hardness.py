"""Real, odd and hostile DICOM objects through the sandbox and through `memmc ingest`, against independent decoders.

    python infra/benchmarks/hardness.py DATA [--good 1000] [--only zoo odd poison ingest]

DATA holds dicom-zoo, dicom-odd and dicom-poison. Prints what became of every
object and exits with 1 where a promise is broken:

- zoo: at least 175 images that an oracle decodes are stored or excluded by a named rule, at most 12 are not, with the
  default selection and with every modality in scope; and stored values are bit-equal to an independent oracle for
  lossless syntaxes, within 1 for lossy ones;
- odd: every object has the outcome of its class;
- poison: among good objects none of those is lost, no object takes over 60 s, this process grows by less than 50 MB;
- ingest: one run over all of it accounts for every file and stores every good one.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from pixel_oracles import Comparison, compare

from memmc.config import load_config
from memmc.dicom.convert import ConvertPolicy
from memmc.dicom.sandbox import Sandbox
from memmc.phantom.objects import PROFILES, Identity, image_object
from memmc.phantom.radiograph import simulate

LEAST_ACCOUNTED, MOST_MISSED = 175, 12
MOST_SECONDS, MOST_GROWTH = 60.0, 50 << 20
WIDE = (  # every modality and class that the decoders can show
    "select.modalities=CR,DX,DR,RG,CT,MR,OT,US,NM,MG,PT,SC,XC,XA,OP,ES,IO,PX,UNKNOWN",
    "select.derived=true",
    "select.secondary_capture=true",
    "select.lateral_views=true",
    "select.burned_in_annotation=accept",
)
ODD = {  # class of dicom-odd/expected.csv -> outcomes that are right
    "image": {"stored"},
    "tolerate": {"stored", "excluded", "quarantined"},
    "reject": {"quarantined"},
    "nonimage": {"excluded"},
}


class Findings:
    """Collects broken promises."""

    def __init__(self) -> None:
        self.broken: list[str] = []

    def expect(self, holds: bool, promise: str) -> None:
        print(f"  {'ok    ' if holds else 'BROKEN'} {promise}", flush=True)
        if not holds:
            self.broken.append(promise)


def objects(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".csv", ".md"))


def policy(*overrides: str) -> ConvertPolicy:
    return ConvertPolicy.from_config(load_config(overrides=overrides), bytes(range(32)))


def comparisons(paths: list[Path]) -> Iterator[tuple[Path, Comparison]]:
    """Compare in a process of its own: some oracles die on what others decode."""
    pool = ProcessPoolExecutor(1)
    for path in paths:
        try:
            yield path, pool.submit(compare, path).result(timeout=120)
        except (BrokenProcessPool, TimeoutError) as error:
            yield path, Comparison("", [], type(error).__name__, {})
            pool.shutdown(wait=False, cancel_futures=True)
            pool = ProcessPoolExecutor(1)
    pool.shutdown()


def zoo(folder: Path, findings: Findings, verbose: bool) -> None:
    compared = dict(comparisons(objects(folder)))
    decodable = [path for path, found in compared.items() if found.oracles]
    print(f"dicom-zoo: {len(compared)} files, {len(decodable)} decodable by an oracle")
    for name, count in Counter(oracle for found in compared.values() for oracle in found.oracles).most_common():
        print(f"  {count:5d}  decoded by {name}")
    for title, strict, chosen in (
        ("default selection", True, policy()),
        ("every modality", False, policy(*WIDE, "select.frames=each", "deid.text=class")),
    ):
        outcomes: dict[Path, tuple[str, str]] = {}
        with Sandbox(chosen) as sandbox:
            for path in decodable:
                result = sandbox.convert(path.read_bytes())
                outcomes[path] = (result.outcome, result.reason or "")
        counts = Counter(outcomes.values())
        print(
            f"  {title}: " + ", ".join(f"{count} {o}" for o, count in Counter(o for o, _ in counts.elements()).items())
        )
        for (outcome, reason), count in sorted(counts.items(), key=lambda item: -item[1]):
            print(f"    {count:4d}  {outcome:<12} {reason}")
        missed = [path for path, (outcome, reason) in outcomes.items() if _missed(outcome, reason, strict)]
        for path in missed if verbose else []:
            print(f"          {outcomes[path][1]:<24} {path.relative_to(folder)}")
        accounted = len(decodable) - len(missed)
        findings.expect(
            accounted >= LEAST_ACCOUNTED and len(missed) <= MOST_MISSED,
            f"{title}: {accounted} of {len(decodable)} stored or excluded by a named rule"
            + ("" if strict else ", or without the attributes a row needs"),
        )
    _exactness(folder, compared, findings, verbose)


def _missed(outcome: str, reason: str, strict: bool) -> bool:
    """Whether a decodable image was lost; with every modality in scope, only one that could not be read."""
    named = ("DEID_",) if strict else ("DEID_", "META_")  # held back for privacy; without what a row needs
    return outcome == "quarantined" and not reason.startswith(named)


def _exactness(folder: Path, compared: dict[Path, Comparison], findings: Findings, verbose: bool) -> None:
    decodable = {path: found for path, found in compared.items() if found.oracles}
    ours = sum(found.ours == "decoded" for found in decodable.values())
    print(f"  our decoders, selection aside: {ours} of {len(decodable)}")
    for path, found in decodable.items() if verbose else ():
        if found.ours != "decoded":
            print(f"          {found.ours:<24} {path.relative_to(folder)}")
    for title, bound, chosen in (("lossless", 0, True), ("lossy", 1, False)):
        judged = {path: found for path, found in decodable.items() if found.compared and found.lossless == chosen}
        # Oracles disagree where one of them is wrong; the nearest decides, and none may be needed to be near.
        near = {path for path, found in judged.items() if min(found.compared.values()) <= bound}
        for path in judged if verbose else ():
            if max(judged[path].compared.values()) > bound:
                print(f"          {judged[path].compared} {path.relative_to(folder)}")
        findings.expect(
            len(near) == len(judged),
            f"{title}: {len(near)} of {len(judged)} with an independent oracle within {bound} of it",
        )


def odd(folder: Path, findings: Findings) -> None:
    with (folder / "expected.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    right, slowest = 0, 0.0
    with Sandbox(policy()) as sandbox:
        for row in rows:
            start = time.monotonic()
            result = sandbox.convert((folder / row["file"]).read_bytes())
            slowest = max(slowest, time.monotonic() - start)
            right += result.outcome in ODD[row["class"]]
            if result.outcome not in ODD[row["class"]]:
                print(f"          {row['class']:<9} but {result.outcome} {result.reason}: {row['file']}")
    print(f"dicom-odd: {len(rows)} files, slowest {slowest:.1f} s")
    findings.expect(right == len(rows) == 58, f"{right} of {len(rows)} have the outcome of their class")


def good_objects(count: int) -> Iterator[bytes]:
    """Yield phantom radiographs of different patients in every encoding; a few images serve them all."""
    images = [simulate(seed, 0) for seed in range(6)]
    for number in range(count):
        image = images[number % len(images)]
        yield image_object(image, Identity(7, number, 0, image.info["sex"]), PROFILES[number % len(PROFILES)])


def poison(folder: Path, good: int, findings: Findings) -> None:
    bad = [path.read_bytes() for path in objects(folder)]
    bad.append((folder / "ok.dcm").read_bytes() + bytes(64 << 20))  # a tail of zeros
    every = max(1, good // len(bad))
    stored, seconds, reasons, wrong = 0, [0.0], Counter[str](), 0
    healthy = list(good_objects(good))
    with Sandbox(policy(*WIDE)) as sandbox:
        sandbox.convert(healthy[0])
        before = _resident_bytes()
        peak = before
        for number, data in enumerate(healthy):
            stored += sandbox.convert(data).outcome == "stored"
            if number % every or number // every >= len(bad):
                continue
            start = time.monotonic()
            result = sandbox.convert(bad[number // every])
            seconds.append(time.monotonic() - start)
            reasons[result.reason or "stored"] += 1
            wrong += (result.outcome == "stored") != (result.pixels is not None)
            peak = max(peak, _resident_bytes())
    print(f"dicom-poison: {len(bad)} hostile among {good} good")
    for reason, count in reasons.most_common():
        print(f"    {count:4d}  {reason}")
    findings.expect(sum(reasons.values()) == len(bad) and not wrong, f"{len(bad)} hostile objects have an answer")
    findings.expect(stored == good, f"{stored} of {good} neighbours stored")
    findings.expect(max(seconds) <= MOST_SECONDS, f"slowest hostile object {max(seconds):.1f} s")
    findings.expect(peak - before < MOST_GROWTH, f"this process grew by {(peak - before) / (1 << 20):.1f} MB")


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def ingest(data: Path, good: int, findings: Findings) -> None:
    """One `memmc ingest` of everything: what the user runs."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        source = root / "in"
        (source / "good").mkdir(parents=True)
        for number, body in enumerate(good_objects(good)):
            (source / "good" / f"{number}.dcm").write_bytes(body)
        files = good
        for name in ("dicom-zoo", "dicom-odd", "dicom-poison"):
            for path in objects(data / name):
                target = source / name / path.relative_to(data / name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
                files += 1
        os.mkfifo(source / "pipe.dcm")
        (source / "link.dcm").symlink_to("/etc/passwd")
        command = [sys.executable, "-m", "memmc.cli.main", "ingest", str(source), "--cohort", "hard", "--json"]
        command += ["--set", "ingest.max_quarantined=1"]  # few of the good ones may be asked for
        start = time.monotonic()
        done = subprocess.run(
            [*command, "--lake", str(root / "lake")],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
        seconds = time.monotonic() - start
        result = {}
        with contextlib.suppress(ValueError, IndexError):
            result = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"memmc ingest of {files} files and two traps: {seconds:.0f} s, exit {done.returncode}")
    if "stored" not in result:
        findings.expect(False, "it ends with a result: " + done.stderr.strip()[-300:])
        return
    for reason, count in sorted(result["reasons"].items(), key=lambda item: -item[1]):
        print(f"    {count:4d}  {reason}")
    outcomes = {name: result[name] for name in ("stored", "duplicate", "excluded", "quarantined")}
    findings.expect(result["seen"] == sum(outcomes.values()) >= files, f"{result['seen']} seen = {outcomes}")
    findings.expect(result["stored"] >= good, f"{result['stored']} stored, {good} of them good neighbours")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--good", type=int, default=1000, help="good objects among the hostile ones")
    parser.add_argument("--only", nargs="+", choices=("zoo", "odd", "poison", "ingest"), default=None)
    parser.add_argument("--verbose", action="store_true", help="name the files that miss")
    chosen = parser.parse_args()
    findings = Findings()
    wanted = chosen.only or ("zoo", "odd", "poison", "ingest")
    if "zoo" in wanted:
        zoo(chosen.data / "dicom-zoo", findings, chosen.verbose)
    if "odd" in wanted:
        odd(chosen.data / "dicom-odd", findings)
    if "poison" in wanted:
        poison(chosen.data / "dicom-poison", chosen.good, findings)
    if "ingest" in wanted:
        ingest(chosen.data, chosen.good, findings)
    print(f"{len(findings.broken)} promises broken" if findings.broken else "every promise held")
    return 1 if findings.broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
