"""The mean over a few seeds with its 95 % interval."""

import math
import statistics
from collections.abc import Sequence

# The 97.5 % quantiles of Student's t with 1 to 30 degrees of freedom.
# fmt: off
STUDENT_T = (
    12.706204736174694, 4.302652729749462, 3.1824463052837078, 2.7764451051977934, 2.5705818356363146,
    2.4469118511449786, 2.364624251592784, 2.306004135204166, 2.262157162798205, 2.228138851986274,
    2.200985160091639, 2.1788128296672284, 2.1603686564627913, 2.144786687917804, 2.131449545559776,
    2.1199052992212546, 2.1098155778333156, 2.1009220402410382, 2.0930240544083087, 2.085963447265864,
    2.0796138447276795, 2.0738730679040254, 2.0686576104190486, 2.0638985616280245, 2.0595385527532972,
    2.0555294386428735, 2.0518305164802846, 2.0484071417952454, 2.045229642132703, 2.0422724563012378,
)
# fmt: on


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of values, one per seed, and the ends of its 95 % interval by Student's t.

    One value has no interval: its ends are NaN. More than 31 values get the quantile of 31, so their interval is up to
    4 % too wide. Raises ValueError for no value, or one that is not finite.
    """
    n = len(values)
    if n == 0 or not all(map(math.isfinite, values)):
        raise ValueError(f"an interval needs at least one value, and all of them finite, not {[*values]}")
    mean = sum(values) / n
    if n == 1:
        return mean, math.nan, math.nan
    degrees = min(n - 1, len(STUDENT_T))
    half = STUDENT_T[degrees - 1] * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half
