"""Figures of information flow and of visual tokens: they show what the result says, and nothing is cut or overlaps."""

import itertools

import numpy as np
import pytest
import xarray as xr
from matplotlib.collections import PolyCollection
from PIL import Image

from hooked_vlm.experiments.information_flow import EDGES, layer_groups
from hooked_vlm.plots import save_figure
from hooked_vlm.plots.flow import answer_by_layer_figure, information_flow_figure
from hooked_vlm.plots.visual_tokens import ablated_tokens_figure, visual_tokens_figure
from hooked_vlm.statistics import bootstrap
from tests.test_plots import check_legible

NAMES = [f"{source} → {target}" for source, target in EDGES]
TITLE = "ChooseAttr, llava-hf/llava-1.5-13b-hf"
METRICS = ["probability", "logit_difference"]


def flow(layers=5, samples=7, window=1, edges=NAMES, names=None) -> xr.Dataset:
    """Made-up numbers: each edge has its dip in a layer of its own."""
    random = np.random.default_rng(0)
    ticks = list(range(layers)) if names is None else names
    shape = (samples, len(edges), len(ticks))
    values = random.normal(0, 2, shape)
    for edge in range(len(edges)):
        values[:, edge, edge % len(ticks)] -= 10 * edge
    groups = "every one" if names is None else "{}"
    return xr.Dataset(
        {
            "relative": (("sample", "edge", "layer"), values),
            "change": (("metric", "sample", "edge", "layer"), np.stack([values / 100, values / 10])),
            "noise_floor": ("metric", [1e-7, 1e-5]),
        },
        {"edge": list(edges), "layer": ticks, "sample": [f"s{row}" for row in range(samples)], "metric": METRICS},
        {"window": window, "window_convention": "centered", "layers": groups, "dtype": "float32"},
    )


@pytest.mark.parametrize("layers", [1, 4, 12, 40])
def test_flow_is_legible_at_any_depth(layers):
    shown = check_legible(information_flow_figure(flow(layers), title=TITLE))
    assert {name.replace(" - ", " − ") for name in NAMES} <= shown
    assert {"change of p(answer) (%)", "blocked layer", "0"} <= shown
    assert any("n = 7" in text and TITLE in text for text in shown)


def test_flow_in_groups_and_windows_says_so():
    groups = flow(names=list(layer_groups(32)))
    shown = check_legible(information_flow_figure(groups))
    assert {"early-mid", "all", "blocked layers"} <= shown
    assert any("groups of layers blocked together" in text for text in shown)
    shown = check_legible(information_flow_figure(flow(40, window=9)))
    assert "middle of the blocked layers" in shown
    assert any("windows of 9 layers" in text for text in shown)


def test_flow_of_many_edges_and_long_names():
    edges = [f"image - image.object number {number} → question + rest + last" for number in range(9)]
    shown = check_legible(information_flow_figure(flow(6, edges=edges), title=" ".join([TITLE] * 3)))
    assert sum("number" in text for text in shown) == 9
    assert len({text for text in shown if "$" in text}) == 0
    check_legible(information_flow_figure(flow(6, edges=["$a$ → b_{2}", "$\\frac$ → last"])))


@pytest.mark.parametrize("quantity", ["relative", "change"])
def test_lines_are_means_with_their_intervals(quantity):
    result = flow(5)
    figure = information_flow_figure(result, quantity=quantity, metric="logit_difference", edges=NAMES[2:5])
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines() if not line.get_label().startswith("_")}
    assert list(lines) == [name.replace(" - ", " − ") for name in NAMES[2:5]]
    bands = [band for band in axes.collections if isinstance(band, PolyCollection)]
    for name, line, band in zip(NAMES[2:5], lines.values(), bands, strict=True):
        values = result.relative if quantity == "relative" else result.change.sel(metric="logit_difference")
        interval = bootstrap(values.sel(edge=name).values)
        assert np.allclose(line, interval.estimate)
        vertices = band.get_paths()[0].vertices
        for layer in range(5):
            own = vertices[vertices[:, 0] == layer, 1]
            assert own.min() == pytest.approx(interval.low[layer])
            assert own.max() == pytest.approx(interval.high[layer])
    assert any(np.allclose(line.get_ydata(), 0) for line in axes.get_lines())
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.get_lines()[:3]]
    assert all(len(set(look)) == 3 for look in zip(*looks, strict=True))


def test_noise_floor_is_said_of_changes():
    figure = information_flow_figure(flow(), quantity="change", metric="logit_difference")
    assert any("noise floor 1e-05 (float32)" in text.replace("\n", " ") for text in check_legible(figure))


def test_flow_says_what_it_lacks():
    with pytest.raises(ValueError, match="no edge 'nobody'"):
        information_flow_figure(flow(), edges=["nobody"])
    with pytest.raises(ValueError, match="no metric 'kl'"):
        information_flow_figure(flow(), quantity="change", metric="kl")
    with pytest.raises(ValueError, match="no quantity 'relative'"):
        information_flow_figure(flow().drop_vars("relative"))


# Answers in layers ----------------------------------------------------------------------------------------------------


def layers_of(tokens, n_layers=41) -> xr.Dataset:
    """``tokens``: of each target and form, in all of five samples."""
    found = np.tile(np.linspace(0, 1, n_layers), (*np.shape(tokens), 5, 1))
    found[np.array(tokens) == ""] = np.nan
    return xr.Dataset(
        {"probability": (("target", "form", "sample", "layer"), found)},
        {
            "target": ["answer", "foil"],
            "form": ["given", "small", "capitalised"],
            "sample": list(range(5)),
            "layer": np.arange(n_layers),
            "token": (("target", "form", "sample"), np.repeat(np.array(tokens)[..., None], 5, -1)),
        },
        {"norm": "false"},
    )


def test_ways_of_writing_that_are_one_are_one_line():
    figure = answer_by_layer_figure(layers_of([["red", "red", "Red"], ["blue", "blue", "blue"]]), title=TITLE)
    shown = check_legible(figure)
    assert {"answer, given or small", "answer, capitalised", "foil", "probability"} <= shown
    assert any("streams not normalised" in text.replace("\n", " ") for text in shown)
    figure = answer_by_layer_figure(layers_of([["red", "red", ""], ["", "", ""]], 6))
    assert {"answer"} == {line.get_label() for line in figure.axes[0].get_lines()}
    assert np.allclose(figure.axes[0].get_lines()[0].get_ydata(), np.linspace(0, 1, 6))


# Visual tokens --------------------------------------------------------------------------------------------------------

CONDITIONS = ("nothing", "object", "object +1", "register", "random 40", "gradient 250")
WAYS = ("caption", "poll", "vqa")


def tokens(samples=6, ways=WAYS, conditions=CONDITIONS, said="a dog on a mat") -> xr.Dataset:
    random = np.random.default_rng(1)
    shape = (len(ways), samples, len(conditions))
    identified = (random.random(shape) < 0.5).astype(float)
    identified[..., 0] = 1
    identified[0, 0, 0] = 0
    identified[:, 1:3, 3] = np.nan
    ablated = random.random((samples, len(conditions), 9)) < 0.4
    ablated[:, 0] = False
    ablated[:, 1:, 0] = True
    ablated[1:3, 3] = False
    columns, rows = np.meshgrid(range(3), range(3))
    boxes = np.stack([columns, rows, columns + 1, rows + 1], -1).reshape(9, 4) * 20.0
    boxes[8] = np.nan
    return xr.Dataset(
        {
            "identified": (("evaluation", "sample", "condition"), identified),
            "lost": (
                ("evaluation", "sample", "condition"),
                np.where(identified[..., :1] == 1, 1 - identified, np.nan),
            ),
            "text": (("evaluation", "sample", "condition"), np.full(shape, said)),
            "ablated": (("sample", "condition", "token"), ablated),
            "n_tokens": (("sample", "condition"), ablated.sum(-1)),
        },
        {
            "evaluation": list(ways),
            "condition": list(conditions),
            "sample": [f"s{row}" for row in range(samples)],
            "question": ("sample", [f"what is in picture {row}?" for row in range(samples)]),
            "token": np.arange(9),
            "box": (("sample", "token", "side"), np.repeat(boxes[None], samples, 0)),
        },
        {"replace_by": "mean"},
    )


@pytest.mark.parametrize("quantity", ["lost", "identified"])
@pytest.mark.parametrize("ways", [WAYS, WAYS[2:]], ids=len)
def test_bars_are_means_with_their_intervals(quantity, ways):
    result = tokens().sel(evaluation=list(ways))
    figure = visual_tokens_figure(result, quantity=quantity, title=TITLE)
    shown = check_legible(figure)
    assert set(ways) <= shown
    names = CONDITIONS[quantity == "lost" :]
    assert all(any(text.startswith(name) for text in shown) for name in names)
    (axes,) = figure.axes
    bars = [container for container in axes.containers if hasattr(container, "patches")]
    for way, container in zip(ways, bars, strict=True):
        values = 100 * result[quantity].sel(evaluation=way, condition=list(names)).values
        interval = bootstrap(values)
        assert np.allclose([bar.get_width() for bar in container.patches], interval.estimate)
        segments = container.errorbar.lines[2][0].get_segments()
        assert np.allclose([segment[0, 0] for segment in segments], interval.low)
        assert np.allclose([segment[1, 0] for segment in segments], interval.high)


def test_bars_tell_how_many_they_are_of():
    shown = check_legible(visual_tokens_figure(tokens()))
    (register,) = [text for text in shown if text.startswith("register")]
    assert register.endswith("; n = 4)")
    title = next(text for text in shown if "replaced" in text).replace("\n", " ")
    assert "tokens replaced by a mean; n = 5 (caption), 6 (poll), 6 (vqa)" in title
    shown = check_legible(
        visual_tokens_figure(tokens(conditions=[*CONDITIONS[:-1], "a choice with a long name $x_1$"]))
    )
    assert any("$x_1$" in text for text in shown)


@pytest.mark.parametrize("size", [(60, 60), (160, 40)])
def test_pictures_show_the_tokens_that_were_ablated(size):
    result = tokens(said="it is a very long caption of $5 and more that nobody reads")
    picture = Image.new("RGB", size, "white")
    figure = ablated_tokens_figure(result, picture, sample=2, evaluation="poll")
    shown = check_legible(figure)
    assert "what is in picture 2?" in shown
    assert len(figure.axes) == len(CONDITIONS)
    for name, axes in zip(CONDITIONS, figure.axes, strict=True):
        part = result.isel(sample=2).sel(condition=name)
        (covers,) = axes.collections
        boxes = [path.get_extents().extents.tolist() for path in covers.get_paths()]
        expected = part.box.values[part.ablated.values]
        assert boxes == expected[~np.isnan(expected).any(1)].tolist()
        title = next(text for text in shown if text.startswith(f"{name}: "))
        assert f"{int(part.n_tokens)} token" in title
        assert ("not run" in title) == (name == "register")
        assert name == "register" or "“it is a very long cap…”" in title


def test_figures_of_tokens_say_what_they_lack(unchecked):
    result, picture = tokens(), Image.new("RGB", (60, 60))
    with pytest.raises(ValueError, match="no condition 'subject'"):
        visual_tokens_figure(result, conditions=["subject"])
    with pytest.raises(ValueError, match="'lost' or 'identified'"):
        visual_tokens_figure(result, quantity="found")
    with pytest.raises(ValueError, match="no evaluation 'captions'"):
        ablated_tokens_figure(result, picture, evaluation="captions")


def test_figures_are_written(tmp_path):
    figures = [information_flow_figure(flow()), visual_tokens_figure(tokens())]
    for number, figure in enumerate(figures):
        written = save_figure(figure, tmp_path / f"figure{number}")
        assert all(path.stat().st_size > 5000 for path in written)
    first, second = (Image.open(tmp_path / f"figure{number}.png") for number in range(2))
    assert first.size != second.size


def test_lines_on_each_other_are_all_seen():
    """The first is the thickest."""
    (axes,) = information_flow_figure(flow()).axes
    widths = [line.get_linewidth() for line in axes.get_lines()[: len(NAMES)]]
    assert all(one > other for one, other in itertools.pairwise(widths))
