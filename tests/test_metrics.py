"""What the training log writes of steps in which not all blocks take part."""

import numpy as np
import pytest

from dgl_jax.errors import UserError
from dgl_jax.metrics import MetricsWriter, TrainingLog, read_metrics


class _Bar:
    def update(self, count):
        pass

    def set_postfix_str(self, text):
        self.text = text


def _log(tmp_path, totals, in_step=False):
    writer = MetricsWriter(str(tmp_path), first_step=0)
    log = TrainingLog(
        writer,
        _Bar(),
        every_steps=3,
        batch_size=4,
        steps_per_epoch=6.0,
        learning_rates=np.array([0.5, 0.25, 0.125, 0.1, 0.1, 0.1]),
        totals=totals,
        in_step=in_step,
    )
    return log, writer


def test_blocks_out_of_step_have_their_own_updates_and_learning_rates(tmp_path):
    totals = {"train/block_0/sum_learning_rate_gradient_norm_squared": 10.0}
    log, writer = _log(tmp_path, totals)
    log.append(1, {0: {"loss": 2.0, "updates": 1, "gradient_norm": 2.0}})
    log.append(2, {0: {"loss": 4.0, "updates": 2, "gradient_norm": 4.0}})
    log.append(3, {1: {"loss": 1.0, "updates": 1, "age": 7}})
    log.flush()
    log.append(4, {})  # A block that has finished fed the one above.
    log.flush()
    writer.close()
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line == {
        "step": 3,
        "train/block_0/loss": 3.0,
        "train/block_0/gradient_norm": 3.0,
        "train/block_0/updates": 2,
        "train/block_0/learning_rate": 0.25,
        # Gone on with from 10: 0.5 * 2^2 + 0.25 * 4^2.
        "train/block_0/sum_learning_rate_gradient_norm_squared": 16.0,
        "train/block_1/loss": 1.0,
        "train/block_1/age": 7.0,
        "train/block_1/updates": 1,
        "train/block_1/learning_rate": 0.5,
        "train/epoch": 0.5,
    }
    assert totals["train/block_0/sum_learning_rate_gradient_norm_squared"] == 16.0


def test_blocks_in_step_have_one_learning_rate(tmp_path):
    log, writer = _log(tmp_path, {}, in_step=True)
    for step in (1, 2):
        log.append(step, {block: {"loss": 1.0, "updates": step} for block in (0, 1)})
    log.flush()
    writer.close()
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["train/learning_rate"] == 0.25
    assert not [name for name in line if "updates" in name]


def test_several_steps_at_once_are_as_many_one_by_one(tmp_path):
    rng = np.random.default_rng(0)
    losses, norms = rng.random(6).astype(np.float32), rng.random(6).astype(np.float32)
    results = []
    for calls in ([(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)], [(0, 3), (3, 4), (4, 6)]):
        totals, folder = {}, tmp_path / str(len(calls))
        folder.mkdir()
        log, writer = _log(folder, totals, in_step=True)
        for first, end in calls:
            scalars = {"loss": losses[first:end], "gradient_norm": norms[first:end]}
            log.append(
                end,
                {0: scalars | {"updates": np.arange(first + 1, end + 1)}},
                num_steps=end - first,
            )
        log.flush()
        writer.close()
        lines = read_metrics(folder / "metrics.jsonl")
        assert [line["step"] for line in lines] == [3, 6]
        results.append((lines, totals))
    assert results[0] == results[1]

    log, writer = _log(tmp_path, {})
    scalars = {"loss": np.array([1.0, np.inf, np.nan]), "updates": np.array([1, 2, 3])}
    log.append(9, {2: scalars}, num_steps=3)
    with pytest.raises(UserError, match="block_2/loss=inf at step 8"):
        log.flush()
    writer.close()


def test_a_loss_that_is_not_finite_is_told_with_its_block(tmp_path):
    log, writer = _log(tmp_path, {})
    log.append(1, {2: {"loss": float("nan"), "updates": 1}})
    with pytest.raises(UserError, match="block_2/loss=nan"):
        log.flush()
    writer.close()


def test_a_gradient_norm_that_is_not_finite_is_told_and_its_square_may_be_large(tmp_path):
    totals = {}
    log, writer = _log(tmp_path, totals)
    norm = np.float32(1e30)  # Its square is beyond float32.
    log.append(1, {0: {"loss": 1.0, "updates": 1, "gradient_norm": norm}})
    log.flush()
    (total,) = totals.values()
    assert total == pytest.approx(0.5 * 1e60)
    log.append(2, {0: {"loss": 1.0, "updates": 2, "gradient_norm": np.float32(np.inf)}})
    with pytest.raises(UserError, match="block_0/gradient_norm=inf at step 2 is not finite"):
        log.flush()
    writer.close()


def test_a_block_that_is_alone_so_far_is_not_in_step(tmp_path):
    log, writer = _log(tmp_path, {})
    log.append(1, {0: {"loss": 1.0, "updates": 1}})
    log.flush()
    writer.close()
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["train/block_0/updates"] == 1 and "train/learning_rate" not in line
