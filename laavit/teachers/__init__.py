"""Teachers by name: a backbone seen from inside, and the extraction of its traces into the store."""

from laavit.teachers.base import Extractor, Preparer, Teacher
from laavit.teachers.engine import extract
from laavit.teachers.hf import HFTeacher
from laavit.teachers.official import LaViT15kFeatures
from laavit.teachers.open_clip_encoder import OpenCLIPEncoder
from laavit.teachers.settings import ExtractSettings
from laavit.teachers.timm_encoder import TimmEncoder

__all__ = [
    "ExtractSettings",
    "Extractor",
    "HFTeacher",
    "LaViT15kFeatures",
    "OpenCLIPEncoder",
    "Preparer",
    "Teacher",
    "TimmEncoder",
    "extract",
]
