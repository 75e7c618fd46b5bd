"""Asks CUDA's driver for the GPUs of this process; a separate script, since a process that asked cannot fork ranks.

    python cluster/gpu_driver.py

Prints a JSON list with name, compute capability (10 x major + minor) and bytes of memory of each GPU, in the driver's
order; an empty one without a driver or a GPU.
"""

import ctypes
import json

MAJOR, MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of the driver's interface."""
NAME_BYTES = 128


def find_gpus() -> list[dict[str, object]]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves; raises RuntimeError naming the call that failed."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []

    def ask(name: str, *arguments: object) -> None:
        code = getattr(driver, name)(*arguments)
        if code:
            raise RuntimeError(f"CUDA's driver: {name} failed with code {code}")

    if driver.cuInit(0):  # a driver without a GPU, as images for GPUs have it
        return []
    count = ctypes.c_int()
    ask("cuDeviceGetCount", ctypes.byref(count))
    found: list[dict[str, object]] = []
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        memory, name = ctypes.c_size_t(), ctypes.create_string_buffer(NAME_BYTES)
        ask("cuDeviceGet", ctypes.byref(device), index)
        ask("cuDeviceGetAttribute", ctypes.byref(major), MAJOR, device)
        ask("cuDeviceGetAttribute", ctypes.byref(minor), MINOR, device)
        ask("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        ask("cuDeviceGetName", name, NAME_BYTES, device)
        capability = 10 * major.value + minor.value
        found.append({"name": name.value.decode(), "capability": capability, "memory_bytes": memory.value})
    return found


if __name__ == "__main__":
    print(json.dumps(find_gpus()))
