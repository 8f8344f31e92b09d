"""Means over samples by role, and runs side by side."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hooked_vlm import HookedVLM
from hooked_vlm.corruptions import Scaled
from hooked_vlm.data import shapes
from hooked_vlm.experiments.compare import compare
from hooked_vlm.experiments.parts.roles import by_role
from hooked_vlm.plots.roles import comparison_figure, role_figure

LD = "logit_difference"


@pytest.fixture(scope="module")
def compared():
    model = HookedVLM.from_pretrained("toy-blip-vqa")
    ways = {"nothing seen": Scaled(0.0), "SIP": "sip"}
    return compare(
        model,
        shapes(2, seed=7, kinds=("color",)),
        ways,
        towers=["question_encoder"],
        sites=["resid", "mlp"],
        all_positions=True,
        resamples=20,
    )


def meshes(figure: Figure) -> list[QuadMesh]:
    return [mesh for axes in figure.axes[:-1] for mesh in axes.collections if isinstance(mesh, QuadMesh)]


def hatched(mesh: QuadMesh) -> list[tuple[int, int]]:
    cells = [patch for patch in mesh.axes.patches if isinstance(patch, Rectangle) and patch.get_hatch()]
    return sorted((int(cell.get_y()), int(cell.get_x())) for cell in cells)


def test_runs_are_columns_and_sites_rows(compared):
    figure = comparison_figure(compared, title="toy")
    figure.canvas.draw()
    shown = meshes(figure)
    assert [mesh.axes.get_title("left") for mesh in shown] == ["nothing seen", "SIP"] * 2
    means = compared.normalized.sel(metric=LD).mean("sample").isel(tower=0)
    for place, mesh in enumerate(shown):
        site, run = divmod(place, 2)
        own = means.isel(site=site, run=run).transpose("role", "layer").dropna("role", how="all")
        assert np.allclose(mesh.get_array(), own)
    roles = [label.get_text() for label in shown[0].axes.get_yticklabels()]
    assert roles == compared.role.values.tolist()
    last = (roles.index("(all)"), 3)
    assert hatched(shown[0]) == hatched(shown[1]) == [last], "only the last whole stream is all that is read"
    assert hatched(shown[2]) == []
    title = figure._suptitle.get_text().replace("\n", " ")
    agreement = float(compared.rank_correlation.sel(run="nothing seen", other="SIP"))
    assert f"nothing seen and SIP {agreement:.2f} [" in title
    assert "mean over 2 samples" in title


def test_a_tower_that_was_not_compared(compared):
    with pytest.raises(ValueError, match="no tower 'answer_decoder' was compared; there are question_encoder"):
        comparison_figure(compared, tower="answer_decoder")


def test_all_panels_have_one_scale_and_identities_are_hatched(blip_trace):
    figure = role_figure(blip_trace, quantity="effect", title="toy")
    shown = meshes(figure)
    assert len({mesh.get_clim() for mesh in shown}) == 1
    assert [hatched(mesh) for mesh in shown] == [[], [(0, 3)]], "the last layer of the one position that is read"
    means = by_role(blip_trace).effect.sel(metric=LD, tower="answer_decoder", site="resid").mean("sample")
    assert np.allclose(shown[1].get_array(), means.sel(role=["[DEC]"]).transpose("role", "layer"))


@pytest.fixture(scope="module")
def blip_trace():
    from hooked_vlm.experiments import causal_trace

    model = HookedVLM.from_pretrained("toy-blip-vqa")
    return causal_trace(model, shapes(2, seed=7, kinds=("color",)), Scaled(0.0), sites=["resid"])
