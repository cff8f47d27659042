"""What the parameters of each family's parts are called, as regular expressions."""

from __future__ import annotations

#: of families whose tower holds its projector, or that have other names than most
TOWER = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), r"model\.visual\.(?!merger\.)"),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), r"model\.visual\.(?!merger\.|deepstack_merger_list\.)"),
    **dict.fromkeys(("idefics3", "smolvlm"), r"model\.vision_model\."),
}
PROJECTOR = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), r"model\.visual\.merger\."),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), r"model\.visual\.(merger|deepstack_merger_list)\."),
    **dict.fromkeys(("idefics3", "smolvlm"), r"model\.connector\."),
}


def patterns(family: str) -> dict[str, str]:
    """What each part's parameters are called."""
    tower = TOWER.get(family, r"model\.vision_tower\.")
    projector = PROJECTOR.get(family, r"model\.(multi_modal_projector\.|image_newline$)")
    text = "text_model" if family in ("idefics3", "smolvlm") else "language_model"
    return {
        "tower": tower,
        "projector": projector,
        "vision": rf"{tower}|{projector}" if family.startswith("qwen") else tower,
        "embeddings": rf"model\.{text}\.embed_tokens\.",
        "decoder": rf"model\.{text}\.(layers|norm)\.",
        "head": r"lm_head\.",
    }
