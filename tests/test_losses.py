"""Local losses against numpy in float64, their gradients against finite differences."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import to_float64

from dgl_jax.auxiliary import SimilarityHead, head_for_loss, make_auxiliary
from dgl_jax.block import Block, forward, init_block_state, make_block_step
from dgl_jax.config import Config, LossConfig, OptimizerConfig, PlacementConfig, from_dict, to_dict
from dgl_jax.errors import UserError
from dgl_jax.losses import (
    cross_entropy,
    local_losses,
    make_loss_fn,
    make_loss_fns,
    similarity_loss,
    similarity_matrix,
)
from dgl_jax.methods import METHODS
from dgl_jax.metrics import read_metrics
from dgl_jax.models.network import Network
from dgl_jax.optim import make_optimizer
from dgl_jax.pipeline import init_states
from dgl_jax.placement import make_placements
from dgl_jax.train import train_and_evaluate
from dgl_jax.types import TrainState

_NUM_CLASSES = 4
_LABELS = np.array([0, 2, 2, 1, 0], np.int32)

# Maps of more than three channels and one pixel are reduced over space, others are not.
_SHAPES = {
    (5, 4, 3, 6): True,
    (5, 3, 6): True,
    (5, 4, 3, 3): False,
    (5, 1, 1, 6): False,
    (5, 7): False,
}


def _numpy_similarity_loss(features, labels):
    """One pair of examples after the other."""
    vectors = []
    for example in features:
        if _SHAPES[features.shape]:
            pixels = example.reshape(-1, example.shape[-1])
            example = np.array([np.std(channel, ddof=1) for channel in pixels.T])
        vectors.append(example.ravel() - example.mean())
    total = 0.0
    for (a, label_a), (b, label_b) in itertools.product(zip(vectors, labels), repeat=2):
        cosine = a @ b / ((np.sqrt(a @ a) + 1e-8) * (np.sqrt(b @ b) + 1e-8))
        target = 1.0 if label_a == label_b else -1 / (_NUM_CLASSES - 1)
        total += (cosine - target) ** 2
    return total / len(labels) ** 2


def _numpy_cross_entropy(logits, labels, smoothing):
    targets = np.eye(_NUM_CLASSES)[labels] * (1 - smoothing) + smoothing / _NUM_CLASSES
    return np.mean(-np.sum(targets * logits, -1) + np.log(np.sum(np.exp(logits), -1)))


def _finite_differences(fn, x, h=1e-6):
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = h
        gradient[index] = (fn(x + step) - fn(x - step)) / (2 * h)
    return gradient


@pytest.mark.parametrize("shape", _SHAPES)
def test_similarity_loss(shape):
    x = np.random.default_rng(0).standard_normal(shape)
    with jax.enable_x64(True):
        loss, gradient = jax.value_and_grad(similarity_loss)(x, _LABELS, _NUM_CLASSES)
    np.testing.assert_allclose(loss, _numpy_similarity_loss(x, _LABELS), rtol=1e-12)
    expected = _finite_differences(lambda x: _numpy_similarity_loss(x, _LABELS), x)
    np.testing.assert_allclose(gradient, expected, atol=1e-7)
    assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize("name", ["cross_entropy", "pred", "sim", "predsim"])
def test_loss_fn(name):
    rng = np.random.default_rng(0)
    config = LossConfig(name=name, similarity_weight=0.7, label_smoothing=0.1)
    output = {"logits": rng.standard_normal((5, 4)), "similarity": rng.standard_normal((5, 7))}
    weights = {"sim": (0.0, 1.0), "predsim": (0.3, 0.7)}.get(name, (1.0, 0.0))

    def expected(logits, similarity):
        return weights[0] * _numpy_cross_entropy(logits, _LABELS, 0.1) + weights[
            1
        ] * _numpy_similarity_loss(similarity, _LABELS)

    with jax.enable_x64(True):
        loss, gradients = jax.value_and_grad(make_loss_fn(config, _NUM_CLASSES))(output, _LABELS)
    logits, similarity = output["logits"], output["similarity"]
    np.testing.assert_allclose(loss, expected(logits, similarity), rtol=1e-12)
    np.testing.assert_allclose(
        gradients["logits"],
        _finite_differences(lambda x: expected(x, similarity), logits),
        atol=1e-8,
    )
    np.testing.assert_allclose(
        gradients["similarity"],
        _finite_differences(lambda x: expected(logits, x), similarity),
        atol=1e-7,
    )


def test_plain_logits_are_enough_for_the_cross_entropy():
    logits = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    for name in ("cross_entropy", "pred"):
        loss = make_loss_fn(LossConfig(name=name))(logits, _LABELS)
        np.testing.assert_allclose(loss, _numpy_cross_entropy(logits, _LABELS, 0.0), rtol=1e-6)


@pytest.mark.parametrize("shape", _SHAPES)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1])
def test_features_that_do_not_vary_have_finite_gradients(shape, value):
    x = np.full(shape, value, np.float32)
    loss, gradient = jax.value_and_grad(similarity_loss)(x, _LABELS, _NUM_CLASSES)
    assert np.isfinite(loss) and np.all(np.isfinite(gradient))
    if value == 0:  # Nothing is like anything.
        targets = np.where(_LABELS[:, None] == _LABELS, 1, -1 / 3)
        np.testing.assert_allclose(loss, np.mean(targets**2), rtol=1e-6)
        assert not np.any(gradient)


@pytest.mark.parametrize("shape", _SHAPES)
def test_one_example_or_one_channel_that_does_not_vary(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    reference = jax.grad(similarity_loss)(x, _LABELS, _NUM_CLASSES)
    x[1] = 0.0
    if _SHAPES[shape]:
        x[2, ..., 4] = 1.0
    loss, gradient = jax.value_and_grad(similarity_loss)(x, _LABELS, _NUM_CLASSES)
    assert np.isfinite(loss) and np.all(np.isfinite(gradient))
    assert not np.any(gradient[1])
    assert not _SHAPES[shape] or not np.any(gradient[2, ..., 4])
    assert np.abs(gradient).max() < 10 * np.abs(reference).max()
    similarity = similarity_matrix(x)
    assert not np.any(similarity[1]) and not np.any(similarity[:, 1])


def test_similarity_is_computed_in_float32_at_least():
    x = np.random.default_rng(0).standard_normal((5, 4, 3, 6))
    low = jnp.asarray(x, jnp.bfloat16)
    similarity = similarity_matrix(low)
    assert similarity.dtype == jnp.float32
    np.testing.assert_array_equal(similarity, similarity_matrix(low.astype(jnp.float32)))
    assert np.all(np.abs(similarity_matrix(jnp.ones((3, 2)).at[:, 0].set(0.1))) <= 1)


# ---- In a block.

_LEARNING_RATE, _MOMENTUM, _DECAY, _BETA, _MAX_FEATURES = 0.1, 0.9, 5e-4, 0.9, 50


def _two_blocks(small_network):
    """Layers of 5 and 6 channels on 6x6 images, predsim with a classifier that pools to 3x3."""
    layer = type(small_network.layers[0])
    network = Network("two", [layer(5), layer(6)], small_network.head)
    config = LossConfig(name="predsim", similarity_weight=_BETA)
    head = head_for_loss("predsim", make_auxiliary("pred", 4, max_features=_MAX_FEATURES))
    blocks = METHODS["dgl"].make_blocks(network, (0,), (head,), make_loss_fns(config, 2, 4))
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
    return blocks, optimizer


def test_gradient_through_a_block(small_network, small_batches):
    """Along random directions of all parameters, layers' and head's."""
    (block, _), optimizer = _two_blocks(small_network)
    batch = small_batches[0]
    with jax.enable_x64(True):
        x = batch.images.astype(np.float64)
        state = to_float64(init_block_state(block, optimizer, jax.random.key(0), x))

        @jax.jit
        def loss(params):
            _, output, _ = forward(block, params, state.batch_stats, x, train=True)
            return block.loss_fn(output, batch.labels)

        gradients = jax.grad(loss)(state.params)
        rng = np.random.default_rng(0)
        for _ in range(3):
            direction = jax.tree.map(lambda p: rng.standard_normal(p.shape), state.params)
            moved = lambda h, d: jax.tree.map(lambda p, d: p + h * d, state.params, d)
            slope = (loss(moved(1e-6, direction)) - loss(moved(-1e-6, direction))) / 2e-6
            products = jax.tree.map(lambda g, d: np.sum(g * d), gradients, direction)
            expected = sum(jax.tree.leaves(products))
            np.testing.assert_allclose(slope, expected, rtol=1e-5)


def _conv3x3(x, kernel):
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(
        jnp.einsum("bhwc,co->bhwo", padded[:, i : i + height, j : j + width], kernel[i, j])
        for i in range(3)
        for j in range(3)
    )


def _written_out_loss(params, x, labels, block):
    """One block's loss, from PredSim's formulas; and its output and batch statistics."""
    layer, head = params["layers"][0], params["head"]
    z = _conv3x3(x, layer["Conv_0"]["kernel"])
    mean, var = z.mean((0, 1, 2)), z.var((0, 1, 2))
    scale, bias = layer["BatchNorm_0"]["scale"], layer["BatchNorm_0"]["bias"]
    z = (z - mean[None, None, None]) / jnp.sqrt(var + 1e-5)[None, None, None]
    h = jnp.maximum(z * scale[None, None, None] + bias[None, None, None], 0)
    batch, height, width, channels = h.shape
    if block == 0:
        # Three rows and columns of 2x2 pixels: 3 * 3 * 5 <= 50 < 3 * 6 * 5.
        pooled = jnp.stack(
            [h[:, i : i + 2, j : j + 2].mean((1, 2)) for i in (0, 2, 4) for j in (0, 2, 4)], 1
        )
        dense, features = head["classifier"]["Dense_0"], pooled.reshape(batch, -1)
    else:
        dense, features = head["Dense_0"], h.mean((1, 2))
    logits = features @ dense["kernel"] + dense["bias"][None]
    log_sum = jnp.log(jnp.exp(logits).sum(-1))
    loss = jnp.mean(log_sum - logits[np.arange(batch), labels])
    if block == 0:
        maps = _conv3x3(h, head["similarity"]["kernel"]).reshape(batch, -1, channels)
        spread = jnp.sqrt(((maps - maps.mean(1, keepdims=True)) ** 2).sum(1) / (height * width - 1))
        centred = spread - spread.mean(1, keepdims=True)
        inner = centred @ centred.T
        norms = jnp.sqrt(jnp.diag(inner)) + 1e-8
        cosines = inner / (norms[:, None] * norms[None])
        targets = jnp.where(labels[:, None] == labels[None], 1, -1 / 3)
        loss = (1 - _BETA) * loss + _BETA * ((cosines - targets) ** 2).mean()
    return loss, (h, mean, var)


def test_two_blocks_match_predsim_written_out(small_network, small_batches):
    blocks, optimizer = _two_blocks(small_network)
    key = jax.random.key(0)
    with jax.enable_x64(True):
        shapes = [(2, 6, 6, 2), (2, 6, 6, 5)]
        states = [
            to_float64(init_block_state(block, optimizer, key, jnp.zeros(shape)))
            for block, shape in zip(blocks, shapes)
        ]
        steps = [jax.jit(make_block_step(block, optimizer)) for block in blocks]
        expected = [jax.device_get(state.params) for state in states]
        momenta = [jax.tree.map(np.zeros_like, params) for params in expected]
        stats = [(np.zeros(5), np.ones(5)), (np.zeros(6), np.ones(6))]
        gradient_fn = jax.jit(jax.value_and_grad(_written_out_loss, has_aux=True), static_argnums=3)
        for batch in small_batches[:10]:
            x = expected_x = batch.images.astype(np.float64)
            for block in (0, 1):
                output = steps[block](states[block], x, batch.labels, key)
                (loss, (h, mean, var)), gradients = gradient_fn(
                    expected[block], expected_x, batch.labels, block
                )
                momenta[block] = jax.tree.map(
                    lambda m, g, p: _MOMENTUM * m + g + _DECAY * p,
                    momenta[block],
                    gradients,
                    expected[block],
                )
                expected[block] = jax.tree.map(
                    lambda p, m: p - _LEARNING_RATE * m, expected[block], momenta[block]
                )
                stats[block] = tuple(
                    0.9 * old + 0.1 * new for old, new in zip(stats[block], (mean, var))
                )
                np.testing.assert_allclose(output.metrics["loss"], loss, rtol=1e-10)
                np.testing.assert_allclose(output.activations, h, atol=1e-10)
                states[block], x, expected_x = output.state, output.activations, h
        for block, state in enumerate(states):
            close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10)
            jax.tree.map(close, state.params, expected[block])
            statistics = state.batch_stats["layers"][0]["BatchNorm_0"]
            close(statistics["mean"], stats[block][0])
            close(statistics["var"], stats[block][1])


# ---- One loss a block.


def _mixed_blocks(small_network, small_head, per_block=("sim", "pred", "predsim")):
    config = LossConfig(per_block=per_block)
    heads = [head_for_loss(name, small_head) for name in local_losses(config, 4)]
    return METHODS["dgl"].make_blocks(
        small_network, (0, 1, 2), heads, make_loss_fns(config, 4, num_classes=4)
    )


def test_each_block_has_its_own_loss(small_network, small_head):
    blocks = _mixed_blocks(small_network, small_head)
    assert [block.classifies for block in blocks] == [False, True, True, True]
    assert blocks[0].head == SimilarityHead(None) and blocks[1].head is small_head
    assert blocks[2].head == SimilarityHead(small_head)
    assert blocks[3].head is small_network.head
    rng = np.random.default_rng(0)
    output = {"logits": rng.standard_normal((5, 4)), "similarity": rng.standard_normal((5, 7))}
    prediction = jnp.mean(cross_entropy(jnp.asarray(output["logits"]), _LABELS))
    similarity = similarity_loss(jnp.asarray(output["similarity"]), _LABELS, 4)
    expected = [similarity, prediction, 0.01 * prediction + 0.99 * similarity, prediction]
    losses = [block.loss_fn(jax.tree.map(jnp.asarray, output), _LABELS) for block in blocks]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def _train(blocks, placement, batches):
    """The losses of a few steps, and each head's logits after them."""
    config = Config(placement=placement)
    optimizer = make_optimizer(OptimizerConfig(schedule="constant"), 10, 5)
    placements = make_placements(placement, len(blocks))
    key = jax.random.key(0)
    state = TrainState(init_states(blocks, optimizer, key, (6, 6, 2), placements))
    runner = METHODS["dgl"].make_runner(config, blocks, optimizer, key, placements)
    batches, losses = jax.device_put(batches, placements[0].batch), []
    for tasks in METHODS["dgl"].make_schedule(config, len(blocks), 4, 2).tasks(0):
        state, metrics = runner.step(state, tasks, lambda step: batches[step])
        losses += [scalars["loss"] for scalars in metrics.values()]
        for block in blocks:
            assert ("top1" in metrics[block.index]) == block.classifies
    return np.array(jax.device_get(losses)), runner.logits(state.blocks, batches[0].images)


def test_mixed_losses_run_fused_and_pipelined(small_network, small_head, small_batches):
    blocks = _mixed_blocks(small_network, small_head)
    fused, _ = _train(blocks, PlacementConfig(), small_batches)
    pipelined, logits = _train(
        blocks, PlacementConfig(kind="pipelined", num_devices=4), small_batches
    )
    np.testing.assert_allclose(pipelined, fused, rtol=1e-4)
    assert logits.keys() == {1, 2, 3}


def test_data_parallel_blocks_compare_the_whole_batch(small_network, small_head, small_batches):
    blocks = _mixed_blocks(small_network, small_head, ("predsim",) * 3)[1:2]
    blocks = [dataclasses.replace(blocks[0], index=0)]
    one, two = (
        _train(blocks, PlacementConfig(data_parallel=devices), small_batches)[0]
        for devices in (1, 2)
    )
    np.testing.assert_allclose(two, one, rtol=1e-5)


def test_mistakes(small_head):
    with pytest.raises(UserError, match="per_block=.*'sim'.* give 3 for 4 blocks"):
        make_loss_fns(LossConfig(per_block=("sim", "pred")), 4, 10)
    with pytest.raises(UserError, match="num_classes=None: the predsim loss needs"):
        make_loss_fn(LossConfig(name="predsim"))
    block = Block(0, 0, (), small_head, make_loss_fn(LossConfig(name="sim"), 4))
    with pytest.raises(UserError, match="loss.name=sim needs a head with a similarity map"):
        block.loss_fn(jnp.zeros((5, 4)), _LABELS)
    assert local_losses(LossConfig(name="sim"), 1) == ()


# ---- Whole runs.


def _config(**sections):
    config = to_dict(Config())
    fields = {
        "network": {"name": "cnn4", "width_factor": 0.0625},
        "auxiliary": {"name": "pred"},
        "partition": {"strategy": "uniform", "num_blocks": 2},
        "optimizer": {
            "name": "adam",
            "learning_rate": 5e-3,
            "weight_decay": 0.0,
            "schedule": "constant",
        },
        "train": {"batch_size": 100, "num_steps": 60, "num_epochs": 0.0, "log_every_steps": 10},
        "eval": {"time_blocks": False},
    }
    for changes in (fields, sections):
        for section, values in changes.items():
            config[section] |= values
    return from_dict(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, partition, loss, classifiers",
    [
        ("dgl", {}, {"name": "predsim"}, [0, 1]),
        ("sequential", {}, {"name": "sim"}, [1]),
        ("dgl", {"num_blocks": 4}, {"per_block": ["sim", "pred", "predsim"]}, [1, 2, 3]),
    ],
)
def test_every_loss_trains_on_the_embedded_images(method, partition, loss, classifiers, tmp_path):
    config = _config(method={"name": method}, partition=partition, loss=loss)
    summary = train_and_evaluate(config, str(tmp_path))
    assert summary["classifiers"] == classifiers
    assert min(summary["test_top1"]) > 0.3  # Chance is 0.1.
    lines = read_metrics(tmp_path / "metrics.jsonl")
    for block in range(summary["num_blocks"]):
        name = f"train/block_{block}/loss"
        losses = [line[name] for line in lines if name in line]
        assert losses[-1] < 0.9 * losses[0]
        assert (f"test/block_{block}/top1" in lines[-1]) == (block in classifiers)


@pytest.mark.parametrize("labels, batch_size", [([0] * 48, 24), ([1] + [0] * 47, 2)])
def test_a_first_batch_of_one_class_is_refused_before_training(labels, batch_size, tmp_path):
    images = np.zeros((48, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    config = _config(
        data={"name": "arrays", "data_dir": str(tmp_path / "a.npz"), "crop_padding": 0},
        train={"batch_size": batch_size},
        loss={"name": "predsim"},
    )
    message = f"config.train.batch_size={batch_size}: the first batch has one class only"
    with pytest.raises(UserError, match=message) as error:
        train_and_evaluate(config, str(tmp_path / "run"))
    assert "predsim" in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "run").iterdir())


def test_the_wrong_number_of_losses_is_refused_before_training(tmp_path):
    with pytest.raises(UserError, match="per_block=.* give 1 for 2 blocks"):
        train_and_evaluate(_config(loss={"per_block": ["sim", "sim"]}), str(tmp_path))
    assert not list(tmp_path.iterdir())
