"""How many samples a second are trained: ours, padded batches, and the LaViT authors' way, on the same step in one run.

    python tools/bench/train.py --repeats 2 --out train.json

A step is 16 questions about 6 images of unequal sizes (2.7 questions an image, Visual-CoT has 2.6), forward, backward
and AdamW, with K = 4 latents, the gate half open, concept and trajectory. Ways:

* *authors*: one sample at a time, 16 times accumulated, eager attention whose maps give the latents' rows, logits of
  all positions; a plain loop, below.
* *padded*: the library with all its levers off: one padded batch, SDPA, logits where labels are.
* *best*: ``train.shared_prefix`` and ``train.packing='pack'``, each image read once and no padding, in the
  micro-batches that the engine makes of a budget of tokens (``train.tokens``) with ``train.accumulate`` 3.
* *best, kept*: the same with ``train.cache_vision``, as from the second epoch on.
* *best, no alignment*: as *best* without gate, rows and targets; latents stay.

All ways have to give the same loss, or the script stops. The decoder is random, of 8 layers and width 256, with the 16
heads over 2 of Qwen2.5-VL-3B; vocabulary and frozen vision tower (whole attention in one of 8 blocks) have about the
share of the work that they have there. Every way runs in a process of its own; memory is the peak of its first step
over the model, times are of the processor on a CPU.

The last table is the alignment's own work at one layer of Qwen2.5-VL-3B (16 heads over 2, width 128): the rows of K
latents and the trajectory's loss, forward and backward, from 1k to 8k image tokens, counted; linear has exponent 1.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from measuring import Worker, answer, asked, compared, peak_of, write_results
from training import WIDTH, build, sample, tokenizer

WAYS = ("authors", "padded", "best", "best, kept", "best, no alignment")
QUESTIONS = (3, 2, 3, 3, 2, 3)  # about each image: 16 in all
VOCABULARY, LATENTS, GAMMA, ACCUMULATE = 4096, 4, 0.5, 3
TOWER = {"depth": 8, "hidden_size": 128, "intermediate_size": 320, "num_heads": 4, "fullatt_block_indexes": [7]}
TEACHER = 5 * WIDTH // 2
#: least that the best way is wanted to be, as times the samples a second of others; most that alignment may cost
FASTER, DEARER = {"authors": 4.0, "padded": 1.5}, 1.10
#: image tokens at which the alignment's own work is counted, and the largest exponent that counts as linear
GROWTH, LINEAR = (1024, 2048, 4096, 8192), 1.1


# --- one way, in a process of its own --------------------------------------------------------------------------------


def model_of(way: str, options: argparse.Namespace) -> Any:
    """The library's model; the authors' way has the same weights under transformers' eager attention."""
    import torch

    from laavit.backbones import Backbone
    from laavit.model import LaViT
    from laavit.recipe import build_part
    from laavit.students import HFStudent

    attention = "eager" if way == "authors" else "laavit"
    inner = build("qwen2_5_vl", attention, VOCABULARY, options.layers, TOWER, options.heads)
    processor = SimpleNamespace(tokenizer=tokenizer(), image_token="w10", image_processor=None)
    student = HFStudent.of(Backbone(inner, processor), "qwen2_5_vl", ("vision",))
    student.setup(build_part("latents", "latents", {"name": "learned", "count": LATENTS}), torch.Generator())
    if way.endswith("no alignment"):
        return LaViT(student).to(options.device).train()
    targets = {name: build_part(name, "targets", name) for name in ("concept", "trajectory")}
    torch.manual_seed(2)
    for target in targets.values():
        target.setup(WIDTH, options.layers, LATENTS, {"width": TEACHER})
    gate = build_part("gate", "gates", {"type": "ConstantGate", "value": GAMMA})
    return LaViT(student, gate, targets).to(options.device).train()


def items_of(model: Any, tokens: Sequence[int]) -> list[tuple[Any, dict[str, Any]]]:
    """The step's samples with what each target prepared: images in turn, so that no two neighbours share one."""
    import torch

    from laavit.structures import Sample, Trace

    generator, backbone, found = torch.Generator().manual_seed(1), model.student.backbone, []
    for image, count in enumerate(tokens):
        plain = sample(backbone, count, LATENTS)
        patches = torch.randn(int(plain.vision["image_grid_thw"].prod()), 3 * 2 * 14 * 14, generator=generator)
        for question in range(QUESTIONS[image % len(QUESTIONS)]):
            named = Sample(f"{image}-{question}", (Path(f"{image}.png"),), "", "")
            item = replace(plain, vision={**plain.vision, "pixel_values": patches}, sample=named)
            gaze, semantics = torch.rand(count, generator=generator), torch.randn(TEACHER, generator=generator)
            trace = Trace(named.id, "", tuple(s.tile for s in item.spans), gaze, semantics, 1.0)
            prepared = {name: target.prepare(item, trace) for name, target in model.named_targets.items()}
            found.append((question, item, prepared))
    return [(item, prepared) for _, item, prepared in sorted(found, key=lambda one: one[0])]


def library_step(model: Any, parts: Sequence[dict[str, Any]]) -> float:
    """Forward and backward of a step's micro-batches by the library; returns the loss."""
    total = 0.0
    for part in parts:
        loss = model(**part)["loss"] / len(parts)
        loss.backward()
        total += float(loss.detach())
    return total


def micro_batches(items: Sequence[Any], tokens: Sequence[int], accumulate: int) -> list[list[Any]]:
    """The step's groups of samples as the engine puts them into micro-batches of a budget of tokens."""
    import numpy as np

    from laavit.engine.buckets import UnitLengths

    units: list[list[int]] = [[] for _ in tokens]
    for place, (item, _) in enumerate(items):
        units[int(item.sample.images[0].stem)].append(place)
    begins = np.array([item.spans[-1].stop for item, _ in items])
    after = np.array([len(item.roles) for item, _ in items]) - begins
    lengths = UnitLengths.of(np.stack([begins, after], 1), units, shared=True, packed=True)
    parts = lengths.split(range(len(units)), min(accumulate, len(units)), even=False)
    return [[items[place] for unit in part for place in units[unit]] for part in parts]


def authors_step(model: Any, batches: Sequence[Any]) -> float:
    """The same sum of losses as a plain loop over samples: eager maps, whole logits, gradients accumulated."""
    import torch
    from torch.nn import functional as F

    from laavit.backbones.rows import row_positions
    from laavit.structures import Role, StudentOutput

    inner, total = model.student.model, 0.0
    for batch in batches:
        roles, length = batch.roles, batch.roles.shape[1]
        mask = torch.full((length, length), torch.finfo(torch.float32).min, device=roles.device).triu(1)[None, None]
        gated = (roles[0] == Role.ANSWER)[:, None] & (roles[0] == Role.IMAGE)
        output = inner(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask + math.log(GAMMA) * gated,
            **model.student.backbone.family.text_inputs(batch.input_ids), **batch.vision,
            use_cache=False, output_attentions=True, output_hidden_states=True,
        )  # fmt: skip
        ntp = F.cross_entropy(output.logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
        positions = {kind: row_positions(batch, kind) for t in model.named_targets.values() for kind in t.rows}
        asked_rows = torch.cat(list(positions.values()), 1)[0]
        rows = {layer: maps.float().mean(1)[:, asked_rows] for layer, maps in enumerate(output.attentions)}
        seen = StudentOutput(output.hidden_states[-1], output.logits[:0], batch.labels[:0], rows, positions)
        for name, target in model.named_targets.items():
            ntp = ntp + target.weight * target(seen, roles, batch.targets[name])
        (ntp / len(batches)).backward()
        total += float(ntp.detach()) / len(batches)
    return total


def make_step(way: str, options: argparse.Namespace) -> Callable[[], float]:
    """One step of training as a function; it returns the loss before the step."""
    import torch

    from laavit.backbones.vision_cache import keep_features
    from laavit.data.aligned import Collate
    from laavit.engine.normalisation import add_shares
    from laavit.engine.optim import build_adamw, unique_parameters
    from laavit.engine.settings import TrainSettings

    model = model_of(way, options)
    items, family = items_of(model, options.tokens), model.student.backbone.family
    best, device = way.startswith("best"), torch.device(options.device)
    collate = Collate(family, 0, share=best, pack=best)
    parts = [[item] for item in items] if way == "authors" else [items]
    if best:
        parts = micro_batches(items, options.tokens, ACCUMULATE)
    batches = [{"batch": collate(part)["batch"].to(device)} for part in parts]
    add_shares(model, batches, device)
    named = unique_parameters(model.trainable_parameters())
    if way == "authors":
        optimizer: Any = torch.optim.AdamW([p for _, p in named], lr=1e-8, weight_decay=0.0)
    else:
        optimizer = build_adamw(named, TrainSettings(lr=1e-8))
    if way == "best, kept":
        keep_features(model.student.backbone, 2**30)

    def step() -> float:
        loss = authors_step(model, [b["batch"] for b in batches]) if way == "authors" else library_step(model, batches)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def clock(device: str) -> float:
    """Seconds: of the processor, or of the clock once a GPU is done."""
    if device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def worker(options: argparse.Namespace) -> None:
    """Answer every line of stdin with one measurement: ``memory`` or ``time``."""
    import torch

    torch.set_num_threads(options.threads)
    small = argparse.Namespace(**{**vars(options), "tokens": [4, 4], "layers": 1})
    make_step(options.worker, small)()  # kernels are loaded before anything is measured
    step = make_step(options.worker, options)
    for what in asked():
        if what == "memory":
            value, loss = peak_of(step, options.device)
        else:
            begin = clock(options.device)
            loss = step()
            value = clock(options.device) - begin
        answer([value, loss])


# --- the comparison --------------------------------------------------------------------------------------------------


def start(way: str, options: argparse.Namespace, large_blocks: bool) -> Worker:
    """A worker of one way."""
    command = [__file__, "--worker", way, "--tokens", *map(str, options.tokens), "--layers", str(options.layers)]
    command += ["--heads", str(options.heads), "--device", options.device, "--threads", str(options.threads)]
    return Worker(command, options.threads, large_blocks)


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a way: samples a second, peak bytes, both against the best.

    Raises:
        RuntimeError: two ways give another loss.
    """
    found = compared(options.ways, "best", lambda way, large: start(way, options, large), options.repeats)
    count = sum(QUESTIONS[image % len(QUESTIONS)] for image in range(len(options.tokens)))
    for way, row in found.items():
        if not way.endswith("no alignment") and not math.isclose(row["figure"], found["best"]["figure"], rel_tol=1e-4):
            raise RuntimeError(f"{way} gives {row['figure']}, best {found['best']['figure']}: not the same work")
    return [{"way": way, "samples_a_second": count / row["seconds"], **row} for way, row in found.items()]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, with what the best way is wanted to reach."""
    lines = ["| way | samples a second | best is | peak memory | memory / best | wanted |", "|---|---|---|---|---|---|"]
    for row in rows:
        wanted, times = "", row["time_ratio"]
        if row["way"] in FASTER:
            least = FASTER[row["way"]]
            wanted = f"≥ {least:g}: {'met' if times >= least else 'missed'}"
        elif row["way"].endswith("no alignment"):
            wanted = f"alignment on / off {1 / times:.2f}, ≤ {DEARER:.2f}: {'met' if 1 / times <= DEARER else 'missed'}"
        lines.append(
            f"| {row['way']} | {row['samples_a_second']:.2f} | {times:.2f} × | {row['bytes'] / 2**20:.0f} MiB "
            f"| {row['memory_ratio']:.2f} | {wanted} |"
        )
    return "\n".join(lines)


def alignment_work(tokens: int, device: str) -> dict[str, int]:
    """FLOPs of one layer's recorded rows and the trajectory's loss, forward and backward, and bytes kept in between."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from laavit.attention import AttentionContext, record_rows

    length = tokens + 60
    query, key = (torch.randn(1, heads, length, 128, device=device, requires_grad=True) for heads in (16, 2))
    rows = torch.arange(length - 14, length - 10, device=device)[None]
    wanted = torch.rand(tokens, device=device).softmax(0)
    kept = {tensor.untyped_storage().data_ptr(): 0 for tensor in (query, key)}  # there for the attention anyway

    def keep(tensor: Any) -> Any:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    module: Any = SimpleNamespace(layer_idx=0)
    with FlopCounterMode(display=False) as counter:
        context = AttentionContext(rows=rows)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            record_rows(module, query, key, None, None, context)
            seen = context.mean_rows()[0, :, 2 : 2 + tokens]
            loss = (wanted * (wanted.log() - (seen / seen.sum(-1, keepdim=True)).log())).sum()
        torch.autograd.grad(loss, (query, key))
    return {"tokens": tokens, "flops": counter.get_total_flops(), "bytes": sum(kept.values())}


def growth_table(device: str) -> tuple[str, list[dict[str, Any]]]:
    """The alignment's work from 1k to 8k image tokens as a Markdown table, with the exponents of its growth."""
    rows = [alignment_work(tokens, device) for tokens in GROWTH]
    lines = ["| image tokens | " + " | ".join(str(row["tokens"]) for row in rows) + " | exponent |"]
    lines.append("|---" * (len(rows) + 2) + "|")
    for name, unit, scale in (("flops", "MFLOP", 10**6), ("bytes", "MiB kept", 2**20)):
        exponent = math.log(rows[-1][name] / rows[0][name]) / math.log(rows[-1]["tokens"] / rows[0]["tokens"])
        verdict = f"{exponent:.2f}, ≤ {LINEAR}: {'met' if exponent <= LINEAR else 'missed'}"
        lines.append(f"| {unit} | " + " | ".join(f"{row[name] / scale:.1f}" for row in rows) + f" | {verdict} |")
    return "\n".join(lines), rows


def main() -> int:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="'best' among them")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[256, 400, 576, 784, 1024, 1156],
        help="image tokens of each image; the default has the mean of LaViT-SFT-15K",
    )
    parser.add_argument("--layers", type=int, default=8, help="of the decoder")
    parser.add_argument("--heads", type=int, choices=(2, 4, 8, 16), default=16, help="of its attention, over 2 of keys")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--out", type=Path, help="write every measurement as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(*options.tokens, options.repeats, options.layers) < 1:
        parser.error("--tokens, --layers and --repeats are at least 1")
    if options.worker:
        worker(options)
        return 0
    if "best" not in options.ways:
        parser.error("--ways holds 'best', which the others are compared with")
    rows = compare(options)
    sys.stdout.write(table(rows) + "\n\n")
    text, growth = growth_table(options.device)
    sys.stdout.write(text + "\n")
    if options.out is not None:
        about = {name: getattr(options, name) for name in ("device", "threads", "repeats", "tokens", "layers", "heads")}
        write_results(options.out, about, {"throughput": rows, "growth": growth})
    return 0


if __name__ == "__main__":
    sys.exit(main())
