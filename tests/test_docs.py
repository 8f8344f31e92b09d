"""What the documentation says is so: its Python runs and prints what it shows, commands parse, links lead on."""

from __future__ import annotations

import io
import re
import shlex
from contextlib import redirect_stdout
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import typer
from typer.testing import CliRunner

from hooked_vlm.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return FENCED.findall(page.read_text(encoding="utf-8"))


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text(encoding="utf-8"))


REPRODUCED = ("constraint_tracing", "information_flow", "notice", "running", "visual_tokens")
"""Pages of methods whose signatures are checked where ``tests/runs`` runs them: here they are not, to save half of the
time of these pages."""


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text("utf-8")], ids=name_of)
def test_python_runs_and_prints_what_is_shown(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page are one session. What a ``text`` block after one shows is what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", page.stem in REPRODUCED)
    session: dict[str, Any] = {"__name__": "__main__"}
    found = [*blocks(page), ("", "")]
    for (language, code), (next_language, shown) in pairwise(found):
        if language != "python":
            continue
        out = io.StringIO()
        with redirect_stdout(out):
            exec(compile(code, name_of(page), "exec"), session)
        assert out.getvalue() == (shown if next_language == "text" else ""), code


def command_lines(page: Path) -> list[list[str]]:
    lines = [line for language, text in blocks(page) if language == "sh" for line in text.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = [(page, words) for page in PAGES for words in command_lines(page)]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[" ".join(words) for _, words in COMMANDS])
def test_command_lines_parse(page: Path, words: list[str]) -> None:
    match words:
        case ["hooked-vlm", command, *arguments]:
            typer.main.get_group(app).commands[command].make_context(command, arguments)
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
        case ["python", "-m", module, *_]:
            assert find_spec(module)
        case ["python", script, *_]:
            assert (ROOT / script).is_file()
        case _:
            raise AssertionError(f"{name_of(page)} has a command that nobody checks: {words}")


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_commands_in_the_text_exist(page: Path) -> None:
    commands = typer.main.get_group(app).commands
    text = prose(page)
    assert set(re.findall(r"`hooked-vlm (\w+)", text)) <= set(commands)
    assert all(find_spec(module) for module in re.findall(r"`python -m ([\w.]+\w)", text) if module != "build")


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        file, _, heading = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        assert not heading or heading in headings(linked), target


def headings(page: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


TOYS = ("toy-blip-vqa", "toy-llava")


@pytest.mark.parametrize(("place", "toy"), list(enumerate(TOYS)), ids=TOYS)
def test_hook_names_are_what_the_command_prints(place: int, toy: str) -> None:
    """To renew a table of the page: `hooked-vlm hooks TOY`."""
    printed = CliRunner().invoke(app, ["hooks", toy]).output
    shown = [text for language, text in blocks(ROOT / "docs" / "hook_names.md") if language == "text"]
    assert len(shown) == len(TOYS)
    assert [line.rstrip() for line in shown[place].splitlines()] == [line.rstrip() for line in printed.splitlines()]


@pytest.mark.parametrize("toy", TOYS)
def test_the_toys_figures_are_those_of_its_card(toy: str) -> None:
    card = (ROOT / "hooked_vlm" / "toys" / toy / "README.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:color|shape|count|exists) \| .*$", card, re.MULTILINE)
    assert len(rows) == 4
    assert all(row in readme for row in rows)
