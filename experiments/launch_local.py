"""Starts several processes of one run on this machine.

python experiments/launch_local.py --num_processes=2 -- experiments/train.py \
    --config=experiments/configs/quickstart.py --workdir=runs/two_processes \
    --config.placement.kind=pipelined --config.placement.num_devices=6

They run on the CPU unless JAX_PLATFORMS says otherwise. What each prints comes with its number in
front. When one fails all are ended, and this ends with
the exit code of the first that failed.
"""

import os
import signal
import subprocess
import sys
import threading

import plain_flags
from absl import flags

from dgl_jax.distributed import free_port
from dgl_jax.errors import UserError
from dgl_jax.processes import GRACE_S, end

_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many.", lower_bound=1)


def main(script: list[str]) -> None:
    if not script or not _NUM_PROCESSES.value:
        raise UserError(
            "give --num_processes=N -- SCRIPT.py [FLAG ...], such as --num_processes=2 -- "
            "experiments/train.py --config=... --workdir=..."
        )
    if not os.path.isfile(script[0]):
        raise UserError(f"{script[0]} is not a file; give a Python script after --")
    coordinator = f"localhost:{free_port()}"
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-u", *script, f"--coordinator={coordinator}"),
                f"--num_processes={_NUM_PROCESSES.value}",
                f"--process_id={process_id}",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={"JAX_PLATFORMS": "cpu"} | os.environ,
        )
        for process_id in range(_NUM_PROCESSES.value)
    ]
    signal.signal(signal.SIGTERM, lambda *unused: sys.exit(128 + signal.SIGTERM))
    failed = []
    ended = threading.Condition()

    def follow(process_id: int, process: subprocess.Popen) -> None:
        for line in process.stdout:
            print(f"[{process_id}] {line}", end="", flush=True)
        code = process.wait()
        with ended:
            if code:
                failed.append((process_id, code))
            ended.notify_all()

    threads = [
        threading.Thread(target=follow, args=pair, daemon=True) for pair in enumerate(processes)
    ]
    for thread in threads:
        thread.start()
    try:
        with ended:
            ended.wait_for(lambda: failed or all(p.poll() is not None for p in processes))
            if failed:  # The others may be about to say the same in their own words.
                ended.wait_for(lambda: all(p.poll() is not None for p in processes), timeout=2)
    except KeyboardInterrupt:
        failed.append((None, 128 + signal.SIGINT))
    finally:
        end(processes)
        for thread in threads:
            thread.join(timeout=GRACE_S)
    if failed:
        process_id, code = failed[0]
        if process_id is not None:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            print(f"error: process {process_id} {how}; the others were ended", file=sys.stderr)
        sys.exit(128 - code if code < 0 else code)


if __name__ == "__main__":
    plain_flags.run(main, takes_arguments=True)
