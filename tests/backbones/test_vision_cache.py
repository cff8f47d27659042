"""Image features on disk: what names them, files that are broken, samples without images."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from laavit.backbones import Backbone, PromptSettings, collate
from laavit.backbones.vision_cache import VisionCache
from laavit.cli import run as cli_run
from laavit.data.aligned import AlignedDataset, Collate
from laavit.data.cached_features import fill
from laavit.registry import UserError
from laavit.structures import Encoded, Sample

PROMPT = PromptSettings(system="Look.")


@pytest.fixture
def backbone(folder_of: Callable[[str], Path]) -> Backbone:
    found = Backbone.load(str(folder_of("qwen2_5_vl")))
    found.model.requires_grad_(False)
    return found


def encoded_of(backbone: Backbone, sample: Sample) -> Encoded:
    return backbone.builder(PROMPT).encode(sample, sample.answer)


def test_the_layer_that_is_read_names_the_features(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """The same weights read at another layer are other features; another folder or number of words changes none."""
    llava = Backbone.load(str(folder_of("llava")))
    llava.model.requires_grad_(False)
    config: Any = llava.model.config
    first = VisionCache(tmp_path, llava).namespace
    config._name_or_path = config.vision_config._name_or_path = "elsewhere"
    config.text_config.vocab_size += 8
    assert VisionCache(tmp_path, llava).namespace == first
    config.vision_feature_layer -= 1
    assert VisionCache(tmp_path, llava).namespace != first


def test_features_of_a_run_in_bf16_are_those_of_its_steps(
    backbone: Backbone, samples: list[Sample], tmp_path: Path
) -> None:
    cache = VisionCache(tmp_path, backbone, precision="bf16")
    assert cache.namespace != VisionCache(tmp_path, backbone).namespace
    dataset = AlignedDataset(samples, backbone.builder(PROMPT), cache=cache)
    cached = Collate(backbone.family, 0)([dataset[0], dataset[1]])["batch"]
    plain = collate([encoded_of(backbone, sample) for sample in samples[:2]], backbone.family, 0)
    assert cached.features is not None and {each.dtype for each in cached.features} == {torch.bfloat16}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(backbone.forward(cached), backbone.forward(plain))


def test_a_broken_file_is_written_anew(
    backbone: Backbone, samples: list[Sample], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    item = encoded_of(backbone, samples[0])
    features = VisionCache(tmp_path, backbone).features(item)
    [file] = tmp_path.rglob("*.safetensors")
    whole = file.read_bytes()
    for broken in (b"", whole[:20], whole[:-8]):
        file.write_bytes(broken)
        with caplog.at_level(logging.WARNING, logger="laavit"):
            assert torch.equal(VisionCache(tmp_path, backbone).features(item), features)
        assert file.read_bytes() == whole and "worked out anew" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_samples_without_images_go_beside_cached_ones(
    backbone: Backbone, samples: list[Sample], tmp_path: Path, order: list[int]
) -> None:
    asked = [samples[0], replace(samples[1], images=(), boxes=())]
    dataset = AlignedDataset([asked[i] for i in order], backbone.builder(PROMPT), cache=VisionCache(tmp_path, backbone))
    batch = Collate(backbone.family, backbone.tokenizer.pad_token_id)([dataset[0], dataset[1]])["batch"]
    plain = collate([encoded_of(backbone, asked[i]) for i in order], backbone.family, backbone.tokenizer.pad_token_id)
    assert batch.features is not None and len(batch.features) == 1 and plain.features is None
    with torch.no_grad():
        torch.testing.assert_close(backbone.forward(batch), backbone.forward(plain), rtol=0, atol=1e-6)
    alone = Collate(backbone.family, 0)([dataset[order.index(1)]])["batch"]
    assert alone.features is None


def test_data_workers_hold_no_features_of_their_own(backbone: Backbone, samples: list[Sample], tmp_path: Path) -> None:
    cache = VisionCache(tmp_path, backbone)
    fill(cache, [samples], backbone.builder(PROMPT), torch.device("cpu"))
    cache._memory.clear()

    class Held(torch.utils.data.Dataset[int]):
        def __getitem__(self, index: int) -> int:
            assert cache.features(encoded_of(backbone, samples[index])).numel()
            return len(cache._memory)

    asked = torch.utils.data.DataLoader(Held(), sampler=[0, 1], batch_size=None, num_workers=1)  # type: ignore[arg-type]
    assert list(asked) == [0, 0] and Held()[0] == 1


def test_samples_without_images_are_no_group(backbone: Backbone, samples: list[Sample]) -> None:
    words = [replace(sample, images=()) for sample in samples]
    assert len(set(AlignedDataset([*words, *samples], backbone.builder(PROMPT)).groups)) == 6


def test_what_loading_could_not_make_is_made_before_a_run(project: Path, tmp_path: Path) -> None:
    """With shares of the tower, or in workers: the same steps as without a cache, and the second run only reads."""
    kept, before = tmp_path / "kept", None
    words = [str(project), "--train.steps", "2", "--train.log_every", "1"]
    assert cli_run("train", [*words, "--work-dir", str(tmp_path / "plain")]) == 0
    for name, more in (("shares", ["--strategy", "fsdp2"]), ("workers", ["--train.workers", "2"])):
        given = [*words, *more, "--traces.vision_cache", str(kept), "--work-dir", str(tmp_path / name)]
        assert cli_run("train", given) == 0
        # no weights: AdamW's first updates are +-lr even where a gradient is rounding alone (a key's bias)
        lines = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in (name, "plain")]
        for found, expected in zip(*([json.loads(line) for line in own] for own in lines), strict=True):
            for key in ("loss", "ntp", "concept", "trajectory", "grad_norm"):
                assert found[key] == pytest.approx(expected[key], rel=1e-5), (name, key)
        made = {file: file.stat().st_mtime_ns for file in kept.rglob("*.safetensors")}
        assert made and before in (None, made)
        before = made


def test_a_filled_cache_works_nothing_out(backbone: Backbone, samples: list[Sample], tmp_path: Path) -> None:
    """Two processes begin apart and leave what the other has written."""
    builder, two = backbone.builder(PROMPT), [VisionCache(tmp_path, backbone) for _ in range(2)]
    made: list[int] = []
    backbone.family.vision_tower(backbone.model).register_forward_hook(lambda *given: made.append(1))
    again = [*samples, replace(samples[0], id="d")]
    fill(two[0], [again, samples[:1]], builder, torch.device("cpu"))
    assert len(made) == len(samples)
    fill(two[1], [again], builder, torch.device("cpu"), start=0.5)
    assert len(made) == len(samples)
    fill(VisionCache(tmp_path / "elsewhere", backbone), [again], builder, torch.device("cpu"), start=0.5)
    assert len(made) == 2 * len(samples)
    item = encoded_of(backbone, samples[2])
    assert torch.equal(two[0].features(item), two[1].features(item))
    other = encoded_of(backbone, replace(samples[2], images=samples[2].images[:1]))
    with pytest.raises(UserError, match=f"an image of sample '{samples[2].id}'.* start or resume"):
        two[1].features(other)  # an image alone is another one than beside a second
