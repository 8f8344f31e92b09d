"""What goes into a model: tensors under HF's names, and where in them the words and patches are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from hooked_vlm.patches import PatchGrid, Region

IMAGE_TENSORS = ("pixel_values", "image_sizes")
"""The entries of :class:`VLMInputs` that have one row an image."""

TEXT_TENSORS = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "token_type_ids")
"""The entries that have one row a sample."""

TENSORS = (*IMAGE_TENSORS, *TEXT_TENSORS)
"""The entries of :class:`VLMInputs` that are tensors."""


class SpanError(ValueError):
    """A span that a text does not have, or has more than once."""


@dataclass(frozen=True)
class Span:
    """Positions in one tower's sequence, for each row of the batch."""

    tower: str
    rows: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[int, ...]:
        return self.rows[row]


@dataclass(frozen=True)
class TextPiece:
    """A row's text, and which characters each position of ``input_ids`` stands for (None for special tokens)."""

    text: str
    offsets: tuple[tuple[int, int] | None, ...]
    question: tuple[int, int] | None = None
    """Which of its characters are the question, where the text is a whole prompt."""

    def positions_of(self, start: int, end: int) -> tuple[int, ...]:
        """Positions of the tokens that some characters lie in."""
        return tuple(
            position
            for position, offset in enumerate(self.offsets)
            if offset is not None and offset[0] < end and offset[1] > start
        )


@dataclass(frozen=True, eq=False)
class VLMInputs:
    """One batch for a model: HF's tensors, with token strings and named spans where :meth:`HookedVLM.prepare` made it.

    ``VLMInputs(**hf_batch)`` takes what any HF processor returns.

    Raises:
        ValueError: pixel values that are not finite; row counts that differ; a mask of another shape than its ids;
            ``image_rows`` that do not fit the images.
        TypeError: something else than tensors; whole-number pixels or fractional ids.
    """

    pixel_values: Float[Tensor, "n_images ..."] | None = None
    """``[n_images 3 height width]``; LLaVA-NeXT: ``[n_images tile 3 height width]``, zeros after an image's last."""
    image_sizes: Int[Tensor, "n_images 2"] | None = None
    """LLaVA-NeXT: height and width of each picture before it was tiled."""
    input_ids: Int[Tensor, "b p"] | None = None
    attention_mask: Int[Tensor, "b p"] | None = None
    decoder_input_ids: Int[Tensor, "b p_answer"] | None = None
    decoder_attention_mask: Int[Tensor, "b p_answer"] | None = None
    token_type_ids: Int[Tensor, "b p"] | None = None
    """Accepted, because some processors return it; BLIP's and LLaVA's towers have no token types."""
    interpolate_pos_encoding: bool = False
    """Resize the position embeddings to an image of another size than the checkpoint's."""
    tokens: tuple[tuple[str, ...], ...] | None = None
    """Token strings of ``input_ids``, for axes."""
    spans: Mapping[str, Span] = field(default_factory=dict)
    texts: tuple[TextPiece, ...] | None = None
    text_tower: str = ""
    """The tower that reads ``input_ids``."""
    image_rows: tuple[int, ...] | None = None
    """The row that each image belongs to, in ascending order; None where the i-th image is the i-th row's."""
    patch_grid: tuple[PatchGrid, ...] = ()
    """For each image, where its patches are: in the picture's pixels, and in the sequence that holds them."""

    def __post_init__(self) -> None:
        self._check_types()
        for names in (IMAGE_TENSORS, TEXT_TENSORS):
            sizes = {name: len(tensor) for name, tensor in self.tensors().items() if name in names}
            if len(set(sizes.values())) > 1:
                raise ValueError(f"inputs have different numbers of rows: {sizes}")
        if self.image_rows is not None:
            n_images = 0 if self.pixel_values is None else len(self.pixel_values)
            is_sorted = list(self.image_rows) == sorted(self.image_rows)
            if (
                len(self.image_rows) != n_images
                or not is_sorted
                or any(row not in range(len(self)) for row in self.image_rows)
            ):
                raise ValueError(
                    f"image_rows are {self.image_rows}: give a row for each of the {n_images} images, in ascending "
                    "order"
                )
        if self.pixel_values is not None and not bool(torch.isfinite(self.pixel_values).all()):
            bad = int((~torch.isfinite(self.pixel_values)).sum())
            raise ValueError(f"pixel_values hold {bad} values that are NaN or infinite")

    def _check_types(self) -> None:
        for name in TENSORS:
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{name} is a {type(value).__name__}, not a tensor; HF processors take return_tensors='pt'"
                )
            if name != "pixel_values" and value.ndim != 2:
                axes = "n_images 2" if name == "image_sizes" else "b p"
                raise ValueError(f"{name} has shape {tuple(value.shape)}; it should be [{axes}]")
            if name != "pixel_values" and value.shape[1] == 0:
                raise ValueError(f"{name} hold no tokens")
            if value.is_floating_point() != (name == "pixel_values"):
                wanted = "floats, normalised as the processor does" if name == "pixel_values" else "whole numbers"
                raise TypeError(f"{name} is {value.dtype}; it should hold {wanted}")
        for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
            shapes = [tuple(getattr(self, name).shape) for name in (ids, mask) if getattr(self, name) is not None]
            if len(set(shapes)) > 1:
                raise ValueError(f"{mask} has shape {shapes[1]}, and {ids} has {shapes[0]}")

    @classmethod
    def of(cls, inputs: VLMInputs | Mapping[str, Any]) -> VLMInputs:
        """``inputs`` as they are, or made from an HF batch."""
        if isinstance(inputs, VLMInputs):
            return inputs
        if not isinstance(inputs, Mapping):
            raise TypeError(f"inputs are a {type(inputs).__name__}; give what model.prepare or an HF processor returns")
        known = {entry.name for entry in fields(cls)}
        unknown = [name for name in inputs if name not in known]
        if unknown:
            raise ValueError(f"inputs have unknown entries {unknown}; known: {sorted(known)}")
        return cls(**inputs)

    def checked(self, d_vocab: int, *, is_tiled: bool = False) -> VLMInputs:
        """These inputs, for a model that sees three channels and has a vocabulary of ``d_vocab`` tokens.

        Raises:
            ValueError: pixel values of another shape; token ids that the model does not have.
        """
        pixels, axes = self.pixel_values, "[b tile 3 height width]" if is_tiled else "[b 3 height width]"
        if pixels is not None and (pixels.ndim != 4 + is_tiled or pixels.shape[-3] != 3):
            raise ValueError(f"pixel_values have shape {tuple(pixels.shape)}; give {axes}")
        for name in ("input_ids", "decoder_input_ids"):
            ids = getattr(self, name)
            if ids is None or len(ids) == 0:
                continue
            lowest, highest = (int(bound) for bound in ids.aminmax())
            if lowest < 0 or highest >= d_vocab:
                wrong = lowest if lowest < 0 else highest
                raise ValueError(f"{name} hold {wrong}, and the model's tokens are 0 to {d_vocab - 1}")
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by HF's name."""
        return {name: getattr(self, name) for name in TENSORS if getattr(self, name) is not None}

    def __repr__(self) -> str:
        shapes = [f"{name} {list(tensor.shape)}" for name, tensor in self.tensors().items()]
        texts = [repr(piece.text) for piece in self.texts or ()]
        return f"VLMInputs({'; '.join([*shapes, *texts, *([f'spans {list(self.spans)}'] if self.spans else [])])})"

    def __len__(self) -> int:
        """Rows in the batch."""
        tensors = self.tensors()
        return next((len(tensors[name]) for name in (*TEXT_TENSORS, *IMAGE_TENSORS) if name in tensors), 0)

    def __iter__(self) -> Iterator[VLMInputs]:
        return (self.rows([row]) for row in range(len(self)))

    def to(self, device: torch.device | str) -> VLMInputs:
        """The same on a device; itself where it is there already."""
        tensors = self.tensors()
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in tensors.items()}
        return self if all(moved[name] is tensors[name] for name in moved) else replace(self, **moved)

    def rows(self, rows: Sequence[int]) -> VLMInputs:
        """A batch of some rows, in the order given; a row may be given several times."""
        images = self._images_of(rows)
        own_rows = torch.as_tensor(list(rows), dtype=torch.long)
        own_images = torch.as_tensor([image for image, _ in images], dtype=torch.long)
        picked: dict[str, Any] = {
            name: tensor[(own_images if name in IMAGE_TENSORS else own_rows).to(tensor.device)]
            for name, tensor in self.tensors().items()
        }
        if self.image_rows is not None:
            picked["image_rows"] = tuple(row for _, row in images)
        if self.patch_grid:
            picked["patch_grid"] = tuple(
                replace(self.patch_grid[image], image=place, row=row) for place, (image, row) in enumerate(images)
            )
        if self.tokens is not None:
            picked["tokens"] = tuple(self.tokens[row] for row in rows)
        if self.texts is not None:
            picked["texts"] = tuple(self.texts[row] for row in rows)
        picked["spans"] = {
            name: Span(span.tower, tuple(span.rows[row] for row in rows)) for name, span in self.spans.items()
        }
        return replace(self, **picked)

    def _images_of(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """The images of some rows, each with the place of its row among them."""
        if self.pixel_values is None:
            return []
        owners = range(len(self.pixel_values)) if self.image_rows is None else self.image_rows
        if self.image_rows is None and len(self.pixel_values) != len(self):
            raise ValueError(
                f"{len(self.pixel_values)} images and {len(self)} rows: say which row each image belongs to "
                "(image_rows), or make the inputs with model.prepare"
            )
        return [(image, place) for place, row in enumerate(rows) for image, owner in enumerate(owners) if owner == row]

    def repeat(self, times: int) -> VLMInputs:
        """Each row ``times`` times, copies beside each other."""
        return self.rows([row for row in range(len(self)) for _ in range(times)])

    def with_pixels(self, pixel_values: Float[Tensor, "n_images ..."]) -> VLMInputs:
        """The same texts before other pictures."""
        return replace(self, pixel_values=pixel_values)

    def span(self, text: str, *, occurrence: int | None = None) -> Span:
        """Positions of the tokens of ``text`` in each row, found as whole words, whatever their case.

        Args:
            occurrence: which one, from 0, where the text occurs several times.

        Raises:
            SpanError: ``text`` does not occur in a row, occurs several times without ``occurrence``, or the inputs
                were made without :meth:`HookedVLM.prepare` and do not know their texts.
        """
        if self.texts is None:
            raise SpanError("these inputs do not know their texts; make them with model.prepare(images, texts)")
        return Span(self.text_tower, tuple(_find(piece, text, occurrence) for piece in self.texts))

    def positions(self, span: str, occurrence: int | None = None) -> Span:
        """A span by its name, or else by its text; or several, added and taken away: ``"image - image.object"``.

        Raises:
            SpanError: there is no such span; spans of several towers; nothing is left in a row.
        """
        if span in self.spans:
            return self.spans[span]
        try:
            return self.span(span, occurrence=occurrence)
        except SpanError as error:
            parts = re.split(r"\s([+-])\s", span)
            if len(parts) > 1:
                return self._combined(parts, occurrence)
            raise SpanError(f"{error}; named spans: {', '.join(self.spans) or 'none'}") from None

    def _combined(self, parts: Sequence[str], occurrence: int | None) -> Span:
        first = self.positions(parts[0], occurrence)
        rows = [set(row) for row in first.rows]
        for sign, name in zip(parts[1::2], parts[2::2], strict=True):
            other = self.positions(name, occurrence)
            if other.tower != first.tower:
                raise SpanError(f"{parts[0]!r} is in {first.tower}, {name!r} in {other.tower}: they cannot be combined")
            for row, positions in zip(rows, other.rows, strict=True):
                row.update(positions) if sign == "+" else row.difference_update(positions)
        if not all(rows):
            raise SpanError(f"nothing is left of {' '.join(parts)!r} in row {[bool(row) for row in rows].index(False)}")
        return Span(first.tower, tuple(tuple(sorted(row)) for row in rows))

    def positions_in(
        self,
        region: Region | Sequence[Region],
        *,
        image: int = 0,
        tower: str | None = None,
        min_overlap: float = 0.0,
    ) -> Span:
        """Positions of the patches that a part of a picture covers.

        Exact under the processor's resizing, cropping, padding and tiling: a patch is the part of the original picture
        that its pixels were made from.

        Args:
            region: a box (left, top, right, bottom) in the original picture's pixels, or a boolean mask
                ``[height width]`` of it; or a list of them, one a row.
            image: which of its row's pictures is meant.
            tower: whose positions; by default of the tower that the ``image`` span is in. In ``vision_encoder`` a row
                of the answer is an image (or tile), as it is there.
            min_overlap: the share of a patch that must be covered, or more than nothing by default.

        Raises:
            SpanError: inputs that :meth:`HookedVLM.prepare` did not make; a row without such a picture.
            ValueError: a box or mask that does not fit the picture.
        """
        from hooked_vlm.patches import is_region

        if not self.patch_grid:
            raise SpanError("these inputs do not know their patches; make them with model.prepare")
        own = self.patch_grid[0].tower
        known = list(dict.fromkeys([own, "vision_encoder", *(["projector"] if own == "language_model" else [])]))
        if tower is not None and tower not in known:
            raise SpanError(f"no picture's patches are in {tower!r}; they are in {', '.join(known)}")
        # CLIP's pictures are rows of their own, and need not be as many as its texts.
        n_rows, rows = (len(self), "rows") if own == self.text_tower else (len(self.patch_grid), "pictures")
        regions: list[Any] = [region] * n_rows if is_region(region) else list(region)
        if len(regions) != n_rows:
            raise SpanError(f"{len(regions)} regions for {n_rows} {rows}")
        found: list[tuple[int, ...]] = []
        for row, one in enumerate(regions):
            grids = [grid for grid in self.patch_grid if grid.row == row]
            if image not in range(len(grids)):
                raise SpanError(f"row {row} has {len(grids)} pictures, so there is no picture {image}")
            if tower in (None, own):
                found.append(grids[image].positions_in(one, min_overlap=min_overlap))
                continue
            first = 0 if tower == "projector" and not grids[image].has_class_token else 1
            found += [
                grid.of_tile(tile, first).positions_in(one, min_overlap=min_overlap) if grid is grids[image] else ()
                for grid in grids
                for tile in range(len(grid.views))
            ]
        return Span(tower or own, tuple(found))


def _find(piece: TextPiece, wanted: str, occurrence: int | None) -> tuple[int, ...]:
    matches = occurrences(piece.text, wanted)
    if not matches:
        raise SpanError(f"{wanted!r} does not occur in {piece.text!r}")
    if occurrence is None and len(matches) > 1:
        raise SpanError(
            f"{wanted!r} occurs {len(matches)} times in {piece.text!r}; say which with occurrence=0, 1, ..."
        )
    if not 0 <= (occurrence or 0) < len(matches):
        raise SpanError(
            f"{wanted!r} occurs {len(matches)} times in {piece.text!r}; there is no occurrence {occurrence}"
        )
    start, end = matches[occurrence or 0]
    positions = piece.positions_of(start, end)
    if not positions:
        raise SpanError(f"{wanted!r} has no tokens of its own in {piece.text!r}")
    return positions


def occurrences(text: str, wanted: str) -> list[tuple[int, int]]:
    """Where ``wanted`` stands in a text as whole words, whatever their case: (first, one past the last) character."""
    if not wanted.strip():
        return []
    return [match.span() for match in re.finditer(_pattern(wanted), text, flags=re.IGNORECASE)]


def _pattern(wanted: str) -> str:
    """Whole words, with any space between them. A word ends where no letter follows, punctuation where it does."""
    words = wanted.split()
    before = r"(?<!\w)" if re.match(r"\w", words[0]) else ""
    after = r"(?!\w)" if re.search(r"\w$", words[-1]) else ""
    return before + r"\s+".join(map(re.escape, words)) + after
