"""Intervals, pass@k, rewards, and the KL and entropy of an evaluation against their definitions."""

import itertools

import pytest
import torch

from nano_opd import arithmetic, evaluate
from nano_opd.gpt import GPT, GPTConfig
from nano_opd.rollout import Rollout, sample
from nano_opd.streams import numpy_stream, torch_stream
from nano_opd.tokenizer import EOS, PAD, VOCAB_SIZE, encode


def test_pass_at_k_is_the_chance_that_k_of_the_samples_contain_a_right_one():
    correct = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.3
    for k in range(1, 6):
        subsets = list(itertools.combinations(range(5), k))
        want = sum(correct[:, list(s)].any(1).float().mean().item() for s in subsets) / len(subsets)
        assert evaluate.pass_at_k(correct, k) == pytest.approx(want)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k={k} of 5"):
            evaluate.pass_at_k(correct, k)


def test_a_right_answer_counts_only_with_its_eos():
    problem = arithmetic.Problem("add", 1, 2, 3)
    texts = ["2+3=05 #05", "2+3=05 #06", "2+3=05 #05"]
    rows = [encode(arithmetic.prompt(problem) + text) for text in texts]
    tokens = torch.tensor([rows[0] + [EOS, PAD], rows[1] + [EOS, PAD], rows[2] + encode("  ")])
    mask = torch.tensor([[True] * 11 + [False], [True] * 11 + [False], [True] * 12])
    rollout = Rollout(tokens, 4, mask, torch.zeros(3, 12))
    assert evaluate.rewards([problem] * 3, rollout).tolist() == [1, 0, 0]
    padded = torch.tensor([rows[0] + [PAD, 9, EOS]])  # a PAD can be sampled like any token; it ends nothing
    assert evaluate.rewards([problem], Rollout(padded, 4, torch.ones(1, 13, dtype=torch.bool), torch.zeros(1, 13))) == 0
    cut = Rollout(tokens[2:, :-2], 4, mask[2:, :-2], torch.zeros(1, 10))  # the right answer, but never an EOS
    assert cut.truncated.item() and evaluate.rewards([problem], cut).tolist() == [0]


@pytest.fixture
def models():
    torch.manual_seed(0)
    return GPT(GPTConfig(VOCAB_SIZE, 20)), GPT(GPTConfig(VOCAB_SIZE, 20, 3, 4, 32))


@torch.no_grad()
def test_kl_and_entropy_are_means_over_the_sampled_tokens(models):
    student, teacher = models
    problems = arithmetic.sample_problems("add", 1, 40, numpy_stream(0, "x"))
    got = evaluate.evaluate(student, teacher, problems, 16, torch_stream(0, "y"))
    rollout = sample(student, evaluate.prompts_of(problems), 16, torch_stream(0, "y"))
    kl, entropy, tokens = 0.0, 0.0, 0
    for row, mask in zip(rollout.tokens, rollout.mask):  # token by token, one prefix at a time
        for n in range(int(mask.sum())):
            p, q = (model(row[None, : 4 + n])[0, -1].double().softmax(-1) for model in models)
            kl, entropy, tokens = kl + (p * (p / q).log()).sum(), entropy - (p * p.log()).sum(), tokens + 1
    assert got["kl"] == pytest.approx(float(kl / tokens), rel=1e-4)
    assert got["entropy"] == pytest.approx(float(entropy / tokens), rel=1e-4)
    assert got["response_length"] == pytest.approx(tokens / 40)
    assert got["truncated"] == pytest.approx(rollout.truncated.float().mean().item())


def test_a_student_is_at_distance_zero_from_itself(models):
    problems = arithmetic.sample_problems("add", 1, 10, numpy_stream(0, "x"))
    assert abs(evaluate.evaluate(models[0], models[0], problems, 16, torch_stream(0, "y"))["kl"]) < 1e-6


@torch.no_grad()
def test_leakage_is_measured_against_every_reference(models):
    """leak_rate, kl and information_gap of an evaluation from prompts written out by hand, one prefix at a time."""
    torch.manual_seed(1)
    student, teacher = (GPT(GPTConfig(VOCAB_SIZE, 30)) for _ in range(2))
    for block in [*student.blocks, *teacher.blocks]:  # so that the reference is read at all
        torch.nn.init.normal_(block.attention_out.weight, std=0.5)
    student.embedding.weight[encode("@")[0]] *= 1.5  # so that some answers cite
    problems = arithmetic.sample_problems("add", 1, 40, numpy_stream(0, "x"))
    got = evaluate.evaluate(student, teacher, problems, 6, torch_stream(0, "y"), privileged=True)
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
    assert "leak_rate" not in evaluate.evaluate(student, teacher, problems, 6, torch_stream(0, "y"))


def test_the_reasoning_span_ends_before_the_answer():
    texts = ["2+3=05 #05", "#05", "2+3"]
    rows = torch.tensor([encode(t) + [EOS] + [PAD] * (11 - len(t)) for t in texts])
    span = evaluate.reasoning_span(Rollout(rows, 0, rows != PAD, torch.zeros(rows.shape)))
    assert span[0].tolist() == [True] * 7 + [False] * 5 and not span[1].any() and span[2].all()


def test_token_credit_by_hand():
    advantage = torch.tensor([[-1.0, -1, -1, -1], [-1, -4, -1, 9], [0.5, 2, -2, 0.5], [0, 0, 3, 1]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    ratio, first = evaluate.token_credit(advantage, mask, torch.tensor([2, 1, 1, 0]))
    torch.testing.assert_close(ratio, torch.tensor([1.0, 4.0, 2.0, 0.0]))
    torch.testing.assert_close(first, torch.tensor([0.25, 1.0, 0.5, 0.0]))
    torch.testing.assert_close(evaluate.token_credit(10 * advantage, mask, torch.tensor([2, 1, 1, 0])), (ratio, first))
    for token, cut in [(3, mask), (0, mask & (torch.arange(4) < 1))]:
        with pytest.raises(ValueError, match="inside a response of at least two tokens"):
            evaluate.token_credit(advantage, cut, torch.full((4,), token))
