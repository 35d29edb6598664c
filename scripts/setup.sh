#!/usr/bin/env bash
# Makes .venv at the root of the repository and installs the project into it, editable, with the development tools.
# Quick when nothing has changed. PYTHON names the interpreter to make it with (3.11 or later).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
started=$SECONDS
venv_python=.venv/bin/python
[ -x .venv/Scripts/python.exe ] && venv_python=.venv/Scripts/python.exe

recent_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        recent_enough "$PYTHON" || fail "PYTHON=$PYTHON does not run as Python 3.11 or later: $("$PYTHON" --version 2>&1 || true)"
        echo "$PYTHON"
        return
    fi
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if recent_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or later is needed; python3 here is: $(python3 --version 2>&1 || true)" \
        "install one, or name it: PYTHON=/path/to/python3.12 $0"
}

# What the installation depends on; the stamp holds it once an installation has gone through.
wanted() {
    "$venv_python" - <<'PY'
import hashlib, pathlib, sys

digest = hashlib.sha256(f"{sys.version} {sys.prefix} {pathlib.Path.cwd()}".encode())
for name in ("pyproject.toml", "constraints.txt", "scripts/setup.sh"):
    digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())
PY
}

if [ -e .venv ]; then
    recent_enough "$venv_python" || fail ".venv is there but holds no working Python 3.11 or later; remove it and run this again"
else
    python=$(find_python)
    echo "setup: making .venv with $("$python" --version 2>&1) ($python)"
    if ! "$python" -m venv .venv; then
        rm -rf .venv
        fail "$python cannot make a virtual environment (on Debian and Ubuntu: apt-get install python3-venv)"
    fi
    [ -x .venv/Scripts/python.exe ] && venv_python=.venv/Scripts/python.exe
fi

stamp=.venv/.gatedfwa-zoo-setup
if [ "$(cat "$stamp" 2>/dev/null)" = "$(wanted)" ]; then
    echo "setup: up to date"
    exit 0
fi

"$venv_python" -m pip --version >/dev/null 2>&1 || "$venv_python" -m ensurepip --upgrade >/dev/null
echo "setup: installing (the first time this fetches PyTorch, which is large)"
rm -f "$stamp"
talk=-qq
[ -t 1 ] && talk=--progress-bar=on  # on a terminal: what is being fetched, and how far it is
"$venv_python" -m pip install "$talk" --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
wanted >"$stamp"
echo "setup: ready in $((SECONDS - started)) s; activate with: source .venv/bin/activate"
