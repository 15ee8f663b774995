"""A whole run of every method with arrays that behave as an accelerator's do.

A CPU's arrays lie on the host, so the guard around the dispatch of steps lets copies of them pass
that it refuses on a GPU or a TPU. See `accelerator_arrays`.
"""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from accelerator_arrays import accelerator_arrays

from dgl_jax import checkpoint
from dgl_jax import search as search_module
from dgl_jax.config import SearchConfig, default_config, from_dict


@pytest.fixture(autouse=True)
def _as_on_an_accelerator():
    with accelerator_arrays():
        yield


class _Killed(BaseException):
    pass


def _kill_after_the_first_save(monkeypatch):
    save = checkpoint.save

    def save_and_kill(checkpointer, *args, **kwargs):
        save(checkpointer, *args, **kwargs)
        checkpointer.wait()
        raise _Killed

    monkeypatch.setattr(checkpoint, "save", save_and_kill)


def test_copies_are_refused_under_the_guard():
    x = jnp.arange(4.0) + 1
    one = x[0]
    with jax.transfer_guard("disallow"):
        for copy in (np.asarray, np.isfinite, lambda x: x.copy_to_host_async(), str):
            with pytest.raises(RuntimeError, match="Disallowed"):
                copy(x)
        with pytest.raises(RuntimeError, match="Disallowed"):
            float(one)
        # The guard of jax itself, which a CPU's array meets only where numpy can't read it.
        with pytest.raises(RuntimeError, match="Disallowed"):
            np.asarray(jax.lax.convert_element_type(x, jnp.int4))
        np.testing.assert_array_equal(jax.device_get(x), [1, 2, 3, 4])
    np.testing.assert_array_equal(np.asarray(x), [1, 2, 3, 4])


def test_a_search_killed_resumed_and_trained_from(arrays_path, tmp_path, monkeypatch):
    config = default_config(SearchConfig)
    config.network.name, config.network.width_factor = "cnn4", 1 / 32
    config.data.name, config.data.data_dir = "arrays", arrays_path
    config.data.crop_padding, config.data.validation_fraction = 1, 0.4
    search = config.search
    search.candidates = ("pred", "mlp")
    search.num_pretraining_steps, search.num_outer_steps, search.num_inner_steps = 3, 3, 2
    search.batch_size, search.validation_batch_size, search.num_snapshots = 8, 8, 2
    search.num_blocks, search.log_every_steps = (2,), 1
    config.checkpoint.every_steps = 2
    config = from_dict(config.to_dict(), SearchConfig)
    workdir = str(tmp_path / "search")
    with monkeypatch.context() as patch:
        _kill_after_the_first_save(patch)
        with pytest.raises(_Killed):
            search_module.search(config, workdir)
    assert search_module.search(config, workdir)["finished"]
    with open(os.path.join(workdir, search_module.RESULT_FILE)) as file:
        assert len(json.load(file)["alpha"]) == 3  # A place between two of four layers each.
