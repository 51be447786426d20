"""Hook of the build backend: a wheel carries `lookup.c` compiled for several CPUs, where there is a compiler.

Without one the wheel is the same for all platforms. An editable install compiles at run time, because its source
may change.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

_SECONDS = 120.0


def get_build_hook() -> type:
    """Return the hook's class; called by hatchling, which is not installed where this module is only imported."""
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    class KernelBuildHook(BuildHookInterface):  # type: ignore[misc]
        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            self.work = Path(tempfile.mkdtemp(prefix="cqr-compress-wheel-"))
            libraries = _compiled(self.work, self.app.display_warning) if version == "standard" else []
            if libraries:
                build_data["force_include"] |= {str(p): f"cqr_compress/kernel/{p.name}" for p in libraries}
                build_data["pure_python"] = False
                build_data["tag"] = f"py3-none-{_platform()}"

        def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
            shutil.rmtree(self.work, ignore_errors=True)

    return KernelBuildHook


def _compiled(work: Path, warn: Any) -> list[Path]:
    """Compile the libraries of all CPU levels; those that fail are left out with a warning."""
    here = Path(__file__).with_name("compile.py")
    spec = importlib.util.spec_from_file_location("cqr_compress_compile", here)
    assert spec is not None and spec.loader is not None
    compiler: Any = importlib.util.module_from_spec(spec)  # the package is not importable while it is built
    spec.loader.exec_module(compiler)
    built = []
    for level in compiler.levels():
        for threads, flags in compiler.THREADS.items():
            output = work / compiler.installed_name(level, threads)
            try:
                flags = (*compiler.level_flags(level), *flags)
                compiler.compile_library(compiler.find_compiler(), flags, output, _SECONDS)
                built.append(output)
            except compiler.NoCompilerError as e:
                warn(f"the wheel has no compiled lookups: {e}")
                return []
            except OSError as e:
                warn(f"the wheel has no {output.name}: {e}")
    return built


def _platform() -> str:
    """Return the platform tag; that of the system rather than of a range of C libraries, which is not verified."""
    from packaging.tags import platform_tags

    return next(tag for tag in platform_tags() if not tag.startswith(("manylinux", "musllinux")))
