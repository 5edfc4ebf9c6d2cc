"""Leaks planted on purpose: a search that does not find these proves nothing by finding none."""

from __future__ import annotations

import base64
import gzip
import json
import secrets
import sqlite3
import tempfile
import zipfile
import zlib
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from memmc.phi.planes import local_items
from memmc.phi.scan import Scan

LEAKS = (
    "compressed Parquet page",
    "Parquet footer metadata",
    "base64 in a Delta log",
    "URL-escaped in an SQLite write-ahead log",
    "JSON-escaped in a gzip artifact",
    "other case in a log",
    "UTF-16 in a zip archive",
    "hex in a zlib stream",
)


def self_test(values: Iterable[str]) -> list[str]:
    """Plant one leak of each kind into a temporary folder and search it together with the values of a scan.

    Returns:
        The kinds that were found; all of `LEAKS` if the search works.
    """
    tag = secrets.token_hex(4)
    decoys = [f"QZÄX{tag}{number}^ÖRJAN O'HARA" for number in range(len(LEAKS))]
    with tempfile.TemporaryDirectory(prefix="memmc-selftest-") as name, _planted(Path(name), decoys):
        given = list(values)
        scan = Scan([*given, *decoys], secrets.token_bytes(32))
        scan.run(local_items("self-test", Path(name)))
        found = {hit.number - 1 - len(given) for hit in scan.findings.hits}
    return [leak for number, leak in enumerate(LEAKS) if number in found]


@contextmanager
def _planted(root: Path, decoys: list[str]) -> Generator[None]:
    page, footer, delta, wal, artifact, log, archive, stream = decoys
    lake, mlflow, ray = root / "lake", root / "mlflow", root / "ray"
    for folder in (lake / "_delta_log", mlflow, ray):
        folder.mkdir(parents=True)
    noise = [f"row {number}" for number in range(500)]
    table = pa.table({"label": [*noise, page, *noise]})
    pq.write_table(table, lake / "page.parquet", compression="zstd")
    pq.write_table(
        pa.table({"label": noise}).replace_schema_metadata({"note": footer}), lake / "footer.parquet", compression="lz4"
    )
    note = base64.b64encode(f"ab{delta}".encode()).decode()
    (lake / "_delta_log" / "0.json").write_text(json.dumps({"commitInfo": {"note": note}}))
    (mlflow / "artifact.gz").write_bytes(gzip.compress(json.dumps({"path": artifact}).encode()))
    (mlflow / "model.bin").write_bytes(zlib.compress(bytes(64) + stream.encode().hex().upper().encode()))
    (ray / "worker.log").write_text(f"could not convert {log.swapcase()}\n", encoding="utf-8")
    with zipfile.ZipFile(ray / "package.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("module.bin", bytes(32) + archive.encode("utf-16-le"))
    connection = sqlite3.connect(root / "prefect.db")
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE log (message TEXT)")
        connection.execute("INSERT INTO log VALUES (?)", (f"file:///in/{quote(wal, safe='')}.dcm",))
        connection.commit()  # stays in the log while the connection is open
        yield
    finally:
        connection.close()
