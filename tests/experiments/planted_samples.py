"""The planted models as samples take them: they prepare a picture of one colour, and know the words of the colours."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

from PIL import Image

from hooked_vlm import HookedVLM, VLMInputs
from hooked_vlm.data.samples import Sample
from hooked_vlm.inputs import TextPiece


class _Tokenizer:
    """Tokens of the two colours; in labels, all are called t0, t1, ..."""

    unk_token_id = None

    def __init__(self, room: ModuleType) -> None:
        self.ids = {"red": room.RED_TOKEN, "blue": room.BLUE_TOKEN}

    def __call__(self, text: str, **options: Any) -> Any:
        return SimpleNamespace(input_ids=[self.ids[text.strip().lower()]])

    def decode(self, ids: Any) -> str:
        return self.convert_ids_to_tokens(ids)[0]

    def convert_ids_to_tokens(self, ids: Any) -> list[str]:
        return [f"t{int(token)}" for token in ids]


def red_and_blue(color: str = "red") -> Sample:
    """A picture of one colour, with the other as its counterfactual."""
    other = {"red": "blue", "blue": "red"}[color]
    pictures = {name: Image.new("RGB", (12, 12), name) for name in (color, other)}
    return Sample(color, pictures[color], "what color is it ?", color, other, image_cf=pictures[other])


def planted(room: ModuleType) -> HookedVLM:
    """The model of the module ``planted`` or ``planted_llava``, taking pictures."""
    model = room.planted_model()
    model._processor = SimpleNamespace(tokenizer=_Tokenizer(room))

    def prepare(images: Any, texts: Any, **options: Any) -> VLMInputs:
        text = texts if isinstance(texts, str) else texts[0]
        inputs = room.planted_inputs("red" if images.getpixel((0, 0)) == (255, 0, 0) else "blue")
        return replace(inputs, texts=(TextPiece(text, (None,) * inputs.input_ids.shape[1]),))

    model.prepare = prepare
    return model
