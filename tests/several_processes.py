"""What tests/test_distributed.py runs in processes of their own: python several_processes.py WHAT ..."""

import sys

import jax
import numpy as np

from dgl_jax import checkpoint, distributed
from dgl_jax.errors import UserError
from dgl_jax.transfer import announce, fetch, is_local, move, place


def join(arguments):
    """Joins a run and leaves it again, or says why not."""
    coordinator, num_processes, process_id, timeout_s = arguments
    try:
        distributed.initialize(coordinator, int(num_processes), int(process_id), float(timeout_s))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(distributed.collect(f"process {jax.process_index()}"), distributed.agree({"a": [1]}))
    distributed.finish()


def _sharding(ids, spec):
    mesh = jax.make_mesh(
        (len(ids),),
        ("data",),
        (jax.sharding.AxisType.Auto,),
        devices=[jax.devices()[i] for i in ids],
    )
    return jax.sharding.NamedSharding(mesh, jax.P(*spec))


def transfer(arguments):
    """Arrays go from any devices to any others, in processes of two devices each."""
    coordinator, num_processes, process_id = arguments
    jax.config.update("jax_num_cpu_devices", 2)
    distributed.initialize(coordinator, int(num_processes), int(process_id))
    sharding, own = _sharding, jax.local_devices()[0]
    rows = np.arange(60, dtype=np.float32).reshape(12, 5)
    key, one_row = jax.random.key(3), np.float32(7)
    places = [[0], [1], [3], [0, 1], [2, 3], [1, 2], [3, 0], [1, 2, 3], [0, 1, 2, 3]]
    if num_processes == "3":
        places = [[0], [2], [4], [1, 2], [3, 4], [5, 0], [0, 2, 4]]
    with jax.transfer_guard("disallow"):
        for source in places:
            for target in places:
                for spec in (("data",), ()):
                    x = place(jax.device_put(rows, own), sharding(source, spec))
                    wanted = sharding(target, ("data",))
                    y = move(x, wanted)
                    assert y.sharding == wanted and y.shape == rows.shape
                    assert len(y.addressable_shards) == len(wanted.addressable_devices)
                    for shard in y.addressable_shards:
                        np.testing.assert_array_equal(shard.data, rows[shard.index])
        scalars = [place(jax.device_put(one_row * i, own), sharding([i], ())) for i in range(4)]
        # On devices of two processes.
        scalars += [place(jax.device_put(one_row * i, own), sharding([1, 2], ())) for i in (5, 6)]
        scalars += [place(jax.device_put(one_row * i, own), sharding([2, 0], ())) for i in (8, 9)]
        halves = place(jax.device_put(rows, own), sharding([2, 3], ("data",)))
        fetched = fetch({"scalars": scalars, "halves": halves, "text": "kept"})
        if jax.process_index() == 0:
            assert fetched["scalars"] == [0, 7, 14, 21, 35, 42, 56, 63]
            assert fetched["text"] == "kept"
            np.testing.assert_array_equal(fetched["halves"], rows)
        else:
            assert fetched is None
        heard = announce(scalars[3])
        assert is_local(heard.sharding) and jax.device_get(heard) == 21
        key = place(key, sharding([0, 3], ()))
        drawn = jax.jit(lambda key: jax.random.bits(key, (2,)))(key)
    np.testing.assert_array_equal(
        drawn.addressable_data(0), jax.random.bits(jax.random.key(3), (2,))
    )
    print("all as it should be")
    distributed.finish()


def save_and_restore(arguments):
    """A checkpoint of arrays on any devices of two processes."""
    coordinator, process_id, directory = arguments
    jax.config.update("jax_num_cpu_devices", 2)
    distributed.initialize(coordinator, 2, int(process_id))
    rows, own = np.arange(12, dtype=np.float32).reshape(4, 3), jax.local_devices()[0]
    places = {"first": ([0], ()), "split": ([1, 2], ("data",)), "last": ([3], ())}
    places |= {"whole": ([0, 1, 2, 3], ()), "others": ([2, 3], ("data",))}

    def tree(factor):
        return {
            name: place(jax.device_put(factor * rows * len(name), own), _sharding(*where))
            for name, where in places.items()
        }

    with checkpoint.open_checkpointer(directory) as checkpointer:
        assert checkpoint.restore_latest(checkpointer, tree(0)) is None
        for step in (3, 7):
            checkpoint.save(checkpointer, step, tree(step), top1=None, record={"step": step})
        checkpointer.wait()
        step, restored, record = checkpoint.restore_latest(checkpointer, tree(0))
    assert step == 7 and record == {"step": 7}
    for name, x in restored.items():
        assert x.sharding == _sharding(*places[name])
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, 7 * rows[shard.index] * len(name))
    print("all as it should be")
    distributed.finish()


if __name__ == "__main__":
    what = {"join": join, "transfer": transfer, "save_and_restore": save_and_restore}
    what[sys.argv[1]](sys.argv[2:])
