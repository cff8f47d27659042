"""Any Hugging Face vision-language model: loading, where its image tokens are, chat and roles of positions."""

from laavit.backbones.base import Backbone, collate
from laavit.backbones.chat import PromptSettings, SequenceBuilder

__all__ = ["Backbone", "PromptSettings", "SequenceBuilder", "collate"]
