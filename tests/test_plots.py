"""Figures: every token, layer and site is named; nothing is cut, nothing overlaps; patches lie where they look."""

import itertools

import jaxtyping
import numpy as np
import pytest
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image
from transformers import CLIPImageProcessor, LlavaNextImageProcessor

from hooked_vlm import HookedVLM, toys
from hooked_vlm.corruptions import CounterfactualImage
from hooked_vlm.experiments import causal_trace
from hooked_vlm.patches import PatchGrid, image_tokens
from hooked_vlm.plots import causal_trace_figure, patch_trace_figure, save_figure

SAMPLE = toys.demo_sample()
IMAGES = [("clean", SAMPLE.image), ("corrupted", SAMPLE.sip.image)]
TITLE = (
    "“what color is the circle ?” → red    p clean 1.000, corrupted 0.000\n"
    "denoising, one layer at a time; another question (STR): “what color is the star ?”; organisation/llava-1.5-7b-hf"
)
QUANTITIES, METRICS = ("patched", "effect", "normalized"), ("probability", "logit_difference")


@pytest.fixture(scope="module")
def result():
    model = HookedVLM.from_pretrained("toy-blip-vqa")
    inputs = model.prepare(SAMPLE.image, SAMPLE.question)
    return causal_trace(model, inputs, CounterfactualImage(SAMPLE.sip.image), all_positions=True)


@pytest.fixture(scope="module")
def llava():
    """The residual stream of toy-llava, each patch and each token."""
    model = HookedVLM.from_pretrained("toy-llava")
    inputs = model.prepare(SAMPLE.image, SAMPLE.question)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        return causal_trace(model, inputs, CounterfactualImage(SAMPLE.sip.image), sites=["resid"], all_positions=True)


def made(
    size=(480, 640),
    *,
    n_layers=5,
    sites=("resid",),
    pictures=1,
    direction="denoising",
    tiles=None,
    image_size=336,
    tokens=("<s>", "USER:"),
    answers=("red", "blue"),
    ends=(0.9, 0.05),
) -> xr.Dataset:
    """A trace of made-up numbers: of each picture, patch 3 brings the answer back in layer 0 and others nothing."""
    crop = {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
    processor = LlavaNextImageProcessor(**crop, image_grid_pinpoints=tiles) if tiles else CLIPImageProcessor(**crop)
    n_patches = len(image_tokens(size, image_size, 14, tiles))
    grid = PatchGrid.of(
        *(processor, size, range(n_patches)),
        **{"image_size": image_size, "patch_size": 14, "pinpoints": tiles, "tower": "language_model"},
    )
    patches = [f"{place.row},{place.column}" for place in grid.places]
    labels = [*tokens, *patches * pictures, "(image)", "(all)"]
    first = [len(tokens) + n_patches * picture for picture in range(pictures)]
    boxes, seen = np.full((len(labels), 4), np.nan), np.full(len(labels), -1)
    for picture, start in enumerate(first):
        boxes[start : start + n_patches], seen[start : start + n_patches] = grid.boxes, picture
    start, goal = (ends[1], ends[0]) if direction == "denoising" else ends
    scores = np.full((2, 1, 1, len(sites), n_layers, len(labels)), start)
    for picture, place in enumerate(first):
        scores[..., 0, place + 3 + picture] = goal
    dims = ("metric", "sample", "tower", "site", "layer", "position")
    clean, corrupted = ([[end], [end]] for end in ends)
    trace = xr.Dataset(
        {
            "patched": (dims, scores),
            "clean": (dims[:2], clean),
            "corrupted": (dims[:2], corrupted),
            "identity": (dims[2:], np.zeros(scores.shape[2:], bool)),
            **{name: ("sample", [answer]) for name, answer in zip(("answer", "foil"), answers, strict=True)},
        },
        {
            **{"metric": [*METRICS], "sample": [0], "tower": ["language_model"], "site": [*sites]},
            **{"layer": np.arange(n_layers), "position": [*range(len(labels) - 2), -2, -1]},
            "token": (("sample", "tower", "position"), np.array(labels)[None, None]),
            "box": (("sample", "tower", "position", "side"), boxes[None, None]),
            "picture": (("sample", "tower", "position"), seen[None, None]),
        },
        {"direction": direction},
    )
    trace["effect"] = trace.patched - start
    trace["normalized"] = (trace.patched - trace.corrupted) / (trace.clean - trace.corrupted)
    return trace


def drawn_texts(figure) -> list[tuple[str, object]]:
    """What is written in a figure, and where; without the labels of ticks that lie outside of their axes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    hidden = set()
    for axes in figure.findobj(lambda artist: hasattr(artist, "get_xlim")):
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                    hidden |= {id(tick.label1), id(tick.label2)}
    shown = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    renderer = canvas.get_renderer()
    return [(text.get_text(), text.get_window_extent(renderer)) for text in shown if id(text) not in hidden]


def check_legible(figure) -> set[str]:
    """Nothing that is written is cut off, or lies over another; returns what is written."""
    written = drawn_texts(figure)
    width, height = figure.canvas.get_width_height()
    for text, box in written:
        assert min(box.x0, box.y0) >= -1, text
        assert box.x1 <= width + 1, text
        assert box.y1 <= height + 1, text
    for (one, box), (other, beside) in itertools.combinations(written, 2):
        across = min(box.x1, beside.x1) - max(box.x0, beside.x0)
        down = min(box.y1, beside.y1) - max(box.y0, beside.y0)
        assert min(across, down) < 2, (one, other)
    return {text for text, _ in written}


# Heatmaps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("images", [[], IMAGES[:1], IMAGES], ids=len)
def test_everything_is_named_and_inside_the_figure(result, quantity, metric, images):
    figure = causal_trace_figure(result, quantity=quantity, metric=metric, images=images, title=TITLE)
    shown = check_legible(figure)
    for token in ("[CLS]", *SAMPLE.question.split(), "[SEP]", "(all)", "[DEC]"):
        assert token in shown
    for name in ("residual stream", "self-attention", "cross-attention", "MLP", "layer", "question encoder"):
        assert name in shown
    assert any(SAMPLE.answer in text for text in shown)
    assert {caption for caption, _ in images} <= shown


@pytest.mark.parametrize("tower", ["question_encoder", "answer_decoder"])
def test_a_narrow_figure(result, tower):
    part = result.sel(tower=[tower], site=["cross_attn"])
    figure = causal_trace_figure(part, quantity="normalized", metric="logit_difference", images=IMAGES, title=TITLE)
    assert {"clean", "corrupted", "cross-attention"} <= check_legible(figure)
    # A picture's caption keeps clear of the picture above it.
    upper, lower = figure.subfigs[0].axes
    caption = lower.title.get_window_extent(figure.canvas.get_renderer())
    assert caption.y1 <= upper.get_window_extent().y0


def test_identities_are_hatched(result):
    figure = causal_trace_figure(result)
    hatched = [patch for patch in figure.findobj(Rectangle) if patch.get_hatch()]
    assert len(hatched) == int(result.identity.sum()) == 2


def test_saved_as_png_and_pdf(result, llava, tmp_path):
    for figure in (causal_trace_figure(result), patch_trace_figure(llava, SAMPLE.image)):
        paths = save_figure(figure, tmp_path / "figure.png")
        assert [path.name for path in paths] == ["figure.png", "figure.pdf"]
        assert paths[0].read_bytes().startswith(b"\x89PNG")
        assert paths[1].read_bytes().startswith(b"%PDF")


def test_single_patches_are_not_rows(llava):
    figure = causal_trace_figure(llava, images=IMAGES[:1], title=TITLE)
    shown = check_legible(figure)
    assert {"<s>", "USER:", "\\n", *SAMPLE.question.split(), "ASSISTANT:", "(image)", "(all)"} <= shown
    assert not any("," in text and text[0].isdigit() for text in shown)
    (axes,) = (axes for axes in figure.axes if axes.get_title(loc="left") == "residual stream")
    mesh = axes.collections[0]
    part = llava.patched.sel(metric="probability", site="resid").isel(sample=0, tower=0)
    rows = [position for position in llava.position.values if not 2 <= position < 38]
    assert np.array_equal(mesh.get_array(), part.sel(position=rows).transpose("position", "layer"))


def test_a_trace_of_single_patches_alone_has_no_rows(llava):
    alone = llava.isel(position=np.flatnonzero(llava.picture.values[0, 0] == 0))
    with pytest.raises(ValueError, match="drawn by patch_trace_figure"):
        causal_trace_figure(alone)


@pytest.mark.parametrize(("n_layers", "ticks"), [(5, 5), (12, 6), (32, 7), (80, 8)])
def test_layers_are_numbered_as_far_as_there_is_room(n_layers, ticks):
    figure = causal_trace_figure(made(n_layers=n_layers, sites=("resid", "attn", "mlp")), title=TITLE)
    check_legible(figure)
    for axes in figure.axes[:3]:
        labels = [int(text.get_text()) for text in axes.get_xticklabels()]
        assert len(labels) == ticks
        assert axes.get_xticks().tolist() == [label + 0.5 for label in labels]


@pytest.mark.parametrize(
    ("quantity", "metric", "ends"),
    [
        ("patched", "probability", (1e-7, 3e-8)),
        ("effect", "probability", (0.9, 0.05)),
        ("patched", "logit_difference", (25.0, -130.0)),
        ("normalized", "logit_difference", (0.9, 0.05)),
        ("effect", "logit_difference", (25.0, 25.0)),
    ],
)
def test_long_tokens_and_dollars(quantity, metric, ends):
    trace = made(
        tokens=("<|start_header_id|>user<|end_header_id|>", "$x_1$", "\\frac{", "$$", "</s>"),
        answers=("▁extraordinarily", "▁unremarkable"),
        sites=("resid", "attn", "mlp"),
        ends=ends,
    )
    title = "how much is $5 or $6_^ ?  " + "many words " * 30
    shown = check_legible(causal_trace_figure(trace, quantity=quantity, metric=metric, images=IMAGES[:1], title=title))
    assert {"<|start_header_id|>user…", "$x_1$", "\\frac{", "$$"} <= shown
    assert any("▁extraordi…" in text for text in shown)
    check_legible(patch_trace_figure(trace, Image.new("L", (640, 480)), quantity=quantity, metric=metric, title=title))


# Over the picture -----------------------------------------------------------------------------------------------------


def panels(figure) -> list:
    """The axes with patches, row by row."""
    return [axes for axes in figure.axes if any(isinstance(drawn, PolyCollection) for drawn in axes.collections)]


def opacities(axes) -> np.ndarray:
    (patches,) = axes.collections
    patches.update_scalarmappable()
    return patches.get_facecolor()[:, 3]


def extents(axes) -> np.ndarray:
    """Left, top, right, bottom of each patch that is drawn."""
    boxes = [path.get_extents() for path in axes.collections[0].get_paths()]
    return np.array([[box.x0, box.y0, box.x1, box.y1] for box in boxes])


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize(
    ("metric", "sites"), [("probability", ("resid", "attn", "mlp")), ("logit_difference", ("attn",))]
)
@pytest.mark.parametrize("layers", [None, [2]], ids=str)
def test_everything_over_the_picture_is_named_and_inside(quantity, metric, sites, layers):
    trace = made(sites=sites)
    figure = patch_trace_figure(
        trace, Image.new("RGB", (640, 480)), quantity=quantity, metric=metric, layers=layers, title=TITLE
    )
    shown = check_legible(figure)
    assert {f"layer {layer}" for layer in layers or range(5)} <= shown
    assert {"residual stream", "self-attention", "MLP"} & shown == {
        {"resid": "residual stream", "attn": "self-attention", "mlp": "MLP"}[site] for site in sites
    }
    score = "p(red)" if metric == "probability" else "red − blue"
    assert {"patched": score, "effect": f"Δ {score}", "normalized": f"norm. {score}"}[quantity] in shown
    assert len(panels(figure)) == len(sites) * len(layers or range(5))


@pytest.mark.parametrize(
    ("size", "n_layers"), [((480, 640), 32), ((640, 525), 40), ((480, 640), 8), ((100, 1000), 9), ((1000, 100), 1)]
)
def test_one_panel_a_layer_at_most_eight(n_layers, size):
    figure = patch_trace_figure(made(size, n_layers=n_layers), Image.new("RGB", size[::-1]), title=TITLE)
    titles = [axes.get_title() for axes in panels(figure)]
    layers = [int(title.removeprefix("layer ")) for title in titles]
    assert len(layers) == min(n_layers, 8)
    assert (layers[0], layers[-1]) == (0, n_layers - 1)
    assert max(np.diff(layers), default=1) - min(np.diff(layers), default=1) <= 1
    check_legible(figure)
    # The bar is as high as the picture beside it, if that is not too flat.
    bar, last = figure.axes[-1].get_window_extent(), panels(figure)[-1].get_window_extent()
    if size[0] > 100:
        assert (bar.y0, bar.y1) == pytest.approx((last.y0, last.y1), abs=1)
    assert bar.height > 80


def test_the_lit_patch_is_where_the_object_is(llava):
    (circle,) = (item for item in SAMPLE.objects if item.shape == "circle")
    figure = patch_trace_figure(llava, SAMPLE.image)
    axes = panels(figure)
    assert len(axes) == 5
    lit = opacities(axes[0])
    assert (lit > 0.5).sum() == 1
    left, top, right, bottom = extents(axes[0])[lit.argmax()]
    assert left <= circle.box[0] <= circle.box[2] <= right
    assert top <= circle.box[1] <= circle.box[3] <= bottom
    for layer, own in enumerate(axes):
        effects = llava.effect.sel(metric="probability", site="resid", layer=layer).isel(sample=0, tower=0)
        assert opacities(own) == pytest.approx(0.85 * effects.values[2:38].clip(0) / 1.0, abs=0.01)
        assert own.get_xlim() == (-0.5, 95.5)
        assert own.get_ylim() == (95.5, -0.5)


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_patches_that_do_nothing_are_clear(quantity, direction):
    """Restored states light up, and so do spoilt ones; the bar shows the same colors, as they are on white."""
    figure = patch_trace_figure(made(direction=direction), Image.new("RGB", (640, 480)), quantity=quantity)
    first, *others = panels(figure)
    assert np.flatnonzero(opacities(first) > 0.01).tolist() == [3]
    assert opacities(first)[3] == pytest.approx(0.85)
    assert all((opacities(axes) < 0.01).all() for axes in others)
    color = first.collections[0].get_facecolor()[3]
    assert color[:3].mean() < 0.4, "a dark one"
    expected = 1 - 0.85 * (1 - color[:3])
    start, goal = {"patched": (0.05, 0.9), "effect": (0, 0.85), "normalized": (0, 1)}[quantity]
    if direction == "noising":
        start, goal = (0, -goal) if quantity == "effect" else (goal, start)
    (colors,) = (drawn for drawn in figure.axes[-1].collections if isinstance(drawn, QuadMesh))
    shown = colors.cmap(colors.norm([start, goal]))
    assert shown[0][:3] == pytest.approx([1, 1, 1], abs=0.01)
    assert shown[1][:3] == pytest.approx(expected, abs=0.01)
    assert sorted(figure.axes[-1].get_ylim()) == pytest.approx(sorted((start, goal)))


def test_what_goes_the_other_way_is_seen_too():
    trace = made()
    trace.patched[..., 0, 10] = -0.8
    figure = patch_trace_figure(trace, Image.new("RGB", (640, 480)))
    lit = opacities(panels(figure)[0])
    assert np.flatnonzero(lit > 0.01).tolist() == [3, 8]
    assert len({tuple(color) for color in panels(figure)[0].collections[0].get_facecolor().round(3)}) == 3


def test_finer_tiles_are_drawn_over_the_coarser():
    size, tiles = (400, 800), [[336, 672], [672, 336], [672, 672]]
    trace = made(size, tiles=tiles)
    figure = patch_trace_figure(trace, Image.new("RGB", size[::-1]))
    boxes = extents(panels(figure)[0])
    assert np.allclose(boxes, trace.box.values[0, 0][~np.isnan(trace.box.values[0, 0, :, 0])])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    # Those of the whole picture first; the newlines, which see nothing, are left out.
    assert area[:576].min() > 1.5 * area[576:].max()
    assert len(boxes) == 576 + 24 * 48
    covered = np.zeros(size, bool)
    for left, top, right, bottom in boxes[576:].round().astype(int):
        covered[top:bottom, left:right] = True
    assert covered.all()
    assert panels(figure)[0].collections[0].get_zorder() > panels(figure)[0].images[0].get_zorder()


def test_one_of_several_pictures():
    trace = made(pictures=2)
    for picture in range(2):
        figure = patch_trace_figure(trace, Image.new("RGB", (640, 480)), picture=picture)
        assert np.flatnonzero(opacities(panels(figure)[0]) > 0.01).tolist() == [3 + picture]
        assert len(extents(panels(figure)[0])) == 576
    with pytest.raises(ValueError, match="holds no positions of picture 2 of sample 0"):
        patch_trace_figure(trace, Image.new("RGB", (640, 480)), picture=2)


def test_a_trace_without_patches_is_not_drawn_over_a_picture(result, llava):
    text = llava.isel(position=[0, 1, -2, -1])
    for trace in (result, text, text.drop_vars(["box", "picture"])):
        with pytest.raises(ValueError, match="holds no positions of picture 0 of sample 0"):
            patch_trace_figure(trace, SAMPLE.image)


def test_a_patch_that_is_not_defined_is_clear():
    trace = made()
    trace.normalized[:] = np.nan
    figure = patch_trace_figure(trace, Image.new("RGB", (640, 480)), quantity="normalized")
    check_legible(figure)
    assert (opacities(panels(figure)[0]) == 0).all()


def test_pictures_are_drawn_as_they_were_prepared(llava, tmp_path):
    """Upright; from files and arrays, too."""
    turned = SAMPLE.image.rotate(90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    expected = np.asarray(SAMPLE.image.convert("L"))
    for image in (SAMPLE.image, SAMPLE.pixels, tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        axes = panels(patch_trace_figure(llava, image, layers=[0]))[0]
        assert np.array_equal(axes.images[0].get_array(), expected)
