"""What a few seeds can say: p-values of paired differences, and their correction for being many."""

import math
import statistics
from collections.abc import Sequence

from intervals import mean_interval


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of the hypothesis that paired differences over seeds have mean 0, by Student's t.

    Differences that are all equal have no spread, and t is undefined. If they are 0 the p-value is 1; otherwise it is
    that of the sign test, 2^{1−n}, which needs no spread. One difference has none: NaN. Raises as mean_interval.
    """
    n = len(differences)
    mean, _, _ = mean_interval(differences)
    if n == 1:
        return math.nan
    if max(differences) - min(differences) <= 1e-12:
        return 1.0 if abs(mean) <= 1e-12 else 2.0 ** (1 - n)
    from scipy import stats  # here, because notebooks that only read results import this file, and need no scipy

    t = mean / (statistics.stdev(differences) / math.sqrt(n))
    return float(2 * stats.t.sf(abs(t), n - 1))


def equivalence_p(differences: Sequence[float], margin: float) -> float:
    """p-value of the hypothesis that paired differences have a mean outside ± margin: small if they are as good as 0.

    The larger of two one-sided tests (Schuirmann 1987). NaN for one difference.
    """
    one_sided = []
    for sign in (-1, 1):
        room = [margin + sign * d for d in differences]  # positive on average, if inside
        half = paired_p(room) / 2
        one_sided.append(half if sum(room) > 0 else 1 - half)
    return max(one_sided)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the chance of any false one below α is then at most α.

    The k-th smallest of m is multiplied by m − k + 1, and none falls below one before it.
    """
    m = len(p_values)
    ascending = sorted(range(m), key=lambda i: p_values[i])
    corrected = [0.0] * m
    largest = 0.0
    for rank, i in enumerate(ascending):
        largest = max(largest, min(1.0, (m - rank) * p_values[i]))
        corrected[i] = largest
    return corrected
