"""Wires of a run, of its optimizer and of its report: each test holds one that no other test would miss.

Most tests make one tiny run through `train.main` and read what it leaves: metrics.csv, its figure, what it prints.
"""

import csv
import itertools
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from test_methods import updated
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import train
from nano_opd import arithmetic, sft
from nano_opd.evaluate import wilson
from nano_opd.gpt import GPT, GPTConfig
from nano_opd.methods import METHODS
from nano_opd.rollout import Rollout, sample
from nano_opd.system import checkpoint, config, folder, report
from nano_opd.tokenizer import EOS, PAD, decode, encode

STUDENT_WIDTH = 8
TEACHER_WIDTH = 16
TINY = (
    f"--digits 2 --teacher-layers 1 --teacher-width {TEACHER_WIDTH} --student-layers 1 "
    f"--student-width {STUDENT_WIDTH} --teacher-steps 3 --student-steps 2 --sft-batch-size 8 --batch-size 4 "
    "--eval-size 5 --steps 2"
).split()


@pytest.fixture(autouse=True)
def figures(monkeypatch):
    """Keep the figures that a run makes in a list, and do not draw them: that takes longer than the run."""
    made = []

    def keep(figure, *_, **__):
        made.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return made


def run(out_dir: Path, *arguments: str) -> Path:
    """Make one tiny run in this process and return its folder."""
    arguments = [*TINY, "--out-dir", str(out_dir), *arguments]
    train.main(arguments)
    return config.parse(arguments).run_dir


def column(run_dir: Path, name: str) -> list[str]:
    """Read one column of metrics.csv."""
    with open(run_dir / "metrics.csv", encoding="utf-8") as file:
        return [row[name] for row in csv.DictReader(file)]


def problem_of(prompt: str) -> arithmetic.Problem:
    """Return the problem that a prompt of two digits ends in."""
    a, symbol, b = re.search(r"(\d\d)([-+*])(\d\d)=$", prompt).groups()
    (task,) = [name for name, task in arithmetic.TASKS.items() if task.symbol == symbol]
    return arithmetic.Problem(task, 2, int(a), int(b))


def worked(problem: arithmetic.Problem, broken: int | None) -> str:
    """Return the worked solution; or one that is wrong in the step of this number first, and in its answer."""
    steps = arithmetic.steps(problem)
    if broken is None:
        return "".join(steps)
    for n in {broken, len(steps) - 1}:
        text = steps[n].rstrip()
        digit = (int(text[-1]) + 1) % 10
        steps[n] = steps[n].replace(text, f"{text[:-1]}{digit}")
    return "".join(steps)


class Script:
    """A sampler that writes worked solutions for both models, and breaks a step of some.

    right   maps the width of a model, the number of its call and the row of a response to whether it is right
    """

    def __init__(self, right):
        self.right = right
        self.asked = {STUDENT_WIDTH: [], TEACHER_WIDTH: []}  # the problems of each call

    def __call__(self, model, prompts, max_new_tokens, generator=None, greedy=False) -> Rollout:
        width = model.config.n_embd
        call = len(self.asked[width])
        problems = [problem_of(decode(prompt)) for prompt in prompts.tolist()]
        self.asked[width].append(problems)
        tokens = prompts.new_full((len(prompts), max_new_tokens), PAD)
        for row, problem in enumerate(problems):
            broken = None if self.right(width, call, row) else (row + call) % 3
            text = encode(worked(problem, broken)) + [EOS]
            tokens[row, : len(text)] = torch.tensor(text)
        mask = tokens != PAD
        return Rollout(torch.cat([prompts, tokens], 1), prompts.shape[1], mask, torch.zeros(mask.shape))


# ----------------------------------------------------------------------------------------------------- what is counted


def test_an_update_counts_its_rollouts_once_however_many_epochs_it_has(tmp_path):
    run_dir = run(tmp_path, "--method", "grpo", "--epochs", "3", "--batch-size", "8")
    assert column(run_dir, "rollouts") == ["0", "8", "16"]


@pytest.fixture
def clock(monkeypatch):
    """A clock in a list by which an evaluation takes 100 seconds and an update 1."""
    clock = [0.0]
    update = train.update
    evaluate = train.evaluate

    def update_of_a_second(*arguments):
        clock[0] += 1
        return update(*arguments)

    def long_evaluation(*arguments, **options):
        clock[0] += 100
        return evaluate(*arguments, **options)

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(train, "update", update_of_a_second)
    monkeypatch.setattr(train, "evaluate", long_evaluation)
    return clock


def test_the_clock_of_a_row_is_read_before_its_evaluation(clock, tmp_path, capsys):
    """Row n has n evaluations and n updates behind it; the report names the last row's."""
    run_dir = run(tmp_path, "--eval-every", "1")
    assert [float(seconds) for seconds in column(run_dir, "seconds")] == [0, 101, 202]
    assert ": 2 updates of 4 rollouts in 202 s" in capsys.readouterr().out


def test_the_clock_of_a_resumed_run_has_counted_all_that_was_done_before(clock, tmp_path):
    """Three evaluations and two updates; what passes between the two commands is not counted."""
    run(tmp_path, "--eval-every", "1")
    clock[0] += 10_000
    run_dir = run(tmp_path, "--eval-every", "1", "--steps", "3", "--resume")
    assert [float(seconds) for seconds in column(run_dir, "seconds")] == [0, 101, 302, 403]


def test_the_bar_of_a_resumed_run_starts_at_its_step_and_ends_at_the_last(tmp_path, monkeypatch, capsys):
    run(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(tmp_path, "--steps", "4", "--resume")
    assert re.findall(r"(\d)/4", capsys.readouterr().err)[-1] == "4"


def test_every_evaluation_draws_numbers_of_its_own(tmp_path):
    """At a learning rate of 0 steps 1 to 4 evaluate one student on the same problems."""
    run_dir = run(tmp_path, *"--lr 0 --steps 5 --eval-every 1 --eval-size 20".split())
    assert len(set(column(run_dir, "entropy")[1:5])) == 4


@pytest.mark.parametrize("task", [*arithmetic.TASKS, "mix"])
@pytest.mark.parametrize("digits", [2, 5])
def test_a_response_has_room_for_a_worked_solution_and_five_tokens_more(task, digits):
    cfg = config.Config(task=task, digits=digits)
    tokens = sft.solution_tokens(train.draw_problems(cfg, "any", 50))
    solution_length = tokens.shape[1] - cfg.prompt_length
    assert cfg.response_cap == solution_length + 5


# --------------------------------------------------------------------------------------------------- how it is trained


@pytest.mark.parametrize("method", ["opd", "opdplus"])
def test_a_baseline_takes_as_much_from_the_advantage_at_every_gamma(method):
    """A_n has two added parts, the future rewards and the baseline: neither depends on whether the other is there."""

    def gradient(**options):
        return updated(method=method, **options).gradients[0]

    plain = gradient()
    with_future = gradient(gamma=0.5)
    with_baseline = gradient(variance="baseline")
    with_both = gradient(gamma=0.5, variance="baseline")
    size = plain.abs().max().item()
    assert (with_future - plain).abs().max() > 0.01 * size
    torch.testing.assert_close(with_both - with_future, with_baseline - plain, rtol=1e-3, atol=1e-5 * size)


@pytest.fixture
def optimizer_steps():
    """A list that grows with every step of any optimizer: its learning rate, and weights and gradients around it."""
    steps = []

    def note_before(optimizer, *_):
        group = optimizer.param_groups[0]
        weights = [weight.detach().double() for weight in group["params"]]
        gradients = [weight.grad.double() for weight in group["params"]]
        steps.append({"optimizer": optimizer, "lr": group["lr"], "before": weights, "gradients": gradients})

    def note_after(optimizer, *_):
        steps[-1]["after"] = [weight.detach().double() for weight in optimizer.param_groups[0]["params"]]

    hooks = [register_optimizer_step_pre_hook(note_before), register_optimizer_step_post_hook(note_after)]
    yield steps
    for hook in hooks:
        hook.remove()


def test_the_gradient_of_every_epoch_is_clipped(tmp_path, optimizer_steps):
    run(tmp_path, *"--method grpo+opsd --epochs 3 --grad-clip 1e-3 --lr 0.003 --steps 1".split())
    norms = []
    for step in optimizer_steps:
        if step["optimizer"].defaults["lr"] == 0.003:  # not a warm start's
            norms.append(torch.cat([gradient.flatten() for gradient in step["gradients"]]).norm().item())
    assert norms == pytest.approx([1e-3] * 3, rel=1e-3)


def test_every_step_of_teacher_and_student_is_adams_with_betas_of_0_9_and_0_95_and_no_weight_decay(
    tmp_path, optimizer_steps
):
    """Kingma & Ba 2015, algorithm 1, in float64."""
    run(tmp_path, "--steps", "3")
    optimizers = {id(step["optimizer"]): step["optimizer"] for step in optimizer_steps}
    assert len(optimizers) == 3 and len(optimizer_steps) == 3 + 2 + 3  # two warm starts, and the run
    for optimizer in optimizers.values():
        steps = [step for step in optimizer_steps if step["optimizer"] is optimizer]
        first_moments = [0.0] * len(steps[0]["before"])
        second_moments = [0.0] * len(steps[0]["before"])
        for t, step in enumerate(steps, 1):
            for i, gradient in enumerate(step["gradients"]):
                first_moments[i] = 0.9 * first_moments[i] + 0.1 * gradient
                second_moments[i] = 0.95 * second_moments[i] + 0.05 * gradient**2
                mean = first_moments[i] / (1 - 0.9**t)
                scale = (second_moments[i] / (1 - 0.95**t)).sqrt() + 1e-8
                wanted = step["before"][i] - step["lr"] * mean / scale
                torch.testing.assert_close(step["after"][i], wanted, rtol=0, atol=2e-6)


def test_teacher_and_student_learn_from_different_problems(tmp_path, monkeypatch):
    taught = []
    warm_start = sft.warm_start

    def noted(model, problems, *rest, **named):
        taught.append(problems)
        warm_start(model, problems, *rest, **named)

    monkeypatch.setattr(sft, "warm_start", noted)
    run(tmp_path, *"--digits 4 --teacher-steps 2 --student-steps 2".split())
    student, teacher = taught
    assert len(student) == len(teacher) == 16 and not set(student) & set(teacher)


@pytest.fixture
def views_of_a_warm_start(tmp_path, monkeypatch):
    """A function from a seed to the references that the warm start of a self-teacher reads."""

    def views(seed: int) -> list[str]:
        noted = []

        def note(problems, device, styles):
            if styles is not None:
                noted.extend(styles)
            return solution_tokens(problems, device, styles)

        solution_tokens = sft.solution_tokens
        with monkeypatch.context() as patch:
            patch.setattr(sft, "solution_tokens", note)
            run(tmp_path, *f"--method rlsd --student-steps 100 --seed {seed}".split())
        return noted

    return views


def test_a_self_teacher_starts_from_as_many_blank_prompts_as_prompts_with_a_reference(views_of_a_warm_start):
    views = views_of_a_warm_start(0)
    assert len(views) == 800
    shares = {view: views.count(view) / len(views) for view in set(views)}
    assert shares == pytest.approx({"blank": 0.5, "work": 0.25, "cite": 0.25}, abs=0.07)  # four standard errors
    assert views != views_of_a_warm_start(1)


def test_teacher_and_student_of_one_size_begin_with_different_weights(tmp_path):
    one_size = f"--teacher-width {STUDENT_WIDTH} --teacher-steps 0 --student-steps 0".split()
    assert float(column(run(tmp_path, *one_size), "kl")[0]) > 0.01


def test_teacher_and_student_have_the_sizes_that_were_asked_for():
    cfg = config.parse("--teacher-layers 1 --teacher-width 16 --student-layers 4 --student-width 8".split())
    sizes = {who: (cfg.gpt(who).n_layer, cfg.gpt(who).n_embd) for who in ("teacher", "student")}
    assert sizes == {"teacher": (1, 16), "student": (4, 8)}


def test_a_block_starts_as_the_identity_and_reads_its_input_with_a_gain_of_two():
    """The weights W of a block that read a normalised x of C channels have a standard deviation of 2/√C."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 16, n_layer=2, n_embd=64))
    x = torch.randn(4, 16, 64)
    x = (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True)
    for block in model.blocks:
        assert torch.equal(block(x, model.mask, None, slice(16)), x)
        for layer in (block.qkv, block.mlp_in):
            assert layer(x).std().item() == pytest.approx(2, rel=0.1)


def test_a_signal_ends_a_warm_start_at_once_and_nothing_of_it_is_kept(tmp_path, monkeypatch, capsys):
    warm_start = sft.warm_start
    updates = []

    def interrupted(*arguments, after_update):
        def update():
            updates.append(None)
            if len(updates) == 2:
                signal.raise_signal(signal.SIGTERM)
            after_update()

        warm_start(*arguments, after_update=update)

    monkeypatch.setattr(sft, "warm_start", interrupted)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--student-steps", "9")
    assert end.value.code == 143 and len(updates) == 2
    assert not list(tmp_path.rglob("*.pt"))


# ------------------------------------------------------------------------------------------------- what the report says

MEASURED = {  # (at the start, in the middle, at the end); proportions are such of 20, 5 and 20 problems
    "accuracy": (0.20, 0.60, 0.75),
    "greedy_accuracy": (0.35, 0.40, 0.90),
    "kl": (2.125, 1.5, 0.875),
    "entropy": (1.25, 1.0, 0.5),
    "response_length": (11.5, 12.0, 15.25),
    "truncated": (0.15, 0.2, 0.05),
    "leak_rate": (0.30, 0.2, 0.65),
    "information_gap": (0.375, 0.25, 0.625),
}
LABELS = {
    "KL to the teacher, nats": "kl",
    "entropy, nats": "entropy",
    "response length, tokens": "response_length",
    "truncated, fraction": "truncated",
}
LABELS_OF_A_SELF_TEACHER = {"answers that cite": "leak_rate", "I(Y; R | X), nats": "information_gap"}


@pytest.fixture
def measured(monkeypatch):
    """Let the evaluations of a run with two updates find what stands in MEASURED."""
    evaluations = []

    def evaluate(*_, **__):
        evaluations.append(None)
        return {name: values[len(evaluations) - 1] for name, values in MEASURED.items()}

    monkeypatch.setattr(train, "evaluate", evaluate)


def with_interval(proportion: float, problems: int) -> str:
    low, high = wilson(round(proportion * problems), problems)
    return f"{proportion:.3f} [{low:.3f}, {high:.3f}]"


@pytest.mark.parametrize("method", ["opdplus", "rlsd"])
def test_the_report_says_each_measurement_at_the_start_and_the_end_under_its_own_label(
    method, measured, tmp_path, capsys
):
    run(tmp_path, "--method", method, "--eval-every", "1")
    said = capsys.readouterr().out
    for step in range(3):
        accuracy = MEASURED["accuracy"][step]
        kl = MEASURED["kl"][step]
        assert re.search(rf"^step +{step} .* accuracy {accuracy:.3f}  kl {kl:.3f}$", said, re.MULTILINE)
    for label, name in {"accuracy, sampled": "accuracy", "accuracy, greedy": "greedy_accuracy"}.items():
        start, _, end = MEASURED[name]
        wanted = f"{with_interval(start, 20)} → {with_interval(end, 20)}"
        assert re.search(rf"^ +{label} +{re.escape(wanted)}$", said, re.MULTILINE), label
    labels = LABELS | (LABELS_OF_A_SELF_TEACHER if METHODS[method].teacher == "self" else {})
    for label, name in labels.items():
        start, _, end = MEASURED[name]
        wanted = f"{start:.3f} → {end:.3f}"
        assert re.search(rf"^ +{re.escape(label)} +{wanted}$", said, re.MULTILINE), label


def test_the_curves_of_a_run_have_the_intervals_of_as_many_problems_as_were_evaluated(measured, figures, tmp_path):
    run_dir = run(tmp_path, "--eval-every", "1")
    (figure,) = figures
    accuracy, nats, length, _ = figure.axes
    labels = {"sampled": "accuracy", "greedy": "greedy_accuracy"}
    labels |= {"KL(student‖teacher)": "kl", "student entropy": "entropy"}
    for line in [*accuracy.lines, *nats.lines]:
        assert tuple(line.get_ydata()) == MEASURED[labels.pop(line.get_label())]
    assert not labels
    for band, name in zip(accuracy.collections, ["accuracy", "greedy_accuracy"], strict=True):
        for step, problems in [(0, 20), (1, 5), (2, 20)]:
            at_step = [y for x, y in band.get_paths()[0].vertices if x == step]
            successes = round(MEASURED[name][step] * problems)
            assert (min(at_step), max(at_step)) == pytest.approx(wilson(successes, problems))
    cap = config.parse(TINY).response_cap
    assert list(length.lines[-1].get_ydata()) == [cap, cap]
    assert figure.get_suptitle() == run_dir.name


def test_the_four_tries_at_a_problem_are_drawn_one_after_the_other(tmp_path, monkeypatch):
    """Else pass@4 would be the accuracy."""
    tries = []

    def noted(model, *arguments):
        rollout = sample(model, *arguments)
        if model.config.n_embd == STUDENT_WIDTH:
            tries.append(rollout.responses)
        return rollout

    monkeypatch.setattr(report, "sampler", lambda *_, **__: noted)
    run(tmp_path)
    assert len(tries) == 4
    for first, second in itertools.combinations(tries, 2):
        assert (first != second).any(1).float().mean() > 0.8


def scripted(monkeypatch, right) -> Script:
    """Let the report ask models that answer as scripted."""
    script = Script(right)
    monkeypatch.setattr(report, "sampler", lambda *_, **__: script)
    return script


def test_the_report_shows_wrong_answers_first_each_with_its_own_first_broken_step(tmp_path, monkeypatch, capsys):
    """Three of 20 are wrong in the first of four tries, and others in the other tries."""
    scripted(monkeypatch, lambda width, call, row: row % 7 != call + 2)
    run(tmp_path)
    said = capsys.readouterr().out
    shown = re.findall(r"^  (\d\d\+\d\d=)(.*?)   (right|wrong: .*)$", said, re.MULTILINE)
    assert [verdict[:5] for *_, verdict in shown] == ["wrong"] * 3 + ["right"] * 2
    steps = set()
    for prompt, answer, verdict in shown:
        broken = arithmetic.first_broken_step(problem_of(prompt), answer)
        assert verdict == (f"wrong: {broken}" if broken else "right")
        steps.add(broken and broken.split(":")[0])
    assert len(steps) == 4  # a column, another, the answer, and none


@pytest.mark.parametrize("right_of_25,weak", [(22, True), (23, False)])
def test_a_teacher_is_weak_if_it_is_right_on_fewer_than_nine_in_ten_held_out_problems(
    right_of_25, weak, tmp_path, monkeypatch, capsys
):
    script = scripted(monkeypatch, lambda width, call, row: width == STUDENT_WIDTH or row % 25 < right_of_25)
    run(tmp_path, "--eval-size", "25")
    said = capsys.readouterr().out
    at_the_start, at_the_end = said.split("step     0")
    for part in (at_the_start, at_the_end):
        assert part.count("a weak teacher") == part.count("a weak teacher, right only 0.88 of the time") == weak
    assert re.search(rf"^ +the teacher, sampled +{re.escape(with_interval(right_of_25 / 25, 100))}$", said, re.M)
    checked, reported = script.asked[TEACHER_WIDTH]
    assert all(arithmetic.is_held_out(p.task, p.a, p.b) for p in checked + reported)
    assert 0.3 / len(checked) ** 0.5 < 0.015  # the standard error of 0.9
    assert checked[: len(reported)] != reported


# ------------------------------------------------------------------------------------------------------------ its files


def test_a_checkpoint_in_which_two_entries_have_exchanged_their_names_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"seed": 0}, {"student": {"mlp_in": torch.zeros(2), "mlp_out": torch.ones(2)}})
    content = torch.load(path, weights_only=True)
    first, second = content["state"]["student"].values()
    content["state"]["student"] = {"mlp_out": first, "mlp_in": second}
    torch.save(content, path)
    with pytest.raises(checkpoint.CheckpointError, match="was edited after it was saved"):
        checkpoint.load(path, {"seed": 0})


def test_a_run_that_is_refused_a_folder_leaves_what_its_owner_is_writing(tmp_path):
    arguments = [*TINY, "--out-dir", str(tmp_path)]
    cfg = config.parse(arguments)
    half_written = cfg.run_dir / ".metrics.csv.0123456789abcdef.tmp"
    with folder.claim(cfg, train.CODE):
        half_written.write_bytes(b"step,")
        with pytest.raises(SystemExit):
            train.main(arguments)
        assert half_written.read_bytes() == b"step,"
    train.main(arguments)  # and the next owner takes away what the last one left
    assert not half_written.exists()
