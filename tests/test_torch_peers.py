"""PyTorch's side of the benchmark computes what ours does; its worker."""

import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from dgl_jax.auxiliary import make_auxiliary
from dgl_jax.block import init_block_state, make_block_eval, make_block_feed, make_block_step
from dgl_jax.config import LossConfig, OptimizerConfig
from dgl_jax.losses import make_loss_fn
from dgl_jax.methods.dgl import make_blocks
from dgl_jax.models import make_network
from dgl_jax.optim import make_optimizer
from dgl_jax.partition import uniform_cuts
from dgl_jax.types import BlockState

torch = pytest.importorskip("torch")  # An option: requirements-bench.txt.

_FILE = pathlib.Path(__file__).parents[1] / "experiments/benchmarks/torch_peers.py"
_SPEC = importlib.util.spec_from_file_location("torch_peers", _FILE)
torch_peers = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(torch_peers)

_OPTIMIZER = make_optimizer(OptimizerConfig(schedule="constant"), 1, 1)
_KEY = jax.random.key(0)
torch.set_num_threads(1)  # As many as these small arrays keep busy.


def _batch():
    rng = np.random.default_rng(0)
    return rng.standard_normal((4, 32, 32, 3)), rng.integers(0, 10, 4)


def _to_torch(images):
    return torch.tensor(images.transpose(0, 3, 1, 2))


def _both(network, width_factor, num_blocks):
    """Our blocks and their states, float64 of numpy, and PyTorch's blocks with the same weights."""
    ours = make_network(network, 10, width_factor=width_factor)
    cuts = uniform_cuts(len(ours.layers), num_blocks)
    blocks = make_blocks(ours, cuts, make_auxiliary("mlp_sr", 10), make_loss_fn(LossConfig()))

    def init(x):
        states = []
        for block in blocks:
            states.append(init_block_state(block, _OPTIMIZER, _KEY, x))
            x = make_block_feed(block)(states[-1], x)
        return states

    # Nothing is zero, as biases are in a fresh network: a weight in the wrong place is noticed.
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        if leaf.ndim == 1:
            least = -0.3 if path[-1].key in ("bias", "mean") else 0.1
            return rng.uniform(least, 0.3, leaf.shape)
        return rng.standard_normal(leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1]))

    states = []
    for state in jax.eval_shape(init, _batch()[0]):
        params, batch_stats = jax.tree.map_with_path(draw, (state.params, state.batch_stats))
        with jax.enable_x64(True):
            opt_state = _OPTIMIZER.init(params)
        states.append(BlockState(np.int32(0), params, batch_stats, opt_state))
    theirs = torch_peers.make_blocks(network, width_factor, 32, cuts)
    for block in theirs:
        block.double()
    torch_peers.load_from_jax(theirs, states)
    return blocks, states, theirs


_SLOW = [("vgg19", 1 / 8), ("resnet50", 1 / 8), ("resnet110", 1.0)]


@pytest.mark.parametrize("num_blocks", [1, 2, 4])
@pytest.mark.parametrize(
    ("network", "width_factor"),
    [
        ("cnn6", 1 / 16),
        ("resnet18", 1 / 8),
        *[pytest.param(*network, marks=pytest.mark.slow) for network in _SLOW],
    ],
)
def test_local_losses_are_ours(network, width_factor, num_blocks):
    """One block is backprop. The third step's loss is the first that momentum changes."""
    images, labels = _batch()
    blocks, states, theirs = _both(network, width_factor, num_blocks)
    steps = [make_block_step(block, _OPTIMIZER) for block in blocks]

    @jax.jit
    def step(states):
        x, next_states, losses = images, [], []
        for block_step, state in zip(steps, states, strict=True):
            output = block_step(state, x, labels, _KEY)
            x = output.activations
            next_states.append(output.state)
            losses.append(output.metrics["loss"])
        return next_states, losses

    expected = []
    with jax.enable_x64(True):
        for _ in range(3):
            states, losses = step(states)
            expected.append(np.asarray(losses))
    train_step = torch_peers.make_train_step(theirs)
    x, y = _to_torch(images), torch.tensor(labels)
    losses = [[loss.item() for loss in train_step(x, y)] for _ in range(3)]
    np.testing.assert_allclose(losses, expected, rtol=1e-8)
    # A gradient that flowed down would come after the block's update: it would only take time.
    assert not theirs[0](x, y)[0].requires_grad


def test_running_statistics_are_loaded():
    """In evaluation mode, all logits of a network and of its auxiliary heads."""
    images, _ = _batch()
    blocks, states, theirs = _both("cnn4", 1 / 8, 4)
    x, y = images, _to_torch(images)
    for block, state, their in zip(blocks, states, theirs, strict=True):
        with jax.enable_x64(True):
            x, logits = jax.jit(make_block_eval(block))(state.params, state.batch_stats, x)
        with torch.no_grad():
            y = their.eval().layers(y)
            np.testing.assert_allclose(their.head(y).numpy(), logits, rtol=1e-8)


def test_a_network_of_another_form_is_not_loaded():
    _, states, _ = _both("cnn4", 1 / 8, 2)
    for name, width_factor, cuts in (
        ("cnn4", 1 / 4, (1,)),
        ("cnn4", 1 / 8, ()),
        ("cnn6", 1 / 16, (1,)),
    ):
        others = torch_peers.make_blocks(name, width_factor, 32, cuts)
        with pytest.raises((ValueError, RuntimeError), match="size mismatch|zip"):
            torch_peers.load_from_jax(others, states)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [("--method=backprop",), ("--method=dgl", "--cuts=0,2", "--dtype=bfloat16")]
)
def test_worker(method):
    small = ("--network=cnn4", "--width_factor=0.125", "--batch_size=4", "--image_size=16")
    result = subprocess.run(
        [sys.executable, str(_FILE), *small, *method],
        check=False, input="2\n3\n", capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    ready, *answers = map(json.loads, result.stdout.splitlines())
    assert ready.keys() == {"device", "torch"} and answers == [{"done": 2}, {"done": 3}]


@pytest.mark.slow
def test_a_worker_has_no_jax():
    command = "import sys, torch_peers; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True, timeout=300, cwd=_FILE.parent)
