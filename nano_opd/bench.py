"""How fast it is: `python -m nano_opd.bench` prints its tables in Markdown and keeps them in out/bench.json.

Each time stands beside its floor: the same matrix products alone, timed in the same minute. On a GPU the floor is
replayed as one CUDA graph, and is never below the time that reading weights, keys and values takes.
"""

import argparse
import csv
import importlib.util
import json
import platform
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nano_opd import plots, policy_gradient, sft
from nano_opd.config import Config
from nano_opd.device import keep_freed_memory, resolve
from nano_opd.gpt import GPT, GPTConfig
from nano_opd.losses import distillation_loss
from nano_opd.rollout import logprobs_of, response_logits, response_logprobs, sample
from nano_opd.timing import floor, observe, paired_ratio, phase_products, take_turns
from nano_opd.tokenizer import EOS

SIZES = [(2, 64), (4, 128), (6, 384), (12, 768)]  # layers × width
P, R = 8, 24  # prompt and response, tokens
VOCAB_SIZE = EOS  # the toy's alphabet without EOS and PAD: no response ends early, so that R tokens are R tokens
RESULTS = Path(__file__).parents[1] / "notebooks" / "results"


def sizes_of(layers: int, width: int, length: int = P + R, vocab_size: int = VOCAB_SIZE) -> GPTConfig:
    """The GPT of `layers` × `width`: four heads, or more of 64 channels each."""
    return GPTConfig(vocab_size, length, layers, max(4, width // 64), width)


def new_model(config: GPTConfig, device: torch.device) -> GPT:
    """Random weights, none of them zero as they are before training."""
    model = GPT(config).to(device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=config.n_embd**-0.5)
    return model


def phases(student: GPT, teacher: GPT, B: int, prompt: int, response: int, dtype: torch.dtype) -> dict[str, Callable]:
    """What is timed: the student's rollout, score and update, and the default method's whole step, with its teacher."""
    device, cfg, optimizer = student.device, Config(), sft.adamw(student, 0.0)  # lr 0: no update changes the next
    prompts = torch.randint(VOCAB_SIZE, (B, prompt), device=device)
    tokens = sample(student, prompts, response).tokens

    def optimize(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def update() -> None:
        logp = response_logprobs(student, tokens, prompt)
        optimize(policy_gradient.loss(logp, torch.ones_like(logp), torch.ones_like(logp, dtype=torch.bool)))

    rollout = lambda: sample(student, prompts, response)
    score = torch.no_grad()(lambda: response_logprobs(student, tokens, prompt))
    step = lambda: optimize(distillation_loss(cfg, student, teacher, rollout())[0])
    in_dtype = lambda run: torch.autocast(device.type, dtype, enabled=dtype != torch.float32)(run)
    return {k: in_dtype(run) for k, run in {"rollout": rollout, "score": score, "update": update, "step": step}.items()}


def pair(layers: int, width: int, device: torch.device, length: int = P + R) -> tuple[GPT, GPT]:
    """A student and its teacher: 3×96 for the default student of 2×64, else of the same size."""
    student = new_model(sizes_of(layers, width, length), device)
    teacher = new_model(sizes_of(*((3, 96) if (layers, width) == (2, 64) else (layers, width)), length), device)
    return student, teacher.requires_grad_(False)


def speed(sizes: list, batches: list, device: torch.device, dtype: torch.dtype, seconds: float = 8) -> list[dict]:
    """One row for each size, batch and phase. Tokens are response tokens."""
    rows, bandwidth = [], np.inf
    if device.type == "cuda":
        a, b = torch.empty(2, 2**28, device=device)
        bandwidth = 2 * a.nbytes / np.median(take_turns({"copy": lambda: a.copy_(b)}, device, 1)["copy"])  # bytes/s
        del a, b
    for layers, width in sizes:
        for B in batches:
            student, teacher = pair(layers, width, device)
            work, passes = phases(student, teacher, B, P, R, dtype), phase_products(student.config, B, P, R)
            passes["step"] = passes["rollout"] + phase_products(teacher.config, B, P, R)["score"] + passes["update"]
            floors = {f"{name} floor": floor(products, device, dtype) for name, products in passes.items()}
            times = take_turns(work | floors, device, seconds)
            for name, run in work.items():
                read = sum(b * k * n for products in passes[name] for b, m, k, n in products) * dtype.itemsize
                lowest = np.maximum(times[f"{name} floor"], read / bandwidth)
                calls, peak = observe(run, device)
                rows.append(
                    {
                        "size": f"{layers}×{width}",
                        "B": B,
                        "phase": name,
                        "tokens/s": round(B * R / np.median(times[name])),
                        "ms": 1e3 * np.median(times[name]),
                        "floor ms": 1e3 * np.median(lowest),
                        "time / floor": paired_ratio(times[name], lowest),
                        "calls": calls,
                        "calls per token": calls / R if name == "rollout" else None,
                        "peak MB": peak,
                    }
                )
            del student, teacher, work, floors
    return rows


def vocabulary(device: torch.device, dtype: torch.dtype, B: int = 8, T: int = 256, V: int = 50257) -> list[dict]:
    """Log-probs of sampled tokens at GPT-2's vocabulary: `response_logprobs` and the whole (B, T, V) in float32."""
    model = new_model(sizes_of(2, 256, T, V), device)
    tokens = torch.randint(V, (B, T), device=device)
    ways = {
        "response_logprobs": lambda: response_logprobs(model, tokens, P),
        "the whole (B, T, V)": lambda: logprobs_of(tokens[:, P:], response_logits(model, tokens, P).float()),
    }
    rows = []
    for phase in ("forward", "forward + backward"):
        run_of = torch.no_grad() if phase == "forward" else lambda way: lambda: way().sum().backward()
        runs = {
            name: run_of(torch.autocast(device.type, dtype, dtype != torch.float32)(way)) for name, way in ways.items()
        }
        times = take_turns(runs, device, 0, turns=5)
        for name, run in runs.items():
            model.zero_grad()
            row = {
                "log-probs": name,
                "phase": phase,
                "ms": 1e3 * np.median(times[name]),
                "peak MB": observe(run, device)[1],
            }
            rows.append(row | {"time / whole": paired_ratio(times[name], times["the whole (B, T, V)"])})
    return rows


def peers(sizes: list, B: int, device: torch.device, dtype: torch.dtype) -> list[dict]:
    """Our rollout against generation without a cache, and against `generate` of Hugging Face for a GPT-2 of our size."""
    from transformers import GPT2Config, GPT2LMHeadModel

    rows = []
    for layers, width in sizes:
        model = new_model(config := sizes_of(layers, width), device)
        prompts = torch.randint(VOCAB_SIZE, (B, P), device=device)
        shape = {"n_layer": layers, "n_head": config.n_head, "n_embd": width, "n_positions": P + R}
        none = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": None, "eos_token_id": None}
        peer = GPT2LMHeadModel(GPT2Config(VOCAB_SIZE, **shape, **none)).to(device).eval()
        knobs = {"do_sample": True, "top_k": 0, "min_new_tokens": R, "max_new_tokens": R, "pad_token_id": 0}
        hugging_face = lambda: peer.generate(prompts, attention_mask=torch.ones_like(prompts), **knobs)

        @torch.no_grad()
        def without_cache() -> torch.Tensor:
            tokens = prompts
            for _ in range(R):
                probs = model(tokens, logits_from=tokens.shape[1] - 1)[:, -1].softmax(-1)
                tokens = torch.cat([tokens, probs.multinomial(1)], dim=1)
            return tokens

        runs = {
            "ours": lambda: sample(model, prompts, R).tokens,
            "no cache": without_cache,
            "Hugging Face": hugging_face,
        }
        assert {tuple(run().shape) for run in runs.values()} == {(B, P + R)}
        runs = {name: torch.autocast(device.type, dtype, dtype != torch.float32)(run) for name, run in runs.items()}
        times = take_turns(runs, device, 10)
        for name in runs:
            rate = {"tokens/s": round(B * R / np.median(times[name]))}
            faster = {"ours / peer, tokens/s": None if name == "ours" else paired_ratio(times[name], times["ours"])}
            rows.append({"size": f"{layers}×{width}", "B": B, "generation": name} | rate | faster)
    return rows


def precision(widths: list, B: int, device: torch.device) -> list[dict]:
    """float32 against bfloat16 weights and against autocast: one product (B·31, C) @ (C, 4C), and an update of 2 layers."""
    rows = []
    for width in widths:
        x, w = torch.randn(B * (P + R - 1), width, device=device), torch.randn(width, 4 * width, device=device)
        autocast = torch.autocast(device.type, torch.bfloat16)
        x_half, w_half = x.bfloat16(), w.bfloat16()
        runs = {"product": (lambda: x @ w, lambda: x_half @ w_half, autocast(lambda: x @ w))}
        models = [new_model(sizes_of(2, width), device) for _ in range(3)]
        models[1].bfloat16()
        dtypes = torch.float32, torch.float32, torch.bfloat16
        runs["update"] = [phases(m, m, B, P, R, dtype)["update"] for m, dtype in zip(models, dtypes)]
        for name, three in runs.items():
            times = take_turns(dict(zip(("float32", "weights", "autocast"), three)), device, 3)
            with torch.profiler.profile() as profile:
                three[2]()
            total = sum(e.self_cpu_time_total for e in profile.key_averages())
            casts = [e for e in profile.key_averages() if e.key == "aten::_to_copy"]
            rows.append(
                {"width": width, "what": name, "float32 ms": 1e3 * np.median(times["float32"])}
                | {f"bfloat16 {k} / float32": paired_ratio(times[k], times["float32"]) for k in ("weights", "autocast")}
                | {"casts": sum(e.count for e in casts)}
                | {"share of autocast": sum(e.cpu_time_total for e in casts) / total}
            )
    return rows


def scaling(
    lengths: list, batches: list, B: int, device: torch.device, dtype: torch.dtype, seconds: float
) -> list[dict]:
    """Seconds of a step, of its rollout and of the rollout's floor, against response length and against batch size."""
    rows = []
    for axis, values in {"response tokens": lengths, "batch": batches}.items():
        for value in values:
            rollouts, length = (B, value) if axis == "response tokens" else (value, R)
            student, teacher = pair(2, 64, device, P + length)
            work = phases(student, teacher, rollouts, P, length, dtype)
            products = phase_products(student.config, rollouts, P, length)["rollout"]
            runs = {"step": work["step"], "rollout": work["rollout"], "products": floor(products, device, dtype)}
            for name, times in take_turns(runs, device, seconds, turns=3).items():
                low, median, high = np.percentile(times, (25, 50, 75))
                rows.append({"axis": axis, "value": value, "series": name, "s": median, "s_low": low, "s_high": high})
    return rows


def exponent(x: np.ndarray, y: np.ndarray) -> float:
    """The a of y ∝ x^a, by least squares on logarithms over the upper half of x."""
    half = len(x) // 2
    return float(np.polyfit(np.log(x[half:]), np.log(y[half:]), 1)[0])


def scaling_figure(rows: list[dict]) -> plots.Figure:
    """Seconds against length and batch with their exponents, and milliseconds of one more token at each position."""
    panels = {}
    for axis in ("response tokens", "batch"):
        series = {}
        for name in ("step", "rollout", "products"):
            points = [(row["value"], row["s"]) for row in rows if row["axis"] == axis and row["series"] == name]
            series[name] = tuple(np.array(points).T)
        panels[f"s against {axis}, exponent {exponent(*series['step']):.2f}"] = series
    by_length = next(iter(panels.values()))
    middle = lambda x: np.sqrt(x[1:] * x[:-1])
    panels["ms for one more token at a position"] = {
        name: (middle(x), 1e3 * np.diff(y) / np.diff(x)) for name, (x, y) in by_length.items()
    }
    return plots.curves(panels, "", "", xscale="log", yscale="log")


def markdown(rows: list[dict]) -> str:
    """A table of Markdown: three digits, quartiles in brackets."""

    def cell(value) -> str:
        if isinstance(value, list):
            return "{} [{}, {}]".format(*map(cell, value))
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return f"{value:,}" if isinstance(value, int) and value > 9999 else "" if value is None else str(value)

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(v) for v in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(device: torch.device, dtype: torch.dtype) -> str:
    """Where the numbers come from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        found = re.search("model name\\s*: (.*)", info.read_text()) if info.exists() else None
        name = f"{found[1] if found else platform.processor()}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"bench: {message}\n")  # the one sentence, without the page of usage


def main(arguments: list[str] | None = None) -> None:
    """Measure what was asked for; without a question, speed and the large vocabulary."""
    parser = _Parser(prog="bench", description=__doc__.splitlines()[0], allow_abbrev=False)
    for name in (questions := ("peers", "precision", "scaling")):
        parser.add_argument(f"--{name}", action="store_true", help=globals()[name].__doc__)
    parser.add_argument("--large", action="store_true", help="6×384 on a CPU too")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<n>")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="bfloat16 is by autocast")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--json", type=Path, default=Path("out/bench.json"), help="its other tables are kept")
    args = parser.parse_args(arguments)
    if args.peers and importlib.util.find_spec("transformers") is None:
        parser.error("--peers needs Hugging Face's transformers, which is not installed here")
    if args.threads < 1:
        parser.error(f"--threads {args.threads}: must be 1 or more")
    try:
        device, dtype = resolve(args.device), getattr(torch, args.dtype)
        tables = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(
            f"--device {error}" if "choose from" in str(error) or "machine" in str(error) else f"--json {error}"
        )
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    gpu = device.type == "cuda"
    sizes, batches = SIZES[: 4 if gpu else 2 + args.large], [128, 512, 1024, 4096] if gpu else [128]
    measure = {
        "speed": lambda: speed(sizes, batches, device, dtype),
        "vocabulary": lambda: vocabulary(device, dtype),
        "peers": lambda: peers(sizes, 128, device, dtype),
        "precision": lambda: precision([64, 128, 256, 384, 768], 128, device),
        "scaling": lambda: scaling([2**i for i in range(4, 10)], [2**i for i in range(4, 11)], 32, device, dtype, 3),
    }
    for name in [q for q in questions if getattr(args, q)] or ["speed", "vocabulary"]:
        rows = measure[name]()
        tables[name] = {"machine": machine(device, dtype), "rows": rows}
        print(f"\n{name}: {tables[name]['machine']}\n\n{markdown(rows)}", flush=True)
        args.json.write_text(json.dumps(tables, indent=1, ensure_ascii=False) + "\n")
        if name == "scaling":
            with open(RESULTS / "scaling.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
            scaling_figure(rows).savefig(RESULTS / "scaling.png", dpi=120)


if __name__ == "__main__":
    main()
