"""The main job: synchronous DGL, one block a layer, on the embedded part of Fashion-MNIST.

    python experiments/train.py --config=experiments/configs/quickstart.py \
        --workdir=runs/quickstart
"""

from dgl_jax.config import default_config


def get_config():
    config = default_config()
    config.network.name = "cnn4"
    config.network.width_factor = 0.5
    config.partition.strategy = "per_layer"
    config.auxiliary.name = "mlp_sr"
    config.data.name = "embedded"
    config.data.crop_padding = 2
    config.train.batch_size = 100
    config.train.num_epochs = 5.0
    config.optimizer.learning_rate = 0.1
    config.optimizer.schedule = "cosine"
    return config
