"""The build backend: scikit-build-core, with a package without the native library where that cannot be built.

The library makes steps faster and changes none of their results, so its absence is no reason to fail. An override with
`if.failed` would cover a cmake that ran and failed, but not a cmake or ninja that is missing.

With `--config-settings wheel.cmake=true` the library is built or the build fails, with `=false` it is left out.
"""

import os
import sys
import tempfile
import zipfile
from pathlib import Path

from scikit_build_core import build as scikit_build
from scikit_build_core.build import build_sdist, get_requires_for_build_sdist, get_requires_for_build_wheel
from scikit_build_core.errors import ScikitBuildError

# Without prepare_metadata_for_build_wheel: what it would promise holds the wheel's tags, known only after the attempt.
__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]

Settings = dict[str, list[str] | str]

SETTING = "wheel.cmake"
LIBRARIES = "lowmem_adam/native/liblowmem_adam."

# The editable install, too, builds the library as for a wheel.
get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(
    wheel_directory: str, config_settings: Settings | None = None, metadata_directory: str | None = None
) -> str:
    """A wheel for this platform with the library, or one for every platform without it."""
    settings = config_settings or {}
    try:
        return scikit_build.build_wheel(wheel_directory, settings, metadata_directory)
    except (ScikitBuildError, SystemExit) as error:  # it exits after saying what failed in cmake
        if SETTING in settings:
            raise
        reason = "see above" if isinstance(error, SystemExit) else error
        print(f"*** lowmem-adam is built without its native library ({reason})", file=sys.stderr)
    return scikit_build.build_wheel(wheel_directory, {**settings, SETTING: "false"}, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings | None = None, metadata_directory: str | None = None
) -> str:
    """The sources on the path, and the library among them, where the package looks for it.

    scikit-build-core's own inplace mode would make cmake work in the sources and leave all its files there.
    """
    with tempfile.TemporaryDirectory() as folder:
        place_library(Path(folder, build_wheel(folder, config_settings)))
    pure = {**(config_settings or {}), SETTING: "false"}
    return scikit_build.build_editable(wheel_directory, pure, metadata_directory)


def place_library(wheel: Path) -> None:
    """Copies the library of a wheel into the sources; an old one never stays, as it belongs to other sources.

    It is put in place as a whole: a process may just be running the old one.
    """
    with zipfile.ZipFile(wheel) as archive:
        built = [name for name in archive.namelist() if name.startswith(LIBRARIES)]
        for name in built:
            partial = Path(name).with_name(f"{os.getpid()}_{Path(name).name}")
            partial.write_bytes(archive.read(name))
            partial.chmod(0o755)
            partial.replace(name)
    for path in Path(LIBRARIES).parent.glob(f"{Path(LIBRARIES).name}*"):
        if path.as_posix() not in built:
            path.unlink()
