"""What a run left behind: activations by hook name, and the sums that the residual stream is made of.

Axes: b batch, p position, h head. ``c`` components stacked along a new first axis.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vlm.files import whole_file

Key = str | tuple[str, int] | tuple[str, int, str]


class ActivationCache(Mapping[str, Tensor]):
    """Activations by hook name, in the order in which they were made.

    ``cache["question_encoder.blocks.3.hook_resid_post"]``, or shorter ``cache["resid_post", 3, "question_encoder"]``
    (``"q"``, ``"pattern"``, ``"z"``, ... mean self-attention's, ``"cross_q"``, ``"cross_pattern"``, ...
    cross-attention's). The tower may be left out where one tower alone has that activation.
    """

    def __init__(
        self, activations: Mapping[str, Tensor], model: nn.Module | None = None, has_batch_dim: bool = True
    ) -> None:
        self.activations = dict(activations)
        self.model = model
        self.has_batch_dim = has_batch_dim

    # A mapping ---------------------------------------------------------------------------------------------------

    def __getitem__(self, key: Key) -> Tensor:
        name = key if isinstance(key, str) else self._name(*key)
        if name not in self.activations:
            nearest = difflib.get_close_matches(name, self.activations, n=4, cutoff=0.4)
            hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
            raise KeyError(f"{name} is not in the cache of {len(self)} activations{hint}")
        return self.activations[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.activations)

    def __len__(self) -> int:
        return len(self.activations)

    def __contains__(self, key: object) -> bool:
        try:
            return (key if isinstance(key, str) else self._name(*key)) in self.activations  # type: ignore[misc]
        except (KeyError, TypeError):
            return False

    def __repr__(self) -> str:
        return f"ActivationCache({len(self)} activations, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def nbytes(self) -> int:
        """Bytes held; activations that share memory are counted once."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in self.values()}
        return sum(storage.nbytes() for storage in storages.values())

    @property
    def towers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.split(".")[0] for name in self if ".blocks." in name))

    def _name(self, short: str, layer: int, tower: str | None = None) -> str:
        endings = _endings(short)
        towers = self.towers if tower is None else (tower,)
        found = [
            name for t in towers for ending in endings if (name := f"{t}.blocks.{layer}.{ending}") in self.activations
        ]
        if len(found) > 1:
            holders = ", ".join(name.split(".")[0] for name in found)
            raise KeyError(f"{short!r} at layer {layer} is in several towers; name one of: {holders}")
        return found[0] if found else f"{towers[0] if towers else tower}.blocks.{layer}.{endings[0]}"

    # Moving and keeping ------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ActivationCache:
        """A cache on another device, or of another floating dtype."""
        moved = {
            name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
            for name, tensor in self.items()
        }
        return ActivationCache(moved, self.model, self.has_batch_dim)

    def remove_batch_dim(self) -> ActivationCache:
        """A cache without the batch axis, which must be 1."""
        if not self.has_batch_dim:
            return self
        rows = {len(tensor) for tensor in self.values()}
        if rows != {1}:
            raise ValueError(f"remove_batch_dim needs a batch of 1, not of {sorted(rows)}")
        return ActivationCache({name: tensor[0] for name, tensor in self.items()}, self.model, has_batch_dim=False)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in self.items()}
        metadata = {"order": json.dumps(list(self)), "has_batch_dim": json.dumps(self.has_batch_dim)}
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(
        cls, path: str | Path, model: nn.Module | None = None, device: torch.device | str = "cpu"
    ) -> ActivationCache:
        """Read what :meth:`save` wrote. ``model`` is needed to decompose the residual stream again."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                order = json.loads(metadata.get("order", "null")) or list(file.keys())
                tensors = {name: file.get_tensor(name) for name in order}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a cache: {error}") from error
        return cls(tensors, model, json.loads(metadata.get("has_batch_dim", "true")))

    # The residual stream -----------------------------------------------------------------------------------------

    def stack(self, name: str, tower: str | None = None) -> Float[Tensor, "layer ..."]:
        """One activation of every layer, e.g. ``cache.stack("resid_post", "vision_encoder")``."""
        tower = self._tower(tower)
        endings = _endings(name)
        found = [f"{tower}.blocks.{layer}.{ending}" for layer in range(self._n_layers(tower)) for ending in endings]
        tensors = [self.activations[full] for full in found if full in self.activations]
        if len(tensors) != self._n_layers(tower):
            raise KeyError(f"{name!r} is cached for {len(tensors)} of {self._n_layers(tower)} layers of {tower}")
        return torch.stack(_together(tensors))

    def accumulated_resid(
        self,
        layer: int | None = None,
        tower: str | None = None,
        *,
        incl_mid: bool = False,
        apply_ln: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """The residual stream as each layer finds it, up to what ``layer`` reads (by default to the end).

        Args:
            incl_mid: the stream between the sub-layers too.
            apply_ln: pass each through the tower's last LayerNorm, as a logit lens does.
            return_labels: return ``(stack, labels)``; labels are ``"0_pre"``, ``"0_mid"``, ..., ``"final_post"``.

        Returns:
            ``[c ...]``, stacked along a new first axis.

        Raises:
            ValueError: no such layer; ``apply_ln`` in a post-LN tower, whose stream is normalised already.
        """
        tower = self._tower(tower)
        n_layers, last = self._n_layers(tower), self._end(layer, tower)
        mids = ["mid", "mid_cross"] if incl_mid else []
        names: list[tuple[str, str]] = []
        for index in range(last + 1):
            if index == n_layers:
                names.append(("final_post", f"blocks.{index - 1}.{self._stream(tower, 'post')}"))
                break
            names.append((f"{index}_pre", f"blocks.{index}.hook_resid_pre"))
            if index < last:
                names += [(f"{index}_{mid}", f"blocks.{index}.{self._stream(tower, mid)}") for mid in mids]
        kept = [
            (label, f"{tower}.{name}") for label, name in names if "cross" not in label or f"{tower}.{name}" in self
        ]
        stack = torch.stack(_together([self[name] for _, name in kept]))
        if apply_ln:
            if self._module(tower).config.norm_order == "post":
                raise ValueError(f"{tower} normalises its stream in every layer; there is no last LayerNorm to apply")
            norm = next(n for n in ("ln_final", "ln_post") if hasattr(self._module(tower), n))
            stack = getattr(self._module(tower), norm).normalize(stack)
        return (stack, [label for label, _ in kept]) if return_labels else stack

    def decompose_resid(
        self,
        layer: int | None = None,
        tower: str | None = None,
        *,
        mode: Literal["all", "attn", "mlp"] = "all",
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """What was added to the residual stream before ``layer`` (by default, in all layers), one by one.

        The parts sum to the stream that ``layer`` reads, in towers whose blocks normalise before a sub-layer.

        Raises:
            ValueError: a post-LN tower, whose stream is no sum: each LayerNorm rescales all that came before.
        """
        tower = self._tower(tower)
        if self._module(tower).config.norm_order == "post":
            raise ValueError(
                f"{tower} normalises its stream after every sub-layer, so the stream is not a sum of what was added; "
                "stack hook_attn_out, hook_cross_attn_out and hook_mlp_out instead: cache.stack('mlp_out', tower)"
            )
        last = self._end(layer, tower)
        kinds = {"all": ("attn_out", "cross_attn_out", "mlp_out"), "attn": ("attn_out", "cross_attn_out")}.get(
            mode, ("mlp_out",)
        )
        names = [("embed", f"{tower}.hook_full_embed")] if incl_embeds else []
        for index in range(last):
            for kind in kinds:
                name = f"{tower}.blocks.{index}.hook_{kind}"
                if kind != "cross_attn_out" or name in self:
                    names.append((f"{index}_{kind}", name))
        stack = torch.stack(_together([self[name] for _, name in names]))
        return (stack, [label for label, _ in names]) if return_labels else stack

    def stack_head_results(
        self,
        layer: int | None = None,
        tower: str | None = None,
        *,
        cross: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """What each head of the layers before ``layer`` adds: ``[c ... d_model]``, c = layer x head.

        Made from ``hook_z`` and ``W_O``. Heads of a layer and its ``b_O`` sum to ``hook_attn_out``.
        """
        tower = self._tower(tower)
        module = "cross_attn" if cross else "attn"
        last = self._end(layer, tower)
        results, labels = [], []
        for index in range(last):
            attention = self._module(tower).blocks[index].get_submodule(module)
            z = self[f"{tower}.blocks.{index}.{module}.hook_z"]
            weight = attention.W_O.to(device=z.device, dtype=z.dtype)
            results.append(einsum(z, weight, "... h d_head, h d_head m -> h ... m"))
            labels += [f"L{index}H{head}" for head in range(attention.n_heads)]
        stack = torch.cat(_together(results))
        return (stack, labels) if return_labels else stack

    def _tower(self, tower: str | None) -> str:
        if tower is not None:
            if tower not in self.towers:
                raise KeyError(f"no layer of {tower!r} is in the cache; its towers: {', '.join(self.towers) or 'none'}")
            return tower
        if len(self.towers) != 1:
            raise KeyError(f"name a tower: the cache holds {', '.join(self.towers) or 'none'}")
        return self.towers[0]

    def _module(self, tower: str) -> Any:
        if self.model is None:
            raise ValueError("this cache was loaded without its model; pass model= to ActivationCache.load")
        return self.model.get_submodule(tower)

    def _n_layers(self, tower: str) -> int:
        if self.model is not None:
            return self._module(tower).config.n_layers
        return 1 + max(int(name.split(".")[2]) for name in self if name.startswith(f"{tower}.blocks."))

    def _end(self, layer: int | None, tower: str) -> int:
        n_layers = self._n_layers(tower)
        if layer is None or layer == -1:
            return n_layers
        if not 0 <= layer <= n_layers:
            raise ValueError(f"{tower} has {n_layers} layers; there is no layer {layer}")
        return layer

    def _stream(self, tower: str, point: str) -> str:
        # In a post-LN block, what the next sub-layer reads is the LayerNorm's output.
        post_norm = self._module(tower).config.norm_order == "post"
        return f"hook_normalized_resid_{point}" if post_norm else f"hook_resid_{point}"


ATTENTION = ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result")
"""The hook points inside an attention."""


def _endings(short: str) -> Sequence[str]:
    """The names inside a block that a short name may mean."""
    if "hook_" in short:
        return (short,)
    if short.removeprefix("cross_") in ATTENTION:
        return (f"{'cross_' if short.startswith('cross_') else ''}attn.hook_{short.removeprefix('cross_')}",)
    if short in ("pre", "pre_linear", "post"):
        return (f"mlp.hook_{short}",)
    if short.startswith(("ln", "scale", "normalized")) and "resid" not in short:
        owner, _, point = short.rpartition(".")
        return (f"{owner or 'ln1'}.hook_{point}",)
    return (f"hook_{short}",)


def _together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Layers of a model that is spread over devices leave their activations on several."""
    return [tensor.to(tensors[0].device) for tensor in tensors]
