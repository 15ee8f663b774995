"""Runs of several processes on this machine: the same numbers as one, and every way to fail."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from dgl_jax.distributed import free_port

_ROOT = pathlib.Path(__file__).parents[1]
_SCRIPT = str(_ROOT / "tests" / "several_processes.py")

_STARTED = []
_TWO_BLOCKS = ("--config.partition.strategy=uniform", "--config.partition.num_blocks=2")

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    for process in _STARTED:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for file in process.files:
            file.close()
    _STARTED.clear()


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
    """A process in a group of its own; what it says goes to files, which never fill up."""
    out, err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=_ROOT, env=environment, stdout=out, stderr=err, start_new_session=True,
    )  # fmt: skip
    process.files = out, err
    _STARTED.append(process)
    return process


def _end(process, timeout_s=300):
    """(exit code, stdout, the error line of stderr, or all of it)."""
    try:
        process.wait(timeout_s)
    finally:
        out, err = (file.seek(0) or file.read() for file in process.files)
        if process.returncode is None:
            print(out, err)  # pytest shows it.
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    return process.returncode, out, (lines or [err])[-1]


@pytest.fixture(scope="module")
def train(arrays_path):
    """The command of a small run."""
    return [
        "experiments/train.py",
        "--config=experiments/configs/quickstart.py",
        "--config.data.name=arrays",
        f"--config.data.data_dir={arrays_path}",
        "--config.data.crop_padding=1",
        "--config.network.width_factor=0.0625",
        "--config.train.batch_size=24",
        "--config.train.num_epochs=0",
        "--config.train.log_every_steps=3",
        "--config.eval.batch_size=48",
        "--config.eval.time_blocks=False",
        "--config.placement.kind=pipelined",
    ]


def _launch(num_processes, command, environment):
    launcher = ["experiments/launch_local.py", f"--num_processes={num_processes}", "--"]
    return _start([*launcher, *command], environment)


def _result(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    metrics = (workdir / "metrics.jsonl").read_text()
    return summary, metrics


@pytest.mark.parametrize("num_processes", [2, 3])
def test_arrays_go_from_any_devices_to_any_others(environment, num_processes):
    address = f"localhost:{free_port()}"
    processes = [
        _start([_SCRIPT, "transfer", address, num_processes, process_id], environment)
        for process_id in range(num_processes)
    ]
    for process in processes:
        code, out, error = _end(process)
        assert (code, out.splitlines()[-1:]) == (0, ["all as it should be"]), error


def test_a_checkpoint_holds_what_several_processes_have(environment, tmp_path):
    address = f"localhost:{free_port()}"
    processes = [
        _start([_SCRIPT, "save_and_restore", address, i, tmp_path], environment) for i in (0, 1)
    ]
    for process in processes:
        code, out, error = _end(process)
        assert (code, out.splitlines()[-1:]) == (0, ["all as it should be"]), error


def _join(environment, *rows, timeout_s=60, delays=None):
    """How processes end that join a run, each given (num_processes, process_id)."""
    address, processes = f"localhost:{free_port()}", []
    for place, row in enumerate(rows):
        time.sleep((delays or {}).get(place, 0))
        processes.append(_start([_SCRIPT, "join", address, *row, timeout_s], environment))
    return [_end(process) for process in processes]


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
    ends = _join(environment, *rows, timeout_s=12)
    assert time.monotonic() - start < 90
    for code, _, error in ends:
        assert code == 2 and message in error, ends


def test_a_configuration_that_differs_and_a_process_too_many(environment, train, tmp_path):
    command = [*train, "--config.train.num_steps=2", f"--workdir={tmp_path}"]
    for name, values in (("seed", (0, 1)), ("placement.num_devices", (2, 4))):
        address = f"--coordinator=localhost:{free_port()}"
        processes = [
            _start(
                [*command, f"--config.{name}={value}", address, "--num_processes=2",
                 f"--process_id={process_id}"],
                environment,
            )
            for process_id, value in enumerate(values)
        ]  # fmt: skip
        for process in processes:
            code, _, error = _end(process)
            assert code == 2 and f"config.{name.partition('.')[0]}=" in error, error
            assert "in process 1 is not that of process 0" in error

    code, out, error = _end(_launch(3, [*command, "--config.placement.num_devices=2"], environment))
    assert code == 2, error
    assert "process 2 has none of the devices that blocks live on" in out
    assert error.endswith("ended with code 2; the others were ended")


@pytest.mark.parametrize(
    "num_processes, arguments",
    [
        (2, (*_TWO_BLOCKS, "--config.eval.log_drift=True")),
        (2, (*_TWO_BLOCKS, "--config.method.name=sequential")),
        (2, (*_TWO_BLOCKS, "--config.method.name=ddg")),
        (2, (*_TWO_BLOCKS, "--config.method.name=pipeline_backprop")),
        (3, ("--config.train.log_gradient_norm=True",)),
        (4, ()),
    ],
    ids=["2", "sequential", "ddg", "pipeline_backprop", "3", "4"],
)
def test_processes_compute_what_one_computes(
    environment, train, tmp_path, num_processes, arguments
):
    """One device a process: the same programs, the same numbers."""
    command = [*train, *arguments, "--config.train.num_steps=14"]
    command += [f"--config.placement.num_devices={num_processes}"]
    code, _, error = _end(_start([*command, f"--workdir={tmp_path / 'one'}"], environment))
    assert code == 0, error
    code, out, error = _end(
        _launch(num_processes, [*command, f"--workdir={tmp_path / 'many'}"], environment)
    )
    assert code == 0, (out, error)
    (one, one_metrics), (many, many_metrics) = (
        _result(tmp_path / name) for name in ("one", "many")
    )
    assert many["params_sha256"] == one["params_sha256"]
    assert many_metrics == one_metrics
    assert many["num_processes"] == num_processes and one["num_processes"] == 1
    assert many["devices_per_block"] == one["devices_per_block"]
    assert one_metrics.count("test/block_") >= 1


@pytest.mark.parametrize(
    "arguments",
    [
        (
            "--config.placement.devices_per_block=(1,2,1)",
            "--config.partition.num_blocks=3",
            "--config.partition.strategy=uniform",
        ),
        (
            "--config.method.name=data_parallel",
            "--config.placement.num_devices=4",
            "--config.placement.kind=fused",
        ),
    ],
    ids=["uneven", "data_parallel"],
)
def test_a_block_may_be_on_devices_of_two_processes(environment, train, tmp_path, arguments):
    """Sums over devices of two processes may be in another order."""
    runs = {}
    for name, start in (("one", _start), ("two", functools.partial(_launch, 2))):
        command = [*train, *arguments, "--config.train.num_steps=6"]
        code, out, error = _end(start([*command, f"--workdir={tmp_path / name}"], environment))
        assert code == 0, (out, error)
        runs[name] = [json.loads(line) for line in _result(tmp_path / name)[1].splitlines()]
    assert [row["step"] for row in runs["one"]] == [row["step"] for row in runs["two"]]
    for row, other in zip(runs["one"], runs["two"], strict=True):
        assert other == pytest.approx(row, rel=1e-5)


def test_a_killed_process_is_named_and_the_run_goes_on_as_if_it_had_not_been(
    environment, train, tmp_path
):
    """Goes on in two processes again, and in one."""
    command = [*train, *_TWO_BLOCKS, "--config.placement.num_devices=2"]
    command += ["--config.train.num_steps=200", "--config.checkpoint.every_steps=10"]
    command += ["--config.eval.every_epochs=5.0"]
    for name, killed in (("two", 1), ("one", 0)):
        workdir = tmp_path / name
        command_here = [*command, f"--workdir={workdir}"]
        run = [*command_here, f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
        processes = [_start([*run, f"--process_id={i}"], environment) for i in (0, 1)]
        deadline = time.monotonic() + 300
        while not list(workdir.glob("checkpoints/[0-9]*0")) and time.monotonic() < deadline:
            assert all(process.poll() is None for process in processes)
            time.sleep(0.02)
        processes[killed].send_signal(signal.SIGKILL)
        start = time.monotonic()
        code, _, error = _end(processes[1 - killed], timeout_s=60)
        assert time.monotonic() - start < 30
        # Without process 0 jax itself aborts the others, if it is quicker.
        assert code == 1 or (killed == 0 and code == -signal.SIGABRT)
        if code == 1:
            assert f"process {killed} has stopped without a word" in error
        assert json.loads((workdir / "summary.json").read_text())["finished"] is False

        after = (
            _launch(2, command_here, environment)
            if name == "two"
            else _start(command_here, environment)
        )
        code, out, error = _end(after)
        assert code == 0, (out, error)
    code, _, error = _end(_start([*command, f"--workdir={tmp_path / 'whole'}"], environment))
    assert code == 0, error
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
    code, out, error = _end(_launch(3, [script], environment))
    assert code == 7 and time.monotonic() - start < 30
    assert "[1] going" in out
    assert error == "error: process 1 ended with code 7; the others were ended"
    for arguments, message in (
        (["--num_processes=2"], "give --num_processes=N -- SCRIPT.py"),
        (["--num_processes=2", "--", "missing.py"], "missing.py is not a file"),
        (["--num_processes=0", "--", script], "num_processes"),
    ):
        code, _, error = _end(_start(["experiments/launch_local.py", *arguments], environment))
        assert code == 2 and message in error
