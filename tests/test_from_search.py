"""Training from a search's result: its file, the cuts and heads it gives, and a whole run."""

import json
import math
import pathlib

import jax
import pytest
from absl import logging

from dgl_jax import checkpoint, cost
from dgl_jax.auxiliary import make_heads
from dgl_jax.config import LOCAL_METHODS, default_config, from_dict
from dgl_jax.errors import UserError
from dgl_jax.grouping import choose_cuts_and_heads, make_classifiers
from dgl_jax.methods import METHODS
from dgl_jax.models import make_network
from dgl_jax.partition import slowest_block_cost
from dgl_jax.sedona.result import SearchResult, load_result, write_result
from dgl_jax.train import train_and_evaluate

_PUBLISHED = pathlib.Path(__file__).parents[1] / "experiments" / "published"

# Of cnn4's three places: the last is most probably local, then the first.
_RESULT = SearchResult(
    "cnn4",
    ("sepconv_1", "pred"),
    ((1.0, 0.0), (-1.0, 0.0), (2.0, 0.0)),
    ((0.5, 0.1), (0.0, 0.0), (0.1, 0.5)),
)


@pytest.fixture
def result_path(tmp_path) -> str:
    path = str(tmp_path / "result.json")
    write_result(path, _RESULT, {"steps": 3})
    return path


def _config(**fields):
    config = default_config()
    config.network.name, config.network.width_factor = "cnn4", 0.125
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return from_dict(config.to_dict())


def _choose(**fields):
    config = _config(**fields)
    network = make_network("cnn4", 4, width_factor=config.network.width_factor)
    return choose_cuts_and_heads(config, network, 4, (8, 8, 1))


# ---- The file.


def test_what_is_written_is_read(result_path):
    assert load_result(result_path, "cnn4", 4) == _RESULT
    assert json.loads(pathlib.Path(result_path).read_text())["steps"] == 3


@pytest.mark.parametrize("name, num_layers", [("vgg19", 16), ("resnet50", 16), ("resnet101", 33)])
def test_the_published_files_are_as_the_search_would_write_them(name, num_layers, tmp_path):
    path = _PUBLISHED / f"sedona_{name}.json"
    source = json.loads(path.read_text())["source"]
    write_result(str(tmp_path / "again"), load_result(str(path), name, num_layers),
                 {"source": source})  # fmt: skip
    assert (tmp_path / "again").read_text() == path.read_text()


@pytest.mark.parametrize(
    "changes, message",
    [
        ("{", "is no JSON"),
        ("[1]", "lacks 'network'"),
        ({"beta": None}, "lacks 'beta'"),
        ({"network": "vgg19"}, "is of the network vgg19, not of config.network.name=cnn4"),
        ({"candidates": []}, "'candidates' must be a list of heads' names"),
        ({"candidates": [1, 2]}, "'candidates' must be a list of heads' names"),
        ({"alpha": [[1, 0]] * 2}, "'alpha' has 2 rows, but the network has 3 places"),
        ({"beta": [[1, 0]] * 4}, "'beta' has 4 rows, but the network has 3 places"),
        ({"alpha": [[1, 0], [1, 0], [1]]}, "row 2 of 'alpha' must be 2 numbers"),
        ({"beta": [[1, 0], [1, 0, 0], [1, 0]]}, "row 1 of 'beta' must be 2 numbers"),
        ({"alpha": [[math.nan, 0], [1, 0], [1, 0]]}, "row 0 of 'alpha' must be .* finite"),
        ({"alpha": [[10**400, 0], [1, 0], [1, 0]]}, "row 0 of 'alpha' must be .* finite"),
        ({"beta": [["1", 0], [1, 0], [1, 0]]}, "row 0 of 'beta' must be 2 numbers"),
    ],
)
def test_mistakes_in_the_file(changes, message, result_path):
    if isinstance(changes, dict):
        content = json.loads(pathlib.Path(result_path).read_text()) | changes
        changes = json.dumps({k: value for k, value in content.items() if value is not None})
    pathlib.Path(result_path).write_text(changes)
    with pytest.raises(UserError, match=message) as error:
        load_result(result_path, "cnn4", 4)
    assert str(error.value).startswith(f"config.partition.from_search={result_path}")
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(UserError, match="cannot be read"):
            load_result(str(path), "cnn4", 4)


# ---- Cuts and heads.


def test_cuts_and_heads_of_a_search(result_path):
    fields = {"partition__from_search": result_path, "partition__num_blocks": 3}
    # Options of the configuration's own head do not stand in the way of the search's heads.
    chosen = _choose(**fields, auxiliary__name="mlp", auxiliary__max_hidden=8)
    assert chosen == ((0, 2), ("sepconv_1", "pred"))
    assert _choose(**fields | {"partition__num_blocks": 1}) == ((), ())
    # It has no say in heads where they are not asked for.
    assert _choose(**fields, partition__search_heads=False) == ((0, 2), ("mlp_sr",) * 2)
    by_hand = {"partition__search_heads": False, "auxiliary__per_block": ("cnn", "mlp")}
    assert _choose(**fields, **by_hand) == ((0, 2), ("cnn", "mlp"))
    assert _choose(**fields, method__name="ddg")[0] == (0, 2)
    assert _choose(**fields, method__name="backprop")[0] == ()


def test_heads_by_hand():
    assert _choose(auxiliary__per_block=("mlp", "cnn", "pred")) == (
        (0, 1, 2),
        ("mlp", "cnn", "pred"),
    )
    with pytest.raises(UserError, match=r"per_block=\('mlp',\) .* give 3 for 4 blocks"):
        _choose(auxiliary__per_block=("mlp",))
    with pytest.raises(UserError, match="auxiliary.per_block=.*the head 'x' is unknown"):
        _choose(auxiliary__per_block=("mlp", "cnn", "x"))
    # An option goes to those that have it, and is a mistake where none has.
    config = _config(auxiliary__per_block=("mlp", "pred", "pred"), auxiliary__max_hidden=8)
    heads = make_classifiers(config, config.auxiliary.per_block, 4)
    assert heads == make_heads(("mlp", "pred", "pred"), 4, max_hidden=8)
    with pytest.raises(UserError, match="max_hidden=8 does not apply to auxiliary.name=pred"):
        make_classifiers(config, ("pred",), 4)


@pytest.mark.parametrize("name", LOCAL_METHODS)
def test_every_method_with_local_losses_takes_a_head_a_block(name, small_network):
    heads = make_heads(("mlp", "sepconv_1", "pred"), 4)
    blocks = METHODS[name].make_blocks(small_network, (0, 1, 2), heads, None)
    assert [block.head for block in blocks] == [*heads, small_network.head]


def test_an_unknown_candidate_is_the_files_mistake(tmp_path):
    path = str(tmp_path / "result.json")
    write_result(path, SearchResult("cnn4", ("a", "pred"), _RESULT.alpha, _RESULT.beta), {})
    fields = {"partition__from_search": path, "partition__num_blocks": 2}
    with pytest.raises(UserError, match="from_search=.*result.json: the head 'a' is unknown"):
        _choose(**fields)
    assert _choose(**fields, partition__search_heads=False)[0] == (2,)


def test_the_slowest_block_is_bound(tmp_path):
    """The most probable place within the bound, with the cost of each place's own best head."""
    path = str(tmp_path / "result.json")
    alpha, beta = ((3.0, 0.0), (2.0, 0.0), (1.0, 0.0)), ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0))
    write_result(path, SearchResult("cnn4", ("cnn", "pred"), alpha, beta), {})
    network = make_network("cnn4", 4, width_factor=0.125)
    heads = make_heads(("pred", "cnn", "cnn"), 4)  # Of equal ones the first.
    costs = cost.layer_and_head_costs(network, heads, (8, 8, 1), 128, "flops")
    slowest = [slowest_block_cost(*costs, (place,)) for place in range(3)]
    assert len(set(slowest)) == 3 and slowest[0] > min(slowest)
    fields = {"partition__from_search": path, "partition__num_blocks": 2}
    assert _choose(**fields)[0] == (0,)
    assert _choose(**fields, partition__max_imbalance=1.0)[0] == (slowest.index(min(slowest)),)
    for place in (0, 1):
        for factor in (0.999, 1.001):
            bound = max(1.0, factor * slowest[place] / min(slowest))
            expected = next(p for p in range(3) if slowest[p] <= bound * min(slowest))
            assert _choose(**fields, partition__max_imbalance=bound)[0] == (expected,)


def test_a_choice_by_chance_is_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    path = str(tmp_path / "result.json")
    alpha = ((1.0, 0.0), (1.001, 0.0), (2.0, 0.0))
    write_result(path, SearchResult("cnn4", ("pred",), alpha, ((0.0,),) * 3), {})
    fields = {"partition__from_search": path}
    for num_blocks in (1, 2, 4):
        _choose(**fields, partition__num_blocks=num_blocks)
    assert not said
    assert _choose(**fields, partition__num_blocks=3)[0] == (1, 2)
    (line,) = said
    assert "at K=3" in line and "0.0002" in line and "chance" in line and "\n" not in line


# ---- A whole run.


class _StoppedError(Exception):
    pass


@pytest.mark.slow
def test_a_run_goes_on_without_the_file(arrays_path, result_path, tmp_path, monkeypatch):
    config = _config(
        partition__from_search=result_path,
        partition__num_blocks=3,
        auxiliary__features=24,
        data__name="arrays",
        data__data_dir=arrays_path,
        data__crop_padding=1,
        train__batch_size=24,
        train__num_epochs=0.0,
        train__num_steps=6,
        checkpoint__every_steps=3,
        eval__batch_size=25,
        eval__time_blocks=False,
    )
    whole = train_and_evaluate(config, str(tmp_path / "whole"))
    save, shapes = checkpoint.save, []

    def save_and_stop(checkpointer, step, state, **kwargs):
        save(checkpointer, step, state, **kwargs)
        checkpointer.wait()
        shapes.append([jax.tree.map(lambda x: x.shape, block.params) for block in state.blocks])
        raise _StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_stop)
        with pytest.raises(_StoppedError):
            train_and_evaluate(config, str(tmp_path / "stopped"))
    resolved = json.loads((tmp_path / "stopped" / "config.json").read_text())["resolved"]
    assert resolved["cuts"] == [0, 2] and resolved["heads"] == ["sepconv_1", "pred"]
    pathlib.Path(result_path).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        train_and_evaluate(config, str(tmp_path / "new"))
    summary = train_and_evaluate(config, str(tmp_path / "stopped"))
    assert summary["params_sha256"] == whole["params_sha256"]
    assert summary["heads"] == whole["heads"] == ["sepconv_1", "pred"]
    assert summary["cuts"] == [0, 2] and summary["auxiliary"] == "sepconv_1, pred"
    resolved_again = json.loads((tmp_path / "stopped" / "config.json").read_text())["resolved"]
    assert resolved_again == resolved

    # sepconv_1 ends in `features` channels, pred pools the map until 2048 numbers are left.
    first, second, _ = (jax.tree.leaves(tree["head"], is_leaf=_is_shape)
                        for tree in shapes[0])  # fmt: skip
    assert (24, 4) in first and sum(len(shape) == 4 for shape in first) == 3
    assert [len(shape) for shape in second] == [1, 2]


def _is_shape(leaf):
    return isinstance(leaf, tuple)
