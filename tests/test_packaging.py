"""The wheel, as a user gets it: built, installed into an empty environment, run from another directory."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from saekit import index

SOURCES = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "pretrained_index.yaml", "saekit", "cli"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools leaves build/ behind, and an old one would leak into the next wheel."""
    tree = tmp_path_factory.mktemp("tree")
    repository = Path(__file__).resolve().parents[1]
    for name in SOURCES:
        source = repository / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / name)
    # without isolation pip downloads no setuptools: the one in this environment builds
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tree / "dist", tree]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = (tree / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """An environment in which the wheel is installed and its dependencies are borrowed from this one.

    The borrowing is a .pth line that appends this environment's site-packages to sys.path. It stands behind the
    new site-packages, and .pth files of a folder that is reached through a .pth are not read, so the editable
    saekit of this environment stays invisible there.
    """
    place = tmp_path_factory.mktemp("venv")
    venv.create(place, with_pip=False, symlinks=True)
    python = place / "bin" / "python"
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (purelib / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place


def run(installed: Path, program: str, *arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Runs a program of the new environment from an empty home and nothing else of this session."""
    environment = {"HOME": str(home), "PATH": os.defpath, "HF_HUB_OFFLINE": "1"}
    command = [installed / "bin" / program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=home, env=environment)


def test_the_wheel_holds_every_module_and_nothing_else(names, repository):
    modules = {str(path.relative_to(repository)) for path in (repository / "saekit").rglob("*.py")}
    modules |= {f"saekit_cli/{path.relative_to(repository / 'cli')}" for path in (repository / "cli").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {name.split("/")[0] for name in names} == {"saekit", "saekit_cli", "saekit-0.1.0.dist-info"}


def test_assets_index_and_licence_travel_in_the_wheel(names, repository):
    assets = [path for path in (repository / "saekit" / "assets").rglob("*") if path.is_file()]
    assert assets
    assert {str(path.relative_to(repository)) for path in assets} <= set(names)
    assert "saekit/pretrained_index.yaml" in names
    assert "saekit-0.1.0.dist-info/licenses/LICENSE" in names


def test_the_installed_command_runs_from_another_directory(installed, tmp_path):
    done = run(installed, "saekit", "--help", home=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "doctor" in done.stdout


def test_the_installed_doctor_finds_nothing_wrong(installed, tmp_path):
    done = run(installed, "saekit", "doctor", "--json", home=tmp_path)
    facts = json.loads(done.stdout)
    assert facts["problems"] == []
    assert done.returncode == 0
    inside = installed.resolve()
    assert Path(facts["bundled_model"]["path"]).resolve().is_relative_to(inside)
    assert Path(facts["index"]).resolve().is_relative_to(inside)


def test_the_installed_packages_come_from_the_wheel_and_none_is_called_cli(installed, tmp_path):
    script = "import saekit, saekit_cli; print(saekit.__file__, saekit_cli.__file__); import cli"
    done = run(installed, "python", "-c", script, home=tmp_path)
    assert all(Path(place).resolve().is_relative_to(installed.resolve()) for place in done.stdout.split())
    assert len(done.stdout.split()) == 2
    assert "No module named 'cli'" in done.stderr


def test_the_index_is_found_and_valid():
    written = yaml.safe_load(index.index_path().read_text(encoding="utf-8"))
    assert written["version"] == index.INDEX_VERSION
    assert isinstance(written["releases"], dict)


def test_versions_agree(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (repository / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = changelog.partition("\n## [")[2].partition("]")[0]
    assert newest == project["version"]


def test_every_dependency_is_pinned_for_make(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in pins if "==" in line}
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {name.partition(">")[0].partition("[")[0].lower() for name in wanted} <= pinned
    assert "torch==2.13.0" in pins
