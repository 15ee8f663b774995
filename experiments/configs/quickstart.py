"""The main job: synchronous DGL, one block a layer, on the embedded part of Fashion-MNIST.

    python experiments/train.py --config=experiments/configs/quickstart.py \
        --workdir=runs/quickstart

A four-layer network of the learning curves (Figures 3 and 4) at a quarter of its width, with
MLP-aux heads. About a minute on two CPU cores. Seen there: test accuracy by block 80.95,
87.60, 88.35, 87.80 %; backprop (--config.method.name=backprop) on the same budget 89.40 %.
"""

from dgl_jax.config import default_config


def get_config():
    config = default_config()
    config.method.name = "dgl"
    config.network.name = "cnn4"
    config.network.width_factor = 0.25
    config.partition.strategy = "per_layer"
    config.auxiliary.name = "mlp"
    config.data.name = "embedded"
    config.data.crop_padding = 0
    config.train.batch_size = 100
    config.train.num_epochs = 6.0
    config.optimizer.learning_rate = 0.1
    config.optimizer.schedule = "cosine"
    return config
