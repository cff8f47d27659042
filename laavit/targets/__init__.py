"""What a student is aligned to: semantics (concept, regions), gaze (trajectory, boxes), logits; controls of each."""

from laavit.targets.base import Target
from laavit.targets.box import BoxTarget
from laavit.targets.concept import ConceptTarget
from laavit.targets.logits import LogitsTarget
from laavit.targets.region import RegionTarget
from laavit.targets.trajectory import TrajectoryTarget

__all__ = ["BoxTarget", "ConceptTarget", "LogitsTarget", "RegionTarget", "Target", "TrajectoryTarget"]
