"""The privileged view, its alignment, and the information gap against sums over plain floats."""

import math

import pytest
import torch

from nano_opd import arithmetic, divergences, gkd, opsd
from nano_opd.gpt import GPT, GPTConfig
from nano_opd.methods import METHODS, Scored
from nano_opd.rollout import response_logits, response_logprobs, sample
from nano_opd.streams import numpy_stream, torch_stream
from nano_opd.tokenizer import VOCAB_SIZE

R = 14


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(VOCAB_SIZE, 40))
    for block in model.blocks:  # the initialisation is the identity, which attends to nothing
        torch.nn.init.normal_(block.attention_out.weight, std=0.3)
        torch.nn.init.normal_(block.mlp_out.weight, std=0.3)
    return model


@pytest.fixture
def problems():
    return arithmetic.sample_problems("add", 1, 30, numpy_stream(0, "x"))


@pytest.fixture
def rollout(model, problems):
    prompts = arithmetic.prompts_of(problems, slots=arithmetic.slots_of(problems, "blank"))
    return sample(model, prompts, R, torch_stream(0, "y"))


def view_of(rollout, problems, style):
    prompts = arithmetic.prompts_of(problems, slots=None if style is None else arithmetic.slots_of(problems, style))
    return opsd.privileged_view(rollout.tokens, rollout.prompt_length, prompts)


def test_the_response_is_the_same_in_both_views_and_starts_at_the_same_position(rollout, problems):
    for style in (*arithmetic.REFERENCES, "blank"):
        tokens, prompt_length = view_of(rollout, problems, style)
        assert prompt_length == rollout.prompt_length == arithmetic.prompt_length(1, slot=True)
        assert torch.equal(tokens[:, prompt_length:], rollout.responses)
        problem_part = slice(arithmetic.slot_length(1) + 1, prompt_length)
        assert torch.equal(tokens[:, problem_part], rollout.tokens[:, problem_part])
        same = torch.equal(tokens, rollout.tokens)
        assert same == (style == "blank")
    shorter, prompt_length = view_of(rollout, problems, None)  # a prompt of another length stays aligned by response
    assert prompt_length < rollout.prompt_length and torch.equal(shorter[:, prompt_length:], rollout.responses)


@torch.no_grad()
def test_a_blank_reference_makes_the_teacher_the_student_and_a_real_one_does_not(model, rollout, problems):
    student = response_logprobs(model, rollout.tokens, rollout.prompt_length)
    assert torch.equal(response_logprobs(model, *view_of(rollout, problems, "blank")), student)
    assert not torch.allclose(response_logprobs(model, *view_of(rollout, problems, "work")), student)


def test_an_off_by_one_in_the_view_would_show(model, rollout, problems):
    """The teacher's logits at response token n are those after prompt and n tokens, computed one prefix at a time."""
    tokens, prompt_length = view_of(rollout, problems, "work")
    logits = response_logits(model, tokens, prompt_length)
    for n in (0, 3, R - 1):
        torch.testing.assert_close(logits[:, n], model(tokens[:, : prompt_length + n])[:, -1])


def test_the_loss_is_gkd_with_a_teacher_that_is_not_trained():
    student, teacher = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    student = student.requires_grad_()
    teacher = teacher.requires_grad_()
    mask = torch.arange(4) < torch.tensor([[4], [3], [1]])
    none = torch.empty(2, 0)  # of log-probs, which it does not read
    scored = Scored(none, mask, none, none, student_logits=student, teacher_logits=teacher)
    for name in ("jsd", "forward_kl", "alpha=0.3"):
        loss, measured = METHODS["opsd"].loss(scored, name)
        torch.testing.assert_close(loss, gkd.loss(student, teacher, mask, divergences.get(name)))
        (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
        assert gradient.abs().sum() > 0 and measured == {}
        assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)


@pytest.fixture
def teacher_logp():
    logits = torch.randn(3, 4, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    return logits.log_softmax(-1)


def test_the_information_gap_is_the_mean_kl_to_the_mixture(teacher_logp):
    got = opsd.information_gap(teacher_logp)
    K, B, T, V = teacher_logp.shape
    p = teacher_logp.exp().tolist()
    for b in range(B):
        for n in range(T):
            want = 0.0
            for v in range(V):
                of_references = [p[k][b][n][v] for k in range(K)]
                mixture = sum(of_references) / K
                want += sum(x * math.log(x / mixture) for x in of_references) / K
            assert got[b, n].item() == pytest.approx(want)


def test_the_gap_is_what_no_student_can_close(teacher_logp):
    """E_r KL(P_T(·|r) ‖ p) = I + KL(mean ‖ p) for every p, so the least is I, reached by the mean over r."""
    gap = opsd.information_gap(teacher_logp)
    mixture = teacher_logp.exp().mean(0)
    student = torch.randn(4, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    mean_kl = (teacher_logp.exp() * (teacher_logp - student)).sum(-1).mean(0)
    torch.testing.assert_close(mean_kl, gap + (mixture * (mixture.log() - student)).sum(-1))
    assert (mean_kl > gap).all()


def test_the_gap_is_zero_without_a_choice_and_ln_k_when_the_references_exclude_each_other(teacher_logp):
    one = teacher_logp[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(opsd.information_gap(one), torch.zeros(4, 2, dtype=torch.float64), rtol=0, atol=1e-12)
    disjoint = torch.full((3, 1, 1, 5), -math.inf)
    for k in range(3):
        disjoint[k, ..., k] = 0.0
    torch.testing.assert_close(opsd.information_gap(disjoint), torch.full((1, 1), math.log(3)))


def test_as_many_prompts_as_responses(rollout):
    with pytest.raises(ValueError, match="29 privileged prompts for 30 responses"):
        opsd.privileged_view(rollout.tokens, rollout.prompt_length, rollout.tokens[:29, :4])
