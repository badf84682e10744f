"""Does the fast path of your GPU compute what plain code computes on the CPU? `python -m lab.check_gpu`.

A few minutes. One update of every method is compared, sampling with CUDA graphs and without, and short runs of
train.py go through every path once. Then come the tables of bench.py. All of it is in check.json: please send it in.
"""

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator

import torch
from lab import ROOT
from lab.bench import B, P, R, machine, markdown, measure, new_model, new_pair

import train
from nano_opd import arithmetic, rollout
from nano_opd.gpt import GPT, GPTConfig
from nano_opd.methods import METHODS
from nano_opd.rollout import Rollout, response_logprobs
from nano_opd.system import config
from nano_opd.system.batches import draw_batch
from nano_opd.system.console import Parser, accept_any_text, typed_path
from nano_opd.system.device import has_compiler, resolve
from nano_opd.system.fast_rollout import sampler
from nano_opd.tokenizer import EOS, PAD, encode

WITHIN = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # relative, of what is the same but for rounding


def row(what: str, difference: float, within: float) -> dict:
    """One comparison."""
    return {"check": what, "difference": difference, "within": within, "as it should be": str(difference <= within)}


def models(cfg: config.Config, dtype: torch.dtype) -> tuple[GPT, GPT]:
    """A student and a teacher with random weights on the CPU."""
    torch.manual_seed(0)
    student = model(cfg.gpt("student"), dtype)
    teacher = model(cfg.gpt("student" if cfg.reference_slot else "teacher"), dtype)
    return student, teacher.requires_grad_(False)


def model(size: GPTConfig, dtype: torch.dtype) -> GPT:
    """A model with random weights on the CPU."""
    made = new_model(size.n_layer, size.n_embd, size.block_size, torch.device("cpu"), size.vocab_size)
    made.precision = dtype
    return made


def answers(cfg: config.Config, device: torch.device) -> Rollout:
    """Worked solutions in the place of samples, the same on every device; every other one with a wrong last digit."""
    batch = draw_batch(cfg, 0, device)
    rows = []
    for n, problem in enumerate(batch.problems):
        text = arithmetic.solution(problem)
        if n % 2 == 0:
            wrong_digit = (int(text[-1]) + 1) % 10
            text = text[:-1] + str(wrong_digit)
        row = encode(text) + [EOS] + [PAD] * cfg.response_cap
        rows.append(row[: cfg.response_cap])
    responses = torch.tensor(rows, device=device)
    return Rollout(
        tokens=torch.cat([batch.prompts, responses], 1),
        prompt_length=batch.prompts.shape[1],
        mask=responses != PAD,
        logp=torch.zeros(responses.shape, device=device),
    )


def gradient(cfg: config.Config, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Of one update of train.py, on that device."""
    student, teacher = models(cfg, dtype)
    student.to(device)
    teacher.to(device)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)

    def sample(*_) -> Rollout:
        return answers(cfg, device)

    train.update(cfg, 0, student, teacher, optimizer, sample)
    return torch.cat([parameter.grad.flatten() for parameter in student.parameters()]).cpu().double()


def updates(device: torch.device, dtype: torch.dtype) -> Iterator[dict]:
    """Every method's gradient, against that of float32 on the CPU."""
    ways = [["--method", method] for method in METHODS]
    ways += [["--variance", variance] for variance in ("baseline", "topk", "full")]
    for way in ways:
        cfg = config.parse([*way, "--batch-size", "32"])
        want = gradient(cfg, torch.float32, torch.device("cpu"))
        got = gradient(cfg, dtype, device)
        difference = ((got - want).norm() / want.norm()).item()
        yield row(f"gradient, {' '.join(way)}, {dtype}", difference, WITHIN[dtype])


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[dict]:
    """What the fast sampler draws against the plain one on the same device, and its log-probs against a full forward.

    Twice with the same sampler and other weights: a graph that kept old ones would show.
    """
    cfg = config.parse(["--batch-size", "256"])
    student, _ = models(cfg, dtype)
    student.to(device)
    prompts = draw_batch(cfg, 0, device).prompts
    fast = sampler(device)
    for time in ("first", "second"):
        got = fast(student, prompts, cfg.response_cap, torch.Generator(device).manual_seed(1))
        want = rollout.sample(student, prompts, cfg.response_cap, torch.Generator(device).manual_seed(1))
        others = (got.tokens != want.tokens).any(1).float().mean().item()
        few = 0.02 if dtype == torch.float32 else 0.2
        yield row(f"responses that differ, {time} weights, {dtype}", others, few)
        with torch.no_grad():
            logp = response_logprobs(student, got.tokens, got.prompt_length)
            apart = (got.logp - logp)[got.mask].abs().mean().item()
            for parameter in student.parameters():
                parameter.mul_(0.7)
        yield row(f"log-probs of what was sampled (nats), {time} weights, {dtype}", apart, WITHIN[dtype] / 10)


def runs(device: torch.device, folder: str) -> Iterator[dict]:
    """Short runs of train.py: every method, then --compile and --dtype; each resumed once. An error fails a check."""
    short = f"--steps 4 --eval-every 2 --eval-size 20 --teacher-steps 3 --student-steps 3 --digits 2 --device {device}"
    ways = [f"--method {method} --batch-size 16" for method in METHODS]
    ways.append("--compile off --batch-size 24")
    if has_compiler(device):
        ways.append("--compile on --batch-size 24")
    ways += [f"--dtype {dtype} --batch-size 32" for dtype in ("float32", "bfloat16")]
    for way in ways:
        command = [*way.split(), *short.split(), "--out-dir", folder]
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                train.main(command)
                train.main([*command, "--resume", "--steps", "6"])
        except (SystemExit, Exception) as error:  # whatever it is, the report goes on
            yield row(f"train.py {way}: {type(error).__name__}: {error} {said.getvalue()[-500:]}", float("inf"), 0.0)
        else:
            yield row(f"train.py {way}", 0.0, 0.0)


def main(arguments: list[str] | None = None) -> None:
    """All checks, then the speed of each size; exit code 1 if a check fails."""
    accept_any_text()
    parser = Parser("check_gpu", description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<n>")
    parser.add_argument("--file", type=typed_path, default=ROOT / "check.json", help="what to write")
    args = parser.parse_args(arguments)
    try:
        device = resolve(args.device)
    except ValueError as error:
        parser.error(f"--device {error}")
    dtypes = [torch.float32]
    sizes = [(2, 64)]
    report = {"machine": machine(device, torch.float32), "checks": [], "speed": {}}
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of several
        dtypes = [torch.float32, torch.bfloat16]
        sizes = [(2, 64), (6, 384), (12, 768)]
        report["machine"] += f", CUDA {torch.version.cuda}, {torch.cuda.get_device_properties(device)}"
    print(report["machine"])

    def keep() -> None:
        args.file.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        checks = []
        for dtype in WITHIN:
            checks.append(("updates", updates(device, dtype)))
            checks.append(("samples", samples(device, dtype)))
        checks.append(("runs", runs(device, folder)))
        for name, rows in checks:
            try:
                report["checks"].extend(rows)
            except Exception as error:  # the report goes on
                report["checks"].append(row(f"{name}: {type(error).__name__}: {error}", float("inf"), 0.0))
            keep()
    print(markdown(report["checks"]))
    for layers, width in sizes:
        for dtype in dtypes:
            student, teacher = new_pair(layers, width, P + R, device)
            rows, _ = measure(student, teacher, B, dtype, seconds=5)
            report["speed"][f"{layers}×{width}, {dtype}"] = rows
            print(f"\n{dtype}\n\n{markdown(rows)}", flush=True)
            keep()
    failed = [checked["check"] for checked in report["checks"] if checked["as it should be"] != "True"]
    passed = len(report["checks"]) - len(failed)
    print(f"\n{passed} of {len(report['checks'])} checks passed; {args.file}: please send it")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
