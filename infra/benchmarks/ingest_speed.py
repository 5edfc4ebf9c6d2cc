"""Speed and memory of ingest on radiographs of real size, as ratios in one run.

Every rate is of the same objects, one after the other in each of ``--repeats`` rounds; medians of the rounds are
compared. ``less start-up`` is the rate of the last three quarters: all objects less a run of the first quarter.

* ``bare``: the pinned decoders called in one process per core, nothing else: the limit of this machine;
* ``prepared``: the same, and grey scale and resize as ingest does them;
* ``script``: what one writes in an afternoon (pydicom, apply_voi_lut, Pillow, one Parquet file), one process;
* ``ingest``: the verb, with its start, sandbox, de-identification, quality checks, shards and commit;
  text is not read (burned_in_text.py measures that), but for ``--set deid.text=ocr``;
  ``--set ray.ingest_from=0`` measures it on a local cluster.

::

    python infra/benchmarks/ingest_speed.py --images FOLDER_OF_RADIOGRAPHS --objects 500
    python infra/benchmarks/ingest_speed.py --images FOLDER_OF_RADIOGRAPHS --memory
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one process per core, as in ingest's sandbox

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
from PIL import Image
from pydicom.pixels import pixel_array
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from memmc.config import load_config
from memmc.dicom.decode import check_geometry
from memmc.dicom.pixels import prepare
from memmc.dicom.read import read_instance
from memmc.phantom.objects import PROFILES, Identity, image_object
from memmc.phantom.radiograph import BITS_STORED, Radiograph

PLUGINS = {JPEGLSLossless: "pyjpegls", JPEG2000Lossless: "pylibjpeg", RLELossless: "pydicom"}  # as ingest pins them
CORES = len(os.sched_getaffinity(0))
TO_LIMIT, TO_SCRIPT, MEMORY_GROWTH = 0.85, 2.5, 1.1


def make_corpus(images: Path, out: Path, count: int, side: int) -> None:
    """Write `count` DICOM objects of side x side px, 12 bits, in turn of every profile; one patient each."""
    sources = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not sources:
        raise SystemExit(f"no .jpg or .png below {images}")
    jobs = [(sources[i % len(sources)], out / f"{i:05d}.dcm", i, side) for i in range(count)]
    out.mkdir(parents=True)
    with multiprocessing.Pool(CORES) as pool:
        pool.starmap(_write_object, jobs, chunksize=8)


def _write_object(source: Path, target: Path, number: int, side: int) -> None:
    rng = np.random.default_rng(number)
    grey_HW = np.asarray(Image.open(source).convert("L").resize((side, side), Image.Resampling.BICUBIC), np.float32)
    noisy_HW = grey_HW * 15.5 + rng.normal(60, 8, grey_HW.shape)  # the low bits of a detector are noise
    image_HW = noisy_HW.clip(0, (1 << BITS_STORED) - 1).astype(np.uint16)
    radiograph = Radiograph(image_HW, np.zeros_like(image_HW, bool), {"pixel_mm": 350 / side})
    identity = Identity(seed=9, patient=number, study=0, sex="O")
    target.write_bytes(image_object(radiograph, identity, PROFILES[number % len(PROFILES)]))


def bare(path: Path) -> None:
    dataset = pydicom.dcmread(path)
    pixel_array(dataset, raw=True, decoding_plugin=PLUGINS.get(dataset.file_meta.TransferSyntaxUID, ""))


def prepared(path: Path) -> None:
    config = load_config()
    instance = read_instance(path.read_bytes(), 1 << 31)
    prepare(instance, check_geometry(instance, config.ingest), config.data)


def in_processes(work: Callable[[Path], None], paths: list[Path]) -> float:
    """Return the seconds that one process per core takes for all paths; the processes are warm."""
    with multiprocessing.Pool(CORES) as pool:
        pool.map(work, paths[: len(PROFILES) * CORES], chunksize=len(PROFILES))
        start = time.perf_counter()
        pool.map(work, paths, chunksize=4)
        return time.perf_counter() - start


def script(paths: list[Path], out: Path, side: int) -> float:
    """Convert as a user's own script would."""
    start = time.perf_counter()
    rows = []
    for path in paths:
        dataset = pydicom.dcmread(path)
        values = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset).astype(np.float32)
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            values = values.max() - values
        values = (values - values.min()) / max(float(np.ptp(values)), 1e-6)
        small = Image.fromarray(values).resize((side, side), Image.Resampling.BILINEAR)
        rows.append({"uid": dataset.SOPInstanceUID, "pixels": (np.asarray(small) * 65535).astype("<u2").tobytes()})
    pq.write_table(pa.Table.from_pylist(rows), out)
    return time.perf_counter() - start


def ingest(source: Path, work: Path, *settings: str, watched: bool = False) -> tuple[float, dict[str, object], float]:
    """Run the verb; return its seconds, its account, and the peak memory of its process tree in MiB (PSS).

    The peak is 0 unless `watched`: to add up a process's pages takes the processor from what is timed.
    """
    command = [sys.executable, "-m", "memmc.cli.main", "ingest", str(source), "--cohort", "bench", "--json"]
    command += [word for setting in ("deid.text=class", *settings) for word in ("--set", setting)]
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        peak = [0.0]
        if watched:
            threading.Thread(target=_sample, args=(process.pid, peak), daemon=True).start()
        answer, _ = process.communicate()
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"ingest ended with {process.returncode}")
    return seconds, json.loads(answer), peak[0]


def _sample(pid: int, peak: list[float]) -> None:
    root = psutil.Process(pid)
    while True:
        try:
            tree = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        total = 0
        for process in tree:
            try:
                # Ray's object store is preallocated shared memory: counted once, as far as it is touched.
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        peak[0] = max(peak[0], total / 2**20)
        time.sleep(0.5)


def speed(args: argparse.Namespace, work: Path) -> bool:
    corpus = args.corpus or work / "corpus"
    if not corpus.exists():
        make_corpus(args.images, corpus, args.objects, args.side)
    paths = sorted(corpus.glob("*.dcm"))
    side = load_config().data.image_size
    in_bytes = sum(path.stat().st_size for path in paths)
    print(f"{len(paths)} objects of {args.side} px, {in_bytes / 2**20:.0f} MiB, {CORES} cores", flush=True)
    part = work / "part"
    part.mkdir()
    for path in paths[: len(paths) // 4]:
        shutil.copy(path, part)
    rounds: list[dict[str, float]] = []
    for number in range(args.repeats):
        found = {"bare": in_processes(bare, paths), "prepared": in_processes(prepared, paths)}
        found["script"] = script(paths, work / "script.parquet", side)
        places = [work / f"{name}{number}" for name in ("part", "all")]
        for place in places:
            place.mkdir()
        some, _, _ = ingest(part, places[0], *args.set)
        found["ingest"], account, _ = ingest(corpus, places[1], *args.set)
        assert account["stored"] == len(paths), account
        found["ingest, less start-up"] = (found["ingest"] - some) / (len(paths) - len(paths) // 4) * len(paths)
        print(", ".join(f"{name} {value:.1f} s" for name, value in found.items()), flush=True)
        rounds.append(found)
    seconds = {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}
    for name, value in seconds.items():
        print(f"{name:24} {value:8.2f} s {len(paths) / value:8.1f} objects/s", flush=True)
    to_limit, to_script = seconds["bare"] / seconds["ingest"], seconds["script"] / seconds["ingest"]
    steady = seconds["ingest, less start-up"]
    print(f"ingest / bare decoders  {to_limit:.2f}, less start-up {seconds['bare'] / steady:.2f} (asked >= {TO_LIMIT})")
    print(f"ingest / prepared       {seconds['prepared'] / seconds['ingest']:.2f}, {seconds['prepared'] / steady:.2f}")
    print(f"ingest / own script     {to_script:.2f}, {seconds['script'] / steady:.2f} (asked >= {TO_SCRIPT})")
    return to_limit >= TO_LIMIT and to_script >= TO_SCRIPT


def memory(args: argparse.Namespace, work: Path) -> bool:
    peaks = {}
    for count in (500, 5000):
        corpus = work / f"corpus{count}"
        make_corpus(args.images, corpus, count, 256)
        (work / str(count)).mkdir()
        _, account, peaks[count] = ingest(corpus, work / str(count), *args.set, watched=True)
        assert account["stored"] == count, account
        print(f"{count:5d} objects: peak {peaks[count]:.0f} MiB in all processes", flush=True)
    growth = peaks[5000] / peaks[500]
    print(f"peak memory 5000 / 500 objects {growth:.2f}   (asked <= {MEMORY_GROWTH})")
    return growth <= MEMORY_GROWTH


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of radiographs (.jpg, .png)")
    parser.add_argument("--objects", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", type=int, default=2048, help="px")
    parser.add_argument("--corpus", type=Path, help="keep the DICOM objects here and use them again")
    parser.add_argument("--memory", action="store_true", help="peak memory at 500 and 5,000 objects instead")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        passed = (memory if args.memory else speed)(args, Path(folder))
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
