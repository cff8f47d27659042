"""Where the data folders are: beside the package in a checkout, inside it in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from laavit.registry import UserError, nearest

#: The folders that hold plain data and no import package.
DATA_FOLDERS = ("registry", "model_zoo", "eval")

#: The file in an export that says what it was trained with: {"system": str, "latents": int, "separator": str, ...};
#: laavit's own bridge and analyses read it, stock transformers needs none of it.
EXPORT_CARD = "laavit.json"

_PACKAGE = Path(__file__).resolve().parent


def project_data(kind: str) -> Path:
    """The folder of one kind of project data.

    Args:
        kind: 'registry', 'model_zoo' or 'eval'.

    Raises:
        UserError: there is no such kind, or this installation carries no such folder.
    """
    if kind not in DATA_FOLDERS:
        raise UserError(f"no project data is called '{kind}'; {nearest(kind, DATA_FOLDERS)}")
    installed = _PACKAGE / "_data" / kind
    if installed.is_dir():
        return installed
    checkout = _PACKAGE.parent
    # pyproject.toml tells a checkout from a site-packages folder that happens to hold something called `eval`
    if (checkout / "pyproject.toml").is_file() and (checkout / kind).is_dir():
        return checkout / kind
    raise UserError(
        f"the folder '{kind}' is neither in {installed.parent} nor in a checkout at {checkout}; reinstall laavit"
    )
