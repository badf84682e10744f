"""Functions called from a notebook with something slightly wrong: each raises, or is right."""

import numpy as np
import pytest
import torch
from conftest import new_model

from nano_opd import (
    arithmetic,
    divergences,
    evaluate,
    exact,
    gkd,
    grpo,
    opd,
    opdplus,
    opsd,
    policy_gradient,
    rlsd,
    sft,
    topk,
)
from nano_opd.checks import NumericalFault
from nano_opd.exact import judge, law
from nano_opd.exact import rewards as exact_rewards
from nano_opd.methods import METHODS, Scored
from nano_opd.rollout import response_logits, response_logprobs, sample, score

MASK = torch.tensor([[True, True, True], [True, True, False], [True, True, True], [True, True, False]])
LOGP = -torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) - 0.1
A = torch.tensor([1.0, -1.0, 2.0, -0.5])


def test_targets_and_positions_that_no_logits_belong_to():
    model = new_model(12)
    tokens = torch.arange(24).view(2, 12) % 17
    for targets in (tokens[:, 1:], tokens.T, tokens[:1]):
        with pytest.raises(ValueError, match="targets must be .2, 12., not"):
            model(tokens, targets=targets)
    for call in (response_logits, response_logprobs, score):
        for prompt_length in (0, -3, 13):
            with pytest.raises(ValueError, match="logits_from must lie in 0 … 11"):
                call(model, tokens, prompt_length)
        call(model, tokens, 1)


def loss_of(name, x, mask):
    """Return a loss of log-probs x (B, R), or of the logits that GKD under a divergence makes of them."""
    ones_or_nan = torch.where(x.isnan(), x.detach(), 1.0)
    if name == "policy gradient":
        return policy_gradient.loss(x, ones_or_nan, mask)
    if name == "surrogate":
        return grpo.clipped_surrogate(x, x.detach(), ones_or_nan, mask, 0.2, 0.2)
    student_logits = x.unsqueeze(-1) * torch.tensor([1.0, -0.5])
    teacher_logits = 2 - x.unsqueeze(-1) * torch.tensor([0.3, 1])
    return gkd.loss(student_logits, teacher_logits, mask, divergences.get(name))


@pytest.mark.parametrize("loss", ["policy gradient", "surrogate", *divergences.DIVERGENCES])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_stands_behind_the_mask_is_in_no_gradient(loss, value):
    plain = torch.where(MASK, LOGP, 0.0).requires_grad_()
    spoilt = torch.where(MASK, LOGP, value).requires_grad_()
    want = loss_of(loss, plain, MASK)
    got = loss_of(loss, spoilt, MASK)
    want.backward()
    got.backward()
    assert torch.equal(want, got) and plain.grad[MASK].abs().min() > 0
    assert torch.equal(torch.where(MASK, plain.grad, 0), torch.where(MASK, spoilt.grad, 0))
    if loss not in divergences.DIVERGENCES:  # x itself has a slope of 0 · ∞ on the way to the logits
        assert torch.equal(spoilt.grad, plain.grad)


def test_an_information_gap_is_of_log_probs():
    logits = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    assert 0 <= opsd.information_gap(logits.log_softmax(-1)).min()
    assert opsd.information_gap(torch.tensor([0.0, -torch.inf]).expand(2, 1, 1, 2)).item() == 0
    for wrong in (logits, logits.softmax(-1), logits * torch.nan):
        with pytest.raises(ValueError, match="must be log-probs"):
            opsd.information_gap(wrong)


def test_rlsd_takes_a_constant_and_log_probs_that_are_there():
    with pytest.raises(ValueError, match="carries a gradient"):
        rlsd.advantage(A.clone().requires_grad_(), LOGP, LOGP, MASK, 0.5, 0.2)
    for broken in (torch.nan, -torch.inf):  # a token that the student says it cannot have sampled
        with pytest.raises(NumericalFault, match="log u"):
            rlsd.advantage(A, LOGP, torch.full_like(LOGP, broken), MASK, 0.5, 0.2)
    assert rlsd.advantage(A, torch.full_like(LOGP, -torch.inf), LOGP, MASK, 0.5, 0.2)[0, 0] == 0.9


def test_nothing_is_no_batch():
    none = torch.zeros(0, 3)
    for call in (
        lambda: policy_gradient.loss(none, none, none.bool()),
        lambda: grpo.clipped_surrogate(none, none, none[:, 0], none.bool(), 0.2, 0.2),
        lambda: gkd.loss(none[..., None], none[..., None], none.bool(), divergences.get("jsd")),
        lambda: rlsd.advantage(none[:, 0], none, none, none.bool(), 0.5, 0.2),
        lambda: grpo.advantage(none[:, 0], 2),
        lambda: grpo.zero_fraction(none[:, 0], 2),
    ):
        with pytest.raises(ValueError, match="not torch.bool .0, 3.|0 rewards"):
            call()


PROBLEMS = [arithmetic.Problem("add", 2, 12, 34), arithmetic.Problem("add", 2, 5, 6)]
RNG = np.random.default_rng(0)
WORLD = exact.World.of(exact.random_tabular(3, 2, 0), exact.random_tabular(3, 2, 1), 3, 2)
ONE = torch.ones(9, dtype=torch.float64)
TOKENS = torch.arange(24).view(2, 12) % 17
MODEL = new_model(12)
LOGITS = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
SCORED = Scored(MASK.long(), MASK, LOGP, LOGP, LOGP, LOGITS, LOGITS, torch.ones(4))
MEANINGLESS = {
    "one slot for two problems": (lambda: arithmetic.prompts_of(PROBLEMS, "cpu", ["_" * 8]), "zip"),
    "a reference that does not exist": (
        lambda: arithmetic.draw_references(PROBLEMS, 1, RNG, "foo"),
        "unknown reference",
    ),
    "one group, shuffled": (lambda: arithmetic.draw_references(PROBLEMS, 2, RNG, "shuffled"), "no other"),
    "a style that does not exist": (lambda: arithmetic.solution(PROBLEMS[0], "foo"), "unknown reference"),
    "half a digit": (lambda: arithmetic.sample_problems("add", 2.5, 3, RNG), "digits must lie"),
    "an operand that is too long": (
        lambda: arithmetic.solution(arithmetic.Problem("add", 2, 123, 3)),
        "no problem of 2",
    ),
    "a negative difference": (lambda: arithmetic.solution(arithmetic.Problem("sub", 2, 3, 5)), "no problem of 2"),
    "a factor of two digits": (lambda: arithmetic.solution(arithmetic.Problem("mul", 2, 34, 12)), "no problem of 2"),
    "problems of two lengths": (
        lambda: sft.worked_solutions([PROBLEMS[0], arithmetic.Problem("add", 3, 1, 2)]),
        "the same digits",
    ),
    "an integer reward": (lambda: policy_gradient.future_return(torch.ones(2, 3).long(), 0.5), "floating-point"),
    "a mask that broadcasts": (lambda: policy_gradient.reduce(LOGP, MASK[:1]), "shapes"),
    "no response": (lambda: policy_gradient.reduce(LOGP[:0], MASK[:0]), "not"),
    "rewards in rows": (lambda: grpo.advantage(torch.ones(2, 3), 2), r"rewards must be floating-point \(B,\)"),
    "rewards that are bool": (lambda: grpo.advantage(torch.ones(4, dtype=torch.bool), 2), "rewards must be"),
    "a reward that is NaN": (lambda: grpo.advantage(torch.tensor([1.0, torch.nan]), 2), "not finite"),
    "a ratio that broadcasts": (lambda: grpo.clip_fraction(LOGP, LOGP[:1], MASK, 0.2, 0.2), "shapes"),
    "a clip without 1": (lambda: grpo.clipped_surrogate(LOGP, LOGP, A, MASK, -1.0, 0.2), "keep 1 inside"),
    "token advantages for a fraction": (lambda: rlsd.clip_fraction(LOGP, LOGP, LOGP, MASK, 0.2), "shapes"),
    "an advantage without its axis": (lambda: rlsd.evidence_weight(A, LOGP, LOGP, MASK), "must be"),
    "a span that broadcasts": (lambda: rlsd.advantage(A, LOGP, LOGP, MASK, 0.5, 0.2, span=MASK[:1]), "shapes"),
    "a span of numbers": (lambda: rlsd.advantage(A, LOGP, LOGP, MASK, 0.5, 0.2, span=MASK.float()), "must be bool"),
    "an advantage that is NaN": (lambda: rlsd.advantage(A * torch.nan, LOGP, LOGP, MASK, 0.5, 0.2), "no NaN"),
    "a prompt longer than all": (lambda: opsd.privileged_view(TOKENS, 99, TOKENS), "prompt_length must lie"),
    "one reference too few": (lambda: opsd.information_gap(torch.zeros(2, 3, 1)), r"\(K, B, R, V\)"),
    "counts in the place of bools": (lambda: evaluate.pass_at_k(torch.tensor([[2, 0]]), 1), "must be bool"),
    "no problem": (lambda: evaluate.pass_at_k(torch.ones(0, 2, dtype=torch.bool), 1), "must be bool"),
    "more successes than trials": (lambda: evaluate.wilson(5, 3), "5 of 3"),
    "a negative bound": (lambda: divergences.clipped(divergences.get("jsd"), -1.0), "must be positive"),
    "weights that are no probability": (
        lambda: exact.moments(WORLD, exact.sampled(lambda x, mask, *_: x), probability=ONE),
        "sum to 1",
    ),
    "one reward for all responses": (lambda: exact_rewards.gradient(WORLD, ONE[:1]), "reward must be float64"),
    "rewards that are integers": (lambda: exact_rewards.values(WORLD, ONE.long()), "reward must be float64"),
    "a probability of 5": (lambda: exact_rewards.conditioned(WORLD, 5 * ONE), "from 0 to 1"),
    "probabilities of the teacher": (
        lambda: law.paths(lambda p, q: q - p, LOGP, LOGP.softmax(-1)),
        "log_q must be log-probs",
    ),
    "a teacher's logits that are integers": (
        lambda: gkd.loss(LOGITS, LOGITS.long(), MASK, divergences.get("jsd")),
        "teacher_logits must be floating-point",
    ),
    "integers for a top k": (
        lambda: topk.loss(LOGITS, LOGITS.long(), MASK.long(), MASK, lambda x: x, 2),
        "teacher_logits must be floating-point",
    ),
    "integers for a baseline": (
        lambda: policy_gradient.mean_over_vocabulary(LOGITS, LOGITS.long(), lambda x: x),
        "teacher_logits must be floating-point",
    ),
    "two problems for one group": (lambda: arithmetic.draw_references(PROBLEMS, 2, RNG, "true"), "stand together"),
    "a clip without 1, counted": (lambda: grpo.clip_fraction(LOGP, LOGP, MASK, -1.0, 0.2), "keep 1 inside"),
    "one prompt without its axis": (lambda: sample(MODEL, TOKENS[0], 3), "prompts must be int64"),
    "tokens that are no integers": (lambda: score(MODEL, TOKENS.float(), 2), "tokens must be int64"),
    "tokens outside the vocabulary": (
        lambda: topk.loss(LOGITS, LOGITS, torch.full(MASK.shape, 9), MASK, lambda x: x, 2),
        "not in the vocabulary of 5",
    ),
    "a mask without its axis": (
        lambda: opdplus.exact_baseline(LOGITS, LOGITS, divergences.get("jsd"), MASK[0]),
        "mask must be bool",
    ),
    "a mask of one column": (
        lambda: opd.exact_baseline(LOGITS, LOGITS, divergences.get("jsd"), MASK[:, :1]),
        "shapes must be equal",
    ),
    "a mask of one row": (
        lambda: policy_gradient.mean_over_vocabulary(LOGITS, LOGITS, lambda p, q: p * q, MASK[:1]),
        "shapes must be equal",
    ),
    "a name for a divergence": (lambda: opd.advantage(LOGP, MASK, "jsd"), r"divergences.get\('jsd'\), not its name"),
    "a name for the divergence of GKD": (lambda: gkd.loss(LOGITS, LOGITS, MASK, "jsd"), "not its name"),
    "a name for the divergence of a baseline": (
        lambda: opdplus.exact_baseline(LOGITS, LOGITS, "jsd"),
        "not its name",
    ),
    "no worked solution": (lambda: sft.worked_solutions([]), "give at least one"),
    "no response to reward": (
        lambda: arithmetic.rewards([], sft.worked_solutions(PROBLEMS)),
        "one problem for each response, not 0 for 2",
    ),
    "an operand too long for its prompt": (
        lambda: arithmetic.prompt(arithmetic.Problem("add", 2, 1, 200)),
        "no problem of 2",
    ),
    "a negative operand": (lambda: arithmetic.prompt(arithmetic.Problem("add", 2, -1, 2)), "no problem of 2"),
    "a loss type that does not exist": (
        lambda: METHODS["grpo"].loss(SCORED, 2, "dr-grpo", 0.2, 0.28, "batch"),
        "unknown loss_type 'dr-grpo'",
    ),
    "a variance that does not exist": (
        lambda: METHODS["opd"].loss(SCORED, "jsd", 0.0, "fulll", 4, 0.0, "batch"),
        "unknown variance 'fulll'",
    ),
    "an advantage without a value": (lambda: judge.judge(lambda p, q: p * torch.nan), "expected update is not finite"),
}


@pytest.mark.parametrize("what", MEANINGLESS)
def test_what_means_nothing_is_refused_in_a_sentence(what):
    call, said = MEANINGLESS[what]
    with pytest.raises(ValueError, match=said):
        call()
