"""`memmc scan-phi`: does anything of a patient stand anywhere?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memmc.cli.options import ConfigOption, JsonOption, LakeOption, SetOption, call

if TYPE_CHECKING:
    from memmc.pipeline.scan_phi import ScanResult

_LISTED = 20


def scan_phi(
    identifiers: Annotated[
        list[Path] | None,
        typer.Option(
            "--identifiers",
            metavar="FILE",
            help="One value a line, or a .csv, every cell but those of a column 'kind'.",
        ),
    ] = None,
    dicom: Annotated[
        list[Path] | None,
        typer.Option("--dicom", metavar="FOLDER", help="Original objects; what identifies is read from their headers."),
    ] = None,
    path: Annotated[
        list[str] | None,
        typer.Option("--path", metavar="URI", help="Another folder, file or s3:// prefix to search; may be repeated."),
    ] = None,
    prefect_api: Annotated[
        str | None,
        typer.Option("--prefect-api", metavar="URL", help="A running Prefect API; PREFECT_API_URL when absent."),
    ] = None,
    self_test: Annotated[bool, typer.Option("--self-test", help="Only show that planted leaks are found.")] = False,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search lake, logs, Prefect, MLflow and Ray for identifiers in every form. Ends with 1 on a hit; shows none."""
    from memmc.phi.identifiers import Identifiers
    from memmc.pipeline.scan_phi import identifiers_of
    from memmc.pipeline.scan_phi import scan_phi as step

    with call(lake, config, settings, as_json=as_json) as run:
        given = bool(identifiers or dicom)
        run.terminal.stage("identifiers")
        wanted = identifiers_of(identifiers or [], dicom or []) if given or not self_test else Identifiers(())
        result = step(
            run.config,
            wanted,
            paths=path or [],
            prefect_api=prefect_api or os.environ.get("PREFECT_API_URL"),
            everything=not self_test,
            progress=run.terminal,
        )
        run.finish(result, lambda: summary(result))
    if not result.clean:
        raise typer.Exit(1)


def summary(result: ScanResult) -> str:
    """Planes, then hits by place, form and digest."""
    lines = [f"self-test: {result.found} of {result.planted} planted leaks found"]
    if not result.planes:
        return lines[0]
    for name, plane in result.planes.items():
        hits = sum(hit["plane"] == name for hit in result.hits)
        lines.append(f"{name:<12} {plane['files']:7d} files  {plane['bytes'] / 1e6:10.1f} MB  {hits:6d} hits")
    for hit in result.hits[:_LISTED]:
        lines.append(
            f"HIT  {hit['plane']}: {hit['file']} ({hit['inside']}), {hit['encoding']}, "
            f"value {hit['number']} ({hit['identifier']})"
        )
    if result.num_hits > _LISTED:
        lines.append(f"     and {result.num_hits - _LISTED} more; --json lists them")
    notes = (
        (result.skipped_short, "values too short to search for (under 4 characters, numbers under 5 digits)"),
        (result.skipped_generic, "values made of words that ingest itself may write"),
        (result.unread_headers, "originals whose header could not be read"),
        (result.shifted_dates, "shifted dates that happen to equal a date searched for"),
        (result.unread, "files that could not be opened or unpacked: the answer is incomplete"),
    )
    lines += [f"note: {count} {text}" for count, text in notes if count]
    lines.append(f"{result.num_hits} hits of {result.identifiers} identifiers in {result.seconds:.1f} s")
    return "\n".join(lines)
