"""DGL, Figure 6: asynchronous DGL with replay buffers of different sizes M, on CIFAR-10.

    python experiments/train.py --config=experiments/configs/figure6.py:M=5,block=3 \
        --workdir=runs/figure6_M5_block3_seed0 --config.data.data_dir=TFDS_DIR --config.seed=0

Every M, and the table:

    python experiments/compare_methods.py --config=experiments/configs/figure6.py \
        --variant=block=3 --seeds=3 --workdir=runs/figure6_block3 \
        --out=experiments/results/figure6_block3.md --config.data.data_dir=TFDS_DIR

Words: M=50, M=40, M=30, M=20, M=10, M=5, M=2, M=1 (mini-batches a buffer); block=0 to block=5
(which is slowed down, S = 1.2). A point of the figure is the mean over the six blocks and three
seeds.

Expected (the paper, read as text, no numbers are given): even a tiny buffer loses only slightly.
M = 50 in float32 takes 10.2 GiB for the five buffers.

Known differences: those of figure5.py, whose setting this is; the values of M are not listed in
the paper's text. BatchNorm's weights start from U(0, 1) here too.

The disk needs 31 GiB free at M = 50: room for three checkpoints with their buffers.
"""

from dgl_jax.config import default_config
from dgl_jax.data.statistics import DGL_CIFAR10_STD
from dgl_jax.variants import choose_words

WORDS = (
    ("M=50", "M=40", "M=30", "M=20", "M=10", "M=5", "M=2", "M=1"),
    tuple(f"block={block}" for block in range(6)),
)


def get_config(variant: str = ""):
    size, block = choose_words(variant, WORDS)
    config = default_config()
    config.method.name = "async_dgl"
    config.replay.buffer_size = int(size.removeprefix("M="))
    config.replay.slowdown = 1.2
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
