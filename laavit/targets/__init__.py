"""What latents are aligned to: semantics (concept) and gaze (trajectory)."""

from laavit.targets.base import Target
from laavit.targets.concept import ConceptTarget
from laavit.targets.trajectory import TrajectoryTarget

__all__ = ["ConceptTarget", "Target", "TrajectoryTarget"]
