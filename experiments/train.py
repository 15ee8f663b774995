r"""Trains a network as decoupled blocks.

python experiments/train.py --config=experiments/configs/quickstart.py --workdir=runs/quickstart \
    [--config.FIELD=VALUE ...]

The same command goes on with a run that was stopped.
"""

from dgl_jax import cli
from dgl_jax.config import Config
from dgl_jax.tables import accuracy_table


def main(config: Config, workdir: str) -> None:
    from dgl_jax.train import train_and_evaluate  # Late: --help does not wait for JAX.

    summary = train_and_evaluate(config, workdir)
    if summary is not None:  # Of several processes the first one has it.
        print(accuracy_table([summary]))


if __name__ == "__main__":
    cli.run(main)
