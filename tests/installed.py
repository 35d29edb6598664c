"""Wheels in an environment of their own, without a download.

A wheel is built with the installed hatchling, and the environment sees the installed dependencies through one line in a
.pth file (which does not make it see this checkout: no editable finder runs).
"""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

BIN = "Scripts" if os.name == "nt" else "bin"


def run(*command: object, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess:
    clean = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=clean, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, f"{command} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def build_wheel(project: Path, out: Path) -> Path:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, project, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def make_environment(home: Path, *wheels: Path) -> Path:
    """A fresh environment with the wheels in it; returns its bin folder."""
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    python = home / BIN / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).stdout.strip()
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    Path(site, "installed-dependencies.pth").write_text("\n".join(paths) + "\n")
    installer = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check")
    # --ignore-installed: the editable installation that shows through the .pth is not this environment's to remove.
    run(*installer, "--no-deps", "--no-index", "--ignore-installed", *wheels, cwd=home)
    return home / BIN
