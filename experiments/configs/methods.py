"""All training methods on one network, one data set and one budget, one block a layer.

    python experiments/compare_methods.py --config=experiments/configs/methods.py --variant=short \
        --seeds=3 --workdir=runs/methods --out=runs/methods.md

Words: the methods in `WORDS`; full, short. One of them alone:

    python experiments/train.py --config=experiments/configs/methods.py:ddg,short \
        --workdir=runs/methods_ddg

full: CIFAR-10 with the network, the heads and the setting of DGL's Table 1 (50 epochs, K = 6).
Published there: dgl 91.2 %; nothing for the other methods on this network.

short: the embedded images and the quickstart's network (four layers at a quarter of the width,
MLP-aux heads, K = 4), three epochs: about 40 seconds a run on two CPU cores.

All have the same batches, epochs of updates a block, and SGD, but for what is noted below.
"""

from dgl_jax.config import default_config
from dgl_jax.data.statistics import DGL_CIFAR10_STD
from dgl_jax.variants import choose_words

WORDS = (
    (
        "dgl",
        "dgl_predsim",
        "sequential",
        "sequential_laps",
        "async_dgl",
        "async_dgl_bfloat16",
        "async_dgl_int8",
        "async_dgl_parallel",
        "backprop",
        "ddg",
        "ddg_current",
        "features_replay",
        "dni",
        "cdni",
    ),
    ("full", "short"),
)


def get_config(variant: str = ""):
    method, budget = choose_words(variant, WORDS)
    is_short = budget == "short"
    config = default_config()
    config.partition.strategy = "per_layer"
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    if is_short:
        config.network.name = "cnn4"
        config.network.width_factor = 0.25
        config.auxiliary.name = "mlp"
        config.data.name = "embedded"
        config.data.crop_padding = 0
        config.train.batch_size = 100
        config.train.num_epochs = 3.0
        config.optimizer.schedule = "cosine"
    else:
        config.network.name = "cnn6"
        config.auxiliary.name = "mlp_sr"
        config.data.name = "cifar10"
        config.data.crop_padding = 4
        config.data.std = DGL_CIFAR10_STD
        config.train.batch_size = 128
        config.train.num_epochs = 50.0
        config.optimizer.schedule = "step"
        config.optimizer.drop_epochs = (15.0, 30.0, 45.0)
        config.optimizer.drop_factor = 0.2

    if method == "dgl_predsim":
        config.method.name = "dgl"
        config.auxiliary.name = "pred"
        config.loss.name = "predsim"
        _use_adam(config, 5e-4)  # Nokland and Eidnes 2019.
    elif method == "sequential_laps":
        config.method.name = "sequential"
        config.method.laps = 3 if is_short else 5
    elif method == "ddg_current":
        config.method.name = "ddg"
        config.method.weights = "current"
    elif method == "async_dgl_parallel":
        config.method.name = method
        config.placement.kind = "pipelined"
        config.placement.num_devices = 2 if is_short else 0  # Two cores; or what GPUs there are.
    elif method.startswith("async_dgl"):
        config.method.name = "async_dgl"
        config.replay.buffer_dtype = method.removeprefix("async_dgl").strip("_") or "float32"
    else:
        config.method.name = method
    if method.startswith("async_dgl"):
        config.replay.buffer_size = 10 if is_short else 50
    if method in ("dni", "cdni"):
        # Diverges at SGD's usual rates (DGL, section 4.1), where it has 3e-5 and 1,500 epochs.
        config.auxiliary.name = "synthesizer"
        _use_adam(config, 1e-3 if is_short else 3e-4)
    return config


def _use_adam(config, learning_rate: float) -> None:
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = learning_rate
    config.optimizer.weight_decay = 0.0
