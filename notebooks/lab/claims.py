"""What the papers claim, and what the runs of reproduce.py say of it; pages.py puts it into the READMEs.

notebooks/README.md says how a claim is tested and what each verdict means.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import figures
from intervals import mean_interval
from lab import ceiling, reproduce
from lab.seeds import equivalence_p, holm, paired_p

Results = dict[str, list[list[dict]]]  # arm → one list of rows per seed

MARGIN = {"accuracy": (0.05, "± 0.05"), "grad_norm": (math.log(1.5), "a factor 1.5")}  # within it two are the same
NEAR_0 = 0.02  # two accuracies below it cannot show a difference


def mean_of(rows: list[dict], column: str, keep: Callable[[float], bool] = lambda part: True) -> float:
    """Mean of a column over the rows whose part of the run, 0 to 1, is to be kept; NaN where nothing was measured."""
    last = rows[-1]["step"] or 1
    values = [row[column] for row in rows if keep(row["step"] / last) and row[column] is not None]
    return sum(values) / len(values) if values else math.nan


MOMENTS = {
    "start": lambda rows, column: rows[0][column],
    "early": lambda rows, column: mean_of(rows, column, lambda part: 0 < part <= 0.25),  # the first quarter of the run
    "late": lambda rows, column: mean_of(rows, column, lambda part: part > 0.75),  # the last one
    "end": lambda rows, column: rows[-1][column],
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
        sides = [self.first, self.second] if isinstance(self.second, str) else [self.first]
        return [arm for side in sides if (arm := side.split("@")[0].strip())]

    def sides(self, results: Results) -> list[list[float]]:
        """Both sides, one value per seed; log gradient norms. Empty lists where an arm has not been run."""
        if any(arm not in results for arm in self.arms()):
            return [[], []]
        return [self._values(side, results) for side in (self.first, self.second)]

    def _values(self, side: str | float, results: Results) -> list[float]:
        if not isinstance(side, str):
            return [side] * len(results[self.arms()[0]])
        arm, _, moment = map(str.strip, side.partition("@"))
        moment = moment or ("training" if self.column == "grad_norm" else "end")
        values = [MOMENTS[moment](rows, self.column) for rows in results[arm or self.arms()[0]]]
        return [math.log(v) for v in values] if self.column == "grad_norm" else values

    def differences(self, results: Results) -> list[float]:
        """One per seed that both sides have."""
        return [a - b for a, b in zip(*self.sides(results))]

    def p(self, differences: list[float]) -> float:
        """The p-value before correction."""
        return paired_p(differences) if self.expected else equivalence_p(differences, MARGIN[self.column][0])

    def verdict(self, differences: list[float], p: float, tests: int = 1) -> str:
        """In words, from the p-value corrected for so many tests; explains an interval that seems to contradict it."""
        mean, low, high = mean_interval(differences)
        alone, excludes_0, as_claimed = self.p(differences), not low <= 0 <= high, mean * self.expected > 0
        if self.expected == 0:
            if p < 0.05 and excludes_0:
                return f"seen: within {MARGIN[self.column][1]}, though {'higher' if mean > 0 else 'lower'}"
            return "seen" if p < 0.05 else "not seen here: they differ" if excludes_0 else "no difference seen"
        if p < 0.05:
            return "seen" if as_claimed else "the opposite is seen"
        if alone >= 0.05:
            return "not seen here"
        which = "" if as_claimed else "the opposite "
        return f"not seen here ({which}only before the correction for {tests} claims: p = {alone:.3f})"

    def size(self, differences: list[float]) -> str:
        """Mean and interval; of log ratios, as ratios."""
        if self.column != "grad_norm":
            return interval(differences, 1 if self.column == "response_length" else 3)
        return "× {:.3g} [{:.3g}, {:.3g}]".format(*map(math.exp, mean_interval(differences)))

    def experiments(self) -> str:
        """The experiments that make its arms, in Markdown."""
        return " ".join(f"`{name}`" for name, e in reproduce.EXPERIMENTS.items() if {*e.arms} & {*self.arms()})


def pair(divergence: str, variance: str = "sampled") -> tuple[str, str]:
    """The arms of OPD and OPD+."""
    return f"opd, {divergence}, {variance}", f"opdplus, {divergence}, {variance}"


REVERSE, FORWARD, JSD = map(pair, ("reverse_kl", "forward_kl", "jsd"))
SPARSE, BASELINE = "grpo, 400 × 128", "opdplus, jsd, baseline"
CLAIMS = {
    "opdplus": [
        Claim("reverse KL: the correction changes nothing", *REVERSE[::-1], 0, "0.473 − 0.494"),
        Claim("forward KL: OPD collapses below its start", FORWARD[0], "@ start", -1, "0.039 − 0.331"),
        Claim("forward KL: OPD+ rescues it (OPD+ − OPD)", *FORWARD[::-1], +1, "0.450 − 0.039"),
        Claim("JSD: OPD collapses below its start", JSD[0], "@ start", -1, "0.134 − 0.331"),
        Claim("JSD: OPD+ rescues it (OPD+ − OPD)", *JSD[::-1], +1, "0.460 − 0.134"),
        Claim("OPD+ with forward KL beats OPD with reverse KL", FORWARD[1], REVERSE[0], +1, "0.450 − 0.494"),
        Claim("OPD+ with JSD beats OPD with reverse KL", JSD[1], REVERSE[0], +1, "0.460 − 0.494"),
        Claim(
            "OPD+ with JSD beats GRPO (which starts at 0.45 here, with 210 warm-start updates and lr 4e-4)",
            *(JSD[1], SPARSE, +1, "0.460 − 0.404"),
        ),
        Claim("gradient norm OPD : OPD+, reverse KL: the same", *REVERSE, 0, "15.4 : 18.0 = 0.86", "grad_norm"),
        Claim("gradient norm OPD : OPD+, forward KL: larger", *FORWARD, +1, "1942 : 13.8 = 141", "grad_norm"),
        Claim("gradient norm OPD : OPD+, JSD: larger", *JSD, +1, "92.7 : 1.25 = 74", "grad_norm"),
        Claim("OPD, forward KL: KL to the teacher rises", FORWARD[0], "@ start", +1, "0.90 → 1.55", "kl"),
        Claim("OPD, JSD: KL to the teacher rises", JSD[0], "@ start", +1, "0.90 → 1.35", "kl"),
        Claim("OPD+, forward KL: KL to the teacher falls", FORWARD[1], "@ start", -1, "0.90 → 0.50", "kl"),
        Claim("OPD+, JSD: KL to the teacher falls", JSD[1], "@ start", -1, "0.90 → 0.50", "kl"),
        Claim("OPD, forward KL: more responses run to the cap", FORWARD[0], "@ start", +1, "", "truncated"),
        Claim("OPD, forward KL: responses grow (tokens)", FORWARD[0], "@ start", +1, "169 → 287", "response_length"),
        Claim("OPD, JSD: responses shrink (tokens)", JSD[0], "@ start", -1, "148 → 75", "response_length"),
    ],
    "rlsd": [
        Claim("OPSD rises early (first quarter − start)", "opsd @ early", "@ start", +1, "yes"),
        Claim("OPSD then degrades (last − first quarter)", "opsd @ late", "@ early", -1, "yes"),
        Claim("OPSD ends below its start (published: above it)", "opsd", "@ start", -1, "52.49 − 51.49"),
        Claim("OPSD ends below GRPO", "opsd", "grpo", -1, "52.49 − 53.86"),
        Claim("GRPO + OPSD ends below GRPO", "grpo+opsd", "grpo", -1, "52.91 − 53.86"),
        Claim("RLSD ends above GRPO", "rlsd", "grpo", +1, "56.18 − 53.86"),
        Claim("RLSD ends above OPSD", "rlsd", "opsd", +1, "56.18 − 52.49"),
        Claim("RLSD needs the right reference (RLSD − shuffled)", "rlsd", "rlsd, shuffled", +1),
        Claim("OPSD leaks (citing answers − 0.2)", "opsd", 0.2, +1, "yes", "leak_rate"),
        Claim("OPSD leaks more than GRPO", "opsd", "grpo", +1, "yes", "leak_rate"),
        Claim("GRPO does not leak (citing answers − 0.01)", "grpo", 0.01, -1, "yes", "leak_rate"),
        Claim("RLSD does not leak (citing answers − 0.01)", "rlsd", 0.01, -1, "yes", "leak_rate"),
        Claim("a wide clip leaks (ε_w = 10 − 0.2, λ = 1)", "λ=1, ε_w=10", "λ=1, ε_w=0.2", +1, "", "leak_rate"),
        Claim("always the work reference: OPSD does not leak (− 0.01)", "opsd, work", 0.01, -1, "I = 0", "leak_rate"),
        Claim("always the work reference: OPSD ends higher for it", "opsd, work", "opsd", +1),
        Claim("always the cite reference: OPSD does not leak (− 0.01)", "opsd, cite", 0.01, -1, "I = 0", "leak_rate"),
        Claim("always the cite reference: OPSD ends below its start", "opsd, cite", "@ start", -1),
        Claim("always the cite reference: RLSD does not leak (− 0.01)", "rlsd, cite", 0.01, -1, "", "leak_rate"),
        Claim("RLSD's published schedule ends above GRPO, G = 8", "rlsd, published", "grpo, G=8", +1, "56.18 − 53.86"),
        Claim("RLSD's entropy ends below GRPO's (2606.04036)", "rlsd", "grpo", -1, "collapses late", "entropy"),
    ],
    # derived in this project, or asked by it
    "beyond": [
        *(Claim(f"{name}: OPD+ ends above OPD", *pair(name)[::-1], +1) for name in reproduce.DIVERGENCES[3:]),
        Claim("jsd in its falling generator: OPD ends where OPD+ does", "opd, jsd_falling", JSD[1], 0),
        Claim("jsd with c = −¼, right only near the teacher: OPD collapses", "opd, jsd,c=-0.25", "@ start", -1),
        *(
            Claim(f"{name.split(',')[0]} in its falling generator: OPD ends higher for it", f"opd, {name}", old, +1)
            for name in ("hellinger,c=-1", "tv,c=-0.5")
            for old in pair(name.split(",")[0])[:1]
        ),
        *(
            Claim(f"{name}, full vocabulary, no action noise: OPD+ ends above OPD", *pair(name, "full")[::-1], +1)
            for name in ("forward_kl", "jsd")
        ),
        Claim("the control without a teacher, all noise: it falls below its start", "null", "@ start", -1),
        Claim("JSD: a top k of 4 and a sampled tail end above the sampled token", "opdplus, jsd, topk", JSD[1], +1),
        Claim("JSD: they lower the gradient norm", "opdplus, jsd, topk", JSD[1], -1, "", "grad_norm"),
        Claim("JSD: the exact baseline lowers the gradient norm", BASELINE, JSD[1], -1, "", "grad_norm"),
        Claim("γ = 1, reverse KL: the correction changes nothing", *pair("reverse_kl", "γ=1")[::-1], 0),
        Claim("γ = ½ costs accuracy against γ = 0", "opdplus, jsd, γ=0.5", JSD[1], -1),
        Claim("γ = 1 costs accuracy against γ = 0", "opdplus, jsd, γ=1", JSD[1], -1),
    ],
    # what falls at a large rate though its mean gradient is right: is it noise?
    "noise": [
        Claim("GRPO, lr 2e-3, 64 responses an update: it falls below its start", "grpo, lr=2e-3", "@ start", -1),
        Claim("GRPO, lr 2e-3, 512 responses an update: it rises", "grpo, lr=2e-3, B=512", "@ start", +1),
        Claim("GRPO, lr 5e-3, 512 responses an update: it rises", "grpo, lr=5e-3, B=512", "@ start", +1),
        Claim("γ = 1, reverse KL, lr 5e-3: OPD+ falls below its start", "opdplus, reverse_kl, γ=1", "@ start", -1),
        Claim("γ = 1, reverse KL, lr 5e-4: OPD+ rises", "opdplus, reverse_kl, γ=1, lr=5e-4", "@ start", +1),
    ],
    # settings in which token-level credit might matter: RLSD − GRPO, all else the same
    "search": [
        *(Claim(name, f"rlsd, {name}", f"grpo, {name}", +1) for name in ("add 5", "mul 3", "mix 3")),
        *(Claim(name, f"rlsd, {name}", "grpo", +1) for name in reproduce.RLSD_ONLY),
        *(Claim(name, name, "grpo", +1) for name in reproduce.EXPERIMENTS["rlsd_clip"].arms),
        Claim("λ=1, ε_w=10, worked reference", "λ=1, ε_w=10, work", "grpo", +1),
    ],
    # what an oracle's credit brings: the arm − GRPO with the same rollouts, and the floor
    "credit": [
        *(Claim(name, name, "grpo", +1) for name in ceiling.ARMS),
        Claim("exact A, mean over training", "exact A @ training", "grpo @ training", +1),
        Claim("RLSD's weights − the same weights dealt anew", "rlsd", "weights dealt anew", +1),
    ],
    # the same from a start that is right in about one answer of twenty, on fresh seeds
    "rare": [
        Claim("exact A − GRPO", "exact A from 120", "grpo from 120", +1),
        Claim("RLSD − GRPO", "rlsd, λ=1, ε_w=1 from 120", "grpo from 120", +1),
        Claim("RLSD − exact A", "rlsd, λ=1, ε_w=1 from 120", "exact A from 120", -1),
        Claim("GRPO − its start", "grpo from 120", "@ start", +1),
    ],
    # the largest of them, tested once on seeds that had no part in finding it
    "confirm": [Claim("sync 50, fresh seeds", "rlsd, sync 50, fresh seeds", "grpo, fresh seeds", +1)],
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
    paths = [folder / f"{name}.csv" for name in reproduce.EXPERIMENTS]
    return {arm: seeds for path in paths if path.exists() for arm, seeds in figures.read_results(path).items()}


def number(value: float, digits: int = 3) -> str:
    """With a minus sign, and no minus zero."""
    return f"{value:.{digits}f}".replace("-", "−") if round(value, digits) else f"{0:.{digits}f}"


def interval(values: list[float], digits: int = 3) -> str:
    """mean [low, high]."""
    return "{} [{}, {}]".format(*(number(v, digits) for v in mean_interval(values)))


def table(head: str, rows: list[list[str]]) -> str:
    """In Markdown."""
    columns = head.split(" | ")
    cells = [[cell.replace("|", r"\|") for cell in row] for row in [columns, ["---"] * len(columns), *rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def tested(claims: list[Claim], results: Results) -> list[list[str]]:
    """Of each claim: here [95 %], p, seeds, verdict; p is corrected for the number of claims that have a result."""
    differences = [claim.differences(results) for claim in claims]
    tested = [i for i, d in enumerate(differences) if len(d) > 1 and all(map(math.isfinite, d))]
    corrected = dict(zip(tested, holm([claims[i].p(differences[i]) for i in tested])))
    rows = [["", "", str(len(d)), "not run"] for d in differences]
    for i, p in corrected.items():
        claim, d = claims[i], differences[i]
        verdict = claim.verdict(d, p, len(tested))
        if claim.column == "accuracy" and all(statistics.mean(side) < NEAR_0 for side in claim.sides(results)):
            verdict = "says nothing: both are near 0"
        rows[i] = [claim.size(d), "<0.001" if p < 0.001 else f"{p:.3f}", str(len(d)), f"**{verdict}**"]
    return rows


def claims_table(claims: list[Claim], results: Results) -> str:
    """One row per claim."""
    rows = [[c.text, c.published, *cells, c.experiments()] for c, cells in zip(claims, tested(claims, results))]
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
    arms = [arm for arm in reproduce.EXPERIMENTS["rlsd"].arms if arm in results]
    leak = {arm: [seed[-1]["leak_rate"] > 0.2 for seed in results[arm]] for arm in arms}
    counts = [f"{sum(seeds)} of {len(seeds)} under `{arm}`" for arm, seeds in leak.items()]
    return f"Seeds that cite in more than 0.2 of their answers at the end: {', '.join(counts)}."
