"""``laavit import lavit-official DIR OUT``: the LaViT authors' checkpoint as an export folder of laavit.

Their layout (public code of arXiv 2601.10129): a Qwen2.5-VL folder whose tokenizer has ``<lvr1>`` … ``<lvr4>``, and
beside the model's weights those of two heads that only their training reads: ``v_top_head`` (the state of the last
latent to the teacher's width) and ``traj_head`` (not there where trajectory supervision was off). Their sequence is
``assistant: <lvr1><lvr2><lvr3><lvr4> answer`` with a space, and no separator; the template's own system prompt; the
cross-entropy covers the latent tokens, and at inference the model writes them itself.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from laavit.backbones.loading import dtype_of, read_processor, reading
from laavit.commands.common import Parser, file_digest
from laavit.commands.export import exported_template
from laavit.files import write_json, write_text
from laavit.latents import SEPARATOR, LatentLayout, LearnedLatents, latent_tokens
from laavit.paths import EXPORT_CARD
from laavit.registry import UserError, nearest

logger = logging.getLogger(__name__)

#: the authors' code knows this many
LATENTS = 4
HEADS = "official_heads.safetensors"
#: settings of their training that stand in the model's configuration; they go into laavit.json
SETTINGS = (
    "v_top_dim",
    "loss_scale_vtop",
    "loss_scale_traj",
    "training_stage",
    "bottleneck_block_prompt",
    "use_trajectory_supervision",
)


def import_official(
    folder: Path, out: Path, dtype: str = "auto", processor: Path | None = None, emitted: bool = False
) -> Path:
    """Write ``out``: the weights bit for bit, their tokens under laavit's names, the heads apart, ``laavit.json``.

    Args:
        folder: the authors' checkpoint, weights as safetensors or ``pytorch_model.bin``.
        dtype: of the written weights; 'auto' keeps the stored one.
        processor: a folder of Qwen2.5-VL, for a checkpoint that was saved without its image processor.
        emitted: the model writes the latents itself, as in the authors' evaluation; else the chat template does.

    Raises:
        UserError: the folder is not of this layout, or ``out`` exists and is no export.
    """
    if out.exists() and any(out.iterdir()) and not (out / EXPORT_CARD).is_file():
        raise UserError(f"'{out}' exists and is no export of laavit; name another folder")
    config = read_config(folder)
    tokens = lvr_tokens(folder)
    heads = read_heads(folder, config.get_text_config().hidden_size)
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_processor(folder, processor, temporary, dict(zip(tokens, latent_tokens(LATENTS), strict=False)))
    model = read_weights(folder, dtype, tokens)
    settings = {name: vars(model.config).pop(name) for name in SETTINGS if name in vars(model.config)}
    opened = AutoProcessor.from_pretrained(temporary)
    # Their tokens have rows: what is added, and starts at the vocabulary's mean, is the separator alone.
    LearnedLatents(LATENTS, noise=0.0).add_to(model, opened.tokenizer, torch.Generator())
    model.save_pretrained(temporary, safe_serialization=True)
    opened.save_pretrained(temporary)
    template = exported_template(opened.chat_template, "", 0 if emitted else LATENTS)
    write_text(temporary / "chat_template.jinja", template.replace(SEPARATOR, ""))
    save_file(heads, temporary / HEADS)
    card = {
        "latents": LATENTS,
        "layout": asdict(LatentLayout(LATENTS, LATENTS, emitted)),
        "separator": None,
        "system": "",
        "order": "image_first",
        "suffix": "",
        "imported": {
            "from": "lavit-official",
            "source": folder.name,
            "files_sha256": {file.name: file_digest(file) for file in weight_files(folder)},
            "tokens": dict(zip(latent_tokens(LATENTS), tokens, strict=False)),
            "separator_row": f"{SEPARATOR} is new: the mean of the vocabulary's rows",
            "heads": {name: list(tensor.shape) for name, tensor in heads.items()},
            "settings": settings,
        },
    }
    write_json(temporary / EXPORT_CARD, card)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    return out


def read_config(folder: Path) -> Any:
    """The model's configuration.

    Raises:
        UserError: there is none, or of another family.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"'{folder}' is no checkpoint: config.json is missing")
    with reading(str(folder)) as place:
        config = AutoConfig.from_pretrained(place)
    if config.model_type != "qwen2_5_vl":
        raise UserError(
            f"'{folder}' is of type '{config.model_type}'; allowed: qwen2_5_vl, which LaViT's authors train"
        )
    return config


def lvr_tokens(folder: Path) -> list[str]:
    """The authors' latent tokens, in order.

    Raises:
        UserError: the tokenizer has others than ``<lvr1>`` … ``<lvr4>``, or laavit's own.
    """
    with reading(str(folder)) as place:
        known = AutoTokenizer.from_pretrained(place).get_vocab()
    wanted = [f"<lvr{i}>" for i in range(1, LATENTS + 1)]
    found = sorted(token for token in known if token.startswith("<lvr") and token.endswith(">"))
    # Their evaluation adds a bare <lvr> to tokenizers at hand; no sequence of their training has it.
    if [token for token in found if token != "<lvr>"] != wanted:
        raise UserError(
            f"the tokenizer of '{folder}' has {', '.join(found) or 'no <lvr> token'}; allowed: {', '.join(wanted)}"
        )
    own = [token for token in latent_tokens(LATENTS) if token in known]
    if own:
        raise UserError(
            f"the tokenizer of '{folder}' has {', '.join(own)} already: it is no checkpoint of the authors'"
        )
    return wanted


def weight_files(folder: Path) -> list[Path]:
    """The files of the weights: safetensors where there are any, else ``pytorch_model.bin``, whole or in shards.

    Raises:
        UserError: there is none, or one that the index names is missing.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"'{index}' is no index of shards: {error!r}") from None
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise UserError(f"'{folder}' is not complete: {missing[0]} is missing, which {index.name} names")
            return [folder / name for name in names]
        if (folder / f"{stem}.{suffix}").is_file():
            return [folder / f"{stem}.{suffix}"]
    raise UserError(f"'{folder}' has no weights; allowed: model.safetensors or pytorch_model.bin, whole or in shards")


def read_heads(folder: Path, width: int) -> dict[str, Tensor]:
    """The weights of the authors' heads.

    Args:
        width: D of the model.

    Raises:
        UserError: ``v_top_head`` is missing, a head is not as their code has it, or for another width.
    """
    heads: dict[str, Tensor] = {}
    for file in weight_files(folder):
        heads |= _tensors(file, lambda name: name.startswith(("v_top_head.", "traj_head.")))
    shapes: dict[str, list[int | None]] = {  # None: the teacher's width
        "v_top_head.mlp.0.weight": [width, width],
        "v_top_head.mlp.0.bias": [width],
        "v_top_head.mlp.2.weight": [None, width],
        "v_top_head.mlp.2.bias": [None],
    }
    if any(name.startswith("traj_head.") for name in heads):
        shapes |= {"traj_head.query_proj.weight": [width, width], "traj_head.query_proj.bias": [width]}
    if set(heads) != set(shapes):
        names = sorted(set(heads) ^ set(shapes))
        verb = "has no" if names[0] in shapes else "has an unknown"
        raise UserError(f"'{folder}' {verb} tensor {names[0]}: it is no checkpoint of the LaViT authors'")
    for name, wanted in shapes.items():
        given = list(heads[name].shape)
        if len(given) != len(wanted) or any(w not in (None, g) for w, g in zip(wanted, given)):
            said = ", ".join("teacher" if w is None else str(w) for w in wanted)
            raise UserError(f"{name} of '{folder}' is {given}; a model of width {width} needs [{said}]")
    return heads


def _tensors(file: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The wanted tensors of a file of weights; nothing but tensors is ever unpickled."""
    try:
        if file.suffix == ".bin":
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            if not isinstance(loaded, Mapping):
                raise UserError(f"'{file}' holds no state dict")
            return {name: tensor.clone() for name, tensor in loaded.items() if wanted(name)}
        with ExitStack() as stack:
            opened = stack.enter_context(safe_open(file, framework="pt"))
            return {name: opened.get_tensor(name) for name in opened.keys() if wanted(name)}  # noqa: SIM118
    except UnpicklingError:
        raise UserError(f"'{file}' holds more than tensors: it would be code to execute, and is not opened") from None
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"'{file}' cannot be read: {' '.join(str(error).split())[:200]}") from None


def read_weights(folder: Path, dtype: str, tokens: Sequence[str]) -> Any:
    """The model without its heads; transformers maps the names of its older versions.

    Raises:
        UserError: weights are missing or of other shapes, there are unknown ones, or a token has no row.
    """
    kind = "auto" if dtype == "auto" else dtype_of(dtype)
    with reading(str(folder)) as place:
        try:
            model, told = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                place, dtype=kind, output_loading_info=True
            )
        except RuntimeError as error:  # how transformers tells of shapes that do not fit
            raise UserError(f"the weights of '{folder}' do not fit its config.json: {error}") from None
    unknown = [name for name in told["unexpected_keys"] if not name.startswith(("v_top_head.", "traj_head."))]
    for what, names in (("lacks", told["missing_keys"]), ("has unknown", unknown)):
        if names:
            raise UserError(f"the state dict of '{folder}' {what} weights: {', '.join(sorted(names)[:3])}")
    rows = model.get_input_embeddings().weight.shape[0]
    with reading(str(folder)) as place:
        ids = AutoTokenizer.from_pretrained(place).convert_tokens_to_ids(list(tokens))
    if max(ids) >= rows:
        raise UserError(f"'{folder}': {tokens[-1]} is token {max(ids)}, and the embedding has {rows} rows")
    return model


def write_processor(folder: Path, base: Path | None, out: Path, names: Mapping[str, str]) -> None:
    """Write tokenizer, image processor and template, with tokens renamed: their ids, and so their rows, stay.

    Raises:
        UserError: the image processor or the chat template is missing, and ``base`` was not given.
    """
    if base is None and not any(
        (folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")
    ):
        raise UserError(
            f"'{folder}' was saved without its image processor; give --processor FOLDER of the Qwen2.5-VL it comes from"
        )
    processor = read_processor(str(base or folder))
    if base is not None:
        with reading(str(folder)) as place:
            processor.tokenizer = AutoTokenizer.from_pretrained(place)
    if not processor.chat_template:
        raise UserError(
            f"'{base or folder}' has no chat template; give --processor FOLDER of the Qwen2.5-VL it comes from"
        )
    processor.save_pretrained(out)
    for file in out.glob("*.json"):
        write_text(file, json.dumps(_renamed(json.loads(file.read_text(encoding="utf-8")), names), ensure_ascii=False))


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """JSON with strings replaced, as keys and as values, where they are one of the names as a whole."""
    if isinstance(value, Mapping):
        return {names.get(key, key): _renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


#: layout -> how it is imported
LAYOUTS = {"lavit-official": import_official}


def main(argv: Sequence[str]) -> int:
    """Run the command with its words; returns the exit code."""
    parser = Parser(prog="import", description="A checkpoint of another layout as an export folder of laavit.")
    parser.add_argument("layout", help=f"allowed: {', '.join(LAYOUTS)} (the LaViT authors' own)")
    parser.add_argument("folder", type=Path, help="the checkpoint")
    parser.add_argument("out", type=Path, help="the folder to write; stock transformers loads it")
    parser.add_argument(
        "--processor", type=Path, help="a Qwen2.5-VL folder, where the checkpoint has no image processor"
    )
    parser.add_argument(
        "--emitted", action="store_true", help="leave the latents to the model, as its authors evaluate it"
    )
    parser.add_argument("--dtype", default="auto", help="of the written weights; default as stored")
    options = parser.parse_args(list(argv))
    if options.layout not in LAYOUTS:
        raise UserError(f"no layout is called '{options.layout}'; {nearest(options.layout, LAYOUTS)}")
    importer = LAYOUTS[options.layout]
    out = importer(options.folder, options.out, options.dtype, options.processor, options.emitted)
    logger.info("imported to %s; the heads, which no inference reads, are in %s", out, HEADS)
    return 0
