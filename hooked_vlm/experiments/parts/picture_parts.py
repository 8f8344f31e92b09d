"""What a picture's tokens are: patches that see a part of it, padding, newlines, class tokens; and which lie together.

Spans of these names let edits and edges say which tokens they mean, whatever the processor did to the picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool

from hooked_vlm.inputs import Span, SpanError, VLMInputs
from hooked_vlm.patches import NEWLINE, PatchGrid


def with_picture_spans(inputs: VLMInputs) -> VLMInputs:
    """Inputs with more spans, by which tokens can be told apart.

    ``image`` becomes all that a picture is read from, in BLIP with the class token. Of it ``image.seen`` are the
    patches that see a part of the picture, ``image.padding`` those that see none, ``image.class`` class tokens.
    ``rest`` are the text's tokens that belong to neither ``question``, ``image`` nor ``last``: instructions and
    template. What a model or prompt does not have is left out.

    Raises:
        SpanError: a region that has one of these names.
    """
    found = {**_of_pictures(inputs), "rest": _rest(inputs)}
    taken = [name for name in found if name != "image" and inputs.spans.get(name, found[name]) != found[name]]
    if taken:
        raise SpanError(f"{taken[0]!r} has a meaning of its own among the spans; call the span or region otherwise")
    known = {name: span for name, span in found.items() if any(span.rows)}
    return replace(inputs, spans={**inputs.spans, **known})


def picked(inputs: VLMInputs, words: str, *, padding: bool = False) -> Span:
    """Positions of a span by name, text or expression, where what is left of a picture are patches that see it.

    In ``"image - image.object"`` neither padding, newlines nor class tokens are the picture's other part;
    ``padding=True`` counts the padding in. Elsewhere ``image`` is all that there is of it.

    Raises:
        SpanError: there is no such span, or nothing is left.
    """
    terms = re.split(r"\s([+-])\s", words)
    signs = ["+", *terms[1::2]]
    seen = "image.seen + image.padding" if padding and "image.padding" in inputs.spans else "image.seen"
    if "-" in signs and "image.seen" in inputs.spans:
        names = [
            seen if (sign, name) == ("+", "image") else name for sign, name in zip(signs, terms[0::2], strict=True)
        ]
        words = names[0] + "".join(f" {sign} {name}" for sign, name in zip(signs[1:], names[1:], strict=True))
    return inputs.positions(words)


def dilated(inputs: VLMInputs, span: Span, by: int) -> Span:
    """A part of a picture and the patches around it, up to ``by`` patches far, corners too.

    Patches are neighbours where what they see of the picture touches; in LLaVA-NeXT those of the whole picture and
    those of its tiles each among themselves, across the tiles' edges.

    Raises:
        SpanError: positions that hold no patches.
    """
    if by < 0:
        raise ValueError(f"a part of a picture grows by 0 patches or more, not {by}")
    rows = [set(row) for row in span.rows]
    for grid in _grids(inputs, span):
        own = np.isin(grid.positions, span[grid.row])
        for _ in range(by):
            own = own | _beside(grid, own)
        rows[grid.row].update(position for position, is_own in zip(grid.positions, own, strict=True) if is_own)
    return Span(span.tower, tuple(tuple(sorted(row)) for row in rows))


def _grids(inputs: VLMInputs, span: Span) -> Iterator[PatchGrid]:
    known = {grid.tower for grid in inputs.patch_grid}
    if span.tower not in known:
        where = f"they are in {', '.join(known)}" if known else "make the inputs with model.prepare"
        raise SpanError(f"no patches are known in {span.tower}: {where}")
    return iter(inputs.patch_grid)


def _beside(grid: PatchGrid, own: Bool[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """The places whose part of the picture touches that of some others."""
    boxes, is_whole = grid.boxes, np.array([place.tile == 0 for place in grid.places])
    reach = 1e-6 * max(grid.size)
    found = np.zeros(len(boxes), dtype=bool)
    for whole in (True, False):
        chosen = boxes[own & (is_whole == whole)]
        # NaN, what sees nothing, touches nothing.
        touches = (chosen[:, None, :2] <= boxes[None, :, 2:] + reach) & (
            chosen[:, None, 2:] >= boxes[None, :, :2] - reach
        )
        found |= touches.all(-1).any(0) & (is_whole == whole)
    return found


def _of_pictures(inputs: VLMInputs) -> dict[str, Span]:
    if not inputs.patch_grid:
        return {}
    tower = inputs.patch_grid[0].tower
    own = inputs.spans.get("image")
    n_rows = len(own) if own is not None else 1 + max(grid.row for grid in inputs.patch_grid)
    rows: dict[str, list[list[int]]] = {
        name: [[] for _ in range(n_rows)] for name in ("image", "image.seen", "image.padding", "image.class")
    }
    for grid in inputs.patch_grid:
        # In its own tower a class token stands before the patches.
        before = tuple(range(min(grid.positions))) if tower == "vision_encoder" else ()
        rows["image"][grid.row] += [*before, *grid.positions]
        rows["image.class"][grid.row] += before
        for position, place, sees in zip(grid.positions, grid.places, grid.sees, strict=True):
            if sees:
                rows["image.seen"][grid.row].append(position)
            elif place.tile != NEWLINE:
                rows["image.class" if place.column < 0 else "image.padding"][grid.row].append(position)
    return {name: _span(tower, own_rows) for name, own_rows in rows.items()}


def _rest(inputs: VLMInputs) -> Span:
    tower, ids, mask = inputs.text_tower, inputs.input_ids, inputs.attention_mask
    n_rows, n_positions = (0, 0) if ids is None else tuple(ids.shape)
    rows = []
    for row in range(n_rows):
        spans = [inputs.spans[name] for name in ("question", "image", "last") if name in inputs.spans]
        taken = {position for span in spans if span.tower == tower for position in span[row]}
        is_there = [True] * n_positions if mask is None else mask[row].bool().tolist()
        rows.append([place for place in range(n_positions) if is_there[place] and place not in taken])
    return _span(tower, rows)


def _span(tower: str, rows: Sequence[Sequence[int]]) -> Span:
    return Span(tower, tuple(tuple(row) for row in rows))
