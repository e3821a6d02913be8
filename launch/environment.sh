# shellcheck shell=bash
# Sourced by the launchers, never run: source launch/environment.sh EXTRA...
#
# Creates or reuses the project's virtual environment, installs the named extras at the versions of
# launch/constraints.txt, and activates it. What is installed already is not installed again.
#   LOWMEM_ADAM_VENV  where the environment lies (default: .venv in the repository)
#   LOWMEM_ADAM_TORCH  another version of torch than that of launch/constraints.txt
# The install builds the native library into lowmem_adam/native, where a C++ compiler is found.
# Runs may share one environment, also at the same time: only one installs, the others wait for it.

lowmem_adam_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# The versions of pyproject.toml; a condition in Python, where sys is imported.
lowmem_adam_python_fits='(3, 10) <= sys.version_info < (3, 14)'

_lowmem_adam_say() {
    printf '[environment] %s\n' "$*"
}

# Prints the interpreter to use. Each candidate is run: a name on the PATH may belong to a version
# manager and lead nowhere, and Debian's python3 comes without venv until python3-venv is installed.
_lowmem_adam_find_python() {
    local candidate path
    for candidate in python3.11 python3.10 python3.12 python3.13 python3; do
        while IFS= read -r path; do
            if "$path" -c "import sys, venv, ensurepip; sys.exit(not $lowmem_adam_python_fits)" \
                >/dev/null 2>&1; then
                printf '%s\n' "$path"
                return 0
            fi
        done < <(type -aP "$candidate")
    done
    printf '%s\n' 'No Python from 3.10 to 3.13 with the modules venv and ensurepip on the PATH: install one' \
        '(Debian and Ubuntu: apt-get install python3 python3-venv).' >&2
    return 1
}

# Also completes an environment whose making was cut off. A folder that is something else is left alone.
_lowmem_adam_create_venv() {
    local venv="$1" python="$2"
    if "$venv/bin/python" -c 'import pip' >/dev/null 2>&1; then
        if ! "$venv/bin/python" -c "import sys; sys.exit(not $lowmem_adam_python_fits)"; then
            printf '%s has %s, the project needs Python 3.10 to 3.13: remove it, or set LOWMEM_ADAM_VENV.\n' \
                "$venv" "$("$venv/bin/python" -V 2>&1)" >&2
            return 1
        fi
        return 0
    fi
    if [[ -e "$venv" && ! -e "$venv/pyvenv.cfg" ]]; then
        printf '%s exists and is no virtual environment: remove it, or set LOWMEM_ADAM_VENV.\n' "$venv" >&2
        return 1
    fi
    _lowmem_adam_say "creating $venv with $python ($("$python" -V 2>&1))"
    "$python" -m venv "$venv"
}

# What an install depends on; kept beside it, it tells whether the install still holds.
_lowmem_adam_fingerprint() {
    "$1/bin/python" - "$lowmem_adam_root" "${LOWMEM_ADAM_TORCH:-}" <<'PYTHON'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(f"{root}\n{sys.version}\n{sys.argv[2]}\n".encode())
names = ["pyproject.toml", "launch/constraints.txt", "launch/environment.sh", ".build_backend/lowmem_adam_backend.py"]
native = [path for path in (root / "lowmem_adam/native").iterdir() if path.suffix in (".cpp", ".h", ".txt")]
for path in [*(root / name for name in names), *sorted(native)]:
    digest.update(f"{path}\n".encode() + path.read_bytes())
print(digest.hexdigest())
PYTHON
}

# The native library is there, or a compiler that could build it, or neither.
_lowmem_adam_library() {
    if compgen -G "$lowmem_adam_root/lowmem_adam/native/liblowmem_adam.*" >/dev/null; then
        printf 'library\n'
    elif [[ -n "${CXX:-}$(type -P c++ g++ clang++)" ]]; then
        printf 'compiler\n'
    else
        printf 'neither\n'
    fi
}

_lowmem_adam_say_whether_native() {
    case "$(_lowmem_adam_library)" in
        compiler)
            _lowmem_adam_say "the native library was not built: steps will be slow, by the reference backend (for the" \
                "reason: pip install --verbose --config-settings wheel.cmake=true --editable $lowmem_adam_root)"
            ;;
        neither)
            _lowmem_adam_say "the native library was not built, as no C++ compiler is on the PATH: steps will be" \
                "slow, by the reference backend (Debian and Ubuntu: apt-get install g++)"
            ;;
    esac
}

# torch and what builds the project come first, by exact version: no later command can pull in another torch,
# and the project is built against what is there, without a second copy of anything in a build environment.
_lowmem_adam_pip_install() {
    local venv="$1" extras="$2" torch="torch==${LOWMEM_ADAM_TORCH:-2.13.0}" line
    local constraints="$venv/.lowmem_adam_constraints.txt"
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --quiet --constraint "$constraints")
    while IFS= read -r line; do
        if [[ "$line" == torch==* ]]; then printf '%s\n' "$torch"; else printf '%s\n' "$line"; fi
    done <"$lowmem_adam_root/launch/constraints.txt" >"$constraints" || return 1
    _lowmem_adam_say "installing $torch" &&
        "${pip[@]}" "$torch" scikit-build-core cmake ninja &&
        _lowmem_adam_say "installing lowmem-adam[$extras]" &&
        "${pip[@]}" "$torch" --no-build-isolation --editable "${lowmem_adam_root}[$extras]"
}

# One stamp for each extra, so that runs with different extras do not undo one another's. A library that was removed,
# or a compiler that has come, is a reason to install anew; a build that failed is not tried again as it is.
_lowmem_adam_install() {
    local venv="$1" stamps="$1/.lowmem_adam" fingerprint extra missing=()
    shift
    fingerprint="$(_lowmem_adam_fingerprint "$venv")" || return 1
    for extra in "$@"; do
        if [[ ! -f "$stamps/$extra" || "$(<"$stamps/$extra")" != "$fingerprint $(_lowmem_adam_library)" ]]; then
            missing+=("$extra")
        fi
    done
    if ((${#missing[@]} == 0)); then
        _lowmem_adam_say "$venv is up to date"
        _lowmem_adam_say_whether_native
        return 0
    fi
    _lowmem_adam_pip_install "$venv" "$(IFS=,; printf '%s' "${missing[*]}")" || return 1
    mkdir -p "$stamps" || return 1
    for extra in "${missing[@]}"; do
        printf '%s\n' "$fingerprint $(_lowmem_adam_library)" >"$stamps/$extra" || return 1
    done
    _lowmem_adam_say_whether_native
}

_lowmem_adam_environment() {
    local venv="${LOWMEM_ADAM_VENV:-$lowmem_adam_root/.venv}" lock python status=0
    if (($# == 0)); then
        printf 'usage: source launch/environment.sh EXTRA...\n' >&2
        return 1
    fi
    mkdir -p "$(dirname "$venv")" || return 1
    venv="$(cd "$(dirname "$venv")" && pwd)/$(basename "$venv")"
    python="$(_lowmem_adam_find_python)" || return 1
    # The lock belongs to the open file, so it outlives the interpreter that takes it and ends with this
    # shell at the latest; flock(1) would be shorter, but not every system has it.
    exec {lock}>"$venv.lock" || return 1
    "$python" - "$lock" "$venv" <<'PYTHON' || return 1
import fcntl, sys

lock, venv = int(sys.argv[1]), sys.argv[2]
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print(f"[environment] waiting for another run that prepares {venv}", flush=True)
    fcntl.flock(lock, fcntl.LOCK_EX)
PYTHON
    { _lowmem_adam_create_venv "$venv" "$python" && _lowmem_adam_install "$venv" "$@"; } || status=$?
    exec {lock}>&-
    ((status == 0)) || return "$status"
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
    # These sources first, even where the environment is shared with another checkout.
    export PYTHONPATH="$lowmem_adam_root${PYTHONPATH:+:$PYTHONPATH}"
}

_lowmem_adam_environment "$@"
