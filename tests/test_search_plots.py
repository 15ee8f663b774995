"""Pictures of a search: all are drawn from what the metrics have, whole or not."""

import json

import matplotlib.image
import numpy as np
import pytest

from dgl_jax.sedona.plots import plot_search

_LAYERS = 5


def _pretraining_line(step):
    losses = {f"pretrain/layer_{j}/loss": 2 / step + 1 / (j + 1) for j in range(_LAYERS)}
    return {"step": step, "pretrain/loss": 1.0} | losses


def _search_line(step, num_candidates):
    line = {"step": step, "search/validation_loss": 1 / step, "search/loss": 2 / step}
    line["search/validation_top1"] = step / 100
    for place in range(_LAYERS - 1):
        line[f"search/layer_{place}/local"] = (place + 1) / _LAYERS
        for head in range(num_candidates):
            line[f"search/layer_{place}/head_{head}"] = 1 / num_candidates
    return line


def _draw(folder, num_pretraining, num_outer, candidates, groupings):
    lines = [_pretraining_line(step + 1) for step in range(num_pretraining)]
    lines += [
        _search_line(num_pretraining + step + 1, len(candidates)) for step in range(num_outer)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        "network": "net",
        "dataset": "arrays",
        "num_layers": _LAYERS,
        "candidates": candidates,
        "pretraining_steps": num_pretraining,
        "outer_steps": num_outer,
        "groupings": groupings,
        "layer_flops": [0.0, 1e9, 3e9, 1e3, 1e9],
    }
    plot_search(str(folder), summary)
    drawn = {}
    for path in folder.glob("*.png"):
        drawn[path.stem] = matplotlib.image.imread(path)[..., :3]
    return drawn


_GROUPINGS = {
    "1": {"cuts": [], "heads": [], "margin": None},
    "2": {"cuts": [3], "heads": ["sepconv_1"], "margin": 0.2},
    "4": {"cuts": [1, 2, 3], "heads": ["mlp", "sepconv_1", "mlp"], "margin": 0.001},
}


@pytest.mark.parametrize(
    ("num_pretraining", "num_outer", "candidates", "groupings", "expected"),
    [
        (60, 50, ["sepconv_1", "mlp"], _GROUPINGS, "alpha beta groupings validation_loss"),
        (3, 1, ["a", "b", "c", "d", "e"], _GROUPINGS, "alpha beta groupings validation_loss"),
        (0, 2, ["sepconv_1"], _GROUPINGS, "alpha groupings validation_loss"),
        (4, 0, ["sepconv_1", "mlp"], {}, "validation_loss"),
        (0, 0, ["sepconv_1", "mlp"], {}, ""),
    ],
    ids=["whole", "one_outer_step", "one_candidate", "pretraining_only", "nothing"],
)
def test_all_that_there_are_numbers_for(
    num_pretraining, num_outer, candidates, groupings, expected, tmp_path
):
    drawn = _draw(tmp_path, num_pretraining, num_outer, candidates, groupings)
    assert sorted(drawn) == expected.split()
    for image in drawn.values():
        assert min(image.shape[:2]) > 200 and len(np.unique(image.reshape(-1, 3), axis=0)) > 50


def test_the_heat_map_has_layer_0_at_the_bottom(tmp_path):
    """P(local) rises with the layer, blue below 0.5 and red above."""
    image = _draw(tmp_path, 3, 2, ["mlp"], {})["alpha"]
    height, width = image.shape[:2]
    column = image[:, width // 2].astype(float)
    low, high = column[int(0.65 * height)], column[int(0.2 * height)]
    assert low[2] > low[0] + 0.2 and high[0] > high[2] + 0.2
