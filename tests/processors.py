"""A small WordPiece processor for the models of :mod:`tests.tiny_blip`."""

from __future__ import annotations

from functools import cache

from transformers import BertTokenizer, BlipImageProcessor, BlipProcessor

from hooked_vlm import HookedVLM
from tests.tiny_blip import CLS, DEC, ENC, IMAGE, PAD, SEP, hf_blip

WORDS = (
    "what color is the red circle left of and a ' s t ? , . ! she cir isn ##ep ##cle ##s ##color gr ##een ##er".split()
)


def vocabulary() -> dict[str, int]:
    special = {"[PAD]": PAD, "[UNK]": 1, "[CLS]": CLS, "[SEP]": SEP, "[MASK]": 4}
    words = {word: len(special) + place for place, word in enumerate(WORDS)}
    unused = {f"[unused{number}]": number for number in range(len(special) + len(words), DEC)}
    return {**special, **words, **unused, "[DEC]": DEC, "[ENC]": ENC}


@cache
def processor() -> BlipProcessor:
    return BlipProcessor(BlipImageProcessor(size={"height": IMAGE, "width": IMAGE}), BertTokenizer(vocab=vocabulary()))


@cache
def model(task: str) -> HookedVLM:
    """One of our models over HF's, with a processor; do not change it."""
    return HookedVLM.from_hf(hf_blip(task), processor=processor())
