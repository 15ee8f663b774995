"""A backend that does not start is reported as that, and by nothing else."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from dgl_jax import backend

_NO_TPU = "Unable to initialize backend 'tpu': libtpu.so not found (set JAX_PLATFORMS='')"


@pytest.fixture
def platforms():
    """Sets JAX's platforms for a test; the devices, which exist already, stay."""
    before = jax.config.jax_platforms
    yield lambda value: jax.config.update("jax_platforms", value)
    jax.config.update("jax_platforms", before)


def test_says_what_failed_what_is_at_hand_and_the_remedy(platforms):
    platforms("tpu")
    assert backend.failure(RuntimeError(_NO_TPU)) == (
        "JAX_PLATFORMS=tpu can't be used: Unable to initialize backend 'tpu': libtpu.so not found; "
        "this host has 8 cpu device(s); unset JAX_PLATFORMS, or install jax for that platform "
        "(requirements-cuda.txt, requirements-tpu.txt)"
    )


def test_of_several_processes_none_looks_for_what_is_at_hand(platforms, monkeypatch):
    platforms("tpu")
    monkeypatch.setattr(backend.distributed, "num_processes", lambda: 2)
    monkeypatch.setattr(jax, "devices", lambda: pytest.fail("must not wait for the others"))
    assert "not found; unset JAX_PLATFORMS" in backend.failure(RuntimeError(_NO_TPU))


def test_without_a_choice_the_remedy_is_the_cpu(platforms):
    platforms("")
    assert backend.failure(RuntimeError(_NO_TPU)) == (
        "JAX_PLATFORMS is not set, and Unable to initialize backend 'tpu': libtpu.so not found; "
        "try JAX_PLATFORMS=cpu"
    )


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("out of memory"), ValueError()])
def test_other_errors_are_none_of_a_backend(error):
    assert backend.failure(error) is None


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is an NVIDIA GPU")
@pytest.mark.parametrize(
    "command",
    [
        "train.py --config={configs}/quickstart.py --workdir={out}",
        "benchmark.py memory --out={out}",
    ],
    ids=["train", "benchmark"],
)
def test_a_script_says_it_in_one_line_and_leaves_nothing_behind(command, tmp_path):
    experiments = pathlib.Path(__file__).resolve().parents[1] / "experiments"
    out = tmp_path / "out"
    script, *arguments = command.format(configs=experiments / "configs", out=out).split()
    result = subprocess.run(
        [sys.executable, str(experiments / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cuda"},
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: JAX_PLATFORMS=cuda can't be used: no NVIDIA GPU is visible; ")
    assert "this host has 1 cpu device(s); unset JAX_PLATFORMS" in line
    assert not out.exists() or not list(out.iterdir())
