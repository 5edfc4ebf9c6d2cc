"""How a flow meets its caller: parameters that may be shown, errors that come out as they went in.

Prefect's API shows parameters, logs and error texts verbatim. So parameters are
a plain dictionary of settings without credentials, and only errors of
`memmc.errors`, whose texts never hold patient data, are let into Prefect with
their text; the caller in the same process gets the original.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.deadline import time_limit
from flows.embedded import await_server, prepare
from flows.naming import TAG, check_cohort
from flows.progress import Both, PrefectProgress
from memmc.config import Config, load_config
from memmc.errors import GateRefused, IdentityKeyError, MemmcError, StorageError, UsageError
from memmc.pipeline.audit import acting
from memmc.pipeline.custody import adopt, handed_over, holding
from memmc.pipeline.progress import Progress
from memmc.pipeline.results import Result

if TYPE_CHECKING:
    from prefect import Flow

logger = logging.getLogger(__name__)

Overrides = dict[str, dict[str, Any]]
RETRY_DELAYS_S = [2.0, 10.0]
PLACES: Mapping[str, frozenset[str]] = {
    "source": frozenset({"uri", "labels_file", "user", "password_file", "token_file", "ca_file"}),
    "push": frozenset({"uri", "user", "password_file", "token_file", "ca_file"}),
    "deid": frozenset({"key_file"}),
}
"""Settings, by section, that Prefect is not shown: a path may be called after a patient, or lead to a secret."""

_CREDENTIALS = re.compile(r"://[^/@\s]*@")


class StepError(RuntimeError):
    """A step failed in a way nobody foresaw; the text of the original error is withheld."""


@dataclass
class Caller:
    """The caller in the same process, if there is one: a deployed run has none."""

    config: Config
    progress: Progress
    places: Mapping[str, str] = field(default_factory=dict[str, str])
    error: BaseException | None = None
    found: dict[str, Any] | None = None


_CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)


def call_flow(
    flow: Callable[[], Flow[..., dict[str, Any]]],
    parameters: Mapping[str, Any],
    *,
    config: Config,
    home: Path,
    progress: Progress,
    places: Collection[str] = (),
) -> dict[str, Any]:
    """Run a flow in this process and return its result; where a gate has refused, what the flow has kept of it.

    Args:
        flow: gives the flow; called when Prefect may be imported.
        parameters: the flow's parameters but `config`.
        home: the working directory's `.memmc`.
        progress: fed beside Prefect's own progress artifacts.
        places: parameters that name a place which may be called after a patient: Prefect is shown `place_shown`, and
            the task gets the place itself from `given_place`.

    Raises:
        UsageError: a parameter holds credentials, or the cohort's name is none.
        StorageError: the Prefect server cannot be reached.
        MemmcError: what the step raised.
    """
    shown = {**parameters, "config": without(overrides_of(config), PLACES)}
    check_cohort(parameters["cohort"])
    refuse_credentials(shown)
    given = {name: parameters[name] for name in places if parameters.get(name) is not None}
    shown |= {name: place_shown(place) for name, place in given.items()}
    prepare(home)
    progress.stage("prefect")
    await_server()
    caller = Caller(config, progress, given)
    token = _CALLER.set(caller)
    try:
        from prefect import tags

        with tags(TAG):
            return flow()(**shown)
    except Exception as error:  # noqa: BLE001 - the boundary: nothing of Prefect's may hide what the step raised
        failure = caller.error or _explain(error)
    finally:
        _CALLER.reset(token)
    if isinstance(failure, GateRefused) and caller.found is not None:
        return caller.found
    raise failure


def has_caller() -> bool:
    """Say whether somebody in this process called the flow: a deployed run has nobody."""
    return _CALLER.get() is not None


def keep_result(found: dict[str, Any]) -> None:
    """Keep what a flow that may yet be refused has found, for the caller to show."""
    caller = _CALLER.get()
    if caller is not None:
        caller.found = found


def place_shown(place: str) -> str:
    """Return what may be shown of a place: scheme and host or bucket of a URI, nothing of a path."""
    scheme, separator, rest = place.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}" if separator and scheme != "file" else "a local path"


def given_place(name: str, parameter: str) -> str:
    """Return the place itself behind a flow's parameter: the caller's, or of a deployed run the parameter."""
    caller = _CALLER.get()
    return parameter if caller is None else caller.places.get(name, parameter)


def kept_places() -> list[str]:
    """Return the parameters whose places the caller keeps from Prefect."""
    caller = _CALLER.get()
    return [] if caller is None else sorted(caller.places)


def run_step(key: str, config: Overrides | None, step: Callable[[Config, Progress], Result | None]) -> dict[str, Any]:
    """Do one step inside a task: resolve the configuration, show progress, let only shareable errors out.

    Args:
        key: stem of the progress artifacts' keys.
        config: the flow's parameter.
        step: calls the pipeline; its None becomes an empty result.

    Raises:
        MemmcError: as the step raised it, without the chain of errors behind it.
        StepError: for any other error, without its text.
    """
    caller = _CALLER.get()
    try:
        resolved = config_in_force(config)
        adopt(os.environ)
        secret = resolved.deid.key_secret
        # A key in the environment comes before the block, as it comes before a file.
        held = nullcontext() if secret is None or handed_over() is not None else holding(secret_value(secret))
        limit = time_limit(resolved.operate.deadline_minutes)
        with limit, held, _acting_as_deployment(), PrefectProgress(key) as shown:
            result = step(resolved, Both(caller.progress, shown) if caller else shown)
        if caller:
            caller.error = None  # an earlier try's
        return {} if result is None else result.as_dict()
    except Exception as error:  # noqa: BLE001 - the boundary to an API that shows error texts
        if caller:
            caller.error = error
        failure = _shareable(error)
    # Raised here and not above, so that no traceback in Prefect's log leads to the original.
    raise failure


def _acting_as_deployment() -> AbstractContextManager[None]:
    """Let the audit trail name the deployment that runs; nothing is asked of a server where none does."""
    if not os.environ.get("PREFECT__FLOW_RUN_ID"):  # set in the processes that workers start
        return nullcontext()
    import httpx
    from prefect.exceptions import PrefectException
    from prefect.runtime import deployment

    try:
        name = deployment.name
    except (httpx.HTTPError, PrefectException, OSError, RuntimeError):  # a server that restarts ends no step
        name = None
    return acting(str(name), "deployment") if name else nullcontext()


def secret_value(block: str) -> str:
    """Return the value of a Prefect Secret block; it goes to the step in memory, not through a parameter or a result.

    Raises:
        IdentityKeyError: no such block, or it cannot be read.
    """
    from prefect.blocks.system import Secret

    failure = IdentityKeyError(
        "the Prefect Secret block that deid.key_secret names cannot be read; make it with "
        "'prefect block create secret', or check its name"
    )
    try:
        secret = Secret.load(block)
        value = secret.get() if isinstance(secret, Secret) else None
    except Exception:  # noqa: BLE001 - the library's own text may quote the block's document
        raise failure from None
    if not isinstance(value, str):
        raise failure
    return value


def is_transient(_task: Any, _run: Any, state: Any) -> bool:
    """Say whether a failed task is worth another try: only when a place could not be reached."""
    return isinstance(state.data, StorageError)


def overrides_of(config: Config) -> Overrides:
    """Return the settings in which `config` differs from the defaults of preset and scorer, as plain JSON values."""
    chosen = {"train": {"preset": config.train.preset}, "score": {"scorer": config.score.scorer}}
    baseline = Config.model_validate(chosen).model_dump(mode="json")
    tree = config.model_dump(mode="json")
    found = {
        section: {key: value for key, value in fields.items() if value != baseline[section][key]}
        for section, fields in tree.items()
    }
    defaults = Config().model_dump(mode="json")
    for section, fields in chosen.items():
        found[section] |= {key: value for key, value in fields.items() if value != defaults[section][key]}
    return {section: fields for section, fields in found.items() if fields}


def without(overrides: Overrides, keys: Mapping[str, Collection[str]]) -> Overrides:
    """Return settings less some keys, by section; a section left empty goes too."""
    kept = {
        section: {key: value for key, value in fields.items() if key not in keys.get(section, ())}
        for section, fields in overrides.items()
    }
    return {section: fields for section, fields in kept.items() if fields}


def config_of(overrides: Overrides | None) -> Config:
    """Return the configuration of a deployed run: its parameter over the environment over the file MEMMC_CONFIG names.

    Raises:
        ConfigError: unknown key or value out of range.
    """
    return load_config(os.environ.get("MEMMC_CONFIG") or None, os.environ, setting_arguments(overrides or {}))


def config_in_force(overrides: Overrides | None) -> Config:
    """Return the caller's configuration, or that of a deployed run.

    Raises:
        ConfigError: as `config_of`.
    """
    caller = _CALLER.get()
    return config_of(overrides) if caller is None else caller.config


def setting_arguments(overrides: Overrides) -> list[str]:
    """Return settings as `--set` takes them."""
    return [f"{s}.{k}={_text(value)}" for s, fields in overrides.items() for k, value in fields.items()]


def refuse_credentials(parameters: Any) -> None:
    """Refuse URIs with a user or password in them, since Prefect stores and shows parameters.

    Raises:
        UsageError: saying where such values belong.
    """
    if isinstance(parameters, Mapping):
        for value in parameters.values():
            refuse_credentials(value)
    elif isinstance(parameters, str) and _CREDENTIALS.search(parameters):
        raise UsageError(
            "a URI holds a user or password, which Prefect would store and show; put credentials into the environment "
            "(AWS_*, MLFLOW_TRACKING_USERNAME and _PASSWORD, PGPASSWORD), or run without --flow"
        )


def _shareable(error: Exception) -> Exception:
    if isinstance(error, MemmcError):
        return type(error)(str(error))
    if isinstance(error, ConnectionError | TimeoutError):
        return StorageError(f"a connection failed ({type(error).__name__}); check the network and the servers named")
    return StepError(
        f"unexpected {type(error).__name__}; its text is withheld here as it may hold patient data: "
        "it stands in the terminal or log of the process that ran the step"
    )


def _explain(error: Exception) -> Exception:
    """Turn a failure to reach Prefect's server into an error of the tree."""
    import httpx
    from prefect.exceptions import PrefectException

    # RuntimeError is what Prefect raises when its server cannot be reached at the start.
    if isinstance(error, httpx.HTTPError | PrefectException | OSError | RuntimeError):
        failure = StorageError(
            f"the Prefect server failed ({type(error).__name__}); check PREFECT_API_URL and that its server runs, "
            "or run without --flow"
        )
        failure.__cause__ = error
        return failure
    return error


def _text(value: Any) -> str:
    """Write a value as `--set` takes it."""
    if value is None:
        return "none"
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)
