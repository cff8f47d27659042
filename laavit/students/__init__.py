"""Students by name: a backbone with latents."""

from laavit.students.composed import ComposedStudent
from laavit.students.hf import HFStudent

__all__ = ["ComposedStudent", "HFStudent"]
