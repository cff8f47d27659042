"""Readers that turn annotations on disk into ``Sample``s."""

from laavit.data.visual_cot import VisualCoT

__all__ = ["VisualCoT"]
