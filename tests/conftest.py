"""Eight CPU devices, strict ranks, and small networks and data for every test."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Small networks take longer to compile than to run: let XLA optimise little.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# One cache of compiled programs for all tests, their processes and the scripts they run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dgl_jax_tests_")
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

from dgl_jax.models.network import Network
from dgl_jax.types import Batch


class SmallLayer(nn.Module):
    """Conv 3x3, BatchNorm, ReLU: a user's own layer."""

    features: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.features, (3, 3), use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x)
        return nn.relu(x)


class SmallHead(nn.Module):
    """Global average pool and a linear layer: a user's own head, with no train argument."""

    num_classes: int = 4

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(jnp.mean(x, axis=(1, 2)))


def to_float64(tree):
    """The same tree with its floats in float64; for use under ``jax.enable_x64``."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


@pytest.fixture
def small_network() -> Network:
    """Four layers on 6x6x2 images, four classes."""
    return Network("small", [SmallLayer(c) for c in (3, 4, 4, 5)], SmallHead())


@pytest.fixture
def small_head() -> nn.Module:
    return SmallHead()


@pytest.fixture
def small_batches() -> list[Batch]:
    """Twenty batches of eight 6x6x2 images in four classes."""
    rng = np.random.default_rng(0)
    return [
        Batch(
            rng.standard_normal((8, 6, 6, 2), dtype=np.float32),
            rng.integers(0, 4, 8).astype(np.int32),
        )
        for _ in range(20)
    ]


@pytest.fixture(scope="module")
def arrays_path(tmp_path_factory) -> str:
    """Four classes of 8x8 images: a bright quarter, in noise."""
    rng = np.random.default_rng(0)

    def images(labels):
        noise = rng.integers(0, 160, (len(labels), 8, 8))
        for image, label in zip(noise, labels):
            row, column = 4 * (label // 2), 4 * (label % 2)
            image[row : row + 4, column : column + 4] += 60
        return noise.astype(np.uint8)

    y_train, y_test = np.arange(240) % 4, np.arange(50) % 4
    path = tmp_path_factory.mktemp("data") / "arrays.npz"
    np.savez(path, x_train=images(y_train), y_train=y_train, x_test=images(y_test), y_test=y_test)
    return str(path)
