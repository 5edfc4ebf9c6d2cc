"""`memmc push`: results back to the archive."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memmc.cli.options import (
    CohortOption,
    ConfigOption,
    DryRunOption,
    JsonOption,
    LakeOption,
    ModelOption,
    SetOption,
    call,
)
from memmc.cli.vault import PrivateKeyOption, given_passphrase

if TYPE_CHECKING:
    from memmc.pipeline.results import PushResult


def push(
    cohort: CohortOption,
    private_key_file: PrivateKeyOption,
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="URI", help="dicomweb+https://..., dicom://AETITLE@host:port or dicom+tls://...; push.uri."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Write the objects there in place of sending them.")
    ] = None,
    uids: Annotated[
        Path | None, typer.Option("--uids", metavar="FILE", help="Pseudonymous UIDs, one a line; else all scored.")
    ] = None,
    only_abnormal: Annotated[
        bool, typer.Option("--only-abnormal", help="Only images whose verdict is abnormal.")
    ] = False,
    model: ModelOption = None,
    dry_run: DryRunOption = False,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send a DICOM report and a heat map of each scored image to the archive, into the study it came from."""
    from memmc.pipeline.maps import read_uids
    from memmc.pipeline.push import push as step
    from memmc.pipeline.vault import read_private_key

    overrides = [*(settings or []), *([f"push.uri={to}"] if to else [])]
    with call(lake, config, overrides, as_json=as_json) as run:
        key = read_private_key(private_key_file, given_passphrase(private_key_file))
        result = step(
            run.config,
            cohort,
            key,
            model,
            uids=read_uids(uids) if uids else None,
            only_abnormal=only_abnormal,
            out=out,
            dry_run=dry_run,
            progress=run.terminal,
        )
        run.finish(result, lambda: summary(result, dry_run=dry_run))
    if result.failed:
        raise typer.Exit(1)


def summary(result: PushResult, *, dry_run: bool) -> str:
    """What went, what was there, and what did not go, with the reason."""
    from memmc.pipeline.push import REASONS

    verb = "would be sent" if dry_run else "sent"
    lines = [
        f"{result.archive}: {result.objects} objects of {result.pushed} images {verb}, {result.present} images there "
        f"already, {result.failed} failed ({result.images} chosen)"
    ]
    lines += [f"  {count:6d}  {reason}: {REASONS[reason]}" for reason, count in sorted(result.reasons.items())]
    return "\n".join(lines)
