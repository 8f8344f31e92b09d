"""The house: what importing costs, what the wheel holds, and what no file may hold."""

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hooked_vlm
from hooked_vlm.version import __version__

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["hooked_vlm", "weights_conversion"]
IMPORTED_WHERE_USED = {
    "h5netcdf",
    "h5py",
    "matplotlib",
    "pandas",
    "rich",
    "tokenizers",
    "transformers",
    "typer",
    "xarray",
}
LONGEST_FILE = 450
MACHINE_PATH = re.compile(r"(?<![\w.~}-])/(work|home|root|Users)/\w")


def repository_files() -> list[Path]:
    """Every file that is in the repository or would be added to it."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")
    paths = (ROOT / name for name in listing.split("\0") if name)
    return [path for path in paths if path.is_file()]


@pytest.mark.parametrize("package", PACKAGES)
def test_import_is_light(package: str) -> None:
    program = f"import sys, {package}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True, text=True)
    assert not IMPORTED_WHERE_USED & set(done.stdout.split())


def test_version_is_written_once() -> None:
    assert hooked_vlm.__version__ == __version__
    assert importlib.metadata.version("hooked-vlm") == __version__, "install the package again: make test does"


def test_public_names_exist() -> None:
    assert all(hasattr(hooked_vlm, name) for name in hooked_vlm.__all__)


def test_command_is_installed() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts", name="hooked-vlm")
    assert {script.value for script in scripts} == {"hooked_vlm.cli:app"}


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_no_file_names_a_machine_path() -> None:
    found = []
    for path in repository_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        name = path.relative_to(ROOT)
        found += [f"{name}:{number}" for number, line in enumerate(lines, 1) if MACHINE_PATH.search(line)]
    assert not found


def test_every_file_is_short_enough_to_be_one_idea() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in repository_files() if path.suffix == ".py"}
    assert not {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > LONGEST_FILE}


@pytest.mark.slow
def test_wheel_holds_both_packages_whole(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("hooked_vlm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        licensed = any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in repository_files()}
    assert held == {name for name in sources if name.split("/")[0] in PACKAGES}
    assert licensed
