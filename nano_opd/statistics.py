"""What a few seeds can say: intervals, p-values of paired differences, and their correction for being many."""

import math
from collections.abc import Sequence


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927); unlike ±z·SE it stays inside [0, 1] and is not empty at 0 or 1."""
    p, z2 = successes / trials, z * z / trials
    center = (p + z2 / 2) / (1 + z2)
    half = z / (1 + z2) * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials))
    return center - half, center + half


# 97.5 % quantiles of Student's t at 1 … 30 degrees of freedom, to four digits
T_975 = (
    "12.71 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 2.131 2.120 2.110 2.101 2.093 "
    "2.086 2.080 2.074 2.069 2.064 2.060 2.056 2.052 2.048 2.045 2.042"
).split()


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds, or of paired differences over seeds, and the ends of its 95 % interval by Student's t.

    One value has no interval: its ends are NaN. Raises ValueError for no value, or more than 31.
    """
    n = len(values)
    if not 1 <= n <= 31:
        raise ValueError(f"an interval needs 1 to 31 values, not {n}")
    mean = sum(values) / n
    if n == 1:
        return mean, math.nan, math.nan
    half = float(T_975[n - 2]) * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean, mean - half, mean + half


def student_t_p(t: float, df: int) -> float:
    """Two-sided p-value of Student's t: the probability that |T| ≥ |t| at df = ν ≥ 1 degrees of freedom.

    For whole ν the integral is a finite sum in θ = arctan(|t|/√ν) (Abramowitz and Stegun 26.7.3–4):

        ν even  1 − p = sin θ (1 + ½ cos²θ + (1·3)/(2·4) cos⁴θ + …),             the last power being cos^{ν−2}θ
        ν odd   1 − p = 2/π [θ + sin θ (cos θ + ⅔ cos³θ + (2·4)/(3·5) cos⁵θ + …)]    the same; for ν = 1, 2θ/π

    Exact to about 1e-15, so what it says below that is 0.
    """
    theta = math.atan(abs(t) / math.sqrt(df))
    odd, total = df % 2, 0.0
    term = math.cos(theta) if odd else 1.0
    for k in range(2 + odd, df + 1, 2):
        total += term
        term *= math.cos(theta) ** 2 * (k - 1) / k
    inside = math.sin(theta) * total
    return max(0.0, 1 - (2 / math.pi * (theta + inside) if odd else inside))


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of the hypothesis that paired differences over seeds have mean 0, by Student's t.

    Differences that are all equal have no spread, and t is undefined. If they are 0 the p-value is 1; otherwise it is
    that of the sign test, 2^{1−n}, which needs no spread. One difference has none: NaN.
    """
    n, (mean, low, _) = len(differences), mean_interval(differences)
    if n == 1:
        return math.nan
    if max(differences) - min(differences) <= 1e-12:
        return 1.0 if abs(mean) <= 1e-12 else 2.0 ** (1 - n)
    standard_error = (mean - low) / float(T_975[n - 2])
    return student_t_p(mean / standard_error, n - 1)


def equivalence_p(differences: Sequence[float], margin: float) -> float:
    """p-value of the hypothesis that paired differences have a mean outside ± margin: small if they are as good as 0.

    The larger of two one-sided tests (Schuirmann 1987). NaN for one difference.
    """
    one_sided = []
    for sign in (-1, 1):
        room = [margin + sign * d for d in differences]  # positive on average, if inside
        p = paired_p(room) / 2
        one_sided.append(p if sum(room) > 0 else 1 - p)
    return max(one_sided)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the chance of any false one below α is then at most α.

    The k-th smallest of m is multiplied by m − k + 1, and none falls below one before it.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected
