"""Runs of several processes on this machine: the same numbers as one, and every way to fail."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_SCRIPT = str(_ROOT / "tests" / "several_processes.py")
_TRAIN = [
    "experiments/train.py",
    "--config=experiments/configs/quickstart.py",
    "--config.network.width_factor=0.0625",
    "--config.train.batch_size=48",
    "--config.train.num_epochs=0",
    "--config.train.log_every_steps=3",
    "--config.eval.batch_size=480",
    "--config.eval.time_blocks=False",
    "--config.placement.kind=pipelined",
]

_TWO_BLOCKS = ("--config.partition.strategy=uniform", "--config.partition.num_blocks=2")

pytestmark = pytest.mark.slow


def _free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Programs are the same in many of these runs: they share a compilation cache."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(_ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # Programs run a few times only.
    }


def _start(arguments, environment):
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=_ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def _ends(processes, timeout_s=120):
    """(exit code, stdout, last line of stderr) of each."""
    ends = []
    for process in list(processes):  # All are started before one is waited for.
        out, err = process.communicate(timeout=timeout_s)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        ends.append((process.returncode, out, (lines or [err])[-1]))
    return ends


def _launch(num_processes, arguments, environment, workdir):
    command = ["experiments/launch_local.py", f"--num_processes={num_processes}", "--", *_TRAIN]
    return _start([*command, *arguments, f"--workdir={workdir}"], environment)


def _result(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    metrics = (workdir / "metrics.jsonl").read_text()
    return summary, metrics


def test_arrays_go_from_any_devices_to_any_others(environment):
    address = f"localhost:{_free_port()}"
    ends = _ends([_start([_SCRIPT, "transfer", address, "2", str(i)], environment) for i in (0, 1)])
    for code, out, error in ends:
        assert (code, out.splitlines()[-1:]) == (0, ["all as it should be"]), error


def _join(environment, *rows, timeout_s=20, delays=None):
    """Processes that join a run, each given (num_processes, process_id)."""
    address, processes = f"localhost:{_free_port()}", []
    for place, row in enumerate(rows):
        time.sleep((delays or {}).get(place, 0))
        arguments = (address, *map(str, row), str(timeout_s))
        processes.append(_start([_SCRIPT, "join", *arguments], environment))
    return _ends(processes)


def test_three_processes_find_one_another_though_the_first_is_late(environment):
    ends = _join(environment, (3, 2), (3, 1), (3, 0), delays={2: 4})
    assert [code for code, _, _ in ends] == [0, 0, 0], ends
    for _, out, _ in ends:
        assert out.splitlines()[-1] == "['process 0', 'process 1', 'process 2'] {'a': [1]}"


@pytest.mark.parametrize(
    "rows, message",
    [
        ([(3, 0), (3, 1)], "--num_processes=3: process 2 has not come in time"),
        ([(2, 0), (3, 1)], "--num_processes=3 in process 1, but 2 in process 0"),
        ([(3, 0), (3, 1), (3, 1)], "--process_id=1 was given to two processes"),
        ([(2, 1)], "process 0 does not answer there"),
        ([(2, 2)], "--process_id=2 must be in 0 to 1"),
    ],
)
def test_what_does_not_fit_is_said_by_all_in_one_line(environment, rows, message):
    start = time.monotonic()
    ends = _join(environment, *rows, timeout_s=6)
    assert time.monotonic() - start < 60
    for code, _, error in ends:
        assert code == 2 and message in error, ends


def test_a_configuration_that_differs_and_a_process_too_many(environment, tmp_path):
    command = [*_TRAIN, "--config.train.num_steps=2", "--config.placement.num_devices=2"]
    address = f"--coordinator=localhost:{_free_port()}"
    ends = _ends(
        _start(
            [*command, address, "--num_processes=2", f"--process_id={i}", f"--config.seed={i}",
             f"--workdir={tmp_path}"],
            environment,
        )
        for i in (0, 1)
    )  # fmt: skip
    for code, _, error in ends:
        assert code == 2 and "config.seed=1 in process 1 is not that of process 0, 0" in error, ends

    ((code, out, error),) = _ends([_launch(3, command[len(_TRAIN) :], environment, tmp_path)])
    assert code == 2, out
    assert "process 2 has none of the devices that blocks live on" in out
    assert error == "error: process 0 ended with code 2; the others were ended" or "2" in error


@pytest.mark.parametrize("num_processes", [2, 3, 4])
def test_processes_compute_what_one_computes(environment, tmp_path, num_processes):
    arguments = ["--config.train.num_steps=7", f"--config.placement.num_devices={num_processes}"]
    if num_processes == 2:
        arguments += [*_TWO_BLOCKS, "--config.eval.log_drift=True"]
    one = _start([*_TRAIN, *arguments, f"--workdir={tmp_path / 'one'}"], environment)
    assert one.wait(timeout=300) == 0, one.communicate()
    many = _launch(num_processes, arguments, environment, tmp_path / "many")
    ((code, out, error),) = _ends([many], timeout_s=300)
    assert code == 0, (out, error)
    summary, metrics = _result(tmp_path / "one")
    summaries, many_metrics = _result(tmp_path / "many")
    assert summaries["params_sha256"] == summary["params_sha256"]
    assert many_metrics == metrics
    assert summaries["num_processes"] == num_processes and summary["num_processes"] == 1
    assert summaries["devices_per_block"] == summary["devices_per_block"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--config.placement.devices_per_block=(1,2,1)", "--config.partition.num_blocks=3",
         "--config.partition.strategy=uniform"),
        ("--config.method.name=ddg", "--config.placement.num_devices=2", *_TWO_BLOCKS),
        ("--config.method.name=pipeline_backprop", "--config.placement.num_devices=2",
         *_TWO_BLOCKS),
        ("--config.method.name=data_parallel", "--config.placement.num_devices=4",
         "--config.placement.kind=fused"),
    ],
    ids=["uneven", "ddg", "pipeline_backprop", "data_parallel"],
)  # fmt: skip
def test_blocks_over_two_processes_by_other_methods_and_meshes(environment, tmp_path, arguments):
    """Here a block's devices may be of two processes, and gradients come down between them."""
    arguments = [*arguments, "--config.train.num_steps=6"]
    one = _start([*_TRAIN, *arguments, f"--workdir={tmp_path / 'one'}"], environment)
    assert one.wait(timeout=300) == 0, one.communicate()
    ((code, out, error),) = _ends(
        [_launch(2, arguments, environment, tmp_path / "two")], timeout_s=300
    )
    assert code == 0, (out, error)
    one, two = (
        [json.loads(line) for line in _result(tmp_path / name)[1].splitlines()]
        for name in ("one", "two")
    )
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for row, other in zip(one, two, strict=True):
        # Sums over devices of two processes may be in another order.
        assert other == pytest.approx(row, rel=1e-5)


def test_a_killed_process_is_named_and_the_run_goes_on_as_if_it_had_not_been(environment, tmp_path):
    arguments = ["--config.train.num_steps=120", "--config.placement.num_devices=2", *_TWO_BLOCKS]
    arguments += ["--config.checkpoint.every_steps=10", "--config.eval.every_epochs=10.0"]
    for name, num_processes_after in (("two", 2), ("one", 1)):
        workdir, address = tmp_path / name, f"--coordinator=localhost:{_free_port()}"
        processes = [
            _start([*_TRAIN, *arguments, address, "--num_processes=2", f"--process_id={i}",
                    f"--workdir={workdir}"], environment)
            for i in (0, 1)
        ]  # fmt: skip
        deadline = time.monotonic() + 200
        while not list(workdir.glob("checkpoints/[0-9]*0/*")) and time.monotonic() < deadline:
            assert all(process.poll() is None for process in processes)
            time.sleep(0.05)
        killed = 1 if name == "two" else 0
        processes[killed].send_signal(signal.SIGKILL)
        start = time.monotonic()
        ends = _ends(processes, timeout_s=60)
        assert time.monotonic() - start < 30
        code, _, error = ends[1 - killed]
        assert code == 1 and f"process {killed} has stopped without a word" in error, ends
        assert json.loads((workdir / "summary.json").read_text())["finished"] is False

        if num_processes_after == 2:
            after = _launch(2, arguments, environment, workdir)
        else:
            after = _start([*_TRAIN, *arguments, f"--workdir={workdir}"], environment)
        ((code, out, error),) = _ends([after], timeout_s=300)
        assert code == 0, (out, error)
    whole = _start([*_TRAIN, *arguments, f"--workdir={tmp_path / 'whole'}"], environment)
    assert whole.wait(timeout=300) == 0
    results = [_result(tmp_path / name) for name in ("whole", "two", "one")]
    assert len({summary["params_sha256"] for summary, _ in results}) == 1
    assert len({metrics for _, metrics in results}) == 1


def test_the_launcher_returns_the_code_of_the_process_that_failed(environment, tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        "import sys, time\n"
        "if sys.argv[-1] == '--process_id=1':\n"
        "    print('going', flush=True); sys.exit(7)\n"
        "time.sleep(100)\n"
    )
    start = time.monotonic()
    command = ["experiments/launch_local.py", "--num_processes=3", "--", str(script)]
    ((code, out, error),) = _ends([_start(command, environment)])
    assert code == 7 and time.monotonic() - start < 30
    assert "[1] going" in out
    assert error == "error: process 1 ended with code 7; the others were ended"
    for arguments, message in (
        (["--num_processes=2"], "give --num_processes=N -- SCRIPT.py"),
        (["--num_processes=2", "--", "missing.py"], "missing.py is not a file"),
        (["--num_processes=0", "--", str(script)], "num_processes"),
    ):
        ((code, _, error),) = _ends(
            [_start(["experiments/launch_local.py", *arguments], environment)]
        )
        assert code == 2 and message in error
