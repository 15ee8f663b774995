"""What follows ``FILE.py:`` after ``--config=``: words that choose a configuration's variant.

A configuration file lists its words in groups; the first of each is the default:

    WORDS = (("dgl", "ddg", "backprop"), ("K=2", "K=4"))

``table2.py:K=4,ddg`` takes one of each group, in any order; ``table2.py`` takes the defaults.
Plain Python.
"""

from collections.abc import Sequence

from dgl_jax.errors import UserError


def choose_words(variant: str, groups: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Reads a variant.

    Args:
      variant: words with commas between them, at most one of each group; "" for the defaults.
      groups: the words there are; a group's first is its default.

    Returns:
      One word a group, in the groups' order.

    Raises:
      UserError: an unknown word, or two of one group.

    Example:
      >>> choose_words("K=4", groups=(("dgl", "ddg", "backprop"), ("K=2", "K=4")))
      ('dgl', 'K=4')
    """
    chosen = {}
    for word in variant.split(",") if variant else ():
        group = next((place for place, words in enumerate(groups) if word in words), None)
        if group is None:
            known = "; ".join(", ".join(words) for words in groups)
            raise UserError(f"variant={variant}: {word!r} is unknown; choose from {known}")
        if group in chosen:
            raise UserError(
                f"variant={variant}: {chosen[group]} and {word} exclude each other; leave one out"
            )
        chosen[group] = word
    return tuple(chosen.get(place, words[0]) for place, words in enumerate(groups))
