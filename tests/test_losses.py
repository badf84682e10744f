"""The wiring of models to methods: each loss against a loop over tokens, probabilities and textbook formulas."""

import dataclasses

import pytest
import torch

from nano_opd import arithmetic, config, evaluate, losses
from nano_opd.gpt import GPT
from nano_opd.rollout import sample
from nano_opd.streams import numpy_stream, torch_stream

# −f and w_f in u, as the paper's Table 1 prints them
TABLE = {
    "reverse_kl": (lambda u: u.log(), lambda u: u.log() - 1),
    "forward_kl": (lambda u: -u * u.log(), lambda u: u),
    "pearson_chi2": (lambda u: -((u - 1) ** 2), lambda u: u**2 - 1),
}
TINY = config.Config(digits=1, heads=2, teacher_layers=1, teacher_width=16, student_layers=1, student_width=8)


def model(cfg, who, seed):
    torch.manual_seed(seed)
    model = GPT(cfg.gpt(who))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


@pytest.fixture
def scene():
    """Student, teacher and 16 rollouts of which some end early."""
    student, teacher = model(TINY, "student", 0), model(TINY, "teacher", 1)
    problems = arithmetic.sample_problems("add", 1, 16, numpy_stream(0, "losses"))
    rollout = sample(student, evaluate.prompts_of(problems), TINY.response_cap, torch_stream(0, "losses"))
    assert rollout.mask.sum(1).min() < rollout.mask.sum(1).max()
    return student, teacher, rollout


def by_hand(cfg, student, teacher, rollout):
    """−Σ A log p / B, one response and one token at a time; the whole vocabulary where the method sums over it."""
    total, P = 0.0, rollout.prompt_length
    minus_f, w = TABLE[cfg.divergence]
    own = minus_f if cfg.method == "opd" else w
    for tokens, mask in zip(rollout.tokens, rollout.mask):
        L = int(mask.sum())
        p = student(tokens[None])[0, P - 1 : P - 1 + L].softmax(-1)  # (L, V): position n − 1 predicts token n
        q = teacher(tokens[None])[0, P - 1 : P - 1 + L].softmax(-1)
        u = (q / p).detach()
        if cfg.log_u_clip:
            u = u.log().clamp(-cfg.log_u_clip, cfg.log_u_clip).exp()
        for n in range(L):
            y = tokens[P + n]
            mean = (p[n] * own((q / p)[n])).sum().detach()
            if cfg.method == "gkd" or cfg.variance == "full":
                total = total - (p[n] * own(u[n])).sum()  # Σ_v p_v A_v ∇log p_v = Σ_v A_v ∇p_v
                continue
            A = own(u[n, y]) - (mean if cfg.variance == "baseline" else 0.0)
            A = A + sum(cfg.gamma ** (m - n) * minus_f(u[m, tokens[P + m]]) for m in range(n + 1, L))
            total = total - A * p[n, y].log()
    return total / len(rollout.tokens)


def gradient(loss, student):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))])


@pytest.mark.parametrize("divergence", TABLE)
@pytest.mark.parametrize(
    "knobs",
    [
        {"method": "gkd"},
        *({"method": m, "variance": v} for m in ("opd", "opdplus") for v in ("sampled", "baseline", "full")),
        *({"method": m, "variance": "sampled", "gamma": g} for m in ("opd", "opdplus") for g in (0.5, 1.0)),
        {"method": "opdplus", "variance": "sampled", "log_u_clip": 0.3},
    ],
    ids=str,
)
def test_distillation_losses_have_the_gradient_of_the_loop(divergence, knobs, scene):
    cfg = dataclasses.replace(TINY, divergence=divergence, **knobs)
    student, teacher, rollout = scene
    loss, measured = losses.distillation_loss(cfg, student, teacher.requires_grad_(False), rollout)
    got, want = gradient(loss, student), gradient(by_hand(cfg, student, teacher, rollout), student)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-4 * want.abs().max().item())
    if cfg.log_u_clip:
        assert 0 < measured["clip_fraction"] < 1
