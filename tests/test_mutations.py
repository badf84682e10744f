"""The suite can fail: each of these single edits, made in a copy of the package, must turn some test red.

A fork server imports torch once; every mutant is then a process of its own that imports the edited copy and runs the
tests that guard it, in a second or two.
"""

import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SLOW_IMPORTS = [
    "torch",
    "torch.func",
    "torch.fx.experimental.symbolic_shapes",
    "hypothesis.strategies",
    "pytest",
    "tiktoken",
]

# file: (what stands there, once; what to put in its place; the test file and, as for -k, the tests that must notice)
MUTATIONS = {
    "opd.py": [
        ("(mask, log_u, 0.0).detach()", "(mask, log_u, 0.0)", "estimators: baselines_are_detached"),
        ("baseline.detach()", "baseline", "estimators: baselines_are_detached"),
        ("student_logits.detach()", "student_logits", "estimators: baselines_are_detached"),
        ("teacher_logits.detach()", "teacher_logits", "estimators: baselines_are_detached"),
        ("own = reward\n", "own = -reward\n", "exact: missing_term"),
        ("own = reward\n", "own = divergence.unbiased(log_u)\n", "exact: missing_term"),
        ("future_return(reward, gamma)", "future_return(-reward, gamma)", "exact: missing_term"),
        ("* divergence.stop_gradient(log_u)", "* divergence.unbiased(log_u)", "estimators: exact_baselines"),
    ],
    "opdplus.py": [
        ("(mask, log_u, 0.0).detach()", "(mask, log_u, 0.0)", "estimators: baselines_are_detached"),
        ("baseline.detach()", "baseline", "estimators: baselines_are_detached"),
        ("student_logits.detach()", "student_logits", "estimators: baselines_are_detached"),
        ("teacher_logits.detach()", "teacher_logits", "estimators: baselines_are_detached"),
        ("torch.where(mask, log_u, 0.0)", "torch.where(mask, -log_u, 0.0)", "exact: unbiased_for_the_prefix"),
        ("own = divergence.unbiased(log_u)", "own = reward", "exact: unbiased_for_the_prefix"),
        (
            "own = divergence.unbiased(log_u)",
            "own = reward + divergence.f_prime(log_u)",
            "exact: unbiased_for_the_prefix",
        ),
        ("future_return(reward, gamma)", "future_return(own, gamma)", "exact: unbiased_for_the_prefix"),
        ("own + future_return", "own * future_return", "exact: unbiased_for_the_prefix"),
        ("A = A - baseline", "A = A * baseline", "exact: baseline_and_full"),
        ("(student_logp.exp() *", "(teacher_logits.softmax(-1) *", "estimators: exact_baselines"),
        ("return torch.where(mask, A, 0.0)", "return A", "estimators: term_by_term"),
    ],
    "gkd.py": [
        ("f = f.detach()", "pass", "exact: baseline_and_full"),
        ("f = f.detach()", "student_logp = student_logp.detach()", "exact: baseline_and_full"),
        ("teacher_logits.detach()", "teacher_logits", "estimators: teacher_is_not_trained"),
        ("teacher_logp - student_logp, 0.0", "student_logp - teacher_logp, 0.0", "exact: baseline_and_full"),
        ("(student_logp.exp() * f)", "(teacher_logp.exp() * f)", "estimators: gkd_value"),
        (".sum() / len(mask)", ".mean()", "estimators: gkd_value"),
        (
            "torch.where(mask.unsqueeze(-1), teacher_logp - student_logp, 0.0)",
            "teacher_logp - student_logp",
            "exact: baseline_and_full",
        ),
    ],
    "policy_gradient.py": [
        ("reduce(-advantage * logp", "reduce(advantage * logp", "estimators: grad_logp"),
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
        ("if advantage.requires_grad:", "if False:", "estimators: misuse"),
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
        ("- own) / (length - 1)", ") / length", "evaluate: credit_by_hand"),
        ("/ top.sum(1)", "* 1.0", "evaluate: credit_by_hand"),
    ],
    "arithmetic.py": [
        ("groups = groups[1:] + groups[:1]", "pass", "arithmetic: shuffled"),
        ("for _ in range(group_size)]", "for _ in range(1)]", "arithmetic: shuffled"),
    ],
    "divergences.py": [
        ("return -self.f(log_u)", "return self.f(log_u)", "exact: missing_term"),
        ("f=lambda x: -x,", "f=lambda x: x,", "exact: names_say"),
        ("unbiased=lambda x: x - 1)", "unbiased=lambda x: 1 - x)", "exact: unbiased_for_the_prefix"),
        ("unbiased=exp)", "unbiased=lambda x: x * exp(x))", "exact: unbiased_for_the_prefix"),
        (
            "unbiased=lambda x: log1p(expm1(x) / 2) / 2",
            "unbiased=lambda x: log1p(expm1(x) / 2)",
            "exact: unbiased_for_the_prefix",
        ),
        ("f_prime=lambda x: x + 1", "f_prime=lambda x: x", "exact: missing_term"),
        ("else expm1(a * x) / a", "else expm1(a * x)", "exact: unbiased_for_the_prefix"),
        ("unbiased=lambda x: x.sign() / 2", "unbiased=lambda x: x.sign()", "exact: unbiased_for_the_prefix"),
    ],
    "losses.py": [
        (
            "log_u = teacher_logp - student_logp",
            "log_u = student_logp - teacher_logp",
            "losses: gradient_of_the_loop and opdplus",
        ),
        (
            '{"opd": opd, "opdplus": opdplus}',
            '{"opd": opdplus, "opdplus": opd}',
            "losses: gradient_of_the_loop and opdplus",
        ),
        (
            'stop_gradient=cfg.method == "opd"',
            'stop_gradient=cfg.method != "opd"',
            "losses: gradient_of_the_loop and full",
        ),
        (
            "mask, divergence, cfg.gamma, baseline",
            "mask, divergence, 0.0, baseline",
            "losses: gradient_of_the_loop and gamma",
        ),
        (
            "(logprobs_of(rollout.responses, z)",
            "(logprobs_of(rollout.responses.roll(1, 1), z)",
            "losses: gradient_of_the_loop and opdplus",
        ),
    ],
    "rollout.py": [
        ("ends.cumsum(1) - ends == 0", "ends.cumsum(1) == 0", "rollout: first_eos"),
        (
            "tokens[:, :-1], logits_from=prompt_length - 1)",
            "tokens[:, 1:], logits_from=prompt_length - 1)",
            "rollout: predict_the_response",
        ),
        ("torch.where(mask, responses, PAD)", "responses", "rollout: first_eos"),
        ("slice(n, n + 1) for n in before", "slice(n - 1, n) for n in before", "rollout: full_forward"),
        ("first == 0 and P > 1", "first < 0", "rollout: full_forward"),
        ("responses.fill_(PAD)", "pass", "rollout: remembers_nothing"),
        ("(1 - uniform) * cdf", "(1 - uniform**2) * cdf", "rollout: follow_the_model"),
        ("cache, position)[:, 0].float()", "cache, position)[:, 0].float().mul(2)", "rollout: follow_the_model"),
        ("if not evaluation and (", "if evaluation and (", "rollout: off_policy_sampling"),
    ],
    "gpt.py": [
        ("is_causal=True", "is_causal=False", "gpt: only_the_past"),
        ("self.position.weight[at]", "self.position.weight[:T]", "gpt: cached_logits"),
    ],
    "exact.py": [
        ("frozen = world.probability()", "frozen = world.probability(theta)", "exact: prefix_by_prefix"),
        ("ends.cumsum(1) - ends == 0", "ends.cumsum(1) == 0", "exact: listed_once"),
        ("second - mean.square().sum()", "second", "exact: one_response_at_a_time"),
        ("f(log_u.sum(1))", "f(log_u).sum(1)", "exact: names_say"),
    ],
}
CASES = [(file, *mutation) for file, mutations in MUTATIONS.items() for mutation in mutations]


def run_suite(package_parent: str, guards: dict[str, str]) -> None:
    """Body of the process: in each test file the tests that match, with the package under package_parent.

    Exits with pytest's worst code, or 99 when it was not that package that was tested.
    """
    code = 99
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        sys.path.insert(0, package_parent)
        import nano_opd.opd

        if Path(nano_opd.opd.__file__).is_relative_to(package_parent):
            options = ["-x", "-o", "addopts=", "--assert=plain", "-p", "no:cacheprovider", "--rootdir", package_parent]
            code = max(pytest.main([str(TESTS / f"test_{f}.py"), "-k", k, *options]) for f, k in guards.items())
    finally:
        os._exit(code)


def exit_code_of_suite(package_parent: Path, guards: dict[str, str]) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_IMPORTS)
    process = context.Process(target=run_suite, args=(str(package_parent), guards))
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture
def copy(tmp_path):
    """A folder with a copy of the package in it."""
    shutil.copytree(TESTS.parent / "nano_opd", tmp_path / "nano_opd", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize("file,old,new,guard", CASES, ids=[f"{c[0]}-{c[2].strip()}" for c in CASES])
def test_the_suite_fails_on_the_mutant(file, old, new, guard, copy):
    path = copy / "nano_opd" / file
    source = path.read_text()
    assert source.count(old) == 1
    path.write_text(source.replace(old, new))
    assert exit_code_of_suite(copy, dict([guard.split(": ")])) == pytest.ExitCode.TESTS_FAILED


def test_the_suite_passes_on_the_unchanged_copy(copy):
    """Every test that a mutation relies on: were one of them always red, its mutants would prove nothing."""
    guards = {}
    for *_, guard in CASES:
        file, expression = guard.split(": ")
        guards.setdefault(file, set()).add(expression)
    assert exit_code_of_suite(copy, {f: " or ".join(sorted(k)) for f, k in guards.items()}) == pytest.ExitCode.OK
