"""DGL, Figure 5: asynchronous DGL with one block slowed down by S, on CIFAR-10.

    python experiments/train.py --config=experiments/configs/figure5.py:S=1.2,block=3 \
        --workdir=runs/figure5_S1.2_block3_seed0 --config.data.data_dir=TFDS_DIR --config.seed=0

One block slowed down by every S, and the table:

    python experiments/compare_methods.py --config=experiments/configs/figure5.py \
        --variant=block=3 --seeds=3 --workdir=runs/figure5_block3 \
        --out=experiments/results/figure5_block3.md --config.data.data_dir=TFDS_DIR

Words: S=1.0 (all blocks alike), S=1.1 to S=2.0 in tenths, dgl (the synchronous control; no block
is slowed down); block=0 to block=5 (which). A point of the figure is the mean over
the six blocks and three seeds.

Expected (the paper, read as text, no numbers are given): at S = 1.0 the accuracy of synchronous
DGL; the same up to about S = 1.2; small losses up to S = 2.0. Buffers of M = 50.

Known differences: the ten values of S are not listed in the paper. Updates stop after 50 epochs
of each block and rates drop at 15, 30 and 45, as the text has it; the official code, with 51 and
17, 32, 47, and with its slip in choosing the slot that is read, is
--config.replay.accounting=official --config.replay.policy=official
--config.replay.warm_up=official. The code clamps probabilities in its loss to 1e-5; ours does
not. The text says five layers, the code has six.

BatchNorm's weights start from U(0, 1) (network.norm_init), as the official code's did with the
PyTorch of its time; with ones the upper blocks learn more slowly in the first epochs.

The disk needs 31 GiB free at M = 50: room for three checkpoints with their buffers.
"""

from dgl_jax.config import default_config
from dgl_jax.data.statistics import DGL_CIFAR10_STD
from dgl_jax.variants import choose_words

_SLOWDOWNS = tuple(f"S={1 + tenth / 10:.1f}" for tenth in range(11))
WORDS = ((*_SLOWDOWNS, "dgl"), tuple(f"block={block}" for block in range(6)))


def get_config(variant: str = ""):
    slowdown, block = choose_words(variant, WORDS)
    config = default_config()
    if slowdown == "dgl":
        config.method.name = "dgl"
    else:
        config.method.name = "async_dgl"
        config.replay.buffer_size = 50
        config.replay.slowdown = float(slowdown.removeprefix("S="))
        config.replay.slow_block = int(block.removeprefix("block="))
    config.network.name = "cnn6_async"
    config.network.norm_init = "uniform"
    config.partition.strategy = "per_layer"
    config.auxiliary.name = "mlp"
    config.data.name = "cifar10"
    config.data.crop_padding = 4
    config.data.std = DGL_CIFAR10_STD
    config.train.batch_size = 128
    config.train.num_epochs = 50.0
    config.eval.every_epochs = 5.0
    config.checkpoint.every_steps = 10**9  # Only then: one holds the buffers, 10 GiB at M = 50.
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = "step"
    config.optimizer.drop_epochs = (15.0, 30.0, 45.0)
    config.optimizer.drop_factor = 0.2
    config.optimizer.momentum_at_drop = "reset"
    return config
