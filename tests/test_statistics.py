"""Intervals cover, p-values are those of Student's t, and the correction holds what it promises."""

import math

import pytest
import torch

from nano_opd import statistics


def test_wilson_covers_the_truth():
    """Exact coverage over all outcomes of 60 trials: at least 93 % for every p, and never outside [0, 1]."""
    n = 60
    for p in torch.linspace(0.02, 0.98, 25).tolist():
        binomial = torch.distributions.Binomial(n, torch.tensor(p, dtype=torch.float64))
        covered = 0.0
        for k in range(n + 1):
            low, high = statistics.wilson(k, n)
            assert -1e-12 <= low < high <= 1 + 1e-12
            covered += binomial.log_prob(torch.tensor(float(k))).exp().item() * (low <= p <= high)
        assert covered > 0.93
    assert statistics.wilson(0, 500)[1] < 0.01 < 0.99 < statistics.wilson(500, 500)[0]


def test_the_interval_of_a_mean_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    for n in (2, 5, 20, 31):
        samples = torch.randn(4000, n, dtype=torch.float64, generator=generator)
        covered = [low <= 0 <= high for _, low, high in map(statistics.mean_interval, samples.tolist())]
        assert abs(sum(covered) / 4000 - 0.95) < 0.015
    mean, low, high = statistics.mean_interval([3.0])
    assert mean == 3 and low != low and high != high
    for values in ([], [0.0] * 32):
        with pytest.raises(ValueError, match="1 to 31 values"):
            statistics.mean_interval(values)


def test_student_t_against_published_values_and_the_integral_of_its_density():
    for t, df, p in [
        (1.0, 1, 0.5),
        (12.706, 1, 0.05),
        (4.303, 2, 0.05),
        (9.925, 2, 0.01),
        (2.132, 4, 0.10),
        (8.610, 4, 0.001),
        (2.571, 5, 0.05),
        (3.169, 10, 0.01),
        (3.646, 30, 0.001),
    ]:  # any table of critical values
        assert statistics.student_t_p(t, df) == statistics.student_t_p(-t, df) == pytest.approx(p, rel=2e-3)
    for df, quantile in enumerate(statistics.T_975, 1):
        assert statistics.student_t_p(float(quantile), df) == pytest.approx(0.05, rel=2e-3)
    for df in (1, 2, 3, 4, 7, 12, 29):
        log_c = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(math.pi * df) / 2
        for t in (0.0, 0.3, 1.7, 4.0, 11.0):
            x = torch.linspace(0, t, 20001, dtype=torch.float64)
            density = torch.exp(log_c - (df + 1) / 2 * torch.log1p(x**2 / df))
            assert statistics.student_t_p(t, df) == pytest.approx(1 - 2 * torch.trapezoid(density, x).item(), abs=1e-8)
    assert statistics.student_t_p(1e9, 30) == 0


def test_the_p_value_of_paired_differences():
    t = 2 / (1 / math.sqrt(3))  # mean 2, standard deviation 1, n = 3
    assert statistics.paired_p([1.0, 2.0, 3.0]) == pytest.approx(statistics.student_t_p(t, 2))
    low, high = statistics.mean_interval(shifted := [0.1, 0.7, 0.4, 1.3])[1:]
    for end in (low, high):  # at the end of the 95 % interval, p = 0.05
        assert statistics.paired_p([d - end for d in shifted]) == pytest.approx(0.05, rel=1e-3)
    assert statistics.paired_p([0.0] * 4) == 1 and statistics.paired_p([-0.3] * 4) == 1 / 8
    assert math.isnan(statistics.paired_p([1.0]))


def test_the_p_value_of_equivalence():
    near, far = [0.010, -0.012, 0.003, -0.001], [0.110, 0.088, 0.103, 0.099]
    assert statistics.equivalence_p(near, 0.05) < 0.01 < 0.99 < statistics.equivalence_p(far, 0.05)
    assert statistics.equivalence_p([-d for d in far], 0.05) == pytest.approx(statistics.equivalence_p(far, 0.05))
    low, high = statistics.mean_interval(near)[1:]
    margin = max(-low, high)  # the 95 % interval just fits: one of the two tests is at 2.5 %
    assert statistics.equivalence_p(near, margin) == pytest.approx(0.025, rel=1e-3)


def test_false_positives_are_as_rare_as_they_should_be():
    """Of 4000 families of six true null hypotheses, Holm rejects anything in about 5 %; t alone in about 26 %."""
    samples = torch.randn(4000, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    families = [[statistics.paired_p(differences) for differences in family] for family in samples]
    assert abs(sum(min(family) < 0.05 for family in families) / 4000 - (1 - 0.95**6)) < 0.02
    assert 0.04 < sum(min(statistics.holm(family)) < 0.05 for family in families) / 4000 < 0.06
    assert statistics.holm([0.02, 0.01, 0.9, 0.011]) == pytest.approx([0.04, 0.04, 0.9, 0.04])
    assert statistics.holm([0.6, 0.7]) == [1, 1] and statistics.holm([]) == []
