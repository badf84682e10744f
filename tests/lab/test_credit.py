"""The first wrong token of a response, the blame that falls on it, and values by Monte Carlo, by hand and exactly."""

import credit
import numpy as np
import pytest
import torch
from conftest import new_model

from nano_opd import arithmetic, exact, rlsd
from nano_opd.arithmetic import prompts_of
from nano_opd.exact import rewards as exact_rewards
from nano_opd.rollout import response_logits, sample
from nano_opd.tokenizer import EOS, VOCAB_SIZE


def test_the_first_wrong_token():
    rng = np.random.default_rng(0)
    for problem in arithmetic.sample_problems("mix", 3, 300, rng):
        text = arithmetic.solution(problem)
        assert credit.first_wrong_token(problem, text) is None
        i = int(rng.integers(len(text)))
        broken = text[:i] + ("0" if text[i] != "0" else "1") + "9" * int(rng.integers(4))
        assert credit.first_wrong_token(problem, broken) == i
        assert credit.first_wrong_token(problem, text[:i]) == i  # its EOS came too early
        assert credit.first_wrong_token(problem, text + "0") == len(text)
        assert credit.first_wrong_token(problem, arithmetic.solution(problem, "cite")) == 0


def test_token_credit_by_hand():
    advantage = torch.tensor([[-1.0, -1, -1, -1], [-1, -4, -1, 9], [0.5, 2, -2, 0.5], [0, 0, 3, 1]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    ratio, first = credit.token_credit(advantage, mask, torch.tensor([2, 1, 1, 0]))
    torch.testing.assert_close(ratio, torch.tensor([1.0, 4.0, 2.0, 0.0]))
    torch.testing.assert_close(first, torch.tensor([0.25, 1.0, 0.5, 0.0]))
    torch.testing.assert_close(credit.token_credit(10 * advantage, mask, torch.tensor([2, 1, 1, 0])), (ratio, first))
    nothing = credit.token_credit(torch.zeros(4, 4), mask, torch.tensor([2, 1, 1, 0]))[0]
    assert torch.equal(nothing, torch.ones(4))  # equal everywhere
    with pytest.raises(ValueError, match="shapes must be equal"):
        credit.token_credit(advantage[:, :1], mask, torch.tensor([2, 1, 1, 0]))
    for token, cut in [(3, mask), (0, mask & (torch.arange(4) < 1))]:
        with pytest.raises(ValueError, match="inside a response of at least two tokens"):
            credit.token_credit(advantage, cut, torch.full((4,), token))


def test_kinds_follow_the_layout_of_the_solution():
    problem = arithmetic.Problem("add", 2, 57, 68)
    text = arithmetic.solution(problem) + "$"
    named = dict.fromkeys(credit.KINDS, "")
    for character, kind in zip(text + "..", credit.kinds(2, len(text) + 2), strict=True):
        named[kind] += character
    assert named == {"operand": "7856", "separator": "+= += #$..", "carry": "11", "digit": "52", "answer": "125"}


@pytest.fixture
def short(monkeypatch):
    """A random model that writes up to two tokens after a prompt, six responses, and a reward: no EOS within two."""
    rewarded = lambda problems, rollout: (rollout.responses[:, :2] != EOS).all(1).float()
    monkeypatch.setattr(credit, "rewards", rewarded)
    problems = [arithmetic.Problem("add", 2, 12, 34), arithmetic.Problem("add", 2, 43, 21)] * 3
    model, prompts = new_model(8, n_layer=2, n_embd=16), prompts_of(problems)
    return model, problems, sample(model, prompts, 2, torch.Generator().manual_seed(0))


def test_monte_carlo_values_are_the_exact_ones_within_their_errors(short):
    model, problems, rollout = short
    V, error = credit.monte_carlo_values(model, problems, rollout, 2000, torch.Generator().manual_seed(1), sure=1.1)
    tokens, mask = exact.enumerate_responses(VOCAB_SIZE, 2, EOS)
    for i, response in enumerate(rollout.responses):
        with torch.no_grad():
            prompt = rollout.tokens[i, : rollout.prompt_length].expand(len(tokens), -1)
            logits = response_logits(model, torch.cat([prompt, tokens], 1), rollout.prompt_length).double()
        world = exact.World(lambda theta, tokens, logits=logits: logits, torch.zeros(1), logits, tokens, mask)
        want, _ = exact_rewards.values(world, (tokens != EOS).all(1).double())
        same = (tokens == response.where(rollout.mask[i], torch.zeros(()).long())).all(1)
        assert ((V[i] - want[same][0]).abs() <= 5 * error[i] + 1e-6).all()
        assert (error[i, : rollout.mask[i].sum()] < 0.02).all() and error[i, 0] > 0 and error[i, -1] == 0


def test_a_value_is_kept_after_a_sure_token_and_shared_by_equal_prefixes(short):
    model, problems, rollout = short
    V, error = credit.monte_carlo_values(model, problems, rollout, 8, torch.Generator().manual_seed(1), sure=0.0)
    open_ = rollout.mask
    assert torch.equal(V[:, 1][open_[:, 1]], V[:, 0][open_[:, 1]])  # every token is sure
    assert V[0, 0] == V[2, 0] == V[4, 0] and torch.equal(V[:, -1], credit.rewards(problems, rollout))


def test_the_interval_of_a_correlation_covers_it_though_tokens_of_a_problem_are_alike():
    rng, covered, widths = np.random.default_rng(0), 0, []
    for _ in range(100):
        shared = rng.standard_normal((2, 40, 1)) @ np.ones((1, 10))
        x = shared[0] + 0.1 * rng.standard_normal((40, 10))
        y = 0.6 * shared[0] + 0.8 * shared[1] + 0.1 * rng.standard_normal((40, 10))
        cluster = torch.arange(40).repeat_interleave(10)
        r, low, high = credit.correlation(torch.tensor(x).flatten(), torch.tensor(y).flatten(), cluster, 400)
        assert r == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1])
        covered, widths = covered + (low < 0.6 < high), [*widths, high - low]
    assert covered >= 85 and np.mean(widths) > 0.3  # 400 independent tokens would give 0.13


@pytest.fixture
def judged():
    """A of both signs and 0, log-probs of two judges and the student, and a mask."""
    A, draws = torch.tensor([1.5, -0.7, 0.0, 0.1]), -3 * torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    return A, *draws, torch.arange(5) < torch.tensor([5, 4, 3, 2])[:, None]


def test_the_reversed_weight_is_rlsd_with_its_judges_exchanged_on_right_responses_only(judged):
    A, teacher, _, student, mask = judged
    got = credit.reversed_on_right(A, teacher, student, mask, 0.5, 0.9)
    plain = rlsd.advantage(A, teacher, student, mask, 0.5, 0.9)
    right = A > 0
    assert torch.equal(got[right], rlsd.advantage(A, student, teacher, mask, 0.5, 0.9)[right])
    assert torch.equal(got[~right], torch.where(mask, A[:, None], 0.0)[~right])
    shift = lambda x: (x - A[:, None])[right & (A > 0)][mask[right]]
    assert (shift(got) * shift(plain) <= 0).all()  # what one credits more, the other credits less


def test_an_added_contrast_moves_a_size_and_never_a_sign(judged):
    A, right, wrong, _, mask = judged
    got = credit.added_contrast(A, right, wrong, mask, lam=3.0)
    assert (got * A[:, None] >= 0).all() and (got[~mask] == 0).all() and (got[A == 0] == 0).all()
    moved = (got - A[:, None]) * (right - wrong)
    assert (moved[mask & (got != 0)] > 0).all() and (got[mask & (A != 0)[:, None]] == 0).any()
    torch.testing.assert_close(credit.added_contrast(A, right, right, mask), torch.where(mask, A[:, None], 0.0))


def test_the_running_advantage_is_exact_with_the_ideal_pair_and_not_against_the_student():
    world = exact.World.of(exact.random_tabular(3, 3, 0), exact.random_tabular(3, 3, 1), 3, 3)
    R_y = (torch.arange(27) % 4 == 0).double()
    V, _ = exact_rewards.values(world, R_y)
    chosen = lambda logits: logits.log_softmax(-1).gather(-1, world.tokens[..., None])[..., 0]
    right, wrong = (chosen(exact_rewards.conditioned(world, x).teacher_logits) for x in (R_y, 1 - R_y))
    undecided = (V[:, :-1] > 0) & (V[:, :-1] < 1)  # afterwards both conditions say nothing
    got = credit.running_advantage(torch.where(undecided, right - wrong, 0.0), V[:, 0])
    torch.testing.assert_close(got, V.diff())
    student = credit.running_advantage(torch.where(undecided, right - chosen(world.logps()[0]), 0.0), V[:, 0])
    assert (student - V.diff()).abs().max() > 0.1
