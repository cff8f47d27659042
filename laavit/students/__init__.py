"""Students by name: a backbone with latents."""

from laavit.students.hf import HFStudent

__all__ = ["HFStudent"]
