"""Installed plug-ins: what their entry point brings, and one clear sentence where it is broken."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from laavit.cli import main
from laavit.custom import import_custom
from laavit.data.statistics import _remember
from laavit.recipe import build_part, cards
from laavit.registry import GATES, Kind, UserError, plugins

Install = Callable[..., None]
GATE = """
from laavit.gates import Gate
from laavit.registry import GATES

@GATES.register_module()
class {name}(Gate):
    def __init__(self, level: float = 0.5) -> None:
        super().__init__()
        self.level = level

    def gamma(self, step):
        return self.level
"""
CARD = "type: {name}\nargs: {{level: 0.25}}\ndescription: a plug-in's\nsource: a test\n"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Lays a distribution out as pip does, on the path of this process."""

    def forget() -> None:
        plugins.cache_clear()
        cards.cache_clear()

    def lay_out(distribution: str, value: str, files: Mapping[str, str]) -> None:
        info = tmp_path / f"{distribution.replace('-', '_')}-1.0.dist-info"
        files = dict(files) | {
            f"{info.name}/METADATA": f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n",
            f"{info.name}/entry_points.txt": f"[laavit.components]\nmine = {value}\n",
        }
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        forget()

    monkeypatch.syspath_prepend(tmp_path)
    yield lay_out
    forget()


def test_a_plug_in_brings_classes_and_named_parts(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"plug_a/__init__.py": "", "plug_a/parts.py": GATE.format(name="PlugA")}
    install("plug-a", "plug_a.parts", files | {"plug_a/registry/gates/quarter.yaml": CARD.format(name="PlugA")})
    assert "plug_a.parts" not in sys.modules  # not before somebody asks
    assert build_part("gate", "gates", {"type": "PlugA"}).gamma(0) == 0.5  # a class, before any name was looked up
    assert build_part("gate", "gates", "quarter").gamma(0) == 0.25
    assert main(["list", "gates"]) == 0 and main(["show", "quarter"]) == 0
    assert "quarter" in (said := capsys.readouterr().out) and "plug_a.parts.PlugA" in said


BROKEN = {
    "has a mistake": ({"plug_b.py": "1 / 0\n"}, "plug_b", "cannot be loaded: ZeroDivisionError: division by zero"),
    "is not there": ({}, "plug_absent", "cannot be loaded: ModuleNotFoundError: No module named 'plug_absent'"),
    "is no module": ({"plug_c.py": "x = 1\n"}, "plug_c:x", "names 'plug_c:x', which is no module"),
    "takes a name": (
        {"plug_d.py": GATE.format(name="CosineGate")},
        "plug_d",
        "cannot be loaded: CosineGate is already registered in gate at laavit.gates; register it under another name",
    ),
    "takes a named part": (
        {"plug_e/__init__.py": GATE.format(name="PlugE"), "plug_e/registry/gates/hard.yaml": CARD.format(name="PlugE")},
        "plug_e",
        "brings gates/hard, a name that laavit has already",
    ),
    "has an unknown kind": (
        {"plug_f/__init__.py": "", "plug_f/registry/gate/x.yaml": ""},
        "plug_f",
        "no kind of component is called 'gate'; .*did you mean 'gates'",
    ),
    "has a part without a type": (
        {"plug_g/__init__.py": "", "plug_g/registry/gates/x.yaml": "args: {}\n"},
        "plug_g",
        "lacks type, description, source",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plug_in_is_named_in_one_sentence(
    case: str, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    files, value, message = BROKEN[case]
    install("plug-broken", value, files)
    assert main(["--help"]) == 0 and main(["train", "--help"]) == 0  # nothing is looked up: nothing is imported
    capsys.readouterr()
    assert main(["list", "gates"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "distribution 'plug-broken'" in line
    with pytest.raises(UserError, match=message):
        cards("gates")
    GATES.module_dict.pop("PlugE", None)


def test_two_plug_ins_with_one_name_are_told_apart(install: Install) -> None:
    for letter in "hi":
        files = {f"plug_{letter}/__init__.py": GATE.format(name=f"Plug{letter.upper()}")}
        card = {f"plug_{letter}/registry/gates/shared.yaml": CARD.format(name=f"Plug{letter.upper()}")}
        install(f"plug-{letter}", f"plug_{letter}", files | card)
    with pytest.raises(UserError, match=r"'plug-i'.* brings gates/shared, a name that .*'plug-h'.* has already"):
        cards("gates")


def test_laavits_own_parts_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is taken from the start: not only once the module that fills the registry happens to be imported."""
    thing = Kind("thing", scope="laavit", locations=["plug_own"])
    monkeypatch.setitem(sys.modules, "plug_kind", SimpleNamespace(THING=thing))
    (tmp_path / "plug_own.py").write_text(
        "from plug_kind import THING\n\n@THING.register_module()\nclass Taken:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="Taken is already registered in thing at plug_own"):
        thing.register_module(name="Taken", module=SimpleNamespace)


def test_a_class_of_a_file_unpickles_in_a_fresh_process(tmp_path: Path) -> None:
    """As spawned workers and Ray's do: after any module of laavit's that handles data, before any recipe."""
    file = tmp_path / "v1.0" / "my gate%.py"
    file.parent.mkdir()
    file.write_text(GATE.format(name="Spawned"))
    import_custom(file.name, file.parent)
    assert import_custom(str(file), Path()) == [str(file)]  # a second time is no second registration
    (tmp_path / "pickled").write_bytes(pickle.dumps((_remember, GATES.find("Spawned")(level=0.125))))
    script = f"import pickle; print(pickle.load(open({str(tmp_path / 'pickled')!r}, 'rb'))[1].gamma(3))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.125"
