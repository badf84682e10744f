"""What the docstrings, READMEs and notebooks state in words is so: each statement beside the case that decides it."""

import json
import math
from pathlib import Path

import pytest
import torch
from lab import ceiling, claims, pages
from lab.field import ROWS, in_top_k

from nano_opd import divergences, exact, grpo, rlsd, topk
from nano_opd.exact import law

ROOT = Path(__file__).parents[1]
BY_NAME = {row.name: row for row in ROWS}
JSD = divergences.get("jsd")
LN2 = torch.log(torch.tensor(2.0, dtype=torch.float64)).item()


def words(path: str) -> str:
    """Return the text of a file on one line; of a notebook, that of its cells, without their outputs."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".ipynb"):
        text = " ".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return " ".join(text.split())


def parts_of_the_variance(p: torch.Tensor, q: torch.Tensor, k: int) -> tuple[float, float, float]:
    """Return E|g|², |E g|², and by how much the variance falls where the teacher's top k are summed."""
    g = JSD.w_f((q / p).log())[:, None] * (torch.eye(len(p), dtype=p.dtype) - p)  # A ∇log p, one token a row
    inside = torch.zeros(len(p), dtype=torch.bool)
    inside[q.topk(k).indices] = True
    second = (p * g.square().sum(1)).sum()
    square_of_the_mean = (p @ g).square().sum()
    falls_by = (p * g.square().sum(1))[inside].sum() + (p[~inside] @ g[~inside]).square().sum() - square_of_the_mean
    return second.item(), square_of_the_mean.item(), falls_by.item()


def sampled_variance(p: torch.Tensor, q: torch.Tensor, k: int) -> float:
    """Return the variance of the gradient of topk.loss at one prefix, by enumeration of the token that is drawn."""
    gradients = []
    for token in range(len(p)):
        student = p.log().view(1, 1, -1).clone().requires_grad_()
        mask = torch.ones(1, 1, dtype=torch.bool)
        loss = topk.loss(student, q.log().view(1, 1, -1), torch.tensor([[token]]), mask, JSD.w_f, k)
        gradients.append(torch.autograd.grad(loss, student)[0].flatten())
    g = torch.stack(gradients)
    return ((p * g.square().sum(1)).sum() - (p @ g).square().sum()).item()


def worlds(number: int, size: int, scale: float = 1.5):
    """Return random students and teachers at one prefix, two tensors (number, size)."""
    logits = scale * torch.randn(2, number, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return logits.softmax(-1)


def test_the_variance_of_a_top_k_falls_if_and_only_if_the_condition_of_topk_py_holds():
    fell = set()
    for p, q in zip(*worlds(40, 4)):
        for k in (1, 2, 3):
            _, _, falls_by = parts_of_the_variance(p, q, k)
            measured = sampled_variance(p, q, 0) - sampled_variance(p, q, k)
            assert measured == pytest.approx(falls_by, abs=1e-12)
            fell.add(falls_by > 0)
    assert fell == {True, False}
    assert "falls if and only if E[|g|², y in top k] + |E[g, y outside]|² > |E g|²" in words("nano_opd/topk.py")


def test_noise_larger_than_signal_is_neither_needed_nor_enough_for_a_top_k_to_be_quieter():
    cases = set()
    for p, q in zip(*worlds(400, 3, scale=2.5)):
        second, square_of_the_mean, falls_by = parts_of_the_variance(p, q, 1)
        noise = second - square_of_the_mean
        cases.add((noise > square_of_the_mean, falls_by > 0))
    assert {(True, False), (False, True)} <= cases
    assert "where noise is larger than signal" not in words("nano_opd/topk.py")


def flat(log_u: torch.Tensor) -> torch.Tensor:
    return log_u.sign() * (log_u.abs() - 0.5).clamp(min=0)


def test_an_advantage_that_never_falls_but_is_constant_on_both_sides_of_1_rests_at_other_students():
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    assert (flat(x).diff() >= 0).all()
    ends = law.paths(law.of_u(flat), law.STUDENTS.log(), law.TEACHER.log(), steps=2000)[-1]
    assert ((ends - law.TEACHER).norm(dim=1) > 0.02).all()  # no student arrives
    log_u = law.TEACHER.log() - ends.log()
    assert log_u.abs().max() < 0.501 and law.update(law.of_u(flat), ends.log(), law.TEACHER.log()).abs().max() < 1e-3
    one_sided = law.of_u(lambda x: flat(x) + x.clamp(max=0))  # constant above u = 1 alone
    ends = law.paths(one_sided, law.STUDENTS.log(), law.TEACHER.log(), steps=4000)[-1]
    assert ((ends - law.TEACHER).norm(dim=1) < 0.02).all()
    assert "if A never falls and is not constant on both sides of u = 1" in words("nano_opd/exact/law.py")
    assert "if $h$ is convex and not flat on both sides of $u = 1$" in words("notebooks/01_estimator_bias.ipynb")
    assert "a convex $h$ that is not flat on both sides of $u = 1$" in words("notebooks/05_judge.ipynb")


def test_under_opd_with_jsd_an_overrated_token_shrinks_below_a_divergence_of_half_ln_2_and_grows_above():
    q = torch.tensor([1e-9, 0.999, 0.001], dtype=torch.float64)  # token 0 is overrated by far
    students = torch.tensor([[0.2, 0.7, 0.1], [0.05, 0.9, 0.05], [0.2, 0.01, 0.79], [0.05, 1e-3, 0.949]]).double()
    divergence = (students * JSD.f((q / students).log())).sum(-1)
    change = law.update(law.of_u(JSD.reward), students.log(), q.log())[:, 0]
    assert (divergence > LN2 / 2).tolist() == [False, False, True, True]
    assert (change > 0).tolist() == [False, False, True, True]
    notebook = words("notebooks/01_estimator_bias.ipynb")
    assert "overrated by far shrinks while $D_{JS} < \\frac12 \\ln 2$" in notebook
    assert "wins in comparison" not in notebook


def test_without_noise_opd_under_jsd_leaves_a_teacher_that_it_stands_near():
    noise = 0.3 * torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ways = law.paths(law.of_u(JSD.reward), law.TEACHER.log() + noise, law.TEACHER.log(), steps=6000)
    assert ((ways[-1] - law.TEACHER).norm(dim=1) > 0.3).sum() >= 18
    far, near = (law.TEACHER.log() + noise * scale for scale in (0.1, 0.01))
    steps = [law.update(law.of_u(JSD.reward), z.log_softmax(-1), law.TEACHER.log()) for z in (far, near)]
    shrinks = steps[0].norm() / steps[1].norm()
    assert 90 < shrinks < 110  # at a tenth of the distance the update has a hundredth of the length: it leaves slowly
    page = words("notebooks/README.md")
    assert "so the student leaves the teacher slowly. It leaves without noise too." in page
    assert "driven off by noise" not in page


def test_more_responses_save_two_of_five_seeds_at_the_rate_of_the_dense_methods():
    seeds = claims.load(pages.RESULTS)["grpo, lr=5e-3, B=512"]
    risen = [seed[-1]["accuracy"] > seed[0]["accuracy"] + 0.3 for seed in seeds]
    assert len(seeds) == 5 and sum(risen) == 2
    page = words("notebooks/README.md")
    assert "More responses save GRPO at 2e-3, and at 5e-3 in two of five seeds." in page and "They do." not in page


def test_what_is_said_of_exact_credit_is_said_with_its_corrected_p():
    results = claims.load(pages.RESULTS)
    table = claims.CLAIMS["credit"]
    rows = dict(zip((claim.text for claim in table), claims.tested(table, results)))
    size, p, _, verdict = rows["exact A"]
    assert size.startswith("0.018") and p == "0.100" and "not seen here" in verdict
    assert "exact credit adds 0.018 to GRPO's 0.727 (p = 0.10 after the correction" in words("README.md")
    assert "its V is the chance to finish the worked solution" in words("README.md")
    assert "0.018 at the end is not shown after the correction (p = 0.10)" in words("notebooks/README.md")
    assert words("notebooks/04_credit.ipynb").count("(p = 0.10") == 2
    assert "worked solution" in ceiling.__doc__ + ceiling.values.__doc__


def test_before_the_first_mistake_lies_098_of_the_squared_gradient_of_the_reward_less_V_and_less_of_grpo_s():
    """A chain of 2, 3 and 6 decisions that is right 0.02 of the time; GRPO in groups of four."""
    rate, group = 0.02, 4
    shares = {"R − V": [], "GRPO": []}
    for decisions in (2, 3, 6):
        each = rate ** (1 / decisions)
        table = torch.tensor([[each, 1 - each]], dtype=torch.float64).log().repeat(2**decisions - 1, 1)
        world = exact.World.of((exact.tabular, table), (exact.tabular, table), 2, decisions)
        logp = world.logps()[0]
        chosen = logp.gather(-1, world.tokens.unsqueeze(-1)).squeeze(-1)
        square = 1 - 2 * chosen.exp() + logp.exp().square().sum(-1)  # ‖∇log p‖² of each token
        right = (world.tokens == 0).all(1)
        squared = {}  # E[A²] of a wrong and of a right response, over the rewards of the others in its group
        for own in (0.0, 1.0):
            expected = 0.0
            for others in range(group):
                probability = math.comb(group - 1, others) * rate**others * (1 - rate) ** (group - 1 - others)
                rewards = torch.tensor([own] + [1.0] * others + [0.0] * (group - 1 - others), dtype=torch.float64)
                expected += probability * grpo.advantage(rewards, group)[0].item() ** 2
            squared[own] = expected
        paid = {
            "R − V": (right.double() - rate).square(),
            "GRPO": torch.where(right, squared[1.0], squared[0.0]),
        }
        before = (world.tokens != 0).cumsum(1) == 0
        for name, A_squared in paid.items():
            spent = world.probability()[:, None] * A_squared[:, None] * square
            shares[name].append((spent[before].sum() / spent.sum()).item())
    assert min(shares["R − V"]) > 0.98
    assert shares["GRPO"] == pytest.approx([0.97, 0.92, 0.77], abs=0.005)
    notebook = words("notebooks/04_credit.ipynb")
    assert "paid $R - V$ of its prompt, 0.98 or more of the squared gradient" in notebook
    assert "Of GRPO's in groups of four it is 0.97, 0.92 and 0.77" in notebook


def test_a_verdict_is_corrected_for_the_claims_of_its_own_table():
    results = claims.load(pages.RESULTS)
    of = lambda rows, text: next(row for claim, row in rows if claim.text == text)
    own = claims.CLAIMS["opdplus"]
    alone = of(zip(own, claims.tested(own, results)), own[1].text)
    everything = [claim for table in claims.CLAIMS.values() for claim in table]
    among_all = of(zip(everything, claims.tested(everything, results)), own[1].text)
    assert float(among_all[1]) > float(alone[1])  # so it matters which is said
    found = next(line for line in claims.found_table(results).splitlines() if own[1].text in line)
    assert alone[3] in found
    assert '"seen" after correction for the number of claims of its table' in words("README.md")


def test_rlsd_gives_more_credit_to_what_the_teacher_finds_likelier_and_more_blame_to_what_it_finds_less_likely():
    log_w = torch.tensor([[-1.0, -0.1, 0.0, 0.1, 1.0]], dtype=torch.float64).expand(2, 5)
    A = torch.tensor([1.0, -1.0], dtype=torch.float64)
    mask = torch.ones(2, 5, dtype=torch.bool)
    right, wrong = rlsd.advantage(A, log_w - 2, torch.full_like(log_w, -2.0), mask, 0.5, 0.2)
    assert (right.diff() > 0).all() and right[2] == 1
    assert (wrong.diff() > 0).all() and wrong[2] == -1  # blame is the size of what is below 0
    said = (
        "in a right answer, tokens that the teacher finds likelier than the student does get more credit; in a wrong "
        "one, tokens that it finds less likely get more blame."
    )
    assert said in words("README.md")


@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_a_bucket_over_five_tokens_leads_no_student_to_the_teacher(whose):
    """The top k and the mass of the tail come to be right. A sampled tail leads all to the teacher."""
    rng = torch.Generator().manual_seed(0)
    students = 1.5 * torch.randn(20, 5, dtype=torch.float64, generator=rng)
    teacher = (1.5 * torch.randn(5, dtype=torch.float64, generator=rng)).log_softmax(-1)
    row = BY_NAME[f"top k of the {whose} and a bucket for its tail"]
    ends = law.paths(row.advantage, students, teacher, steps=3000)[-1]
    assert ((ends - teacher.exp()).norm(dim=1) > 0.02).all()
    assert (ends - teacher.exp())[:, in_top_k(teacher)].abs().max() < 1e-6
    sampled = law.paths(BY_NAME["top k and a sampled tail"].advantage, students, teacher, steps=1000)[-1]
    assert ((sampled - teacher.exp()).norm(dim=1) < 1e-6).all()
    assert "over five tokens none of 20 students arrives" in row.exactly


def test_the_rows_of_the_field_that_trl_does_not_compute_are_called_derived():
    for name in ("top k of the teacher, both renormalised", "top k of the teacher and a bucket for its tail"):
        assert BY_NAME[name].source.startswith("derived here")
    assert "with a sample for its tail" in words("notebooks/05_judge.ipynb")
    assert "with a bucket or a sample for its tail" not in words("notebooks/05_judge.ipynb")
