"""The wiring: what `train.update` learns from a batch, against a loop over tokens, probabilities and textbook formulas.

Every method is held to it, and what a method reads, what its options are, and how a new one is added.
"""

import copy
import dataclasses
import functools
import inspect
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from nano_opd import arithmetic, rollout, sft
from nano_opd.gpt import GPT
from nano_opd.methods import METHODS, Scored
from nano_opd.streams import torch_stream
from nano_opd.system import config, runs
from nano_opd.system.batches import draw_problems
from nano_opd.tokenizer import EOS, PAD, decode, encode

ROOT = Path(__file__).parents[1]

# −f and w_f in u, as the paper's Table 1 prints them
TABLE = {
    "reverse_kl": (lambda u: u.log(), lambda u: u.log() - 1),
    "forward_kl": (lambda u: -u * u.log(), lambda u: u),
    "pearson_chi2": (lambda u: -((u - 1) ** 2), lambda u: u**2 - 1),
    "jsd": (lambda u: ((1 + u) * ((1 + u) / 2).log() - u * u.log()) / 2, lambda u: ((1 + u) / 2).log() / 2),
}
STEP, LR = 3, 0.1
TINY = {"digits": 2, "teacher_layers": 1, "teacher_width": 16, "student_layers": 1, "student_width": 8}
RIGHT = (0, 3, 9, 12, 13, 15)  # of 16 responses these are worked solutions: none of one group, three of another

KNOBS = [
    {"method": "sft"},
    {"method": "null"},
    {"method": "gkd"},
    *({"method": m, "variance": v} for m in ("opd", "opdplus") for v in ("sampled", "baseline", "topk", "full")),
    *({"method": m, "gamma": g} for m in ("opd", "opdplus") for g in (0.5, 1.0)),
    *({"method": m, "log_u_clip": 0.3} for m in ("opd", "opdplus")),
    *({"method": m, "log_u_clip": 0.3, "variance": "baseline"} for m in ("opd", "opdplus")),
    *(
        {"method": m, "log_u_clip": 0.3, "variance": "topk", "top_k": 2, "normalize": "sequence_mean"}
        for m in ("opd", "opdplus")
    ),
    *({"method": m, "normalize": n} for m in ("opd", "opdplus", "grpo") for n in ("token_mean", "sequence_mean")),
    *({"method": "grpo", "epochs": 2, "loss_type": t} for t in ("grpo", "dr_grpo")),
    {"method": "grpo", "epochs": 3, "clip_low": 0.02, "clip_high": 0.3},
    {"method": "grpo", "epochs": 3, "clip_low": 0.3, "clip_high": 0.02},
    {"method": "opsd"},
    {"method": "grpo+opsd", "epochs": 2},
    {"method": "grpo+opsd", "loss_type": "dr_grpo"},
    {"method": "rlsd"},
    {"method": "rlsd", "epochs": 2, "lam": 1.0, "eps_w": 0.9, "loss_type": "dr_grpo"},
    {"method": "rlsd", "lam": 0.9, "lam_decay": 6, "eps_w": 0.5, "normalize": "sequence_mean"},
    {"method": "rlsd", "lam": 1.0, "eps_w": 0.9, "negative_only": True},
    {"method": "rlsd", "lam": 1.0, "eps_w": 0.9, "reasoning_only": True},
]


class Reader(torch.nn.Module):
    """A model that keeps what it has read in whole."""

    def __init__(self, model):
        super().__init__()
        self.model, self.read = model, []

    def forward(self, tokens, **options):
        self.read.append(tokens)
        return self.model(tokens, **options)


class Followed(torch.optim.SGD):
    """Keeps every gradient that it has followed, as one row."""

    def step(self):
        (group,) = self.param_groups
        self.gradients = [*getattr(self, "gradients", []), torch.cat([p.grad.flatten() for p in group["params"]])]
        return super().step()


@dataclasses.dataclass
class Scene:
    """One update, and what it was made of."""

    student: Reader
    teacher: Reader
    before: GPT  # the student before it
    sampled: rollout.Rollout | None  # what the sampler returned
    gradients: list[torch.Tensor]
    measured: dict


def model(cfg, who, seed):
    torch.manual_seed(seed)
    model = GPT(cfg.gpt(who))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


def operands(prompt):
    """(a, b) of the text of a prompt, behind a slot or not."""
    return tuple(map(int, re.search(r"(\d\d)\+(\d\d)=$", prompt).groups()))


def worked(prompt):
    a, b = operands(prompt)
    ones = a % 10 + b % 10
    tens = a // 10 + b // 10 + ones // 10
    return f"{a % 10}+{b % 10}={ones:02d} {a // 10}+{b // 10}={tens:02d} #{a + b:03d}"


def updated(sampling_seed=0, **knobs) -> Scene:
    """One update by train.update with a sampler that is sometimes right, as a tiny student never is."""
    cfg = config.Config(**TINY, **{"batch_size": 16} | knobs)
    sampled = []

    def sample(student, prompts, R, generator):
        got = rollout.sample(student.model, prompts, R, torch.Generator().manual_seed(sampling_seed))
        tokens, mask = got.tokens.clone(), got.mask.clone()
        for i in RIGHT:
            response = encode(worked(decode(prompts[i]))) + [EOS]
            tokens[i, prompts.shape[1] :] = torch.tensor(response + [PAD] * (R - len(response)))
            mask[i] = torch.arange(R) < len(response)
        assert generator.initial_seed() == torch_stream(cfg.seed, "rollout", STEP).initial_seed()
        assert mask.sum(1).min() < mask.sum(1).max()
        # p_old is the student of the first epoch, scored: what the sampler says of log-probs is only checked
        sampled.append(rollout.Rollout(tokens, prompts.shape[1], mask, torch.full(mask.shape, -9.0)))
        return sampled[-1]

    student = Reader(model(cfg, "student", 0))
    teacher = Reader(model(cfg, "student" if cfg.reference_slot else "teacher", 1)).requires_grad_(False)
    before, optimizer = copy.deepcopy(student.model), Followed(student.parameters(), lr=LR)
    sampler = sample if METHODS[cfg.method].samples else sft.solve
    measured = train.update(cfg, STEP, student, teacher, optimizer, sampler)
    assert len(sampled) == METHODS[cfg.method].samples
    return Scene(student, teacher, before, *(sampled or [None]), optimizer.gradients, measured)


# ------------------------------------------------------------------------------------------------- the loss, by hand


def responses(cfg, scene):
    """Each response, its end included, with the two prompts that it stands behind: three lists of tokens."""
    if cfg.method == "sft":
        prompts = [arithmetic.prompt(problem) for problem in draw_problems(cfg, "problems", cfg.batch_size, STEP)]
        return [(encode(prompt), encode(prompt), encode(worked(prompt)) + [EOS]) for prompt in prompts]
    P = scene.sampled.prompt_length
    behind = scene.teacher.read[0] if scene.teacher.read else scene.sampled.tokens
    rows = zip(scene.sampled.tokens.tolist(), behind.tolist(), scene.sampled.mask.sum(1).tolist())
    return [(tokens[:P], theirs[:P], tokens[P : P + length]) for tokens, theirs, length in rows]


def distributions(model, prompt, response):
    """(L, V): the distribution that each of the L tokens of the response was drawn from."""
    return model(torch.tensor([prompt + response[:-1]]))[0, len(prompt) - 1 :].softmax(-1)


def group_advantages(cfg, rows):
    """A_i of each response, from the texts."""
    R = [float(decode(y).endswith(worked(decode(prompt))[-4:]) and y[-1] == EOS) for prompt, _, y in rows]
    assert [i for i, r in enumerate(R) if r] == list(RIGHT)
    A = []
    for first in range(0, len(R), cfg.group_size):
        group = R[first : first + cfg.group_size]
        scale = statistics.pstdev(group) + 1e-6 if cfg.loss_type == "grpo" else 1.0
        A += [(r - statistics.fmean(group)) / scale for r in group]
    return A


def by_hand(cfg, student, teacher, rows, old):
    """The loss, one response and one token at a time; the whole vocabulary where the method sums over it.

    old  p_old of each token of each response; None on the first epoch, where it is the student itself
    """
    rewarded, distils = cfg.method in ("grpo", "rlsd", "grpo+opsd"), cfg.method in ("gkd", "opsd", "grpo+opsd")
    group_A = group_advantages(cfg, rows) if rewarded else None
    sums, lengths, dense = [], [len(y) for *_, y in rows], 0.0
    for i, (prompt, teacher_prompt, y) in enumerate(rows):
        p = distributions(student, prompt, y)
        q = distributions(teacher, teacher_prompt, y) if METHODS[cfg.method].teacher else None
        total = 0.0
        if cfg.method == "sft":
            total = -sum(p[n, v].log() for n, v in enumerate(y))
        if cfg.method == "null":
            total = sum(p[n, v].log() for n, v in enumerate(y))
        if distils:
            minus_f, _ = TABLE[cfg.divergence]
            dense = dense - (p * minus_f(q / p)).sum() / len(rows)  # whatever --normalize divides the rest by
        if cfg.method in ("opd", "opdplus"):
            total = total + distillation(cfg, p, q, y)
        if rewarded:
            total = total + surrogate(cfg, p, q, y, group_A[i], old and old[i])
        sums.append(total)
    if cfg.normalize == "token_mean":
        return sum(sums) / sum(lengths) + dense
    if cfg.normalize == "sequence_mean":
        return sum(total / length for total, length in zip(sums, lengths)) / len(rows) + dense
    return sum(sums) / len(rows) + dense


def distillation(cfg, p, q, y):
    """−Σ A log p of one response under OPD or OPD+."""
    minus_f, w = TABLE[cfg.divergence]
    own = minus_f if cfg.method == "opd" else w
    total, u = 0.0, (q / p).detach()
    if cfg.log_u_clip:
        u = u.log().clamp(-cfg.log_u_clip, cfg.log_u_clip).exp()
    for n, v in enumerate(y):
        mean = (p[n] * own(u[n])).sum().detach()
        if cfg.variance == "full":
            total = total - (p[n] * own(u[n])).sum()  # Σ_v p_v A_v ∇log p_v = Σ_v A_v ∇p_v
            continue
        if cfg.variance == "topk":
            top = q[n].argsort(descending=True)[: cfg.top_k].tolist()
            total = total - sum(p[n, t].item() * own(u[n, t]) * p[n, t].log() for t in top)
            total = total - (0.0 if v in top else own(u[n, v]) * p[n, v].log())
            continue
        A = own(u[n, v]) - (mean if cfg.variance == "baseline" else 0.0)
        A = A + sum(cfg.gamma ** (m - n) * minus_f(u[m, y[m]]) for m in range(n + 1, len(y)))
        total = total - A * p[n, v].log()
    return total


def surrogate(cfg, p, q, y, A, old):
    """−Σ min(ρ Â, clip(ρ) Â) of one response under GRPO or RLSD."""
    total, sign = 0.0, (A > 0) - (A < 0)
    lam = cfg.lam * (1 - STEP / cfg.lam_decay) if cfg.lam_decay else cfg.lam
    for n, v in enumerate(y):
        A_n = A
        applies = not (cfg.negative_only and A >= 0) and not (cfg.reasoning_only and "#" in decode(y[: n + 1]))
        if cfg.method == "rlsd" and applies:
            w = (q[n, v] / p[n, v]).item() ** sign  # P_S is the student of this epoch, and a constant
            A_n = A * ((1 - lam) + lam * min(max(w, 1 - cfg.eps_w), 1 + cfg.eps_w))
        ratio = p[n, v] / (old[n] if old else p[n, v].item())
        total = total - min(ratio * A_n, ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * A_n)
    return total


def gradient(loss, student):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))])


def require_the_gradients_of_the_loop(cfg, scene):
    rows, student, old = responses(cfg, scene), scene.before, None
    assert len(scene.gradients) == cfg.epochs
    for got in scene.gradients:
        loss = by_hand(cfg, student, scene.teacher.model, rows, old)
        want = gradient(loss, student)
        assert want.norm() > 1e-4
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-4 * want.abs().max().item())
        with torch.no_grad():
            if old is None:
                old = [[distributions(student, x, y)[n, v].item() for n, v in enumerate(y)] for x, _, y in rows]
            for parameter, step in zip(student.parameters(), want.split([p.numel() for p in student.parameters()])):
                parameter -= LR * step.view(parameter.shape)
    size = LR * max(g.abs().max().item() for g in scene.gradients)
    for name, weight in student.named_parameters():  # and the weights have followed them
        after = dict(scene.student.model.named_parameters())[name]
        torch.testing.assert_close(after, weight, rtol=1e-5, atol=1e-3 * size)
    assert scene.measured["grad_norm"].item() == pytest.approx(scene.gradients[-1].norm().item(), rel=1e-4)
    if cfg.variance != "full":  # there the loop has the gradient of the divergence, not its value
        assert scene.measured["loss"].item() == pytest.approx(loss.item(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("divergence", TABLE)
@pytest.mark.parametrize("knobs", [k for k in KNOBS if "divergence" in METHODS[k["method"]].options], ids=str)
def test_distillation_losses_have_the_gradient_of_the_loop(divergence, knobs):
    scene = updated(divergence=divergence, **knobs)
    require_the_gradients_of_the_loop(config.Config(**TINY, batch_size=16, divergence=divergence, **knobs), scene)


@pytest.mark.parametrize("knobs", [k for k in KNOBS if "divergence" not in METHODS[k["method"]].options], ids=str)
def test_rewarded_losses_have_the_gradient_of_the_loop(knobs):
    scene = updated(**knobs)
    require_the_gradients_of_the_loop(config.Config(**TINY, batch_size=16, **knobs), scene)


def test_every_method_is_held_to_the_loop():
    assert {knobs["method"] for knobs in KNOBS} == set(METHODS)


# ------------------------------------------------------------------------------------ what is read, and what comes out


@pytest.mark.parametrize("name", METHODS)
def test_the_student_reads_the_problem_alone_and_a_self_teacher_a_reference_besides(name):
    scene, method = updated(method=name), METHODS[name]
    cfg, itself = config.Config(**TINY, batch_size=16, method=name), method.teacher == "self"
    P = cfg.prompt_length
    (read,) = scene.student.read
    prompts = [decode(row) for row in read[:, :P]]
    assert prompts == [("________ " if itself or method.rewards else "") + prompt[-6:] for prompt in prompts]
    copies = [len(set(prompts[first : first + 4])) for first in range(0, 16, 4)]
    assert (copies == [1, 1, 1, 1]) == (itself or method.rewards)  # the responses to one problem stand together
    assert len(scene.teacher.read) == (method.teacher is not None)
    for theirs in scene.teacher.read:
        assert torch.equal(theirs[:, P:], read[:, P:])  # one response, two prompts
        slots = [decode(row)[:8] for row in theirs[:, :P]]
        assert [decode(row)[-6:] for row in theirs[:, :P]] == [prompt[-6:] for prompt in prompts]
        if itself:
            # the work, or the answer to cite
            texts = [worked(prompt) for prompt in prompts]
            assert all(slot in (t[4:6] + t[11:13] + t[14:], "@___" + t[14:]) for slot, t in zip(slots, texts))
            assert all(len(set(slots[first : first + 4])) == 1 for first in range(0, 16, 4))
            assert len({slot[0] == "@" for slot in slots}) == 2
        else:
            assert torch.equal(theirs, read)


def calls_of_losses(monkeypatch):
    """(Scored, options) of every call of a method's loss to come."""
    calls = []

    def recorded(loss):
        def recorder(scored, **options):
            calls.append((scored, options))
            return loss(scored, **options)

        return functools.wraps(loss)(recorder)

    for name, method in METHODS.items():
        monkeypatch.setitem(METHODS, name, dataclasses.replace(method, loss=recorded(method.loss)))
    return calls


@pytest.mark.parametrize("task", [*arithmetic.TASKS, "mix"])
def test_a_worked_solution_holds_exactly_one_eos_inside_its_mask(task, monkeypatch):
    calls = calls_of_losses(monkeypatch)
    cfg = config.Config(**TINY | {"digits": 2}, batch_size=16, method="sft", task=task)
    student = model(cfg, "student", 0)
    train.update(cfg, STEP, student, None, Followed(student.parameters(), lr=LR), sft.solve)
    ((scored, _),) = calls
    problems = draw_problems(cfg, "problems", 16, STEP)
    for problem, tokens, mask in zip(problems, scored.tokens, scored.mask, strict=True):
        inside = tokens[mask].tolist()
        assert inside == encode(arithmetic.solution(problem)) + [EOS] and (tokens[~mask] == PAD).all()


def test_what_an_update_measures_is_what_happened():
    rlsd = {"method": "rlsd", "lam": 1.0, "eps_w": 0.3}
    one, two = updated(**rlsd), updated(**rlsd, epochs=2)  # the same rollouts; one's student is two's in the second
    cfg = config.Config(**TINY, batch_size=16, **rlsd)
    rows = responses(cfg, one)
    outside, bounded, judged, count = 0, 0, 0, 0
    for (prompt, teacher_prompt, y), A in zip(rows, group_advantages(cfg, rows)):
        before, after = (distributions(m, prompt, y) for m in (one.before, one.student.model))
        q = distributions(one.teacher.model, teacher_prompt, y)
        for n, v in enumerate(y):
            count += 1
            outside += not 1 - cfg.clip_low <= (after[n, v] / before[n, v]).item() <= 1 + cfg.clip_high
            judged += A != 0
            bounded += A != 0 and not 0.7 <= (q[n, v] / before[n, v]).item() ** math.copysign(1, A) <= 1.3
    assert one.measured["clip_fraction"].item() == 0 and 0 < outside < count
    assert two.measured["clip_fraction"].item() == pytest.approx(outside / count)
    assert one.measured["weight_clip_fraction"].item() == pytest.approx(bounded / judged) and 0 < bounded < judged
    assert one.measured["reward"].item() == pytest.approx(len(RIGHT) / 16)
    assert one.measured["zero_groups"].item() == pytest.approx(1 / 4)


@pytest.mark.parametrize("method", ["opd", "opdplus"])
def test_the_clipped_fraction_of_log_ratios_counts_both_sides(method):
    scene = updated(method=method, log_u_clip=0.3)
    log_u = []
    for prompt, _, y in responses(config.Config(**TINY, batch_size=16), scene):
        p, q = (distributions(m, prompt, y) for m in (scene.before, scene.teacher.model))
        log_u += [(q[n, v] / p[n, v]).log().item() for n, v in enumerate(y)]
    low, high = sum(x < -0.3 for x in log_u), sum(x > 0.3 for x in log_u)
    assert min(low, high) > 0 and low + high < len(log_u)
    assert scene.measured["clip_fraction"].item() == pytest.approx((low + high) / len(log_u))


@pytest.mark.parametrize("method", ["opd", "opdplus"])
def test_what_stands_after_the_eos_has_no_baseline(method):
    """A teacher and a student that share no token there would make its mean 0 · ∞, and logits may be NaN there."""
    mask = torch.tensor([[True, True, False]])
    student, teacher = torch.randn(2, 1, 3, 5, generator=torch.Generator().manual_seed(0))
    logits = [x.clone() for x in (student, teacher)]
    logits[0][0, 2, 1], logits[1][0, 2, 1] = -200.0, 200.0
    broken = student.clone()
    broken[0, 2] = math.nan
    gradients = []
    for p, q in ((student, teacher), logits, (broken, teacher)):
        logp = torch.zeros(1, 3, requires_grad=True)
        scored = Scored(torch.zeros(1, 3).long(), mask, logp, logp.detach(), torch.ones(1, 3), p, q)
        options = dict(divergence="jsd", gamma=0.0, variance="baseline", top_k=4, log_u_clip=0.0, normalize="batch")
        gradients += torch.autograd.grad(METHODS[method].loss(scored, **options)[0], logp)
    assert all(torch.equal(gradients[0], other) for other in gradients[1:]) and gradients[0].isfinite().all()


@pytest.mark.parametrize("method", ["opd", "opdplus"])
def test_a_clip_bounds_the_advantage_with_a_baseline_too(method):
    """Pearson's u² − 1 has a mean of 117 under p = (.999, .0005, .0005) and q = (.5, .25, .25) without the clip."""
    p, q = torch.tensor([0.999, 0.0005, 0.0005]).log(), torch.tensor([0.5, 0.25, 0.25]).log()
    logp = p[:1, None].clone().requires_grad_()
    scored = Scored(
        torch.zeros(1, 1).long(),
        torch.ones(1, 1).bool(),
        logp,
        logp.detach(),
        q[:1, None],
        p[None, None],
        q[None, None],
    )
    options = dict(
        divergence="pearson_chi2", gamma=0.0, variance="baseline", top_k=4, log_u_clip=1.0, normalize="batch"
    )
    (minus_A,) = torch.autograd.grad(METHODS[method].loss(scored, **options)[0], logp)
    assert abs(minus_A.item()) < 2 * (math.e**2 - 1)


def test_a_gradient_is_shortened_to_grad_clip_and_reported_as_it_was():
    free, clipped = updated(method="grpo"), updated(method="grpo", grad_clip=0.01)
    assert free.gradients[0].norm() > 0.1 and clipped.gradients[0].norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(clipped.gradients[0] * free.gradients[0].norm() / 0.01, free.gradients[0])
    assert torch.equal(clipped.measured["grad_norm"], free.measured["grad_norm"])


# --------------------------------------------------------------------------------------------------------- the options


def taken(method):
    """The names of what a loss takes behind the batch."""
    return [*inspect.signature(method.loss).parameters][1:]


@pytest.mark.parametrize("name", METHODS)
def test_the_table_names_the_options_that_a_loss_takes(name):
    method = METHODS[name]
    assert list(method.options) == taken(method)
    assert set(method.options) <= {field.name for field in dataclasses.fields(config.Config)}


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_gets_the_options_that_it_takes_as_they_were_given(name, monkeypatch):
    calls, method = calls_of_losses(monkeypatch), METHODS[name]
    other = {"divergence": "hellinger", "group_size": 8, "eps_w": 0.3, "clip_low": 0.1, "normalize": "sequence_mean"}
    other |= {"gamma": 0.5, "log_u_clip": 3.0, "loss_type": "dr_grpo", "lam": 0.7, "negative_only": True}
    given = {option: value for option, value in other.items() if option in taken(method)}
    monkeypatch.setattr(sys.modules[__name__], "RIGHT", (0, 3, 9))
    updated(method=name, **given)
    ((scored, options),) = calls
    defaults = {
        option: getattr(config.Config(method=name), option) for option in taken(method)
    }  # each is one of config's
    assert options == defaults | given and scored.step == STEP


@pytest.mark.parametrize("name", METHODS)
def test_the_command_line_refuses_what_the_method_does_not_read(name, capsys):
    """Whatever one loss takes and this one does not; of what the loop itself reads, what has no subject here."""
    method, of_losses = METHODS[name], {option for method in METHODS.values() for option in taken(method)}
    needs = {"reference": "self", "teacher_sync": "self", "epochs": "rewards", "group_size": "slot"}
    has = {"self": method.teacher == "self", "rewards": method.rewards, "slot": method.reference_slot}
    for field in dataclasses.fields(config.Config):
        flag = "--" + field.name.replace("_", "-")
        typed = [flag] if field.type is bool else [flag, str(getattr(config.Config(method=name), field.name))]
        if field.name in needs:
            reads = has[needs[field.name]]
        else:
            reads = field.name not in of_losses or field.name in taken(method)
        if reads:
            config.parse(["--method", name, *typed])
            continue
        with pytest.raises(SystemExit) as end:
            config.parse(["--method", name, *typed])
        error = capsys.readouterr().err
        assert end.value.code == 2 and f" means nothing with --method {name}: it is read by " in error
        readers = error.strip().split("it is read by ")[1].split(", ")
        assert readers and name not in readers and set(readers) <= set(METHODS)
        if field.name in of_losses - {*needs}:
            assert readers == [other for other in METHODS if field.name in taken(METHODS[other])]


ADDED = """
import sys
import torch
from nano_opd import methods, policy_gradient

def coin_loss(s, lam, normalize):
    A = torch.where(s.teacher_logp > s.student_logp, lam, -lam).detach()
    return policy_gradient.loss(s.student_logp, A, s.mask, normalize), {"clip_fraction": (A > 0)[s.mask].float().mean()}

methods.METHODS["coin"] = methods.Method(coin_loss, options=("lam", "normalize"), teacher="larger")

import train
*tiny, out_dir = sys.argv[1:]
for arguments in ("coin --gamma 1", "gkd --lam 0.7", "coin --help", "coin --lam 0.7 --normalize sequence_mean"):
    try:
        train.main([*tiny, "--out-dir", out_dir, "--method", *arguments.split()])
    except SystemExit:
        pass
"""
RUN = (
    "--digits 2 --teacher-layers 1 --teacher-width 16 --student-layers 1 --student-width 8 --teacher-steps 5 "
    "--student-steps 3 --sft-batch-size 8 --batch-size 8 --eval-size 8 --eval-every 5 --steps 12"
).split()


def test_one_function_and_one_entry_are_a_new_method(tmp_path):
    """It trains, and the command line knows its options as it knows every other method's."""
    command = [sys.executable, "-c", ADDED, *RUN, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    first, second = ended.stderr.splitlines()
    assert "--gamma 1.0 means nothing with --method coin: it is read by opd, opdplus" in first
    assert second.endswith("--lam 0.7 means nothing with --method gkd: it is read by rlsd, coin")
    said = " ".join(ended.stdout.split())
    assert "[rlsd, coin]" in said and "rlsd,coin}" in said
    (folder,) = tmp_path.glob("coin*")
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.pt", "config.json", "curves.png", "metrics.csv"]
    header, *lines = (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
    rows = [dict(zip(header.split(","), line.split(","))) for line in lines]
    assert len(rows) == 13 and all(float(row["grad_norm"]) > 0 for row in rows[:-1])
    assert all(0 < float(row["clip_fraction"]) < 1 for row in rows[:-1])


@pytest.mark.parametrize("name", ["opdplus", "grpo", "rlsd"])
def test_who_is_to_be_its_own_teacher_learns_half_of_its_prompts_blank_and_half_with_a_reference(
    name, tmp_path, monkeypatch
):
    given = []

    def note(model, problems, generator, batch_size, lr, after_update):
        styles = generator and generator.choice(train.sft.VIEWS, len(problems)).tolist()
        given.append((problems, batch_size, lr, styles))

    monkeypatch.setattr(train.sft, "warm_start", note)
    cfg = config.Config(
        method=name, student_steps=50, sft_batch_size=40, sft_lr=0.125, student_width=8, out_dir=str(tmp_path)
    )
    with runs.opened(cfg, train.CODE) as run:
        train.warm_start(run, "student")
    ((problems, batch_size, lr, styles),) = given
    assert len(problems) == 2000 and (batch_size, lr) == (40, 0.125)
    assert (styles is None) == (name == "opdplus")
    if styles:
        counts = {style: styles.count(style) for style in ("blank", *arithmetic.REFERENCES)}
        assert sum(counts.values()) == len(styles) == 2000
        assert abs(counts["blank"] - 1000) < 100 and all(abs(counts[r] - 500) < 90 for r in arithmetic.REFERENCES)


# ------------------------------------------------------------------------------------------------------- the evaluation


@pytest.mark.parametrize("name", ["sft", "opdplus", "rlsd"])
def test_only_held_out_problems_are_evaluated_and_everything_else_reads_none_of_them(name, tmp_path, monkeypatch):
    """Whatever any model reads, in warm starts, updates and evaluations, sorted by who asked it to."""
    arguments = [*RUN, "--digits", "2", "--method", name, "--out-dir", str(tmp_path)]
    cfg, forward = config.parse(arguments), GPT.forward
    read, asked_by = {}, ["the rest"]

    def recorded(self, tokens, *rest, **named):
        for row in tokens.tolist() if tokens.shape[1] > 1 else []:  # one token is the next of a response
            prompt = decode(row)[arithmetic.slot_length(2) + 1 if cfg.reference_slot else 0 :]
            read.setdefault(asked_by[-1], set()).add(tuple(map(int, re.match(r"(\d\d)\+(\d\d)", prompt).groups())))
        return forward(self, tokens, *rest, **named)

    def asking(function):
        def asked(*given, **named):
            asked_by.append(function.__name__)
            try:
                return function(*given, **named)
            finally:
                asked_by.pop()

        return asked

    monkeypatch.setattr(GPT, "forward", recorded)
    for function in (train.evaluate, train.report, train.warn_of_a_weak_teacher):
        monkeypatch.setattr(train, function.__name__, asking(function))
    train.main(arguments)
    checks = {"warn_of_a_weak_teacher"} if not cfg.reference_slot else set()
    assert set(read) == {"the rest", "evaluate", "report"} | checks and all(len(pairs) > 20 for pairs in read.values())
    for who, pairs in read.items():
        held_out = {bool(arithmetic.is_held_out("add", a, b)) for a, b in pairs}
        assert held_out == {who != "the rest"}


def test_accuracy_is_sampled_and_greedy_accuracy_greedy(tmp_path, monkeypatch):
    """A run with a sampler that is right only when it is greedy."""
    asked = []

    def sample(student, prompts, R, generator=None, greedy=False):
        asked.append((len(prompts), greedy or generator.initial_seed()))
        got = rollout.sample(student, prompts, R, generator, greedy)
        tokens = got.tokens.clone()
        for i, prompt in enumerate(prompts if greedy else []):
            response = encode(worked(decode(prompt))) + [EOS]
            tokens[i, prompts.shape[1] :] = torch.tensor(response + [PAD] * (R - len(response)))
        return dataclasses.replace(got, tokens=tokens, mask=tokens[:, prompts.shape[1] :] != PAD) if greedy else got

    monkeypatch.setattr(train, "sampler", lambda device, compile, seldom=False: sample)
    with_rows, trained = [], train.train
    monkeypatch.setattr(train, "train", lambda run, *models: with_rows.append(run) or trained(run, *models))
    train.main([*RUN, "--student-steps", "0", "--out-dir", str(tmp_path)])
    measured = [row for row in with_rows[0].rows if row["accuracy"] is not None]
    assert [row["step"] for row in measured] == [0, 5, 10, 12]
    assert all(row["greedy_accuracy"] == 1 and row["accuracy"] < 0.5 for row in measured)
    stream = lambda purpose, step: torch_stream(0, purpose, step).initial_seed()
    want = []
    for step in range(13):
        if step in (0, 5, 10, 12):  # four times the problems at the start and the end
            n = 32 if step in (0, 12) else 8
            want += [(n, True), (n, stream("evaluation", step))]
        want += [(8, stream("rollout", step))] if step < 12 else []
    assert asked == want  # greedily never where it trains
