"""Where PyTorch and Triton can compile for a GPU but none is there: the kernels of --compile on, made for sm_86."""

import importlib.util
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import new_model
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from nano_opd.rollout import score
from nano_opd.system.fast_rollout import draw

B, P, R = 128, 8, 24
GPU = torch.device("cuda", 0)
CARD = SimpleNamespace(  # a consumer's card of 2020
    name="imaginary",
    multi_processor_count=28,
    major=8,
    minor=6,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=1536,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=101376,
    total_memory=2**33,
)
can_compile = (
    torch.version.cuda
    and importlib.util.find_spec("triton")
    and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
)
pytestmark = pytest.mark.skipif(
    not can_compile or torch.cuda.is_available(),
    reason="needs a CUDA build of torch 2.14 or later, and Triton; where a GPU is, lab.check_gpu runs them",
)


@pytest.fixture
def kernels(monkeypatch):
    """A function that compiles f(*arguments), given on the CPU, for CARD, and returns Triton's kernels, not loaded."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import compile_fx, config, decomposition
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    from torch._subclasses import fake_tensor
    from triton.backends.compiler import GPUTarget

    driver = mock.Mock()
    driver.get_current_target = lambda: GPUTarget("cuda", 86, 32)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver, raising=False)
    monkeypatch.setattr(triton_helpers, "set_driver_to_gpu", lambda: None)
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda *_: None)
    monkeypatch.setattr(CudaInterface, "get_device_properties", staticmethod(lambda *_: CARD))
    monkeypatch.setattr(torch.Tensor, "__invert__", torch.Tensor.bitwise_not)  # ~x asks the driver for its device
    monkeypatch.setattr(torch.Tensor, "copy_", lambda x, y: torch.ops.aten.copy_(x, y))
    imaginary = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: CARD,
        "get_device_capability": lambda *_: (8, 6),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
        "synchronize": lambda *_: None,
    }
    for name, function in imaginary.items():
        monkeypatch.setattr(torch.cuda, name, function, raising=False)
    made = []
    monkeypatch.setattr(
        triton_heuristics.CachingAutotuner, "_make_launchers", lambda self: made.extend(self.compile_results)
    )

    def compiled(f, *arguments) -> list:
        made.clear()
        table = decomposition.select_decomp_table()
        graph = make_fx(f, table, "fake")(*arguments)
        for node in graph.graph.nodes:  # traced on the CPU: a tensor of an imaginary GPU cannot be indexed in Python
            if "device" in node.kwargs:
                node.update_kwarg("device", GPU)
            for value in tree_leaves(node.meta.get("val", ())):
                value.fake_device = GPU
        there = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
        settings = {"compile_threads": 1, "force_disable_caches": True, "use_static_triton_launcher": False}
        with there[0].fake_mode, torch.no_grad(), config.patch(settings):
            compile_fx.compile_fx_inner(graph, there)
        return [result.kernel for result in made]

    return compiled


def functions(dtype: torch.dtype) -> dict:
    """Name → function and its arguments: the weights first."""
    model = new_model(P + R)
    model.precision = dtype
    names, weights = zip(*model.named_parameters(), *model.named_buffers())
    tokens = torch.ones(B, P + R, dtype=torch.int64)
    cache = [x for kept in model.new_cache(B, P + R) for x in kept]

    class Call(torch.nn.Module):  # with the weights that are given, for functional_call
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, f, *arguments):
            return f(self.model, *arguments)

    def through(f, *given):
        weights, rest = given[: len(names)], given[len(names) :]
        named = {f"model.{name}": x for name, x in zip(names, weights)}
        return functional_call(Call(), named, (partial(f, weights), *rest))

    def gradient(weights, model, tokens, of_logp):
        return torch.autograd.grad((score(model, tokens, P)[0] * of_logp).sum(), weights[:-1])

    def drawn(weights, model, token, uniform, *cache):
        at = [slice(n, n + 1) for n in range(P, P + len(uniform))]
        return draw(model, token, [*zip(cache[::2], cache[1::2])], at, uniform, False)

    return {
        "score": (partial(through, lambda _, model, tokens: score(model, tokens, P)[:1]), *weights, tokens),
        "gradient": (partial(through, gradient), *weights, tokens, torch.ones(B, R)),
        "draw": (functionalize(partial(through, drawn)), *weights, tokens[:, :1], torch.ones(4, B, 1), *cache),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", ["score", "gradient", "draw"])
def test_the_kernels_of_a_step_compile_to_machine_code(kernels, what, dtype):
    made = kernels(*functions(dtype)[what])
    assert len(made) > 5
    for kernel in made:
        assert ".target sm_86" in kernel.asm["ptx"] and kernel.asm["cubin"][:4] == b"\x7fELF"
