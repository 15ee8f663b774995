"""What the documentation says holds: examples, commands, names, links, the tutorial."""

import ast
import doctest
import importlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from dgl_jax.config import Config, SearchConfig, check_field_name, from_dict
from dgl_jax.data import describe_dataset
from dgl_jax.grouping import (
    choose_cuts_heads_and_devices,
    configured_blocks,
    configured_network,
)
from dgl_jax.methods import METHODS
from dgl_jax.placement import make_placements, over_all

_ROOT = pathlib.Path(__file__).parents[1]
_PAGES = sorted((_ROOT / "docs" / "methods").glob("*.md"))
_DOCUMENTS = [
    *sorted((_ROOT / "docs").rglob("*.md")),
    *sorted((_ROOT / "experiments").rglob("*.md")),
    _ROOT / "README.md",
    _ROOT / "WORKSPACE.md",
]
_SOURCES = {
    ".".join(path.relative_to(_ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((_ROOT / "dgl_jax").rglob("*.py"))
}
_WITH_EXAMPLES = [name for name, path in _SOURCES.items() if ">>> " in path.read_text()]
# Those with functions that a researcher calls first.
_MUST_HAVE_EXAMPLES = {
    f"dgl_jax.{name}"
    for name in (
        "auxiliary",
        "block",
        "config",
        "cost",
        "data",
        "data.augment",
        "data.dataset",
        "data.sources",
        "data.statistics",
        "drift",
        "evaluation",
        "grouping",
        "losses",
        "methods.async_dgl",
        "methods.async_dgl_parallel",
        "methods.backprop",
        "methods.data_parallel",
        "methods.ddg",
        "methods.dgl",
        "methods.dni",
        "methods.features_replay",
        "methods.method",
        "methods.pipeline_backprop",
        "methods.sequential",
        "models",
        "models.cnn",
        "models.layers",
        "models.network",
        "models.resnet",
        "models.vgg",
        "optim",
        "partition",
        "pipeline",
        "placement",
        "replay",
        "replay_buffer",
        "schedule",
        "sedona.discretise",
        "sedona.hypergradient",
        "sedona.inner",
        "sedona.outer",
        "sedona.random_groupings",
        "sedona.relaxation",
        "simulator",
        "tables",
        "types",
        "variants",
    )
}
# Images and classes of the sets that do not ship with the package.
_TFDS_SETS = {"cifar10": ((32, 32, 3), 10), "imagenet2012": ((224, 224, 3), 1000)}


def test_the_first_functions_to_call_have_examples():
    assert _MUST_HAVE_EXAMPLES <= set(_WITH_EXAMPLES)


def _public_without_docstring(nodes, prefix):
    """Names of functions, classes and their methods; those in functions are nobody's to call."""
    for node in nodes:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        if not ast.get_docstring(node):
            yield name
        if isinstance(node, ast.ClassDef):
            yield from _public_without_docstring(node.body, name)


def test_all_that_is_public_has_a_docstring():
    trees = {name: ast.parse(path.read_text()) for name, path in _SOURCES.items()}
    assert [name for name, tree in trees.items() if tree.body and not ast.get_docstring(tree)] == []
    missing = [_public_without_docstring(tree.body, name) for name, tree in trees.items()]
    assert [name for names in missing for name in names] == []


@pytest.mark.parametrize("name", _WITH_EXAMPLES)
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0


def _commands(page):
    """Each command of a page, as its words."""
    text = page.read_text().replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^ {4}(python .*)$", text, re.MULTILINE)]


def _parse(words):
    """The configuration of a command, and its class, as the scripts read it."""
    python, script, *arguments = words
    assert python == "python" and (_ROOT / script).is_file()
    config_class = SearchConfig if script.endswith("search.py") else Config
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=words[1:])
    flags.DEFINE_string("workdir", None, "The run's folder.", flag_values=values)
    assert values([script, *arguments]) == [script] and values.workdir.startswith("runs/")
    return from_dict(values.config.to_dict(), config_class)


@pytest.mark.filterwarnings("ignore:the load_module")  # Of ml_collections.
@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.stem)
def test_commands_make_blocks_and_a_schedule(page, monkeypatch, tmp_path):
    monkeypatch.chdir(_ROOT)
    # Stands for what the command above it would find.
    found, rows = tmp_path / "search.json", range(7)
    result = {"alpha": [[row, 0.0] for row in rows], "beta": [[0.0, 1.0] for row in rows]}
    result |= {"network": "resnet18", "candidates": ["sepconv_1", "sepconv_4"]}
    found.write_text(json.dumps(result))
    commands = _commands(page)
    methods, data_names = set(), set()
    for words in commands:
        config = _parse([word.replace("runs/search/search.json", str(found)) for word in words])
        data_names.add(config.data.name)
        assert (config.data.data_dir == "TFDS_DIR") == (config.data.name in _TFDS_SETS)
        image_shape, num_classes = _TFDS_SETS.get(config.data.name) or (
            (description := describe_dataset(name=config.data.name)).image_shape,
            description.num_classes,
        )
        network = configured_network(config, num_classes)
        if isinstance(config, SearchConfig):
            continue
        methods.add(config.method.name)
        cuts, heads, devices = choose_cuts_heads_and_devices(
            config, network, num_classes, image_shape
        )
        blocks = configured_blocks(config, network, cuts, heads, num_classes)
        placement = config.placement
        if config.method.name == "data_parallel":
            placement = over_all(placement)
        assert len(make_placements(placement, len(blocks), devices)) == len(blocks)
        method = METHODS[config.method.name]
        schedule = method.make_schedule(config, len(blocks), num_updates=30, steps_per_epoch=10)
        assert next(schedule.tasks(0)) or config.method.name == "async_dgl_parallel"
    pages_methods = {"dni": {"dni", "cdni"}, "sedona": {"dgl"}}
    assert methods == pages_methods.get(page.stem, {page.stem})
    assert "embedded" in data_names  # One that runs as it is printed.


_OTHERS = [_ROOT / "README.md", _ROOT / "experiments" / "results" / "README.md"]


@pytest.mark.filterwarnings("ignore:the load_module")  # Of ml_collections.
@pytest.mark.parametrize("document", _OTHERS, ids=lambda path: path.parent.name)
def test_commands_of_training_and_search_are_valid(document, monkeypatch):
    monkeypatch.chdir(_ROOT)
    commands = [w for w in _commands(document) if w[1].endswith(("/train.py", "/search.py"))]
    for words in commands:
        _parse([re.sub("^--workdir=DIR", "--workdir=runs/DIR", word) for word in words])
    assert commands


def test_every_method_has_a_page():
    index = (_ROOT / "docs" / "README.md").read_text()
    assert [name for name in METHODS if f"`{name}`" not in index] == []
    assert [page.name for page in _PAGES if f"(methods/{page.name})" not in index] == []


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.stem)
def test_fields_and_names_in_the_code_are_there(page):
    text = page.read_text()
    config_class, section = Config, None
    for field in re.findall(r"`(\w*\.\w+)(?:=[^`]*)?`", text.partition("## Options")[2]):
        if field.endswith((".py", ".json")):
            continue
        section = field.partition(".")[0] or section
        config_class = SearchConfig if section == "search" else Config
        check_field_name(f"{section}.{field.partition('.')[2]}", config_class)
    in_the_code = text.partition("## In the code")[2].partition("## Deviations")[0]
    sources = "\n".join(path.read_text() for path in _SOURCES.values())
    for name in re.findall(r"`(\w+)`", in_the_code):
        assert re.search(rf"\b(def|class) {name}\b|^{name} = ", sources, re.MULTILINE), name


def _anchors(document):
    """What GitHub makes of its headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", _DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


@pytest.mark.slow
def test_the_tutorial(tmp_path):
    picture = tmp_path / "tutorial.png"
    environment = {"TUTORIAL_STEPS": "20", "TUTORIAL_PICTURE": str(picture)}
    result = subprocess.run(
        [sys.executable, "-W", "error", str(_ROOT / "docs" / "tutorial.py")],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | environment,
    )
    assert result.returncode == 0, result.stderr
    assert picture.read_bytes()[:4] == b"\x89PNG"
    accuracies = [float(percent) for percent in re.findall(r": ([\d.]+)% after 20", result.stdout)]
    assert len(accuracies) == 4 and max(accuracies) > 20  # Chance is 10.
    # The script itself compares them.
    assert "fused     after 2 steps" in result.stdout and "pipelined after 2" in result.stdout
