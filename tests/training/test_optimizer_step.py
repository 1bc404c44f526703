"""The optimizer step against Megatron's own, and how often a training step waits for the device."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sedd_megatron.arguments import parse_pretrain_options, weighted_corpora
from sedd_megatron.data.tokenizers import ByteTokenizer
from sedd_megatron.data.windows import open_windows
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import groups_of_this_process
from tests.diffusion.simulated_device import waits_for_values
from tests.distributed.layouts import MODEL

# What reads a device's numbers on the host, by its name in Python; the operators are those of waits_for_values.
READING_METHODS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__"}


def options_of(*flags: str):
    return parse_pretrain_options(["--data-path", "x", *MODEL, *flags])


def build(*flags: str):
    """A run of the tests' model in this process, before its first step."""
    cpu_backend.install()
    from sedd_megatron.training.build import build_run

    options = options_of(*flags)
    return build_run(options, ByteTokenizer(), groups_of_this_process(options.parallel))


def fill_gradients(run, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for chunk in run.ddp_chunks:
        for parameter in chunk.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def moment_of(run, main) -> torch.Tensor:
    """Adam's first: a sum of the gradients as they were clipped."""
    return run.optimizer.chained_optimizers[0].optimizer.state[main.tensor]["exp_avg"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("flags", [[], ["--bf16"], ["--use-distributed-optimizer"]], ids=" ".join)
@pytest.mark.parametrize("scale", [1e-5, 1.0])
@pytest.mark.parametrize("clip", ["0", "1"])
def test_step_is_megatrons(clip, scale, flags, device, monkeypatch):
    flags = [*flags, "--clip-grad", clip, "--weight-decay", "0.1"]
    theirs, ours = build(*flags), build(*flags)
    from sedd_megatron.training import optimizer_step

    # What a GPU does runs on a CPU as well.
    for choices in (optimizer_step.NORMS, optimizer_step.CLIP):
        monkeypatch.setitem(choices, "cpu", choices[device])
    norms = []
    for run in (theirs, ours):
        for group in run.optimizer.param_groups:
            group["lr"] = 1e-3
        for _ in range(2):
            fill_gradients(run, scale)
            if run is theirs:
                norms.append(run.optimizer.step()[1])
            else:
                (square,) = optimizer_step.squared_gradient_norms(run.optimizer, run.groups.device)
                optimizer_step.update_parameters(run.optimizer, square)
                norms.append(square.sqrt().item())
    assert (norms[0] > 1) == (scale == 1), "one norm is to be clipped, the other not"
    assert norms[2:] == pytest.approx(norms[:2], rel=1e-6)
    for expected, actual in zip(theirs.main_parameters, ours.main_parameters, strict=True):
        torch.testing.assert_close(actual.tensor, expected.tensor, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(moment_of(ours, actual), moment_of(theirs, expected), rtol=1e-5, atol=0)


def random_gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((3,), (64, 64), (5, 4097), (1,))]


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_norm_is_that_of_all_entries(name):
    cpu_backend.install()
    from sedd_megatron.training.optimizer_step import NORMS

    gradients = random_gradients()
    expected = torch.cat([gradient.flatten() for gradient in gradients]).double().norm().item()
    norm = torch.stack(NORMS[name](gradients)).norm().item()
    assert norm == pytest.approx(expected, rel={"cpu": 1e-7, "cuda": 1e-5}[name])


@pytest.mark.parametrize("norm", [0.3, 1.0, 7.0])
def test_clipping_unread_changes_the_same_bits(norm):
    cpu_backend.install()
    from sedd_megatron.training.optimizer_step import CLIP

    read, unread = random_gradients(), random_gradients()
    CLIP["cpu"](read, torch.tensor(norm, dtype=torch.float64), 1.0)
    CLIP["cuda"](unread, torch.tensor(norm, dtype=torch.float64), 1.0)
    for before, one, other in zip(random_gradients(), read, unread, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, before * min(1.0, 1 / norm), rtol=1e-5, atol=0)


class Waits(TorchDispatchMode):
    """Where a GPU would make the host wait, while it is on: names of operators and of Tensor's methods."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._methods = _ReadingMethods(self.found)

    def __enter__(self):
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if waits_for_values(func.overloadpacket, args):
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class _ReadingMethods(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READING_METHODS:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def kernel_without_a_wait(
    keys: torch.Tensor, branch: int, first_position: int, length: int, width: int, probability: float
) -> torch.Tensor:
    return keys.new_empty(length, len(keys), width, dtype=torch.bool).zero_()


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--bf16", "--graph", "uniform"],
        ["--loss-chunk-rows", "0", "--clip-grad", "0"],
        ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather", "--ema-interval", "2"],
        ["--hidden-dropout", "0.1", "--recompute-granularity", "selective", "--recompute-modules", "layernorm", "mlp"],
    ],
    ids=" ".join,
)
def test_a_step_waits_for_the_device_once(flags, byte_corpus, monkeypatch):
    run = build(*flags, "--num-workers", "1", "--data-path", str(byte_corpus))
    from sedd_megatron.model import dit_layer
    from sedd_megatron.training import optimizer_step
    from sedd_megatron.training.iterators import training_iterators
    from sedd_megatron.training.step import train_step
    from sedd_megatron.training.step_guard import StepGuard

    # The optimizer's ways on a GPU; what is made for a batch is made by the loader process. Dropout's draws are one
    # kernel there, of which nothing is read.
    for choices in (optimizer_step.NORMS, optimizer_step.CLIP):
        monkeypatch.setitem(choices, "cpu", choices["cuda"])
    monkeypatch.setattr(dit_layer, "dropped_elements", kernel_without_a_wait)
    windows = open_windows(weighted_corpora(run.options.data), seq_length=run.options.model.seq_length,
                           split="1,0,0", num_tokens=256, seed=0)  # fmt: skip
    run.guard = StepGuard(run, windows.train)
    batches = training_iterators(run, windows.train)
    train_step(run, batches)
    for _ in range(2):
        with Waits() as waits:
            metrics, flags = train_step(run, batches, [False, True])
        assert waits.found == ["tolist"]
        assert flags == [False, True]
    assert metrics["iteration"] == 3


def test_waits_are_seen():
    # Or the test above would show nothing: in a forward pass, in a backward pass, and by a mask.
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * grad.sum().item()

    x = torch.ones(3, requires_grad=True)
    for body, expected in (
        (lambda: Reads.apply(x).sum().backward(), {"_local_scalar_dense"}),
        (lambda: float(x.detach().sum()), {"__float__"}),
        (lambda: x.detach()[x.detach() > 0], {"index"}),
        (lambda: (x > 0).nonzero(), {"nonzero"}),
        (lambda: x.detach().sum() > 2 and None, {"__bool__"}),
        (lambda: x.tolist(), {"tolist"}),
    ):
        with Waits() as waits:
            body()
        assert expected <= set(waits.found), (expected, waits.found)
