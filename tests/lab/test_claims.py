"""The READMEs' tables and figures are those of the CSVs, and a claim's verdict is what its numbers say."""

import csv
import math
import re
import shutil
import statistics
from pathlib import Path

import figures
import numpy as np
import pytest
from lab import claims, pages, reproduce
from PIL import Image

from nano_opd.system import config, runs

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "notebooks" / "results"
PAGES = [ROOT / "README.md", ROOT / "notebooks" / "README.md", ROOT / "nano_opd" / "system" / "README.md"]

CLAIMS = [claim for part in claims.CLAIMS.values() for claim in part]
ARMS = {arm for experiment in reproduce.EXPERIMENTS.values() for arm in experiment.arms}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_readmes_say_what_the_results_say(page):
    made = pages.pages(RESULTS)
    assert set(made) == set(PAGES)
    assert made[page] == page.read_text(encoding="utf-8"), "in notebooks/, run python -m lab.pages"


def test_every_block_of_a_readme_is_filled():
    marked = [name for page in PAGES for name in re.findall(r"<!-- (\w[\w ]*) -->", page.read_text(encoding="utf-8"))]
    assert sorted(marked) == sorted(pages.tables(RESULTS))


def test_the_figures_are_those_of_the_results():
    drawn = pages.draw(RESULTS)
    assert {path.name for path in RESULTS.glob("*.png")} == {*drawn, "scaling.png"}  # which lab.speed draws
    for name, figure in drawn.items():
        assert Image.open(RESULTS / name).text["Digest"] == figures.digest(figure), (
            "in notebooks/, run python -m lab.pages"
        )


def test_each_figure_is_linked_where_it_is_explained():
    linked = [re.findall(r"\]\(([\w./]+\.png)\)", page.read_text(encoding="utf-8")) for page in PAGES[:2]]
    assert sorted(linked[0]) == ["notebooks/results/collapse.png", "notebooks/results/flow.png"]
    assert sorted(linked[1]) == ["results/dense.png", "results/rate.png", "results/rlsd.png"]
    for page, links in zip(PAGES, linked):
        assert all((page.parent / link).exists() for link in links)


def test_one_other_number_in_a_csv_is_another_readme_and_another_figure(tmp_path):
    folder = shutil.copytree(RESULTS, tmp_path / "results")
    with open(folder / "opd.csv", encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    changed = next(row for row in rows if row["arm"] == "opdplus, jsd, sampled" and row["seed"] == "3")
    changed["accuracy"] = str(float(changed["accuracy"]) + 0.01)  # at the start
    rows[[*map(id, rows)].index(id(changed)) + 1]["kl"] = "7"  # which no table shows
    with open(folder / "opd.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    before, after = (pages.tables(f) for f in (RESULTS, folder))
    assert {name for name in before if before[name] != after[name]} == {"dense", "methods", "sizes"}
    before, after = (pages.draw(f) for f in (RESULTS, folder))
    differ = {name for name in before if figures.digest(before[name]) != figures.digest(after[name])}
    assert differ == {"collapse.png", "dense.png"}


def test_all_results_are_small_and_of_arms_that_exist():
    assert sum(path.stat().st_size for path in RESULTS.iterdir()) < 2e6
    for name, experiment in reproduce.EXPERIMENTS.items():
        if (RESULTS / f"{name}.csv").exists():
            results = figures.read_results(RESULTS / f"{name}.csv")
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
    assert set(pages.DENSE.values()) <= ARMS


def seeds(*ends: float, column="accuracy") -> list[list[dict]]:
    """Runs of 8 updates whose column grows with the square of the step, up to its end."""
    return [[{"step": n, "rollouts": 10 * n, column: end * n * n / 64} for n in range(9)] for end in ends]


def cells(text: str) -> list[list[str]]:
    """Of a Markdown table, without its head."""
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in text.splitlines()[2:]]


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
        (0, [0.021, 0.022, 0.020, 0.021], "seen: within ± 0.05, though higher"),
        (0, [-0.021, -0.022, -0.020, -0.021], "seen: within ± 0.05, though lower"),
        (0, [0.10, -0.12, 0.03, 0.0], "no difference seen"),
        (0, [0.30, 0.31, 0.29, 0.30], "not seen here: they differ"),
    ],
)
def test_verdicts(expected, differences, verdict):
    claim = claims.Claim("", "a", "b", expected)
    assert claim.verdict(differences, claim.p(differences)) == verdict


def test_a_verdict_says_where_only_the_correction_decides():
    differences = [0.014, 0.011, 0.018, 0.002]
    for expected, which in ((+1, ""), (-1, "the opposite ")):
        claim = claims.Claim("", "a", "b", expected)
        p = claim.p(differences)
        assert 0.01 < p < 0.05
        why = f"not seen here ({which}only before the correction for 12 claims: p = {p:.3f})"
        assert claim.verdict(differences, 12 * p, 12) == why
    norms = claims.Claim("", "a", "b", 0, column="grad_norm")
    assert norms.verdict([0.10, 0.11, 0.10, 0.09], 0.001) == "seen: within a factor 1.5, though higher"


def test_what_the_page_says_of_the_learning_rate():
    results, arms = claims.load(RESULTS), reproduce.rates(("opd",), reproduce.DIVERGENCES[1:3], "", "{}")
    values = lambda note, n, d="": [s[n]["accuracy"] for a in arms if d in a for s in results[a.format(note)]]
    assert f"{statistics.mean(values('', 0)):.2f}" == "0.08"
    assert max(values("", -1)) <= 0.002 and max(values(", clipped", -1)) <= 0.003
    assert min(values(", near", 0)) >= 0.945 and max(values(", near", -1, "forward_kl")) == 0
    near = lambda lr: [seed[-1]["accuracy"] for seed in results[f"opd, jsd, lr={lr}, near"]]
    assert min(near("2e-4")) > 0.94 and min(near("6e-4")) == 0 and max(near("6e-4")) > 0.7
    assert all(max(near(lr)) == 0 for lr in ("2e-3", "6e-3", "2e-2"))


def test_two_accuracies_near_0_say_nothing():
    results = {"a": seeds(0.018, 0.001, 0.003), "b": seeds(0.0, 0.0, 0.001), "c": seeds(0.3, 0.32, 0.31)}
    verdicts = lambda *made: [row[-1] for row in claims.tested(list(made), results)]
    nothing = "**says nothing: both are near 0**"
    assert verdicts(*(claims.Claim("", "a", "b", expected) for expected in (-1, 0, +1))) == [nothing] * 3
    assert verdicts(claims.Claim("", "c", "b", +1)) == ["**seen**"]
    leaks = {arm: seeds(0.018, 0.001, 0.003, column="leak_rate") for arm in "ab"}
    assert claims.tested([claims.Claim("", "a", "b", +1, "", "leak_rate")], leaks)[0][-1] == "**not seen here**"


def test_p_values_are_corrected_for_the_claims_that_were_run():
    results = {"a": seeds(0.5, 0.6, 0.7), "b": seeds(0.1, 0.25, 0.3)}
    one, missing = claims.Claim("one", "a", "b", +1), claims.Claim("two", "a", "c", +1)
    alone = cells(claims.claims_table([one, missing], results))
    twice = cells(claims.claims_table([one, one], results))
    p = claims.paired_p(one.differences(results))
    assert alone[0][2] == claims.interval([0.4, 0.35, 0.4]) and alone[0][3] == f"{p:.3f}"
    assert alone[1][4:6] == ["0", "not run"]
    assert twice[0][3] == twice[1][3] == f"{2 * p:.3f}"


def test_the_short_table_repeats_the_long_ones():
    tables = pages.tables(RESULTS)
    long = {row[0]: row for name in tables if name.startswith("claims") for row in cells(tables[name])}
    for (text, published, here, why), reason in zip(cells(tables["found"]), claims.FOUND.values(), strict=True):
        assert [published, here] == [long[text][1], f"{long[text][2]} {long[text][5]}"]
        assert why == reason and long[text][4] == "5"


def test_the_reasons_in_the_short_table_are_in_the_csvs():
    results = claims.load(RESULTS)
    end = lambda arm, column: [seed[-1][column] for seed in results[arm]]
    mean_end = lambda arm: f"{statistics.mean(end(arm, 'accuracy')):.3f}"
    why = list(claims.FOUND.values())
    reverse_kl = mean_end("opd, reverse_kl, sampled")
    assert f"OPD with reverse KL ends at {reverse_kl}, so at most {1 - float(reverse_kl):.3f}" in why[5]
    assert (
        f"OPSD ends at {mean_end('opsd, work')}, above GRPO's {mean_end('grpo')}" in why[7]
        and f" at {mean_end('opsd, cite')}." in why[7]
    )
    low, *most = sorted(end("opsd", "leak_rate"))
    assert len(most) == 4 and f"in {most[0]} to {most[-1]} of their answers, one in {low}" in why[8]
    search, confirm = (claims.tested(claims.CLAIMS[name], results) for name in ("search", "confirm"))
    assert len(search) == 12 and all(row[-1].startswith("**not seen here") for row in search + confirm)
    assert claims.CLAIMS["confirm"][0].first.startswith("rlsd, sync 50")
    gains = {c.text: statistics.mean(c.differences(results)) for c in claims.CLAIMS["search"]}
    assert max(gains, key=gains.get) == "sync 50"


def test_what_the_prose_says_of_perfect_credit():
    results, why = claims.load(RESULTS), claims.FOUND["RLSD ends above GRPO"]
    end = lambda arm: statistics.mean(seed[-1]["accuracy"] for seed in results[arm])
    gains = {arm: f"{end(arm) - end('grpo'):.3f}" for arm in (*reproduce.ceiling.ARMS, "rlsd")}
    first = gains["blame on the first mistake"]
    oracles = dict(zip((c.text for c in claims.CLAIMS["credit"]), claims.tested(claims.CLAIMS["credit"], results)))
    p = float(oracles["exact A"][1])
    said = f"exact credit adds {gains['exact A']} to GRPO's {end('grpo'):.3f} (p = {p:.2f} after the correction"
    assert said in why
    assert f"all blame on the first mistake {first}; RLSD adds {gains['rlsd']}." in why
    start = statistics.mean(seed[0]["accuracy"] for seed in results["grpo from 120"])
    oracle, ours = (c.size(c.differences(results)) for c in claims.CLAIMS["rare"][:2])
    assert f"({start:.3f} at the start" in why
    assert f"the oracle adds {oracle}, and RLSD {ours}: notebook 04" in why
    assert all(float(gains[arm]) < 0.05 for arm in reproduce.ceiling.ARMS)  # hardly anything to gain
    for arm in ("λ=1, ε_w=1, less its one", "running value"):
        assert end(arm) < end("grpo") - 0.1  # does harm
    *honest, few, most = sorted((seed[-1]["leak_rate"], i) for i, seed in enumerate(results["running value"]))
    losses = [c for c in claims.CLAIMS["credit"] if c.text == "running value"][0].differences(results)
    assert honest[-1][0] < 0.01 and sorted(losses)[:2] == [losses[most[1]], losses[few[1]]]
    notebook = (ROOT / "notebooks" / "04_credit.ipynb").read_text(encoding="utf-8")
    page = " ".join((ROOT / "notebooks" / "README.md").read_text(encoding="utf-8").split())
    assert f"two of five seeds learn to cite, in {few[0]:.2f} and {most[0]:.2f} of their answers" in page
    assert f"end {-losses[few[1]]:.2f} and {-losses[most[1]]:.2f} below GRPO" in notebook
    oracle, end = (
        np.mean([[row["accuracy"] for row in seed] for seed in results[arm]], 0)
        for arm in ("exact A from 120", "grpo from 120")
    )
    n = int(np.argmax(oracle >= end[-1]))
    reached = (n - 1 + (end[-1] - oracle[n - 1]) / (oracle[n] - oracle[n - 1])) / (len(oracle) - 1)
    assert f"{reached:.2f} of its rollouts" in (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    assert reproduce.EXPERIMENTS["credit_rare"].seeds == 8 and reproduce.EXPERIMENTS["credit_rare"].first_seed == 5


def test_what_the_prose_says_of_grpo_and_of_evaluations():
    results = claims.load(RESULTS)
    claim = next(claim for claim in CLAIMS if "beats GRPO" in claim.text)
    start = statistics.mean(seed[0]["accuracy"] for seed in results[claims.SPARSE])
    assert f"starts at {start:.2f} here" in claim.text
    cfg = config.parse(reproduce.EXPERIMENTS["baselines"].arms[claims.SPARSE].split())
    assert (cfg.student_steps, cfg.lr) == (210, 4e-4)
    assert "with 210 warm-start updates and lr 4e-4" in claim.text
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    cites = lambda arm: statistics.mean(seed[-1]["leak_rate"] for seed in results[arm])
    end = lambda arm: statistics.mean(seed[-1]["accuracy"] for seed in results[arm])
    assert f"OPSD ends at {end('opsd, cite'):.3f} and cites in {cites('opsd, cite'):.3f} of its answers" in readme
    assert f"RLSD at {end('rlsd, cite'):.3f} and cites in {cites('rlsd, cite'):.3f}" in readme
    assert "--eval-size 250" in reproduce.EVALUATION  # four times as many at the start and at the end


def test_what_the_prose_says_of_gamma_and_of_the_other_divergences():
    results = claims.load(RESULTS)
    page, readme = (
        " ".join((ROOT / p).read_text(encoding="utf-8").split()) for p in ("notebooks/README.md", "README.md")
    )
    of = lambda column, arm, n: statistics.mean(seed[n][column] for seed in results[arm])
    J = lambda arm, n: statistics.mean(seed[n]["kl"] * seed[n]["response_length"] for seed in results[arm])  # Σ_n KL
    for arm in ("opd, reverse_kl, γ=1", "opdplus, reverse_kl, γ=1"):
        assert results[arm][0][1]["step"] == 25 and [round(J(arm, n)) for n in (0, -1, 1)] == [14, 14, 22]
    slow = "opdplus, reverse_kl, γ=1, lr=5e-4"
    of_J = [J(slow, n) for n in (0, -1)]
    rise = "from {:.3f} to {:.3f}".format(*(of("accuracy", slow, n) for n in (0, -1)))
    assert f"OPD+ rises {rise}, and J" in page and "falls from {:.1f} nats to {:.1f}.".format(*of_J) in page
    assert "it is 14 nats at the start and at the end" in page and "to 22 nats after 25 updates" in page
    assert J("opdplus, jsd, γ=0.5", -1) < 0.3  # near 0 where the student is near the teacher
    lengths = [seed[-1]["response_length"] for arm in results if arm.endswith("γ=1") for seed in results[arm]]
    assert "shrink to one to four tokens" in page and 1 <= min(lengths) and 3.5 < max(lengths) < 4
    of_chi2 = [f"opdplus, {chi2}_chi2, sampled" for chi2 in ("pearson", "neyman")]
    assert all(seed[-1]["accuracy"] < 0.02 < seed[0]["accuracy"] for arm in of_chi2 for seed in results[arm])
    norms = {row[1]: row[7] for row in cells(pages.arms_table(results))}
    assert [norms[arm] for arm in of_chi2] == ["1.22e+04", "1.76e+07"] and norms["opdplus, jsd, sampled"] == "4.27"
    assert "its gradient norm is 1.2e4 and 1.8e7, against 4 under" in page
    start, end = (of("accuracy", "opd, tv,c=-0.5", n) for n in (0, -1))
    assert f"there OPD falls from {start:.3f} to {end:.3f}" in readme
    assert all(seed[-1]["accuracy"] < seed[0]["accuracy"] for seed in results["opd, tv,c=-0.5"])


def test_what_the_prose_says_of_noise():
    results = claims.load(RESULTS)
    page, concepts = (
        " ".join((ROOT / p / "README.md").read_text(encoding="utf-8").split()) for p in ("notebooks", "nano_opd")
    )
    ends = lambda arm: sorted(seed[-1]["accuracy"] for seed in results[arm])
    few, many = ends("grpo, lr=2e-3"), ends("grpo, lr=2e-3, B=512")
    assert f"At 2e-3 GRPO ends at {few[0]:.3f} to {few[-1]:.3f} with 64 responses to an update" in page
    assert f"and at {many[0]:.3f} to {many[-1]:.3f} with 512 (five seeds)" in page
    assert few[-1] < 0.06 and many[0] > 0.8 and "below 0.06 with 64 responses to an update, and above 0.8" in concepts
    assert ends("grpo, lr=5e-3")[-1] <= 0.001 and [end < 0.01 for end in ends("grpo, lr=5e-3, B=512")].count(True) == 3
    for arm in ("grpo, lr=4e-4", "grpo, lr=1e-3"):
        assert all(seed[-1]["accuracy"] > seed[0]["accuracy"] for seed in results[arm])
    starts = sorted(seed[0]["accuracy"] for seed in results["grpo, lr=5e-3"])
    assert f"right {starts[0]:.2f} to {starts[-1]:.2f} of the time to 0.000 within 25 updates (five seeds)" in concepts
    assert all(seed[1]["step"] == 25 and seed[1]["accuracy"] < 0.0005 for seed in results["grpo, lr=5e-3"])


def test_every_method_of_the_table_of_sizes_ends_above_its_start():
    results = claims.load(RESULTS)
    for task in reproduce.TASKS:
        for arm in reproduce.EXPERIMENTS[f"sizes_{task}"].arms:
            assert len(results[arm]) == 3 and all(
                seed[-1]["accuracy"] > seed[0]["accuracy"] for seed in results[arm]
            ), arm
    assert statistics.mean(seed[-1]["accuracy"] for seed in results["opdplus, mix 3"]) > 0.9


def test_the_seeds_that_leak_are_counted():
    results = {"opsd": seeds(0.1, 0.3, 0.4, column="leak_rate"), "grpo": seeds(0.0, 0.2, column="leak_rate")}
    said = claims.leaks(results)
    assert "0 of 2 under `grpo`, 2 of 3 under `opsd`" in said and "rlsd" not in said


def test_rollouts_to_a_level_lie_on_the_line_between_two_evaluations():
    rows = [{"accuracy": a, "rollouts": r} for a, r in ((0.1, 0), (0.4, 100), (0.6, 200), (0.5, 300), (0.9, 400))]
    assert pages.rollouts_to(rows, 0.5) == pytest.approx(150) and pages.rollouts_to(rows, 0.8) == pytest.approx(375)
    assert pages.rollouts_to(rows, 0.1) == 0 and pages.rollouts_to(rows, 0.95) == math.inf


def test_blocks_are_filled_between_their_marks_and_nowhere_else():
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb"
    assert pages.fill(text, {"x": "new"}) == "a\n<!-- x -->\nnew\n<!-- /x -->\nb"
    for broken in ("a", text + text):
        with pytest.raises(ValueError, match="exactly once"):
            pages.fill(broken, {"x": "new"})


def test_what_the_readme_says_one_sees_is_in_the_results():
    readme, results = (ROOT / "README.md").read_text(encoding="utf-8"), claims.load(RESULTS)
    key = lambda arguments: config.parse([*arguments, "--eval-every", "25", "--eval-size", "250"]).run_key()
    from_0 = [e for e in reproduce.EXPERIMENTS.values() if e.first_seed == 0]
    of_methods = [(e, arm) for e in from_0 for arm in e.arms if arm not in reproduce.ceiling.ARMS]
    arms = {str(key(f"{e.common} {e.arms[arm]}".split())): arm for e, arm in of_methods}
    commands = cells(readme.split("## Commands to try\n\n")[1].split("\n\n")[0])
    assert len(commands) == 7
    for _, command, accuracy, _ in commands:
        seeds = results[arms[str(key(command.strip("`").split()[2:]))]]
        assert accuracy == pages.change(seeds) and len(seeds) == 5
    starts = [seed[0]["accuracy"] for seed in results["opd, jsd, sampled"]]
    assert f"from {min(starts):.2f} to {max(starts):.2f} say" in readme
    assert all(seed[-1]["leak_rate"] < 0.01 for arm in ("grpo", "rlsd") for seed in results[arm])
    for d, arm in (("OPD then", "opd, jsd_falling"), ("OPD+", "opdplus, jsd, sampled")):
        end = claims.interval([seed[-1]["accuracy"] for seed in results[arm]])
        assert re.search(re.escape(f"{d} ends at {end}" if "then" in d else f"{d} at {end}"), readme)
    assert all(seed[-1]["accuracy"] == 0 for seed in results["opd, jsd, sampled"])
    swept = lambda m, *note: [s for a in reproduce.rates((m,), reproduce.DIVERGENCES[1:3], *note) for s in results[a]]
    of_opd = swept("opd") + swept("opd", "", ", clipped")
    assert len(of_opd) == 60 and f"OPD ends at {max(s[-1]['accuracy'] for s in of_opd):.3f} or below" in readme
    assert f"in {sum(s[-1]['accuracy'] > s[0]['accuracy'] for s in swept('opdplus'))} of 30 runs" in readme
    begins = [
        next((row["step"] for row in seed if row["leak_rate"] > 0.1), None) for seed in results["opsd"]
    ]  # of answers that cite
    assert begins.count(None) == 1 and all(75 <= step <= 125 for step in begins if step)
    assert "in four of five seeds, from about 100 updates on" in readme
