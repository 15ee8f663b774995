"""What the README shows runs as it stands."""

import pathlib
import re
import subprocess
import sys

import pytest

_README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
_EXAMPLES = re.findall(r"```python\n(.*?)```", _README, flags=re.DOTALL)


def _run(example):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_example_of_a_search():
    (example,) = (example for example in _EXAMPLES if "dgl_jax.sedona" in example)
    output = _run(example)
    assert float(re.search(r"validation loss (\d+\.\d+)", output)[1]) < 1.6  # Chance is 2.3.
    assert re.search(r"Grouping\(cuts=\([012],\), heads=\([01],\)", output)


@pytest.mark.slow
def test_the_example_with_a_users_own_network_learns():
    (example,) = (example for example in _EXAMPLES if "dgl_jax.sedona" not in example)
    accuracies = [int(percent) for percent in re.findall(r"(\d+)%", _run(example))]
    assert len(accuracies) == 2 and min(accuracies) > 50  # Chance is 10.
