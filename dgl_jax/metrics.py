"""Where numbers go: metrics.jsonl, TensorBoard, the progress bar; and seconds compiling."""

import collections
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorboardX

from dgl_jax.errors import not_finite_error

_compile_seconds = [0.0]


def _on_duration(event: str, duration: float, **unused) -> None:
    del unused
    if event.startswith("/jax/core/compile/"):
        _compile_seconds[0] += duration


jax.monitoring.register_event_duration_secs_listener(_on_duration)


def compile_seconds() -> float:
    """Seconds that this process has spent tracing, lowering and compiling."""
    return _compile_seconds[0]


class MetricsWriter:
    """Writes scalars to ``metrics.jsonl`` and TensorBoard event files."""

    def __init__(self, directory: str, first_step: int):
        """Opens the files.

        Args:
          directory: the run's folder.
          first_step: the step a run goes on from; later lines, of a run that was killed after
            its last checkpoint, are dropped, since their steps are done again.
        """
        self._path = os.path.join(directory, "metrics.jsonl")
        kept = [line for line in read_metrics(self._path) if line["step"] <= first_step]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115 open for the whole run
        self._tensorboard = tensorboardX.SummaryWriter(
            os.path.join(directory, "tensorboard"), purge_step=first_step + 1
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one line; names are flat, such as ``train/block_0/loss``."""
        self._file.write(json.dumps({"step": step, **scalars}, allow_nan=False) + "\n")
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()


def read_metrics(path: str) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; a last line that was cut off is left out."""
    lines = []
    if os.path.exists(path):
        with open(path) as file:
            for line in file:
                try:
                    lines.append(json.loads(line))
                except json.JSONDecodeError:
                    break
    return lines


def write_atomically(path: str, text: str) -> None:
    """Replaces a file in one step, so that a kill leaves the old or the new one whole."""
    temporary = path + ".tmp"
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class TrainingLog:
    """Collects each step's metrics and writes their means, one line a logging interval.

    Numbers are fetched a whole interval late, so that no device ever waits for the host to
    read one.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        bar: Any,
        *,
        every_steps: int,
        batch_size: int,
        steps_per_epoch: int,
        learning_rates: np.ndarray,
    ):
        """Args:
        writer: where lines go.
        bar: a tqdm bar that counts examples.
        every_steps: the length of an interval.
        batch_size: examples a step.
        steps_per_epoch: to state the epoch.
        learning_rates: float [num_steps], that of each update.
        """
        self._writer, self._bar = writer, bar
        self._every_steps, self._batch_size = every_steps, batch_size
        self._steps_per_epoch, self._learning_rates = steps_per_epoch, learning_rates
        self._unread = collections.deque()

    def append(self, step: int, block_metrics: Sequence[Mapping[str, jax.Array]]) -> None:
        """Takes the metrics of step number `step` (from 1), one dict of scalars a block."""
        self._unread.append((step, block_metrics))
        self._bar.update(self._batch_size)
        if step % self._every_steps == 0 and len(self._unread) > self._every_steps:
            self._read(len(self._unread) - self._every_steps)

    def flush(self) -> None:
        """Waits for all steps taken so far and writes their metrics.

        Raises:
          UserError: a loss was not finite; the message has the block and the step.
        """
        self._read(len(self._unread))

    def _read(self, count: int) -> None:
        if not count:
            return
        rows = [self._unread.popleft() for _ in range(count)]
        steps = [step for step, _ in rows]
        values = jax.device_get([block_metrics for _, block_metrics in rows])
        for step, row in zip(steps, values):
            for block, scalars in enumerate(row):
                if not np.isfinite(scalars["loss"]):
                    raise not_finite_error(f"block_{block}/loss={scalars['loss']}", step)
        means = [
            {name: float(np.mean([row[block][name] for row in values])) for name in scalars}
            for block, scalars in enumerate(values[0])
        ]
        step = steps[-1]
        line = {
            f"train/block_{block}/{name}": value
            for block, scalars in enumerate(means)
            for name, value in scalars.items()
        }
        line["train/learning_rate"] = float(self._learning_rates[step - 1])
        line["train/epoch"] = step / self._steps_per_epoch
        self._writer.write(step, line)
        accuracies = " ".join(f"{scalars['top1']:.1%}" for scalars in means)
        self._bar.set_postfix_str(f"step {step}, loss {means[-1]['loss']:.3f}, top-1 {accuracies}")
