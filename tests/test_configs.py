"""Every variant of every configuration file is valid, and says what was published."""

import functools
import itertools
import pathlib
import runpy

import pytest
from absl import flags
from ml_collections import config_flags

from dgl_jax.auxiliary import OPTIONS, make_heads
from dgl_jax.config import SearchConfig, from_dict
from dgl_jax.errors import UserError
from dgl_jax.grouping import choose_cuts_and_heads
from dgl_jax.models import check_image_shape, layer_shapes, make_network
from dgl_jax.partition import check_num_blocks
from dgl_jax.variants import choose_words

_FOLDER = pathlib.Path(__file__).parents[1] / "experiments" / "configs"
_ALL = {path.stem: runpy.run_path(str(path)) for path in sorted(_FOLDER.glob("*.py"))}
_SEARCHES = {name: _ALL[name] for name in ("sedona_search",)}
_FILES = {name: file for name, file in _ALL.items() if name not in _SEARCHES}
_IMAGE_SHAPES = {
    "arrays": (28, 28, 1),
    "embedded": (28, 28, 1),
    "cifar10": (32, 32, 3),
    "tiny_imagenet": (64, 64, 3),
}


def _load(name, variant=""):
    file = _FILES[name]
    config = file["get_config"](variant) if "WORDS" in file else file["get_config"]()
    return from_dict(config.to_dict())


@functools.cache
def _network(network_config, image_shape):
    config = network_config
    network = make_network(
        config.name, 10, form=config.form, width_factor=config.width_factor, dropout=config.dropout
    )
    if len(network.layers) < 20:  # Shapes of the deep ones are tests/test_models.py's.
        check_image_shape(network, image_shape)
    return network


def _cut_network(config):
    shape = _IMAGE_SHAPES.get(config.data.name) or (config.data.image_size,) * 2 + (3,)
    network = _network(config.network, shape)
    return network, *choose_cuts_and_heads(config, network, 10, shape)


@pytest.mark.parametrize("name", _FILES)
def test_every_variant_is_a_valid_configuration(name):
    variants = itertools.product(*_FILES[name].get("WORDS", ()))
    configs = {variant: _load(name, ",".join(variant)) for variant in variants}
    for config in configs.values():
        _, cuts, heads = _cut_network(config)
        assert (config.method.name == "backprop") == (cuts == ())
        assert len(heads) == len(cuts)

    # Every word makes a difference, but for which block is slowed down where none is, and into
    # how many blocks SEDONA's files cut what backprop trains.
    def meaning(variant):
        unused = ()
        if name == "figure5" and "dgl" in variant:
            unused = ("block=",)
        if name.startswith("sedona") and "backprop" in variant:
            unused = ("K=",)
        return tuple(word for word in variant if not word.startswith(unused))

    found = {}
    for variant, config in configs.items():
        assert found.setdefault(meaning(variant), config) == config
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("name", _SEARCHES)
def test_every_variant_is_a_valid_search(name):
    variants = list(itertools.product(*_SEARCHES[name]["WORDS"]))
    configs = [
        from_dict(_SEARCHES[name]["get_config"](",".join(words)).to_dict(), SearchConfig)
        for words in variants
    ]
    assert len(set(configs)) == len(variants)
    for words, config in zip(variants, configs):
        network = _network(config.network, _IMAGE_SHAPES[config.data.name])
        for num_blocks in config.search.num_blocks:
            check_num_blocks(len(network.layers), num_blocks)
        options = {option: getattr(config.auxiliary, option) for option in OPTIONS}
        assert len(make_heads(config.search.candidates, 10, **options)) == (
            1 if "cuts_only" in words else 4
        )


def test_the_published_search():
    config = from_dict(_SEARCHES["sedona_search"]["get_config"]("").to_dict(), SearchConfig)
    search = config.search
    assert config.data.validation_fraction == 0.4 and config.loss.label_smoothing == 0.1
    assert (search.num_pretraining_steps, search.num_outer_steps) == (40_000, 2_000)
    assert (search.num_inner_steps, search.num_snapshots) == (5, 50)
    assert (search.batch_size, search.validation_batch_size) == (128, 1024)
    assert (search.learning_rate, search.b1, search.b2) == (1e-2, 0.5, 0.999)
    assert (config.optimizer.learning_rate, config.optimizer.min_learning_rate) == (0.1, 1e-3)


# Of each row: blocks, head, mini-batch, epochs, learning rate, its drops and their factor, L2.
_CIFAR = (128, 50, 0.1, (15, 30, 45), 0.2, 5e-4)
_RESNET110 = (128, 300, 0.01, (150, 225), 0.1, 5e-4)
_IMAGENET = (256, 50, 0.1, (10, 20, 30, 40), 0.1, 1e-4)
_PUBLISHED = {
    ("table1", "mlp_sr"): (6, "mlp_sr", *_CIFAR),
    ("table1", "mlp"): (6, "mlp", *_CIFAR),
    ("table1", "cnn"): (6, "cnn", *_CIFAR),
    ("figure34", "dgl"): (4, "mlp_sr", *_CIFAR),
    ("figure34", "sequential"): (4, "mlp_sr", *_CIFAR),
    ("figure5", "S=1.2,block=3"): (6, "mlp", *_CIFAR),
    ("figure5", "dgl"): (6, "mlp", *_CIFAR),
    ("figure6", "M=5"): (6, "mlp", *_CIFAR),
    ("methods", "ddg"): (6, "mlp_sr", *_CIFAR),
    ("figure2", "dgl"): (3, "synthesizer", 256, 1500, 3e-5, None, None, 0),
    ("table2", "dgl"): (2, "mlp_sr", *_RESNET110),
    ("table2", "ddg,K=4"): (4, "mlp_sr", *_RESNET110),
    ("table3", "vgg13_K=10"): (10, "mlp_sr", *_IMAGENET),
    ("table3", "vgg13_K=4"): (4, "mlp_sr", *_IMAGENET),
    ("table3", "vgg13_backprop"): (1, None, *_IMAGENET),
    ("table3", "vgg19_K=4"): (4, "mlp_sr", *_IMAGENET),
    ("table3", "vgg19_K=2"): (2, "mlp_sr", *_IMAGENET),
    ("table3", "resnet152_K=2"): (2, "mlp_sr", *_IMAGENET),
    ("sedona_cifar10", "dgl,vgg19"): (4, "mlp_sr", 128, 0, 0.1, None, None, 1e-4),
    ("sedona_cifar10", "predsim,resnet101"): (4, "pred", 128, 0, 0.1, None, None, 1e-4),
    ("sedona_cifar10", "dgl,vgg19,K=8"): (8, "mlp_sr", 128, 0, 0.1, None, None, 1e-4),
    ("sedona_cifar10", "sedona,vgg19,K=2"): (2, "sepconv_4", 128, 0, 0.1, None, None, 1e-4),
    ("sedona_cifar10", "sedona,resnet152"): (4, "sepconv_4", 128, 0, 0.1, None, None, 1e-4),
    ("sedona_imagenet", "sedona,resnet101,K=4"): (4, "sepconv_4", 256, 0, 0.1, None, None, 1e-4),
    ("sedona_imagenet", "dgl,resnet152,K=2"): (2, "mlp_sr", 256, 0, 0.1, None, None, 1e-4),
    ("sedona_imagenet", "backprop,resnet101"): (1, None, 256, 0, 0.1, None, None, 1e-4),
    ("sedona_tiny_imagenet", "sedona,resnet50"): (4, "sepconv_4", 256, 0, 0.1, None, None, 1e-4),
}


@pytest.mark.parametrize("name, variant", _PUBLISHED)
def test_blocks_heads_and_schedules_are_the_published_ones(name, variant):
    config = _load(name, variant)
    _, cuts, heads = _cut_network(config)
    optimizer, train = config.optimizer, config.train
    is_step = optimizer.schedule == "step"
    assert (
        len(cuts) + 1,
        ", ".join(dict.fromkeys(heads)) or None,
        train.batch_size,
        train.num_epochs,
        optimizer.learning_rate,
        optimizer.drop_epochs if is_step else None,
        optimizer.drop_factor if is_step else None,
        optimizer.weight_decay,
    ) == _PUBLISHED[name, variant]
    if optimizer.name == "sgd":
        assert optimizer.momentum == 0.9


@pytest.mark.parametrize(
    "name, variant, shapes",
    [
        ("table1", "", [(128, 32), (256, 16), (256, 16), (512, 8), (512, 8), (512, 8)]),
        ("figure34", "", [(64, 32), (128, 16), (128, 16), (256, 8)]),
        ("figure5", "", [(128, 32), (128, 32), (256, 16), (256, 16), (512, 8), (512, 8)]),
        ("figure2", "", [(128, 10), (128, 3), (128, 1)]),
        ("sedona_cifar10", "dgl,vgg19", [(16, 32)] * 2 + [(32, 16)] * 2 + [(64, 8)] * 4),
    ],
)
def test_widths_and_sizes_are_the_published_ones(name, variant, shapes):
    network, *_ = _cut_network(_load(name, variant))
    found = layer_shapes(network, (32, 32, 3))[: len(shapes)]
    assert [(width, height) for _, height, _, width in found] == shapes


def test_cuts_are_those_of_the_official_code():
    cuts = {
        ("table2", "dgl"): (25,),  # Of 58 modules 29 below: the stem's three, 26 of 54 blocks.
        ("table3", "vgg13_K=4"): (2, 5, 8),
        ("table3", "vgg19_K=4"): (3, 7, 11),
        ("table3", "vgg19_K=2"): (7,),
        ("table3", "resnet152_K=2"): (24,),  # The stem and 25 of 50 bottlenecks.
        ("sedona_cifar10", "dgl,resnet50"): (3, 7, 11),
        ("sedona_cifar10", "dgl,resnet101"): (7, 15, 23),
        ("sedona_imagenet", "sedona,resnet101,K=4"): (6, 10, 11),
        ("sedona_tiny_imagenet", "sedona,vgg19"): (5, 12, 13),
    }
    assert {key: _cut_network(_load(*key))[1] for key in cuts} == cuts
    assert _cut_network(_load("sedona_cifar10", "sedona,vgg19"))[2] == (
        "sepconv_4",
        "sepconv_1",
        "sepconv_1",
    )


def test_what_else_the_papers_set():
    assert _load("table3", "vgg19_backprop").network.dropout == 0.5
    assert _load("table3", "vgg19_K=2").network.dropout == 0.0
    assert [_load("table2", method).optimizer.nesterov for method in ("ddg", "dgl")] == [
        True,
        False,
    ]
    assert _load("table1").optimizer.momentum_at_drop == "keep"
    for name in ("table2", "table3", "figure5", "figure6"):
        assert _load(name).optimizer.momentum_at_drop == "reset"
    replay = _load("figure5", "block=3,S=1.2").replay
    assert (replay.buffer_size, replay.slowdown, replay.slow_block) == (50, 1.2, 3)
    replay = _load("figure6", "M=2,block=5").replay
    assert (replay.buffer_size, replay.slowdown, replay.slow_block) == (2, 1.2, 5)
    assert _load("figure2", "cdni").optimizer.name == "adam"
    config = _load("sedona_cifar10", "dgl,resnet152")
    assert config.train.num_steps == 64_000 and config.network.width_factor == 0.25
    assert config.optimizer.schedule == "cosine" and config.optimizer.min_learning_rate == 1e-3
    assert config.data.crop_padding == 2 and config.data.validation_fraction == 0.1
    assert config.loss.label_smoothing == 0.1
    for name, steps, features in (("cifar10", 64_000, 512), ("tiny_imagenet", 30_000, 2048),
                                  ("imagenet", 600_000, 2048)):  # fmt: skip
        config = _load(f"sedona_{name}", "sedona,resnet152")
        assert (config.train.num_steps, config.auxiliary.features) == (steps, features)
        assert config.network.width_factor == features / 2048
        assert config.loss.label_smoothing == 0.1 and config.auxiliary.reduction == 4
    loss = _load("sedona_cifar10", "predsim,resnet152").loss
    assert (loss.name, loss.similarity_weight, loss.label_smoothing) == ("predsim", 0.99, 0.0)


def test_words():
    groups = (("S=1.0", "S=1.2"), ("block=0", "block=3"))
    assert choose_words("", groups) == ("S=1.0", "block=0")
    assert choose_words("block=3,S=1.2", groups) == ("S=1.2", "block=3")
    with pytest.raises(UserError, match="'S=3' is unknown; choose from S=1.0, S=1.2; block=0"):
        choose_words("S=3", groups)
    with pytest.raises(UserError, match="S=1.0 and S=1.2 exclude each other"):
        choose_words("S=1.0,S=1.2", groups)


@pytest.mark.filterwarnings("ignore:the load_module")  # Of ml_collections.
def test_words_on_the_command_line():
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(["", f"--config={_FOLDER / 'figure5.py'}:S=1.2,block=3"])
    assert from_dict(values.config.to_dict()) == _load("figure5", "S=1.2,block=3")
