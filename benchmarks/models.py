"""The models that are measured: HF's BLIP for question answering and its LLaVA, of several sizes, at random."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

CLS = 101


@dataclass(frozen=True)
class Size(ABC):
    """One model. ``d_model`` is the text towers' width."""

    d_model: int
    n_layers: int
    n_heads: int
    image: int
    vocabulary: int

    architecture: ClassVar[str]
    """HF's class."""
    hooked: ClassVar[str]
    """The hook that a forward with one hook has."""

    @property
    @abstractmethod
    def config(self) -> Any:
        """HF's config."""

    @abstractmethod
    def inputs(self, batch: int = 1) -> dict[str, Tensor]:
        """As HF's processor makes them."""

    @abstractmethod
    def logits(self, hf_model: Any, tensors: dict[str, Tensor]) -> Tensor:
        """What HF's forward gives."""

    @property
    def hf_class(self) -> Any:
        import transformers

        return getattr(transformers, self.architecture)

    def hf_model(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """With weights in which a mistake would show: no bias is 0, no norm does nothing."""
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = self.hf_class(self.config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)
        for name, parameter in model.named_parameters():
            self.draw(name, parameter)
        return model

    def draw(self, name: str, parameter: Tensor) -> Tensor:
        """Random numbers for a parameter of HF's."""
        parameter.normal_(std=self.d_model**-0.5 if parameter.dim() > 1 else 0.1)
        if parameter.dim() == 1 and "norm" in name.lower() and name.endswith("weight"):
            parameter.add_(1.0)
        return parameter

    def write(self, folder: Path) -> None:
        """A checkpoint for HF's ``from_pretrained`` and for ours."""
        self.hf_model().save_pretrained(folder)


@dataclass(frozen=True)
class BlipSize(Size):
    """Both towers alike; a question of ``question`` tokens, an answer of ``answer``."""

    question: int
    answer: int = 1
    patch: int = 16

    architecture = "BlipForQuestionAnswering"
    hooked = "question_encoder.blocks.3.hook_mlp_out"

    @property
    def config(self) -> Any:
        from transformers import BlipConfig

        tower = {
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "intermediate_size": 4 * self.d_model,
        }
        return BlipConfig(
            vision_config={**tower, "image_size": self.image, "patch_size": self.patch},
            text_config={
                **tower,
                "vocab_size": self.vocabulary,
                "encoder_hidden_size": self.d_model,
                "bos_token_id": self.vocabulary - 2,
            },
        )

    def inputs(self, batch: int = 1) -> dict[str, Tensor]:
        """And the answer's tokens."""
        generator = torch.Generator().manual_seed(0)
        question = torch.randint(1000, self.vocabulary - 2, (batch, self.question), generator=generator)
        question[:, 0] = CLS
        answer = torch.full((batch, self.answer), self.vocabulary - 2)
        return {
            "pixel_values": torch.randn(batch, 3, self.image, self.image, generator=generator),
            "input_ids": question,
            "attention_mask": torch.ones_like(question),
            "decoder_input_ids": answer,
        }

    def logits(self, hf_model: Any, tensors: dict[str, Tensor]) -> Tensor:
        """HF's forward for question answering computes them and does not return them."""
        seen: list[Tensor] = []
        decoder = hf_model.text_decoder
        handle = decoder.register_forward_hook(lambda _module, _inputs, output: seen.append(output.logits))
        hf_model(**tensors)
        handle.remove()
        return seen[0]


@dataclass(frozen=True)
class LlavaSize(Size):
    """A CLIP of ``vision_layers`` layers, and a LLaMA. Its prompt: ``before`` tokens, an image, ``after`` tokens."""

    d_mlp: int
    d_vision: int
    vision_layers: int
    vision_heads: int
    patch: int = 14
    before: int = 5
    after: int = 20
    dtype: torch.dtype = torch.float32
    shard: int = 5 * 10**9
    """Bytes in one file of a checkpoint, at most."""

    architecture = "LlavaForConditionalGeneration"
    hooked = "language_model.blocks.1.hook_mlp_out"

    @property
    def image_token(self) -> int:
        """Its place in LLaVA-1.5's vocabulary: the first after LLaMA's."""
        return self.vocabulary - 64

    @property
    def image_tokens(self) -> int:
        return (self.image // self.patch) ** 2

    @property
    def config(self) -> Any:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

        vision = CLIPVisionConfig(
            hidden_size=self.d_vision,
            intermediate_size=4 * self.d_vision,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=self.vision_heads,
            image_size=self.image,
            patch_size=self.patch,
        )
        text = LlamaConfig(
            hidden_size=self.d_model,
            intermediate_size=self.d_mlp,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        )
        return LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=self.image_token,
            pad_token_id=self.image_token + 1,
            architectures=[self.architecture],
            dtype=self.dtype,
        )

    def inputs(self, batch: int = 1) -> dict[str, Tensor]:
        """One image a row."""
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(3, self.image_token, (batch, self.before + self.after), generator=generator)
        prompt[:, 0] = 1
        image = torch.full((batch, self.image_tokens), self.image_token)
        ids = torch.cat([prompt[:, : self.before], image, prompt[:, self.before :]], dim=1)
        return {
            "pixel_values": torch.randn(batch, 3, self.image, self.image, generator=generator),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }

    def logits(self, hf_model: Any, tensors: dict[str, Tensor]) -> Tensor:
        return hf_model(**tensors).logits

    def write(self, folder: Path) -> None:
        """In the hub's layout, shard by shard, so that no more than one is in memory."""
        from safetensors.torch import save_file

        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in self.hf_class(self.config).state_dict().items()}
        torch.manual_seed(0)
        shards = self._shards(shapes)
        files: dict[str, str] = {}
        for place, names in enumerate(shards, start=1):
            file = f"model-{place:05}-of-{len(shards):05}.safetensors"
            drawn = {hub_name(name): self.draw(name, torch.empty(shapes[name], dtype=self.dtype)) for name in names}
            save_file(drawn, folder / file, metadata={"format": "pt"})
            files |= dict.fromkeys(drawn, file)
        index = {"metadata": {"total_size": sum(map(self._n_bytes, shapes.values()))}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        self.config.save_pretrained(folder)

    def _shards(self, shapes: Mapping[str, torch.Size]) -> list[list[str]]:
        """Which tensors go into one file."""
        shards: list[list[str]] = []
        room = 0
        for name, shape in shapes.items():
            room -= self._n_bytes(shape)
            if room < 0 or not shards:
                shards.append([])
                room = self.shard - self._n_bytes(shape)
            shards[-1].append(name)
        return shards

    def _n_bytes(self, shape: torch.Size) -> int:
        return shape.numel() * self.dtype.itemsize


HUB_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
"""What the names of LLaVA-1.5's tensors start with in transformers 5, and on the hub."""


def hub_name(name: str) -> str:
    """What the hub's LLaVA checkpoints call a tensor."""
    start = next(start for start in HUB_NAMES if name.startswith(start))
    return HUB_NAMES[start] + name.removeprefix(start)


VIT_L: dict[str, Any] = {"d_vision": 1024, "vision_layers": 24, "vision_heads": 16, "image": 336}
"""CLIP's, with 576 patches."""

SIZES: dict[str, Size] = {
    # Salesforce/blip-vqa-base: 361 million parameters, ViT-B/16 at 384 pixels, 577 image positions.
    "vqa-base": BlipSize(d_model=768, n_layers=12, n_heads=12, image=384, vocabulary=30524, question=9),
    # As many layers, but so narrow and short that only Python counts: 10 image positions, 16 tokens.
    "small": BlipSize(d_model=256, n_layers=12, n_heads=4, image=48, vocabulary=2048, question=16, answer=16),
    # Narrower still: arithmetic is all but free, and what is left is Python and the dispatch of kernels.
    "tiny": BlipSize(d_model=32, n_layers=12, n_heads=2, image=48, vocabulary=2048, question=16, answer=16),
    # llava-hf/llava-1.5-7b-hf: 7063 million parameters.
    "llava-7b": LlavaSize(
        d_model=4096, n_layers=32, n_heads=32, d_mlp=11008, vocabulary=32064, dtype=torch.bfloat16, **VIT_L
    ),
    # Its vision tower, and a language model of about that size: 680 million parameters.
    "llava": LlavaSize(d_model=1024, n_layers=24, n_heads=16, d_mlp=2816, vocabulary=32064, **VIT_L),
    # Narrow, and 9 patches.
    "llava-small": LlavaSize(
        d_model=256,
        n_layers=12,
        n_heads=4,
        d_mlp=704,
        vocabulary=2048,
        d_vision=256,
        vision_layers=12,
        vision_heads=4,
        image=42,
    ),
    "llava-tiny": LlavaSize(
        d_model=32,
        n_layers=12,
        n_heads=2,
        d_mlp=88,
        vocabulary=2048,
        d_vision=32,
        vision_layers=12,
        vision_heads=2,
        image=42,
        shard=10**5,
    ),
}
