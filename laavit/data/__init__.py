"""Readers that turn annotations on disk into ``Sample``s, and samples beside their traces."""

from laavit.data.aligned import AlignedDataset, Collate, TraceSettings
from laavit.data.columns import Columns
from laavit.data.lavit_15k import Lavit15k
from laavit.data.llava import Llava
from laavit.data.records import RecordReader
from laavit.data.visual_cot import VisualCoT

__all__ = [
    "AlignedDataset",
    "Collate",
    "Columns",
    "Lavit15k",
    "Llava",
    "RecordReader",
    "TraceSettings",
    "VisualCoT",
]
