"""Teachers by name: a backbone seen from inside, and the extraction of its traces into the store."""

from laavit.teachers.extraction import ExtractSettings, extract
from laavit.teachers.hf import HFTeacher

__all__ = ["ExtractSettings", "HFTeacher", "extract"]
