"""What a comparison found: a row for each hook point, and a verdict. Prints itself, and writes itself as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from hooked_vlm.version import __version__

if TYPE_CHECKING:
    from rich.console import RenderableType

LOGITS, OUTPUT = "logits", "output"
"""The row of what the forward returns, with no hook attached; the second, where that is no logits."""

Padding = Literal["", "left", "right"]


@dataclass(frozen=True)
class Row:
    """One hook point in one run."""

    run: str
    """``"ITM"`` or ``"ITC"`` for retrieval models, which can be called in two ways; else empty."""
    name: str
    hf: str
    """HF's module, and how the tensor is read there."""
    shape: tuple[int, ...]
    difference: float
    """The largest absolute one; infinite where the two cannot be compared."""
    relative: float
    """``difference`` as a share of the largest magnitude in HF's tensor."""
    equal: bool
    """Every bit."""
    passed: bool
    note: str = ""
    """Why the two cannot be compared."""

    @classmethod
    def incomparable(cls, run: str, name: str, hf: str, shape: tuple[int, ...], note: str) -> Row:
        return cls(run, name, hf, shape, math.inf, math.inf, equal=False, passed=False, note=note)

    @property
    def verdict(self) -> str:
        if self.passed:
            return "equal" if self.equal else "pass"
        return f"FAIL: {self.note}" if self.note else "FAIL"


@dataclass(frozen=True)
class Report:
    """All rows in forward order, and how they were made."""

    model: str
    architecture: str
    """HF's class."""
    inputs: str
    rows: tuple[Row, ...]
    without_counterpart: tuple[tuple[str, str], ...]
    """Hook points that HF has no tensor of, and why."""
    tolerance: float
    dtype: str
    device: str
    attention: str
    hf_attention: str
    padded: Padding
    """At which end the rows of the inputs are padded; empty where none is."""
    cross_attention_padding: str
    """BLIP's; empty for models that read padding nowhere."""
    versions: dict[str, str]

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def n_equal(self) -> int:
        return sum(row.equal for row in self.rows)

    @property
    def first_failure(self) -> Row | None:
        """Where the two part: the first row, in forward order, that did not pass."""
        return next((row for row in self.rows if not row.passed), None)

    def to_json(self) -> str:
        """The report as JSON; numbers that are not finite become null."""
        written = {
            **asdict(self),
            "passed": self.passed,
            "n_equal": self.n_equal,
            "n_compared": len(self.rows),
            "rows": [{name: _finite(value) for name, value in asdict(row).items()} for row in self.rows],
            "without_counterpart": dict(self.without_counterpart),
        }
        return json.dumps(written, indent=2, allow_nan=False)

    def print(self) -> None:
        """Print the table and the verdict."""
        from hooked_vlm.commands.common import console

        console().print(self)

    def lines(self) -> list[str]:
        """What the table does not say; the verdict comes last."""
        told = [f"inputs: {self.inputs}", self._padding(), *self._attention(), self._absent()]
        if self.first_failure is not None:
            first = self.first_failure
            where = f" in {first.run}" if first.run else ""
            told.append(f"first difference: {first.name}{where} ({first.note or f'{first.difference:.3g}'})")
        return [*told, self._verdict()]

    def _padding(self) -> str:
        if not self.padded:
            no_matter = ", so cross_attention_padding makes no difference" if self.cross_attention_padding else ""
            return f"padding: none in these inputs{no_matter}"
        if not self.cross_attention_padding:
            return f"padding: rows are padded on the {self.padded}; padded positions are compared like all others"
        return (
            "padding: these inputs are padded, and HF's cross-attention reads padded positions, so ours ran with "
            'cross_attention_padding="hf" to compare like with like; the default, "mask", keeps off them'
        )

    def _attention(self) -> list[str]:
        if self.attention != self.hf_attention:
            return [
                f"attention: ours {self.attention}, HF's {self.hf_attention}, because HF has no {self.attention} for "
                f"{self.architecture}: their rounding differs, so a relative difference of {self.tolerance:g} passes"
            ]
        if self.attention == "sdpa":
            return [
                "attention: sdpa on both sides, a fused kernel, of which HF gives no patterns; to compare them too, "
                'ask for attention="eager" (--attention eager)'
            ]
        return []

    def _absent(self) -> str:
        endings: dict[str, int] = {}
        for name, _ in self.without_counterpart:
            ending = name.rpartition(".")[2]
            endings[ending] = endings.get(ending, 0) + 1
        counted = ", ".join(f"{count} {ending}" for ending, count in endings.items())
        return f"without a counterpart in HF: {len(self.without_counterpart)} hook points ({counted or 'none'})"

    def _verdict(self) -> str:
        returned = " and ".join(
            f"{row.run} {row.name}".strip() + f" {'equal' if row.equal else f'differ by {row.difference:.3g}'}"
            for row in self.rows
            if row.name in (LOGITS, OUTPUT)
        )
        told = [
            f"{self.dtype} on {self.device}",
            f"attention {self.attention} (HF {self.hf_attention})",
            *([f"cross_attention_padding {self.cross_attention_padding}"] if self.cross_attention_padding else []),
            f"tolerance {self.tolerance:g}",
        ]
        verdict = f"{'PASS' if self.passed else 'FAIL'}: {returned}"
        counted = f"{self.n_equal} of {len(self.rows)} are equal to the bit"
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return "; ".join([verdict, counted, ", ".join(told), versions])

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        style = "green" if self.passed else "bold red"
        *told, verdict = (Text(line) for line in self.lines())
        verdict.stylize(style)
        return Group(self._table(), *told, verdict)

    def _table(self) -> RenderableType:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        has_runs = any(row.run for row in self.rows)
        table = Table(box=box.SIMPLE_HEAD, title=f"{self.model}: ours and HF's {self.architecture}")
        for title in ("run",) * has_runs + ("hook point", "HF", "shape"):
            table.add_column(title, overflow="fold")
        for title in ("max |diff|", "relative"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("verdict", overflow="fold")
        for row in self.rows:
            told = (row.name, row.hf, " ".join(map(str, row.shape)), f"{row.difference:.3g}", f"{row.relative:.3g}")
            cells = ((row.run,) if has_runs else ()) + told
            verdict = Text(row.verdict, style="green" if row.passed else "bold red")
            table.add_row(*(Text(cell) for cell in cells), verdict)
        return table


def versions() -> dict[str, str]:
    """Of what computes the two sides."""
    return {"torch": version("torch"), "transformers": version("transformers"), "hooked-vlm": __version__}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
