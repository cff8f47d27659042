"""What a step of LaViT costs over a step of plain fine-tuning of the same samples, in one run.

    python tools/bench/training.py --families qwen2_5_vl llava_onevision --repeats 5 --out training.json

Ways: *sft*, plain fine-tuning on SDPA, without latents, gate and targets; *lavit*, K = 4 learned tokens, a half-open
gate on answer -> image, concept and trajectory; *feedback*, the same with latents that are fed back, which costs K + 1
short passes more. A step is forward, backward and AdamW, of the library's own model. The decoders are random, of 8
layers and width 256; every sample has 1024 image tokens, 60 text tokens and 10 of an answer. Image features are handed
over, as from a cache: a frozen tower would cost all ways alike and only bring the ratios nearer to one. The head of
concept has the paper's proportions (a teacher 2.5 times as wide), which is much for a decoder as small as this.

Every way runs in a process of its own. Memory is the peak of a step over the loaded model and AdamW's state; times are
medians of repeats that take turns between the ways, ratios are taken repeat by repeat.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from measuring import Worker, answer, asked, compared, peak_of, write_results

WAYS = ("sft", "lavit", "feedback")
FAMILIES = ("qwen2_5_vl", "llava_onevision", "gemma3")
#: most that token mode may cost, as a ratio to plain fine-tuning, in time and in memory
BOUND = 1.10
LATENTS, BEFORE, QUESTION, HEADER, ANSWER = 4, 30, 27, 3, 10
VOCABULARY, WIDTH, IMAGE_TOKEN = 1024, 256, 10


# --- one way, in a process of its own --------------------------------------------------------------------------------


def build(
    family: str,
    attention: str,
    vocabulary: int = VOCABULARY,
    layers: int = 8,
    tower: dict[str, Any] | None = None,
    heads: int = 4,
) -> Any:
    """A random model of a family: width 256, heads over two key heads, next to no tower unless one is given."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    import laavit.attention  # noqa: F401 - registers the implementation

    text: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    vision: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32}
    if family == "qwen2_5_vl":
        sections = [WIDTH // heads // part for part in (4, 8, 8)]
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
        vision |= {"depth": 1, "num_heads": 2, "out_hidden_size": WIDTH, **(tower or {})}
        named = {"image_token_id": IMAGE_TOKEN}
    else:
        vision |= {"model_type": "siglip_vision_model", "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"image_size": 448, "patch_size": 14, "vision_use_head": False}
        named = {"image_token_index": IMAGE_TOKEN}
        if family == "gemma3":
            text |= {"head_dim": WIDTH // 4, "query_pre_attn_scalar": WIDTH // 4, "sliding_window": 512}
            named["mm_tokens_per_image"] = 256
        else:
            text["model_type"] = "qwen2"
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision, tie_word_embeddings=True, **named)
    config._attn_implementation = {"text_config": attention, "vision_config": "sdpa"}
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config)


def tokenizer() -> Any:
    """One that knows as many words as the model; no text is tokenised here."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w1"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w1", pad_token="w0", eos_token="w2")


def sample(backbone: Any, tokens: int, latents: int) -> Any:
    """One sample: system prompt, image, question, header, latents and separator, answer."""
    import torch

    from laavit.backbones.chat import IGNORED
    from laavit.latents import latent_tokens
    from laavit.structures import Encoded, Role, Sample, Span, Tile

    written = backbone.tokenizer.convert_tokens_to_ids(latent_tokens(latents))
    parts = [(Role.OTHER, BEFORE), (Role.IMAGE, tokens), (Role.QUESTION, QUESTION), (Role.OTHER, HEADER)]
    parts += [(Role.LATENT, latents), (Role.ANSWER, ANSWER + (latents > 0))]
    roles = torch.cat([torch.full((count,), int(role), dtype=torch.uint8) for role, count in parts])
    ids = torch.arange(len(roles)) % 500 + 20
    ids[roles == Role.IMAGE] = IMAGE_TOKEN
    start = BEFORE + tokens + QUESTION + HEADER
    ids[start : start + len(written)] = torch.tensor(written, dtype=torch.long)
    labels = torch.full(ids.shape, IGNORED)
    labels[-ANSWER - 1 : -1] = ids[-ANSWER:]
    height = max(h for h in range(1, math.isqrt(tokens) + 1) if tokens % h == 0)
    tile = Tile(height, tokens // height)
    grid = torch.tensor([[1, height * backbone.family.merge, tile.width * backbone.family.merge]])
    vision = {"image_grid_thw": grid} if "image_grid_thw" in backbone.family.vision_keys else {}
    positions = backbone.family.positions(ids, vision)
    spans, header = (Span(BEFORE, tile),), (start - HEADER, start)
    return Encoded(ids, roles, labels, spans, positions, header, vision, Sample("bench", (), "", ""))


def make_step(way: str, family: str, options: argparse.Namespace) -> Callable[[], float]:
    """One step of training as a function; it returns the loss."""
    import torch

    from laavit.backbones import Backbone, collate
    from laavit.engine.optim import build_adamw, unique_parameters
    from laavit.engine.settings import TrainSettings
    from laavit.model import LaViT
    from laavit.recipe import build_part
    from laavit.structures import Trace
    from laavit.students import HFStudent
    from laavit.targets.base import stack

    device, dtype = options.device, getattr(torch, options.dtype)
    model = build(family, "sdpa" if way == "sft" else "laavit").to(device=device, dtype=dtype)
    processor = SimpleNamespace(tokenizer=tokenizer(), image_token="w10", image_processor=None)
    student = HFStudent.of(Backbone(model, processor), family, ("vision",))
    gate, targets, latents = None, {}, None
    if way != "sft":
        name = {"lavit": "learned", "feedback": "feedback"}[way]
        latents = build_part("latents", "latents", {"name": name, "count": LATENTS})
        gate = build_part("gate", "gates", {"type": "ConstantGate", "value": 0.5})
        targets = {name: build_part(name, "targets", name) for name in ("concept", "trajectory")}
    student.setup(latents, torch.Generator().manual_seed(0))
    for target in targets.values():
        target.setup(student.backbone.width, student.backbone.depth, student.latents, {"width": 5 * WIDTH // 2})
    whole = LaViT(student, gate, targets).to(device=device).train()
    item = sample(student.backbone, options.tokens, student.latents)
    batch = collate([item] * options.batch, student.backbone.family, 0)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(options.tokens, WIDTH, generator=generator).to(dtype)
    batch.features = [features] * options.batch
    tiles, semantics = tuple(span.tile for span in item.spans), torch.randn(5 * WIDTH // 2, generator=generator)
    trace = Trace("bench", "", tiles, torch.rand(options.tokens, generator=generator), semantics, 1.0)
    batch.targets = {name: stack([target.prepare(item, trace)] * options.batch) for name, target in targets.items()}
    batch = batch.to(torch.device(device))
    optimizer = build_adamw(unique_parameters(whole.trainable_parameters()), TrainSettings(lr=1e-6))

    def step() -> float:
        losses = whole(batch)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if set(targets) - set(losses) or not all(torch.isfinite(value) for value in losses.values()):
            raise RuntimeError(f"{way}: no step of training, {losses}")
        return float(losses["loss"].detach())

    return step


def worker(options: argparse.Namespace) -> None:
    """Answer every line of stdin with one measurement: ``memory`` or ``time``."""
    import torch

    torch.set_num_threads(options.threads)
    step = make_step(*options.worker, options)
    step()  # kernels are loaded and AdamW's state is there before anything is measured
    for what in asked():
        if what == "memory":
            value, loss = peak_of(step, options.device)
        else:
            begin = time.perf_counter()
            loss = step()
            if options.device != "cpu":
                torch.cuda.synchronize()
            value = time.perf_counter() - begin
        answer([value, loss])


# --- the comparison --------------------------------------------------------------------------------------------------


def start(way: str, family: str, options: argparse.Namespace, large_blocks: bool) -> Worker:
    """A worker of one way."""
    command = [__file__, "--worker", way, family, "--tokens", str(options.tokens), "--batch", str(options.batch)]
    command += ["--device", options.device, "--dtype", options.dtype, "--threads", str(options.threads)]
    return Worker(command, options.threads, large_blocks)


def compare(family: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a way: median seconds, peak bytes, both as ratios to plain fine-tuning."""
    rows = compared(
        options.ways, "sft", lambda way, large: start(way, family, options, large_blocks=large), options.repeats
    )
    return [{"family": family, "way": way, **row} for way, row in rows.items()]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, with the bound that token mode is held to."""
    lines = [
        "| family | way | step | peak memory | time / sft | memory / sft | wanted |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        wanted = ""
        if row["way"] == "lavit":
            met = max(row["time_ratio"], row["memory_ratio"]) <= BOUND
            wanted = f"≤ {BOUND:.2f}, ≤ {BOUND:.2f}: {'met' if met else 'missed'}"
        lines.append(
            f"| {row['family']} | {row['way']} | {row['seconds'] * 1000:.0f} ms | {row['bytes'] / 2**20:.0f} MiB "
            f"| {row['time_ratio']:.2f} | {row['memory_ratio']:.2f} | {wanted} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES[:2]))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="sft first, the base")
    parser.add_argument("--tokens", type=int, default=1024, help="image tokens of a sample")
    parser.add_argument("--batch", type=int, default=2, help="samples of a step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, help="write every measurement as JSON")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.tokens, options.batch, options.repeats) < 1:
        parser.error("--tokens, --batch and --repeats are at least 1")
    if options.ways[0] != "sft":
        parser.error("--ways begins with sft, which the others are compared with")
    if options.worker:
        worker(options)
        return 0
    rows: list[dict[str, Any]] = []
    for family in options.families:
        rows += compare(family, options)
        sys.stderr.write(table(rows[-len(options.ways) :]).split("\n", 2)[2] + "\n")  # each family as it is done
    sys.stdout.write(table(rows) + "\n")
    if options.out is not None:
        about = {name: getattr(options, name) for name in ("device", "dtype", "threads", "repeats", "tokens", "batch")}
        write_results(options.out, about, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
