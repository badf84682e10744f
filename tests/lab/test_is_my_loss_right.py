"""is_my_loss_right.py, by losses whose average gradient is derived by hand: the comment beside each says what is right.

Notation: p student, q teacher, u = q/p and x = log u at the sampled token, s a prefix. For a sampled token v ~ p the
average of A(v) ∇log p(v) is the gradient of −D_f if and only if A = w_f = −f + u f′ up to a constant. Differentiating
any function g(u) of the sampled token gives g′(u) ∇u = −u g′(u) ∇log p, so a loss g pays A = u g′(u).
"""

import ast
import math
import subprocess
import sys
from functools import cache
from pathlib import Path

import is_my_loss_right as judge
import pytest
import torch
import torch.nn.functional as F
from is_my_loss_right import (
    FACTOR,
    NOTHING,
    OTHER,
    REWEIGHTED,
    RIGHT,
    ROUNDED,
    WRONG,
    at_tokens,
    check,
    from_labels,
    from_logits,
    from_sampled,
    from_shifting_labels,
    from_token_mean,
)

from nano_opd import divergences, exact

FILE = Path(judge.__file__)
# The file's own names, and nano_opd's, whose f and w_f are proved elsewhere and know nothing of the file's.
NAMES = {
    "reverse KL": "reverse_kl",
    "forward KL": "forward_kl",
    "Jensen–Shannon": "jsd",
    "Pearson χ²": "pearson_chi2",
    "Neyman χ²": "neyman_chi2",
    "squared Hellinger": "hellinger",
    "total variation": "tv",
}


def ratio(p, q, tokens):
    logp = at_tokens(p, tokens)
    return logp, at_tokens(q, tokens) - logp


def per_response(terms, mask):
    """Return the sum of terms (B, R) over the tokens, divided by the number of responses."""
    return torch.where(mask, terms, 0.0).sum() / len(mask)


def paying(advantage, reduce=per_response):
    """Return the loss −A(x) log p with A detached."""

    def loss(p, q, tokens, mask):
        logp, x = ratio(p, q, tokens)
        return reduce(-advantage(x).detach() * logp, mask)

    return loss


def differentiating(g, reduce=per_response):
    """Return the loss g(x), differentiated as it stands."""

    def loss(p, q, tokens, mask):
        return reduce(g(ratio(p, q, tokens)[1]), mask)

    return loss


def over_the_vocabulary(divergence, reduce=per_response):
    def loss(p, q, tokens, mask):
        return reduce((p.exp() * divergence.f(q - p)).sum(-1), mask)

    return loss


def own_length(terms, mask):
    return ((terms * mask).sum(1) / mask.sum(1)).mean()


def token_mean(terms, mask):
    return (terms * mask).sum() / mask.sum()


def d(name):
    return divergences.get(NAMES.get(name, name))


k1 = lambda x: -x
k2 = lambda x: x**2 / 2
k3 = lambda x: x.expm1() - x


@cache
def plus(name):
    return check(paying(d(name).unbiased))


# ---------------------------------------------------------------------------------------------- the file and its tools


def test_the_file_needs_pytorch_alone():
    imported = set()
    for node in ast.walk(ast.parse(FILE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch"}


def test_the_copied_file_runs_alone_and_judges_its_three_losses(tmp_path):
    copy = tmp_path / "is_my_loss_right.py"
    copy.write_bytes(FILE.read_bytes())
    command = [sys.executable, "-I", "-X", "utf8", str(copy)]
    printed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, encoding="utf-8").stdout
    verdicts = [line for line in printed.splitlines() if line.startswith("verdict")]
    assert [line.split()[1].rstrip(":") for line in verdicts] == ["WRONG", "RIGHT", "RIGHT"]
    assert "(OPD)" in verdicts[0] and "Jensen–Shannon" in verdicts[1] and "forward KL" in verdicts[2]


def test_the_probabilities_of_all_responses_sum_to_one_and_are_whole_4096ths():
    world = judge.make_world(0)
    assert len(world.tokens) == 1 + 4 + 16 * 5
    for policy in (world.student, world.older):
        probability = judge.response_probabilities(world, policy)
        assert probability.sum() == pytest.approx(1)
        torch.testing.assert_close(probability * 4096, (probability * 4096).round())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["prefix", "return", "sequence"])
def test_its_gradients_are_those_of_the_packages_enumeration(name, kind):
    world = judge.make_world(3)
    tokens, mask = exact.enumerate_responses(5, 3, 4)
    other = exact.World(exact.tabular, world.student, exact.tabular(world.teacher, tokens), tokens, mask)
    mine = judge.divergence_gradients(world, next(f for f in judge.DIVERGENCES if f.name == name))
    kinds = {"prefix": "each prefix", "return": "whole return", "sequence": "whole response"}
    torch.testing.assert_close(mine[kinds[kind]], exact.gradient(other, d(name), kind))


@pytest.mark.parametrize("name", NAMES)
def test_its_w_f_is_the_packages_up_to_a_constant(name):
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    mine = next(f for f in judge.DIVERGENCES if f.name == name).w_f(x)
    difference = mine - d(name).unbiased(x)
    torch.testing.assert_close(difference, difference.mean().expand_as(x))
    u = x.exp()
    printed = eval(
        judge.W_F[name].replace("log u", "log(u)"), {"u": u, "log": torch.log, "sqrt": torch.sqrt, "sign": torch.sign}
    )
    difference = printed - mine
    torch.testing.assert_close(difference, difference.mean().expand_as(x))


# -------------------------------------------------------------------------------------------------- k1, k2 and k3


@pytest.mark.parametrize(
    "loss, status, divergence, causes",
    [
        # As a reward: A = −k. −k1 = x = w of reverse KL up to the constant −1.
        (paying(lambda x: -k1(x)), RIGHT, "reverse KL", []),
        # −k2 = −x²/2: h″ = −x/u², which is below 0 for u > 1; no divergence of the list, so the mistake is named.
        (paying(lambda x: -k2(x)), WRONG, "reverse KL", ["stop-gradient"]),
        # −k3 = x − (u − 1): w of reverse KL minus w of forward KL.
        (paying(lambda x: -k3(x)), WRONG, "reverse KL", ["stop-gradient"]),
        # As a loss: A = u k′(u). k1: u · (−1/u) = −1, a constant: E[−∇log p] = 0.
        (differentiating(k1), NOTHING, "", ["zero on average"]),
        # k2: u · x/u = x = w of reverse KL up to a constant.
        (differentiating(k2), RIGHT, "reverse KL", []),
        # k3: u (1 − 1/u) = u − 1 = w of forward KL up to a constant.
        (differentiating(k3), RIGHT, "forward KL", []),
    ],
    ids=["k1 reward", "k2 reward", "k3 reward", "k1 loss", "k2 loss", "k3 loss"],
)
def test_k1_k2_and_k3(loss, status, divergence, causes):
    report = check(loss)
    assert (report.status, report.divergence, report.causes) == (status, divergence, causes)


def test_an_exact_gradient_of_a_divergence_that_was_not_meant_is_wrong():
    report = check(differentiating(k3), meant="reverse KL")
    assert report.status == WRONG and "forward KL" in str(report) and "log u" in report.finding.change
    assert check(differentiating(k2), meant="reverse KL").status == RIGHT
    with pytest.raises(ValueError, match="unknown divergence"):
        check(differentiating(k2), meant="reverse_kl")


# ------------------------------------------------------------------------------------------ OPD, OPD+, what is detached


@pytest.mark.parametrize("name", NAMES)
def test_opd_plus_is_right_under_every_divergence(name):
    """A = w_f, so it is the gradient with factor 1, and its noise is that of OPD+."""
    report = plus(name)
    assert (report.status, report.divergence, report.causes) == (RIGHT, name, [])
    fit = report.fit(name)
    assert fit.cosine == pytest.approx(1) and fit.bias < 1e-9 and fit.scale == pytest.approx(1)
    assert report.pay.of_u_alone and not report.pay.falls()
    assert report.asymmetry < 1e-3 and report.work < 0.01
    assert report.at_teacher.pulled == 4
    assert report.noise == pytest.approx(report.noise_of_opd_plus)  # its w_f has the package's constant


# −f = w_f + a positive multiple of forward KL's w plus …: PAPERS' "law". It is a divergence only for reverse KL.
@pytest.mark.parametrize("name", NAMES)
def test_opd_is_right_under_reverse_kl_and_named_under_the_others(name):
    report = check(paying(d(name).stop_gradient))
    if name == "reverse KL":
        assert (report.status, report.divergence) == (RIGHT, "reverse KL")
    else:
        assert (report.status, report.divergence, report.causes) == (WRONG, name, ["stop-gradient"])
        assert report.pay.falls() and report.asymmetry < 1e-3  # it is the gradient of something: of no divergence
        assert "(OPD)" in report.finding.sentence


def test_opd_in_the_falling_generator_descends_a_divergence_of_its_own():
    """f − f′(∞)(u − 1) of JSD never rises, so −f never falls: h″ = ½ ln((1+u)/u)/u > 0. It is not JSD: h″ differs."""
    report = check(paying(d("jsd_falling").stop_gradient))
    assert report.status == OTHER and report.causes == ["own"]
    assert report.at_teacher.pulled == 4 and report.fit("Jensen–Shannon").distance > 1e-3


@pytest.mark.parametrize("name", [name for name in NAMES if name != "reverse KL"])
def test_a_forgotten_detach_is_found(name):
    """∇(f log p) = f ∇log p − log p u f′ ∇log p: A = −f + u f′ log p."""

    def loss(p, q, tokens, mask):
        logp, x = ratio(p, q, tokens)
        return per_response(d(name).f(x) * logp, mask)

    report = check(loss)
    assert (report.status, report.divergence, report.causes) == (WRONG, name, ["f attached"])


def test_a_forgotten_detach_under_reverse_kl_has_no_u_f_prime_to_be_right_by():
    """f = −x = log p − log q: ∇(f log p) = (f + log p) ∇log p. A = log q − 2 log p: KL(p‖q) minus the entropy... of p,
    since −log p pays the entropy: ∇H = −E[log p ∇log p]. So it is 1 × reverse KL − 1 × entropy as a loss: the student
    is also rewarded for entropy. That is a sum people may want, so it is named and not called wrong."""

    def loss(p, q, tokens, mask):
        logp, x = ratio(p, q, tokens)
        return per_response(-x * logp, mask)

    report = check(loss)
    assert report.status == OTHER and report.causes == ["entropy"]
    assert "1 reverse KL − 1 the student's entropy" in report.finding.sentence


@pytest.mark.parametrize("name", NAMES)
def test_detached_f_times_logp_plus_f_is_right(name):
    """f ∇log p + ∇f = (f − u f′) ∇log p: A = −f + u f′ = w_f."""

    def loss(p, q, tokens, mask):
        logp, x = ratio(p, q, tokens)
        f = d(name).f(x)
        return per_response(f.detach() * logp + f, mask)

    report = check(loss)
    assert (report.status, report.divergence) == (RIGHT, name)


@pytest.mark.parametrize("name", NAMES)
def test_the_sum_over_the_vocabulary_is_right_and_less_noisy(name):
    """Σ_v p_v f(u_v), differentiated, is the divergence itself; only the prefix is sampled."""
    report = check(over_the_vocabulary(d(name)))
    assert (report.status, report.divergence) == (RIGHT, name)
    assert report.noise < report.noise_of_opd_plus
    assert report.older["without a ratio"].startswith("sound: the same direction at each prefix")


def test_the_wrong_sign_is_found():
    """Paying k1 = log p − log q is minus w of reverse KL."""
    report = check(paying(k1))
    assert (report.status, report.divergence, report.causes) == (WRONG, "reverse KL", ["wrong sign"])
    assert report.fit("reverse KL").cosine == pytest.approx(-1)


def test_a_factor_is_told_apart_from_wrong():
    """0.3 w_f: cosine 1, bias 0.7, and nothing is left at the best scale."""
    report = check(paying(lambda x: 0.3 * d("jsd").unbiased(x)))
    fit = report.fit("Jensen–Shannon")
    assert (report.status, report.divergence, report.causes) == (FACTOR, "Jensen–Shannon", ["factor"])
    assert fit.bias == pytest.approx(0.7) and fit.scale == pytest.approx(0.3) and fit.distance < 1e-9


def test_a_sum_over_the_batch_is_named():
    report = check(paying(d("jsd").unbiased, reduce=lambda terms, mask: (terms * mask).sum()))
    assert report.status == RIGHT and report.how == "sum" and "sum over the batch" in str(report)


# ------------------------------------------------------------------------------------------------ whole responses


def later(values):
    return values.flip(1).cumsum(1).flip(1)


@pytest.mark.parametrize("name", ["forward KL", "Jensen–Shannon"])
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_gamma_one_is_right_for_the_whole_return_and_between_there_is_none(name, gamma):
    """A = Σ_{m≥n} γ^{m−n} (−f_m) + u f′: unbiased for J at γ = 1, for neither objective in between."""

    def loss(p, q, tokens, mask):
        logp, x = ratio(p, q, tokens)
        x = torch.where(mask, x, 0.0).detach()
        reward = -d(name).f(x)
        weights = gamma ** torch.arange(tokens.shape[1]).double()
        A = later(weights * reward) / weights + d(name).unbiased(x) - reward
        return per_response(-A * logp, mask)

    report = check(loss)
    if gamma == 1:
        assert (report.status, report.divergence, report.finding.kind) == (RIGHT, name, "whole return")
        assert name + ", whole return" in str(report)
    else:
        assert (report.status, report.divergence, report.causes) == (OTHER, name, ["discount"])
        assert "γ = 0.5" in report.finding.sentence


def test_summing_w_f_into_the_return_is_wrong():
    """The correction u f′ is the own token's: in the sum it multiplies scores that it has nothing to do with."""

    def loss(p, q, tokens, mask):
        logp, x = ratio(p, q, tokens)
        w = d("jsd").unbiased(torch.where(mask, x, 0.0)).detach() * mask
        return per_response(-later(w) * logp, mask)

    report = check(loss)
    assert (report.status, report.divergence, report.causes) == (WRONG, "Jensen–Shannon", ["w_f summed"])


def test_one_advantage_for_the_whole_response_is_right_for_the_divergence_of_responses():
    """w_f(Π u) for every token is the same identity for the distribution of responses."""

    def loss(p, q, tokens, mask):
        logp, x = ratio(p, q, tokens)
        whole = torch.where(mask, x, 0.0).sum(1, keepdim=True).detach()
        return per_response(-d("forward_kl").unbiased(whole) * logp, mask)

    report = check(loss)
    assert (report.status, report.divergence, report.finding.kind) == (RIGHT, "forward KL", "whole response")


# -------------------------------------------------------------------------------------------------- TRL, written anew


def trl_jsd(beta, temperature=1.0, top_k=None, add_tail=False):
    """TRL's generalised JSD of logits and labels with reduction "batchmean": the sum over all labels ≠ −100, divided by
    their number. β = 0 is KL(teacher‖student), β = 1 KL(student‖teacher), between them β KL(q‖m) + (1−β) KL(p‖m) with
    m = (1−β) p + β q. top_k keeps the teacher's top k for β < 1 and the student's for β = 1."""

    def loss(student_logits, teacher_logits, labels):
        p = F.log_softmax(student_logits / temperature, -1)
        q = F.log_softmax(teacher_logits / temperature, -1)
        if top_k:
            kept = (p if beta == 1 else q).topk(top_k, -1).indices
            p, q = p.gather(-1, kept), q.gather(-1, kept)
            if add_tail:
                p, q = (torch.cat([a, torch.log1p(-a.exp().sum(-1, keepdim=True))], -1) for a in (p, q))
            else:
                p, q = p.log_softmax(-1), q.log_softmax(-1)
        if beta == 0:
            terms = F.kl_div(p, q, reduction="none", log_target=True)
        elif beta == 1:
            terms = F.kl_div(q, p, reduction="none", log_target=True)
        else:
            m = torch.logsumexp(torch.stack([p + math.log(1 - beta), q + math.log(beta)]), 0)
            of_teacher = F.kl_div(m, q, reduction="none", log_target=True)
            of_student = F.kl_div(m, p, reduction="none", log_target=True)
            terms = beta * of_teacher + (1 - beta) * of_student
        counts = labels != -100
        return terms[counts].sum() / counts.sum()

    return from_labels(loss)


# Σ over the vocabulary, so exact at each prefix. The divisor is the number of tokens of the batch, in a large batch B
# times the mean length, a constant: right up to that factor. Undone by from_token_mean, the factor is 1.
@pytest.mark.parametrize("beta, name", [(0, "forward KL"), (0.5, "Jensen–Shannon"), (1, "reverse KL")])
def test_trls_generalised_jsd(beta, name):
    report = check(trl_jsd(beta))
    assert (report.status, report.divergence, report.causes) == (FACTOR, name, ["token mean"])
    assert report.how == "coupled" and report.pairs.distance > 1e-4  # in small batches the divisor is a sample
    undone = check(from_token_mean(trl_jsd(beta)))
    assert (undone.status, undone.divergence) == (RIGHT, name)


def test_trls_generalised_jsd_between_its_ends_is_the_skewed_one():
    assert check(trl_jsd(0.1)).divergence == "JSD, β = 0.1"
    assert check(trl_jsd(0.9)).divergence == "JSD, β = 0.9"


# Σ p_top over renormalised distributions: the mass outside the top 2 never changes it, and how the other three share
# it neither. A renormalised top 2 has 1 free direction of V − 1 = 4; with a bucket for the tail it has 2.
# For β = 1 the top 2 are the student's: where two tokens change places the loss jumps, so it is no gradient; and at
# every prefix alone it is blind in as many directions.
@pytest.mark.parametrize("beta", [0, 0.5, 1])
@pytest.mark.parametrize("add_tail, blind", [(False, 3), (True, 2)])
def test_trls_top_k_does_not_see_all_directions(beta, add_tail, blind):
    report = check(from_token_mean(trl_jsd(beta, top_k=2, add_tail=add_tail)))
    assert report.status == WRONG and report.fits[0].distance > 0.01
    assert (report.at_teacher.pulled, report.at_teacher.blind) == (4 - blind, blind)
    assert report.at_teacher.drift < 1e-6
    assert (report.work > 0.01) == (beta == 1)
    assert report.asymmetry < 1e-3


# --------------------------------------------------------------------------------------------------------------- top k


def teachers_top(q, k=2):
    return q >= q.topk(k, -1).values[..., -1:]


def test_a_top_k_whose_rest_is_dropped_drives_the_student_away_from_the_teacher():
    """Σ_top p ln(p/q) pays the top k x − 1 and the rest 0: at p = q the top k is paid −1 and the rest 0."""

    def loss(p, q, tokens, mask):
        return per_response((teachers_top(q) * p.exp() * (p - q)).sum(-1), mask)

    report = check(loss)
    assert report.status == WRONG and report.at_teacher.drift > 0.01


def test_a_top_k_with_a_sampled_tail_is_right():
    """Σ_top p_v A_v ∇log p_v, and A ∇log p where the sampled token is outside: the average is E_p[A ∇log p]."""

    def loss(p, q, tokens, mask):
        A = d("jsd").unbiased(q - p).detach()
        top = teachers_top(q)
        inside = (top * p.exp().detach() * A * p).sum(-1)
        outside = torch.where(at_tokens(top, tokens), 0.0, at_tokens(A, tokens) * at_tokens(p, tokens))
        return per_response(-inside - outside, mask)

    report = check(loss)
    assert (report.status, report.divergence) == (RIGHT, "Jensen–Shannon")


def test_a_state_only_top_k_kl_as_an_advantage_teaches_nothing():
    """It does not depend on the token: E[c(s) ∇log p] = 0."""

    def loss(p, q, tokens, mask):
        A = -(teachers_top(q) * p.exp() * (p - q)).sum(-1).detach()
        return per_response(-A * at_tokens(p, tokens), mask)

    assert check(loss).status == NOTHING


# -------------------------------------------------------------------------------------------------- divisors, whitening


def test_a_division_by_each_length_reweights_a_full_sum():
    """Over the vocabulary the sampled token decides nothing but the length: at each prefix E[1/L | s] D_f(s)."""
    report = check(over_the_vocabulary(d("jsd"), own_length))
    assert (report.status, report.divergence, report.causes) == (REWEIGHTED, "Jensen–Shannon", ["length"])


@pytest.mark.parametrize("name", ["reverse KL", "Jensen–Shannon"])
def test_a_division_by_each_length_biases_a_sampled_loss(name):
    """The sampled EOS decides L, so E[c ∇log p / L] is not 0 for a constant c: another direction."""
    report = check(paying(d(name).unbiased, own_length))
    assert (report.status, report.divergence, report.causes) == (WRONG, name, ["length"])
    assert report.fit(name).distance > 1e-3


def test_k1_as_a_loss_divided_by_each_length_only_changes_lengths():
    """−∇log p / L has the average −∇E[1/L]; times L it is zero."""
    report = check(differentiating(k1, own_length))
    assert report.status == NOTHING and report.causes == ["length", "zero on average"]


def test_opd_divided_by_each_length_has_both_mistakes():
    report = check(paying(d("jsd").stop_gradient, own_length))
    assert report.status == WRONG and report.causes == ["stop-gradient", "length"]


def test_a_token_mean_is_right_in_a_large_batch_and_biased_in_small_ones():
    report = check(paying(d("jsd").unbiased, token_mean))
    assert (report.status, report.divergence, report.causes) == (FACTOR, "Jensen–Shannon", ["token mean"])
    assert report.pairs.distance > 1e-3


def whitening(advantage, epsilon=1e-6):
    """(A − mean) / std over the tokens of the batch."""

    def loss(p, q, tokens, mask):
        logp, x = ratio(p, q, tokens)
        A = advantage(x).detach()
        A = (A - A[mask].mean()) / (A[mask].std() + epsilon)
        return per_response(-A * logp, mask)

    return loss


# In a large batch mean and std are constants: the first has no effect, the second is a factor of the batch. So w_f
# stays right, and −f stays wrong, except for reverse KL. In batches of two the own token is in mean and std: biased.
def test_whitening_keeps_w_f_right_up_to_a_factor_of_the_batch():
    report = check(whitening(d("jsd").unbiased))
    assert (report.status, report.divergence, report.causes) == (FACTOR, "Jensen–Shannon", ["factor of the batch"])
    assert report.how == "coupled" and report.pairs.distance > 1e-2
    assert check(whitening(d("reverse_kl").stop_gradient)).divergence == "reverse KL"


def test_whitening_without_an_epsilon_is_not_finite_where_two_responses_are_one_token_each():
    """Two times the EOS alone: A = mean and std = 0."""
    report = check(whitening(d("jsd").unbiased, epsilon=0.0))
    assert report.causes == ["factor of the batch"] and report.pairs is None
    assert "In batches of two its gradient is sometimes not finite" in str(report)


def test_whitening_does_not_mend_opd():
    report = check(whitening(d("jsd").stop_gradient))
    assert (report.status, report.divergence, report.causes) == (WRONG, "Jensen–Shannon", ["stop-gradient"])


# ------------------------------------------------------------------------------------------------ masks, shifts, scales


def test_the_eos_masked_out_is_found():
    """pad == eos and a mask of tokens != pad: the EOS is never paid, so no constant cancels: wrong."""

    def loss(p, q, tokens, mask):
        return paying(d("jsd").unbiased)(p, q, tokens, tokens != judge.EOS)

    report = check(loss)
    assert (report.status, report.divergence, report.causes) == (WRONG, "Jensen–Shannon", ["EOS"])
    assert not report.eos_trained and "never learns when to stop" in str(report)


def test_the_eos_masked_out_of_a_full_sum_only_reweights():
    """A prefix counts if the sampled token was not the EOS: with the weight 1 − p(EOS | s)."""

    def loss(p, q, tokens, mask):
        return over_the_vocabulary(d("jsd"))(p, q, tokens, tokens != judge.EOS)

    report = check(loss)
    assert (report.status, report.divergence, report.causes) == (REWEIGHTED, "Jensen–Shannon", ["EOS"])


@pytest.mark.parametrize("make", [lambda f: paying(f.unbiased), over_the_vocabulary], ids=["sampled", "full"])
def test_the_padded_tail_counted_is_found(make):
    """Right at the real tokens; the positions behind the EOS have a gradient that no objective has."""

    def loss(p, q, tokens, mask):
        return make(d("jsd"))(p, q, tokens, torch.ones_like(mask))

    report = check(loss)
    assert (report.status, report.divergence, report.causes) == (WRONG, "Jensen–Shannon", ["padding"])
    assert report.tail_share > 0.01 and "Multiply by the mask" in report.finding.change


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("make", [lambda f: paying(f.unbiased), over_the_vocabulary], ids=["sampled", "full"])
def test_a_teacher_shifted_by_one_token_is_found(make, shift):
    """The divergence from the teacher at another prefix: right again once the teacher is rolled back."""

    def loss(p, q, tokens, mask):
        return make(d("jsd"))(p, q.roll(shift, dims=1), tokens, mask)

    report = check(loss)
    assert (report.status, report.divergence, report.causes) == (WRONG, "Jensen–Shannon", ["teacher shifted"])


def test_a_teacher_that_is_cut_instead_of_rolled_is_found_too():
    """student[:, 1:] beside teacher[:, :-1]: the first position is not trained."""

    def loss(p, q, tokens, mask):
        return over_the_vocabulary(d("forward_kl"))(p[:, 1:], q[:, :-1], tokens[:, 1:], mask[:, 1:])

    report = check(loss)
    assert (report.status, report.divergence, report.causes) == (WRONG, "forward KL", ["teacher shifted"])


@pytest.mark.parametrize("temperature", [0.7, 2.0, 3.3])
@pytest.mark.parametrize("make", [lambda f: paying(f.unbiased), over_the_vocabulary], ids=["sampled", "full"])
def test_a_temperature_on_the_teacher_is_found(make, temperature):
    """D_f(q_T ‖ p): right once the teacher's logits are multiplied by T. T itself comes out."""

    def loss(p, q, tokens, mask):
        return make(d("jsd"))(p, (q / temperature).log_softmax(-1), tokens, mask)

    report = check(loss)
    assert (report.status, report.divergence, report.causes) == (WRONG, "Jensen–Shannon", ["teacher temperature"])
    assert f"{temperature:.3g}" in report.finding.sentence


def test_a_temperature_on_the_student_is_found():
    """D_f(q ‖ p_T) with responses from p: the teacher is no longer where it ends."""

    def loss(p, q, tokens, mask):
        return over_the_vocabulary(d("reverse_kl"))((p / 2).log_softmax(-1), q, tokens, mask)

    report = check(loss)
    assert (report.status, report.divergence, report.causes) == (WRONG, "reverse KL", ["student temperature"])
    assert report.at_teacher.drift > 0.01


def test_a_temperature_on_both_sides_ends_at_the_teacher():
    """D_f(q_T ‖ p_T) is 0 if and only if p = q: another objective, not a wrong one."""
    report = check(from_token_mean(trl_jsd(0.5, temperature=2.0)))
    assert (report.status, report.divergence, report.causes) == (OTHER, "Jensen–Shannon", ["both temperature"])
    assert report.at_teacher.pulled == 4


# -------------------------------------------------------------------------------------------------------- older samples


def with_ratio(advantage, product):
    def loss(p, q, tokens, mask, old_logp=None):
        logp, x = ratio(p, q, tokens)
        log_rho = torch.where(mask, logp - old_logp, 0.0).detach()
        return per_response(-product(log_rho).exp() * advantage(x).detach() * logp, mask)

    return loss


def test_older_samples_and_ratios():
    """E_μ[ρ A ∇log p] with the own token's ρ is E_p at the prefixes of μ; with the product of all ρ before and at the
    token it is E_p at the prefixes of p. Without a ratio a sampled loss is biased."""
    w = d("jsd").unbiased
    own = check(with_ratio(w, lambda log_rho: log_rho))
    assert own.status == RIGHT and own.older["without a ratio"].startswith("BIASED")
    assert own.older["with your ratio"].startswith("sound: the same direction at each prefix")
    all_before = check(with_ratio(w, lambda log_rho: log_rho.cumsum(1)))
    assert all_before.older["with your ratio"].startswith("sound: the same average")
    clipped = check(with_ratio(w, lambda log_rho: log_rho.clamp(-0.2, 0.2)))
    assert clipped.status == RIGHT and clipped.older["with your ratio"].startswith("BIASED")


def test_k1_and_k3_as_losses_want_another_reading_on_older_samples():
    """ρ k with both differentiated: E_μ[ρ k1] = E_p[k1] = KL(p‖q) at the prefixes of μ, so k1, zero on-policy with ρ
    detached, is reverse KL. On-policy ρ = 1 still has a gradient: A = −k1 + u k1′ = x − 1: right there too."""

    def loss(p, q, tokens, mask, old_logp=None):
        logp, x = ratio(p, q, tokens)
        return per_response((logp - old_logp).exp() * k1(x), mask)

    report = check(loss)
    assert (report.status, report.divergence) == (RIGHT, "reverse KL")
    assert report.older["with your ratio"].startswith("sound")
    zero = check(differentiating(k1))
    assert zero.older["without a ratio"].startswith("BIASED: the average gradient is zero on fresh samples")


# ----------------------------------------------------------------------------------------------------------- adapters


def test_the_adapters_change_nothing():
    jsd = d("jsd")

    def sampled(logp, teacher_logp, mask):
        return per_response(-jsd.unbiased(teacher_logp - logp).detach() * logp, mask)

    def logits(student_logits, teacher_logits, tokens, mask):
        return over_the_vocabulary(jsd)(student_logits.log_softmax(-1), teacher_logits.log_softmax(-1), tokens, mask)

    def shifting(student_logits, teacher_logits, labels):
        p, q = student_logits[:, :-1].log_softmax(-1), teacher_logits[:, :-1].log_softmax(-1)
        terms = (p.exp() * jsd.f(q - p)).sum(-1)
        return per_response(terms, labels[:, 1:] != -100)

    for loss in (from_sampled(sampled), from_logits(logits), from_shifting_labels(shifting)):
        report = check(loss)
        assert (report.status, report.divergence) == (RIGHT, "Jensen–Shannon")


# ----------------------------------------------------------------------------------------------------------- refusals


def test_what_it_cannot_measure_is_refused_in_one_sentence():
    def random(p, q, tokens, mask):
        return per_response(at_tokens(p, tokens) * torch.rand(()), mask)

    def groups(p, q, tokens, mask):
        A = at_tokens(q - p, tokens).sum(1).detach()
        A = A - (A + A.roll(1)) / 2
        return per_response(-A.unsqueeze(1) * at_tokens(p, tokens), mask)

    def no_scalar(p, q, tokens, mask):
        return at_tokens(p, tokens)

    def not_finite(p, q, tokens, mask):
        return per_response(at_tokens(p, tokens) * math.nan, mask)

    for loss, words in [
        (random, "random"),
        (groups, "order"),
        (no_scalar, "one number"),
        (not_finite, "NaN"),
    ]:
        with pytest.raises(ValueError, match=words):
            check(loss)


def test_a_loss_without_a_gradient_says_so():
    def loss(p, q, tokens, mask):
        return per_response(at_tokens(p, tokens).detach(), mask)

    report = check(loss)
    assert report.status == NOTHING and report.causes == ["no gradient"]


def test_float32_inside_the_loss_is_still_exact():
    loss = paying(d("jsd").unbiased)
    report = check(lambda p, q, tokens, mask: loss(p.float(), q.float(), tokens, mask))
    assert (report.status, report.divergence) == (RIGHT, "Jensen–Shannon")


def test_bfloat16_inside_the_loss_is_told_apart_from_wrong():
    loss = paying(d("reverse_kl").unbiased)
    report = check(lambda p, q, tokens, mask: loss(p.bfloat16(), q.bfloat16(), tokens, mask))
    assert (report.status, report.divergence, report.causes) == (ROUNDED, "reverse KL", ["low precision"])
    assert report.how == "mean"


# ------------------------------------------------------------------------------------------------ twenty losses at once


def full_reverse_kl(p, q):
    return (p.exp() * (p - q)).sum(-1)


def exact_baseline(p, q, tokens, mask):
    logp, x = ratio(p, q, tokens)
    baseline = -full_reverse_kl(p, q)
    return per_response(-(x - baseline).detach() * logp, mask)


def kl_div_batchmean(p, q, tokens, mask):
    return F.kl_div(p.flatten(0, 1), q.flatten(0, 1), reduction="batchmean", log_target=True)


def kl_div_mean(p, q, tokens, mask):
    return (F.kl_div(p, q, reduction="none", log_target=True) * mask.unsqueeze(-1)).mean()


def absolute_discount(p, q, tokens, mask):
    logp, x = ratio(p, q, tokens)
    discount = 0.9 ** torch.arange(tokens.shape[1])
    return per_response(-discount * d("jsd").unbiased(x).detach() * logp, mask)


def teachers_logp_as_reward(p, q, tokens, mask):
    return per_response(-at_tokens(q, tokens) * at_tokens(p, tokens), mask)


def teachers_probability_as_reward(p, q, tokens, mask):
    return per_response(-at_tokens(q, tokens).exp() * at_tokens(p, tokens), mask)


def power(p, q, tokens, mask):
    return per_response(
        -(at_tokens(q, tokens).exp() - at_tokens(p, tokens).exp()).detach() * at_tokens(p, tokens), mask
    )


def hard_label(p, q, tokens, mask):
    return per_response(-at_tokens(p, q.argmax(-1)), mask)


def ppo(p, q, tokens, mask, old_logp=None):
    logp, x = ratio(p, q, tokens)
    A = d("jsd").unbiased(x).detach()
    rho = (logp - old_logp).exp()
    return per_response(-torch.min(rho * A, rho.clamp(0.8, 1.2) * A), mask)


def whole_response_k1(p, q, tokens, mask):
    logp, x = ratio(p, q, tokens)
    return per_response(-torch.where(mask, x, 0.0).sum(1, keepdim=True).detach() * logp, mask)


def whitened_responses(p, q, tokens, mask):
    logp, x = ratio(p, q, tokens)
    reward = torch.where(mask, x, 0.0).sum(1, keepdim=True).detach()
    return per_response(-(reward - reward.mean()) / (reward.std() + 1e-6) * logp, mask)


def where_the_teacher_is_unsure(p, q, tokens, mask):
    entropy = -(q.exp() * q).sum(-1)
    return per_response((entropy > 1.2) * full_reverse_kl(p, q), mask)


def weights_detached(p, q, tokens, mask):
    return per_response((p.exp().detach() * (p - q)).sum(-1), mask)


def smoothed_teacher(p, q, tokens, mask):
    return over_the_vocabulary(d("forward_kl"))(p, (0.9 * q.exp() + 0.02).log(), tokens, mask)


def batch_mean_as_baseline(p, q, tokens, mask):
    logp, x = ratio(p, q, tokens)
    A = d("jsd").unbiased(x).detach()
    return per_response(-(A - A[mask].mean()) * logp, mask)


def two_divergences(p, q, tokens, mask):
    return 0.5 * over_the_vocabulary(d("forward_kl"))(p, q, tokens, mask) + paying(lambda x: x)(p, q, tokens, mask)


@pytest.mark.parametrize(
    "loss, status, divergence, causes",
    [
        # tanh x and clip(x, ±1) never fall: h″ = A′/u ≥ 0, so each is a divergence of its own, and none of the list.
        (paying(torch.tanh), OTHER, None, ["own"]),
        (paying(lambda x: x.clamp(-1, 1)), OTHER, None, ["own"]),
        # q − p is −∇ of ½ Σ (p − q)² : p_v (A_v − E A) = Σ ∇p_v (q_v − p_v). Lowest at the teacher, no function of u.
        (power, OTHER, None, ["own"]),
        # The likeliest token of the teacher at probability 1 is not the teacher; nor is the argmax of E_p[q].
        (hard_label, WRONG, None, ["unknown"]),
        (teachers_probability_as_reward, WRONG, None, ["unknown"]),
        # E_p[log q] = −KL(p‖q) − H(p): the loss is KL + H.
        (teachers_logp_as_reward, WRONG, "reverse KL", ["entropy"]),
        # KL(0.9 q + 0.1/5 ‖ p): a teacher that is not the teacher.
        (smoothed_teacher, WRONG, "forward KL", ["unknown"]),
        # A baseline of the prefix changes no average.
        (exact_baseline, RIGHT, "reverse KL", []),
        # "batchmean" divides by the first dimension, B·R, a constant: 1/3; nothing is masked.
        (kl_div_batchmean, WRONG, "forward KL", ["factor", "padding"]),
        # .mean() divides by B·R·V: 1/15.
        (kl_div_mean, FACTOR, "forward KL", ["factor"]),
        # γ^t A_t scales the prefixes of position t.
        (absolute_discount, REWEIGHTED, "Jensen–Shannon", ["position"]),
        # A gate of the teacher's entropy is a weight of the prefix, 0 or 1.
        (where_the_teacher_is_unsure, REWEIGHTED, "reverse KL", ["weights"]),
        # On fresh samples the ratio is 1 and inside the clip: −A ∇log p.
        (ppo, RIGHT, "Jensen–Shannon", []),
        # Σ over the whole response instead of what is still to come: what came before has the average 0 with ∇log p_n.
        (whole_response_k1, RIGHT, "reverse KL", []),
        # The same less a constant and over the std of the batch.
        (whitened_responses, FACTOR, "reverse KL", ["factor of the batch"]),
        # Σ sg(p) ∇log p = 0.
        (weights_detached, NOTHING, "", ["no gradient"]),
        # In a large batch a constant.
        (batch_mean_as_baseline, RIGHT, "Jensen–Shannon", []),
        (two_divergences, OTHER, "reverse KL", ["sum"]),
        # |x| as a loss: A = u · sign(x)/u = sign x = 2 w of total variation.
        (differentiating(torch.abs), FACTOR, "total variation", ["factor"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_losses_of_another_kind(loss, status, divergence, causes):
    report = check(loss)
    assert (report.status, report.causes) == (status, causes)
    assert divergence is None or report.divergence == divergence


def test_what_the_verdict_says_of_the_teacher_and_of_gradients():
    """q as a reward pays the student for leaving the teacher. A factor of the batch makes a direction no gradient."""
    assert "driven away" in check(teachers_probability_as_reward).finding.sentence
    assert "its factor changes with the student" in str(check(whitened_responses))
    assert "at one prefix it is one" in str(check(teachers_logp_as_reward))
