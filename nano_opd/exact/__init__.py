"""The tools of proof: every response listed with its probability, so that a mean is a finite sum.

enumeration   the expected gradient of an estimator, its variance, and the objectives, without sampling
rewards       what each token of a response is worth to a reward
law           what an advantage descends, and where it leads
judge         all of this for an advantage that you bring
"""

from nano_opd.exact.enumeration import (
    MAX_RESPONSES,
    OBJECTIVES,
    Estimator,
    Moments,
    Policy,
    World,
    at,
    enumerate_responses,
    estimates,
    gradient,
    moments,
    objective,
    random_tabular,
    sampled,
    tabular,
)

__all__ = [
    "MAX_RESPONSES",
    "OBJECTIVES",
    "Estimator",
    "Moments",
    "Policy",
    "World",
    "at",
    "enumerate_responses",
    "estimates",
    "gradient",
    "moments",
    "objective",
    "random_tabular",
    "sampled",
    "tabular",
]
