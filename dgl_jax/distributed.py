"""A run of several processes: how they find one another, and what happens when one of them stops.

jax.distributed connects the processes' devices. Before that, and beside it for as long as the run
lasts, process 0 keeps a connection to each of the others, the roll call: it knows who is missing
and who gave another number of processes, and it tells everybody at once when one has failed or
has died. A machine that vanishes without closing its connections is noticed by jax's heartbeats.
"""

import itertools
import json
import os
import socket
import sys
import threading
import time
from multiprocessing import connection
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # Its key-value store has no public name.

from dgl_jax.errors import UserError

_roll_call = None
_num_processes = 1
_calls = itertools.count()  # Of `agree` and `collect`, the same in all processes.
_A_DAY_S = 24 * 3600  # A process that has died is noticed otherwise, and sooner.


def initialize(
    coordinator: str,
    num_processes: int,
    process_id: int,
    connect_timeout_s: float = 120.0,
    heartbeat_timeout_s: int = 60,
) -> None:
    """Joins a run of several processes. Must run before anything touches a device.

    Args:
      coordinator: HOST:PORT of process 0, as all processes reach it; PORT + 1 must be free too.
      num_processes: of the run; the same in all of them.
      process_id: 0 to num_processes - 1, one each.
      connect_timeout_s: how long the processes wait for one another.
      heartbeat_timeout_s: after so long without a sign of life a process counts as dead. One that
        ends or is killed is noticed at once.

    Raises:
      UserError: the arguments don't fit together, or with those of the others, or not all
        processes have come in time.
    """
    global _roll_call, _num_processes
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65535):
        raise UserError(f"--coordinator={coordinator} must be HOST:PORT; try localhost:8476")
    if num_processes < 1:
        raise UserError(f"--num_processes={num_processes} must be at least 1")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} must be in 0 to {num_processes - 1}, as "
            f"--num_processes={num_processes}"
        )
    address = (host, int(port) + 1)
    deadline = time.monotonic() + connect_timeout_s
    if process_id == 0:
        _roll_call = _Leader(address, num_processes, deadline)
    else:
        _roll_call = _Follower(address, num_processes, process_id, connect_timeout_s)
    _num_processes = num_processes
    _allow_transfers(_own_address(host))
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=max(1, round(connect_timeout_s)),
        heartbeat_timeout_seconds=heartbeat_timeout_s,
    )


def initialize_from_cluster(heartbeat_timeout_s: int = 60) -> None:
    """Joins a run whose processes a cluster has started: Slurm, Kubernetes, MPI, a TPU pod.

    The cluster says where the coordinator is and who is who. There is no roll call: a process
    that is missing or dead is noticed by jax, within its time limits.

    Args:
      heartbeat_timeout_s: after so long without a sign of life a process counts as dead.

    Raises:
      UserError: no cluster was recognised.
    """
    global _num_processes
    _allow_transfers(socket.gethostbyname(socket.gethostname()))
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_timeout_s)
    except ValueError as error:
        raise UserError(
            f"--distributed: no cluster was recognised ({error}); give --coordinator, "
            "--num_processes and --process_id"
        ) from error
    _num_processes = jax.process_count()


def free_port() -> int:
    """One of this machine for a coordinator: it is free now, and so is the next."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("", port + 1))
                return port
            except OSError:
                continue


def num_processes() -> int:
    """The number of processes, without touching a device."""
    return _num_processes


def is_for_cpus() -> bool:
    """Whether JAX_PLATFORMS says so; touches no device."""
    return (jax.config.jax_platforms or "").split(",")[0] == "cpu"


def is_main() -> bool:
    """Whether this is process 0, which writes the run's files."""
    return _num_processes == 1 or jax.process_index() == 0


def agree(value: Any) -> Any:
    """Process 0's value, in all processes: JSON of any kind. All must call it.

    Nothing of it runs on a device: a collective there would wait behind, and with, what blocks
    do. No process returns before process 0 has called.
    """
    if _num_processes == 1:
        return value
    store, key = jax_distributed.global_state.client, f"dgl_jax/{next(_calls)}"
    if is_main():
        store.key_value_set(key, json.dumps(value))
    return json.loads(store.blocking_key_value_get(key, 1000 * _A_DAY_S))


def collect(value: Any) -> list[Any]:
    """Every process's value, in all of them, by process: JSON of any kind. All must call it.

    No process returns before all have called.
    """
    if _num_processes == 1:
        return [value]
    store, key = jax_distributed.global_state.client, f"dgl_jax/{next(_calls)}"
    store.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    texts = [
        store.blocking_key_value_get(f"{key}/{process}", 1000 * _A_DAY_S)
        for process in range(_num_processes)
    ]
    return [json.loads(text) for text in texts]


def check_same(config: dict[str, Any]) -> None:
    """Raises UserError in a process whose configuration is not that of process 0."""
    first = agree(config)
    own = json.loads(json.dumps(config))
    for section in own:
        if own[section] != first[section]:
            raise UserError(
                f"config.{section}={own[section]} in process {jax.process_index()} is not that of "
                f"process 0, {first[section]}; give all processes the same configuration"
            )


def finish() -> None:
    """Ends a run in which nothing went wrong: waits for the other processes."""
    if _roll_call is not None:
        _roll_call.finish()
    if _num_processes > 1:
        jax.distributed.shutdown()


def fail(message: str, code: int) -> None:
    """Tells the other processes, which end with that line and exit code too. Returns."""
    if _roll_call is not None and code == 1:
        time.sleep(0.5)  # If this is but the echo of another's end, the roll call says whose.
    if isinstance(_roll_call, _Leader):
        _roll_call.fail(f"process 0: {message}", code)
    elif _roll_call is not None:
        _roll_call.tell({"failed": message, "code": code})  # Process 0 says who.


def _allow_transfers(own_address: str) -> None:
    """What jax needs on CPUs to send arrays from one process to another; elsewhere it has its own."""
    # Nothing here uses the notice; with it, SIGTERM would not end a process.
    jax.config.update("jax_enable_preemption_service", False)
    # Which devices there are is not known yet, and must not be asked before jax is connected.
    if not is_for_cpus():
        return
    # With port 0 jaxlib aborts: the port must be known beforehand.
    jax.config.update("jax_cross_host_transfer_socket_address", f"{own_address}:{free_port()}")
    # The first transfer waits until the other process has compiled what it sends.
    jax.config.update("jax_cross_host_transfer_timeout_seconds", _A_DAY_S)


def _own_address(host: str) -> str:
    """The address of this machine on the network on which it reaches the host."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((socket.gethostbyname(host), 1))  # Sends nothing.
        return probe.getsockname()[0]


def _send(peer: connection.Connection, message: dict[str, Any]) -> None:
    try:
        peer.send_bytes(json.dumps(message).encode())
    except OSError:
        pass  # It has died; whoever reads from it will say so.


def _receive(peer: connection.Connection) -> dict[str, Any] | None:
    """The next message; None when the other end is closed."""
    try:
        return json.loads(peer.recv_bytes())
    except (EOFError, OSError):
        return None


def _end(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code)  # The main thread may wait for a device that will never answer.


_DIED = (
    "{who} has stopped without a word (killed, or its machine failed); the last checkpoint is "
    "whole, and the same command goes on from it"
)


class _Leader:
    """Process 0's side: one thread for each of the others."""

    def __init__(self, address: tuple[str, int], num_processes: int, deadline: float):
        self._num_processes = num_processes
        self._peers: dict[int, connection.Connection] = {}
        self._finished: set[int] = set()
        self._gone: set[int] = set()
        self._has_failed = False
        self._changed = threading.Condition()
        self._refused = None
        try:
            self._listener = connection.Listener(("", address[1]), backlog=num_processes)
        except OSError as error:
            raise UserError(
                f"--coordinator={address[0]}:{address[1] - 1}: port {address[1]} is not free "
                f"({error.strerror}); choose another port"
            ) from error
        threading.Thread(target=self._accept, daemon=True).start()
        with self._changed:
            self._changed.wait_for(
                lambda: self._refused or len(self._peers) == num_processes - 1,
                timeout=max(0.0, deadline - time.monotonic()),
            )
            missing = [str(p) for p in range(1, num_processes) if p not in self._peers]
        if self._refused or missing:
            problem = self._refused or (
                f"--num_processes={num_processes}: process {', '.join(missing)} has not come in "
                "time; start it, or raise --connect_timeout_s"
            )
            self.fail(problem, 2)
            raise UserError(problem)
        self.tell({"complete": True})

    def _accept(self) -> None:
        while True:
            try:
                peer = self._listener.accept()
            except OSError:
                continue  # One that went away at once.
            threading.Thread(target=self._attend, args=(peer,), daemon=True).start()

    def _attend(self, peer: connection.Connection) -> None:
        hello = _receive(peer)
        if hello is None or "process_id" not in hello:
            return  # Not one of ours.
        process_id, given = hello["process_id"], hello["num_processes"]
        with self._changed:
            problem = None
            if given != self._num_processes:
                problem = (
                    f"--num_processes={given} in process {process_id}, but {self._num_processes} "
                    "in process 0; give all the same number"
                )
            elif process_id in self._peers:
                problem = f"--process_id={process_id} was given to two processes; number them"
            if problem:
                self._refused = problem
                _send(peer, {"failed": problem, "code": 2})
            else:
                self._peers[process_id] = peer
            self._changed.notify_all()
        while not problem:
            message = _receive(peer)
            with self._changed:
                if message is not None and "finished" in message:
                    self._finished.add(process_id)
                    self._changed.notify_all()
                    continue
                self._gone.add(process_id)
                self._changed.notify_all()
                if self._has_failed or process_id in self._finished:
                    return
            who = f"process {process_id}"
            text = _DIED.format(who=who) if message is None else f"{who}: {message['failed']}"
            code = 1 if message is None else message["code"]
            self.fail(text, code)
            _end(text, code)

    def tell(self, message: dict[str, Any]) -> None:
        for peer in list(self._peers.values()):
            _send(peer, message)

    def fail(self, message: str, code: int) -> None:
        """Tells all others, and lets them end first: without process 0 jax would abort them."""
        with self._changed:
            self._has_failed = True
        self.tell({"failed": message, "code": code})
        with self._changed:
            self._changed.wait_for(lambda: len(self._gone) == len(self._peers), timeout=1)

    def finish(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._finished) == len(self._peers))
        self.tell({"finished": True})


class _Follower:
    """The side of every other process."""

    def __init__(
        self,
        address: tuple[str, int],
        num_processes: int,
        process_id: int,
        connect_timeout_s: float,
    ):
        deadline = time.monotonic() + connect_timeout_s
        self._finished = threading.Event()
        self._complete = threading.Event()
        while True:  # Process 0 may start later.
            try:
                # The probe has a time limit, which a Client lacks.
                socket.create_connection(address, timeout=5).close()
                self._leader = connection.Client(address)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"--coordinator={address[0]}:{address[1] - 1}: process 0 does not answer "
                        f"there ({error.strerror or error}); is it running, and is that its "
                        "address?"
                    ) from error
                time.sleep(0.2)
        self.tell({"process_id": process_id, "num_processes": num_processes})
        threading.Thread(target=self._attend, daemon=True).start()
        # Process 0 ends the wait: with everybody there, or an error.
        if not self._complete.wait(connect_timeout_s + 30):
            raise UserError(
                f"--coordinator={address[0]}:{address[1] - 1}: what answers at port {address[1]} "
                "is not process 0 of this run; choose another port"
            )

    def _attend(self) -> None:
        while True:
            message = _receive(self._leader)
            if message is None:
                if self._finished.is_set():
                    return
                _end(_DIED.format(who="process 0"), 1)
            if "failed" in message:
                _end(message["failed"], message["code"])
            if "complete" in message:
                self._complete.set()
            if "finished" in message:
                self._finished.set()

    def tell(self, message: dict[str, Any]) -> None:
        _send(self._leader, message)

    def finish(self) -> None:
        self.tell({"finished": True})
        self._finished.wait()
