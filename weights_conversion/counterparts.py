"""Where HF has the same tensor: a table of hook points, HF modules, and how to read the tensor there.

"How" is spelled in words, a place and then what is done to the tensor found there: ``"output"``, ``"input, heads"``,
``"output, first third, heads"``. A hook point whose tensor no HF module gives has no module, and a reason instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weights_conversion.rules import Rules

PLACES: Mapping[str, Callable[[Any, Any], Tensor]] = {
    "input": lambda first_input, output: first_input,
    "output": lambda first_input, output: output,
    "output[0]": lambda first_input, output: output[0],
    "output[1]": lambda first_input, output: output[1],
    "output.itm_score": lambda first_input, output: output.itm_score,
    "output.logits": lambda first_input, output: output.logits,
    "output.logits_per_image": lambda first_input, output: output.logits_per_image,
    "output.image_embeds": lambda first_input, output: output.image_embeds,
    "output.text_embeds": lambda first_input, output: output.text_embeds,
    "output.pooler_output": lambda first_input, output: output.pooler_output,
}
"""From a module's first input and its output to a tensor."""

NOT_GIVEN: Mapping[str, str] = {"output[1]": "HF gives no attention pattern where its attention is fused (sdpa)"}
"""Why a place may hold nothing."""

PARAMETER = "parameter"
"""The place of a tensor that is itself a parameter; the table names it where others name a module."""

FORMS: Mapping[str, Callable[[Tensor, torch.Size], Tensor]] = {
    "patches": lambda tensor, shape: tensor.flatten(2).transpose(1, 2),
    "first third": lambda tensor, shape: tensor.chunk(3, dim=-1)[0],
    "second third": lambda tensor, shape: tensor.chunk(3, dim=-1)[1],
    "last third": lambda tensor, shape: tensor.chunk(3, dim=-1)[2],
    # Matrices that hold several, of sizes that differ: as many columns as our hook point has.
    "first columns": lambda tensor, shape: tensor[..., : shape[2:].numel()],
    "last but one columns": lambda tensor, shape: tensor[..., -2 * shape[2:].numel() : -shape[2:].numel()],
    "last columns": lambda tensor, shape: tensor[..., -shape[2:].numel() :],
    "heads": lambda tensor, shape: tensor.unflatten(-1, shape[2:]),
    "each row": lambda tensor, shape: tensor.expand(shape),
    "one position": lambda tensor, shape: tensor.unsqueeze(1),
    "each head": lambda tensor, shape: tensor.unsqueeze(2).expand(shape),
    "unit length": lambda tensor, shape: F.normalize(tensor, dim=-1),
}
"""What is done to the tensor, so that it has our hook point's shape."""


@dataclass(frozen=True)
class Counterpart:
    """HF's side of one hook point."""

    module: str
    """HF's module, or parameter; empty for the model itself."""
    how: str

    @property
    def place(self) -> str:
        return self.how.split(", ")[0]

    @property
    def not_given(self) -> str:
        """Why HF may give nothing at the place; empty where it always gives something."""
        return NOT_GIVEN.get(self.place, "")

    def read(self, first_input: Any, output: Any) -> Tensor | None:
        """The tensor at the place, in HF's own shape; None where HF gives nothing there (:attr:`not_given`)."""
        return PLACES[self.place](first_input, output)

    def form(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        """What :meth:`read` gave, as a hook point of this shape shows it."""
        for name in self.how.split(", ")[1:]:
            tensor = FORMS[name](tensor, shape)
        return tensor

    def __str__(self) -> str:
        return f"{self.module or 'the model'}: {self.how}"


class Counterparts:
    """Rows of (hook point pattern, HF module pattern or None, how to read or the reason why not).

    Patterns are those of :class:`~weights_conversion.rules.Rules`. The first row that fits a hook point's name counts.
    """

    def __init__(self, *rows: tuple[str, str | None, str]) -> None:
        for hook, module, how in rows:
            place, *forms = how.split(", ")
            if module is not None and not ({place} <= {*PLACES, PARAMETER} and set(forms) <= {*FORMS}):
                raise ValueError(f"{hook}: no such way to read: {how!r}")
        self.rows = rows
        self._names = Rules(*((hook, module or "") for hook, module, _ in rows))

    def __add__(self, other: Counterparts) -> Counterparts:
        return Counterparts(*self.rows, *other.rows)

    def of(self, hook_name: str) -> Counterpart | None:
        """HF's side of a hook point; None where it has none."""
        _, module, how = self._row(hook_name)
        return None if module is None else Counterpart(self._names.parameter(hook_name) or "", how)

    def reason(self, hook_name: str) -> str:
        """Why HF has no counterpart of this hook point; empty where it has one."""
        _, module, how = self._row(hook_name)
        return how if module is None else ""

    def _row(self, hook_name: str) -> tuple[str, str | None, str]:
        rank = self._names.rank(hook_name)
        if rank == len(self.rows):
            return hook_name, None, "not in the table of counterparts"
        return self.rows[rank]


ABSENT = Counterparts(
    ("*.hook_scale", None, "HF's LayerNorm is one kernel, which returns no scale"),
    ("*.hook_attn_scores", None, "a value inside the forward of HF's attention; the pattern made of it is compared"),
    ("*.hook_result", None, "HF never takes attention's output apart by head; z and the output are compared"),
)
"""What no model of HF's gives."""


def pre_norm_block(
    block: str, layer: str, *, norms: tuple[str, str], attention: str, qkv: tuple[str, str, str], out: str
) -> Counterparts:
    """A pre-LN block's rows, all but its MLP's inside.

    Args:
        block: our block's prefix.
        layer: HF's layer.
        norms: its normalisations, before attention and before the MLP.
        attention, out: its attention, and in it the output projection.
        qkv: for q, k and v, module and how, as ``"q_proj: output, heads"``.
    """
    before, between = (f"{layer}.{norm}" for norm in norms)
    projections = [projected.split(": ") for projected in qkv]
    return Counterparts(
        (f"{block}hook_resid_pre", layer, "input"),
        (f"{block}hook_attn_in", before, "input"),
        *((f"{block}hook_{name}_input", before, "input, each head") for name in "qkv"),
        (f"{block}ln1.hook_normalized", before, "output"),
        *(
            (f"{block}attn.hook_{name}", f"{layer}.{attention}.{module}", how)
            for name, (module, how) in zip("qkv", projections, strict=True)
        ),
        (f"{block}attn.hook_pattern", f"{layer}.{attention}", "output[1]"),
        (f"{block}attn.hook_z", f"{layer}.{attention}.{out}", "input, heads"),
        (f"{block}hook_attn_out", f"{layer}.{attention}", "output[0]"),
        (f"{block}hook_resid_mid", between, "input"),
        (f"{block}hook_mlp_in", between, "input"),
        (f"{block}ln2.hook_normalized", between, "output"),
        (f"{block}hook_mlp_out", f"{layer}.mlp", "output"),
        (f"{block}hook_resid_post", layer, "output"),
    )


def plain_mlp(block: str, layer: str) -> Counterparts:
    """The rows inside a two-layer MLP."""
    return Counterparts(
        (f"{block}mlp.hook_pre", f"{layer}.mlp.fc1", "output"),
        (f"{block}mlp.hook_post", f"{layer}.mlp.fc2", "input"),
    )


SEPARATE_QKV = ("q_proj: output, heads", "k_proj: output, heads", "v_proj: output, heads")
"""Three projections, as in most of HF's models."""
