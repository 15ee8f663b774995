# %% [markdown]
# # Your own network, head and loss, trained by decoupled greedy learning
#
# A network is cut into blocks; each block gets a small head and learns from its own local loss.
# Here network, head and loss are defined from scratch, trained on a part of Fashion-MNIST that
# ships with the package, and then placed on two devices. Run it from top to bottom with
# `python docs/tutorial.py` (about a minute on two CPU cores), or cell by cell as a notebook.

# %%
import os
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from dgl_jax.config import Config, LossConfig, OptimizerConfig, PlacementConfig
from dgl_jax.data import load_dataset
from dgl_jax.evaluation import make_evaluate
from dgl_jax.losses import cross_entropy, make_loss_fn
from dgl_jax.methods import METHODS
from dgl_jax.models.layers import adaptive_avg_pool
from dgl_jax.models.network import Network
from dgl_jax.optim import make_optimizer
from dgl_jax.partition import per_layer_cuts
from dgl_jax.pipeline import init_states
from dgl_jax.placement import make_placements
from dgl_jax.types import TrainState

# %% [markdown]
# The environment may set how long to train and where the picture goes. The CPU is made to look
# like two devices, which must be said before jax uses one; on a host with two accelerators leave
# these two lines out.

# %%
STEPS = int(os.environ.get("TUTORIAL_STEPS", "300"))
PICTURE = pathlib.Path(os.environ.get("TUTORIAL_PICTURE", "runs/tutorial.png"))
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)

# %% [markdown]
# ## Data
# `batch_at(step)` is a function of the seed and the step: images float32 [B, H, W, C], normalised
# and augmented, and labels int32 [B].

# %%
data = load_dataset(name="embedded", batch_size=100, eval_batch_size=500, seed=0, crop_padding=0)
print(data.image_shape, data.num_classes, data.num_train, data.num_test)


# %% [markdown]
# ## A network
# Any list of flax modules and a head. `__call__` takes `x`, or `x` and `train` where a module
# needs to know, as BatchNorm does. A layer is the smallest unit at which the network may be cut.
# Variables are `params` and `batch_stats`, others are refused; dropout's is the one random stream.


# %%
class Layer(nn.Module):
    """Convolution, BatchNorm, ReLU; of stride 2 where it halves the image."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.features, (3, 3), strides=self.stride, use_bias=False)(x)
        return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))


class Classifier(nn.Module):
    """The network's own head."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(jnp.mean(x, axis=(1, 2)))


layers = [Layer(16), Layer(32, stride=2), Layer(32), Layer(64, stride=2)]
network = Network("mine", layers, Classifier(data.num_classes))


# %% [markdown]
# ## An auxiliary head
# Every block but the last gets one. A head returns logits, or a dictionary that has `logits` and
# whatever else the loss needs. This one has an embedding for a contrastive loss, and a linear
# probe: its `stop_gradient` keeps the probe's loss out of the block, so that its accuracy tells
# what the contrastive loss alone has taught the block.


# %%
class ProbedEmbedding(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x):
        x = adaptive_avg_pool(x, (2, 2))
        x = x.reshape(x.shape[0], -1)
        return {
            "embedding": nn.Dense(32)(nn.relu(nn.Dense(128)(x))),
            "logits": nn.Dense(self.num_classes, name="probe")(jax.lax.stop_gradient(x)),
        }


# %% [markdown]
# ## A local loss
# A function of what the head returns and the labels, to a scalar. This one is the supervised
# contrastive loss (Khosla et al. 2020): among all other examples of the batch, those of the same
# class are to be the most alike. The cross-entropy trains the probe.


# %%
def contrastive_loss(output, labels, temperature=0.1):
    z = output["embedding"]
    z = z / jnp.sqrt(jnp.sum(z**2, axis=-1, keepdims=True) + 1e-8)
    is_other = ~jnp.eye(len(labels), dtype=bool)
    is_same_class = is_other & (labels[:, None] == labels[None, :])
    similarity = jnp.where(is_other, z @ z.T / temperature, -jnp.inf)
    log_probability = jax.nn.log_softmax(similarity, axis=-1)
    num_same = jnp.maximum(jnp.sum(is_same_class, axis=-1), 1)
    per_example = -jnp.sum(jnp.where(is_same_class, log_probability, 0.0), axis=-1) / num_same
    return jnp.mean(per_example) + jnp.mean(cross_entropy(output["logits"], labels))


# %% [markdown]
# ## Blocks
# A method makes blocks of a network, the cuts, a head (one for all cuts, or one each) and a loss
# (one for all blocks, or one each). The last block has the network's own head, here with the
# cross-entropy. Every block has its own optimizer state, of one optax transformation.

# %%
method = METHODS["dgl"]
cuts = per_layer_cuts(len(layers))
num_blocks = len(cuts) + 1
losses = (contrastive_loss,) * len(cuts) + (make_loss_fn(LossConfig()),)
blocks = method.make_blocks(network, cuts, ProbedEmbedding(data.num_classes), losses)

optimizer_config = OptimizerConfig(learning_rate=0.1, weight_decay=1e-4, schedule="cosine")
optimizer = make_optimizer(optimizer_config, STEPS, data.steps_per_epoch)

# %% [markdown]
# ## Training
# A schedule says which block does what in each step; a runner does it on devices and returns at
# once, so nothing waits until a number is read. `make_evaluate` gives every head's accuracy. The
# same function serves any placement of the blocks.


# %%
def train(placement, num_steps, eval_every):
    """Returns [(step, accuracy of each block), ...]."""
    config = Config(placement=placement)
    key = jax.random.key(0)
    where = make_placements(placement, num_blocks)
    runner = method.make_runner(config, blocks, optimizer, key, where)
    evaluate = make_evaluate(runner.logits, where[-1], ensemble_last=1)
    states = init_states(blocks, optimizer, key, data.image_shape, where)
    images = jax.ShapeDtypeStruct((100, *data.image_shape), jnp.float32)
    state = TrainState(states, runner.init_memory(states, images))
    schedule = method.make_schedule(config, num_blocks, num_steps, data.steps_per_epoch)
    curve = []
    for step, tasks in enumerate(schedule.tasks(0), start=1):
        state, _ = runner.step(state, tasks, data.batch_at)
        if step % eval_every == 0:
            curve.append((step, evaluate(state.blocks, data.eval_batches("test"))["top1"]))
    return curve


# %% [markdown]
# **Fused**: all blocks in one program on one device, each block's backward pass right after its
# forward pass.

# %%
eval_every = max(1, STEPS // 10)
curve = train(PlacementConfig(kind="fused"), STEPS, eval_every)
for block, accuracy in enumerate(curve[-1][1]):
    print(f"block {block}: {accuracy:.1%} after {STEPS} steps")

# %% [markdown]
# ## A picture
# The accuracy of each block's head on the test images: of the probes for the first three blocks,
# of the network's own head for the last.

# %%
figure = Figure(figsize=(6, 4))
axes = figure.subplots()
for block in range(num_blocks):
    steps, accuracies = zip(*[(step, 100 * top1[block]) for step, top1 in curve])
    axes.plot(steps, accuracies, marker="o", ms=3, label=f"block {block}")
axes.set(xlabel="step", ylabel="test accuracy, %", title="A local contrastive loss")
axes.legend()
PICTURE.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(PICTURE)
print(f"saved {PICTURE}")

# %% [markdown]
# ## Two devices
# **Pipelined**: one program a block. Blocks 0 and 1 live on the first device, 2 and 3 on the
# second; activations move, no gradient comes back, so the first device works ahead of the second.
# Nothing else changes, and neither do the numbers, but for rounding: the first point of the curve
# again.

# %%
pipelined = PlacementConfig(kind="pipelined", num_devices=2)
for block, where in enumerate(make_placements(pipelined, num_blocks)):
    print(f"block {block} lives on {where.devices}")
((_, accuracies),) = train(pipelined, eval_every, eval_every)
for name, row in (("fused", curve[0][1]), ("pipelined", accuracies)):
    print(f"{name:9} after {eval_every} steps:", *(f"{accuracy:.1%}" for accuracy in row))
np.testing.assert_allclose(accuracies, curve[0][1], atol=0.01)

# %% [markdown]
# ## Further
# `METHODS["sequential"]` takes the same blocks; other methods make theirs by their own `make_blocks`,
# with the same arguments. Runs with checkpoints, logs and plots are `experiments/train.py`'s, of the
# networks, heads and losses in `models.NETWORKS`, `auxiliary.AUXILIARY` and `losses.make_loss_fn`: add
# yours there. What each method does is in [methods](methods).
