"""Cuts and heads from decision variables: the published ones, ties, and every way to cut."""

import itertools
import json
import pathlib

import numpy as np
import pytest

from dgl_jax.errors import UserError
from dgl_jax.partition import balanced_cuts, block_ranges
from dgl_jax.sedona.discretise import discretise, discretise_balanced, local_probabilities

_FOLDER = pathlib.Path(__file__).parents[1] / "experiments" / "published"
_PUBLISHED = {
    network: json.loads((_FOLDER / f"sedona_{network}.json").read_text())
    for network in ("vgg19", "resnet50", "resnet101", "resnet152")
}


# The cuts of the released code on its released decision variables; depths at K = 4.
@pytest.mark.parametrize(
    "network, expected, depths",
    [
        ("vgg19", {2: (5,), 4: (5, 12, 13), 8: (5, 7, 10, 11, 12, 13, 14)}, (4, 1, 1)),
        ("resnet50", {2: (9,), 4: (9, 10, 11), 8: (8, 9, 10, 11, 12, 13, 14)}, (4, 4, 4)),
        ("resnet101", {2: (6,), 4: (6, 10, 11), 8: (6, 10, 11, 21, 24, 26, 27)}, (4, 4, 4)),
        ("resnet152", {2: (10,), 4: (10, 12, 16), 8: (10, 12, 16, 18, 21, 22, 24)}, (4, 4, 4)),
    ],
)
def test_the_published_variables_give_the_published_cuts(network, expected, depths):
    alpha, beta = _PUBLISHED[network]["alpha"], _PUBLISHED[network]["beta"]
    groupings = {num_blocks: discretise(alpha, beta, num_blocks) for num_blocks in expected}
    assert {num_blocks: found.cuts for num_blocks, found in groupings.items()} == expected
    assert tuple(head + 1 for head in groupings[4].heads) == depths


def test_the_margin_tells_when_chance_decides():
    published = _PUBLISHED["resnet101"]
    margins = [
        discretise(published["alpha"], published["beta"], num_blocks).margin
        for num_blocks in (2, 8)
    ]
    assert margins[0] > 0.3 and 0 <= margins[1] < 1e-6
    alpha, beta = np.zeros((4, 2)), np.zeros((4, 3))
    tie = discretise(alpha, beta, 3)
    assert tie.cuts == (0, 1) and tie.heads == (0, 0) and tie.margin == 0
    assert discretise(alpha, beta, 1).margin is None and discretise(alpha, beta, 5).margin is None


def test_probabilities_are_a_softmax_however_large_alpha_is():
    alpha = [(0.0, 0.0), (1.0, -1.0), (-900.0, 900.0), (900.0, -900.0)]
    found = local_probabilities(alpha)
    np.testing.assert_allclose(found, [0.5, 1 / (1 + np.exp(-2)), 0, 1], atol=1e-12)


def test_the_more_probable_cut_is_taken_where_both_are_1_but_for_rounding():
    assert discretise([(40.0, 0.0), (60.0, 0.0)], [(0.0,), (0.0,)], 2).cuts == (1,)


def test_balanced_is_the_best_of_every_way_to_cut():
    rng = np.random.default_rng(0)
    for num_layers, num_blocks in itertools.product((5, 7), (1, 2, 3, 4)):
        alpha, beta = rng.normal(size=(num_layers - 1, 2)), rng.normal(size=(num_layers - 1, 4))
        layer_costs, head_costs = rng.uniform(1, 3, num_layers), rng.uniform(0, 1, num_layers)

        def slowest(cuts, layer_costs=layer_costs, head_costs=head_costs):
            ranges = block_ranges(len(layer_costs), cuts)
            return max(layer_costs[a:b].sum() + head_costs[b - 1] for a, b in ranges)

        probabilities = local_probabilities(alpha)
        bound = 1.2 * slowest(balanced_cuts(layer_costs, head_costs, num_blocks))
        ways = itertools.combinations(range(num_layers - 1), num_blocks - 1)
        kept = [cuts for cuts in ways if slowest(cuts) <= bound]
        best = max(kept, key=lambda cuts: sum(probabilities[cut] for cut in cuts))
        found = discretise_balanced(alpha, beta, num_blocks, layer_costs, head_costs, bound)
        assert found.cuts == best
        assert found.heads == tuple(beta[cut].argmax() for cut in best)
        unbound = discretise_balanced(alpha, beta, num_blocks, layer_costs, head_costs, np.inf)
        assert unbound.cuts == discretise(alpha, beta, num_blocks).cuts


def test_mistakes():
    alpha, beta = np.zeros((3, 2)), np.zeros((3, 4))
    with pytest.raises(
        UserError, match="num_blocks=5 must be between 1 and the network's 4 layers"
    ):
        discretise(alpha, beta, 5)
    with pytest.raises(UserError, match="max_block_cost=1 is less than what 2 blocks of these"):
        discretise_balanced(alpha, beta, 2, [1.0] * 4, [0.0] * 4, 1.0)
