import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from places import ROOT

import sophia_optax

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements):
    return [re.match(r"[\w-]+", r).group().lower() for r in requirements]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, because setuptools leaves a build folder behind
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    build = [*command, "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_data_file(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    top = {name.split("/")[0] for name in packed}
    about = f"sophia_optax-{sophia_optax.__version__}.dist-info"
    assert top == {"sophia_optax", "models", "train", about}
    files = [path for name in top - {about} for path in (ROOT / name).rglob("*")]
    wanted = {str(path.relative_to(ROOT)) for path in files if path.is_file()}
    assert {name for name in wanted if "__pycache__" not in name} == {
        name for name in packed if not name.startswith(about)
    }


def run_elsewhere(wheel, folder, code):
    """Runs code with the installed wheel, in a folder outside the clone."""
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    environment = os.environ | {"PYTHONPATH": str(folder / "installed"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def test_the_trainer_is_imported_outside_the_clone(wheel, tmp_path):
    code = """
from train import Config, preset, resume, train
import train.baseline, train.data
from train.program import assemble
print(train.__file__, assemble(preset("tiny", "adamw")).data().vocab_size)"""
    out = run_elsewhere(wheel, tmp_path, code)
    assert out.returncode == 0, out.stderr
    path, size = out.stdout.split()
    assert path.startswith(str(tmp_path)) and size == "256"


ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in {}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


@pytest.mark.parametrize("absent", ["tyro", "flax", "orbax", "matplotlib"])
def test_a_missing_extra_is_named_in_one_line(wheel, tmp_path, absent):
    code = f"""{ABSENT.format([absent])}
import runpy
sys.argv = ["train", "tiny", "adamw"]
runpy.run_module("train", run_name="__main__")"""
    out = run_elsewhere(wheel, tmp_path, code)
    assert out.returncode == 1 and out.stdout == ""
    (line,) = out.stderr.splitlines()
    assert line.startswith(f"error: the trainer needs {absent}")
    assert "pip install -e '.[train]'" in line


def test_importing_the_trainer_names_the_missing_extra(wheel, tmp_path):
    code = ABSENT.format(["flax"]) + "from train import train"
    out = run_elsewhere(wheel, tmp_path, code)
    assert "the trainer needs flax, which is not installed: install the extra" in out.stderr


def test_the_library_imports_without_the_extras(wheel, tmp_path):
    absent = ["flax", "orbax", "tyro", "rich", "matplotlib"]
    code = ABSENT.format(absent) + "import sophia_optax as s; print(s.__version__)"
    out = run_elsewhere(wheel, tmp_path, code)
    assert out.stdout.strip() == sophia_optax.__version__, out.stderr


def test_the_library_needs_jax_and_optax_only():
    assert names(PROJECT["dependencies"]) == ["jax", "optax"]
    code = "import sys, sophia_optax; print({m.split('.')[0] for m in sys.modules})"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not {"flax", "orbax", "tyro", "rich", "matplotlib", "train", "models"} & eval(loaded)


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-newest.txt"])
def test_ci_installs_pinned_versions(name):
    lines = (ROOT / name).read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    extras = PROJECT["optional-dependencies"]
    for extra in ("train", "notebooks", "dev"):
        assert set(names(extras[extra])) <= pinned
