"""``laavit zoo``: every recipe of the model zoo as a row of a table, and ``--write`` puts it into the zoo's README."""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mmengine.config import Config
from rich.console import Console
from rich.progress import track

from laavit.commands.common import Parser
from laavit.compatibility import check
from laavit.files import write_text
from laavit.paths import project_data
from laavit.recipe import load_recipe
from laavit.recipe_parts import Parts
from laavit.registry import MISTAKES, UserError, mistake

#: folder -> what it holds; in this order
FOLDERS = {
    "lavit": "LaViT and its ablations",
    "baselines": "Rivals, with the same parts",
    "controls": "Controls",
    "microlab": "The micro-lab",
    "microlab/hops": "The micro-lab: when do latents pay?",
}
HEADINGS = ("recipe", "what", "base", "its lines", "student", "latents", "gate", "targets", "results")
BEGIN, END = "<!-- laavit zoo: begin -->", "<!-- laavit zoo: end -->"
#: what is evaluated and never trained; figures by task and recipe, one a seed
EVALUATIONS, RESULTS = "evaluations.yaml", "results.yaml"
#: characters of a recipe's lines that a cell holds; of more the keys alone are named
LONG = 160


@dataclass(frozen=True)
class Row:
    """One recipe as text, a cell each of ``HEADINGS``."""

    recipe: str
    what: str
    base: str
    lines: str
    student: str
    latents: str
    gate: str
    targets: str
    results: str

    def cells(self) -> list[str]:
        return list(vars(self).values())


def recipes(zoo: Path) -> dict[Path, dict[str, Any]]:
    """The recipes of the zoo, folder by folder, as they are written (bases merged, names not yet resolved).

    Those of the micro-lab's pretraining, which have no student, are none.

    Raises:
        UserError: one does not read.
    """
    found = {}
    for path in (path for folder in FOLDERS for path in sorted((zoo / folder).glob("*.py"))):
        try:
            raw = Config.fromfile(path, import_custom_modules=False).to_dict()
        except MISTAKES as error:
            raise UserError(f"{path} does not read as a recipe: {mistake(error)}") from None
        if "student" in raw:
            found[path] = raw
    return found


def row_of(path: Path, raw: Mapping[str, Any], zoo: Path) -> Row:
    """The row of one recipe.

    Args:
        raw: as ``recipes`` gives it. zoo: the folder that links start from.

    Raises:
        UserError: it does not read, its parts do not fit one another, or it has no docstring.
    """
    try:
        recipe = load_recipe(path)
        check(recipe)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    parts, tree = Parts.of(recipe), ast.parse(path.read_text(encoding="utf-8"))
    title = (ast.get_docstring(tree) or "").partition("\n\n")[0].replace("\n", " ")
    if not title:
        raise UserError(f"{path}: a recipe of the zoo says in its docstring what it is")
    base, lines = _own(tree)
    names = raw.get("targets") or {}
    targets = [_control(_name(names[key]), target.control) for key, target in parts.targets.items()]
    return Row(
        recipe=_link(path, zoo),
        what=title,
        base=_link((path.parent / base).resolve(), zoo.resolve()) if base else "",
        lines=lines if base else "",
        student=_name(raw["student"]) + (" + LoRA" if recipe.arguments("student").get("lora") else ""),
        latents=_latents(raw.get("latents"), parts),
        gate=_name(raw.get("gate")),
        targets=" + ".join(dict.fromkeys(targets)),
        results=_results(path),
    )


def table(zoo: Path) -> str:
    """The zoo as Markdown: a table a folder, then what is evaluated without any training."""
    read = track(list(recipes(zoo).items()), "recipes", console=Console(stderr=True), transient=True)
    rows = [(path.parent.relative_to(zoo).as_posix(), row_of(path, raw, zoo)) for path, raw in read]
    parts = []
    for folder, title in FOLDERS.items():
        own = [row.cells() for name, row in rows if name == folder]
        parts.append(f"### {title}\n\n" + _markdown(HEADINGS, own))
    given = yaml.safe_load((zoo / EVALUATIONS).read_text(encoding="utf-8"))
    evaluated = [[each["row"], each["what"], f"`{each['command']}`"] for each in given]
    parts.append("### Evaluated, not trained\n\n" + _markdown(("row", "what", "command"), evaluated))
    return "\n".join(parts)


def written(readme: str, content: str) -> str:
    """The README with the table between its markers.

    Raises:
        UserError: it has no markers.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"the model zoo's README.md lacks the markers '{BEGIN}' and '{END}'")
    return f"{before}{BEGIN}\n\n{content}\n{END}{after}"


def _own(tree: ast.Module) -> tuple[str | None, str]:
    """A recipe's base, and the lines that it changes; of many the keys alone."""
    base, lines = None, {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            key = node.targets[0].id
            if key == "_base_":
                base = ast.literal_eval(node.value)[0]
            else:
                lines[key] = ast.unparse(node).replace("_delete_=True, ", "").replace("'", '"')
    short = sum(map(len, lines.values())) <= LONG
    return base, "<br>".join(f"`{text}`" for text in (lines.values() if short else lines))


def _name(spec: Any) -> str:
    if spec is None:
        return ""
    return str(spec.get("name", spec.get("type"))) if isinstance(spec, Mapping) else str(spec)


def _control(name: str, control: str) -> str:
    return name if control in ("none", *name.split("_")) else f"{name} ({control})"


def _latents(spec: Any, parts: Parts) -> str:
    layout = parts.layout
    if not layout.most:
        return ""
    count = f"{layout.least}–{layout.most}" if layout.varies else str(layout.most)
    return f"{_name(spec)} × {count}" + (", emitted" if layout.emitted else "")


def _results(path: Path) -> str:
    """The measured figures of a recipe, from the results that stand beside it."""
    file = path.with_name(RESULTS)
    tasks = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = {task: figures[path.stem] for task, figures in tasks.items() if path.stem in figures}
    return "; ".join(f"{task}: {', '.join(f'{figure:.1f}' for figure in each)}" for task, each in found.items())


def _link(path: Path, zoo: Path) -> str:
    place = path.relative_to(zoo)
    return f"[{place.stem}]({place})"


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main(argv: Sequence[str]) -> int:
    """Run the command with its words; returns the exit code."""
    parser = Parser(prog="zoo", description="The recipes of the model zoo as a table (Markdown).")
    parser.add_argument("--write", action="store_true", help="put it into the zoo's README.md, between its markers")
    options = parser.parse_args(list(argv))
    zoo = project_data("model_zoo")
    content = table(zoo)
    if options.write:
        readme = zoo / "README.md"
        write_text(readme, written(readme.read_text(encoding="utf-8"), content))
    else:
        sys.stdout.write(content)
    return 0
