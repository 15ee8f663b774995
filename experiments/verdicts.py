"""What holds: each figure of the papers and each claim, beside what was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import evidence
from run_folders import FULL, Run, group, point, settings_of

_COLOURS = {
    evidence.HOLDS: "green",
    evidence.UNDECIDED: "amber",
    evidence.FAILS: "red",
    evidence.NOT_RUN: "grey",
}


def judge(row: evidence.Row, measured: Mapping[str, Any] | None) -> dict[str, Any]:
    """A figure against the published one, by the 95 % confidence interval of their difference."""
    nothing = {"difference": None, "error": None}
    if measured is None:
        return {"verdict": evidence.NOT_RUN, "colour": "grey"} | nothing
    if row.published is None:
        return {"verdict": "no number published", "colour": "plain"} | nothing
    difference = measured["mean"] - row.published
    ours = with_deviation(row, measured)
    theirs = evidence.assumed_spread(row) if row.spread is None else row.spread
    if row.unit in evidence.COUNTED:
        error = theirs  # The rounding.
    else:
        error = evidence.half_interval([ours, evidence.Measured(row.published, theirs, 1)])
    near = evidence.NEAR if row.unit.endswith("%") else evidence.NEAR_PART * row.published
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
                short = setting if setting in row.short else ""
                measured = with_deviation(row, found, short, is_reduced=True)
                reduced.setdefault(setting, {})[row.label] = measured
        words = _decided(claim, full)
        words |= {"reduced": {s: _decided(claim, found) for s, found in sorted(reduced.items())}}
        claims.append(claim._asdict() | {"paper": item.paper} | words)
    others |= {run.folder: "matches no row" for run in runs if run.folder not in {*used, *others}}
    return {"items": items, "claims": claims, "other_runs": dict(sorted(others.items()))}


def _decided(claim: evidence.Claim, measured: Mapping[str, evidence.Measured]) -> dict[str, Any]:
    verdict, compared = evidence.decide(claim, measured), []
    for comparison in claim.comparisons:
        found = zip(("verdict", "difference", "error"), evidence.compare(comparison, measured))
        words = {"rule": str(comparison), **comparison._asdict(), **dict(found)}
        rows = [measured[label] for label in comparison[:2] if label in measured]
        words["seeds"] = min((row.seeds for row in rows), default=None)
        compared.append(words | {"colour": _COLOURS[words["verdict"]]})
    return {"verdict": verdict, "colour": _COLOURS[verdict], "comparisons": compared}


def with_deviation(
    row: evidence.Row, found: Mapping[str, Any], short: str = "", is_reduced: bool = False
) -> evidence.Measured:
    """A point with the deviation that is assumed where it has none, and whether it is whole."""
    deviation = found["deviation"]
    deviation = evidence.assumed_spread(row, is_reduced) if deviation is None else deviation
    # Of each seed that counts, as many configurations as of any other.
    wanted = found["seeds"] * len(evidence.configurations(row, short))
    runs, is_whole = found["runs"], len(found["runs"]) == wanted
    by_seed = (
        zip(*((run["folder"], run["value"]) for run in runs))
        if len(runs) == found["seeds"]
        else ((), ())
    )
    return evidence.Measured(found["mean"], deviation, found["seeds"], is_whole, *by_seed)
