r"""Searches where to cut a network, and which head each block gets.

python experiments/search.py --config=experiments/configs/sedona_search.py:resnet18,short \
    --workdir=runs/search [--config.FIELD=VALUE ...]

The same command goes on with a search that was stopped. Train with what it found:

python experiments/train.py --config=... --workdir=... \
    --config.partition.from_search=runs/search/search.json --config.partition.num_blocks=4
"""

from dgl_jax import cli
from dgl_jax.config import SearchConfig
from dgl_jax.tables import search_table


def main(config: SearchConfig, workdir: str) -> None:
    from dgl_jax.search import search  # Late: --help does not wait for JAX.

    print(search_table(search(config, workdir)))


if __name__ == "__main__":
    cli.run(main, SearchConfig)
