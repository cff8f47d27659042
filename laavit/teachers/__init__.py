"""Teachers by name: a backbone seen from inside, and the extraction of its traces into the store."""

from laavit.teachers.base import Extractor, Preparer, Teacher
from laavit.teachers.engine import extract
from laavit.teachers.hf import HFTeacher
from laavit.teachers.settings import ExtractSettings

__all__ = ["ExtractSettings", "Extractor", "HFTeacher", "Preparer", "Teacher", "extract"]
