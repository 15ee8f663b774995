"""A run of two blocks, the first much faster than the second, for tests/test_pipeline.py.

python uneven_blocks.py MAX_STEPS_IN_FLIGHT NUM_STEPS COORDINATOR NUM_PROCESSES PROCESS_ID prints how far
the process's memory was above its start after each step, in bytes.
"""

import json
import os
import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dgl_jax import distributed
from dgl_jax.config import Config, LossConfig, OptimizerConfig, PlacementConfig
from dgl_jax.losses import make_loss_fn
from dgl_jax.methods import METHODS
from dgl_jax.models.network import Network
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import init_states
from dgl_jax.placement import make_placements
from dgl_jax.transfer import place
from dgl_jax.types import Batch, TrainState


class _Spread(nn.Module):
    """[B, C] to [B, C, 128]: little work, much to hand on."""

    @nn.compact
    def __call__(self, x):
        return x[:, :, None] * self.param("scale", nn.initializers.normal(), (128,))[None, None]


class _Work(nn.Module):
    """[B, C, 128] to [B, 1024]: much work."""

    @nn.compact
    def __call__(self, x):
        x = jnp.mean(x, axis=2)
        for _ in range(3):
            x = nn.relu(nn.Dense(1024)(x))
        return x


class _MeanHead(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x.reshape(x.shape[0], x.shape[1], -1).mean(axis=2))


def _resident_bytes():
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def main(max_steps_in_flight, num_steps, coordinator, num_processes, process_id):
    if num_processes == 1:
        jax.config.update("jax_num_cpu_devices", 2)
    else:
        distributed.initialize(coordinator, num_processes, process_id)
    config = Config(
        placement=PlacementConfig(
            kind="pipelined", num_devices=2, max_steps_in_flight=max_steps_in_flight
        )
    )
    dgl, key = METHODS["dgl"], jax.random.key(0)
    network = Network("uneven", (_Spread(), _Work()), _MeanHead())
    blocks = dgl.make_blocks(network, (0,), _MeanHead(), make_loss_fn(LossConfig()))
    placements = make_placements(config.placement, 2)
    optimizer = make_optimizer(OptimizerConfig(schedule="constant"), 1, 1)
    states = init_states(blocks, optimizer, key, (128,), placements)
    runner = dgl.make_runner(config, blocks, optimizer, key, placements)
    images = place(np.zeros((64, 128), np.float32), placements[0].batch)
    batch = Batch(images, jax.device_put(np.zeros(64, np.int32)))
    state, sizes = TrainState(states), []
    for step, tasks in enumerate(dgl.make_schedule(config, 2, num_steps, num_steps).tasks(0)):
        state, _ = runner.step(state, tasks, lambda step: batch)
        if step < 10:
            jax.block_until_ready(state)  # Compiled, and everything has its place.
        sizes.append(_resident_bytes())
    jax.block_until_ready(state)
    sizes = np.array(sizes)
    print(json.dumps((sizes - sizes[9])[10:].tolist()))
    distributed.finish()


if __name__ == "__main__":
    first, second, address, *rest = sys.argv[1:]
    main(int(first), int(second), address, *map(int, rest))
