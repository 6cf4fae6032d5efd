"""Runs the CUDA kernels of `arm_zoo.ops.cuda` on a CPU, whose compiler of C++ makes functions of them."""

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from arm_zoo.ops import cuda

COMPILER = shutil.which("g++") if sys.platform == "linux" else None
HEADER = Path(__file__).with_suffix(".h")
INSTRUCTIONS = Path(cuda.__file__).with_name("instructions.cuh")

ENTRY = """
extern "C" const char *emulated_launch(int grid, int block, const long long *arguments) {{
    emulated::shared_bytes = (sizeof(Shared) + 15) / 16 * 16;
    emulated::kernel_arguments = arguments;
    emulated::kernel_call = [](const long long *arguments) {{
        constexpr auto count = []<class... P>(void (*)(P...)) {{ return std::make_index_sequence<sizeof...(P)>(); }};
        emulated::call({name}, arguments, count({name}));
    }};
    emulated::drawn.seed(1);
    return emulated::launch(grid, block, CLUSTER);
}}
"""


@functools.cache
def _compiled(code: str, folder: str) -> Any:
    """The function `emulated_launch` of a kernel's code."""
    name = hashlib.sha256(code.encode()).hexdigest()[:16]
    source, library = Path(folder, f"{name}.cpp"), Path(folder, f"{name}.so")
    source.write_text(code, encoding="utf-8")
    options = [
        "-std=c++20",
        "-O1",
        "-w",
        "-shared",
        "-fPIC",
        "-fsanitize=alignment",
        "-fsanitize-undefined-trap-on-error",
    ]
    options += ["-U_FORTIFY_SOURCE"]  # its longjmp refuses to go from one stack to another, as threads do here
    done = subprocess.run([str(COMPILER), *options, "-o", library, source], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{COMPILER} cannot compile the kernel: {done.stderr[:4000]}")
    start = ctypes.CDLL(str(library)).emulated_launch
    start.restype = ctypes.c_char_p
    return start


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="emulated-gpu-")


class Program:
    """The compiler, as `cuda.core` has it; its kernels are functions of grid, block and arguments."""

    def __init__(self, code: str, language: str, options: Any) -> None:
        self.code = code

    def compile(self, target: str) -> "Program":
        return self

    def get_kernel(self, name: str) -> Callable[..., None]:
        own = self.code.replace(INSTRUCTIONS.read_text(encoding="utf-8"), HEADER.read_text(encoding="utf-8"))
        own, count = re.subn(r"__shared__ Shared sh;", "Shared &sh = *(Shared *)emulated::current->shared;", own)
        assert own != self.code and count == 1
        start = _compiled(own + ENTRY.format(name=name), _folder().name)

        def kernel(grid: int, block: int, *arguments: Any) -> None:
            numbers = [getattr(argument, "value", argument) for argument in arguments]
            if wrong := start(grid, block, (ctypes.c_longlong * len(numbers))(*numbers)):
                raise RuntimeError(f"{name}: {wrong.decode()}")

        return kernel


def launch(stream: Any, config: SimpleNamespace, kernel: Callable[..., None], *arguments: Any) -> None:
    """As `cuda.core.launch`, but it returns when the kernel has run."""
    kernel(config.grid, config.block, *arguments)
