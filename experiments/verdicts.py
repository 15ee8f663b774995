"""What holds: each figure of the papers and each claim, beside what was measured."""

import collections
import math
import statistics
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import evidence
from run_folders import FULL, Run, group, point, settings_of

HOLDS, FAILS, UNDECIDED, NOT_RUN = "holds", "does not hold", "not decided", "not run"
# The standard deviations that are assumed where there is one seed only, ours or published. Per cent:
# at the end; at the end of reduced settings (what their seeds have, on average); and before the
# end, where rates are high and accuracies jump. And of other units; of a loss, this part of it.
SPREAD, REDUCED_SPREAD, EARLY_SPREAD = 0.5, 1.1, 2.0
SPREAD_OF_UNIT = {
    evidence.FLOPS: 0.0,
    evidence.GIGA: 0.0,
    evidence.DISTANCE: 0.02,
    evidence.PART: 0.5,
}
SPREAD_OF_LOSS = 0.05
# Per cent by which a figure may miss the published one beyond its error and still be near; in units
# other than per cent so much of the published one.
NEAR, NEAR_PART = 1.0, 0.1
CONFIDENCE = 0.95
_COLOURS = {
    HOLDS: "green",
    UNDECIDED: "amber",
    FAILS: "red",
    NOT_RUN: "grey",
}


class Measured(NamedTuple):
    """A mean over seeds and their standard deviation: a sample's, or of one `assumed_spread`.

    Attributes:
      is_whole: whether each word of the row's `each` has a run.
      by_seed: each seed's figure.
    """

    mean: float
    deviation: float
    seeds: int
    is_whole: bool = True
    by_seed: Mapping[int, float] = types.MappingProxyType({})


def assumed_spread(row: evidence.Row, figure: float, is_reduced: bool = False) -> float:
    """The standard deviation of a row's single figure, at the full or a reduced setting."""
    if row.quantity == "rate_sum":
        return 0.0
    if row.unit == evidence.LOSS:
        return SPREAD_OF_LOSS * figure
    if row.unit in SPREAD_OF_UNIT:
        return SPREAD_OF_UNIT[row.unit]
    if row.epoch is not None or row.share is not None:
        return EARLY_SPREAD
    return REDUCED_SPREAD if is_reduced else SPREAD


def half_interval(measured: Sequence[Measured]) -> float:
    """Half of the 95 % confidence interval of a sum or difference of independent means.

    Student's quantile at Welch's degrees of freedom; of one seed the deviation counts as known.
    """
    variances = [one.deviation**2 / one.seeds for one in measured]
    if not sum(variances):
        return 0.0
    unknown = sum(v**2 / (one.seeds - 1) for v, one in zip(variances, measured) if one.seeds > 1)
    freedom = sum(variances) ** 2 / unknown if unknown else math.inf
    from scipy import stats  # Takes half a second.

    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(sum(variances))


def compare(
    comparison: evidence.Comparison, measured: Mapping[str, Measured]
) -> tuple[str, float | None, float | None]:
    """Decides ``a - b > by`` by the 95 % confidence interval of the difference.

    Args:
      comparison: what is compared.
      measured: by the row's label; a row that was not run is missing.

    Returns:
      The verdict, a - b, and half of the interval. It holds if a - b is above `by` by more than
      this, and does not hold if it is below by more. Between it is not decided; nor is it if a row
      has no run yet for some of its words. Where both have two seeds or more in common, these are
      compared, seed by seed: a seed decides the layers' initial weights and the order of the images,
      whatever the method.
    """
    a, b = (measured.get(x) if isinstance(x, str) else Measured(x, 0.0, 1) for x in comparison[:2])
    if a is None or b is None:
        return NOT_RUN, None, None
    difference, compared = a.mean - b.mean, [a, b]
    common = a.by_seed.keys() & b.by_seed.keys()
    if len(common) > 1:
        pairs = [a.by_seed[seed] - b.by_seed[seed] for seed in common]
        difference = statistics.fmean(pairs)
        compared = [Measured(difference, statistics.stdev(pairs), len(pairs))]
    error = half_interval(compared)
    if abs(difference - comparison.by) <= error or not (a.is_whole and b.is_whole):
        return UNDECIDED, difference, error
    return HOLDS if difference > comparison.by else FAILS, difference, error


def decide(claim: evidence.Claim, measured: Mapping[str, Measured]) -> str:
    """Holds if all comparisons do, does not hold if one does not, not run if none was run.

    Not decided otherwise: some are not decided, or some were not run.
    """
    verdicts = {compare(comparison, measured)[0] for comparison in claim.comparisons}
    if FAILS in verdicts:
        return FAILS
    return verdicts.pop() if len(verdicts) == 1 else UNDECIDED


def judge(row: evidence.Row, measured: Mapping[str, Any] | None) -> dict[str, Any]:
    """A figure against the published one, by the 95 % confidence interval of their difference."""
    nothing = {"difference": None, "error": None}
    if measured is None:
        return {"verdict": NOT_RUN, "colour": "grey"} | nothing
    if row.published is None:
        return {"verdict": "no number published", "colour": "plain"} | nothing
    difference = measured["mean"] - row.published
    ours = with_deviation(row, measured)
    theirs = row.spread
    if theirs is None:
        theirs = assumed_spread(row, row.published)
    if row.unit in evidence.COUNTED:
        error = theirs  # The rounding.
    else:
        error = half_interval([ours, Measured(row.published, theirs, 1)])
    near = NEAR if row.unit.endswith("%") else NEAR_PART * row.published
    side, beyond = "above" if difference > 0 else "below", abs(difference) - error
    colour = "green" if beyond <= 0 else "amber" if beyond <= near else "red"
    words = {"green": "agrees", "amber": f"near, {side}", "red": f"differs, {side}"}[colour]
    return {"verdict": words, "colour": colour, "difference": difference, "error": error}


def measure(runs: Sequence[Run], others: Mapping[str, str]) -> dict[str, Any]:
    """The whole report as data: report.json."""
    others, used, items, claims = dict(others), set(), [], []
    for item in evidence.ITEMS:
        rows = []
        for row in item.rows:
            groups = group(row, runs)
            for first, *again in (same for found in groups.values() for same in found.values()):
                used.add(first.folder)
                reason = f"same configuration and seed as {first.folder}"
                others |= {run.folder: reason for run in again}
            points = {setting: point(row, found) for setting, found in sorted(groups.items())}
            full, names = points.pop(FULL, None), evidence.configurations(row)
            reduced = {
                setting: found | {"wanted_runs": max(item.seeds, found["seeds"]) * len(names)}
                for setting, found in points.items()
                if found
            }
            about = {"label": row.label, "unit": row.unit, "configurations": names}
            about |= {"wanted_runs": item.seeds * len(names), "published": row.published}
            rows.append(about | {"measured": full} | judge(row, full) | {"reduced": reduced})
        items.append(item._asdict() | {"settings": settings_of(item.rows), "rows": rows})
    for claim in evidence.CLAIMS:
        item = next(item for item in evidence.ITEMS if item.name == claim.item)
        rows = list(zip(item.rows, next(i["rows"] for i in items if i["name"] == claim.item)))
        full = {
            row.label: with_deviation(row, one["measured"]) for row, one in rows if one["measured"]
        }
        reduced = {}
        for row, one in rows:
            for setting, found in one["reduced"].items():
                measured = with_deviation(row, found, is_reduced=True)
                reduced.setdefault(setting, {})[row.label] = measured
        words = _decided(claim, full)
        words |= {"reduced": {s: _decided(claim, found) for s, found in sorted(reduced.items())}}
        claims.append(claim._asdict() | {"paper": item.paper} | words)
    others |= {run.folder: "matches no row" for run in runs if run.folder not in {*used, *others}}
    return {"items": items, "claims": claims, "other_runs": dict(sorted(others.items()))}


def _decided(claim: evidence.Claim, measured: Mapping[str, Measured]) -> dict[str, Any]:
    verdict, compared = decide(claim, measured), []
    for comparison in claim.comparisons:
        found = zip(("verdict", "difference", "error"), compare(comparison, measured))
        words = {"rule": str(comparison), **comparison._asdict(), **dict(found)}
        rows = [measured[label] for label in comparison[:2] if label in measured]
        words["seeds"] = min((row.seeds for row in rows), default=None)
        compared.append(words | {"colour": _COLOURS[words["verdict"]]})
    return {"verdict": verdict, "colour": _COLOURS[verdict], "comparisons": compared}


def with_deviation(
    row: evidence.Row, found: Mapping[str, Any], is_reduced: bool = False
) -> Measured:
    """A point with the deviation that is assumed where it has none, and whether it is whole."""
    deviation = found["deviation"]
    if deviation is None:
        deviation = assumed_spread(row, found["mean"], is_reduced)
    # Of each seed that counts, as many configurations as of any other.
    wanted = found["seeds"] * len(evidence.configurations(row))
    values = collections.defaultdict(list)
    for run in found["runs"]:
        values[run["seed"]].append(run["value"])
    by_seed = {seed: statistics.fmean(of_seed) for seed, of_seed in values.items()}
    is_whole = len(found["runs"]) == wanted
    return Measured(found["mean"], deviation, found["seeds"], is_whole, by_seed)
