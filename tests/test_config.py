"""Every mistake in a configuration is one line with name, value, rule and remedy."""

import pytest

from dgl_jax.config import Config, check_same_run, default_config, from_dict, to_dict
from dgl_jax.errors import UserError


def _config(**fields):
    """A default configuration with dotted fields (written with __) changed."""
    config = default_config().to_dict()
    for name, value in fields.items():
        *groups, field = name.split("__")
        target = config
        for group in groups:
            target = target[group]
        target[field] = value
    return from_dict(config)


_DEALT = {"placement__kind": "pipelined", "placement__devices_per_block": (1, 4)}


def test_defaults_round_trip():
    assert from_dict(default_config().to_dict()) == Config()
    assert from_dict(to_dict(Config())) == Config()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"optimizer__learningrate": 0.1}, "did you mean config.optimizer.learning_rate"),
        ({"sed": 1}, "config.sed is not a known field; did you mean config.seed"),
        ({"optimizer": 3}, "config.optimizer=3 must be a group of fields"),
        ({"seed": 1.5}, "config.seed=1.5 must be of type int, not float"),
        ({"seed": True}, "config.seed=True must be of type int, not bool"),
        ({"partition__cuts": 3}, r"config.partition.cuts=3 must be a tuple; try \(3,\)"),
        ({"method__name": "dgll"}, "config.method.name='dgll' must be one of backprop, dgl"),
        ({"placement__kind": "x"}, "config.placement.kind='x' must be one of fused, pipelined"),
        ({"optimizer__learning_rate": 0.0}, "learning_rate=0.0 must be greater than 0"),
        ({"optimizer__learning_rate": float("nan")}, "learning_rate=nan must be a finite number"),
        ({"optimizer__momentum": 1.0}, "config.optimizer.momentum=1.0 must be less than 1"),
        ({"train__batch_size": 0}, "config.train.batch_size=0 must be at least 1"),
        ({"train__batch_size": 130, "placement__data_parallel": 4},
         "batch_size=130 must be divisible by config.placement.data_parallel=4; try 128"),
        ({"eval__batch_size": 510, "placement__data_parallel": 4}, "510 must be divisible"),
        ({"train__num_steps": 5}, "exactly one must be positive"),
        ({"train__num_epochs": 0.0}, "exactly one must be positive"),
        ({"train__steps_per_call": 4, "placement__kind": "pipelined"},
         "steps_per_call=4 is for config.placement.kind=fused and .* backprop, data_parallel, dgl"),
        ({"train__steps_per_call": 4, "method__name": "async_dgl"}, "steps_per_call=4 is for"),
        ({"train__steps_per_call": 4, "trace": True}, "trace=True shows single steps"),
        ({"method__name": "ddg", "network__scan_layers": True}, "ddg keeps what a layer's backward"),
        ({"train__steps_per_call": 8}, "log_every_steps=20 must be a multiple of .*=8; try 24"),
        ({"partition__strategy": "uniform"}, "num_blocks=0 must be at least 1"),
        ({"partition__cuts": (1,)}, "set config.partition.strategy=explicit"),
        ({"optimizer__drop_epochs": (30.0, 15.0)}, "strictly increasing"),
        ({"placement__num_devices": 4}, "a fused run uses"),
        ({"placement__one_after_another": False, "placement__kind": "pipelined"},
         "one_after_another=False is for config.method.name=dgl with .*=fused; leave it out"),
        ({"placement__one_after_another": False, "method__name": "dni"}, "leave it out"),
        ({"placement__num_devices": 3, "placement__data_parallel": 2}, "must be a multiple"),
        ({"train__num_epochs": float("inf")}, "num_epochs=inf must be a finite number"),
        ({"partition__num_blocks": 9}, "num_blocks=9 is not used with .*per_layer"),
        ({"partition__strategy": "balanced", "partition__num_blocks": 2,
          "partition__cuts": (1,)}, "set config.partition.strategy=explicit"),
        ({"eval__batch_size": 3, "placement__data_parallel": 4}, "try 4"),
        ({"optimizer__momentum_at_drop": "reset", "optimizer__schedule": "cosine"}, "not cosine"),
        ({"optimizer__nesterov": True, "optimizer__name": "adam"}, "does not apply to adam"),
        ({"loss__name": "simpred"}, "config.loss.name='simpred' must be one of cross_entropy, pred"),
        ({"loss__per_block": ("sim", "x")}, "'x' must be one of cross_entropy, pred, sim"),
        ({"loss__name": "predsim", "train__batch_size": 1}, "the predsim loss compares"),
        ({"loss__per_block": ("pred", "sim"), "train__batch_size": 1}, "the sim loss compares"),
        ({"loss__name": "sim", "method__name": "backprop"}, "=sim is a local loss, but"),
        ({"loss__per_block": ("pred",), "method__name": "ddg"}, "per_block=.* is for local losses"),
        ({"loss__per_block": ("pred",), "partition__strategy": "balanced",
          "partition__num_blocks": 2}, "weighs the same head at every cut"),
        ({"auxiliary__per_block": ("mlp",), "auxiliary__name": "cnn"}, "name=cnn is not used with"),
        ({"auxiliary__per_block": ("mlp",), "method__name": "dni"}, "those of .*=dni have none"),
        ({"auxiliary__per_block": ("mlp",), "partition__strategy": "balanced",
          "partition__num_blocks": 2}, "auxiliary.per_block=.* weighs the same head at every cut"),
        ({"auxiliary__per_block": ("mlp",), "partition__from_search": "f.json",
          "partition__num_blocks": 2, "partition__search_heads": False,
          "partition__max_imbalance": 1.5}, "max_imbalance=1.5 weighs heads before it is known"),
        ({"partition__strategy": "from_search", "partition__num_blocks": 2}, "needs a search's"),
        ({"partition__from_search": "f.json"}, "num_blocks=0 must be at least 1 with .*from_search"),
        ({"partition__search_heads": False}, "search_heads=False is used with .*from_search only"),
        ({"partition__max_imbalance": 1.5}, "max_imbalance=1.5 is used with .*from_search only"),
        ({"partition__from_search": "f.json", "partition__num_blocks": 2,
          "partition__max_imbalance": 0.5}, "max_imbalance=0.5 must be at least 1, as"),
        ({"loss__similarity_weight": 0.5}, "similarity_weight=0.5 is used by predsim only"),
        ({"loss__name": "predsim", "loss__similarity_weight": 1.5}, "must be at most 1"),
        ({**_DEALT, "placement__auto": True}, r"_block=\(1, 4\) is not used with .*auto=True"),
        ({**_DEALT, "placement__kind": "fused"}, "set config.placement.kind=pipelined"),
        ({"placement__auto": True}, "auto=True deals devices .* set config.placement.kind=pipelined"),
        ({**_DEALT, "placement__data_parallel": 2}, "data_parallel=2 is not used with .*per_block"),
        ({**_DEALT, "placement__devices_per_block": (1, 0)}, "must each be at least 1; give every"),
        ({**_DEALT, "placement__num_devices": 4},
         r"\(1, 4\) makes 5 devices, which exceeds config.placement.num_devices=4; leave"),
        ({**_DEALT, "train__batch_size": 130},
         r"batch_size=130 must be divisible by each of .*per_block=\(1, 4\); try 128"),
        ({**_DEALT, "eval__batch_size": 3}, "config.eval.batch_size=3 must be divisible .* try 4"),
        ({**_DEALT, "placement__devices_per_block": (2, 0), "method__name": "pipeline_backprop"},
         "must each be at least 1; give every"),
        ({**_DEALT, "method__name": "async_dgl_parallel"}, "is not for async_dgl_parallel, where"),
        ({"data__std": (0.2, 0.0, 0.2)}, "config.data.std=.* must be positive"),
    ],
)  # fmt: skip
def test_mistakes(fields, message):
    with pytest.raises(UserError, match=message) as error:
        _config(**fields)
    assert "\n" not in str(error.value)


def test_a_searchs_file_decides_cuts_and_heads_whatever_else_is_said():
    fields = {
        "partition__strategy": "explicit",
        "partition__cuts": (1, 2),
        "partition__num_blocks": 2,
        "partition__from_search": "f.json",
        "auxiliary__per_block": ("mlp", "cnn"),
    }
    config = _config(**fields)
    assert (config.partition.strategy, config.partition.cuts) == ("from_search", ())
    assert config.auxiliary.per_block == () and from_dict(to_dict(config)) == config
    config = _config(**fields, partition__search_heads=False)
    assert config.partition.cuts == () and config.auxiliary.per_block == ("mlp", "cnn")


def test_integers_are_floats_where_floats_are_asked_for():
    assert _config(optimizer__learning_rate=1).optimizer.learning_rate == 1.0
    assert _config(optimizer__drop_epochs=[1, 2]).optimizer.drop_epochs == (1.0, 2.0)


def test_a_run_goes_on_only_with_its_own_configuration():
    previous = to_dict(Config())
    check_same_run(_config(placement__kind="pipelined", eval__batch_size=100), previous, "w")
    with pytest.raises(UserError, match="config.seed=1, but workdir=w holds a run with 0"):
        check_same_run(_config(seed=1), previous, "w")
    with pytest.raises(UserError, match="config.optimizer.momentum=0.5, but .* with 0.9"):
        check_same_run(_config(optimizer__momentum=0.5), previous, "w")
