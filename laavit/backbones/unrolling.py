"""Batches that are read in several passes: latents that are fed back, and beginnings that samples share.

**Fed back** (Coconut, arXiv 2412.06769; LVR, arXiv 2509.24251): a latent's position reads no embedding, but the state,
after the decoder's final norm, of the position before it. So a sequence is read in K + 2 passes: prompts, each latent
(one position a sample), separator and answers.

**Shared beginnings**: questions about the same image begin with the same tokens up to its last one. These are read
once, by a pass of fewer rows, and what follows goes on from their keys and values.

No position is read twice. In training the keys and values of earlier passes are kept by the attention function
(laavit/segments.py), under gradient checkpointing too; to generate, in transformers' cache, from which its own
``generate`` goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from laavit.attention import AttentionContext
from laavit.backbones.rows import positions
from laavit.latents import check_attention, latent_tokens
from laavit.packing import Packing, no_mask
from laavit.registry import UserError
from laavit.segments import Segment, joined_rows, places, segments
from laavit.structures import Batch, Role

if TYPE_CHECKING:
    from laavit.backbones.base import Backbone

#: arguments of ``generate`` that have an entry for every token of the prompt
BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def unrolled(backbone: Backbone, batch: Batch, context: AttentionContext | None = None) -> Tensor:
    """Hidden states [B, S, D] of a batch that is read in several passes, by the batch's columns.

    Columns that no pass reads, padding, are given the state of column 0.

    Args:
        context: as of one pass; paths and rows count in the batch's columns, and it receives the rows.

    Raises:
        UserError: latents are to be fed back and a sample has none, or the decoder's attention keeps no keys.
    """
    check_attention(backbone.layout, backbone.attention, batch.shared is not None)
    context, length, shared = context or AttentionContext(), batch.roles.shape[1], batch.shared
    most = backbone.layout.most if backbone.even_passes else 0
    parts, latents = _passes(batch, backbone.layout.feedback, most)
    contexts, index = _contexts(context, parts, length, batch)
    decoder: Any = backbone.family.decoder(backbone.model)
    table: Any = backbone.model.get_input_embeddings()  # type: ignore[operator]

    def read(number: int, embeddings: Tensor) -> Tensor:
        """The states of a pass that goes on: [B, Q, D] -> [B, Q, D]."""
        columns = parts[number].columns.clamp(min=0)
        if batch.position_ids is not None:
            columns = batch.position_ids.gather(-1, columns.expand(*batch.position_ids.shape[:-1], -1))
        asked: dict[str, Any] = {"use_cache": False, "laavit": contexts[number]}
        if (packing := contexts[number].packing) is not None:
            embeddings, columns = packing.pack(embeddings), packing.pack_ids(columns)
            asked["attention_mask"] = no_mask(embeddings.device)
        states: Tensor = decoder(inputs_embeds=embeddings, position_ids=columns, **asked).last_hidden_state
        return states if packing is None else packing.unpack(states)

    states = [backbone.read(batch, contexts[0], parts[0].columns.shape[1])]
    if shared is not None:
        states[0] = states[0][shared.owners]
    feedback = Feedback(backbone) if latents else None
    for number in range(1, len(parts)):
        if feedback is not None and number in latents:
            last = (parts[number - 1].each >= 0).sum(1, keepdim=True) - 1 if number == latents[0] else None
            state = states[-1] if last is None else _chosen(states[-1], last)
            states.append(read(number, feedback(state).to(table.weight.dtype)))
        else:
            states.append(read(number, table(batch.input_ids.gather(1, parts[number].columns.clamp(min=0)))))
    if context.rows is not None and index:
        shape = (context.rows.shape[1], length)
        asked, which = [parts[number] for number in index], list(index.values())
        context.take([contexts[number] for number in index], lambda rows: joined_rows(rows, asked, which, *shape))
    return _chosen(torch.cat(states, 1), places(parts, length))


class Feedback:
    """What a latent's position reads of the state before it.

    Args:
        backbone: its layout says how a state is scaled: not at all, or to the root mean square of the vocabulary's
            embeddings (those of the latents left out) as the decoder reads them.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.size: Tensor | None = vocabulary_rms(backbone) if backbone.layout.scale == "vocabulary" else None

    def __call__(self, state: Tensor) -> Tensor:
        """[B, 1, D] -> [B, 1, D]."""
        if self.size is None:
            return state
        exact = state.to(self.size.dtype)
        return exact * (self.size / exact.square().mean(-1, keepdim=True).sqrt())


@torch.no_grad()
def vocabulary_rms(backbone: Backbone) -> Tensor:
    """The root mean square of the vocabulary's input embeddings, a scalar of float32 or more.

    The latents' own rows are left out: adapters keep them elsewhere until they are merged.
    """
    table: Any = backbone.model.get_input_embeddings()  # type: ignore[operator]
    ids = backbone.tokenizer.convert_tokens_to_ids(latent_tokens(backbone.layout.most))
    weight, exact = table.weight, torch.promote_types(table.weight.dtype, torch.float32)
    squares = torch.linalg.vector_norm(weight, dtype=exact).square() - weight[ids].to(exact).square().sum()
    # Gemma's table multiplies what it looks up.
    return (squares / weight[0].numel() / (len(weight) - len(ids))).sqrt() * getattr(table, "scalar_embed_scale", 1.0)


def _passes(batch: Batch, feedback: bool, most: int = 0) -> tuple[list[Segment], range]:
    """The passes in order, and which of them read a latent that is fed back.

    Shared beginnings, where there are any; what is left of the prompts; each latent; separators and answers. Where
    nothing is fed back, all that follows a shared beginning is one pass. A shorter sample's columns past its own are
    read beside the longest, and seen by nobody.

    Args:
        most: passes for fed-back latents that there are at least; those that no sample needs read padding.

    Raises:
        UserError: latents are fed back, and a sample has none.
    """
    shared, count, device = batch.shared, batch.roles.shape[1], batch.roles.device
    columns = torch.arange(count, device=device).expand(len(batch.roles), -1)
    begun = torch.zeros(len(batch.roles), 1, dtype=torch.long, device=device)
    found = []
    if shared is not None:
        begun = shared.stops[shared.owners][:, None]
        first = columns[: len(shared.stops), : int(shared.stops.max())]
        found.append(torch.where(first < shared.stops[:, None], first, -1))
    if not feedback:
        used = (batch.roles != Role.OTHER).long()
        last = (used * columns).amax(1, keepdim=True)  # what follows is padding, or markup that no loss reads
        found.append(positions((columns >= begun) & (columns <= last)))
        return segments(found, shared.owners if shared is not None else None), range(0)
    latents, after = (positions(batch.roles == role) for role in (Role.LATENT, Role.ANSWER))
    starts = latents[:, :1]
    if bool((starts < 0).any()):
        sample = batch.samples[int((starts[:, 0] < 0).nonzero()[0])]
        raise UserError(f"sample '{sample.id}' has no latents to feed back, and others of its batch do")
    latents = nn.functional.pad(latents, (0, max(0, most - latents.shape[1])), value=-1)
    found.append(positions((columns >= begun) & (columns < starts)))
    which = range(len(found), len(found) + latents.shape[1])
    found += [*latents.split(1, 1), after]
    return segments(found, shared.owners if shared is not None else None), which


def _contexts(
    context: AttentionContext, parts: list[Segment], length: int, batch: Batch
) -> tuple[list[AttentionContext], dict[int, Tensor]]:
    """The context of each pass; and, of the passes that record rows, which ones: long [B, R_i], -1 pads."""
    first = parts[0].columns
    width = first.shape[1]
    rows_of = slice(None) if batch.shared is None else batch.shared.first
    paths = tuple(
        replace(path, queries=path.queries[rows_of, :width] & (first >= 0), keys=path.keys[rows_of, :width])
        for path in context.paths
    )
    found: list[AttentionContext] = []
    index: dict[int, Tensor] = {}
    offset = 0
    place = None
    if context.rows is not None:
        place = places(parts, length).gather(1, context.rows.clamp(min=0))
        if batch.shared is not None:  # padding would count as a row of the beginning
            place = place.masked_fill(context.rows < 0, -1)
    for number, part in enumerate(parts):
        rows = None
        if place is not None:
            own = positions((place >= offset) & (place < offset + part.columns.shape[1]))
            if own.shape[1]:
                if part.owners is not None:
                    raise ValueError("rows of a beginning that samples share cannot be recorded, only what follows it")
                rows, index[number] = (place.gather(1, own.clamp(min=0)) - offset).masked_fill(own < 0, -1), own
        found.append(context.part(part, rows, context.paths if part.past else paths))
        if batch.packing is not None:
            real = part.columns >= 0
            real[0, 0] |= not bool(real.any())  # a pass of padding alone reads one position of it
            found[-1].packing = Packing.of(real)
        offset += part.columns.shape[1]
    return found, index


def _chosen(states: Tensor, index: Tensor) -> Tensor:
    """States [B, Q, D] at positions [B, N]: [B, N, D]."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


@torch.no_grad()
def fed_back(backbone: Backbone, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What ``generate`` goes on from when the latents at the end of prompts read the states before them.

    The prompts are read once, then one latent after another; all but the separator is in the cache then.

    Args:
        inputs: arguments of ``generate`` for a left-padded batch of prompts [B, S] that end with latents and separator:
            ids, mask, image inputs; ``position_ids`` where they are not to be worked out from the mask.

    Returns: ids, mask, positions and cache in their place.

    Raises:
        UserError: a prompt does not end with latents and separator, the numbers of latents are too unequal, or the
            model is in training mode with gradient checkpointing.
    """
    model: Any = backbone.model
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    known = torch.tensor(
        backbone.tokenizer.convert_tokens_to_ids(latent_tokens(backbone.layout.most)), device=ids.device
    )
    latents = torch.isin(ids, known[:-1])
    if not bool((ids[:, -1] == known[-1]).all() and latents[:, -2].all()):
        raise UserError("the latents are fed back, and a prompt does not end with latents and their separator")
    start, stop = int(latents.any(0).float().argmax()), ids.shape[1] - 1
    if bool((ids[:, start:stop] == backbone.family.image_token_id).any()):
        raise UserError("the numbers of latents of these prompts differ too much for one batch: ask one by one")
    where = inputs.get("position_ids")
    if where is None:
        where = model._prepare_position_ids_for_generation(ids, dict(inputs))
    cache = DynamicCache(config=model.config)
    first = {name: value[:, :start] if name in BY_TOKEN else value for name, value in inputs.items()}
    first |= {"position_ids": where[..., :start], "past_key_values": cache, "use_cache": True}
    state = model.model(**first).last_hidden_state[:, -1:]
    decoder: Any = backbone.family.decoder(model)
    feedback, table = Feedback(backbone), model.get_input_embeddings()
    for column in range(start, stop):
        here = slice(column, column + 1)
        words = table(ids[:, here])  # of prompts with fewer latents, which are not there yet
        state = decoder(
            inputs_embeds=torch.where(latents[:, here, None], feedback(state).to(words.dtype), words),
            attention_mask=mask[:, : column + 1], position_ids=where[..., here], past_key_values=cache, use_cache=True,
        ).last_hidden_state  # fmt: skip
    if cache.get_seq_length() != stop:  # transformers' layers drop it where they are to run again
        raise UserError("the latents are fed back from a cache, which gradient checkpointing drops: call model.eval()")
    return {"input_ids": ids, "attention_mask": mask, "position_ids": where, "past_key_values": cache}
