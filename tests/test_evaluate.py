"""Intervals, pass@k, and the KL, the entropy and the leakage of an evaluation against their definitions."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from nano_opd import arithmetic, evaluate, sft
from nano_opd.gpt import GPT, GPTConfig
from nano_opd.rollout import sample
from nano_opd.streams import numpy_stream, torch_stream
from nano_opd.tokenizer import VOCAB_SIZE, encode


def test_wilson_covers_the_truth():
    """Exact coverage over all outcomes of 60 trials: at least 93 % for every p, and never outside [0, 1]."""
    n = 60
    for p in torch.linspace(0.02, 0.98, 25).tolist():
        binomial = torch.distributions.Binomial(n, torch.tensor(p, dtype=torch.float64))
        covered = 0.0
        for k in range(n + 1):
            low, high = evaluate.wilson(k, n)
            covered += binomial.log_prob(torch.tensor(float(k))).exp().item() * (low <= p <= high)
        assert covered > 0.93
    assert evaluate.wilson(0, 500)[1] < 0.01 < 0.99 < evaluate.wilson(500, 500)[0]


def test_wilson_never_leaves_zero_to_one_and_is_never_empty():
    """Exactly: at 0 or n of n, rounding alone would leave it."""
    for n in range(1, 150):
        for k in range(n + 1):
            low, high = evaluate.wilson(k, n)
            assert 0 <= low < high <= 1 and low - 1e-12 <= k / n <= high + 1e-12


def test_pass_at_k_is_the_chance_that_k_of_the_samples_contain_a_right_one():
    correct = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.3
    for k in range(1, 6):
        subsets = list(itertools.combinations(range(5), k))
        want = sum(correct[:, list(s)].any(1).float().mean().item() for s in subsets) / len(subsets)
        assert evaluate.pass_at_k(correct, k) == pytest.approx(want)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k={k} of 5"):
            evaluate.pass_at_k(correct, k)


@pytest.fixture
def models():
    torch.manual_seed(0)
    return GPT(GPTConfig(VOCAB_SIZE, 20)), GPT(GPTConfig(VOCAB_SIZE, 20, 3, 4, 32))


@torch.no_grad()
def test_kl_and_entropy_are_means_over_the_sampled_tokens(models):
    student, teacher = models
    problems = arithmetic.sample_problems("add", 1, 40, numpy_stream(0, "x"))
    got = evaluate.evaluate(student, teacher, problems, 16, torch_stream(0, "y"))
    rollout = sample(student, arithmetic.prompts_of(problems), 16, torch_stream(0, "y"))
    kl, entropy, tokens = 0.0, 0.0, 0
    for row, mask in zip(rollout.tokens, rollout.mask):  # token by token, one prefix at a time
        for n in range(int(mask.sum())):
            p, q = (model(row[None, : 4 + n])[0, -1].double().softmax(-1) for model in models)
            kl, entropy, tokens = kl + (p * (p / q).log()).sum(), entropy - (p * p.log()).sum(), tokens + 1
    assert got["kl"] == pytest.approx(float(kl / tokens), rel=1e-4)
    assert got["entropy"] == pytest.approx(float(entropy / tokens), rel=1e-4)
    assert got["response_length"] == pytest.approx(tokens / 40)
    assert got["truncated"] == pytest.approx(rollout.truncated.float().mean().item())


def test_accuracy_is_of_the_samples_and_greedy_accuracy_of_the_likeliest_tokens(models):
    """A sampler that is right only when it is greedy, then one that is right only when it is not."""
    problems = arithmetic.sample_problems("add", 1, 10, numpy_stream(0, "x"))
    right, stream = sft.worked_solutions(problems), torch_stream(0, "y")
    tokens = right.tokens.clone()
    tokens[:, -2] = (tokens[:, -2] + 1) % 10  # the last digit of the answer
    wrong = replace(right, tokens=tokens, mask=right.mask.clone())
    wrong.mask[:, 5:] = False
    for greedy_is_right in (True, False):

        def sampler(model, prompts, max_new_tokens, generator=None, greedy=False, wanted=greedy_is_right):
            assert model is models[0] and max_new_tokens == 12 and (greedy or generator is stream)
            assert torch.equal(prompts, arithmetic.prompts_of(problems))
            return right if greedy == wanted else wrong

        got = evaluate.evaluate(*models, problems, 12, stream, sample=sampler)
        assert got["greedy_accuracy"] == greedy_is_right and got["accuracy"] == (not greedy_is_right)
        assert got["response_length"] == (5 if greedy_is_right else 11)  # as all the rest, of the samples


def test_a_student_is_at_distance_zero_from_itself(models):
    problems = arithmetic.sample_problems("add", 1, 10, numpy_stream(0, "x"))
    assert abs(evaluate.evaluate(models[0], models[0], problems, 16, torch_stream(0, "y"))["kl"]) < 1e-6


def self_taught_models():
    """Two random models whose prompts open with a reference slot."""
    return [GPT(GPTConfig(VOCAB_SIZE, 30, reference_slot=True)) for _ in range(2)]


@torch.no_grad()
def test_leakage_is_measured_against_every_reference(models):
    """leak_rate, kl and information_gap of an evaluation from prompts written out by hand, one prefix at a time."""
    torch.manual_seed(1)
    student, teacher = self_taught_models()
    for block in [*student.blocks, *teacher.blocks]:  # so that the reference is read at all
        torch.nn.init.normal_(block.attention_out.weight, std=0.5)
    student.embedding.weight[encode("@")[0]] *= 1.5  # so that some answers cite
    problems = arithmetic.sample_problems("add", 1, 40, numpy_stream(0, "x"))
    got = evaluate.evaluate(student, teacher, problems, 6, torch_stream(0, "y"))
    blank = torch.tensor([encode("_____ " + arithmetic.prompt(p)) for p in problems])
    rollout = sample(student, blank, 6, torch_stream(0, "y"))
    kl, gap, tokens, cited = 0.0, 0.0, 0, 0
    for problem, row, mask in zip(problems, rollout.tokens, rollout.mask):
        answer = f"#{problem.a + problem.b:02d}"
        carry, digit = divmod(problem.a + problem.b, 10)
        cited += encode("@")[0] in row[10:].tolist()
        for n in range(int(mask.sum())):
            p = student(row[None, : 10 + n])[0, -1].double().softmax(-1)
            q = []
            for slot in (f"{carry}{digit}{answer}", f"@_{answer}"):
                seen = torch.cat([torch.tensor(encode(slot)), row[5 : 10 + n]])
                q.append(teacher(seen[None])[0, -1].double().softmax(-1))
            mixture = (q[0] + q[1]) / 2
            gap += float(sum((x * (x / mixture).log()).sum() for x in q) / 2)
            kl += float(sum((p * (p / x).log()).sum() for x in q) / 2)
            tokens += 1
    assert got["kl"] == pytest.approx(kl / tokens, rel=1e-4)
    assert got["information_gap"] == pytest.approx(gap / tokens, rel=1e-3) and gap > 0
    assert got["leak_rate"] == pytest.approx(cited / 40) and 0 < cited < 40


def test_models_that_read_no_reference_are_not_asked_for_leaks(models):
    problems = arithmetic.sample_problems("add", 1, 40, numpy_stream(0, "x"))
    assert not {"leak_rate", "information_gap"} & set(
        evaluate.evaluate(*models, problems, max_new_tokens=6, generator=torch_stream(0, "y"))
    )


def test_a_student_and_a_teacher_that_read_different_prompts_are_refused(models):
    """Each of them would be measured on prompts that it never saw: a low number, and nothing that says why."""
    problems = arithmetic.sample_problems("add", 1, 4, numpy_stream(0, "x"))
    with_slot = self_taught_models()[0]
    for student, teacher in [(models[0], with_slot), (with_slot, models[0])]:
        with pytest.raises(ValueError, match="must both read prompts with a reference slot, or both without one"):
            evaluate.evaluate(student, teacher, problems, 6, torch_stream(0, "y"))


@pytest.mark.parametrize("reference_slot", [False, True])
def test_an_evaluation_in_pieces_is_the_evaluation(reference_slot, monkeypatch):
    """As for a large vocabulary: every problem with its own references, whatever piece it is in."""
    torch.manual_seed(0)
    student, teacher = (GPT(GPTConfig(VOCAB_SIZE, 30, reference_slot=reference_slot)) for _ in range(2))
    problems = arithmetic.sample_problems("add", 2, 7, np.random.default_rng(0))
    got = []
    for rows in (99, 3):
        monkeypatch.setattr(evaluate, "rows_at_once", lambda *_, rows=rows: rows)
        generator = torch.Generator().manual_seed(1)
        got.append(evaluate.evaluate(student, teacher, problems, 12, generator))
    assert set(got[0]) == set(got[1]) and got[0]["kl"] > 0.01
    assert all(got[0][name] == pytest.approx(got[1][name]) for name in got[0])
