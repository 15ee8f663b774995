"""Cuts, heads and devices as a configuration asks for them, and a run whose devices change."""

import itertools
import json

import numpy as np
import pytest

from dgl_jax import checkpoint, cost
from dgl_jax.config import default_config, from_dict
from dgl_jax.errors import UserError
from dgl_jax.grouping import choose_cuts_heads_and_devices, make_classifiers
from dgl_jax.methods import METHODS
from dgl_jax.metrics import read_metrics
from dgl_jax.models import make_network
from dgl_jax.train import train_and_evaluate


def _config(**fields):
    config = default_config()
    config.network.name, config.network.width_factor = "cnn4", 0.125
    config.placement.kind, config.placement.auto = "pipelined", True
    config.train.batch_size, config.eval.batch_size = 8, 12  # 1, 2 or 4 devices a block.
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return from_dict(config.to_dict())


def _choose(resolved=None, **fields):
    network = make_network("cnn4", 4, width_factor=0.125)
    return choose_cuts_heads_and_devices(_config(**fields), network, 4, (8, 8, 1), resolved)


def _stages(cuts, devices):
    """FLOPs of each block with an mlp_sr head, a device."""
    network = make_network("cnn4", 4, width_factor=0.125)
    heads = make_classifiers(_config(), ("mlp_sr",) * len(cuts), 4)
    costs = cost.block_costs(METHODS["dgl"].make_blocks(network, cuts, heads, None), (8, 8, 1))
    return [(c.layers_flops + c.head_flops) / n for c, n in zip(costs, devices, strict=True)]


def test_cuts_and_devices_together_are_as_fast_as_the_best_cuts_with_devices():
    cuts, heads, devices = _choose(
        partition__strategy="balanced", partition__num_blocks=2, placement__num_devices=5
    )
    slowest = {}
    for cut in range(3):
        given = {"partition__strategy": "explicit", "partition__cuts": (cut,)}
        kept, _, dealt = _choose(placement__num_devices=5, **given)
        assert kept == (cut,) and set(dealt) <= {1, 2, 4} and sum(dealt) <= 5
        # No other numbers are better.
        slowest[cut] = max(_stages(kept, dealt))
        assert slowest[cut] == min(
            max(_stages(kept, numbers))
            for numbers in itertools.product((1, 2, 4), repeat=2)
            if sum(numbers) <= 5
        )
    assert heads == ("mlp_sr",)
    assert max(_stages(cuts, devices)) == min(slowest.values()) < max(slowest.values())


def test_devices_are_dealt_for_every_way_to_cut():
    # All eight devices of the host; one block has as many as divide its batches.
    assert _choose(method__name="backprop") == ((), (), (4,))
    heads = {"auxiliary__per_block": ("sepconv_1", "pred", "mlp"), "loss__name": "predsim"}
    cuts, names, devices = _choose(**heads)
    assert (cuts, names) == ((0, 1, 2), heads["auxiliary__per_block"])
    assert len(devices) == 4 and sum(devices) <= 8
    # A resumed run keeps its cuts and heads, whatever costs are by now.
    resolved = {"cuts": [0], "heads": ["pred"]}
    fields = {"partition__strategy": "balanced", "partition__num_blocks": 2}
    cuts, names, devices = _choose(resolved, **fields, placement__num_devices=2)
    assert (cuts, names, devices) == ((0,), ("pred",), (1, 1))
    for given, num_devices, devices in (
        ([1, 2], 3, (1, 2)),  # As they were, whatever costs are by now.
        ([1, 2], 4, None),  # Another number of devices,
        ([], 3, None),  # not dealt before,
        ([1, 3], 3, None),  # or no divisors of the batches: anew.
    ):
        dealt = resolved | {"dealt_devices": given, "num_devices": 3}
        anew = _choose(resolved, **fields, placement__num_devices=num_devices)
        found = _choose(dealt, **fields, placement__num_devices=num_devices)
        assert found == ((*anew[:2], devices) if devices else anew)
    by_hand = {"placement__auto": False, "placement__devices_per_block": (1, 2)}
    assert _choose(resolved, **fields, **by_hand) == ((0,), ("pred",), ())


def test_more_blocks_than_devices():
    for fields in ({}, {"partition__strategy": "balanced", "partition__num_blocks": 4}):
        with pytest.raises(UserError, match="4 blocks need at least 4 devices, but there are 3"):
            _choose(placement__num_devices=3, **fields)


class _StoppedError(Exception):
    pass


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices(tmp_path, monkeypatch):
    fields = {
        "partition__strategy": "balanced",
        "partition__num_blocks": 2,
        "network__width_factor": 0.0625,
        "data__crop_padding": 0,
        "train__batch_size": 24,
        "train__num_epochs": 0.0,
        "train__num_steps": 6,
        "train__log_every_steps": 1,
        "checkpoint__every_steps": 3,
        "eval__batch_size": 1000,
        "eval__time_blocks": False,
    }
    whole = train_and_evaluate(_config(**fields, placement__num_devices=5), str(tmp_path / "whole"))
    devices = whole["devices_per_block"]
    assert len(devices) == 2 and sum(devices) == whole["num_devices"] > 2
    save = checkpoint.save

    def save_and_stop(checkpointer, *args, **kwargs):
        save(checkpointer, *args, **kwargs)
        checkpointer.wait()
        raise _StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_stop)
        with pytest.raises(_StoppedError):
            train_and_evaluate(
                _config(**fields, placement__num_devices=5), str(tmp_path / "resumed")
            )
    by_hand = {"placement__auto": False, "placement__devices_per_block": (1, 2)}
    assert devices != [1, 2]
    resumed = train_and_evaluate(_config(**fields, **by_hand), str(tmp_path / "resumed"))
    assert resumed["devices_per_block"] == [1, 2] and resumed["cuts"] == whole["cuts"]
    losses = [
        [
            [line[f"train/block_{block}/loss"] for block in range(2)]
            for line in read_metrics(tmp_path / name / "metrics.jsonl")
            if "train/block_0/loss" in line
        ]
        for name in ("whole", "resumed")
    ]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(resumed["test_loss"], whole["test_loss"], rtol=1e-4)
    resolved = json.loads((tmp_path / "resumed" / "config.json").read_text())["resolved"]
    assert resolved["cuts"] == whole["cuts"]
