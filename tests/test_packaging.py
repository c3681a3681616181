import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements):
    return [re.match(r"[\w-]+", r).group().lower() for r in requirements]


def test_the_wheel_holds_the_library_alone(tmp_path):
    source = tmp_path / "source"  # built apart: setuptools leaves its build folder there
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.xz"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    build = [*command, "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert top == {"sophia_optax", f"sophia_optax-{PROJECT['version']}.dist-info"}


def test_the_library_needs_jax_and_optax_only():
    assert names(PROJECT["dependencies"]) == ["jax", "optax"]
    code = "import sys, sophia_optax; print({m.split('.')[0] for m in sys.modules})"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not {"flax", "orbax", "tyro", "rich", "matplotlib", "train", "models"} & eval(loaded)


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-newest.txt"])
def test_what_ci_installs_is_pinned_by_name_and_version_alone(name):
    lines = (ROOT / name).read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    extras = PROJECT["optional-dependencies"]
    for extra in ("train", "notebooks", "dev"):
        assert set(names(extras[extra])) <= pinned


def test_imports_run_one_way():
    allowed = {"sophia_optax": (), "models": (), "train": ("models", "sophia_optax")}
    for package, may in allowed.items():
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text()
            for other in set(allowed) - {package, *may}:
                assert not re.search(rf"^\s*(from|import) {other}\b", text, re.MULTILINE), path
