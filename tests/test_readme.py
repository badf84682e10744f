"""What the README says of options, columns, files, tests and commands is so."""

import dataclasses
import re
import shlex
from pathlib import Path

from nano_opd import config, runs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def table(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def test_the_option_table_is_the_configuration():
    said = {row[0].strip("`"): row[1].strip("`") for row in table("Options of train.py")}
    fields = dataclasses.fields(config.Config)
    assert said == {"--" + f.name.replace("_", "-"): "off" if f.default is False else str(f.default) for f in fields}


def test_the_glossary_has_every_column():
    assert [row[0].strip("`") for row in table("What a run leaves")] == runs.COLUMNS


def test_every_file_of_the_package_is_on_the_map():
    named = {name.split("/")[-1] for row in table("Reading map") for name in re.findall(r"`([\w/]+\.py)`", row[0])}
    assert named == {p.name for p in (ROOT / "nano_opd").glob("*.py") if p.stem != "__init__"} | {"train.py"}


def test_every_test_named_exists():
    tests = "\n".join(p.read_text() for p in (ROOT / "tests").glob("*.py"))
    names = set(re.findall(r"`(test_\w+)`", README))
    assert len(names) > 5 and all(f"def {name}(" in tests for name in names)


def test_every_command_parses():
    commands = re.findall(r"python train\.py((?: +--?[\w-]+(?: +[\w.=]+)?)*)", README)
    assert len(commands) > 1
    for command in commands:
        if "--help" not in command:
            assert isinstance(config.parse(shlex.split(command)), config.Config)
