"""What a time is compared with, and how: the matrix products of a phase alone, and candidates that take turns.

A floor runs every product of a phase with its output preallocated and nothing in between, at the rate that this machine
reaches, so time / floor says what everything else costs: launches, normalisation, softmax, drawing, the optimizer.

What is compared is timed in turns (A, B, floor, floor, B, A, …): a moment in which the machine is busy falls on all. A
ratio is the median over the turns of the ratio within a turn, with its quartiles.
"""

import time
from collections.abc import Callable

import numpy as np
import torch

from nano_opd.gpt import GPTConfig

Product = tuple[int, int, int, int]  # (batch, m, k, n): so many products (m, k) @ (k, n)


def forward_products(c: GPTConfig, B: int, T: int, S: int, logits: int) -> list[Product]:
    """Every product of one forward: T tokens per row that attend to S positions, logits of the last `logits`."""
    C, H = c.n_embd, c.n_head
    D = C // H
    attention = [(1, B * T, C, 3 * C), (B * H, T, D, S), (B * H, T, S, D), (1, B * T, C, C)]
    mlp = [(1, B * T, C, 4 * C), (1, B * T, 4 * C, C)]
    return c.n_layer * (attention + mlp) + [(1, B * logits, C, c.vocab_size)]


def phase_products(c: GPTConfig, B: int, prompt: int, response: int) -> dict[str, list[list[Product]]]:
    """The forwards of "rollout", "score" and "update", each a list of products; an update counts as one forward."""
    score = forward_products(c, B, prompt + response - 1, prompt + response - 1, response)
    backward = [grad for b, m, k, n in score for grad in ((b, m, n, k), (b, k, m, n))]  # dY Wᵀ and Xᵀ dY
    decode = [forward_products(c, B, 1, S, 1) for S in range(prompt + 1, prompt + response)]
    return {
        "rollout": [forward_products(c, B, prompt, prompt, 1), *decode],
        "score": [score],
        "update": [score + backward],
    }


def floor(passes: list[list[Product]], device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """A function that runs the products and nothing else; every weight, key and value has a memory of its own."""
    new = lambda size: torch.randn(size, device=device, dtype=dtype)
    a = new(max(b * m * k for products in passes for b, m, k, n in products))
    out = new(max(b * m * n for products in passes for b, m, k, n in products))
    nth = [[p[i] for p in passes if i < len(p)] for i in range(max(map(len, passes)))]
    weights = [new(max(b * k * n for b, m, k, n in products)) for products in nth]
    calls = []
    for products in passes:
        for (b, m, k, n), weight in zip(products, weights):
            x, w, y = a[: b * m * k].view(b, m, k), weight[: b * k * n].view(b, n, k), out[: b * m * n].view(b, m, n)
            calls.append((torch.mm, x[0], w[0].T, y[0]) if b == 1 else (torch.bmm, x, w.transpose(1, 2), y))

    def run() -> None:
        for product, x, w, y in calls:
            product(x, w, out=y)

    if device.type != "cuda":
        return torch.no_grad()(run)
    run()
    graph = torch.cuda.CUDAGraph()  # one launch for all, or the floor of a small model would be that of its launches
    with torch.no_grad(), torch.cuda.graph(graph):
        run()
    return graph.replay


def sync(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def take_turns(
    candidates: dict[str, Callable], device: torch.device, seconds: float, turns: int = 5
) -> dict[str, np.ndarray]:
    """Seconds of each candidate in each turn: as many turns as fit into `seconds`, but at least `turns`."""
    for run in candidates.values():
        run()
    times = {name: [] for name in candidates}
    names, end, turn = list(candidates), time.monotonic() + seconds, 0
    while turn < turns or time.monotonic() < end:
        for name in names[:: -1 if turn % 2 else 1]:  # A B B A: no one always comes after the same neighbour
            sync(device)
            start = time.perf_counter()
            candidates[name]()
            sync(device)
            times[name].append(time.perf_counter() - start)
        turn += 1
    return {name: np.array(values) for name, values in times.items()}


def paired_ratio(a: np.ndarray, b: np.ndarray) -> list[float]:
    """[median, lower quartile, upper quartile] of a/b, turn by turn."""
    return [float(q) for q in np.percentile(np.asarray(a) / np.asarray(b), (50, 25, 75))]


def observe(run: Callable, device: torch.device) -> tuple[int, float]:
    """Operator calls (on a GPU: kernels) of one run, and its peak MB of tensors on top of what there was before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with torch.profiler.profile(profile_memory=device.type == "cpu") as profile:
        run()
        sync(device)
    if device.type == "cuda":
        kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return len(kernels), (torch.cuda.max_memory_allocated() - before) / 1e6
    is_operator = lambda event: event is not None and event.name.startswith("aten::")
    calls = sum(is_operator(e) and not is_operator(e.cpu_parent) for e in profile.events())  # not those within others
    memory = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = np.cumsum([e.nbytes() for e in sorted(memory, key=lambda e: e.start_ns())])
    return calls, float(live.max()) / 1e6
