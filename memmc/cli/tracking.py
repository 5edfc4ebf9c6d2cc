"""`memmc tracking`: what the tracking store has not received yet."""

from __future__ import annotations

import typer

from memmc.cli.options import ConfigOption, JsonOption, SetOption, call

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look after what is logged to MLflow.")


@app.callback()
def root() -> None:
    """Hold the verbs below, however few."""


@app.command()
def replay(config: ConfigOption = None, settings: SetOption = None, as_json: JsonOption = False) -> None:
    """Send what runs that are gone logged while the tracking store did not answer; train does it too."""
    from memmc.pipeline.replay import replay as step

    with call(None, config, settings, as_json=as_json) as run:
        result = step(run.config)
        run.finish(
            result,
            lambda: f"{result.sent} values and artifacts sent, {result.refused} refused for good, as of deleted runs",
        )
