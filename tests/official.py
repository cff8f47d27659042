"""A tiny checkpoint in the layout of the LaViT authors' public code (commit 26bf182)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

TOKENS = ["<lvr1>", "<lvr2>", "<lvr3>", "<lvr4>"]
#: settings that their configuration class adds
SETTINGS = {"v_top_dim": 40, "loss_scale_vtop": 0.3, "loss_scale_traj": 0.3, "training_stage": 2}


def old_name(name: str) -> str:
    """As transformers before 4.52 called it, and as its ``save_pretrained`` went on writing it until 5."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def write_official(tiny: Path, folder: Path, old: bool = True, tied: bool = True) -> Path:
    """Their training's output from a tiny Qwen2.5-VL: tokens added, embeddings cut to the vocabulary, two heads."""
    torch.manual_seed(7)
    processor = AutoProcessor.from_pretrained(tiny)
    processor.tokenizer.add_tokens(TOKENS, special_tokens=True)
    model = AutoModelForImageTextToText.from_pretrained(tiny)
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    width = model.config.text_config.hidden_size
    with torch.no_grad():
        model.get_input_embeddings().weight[-4:] = torch.randn(4, width)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    if not tied:
        weights["lm_head.weight"] = torch.randn(len(processor.tokenizer), width)
    weights = {old_name(name) if old else name: tensor for name, tensor in weights.items()}
    teacher = SETTINGS["v_top_dim"]
    for name, shape in {"mlp.0": (width, width), "mlp.2": (teacher, width)}.items():
        weights |= {f"v_top_head.{name}.weight": torch.randn(shape), f"v_top_head.{name}.bias": torch.randn(shape[0])}
    weights |= {
        "traj_head.query_proj.weight": torch.randn(width, width),
        "traj_head.query_proj.bias": torch.randn(width),
    }
    processor.save_pretrained(folder)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= SETTINGS | {"architectures": ["LaViTQwen2VL"], "tie_word_embeddings": tied}
    config["text_config"]["tie_word_embeddings"] = tied
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
