"""The one exception for a user's mistake: scripts print its line and exit with code 2."""


class UserError(ValueError):
    """A mistake in the user's input: one line with name, value, rule and remedy."""
