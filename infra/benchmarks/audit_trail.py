"""What a record of the audit trail costs to add, early and late in a long chain, and what verifying the chain costs.

::

    python infra/benchmarks/audit_trail.py                      # on a local folder
    AWS_ENDPOINT_URL=... python infra/benchmarks/audit_trail.py --lake s3://bucket/empty --records 500
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

from memmc.lake.audit import append
from memmc.lake.audit_check import verify_chain
from memmc.lake.storage import Storage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lake", help="an empty place; a temporary folder when absent")
    parser.add_argument("--records", type=int, default=5000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage.open(arguments.lake or folder)
        times: list[float] = []
        for number in range(arguments.records):
            began = time.perf_counter()
            append(storage, {"action": "score", "outcome": "ok", "subject": {"cohort": "cxr", "scored": number}})
            times.append(time.perf_counter() - began)
        began = time.perf_counter()
        verdict = verify_chain(storage)
        verified = time.perf_counter() - began
    tenth = max(1, len(times) // 10)
    print(
        json.dumps(
            {
                "records": verdict.head.sequence,
                "intact": not verdict.findings,
                "append_ms_first_tenth": round(1000 * statistics.median(times[:tenth]), 2),
                "append_ms_last_tenth": round(1000 * statistics.median(times[-tenth:]), 2),
                "verify_s": round(verified, 2),
                "verify_records_per_s": round(len(times) / verified),
            }
        )
    )


if __name__ == "__main__":
    main()
