"""The suite can fail: each of these single edits, made in a copy of the package, must turn some test red."""

import pytest
from suite import exit_code_of_suite, exit_code_on_the_mutant

# file: (what stands there, once; what to put in its place; the test file and, as for -k, the tests that must notice)
# The first of each file of nano_opd/ is also in tests/test_mutants_one_each.py, which plain `pytest` runs.
MUTATIONS = {
    "opd.py": [
        ("own = reward  #", "own = divergence.w_f(log_u)  #", "exact: missing_term"),
        ("(mask, log_u, 0.0).detach()", "(mask, log_u, 0.0)", "estimators: baselines_are_detached"),
        ("baseline.detach()", "baseline", "estimators: baselines_are_detached"),
        ("own = reward  #", "own = -reward  #", "exact: missing_term"),
        ("future_return(reward, gamma)", "future_return(-reward, gamma)", "exact: missing_term"),
        ("divergence.weighted_f,", "divergence.weighted_w_f,", "estimators: exact_baselines"),
    ],
    "opdplus.py": [
        ("own = divergence.w_f(log_u)", "own = reward", "exact: unbiased_for_the_prefix"),
        ("(mask, log_u, 0.0).detach()", "(mask, log_u, 0.0)", "estimators: baselines_are_detached"),
        ("baseline.detach()", "baseline", "estimators: baselines_are_detached"),
        ("torch.where(mask, log_u, 0.0)", "torch.where(mask, -log_u, 0.0)", "exact: unbiased_for_the_prefix"),
        (
            "own = divergence.w_f(log_u)",
            "own = reward + divergence.f_prime(log_u)",
            "exact: unbiased_for_the_prefix",
        ),
        ("future_return(reward, gamma)", "future_return(own, gamma)", "exact: unbiased_for_the_prefix"),
        ("own + future_return", "own * future_return", "exact: unbiased_for_the_prefix"),
        ("A = A - baseline", "A = A * baseline", "exact: baseline_and_full"),
        ("divergence.weighted_w_f,", "divergence.weighted_f,", "estimators: exact_baselines"),
        ("A = torch.where(mask, A, 0.0)", "pass", "estimators: term_by_term"),
    ],
    "gkd.py": [
        ("constant_p_times_f = p_times_f.detach()", "constant_p_times_f = p_times_f", "exact: baseline_and_full"),
        ("(finite - finite.detach()).exp()", "1.0", "exact: baseline_and_full"),
        ("teacher_logits.detach()", "teacher_logits", "estimators: teacher_is_not_trained"),
        (
            "weighted_f(student_logp, teacher_logp)",
            "weighted_f(teacher_logp, student_logp)",
            "exact: baseline_and_full",
        ),
        ("p_times_f.sum(-1)", "(p_times_f * (teacher_logp - student_logp).exp()).sum(-1)", "estimators: gkd_value"),
        ("divergences.sum() / len(mask)", "divergences.mean()", "estimators: gkd_value"),
    ],
    "topk.py": [
        ("-(of_top + of_sampled)", "-of_top", "exact: top_k"),
        ("teacher_logits.detach()", "teacher_logits", "estimators: teacher_is_not_trained"),
        ("log_p = log_p.detach()", "pass", "exact: top_k"),
        ("(sampled_logq - sampled_logp.detach())", "(sampled_logq - sampled_logp)", "exact: top_k"),
        ("teacher_logp.topk(", "student_logp.topk(", "methods: distillation"),
        ("outside = mask & (top != tokens).all(-1)", "outside = mask", "exact: top_k"),
        ("min(k, vocabulary)", "vocabulary", "exact: not_in_the_sum"),
        ("torch.where(p_times_A == 0, 0.0, top_logp)", "top_logp", "estimators: cannot_say"),
    ],
    "policy_gradient.py": [
        ("reduce(-advantage * logp", "reduce(advantage * logp", "estimators: grad_logp"),
        ("logits.masked_fill(~mask.unsqueeze(-1), 0.0)", "logits", "exact: baseline_and_full"),
        ("logits.masked_fill(~mask.unsqueeze(-1), 0.0)", "logits", "estimators: top_k"),
        ("torch.where(mask, terms, 0.0)", "terms * mask", "estimators: longer_cap"),
        ("return terms.sum() / len(terms)", "return terms.mean()", "estimators: grad_logp"),
        ("return terms.sum() / len(terms)", "return (terms.sum(1) / mask.sum(1)).mean()", "exact: free_baseline"),
        ("terms.sum(1) / mask.sum(1)", "terms.sum(1) / mask.shape[1]", "exact: free_baseline"),
        ("reward[:, n + 1] + future", "reward[:, n] + future", "exact: unbiased_for_the_prefix"),
        (
            "gamma * (reward[:, n + 1] + future[:, n + 1])",
            "gamma * reward[:, n + 1] + future[:, n + 1]",
            "estimators: term_by_term",
        ),
        ("student_logits.detach()", "student_logits", "estimators: baselines_are_detached"),
        ("teacher_logits.detach()", "teacher_logits", "estimators: baselines_are_detached"),
        (
            "advantage(student_logp, teacher_logp)",
            "advantage(teacher_logp, student_logp)",
            "estimators: exact_baselines",
        ),
    ],
    "grpo.py": [
        ("advantages = torch.where(_all_equal(groups), 0.0, advantages)", "pass", "grpo: equal_rewards"),
        ("correction=0", "correction=1", "grpo: definition_group_by_group"),
        ("groups - groups.mean(1, keepdim=True)", "groups - groups.mean()", "grpo: definition_group_by_group"),
        ("torch.minimum(", "torch.maximum(", "grpo: token_by_token"),
        ("clamp(1 - clip_low, 1 + clip_high)", "clamp(1 - clip_high, 1 + clip_low)", "grpo: token_by_token"),
        ("torch.where(mask, logp - old_logp, 0.0)", "logp - old_logp", "grpo: behind_the_mask"),
        ("rewards.detach()", "rewards", "grpo: carry_no_gradient"),
        ("old_logp.detach()", "old_logp", "grpo: carry_no_gradient"),
    ],
    "rlsd.py": [
        ("advantage.sign() * gain", "gain", "rlsd: scalar_loop"),
        ("teacher_logp - student_logp, 0.0", "student_logp - teacher_logp, 0.0", "rlsd: scalar_loop"),
        ("lam * w.clamp(1 - eps_w, 1 + eps_w)", "lam * w", "rlsd: inside_the_clip"),
        ("(1 - lam) + lam", "1 + lam", "rlsd: bit_for_bit"),
        ("where(advantage < 0, multiplier", "where(advantage > 0, multiplier", "rlsd: leave_the_rest"),
        ("torch.where(span, multiplier, 1.0)", "multiplier", "rlsd: leave_the_rest"),
        ("torch.where(mask, advantage * multiplier, 0.0)", "advantage * multiplier", "rlsd: scalar_loop"),
        ("return w.detach()", "return w", "rlsd: carries_a_gradient"),
    ],
    "opsd.py": [
        ("tokens[:, prompt_length:]", "tokens[:, prompt_length - 1 :]", "opsd: same_position"),
        (" - math.log(len(teacher_logp))", "", "opsd: mean_kl"),
        ("kl_to_mixture.mean(0)", "kl_to_mixture.sum(0)", "opsd: mean_kl"),
        (
            "torch.where(p > 0, p * (teacher_logp - mixture_logp), 0.0)",
            "p * (teacher_logp - mixture_logp)",
            "opsd: ln_k",
        ),
    ],
    "evaluate.py": [
        ("teacher_logp.mean(0)", "teacher_logp[0]", "evaluate: every_reference"),
        ("max_new_tokens, greedy=True)", "max_new_tokens)", "evaluate: likeliest"),
        ("z2 / (4 * trials)", "z2 / (2 * trials)", "wires: wilson"),
        ('"truncated"] = rollout.', '"truncated"] = greedy.', "evaluate: means_over_the_sampled"),
        ("if teacher.config.reference_slot != reference_slot:", "if False:", "evaluate: read_different_prompts"),
    ],
    "arithmetic.py": [
        ("groups = groups[1:] + groups[:1]", "pass", "arithmetic: shuffled"),
        ("repeated(slots, group_size)", "repeated(slots, 1)", "arithmetic: shuffled"),
        ("problems != repeated(groups", "[] != repeated(groups", "arithmetic: shuffled"),
        ("list(TASKS).index(task)", "0", "arithmetic: own_split"),
        ("b = rng.integers(10, size=size)", "b = rng.integers(1, 10, size=size)", "wires: every_digit"),
        ("& ~rollout.truncated", "", "arithmetic: right_answer"),
        ('encode("#")[0]).cumsum(1) == 0', 'encode("#")[0]).cumsum(1) == 1', "arithmetic: reasoning_span"),
    ],
    "divergences.py": [
        ("return -self.f(log_u)", "return self.f(log_u)", "exact: missing_term"),
        ("f=lambda x: -x,", "f=lambda x: x,", "exact: names_say"),
        ("w_f=lambda x: x - 1,", "w_f=lambda x: 1 - x,", "exact: unbiased_for_the_prefix"),
        ("w_f=exp,", "w_f=lambda x: x * exp(x),", "exact: unbiased_for_the_prefix"),
        ("w_f=lambda x: _log_mean(x) / 2,", "w_f=lambda x: _log_mean(x),", "exact: unbiased_for_the_prefix"),
        ("f_prime=lambda x: x + 1,", "f_prime=lambda x: x,", "exact: missing_term"),
        ("return expm1(a * x) / a", "return expm1(a * x)", "exact: unbiased_for_the_prefix"),
        ("w_f=lambda x: x.sign() / 2,", "w_f=lambda x: x.sign(),", "exact: unbiased_for_the_prefix"),
        ("divergence.f(small) + c * expm1(small)", "divergence.f(small) - c * expm1(small)", "judge: jsd_falling"),
        ("divergence.f_prime(x) + c", "divergence.f_prime(x)", "judge: jsd_falling"),
        ("divergence.w_f(x) + c", "divergence.w_f(x)", "judge: jsd_falling"),
        ("softplus(x) / 2 - math.log(2)", "softplus(x) / 2", "divergences: minus_f"),
        ("divergence.w_f(clip(x))", "divergence.w_f(x)", "methods: distillation and log_u_clip"),
        ("x.clamp(-bound, bound)", "x.clamp(max=bound)", "methods: clipped_fraction or distillation"),
    ],
    "system/config.py": [
        (" * EFFORT.get(task, 1)", "", "train: recipe"),
        (" * digits / 3)", ")", "train: recipe"),
        ("option(SELF_TEACHER, 0.5,", "option(SELF_TEACHER, 1.0,", "wires: papers_settings"),
        ("option(SELF_TEACHER, 0.2,", "option(SELF_TEACHER, 0.3,", "wires: papers_settings"),
        ("made |= METHODS[method].recipe", "made |= {}", "train: recipe"),
        ("return list(METHODS)", "return those", "train: recipe"),
        ("    check_type(field, value)\n", "", "edited_code: made_by_hand"),
        ("if getattr(self, field.name) != defaults[field.name]:", "if False:", "edited_code: made_by_hand"),
        ("float(getattr(self, field.name))", "getattr(self, field.name)", "edited_code: the_same_run"),
    ],
    "rollout.py": [
        ("unfinished & (token != EOS)", "unfinished", "rollout: first_eos"),
        ("mask[:, n : n + 1] = unfinished", "mask[:, n : n + 1] = unfinished & (token != EOS)", "rollout: first_eos"),
        ("torch.where(unfinished, token, PAD)", "token", "rollout: first_eos"),
        ("slice(P + n - 1, P + n)", "slice(P + n - 2, P + n - 1)", "rollout: full_forward"),
        ("model(prompts[:, :-1], cache)", "pass", "rollout: full_forward"),
        ("(1 - uniform) * cdf", "(1 - uniform**2) * cdf", "rollout: follow_the_model"),
        (".exp() > 0", ".exp() >= 0", "rollout: probability_zero"),
        ("cache, at)[:, 0].float()", "cache, at)[:, 0].float().mul(2)", "rollout: follow_the_model"),
        ("if greedy:", "if False:", "rollout: likeliest"),
        ("torch.rand(R, B, 1, generator", "torch.rand(1, B, 1, generator", "wires: number_of_its_own"),
        (
            "tokens[:, :-1], logits_from=prompt_length - 1)",
            "tokens[:, 1:], logits_from=prompt_length - 1)",
            "rollout: predict_the_response",
        ),
    ],
    "system/fast_rollout.py": [
        ("ends.cumsum(1) - ends == 0", "ends.cumsum(1) == 0", "fast_rollout: give_the_same"),
        ("torch.where(mask, responses, PAD)", "responses", "fast_rollout: give_the_same"),
        ("slice(n, n + 1) for n in before", "slice(n - 1, n) for n in before", "fast_rollout: give_the_same"),
        ("first == 0 and P > 1", "first < 0", "fast_rollout: give_the_same"),
        ("responses.fill_(PAD)", "pass", "fast_rollout: remembers_nothing"),
        ("keys.zero_()", "pass", "fast_rollout: fault_does_not_stay"),
        ("values.zero_()", "pass", "fast_rollout: fault_does_not_stay"),
        ("torch.clear_autocast_cache()", "pass", "fast_rollout: is_replayed"),
        ("key = (sizes, greedy,", "key = (sizes,", "fast_rollout: is_replayed"),
        ("if len(of_model) == KEPT:", "if False:", "fast_rollout: is_replayed"),
        (
            "self.state = draft.state  # not",
            "self.draft, self.state = draft, draft.state  # not",
            "fast_rollout: is_replayed",
        ),
    ],
    "checks.py": [
        ("if advantage.requires_grad:", "if False:", "estimators: misuse"),
    ],
    "methods.py": [
        (
            "log_u = s.teacher_logp - s.student_logp\n    A = opd.",
            "log_u = s.student_logp - s.teacher_logp\n    A = opd.",
            "methods: distillation",
        ),
        (
            "log_u = s.teacher_logp - s.student_logp\n    A = opdplus.",
            "log_u = s.student_logp - s.teacher_logp\n    A = opdplus.",
            "methods: distillation",
        ),
        ("A = opd.advantage(", "A = opdplus.advantage(", "methods: distillation"),
        ("A = opdplus.advantage(", "A = opd.advantage(", "methods: distillation"),
        ("baseline = opd.exact_baseline(", "baseline = opdplus.exact_baseline(", "methods: distillation"),
        ("baseline = opdplus.exact_baseline(", "baseline = opd.exact_baseline(", "methods: distillation"),
        ("advantage=f.reward,", "advantage=f.w_f,", "methods: distillation"),
        ("advantage=f.w_f,", "advantage=f.reward,", "methods: distillation"),
        ("stop_gradient=True", "stop_gradient=False", "methods: distillation"),
        ("stop_gradient=False", "stop_gradient=True", "methods: distillation"),
        (
            "opd.advantage(log_u, s.mask, f, gamma, baseline)",
            "opd.advantage(log_u, s.mask, f, 0.0, baseline)",
            "methods: distillation and gamma",
        ),
        (
            "opdplus.advantage(log_u, s.mask, f, gamma, baseline)",
            "opdplus.advantage(log_u, s.mask, f, 0.0, baseline)",
            "methods: distillation and gamma",
        ),
        (
            "opd.advantage(log_u, s.mask, f, gamma, baseline)",
            "opd.advantage(log_u, s.mask, f, gamma)",
            "methods: distillation",
        ),
        (
            "opdplus.advantage(log_u, s.mask, f, gamma, baseline)",
            "opdplus.advantage(log_u, s.mask, f, gamma)",
            "methods: distillation",
        ),
        ("f = divergences.clipped(f, log_u_clip)", "pass", "methods: distillation and log_u_clip"),
        (
            "opd.exact_baseline(s.student_logits, s.teacher_logits, f, s.mask)",
            "opd.exact_baseline(s.student_logits, s.teacher_logits, f)",
            "methods: after_the_eos",
        ),
        (
            "opdplus.exact_baseline(s.student_logits, s.teacher_logits, f, s.mask)",
            "opdplus.exact_baseline(s.student_logits, s.teacher_logits, f)",
            "methods: after_the_eos",
        ),
        (
            "A = opd.advantage(log_u, s.mask, f, gamma, baseline)\n"
            "    return policy_gradient.loss(s.student_logp, A, s.mask, normalize)",
            "A = opd.advantage(log_u, s.mask, f, gamma, baseline)\n"
            "    return policy_gradient.loss(s.student_logp, A, s.mask)",
            "methods: distillation and token_mean",
        ),
        (
            "A = opdplus.advantage(log_u, s.mask, f, gamma, baseline)\n"
            "    return policy_gradient.loss(s.student_logp, A, s.mask, normalize)",
            "A = opdplus.advantage(log_u, s.mask, f, gamma, baseline)\n"
            "    return policy_gradient.loss(s.student_logp, A, s.mask)",
            "methods: distillation and token_mean",
        ),
        (
            "s.old_logp, A, s.mask, clip_low, clip_high, normalize)",
            "s.old_logp, A, s.mask, clip_high, clip_low, normalize)",
            "methods: rewarded",
        ),
        (
            "s.old_logp, A, s.mask, clip_low, clip_high, normalize)",
            "s.old_logp, A, s.mask, clip_low, clip_high)",
            "methods: rewarded",
        ),
        ("s.old_logp, s.mask, clip_low, clip_high)", "s.old_logp, s.mask, clip_high, clip_low)", "methods: measures"),
        (
            "clipped_surrogate(s.student_logp, s.old_logp,",
            "clipped_surrogate(s.student_logp, s.student_logp,",
            "methods: rewarded",
        ),
        (
            "A, s.teacher_logp, s.student_logp, s.mask, lam",
            "A, s.student_logp, s.teacher_logp, s.mask, lam",
            "methods: rewarded",
        ),
        (
            "A, s.teacher_logp, s.student_logp, s.mask, lam",
            "A, s.teacher_logp, s.old_logp, s.mask, lam",
            "methods: rewarded",
        ),
        (
            "A, s.teacher_logp, s.student_logp, s.mask, eps_w)",
            "A, s.student_logp, s.teacher_logp, s.mask, eps_w)",
            "methods: measures",
        ),
        ("rlsd.lam_at(s.step, lam, lam_decay)", "lam", "methods: rewarded"),
        ("if reasoning_only:", "if False:", "methods: rewarded"),
        ("negative_only=negative_only", "negative_only=False", "methods: rewarded"),
        (
            'clip_high, normalize="batch")',
            'clip_high, normalize="token_mean")',
            "methods: distillation and grpo+opsd",
        ),
        ("return opsd_part + grpo_part", "return opsd_part - grpo_part", "methods: distillation and grpo+opsd"),
    ],
    "../train.py": [
        ("if epoch == 0:", "if True:", "methods: rewarded"),
        ("optimizer=optimizer, teacher=teacher)", "optimizer=optimizer)", "train: keeps_its_teacher"),
        ("teacher.config.n_embd)", "student.config.n_embd)", "train: precision_is"),
        ("prompt_length, batch.teacher_prompts)", "prompt_length, batch.prompts)", "methods: self_teacher"),
        ('if method.teacher == "self":', "if False:", "methods: self_teacher"),
        ('cfg.grad_clip or float("inf")', 'float("inf")', "methods: shortened"),
        ("4 * cfg.eval_size, held_out=True", "4 * cfg.eval_size", "methods: held_out"),
        ('own("rollout"), step, device)', 'own("rollout"), 0, device)', "train: other_problems"),
        ('distributed.own("rollout")', '"rollout"', "wires: every_rank"),
        ("student_logits=student_logits,", "student_logits=teacher_logits,", "methods: distillation"),
        ("if METHODS[cfg.method].samples else", "if True else", "wires: copies_worked"),
        (
            "replicate(compiled(cfg.compile, student))",
            "replicate(compiled(cfg.compile, teacher))",
            "train: every_method_trains",
        ),
        ("step % cfg.teacher_sync == 0", "step == 0", "train: frozen_synced"),
        (
            "                student,\n                teacher,\n                problems",
            "                student,\n                student,\n                problems",
            "wires: first_row",
        ),
        ("precision(cfg.dtype, run", 'precision("auto", run', "wires: dtype"),
        ("min(1, 10 * (step + 1) / cfg.steps)", "1", "train: learning_rate"),
        ("fall = 1 - step / cfg.steps", "fall = 1", "train: learning_rate"),
    ],
    "tokenizer.py": [
        ("            break", "            continue", "tokenizer: round_trip"),
    ],
    "streams.py": [
        ("zlib.crc32(purpose.encode())", "hash(purpose) % 2**32", "wires: every_process"),
    ],
    "system/batches.py": [
        ('slots_of(problems, "blank"))', "references)", "methods: self_teacher"),
        (
            "teacher_prompts=prompts_of(problems, device, references)",
            "teacher_prompts=prompts_of(problems, device, slots_of(problems, 'blank'))",
            "methods: self_teacher",
        ),
        (
            '"problems", cfg.batch_size // cfg.copies, step)',
            '"problems", cfg.batch_size // cfg.copies)',
            "streams: drawn_anew",
        ),
        ('distributed.own("reference"), step)', 'distributed.own("reference"))', "streams: drawn_anew"),
        ('distributed.own("reference")', '"reference"', "streams: references_of_its_own"),
        ("rng, held_out)", "rng)", "methods: held_out"),
    ],
    "system/distributed.py": [
        ('else f"{purpose} of rank {rank()}"', "else purpose", "streams: every_rank"),
        ("return purpose if rank() == 0 else", "return", "streams: every_rank"),
    ],
    "sft.py": [
        ("encode(text) + [EOS]", "encode(text)", "methods: worked_solution"),
        ("lr * (1 - first / len(problems))", "lr", "wires: rate_of_a_warm_start"),
        ("slot=styles is not None)", "slot=False)", "wires: learns_its_solutions"),
        (
            "mask = tokens[:, prompt_length:] != PAD",
            "mask = tokens[:, prompt_length:] != EOS",
            "methods: worked_solution",
        ),
    ],
    "gpt.py": [
        ("is_causal=True", "is_causal=False", "gpt: only_the_past"),
        ("self.position.weight[at]", "self.position.weight[:T]", "gpt: cached_logits"),
        (
            "with self.autocast(enabled=False):  # a logit",
            "with self.autocast(enabled=True):  # a logit",
            "wires: dtype",
        ),
    ],
    "exact/law.py": [
        ("(1 - beta) * torch.log1p", "beta * torch.log1p", "judge: name_is_found"),
        ("* exp(-log_t)", "* exp(log_t)", "judge: generator_of"),
        ("exp(log_u) * log_u * integral", "log_u * integral", "judge: what_opd"),
        ("exp(-log_u) * (h(log_u) + w_h(log_u))", "exp(-log_u) * h(log_u)", "judge: generator_of"),
        (".clamp(max=1)", "", "judge: updates_lead"),
        ("logits + step, logits)", "logits - step, logits)", "judge: updates_lead"),
        ("p * (A - (p * A).sum(-1, keepdim=True))", "p * A", "judge: expected_update"),
    ],
    "exact/judge.py": [
        ("(J - J.mT).norm", "(J + J.mT).norm", "judge: asymmetry"),
        ("(work.sum(1).abs()", "(work.sum(1).abs() * 0", "judge: jump"),
        ("corners.roll(-1, 1)", "corners.roll(1, 0)", "judge: jump"),
        ("<= 1e-9 * apart.abs().max()", ">= 0", "judge: more_than_u"),
        ("centred = lambda A: A - A.mean(-1, keepdim=True)", "centred = lambda A: A", "judge: more_than_u"),
        ("of[..., 0] - of[..., 1]", "of[..., 0]", "judge: more_than_u"),
        ("diff() < -1e-9 * size", "diff() > 1e-9 * size", "judge: h_bends"),
        ("combinations(NAMED, 2)]", "[]]", "judge: name_is_found"),
        ("(1 - 2 * p + ", "(1 - p + ", "judge: exact_measures"),
        ("(u - g).norm()", "(u + g).norm()", "judge: exact_measures"),
        ("update(A, log_q, log_q)", "update(A, log_p, log_q)", "judge: teacher_and"),
        ("if not good), ", "if good), ", "judge: wrong_advantage"),
    ],
    "exact/enumeration.py": [
        ("world.probability().detach()", "world.probability(theta)", "exact: prefix_by_prefix"),
        ("world.probability().detach()", "world.probability()", "exact: own_weights"),
        ("ends_before = ends.cumsum(1) - ends", "ends_before = ends.cumsum(1)", "exact: listed_once"),
        ("second_moment - mean.square().sum()", "second_moment", "exact: one_response_at_a_time"),
        ("f(log_u.sum(1))", "f(log_u).sum(1)", "exact: names_say"),
    ],
    "exact/rewards.py": [
        ("prefix, probability * reward)", "prefix, reward)", "exact_rewards: share_a_prefix"),
        ("world.tokens[:, n]), V[-1])", "world.tokens[:, n]), V[0])", "exact_rewards: share_a_prefix"),
        ("world.probability(theta) * reward", "world.probability() * reward", "exact_rewards: with_token_advantages"),
        ("ratio.log())", "ratio)", "exact_rewards: conditioned_on_being_right"),
        ("(V > 0)", "(V >= 0)", "exact_rewards: conditioned_on_being_right"),
        ("torch.where(right, in_the_group[0], in_the_group[-1])", "in_the_group", "exact_rewards: groups"),
        ("k * (k - 1) * a @ a", "k * k * a @ a", "exact_rewards: enumerated_groups"),
        ("second_moment - mean @ mean", "second_moment", "exact_rewards: enumerated_groups"),
        ("rate**k * (1 - rate)", "rate ** (G - k) * (1 - rate)", "exact_rewards: enumerated_groups"),
        ("reward == 0) | (reward == 1", "reward >= 0) | (reward == 1", "exact_rewards: right_and_wrong"),
    ],
    "../notebooks/lab/seeds.py": [("<= 1e-12:", "<= 1e-3:", "wires: small_differences")],
    "../notebooks/lab/claims.py": [
        ("verdict(d, p, len(tested))", "verdict(d, p, len(claims))", "wires: verdict_counts")
    ],
    "../notebooks/credit.py": [
        ("rollout.logp[:, n - 1].exp() < sure", "rollout.logp[:, n].exp() < sure", "wires: token_before"),
        ("(right_logp - wrong_logp) / tau", "(right_logp - wrong_logp) * tau", "wires: added_contrast"),
    ],
    "../notebooks/figures.py": [
        ("divergence.reward(x), color", "divergence.f(x), color", "wires: rewards_figure"),
    ],
    "system/checkpoint.py": [
        ("if there.get(name) != here[name]", "if name in there and there[name] != here[name]", "wires: lacks_what"),
    ],
    "system/folder.py": [
        ('        "sft_lr": cfg.sft_lr,\n', "", "wires: another_file"),
        ("there.get(name) != code.get(name)", "name not in there", "reproduce: by_other_code"),
        ("if len(different) == 1 and", "if different and", "edited_code: names_the_run"),
        (
            "        theirs = other.not_default\n        ours = cfg.not_default\n",
            "        theirs = vars(other)\n        ours = vars(cfg)\n",
            "edited_code: brings",
        ),
    ],
    "system/sources.py": [('    "nano_opd/system/checkpoint.py",\n', "", "edited_code: decides_no_number")],
    "system/report.py": [
        ("torch.stack(right_of_tries, 1)", "torch.stack(right_of_tries)", "wires: pass_at_4"),
        ('generator, style="work")', "generator)", "wires: pass_at_4"),
    ],
    "system/runs.py": [
        ("            stop.check()\n", "            pass\n", "train: after_the_last_update"),
        ("torch_stream(self.cfg.seed, f", "torch_stream(0, f", "wires: two_seeds"),
        ('self.started -= state["seconds"]', "pass", "wires: clock"),
        (
            "self.cfg.run_key(resumed=True) | self.code",
            "self.cfg.run_key(resumed=True)",
            "edited_code: without_config_json",
        ),
        ("if not os.path.exists(self", "if False and os.path.exists(self", "edited_code: comes_back_whole"),
    ],
    "system/signals.py": [
        ("is threading.main_thread()", "is not None", "edited_code: another_thread"),
    ],
    "../notebooks/lab/reproduce.py": [
        ('("loss", "grad_norm", "clip', '("grad_norm", "clip', "wires: every_column"),
        ("--method rlsd --reference shuffled", "--method rlsd --reference none", "wires: arm_is_called"),
        ('"--seed", str(seed), "--out-dir"', '"--seed", "0", "--out-dir"', "reproduce: every_seed"),
        ("range(e.first_seed, e.first_seed +", "range(0,", "reproduce: every_seed"),
        ("[*e.common.split(), *e.arms[arm].split()]", "[*e.common.split()]", "reproduce: every_seed"),
        ("arguments += QUICK.split()", "arguments[:0] = QUICK.split()", "reproduce: every_seed"),
        (', "--resume"]', "]", "reproduce: not_run_twice"),
        ('if row["accuracy"]:', 'if row["accuracy"] and not evaluated:', "reproduce: not_run_twice"),
        ("updates[-1].append(row)", "updates[0].append(row)", "reproduce: not_run_twice"),
        ("sum(values) / len(values)", "values[-1]", "reproduce: not_run_twice"),
        ('(folder / "provenance.json").exists()', '(folder / "metrics.csv").exists()', "reproduce: not_run_twice"),
        (':.5g}"', ':.1g}"', "reproduce: not_run_twice"),
        ('symlink_to((out / "warm_starts")', 'symlink_to((folder / "none")', "reproduce: not_run_twice"),
        ("if any(saved.get(name) != value", "if all(saved.get(name) != value", "reproduce: of_another_run"),
        ("if end.code != 1:", "if end.code > 2:", "reproduce: of_another_run"),
        ('if row["experiment"] != experiment]', 'if row["experiment"] == experiment]', "reproduce: not_run_twice"),
        ("if git(", "if not git(", "reproduce: commit_is_named"),
        ("if run.oracle is not None:", "if False:", "reproduce: place_of_the_update"),
        ("CODE | self.code_of_oracle)", "CODE)", "reproduce: by_other_code"),
        ("mock.patch.dict(train.CODE, run.code_of_oracle)", "mock.patch.dict({})", "reproduce: by_other_code"),
    ],
    "../notebooks/lab/ceiling.py": [
        (".flip(1).cumsum(1).flip(1)", ".cumsum(1)", "ceiling: go_on_as_taught"),
        (".cumprod(1)", "", "ceiling: go_on_as_taught"),
        ("ended, rewards[:, None], V", "ended, 0.0, V", "ceiling: go_on_as_taught"),
        ("judged.scaled(judged.values().diff())", "-judged.scaled(judged.values().diff())", "ceiling: adds_up"),
        ("V[:, 1:] / V[:, :-1]", "V[:, :-1] / V[:, 1:]", "ceiling: ideal_weights"),
        ("1.0, 1.0) - judged.A[:, None]", "1.0, 1.0)", "ceiling: other_arms"),
        ("if A[row, 0] < 0 and", "if A[row, 0] > 0 and", "ceiling: other_arms"),
        ("masked_fill(~mask, 2.0)", "masked_fill(mask, 2.0)", "ceiling: other_arms"),
        ("draw_batch(cfg, scored.step,", "draw_batch(cfg, 0,", "ceiling: methods_advantage"),
        (
            "self.scored.teacher_logp - self.scored.old_logp",
            "self.scored.old_logp - self.scored.teacher_logp",
            "ceiling: groups_and_the_evidence",
        ),
    ],
}

# What a run counts, trains with, reports and keeps
OF_A_RUN = {
    "../train.py": [
        (
            'cfg.grad_clip or float("inf")',
            '(cfg.grad_clip if epoch == 0 else 0) or float("inf")',
            "wires_held: epoch_is_clipped",
        ),
        ('f"{who} solutions"', '"solutions"', "wires_held: different_problems"),
        ('"evaluation", step, run', '"evaluation", 0, run', "wires_held: numbers_of_its_own"),
        ('numpy_stream(cfg.seed, f"{who} views")', 'numpy_stream(0, f"{who} views")', "wires_held: as_many_blank"),
    ],
    "methods.py": [
        (
            "opd.advantage(log_u, s.mask, f, gamma, baseline)",
            "opd.advantage(log_u, s.mask, f, gamma if baseline is None else 0.0, baseline)",
            "wires_held: every_gamma",
        ),
        (
            "opdplus.advantage(log_u, s.mask, f, gamma, baseline)",
            "opdplus.advantage(log_u, s.mask, f, gamma if baseline is None else 0.0, baseline)",
            "wires_held: every_gamma",
        ),
    ],
    "gpt.py": [
        ("return 2 * n_embd**-0.5", "return n_embd**-0.5", "wires_held: gain_of_two"),
        ("betas=(0.9, 0.95)", "betas=(0.9, 0.999)", "wires_held: betas"),
        ("betas=(0.9, 0.95)", "betas=(0.8, 0.95)", "wires_held: betas"),
        ("weight_decay=0.0", "weight_decay=0.01", "wires_held: betas"),
    ],
    "sft.py": [('["blank", "blank", *arith', '["blank", *arith', "wires_held: as_many_blank")],
    "system/config.py": [
        ("solution_length(self.digits) + 5", "solution_length(self.digits) + 4", "wires_held: five_tokens_more"),
        ("solution_length(self.digits) + 5", "solution_length(self.digits) + 6", "wires_held: five_tokens_more"),
        ("n_layer=layers[who]", "n_layer=self.teacher_layers", "wires_held: that_were_asked_for"),
    ],
    "system/runs.py": [
        (
            "step * self.cfg.batch_size\n",
            "step * self.cfg.batch_size * self.cfg.epochs\n",
            "wires_held: counts_its_rollouts",
        ),
        (
            "round(self.seconds, 3)",
            "round(time.monotonic() - self.started, 3)",
            "wires_held: clock_of_a_row",
        ),
        (
            'state["seconds"] = time.monotonic() - self.started',
            'state["seconds"] = self.seconds',
            "wires_held: clock_of_a_resumed",
        ),
        ("self.bar.update(first)", "pass", "wires_held: bar_of_a_resumed"),
        ("{measured['accuracy']:.3f}", "{measured['greedy_accuracy']:.3f}", "wires_held: under_its_own_label"),
        ('f"{who} weights"', '"weights"', "wires_held: of_one_size"),
        (
            "            self.said = now\n        self.stop.check()",
            "            self.said = now",
            "wires_held: ends_a_warm_start",
        ),
    ],
    "system/report.py": [
        ("number = len(right)", "number = run.cfg.eval_size", "wires_held: under_its_own_label"),
        (
            "    start = run.rows[0]\n    end = run.rows[-1]\n",
            "    start = run.rows[-1]\n    end = run.rows[0]\n",
            "wires_held: under_its_own_label",
        ),
        ('("kl", "KL to', '("entropy", "KL to', "wires_held: under_its_own_label"),
        ('("greedy_accuracy", "acc', '("accuracy", "acc', "wires_held: under_its_own_label"),
        ('("leak_rate", "answers', '("information_gap", "answers', "wires_held: under_its_own_label"),
        ("texts_of_tries[0])", "texts_of_tries[1])", "wires_held: first_broken_step"),
        ("(problems[i], texts[i])", "(problems[i], texts[0])", "wires_held: first_broken_step"),
        ('run.rows[-1]["seconds"]', 'run.rows[0]["seconds"]', "wires_held: clock_of_a_row"),
        ("of {cfg.batch_size} rollouts", "of {cfg.eval_size} rollouts", "wires_held: clock_of_a_row"),
        ('("kl", BLUE, ', '("entropy", BLUE, ', "wires_held: curves_of_a_run"),
        ('GREEN, "student entropy"', 'GREEN, "KL(student‖teacher)"', "wires_held: curves_of_a_run"),
        (
            "student, problems, generator)",
            'student, problems, torch_stream(cfg.seed, "answers", device=run.device))',
            "wires_held: one_after_the_other",
        ),
        ("[*wrong_ones, *right_ones]", "[*right_ones, *wrong_ones]", "wires_held: wrong_answers_first"),
        (
            "training_curves(run.rows, cfg.eval_size",
            "training_curves(run.rows, cfg.batch_size",
            "wires_held: curves_of_a_run",
        ),
        ("right.mean() < 0.9", "right.mean() < 0.85", "wires_held: teacher_is_weak"),
        ("right.mean() < 0.9", "right.mean() < 0.95", "wires_held: teacher_is_weak"),
        ('"teacher check", 500, held_out=True', '"teacher check", 500', "wires_held: teacher_is_weak"),
        ('"teacher check", 500, held_out=True', '"teacher check", 50, held_out=True', "wires_held: teacher_is_weak"),
    ],
    "system/checkpoint.py": [
        ('f"{name!r}: {digest(value)}"', "digest(value)", "wires_held: exchanged_their_names"),
    ],
    "system/folder.py": [
        (
            "    with _locked(cfg.run_dir):\n        _remove_unfinished_files(cfg.run_dir)\n",
            "    _remove_unfinished_files(cfg.run_dir)\n    with _locked(cfg.run_dir):\n",
            "wires_held: refused_a_folder",
        ),
    ],
}
CASES = [
    (file, *mutation) for table in (MUTATIONS, OF_A_RUN) for file, mutations in table.items() for mutation in mutations
]


@pytest.mark.parametrize("file,old,new,guard", CASES, ids=[f"{c[0]}-{c[2].strip()}" for c in CASES])
def test_the_suite_fails_on_the_mutant(file, old, new, guard, copied_package):
    assert exit_code_on_the_mutant(copied_package, file, old, new, guard) == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize("file", sorted({guard.split(": ")[0] for *_, guard in CASES}))
def test_the_suite_passes_on_the_unchanged_copy(file, copied_package):
    """Every test that a mutation relies on: were one of them always red, its mutants would prove nothing."""
    expressions = {guard.split(": ")[1] for *_, guard in CASES if guard.startswith(f"{file}: ")}
    assert exit_code_of_suite(copied_package, file, " or ".join(sorted(expressions))) == pytest.ExitCode.OK
