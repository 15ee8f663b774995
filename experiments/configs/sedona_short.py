"""What a short search found against other groupings, on a small ResNet-18 and embedded images.

    python experiments/search.py --config=experiments/configs/sedona_search.py:resnet18,short \
        --workdir=runs/search_short
    python experiments/train.py --config=experiments/configs/sedona_short.py \
        --workdir=runs/retrain_short \
        --config.partition.from_search=runs/search_short/search.json

Words: sedona (the grouping that was found), sedona_bounded (with the slowest block bounded),
uniform (uniform cuts, the candidate of depth 1 at each), dgl (uniform cuts, MLP-SR-aux),
random_1, random_2, random_3 (cuts and heads drawn at random), predsim, backprop; K=4, K=2. All
rows, three seeds, with the committed result of the search of seed 0:

    python experiments/compare_methods.py --config=experiments/configs/sedona_short.py --seeds=3 \
        --workdir=runs/sedona_short --out=experiments/results/sedona_short.md

Three epochs with 300 steps' worth of search: about a minute a run on two CPU cores.
"""

import itertools
import pathlib

from dgl_jax.config import default_config
from dgl_jax.sedona.random_groupings import draw_groupings
from dgl_jax.variants import choose_words

WORDS = (
    (
        "sedona",
        "sedona_bounded",
        "uniform",
        "dgl",
        "random_1",
        "random_2",
        "random_3",
        "predsim",
        "backprop",
    ),
    ("K=4", "K=2"),
)
_NUM_LAYERS = 8
_CANDIDATES = ("sepconv_1", "sepconv_2", "sepconv_3", "sepconv_4")
_FOUND = pathlib.Path(__file__).resolve().parents[1] / "results" / "search_short" / "search.json"


def get_config(variant: str = ""):
    method, blocks = choose_words(variant, WORDS)
    num_blocks = int(blocks.removeprefix("K="))
    config = default_config()
    config.method.name = "backprop" if method == "backprop" else "dgl"
    config.network.name = "resnet18"
    config.network.width_factor = 0.125
    config.partition.strategy = "uniform"
    config.partition.num_blocks = 4 if method == "backprop" else num_blocks
    config.loss.label_smoothing = 0.1
    if method in ("sedona", "sedona_bounded"):
        config.partition.from_search = str(_FOUND)
        config.partition.max_imbalance = 1.25 if method == "sedona_bounded" else 0.0
    elif method == "uniform":
        config.auxiliary.name = "sepconv_1"
    elif method.startswith("random"):
        draws = draw_groupings(_NUM_LAYERS, num_blocks, _CANDIDATES, seed=0)
        index = int(method.removeprefix("random_")) - 1
        config.partition.strategy = "explicit"
        config.partition.num_blocks = 0
        config.partition.cuts, config.auxiliary.per_block = next(
            itertools.islice(draws, index, None)
        )
    elif method == "predsim":
        config.auxiliary.name = "pred"
        config.auxiliary.max_features = 512
        config.loss.name = "predsim"
        config.loss.label_smoothing = 0.0
    if method not in ("dgl", "predsim", "backprop"):
        config.auxiliary.features = 64
        config.auxiliary.reduction = 1
    config.data.name = "embedded"
    config.data.crop_padding = 0
    config.train.batch_size = 100
    config.train.num_epochs = 3.0
    config.eval.time_blocks = False
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.min_learning_rate = 1e-3
    return config
