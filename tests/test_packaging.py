"""A wheel, installed where nothing else is, finds its data; a checkout finds it beside the package."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from laavit.paths import DATA_FOLDERS, project_data
from laavit.registry import UserError

ROOT = Path(__file__).resolve().parents[1]
UNWANTED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "*.egg-info", "_data")


def data_files(folder: Path) -> set[str]:
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in files if "__pycache__" not in path.parts and not path.name.startswith(".")}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with the wheel alone. The sources are copied, so that no build folder is left here."""
    base = tmp_path_factory.mktemp("wheel")
    source = base / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in ("laavit", *DATA_FOLDERS):
        shutil.copytree(ROOT / name, source / name, ignore=UNWANTED)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir"]
    flags = ["--no-deps", "--no-index", "--no-build-isolation", "-q"]
    subprocess.run([*pip, "wheel", *flags, "-w", str(base), str(source)], check=True, cwd=base)
    (wheel,) = base.glob("laavit-*.whl")
    target = base / "target"
    subprocess.run([*pip, "install", *flags, "--target", str(target), str(wheel)], check=True, cwd=base)
    shutil.rmtree(source)
    return target


def test_an_installed_wheel_finds_its_data(installed: Path, tmp_path: Path) -> None:
    code = (
        "import json, laavit.paths as p; "
        "print(json.dumps([p.__file__, {k: str(p.project_data(k)) for k in p.DATA_FOLDERS}]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    module, folders = json.loads(done.stdout)
    assert Path(module).is_relative_to(installed), "the checkout was imported, not the wheel"
    for kind in DATA_FOLDERS:
        assert Path(folders[kind]).is_relative_to(installed)
        assert data_files(Path(folders[kind])) == data_files(ROOT / kind) != set()


def test_a_wheel_carries_only_the_package(installed: Path) -> None:
    (wheel,) = installed.parent.glob("laavit-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"laavit", "laavit-0.1.0.dist-info"}
    entry = zipfile.ZipFile(wheel).read("laavit-0.1.0.dist-info/entry_points.txt").decode()
    assert "laavit = laavit.cli:main" in entry and "[lmms_eval.models]" in entry


def test_a_checkout_finds_its_data() -> None:
    for kind in DATA_FOLDERS:
        assert project_data(kind) == ROOT / kind


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no project data is called 'modelzoo'.*did you mean 'model_zoo'"):
        project_data("modelzoo")


def test_a_folder_that_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laavit.paths._PACKAGE", tmp_path / "laavit")
    (tmp_path / "eval").mkdir()  # something called `eval` beside the package, but no checkout
    with pytest.raises(UserError, match="reinstall laavit"):
        project_data("eval")
