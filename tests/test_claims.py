"""The README's tables and figures are those of the CSVs, and a claim's verdict is what its numbers say."""

import csv
import math
import shutil
from pathlib import Path

import claims
import pytest
import reproduce
from PIL import Image

from nano_opd import plots, runs

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "notebooks" / "results"

CLAIMS = [claim for part in claims.CLAIMS.values() for claim in part]
ARMS = {arm for experiment in reproduce.EXPERIMENTS.values() for arm in experiment.arms}


def test_the_readme_says_what_the_results_say():
    readme = (ROOT / "README.md").read_text()
    assert claims.fill(readme, claims.blocks(RESULTS)) == readme, "run python notebooks/claims.py"


def test_the_figures_are_those_of_the_results():
    drawn = claims.figures(RESULTS)
    assert {path.name for path in RESULTS.glob("*.png")} == {*drawn, "scaling.png"}  # which nano_opd.bench draws
    for name, figure in drawn.items():
        assert Image.open(RESULTS / name).text["Digest"] == plots.digest(figure), "run python notebooks/claims.py"
        assert f"(notebooks/results/{name})" in (ROOT / "README.md").read_text()


def test_one_other_number_in_a_csv_is_another_readme_and_another_figure(tmp_path):
    folder = shutil.copytree(RESULTS, tmp_path / "results")
    with open(folder / "opd.csv") as file:
        rows = [*csv.DictReader(file)]
    changed = next(row for row in rows if row["arm"] == "opdplus, jsd, sampled" and row["seed"] == "3")
    changed["accuracy"] = str(float(changed["accuracy"]) + 0.01)  # at the start
    rows[[*map(id, rows)].index(id(changed)) + 1]["kl"] = "7"  # which no table shows
    with open(folder / "opd.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    before, after = (claims.blocks(f) for f in (RESULTS, folder))
    assert {name for name in before if before[name] != after[name]} == {"dense"}
    before, after = (claims.figures(f) for f in (RESULTS, folder))
    differ = {name for name in before if plots.digest(before[name]) != plots.digest(after[name])}
    assert differ == {"collapse.png", "dense.png"}


def test_all_results_are_small_and_of_arms_that_exist():
    assert sum(path.stat().st_size for path in RESULTS.iterdir()) < 1e6
    for name, experiment in reproduce.EXPERIMENTS.items():
        if (RESULTS / f"{name}.csv").exists():
            results = plots.read_results(RESULTS / f"{name}.csv")
            assert set(results) <= set(experiment.arms)
            assert {len(seeds) for seeds in results.values()} == {experiment.seeds}


def test_every_claim_names_arms_columns_and_experiments_that_exist():
    assert len({claim.text for claim in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        assert claim.arms() and set(claim.arms()) <= ARMS, claim
        assert claim.experiments() and claim.column in runs.COLUMNS and claim.expected in (-1, 0, 1), claim
        assert claim.expected or claim.column in claims.MARGIN, claim
        for side in (claim.first, claim.second):
            assert "@" not in str(side) or side.split("@ ")[1] in claims.MOMENTS, claim
    assert set(claims.DENSE.values()) <= ARMS


def seeds(*ends: float, column="accuracy") -> list[list[dict]]:
    """Runs of 8 updates whose column grows with the square of the step, up to its end."""
    return [[{"step": n, "rollouts": 10 * n, column: end * n * n / 64} for n in range(9)] for end in ends]


def test_moments_and_differences():
    results = {"a": seeds(0.64, 0.32), "b": seeds(0.16, 0.16, 0.16)}
    assert claims.Claim("", "a", "b", +1).differences(results) == pytest.approx([0.48, 0.16])
    assert claims.Claim("", "a", 0.1, +1).differences(results) == pytest.approx([0.54, 0.22])
    early = claims.Claim("", "a @ early", "@ start", +1).differences(results)  # steps 1 and 2 of 8
    assert early == pytest.approx([0.025, 0.0125])
    late = claims.Claim("", "a @ late", "b @ end", +1).differences(results)  # steps 7 and 8
    assert late == pytest.approx([0.64 * 113 / 128 - 0.16, 0.32 * 113 / 128 - 0.16])
    norms = {arm: seeds(end, end, column="grad_norm") for arm, end in (("a", 6.0), ("b", 2.0))}
    ratio = claims.Claim("", "a", "b", +1, column="grad_norm")
    assert ratio.differences(norms) == pytest.approx([math.log(3)] * 2)
    assert ratio.size([math.log(3)] * 2) == "× 3 [3, 3]"
    assert claims.Claim("", "a", "c", +1).differences(results) == []


@pytest.mark.parametrize(
    "expected, differences, verdict",
    [
        (+1, [0.30, 0.31, 0.29, 0.30], "seen"),
        (-1, [0.30, 0.31, 0.29, 0.30], "the opposite is seen"),
        (+1, [0.30, -0.31, 0.29, 0.30], "not seen here"),
        (+1, [0.0, 0.0, 0.0, 0.0], "not seen here"),
        (+1, [0.3, 0.3], "not seen here"),  # no spread, and two seeds are too few for a sign test
        (0, [0.001, -0.002, 0.001, 0.0], "seen"),
        (0, [0.10, -0.12, 0.03, 0.0], "no difference seen"),
        (0, [0.30, 0.31, 0.29, 0.30], "not seen here"),
    ],
)
def test_verdicts(expected, differences, verdict):
    claim = claims.Claim("", "a", "b", expected)
    assert claim.verdict(differences, claim.p(differences)) == verdict


def test_p_values_are_corrected_for_the_claims_that_were_run():
    results = {"a": seeds(0.5, 0.6, 0.7), "b": seeds(0.1, 0.25, 0.3)}
    one, missing = claims.Claim("one", "a", "b", +1), claims.Claim("two", "a", "c", +1)
    cells = lambda text: [row.strip("| ").split(" | ") for row in text.splitlines()[2:]]
    alone = cells(claims.claims_table([one, missing], results))
    twice = cells(claims.claims_table([one, one], results))
    p = claims.paired_p(one.differences(results))
    assert alone[0][2] == claims.interval([0.4, 0.35, 0.4]) and alone[0][3] == f"{p:.3f}"
    assert alone[1][4:6] == ["0", "not run"]
    assert twice[0][3] == twice[1][3] == f"{2 * p:.3f}"


def test_rollouts_to_a_level_lie_on_the_line_between_two_evaluations():
    rows = [{"accuracy": a, "rollouts": r} for a, r in ((0.1, 0), (0.4, 100), (0.6, 200), (0.5, 300), (0.9, 400))]
    assert claims.rollouts_to(rows, 0.5) == pytest.approx(150) and claims.rollouts_to(rows, 0.8) == pytest.approx(375)
    assert claims.rollouts_to(rows, 0.1) == 0 and claims.rollouts_to(rows, 0.95) == math.inf


def test_blocks_are_filled_between_their_marks_and_nowhere_else():
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb"
    assert claims.fill(text, {"x": "new"}) == "a\n<!-- x -->\nnew\n<!-- /x -->\nb"
    for broken in ("a", text + text):
        with pytest.raises(ValueError, match="exactly once"):
            claims.fill(broken, {"x": "new"})
