"""Compiling for devices that need not be there: what the command says, here of eight CPU devices."""

import importlib
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dgl_jax.errors import UserError

_ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def hlo(monkeypatch):
    monkeypatch.syspath_prepend(str(_ROOT / "experiments"))
    return importlib.import_module("benchmarks.hlo")


@pytest.fixture
def programs(monkeypatch):
    monkeypatch.syspath_prepend(str(_ROOT / "experiments"))
    return importlib.import_module("benchmarks.programs")


def _shardings(num_devices):
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("data",), axis_types=(AxisType.Auto,))
    return [NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ())]


def test_collectives_of_a_compiled_program(hlo):
    split, whole = _shardings(8)
    weights = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=whole)
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=split)

    def gradient(weights, x):
        return jax.grad(lambda weights: jnp.sum(jnp.tanh(x @ weights)))(weights)

    text = jax.jit(gradient, out_shardings=whole).lower(weights, x).compile().as_text()
    assert hlo.collectives(text) == {"all-reduce": {"count": 1, "bytes": 32 * 16 * 4}}

    gather = jax.jit(lambda x: x + 1, out_shardings=whole).lower(x).compile().as_text()
    assert hlo.collectives(gather) == {"all-gather": {"count": 1, "bytes": 64 * 32 * 4 // 8}}


# One of each kind, as the compilers of accelerators write them down.
_TEXT = """\
HloModule jit_f, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%inside (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0:T(8,128)S(1)} parameter(0)
  ROOT %nested = f32[8,4]{1,0} fusion(%p), kind=kLoop, calls=%other
}

%body (s: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %s = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%s), index=1
  %cc = (f32[8,4]{1,0}, u8[0]{0}) custom-call(%x), custom_call_target="__cudnn$convForward"
  %r = bf16[2,4]{1,0} get-tuple-element(%cc), index=0
  %rs = bf16[2,4]{1,0} reduce-scatter(%r), dimensions={0}, to_apply=%sum
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%x, %x), metadata={op_name="jit(f)/a, b (c)"}
}

%condition (s.1: (s32[], f32[8,4])) -> pred[] {
  %s.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %lt = pred[] fusion(%s.1), kind=kLoop, calls=%inside
}

%branch_a (q: f32[8,4]) -> f32[8,4] {
  %q = f32[8,4]{1,0} parameter(0)
  ROOT %f.1 = f32[8,4]{1,0} fusion(%q), kind=kInput, calls=%inside
}

%branch_b (q.1: f32[8,4]) -> f32[8,4] {
  ROOT %q.1 = f32[8,4]{1,0} parameter(0)
}

%command_buffer (z: f32[8,4]) -> f32[8,4] {
  %z = f32[8,4]{1,0} parameter(0)
  ROOT %f.2 = f32[8,4]{1,0} fusion(%z), kind=kLoop, calls=%inside
}

ENTRY %main (w: f32[8,4]) -> f32[8,4] {
  %w = f32[8,4]{1,0:T(8,128)} parameter(0)
  %ars = f32[8,4]{1,0} all-reduce-start(%w, /*index=1*/%w), to_apply=%sum
  %ard = f32[8,4]{1,0} all-reduce-done(%ars)
  %perm = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[]) collective-permute-start(%w)
  %tup = (s32[], f32[8,4]{1,0}) tuple(%w, %w)
  %loop = (s32[], f32[8,4]{1,0}) while(%tup), condition=%condition, body=%body
  %i = s32[] constant(0)
  %cond = f32[8,4]{1,0} conditional(%i, %w, %w), branch_computations={%branch_a, %branch_b}
  ROOT %call = f32[8,4]{1,0} call(%cond), to_apply=%command_buffer
}
"""


def test_kernels_and_collectives_of_a_text(hlo):
    # Those of the loop's body, one branch and the call; none inside of fusions or conditions.
    assert hlo.kernels(_TEXT) == {"fusion": 2, "custom-call": 1}
    assert hlo.collectives(_TEXT) == {
        "all-reduce": {"count": 1, "bytes": 2 * 8 * 4 * 4},
        "collective-permute": {"count": 1, "bytes": 8 * 4 * 4},
        "reduce-scatter": {"count": 1, "bytes": 2 * 4 * 2},
    }
    assert hlo.num_bytes("(f8e4m3fn[3,2]{1,0}, s4[3], c64[<=2])") == 6 + 2 + 16


def test_what_a_recorder_writes_down(programs):
    split, whole = _shardings(4)
    with programs.Recorder() as recorder:
        double = jax.jit(lambda x: {"y": 2 * x}, out_shardings={"y": split}, donate_argnums=0)
        x = jax.device_put(np.ones((8, 2), np.float32), split)
        y = double(double(x)["y"])["y"]
        with recorder.aside():
            jax.jit(jnp.sum)(y)
        number = jax.device_get(jax.jit(jnp.max, out_shardings=whole)(y))
    assert y == jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=split)
    assert number.shape == ()
    first, second = recorder.programs
    assert (second.name, first.num_devices(), first.options["donate_argnums"]) == ("max", 4, 0)
    compiled = first.lower().compile()
    assert compiled.memory_analysis().alias_size_in_bytes == 8 * 2 * 4 // 4
    assert float(jax.jit(jnp.sum)(jnp.ones(3))) == 3.0  # JAX is itself again.


@pytest.fixture
def compile_for(monkeypatch, tmp_path):
    """``run(**flags)`` returns what failed, and compile_for.json."""
    monkeypatch.syspath_prepend(str(_ROOT / "experiments"))
    monkeypatch.setattr(sys, "argv", ["experiments/benchmark.py", "compile_for"])
    module = importlib.import_module("benchmarks.compile_for")
    flags.FLAGS.mark_as_parsed()
    enabled = jax.config.jax_enable_compilation_cache

    def run(**values):
        small = {"target": "cpu", "networks": "cnn4:0.0625", "batch_size": "8", "image_size": "8"}
        with flagsaver.as_parsed(**small | values):
            failures = module.compile_for(tmp_path)
        return failures, json.loads((tmp_path / "compile_for.json").read_text())

    yield run
    jax.config.update("jax_enable_compilation_cache", enabled)


def test_a_program_is_compiled_once(compile_for, tmp_path, capsys):
    failures, first = compile_for(methods="dgl:placement.data_parallel=2,data")
    assert failures == []
    assert "5/5 [" in capsys.readouterr().err  # Which row of how many.
    by_name = {(row["method"].partition(":")[0], row["program"]): row for row in first["rows"]}
    assert list(by_name) == [
        ("dgl", "step"),
        ("data", "key"),
        ("data", "epoch_order"),
        ("data", "make_batch"),
        ("data", "eval_batch_from"),
    ]
    for row in first["rows"]:
        assert row["failure"] == "" and row["compile_seconds"] > 0 and row["flops"] >= 0
        sizes = [row[f"{name}_bytes"] for name in ("argument", "output", "temp")]
        assert row["peak_bytes"] == sum(sizes) - row["alias_bytes"] > 0
        assert row["kernels"]["fusion"] >= 0 and row["versions"]["jax"] == jax.__version__
    # The states are donated; metrics, and the table of all outputs, come out besides.
    step = by_name["dgl", "step"]
    assert 0 < step["output_bytes"] - step["alias_bytes"] < step["alias_bytes"] / 50
    assert step["num_devices"] == 2 and step["kernels"]["fusion"] > 0
    assert step["collectives"]["all-reduce"]["bytes"] > 0
    assert by_name["data", "make_batch"]["collectives"] == {}

    # The same again compiles nothing: times are the first ones. A new row is added.
    _, second = compile_for(methods="data,backprop")
    assert second["rows"][:5] == first["rows"]
    assert [(row["method"], row["program"]) for row in second["rows"][5:]] == [("backprop", "step")]
    text = (tmp_path / "compile_for.md").read_text()
    assert text.count("\n| cnn4:0.0625") == 6 and "cpu: batches of 8, 8 pixels" in text
    assert "| backprop " in text and "all-reduce: " in text


def test_what_does_not_compile_is_a_row(compile_for, programs, monkeypatch, tmp_path):
    def lower(program):
        raise ValueError("no such operation\non this device")

    with monkeypatch.context() as patched:
        patched.setattr(programs.Program, "lower", lower)
        failures, content = compile_for(methods="backprop")
    reason = "ValueError: no such operation"
    assert failures == [f"cnn4:0.0625, backprop, step: {reason}"]
    (row,) = content["rows"]
    assert (row["failure"], row["temp_bytes"], row["flops"]) == (reason, None, None)
    assert f"| {reason} |" in (tmp_path / "compile_for.md").read_text()
    # It is tried again.
    failures, content = compile_for(methods="backprop")
    (row,) = content["rows"]
    assert failures == [] and row["failure"] == "" and row["temp_bytes"] > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target": "v5f:2x2"}, "--target=v5f:2x2 is unknown; choose from h200, cpu, or"),
        ({"methods": "x"}, "--methods=x: 'x' must be one of"),
        ({"methods": "dgl:train.steps=2"}, "config.train.steps is not a known field"),
        ({"methods": "dgl:train"}, "--methods=dgl:train: train must be FIELD=VALUE"),
        ({"num_blocks": "x"}, "--num_blocks=x must be"),
        ({"cuts": "1-x"}, "--cuts=1-x must be"),
        ({"remat": "yes"}, "--remat=yes must be on or off"),
        ({"networks": "cnn4:x"}, "--networks=cnn4:x must be"),
    ],
)
def test_mistakes(compile_for, values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        compile_for(**values)


@pytest.mark.parametrize(
    ("target", "package", "kind"),
    [("h200", "jax_cuda13_plugin", "cuda"), ("v5e:2x2", "libtpu", "tpu")],
)
def test_a_missing_compiler(compile_for, monkeypatch, target, package, kind):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    with pytest.raises(UserError, match=f"pip install -r requirements-aot-{kind}.txt"):
        compile_for(target=target)
    assert (_ROOT / f"requirements-aot-{kind}.txt").exists()


@pytest.mark.slow
def test_a_tpu(compile_for):
    pytest.importorskip("libtpu")
    failures, content = compile_for(target="v5e:2x2", methods="dgl:placement.data_parallel=4")
    (row,) = content["rows"]
    assert failures == []
    assert row["target"] == "v5e:2x2" and row["flops"] > 0 and row["argument_bytes"] > 0
    assert row["num_devices"] == 4 and row["collectives"]["all-reduce"]["bytes"] > 0
