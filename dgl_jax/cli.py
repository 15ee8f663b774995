"""How a script starts and ends: its flags, its --help, its one line for an error, its exit code.

0: finished. 2: the user's mistake. 1: anything else.

JAX is imported late, and so it should be in a script: --help and a mistyped flag need not wait.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from dgl_jax.config import Config, check_field_name, describe_fields, from_dict
from dgl_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Needed: the configuration, a Python file; --config.FIELD=VALUE sets a field."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Needed: the run's folder.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "Of a run of several processes: HOST:PORT of the first; takes PORT + 1 too.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many; with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which this is, from 0; with --coordinator.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Whether the cluster (Slurm, Kubernetes, MPI, a TPU pod) says all that."
)
_CONNECT_TIMEOUT = flags.DEFINE_float(
    "connect_timeout_s", 120.0, "How long processes wait for one another.", lower_bound=1.0
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout_s", 60, "A machine silent for so long counts as dead.", lower_bound=5
)

_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "The folder of compiled programs, for the next run; empty for none. By default the environment's "
    "JAX_COMPILATION_CACHE_DIR, and without that programs/ in $DGL_JAX_CACHE or ~/.cache/dgl_jax.",
)


def run(main: Callable[[Any, str], None], config_class: type = Config) -> None:
    """Parses ``--config``, a file of that class, and ``--workdir``; ``main(config, workdir)``.

    The exit code is 2, with one line on stderr, where there was a `UserError`. ``--help`` prints
    `help_text` and ends with 0.
    """

    def parse_flags(argv: Sequence[str]) -> list[str]:
        if not {"--help", "-help", "-h", "-?"}.isdisjoint(argv[1:]):
            print(help_text(argv[0], sys.modules[main.__module__].__doc__, config_class))
            sys.exit(0)
        try:
            _check_config_arguments(argv[1:], config_class)
            remaining = flags.FLAGS(list(argv))
            if len(remaining) > 1:
                raise UserError(f"argument {remaining[1]!r} is not a flag; try --{remaining[1]}")
            return remaining
        except flags.Error as error:
            # A configuration file that fails comes as a traceback; its last line says why.
            reason = str(error).strip().splitlines()[-1]
            _fail(reason.removeprefix("dgl_jax.errors.UserError: "), 2)
        except UserError as error:
            _fail(str(error), 2)

    def run_main(argv: Sequence[str]) -> None:
        del argv
        from dgl_jax import backend, distributed

        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax tells each step of a save.
        try:
            for name in ("config", "workdir"):
                if not flags.FLAGS[name].value:
                    raise UserError(f"--{name} is missing; try --help")
            config = from_dict(_CONFIG.value.to_dict(), config_class)
            _use_compilation_cache()
            _join_processes()
            main(config, _WORKDIR.value)
            distributed.finish()
        except UserError as error:
            _fail(str(error), 2)
        except KeyboardInterrupt:
            _fail("interrupted; the same command goes on from the last checkpoint", 1)
        except Exception as error:
            if (backend_failure := backend.failure(error)) is not None:
                _fail(backend_failure, 2)
            if "No space left on device" not in "".join(traceback.format_exception(error)):
                if distributed.num_processes() == 1:
                    raise
                traceback.print_exc()
                _fail(f"{type(error).__name__}: {error}", 1)
            _fail(
                f"workdir: {_WORKDIR.value} has no space left; its last checkpoint is whole; "
                "free some space and run the same command again",
                2,
            )

    app.run(run_main, flags_parser=parse_flags)


def help_text(script: str, about: str, config_class: type = Config) -> str:
    """What ``--help`` prints: every flag and every field, each with its default on a line.

    Args:
      script: its path.
      about: its docstring.
      config_class: of its configuration.
    """
    lines = [
        f"usage: python {script} --config=FILE --workdir=DIR [--FLAG=VALUE] [--config.FIELD=VALUE]\n",
        about.strip() + "\n",
        "Flags (--helpfull lists those of absl too):",
    ]
    by_module = flags.FLAGS.flags_by_module_dict()
    # Of the script's own module absl says its path.
    for flag in [*by_module[__name__], *by_module.get(sys.argv[0], ())]:
        lines.append(_help_line(flag.name, flag.default, flag.help))
    lines.append("\nFields of the configuration with their own defaults; FILE may set others:")
    before = ""
    for name, (default, help_line) in describe_fields(config_class).items():
        section = name.rpartition(".")[0]
        if section != before:
            lines.append(f"\n{section}: {getattr(config_class(), section).__doc__}")
            before = section
        lines.append(_help_line(f"config.{name}", default, help_line))
    return "\n".join(lines)


def _help_line(name: str, default: Any, help_line: str) -> str:
    """``--name=default  help``, where the first part can be given to the script as it stands."""
    value = str(default)
    if isinstance(default, tuple) or not value:
        value = f'"{value}"'
    argument = f"--{name}" if default is None else f"--{name}={value}"
    return f"  {argument:<44}  {help_line}"


def _use_compilation_cache() -> None:
    """Keeps programs that took a second or longer to compile."""
    import jax

    from dgl_jax.data.cache import cache_dir

    folder = _COMPILATION_CACHE.value
    if folder is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = str(cache_dir() / "programs")
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", folder or None)


def _join_processes() -> None:
    from dgl_jax import distributed

    given = {"num_processes": _NUM_PROCESSES.value, "process_id": _PROCESS_ID.value}
    if _COORDINATOR.value:
        for name, value in given.items():
            if value is None:
                raise UserError(f"--{name} is missing; --coordinator needs it")
        timeouts = (_CONNECT_TIMEOUT.value, _HEARTBEAT_TIMEOUT.value)
        distributed.initialize(_COORDINATOR.value, *given.values(), *timeouts)
    elif _DISTRIBUTED.value:
        distributed.initialize_from_cluster(_HEARTBEAT_TIMEOUT.value)
    else:
        for name, value in given.items():
            if value is not None:
                raise UserError(
                    f"--{name}={value} is used with --coordinator only; give it, or leave --{name} "
                    "out"
                )


def _check_config_arguments(arguments: Sequence[str], config_class: type) -> None:
    """What config_flags would answer with a traceback."""
    for place, argument in enumerate(arguments):
        name, _, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-"):
            continue
        if name == "config":
            value = value or "".join(arguments[place + 1 : place + 2])
            path = value.partition(":")[0]
            if not (os.path.isfile(path) and path.endswith(".py")):
                raise UserError(
                    f"--config={value} does not name a Python file; "
                    "try --config=experiments/configs/quickstart.py"
                )
        elif name.startswith(("config.", "noconfig.")):
            check_field_name(name.partition(".")[2], config_class)


def _fail(message: str, code: int) -> None:
    from dgl_jax import distributed

    message = " ".join(message.split())
    distributed.fail(message, code)
    print(f"error: {message}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(code)  # Threads that still read or write have nothing to add to that line.
