"""From the command line to the number: each test follows one wire that could be cut without any formula being wrong."""

import copy
import math
import re

import credit
import figures
import numpy as np
import pytest
import torch
from conftest import new_model
from lab import claims, reproduce
from lab.seeds import paired_p
from scipy import stats

import train
from nano_opd import arithmetic, divergences, rollout, sft
from nano_opd.arithmetic import prompts_of, slots_of
from nano_opd.evaluate import evaluate, wilson
from nano_opd.gpt import GPT, adamw
from nano_opd.rollout import sample
from nano_opd.streams import numpy_stream, torch_stream
from nano_opd.system import batches, checkpoint, config, folder, report, runs
from nano_opd.system.batches import draw_problems
from nano_opd.tokenizer import PAD

TINY = (
    "--digits 2 --teacher-layers 1 --teacher-width 16 --student-layers 1 --student-width 8 --teacher-steps 3 "
    "--student-steps 2 --sft-batch-size 8 --batch-size 4 --eval-size 5 --steps 2"
).split()


def warm(cfg, who):
    """A cached warm start of a run that has been made."""
    path, key = folder.warm_start(cfg, who, train.warm_start)
    model = GPT(cfg.gpt(who))
    checkpoint.load(path, key, torch.device("cpu"), {"model": model})
    return model


# ------------------------------------------------------------------------------------------------------ what is drawn


def test_every_token_has_a_random_number_of_its_own(monkeypatch):
    seen, choose = [], rollout.choose
    monkeypatch.setattr(
        rollout, "choose", lambda p, uniform, greedy: (seen.append(uniform), choose(p, uniform, greedy))[1]
    )
    sample(new_model(12), torch.full((50, 4), 5), 8, torch.Generator().manual_seed(0))
    numbers = torch.cat(seen)
    assert len(seen) == 8 and len(numbers.unique()) == len(numbers)


def test_a_stream_is_the_same_in_every_process_and_version():
    """Else a resumed run would go on with other problems."""
    assert numpy_stream(3, "problems", 7).integers(10**6, size=3).tolist() == [190192, 148554, 94504]
    assert torch.randint(10**6, (3,), generator=torch_stream(3, "rollout", 7)).tolist() == [196457, 421878, 706720]


@pytest.mark.parametrize("task", arithmetic.TASKS)
def test_every_digit_of_every_operand_is_drawn_about_equally_often(task):
    problems = arithmetic.sample_problems(task, 2, 20_000, np.random.default_rng(0))
    digits = {"b": [p.b % 10 for p in problems]} | ({"a": [p.a % 10 for p in problems]} if task != "sub" else {})
    for drawn in digits.values():
        counts = np.bincount(drawn, minlength=10)
        assert counts.min() > 0.85 * 2000 and counts.max() < 1.15 * 2000


def test_two_seeds_begin_with_other_weights_even_without_a_warm_start(tmp_path):
    made = []
    for seed in ("0", "1"):
        cfg = config.parse([*TINY, "--student-steps", "0", "--out-dir", str(tmp_path), "--seed", seed])
        with runs.opened(cfg, train.CODE) as run:
            made.append(train.warm_start(run, "student").embedding.weight)
    assert not torch.equal(*made)


def test_every_rank_draws_its_own_answers_and_references_and_all_draw_the_same_problems(monkeypatch):
    """Rank 0 goes on as if it were alone; the streams of the others have the names of their ranks."""
    cfg = config.Config(method="rlsd", digits=2, batch_size=24, student_width=8)
    drawn = []

    def noted(stream):
        def note(seed, purpose, *rest):
            drawn.append(purpose)
            return stream(seed, purpose, *rest)

        return note

    monkeypatch.setattr(train, "torch_stream", noted(torch_stream))
    monkeypatch.setattr(batches, "numpy_stream", noted(numpy_stream))
    monkeypatch.setattr(batches.distributed, "shard", lambda groups: groups)
    student = GPT(cfg.gpt("student"))
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        train.update(cfg, 3, student, student, adamw(student, 0.0), sample)
    names = {"problems", "reference", "rollout"}
    assert drawn[:3] == ["problems", "reference", "rollout"] and set(drawn[:3]) == names
    assert drawn[3:] == ["problems", "reference of rank 1", "rollout of rank 1"]


# ----------------------------------------------------------------------------------------------- warm starts, precision


def test_the_rate_of_a_warm_start_falls_to_zero(monkeypatch):
    rates, adamw = [], sft.adamw

    def recorded(model, lr):
        optimizer = adamw(model, lr)
        optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(sft, "adamw", recorded)
    problems = arithmetic.sample_problems("add", 2, 8, np.random.default_rng(0))
    sft.warm_start(GPT(config.Config(digits=2).gpt("student")), problems, batch_size=2, lr=0.1)
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_a_warm_start_learns_its_solutions_and_nothing_of_its_prompts():
    """With references, in both styles: the step is that of −Σ log p over the tokens of the solution alone."""
    problems = arithmetic.sample_problems("add", 2, 8, np.random.default_rng(0))
    styles = np.random.default_rng(3).choice(sft.VIEWS, 8).tolist()
    assert set(styles) == {"blank", *arithmetic.REFERENCES}
    model = new_model(config.Config(method="rlsd", digits=2).gpt("student").block_size, n_layer=1, n_embd=16)
    other = copy.deepcopy(model)
    sft.warm_start(model, problems, np.random.default_rng(3), batch_size=8, lr=0.01)
    loss = 0.0
    for problem, style in zip(problems, styles):
        prompt = prompts_of([problem], slots=slots_of([problem], style))
        row = sft.solution_tokens([problem], styles=[style])
        logp = other(row[:, :-1]).log_softmax(-1).gather(-1, row[:, 1:, None])[0, :, 0]
        assert torch.equal(row[:, : prompt.shape[1]], prompt) and (row != PAD).all()
        loss = loss - logp[prompt.shape[1] - 1 :].sum() / 8
    optimizer = sft.adamw(other, 0.01)
    loss.backward()
    optimizer.step()
    for ours, theirs in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "flag", ["--sft-lr 0.001", "--sft-batch-size 4", "--student-steps 5", "--seed 1", "--student-width 16"]
)
def test_another_warm_start_has_another_file(flag):
    path = lambda *flags: folder.warm_start(config.parse([*TINY, *flags]), "student", train.warm_start)[0]
    assert path(*flag.split()) != path() == path("--lr", "0.1")


def test_the_dtype_that_is_asked_for_multiplies_and_the_logits_stay_float32(tmp_path, monkeypatch):
    seen, right = [], train.evaluate

    def noted(student, teacher, **options):
        seen.append((student.precision, teacher.precision))
        return right(student, teacher, **options)

    monkeypatch.setattr(train, "evaluate", noted)
    train.main([*TINY, "--dtype", "bfloat16", "--device", "cpu", "--out-dir", str(tmp_path)])
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    model = new_model(8)
    model.precision = torch.bfloat16
    assert model(torch.full((2, 5), 3)).dtype == torch.float32  # a product in bfloat16 would be off by 0.06 nats


# -------------------------------------------------------------------------------------------- what is measured and said


def test_the_first_row_is_the_evaluation_of_the_two_warm_starts(tmp_path):
    arguments = [*TINY, "--out-dir", str(tmp_path)]
    train.main(arguments)
    cfg = config.parse(arguments)
    student, teacher = warm(cfg, "student"), warm(cfg, "teacher")
    problems = draw_problems(cfg, "held-out", 20, held_out=True)
    want = evaluate(student, teacher, problems, cfg.response_cap, torch_stream(cfg.seed, "evaluation", 0))
    row = reproduce.read(cfg.run_dir / "metrics.csv")[0]
    assert want["kl"] > 0.01 and float(row["kl"]) == pytest.approx(want["kl"])
    assert float(row["entropy"]) == pytest.approx(want["entropy"])


def test_the_clock_goes_on_where_a_resumed_run_stopped(tmp_path):
    arguments = [*TINY, "--eval-every", "1", "--out-dir", str(tmp_path)]
    train.main(arguments)
    path = config.parse(arguments).run_dir / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved["state"]["seconds"] += 1000
    checkpoint.save(path, saved["key"], saved["state"])
    train.main([*arguments, "--resume", "--steps", "4"])
    seconds = [float(row["seconds"]) for row in reproduce.read(path.with_name("metrics.csv"))]
    assert len(seconds) == 5 and seconds[1] < 900 and seconds[-1] > seconds[-2] >= 1000


def test_the_report_asks_the_teacher_with_its_reference_and_counts_pass_at_4_by_problem(tmp_path, monkeypatch, capsys):
    """Rewards by hand: the teacher is right once in four, and of four tries every problem has exactly one right."""
    asked, prompts = [], []

    def stubbed(problems, _):
        asked.append(len(problems))
        right = torch.zeros(len(problems))
        right[(len(asked) - 1) % 4 :: 4] = 1.0  # the teacher first, then the four tries
        return right

    monkeypatch.setattr(report, "rewards", stubbed)
    monkeypatch.setattr(report, "sampler", lambda *_, **__: lambda m, p, *r: (prompts.append(p), sample(m, p, *r))[1])
    train.main([*TINY, "--method", "rlsd", "--out-dir", str(tmp_path)])
    said = capsys.readouterr().out
    assert "pass@4                   1.000" in said and "with reference, sampled  0.250" in said
    cfg = config.parse([*TINY, "--method", "rlsd"])
    problems = draw_problems(cfg, "answers", 20, held_out=True)
    wanted = [prompts_of(problems, slots=slots_of(problems, style)) for style in ("work", *["blank"] * 4)]
    assert len(prompts) == 5 and all(torch.equal(*pair) for pair in zip(prompts, wanted))


def test_a_checkpoint_whose_key_lacks_what_this_run_has_is_refused(tmp_path):
    checkpoint.save(tmp_path / "one.pt", {"a": 1}, {})
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load(tmp_path / "one.pt", {"a": 1, "b": 2}, torch.device("cpu"), {})


# ---------------------------------------------------------------------------------------------------- what results say


def test_wilsons_interval_solves_its_equation():
    """Its ends are the p at which the proportion seen lies z standard errors away, (p̂ − p)² = z² p (1 − p)/n."""
    for k, n in ((8, 10), (1, 7), (250, 2000), (999, 1000)):
        for p in wilson(k, n):
            assert (k / n - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / n)
    assert wilson(0, 20)[0] == 0 and wilson(20, 20)[1] == pytest.approx(1)


def test_small_differences_have_students_p_too():
    differences = [0.0010, 0.0012, 0.0011, 0.0013]
    assert paired_p(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)


def test_a_verdict_counts_the_claims_that_were_tested():
    run = lambda *ends: [[{"step": n, "accuracy": end * n} for n in (0, 1)] for end in ends]
    results = {"a": run(0.5, 0.52, 0.55), "b": run(0.4, 0.45, 0.41)}
    made = [claims.Claim(str(n), "a", "b", +1) for n in range(2)] + [claims.Claim("2", "a", "not run", +1)] * 9
    rows = claims.tested(made, results)
    assert "before the correction for 2 claims" in rows[0][-1] and rows[-1][-1] == "not run"


def test_what_an_arm_is_called_is_what_it_runs():
    named = {"λ": "lam", "ε_w": "eps_w", "γ": "gamma", "lr": "lr", "G": "group_size", "B": "batch_size"}
    words = {"shuffled": "reference", "cite": "reference", "work": "reference", "topk": "variance", "full": "variance"}
    for experiment in reproduce.EXPERIMENTS.values():
        for arm, flags in experiment.arms.items():
            if arm in reproduce.ceiling.ARMS or arm.startswith("exact A"):
                continue
            cfg = config.parse(f"{experiment.common} {flags}".split())
            head = re.split(r"[, ]", arm)[0]
            assert cfg.method == (head if head in train.METHODS else "rlsd"), arm
            for symbol, value in re.findall(r"(\w+)=(-?[\d.e-]+)", arm):
                if symbol != "c":
                    assert getattr(cfg, named[symbol]) == float(value), arm
            for word in re.findall(r"\w+", arm):
                assert word not in words or getattr(cfg, words[word]) == word, arm
            if "clipped" in arm or "near" in arm:
                assert (cfg.grad_clip, cfg.student_steps) == ((1, 110) if "clipped" in arm else (0, 300)), arm
            if " from " in arm:
                assert cfg.student_steps == int(arm.split(" from ")[1]), arm


def test_the_papers_settings_are_the_defaults():
    cfg = config.Config(method="rlsd")
    assert (cfg.lam, cfg.eps_w, cfg.clip_low, cfg.clip_high) == (0.5, 0.2, 0.2, 0.28)  # as the README says of RLSD


def test_every_column_of_the_updates_is_averaged_between_evaluations(tmp_path):
    (folder_of := tmp_path / "run").mkdir()
    cfg = config.Config(method="rlsd", out_dir=str(folder_of))
    cfg.run_dir.mkdir()
    names = ["step", "accuracy", *reproduce.UPDATE_COLUMNS]
    lines = [",".join(names)] + [f"{n},{0.5 if n % 2 == 0 else ''}," + ",".join([str(n)] * 6) for n in range(4)]
    (cfg.run_dir / "metrics.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = reproduce.Run("e", "a", 0, [], cfg).rows()
    measured = ["loss", "grad_norm", "clip_fraction", "reward", "zero_groups", "weight_clip_fraction"]
    assert [[float(row[name]) for name in measured] for row in rows] == [[0.5] * 6, [2.5] * 6]
    assert set(measured) < set(runs.COLUMNS)


def test_the_lines_of_the_rewards_figure_are_what_their_labels_say():
    axes = figures.rewards(np.zeros(3), ["jsd", "forward_kl"]).axes
    for ax, name in zip(axes, ("jsd", "forward_kl")):
        lines, d = {line.get_label(): line for line in ax.lines}, divergences.get(name)
        x = torch.as_tensor(lines["OPD: −f(u)"].get_xdata())
        torch.testing.assert_close(torch.as_tensor(lines["OPD: −f(u)"].get_ydata()), -d.f(x))
        torch.testing.assert_close(torch.as_tensor(lines["OPD+: w_f(u)"].get_ydata()), d.w_f(x))


# -------------------------------------------------------------------------------------------------------------- credit


def test_a_value_is_kept_exactly_where_the_token_before_was_sure():
    problems = [arithmetic.Problem("add", 2, 12, 34), arithmetic.Problem("add", 2, 43, 21)] * 4
    model = new_model(6 + 5, n_layer=2, n_embd=16)
    drawn = sample(model, prompts_of(problems), 5, torch.Generator().manual_seed(0))
    p = drawn.logp.exp()
    sure = p[drawn.mask].median().item()
    marked = iter(range(1, 10**6))
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patched:  # every estimate is a number of its own
        patched.setattr(credit, "rewards", lambda asked, _: torch.tensor([float(next(marked)) for _ in asked]))
        V, _ = credit.monte_carlo_values(model, problems, drawn, 2, torch.Generator().manual_seed(1), sure)
    for row in range(8):
        for n in range(1, int(drawn.mask[row].sum())):
            assert (V[row, n] == V[row, n - 1]) == (p[row, n - 1].item() >= sure), (row, n)


def test_the_added_contrast_is_its_formula():
    A, right, wrong = torch.tensor([1.0]), torch.tensor([[-0.5]]), torch.tensor([[-2.0]])
    got = credit.added_contrast(A, right, wrong, torch.ones(1, 1, dtype=torch.bool), lam=0.5, tau=1.3)
    assert got.item() == pytest.approx(1 + 0.5 * math.tanh(1.5 / 1.3))


def test_a_method_that_measures_what_is_no_column_is_told_so_at_its_first_update(tmp_path, monkeypatch):
    update = train.update
    monkeypatch.setattr(train, "update", lambda *given: update(*given) | {"bonus": torch.ones(())})
    with pytest.raises(KeyError, match="bonus: no column of metrics.csv; add it to COLUMNS"):
        train.main([*TINY, "--out-dir", str(tmp_path)])


@pytest.mark.parametrize("method", ["sft", "opdplus"])
def test_only_supervised_training_copies_worked_solutions(method, tmp_path, monkeypatch):
    solved = []
    solve = sft.solve

    def noted(*given):
        solved.append(given)
        return solve(*given)

    monkeypatch.setattr(sft, "solve", noted)
    train.main([*TINY, "--method", method, "--steps", "3", "--out-dir", str(tmp_path)])
    assert len(solved) == (3 if method == "sft" else 0)
