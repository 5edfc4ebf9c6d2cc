"""What the README promises exists: its make targets, verbs and options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import typer.main

from memmc.cli.main import app

ROOT = Path(__file__).parents[2]
MADE = {"make demo", "make test"}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.strip().splitlines()]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{name.split()[1]}:", makefile, re.MULTILINE) for name in MADE)
    assert set(commands()) >= MADE


def test_every_command_parses():
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    ran = 0
    for line in commands():
        words = shlex.split(line)
        if line in MADE:
            continue
        assert words[0] == "memmc"
        command, rest = verbs[words[1]], words[2:]
        while commands_within := getattr(command, "commands", None):
            command, rest = commands_within[rest[0]], rest[1:]
        context = command.make_context(words[1], rest, resilient_parsing=False)
        assert context.params
        ran += 1
    assert ran >= 10
