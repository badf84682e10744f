"""What the papers claim, and what the runs of reproduce.py say of it; pages.py puts it into the READMEs.

notebooks/README.md says how a claim is tested and what each verdict means.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import figures
from figures import Results, Rows
from intervals import mean_interval
from lab import ceiling, reproduce
from lab.seeds import equivalence_p, holm, paired_p

MARGIN = {"accuracy": (0.05, "± 0.05"), "grad_norm": (math.log(1.5), "a factor 1.5")}  # within it two are the same
NEAR_0 = 0.02  # two accuracies below it cannot show a difference


def mean_of(rows: Rows, column: str) -> float:
    """Mean of a column over the rows; NaN where nothing was measured."""
    values = [row[column] for row in rows if row[column] is not None]
    return sum(values) / len(values) if values else math.nan


def part_of_run(rows: Rows, begin: float, end: float) -> Rows:
    """The rows after the part `begin` of the run, 0 to 1, and up to the part `end`."""
    last = rows[-1]["step"] or 1
    return [row for row in rows if begin < row["step"] / last <= end]


def at_start(rows: Rows, column: str) -> float:
    return rows[0][column]


def at_end(rows: Rows, column: str) -> float:
    return rows[-1][column]


def early(rows: Rows, column: str) -> float:
    """The mean over the first quarter of the run, its start left out."""
    return mean_of(part_of_run(rows, 0.0, 0.25), column)


def late(rows: Rows, column: str) -> float:
    """The mean over the last quarter."""
    return mean_of(part_of_run(rows, 0.75, 1.0), column)


MOMENTS: dict[str, Callable[[Rows, str], float]] = {
    "start": at_start,
    "early": early,
    "late": late,
    "end": at_end,
    "training": mean_of,
}


@dataclass(frozen=True)
class Claim:
    """first − second has the sign `expected` (+1 or −1), or is 0 within the margin.

    first, second  "arm @ moment", or "arm", its end; the second may be another "@ moment" of the first, or a number
    published      what the paper or its replication reports
    column         of the CSVs; gradient norms are means over training and compared by their ratio
    """

    text: str
    first: str
    second: str | float
    expected: int
    published: str = ""
    column: str = "accuracy"

    def arms(self) -> list[str]:
        """The arms that are compared."""
        sides = [self.first]
        if isinstance(self.second, str):
            sides.append(self.second)
        names = [side.split("@")[0].strip() for side in sides]
        return [name for name in names if name]

    def sides(self, results: Results) -> list[list[float]]:
        """Both sides, one value per seed; log gradient norms. Empty lists where an arm has not been run."""
        if any(arm not in results for arm in self.arms()):
            return [[], []]
        return [self._values(self.first, results), self._values(self.second, results)]

    def _values(self, side: str | float, results: Results) -> list[float]:
        first_arm = self.arms()[0]
        if not isinstance(side, str):
            return [side] * len(results[first_arm])
        arm, _, moment = side.partition("@")
        arm = arm.strip() or first_arm
        moment = moment.strip() or self.usual_moment
        values = [MOMENTS[moment](rows, self.column) for rows in results[arm]]
        if self.column == "grad_norm":
            return [math.log(value) for value in values]
        return values

    @property
    def usual_moment(self) -> str:
        """Where an arm is measured that names no moment."""
        return "training" if self.column == "grad_norm" else "end"

    def differences(self, results: Results) -> list[float]:
        """One per seed that both sides have."""
        first, second = self.sides(results)
        return [a - b for a, b in zip(first, second)]

    def p(self, differences: list[float]) -> float:
        """The p-value before correction."""
        if self.expected:
            return paired_p(differences)
        margin, _ = MARGIN[self.column]
        return equivalence_p(differences, margin)

    def verdict(self, differences: list[float], p: float, tests: int = 1) -> str:
        """In words, from the p-value corrected for so many tests; explains an interval that seems to contradict it."""
        if self.expected == 0:
            return self._verdict_of_equality(differences, p)
        mean, _, _ = mean_interval(differences)
        as_claimed = mean * self.expected > 0
        if p < 0.05:
            return "seen" if as_claimed else "the opposite is seen"
        alone = self.p(differences)
        if alone >= 0.05:
            return "not seen here"
        which = "" if as_claimed else "the opposite "
        return f"not seen here ({which}only before the correction for {tests} claims: p = {alone:.3f})"

    def _verdict_of_equality(self, differences: list[float], p: float) -> str:
        mean, low, high = mean_interval(differences)
        excludes_0 = not low <= 0 <= high
        if p >= 0.05:
            return "not seen here: they differ" if excludes_0 else "no difference seen"
        if not excludes_0:
            return "seen"
        _, margin = MARGIN[self.column]
        return f"seen: within {margin}, though {'higher' if mean > 0 else 'lower'}"

    def size(self, differences: list[float]) -> str:
        """Mean and interval; of log ratios, as ratios."""
        if self.column == "grad_norm":
            mean, low, high = mean_interval(differences)
            return f"× {math.exp(mean):.3g} [{math.exp(low):.3g}, {math.exp(high):.3g}]"
        return interval(differences, digits=1 if self.column == "response_length" else 3)

    def experiments(self) -> str:
        """The experiments that make its arms, in Markdown."""
        names = []
        for name, experiment in reproduce.EXPERIMENTS.items():
            if any(arm in experiment.arms for arm in self.arms()):
                names.append(f"`{name}`")
        return " ".join(names)


def above(text: str, first: str, second: str | float, published: str = "", column: str = "accuracy") -> Claim:
    """Claim that the first is larger."""
    return Claim(text, first, second, expected=+1, published=published, column=column)


def below(text: str, first: str, second: str | float, published: str = "", column: str = "accuracy") -> Claim:
    """Claim that the first is smaller."""
    return Claim(text, first, second, expected=-1, published=published, column=column)


def equal(text: str, first: str, second: str | float, published: str = "", column: str = "accuracy") -> Claim:
    """Claim that both are the same within the margin."""
    return Claim(text, first, second, expected=0, published=published, column=column)


def opd(divergence: str, variance: str = "sampled") -> str:
    """The arm of OPD."""
    return f"opd, {divergence}, {variance}"


def opdplus(divergence: str, variance: str = "sampled") -> str:
    """The arm of OPD+."""
    return f"opdplus, {divergence}, {variance}"


SPARSE = "grpo, 400 × 128"
BASELINE = "opdplus, jsd, baseline"
CLAIMS = {
    "opdplus": [
        equal(
            "reverse KL: the correction changes nothing",
            opdplus("reverse_kl"),
            opd("reverse_kl"),
            published="0.473 − 0.494",
        ),
        below("forward KL: OPD collapses below its start", opd("forward_kl"), "@ start", published="0.039 − 0.331"),
        above(
            "forward KL: OPD+ rescues it (OPD+ − OPD)",
            opdplus("forward_kl"),
            opd("forward_kl"),
            published="0.450 − 0.039",
        ),
        below("JSD: OPD collapses below its start", opd("jsd"), "@ start", published="0.134 − 0.331"),
        above("JSD: OPD+ rescues it (OPD+ − OPD)", opdplus("jsd"), opd("jsd"), published="0.460 − 0.134"),
        above(
            "OPD+ with forward KL beats OPD with reverse KL",
            opdplus("forward_kl"),
            opd("reverse_kl"),
            published="0.450 − 0.494",
        ),
        above("OPD+ with JSD beats OPD with reverse KL", opdplus("jsd"), opd("reverse_kl"), published="0.460 − 0.494"),
        above(
            "OPD+ with JSD beats GRPO (which starts at 0.45 here, with 210 warm-start updates and lr 4e-4)",
            opdplus("jsd"),
            SPARSE,
            published="0.460 − 0.404",
        ),
        equal(
            "gradient norm OPD : OPD+, reverse KL: the same",
            opd("reverse_kl"),
            opdplus("reverse_kl"),
            published="15.4 : 18.0 = 0.86",
            column="grad_norm",
        ),
        above(
            "gradient norm OPD : OPD+, forward KL: larger",
            opd("forward_kl"),
            opdplus("forward_kl"),
            published="1942 : 13.8 = 141",
            column="grad_norm",
        ),
        above(
            "gradient norm OPD : OPD+, JSD: larger",
            opd("jsd"),
            opdplus("jsd"),
            published="92.7 : 1.25 = 74",
            column="grad_norm",
        ),
        above(
            "OPD, forward KL: KL to the teacher rises",
            opd("forward_kl"),
            "@ start",
            published="0.90 → 1.55",
            column="kl",
        ),
        above("OPD, JSD: KL to the teacher rises", opd("jsd"), "@ start", published="0.90 → 1.35", column="kl"),
        below(
            "OPD+, forward KL: KL to the teacher falls",
            opdplus("forward_kl"),
            "@ start",
            published="0.90 → 0.50",
            column="kl",
        ),
        below("OPD+, JSD: KL to the teacher falls", opdplus("jsd"), "@ start", published="0.90 → 0.50", column="kl"),
        above("OPD, forward KL: more responses run to the cap", opd("forward_kl"), "@ start", column="truncated"),
        above(
            "OPD, forward KL: responses grow (tokens)",
            opd("forward_kl"),
            "@ start",
            published="169 → 287",
            column="response_length",
        ),
        below(
            "OPD, JSD: responses shrink (tokens)", opd("jsd"), "@ start", published="148 → 75", column="response_length"
        ),
    ],
    "rlsd": [
        above("OPSD rises early (first quarter − start)", "opsd @ early", "@ start", published="yes"),
        below("OPSD then degrades (last − first quarter)", "opsd @ late", "@ early", published="yes"),
        below("OPSD ends below its start (published: above it)", "opsd", "@ start", published="52.49 − 51.49"),
        below("OPSD ends below GRPO", "opsd", "grpo", published="52.49 − 53.86"),
        below("GRPO + OPSD ends below GRPO", "grpo+opsd", "grpo", published="52.91 − 53.86"),
        above("RLSD ends above GRPO", "rlsd", "grpo", published="56.18 − 53.86"),
        above("RLSD ends above OPSD", "rlsd", "opsd", published="56.18 − 52.49"),
        above("RLSD needs the right reference (RLSD − shuffled)", "rlsd", "rlsd, shuffled"),
        above("OPSD leaks (citing answers − 0.2)", "opsd", 0.2, published="yes", column="leak_rate"),
        above("OPSD leaks more than GRPO", "opsd", "grpo", published="yes", column="leak_rate"),
        below("GRPO does not leak (citing answers − 0.01)", "grpo", 0.01, published="yes", column="leak_rate"),
        below("RLSD does not leak (citing answers − 0.01)", "rlsd", 0.01, published="yes", column="leak_rate"),
        above("a wide clip leaks (ε_w = 10 − 0.2, λ = 1)", "λ=1, ε_w=10", "λ=1, ε_w=0.2", column="leak_rate"),
        below(
            "always the work reference: OPSD does not leak (− 0.01)",
            "opsd, work",
            0.01,
            published="I = 0",
            column="leak_rate",
        ),
        above("always the work reference: OPSD ends higher for it", "opsd, work", "opsd"),
        below(
            "always the cite reference: OPSD does not leak (− 0.01)",
            "opsd, cite",
            0.01,
            published="I = 0",
            column="leak_rate",
        ),
        below("always the cite reference: OPSD ends below its start", "opsd, cite", "@ start"),
        below("always the cite reference: RLSD does not leak (− 0.01)", "rlsd, cite", 0.01, column="leak_rate"),
        above(
            "RLSD's published schedule ends above GRPO, G = 8",
            "rlsd, published",
            "grpo, G=8",
            published="56.18 − 53.86",
        ),
        below(
            "RLSD's entropy ends below GRPO's (2606.04036)",
            "rlsd",
            "grpo",
            published="collapses late",
            column="entropy",
        ),
    ],
    # derived in this project, or asked by it
    "beyond": [
        *(above(f"{name}: OPD+ ends above OPD", opdplus(name), opd(name)) for name in reproduce.DIVERGENCES[3:]),
        equal("jsd in its falling generator: OPD ends where OPD+ does", "opd, jsd_falling", opdplus("jsd")),
        below("jsd with c = −¼, right only near the teacher: OPD collapses", "opd, jsd,c=-0.25", "@ start"),
        above("hellinger in its falling generator: OPD ends higher for it", "opd, hellinger,c=-1", opd("hellinger")),
        above("tv in its falling generator: OPD ends higher for it", "opd, tv,c=-0.5", opd("tv")),
        *(
            above(
                f"{name}, full vocabulary, no action noise: OPD+ ends above OPD",
                opdplus(name, "full"),
                opd(name, "full"),
            )
            for name in ("forward_kl", "jsd")
        ),
        below("the control without a teacher, all noise: it falls below its start", "null", "@ start"),
        above("JSD: a top k of 4 and a sampled tail end above the sampled token", "opdplus, jsd, topk", opdplus("jsd")),
        below("JSD: they lower the gradient norm", "opdplus, jsd, topk", opdplus("jsd"), column="grad_norm"),
        below("JSD: the exact baseline lowers the gradient norm", BASELINE, opdplus("jsd"), column="grad_norm"),
        equal(
            "γ = 1, reverse KL: the correction changes nothing", opdplus("reverse_kl", "γ=1"), opd("reverse_kl", "γ=1")
        ),
        below("γ = ½ costs accuracy against γ = 0", "opdplus, jsd, γ=0.5", opdplus("jsd")),
        below("γ = 1 costs accuracy against γ = 0", "opdplus, jsd, γ=1", opdplus("jsd")),
    ],
    # what falls at a large rate though its mean gradient is right: is it noise?
    "noise": [
        below("GRPO, lr 2e-3, 64 responses an update: it falls below its start", "grpo, lr=2e-3", "@ start"),
        above("GRPO, lr 2e-3, 512 responses an update: it rises", "grpo, lr=2e-3, B=512", "@ start"),
        above("GRPO, lr 5e-3, 512 responses an update: it rises", "grpo, lr=5e-3, B=512", "@ start"),
        below("γ = 1, reverse KL, lr 5e-3: OPD+ falls below its start", "opdplus, reverse_kl, γ=1", "@ start"),
        above("γ = 1, reverse KL, lr 5e-4: OPD+ rises", "opdplus, reverse_kl, γ=1, lr=5e-4", "@ start"),
    ],
    # settings in which token-level credit might matter: RLSD − GRPO, all else the same
    "search": [
        *(above(name, f"rlsd, {name}", f"grpo, {name}") for name in ("add 5", "mul 3", "mix 3")),
        *(above(name, f"rlsd, {name}", "grpo") for name in reproduce.RLSD_ONLY),
        *(above(name, name, "grpo") for name in reproduce.EXPERIMENTS["rlsd_clip"].arms),
        above("λ=1, ε_w=10, worked reference", "λ=1, ε_w=10, work", "grpo"),
    ],
    # what an oracle's credit brings: the arm − GRPO with the same rollouts, and the floor
    "credit": [
        *(above(name, name, "grpo") for name in ceiling.ARMS),
        above("exact A, mean over training", "exact A @ training", "grpo @ training"),
        above("RLSD's weights − the same weights dealt anew", "rlsd", "weights dealt anew"),
    ],
    # the same from a start that is right in about one answer of twenty, on fresh seeds
    "rare": [
        above("exact A − GRPO", "exact A from 120", "grpo from 120"),
        above("RLSD − GRPO", "rlsd, λ=1, ε_w=1 from 120", "grpo from 120"),
        below("RLSD − exact A", "rlsd, λ=1, ε_w=1 from 120", "exact A from 120"),
        above("GRPO − its start", "grpo from 120", "@ start"),
    ],
    # the largest of them, tested once on seeds that had no part in finding it
    "confirm": [above("sync 50, fresh seeds", "rlsd, sync 50, fresh seeds", "grpo, fresh seeds")],
}
# The rows of README.md's table, and why a result differs from the published one, as far as the CSVs show it.
FOUND = {
    "reverse KL: the correction changes nothing": "The −1 of ln u − 1 changes no mean, but adds variance: 12.3 against "
    "3.2 in the enumerated world of notebook 01.",
    "forward KL: OPD collapses below its start": "",
    "forward KL: OPD+ rescues it (OPD+ − OPD)": "",
    "JSD: OPD collapses below its start": "",
    "JSD: OPD+ rescues it (OPD+ − OPD)": "",
    "OPD+ with JSD beats OPD with reverse KL": "Neither source reports it: the paper has 48.85 against 48.96. Here "
    "OPD with reverse KL ends at 0.955, so at most 0.045 is left to gain.",
    "gradient norm OPD : OPD+, forward KL: larger": "",
    "OPSD ends below GRPO": "The gap is larger here. Always shown the worked solution, which the student can learn, "
    "OPSD ends at 0.794, above GRPO's 0.727; always shown the bare answer, which it cannot work out in one step, at "
    "0.008.",
    "OPSD leaks more than GRPO": "Four of five seeds cite in 0.335 to 0.518 of their answers, one in 0.011. Why that "
    "one does not is open.",
    "RLSD ends above GRPO": (
        "There is little to gain by redistributing the reward among the tokens. Of two oracles, exact credit adds "
        "0.018 to GRPO's 0.727 (p = 0.10 after the correction; its V is the chance to finish the worked solution), and "
        "all blame on the first mistake 0.030; RLSD adds 0.003. With an ideal teacher the weight of a token in a "
        "right answer would be 1 + A/V, its true advantage in units of the value, and the one is GRPO. Where right "
        "answers are rare (0.038 at the start, λ = ε_w = 1, eight seeds) the oracle adds 0.122 [0.074, 0.169], and "
        "RLSD 0.022 [0.003, 0.041]: notebook 04. None of twelve settings with a usual warm start gains after the "
        "correction, nor does the published schedule, nor the best of them on fresh seeds."
    ),
}


def load(folder: Path) -> Results:
    """All arms of all the experiments that have been run."""
    results = {}
    for name in reproduce.EXPERIMENTS:
        path = folder / f"{name}.csv"
        if path.exists():
            results |= figures.read_results(path)
    return results


def number(value: float, digits: int = 3) -> str:
    """With a minus sign, and no minus zero."""
    if round(value, digits) == 0:
        value = 0.0
    return f"{value:.{digits}f}".replace("-", "−")


def interval(values: list[float], digits: int = 3) -> str:
    """mean [low, high]."""
    mean, low, high = mean_interval(values)
    return f"{number(mean, digits)} [{number(low, digits)}, {number(high, digits)}]"


def table(head: str, rows: list[list[str]]) -> str:
    """In Markdown."""
    columns = head.split(" | ")
    lines = []
    for row in [columns, ["---"] * len(columns), *rows]:
        cells = [cell.replace("|", r"\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tested(claims: list[Claim], results: Results) -> list[list[str]]:
    """Of each claim: here [95 %], p, seeds, verdict; p is corrected for the number of claims that have a result."""
    differences = [claim.differences(results) for claim in claims]
    tested = []  # the numbers of the claims that have a result
    for i in range(len(claims)):
        if len(differences[i]) > 1 and all(math.isfinite(difference) for difference in differences[i]):
            tested.append(i)
    corrected = holm([claims[i].p(differences[i]) for i in tested])
    rows = [["", "", str(len(d)), "not run"] for d in differences]
    for i, p in zip(tested, corrected):
        claim = claims[i]
        d = differences[i]
        verdict = claim.verdict(d, p, len(tested))
        if claim.column == "accuracy" and all(statistics.mean(side) < NEAR_0 for side in claim.sides(results)):
            verdict = "says nothing: both are near 0"
        rows[i] = [claim.size(d), "<0.001" if p < 0.001 else f"{p:.3f}", str(len(d)), f"**{verdict}**"]
    return rows


def claims_table(claims: list[Claim], results: Results) -> str:
    """One row per claim."""
    rows = []
    for claim, cells in zip(claims, tested(claims, results)):
        rows.append([claim.text, claim.published, *cells, claim.experiments()])
    return table("claim | published | here [95 %] | p | seeds | verdict | experiment", rows)


def found_table(results: Results) -> str:
    """The claims of FOUND, each tested among all the claims of its own table."""
    found = {}
    for claims in CLAIMS.values():
        for claim, (size, _, _, verdict) in zip(claims, tested(claims, results)):
            found[claim.text] = [claim.text, claim.published, f"{size} {verdict}"]
    rows = [[*found[text], why] for text, why in FOUND.items()]
    return table("claim | published | here [95 %] | why, if it differs", rows)


def leaks(results: Results) -> str:
    """How many seeds of each arm leak at their end."""
    counts = []
    for arm in reproduce.EXPERIMENTS["rlsd"].arms:
        if arm in results:
            leaking = [seed[-1]["leak_rate"] > 0.2 for seed in results[arm]]
            counts.append(f"{sum(leaking)} of {len(leaking)} under `{arm}`")
    return f"Seeds that cite in more than 0.2 of their answers at the end: {', '.join(counts)}."
