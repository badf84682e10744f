"""What the README says of options, columns, files, tests and commands is so."""

import dataclasses
import re
import shlex
from pathlib import Path

from nano_opd import config, evaluate, plots, runs

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
    commands = re.findall(r"python train\.py([^`#\n]*)", README)
    assert len(commands) > 1
    for command in commands:
        if "--help" not in command:
            assert isinstance(config.parse(shlex.split(command)), config.Config)


def test_the_numbers_are_those_of_the_csv():
    """Each row of the table of results, and the paired difference, recomputed from notebooks/results/opd.csv."""
    results = plots.read_results(ROOT / "notebooks" / "results" / "opd.csv")
    rows = [row for row in table("What you should see") if len(row) == 7]
    assert {re.sub(r"`| \(the default\)", "", row[0]) for row in rows} == set(results)
    for arm, accuracy, seeds, kl, length, norm, _ in rows:
        runs_of_arm = results[re.sub(r"`| \(the default\)", "", arm)]
        ends = [run[-1] for run in runs_of_arm]
        values = [end["accuracy"] for end in ends]
        assert len(runs_of_arm) == 5
        assert accuracy == "{:.3f} [{:.3f}, {:.3f}]".format(*evaluate.mean_interval(values))
        assert seeds == f"{min(values):.3f} … {max(values):.3f}"
        assert kl == f"{sum(end['kl'] for end in ends) / 5:.3f}"
        assert length == f"{sum(end['response_length'] for end in ends) / 5:.1f}"
        norms = [row["grad_norm"] for run in runs_of_arm for row in run[:-1]]
        assert norm == f"{sum(norms) / len(norms):.1f}"
    last = lambda arm: [run[-1]["accuracy"] for run in results[arm]]
    pairs = zip(last("opdplus, reverse_kl, sampled"), last("opd, reverse_kl, sampled"))
    difference = "{:.3f} [{:.3f}, {:.3f}]".format(*evaluate.mean_interval([a - b for a, b in pairs]))
    assert difference.replace("-", "−") in README
