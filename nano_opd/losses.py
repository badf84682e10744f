"""What each method makes of a batch of rollouts: the models score it, the method says what A_t is, a loss comes out.

This is where models meet the method files, which know tensors only.
"""

import torch
from torch import Tensor

from nano_opd import arithmetic, distributed, divergences, gkd, grpo, opd, opdplus, opsd, policy_gradient, rlsd
from nano_opd.config import Config
from nano_opd.evaluate import prompts_of, reasoning_span, rewards
from nano_opd.gpt import GPT, logprobs_of
from nano_opd.rollout import Rollout, response_logits, response_logprobs
from nano_opd.streams import numpy_stream


def distillation_loss(cfg: Config, student: GPT, teacher: GPT, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
    """score → advantage: the loss of gkd, opd or opdplus on a batch of rollouts, and what was measured on the way."""
    divergence, mask, measured = divergences.get(cfg.divergence), rollout.mask, {}
    scored, baseline = (rollout.tokens, rollout.prompt_length), None
    estimator = {"opd": opd, "opdplus": opdplus}.get(cfg.method)  # gkd has none: it sums over the vocabulary
    if estimator and cfg.variance == "sampled":  # the log-probs of what was sampled are enough
        student_logp = response_logprobs(student, *scored)  # (B, R)
        with torch.no_grad():
            teacher_logp = response_logprobs(teacher, *scored)
    else:
        student_logits = response_logits(student, *scored).float()  # (B, R, V)
        with torch.no_grad():
            teacher_logits = response_logits(teacher, *scored).float()
        if not estimator or cfg.variance == "full":
            return gkd.loss(student_logits, teacher_logits, mask, divergence, stop_gradient=cfg.method == "opd"), {}
        student_logp, teacher_logp = (logprobs_of(rollout.responses, z) for z in (student_logits, teacher_logits))
        baseline = estimator.exact_baseline(student_logits, teacher_logits, divergence)

    log_u = teacher_logp - student_logp
    if cfg.log_u_clip > 0:
        measured["clip_fraction"] = (log_u.abs() > cfg.log_u_clip)[mask].float().mean()
        log_u = log_u.clamp(-cfg.log_u_clip, cfg.log_u_clip)
    advantage = estimator.advantage(log_u, mask, divergence, cfg.gamma, baseline)
    return policy_gradient.loss(student_logp, advantage, mask, cfg.normalize), measured


def privileged_loss(
    cfg: Config, step: int, student: GPT, teacher: GPT, rollout: Rollout, batch: list[arithmetic.Problem]
) -> tuple[Tensor, dict[str, Tensor]]:
    """score → advantage: the loss of grpo, opsd, grpo+opsd or rlsd, whose teacher is a copy of the student."""
    mask, loss, measured = rollout.mask, 0.0, {}
    student_logits = response_logits(student, rollout.tokens, rollout.prompt_length).float()  # (B, R, V)
    student_logp = logprobs_of(rollout.responses, student_logits)  # (B, R)
    old_logp = rollout.logp if cfg.epochs > 1 else student_logp.detach()  # drops nothing: ratio 1, gradient in logp
    if cfg.method != "grpo":
        rng = numpy_stream(cfg.seed, distributed.own("reference"), step)
        slots = arithmetic.draw_references(batch, cfg.group_size, rng, cfg.reference)
        view = opsd.privileged_view(rollout.tokens, rollout.prompt_length, prompts_of(batch, student.device, slots))
        with torch.no_grad():
            teacher_logits = response_logits(teacher, *view).float()
    if cfg.method in ("opsd", "grpo+opsd"):
        loss = cfg.opsd_coef * opsd.loss(student_logits, teacher_logits, mask, divergences.get(cfg.divergence))
    if cfg.method != "opsd":
        R = rewards(batch, rollout)  # (B,)
        A = grpo.advantage(R, cfg.group_size, normalize_std=cfg.loss_type == "grpo")
        measured |= {"reward": R.mean(), "zero_groups": grpo.zero_fraction(R, cfg.group_size)}
        if cfg.method == "rlsd":
            P_S = old_logp if cfg.student_logp == "sampling" else student_logp
            evidence = logprobs_of(rollout.responses, teacher_logits), P_S, mask
            measured["weight_clip_fraction"] = rlsd.clip_fraction(A, *evidence, cfg.eps_w)
            lam = rlsd.lam_at(step, cfg.lam, cfg.lam_warmup, cfg.lam_decay)
            span = reasoning_span(rollout) if cfg.reasoning_only else None
            A = rlsd.advantage(A, *evidence, lam, cfg.eps_w, cfg.negative_only, span)
        clip = cfg.clip_low, cfg.clip_high
        measured["clip_fraction"] = grpo.clip_fraction(student_logp, old_logp, mask, *clip)
        loss = loss + grpo.clipped_surrogate(student_logp, old_logp, A, mask, *clip, cfg.normalize)
    return loss, measured
