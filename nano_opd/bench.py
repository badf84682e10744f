"""How fast it is: `python -m nano_opd.bench` prints its tables in Markdown and keeps them in out/bench.json.

Each time stands beside its floor: the same matrix products alone, timed in the same minute. On a GPU the floor is
replayed as one CUDA graph, and is never below the time that reading weights, keys and values takes.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from nano_opd import plots, timing
from nano_opd.device import has_compiler, keep_freed_memory, resolve
from nano_opd.gpt import logprobs_of
from nano_opd.rollout import response_logits, response_logprobs, sample

SIZES = [(2, 64), (4, 128), (6, 384), (12, 768)]  # layers × width
P, R = 8, 24  # prompt and response, tokens
RESULTS = Path(__file__).parents[1] / "notebooks" / "results"


def speed(
    layers: int, width: int, B: int, device: torch.device, dtype: torch.dtype, copy_rate: float, seconds: float = 8
) -> list[dict]:
    """One row for each phase and --compile. Tokens are response tokens; memory is beyond weights and optimizer."""
    torch.compiler.reset()  # or sizes that are seen to change would become variables of slower kernels
    student, teacher = timing.new_pair(layers, width, P + R, device)
    passes = timing.phase_products(student, teacher, B, P, R)
    runs = {(name, "floor"): timing.floor(products, device, dtype) for name, products in passes.items()}
    for way in ("off", "on") if has_compiler(device) else ("off",):
        work = timing.phases(student, teacher, B, P, R, dtype, way)
        runs |= {(name, way): run for name, run in work.items()}
    times, rows = timing.take_turns(runs, device, seconds), []
    for (name, way), run in runs.items():
        if way == "floor":
            continue
        to_read = sum(b * k * n for products in passes[name] for b, m, k, n in products) * dtype.itemsize
        taken, lowest = times[name, way], np.maximum(times[name, "floor"], to_read / copy_rate)
        calls, peak = timing.observe(run, device)
        row = {"size": f"{layers}×{width}", "B": B, "phase": name, "compile": way}
        row |= {"tokens/s": round(B * R / np.median(taken)), "ms": 1e3 * np.median(taken)}
        row |= {"floor, ms": 1e3 * np.median(lowest), "time / floor": timing.paired_ratio(taken, lowest)}
        row |= {"calls": calls, "calls per token": calls / R if name == "rollout" else None}
        rows.append(row | {"peak, MB": peak})
    return rows


def vocabulary(device: torch.device, dtype: torch.dtype, B: int = 8, T: int = 256, V: int = 50257) -> list[dict]:
    """Log-probs of sampled tokens at GPT-2's vocabulary: `response_logprobs`, and with all of (B, T, V) in float32."""
    model, whole = timing.new_model(2, 256, T, device, V), "the whole (B, T, V)"
    model.precision = dtype
    tokens, rows = torch.randint(V, (B, T), device=device), []
    ways = {
        "response_logprobs": lambda: response_logprobs(model, tokens, P),
        whole: lambda: logprobs_of(tokens[:, P:], response_logits(model, tokens, P).float()),
    }
    backward = lambda way: lambda: way().sum().backward()
    for phase, run_of in {"forward": torch.no_grad(), "forward + backward": backward}.items():
        runs = {name: run_of(way) for name, way in ways.items()}
        times = timing.take_turns(runs, device, 0, turns=4)
        for name, run in runs.items():
            model.zero_grad()
            ratio = {"time / whole": timing.paired_ratio(times[name], times[whole]) if name != whole else None}
            row = {"log-probs": name, "phase": phase, "ms": 1e3 * np.median(times[name])}
            rows.append(row | ratio | {"peak, MB": timing.observe(run, device)[1]})
    return rows


def generators(
    layers: int, width: int, B: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], Tensor]]:
    """Ways to continue B prompts by R tokens: ours; ours without its cache; `generate` for a GPT-2 of the same size."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.compiler.reset()
    model = timing.new_model(layers, width, P + R, device)
    model.precision = dtype
    prompts = torch.randint(timing.VOCAB_SIZE, (B, P), device=device)
    shape = {"vocab_size": timing.VOCAB_SIZE, "n_positions": P + R, "n_layer": layers, "n_embd": width}
    gpt2 = (
        GPT2LMHeadModel(GPT2Config(**shape, n_head=model.config.n_head, bos_token_id=None, eos_token_id=None))
        .to(device, dtype)
        .eval()
    )
    knobs = {"do_sample": True, "top_k": 0, "min_new_tokens": R, "max_new_tokens": R, "pad_token_id": 0}

    @torch.no_grad()
    def without_cache() -> Tensor:
        tokens = prompts
        for _ in range(R):
            probs = model(tokens, logits_from=tokens.shape[1] - 1)[:, -1].softmax(-1)
            tokens = torch.cat([tokens, probs.multinomial(1)], dim=1)
        return tokens

    ours = {"sample": lambda: sample(model, prompts, R).tokens}
    if device.type == "cpu" and has_compiler(device):
        ours["sample, compiled"] = lambda: sample(model, prompts, R, compiled=True).tokens
    return ours | {
        "the same without a cache": without_cache,
        "Hugging Face generate": lambda: gpt2.generate(prompts, attention_mask=torch.ones_like(prompts), **knobs),
    }


def peers(layers: int, width: int, B: int, device: torch.device, dtype: torch.dtype, seconds: float = 8) -> list[dict]:
    """One row for each way to generate; the ratio is of tokens per second, ours over theirs."""
    times, rows = timing.take_turns(generators(layers, width, B, device, dtype), device, seconds), []
    ours = [name for name in times if name.startswith("sample")]
    for name, taken in times.items():
        row = {"size": f"{layers}×{width}", "B": B, "generation": name, "tokens/s": round(B * R / np.median(taken))}
        for mine in ours:
            row[f"{mine} / this"] = timing.paired_ratio(taken, times[mine]) if name not in ours else None
        rows.append(row)
    return rows


def precision(width: int, B: int, device: torch.device, seconds: float = 3) -> list[dict]:
    """bfloat16 weights and autocast against float32: one product (B·31, C) @ (C, 4C), and an update of two layers."""
    x, w = torch.randn(B * (P + R - 1), width, device=device), torch.randn(width, 4 * width, device=device)
    x_half, w_half = x.bfloat16(), w.bfloat16()
    models = [timing.new_model(2, width, P + R, device) for _ in range(3)]
    models[1].bfloat16()
    dtypes = [torch.float32, torch.float32, torch.bfloat16]
    ways = {
        "product": [lambda: x @ w, lambda: x_half @ w_half, torch.autocast(device.type, dtypes[2])(lambda: x @ w)],
        "update": [timing.phases(model, model, B, P, R, dtype)["update"] for model, dtype in zip(models, dtypes)],
    }
    rows = []
    for name, (float32, weights, autocast) in ways.items():
        times = timing.take_turns({"float32": float32, "weights": weights, "autocast": autocast}, device, seconds)
        row = {"width": width, "what": name, "float32, ms": 1e3 * np.median(times["float32"])}
        for kind in ("weights", "autocast"):
            row[f"{kind} / float32"] = timing.paired_ratio(times[kind], times["float32"])
        with torch.profiler.profile() as profile:
            autocast()
        operators = profile.key_averages()
        total = sum(e.self_cpu_time_total for e in operators)
        casts = [e for e in operators if e.key == "aten::_to_copy"]
        rows.append(row | {"of autocast: casts": sum(e.cpu_time_total for e in casts) / total})
    return rows


def scaling(axis: str, values: list[int], device: torch.device, dtype: torch.dtype, turns: int = 5) -> list[dict]:
    """Seconds of a step of the default models, of its rollout and of the rollout's products, by "length" or "batch"."""
    runs = {}
    for value in values:
        B, response = (32, value) if axis == "length" else (value, R)
        student, teacher = timing.new_pair(2, 64, P + response, device)
        products = timing.phase_products(student, teacher, B, P, response)["rollout"]
        work = timing.phases(student, teacher, B, P, response, dtype)
        runs |= {("step", value): work["step"], ("rollout", value): work["rollout"]}
        runs["products of the rollout", value] = timing.floor(products, device, dtype)
    rows = []
    for (name, value), times in timing.take_turns(runs, device, 0, turns).items():
        low, median, high = np.percentile(times, (25, 50, 75))
        rows.append({"axis": axis, "tokens or rows": value, "what": name, "s": median, "s low": low, "s high": high})
    return rows


def exponent(x: np.ndarray, y: np.ndarray) -> float:
    """The a of y ∝ x^a, by least squares on logarithms over the upper half of x."""
    half = len(x) // 2
    return float(np.polyfit(np.log(x[half:]), np.log(y[half:]), 1)[0])


def scaling_figure(rows: list[dict]) -> Figure:
    """Seconds against length and batch with the exponent of a step; ms that each further token takes."""
    measured, panels = {}, {}
    for row in rows:
        measured.setdefault(row["axis"], {}).setdefault(row["what"], []).append((row["tokens or rows"], row["s"]))
    for axis, series in measured.items():
        series = {name: np.array(points).T for name, points in series.items()}
        panels[f"s by {axis}: a step ∝ x^{exponent(*series['step']):.2f}"] = series
        if axis == "length":  # between two lengths, drawn at their geometric mean
            panels["ms per further token, by position"] = {
                name: (np.sqrt(x[1:] * x[:-1]), 1e3 * np.diff(s) / np.diff(x)) for name, (x, s) in series.items()
            }
    figure = plots.curves(panels, "", "", xscale="log", yscale="log")
    for ax in figure.axes:
        ax.set_xscale("log", base=2)
    return figure


def markdown(rows: list[dict]) -> str:
    """A table of Markdown: three digits, quartiles in brackets."""

    def cell(value) -> str:
        if isinstance(value, list):
            return "{} [{}, {}]".format(*map(cell, value))
        if isinstance(value, float) and abs(value) < 100:
            return f"{value:.3g}"
        return f"{value:,.0f}" if isinstance(value, (int, float)) else value or ""

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(v) for v in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, torch.device, dict]:
    """What to measure, where, and the tables there are. Bad input ends the program: one sentence, exit code 2."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"bench: {message}\n")  # without the page of usage
    parser.add_argument("--peers", action="store_true", help="sampling beside other people's")
    parser.add_argument("--precision", action="store_true", help="from which width on bfloat16 is faster")
    parser.add_argument("--scaling", action="store_true", help="cost against response length and batch; a figure")
    parser.add_argument("--large", action="store_true", help="6×384 and 12×768 on a CPU too")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="bfloat16 by autocast")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--json", type=Path, default=Path("out/bench.json"), help="tables not measured now are kept")
    args = parser.parse_args(arguments)
    if args.peers and importlib.util.find_spec("transformers") is None:
        parser.error("--peers: Hugging Face's transformers is not installed here")
    if args.threads < 1:
        parser.error(f"--threads {args.threads}: must be 1 or more")
    try:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        return args, resolve(args.device), json.loads(args.json.read_text()) if args.json.exists() else {}
    except (OSError, ValueError) as error:
        parser.error(f"--device {args.device}, --json {args.json}: {error}")


def main(arguments: list[str] | None = None) -> None:
    """Measure what was asked for; unasked, speed and the large vocabulary."""
    args, device, kept = parse(arguments)
    dtype, gpu = getattr(torch, args.dtype), device.type == "cuda"
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    sizes = SIZES if gpu or args.large else SIZES[:2]
    speeds = [(*size, B) for size in sizes for B in ((128, 512, 1024, 4096) if gpu else (128,))]
    axes = {"length": [2**n for n in range(4, 10)], "batch": [2**n for n in range(4, 11)]}
    copy_rate = timing.bandwidth(device) if gpu else np.inf
    tables = {
        "speed": [lambda s=s: speed(*s, device, dtype, copy_rate) for s in speeds],
        "vocabulary": [lambda: vocabulary(device, dtype)],
        "peers": [lambda s=s: peers(*s, 128, device, dtype) for s in sizes],
        "precision": [lambda w=w: precision(w, 128, device) for w in (64, 128, 256, 384, 768)],
        "scaling": [lambda a=a: scaling(*a, device, dtype) for a in axes.items()],
    }
    for name in [n for n in ("peers", "precision", "scaling") if getattr(args, n)] or ["speed", "vocabulary"]:
        rows = []
        for measure in tables[name]:
            try:
                rows += measure()
            except torch.OutOfMemoryError as error:
                print(f"left out: {str(error).splitlines()[0]}", file=sys.stderr)
        kept[name] = {"machine": timing.machine(device, dtype), "rows": rows}
        print(f"\n{name}: {kept[name]['machine']}\n\n{markdown(rows)}", flush=True)
        args.json.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        if name == "scaling":
            rounded = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
            (RESULTS / "scaling.csv").write_text("\n".join(map(",".join, [rows[0], *rounded])) + "\n")
            scaling_figure(rows).savefig(RESULTS / "scaling.png", dpi=120)


if __name__ == "__main__":
    main()
