"""Intervals cover the truth, p-values agree with the intervals, and the correction holds what it promises."""

import math

import pytest
import torch
from intervals import STUDENT_T, mean_interval
from lab import seeds
from scipy import stats


def test_the_table_has_the_quantiles_of_students_t():
    degrees = range(1, 31)
    assert STUDENT_T == pytest.approx([stats.t.ppf(0.975, n) for n in degrees], rel=1e-12)
    assert STUDENT_T[-1] / stats.norm.ppf(0.975) - 1 < 0.045  # how much too wide it is for any larger number of values
    values = [math.sin(n) for n in range(9)]
    want = stats.t.interval(0.95, 8, loc=sum(values) / 9, scale=stats.sem(values))
    assert mean_interval(values)[1:] == pytest.approx(want)


def test_the_interval_of_a_mean_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    for n in (2, 5, 20, 40):
        samples = torch.randn(2000, n, dtype=torch.float64, generator=generator)
        covered = [low <= 0 <= high for _, low, high in map(mean_interval, samples.tolist())]
        assert abs(sum(covered) / 2000 - 0.95) < 0.015
    mean, low, high = mean_interval([3.0])
    assert mean == 3 and math.isnan(low) and math.isnan(high)
    assert mean_interval([0.25] * 5) == (0.25, 0.25, 0.25)
    for none, of in [((), mean_interval), ((1, math.nan), seeds.paired_p), ((2, math.inf), seeds.paired_p)]:
        with pytest.raises(ValueError, match="at least one value, and all of them finite"):
            of(none)


def test_the_p_value_of_paired_differences():
    t = 2 / (1 / math.sqrt(3))  # mean 2, standard deviation 1, n = 3
    assert seeds.paired_p([1.0, 2.0, 3.0]) == pytest.approx(1 - t / math.sqrt(2 + t * t))  # Student's t of 2 degrees
    low, high = mean_interval(shifted := [0.1, 0.7, 0.4, 1.3])[1:]
    for end in (low, high):  # at the end of the 95 % interval, p = 0.05
        assert seeds.paired_p([d - end for d in shifted]) == pytest.approx(0.05)
    assert seeds.paired_p([0.0] * 4) == 1 and seeds.paired_p([-0.3] * 4) == 1 / 8
    assert math.isnan(seeds.paired_p([1.0]))
    assert seeds.paired_p(shifted) == pytest.approx(stats.ttest_1samp(shifted, 0).pvalue)


def test_the_p_value_of_equivalence():
    near, far = [0.010, -0.012, 0.003, -0.001], [0.110, 0.088, 0.103, 0.099]
    assert seeds.equivalence_p(near, 0.05) < 0.01 < 0.99 < seeds.equivalence_p(far, 0.05)
    assert seeds.equivalence_p([-d for d in far], 0.05) == pytest.approx(seeds.equivalence_p(far, 0.05))
    low, high = mean_interval(near)[1:]
    margin = max(-low, high)  # the 95 % interval just fits: one of the two tests is at 2.5 %
    assert seeds.equivalence_p(near, margin) == pytest.approx(0.025)
    assert math.isnan(seeds.equivalence_p([0.0], 0.05))


def test_false_positives_are_as_rare_as_they_should_be():
    """Of 2000 families of six true null hypotheses, Holm rejects anything in about 5 %; t alone in about 26 %."""
    samples = torch.randn(2000, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    families = [[seeds.paired_p(differences) for differences in family] for family in samples]
    assert abs(sum(min(family) < 0.05 for family in families) / 2000 - (1 - 0.95**6)) < 0.02
    assert 0.04 < sum(min(seeds.holm(family)) < 0.05 for family in families) / 2000 < 0.06
    assert seeds.holm([0.02, 0.01, 0.9, 0.011]) == pytest.approx([0.04, 0.04, 0.9, 0.04])
    assert seeds.holm([0.6, 0.7]) == [1, 1] and seeds.holm([]) == []
