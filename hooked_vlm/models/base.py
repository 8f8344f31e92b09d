"""What every hooked vision-language model can do: load, prepare inputs, run with hooks or a cache, patch, generate."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_vlm.components import Attention
from hooked_vlm.config import AttentionImplementation, ModelConfig
from hooked_vlm.generation import Decoding, beam_search, greedy_tokens
from hooked_vlm.hook_point import HookPoint
from hooked_vlm.hooks import HookedModule
from hooked_vlm.inputs import VLMInputs

if TYPE_CHECKING:
    from hooked_vlm.edits import Edit


class HookedVLM(HookedModule):
    """A vision-language model with a hook point on everything. Load one with :meth:`from_pretrained`."""

    config: ModelConfig
    towers: ClassVar[tuple[str, ...]]
    """The towers' names, in forward order."""
    pairs_rows: ClassVar[bool] = True
    """Whether an image and a text of one row belong together."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._processor: Any = None

    # Loading ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        device_map: str | Mapping[str, int | str | torch.device] | None = None,
        offload_folder: str | Path | None = None,
        quantization: Literal["int8"] | None = None,
        attention: AttentionImplementation | None = None,
        cross_attention_padding: Literal["mask", "hf"] = "mask",
        variant: Literal["hf", "original"] | None = None,
        processor: Any = None,
        vision_tower: str | Path | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> HookedVLM:
        """A model from an embedded name (``"toy-blip-vqa"``), a local folder in HF format, a research file
        (``.pth``, or its tensors as ``.safetensors``), or a hub id.

        Tensors are memory-mapped, and become the parameters without a copy unless ``dtype`` or ``device`` asks for
        one.

        Args:
            dtype: by default what ``config.json`` says, as HF does; then what the file holds.
            device_map: where each part is kept: a device for each by name (``"language_model.blocks.0"``; ``""`` is all
                the rest), or ``"auto"``, ``"balanced"``, ``"balanced_low_0"`` and ``"sequential"``, which need
                accelerate. On accelerators parts run where they are kept; parts on ``"cpu"`` and ``"disk"`` beside them
                are fetched at each use.
            offload_folder: where parts on disk are written that ``dtype`` converts; others stay in the checkpoint's
                own files.
            quantization: ``"int8"``: the weights of linear layers in int8, all but the unembedding's, as HF with
                torchao, which it needs. ``W_Q`` and its like are then multiplied out each time they are read.
            attention: ``"eager"`` or ``"sdpa"``; by default what HF uses for this model.
            cross_attention_padding: BLIP: ``"mask"`` (a padded row gives what it gives alone) or ``"hf"``.
            variant: BLIP: ``"hf"`` or ``"original"``, see :class:`~hooked_vlm.config.BlipConfig`; by default
                ``"original"`` for research files and ``"hf"`` otherwise.
            processor: an HF processor, or where to load one from; by default the checkpoint's own.
            vision_tower: where the CLIP of a research LLaVA lies that does not hold its own; by default where its
                ``config.json`` says.
            revision, token, cache_dir, local_files_only: as in HF, for hub ids.

        Raises:
            FileNotFoundError: no such embedded model, folder, file or hub repository.
            CheckpointError: unsupported model type; missing, unexpected or misshapen keys; unreadable files.
        """
        from hooked_vlm.loading import load_pretrained

        model = load_pretrained(
            name_or_path,
            revision=revision,
            dtype=dtype,
            device=device,
            device_map=device_map,
            offload_folder=offload_folder,
            quantization=quantization,
            attention=attention,
            cross_attention_padding=cross_attention_padding,
            variant=variant,
            processor=processor,
            vision_tower=vision_tower,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        if not isinstance(model, cls):
            raise TypeError(f"{name_or_path} is a {type(model).__name__}, not a {cls.__name__}")
        return model

    @classmethod
    def from_hf(
        cls,
        hf_model: nn.Module,
        *,
        attention: AttentionImplementation | None = None,
        cross_attention_padding: Literal["mask", "hf"] = "mask",
        variant: Literal["hf", "original"] = "hf",
        processor: Any = None,
    ) -> HookedVLM:
        """A model over an HF model in memory; the two share every parameter. :meth:`save_hf` writes it back."""
        from hooked_vlm.loading import load_hf_model

        return load_hf_model(
            hf_model,
            attention=attention,
            cross_attention_padding=cross_attention_padding,
            variant=variant,
            processor=processor,
        )

    def save_hf(self, folder: str | Path) -> None:
        """Write a folder that HF's ``from_pretrained`` loads to identical logits; the processor too, if one is loaded.

        The folder appears whole or not at all.
        """
        from hooked_vlm.loading import save_hf

        save_hf(self, Path(folder))

    @property
    def processor(self) -> Any:
        """The checkpoint's HF processor, loaded when first asked for."""
        if self._processor is None or isinstance(self._processor, (str, Path)):
            from hooked_vlm.processing import load_processor

            source = self._processor or self.config.name_or_path
            self._processor = load_processor(source, reads_text=self.config.d_vocab > 0)
        return self._processor

    @property
    def attention(self) -> AttentionImplementation:
        """How attention is computed; assign ``"eager"`` or ``"sdpa"`` to change it in every layer."""
        return next(module.implementation for module in self.modules() if isinstance(module, Attention))

    @attention.setter
    def attention(self, implementation: AttentionImplementation) -> None:
        if implementation not in ("eager", "sdpa"):
            raise ValueError(f"attention must be 'eager' or 'sdpa', not {implementation!r}")
        for module in self.modules():
            if isinstance(module, Attention):
                module.implementation = implementation

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    # Running ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def forward(self, inputs: VLMInputs | Mapping[str, Any]) -> Float[Tensor, "b ..."]:
        """Logits: ``[b p d_vocab]`` where the model predicts tokens."""

    @abstractmethod
    def enter(
        self, tower: str, inputs: VLMInputs, states: Mapping[str, Float[Tensor, "_ _ d"]]
    ) -> Float[Tensor, "_ p d_model"]:
        """What a tower's first block reads, given what the towers before it put out (``hook_out``)."""

    @abstractmethod
    def leave(self, states: Mapping[str, Float[Tensor, "_ _ d"]], inputs: VLMInputs) -> Float[Tensor, "_ ..."]:
        """What :meth:`forward` returns, given what the towers put out."""

    def positions_read(self, tower: str, inputs: VLMInputs) -> list[int] | None:
        """The positions of a tower's output that anything reads; None where all may be."""
        return None

    def positions_fed(self, inputs: VLMInputs) -> list[int]:
        """The positions of the last tower's first stream that the tower before it writes: an image's."""
        return []

    @abstractmethod
    def prepare(self, images: Any = None, texts: str | Sequence[str] | None = None, **options: Any) -> VLMInputs:
        """Inputs from pictures and texts, through the checkpoint's own processor."""

    @abstractmethod
    def reword(self, inputs: VLMInputs, texts: Sequence[str]) -> VLMInputs:
        """The same pictures with other texts, one a row."""

    @abstractmethod
    def position_labels(self, inputs: VLMInputs, tower: str) -> list[list[str]]:
        """What each position of a tower stands for, row by row, for axes; empty strings for padding."""

    def _inputs(self, inputs: VLMInputs | Mapping[str, Any]) -> VLMInputs:
        """The inputs, where the model is, and known to fit it."""
        inputs = VLMInputs.of(inputs).checked(self.config.d_vocab)
        n_images = 0 if inputs.pixel_values is None else len(inputs.pixel_values)
        if self.pairs_rows and n_images not in (0, len(inputs)) and inputs.image_rows is None:
            sizes = {name: len(tensor) for name, tensor in inputs.tensors().items()}
            raise ValueError(f"inputs have different numbers of rows: {sizes}")
        return inputs.to(self.device)

    def _check_tower(self, tower: str) -> None:
        if tower not in self.towers:
            raise ValueError(f"no tower {tower!r}; this model has {', '.join(self.towers)}")

    @property
    def text_towers(self) -> tuple[str, ...]:
        """Towers with layers, but for the one that sees the image."""
        return tuple(name for name in self.towers[1:] if hasattr(self.get_submodule(name), "blocks"))

    @torch.no_grad()
    def check_finite(self, inputs: VLMInputs | Mapping[str, Any], **options: Any) -> None:
        """Run a forward, and say where in it numbers stop being finite, as half precision's do when they overflow.

        A score of minus infinity is none: that is what a masked score may round to in float16. Layers that nothing
        reads, as beyond LLaVA's feature layers, are left out.

        Raises:
            FloatingPointError: an activation holds infinity or NaN; names the first such hook point.
        """

        def check(activation: Tensor, hook: HookPoint) -> None:
            is_masked = hook.name.endswith("hook_attn_scores") & (activation == -torch.inf)
            bad = ~(activation.isfinite() | is_masked)
            if bool(bad.any()):
                place = tuple(int(index) for index in bad.nonzero()[0])
                where = ", ".join(f"{axis} {index}" for axis, index in zip(hook.axes, place, strict=True))
                raise FloatingPointError(
                    f"{hook.name} is the first activation that is not finite: {int(bad.sum())} of {bad.numel()} "
                    f"numbers in {str(activation.dtype).removeprefix('torch.')}, the first {activation[place].item()} "
                    f"at {where}"
                )

        # Those that exist only where someone looks have nothing that others lack, and cost as much as all the rest.
        apart = ("hook_result", "hook_q_input", "hook_k_input", "hook_v_input")
        unread = {point.name for tower in self.towers for point in getattr(self.get_submodule(tower), "unread", ())}
        names = [name for name in self.hook_names if not name.endswith(apart) and name not in unread]
        self.run_with_hooks(inputs, fwd_hooks=[(names, check)], **options)

    def patch(
        self, inputs: VLMInputs | Mapping[str, Any], edits: Sequence[Edit], **options: Any
    ) -> Float[Tensor, "b ..."]:
        """The logits of a run in which ``edits`` apply together. ``options`` go to the forward.

        Raises:
            EditError, HookError: an edit that does not fit its site, its source or these inputs.
        """
        from hooked_vlm.edits import EditError

        inputs = self._inputs(inputs)
        fired: set[str] = set()
        carried = [edit.hooks(self, inputs, fired) for edit in edits]
        logits = self.run_with_hooks(inputs, fwd_hooks=[hook for hooks in carried for hook in hooks], **options)
        for edit, hooks in zip(edits, carried, strict=True):
            if not any(name in fired for name, _ in hooks):
                raise EditError(f"{edit.site} is not passed in this run, so {type(edit).__name__} changed nothing")
        return logits

    @abstractmethod
    def _start_decoding(self, inputs: VLMInputs) -> tuple[Decoding, Int[Tensor, "b prompt"]]:
        """A running generation, and the prompt that it starts with."""

    @torch.no_grad()
    def generate(
        self,
        inputs: VLMInputs | Mapping[str, Any],
        *,
        max_new_tokens: int = 20,
        min_new_tokens: int = 0,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        return_type: Literal["str", "tokens"] = "str",
    ) -> list[str] | Int[Tensor, "b length"]:
        """Greedy or beam search with a key-value cache; hooks are active at every step, on the new positions.

        Returns:
            One text a row, or with ``return_type="tokens"`` the token ids, prompt included, as HF returns them.
        """
        if return_type not in ("str", "tokens"):
            raise ValueError(f"return_type must be 'str' or 'tokens', not {return_type!r}")
        decoding, prompt = self._start_decoding(self._inputs(inputs))
        tokens = beam_search(
            decoding,
            prompt,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            eos_token_ids=self.config.eos_token_ids,
            pad_token_id=self.config.pad_token_id,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
        return tokens if return_type == "tokens" else self.decode(self._own_words(tokens, prompt))

    def stream(self, inputs: VLMInputs | Mapping[str, Any], *, max_new_tokens: int = 20) -> Iterator[str]:
        """The text of :meth:`generate`, greedy, piece by piece as it is found.

        Raises:
            ValueError: more than one row.
        """
        inputs = self._inputs(inputs)
        if len(inputs) != 1:
            raise ValueError(f"a stream is of one row, and these inputs have {len(inputs)}")
        decoding, prompt = self._start_decoding(inputs)
        found = self._own_words(prompt, prompt)
        told = ""
        for token in greedy_tokens(
            decoding,
            prompt,
            max_new_tokens=max_new_tokens,
            eos_token_ids=self.config.eos_token_ids,
            pad_token_id=self.config.pad_token_id,
        ):
            found = torch.cat([found, token[None]], dim=1)
            text = self.decode(found)[0]
            # A character of several tokens is told when it is whole.
            if text != told and text.startswith(told) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(told) :]
                told = text
        rest = self.decode(found)[0]
        if rest != told and rest.startswith(told):
            yield rest[len(told) :]

    def _own_words(self, tokens: Int[Tensor, "b length"], prompt: Int[Tensor, "b prompt"]) -> Int[Tensor, "b _"]:
        """What of a generated sequence is told as its text: all of it, where the prompt is the text's beginning."""
        return tokens

    def token_strings(self, tokens: Int[Tensor, "..."]) -> list[str]:
        """Each token id as a string, special tokens too."""
        from hooked_vlm.processing import token_strings

        return token_strings(self.processor.tokenizer, tokens.flatten().tolist())

    def decode(self, tokens: Int[Tensor, "b p"]) -> list[str]:
        """Texts of token ids, without special tokens."""
        return [text.strip() for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]
