"""The README's queries run as they stand: score tables open in DuckDB and pandas without memmc."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest
from lake_rows import NOW

from memmc.lake.schemas import SCHEMAS, SCORES
from memmc.lake.tables import Lake

README = Path(__file__).parents[2] / "README.md"


def queries(library: str) -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return [block for block in blocks if library in block]


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty scored images of two models, the last ones flagged, and two that have no score."""
    fixed = {"cohort": "c", "model_digest": "d", "dataset_version": 0, "preprocess_id": "p", "scorer": "s", "run": "r"}
    rows = [
        {**fixed, "sop_instance_uid": f"u{i}", "model": f"m/{1 + i % 2}", "anomaly_score": float(i),
         "p_value": 1 - i / 31, "is_abnormal": i >= 27, "stratum": "pooled", "scored_at": NOW}
        for i in range(30)
    ]  # fmt: skip
    rows += [{**fixed, "sop_instance_uid": f"v{i}", "model": "m/1", "not_scored": "SELECT_VIEW", "scored_at": NOW}
             for i in range(2)]  # fmt: skip
    Lake(tmp_path / "lake").append(SCORES, pa.Table.from_pylist(rows, schema=SCHEMAS[SCORES]))
    monkeypatch.chdir(tmp_path)


def test_duckdb_opens_the_scores(lake: None) -> None:
    pytest.importorskip("duckdb")
    (query,) = queries("duckdb")
    names: dict = {}
    exec(query, names)
    assert [row[0] for row in names["worst"]] == ["u29", "u28", "u27"]


def test_duckdb_opens_the_regions(lake: None) -> None:
    duckdb = pytest.importorskip("duckdb")
    (query,) = re.findall(r"`(SELECT [^`]*regions[^`]*)`", README.read_text())
    region = {field.name: 1 for field in SCHEMAS[SCORES].field("regions").type.value_type}
    row = dict.fromkeys(SCHEMAS[SCORES].names) | {"sop_instance_uid": "u", "regions": [region, region]}
    rows = pa.Table.from_pylist([row], schema=SCHEMAS[SCORES])
    with duckdb.connect() as connection:
        connection.register("scores", rows)
        assert [found[0] for found in connection.sql(query).fetchall()] == ["u", "u"]


def test_pandas_opens_the_scores(lake: None) -> None:
    (query,) = queries("to_pandas")
    names: dict = {}
    exec(query, names)
    assert names["flagged"].loc["m/1"].tolist() == [1, 15] and names["flagged"].loc["m/2"].tolist() == [2, 15]
    assert names["reasons"].to_dict() == {"SELECT_VIEW": 2}
