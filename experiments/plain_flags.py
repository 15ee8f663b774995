"""How a script with plain flags starts and ends: one line for a mistake, and exit code 2.

A script with a --config starts by `dgl_jax.cli`.
"""

import sys
from collections.abc import Callable

from absl import app, flags

from dgl_jax.errors import UserError


def run(main: Callable[[list[str]], None], *, takes_arguments: bool = False) -> None:
    """Parses the flags and calls ``main(arguments)``, with those that are no flags if it takes any.

    A `UserError` that ``main`` raises is the user's mistake, as is a flag that can't be parsed.
    """

    def parse_flags(argv: list[str]) -> list[str]:
        try:
            remaining = flags.FLAGS(argv)
        except flags.Error as error:
            fail(str(error))
        if len(remaining) > 1 and not takes_arguments:
            fail(f"argument {remaining[1]!r} is not a flag; try --{remaining[1]}")
        return remaining

    def run_main(argv: list[str]) -> None:
        try:
            main(argv[1:])
        except UserError as error:
            fail(str(error))
        except KeyboardInterrupt:
            fail("interrupted", code=1)
        except Exception as error:
            from dgl_jax import backend  # Imports JAX, which a script may not need.

            if (backend_failure := backend.failure(error)) is None:
                raise
            fail(backend_failure)

    app.run(run_main, flags_parser=parse_flags)


def fail(*messages: str, code: int = 2) -> None:
    """Ends the script with a line for each message."""
    for message in messages:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
