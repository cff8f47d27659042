"""A tiny untrained model of the micro-lab, built once."""

from __future__ import annotations

from typing import Any

import pytest

from laavit.microlab.tiny import Sizes, build_model, build_processor, build_tokenizer

SIZES = Sizes(text_width=48, text_layers=2, vision_width=32, vision_layers=1)


@pytest.fixture(scope="session")
def processor() -> Any:
    return build_processor(build_tokenizer())


@pytest.fixture
def model(processor: Any) -> Any:
    model = build_model(SIZES, processor.tokenizer, seed=0)
    model.set_attn_implementation({"text_config": "laavit", "vision_config": "sdpa"})
    return model
