"""`memmc vault`: the keys of the identity vault, and the way back from a pseudonym."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from memmc.cli.options import ConfigOption, JsonOption, SetOption, call
from memmc.errors import UsageError

PASSPHRASE_VARIABLE = "MEMMC_VAULT_PASSPHRASE"

PrivateKeyOption = Annotated[
    Path, typer.Option("--private-key-file", metavar="FILE", help="The key that opens the vault.")
]

app = typer.Typer(no_args_is_help=True, help="Keys of the identity vault, and the way back from pseudonyms.")


@app.command()
def init(
    private_key_file: Annotated[
        Path, typer.Option("--private-key-file", metavar="FILE", help="New file for the key that opens the vault.")
    ] = Path("vault-private.pem"),
    public_key_file: Annotated[
        Path, typer.Option("--public-key-file", metavar="FILE", help="New file for the key that ingest seals to.")
    ] = Path("vault-public.pem"),
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help=f"Lock the private key: {PASSPHRASE_VARIABLE}, or asked for.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make the pair of keys. The private one belongs on another machine than ingest; without it nothing comes back."""
    from memmc.pipeline.vault import make_keys

    with call(None, None, None, as_json=as_json) as run:
        secret = _passphrase(confirm=True) if passphrase else None
        result = make_keys(private_key_file, public_key_file, secret)
        run.finish(
            result,
            lambda: (
                f"{result.public_key_file}: set deid.vault_public_key_file to it, and deid.vault_uri to a place "
                f"outside the lake\n{result.private_key_file}: keep it, and a copy, away from both "
                f"(key {result.vault_key_id})"
            ),
        )


@app.command()
def resolve(
    uids: Annotated[str, typer.Option("--uids", metavar="FILE", help="One sop_instance_uid a line; - for stdin.")],
    private_key_file: PrivateKeyOption,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the originals of pseudonyms as JSON: patient data. Each call leaves a record in the vault's audit trail."""
    from memmc.pipeline.vault import read_private_key
    from memmc.pipeline.vault import resolve as step

    with call(None, config, settings, as_json=as_json) as run:
        key = read_private_key(private_key_file, given_passphrase(private_key_file))
        result = step(run.config, _lines(uids), key)
        run.finish(result, lambda: json.dumps(result.originals, indent=1, ensure_ascii=False))
    if result.missing:
        absent, doubtful = len(result.missing) - len(result.ambiguous), len(result.ambiguous)
        told = [f"{absent} pseudonyms are not in the vault"] if absent else []
        told += [f"{doubtful} are there for other objects than the stored one, or for several"] if doubtful else []
        print(f"memmc: {'; '.join(told)}", file=sys.stderr)
        raise typer.Exit(1)


def _lines(uids: str) -> list[str]:
    try:
        return sys.stdin.read().splitlines() if uids == "-" else Path(uids).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise UsageError("--uids cannot be read; give a text file with one sop_instance_uid a line, or -") from None


def given_passphrase(key_file: Path) -> str | None:
    """Return the passphrase of a private key that has one, from the environment or the terminal."""
    try:
        locked = b"ENCRYPTED" in key_file.read_bytes()[:64]
    except OSError:
        return None  # told where the key is read
    return _passphrase() if locked else None


def _passphrase(*, confirm: bool = False) -> str:
    if secret := os.environ.get(PASSPHRASE_VARIABLE):
        return secret
    if not sys.stdin.isatty():
        raise UsageError(f"the private key needs a passphrase; set {PASSPHRASE_VARIABLE}")
    return typer.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm, err=True)
