"""A search's result as a file: what the search writes, and what a training run reads.

JSON: ``network``, ``candidates`` (the names of M heads), ``alpha`` ([L - 1, 2]: local, from above)
and ``beta`` ([L - 1, M]); readers leave other keys alone.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import Any

from dgl_jax.errors import UserError
from dgl_jax.metrics import write_atomically


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """The decision variables of a network of L layers.

    Attributes:
      network: its name, ``config.network.name``.
      candidates: the names of the M heads among which beta chooses.
      alpha: [L - 1, 2], (local, from above).
      beta: [L - 1, M].
    """

    network: str
    candidates: tuple[str, ...]
    alpha: tuple[tuple[float, ...], ...]
    beta: tuple[tuple[float, ...], ...]


def load_result(path: str, network_name: str, num_layers: int) -> SearchResult:
    """Reads a search's result and checks that it is one of this network.

    Args:
      path: of the JSON file.
      network_name: of the network to train.
      num_layers: its L.

    Raises:
      UserError: no such file, no JSON, a key that is missing, another network, or variables
        of wrong shapes or not finite.
    """
    given = f"config.partition.from_search={path}"
    try:
        with open(path) as file:
            content = json.load(file)
    except OSError as error:
        raise UserError(
            f"{given} cannot be read ({error.strerror}); give the file of a search's result"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{given} is no JSON ({error}); give the file of a search's result"
        ) from error
    for key in ("network", "candidates", "alpha", "beta"):
        if not isinstance(content, Mapping) or key not in content:
            raise UserError(f"{given} lacks {key!r}; give the file of a search's result")
    if content["network"] != network_name:
        raise UserError(
            f"{given} is of the network {content['network']}, not of config.network.name="
            f"{network_name}; set that to the same network, or give another search's file"
        )
    candidates = content["candidates"]
    if not (isinstance(candidates, list) and candidates and all(map(_is_text, candidates))):
        raise UserError(f"{given}: 'candidates' must be a list of heads' names, at least one")
    alpha = _rows(given, "alpha", content["alpha"], num_layers - 1, 2)
    beta = _rows(given, "beta", content["beta"], num_layers - 1, len(candidates))
    return SearchResult(network_name, tuple(candidates), alpha, beta)


def write_result(path: str, result: SearchResult, extra: Mapping[str, Any]) -> None:
    """Writes a result that `load_result` reads, one row of the variables a line.

    Args:
      path: of the JSON file; it is replaced in one step.
      result: what the search found.
      extra: what else to say: where it comes from, how it was made.
    """
    content = dict(extra) | dataclasses.asdict(result)
    lines = []
    for key, value in content.items():
        text = json.dumps(value, allow_nan=False)
        if key in ("alpha", "beta"):
            text = "[\n    " + ",\n    ".join(json.dumps(list(row)) for row in value) + "\n  ]"
        lines.append(f"  {json.dumps(key)}: {text}")
    write_atomically(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _rows(
    given: str, key: str, rows: Any, num_rows: int, width: int
) -> tuple[tuple[float, ...], ...]:
    if not isinstance(rows, list) or len(rows) != num_rows:
        found = len(rows) if isinstance(rows, list) else "no"
        raise UserError(
            f"{given}: {key!r} has {found} rows, but the network has {num_rows} places for a cut; "
            "give the result of a search on this network"
        )
    for place, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != width or not all(map(_is_number, row)):
            raise UserError(f"{given}: row {place} of {key!r} must be {width} numbers, each finite")
    return tuple(tuple(map(float, row)) for row in rows)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
