"""Figures: every token, layer and site is named; nothing is cut."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from hooked_vlm import HookedVLM, toys
from hooked_vlm.corruptions import CounterfactualImage
from hooked_vlm.experiments import causal_trace
from hooked_vlm.plots import causal_trace_figure, save_figure

SAMPLE = toys.demo_sample()
IMAGES = [("clean", SAMPLE.image), ("corrupted", SAMPLE.sip.image)]


@pytest.fixture(scope="module")
def result():
    model = HookedVLM.from_pretrained("toy-blip-vqa")
    inputs = model.prepare(SAMPLE.image, SAMPLE.question)
    return causal_trace(model, inputs, CounterfactualImage(SAMPLE.sip.image), all_positions=True)


def texts(figure) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.mark.parametrize("quantity", ["patched", "effect", "normalized"])
@pytest.mark.parametrize("metric", ["probability", "logit_difference"])
@pytest.mark.parametrize("images", [[], IMAGES[:1], IMAGES], ids=len)
def test_everything_is_named_and_inside_the_figure(result, quantity, metric, images):
    figure = causal_trace_figure(result, quantity=quantity, metric=metric, images=images, title="one line\nand another")
    shown = texts(figure)
    for token in ("[CLS]", *SAMPLE.question.split(), "[SEP]", "(all)", "[DEC]"):
        assert token in shown
    for name in ("residual stream", "self-attention", "cross-attention", "MLP", "layer", "question encoder"):
        assert name in shown
    assert any(SAMPLE.answer in text for text in shown)
    assert {caption for caption, _ in images} <= set(shown)

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible():
            box = text.get_window_extent(canvas.get_renderer())
            assert min(box.x0, box.y0) >= -1, text.get_text()
            assert box.x1 <= width + 1, text.get_text()
            assert box.y1 <= height + 1, text.get_text()


def test_identities_are_hatched(result):
    from matplotlib.patches import Rectangle

    figure = causal_trace_figure(result)
    hatched = [patch for patch in figure.findobj(Rectangle) if patch.get_hatch()]
    assert len(hatched) == int(result.identity.sum()) == 2


def test_saved_as_png_and_pdf(result, tmp_path):
    paths = save_figure(causal_trace_figure(result), tmp_path / "figure.png")
    assert [path.name for path in paths] == ["figure.png", "figure.pdf"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert paths[1].read_bytes().startswith(b"%PDF")
