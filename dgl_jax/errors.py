"""The exception for a user's mistake: scripts print its line and exit with code 2."""


class UserError(ValueError):
    """A mistake in the user's input: one line with name, value, rule and remedy."""


class WorkerError(RuntimeError):
    """A block's worker failed; the message has the block, the cause is the original exception."""


def not_finite_error(what: str, step: int) -> UserError:
    """What stops a run whose numbers have overflowed."""
    return UserError(
        f"{what} at step {step} is not finite; the last good checkpoint is kept; try a lower "
        "config.optimizer.learning_rate with another --workdir"
    )
