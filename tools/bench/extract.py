"""What the extraction costs: ours against the straightforward way, on the same samples, in one run.

    python tools/bench/extract.py --out extract.json

*Ours* is ``laavit.teachers.extract`` as a user runs it: samples of like size in batches, greedy answers and recorded
rows of a batch at once, one store. *Straightforward* is one sample at a time: it answers, passes again through eager
attention with ``output_attentions`` and ``output_hidden_states``, and writes a torch file (the last layer's states at
all image tokens, 16 bit) and a JSON file (the maps) a sample, as the authors' code stores them. Its vision tower runs
SDPA, to be fair to it. Both read the same image files with the same processor, and both must give the same answers,
the same Top-8 and the same pooled semantics, or the comparison stops.

The teacher is the micro-lab's architecture with random weights. Both ways are processes of their own; times are medians
of repeats that take turns, factors are taken repeat by repeat, memory is the peak over the loaded, warmed-up model.
Loading is of traces in random order from a warm page cache, the store opened (and its hashes checked) beforehand.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from measuring import Worker, answer, asked, peak_of, write_results

WAYS = ("ours", "straightforward")
TOP_K = 8
#: measure -> the least factor wanted, and whether more is better
WANTED = {"throughput": 5.0, "memory": 3.0, "bytes": 50.0, "loading": 10.0}
QUICK = dict(samples=5, tokens=[4, 24], answer=3, large=64, width=32, layers=2, repeats=1, kept=4, shape=[30, 64])
NUMBERS = (*QUICK, "batch", "threads")
PIXELS = 16  # of a side of an image token: patches of 8, merged by two


# --- teacher and samples ---------------------------------------------------------------------------------------------


def write_teacher(folder: Path, options: argparse.Namespace) -> None:
    """The micro-lab's architecture at the chosen size, random, for images of up to ``--large`` tokens."""
    from laavit.microlab.tiny import Sizes, build_model, build_processor, build_tokenizer

    tokenizer = build_tokenizer()
    processor = build_processor(tokenizer)
    most = max(options.large, options.tokens[1])
    pixels = processor.image_processor
    pixels.size = type(pixels.size)(shortest_edge=PIXELS**2, longest_edge=2 * most * PIXELS**2)  # Qwen's are areas
    sizes = Sizes(options.width, options.layers, vision_width=32, vision_layers=4, vision_heads=2)
    model = build_model(sizes, tokenizer, seed=0)
    # One vision layer sees the whole image, the others windows, as in Qwen2.5-VL: the tower stays the small part.
    model.config.vision_config.fullatt_block_indexes = [3]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_samples(folder: Path, name: str, grids: Sequence[tuple[int, int]]) -> None:
    """Photographs' stand-ins (smooth noise, JPEG) of these many tokens, each with a micro-lab question."""
    import numpy as np
    from PIL import Image

    from laavit.microlab.questions import ask
    from laavit.microlab.scenes import make_scene

    noise = np.random.default_rng(0)
    records = []
    for index, (height, width) in enumerate(grids):
        small = noise.integers(0, 256, (2 * height, 2 * width, 3), dtype=np.uint8)
        path = folder / f"{name}-{index:03d}.jpg"
        Image.fromarray(small).resize((width * PIXELS, height * PIXELS), Image.Resampling.BICUBIC).save(path)
        question = ask(make_scene(0, index))[0]
        records.append([f"{name}-{index:03d}", path.name, question.text, question.answer])
    (folder / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")


def mixed_grids(count: int, least: int, most: int) -> list[tuple[int, int]]:
    """Grids of tokens: numbers spread evenly in the logarithm, shapes from 1 : 2 to 2 : 1, in random order."""
    chance = random.Random(0)
    grids = []
    for index in range(count):
        tokens = least * (most / least) ** (index / max(count - 1, 1))
        height = max(1, round(math.sqrt(tokens * 2 ** chance.uniform(-1, 1))))
        grids.append((height, max(1, round(tokens / height))))
    chance.shuffle(grids)
    return grids


def read_samples(folder: Path, name: str) -> list[Any]:
    """The samples as laavit's."""
    from laavit.structures import Sample

    records = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return [Sample(key, (folder / file,), question, gold) for key, file, question, gold in records]


# --- the two ways ----------------------------------------------------------------------------------------------------


class Ours:
    """The extraction of laavit."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        from laavit.teachers import HFTeacher

        self.teacher, self.options = HFTeacher(str(folder / "teacher"), device=options.device), options

    def run(self, samples: Sequence[Any], out: Path) -> None:
        from laavit.teachers import ExtractSettings, extract

        settings = ExtractSettings(
            max_new_tokens=self.options.answer,
            batch_size=self.options.batch,
            gaze_top_k=TOP_K,
            semantics_dtype="float16",
        )
        extract(self.teacher, samples, settings, out, {"name": "benchmark"})


class Straightforward:
    """One sample at a time, whole maps, a pair of files a sample."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        from laavit.backbones import Backbone, PromptSettings

        self.backbone = Backbone.load(str(folder / "teacher"), device=options.device, attention="eager")
        self.backbone.model.eval().requires_grad_(False)
        self.builder, self.options = self.backbone.builder(PromptSettings(system="")), options

    def run(self, samples: Sequence[Any], out: Path) -> None:
        out.mkdir(parents=True)
        results = []
        for sample in samples:
            prompt = self.builder.prompt_of(sample)
            (text,) = self.backbone.generate([prompt], self.options.answer)
            self.record(self.builder.with_answer(prompt, text), out / sample.id)
            results.append({"question_id": sample.id, "question": sample.question, "teacher_full_response": text})
        (out / "results.json").write_text(json.dumps({"results": results}, indent=2), encoding="utf-8")

    def record(self, item: Any, place: Path) -> None:
        """One teacher-forced pass and its files: Eq. 2 over the rows of question, header and answer."""
        import torch

        from laavit.structures import Role

        device = self.backbone.device
        with torch.no_grad():
            output = self.backbone.model.model(
                input_ids=item.input_ids[None].to(device), position_ids=item.position_ids[:, None].to(device),
                use_cache=False, output_attentions=True, output_hidden_states=True,
                **{key: value.to(device) for key, value in item.vision.items()},
            )  # fmt: skip
        image, index = item.roles == Role.IMAGE, torch.arange(len(item.roles))
        rows = (item.roles == Role.QUESTION) | (item.roles == Role.ANSWER)
        rows |= (index >= item.header[0]) & (index < item.header[1])
        maps = torch.stack([each[0].float().mean(0) for each in output.attentions]).mean(0).cpu()
        write_pair(place, output.hidden_states[-1][0].cpu()[image], maps[rows][:, image].mean(0))


def write_pair(place: Path, states: Any, scores: Any) -> None:
    """The authors' two files of a sample: features [N, D] in 16 bit, and the map with its strongest tokens."""
    import torch

    scaled = (scores - scores.min()) / (scores.max() - scores.min() + 1e-8)
    top = scaled.topk(min(TOP_K, len(scaled))).indices
    step = {"p_t": scaled.tolist(), "p_topk_idx": top.tolist(), "raw_attention_scores": scores.tolist()}
    torch.save(states.to(torch.float16), place.with_name(place.name + "_v_top_layer.pth"))
    with open(place.with_name(place.name + "_attention.json"), "w", encoding="utf-8") as file:
        json.dump({"steps": [step]}, file, indent=2)


def load_pair(place: Path) -> tuple[Any, Any]:
    """What training reads of the two files: the features and the map."""
    import torch

    states = torch.load(place.with_name(place.name + "_v_top_layer.pth"), map_location="cpu", weights_only=True)
    with open(place.with_name(place.name + "_attention.json"), encoding="utf-8") as file:
        return states, torch.tensor(json.load(file)["steps"][0]["p_t"])


def load_all(way: str, out: Path, passes: int) -> tuple[float, float]:
    """Seconds a sample, all of them in random order (the median of passes), and seconds to open what holds them."""
    begin = time.perf_counter()
    if way == "ours":
        from laavit.traces.store import TraceStore

        store = TraceStore(out)
        ids, get = list(store.ids), store.get
    else:
        ids = [path.name.removesuffix("_attention.json") for path in out.glob("*_attention.json")]

        def get(key: str) -> Any:
            return load_pair(out / key)

    opened, times = time.perf_counter() - begin, []
    for number in range(passes):
        random.Random(number).shuffle(ids)
        begin = time.perf_counter()
        for key in ids:
            get(key)
        times.append((time.perf_counter() - begin) / len(ids))
    return statistics.median(times), opened


def bytes_of(way: str, out: Path) -> int:
    """Bytes on disk, of everything that was written."""
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def worker(options: argparse.Namespace) -> None:
    """Answer: ``time SAMPLES OUT``, ``memory SAMPLES OUT`` or ``load OUT PASSES``."""
    import torch

    torch.set_num_threads(options.threads)
    way, folder = options.worker, options.folder
    made: Any = None
    for line in asked():
        what, *words = line.split("\t")
        if what == "load":
            load_all(way, Path(words[0]), 1)  # the page cache is warm for both
            answer(load_all(way, Path(words[0]), int(words[1])))
            continue
        if made is None:
            made = (Ours if way == "ours" else Straightforward)(folder, options)
            warm = folder / f"warm-{way}-{what}"
            made.run(read_samples(folder, "warm"), warm)  # kernels and libraries are loaded before anything is measured
        samples, out = read_samples(folder, words[0]), Path(words[1])
        if what == "memory":
            answer(peak_of(partial(made.run, samples, out), options.device)[0])
            continue
        begin, used = time.perf_counter(), time.process_time()
        made.run(samples, out)
        if options.device != "cpu":
            torch.cuda.synchronize()
        answer([time.perf_counter() - begin, time.process_time() - used])


# --- the comparison --------------------------------------------------------------------------------------------------


def start(way: str, folder: Path, options: argparse.Namespace, large_blocks: bool = False) -> Worker:
    """A worker of one way."""
    words = [__file__, "--worker", way, "--folder", str(folder)]
    for name in ("answer", "batch", "threads"):
        words += [f"--{name}", str(getattr(options, name))]
    return Worker([*words, "--device", options.device], options.threads, large_blocks)


def same(folder: Path) -> int:
    """How many samples both ways agree on.

    Raises:
        RuntimeError: they answered, looked or understood differently.
    """
    import torch

    from laavit.traces.store import TraceStore

    store = TraceStore(folder / "ours-0")
    results = json.loads((folder / "straightforward-0" / "results.json").read_text(encoding="utf-8"))["results"]
    for result in results:
        trace = store.get(result["question_id"])
        if trace.answer != result["teacher_full_response"]:
            raise RuntimeError(f"{trace.sample_id}: '{trace.answer}' and '{result['teacher_full_response']}'")
        states, scaled = load_pair(folder / "straightforward-0" / trace.sample_id)
        top = scaled.topk(min(TOP_K, len(scaled))).indices
        if set(top.tolist()) != set(trace.gaze.nonzero().flatten().tolist()):
            raise RuntimeError(f"{trace.sample_id}: other tokens are looked at")
        pooled = (scaled[top] / scaled[top].sum()) @ states[top].float()
        torch.testing.assert_close(trace.semantics.float(), pooled, rtol=1e-2, atol=1e-2 * float(pooled.abs().max()))
    return len(results)


def compare_runs(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Throughput, bytes and loading of the mixed samples."""
    workers = {way: start(way, folder, options) for way in WAYS}
    times: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for number in range(options.repeats):
        for way in WAYS:
            times[way].append(workers[way].ask(f"time\tmixed\t{folder / f'{way}-{number}'}"))
    agreed = same(folder)
    found = []
    for place, text in enumerate(("samples a second", "samples a second of processor time")):
        fast, slow = ([each[place] for each in times[way]] for way in WAYS)
        one = row("throughput", text, agreed / statistics.median(fast), agreed / statistics.median(slow))
        # Repeat by repeat: what slows the machine down for a while slows neighbours alike.
        factor = statistics.median(after / before for before, after in zip(fast, slow, strict=True))
        found.append(one | {"factor": factor, "seconds": {"ours": fast, "straightforward": slow}})
    size = row("bytes", "bytes a sample", *(bytes_of(way, folder / f"{way}-0") / agreed for way in WAYS))
    read = row("loading", "loading a sample, µs", *(load(workers[way], folder / f"{way}-0") for way in WAYS))
    for one in workers.values():
        one.close()
    return [*found, size, read]


def load(one: Worker, out: Path) -> float:
    """Microseconds a sample."""
    return 1e6 * float(one.ask(f"load\t{out}\t9")[0])


def compare_memory(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory at ``--large`` image tokens: of one sample, and of a whole batch of ours."""
    peaks: dict[tuple[str, str], int] = {}
    for way, name in (*((way, "large") for way in WAYS), ("ours", "batch")):
        alone = start(way, folder, options, large_blocks=True)
        peaks[way, name] = alone.ask(f"memory\t{name}\t{folder / f'{way}-{name}'}")
        alone.close()
    plain = peaks["straightforward", "large"] / 2**20
    whole = f"peak memory, {options.batch} such samples in a batch, MiB"
    return [
        row("memory", f"peak memory, {options.large} image tokens, MiB", peaks["ours", "large"] / 2**20, plain),
        row("", whole, peaks["ours", "batch"] / 2**20, plain),
    ]


def compare_stores(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Bytes and loading of traces as large as a 32B teacher's, made up: Top-8 with pooled semantics, or with 8 rows."""
    import torch

    from laavit.structures import Tile, Trace
    from laavit.traces.store import TraceWriter

    tokens, width = options.shape
    height = max(h for h in range(1, math.isqrt(tokens) + 1) if tokens % h == 0)
    tile = Tile(height, tokens // height)
    plain = folder / "straightforward-made"
    plain.mkdir()
    header = {"gaze_top_k": TOP_K, "semantics_dtype": "float16", "width": width}
    chance = torch.Generator().manual_seed(0)
    writers = (TraceWriter(folder / f"ours-{name}", header, 128) for name in ("pooled", "rows"))
    with next(writers) as pooled, next(writers) as rows:
        for index in range(options.kept):
            gaze, states = torch.rand(tokens, generator=chance).square(), torch.randn(tokens, width, generator=chance)
            top = gaze.topk(min(TOP_K, tokens)).indices
            one = Trace(f"{index:06d}", "the answer", (tile,), gaze / gaze.sum(), states[top].mean(0), 0.5)
            pooled.extend([one])
            rows.extend([Trace(one.sample_id, one.answer, one.tiles, one.gaze, states[top], 0.5, top)])
            write_pair(plain / one.sample_id, states, one.gaze)
    workers = {way: start(way, folder, options) for way in WAYS}
    loaded = load(workers["straightforward"], plain)
    found = []
    for name, text in (("pooled", "one vector"), ("rows", f"{TOP_K} rows")):
        sizes = (bytes_of("", place) / options.kept for place in (folder / f"ours-{name}", plain))
        where = f"{tokens} tokens of {width}, {text}"
        took = load(workers["ours"], folder / f"ours-{name}")
        found.append(row("bytes", f"bytes a sample, {where}", *sizes))
        found.append(row("loading", f"loading a sample, µs, {where}", took, loaded))
    for each in workers.values():
        each.close()
    return found


PARTS = {"runs": compare_runs, "memory": compare_memory, "stores": compare_stores}


def row(kind: str, what: str, ours: float, plain: float) -> dict[str, Any]:
    """A measure of both ways, the factor between them, and what is wanted of it."""
    factor = ours / plain if kind == "throughput" else plain / max(ours, 1e-9)
    return {"kind": kind, "what": what, "ours": ours, "straightforward": plain, "factor": factor}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| measure | ours | straightforward | factor | wanted |", "|---|---|---|---|---|"]
    for one in rows:
        least = WANTED.get(one["kind"])
        wanted = "" if least is None else f"≥ {least:.0f}: {'met' if one['factor'] >= least else 'missed'}"
        figures = (f"{one[way]:,.2f}" if one[way] < 100 else f"{one[way]:,.0f}" for way in WAYS)
        lines.append(f"| {one['what']} | {' | '.join(figures)} | {one['factor']:.1f} | {wanted} |")
    return "\n".join(lines)


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128, help="of mixed sizes")
    parser.add_argument("--tokens", type=int, nargs=2, default=[16, 256], help="least and most image tokens of these")
    parser.add_argument("--answer", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--batch", type=int, default=16, help="samples a batch of ours")
    parser.add_argument("--large", type=int, default=4096, help="image tokens of the sample whose memory is measured")
    parser.add_argument("--width", type=int, default=128, help="of the teacher")
    parser.add_argument("--layers", type=int, default=3, help="of the teacher")
    parser.add_argument("--shape", type=int, nargs=2, default=[698, 5120], help="tokens and width of made-up traces")
    parser.add_argument("--kept", type=int, default=32, help="how many of these")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; the figures mean nothing")
    parser.add_argument("--out", type=Path, help="write every measurement as JSON")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    """Compare, print, write."""
    parser = arguments()
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    given = vars(options)
    numbers = (given[name] for name in NUMBERS)
    least = min(min(number) if isinstance(number, list) else number for number in numbers)
    if least < 1 or options.tokens[0] > options.tokens[1]:
        parser.error("every number is at least 1, and the least number of tokens no more than the most")
    if options.worker:
        worker(options)
        return 0
    folder = Path(tempfile.mkdtemp(prefix="laavit-bench-"))
    try:
        write_teacher(folder / "teacher", options)
        side = round(math.sqrt(options.large))
        least, most = options.tokens
        write_samples(folder, "warm", mixed_grids(2, least, min(2 * least, most)))
        write_samples(folder, "mixed", mixed_grids(options.samples, least, most))
        write_samples(folder, "large", [(side, side)])
        write_samples(folder, "batch", [(side, side)] * options.batch)
        rows: list[dict[str, Any]] = []
        for part in options.parts:
            rows += PARTS[part](folder, options)
            sys.stderr.write(table(rows).split("\n", 2)[2] + "\n\n")  # each part as it is done
    finally:
        shutil.rmtree(folder)
    sys.stdout.write(table(rows) + "\n")
    if options.out is not None:
        write_results(options.out, {name: given[name] for name in (*NUMBERS, "device")}, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
