"""The suite can fail: each of these single edits, made in a copy of the package, must turn some test red."""

import pytest
from suite import exit_code_of_suite, exit_code_on_the_mutant

# file: (what stands there, once; what to put in its place; the test file and, as for -k, the tests that must notice)
# The first of each file of nano_opd/ is also in tests/test_mutants_one_each.py, which plain `pytest` runs.
MUTATIONS = {
    "opd.py": [
        ("(mask, log_u, 0.0).detach()", "(mask, log_u, 0.0)", "estimators: baselines_are_detached"),
        ("baseline.detach()", "baseline", "estimators: baselines_are_detached"),
        ("own = reward\n", "own = -reward\n", "exact: missing_term"),
        ("own = reward\n", "own = divergence.w_f(log_u)\n", "exact: missing_term"),
        ("future_return(reward, gamma)", "future_return(-reward, gamma)", "exact: missing_term"),
        (
            "teacher_logits, divergence.reward,",
            "teacher_logits, divergence.w_f,",
            "estimators: exact_baselines",
        ),
    ],
    "opdplus.py": [
        ("(mask, log_u, 0.0).detach()", "(mask, log_u, 0.0)", "estimators: baselines_are_detached"),
        ("baseline.detach()", "baseline", "estimators: baselines_are_detached"),
        ("torch.where(mask, log_u, 0.0)", "torch.where(mask, -log_u, 0.0)", "exact: unbiased_for_the_prefix"),
        ("own = divergence.w_f(log_u)", "own = reward", "exact: unbiased_for_the_prefix"),
        (
            "own = divergence.w_f(log_u)",
            "own = reward + divergence.f_prime(log_u)",
            "exact: unbiased_for_the_prefix",
        ),
        ("future_return(reward, gamma)", "future_return(own, gamma)", "exact: unbiased_for_the_prefix"),
        ("own + future_return", "own * future_return", "exact: unbiased_for_the_prefix"),
        ("A = A - baseline", "A = A * baseline", "exact: baseline_and_full"),
        ("teacher_logits, divergence.w_f,", "teacher_logits, divergence.f,", "estimators: exact_baselines"),
        ("return torch.where(mask, A, 0.0)", "return A", "estimators: term_by_term"),
    ],
    "gkd.py": [
        ("f = f.detach()", "pass", "exact: baseline_and_full"),
        ("f = f.detach()", "student_logp = student_logp.detach()", "exact: baseline_and_full"),
        ("teacher_logits.detach()", "teacher_logits", "estimators: teacher_is_not_trained"),
        ("(teacher_logp - student_logp)", "(student_logp - teacher_logp)", "exact: baseline_and_full"),
        ("(student_logp.exp() * f)", "(teacher_logp.exp() * f)", "estimators: gkd_value"),
        (".sum() / len(mask)", ".mean()", "estimators: gkd_value"),
    ],
    "topk.py": [
        ("teacher_logits.detach()", "teacher_logits", "estimators: teacher_is_not_trained"),
        ("p = student_logp.detach().exp()", "p = student_logp.exp()", "exact: top_k"),
        ("(teacher_logp - student_logp.detach())", "(teacher_logp - student_logp)", "exact: top_k"),
        ("teacher_logp.topk(", "student_logp.topk(", "methods: distillation"),
        ("torch.where(top == 1, p, sampled)", "torch.where(top == 1, p, 0.0)", "exact: top_k"),
        ("torch.where(top == 1, p, sampled)", "top * p + sampled", "exact: top_k"),
        ("A = torch.where(counts, A, 0.0)", "pass", "exact: not_in_the_sum"),
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
        ("(student_logp.exp() *", "(teacher_logits.softmax(-1) *", "estimators: exact_baselines"),
    ],
    "grpo.py": [
        ("torch.where(_equal(groups), 0.0, A).flatten()", "A.flatten()", "grpo: equal_rewards"),
        ("correction=0", "correction=1", "grpo: definition_group_by_group"),
        ("groups - groups.mean(1, keepdim=True)", "groups - groups.mean()", "grpo: definition_group_by_group"),
        ("torch.minimum(", "torch.maximum(", "grpo: token_by_token"),
        ("clamp(1 - clip_low, 1 + clip_high)", "clamp(1 - clip_high, 1 + clip_low)", "grpo: token_by_token"),
        ("torch.where(mask, logp - old_logp, 0.0).exp()", "(logp - old_logp).exp()", "grpo: behind_the_mask"),
        ("rewards.detach()", "rewards", "grpo: carry_no_gradient"),
        ("old_logp.detach()", "old_logp", "grpo: carry_no_gradient"),
    ],
    "rlsd.py": [
        ("advantage.sign() * gain", "gain", "rlsd: scalar_loop"),
        ("teacher_logp - student_logp, 0.0", "student_logp - teacher_logp, 0.0", "rlsd: scalar_loop"),
        ("lam * w.clamp(1 - eps_w, 1 + eps_w)", "lam * w", "rlsd: inside_the_clip"),
        ("(1 - lam) + lam", "1 + lam", "rlsd: bit_for_bit"),
        ("torch.where(A < 0, multiplier, 1.0)", "torch.where(A > 0, multiplier, 1.0)", "rlsd: leave_the_rest"),
        ("torch.where(span, multiplier, 1.0)", "multiplier", "rlsd: leave_the_rest"),
        ("torch.where(mask, A * multiplier, 0.0)", "A * multiplier", "rlsd: scalar_loop"),
        ("return w.detach()", "return w", "rlsd: carries_a_gradient"),
    ],
    "opsd.py": [
        ("tokens[:, prompt_length:]]", "tokens[:, prompt_length - 1 :]]", "opsd: same_position"),
        (" - math.log(len(teacher_logp))", "", "opsd: mean_kl"),
        (".sum(-1).mean(0)", ".sum(-1).sum(0)", "opsd: mean_kl"),
        ("torch.where(p > 0, p * (teacher_logp - mixture), 0.0)", "(p * (teacher_logp - mixture))", "opsd: ln_k"),
    ],
    "evaluate.py": [
        ("teacher_logp.mean(0)", "teacher_logp[0]", "evaluate: every_reference"),
        ("max_new_tokens, greedy=True)", "max_new_tokens)", "evaluate: likeliest"),
        ("z2 / (4 * trials)", "z2 / (2 * trials)", "wires: wilson"),
    ],
    "arithmetic.py": [
        ("groups = groups[1:] + groups[:1]", "pass", "arithmetic: shuffled"),
        ("slots for _ in range(group_size)]", "slots for _ in range(1)]", "arithmetic: shuffled"),
        ("problems != [problem", "[] != [problem", "arithmetic: shuffled"),
        ("list(TASKS).index(task)", "0", "arithmetic: own_split"),
        ("rng.integers(10, size=size)])", "rng.integers(1, 10, size=size)])", "wires: every_digit"),
        ("& ~rollout.truncated", "", "evaluate: right_answer"),
        ('encode("#")[0]).cumsum(1) == 0', 'encode("#")[0]).cumsum(1) == 1', "evaluate: reasoning_span"),
    ],
    "divergences.py": [
        ("return -self.f(log_u)", "return self.f(log_u)", "exact: missing_term"),
        ('"reverse_kl", lambda x: -x,', '"reverse_kl", lambda x: x,', "exact: names_say"),
        ("lambda x: x - 1)", "lambda x: 1 - x)", "exact: unbiased_for_the_prefix"),
        ("lambda x: x + 1, exp)", "lambda x: x + 1, lambda x: x * exp(x))", "exact: unbiased_for_the_prefix"),
        (
            "lambda x: log1p(expm1(x) / 2) / 2)",
            "lambda x: log1p(expm1(x) / 2))",
            "exact: unbiased_for_the_prefix",
        ),
        ("lambda x: x + 1, exp)", "lambda x: x, exp)", "exact: missing_term"),
        ("else expm1(a * x) / a", "else expm1(a * x)", "exact: unbiased_for_the_prefix"),
        (
            "x.sign() / 2, lambda x: x.sign() / 2)",
            "x.sign() / 2, lambda x: x.sign())",
            "exact: unbiased_for_the_prefix",
        ),
        ("d.f(x) + c * expm1(x)", "d.f(x) - c * expm1(x)", "judge: jsd_falling"),
        ("d.f_prime(x) + c", "d.f_prime(x)", "judge: jsd_falling"),
        ("d.w_f(x) + c", "d.w_f(x)", "judge: jsd_falling"),
        ("softplus(x) / 2 - math.log(2)", "softplus(x) / 2", "divergences: minus_f"),
        ("clip(d.w_f)", "d.w_f", "methods: distillation and log_u_clip"),
        ("x.clamp(-bound, bound)", "x.clamp(max=bound)", "methods: clipped_fraction or distillation"),
    ],
    "system/config.py": [
        (" * EFFORT.get(task, 1)", "", "train: recipe"),
        (" * digits / 3)}", ")}", "train: recipe"),
        ("lam: float = option(0.5,", "lam: float = option(1.0,", "wires: papers_settings"),
        ("eps_w: float = option(0.2,", "eps_w: float = option(0.3,", "wires: papers_settings"),
        ("made |= METHODS[method].recipe", "made |= {}", "train: recipe"),
        ("needs(method)] or list(METHODS)", "needs(method)]", "train: recipe"),
        ("if not _has_type(value, field.type):", "if False:", "edited_code: made_by_hand"),
        ("elif getattr(self, field.name) != defaults[field.name]:", "elif False:", "edited_code: made_by_hand"),
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
        ("kept.zero_()", "pass", "fast_rollout: fault_does_not_stay"),
        ("torch.clear_autocast_cache()", "pass", "fast_rollout: is_replayed"),
        ("key = (sizes, greedy,", "key = (sizes,", "fast_rollout: is_replayed"),
        ("if len(of_model) == KEPT:", "if False:", "fast_rollout: is_replayed"),
        ("state, graphs  # not", "(state, extend), graphs  # not", "fast_rollout: is_replayed"),
    ],
    "checks.py": [
        ("if advantage.requires_grad:", "if False:", "estimators: misuse"),
    ],
    "methods.py": [
        ("log_u = s.teacher_logp - s.student_logp", "log_u = s.student_logp - s.teacher_logp", "methods: distillation"),
        (
            '"opd": Method(partial(distillation_loss, opd)',
            '"opd": Method(partial(distillation_loss, opdplus)',
            "methods: distillation",
        ),
        ("stop_gradient=estimator is opd", "stop_gradient=estimator is opdplus", "methods: distillation"),
        ("s.mask, f, gamma, baseline)", "s.mask, f, 0.0, baseline)", "methods: distillation and gamma"),
        ("s.mask, f, gamma, baseline)", "s.mask, f, gamma)", "methods: distillation"),
        ("f = divergences.clipped(f, log_u_clip)", "pass", "methods: distillation and log_u_clip"),
        ("s.teacher_logits, f, s.mask)", "s.teacher_logits, f)", "methods: after_the_eos"),
        (
            "policy_gradient.loss(s.student_logp, A, s.mask, normalize)",
            "policy_gradient.loss(s.student_logp, A, s.mask)",
            "methods: distillation and token_mean",
        ),
        (
            "A, s.mask, clip_low, clip_high, normalize)",
            "A, s.mask, clip_high, clip_low, normalize)",
            "methods: rewarded",
        ),
        ("A, s.mask, clip_low, clip_high, normalize)", "A, s.mask, clip_low, clip_high)", "methods: rewarded"),
        ("*ratio, s.mask, clip_low, clip_high)", "*ratio, s.mask, clip_high, clip_low)", "methods: measures"),
        ("ratio = s.student_logp, s.old_logp", "ratio = s.student_logp, s.student_logp", "methods: rewarded"),
        ("A, s.teacher_logp, s.student_logp, s.mask", "A, s.student_logp, s.teacher_logp, s.mask", "methods: rewarded"),
        ("A, s.teacher_logp, s.student_logp, s.mask", "A, s.teacher_logp, s.old_logp, s.mask", "methods: rewarded"),
        ("rlsd.lam_at(s.step, lam, lam_decay)", "lam", "methods: rewarded"),
        ("if reasoning_only else None", "if False else None", "methods: rewarded"),
        ("eps_w, negative_only, span)", "eps_w, False, span)", "methods: rewarded"),
        (
            'clip_low, clip_high, "batch")',
            'clip_low, clip_high, "token_mean")',
            "methods: distillation and grpo+opsd",
        ),
        (
            "gkd_loss(s, divergence)[0] + loss",
            "gkd_loss(s, divergence)[0] - loss",
            "methods: distillation and grpo+opsd",
        ),
    ],
    "../train.py": [
        ("if epoch == 0:", "if True:", "methods: rewarded"),
        ("optimizer=optimizer, teacher=teacher)", "optimizer=optimizer)", "train: keeps_its_teacher"),
        ("teacher.config.n_embd)", "student.config.n_embd)", "train: precision_is"),
        ("prompt_length, batch.teacher_prompts)", "prompt_length, batch.prompts)", "methods: self_teacher"),
        ('cfg.grad_clip or float("inf")', 'float("inf")', "methods: shortened"),
        ("4 * cfg.eval_size, held_out=True", "4 * cfg.eval_size", "methods: held_out"),
        ('own("rollout"), step, device)', 'own("rollout"), 0, device)', "train: other_problems"),
        ('distributed.own("rollout")', '"rollout"', "wires: every_rank"),
        ("student_logits=student_logits,", "student_logits=teacher_logits,", "methods: distillation"),
        ("if METHODS[cfg.method].samples else", "if True else", "train: every_method"),
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
        ("with autocast(enabled=False) if lower", "with autocast() if lower", "wires: dtype"),
    ],
    "exact/law.py": [
        ("(1 - b) * torch.log1p", "b * torch.log1p", "judge: name_is_found"),
        ("* exp(-sx)", "* exp(sx)", "judge: generator_of"),
        ("exp(x) * x * (w", "x * (w", "judge: what_opd"),
        ("exp(-x) * (h(x) + rest(x))", "exp(-x) * h(x)", "judge: generator_of"),
        (".clamp(max=1)", "", "judge: updates_lead"),
        ("z + step, z)", "z - step, z)", "judge: updates_lead"),
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
        ("ends.cumsum(1) - ends == 0", "ends.cumsum(1) == 0", "exact: listed_once"),
        ("second - mean.square().sum()", "second", "exact: one_response_at_a_time"),
        ("f(log_u.sum(1))", "f(log_u).sum(1)", "exact: names_say"),
    ],
    "exact/rewards.py": [
        ("prefix, weight * reward)", "prefix, reward)", "exact_rewards: share_a_prefix"),
        ("world.tokens[:, n]), V[-1])", "world.tokens[:, n]), V[0])", "exact_rewards: share_a_prefix"),
        ("world.probability(theta) * reward", "world.probability() * reward", "exact_rewards: with_token_advantages"),
        ("ratio.log())", "ratio)", "exact_rewards: conditioned_on_being_right"),
        ("(V > 0)", "(V >= 0)", "exact_rewards: conditioned_on_being_right"),
        ("A = advantage(torch.where(right, among[0], among[-1])", "A = advantage(among", "exact_rewards: groups"),
        ("k * (k - 1) * a @ a", "k * k * a @ a", "exact_rewards: enumerated_groups"),
        ("second - mean @ mean", "second", "exact_rewards: enumerated_groups"),
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
        ('"sft_lr", "reference_slot"', '"reference_slot"', "wires: another_file"),
        ("there.get(name) != code.get(name)", "name not in there", "edited_code: by_other_code"),
        ("if len(different) == 1:", "if different:", "edited_code: names_the_run"),
        (
            "theirs, ours = other.not_default, cfg.not_default",
            "theirs, ours = vars(other), vars(cfg)",
            "edited_code: brings",
        ),
    ],
    "system/sources.py": [('LEFT_OUT = ("checkpoint", ', "LEFT_OUT = (", "edited_code: decides_no_number")],
    "system/report.py": [
        ("torch.stack(correct, 1)", "torch.stack(correct)", "wires: pass_at_4"),
        ('generator, "work")', "generator)", "wires: pass_at_4"),
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
        ('*e.common.split(), *flags.split(), "--seed"', '*e.common.split(), "--seed"', "reproduce: every_seed"),
        ("arguments += QUICK.split() if quick", "arguments[:0] = QUICK.split() if quick", "reproduce: every_seed"),
        (', "--resume"]', "]", "reproduce: not_run_twice"),
        ('if row["accuracy"]:', 'if row["accuracy"] and not kept:', "reproduce: not_run_twice"),
        ("kept[-1][1].append(row)", "kept[0][1].append(row)", "reproduce: not_run_twice"),
        ("sum(values) / len(values)", "values[-1]", "reproduce: not_run_twice"),
        ('(folder / "provenance.json").exists()', '(folder / "metrics.csv").exists()', "reproduce: not_run_twice"),
        (':.5g}"', ':.1g}"', "reproduce: not_run_twice"),
        ('symlink_to((out / "warm_starts")', 'symlink_to((folder / "none")', "reproduce: not_run_twice"),
        ("if any(saved.get(name) != value", "if all(saved.get(name) != value", "reproduce: of_another_run"),
        ("if end.code != 1:", "if end.code > 2:", "reproduce: of_another_run"),
        ('if row["experiment"] != experiment]', 'if row["experiment"] == experiment]', "reproduce: not_run_twice"),
        ('if changed else "")', 'if not changed else "")', "reproduce: commit_is_named"),
        ("if run.oracle in ceiling.ARMS", "if False", "reproduce: place_of_the_update"),
        ("CODE | self.code_of_oracle)", "CODE)", "edited_code: by_other_code"),
        ("mock.patch.dict(train.CODE, run.code_of_oracle)", "mock.patch.dict({})", "edited_code: by_other_code"),
    ],
    "../notebooks/lab/ceiling.py": [
        (".flip(1).cumsum(1).flip(1)", ".cumsum(1)", "ceiling: go_on_as_taught"),
        (".cumprod(1)", "", "ceiling: go_on_as_taught"),
        ("ended, rewards[:, None], V", "ended, 0.0, V", "ceiling: go_on_as_taught"),
        ("b.scaled(b.values().diff())", "-b.scaled(b.values().diff())", "ceiling: adds_up"),
        ("V[:, 1:] / V[:, :-1]", "V[:, :-1] / V[:, 1:]", "ceiling: ideal_weights"),
        ("1.0, 1.0) - b.A[:, None]", "1.0, 1.0)", "ceiling: other_arms"),
        ("if A[row, 0] < 0 and", "if A[row, 0] > 0 and", "ceiling: other_arms"),
        ("masked_fill(~b.s.mask, 2.0)", "masked_fill(b.s.mask, 2.0)", "ceiling: other_arms"),
        ("draw_batch(cfg, s.step,", "draw_batch(cfg, 0,", "ceiling: methods_advantage"),
        (
            "self.s.teacher_logp - self.s.old_logp",
            "self.s.old_logp - self.s.teacher_logp",
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
            "s.mask, f, gamma, baseline)",
            "s.mask, f, gamma if baseline is None else 0.0, baseline)",
            "wires_held: every_gamma",
        ),
    ],
    "gpt.py": [
        ('(2 if "blocks" in name else 1)', "1", "wires_held: gain_of_two"),
        ("betas=(0.9, 0.95)", "betas=(0.9, 0.999)", "wires_held: betas"),
        ("betas=(0.9, 0.95)", "betas=(0.8, 0.95)", "wires_held: betas"),
        ("weight_decay=0.0", "weight_decay=0.01", "wires_held: betas"),
    ],
    "sft.py": [('["blank", "blank", *arith', '["blank", *arith', "wires_held: as_many_blank")],
    "system/config.py": [
        ("solution_length(self.digits) + 5", "solution_length(self.digits) + 4", "wires_held: five_tokens_more"),
        ("solution_length(self.digits) + 5", "solution_length(self.digits) + 6", "wires_held: five_tokens_more"),
        ('getattr(self, f"{who}_layers")', "self.teacher_layers", "wires_held: that_were_asked_for"),
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
        (
            "wilson(round(p * len(problems)), len(problems))",
            "wilson(round(p * cfg.eval_size), cfg.eval_size)",
            "wires_held: under_its_own_label",
        ),
        ("run.rows[0], run.rows[-1]", "run.rows[-1], run.rows[0]", "wires_held: under_its_own_label"),
        ('("kl", "KL to', '("entropy", "KL to', "wires_held: under_its_own_label"),
        ('("greedy_accuracy", "acc', '("accuracy", "acc', "wires_held: under_its_own_label"),
        ('("leak_rate", "answers', '("information_gap", "answers', "wires_held: under_its_own_label"),
        ("(problems[i], texts[0][i])", "(problems[i], texts[1][i])", "wires_held: first_broken_step"),
        ("(problems[i], texts[0][i])", "(problems[i], texts[0][0])", "wires_held: first_broken_step"),
        ("{end['seconds']:.0f}", "{start['seconds']:.0f}", "wires_held: clock_of_a_row"),
        ("of {cfg.batch_size} rollouts", "of {cfg.eval_size} rollouts", "wires_held: clock_of_a_row"),
        ('("kl", BLUE, ', '("entropy", BLUE, ', "wires_held: curves_of_a_run"),
        ('GREEN, "student entropy"', 'GREEN, "KL(student‖teacher)"', "wires_held: curves_of_a_run"),
        (
            "problems, generator) for _",
            'problems, torch_stream(cfg.seed, "answers", device=run.device)) for _',
            "wires_held: one_after_the_other",
        ),
        ("key=right.__getitem__)", "key=right.__getitem__, reverse=True)", "wires_held: wrong_answers_first"),
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
            """    with _locked(cfg.run_dir):
        for litter in cfg.run_dir.glob(".*.tmp"):  # a process that was killed while it wrote
            if litter.is_file():
                litter.unlink(missing_ok=True)
""",
            """    for litter in cfg.run_dir.glob(".*.tmp"):
        litter.unlink(missing_ok=True)
    with _locked(cfg.run_dir):
""",
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
