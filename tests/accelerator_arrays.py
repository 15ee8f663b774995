"""Makes CPU arrays behave as an accelerator's do, as far as the transfer guard can tell.

The guard lets every copy of a CPU array to the host pass, since numpy reads it where it lies. Here
numpy has to ask, and under ``jax.transfer_guard("disallow")`` it is refused what an accelerator's
array would be refused: every copy that is not by `jax.device_get`.
"""

import contextlib
import ctypes

from jax._src.array import ArrayImpl
from jax._src.lib import guard_lib

# In CPython's PyTypeObject: the pointer to a type's buffer protocol. numpy reads a CPU array by it;
# an accelerator's array has none to offer.
_TP_AS_BUFFER = 160


def refuse(array):
    raise RuntimeError(
        f"Disallowed device-to-host transfer: shape={array.shape}, dtype={array.dtype}"
    )


@contextlib.contextmanager
def accelerator_arrays(refuse=refuse):
    """Within it ``refuse(array)`` is called at every implicit copy to the host under the guard."""
    own_value, own_copy_to_host = ArrayImpl._value, ArrayImpl.copy_to_host_async

    def check(array):
        state = guard_lib.thread_local_state()
        if (
            array._npy_value is None
            and state.device_to_host in _REFUSING
            and not state.explicit_device_get
        ):
            refuse(array)

    def value(array):
        check(array)
        return own_value.fget(array)

    def copy_to_host_async(array):
        check(array)
        return own_copy_to_host(array)

    slot = ctypes.c_void_p.from_address(id(ArrayImpl) + _TP_AS_BUFFER)
    buffer_protocol = slot.value
    ArrayImpl._value, ArrayImpl.copy_to_host_async = property(value), copy_to_host_async
    slot.value = None
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(ArrayImpl))
    try:
        yield
    finally:
        slot.value = buffer_protocol
        ArrayImpl._value, ArrayImpl.copy_to_host_async = own_value, own_copy_to_host
        ctypes.pythonapi.PyType_Modified(ctypes.py_object(ArrayImpl))


_REFUSING = (guard_lib.TransferGuardLevel.DISALLOW, guard_lib.TransferGuardLevel.DISALLOW_EXPLICIT)
