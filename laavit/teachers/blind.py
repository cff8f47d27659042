"""What a text-only language model answers to a question about an image that it never sees (the difficulty filter)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM, AutoTokenizer

from laavit.recipe import zoo_path
from laavit.registry import UserError
from laavit.structures import Sample
from laavit.teachers.settings import ExtractSettings


class BlindReader:
    """A frozen text-only causal language model that answers greedily.

    Args:
        path: its folder, hub name or ``zoo:NAME``. settings: the longest answer, the penalty and the system prompt.
        dtype, device: of its weights, the teacher's own.

    Raises:
        UserError: no language model can be read there.
    """

    def __init__(self, path: str, settings: ExtractSettings, dtype: torch.dtype, device: torch.device) -> None:
        self.settings = settings
        place = zoo_path(path)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left")
            model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
        except (OSError, ValueError, HfHubHTTPError) as error:
            what = str(error).splitlines()[0]
            raise UserError(f"extract.blind: no text-only language model can be read from '{path}': {what}") from None
        self.model = model.to(device).eval().requires_grad_(False)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def prompt(self, sample: Sample) -> str:
        """The question in the model's own chat template; a model without one gets the words 'Question' and 'Answer'."""
        if self.tokenizer.chat_template is None:
            return f"Question: {sample.question}\nAnswer:"
        system = [{"role": "system", "content": self.settings.system}] if self.settings.system else []
        chat = [*system, {"role": "user", "content": sample.question}]
        return str(self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[str]:
        """Greedy answers, one text each."""
        templated = self.tokenizer.chat_template is not None  # which writes the first token itself
        texts = [self.prompt(sample) for sample in samples]
        inputs = self.tokenizer(texts, padding=True, add_special_tokens=not templated, return_tensors="pt")
        inputs = {key: inputs[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
        out = self.model.generate(
            **inputs, max_new_tokens=self.settings.max_new_tokens, do_sample=False,
            repetition_penalty=self.settings.repetition_penalty, temperature=None, top_p=None, top_k=None,
            pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        new = out[:, inputs["input_ids"].shape[1] :]
        answers = [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
        # A model without a chat goes on with questions of its own.
        return answers if templated else [answer.partition("\n")[0].strip() for answer in answers]
