"""Two processes under torchrun: the gradient of one, a single writer, and an end for all when one of them ends.

This file is also their program: `torchrun tests/system/test_distributed.py shares|run <folder> …`.
"""

import copy
import csv
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from nano_opd import arithmetic, grpo, rlsd, streams
from nano_opd.arithmetic import prompts_of, slots_of
from nano_opd.checks import NumericalFault
from nano_opd.gpt import GPT
from nano_opd.methods import METHODS
from nano_opd.rollout import Rollout, sample
from nano_opd.system import checkpoint, config, console, distributed
from nano_opd.system.batches import draw_problems
from nano_opd.system.fast_rollout import sampler

ROOT = Path(__file__).parents[2]
TINY = (
    "--digits 2 --teacher-layers 1 --teacher-width 16 --student-layers 1 --student-width 8 --teacher-steps 5 "
    "--student-steps 3 --sft-batch-size 8 --batch-size 16 --eval-size 4 --eval-every 5 --steps 12 --device cpu"
).split()
ARMS = {
    "sft": "--method sft",
    "gkd": "--method gkd",
    "opd": "--method opd --gamma 1",
    "opdplus": "--method opdplus",
    "baseline": "--method opdplus --variance baseline",
    "own length": "--method opdplus --normalize sequence_mean",
    "grpo": "--method grpo --epochs 2",
    "opsd": "--method opsd --group-size 2",
    "grpo+opsd": "--method grpo+opsd",
    "rlsd": "--method rlsd --epochs 2 --group-size 2 --lam 1 --eps-w 0.9",
    "shuffled": "--method rlsd --reference shuffled --lam 1 --eps-w 0.9",
}


def run_of(out_dir):
    (folder,) = out_dir.glob("opdplus-jsd-sampled-add*")
    return folder


def lucky(problems, rollout):
    """A verifier that likes one response in two, since a tiny student is never right."""
    return (rollout.responses.sum(1) % 2).float()


def models(cfg):
    """A student and a teacher that differ, the same on every rank, and whose every weight matters."""
    torch.manual_seed(0)
    pair = GPT(cfg.gpt("student")), GPT(cfg.gpt("student" if cfg.reference_slot else "teacher"))
    for parameter in [p for model in pair for p in model.parameters()]:
        torch.nn.init.normal_(parameter, std=0.5)
    return pair


def record(module, name, kept):
    """Keep what each call of a function returns."""
    function = getattr(module, name)

    def recorded(*arguments, **named):
        kept[name] = function(*arguments, **named)
        return kept[name]

    setattr(module, name, recorded)


def gradients_of_an_update(cfg, student, teacher, sampler):
    """One for each epoch, (T,), all weights in a row: the second is at the weights that followed the first."""
    gradients, optimizer = [], torch.optim.SGD(student.parameters(), lr=0.01)
    read = lambda *_: gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    optimizer.register_step_pre_hook(read)
    train.update(cfg, 3, student, teacher.requires_grad_(False), optimizer, sampler)
    return gradients


def fractions_of_rank(k):
    """Clipped weights and ratios of ragged responses: 5 tokens with A ≠ 0 on rank 0, none on rank 1."""
    mask = [[[True, True, True], [True, True, False]], [[True, False, False], [True, True, False]]][k]
    mask = torch.tensor(mask)
    A = torch.tensor([[1.0, -1.0], [0.0, 0.0]][k])
    gain = torch.tensor([[9.0, 9.0, 0.0], [0.0, 0.0, 9.0]])  # two of rank 0's five weights are clipped
    ratio = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]], [[9.0, 9.0, 0.0], [9.0, 9.0, 0.0]]][k])
    return {
        "weight_clip_fraction": rlsd.clip_fraction(A, gain, torch.zeros(2, 3), mask, 0.2),
        "clip_fraction": grpo.clip_fraction(ratio, torch.zeros(2, 3), mask, 0.2, 0.2),
    }


def work_on_shares(folder):
    """One update's gradients for every arm, with all that this rank has drawn for it, in a file of its own."""
    out, kept, train.rewards = {}, {}, lucky
    record(arithmetic, "draw_references", kept)
    record(train.sft, "worked_solutions", kept)

    def recorded(student, prompts, *rest):
        kept["prompts"] = prompts
        kept["sample"] = sampler(torch.device("cpu"))(student, prompts, *rest)
        return kept["sample"]

    with distributed.group(torch.device("cpu")):
        for arm, arguments in ARMS.items():
            cfg = config.parse([*TINY, *arguments.split()])
            student, teacher = models(cfg)
            if distributed.rank() > 0:
                torch.nn.init.zeros_(student.embedding.weight)  # so that the weights must come from rank 0
            kept.clear()
            sample_or_solve = recorded if METHODS[cfg.method].samples else train.sft.solve
            gradients = gradients_of_an_update(cfg, distributed.replicate(student), teacher, sample_or_solve)
            drawn = {key: vars(value) if isinstance(value, Rollout) else value for key, value in kept.items()}
            out[arm] = {"gradients": gradients, "weights": student.state_dict(), **drawn}
        k = distributed.rank()
        out["mean"] = distributed.mean({"rank": torch.tensor(float(k)), "one": torch.ones(())})
        out["fractions"] = distributed.mean(fractions_of_rank(k))
        out["first"] = [distributed.first_value(value) for value in (None, k, [None, "of rank 1"][k])]
    torch.save(out, Path(folder) / f"{k}.pt")


def work_on_a_run(out_dir, event, *arguments):
    """train.py with the weights of every rank on disk at its end; `event` happens to rank 1, at step 7 or "…@n"."""
    event, _, at = event.partition("@")
    update, trained, method = train.update, train.train, METHODS["opdplus"]

    def broken_loss(scored):
        return scored.student_logp.sum() / 0, {}

    def broken_sample(*_):
        raise NumericalFault("the log-prob of a sampled token is broken here")

    def eventful(cfg, step, student, teacher, optimizer, sample):
        if step == int(at or 7) and distributed.rank() == 1:
            if event == "fault":
                METHODS["opdplus"] = dataclasses.replace(method, loss=broken_loss, options=())
            elif event == "early fault":  # before it comes to the forward that the others are in
                sample = broken_sample
            elif event:
                os.kill(os.getpid(), getattr(signal, event))
        return update(cfg, step, student, teacher, optimizer, sample)

    def kept(run, student, teacher):
        trained(run, student, teacher)
        torch.save({"student": student.state_dict(), "rows": run.rows}, Path(out_dir) / f"{distributed.rank()}.pt")

    train.update, train.train = eventful, kept
    if distributed.rank() > 0:
        checkpoint.write_atomically = None  # whoever writes here fails
    train.main([*TINY, "--out-dir", out_dir, *arguments])


def torchrun(program, *arguments):
    """Two processes on this machine; the finished launcher."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / program),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*launcher, *map(str, arguments)], env=environment, **pipes) as process:
        try:
            out, error = process.communicate(timeout=600)  # a busy machine takes minutes to import torch twice
        finally:
            process.terminate()  # it takes its ranks with it, should they wait for each other for ever
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def run(out_dir, event="", *arguments):
    return torchrun("tests/system/test_distributed.py", "run", out_dir, event, *arguments)


@pytest.fixture(scope="module")
def shares(tmp_path_factory):
    """What each of the two ranks drew and what gradient it ended with, by arm."""
    folder = tmp_path_factory.mktemp("shares")
    ended = torchrun("tests/system/test_distributed.py", "shares", folder)
    assert ended.returncode == 0, ended.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def batch_of(cfg):
    """The problems of all ranks, as one process draws them."""
    drawn = draw_problems(cfg, "problems", 16 // cfg.copies, 3)
    return [problem for problem in drawn for _ in range(cfg.copies)]


@pytest.mark.parametrize("arm", ARMS)
def test_every_rank_has_the_gradient_of_one_process_on_all_their_rollouts(arm, shares, monkeypatch):
    parts, cfg = [share[arm] for share in shares], config.parse([*TINY, *ARMS[arm].split()])
    student, teacher = models(cfg)
    start = copy.deepcopy(student.state_dict())
    samples = [part["worked_solutions" if arm == "sft" else "sample"] for part in parts]
    together = {key: torch.cat([s[key] for s in samples]) for key in ("tokens", "mask", "logp")}
    rollout = Rollout(prompt_length=cfg.prompt_length, **together)
    slots = sum([part.get("draw_references", []) for part in parts], [])
    monkeypatch.setattr(train, "rewards", lucky)
    monkeypatch.setattr(arithmetic, "draw_references", lambda *_: slots)
    wanted = gradients_of_an_update(cfg, student, teacher, lambda *_: rollout)
    assert len(wanted) == cfg.epochs
    for want, ours, theirs in zip(wanted, *(part["gradients"] for part in parts), strict=True):
        assert want.abs().max() > 0 and torch.equal(ours, theirs)
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    for name, weight in student.state_dict().items():
        ours, theirs = (part["weights"][name] for part in parts)
        assert torch.equal(ours, theirs) and not torch.equal(weight, start[name])
        torch.testing.assert_close(ours, weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "sft"])
def test_ranks_share_out_the_problems_of_one_process_and_sample_with_their_own_streams(arm, shares):
    parts, cfg = [share[arm] for share in shares], config.parse([*TINY, *ARMS[arm].split()])
    batch = batch_of(cfg)
    slots = slots_of(batch, "blank") if cfg.reference_slot else None
    assert torch.equal(torch.cat([part["prompts"] for part in parts]), prompts_of(batch, "cpu", slots))
    student, _ = models(cfg)

    def answers(part, purpose):
        return sample(student, part["prompts"], cfg.response_cap, streams.torch_stream(cfg.seed, purpose, 3)).tokens

    assert torch.equal(parts[0]["sample"]["tokens"], answers(parts[0], "rollout"))  # as with one process
    assert torch.equal(parts[1]["sample"]["tokens"], answers(parts[1], "rollout of rank 1"))
    assert not torch.equal(parts[1]["sample"]["tokens"], answers(parts[1], "rollout"))
    assert ("draw_references" in parts[1]) == cfg.reference_slot
    if cfg.reference_slot:
        for part, purpose, theirs in zip(parts, ("reference", "reference of rank 1"), (batch[:8], batch[8:])):
            rng = streams.numpy_stream(cfg.seed, purpose, 3)
            assert part["draw_references"] == arithmetic.draw_references(theirs, cfg.group_size, rng, cfg.reference)


def test_ranks_share_out_the_worked_solutions_of_one_process(shares):
    cfg = config.parse([*TINY, "--method", "sft"])
    both = torch.cat([share["sft"]["worked_solutions"]["tokens"] for share in shares])
    assert torch.equal(both, train.sft.worked_solutions(batch_of(cfg)).tokens)


def test_ranks_agree_on_means_and_on_the_first_value(shares):
    for share in shares:
        assert share["mean"] == {"rank": 0.5, "one": 1} and share["first"] == [None, 0, "of rank 1"]


def test_a_fraction_over_the_ranks_counts_the_tokens_of_all(shares):
    """2 of 5 and 0 of 0 weights; 1 of 5 and 3 of 3 ratios. The mean of the ranks' fractions would be 0.2 and 0.6."""
    for share in shares:
        assert share["fractions"] == {
            "weight_clip_fraction": pytest.approx(2 / 5),
            "clip_fraction": pytest.approx(1 / 2),
        }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One undisturbed run of two processes."""
    out_dir = tmp_path_factory.mktemp("finished")
    ended = run(out_dir)
    assert ended.returncode == 0, ended.stderr
    return out_dir, ended


def metrics(out_dir):
    with open(run_of(out_dir) / "metrics.csv", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def state(out_dir):
    return torch.load(run_of(out_dir) / "checkpoint.pt", weights_only=True)["state"]


def same(first, second):
    a, b = state(first)["student"], state(second)["student"]
    return all(torch.equal(a[name], b[name]) for name in a) and metrics(first) == metrics(second)


def test_a_run_of_two_processes_is_one_run(finished):
    out_dir, ended = finished
    files = sorted(p.name for p in (run_of(out_dir)).iterdir())
    assert files == ["checkpoint.pt", "config.json", "curves.png", "metrics.csv"]
    assert sorted(p.name for p in out_dir.iterdir()) == ["0.pt", "1.pt", run_of(out_dir).name, "warm_starts"]
    rows = metrics(out_dir)
    assert [int(row["rollouts"]) for row in rows] == list(range(0, 13 * 16, 16))
    assert all(row["grad_norm"] for row in rows[:-1]) and ended.stdout.count("step     5") == 1
    ours, theirs = (torch.load(out_dir / f"{rank}.pt") for rank in (0, 1))
    for name, value in state(out_dir)["student"].items():
        assert torch.equal(ours["student"][name], value) and torch.equal(theirs["student"][name], value)
    for mine, other in zip(ours["rows"], theirs["rows"], strict=True):
        assert mine | {"seconds": 0} == other | {"seconds": 0}  # the loss too, which is the mean over the ranks


def test_a_rank_that_is_killed_ends_the_run_and_it_resumes_to_the_same_bits(finished, tmp_path):
    ended = run(tmp_path, "SIGKILL")
    assert ended.returncode != 0 and "another process of this run has ended; the same command" in ended.stderr
    assert state(tmp_path)["step"] == 5 and not list(tmp_path.rglob(".*.tmp"))
    assert run(tmp_path, "", "--resume").returncode == 0
    assert same(finished[0], tmp_path)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(finished, tmp_path):
    ended = run(tmp_path, "SIGTERM")
    assert ended.returncode != 0 and ended.stderr.count("train.py: stopped") == 1
    assert state(tmp_path)["step"] == 8 == len(metrics(tmp_path))
    assert run(tmp_path, "", "--resume").returncode == 0
    assert same(finished[0], tmp_path)


@pytest.mark.parametrize(
    "fault,step,sentence",
    [
        ("fault", 7, "the loss is"),
        ("early fault", 7, "the log-prob of a sampled token"),
        ("early fault", 1, "the log-prob of a sampled token"),  # in the second forward replicas settle what they share
    ],
)
def test_a_fault_on_one_rank_stops_all_with_one_sentence(fault, step, sentence, tmp_path):
    ended = run(tmp_path, f"{fault}@{step}")
    assert ended.returncode == 1 and ended.stderr.count(f"train.py: step {step}: {sentence}") == 1
    assert "another process" not in ended.stderr and state(tmp_path)["step"] == step // 5 * 5


def test_a_bad_command_line_is_refused_once(tmp_path):
    ended = torchrun("train.py", "--batch-size", "5", "--out-dir", tmp_path / "out")
    assert ended.returncode != 0 and not (tmp_path / "out").exists()
    assert ended.stderr.count("train.py: --batch-size 5: must be a multiple of the 2 processes\n") == 1


def test_a_process_that_does_not_speak_lets_the_one_that_does_end_first(capsys, monkeypatch):
    """On a busy machine rank 1 was first, and torchrun ended rank 0 before it had said what is wrong."""
    waited = []
    monkeypatch.setattr(console.time, "sleep", waited.append)
    for rank, waits in (("0", []), ("1", [console.PATIENCE])):
        env = {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": rank, "MASTER_PORT": "29500"}
        for name, value in (env | {"MASTER_ADDR": "localhost"}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as end:
            config.parse(["--batch-size", "5"])
        assert end.value.code == 2 and bool(capsys.readouterr().err) == (rank == "0") and waited == waits


@pytest.mark.parametrize(
    "arguments,message",
    [
        ("--batch-size 5", "--batch-size 5: must be a multiple of the 2 processes"),
        (
            "--method grpo --batch-size 12",
            "--batch-size 12: must be a multiple of the 2 processes times --group-size 4",
        ),
        ("--normalize token_mean", "--normalize token_mean: no process knows the tokens of all"),
        ("--method rlsd --batch-size 8 --reference shuffled", "two groups or more of --batch-size in each process"),
    ],
)
def test_what_two_processes_cannot_share_is_refused(arguments, message, capsys, monkeypatch):
    assert isinstance(config.parse(arguments.split()), config.Config) or "5" in arguments
    of_torchrun = {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_PORT": 29500}
    for name, value in (of_torchrun | {"MASTER_ADDR": "localhost"}).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as end:
        config.parse(arguments.split())
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "RANK": 3, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert distributed.own_device(torch.device("cuda")) == torch.device("cuda:1")
    assert distributed.own_device(torch.device("cpu")) == torch.device("cpu")
    for refused, there in [("mps", 2), ("cuda:0", 2), ("cuda", 1)]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        with pytest.raises(ValueError, match=f"{refused}: 2 processes need"):
            distributed.own_device(torch.device(refused))


if __name__ == "__main__":
    {"shares": work_on_shares, "run": work_on_a_run}[sys.argv[1]](*sys.argv[2:])
