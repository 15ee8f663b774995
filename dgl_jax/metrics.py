"""Where numbers go: metrics.jsonl, TensorBoard, the progress bar; and seconds compiling."""

import collections
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dgl_jax.errors import not_finite_error
from dgl_jax.transfer import fetch

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
        import tensorboardX  # Takes seconds, and only this needs it.

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
        """Closes the files."""
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
    read one. Of several processes the first one writes, and all take part.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        bar: Any,
        *,
        every_steps: int,
        batch_size: int,
        steps_per_epoch: float,
        learning_rates: np.ndarray,
        totals: dict[str, float],
        in_step: bool,
    ):
        """Args:
        writer: where lines go.
        bar: a tqdm bar that counts examples.
        every_steps: the length of an interval.
        batch_size: examples a step.
        steps_per_epoch: to state the epoch.
        learning_rates: float [num_updates], that of each update.
        totals: sums over the whole run, gone on with; saved with a checkpoint.
        in_step: whether every block makes one update a step, so that one learning rate is all.
        """
        self._writer, self._bar = writer, bar
        self._every_steps, self._batch_size = every_steps, batch_size
        self._steps_per_epoch, self._learning_rates = steps_per_epoch, learning_rates
        self._totals, self._in_step = totals, in_step
        self._unread = collections.deque()

    def append(
        self, step: int, block_metrics: Mapping[int, Mapping[str, Any]], num_steps: int = 1
    ) -> None:
        """Takes the metrics of the steps up to number `step` (from 1).

        Args:
          step: from 1, the last of them.
          block_metrics: of each block that made an update, by the block's index; a number or
            [num_steps]. Among them ``updates``, the number it has made.
          num_steps: how many steps they are of.

        Raises:
          UserError: as `flush`.
        """
        self._unread.append((step, block_metrics))
        self._bar.update(num_steps * self._batch_size)
        if step % self._every_steps == 0:
            last = step - self._every_steps
            self._read(sum(1 for unread, _ in self._unread if unread <= last))

    def flush(self) -> None:
        """Waits for all steps taken so far and writes their metrics.

        Raises:
          UserError: a number was not finite; the message has its name, block and step.
        """
        self._read(len(self._unread))

    def _read(self, count: int) -> None:
        if not count:
            return
        rows = [self._unread.popleft() for _ in range(count)]
        values = fetch([block_metrics for _, block_metrics in rows])
        if values is None:
            return
        columns, line = {}, {}
        for (step, _), row in zip(rows, values):
            for block, scalars in row.items():
                scalars = {name: np.atleast_1d(value) for name, value in scalars.items()}
                for name, values_of_steps in scalars.items():
                    finite = np.isfinite(values_of_steps)
                    if not np.all(finite):
                        first = int(np.argmin(finite))
                        raise not_finite_error(
                            f"block_{block}/{name}={values_of_steps[first]}",
                            step - len(finite) + 1 + first,
                        )
                learning_rates = self._learning_rates[scalars["updates"] - 1]
                for name, values_of_steps in scalars.items():
                    columns.setdefault((block, name), []).extend(values_of_steps)
                if "gradient_norm" in scalars:
                    name = f"train/block_{block}/sum_learning_rate_gradient_norm_squared"
                    for rate, norm in zip(learning_rates, scalars["gradient_norm"]):
                        added = float(rate) * float(norm) ** 2
                        line[name] = self._totals[name] = self._totals.get(name, 0.0) + added
        if not columns:
            return  # Only blocks that have finished had their turn, to feed the others.
        step = rows[-1][0]
        updates = {
            block: column[-1] for (block, name), column in columns.items() if name == "updates"
        }
        for (block, name), column in sorted(columns.items()):
            if name != "updates":
                line[f"train/block_{block}/{name}"] = float(np.mean(column))
        if self._in_step:
            line["train/learning_rate"] = float(self._learning_rates[step - 1])
        else:
            for block, made in updates.items():
                line[f"train/block_{block}/updates"] = int(made)
                line[f"train/block_{block}/learning_rate"] = float(self._learning_rates[made - 1])
        line["train/epoch"] = step / self._steps_per_epoch
        self._writer.write(step, line)
        shown = [f"step {step}"]
        for name, form in (("loss", ".3f"), ("top1", ".1%")):
            numbers = [np.mean(columns[key]) for key in sorted(columns) if key[1] == name]
            shown.append(f"{name} " + " ".join(format(number, form) for number in numbers))
        self._bar.set_postfix_str(", ".join(shown))
