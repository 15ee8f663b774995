"""A start imports what it uses, and --help says all that can be asked for."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from dgl_jax import cli
from dgl_jax.auxiliary import AUXILIARY
from dgl_jax.config import Config, SearchConfig, default_config, describe_fields
from dgl_jax.models import NETWORKS

_EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
# What is slow to import and used by few: pictures, prepared data, streaming, checkpoints.
_LATE = (
    "matplotlib",
    "tensorflow_datasets",
    "grain",
    "array_record",
    "orbax",
    "tensorboardX",
    "scipy",
    "PIL",
)


@pytest.mark.parametrize("modules", ["dgl_jax, dgl_jax.methods", "dgl_jax.train, dgl_jax.search"])
def test_imports_are_of_what_is_used(modules):
    code = f"import sys, {modules}; print([name for name in {_LATE} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert result.stdout == "[]\n"


def test_help_ends_with_0_and_does_not_wait_for_jax():
    command = [sys.executable, "-X", "importtime", _EXPERIMENTS / "train.py", "--help"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: python ")
    assert "Trains a network as decoupled blocks." in result.stdout
    assert [name for name in describe_fields() if f"--config.{name}=" not in result.stdout] == []
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", result.stderr, re.MULTILINE))
    assert "absl.flags" in imported and imported.isdisjoint({"jax", "numpy", *_LATE})


@pytest.mark.filterwarnings("ignore:the load_module")  # Of ml_collections.
@pytest.mark.parametrize(
    "config_class, file", [(Config, "quickstart.py"), (SearchConfig, "sedona_search.py")]
)
def test_help_has_all_flags_and_fields_as_arguments(config_class, file):
    """Given to a script as they are printed, the fields make the defaults, whatever a file says."""
    text = cli.help_text("script.py", "About it.\n", config_class)
    lines = re.findall(r'^  --([\w.]+)(=".*?"|=\S+|) +(.*)$', text, re.MULTILINE)
    own = {"config", "workdir", "coordinator", "num_processes", "process_id", "distributed"}
    assert own <= {name for name, _, _ in lines} and "--heartbeat_timeout_s=60  " in text
    fields = [line for line in lines if line[0].startswith("config.")]
    described = describe_fields(config_class)
    assert [(name, help_line) for name, _, help_line in fields] == [
        (f"config.{name}", help_line) for name, (_, help_line) in described.items()
    ]
    words = shlex.split(" ".join(f"--{name}{value}" for name, value, _ in fields))
    words.insert(0, f"--config={_EXPERIMENTS / 'configs' / file}")
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=words)
    values(["script.py", *words])
    assert values.config.to_dict() == default_config(config_class).to_dict()


def test_every_field_has_a_line_of_help():
    described = describe_fields(Config) | describe_fields(SearchConfig)
    for name, (_, help_line) in described.items():
        assert re.fullmatch(r"\S.{8,}\.", help_line), name
    assert "One of fused, pipelined." in described["placement.kind"][1]
    for field, names in (("network.name", NETWORKS), ("auxiliary.name", AUXILIARY)):
        assert set(names) <= set(re.findall(r"\w+", described[field][1]))
