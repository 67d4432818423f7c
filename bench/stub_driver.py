"""NVIDIA's driver library as far as Triton calls it, with a GPU that takes every launch and does nothing.

`activate` puts Triton's own CUDA driver on it: its launcher, in C, then reads and packs every argument as on a GPU, and
what returns at once is the driver's call that would hand the kernel to the device.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

# What Triton calls by name and only wants to succeed.
_IDLE = """
    cuCtxGetLimit cuCtxSetCurrent cuCtxSetLimit cuDevicePrimaryCtxRetain cuDriverGetVersion cuFuncSetAttribute
    cuFuncSetCacheConfig cuGetErrorString cuInit cuLaunchKernelEx cuModuleUnload cuOccupancyMaxActiveClusters
    cuStreamIsCapturing cuTensorMapEncodeIm2col cuTensorMapEncodeTiled
"""
# What it reads something from. An H100: compute capability 9.0 (attributes 75 and 76), 227 KiB of shared memory.
_ANSWERS = """
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : 232448;
  return 0;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute ? 0 : 1024; return 0; }
static long functions;
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)++functions; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuPointerGetAttribute(unsigned long long *value, int attribute, unsigned long long pointer) {
  *value = pointer;
  return 0;
}
"""


def activate(folder: Path) -> None:
    """Build the library in `folder`, and make Triton launch on its GPU in this process.

    TRITON_INTERPRET must not be set, and nothing may have used the CUDA driver before.
    """
    library = folder / "libcuda.so.1"
    if not library.exists():
        source = "\n".join(f"int {name}() {{ return 0; }}" for name in _IDLE.split()) + _ANSWERS
        command = ["gcc", "-shared", "-fPIC", "-O2", "-x", "c", "-", f"-Wl,-soname,{library.name}", "-o", str(library)]
        subprocess.run(command, input=source, text=True, check=True)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)  # from here on its name leads to it
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)

    import triton
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    # PyTorch answers these, and has no CUDA here.
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    driver.get_device_capability = lambda device=0: (9, 0)
    triton.runtime.driver.set_active(driver)
