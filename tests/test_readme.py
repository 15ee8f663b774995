"""What the README shows runs as it stands."""

import pathlib
import re
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_example_with_a_users_own_network_learns():
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    accuracies = [int(percent) for percent in re.findall(r"(\d+)%", result.stdout)]
    assert len(accuracies) == 2 and min(accuracies) > 50  # Chance is 10.
