"""Model folders as MLflow registry versions: safetensors and JSON, nothing that could run code when loaded."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memmc.errors import IntegrityError, ModelError
from memmc.model.digest import WEIGHTS_FILE, model_digest
from memmc.registry.tracking import Tracking

CHAMPION = "champion"
CHALLENGER = "challenger"
DIGEST_TAG = "memmc.digest"
DESCRIPTION = "model.json"
_ACCEPTED = frozenset({".safetensors", ".json"})
_REFERENCE = re.compile(r"(?:models:/)?(?P<name>[\w.-]+)(?:/(?P<version>\d+)|@(?P<alias>[\w.-]+))?", re.ASCII)


@dataclass(frozen=True)
class ModelVersion:
    """One registered version of a model, or a model folder outside the registry.

    Attributes:
        name: registered model; `local` for a folder.
        version: number within the name; the digest for a folder.
        digest: of the folder's files; empty when the version was registered by other means.
        folder: where the files lie, for a folder outside the registry.
    """

    name: str
    version: str
    digest: str = ""
    run_id: str | None = None
    aliases: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    folder: Path | None = None

    @property
    def ref(self) -> str:
        """`name/version`, as score rows carry it."""
        return f"{self.name}/{self.version}"


def register(
    tracking: Tracking,
    run_id: str,
    folder: Path,
    name: str,
    tags: Mapping[str, str] | None = None,
) -> ModelVersion:
    """Store a model folder as the next version of `name` and point the alias `challenger` at it.

    Args:
        run_id: run that trained it.
        folder: holds model.safetensors and model.json, and no file of another kind.
        name: `memmc-<cohort>`.
        tags: written on the version, beside its digest.

    Raises:
        ModelError: the folder is not a model folder.
        StorageError: the registry cannot be reached.
    """
    check_files(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
    digest = model_digest(folder)
    client = tracking.client
    with tracking.reaching("written"):
        run = client.get_run(run_id)
        logged = client.create_logged_model(
            run.info.experiment_id, name=name, source_run_id=run_id, model_type="safetensors"
        )
        client.log_model_artifacts(logged.model_id, str(folder))
        client.finalize_logged_model(logged.model_id, "READY")
        _create_name(tracking, name)
        created = client.create_model_version(
            name,
            source=logged.model_uri,
            run_id=run_id,
            tags={**(tags or {}), DIGEST_TAG: digest},
            model_id=logged.model_id,
        )
        client.set_registered_model_alias(name, CHALLENGER, str(created.version))
        return _from_mlflow(client.get_model_version(name, str(created.version)))


def registered_before(tracking: Tracking, run_id: str, folder: Path, name: str) -> ModelVersion | None:
    """Return the version of `name` that a run has made of a folder's weights already, as the challenger; else None.

    Descriptions may differ: a run that is gone on with after its end counts a little more time.

    Raises:
        ModelError: the version holds files that are not accepted.
        IntegrityError: its files are not those that were registered.
        StorageError: the registry or its artifacts cannot be reached.
    """
    for version in all_versions(tracking):
        if (version.name, version.run_id) == (name, run_id):
            weights = download(tracking, version) / WEIGHTS_FILE
            if filecmp.cmp(folder / WEIGHTS_FILE, weights, shallow=False):
                with tracking.reaching("written"):
                    tracking.client.set_registered_model_alias(name, CHALLENGER, version.version)
                return version
    return None


def resolve(tracking: Tracking, reference: str | None = None, cohort: str | None = None) -> ModelVersion:
    """Find the model a caller means.

    Args:
        reference: `name/3`, `name@alias`, either with `models:/` before it; a bare name (its champion, else its
            newest version); a model folder; or None, the champion: that of the cohort's own model, else the only one
            there is. Before the first champion the newest version, of the cohort's own model if it has any.
        cohort: that the model is wanted for.

    Raises:
        ModelError: nothing fits, or None may mean several; the message lists what exists.
        StorageError: the registry cannot be reached.
    """
    if reference is not None and (Path(reference) / DESCRIPTION).is_file():
        folder = Path(reference).absolute()
        digest = model_digest(folder)
        return ModelVersion("local", digest, digest=digest, folder=folder)
    versions = all_versions(tracking)
    chosen = _default(versions, cohort) if reference is None else _matching(versions, reference)
    if not chosen:
        wanted = "a model" if reference is None else f"'{reference}'"
        raise ModelError(f"{wanted} is not in the registry {tracking.place}; {_listing(versions)}")
    return chosen[0]


def champion_among(versions: Sequence[ModelVersion], cohort: str | None) -> ModelVersion | None:
    """Return the champion that a cohort is scored with: that of its own model, else the only one there is."""
    champions = [version for version in versions if CHAMPION in version.aliases]
    own = [version for version in champions if version.name == f"memmc-{cohort}"]
    chosen = own or (champions if len(champions) == 1 else [])
    return chosen[0] if chosen else None


def _default(versions: Sequence[ModelVersion], cohort: str | None) -> Sequence[ModelVersion]:
    """Return versions of which the first is meant where none is named; empty without any."""
    champion = champion_among(versions, cohort)
    if champion is not None:
        return [champion]
    champions = sorted(version.ref for version in versions if CHAMPION in version.aliases)
    if champions:
        wanted = "no cohort was named" if cohort is None else f"none is of cohort '{cohort}'"
        raise ModelError(f"{len(champions)} models have a champion and {wanted}: {', '.join(champions)}; name a model")
    return [version for version in versions if version.name == f"memmc-{cohort}"] or versions


def all_versions(tracking: Tracking) -> list[ModelVersion]:
    """Return every version that `register` made, newest first.

    Raises:
        StorageError: the registry cannot be reached.
    """
    client = tracking.client
    found: list[Any] = []
    aliases: dict[tuple[str, str], list[str]] = {}
    with tracking.reaching("read"):
        for page in _pages(client.search_model_versions, filter_string=f"tag.`{DIGEST_TAG}` != ''"):
            found.extend(page)
        for page in _pages(client.search_registered_models):
            for model in page:
                for alias, version in model.aliases.items():
                    aliases.setdefault((model.name, str(version)), []).append(alias)
    found.sort(key=lambda version: (version.creation_timestamp, int(version.version)), reverse=True)
    return [_from_mlflow(version, aliases.get((version.name, str(version.version)), [])) for version in found]


def registered_at(tracking: Tracking, version: ModelVersion) -> datetime | None:
    """Return when a version was registered; None for a model folder.

    Raises:
        StorageError: the registry cannot be reached.
    """
    if version.folder is not None:
        return None
    with tracking.reaching("read"):
        found = tracking.client.get_model_version(version.name, version.version)
    return datetime.fromtimestamp(found.creation_timestamp / 1000, UTC)


def download(tracking: Tracking, version: ModelVersion) -> Path:
    """Return a folder with the version's files, fetched once and checked against its digest.

    Raises:
        ModelError: it holds files other than *.safetensors and *.json.
        IntegrityError: the files are not those that were registered.
        StorageError: the registry or its artifacts cannot be reached.
    """
    if version.folder is not None:
        return version.folder
    kept = tracking.home / "models" / (version.digest or f"{version.name}-{version.version}")
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=kept.parent, prefix=".fetching-"))
        try:
            _fetch(tracking, version, aside)
            _check_digest(aside, version)
            _move(aside, kept)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    else:
        _check_digest(kept, version)
    return kept


def check_files(names: Any) -> None:
    """Refuse anything that is not *.safetensors or *.json in one flat folder.

    Raises:
        ModelError: naming the first file refused.
    """
    for name in sorted(names):
        path = Path(name)
        if path.suffix not in _ACCEPTED or len(path.parts) != 1:
            raise ModelError(f"the model holds '{name}'; only *.safetensors and *.json in one folder are accepted")


def _fetch(tracking: Tracking, version: ModelVersion, target: Path) -> None:
    """List before fetching, so that a refused file is never written here."""
    from mlflow.artifacts import download_artifacts, list_artifacts

    client = tracking.client
    with tracking.reaching("read"):
        uri = client.get_model_version_download_uri(version.name, version.version)
        listed = list_artifacts(uri, tracking_uri=tracking.uri)
    check_files(Path(entry.path).name if not entry.is_dir else f"{entry.path}/" for entry in listed)
    with tracking.reaching("read"):
        for entry in listed:
            name = Path(entry.path).name
            fetched = Path(download_artifacts(f"{uri}/{name}", dst_path=str(target), tracking_uri=tracking.uri))
            if fetched != target / name:
                fetched.replace(target / name)


def _check_digest(folder: Path, version: ModelVersion) -> None:
    found = model_digest(folder)
    if version.digest and found != version.digest:
        raise IntegrityError(
            f"the files of {version.ref} have digest {found}, expected {version.digest}; delete the kept copy "
            f"models/{folder.name} and try again, or register the model anew"
        )


def _move(aside: Path, kept: Path) -> None:
    """Publish by one rename; another process that was faster has put the same bytes there."""
    try:
        os.rename(aside, kept)  # noqa: PTH104 - Path.rename says the same, os.rename is the atomic call meant
    except OSError:
        if not kept.is_dir():
            raise


def _create_name(tracking: Tracking, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        tracking.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _matching(versions: list[ModelVersion], reference: str) -> list[ModelVersion]:
    parsed = _REFERENCE.fullmatch(reference)
    if parsed is None:
        return []
    named = [version for version in versions if version.name == parsed["name"]]
    if parsed["version"]:
        return [version for version in named if version.version == str(int(parsed["version"]))]
    if parsed["alias"]:
        return [version for version in named if parsed["alias"] in version.aliases]
    return [version for version in named if CHAMPION in version.aliases] or named


def _listing(versions: list[ModelVersion]) -> str:
    if not versions:
        return "it holds no model yet: run `memmc train`"
    shown = [version.ref + "".join(f" @{alias}" for alias in version.aliases) for version in versions[:10]]
    more = f" and {len(versions) - 10} more" if len(versions) > 10 else ""
    return f"it holds {', '.join(shown)}{more}"


def _pages(search: Any, **arguments: Any) -> Any:
    page = search(**arguments)
    yield page
    while page.token:
        page = search(page_token=page.token, **arguments)
        yield page


def _from_mlflow(version: Any, aliases: list[str] | None = None) -> ModelVersion:
    return ModelVersion(
        name=version.name,
        version=str(version.version),
        digest=version.tags.get(DIGEST_TAG, ""),
        run_id=version.run_id,
        aliases=tuple(sorted(version.aliases if aliases is None else aliases)),
        tags=dict(version.tags),
    )
