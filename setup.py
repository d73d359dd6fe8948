"""Build of pyprune: packages, and the compiled core `pyprune._core` from csrc/.

The CPU part is built whenever there is a C++ compiler, the CUDA part whenever there is nvcc; whether this
machine has a GPU is never asked. The core uses no PyTorch, so one wheel serves every version of PyTorch, but each
Python version needs its own wheel: pybind11 3.1 has no Py_LIMITED_API. nanobind 3.1 has it from Python 3.12 on, and
for 3.11 only with a second package, nanobind-backend, at run time. Environment:
    PYPRUNE_BUILD_CUDA  1: fail without nvcc; 0: leave the CUDA part out; unset: decide by nvcc
    CXX                 the C++ compiler (default: the first of c++, g++, clang++)
    CUDA_HOME           the toolkit whose bin/nvcc is used (default: nvcc on PATH, then /usr/local/cuda)
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# Code for the two data-centre generations, and PTX that the driver compiles for any later one.
CUDA_TARGETS = {
    "sm_80": "arch=compute_80,code=sm_80",
    "sm_90a": "arch=compute_90a,code=sm_90a",
    "compute_80": "arch=compute_80,code=compute_80",
}

# csrc/cpu/isa/ is compiled once for each; csrc/cpu/isa.cpp asks the processor for the same flags.
ISA_FLAGS: dict[str, list[str]] = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"]


def find_compiler() -> str | None:
    """The C++ compiler's path, or None where there is none; a CXX that does not exist is an error."""
    chosen = os.environ.get("CXX")
    if chosen:
        path = shutil.which(chosen)
        if path is None:
            raise PlatformError(f"CXX={chosen} is not a program on this machine; name a C++ compiler or unset it")
        return path
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def find_nvcc() -> str | None:
    """nvcc's path as PYPRUNE_BUILD_CUDA allows, or None."""
    wanted = os.environ.get("PYPRUNE_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise PlatformError(f"PYPRUNE_BUILD_CUDA={wanted} means nothing; use 1, 0 or leave it unset")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = shutil.which("nvcc", path=str(Path(home) / "bin"))
    else:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if wanted == "1" and nvcc is None:
        place = f"{home}/bin" if home else "PATH or /usr/local/cuda/bin"
        raise PlatformError(f"PYPRUNE_BUILD_CUDA=1, but there is no nvcc in {place}; install the CUDA toolkit")
    return nvcc


def first_output_line(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]


def nvcc_version(nvcc: str) -> str:
    output = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", output)
    if release is None:
        raise PlatformError(f"{nvcc} --version does not name a release:\n{output}")
    return release[1]


@dataclass
class Toolchain:
    """The compilers of one build."""

    compiler: str
    nvcc: str | None

    def defines(self) -> list[str]:
        """What csrc/bindings/module.cpp reports as build_info()."""
        defines = [f'-DPYPRUNE_COMPILER="{first_output_line(self.compiler, "--version")}"']
        if self.nvcc:
            names = ",".join(f'"{name}"' for name in CUDA_TARGETS)
            defines += [
                f'-DPYPRUNE_CUDA_VERSION="{nvcc_version(self.nvcc)}"',
                f"-DPYPRUNE_CUDA_ARCHITECTURES={names}",
            ]
        return defines

    def ninja_file(self, module: Path, pybind11_headers: Path) -> str:
        """The build of `module`, every path absolute. Objects lie beside the ninja file."""
        cxx = [
            self.compiler,
            "-std=c++20",
            "-O3",
            "-fPIC",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-pthread",
        ]
        cxx += [f"-I{CSRC / 'include'}"]
        python = [
            f"-isystem{sysconfig.get_path('include')}",
            f"-isystem{pybind11_headers}",
            f"-I{CSRC}",
        ]
        link = [self.compiler, "-shared", "-pthread", "-Wl,--exclude-libs=ALL"]
        nvcc: list[str] = []
        if self.nvcc:
            nvcc = [
                self.nvcc,
                "-ccbin",
                self.compiler,
                "-std=c++20",
                "-O3",
                "-lineinfo",
                f"-I{CSRC / 'include'}",
            ]
            nvcc += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
            nvcc += [f"-gencode={target}" for target in CUDA_TARGETS.values()]
            # The runtime is linked in, so that the module imports where there is no toolkit and no driver.
            link = [self.nvcc, "-ccbin", self.compiler, "-shared", "-cudart=static", "-Xcompiler=-pthread"]
            link += ["-Xlinker=--exclude-libs=ALL"]

        lines = [
            "ninja_required_version = 1.5",
            *rule("cxx", [*cxx, "$flags", "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out"], depfile=True),
            *rule("nvcc", [*nvcc, "-MD", "-MF", "$out.d", "-c", "$in", "-o", "$out"], depfile=True),
            *rule("link", [*link, "$in", "-o", "$out"]),
        ]
        objects = []

        def compile_with(name: str, source: Path, suffix: str = "", flags: tuple[str, ...] | list[str] = ()) -> None:
            target = f"{source.relative_to(CSRC).as_posix()}{suffix}.o"
            objects.append(target)
            lines.append(f"build {target}: {name} {ninja_path(source)}")
            lines.append(f"  flags = {ninja_command(flags)}")

        for source in sorted((CSRC / "bindings").glob("*.cpp")):
            # -O1, the last one counts: they check arguments and call, and pybind11's templates take longest.
            compile_with("cxx", source, flags=[*python, *self.defines(), "-O1"])
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            compile_with("cxx", source)
        for source in sorted((CSRC / "cpu" / "isa").glob("*.cpp")):
            for isa, flags in ISA_FLAGS.items():
                compile_with("cxx", source, f".{isa}", [*flags, f"-DPYPRUNE_ISA={isa}"])
        if self.nvcc:
            for source in sorted((CSRC / "cuda").glob("*.cu")):
                compile_with("nvcc", source)
        lines.append(f"build {ninja_path(module)}: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"


def rule(name: str, command: list[str], depfile: bool = False) -> list[str]:
    text = " ".join(word if word.startswith("$") else ninja_command([word]) for word in command)
    dependencies = ["  deps = gcc", "  depfile = $out.d"] if depfile else []
    return [f"rule {name}", f"  command = {text}", *dependencies]


def ninja_command(words: list[str] | tuple[str, ...]) -> str:
    return shlex.join(words).replace("$", "$$")


def ninja_path(path: Path) -> str:
    return re.sub(r"([$: ])", r"$\1", str(path))


def link_pybind11(folder: Path) -> Path:
    """Link pybind11's headers into the build folder, by version.

    Each isolated build has pybind11 in a new temporary folder. With that path in the commands, ninja would compile
    the bindings again at every build.
    """
    import pybind11

    link = folder / f"pybind11-{pybind11.__version__}"
    link.unlink(missing_ok=True)
    link.symlink_to(pybind11.get_include(), target_is_directory=True)
    return link


class BuildPackages(build_py):
    """Copies the packages into an empty folder: setuptools keeps files there that the sources no longer have."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "pyprune", ignore_errors=True)
        super().run()


class BuildCore(build_ext):
    """Builds the one extension by ninja: in parallel, and only what changed since the last build here."""

    def build_extension(self, ext: Extension) -> None:
        import ninja

        assert toolchain is not None, "there is an extension only where there is a compiler"
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        # Not build_temp, which is a new folder at every editable installation.
        folder = ROOT / "build" / f"core.{sysconfig.get_config_var('SOABI')}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(toolchain.ninja_file(module, link_pybind11(folder)))
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)]
        if self.verbose > 1:
            command.append("-v")
        status = subprocess.run(command, check=False).returncode
        if status != 0:
            advice = "; PYPRUNE_BUILD_CUDA=0 leaves the CUDA part out" if toolchain.nvcc else ""
            raise CompileError(f"the compiled core did not build: see the compiler's output above{advice}")


def find_toolchain() -> Toolchain | None:
    """The compilers to build the core with, or None, said aloud, where there can be no core."""
    nvcc = find_nvcc()
    if not sys.platform.startswith("linux"):
        reason = f"the compiled core is written for Linux, this is {sys.platform}"
    elif (compiler := find_compiler()) is None:
        reason = "there is no C++ compiler (c++, g++, clang++ or CXX)"
        if os.environ.get("PYPRUNE_BUILD_CUDA") == "1":
            raise PlatformError(f"PYPRUNE_BUILD_CUDA=1, but {reason}; install one")
    else:
        return Toolchain(compiler, nvcc)
    print(
        f"warning: pyprune is installed without its compiled core: {reason}. The triton and reference backends remain.",
        file=sys.stderr,
    )
    return None


toolchain = find_toolchain()

setup(
    packages=[
        *find_packages(include=["pyprune", "pyprune.*"]),
        # The bare name triton_kernels belongs to another project.
        "pyprune.triton_kernels",
    ],
    package_dir={"pyprune": "pyprune", "pyprune.triton_kernels": "triton_kernels"},
    ext_modules=[Extension("pyprune._core", sources=[])] if toolchain else [],
    package_data={
        "pyprune": ["py.typed"],
        "pyprune.calibration.sources": ["builtin.*"],
        "pyprune.publishing": ["templates/*"],
        "pyprune.report": ["templates/*"],
    },
    cmdclass={"build_py": BuildPackages, "build_ext": BuildCore},
)
