"""Costs against arithmetic worked out by hand."""

import jax
import numpy as np
import pytest

from dgl_jax import cost
from dgl_jax.auxiliary import SimilarityHead
from dgl_jax.config import Config, LossConfig, OptimizerConfig, PlacementConfig
from dgl_jax.losses import make_loss_fn
from dgl_jax.methods import METHODS
from dgl_jax.models.network import Network
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import init_states
from dgl_jax.placement import make_placements


def test_block_costs_of_a_small_network(small_network, small_head):
    blocks = METHODS["dgl"].make_blocks(small_network, (1,), small_head, make_loss_fn(LossConfig()))
    first, last = cost.block_costs(blocks, (6, 6, 2))
    # Convolutions 2->3->4 without bias, BatchNorm's scale and bias; the head 4->4.
    assert first.layers_parameters == 9 * 2 * 3 + 2 * 3 + 9 * 3 * 4 + 2 * 4
    assert first.head_parameters == 4 * 4 + 4
    assert last.layers_parameters == 9 * 4 * 4 + 2 * 4 + 9 * 4 * 5 + 2 * 5
    assert last.head_parameters == 5 * 4 + 4
    assert first.activation_bytes == 6 * 6 * 4 * 4
    # Two FLOPs a multiply-add. A 3x3 window on 6x6 pixels has 16 * 16 taps inside the image;
    # BatchNorm and ReLU add a few operations a pixel.
    convolutions = 2 * 16 * 16 * (2 * 3 + 3 * 4)
    assert convolutions < first.layers_flops < convolutions + 12 * 36 * (3 + 4)
    head = 2 * 4 * 4
    assert head < first.head_flops < head + 36 * 4 + 2 * 4 + 8


def test_aux_flops_ratios_are_relative_to_the_largest_block():
    costs = [
        cost.BlockCost(*values, 0, 0, 0) for values in ((50.0, 10.0), (200.0, 4.0), (8.0, 9.0))
    ]
    assert cost.aux_flops_ratios(costs) == [0.05, 0.02, 0.0]


@pytest.mark.parametrize("kind", ["flops", "memory", "time"])
def test_layer_and_head_costs_fit_the_partition(small_network, small_head, kind):
    layers, heads = cost.layer_and_head_costs(small_network, small_head, (6, 6, 2), 4, kind)
    assert len(layers) == len(heads) == 4
    assert min(layers + heads) > 0
    if kind == "flops":
        assert layers == sorted(layers)  # 2->3, 3->4, 4->4, 4->5 channels.
    if kind == "memory":
        # Of each of 36 pixels: the layer's input, and of each output channel three numbers of
        # the convolution and BatchNorm and a byte, ReLU's mask.
        channels = ((2, 3), (3, 4), (4, 4), (4, 5))
        assert layers == [36 * (4 * inputs + 13 * outputs) for inputs, outputs in channels]


@pytest.mark.parametrize("kind", ["flops", "memory", "time"])
def test_layer_and_head_costs_of_a_head_that_returns_more_than_logits(
    small_network, small_head, kind
):
    network = Network("two", small_network.layers[:2], small_network.head)
    head = SimilarityHead(small_head)
    _, (first, _) = cost.layer_and_head_costs(network, head, (6, 6, 2), 4, kind)
    if kind == "flops":  # The similarity map of 3 channels, 256 taps inside the image.
        assert first > 2 * 256 * 3 * 3
    assert first > 0


def test_peak_memory_is_this_processs():
    before = cost.peak_memory_bytes()
    array = jax.block_until_ready(jax.device_put(np.ones(2**26, np.uint8)))
    assert cost.peak_memory_bytes() >= max(before, array.nbytes)


def test_every_blocks_work_is_timed_where_it_lives(small_network, small_head, small_batches):
    blocks = METHODS["dgl"].make_blocks(small_network, (1,), small_head, make_loss_fn(LossConfig()))
    optimizer = make_optimizer(OptimizerConfig(), 20, 5)
    placements = make_placements(PlacementConfig(kind="pipelined", num_devices=2), 2)
    states = init_states(blocks, optimizer, jax.random.key(0), (6, 6, 2), placements)
    calls = []

    def make_work(block):
        step = METHODS["dgl"].make_block_work(Config(), block, optimizer)

        def work(state, x, labels, key):
            calls.append(block.index)  # Once: when it is traced.
            return step(state, x, labels, key)

        return work

    batch = jax.device_put(small_batches[0], placements[0].batch)
    seconds = cost.block_step_seconds(
        blocks, [make_work(block) for block in blocks], states, batch, placements
    )
    assert len(seconds) == 2 and min(seconds) > 0
    assert calls == [0, 1]
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(states))
