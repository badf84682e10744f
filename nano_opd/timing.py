"""What is timed and what it is compared with: the phases of a step, and the matrix products of each phase alone.

A floor runs every product of a phase with its output preallocated and nothing in between, at the rate that this machine
reaches, so time / floor says what everything else costs: launches, normalisation, softmax, drawing, the optimizer.

What is compared takes turns (A, B, floor, floor, B, A, …): a moment in which the machine is busy falls on all. A ratio
is the median over the turns of the ratio within a turn, with its quartiles.
"""

import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nano_opd import policy_gradient, sft
from nano_opd.config import Config
from nano_opd.device import compiled, compiles
from nano_opd.gpt import GPT, GPTConfig
from nano_opd.losses import distillation_loss
from nano_opd.rollout import response_logprobs, sample
from nano_opd.tokenizer import EOS

VOCAB_SIZE = EOS  # the toy's alphabet without EOS and PAD: no response ends early, so 24 tokens are 24 tokens
Product = tuple[int, int, int, int]  # (batch, m, k, n): so many products (m, k) @ (k, n)


def new_model(layers: int, width: int, length: int, device: torch.device, vocab_size: int = VOCAB_SIZE) -> GPT:
    """Four heads, or more of 64 channels each. Random weights, none of them zero as some are before training."""
    model = GPT(GPTConfig(vocab_size, length, layers, max(4, width // 64), width)).to(device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=width**-0.5)
    return model


def new_pair(layers: int, width: int, length: int, device: torch.device) -> tuple[GPT, GPT]:
    """A student and its teacher: 3×96 for the default student of 2×64, else of the same size."""
    of_teacher = (3, 96) if (layers, width) == (2, 64) else (layers, width)
    return new_model(layers, width, length, device), new_model(*of_teacher, length, device).requires_grad_(False)


def phases(
    student: GPT,
    teacher: GPT,
    B: int,
    prompt: int,
    response: int,
    dtype: torch.dtype = torch.float32,
    compile: str = "auto",
) -> dict[str, Callable]:
    """The student's rollout, score and update, and the whole step of the default method, its teacher included.

    As train.py runs them: products in `dtype`, and with `compile` "auto", "on" or "off".
    """
    student.precision = teacher.precision = dtype
    scorer, judge = compiled(compile, student), compiled(compile, teacher)
    device, cfg, optimizer = student.device, Config(), sft.adamw(student, 0.0)  # lr 0: no update changes the next
    prompts = torch.randint(VOCAB_SIZE, (B, prompt), device=device)
    tokens = sample(student, prompts, response).tokens
    everywhere = torch.ones(B, response, device=device)

    def optimize(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    rollout = lambda: sample(student, prompts, response, compiled=compiles(compile, device))
    score = lambda: response_logprobs(scorer, tokens, prompt)
    update = lambda: optimize(policy_gradient.loss(score(), everywhere, everywhere.bool()))
    step = lambda: optimize(distillation_loss(cfg, scorer, judge, rollout())[0])
    return {"rollout": rollout, "score": torch.no_grad()(score), "update": update, "step": step}


def forward_products(c: GPTConfig, B: int, T: int, S: int, logits: int) -> list[Product]:
    """Every product of one forward: T tokens per row that attend to S positions, logits of the last `logits`."""
    C, H = c.n_embd, c.n_head
    D = C // H
    attention = [(1, B * T, C, 3 * C), (B * H, T, D, S), (B * H, T, S, D), (1, B * T, C, C)]
    mlp = [(1, B * T, C, 4 * C), (1, B * T, 4 * C, C)]
    return c.n_layer * (attention + mlp) + [(1, B * logits, C, c.vocab_size)]


def phase_products(student: GPT, teacher: GPT, B: int, prompt: int, response: int) -> dict[str, list[list[Product]]]:
    """The products of each phase, forward by forward; a backward belongs to its forward."""
    T, c = prompt + response - 1, student.config
    score = forward_products(c, B, T, T, response)
    backward = [grad for b, m, k, n in score for grad in ((b, m, n, k), (b, k, m, n))]  # dY Wᵀ and Xᵀ dY
    decode = [forward_products(c, B, 1, S, 1) for S in range(prompt, prompt + response)]
    rollout = [forward_products(c, B, prompt - 1, prompt - 1, 0)[:-1], *decode]
    step = [*rollout, forward_products(teacher.config, B, T, T, response), score + backward]
    return {"rollout": rollout, "score": [score], "update": [score + backward], "step": step}


def floor(passes: list[list[Product]], device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """A function that runs the products and nothing else; a forward has its weights, keys and values side by side."""
    new = lambda size: torch.randn(size, device=device, dtype=dtype)
    products = [product for forward in passes for product in forward]
    x, y = (new(max(b * m * size for b, m, *sizes in products for size in sizes)) for _ in range(2))
    largest = max(b * k * n for b, m, k, n in products)
    pool = new(max(largest, min(2**28, sum(b * k * n for b, m, k, n in max(passes, key=len)))))  # 1 GiB is no cache
    calls = []
    for forward in passes:
        start = 0
        for b, m, k, n in forward:
            start = start if start + b * k * n <= len(pool) else 0
            w = pool[start : start + b * k * n].view(b, n, k).mT
            start += b * k * n
            operands = x[: b * m * k].view(b, m, k), w, y[: b * m * n].view(b, m, n)
            calls.append((torch.bmm, *operands) if b > 1 else (torch.mm, *(operand[0] for operand in operands)))

    @torch.no_grad()
    def run() -> None:
        for product, a, b, out in calls:
            product(a, b, out=out)

    if device.type != "cuda":
        return run
    run()
    graph = torch.cuda.CUDAGraph()  # one launch for all, or the floor of a small model would be that of its launches
    with torch.cuda.graph(graph):
        run()
    return lambda kept=calls: graph.replay()  # a graph holds addresses, not tensors


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy of 1 GiB reads and writes."""
    a, b = torch.empty(2, 2**28, device=device)
    return 2 * a.nbytes / np.median(take_turns({"copy": lambda: a.copy_(b)}, device, 1)["copy"])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    candidates: dict[str, Callable], device: torch.device, seconds: float, turns: int = 5
) -> dict[str, np.ndarray]:
    """Seconds of each candidate in each turn: as many turns as fit into `seconds`, but at least `turns`."""
    for run in candidates.values():
        run()
    times = {name: [] for name in candidates}
    order, end, turn = list(candidates), time.monotonic() + seconds, 0
    while turn < turns or time.monotonic() < end:
        for name in order:
            _wait(device)
            start = time.perf_counter()
            candidates[name]()
            _wait(device)
            times[name].append(time.perf_counter() - start)
        order.reverse()  # so that none always comes after the same neighbour
        turn += 1
    return {name: np.array(values) for name, values in times.items()}


def paired_ratio(a: np.ndarray, b: np.ndarray) -> list[float]:
    """[median, lower quartile, upper quartile] of a/b, turn by turn."""
    return [float(q) for q in np.percentile(np.asarray(a) / np.asarray(b), (50, 25, 75))]


def observe(run: Callable, device: torch.device) -> tuple[int, float]:
    """Operator calls (on a GPU: kernels) of one run, and its peak MB of tensors on top of what there was before."""
    if gpu := device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with torch.profiler.profile(profile_memory=not gpu) as profile:
        run()
        _wait(device)
    if gpu:
        kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
        return kernels, (torch.cuda.max_memory_allocated(device) - before) / 1e6
    is_operator = lambda event: event is not None and event.name.startswith("aten::")
    calls = sum(is_operator(e) and not is_operator(e.cpu_parent) for e in profile.events())  # not those within others
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # +allocated, −freed
    live = np.cumsum([e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())])
    return calls, float(live.max()) / 1e6


def processor() -> str:
    """The CPU's name as Linux gives it; elsewhere, as Python does."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return found[1] if found else platform.processor() or platform.machine()


def machine(device: torch.device, dtype: torch.dtype) -> str:
    """Where the numbers come from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor()}, threads: {torch.get_num_threads()}"
    return f"{name}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}"
