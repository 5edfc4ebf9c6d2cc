"""Read the settings from their sources and check them once."""

from __future__ import annotations

import difflib
import json
import tomllib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from memmc.config.section import Section
from memmc.config.tree import Config
from memmc.errors import ConfigError

ENV_PREFIX = "MEMMC_"


def load_config(
    file: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    overrides: Iterable[str] = (),
) -> Config:
    """Merge the sources and validate them once.

    Args:
        file: TOML file, or None.
        env: environment; only names that start with ``MEMMC_`` and hold ``__`` are read.
        overrides: ``section.key=value`` strings, strongest.

    Raises:
        ConfigError: unreadable file, unknown key (the nearest valid one is named), value out of range.
    """
    tree: dict[str, dict[str, Any]] = {}
    if file is not None:
        for section, fields in _read_toml(Path(file)).items():
            if not isinstance(fields, dict):
                raise ConfigError(
                    f"configuration file: '{section}' stands outside a section; write [section] key = value"
                )
            for key, value in fields.items():
                _place(tree, f"{section}.{key}", value)
    for name, value in sorted((env or {}).items()):
        if name.startswith(ENV_PREFIX) and "__" in name:
            section, _, key = name[len(ENV_PREFIX) :].lower().partition("__")
            _place(tree, f"{section}.{key}", value)
    for item in overrides:
        path, separator, value = item.partition("=")
        if not separator:
            raise ConfigError(f"--set {path}: expected section.key=value")
        _place(tree, path.strip(), value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"configuration file cannot be read ({error.strerror}); check --config or MEMMC_CONFIG"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"configuration file is not TOML: {error}") from None


def _place(tree: dict[str, dict[str, Any]], path: str, value: Any) -> None:
    section, _, key = path.partition(".")
    annotation = Config.model_fields.get(section)
    valid = [f"{s}.{k}" for s, f in Config.model_fields.items() for k in _fields_of(f.annotation)]
    if annotation is None or key not in _fields_of(annotation.annotation):
        near = difflib.get_close_matches(path, valid, n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else f"; sections are {', '.join(Config.model_fields)}"
        raise ConfigError(f"unknown configuration key '{path}'{hint}")
    if isinstance(value, str):
        value = _parse(value, annotation.annotation.model_fields[key].annotation)  # type: ignore[union-attr]
    tree.setdefault(section, {})[key] = value


def _parse(text: str, annotation: Any) -> Any:
    """Turn the text of an environment variable or --set into what the field's type is validated from."""
    accepted = typing.get_args(annotation) or (annotation,)
    if type(None) in accepted and text.strip().lower() in {"none", "null", ""}:
        return None
    if typing.get_origin(annotation) is tuple:
        return [part.strip() for part in text.split(",") if part.strip()]
    if str in accepted or all(isinstance(item, str) for item in accepted):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _fields_of(annotation: Any) -> list[str]:
    return list(annotation.model_fields) if isinstance(annotation, type) and issubclass(annotation, Section) else []


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "configuration"
        lines.append(f"{where}: {item['msg']}")
    return "; ".join(lines)
