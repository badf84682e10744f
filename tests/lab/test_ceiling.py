"""The oracles of the ceiling: values token by token, each arm's credit by definition, and the update around them."""

import copy
from functools import partial

import credit
import pytest
import torch
from conftest import new_model
from lab import ceiling

import train
from nano_opd import arithmetic, grpo, rlsd, sft
from nano_opd.arithmetic import rewards
from nano_opd.methods import Scored
from nano_opd.rollout import response_logprobs, sample
from nano_opd.system import config
from nano_opd.system.batches import draw_batch
from nano_opd.tokenizer import EOS, PAD, decode, encode

CFG = config.parse("--method rlsd --digits 2 --batch-size 16 --lr 0.01".split())


@pytest.fixture(scope="module")
def judged():
    """A model's answers, and answers made by hand: solved, one token wrong, cut short, too long, right without work."""
    model = new_model(CFG.prompt_length + CFG.response_cap, n_layer=1, n_embd=16)
    problems, prompts, _ = draw_batch(CFG, 0, torch.device("cpu"))
    rollout = sample(model, prompts, CFG.response_cap, torch.Generator().manual_seed(0))
    texts = [arithmetic.solution(p) for p in problems[:6]]
    texts[1] = texts[1][:5] + ("7" if texts[1][5] != "7" else "8") + texts[1][6:-1] + str((int(texts[1][-1]) + 1) % 10)
    texts[2], texts[3], texts[4] = texts[2][:9], texts[3] + "0", texts[4][texts[4].index("#") :]
    for row, text in enumerate(texts):
        tokens = (encode(text) + [EOS] + [PAD] * 99)[: CFG.response_cap]
        rollout.responses[row] = torch.tensor(tokens)
        rollout.mask[row] = torch.arange(CFG.response_cap) <= len(text)
    R = rewards(problems, rollout)
    assert R[:6].tolist() == [1, 0, 0, 0, 1, 1]
    generator = torch.Generator().manual_seed(1)
    logp, teacher_logp = -torch.rand(2, *rollout.mask.shape, generator=generator)
    scored = Scored(rollout.responses, rollout.mask, logp, logp, teacher_logp, rewards=R)
    return ceiling.Judged(scored, model, problems, 4, generator)


def test_the_oracle_knows_the_groups_and_the_evidence(judged):
    R, s = judged.scored.rewards, judged.scored
    assert torch.equal(judged.rate, R.view(-1, 4).mean(1).clamp(0.125, 0.875).repeat_interleave(4))
    assert torch.equal(judged.A, grpo.advantage(R, 4))
    assert torch.equal(judged.gain, torch.where(s.mask, s.teacher_logp - s.student_logp, 0.0))


def test_the_value_is_the_chance_to_go_on_as_taught(judged):
    V = judged.values()
    solutions = sft.solution_tokens(judged.problems, styles=["blank"] * 16)
    P = CFG.prompt_length
    logp = response_logprobs(judged.student, solutions, P)
    for row, mask in enumerate(judged.scored.mask):
        solution, written = solutions[row, P:].tolist(), judged.scored.tokens[row][mask].tolist()
        for n in range(len(mask) + 1):
            if n >= len(written):
                want = judged.scored.rewards[row]
            else:
                want = logp[row, n:].sum().exp() * (written[:n] == solution[:n])
            torch.testing.assert_close(V[row, n], torch.as_tensor(want).float(), msg=f"{row=} {n=}")
    assert (V[0] > 0).all() and V[1, 5] > 0 and (V[1, 6:] == 0).all()


def test_exact_credit_adds_up_to_the_surprise_and_blames_the_mistake(judged):
    A = ceiling.exact(judged) * (judged.rate * (1 - judged.rate)).sqrt()[:, None]
    V = judged.values()
    torch.testing.assert_close(A.sum(1), judged.scored.rewards - V[:, 0])
    assert (A[0] >= 0).all() and A[1].argmin() == 5 and (A[1, 6:] == 0).all()
    assert A[4].argmax() == judged.scored.mask[4].sum() - 1  # right without work: all of it on the last token


def test_the_ideal_weights_multiply_to_the_reward_over_the_value(judged):
    wide = ceiling.ideal_teacher(judged, 1.0, 1e9)[0] / judged.A[0]
    V = judged.values()
    assert judged.A[0] > 0
    torch.testing.assert_close(wide[judged.scored.mask[0]].prod(), 1 / V[0, 0], rtol=1e-3, atol=0)
    blame = (
        ceiling.ideal_teacher(judged, 1.0, 1.0)[1] / judged.A[1]
    )  # of a wrong response: at most twice, at the mistake
    assert (
        judged.A[1] < 0 and blame.argmax() == 5 and blame[5] == 2 and (blame[6:][judged.scored.mask[1, 6:]] == 1).all()
    )


def test_the_other_arms_by_their_definitions(judged):
    mask, A = judged.scored.mask, judged.A[:, None]
    first = ceiling.first_mistake(judged)
    for row, text in enumerate(map(decode, judged.scored.tokens.tolist())):
        n = credit.first_wrong_token(judged.problems[row], text)
        blamed = judged.A[row] < 0 and n is not None
        want = (
            torch.zeros(mask.shape[1]).index_fill(0, torch.tensor([n or 0]), 1.0)
            if blamed
            else torch.ones(mask.shape[1])
        )
        assert torch.equal(first[row], judged.A[row] * want)
    plain = rlsd.advantage(judged.A, judged.scored.teacher_logp, judged.scored.student_logp, mask, 0.5, 0.2)
    dealt = ceiling.dealt_anew(judged)
    assert not torch.equal(plain, dealt) and (dealt[~mask] == 0).all()
    for row in range(len(mask)):
        assert torch.allclose(plain[row, mask[row]].sort().values, dealt[row, mask[row]].sort().values)
    less = ceiling.less_its_one(judged)
    w = (judged.scored.teacher_logp - judged.scored.student_logp).mul(A.sign()).exp().clamp(0, 2)
    torch.testing.assert_close(less[mask], (A * (w - 1))[mask])
    log_odds = torch.logit(judged.rate) + torch.where(
        mask, judged.scored.teacher_logp - judged.scored.student_logp, 0.0
    ).sum(1)
    total = ceiling.running(judged).sum(1) * (judged.rate * (1 - judged.rate)).sqrt()
    torch.testing.assert_close(total, log_odds.sigmoid() - judged.rate)


@pytest.mark.parametrize(
    "method,arm", [("grpo", lambda b: b.A[:, None]), ("rlsd", lambda b: b.weighted(b.gain, 0.5, 0.2))]
)
def test_an_arm_with_a_methods_advantage_is_that_method(method, arm, monkeypatch):
    """The same problems, references, draws, scores and step: the arms differ from a method in the advantage alone."""
    cfg = config.parse(f"--method {method} --digits 2 --batch-size 16 --lr 0.01".split())
    start, teacher = (new_model(CFG.prompt_length + CFG.response_cap, n_layer=1, n_embd=16) for _ in range(2))
    monkeypatch.setattr(train, "rewards", lambda problems, rollout: (rollout.responses.sum(1) % 3 == 0).float())
    asked = []
    monkeypatch.setitem(ceiling.ARMS, "own", lambda b: (asked.append(b.problems), arm(b))[1])
    ends = []
    for update in (train.update, partial(ceiling.update, train.update, "own")):
        student = copy.deepcopy(start)
        measured = update(cfg, 3, student, teacher, sft.adamw(student, cfg.lr), sample)
        ends.append((student.state_dict(), measured))
    first, second = (weights for weights, _ in ends)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], start.embedding.weight)
    for name in ("grad_norm", "reward", "zero_groups"):  # the loss is another number with the same gradient
        assert ends[0][1][name] == ends[1][1][name]
    assert asked == [draw_batch(cfg, 3, torch.device("cpu"))[0]]


def test_every_arm_takes_a_step(judged):
    for arm in ceiling.ARMS:
        student, teacher = (copy.deepcopy(judged.student) for _ in range(2))
        measured = ceiling.update(train.update, arm, CFG, 0, student, teacher, sft.adamw(student, 1e-3), sample)
        assert set(measured) == {"loss", "grad_norm", "reward", "zero_groups"} and torch.isfinite(measured["loss"])
