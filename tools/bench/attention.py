"""What the gate and the recorded rows cost: ours against plain SDPA and against eager full maps, in one run.

    python tools/bench/attention.py --tokens 1024 4096 --repeats 7 --out attention.json

Works: *extraction* (no gradient; the rows of all text after the image, mean over heads and layers) and *training*
(forward and backward; the gate half open on answer -> image, the rows of K = 4 latents aligned by a KL). Ways: *ours*;
*plain*, SDPA with neither gate nor rows, the floor; *eager*, full maps with ``output_attentions=True``. The model is a
Qwen2.5-VL decoder of 8 layers, width 256, without a vision tower (random image features are handed over).

Every way runs in a process of its own. Memory is the peak of its first pass over the loaded, warmed-up model; times are
medians of repeats that take turns between the ways, so that a busy machine slows all of them alike.
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

WAYS = ("ours", "plain", "eager")
WORKS = ("extraction", "training")
#: most that ours may cost, as a ratio to plain: (time, memory)
BOUNDS = {"extraction": (1.15, 1.10), "training": (1.10, 1.10)}
TEXT, BEFORE, LATENTS, ANSWER, VOCABULARY = 60, 2, 4, 10, 1024
IMAGE_TOKEN = 10


# --- one way, in a process of its own --------------------------------------------------------------------------------


def build(way: str, device: str, dtype: str) -> Any:
    """A random decoder of 8 layers and width 256, four heads over two key heads."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    import laavit.attention  # noqa: F401 - registers the implementation

    text = {
        "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 8, 8]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 256}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN)
    config._attn_implementation = {
        "text_config": {"ours": "laavit", "plain": "sdpa"}.get(way, "eager"),
        "vision_config": "sdpa",
    }
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    return model.to(device=device, dtype=getattr(torch, dtype))


def inputs_of(model: Any, tokens: int) -> dict[str, Any]:
    """A sequence of ``tokens`` image tokens and 60 text tokens, with features and M-RoPE positions."""
    import torch

    from laavit.backbones.families import family_of

    height = max(h for h in range(1, math.isqrt(tokens) + 1) if tokens % h == 0)
    ids = torch.arange(TEXT + tokens) % 500 + 20
    ids[BEFORE : BEFORE + tokens] = IMAGE_TOKEN
    # No text is tokenised here: all that the family reads of a processor is what stands for an image.
    family = family_of(model.config, SimpleNamespace(image_token="<|image_pad|>"))
    grid = torch.tensor([[1, 2 * height, 2 * tokens // height]])
    device, kind = model.device, model.dtype
    features = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(1)).to(device, kind)
    positions = family.positions(ids, {"image_grid_thw": grid})[:, None].to(device)
    return {"input_ids": ids[None].to(device), "position_ids": positions, **family.feature_inputs([features])}


def context_of(work: str, length: int, tokens: int, device: str) -> Any:
    """What a pass asks of attention: rows of all text after the image; or of the latents, and a half-open gate."""
    import torch

    from laavit.attention import AttentionContext, GatePath

    index = torch.arange(length, device=device)[None]
    image = (index >= BEFORE) & (index < BEFORE + tokens)
    if work == "extraction":
        return AttentionContext(rows=index[:, BEFORE + tokens :], merged=True)
    answer = index >= length - ANSWER
    rows = index[:, length - ANSWER - LATENTS : length - ANSWER]
    return AttentionContext(paths=(GatePath(answer, image, math.log(0.5)),), rows=rows)


def eager_mask(context: Any, length: int, dtype: Any, device: str) -> Any:
    """The full additive mask of a context: causal, plus the gate's bias; [1, 1, S, S]."""
    import torch

    index = torch.arange(length, device=device)
    mask = torch.zeros(1, 1, length, length, dtype=dtype, device=device)
    mask.masked_fill_(index[None] > index[:, None], torch.finfo(dtype).min)
    for path in context.paths:
        mask[:, 0][path.queries[:, :, None] & path.keys[:, None, :]] += path.bias
    return mask


def make_pass(way: str, work: str, model: Any, tokens: int) -> Callable[[], float]:
    """One pass as a function; it returns a figure by which the ways can be compared."""
    import torch
    from torch.nn import functional as F

    inputs, device = inputs_of(model, tokens), str(model.device)
    length = TEXT + tokens
    target = torch.randn(tokens, generator=torch.Generator().manual_seed(2)).softmax(0).to(device)
    labels = torch.arange(ANSWER, device=device)

    def rows_of_pass() -> tuple[Any, Any]:
        context = context_of(work, length, tokens, device)
        if way == "ours":
            hidden = model.model(**inputs, use_cache=False, laavit=context).last_hidden_state
            return hidden, context.mean_rows()
        if way == "plain":
            return model.model(**inputs, use_cache=False).last_hidden_state, None
        mask = eager_mask(context, length, model.dtype, device)
        output = model.model(**inputs, use_cache=False, attention_mask=mask, output_attentions=True)
        picked = [maps.float().mean(1)[:, context.rows[0]] for maps in output.attentions]
        return output.last_hidden_state, torch.stack(picked).mean(0)

    def extraction() -> float:
        with torch.no_grad():
            hidden, rows = rows_of_pass()
            return float((hidden if rows is None else rows[:, :, BEFORE : BEFORE + tokens].mean(1)).float().max())

    def training() -> float:
        hidden, rows = rows_of_pass()
        logits = model.lm_head(hidden[0, -ANSWER:])
        loss = F.cross_entropy(logits.float(), labels)
        if rows is not None:
            seen = rows[0, :, BEFORE : BEFORE + tokens]
            loss = loss + 0.3 * F.kl_div(
                (seen / seen.sum(-1, keepdim=True)).log(), target.expand_as(seen), reduction="sum"
            )
        loss.backward()
        value = float(loss.detach())
        model.zero_grad(set_to_none=True)
        return value

    model.train(work == "training")
    return extraction if work == "extraction" else training


def worker(options: argparse.Namespace) -> None:
    """Answer every line of stdin with one measurement: ``memory`` or ``time``."""
    import torch

    torch.set_num_threads(options.threads)
    way, work = options.worker
    (tokens,) = options.tokens
    model = build(way, options.device, options.dtype)
    make_pass(way, work, model, 64)()  # kernels and libraries are loaded before anything is measured
    run = make_pass(way, work, model, tokens)
    for what in asked():
        if what == "memory":
            value, figure = peak_of(run, options.device)
        else:
            begin = time.perf_counter()
            figure = run()
            if options.device != "cpu":
                torch.cuda.synchronize()
            value = time.perf_counter() - begin
        answer([value, figure])


# --- the comparison --------------------------------------------------------------------------------------------------


def start(way: str, work: str, tokens: int, options: argparse.Namespace, large_blocks: bool) -> Worker:
    """A worker of one way."""
    command = [__file__, "--worker", way, work, "--tokens", str(tokens)]
    command += ["--device", options.device, "--dtype", options.dtype, "--threads", str(options.threads)]
    return Worker(command, options.threads, large_blocks)


def compare(work: str, tokens: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a way: median seconds, peak bytes, both as ratios to plain."""
    found = compared(
        WAYS, "plain", lambda way, large: start(way, work, tokens, options, large_blocks=large), options.repeats
    )
    if not math.isclose(found["ours"]["figure"], found["eager"]["figure"], rel_tol=1e-3):
        raise RuntimeError(
            f"{work}: ours gives {found['ours']['figure']}, eager {found['eager']['figure']}: not the same work"
        )
    return [{"work": work, "tokens": tokens, "way": way, **row} for way, row in found.items()]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, with the bounds that ours is held to."""
    lines = [
        "| work | image tokens | way | time | peak memory | time / plain | memory / plain | wanted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        wanted = ""
        if row["way"] == "ours":
            most = BOUNDS[row["work"]]
            met = row["time_ratio"] <= most[0] and row["memory_ratio"] <= most[1]
            wanted = f"≤ {most[0]:.2f}, ≤ {most[1]:.2f}: {'met' if met else 'missed'}"
        lines.append(
            f"| {row['work']} | {row['tokens']} | {row['way']} | {row['seconds'] * 1000:.0f} ms "
            f"| {row['bytes'] / 2**20:.0f} MiB | {row['time_ratio']:.2f} | {row['memory_ratio']:.2f} | {wanted} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 4096], help="image tokens; 60 text tokens come on top"
    )
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, help="write every measurement as JSON")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.tokens) < 1 or options.repeats < 1:
        parser.error("--tokens and --repeats are at least 1")
    if options.worker:
        worker(options)
        return 0
    rows: list[dict[str, Any]] = []
    for work in options.works:
        for tokens in options.tokens:
            rows += compare(work, tokens, options)
            sys.stderr.write(table(rows[-len(WAYS) :]).split("\n", 2)[2] + "\n")  # each case as it is done
    sys.stdout.write(table(rows) + "\n")
    if options.out is not None:
        about = {"device": options.device, "dtype": options.dtype}
        write_results(options.out, about | {"threads": options.threads, "repeats": options.repeats}, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
