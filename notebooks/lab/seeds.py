"""What a few seeds can say: intervals, p-values of paired differences, and their correction for being many."""

import math
import statistics
from collections.abc import Sequence

from scipy import stats


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds, or of paired differences over seeds, and the ends of its 95 % interval by Student's t.

    One value has no interval: its ends are NaN. Raises ValueError for no value, or one that is not finite.
    """
    n = len(values)
    if n == 0 or not all(map(math.isfinite, values)):
        raise ValueError(f"an interval needs at least one value, and all of them finite, not {[*values]}")
    mean = sum(values) / n
    if n == 1:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of the hypothesis that paired differences over seeds have mean 0, by Student's t.

    Differences that are all equal have no spread, and t is undefined. If they are 0 the p-value is 1; otherwise it is
    that of the sign test, 2^{1−n}, which needs no spread. One difference has none: NaN. Raises as mean_interval.
    """
    n, mean = len(differences), mean_interval(differences)[0]
    if n == 1:
        return math.nan
    if max(differences) - min(differences) <= 1e-12:
        return 1.0 if abs(mean) <= 1e-12 else 2.0 ** (1 - n)
    t = mean / (statistics.stdev(differences) / math.sqrt(n))
    return float(2 * stats.t.sf(abs(t), n - 1))


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
