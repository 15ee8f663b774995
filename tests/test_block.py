"""The block step against Algorithm 1 written out in numpy, with its backward pass by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import to_float64

from dgl_jax.block import Block, init_block_state, make_block_step
from dgl_jax.config import LossConfig, OptimizerConfig, default_config, from_dict
from dgl_jax.grouping import configured_blocks, configured_network
from dgl_jax.losses import make_loss_fn
from dgl_jax.methods import METHODS
from dgl_jax.optim import make_optimizer

_LEARNING_RATE, _MOMENTUM, _DECAY, _SMOOTHING, _EPSILON = 0.1, 0.9, 5e-4, 0.1, 1e-5


class NumpyBlock:
    """Conv 3x3, BatchNorm, ReLU; head: global average pool, linear. All in float64."""

    def __init__(self, params, batch_stats):
        layer, head = params["layers"][0], params["head"]["Dense_0"]
        self.params = {
            "kernel": layer["Conv_0"]["kernel"],
            "scale": layer["BatchNorm_0"]["scale"],
            "bias": layer["BatchNorm_0"]["bias"],
            "head_kernel": head["kernel"],
            "head_bias": head["bias"],
        }
        self.params = {k: np.array(v, np.float64) for k, v in self.params.items()}
        self.momentum = {k: np.zeros_like(v) for k, v in self.params.items()}
        stats = batch_stats["layers"][0]["BatchNorm_0"]
        self.mean, self.var = (
            np.array(stats["mean"], np.float64),
            np.array(stats["var"], np.float64),
        )

    def step(self, x, labels):
        """Algorithm 1, lines 4 to 6. Returns the loss and what is handed on."""
        p = self.params
        batch, height, width, _ = x.shape
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        columns = np.stack(windows, axis=3)  # [B, H, W, 9, C]
        kernel = p["kernel"].reshape(9, *p["kernel"].shape[2:])
        z = np.einsum("bhwkc,kco->bhwo", columns, kernel)
        mean, var = z.mean((0, 1, 2)), z.var((0, 1, 2))
        normal = (z - mean) / np.sqrt(var + _EPSILON)
        affine = normal * p["scale"] + p["bias"]
        h = np.maximum(affine, 0)
        pooled = h.mean((1, 2))
        logits = pooled @ p["head_kernel"] + p["head_bias"]
        probabilities = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        classes = logits.shape[-1]
        targets = np.eye(classes)[labels] * (1 - _SMOOTHING) + _SMOOTHING / classes
        loss = -(targets * np.log(probabilities)).sum(-1).mean()

        # Backward, by hand.
        d_logits = (probabilities - targets) / batch
        d_pooled = d_logits @ p["head_kernel"].T
        d_h = np.broadcast_to(d_pooled[:, None, None] / (height * width), h.shape)
        d_affine = d_h * (affine > 0)
        d_normal = d_affine * p["scale"]
        d_z = (
            d_normal - d_normal.mean((0, 1, 2)) - normal * (d_normal * normal).mean((0, 1, 2))
        ) / np.sqrt(var + _EPSILON)
        gradients = {
            "kernel": np.einsum("bhwkc,bhwo->kco", columns, d_z).reshape(p["kernel"].shape),
            "scale": (d_affine * normal).sum((0, 1, 2)),
            "bias": d_affine.sum((0, 1, 2)),
            "head_kernel": pooled.T @ d_logits,
            "head_bias": d_logits.sum(0),
        }
        for name, gradient in gradients.items():
            gradient = gradient + _DECAY * p[name]
            self.momentum[name] = _MOMENTUM * self.momentum[name] + gradient
            p[name] = p[name] - _LEARNING_RATE * self.momentum[name]
        self.mean = 0.9 * self.mean + 0.1 * mean
        self.var = 0.9 * self.var + 0.1 * var
        return loss, h


def test_two_blocks_match_algorithm_1_written_out(small_network, small_head, small_batches):
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=_LEARNING_RATE,
            momentum=_MOMENTUM,
            weight_decay=_DECAY,
            schedule="constant",
        ),
        num_steps=10,
        steps_per_epoch=5,
    )
    loss_fn = make_loss_fn(LossConfig(label_smoothing=_SMOOTHING))
    network = type(small_network)("two", small_network.layers[:2], small_network.head)
    blocks = METHODS["dgl"].make_blocks(network, (0,), small_head, loss_fn)
    key = jax.random.key(0)
    with jax.enable_x64(True):
        shapes = [(2, 6, 6, 2), (2, 6, 6, 3)]
        states = [
            to_float64(init_block_state(block, optimizer, key, jnp.zeros(shape)))
            for block, shape in zip(blocks, shapes)
        ]
        oracles = [NumpyBlock(state.params, state.batch_stats) for state in states]
        steps = [jax.jit(make_block_step(block, optimizer)) for block in blocks]
        for batch in small_batches[:10]:
            x = expected_x = batch.images.astype(np.float64)
            for index, (step, oracle) in enumerate(zip(steps, oracles)):
                output = step(states[index], x, batch.labels, key)
                loss, expected_x = oracle.step(expected_x, batch.labels)
                np.testing.assert_allclose(output.metrics["loss"], loss, rtol=1e-11)
                np.testing.assert_allclose(output.activations, expected_x, atol=1e-11)
                states[index], x = output.state, output.activations
        for state, oracle in zip(states, oracles):
            layer = state.params["layers"][0]
            close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11)
            close(layer["Conv_0"]["kernel"], oracle.params["kernel"])
            close(layer["BatchNorm_0"]["scale"], oracle.params["scale"])
            close(layer["BatchNorm_0"]["bias"], oracle.params["bias"])
            close(state.params["head"]["Dense_0"]["kernel"], oracle.params["head_kernel"])
            close(state.params["head"]["Dense_0"]["bias"], oracle.params["head_bias"])
            close(state.batch_stats["layers"][0]["BatchNorm_0"]["mean"], oracle.mean)
            close(state.batch_stats["layers"][0]["BatchNorm_0"]["var"], oracle.var)
            assert int(state.step) == 10


def test_gradient_of_a_block_in_every_other_block_is_exactly_zero(
    small_network, small_head, small_batches
):
    optimizer = make_optimizer(OptimizerConfig(), num_steps=10, steps_per_epoch=5)
    blocks = METHODS["dgl"].make_blocks(
        small_network, (0, 1, 2), small_head, make_loss_fn(LossConfig())
    )
    key = jax.random.key(0)
    batch = small_batches[0]
    states, x = [], batch.images
    for block in blocks:
        states.append(init_block_state(block, optimizer, key, x))
        x = make_block_step(block, optimizer)(states[-1], x, batch.labels, key).activations

    def losses(all_params):
        x, out = batch.images, []
        for block, state, params in zip(blocks, states, all_params):
            step = make_block_step(block, optimizer)
            output = step(state.replace(params=params), x, batch.labels, key)
            x = output.activations
            out.append(output.metrics["loss"])
        return tuple(out)

    jacobian = jax.jit(jax.jacrev(losses))(tuple(state.params for state in states))
    for of in range(4):
        for by in range(4):
            leaves = [np.abs(leaf).max() for leaf in jax.tree.leaves(jacobian[of][by])]
            if of == by:
                assert min(leaves) > 0
            else:
                assert max(leaves) == 0


def test_activations_come_from_the_parameters_before_the_update(
    small_network, small_head, small_batches
):
    optimizer = make_optimizer(OptimizerConfig(), num_steps=10, steps_per_epoch=5)
    block = Block(0, 0, small_network.layers[:1], small_head, make_loss_fn(LossConfig()))
    batch, key = small_batches[0], jax.random.key(0)
    state = init_block_state(block, optimizer, key, batch.images)
    output = make_block_step(block, optimizer)(state, batch.images, batch.labels, key)
    layer = small_network.layers[0]
    for params, same in ((state.params, True), (output.state.params, False)):
        variables = {"params": params["layers"][0], "batch_stats": state.batch_stats["layers"][0]}
        y, _ = layer.apply(variables, batch.images, True, mutable=["batch_stats"])
        assert np.allclose(y, output.activations, atol=1e-6) == same


def test_a_step_keeps_structure_shapes_and_dtypes(small_network, small_head, small_batches):
    optimizer = make_optimizer(OptimizerConfig(), num_steps=10, steps_per_epoch=5)
    block = Block(0, 0, small_network.layers, small_head, make_loss_fn(LossConfig()))
    batch, key = small_batches[0], jax.random.key(0)
    state = init_block_state(block, optimizer, key, batch.images)
    step = make_block_step(block, optimizer)
    after = jax.eval_shape(step, state, batch.images, batch.labels, key).state
    before = jax.eval_shape(lambda: state)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert jax.tree.leaves(before) == jax.tree.leaves(after)


def test_initial_weights_do_not_depend_on_the_cuts(small_network, small_head):
    optimizer = make_optimizer(OptimizerConfig(), num_steps=10, steps_per_epoch=5)
    key, loss_fn = jax.random.key(3), make_loss_fn(LossConfig())
    layers = []
    for cuts in ((), (1,), (0, 1, 2)):
        blocks = METHODS["dgl"].make_blocks(small_network, cuts, small_head, loss_fn)
        x = jnp.zeros((2, 6, 6, 2))
        layers.append([])
        for block in blocks:
            params = init_block_state(block, optimizer, key, x).params
            layers[-1] += params["layers"]
            x = jnp.zeros((2, 6, 6, block.layers[-1].features))
        head = params["head"]
        layers[-1].append(head)
    for other in layers[1:]:
        jax.tree.map(np.testing.assert_array_equal, layers[0], other)


def test_uniform_norm_weights_of_layers_and_heads():
    """DGL's start: U(0, 1), each layer's its own; nothing else is drawn anew."""
    config = default_config()
    config.network.name, config.partition.strategy = "cnn4", "per_layer"
    states = {}
    for init in ("own", "uniform"):
        config.network.norm_init = init
        settings = from_dict(config.to_dict())
        network = configured_network(settings, 10)
        blocks = configured_blocks(settings, network, (0, 1, 2), ("mlp_sr",) * 3, 10)
        states[init] = [
            init_block_state(blocks[index], optax.sgd(0.1), jax.random.key(0), jnp.zeros(shape))
            for index, shape in ((0, (2, 8, 8, 3)), (3, (2, 4, 4, 128)))
        ]
    leaves, _ = jax.tree.flatten_with_path([state.params for state in states["uniform"]])
    own = jax.tree.leaves([state.params for state in states["own"]])
    weights = []
    for (path, leaf), own_leaf in zip(leaves, own, strict=True):
        if path[-1].key == "scale":
            weights.append(np.asarray(leaf))
        else:
            np.testing.assert_array_equal(leaf, own_leaf)
    # Block 0: a layer, three 1x1 convolutions and three hidden layers; block 3: a layer and two.
    assert len(weights) == 7 + 3
    everything = np.concatenate(weights)
    assert 0 <= everything.min() and everything.max() < 1
    np.testing.assert_allclose([everything.mean(), everything.var()], [1 / 2, 1 / 12], rtol=0.05)
    assert len(np.unique(everything)) > 0.99 * everything.size


@pytest.mark.parametrize("scan_layers", [False, True])
def test_he_normal_kernels_of_layers_and_heads(scan_layers):
    """SEDONA's start: a variance of 2 / fan-in; nothing else than kernels is drawn anew."""
    config = default_config()
    config.network.name, config.network.width_factor = "resnet18", 0.5
    config.network.scan_layers = scan_layers
    config.partition.strategy, config.partition.num_blocks = "uniform", 2
    config.auxiliary.name = "mlp_sr"
    states = {}
    for init in ("own", "he_normal"):
        config.network.kernel_init = init
        settings = from_dict(config.to_dict())
        network = configured_network(settings, 10)
        block, _ = configured_blocks(settings, network, (3,), ("mlp_sr",), 10)
        x = jnp.zeros((2, 32, 32, 3))
        states[init] = init_block_state(block, optax.sgd(0.1), jax.random.key(0), x)
    leaves, _ = jax.tree.flatten_with_path(states["he_normal"].params)
    count = 0
    for (path, leaf), own in zip(leaves, jax.tree.leaves(states["own"].params), strict=True):
        if path[-1].key != "kernel":
            np.testing.assert_array_equal(leaf, own)
            continue
        is_stacked = leaf.ndim - (2 if "Dense" in str(path) else 4)
        fan_in = np.prod(leaf.shape[is_stacked:-1])
        if leaf.size > 5000:  # The deviation of a deviation is below 1 % then.
            np.testing.assert_allclose(np.std(leaf), np.sqrt(2 / fan_in), rtol=0.05)
            count += 1
        assert np.all(np.asarray(leaf) != np.asarray(own))
    assert count >= 6
    kernels = [np.asarray(leaf) for path, leaf in leaves if path[-1].key == "kernel"]
    layers = [k for stack in kernels for k in (stack if stack.ndim > 4 else [stack])]
    same_shape = [(a, b) for a, b in itertools.combinations(layers, 2) if a.shape == b.shape]
    assert same_shape and not any(np.array_equal(a, b) for a, b in same_shape)


@pytest.mark.parametrize("cuts", [(0,), (1, 2)])
def test_every_block_has_its_layers_and_the_last_the_networks_head(small_network, small_head, cuts):
    blocks = METHODS["dgl"].make_blocks(small_network, cuts, small_head, make_loss_fn(LossConfig()))
    assert sum((block.layers for block in blocks), ()) == small_network.layers
    assert [block.head is small_network.head for block in blocks[:-1]] == [False] * len(cuts)
    assert blocks[-1].head is small_network.head
