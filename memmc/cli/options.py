"""Options every verb shares, and how a verb runs: directly, or as its Prefect flow."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TextIO

import typer

from memmc.cli.terminal import Terminal
from memmc.config import Config, load_config
from memmc.pipeline.custody import adopt
from memmc.pipeline.progress_lines import LINES, VARIABLE, ProgressLines
from memmc.pipeline.results import Result

LakeOption = Annotated[
    str | None, typer.Option("--lake", metavar="URI", help="Where the tables live: a folder or s3://bucket/prefix.")
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE.toml", help="Configuration file; that MEMMC_CONFIG names when absent."),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="One setting; may be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
FlowOption = Annotated[
    bool, typer.Option("--flow", help="Run as the Prefect flow; the default when PREFECT_API_URL is set.")
]
CohortOption = Annotated[str, typer.Option("--cohort", metavar="C", help="Name the instances are filed under.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="MODEL", help="name, name/version, name@alias or a model folder; else the cohort's champion."
    ),
]
SinceOption = Annotated[
    str | None,
    typer.Option(
        "--since", metavar="DATE|VERSION", help="Only what was ingested from that day on, or after that table version."
    ),
]
LimitOption = Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="At most so many instances.")]
BoxesOption = Annotated[
    Path | None,
    typer.Option(
        "--boxes",
        metavar="FILE.csv",
        help="Columns sop_instance_uid, x, y, width, height: lesion boxes, px of the original image.",
    ),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


@dataclass(frozen=True)
class Call:
    """One call of a verb: its configuration and how to speak to the caller.

    Attributes:
        out: for the result alone.
    """

    config: Config
    terminal: Terminal | ProgressLines
    as_json: bool
    as_flow: bool
    out: TextIO

    @property
    def home(self) -> Path:
        """The working directory's `.memmc`."""
        from memmc.pipeline.identity import home_directory

        return home_directory()

    def finish(self, result: Result, summary: Callable[[], str]) -> None:
        """Print a step's result, as JSON or for a person."""
        self.say(json.dumps(result.as_dict()) if self.as_json else summary())

    def say(self, text: str, end: str = "\n") -> None:
        """Print a result that is text already."""
        self.terminal.close()
        print(text, end=end, file=self.out)


@contextmanager
def call(
    lake: str | None, config: Path | None, settings: list[str] | None, *, as_json: bool, flow: bool = False
) -> Generator[Call]:
    """Validate the configuration before anything else, then open the terminal.

    What libraries print on the way goes to stderr: Ray prints the warnings of its cluster on stdout.
    """
    overrides = [*(settings or []), *([f"lake.uri={lake}"] if lake else [])]
    adopt(os.environ)
    loaded = load_config(config or os.environ.get("MEMMC_CONFIG") or None, os.environ, overrides)
    out = sys.stdout
    terminal = ProgressLines() if os.environ.get(VARIABLE) == LINES else Terminal(quiet=as_json)
    as_flow = flow or bool(os.environ.get("PREFECT_API_URL"))
    try:
        with redirect_stdout(sys.stderr):
            yield Call(loaded, terminal, as_json, as_flow, out)
    finally:
        terminal.close()


def prepare_flows(run: Call) -> None:
    """Settle where Prefect keeps its state, before anything imports it."""
    from flows.embedded import prepare

    prepare(run.home)
