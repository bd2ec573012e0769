"""Builds the optional extension, the ops' CUDA kernels, with nvcc and a C++ compiler; else the package is pure Python.

The extension uses the libtorch stable ABI (2.10): it needs the headers of an installed PyTorch and nothing of its
Python, and the result loads in every later PyTorch. So PyTorch is not a build requirement (it would fetch a second one,
perhaps another, into the isolated build); it is looked for where the package is being installed. Nothing here makes an
installation fail: what was built, and why not more, is kept in ``_build.json`` for ``fastensdistill doctor``.

FASTENSDISTILL_BUILD=python builds nothing; TORCH_CUDA_ARCH_LIST names GPU architectures, CXX the C++ compiler.
"""

import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
KERNELS = sorted((ROOT / "csrc").glob("*.cu"))
OTHERS = sorted((ROOT / "csrc").glob("*.cpp"))
# INTERFACE in fastensdistill/kernels/extension.py: a library of another interface is not loaded.
INTERFACE = re.search(r"^INTERFACE = (\d+)", (ROOT / "fastensdistill/kernels/extension.py").read_text(), re.M)[1]
LIBRARY = f"_extension_v{INTERFACE}.so"
REPORT = "fastensdistill/kernels/_build.json"
DEFAULT_ARCHITECTURES = ["80", "89", "90a", "100"]
# Kernels of sm_90a's own instructions, csrc/wgmma_*.cu, are compiled for it alone. What is no kernel of theirs any more
# once the compiler has done this to it: multiplications one at a time, registers in memory.
HOPPER, BROKEN = "90a", re.compile(r"^.*(?:wgmma.* serialized|[1-9]\d* bytes (?:stack frame|spill)).*$", re.M)


class NotBuilt(Exception):
    """Why something is left out."""


def run(*command):
    try:
        done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
        return done.stdout + done.stderr
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        worst = next((line for line in lines if "error" in line), lines[-1] if lines else "failed")
        raise NotBuilt(f"{Path(command[0]).name} failed: {worst.strip()}") from error


def find_torch():
    """Folder, version and CUDA version of PyTorch: importable, or in the environment an isolated build is for."""
    python = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    places += [str(Path(os.environ[name]) / python) for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if name in os.environ]
    for folder in (Path(place or ".") / "torch" for place in places):
        if (folder / "include/torch/csrc/stable/library.h").exists() and (folder / "version.py").exists():
            text = (folder / "version.py").read_text()
            version = re.search(r"__version__ = '([^']+)'", text)[1]
            cuda = re.search(r"^cuda\b[^=\n]*= '([^']+)'", text, re.M)
            if tuple(int(part) for part in version.split(".")[:2]) < (2, 10):
                raise NotBuilt(f"PyTorch {version} is older than 2.10")
            return folder, version, cuda and cuda[1]
    raise NotBuilt("no PyTorch at build time; once it is installed: pip install --no-build-isolation .")


def find_compiler():
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]:
        if path := shutil.which(name):
            return path, run(path, "--version").splitlines()[0]
    raise NotBuilt("no C++ compiler")


def find_nvcc(torch_cuda):
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    if (nvcc := shutil.which("nvcc") or shutil.which("nvcc", path=f"{cuda}/bin")) is None:
        raise NotBuilt("no nvcc")
    version = re.search(r"release (\S+),", run(nvcc, "--version"))[1]
    if torch_cuda is None:
        raise NotBuilt("this PyTorch has no CUDA")
    if int(version.split(".")[0]) > int(torch_cuda.split(".")[0]):
        raise NotBuilt(f"nvcc {version} is newer than PyTorch's CUDA {torch_cuda}, whose driver may not run its code")
    return nvcc, version


def architectures(nvcc):
    """Flags of nvcc, and the names: TORCH_CUDA_ARCH_LIST, or the defaults that this nvcc knows with PTX of the last."""
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        found = re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", listed)
        if not found:
            raise NotBuilt(f"TORCH_CUDA_ARCH_LIST={listed!r} names no architecture such as 9.0a")
        chosen = [(major + minor + letter, bool(ptx)) for major, minor, letter, ptx in found]
    else:
        known = run(nvcc, "--list-gpu-code")
        names = [name for name in DEFAULT_ARCHITECTURES if f"sm_{name.rstrip('a')}" in known.split()]
        chosen = [(name, name == names[-1]) for name in names]
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name, _ in chosen]
    flags += [f"-gencode=arch=compute_{name},code=compute_{name}" for name, ptx in chosen if ptx]
    return flags, [f"sm_{name}" for name, _ in chosen]


class BuildExtension(build_ext):
    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def build_extension(self, ext):
        library, work = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp)
        for folder in (library.parent, work):
            folder.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)  # of an earlier build, which would be packaged
        report = {"built": False}
        try:
            if os.environ.get("FASTENSDISTILL_BUILD") == "python":
                raise NotBuilt("FASTENSDISTILL_BUILD=python")
            if os.name != "posix":
                raise NotBuilt(f"no build on {sys.platform}")
            cxx, report["compiler"] = find_compiler()
            torch, report["torch"], torch_cuda = find_torch()
            nvcc, report["nvcc"] = find_nvcc(torch_cuda)
            gencode, report["architectures"] = architectures(nvcc)
            self.compile(library, work, torch, cxx, nvcc, gencode)
            report["built"] = True
        except NotBuilt as reason:
            report["reason"] = f"pure Python: {reason}"
        library.with_name(Path(REPORT).name).write_text(json.dumps(report, indent=1) + "\n")
        print("fastensdistill:", report.get("reason", "CUDA ops built"), file=sys.stderr)

    def compile(self, library, work, torch, cxx, nvcc, gencode):
        host = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", f"-I{torch}/include"]
        host += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # the stable ABI of 2.10, whatever these headers are
        device = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        hopper = ["-Xptxas=-v", *([flag for flag in gencode if HOPPER in flag] or gencode)]

        def compile_one(source):
            output = work / f"{source.name}.o"
            own = source.name.startswith("wgmma_")
            compiler = (nvcc, *device, *(hopper if own else gencode)) if source.suffix == ".cu" else (cxx, *host)
            said = run(*compiler, "-c", source, "-o", output)
            if own and (broken := BROKEN.search(said)):
                raise NotBuilt(f"{source.name}: {broken[0].strip()}")
            return output

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # the largest first
            objects = list(pool.map(compile_one, sorted([*KERNELS, *OTHERS], key=lambda one: -one.stat().st_size)))
        link = [nvcc, "-shared", "-cudart=static", f"-ccbin={cxx}"]
        run(*link, *objects, f"-L{torch}/lib", "-ltorch_cpu", "-o", library)

    def copy_extensions_to_source(self):  # editable installations
        (ROOT / REPORT).with_name(LIBRARY).unlink(missing_ok=True)
        super().copy_extensions_to_source()
        shutil.copyfile(Path(self.build_lib) / REPORT, ROOT / REPORT)


extension = Extension("fastensdistill.kernels._extension", sources=[], optional=True)
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
