"""Readers that turn annotations on disk into ``Sample``s, and samples beside their traces."""

from laavit.data.aligned import AlignedDataset, Collate, TraceSettings
from laavit.data.records import RecordReader
from laavit.data.visual_cot import VisualCoT

__all__ = ["AlignedDataset", "Collate", "RecordReader", "TraceSettings", "VisualCoT"]
