"""Trace one answer of the toy under three corruptions, draw the figures, and say where each brings the answer back.

python examples/causal_trace.py [FOLDER]
"""

import sys
from pathlib import Path

from hooked_vlm import HookedVLM, results
from hooked_vlm.corruptions import AdditiveGaussian, CounterfactualImage, CounterfactualQuestion
from hooked_vlm.experiments import causal_trace
from hooked_vlm.plots import causal_trace_figure, save_figure
from hooked_vlm.toys import demo_sample


def main() -> None:
    """Print the strongest cell of each trace, and leave figures and results in a folder."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "causal_trace")
    model, sample = HookedVLM.from_pretrained("toy-blip-vqa"), demo_sample()
    inputs = model.prepare(sample.image, sample.question)
    corruptions = {
        "noise": AdditiveGaussian(std=3.0, draws=4, seed=0),
        "image": CounterfactualImage(sample.sip.image),
        "question": CounterfactualQuestion(sample.str_.question),
    }
    print(f"{sample.question} {model.generate(inputs)[0]}")
    for name, corruption in corruptions.items():
        trace = causal_trace(model, inputs, corruption)
        figure = causal_trace_figure(trace, metric="logit_difference", images=[("picture", sample.image)], title=name)
        save_figure(figure, folder / f"{name}.png")
        results.save(trace, folder / f"{name}.nc")

        # Cells that give the clean answer whatever the model are no finding.
        parts = trace.normalized.sel(metric="logit_difference", sample=0).where(~trace.identity)
        cells = parts.stack(cell=("tower", "site", "layer", "position")).dropna("cell")
        best = cells.isel(cell=int(cells.argmax("cell")))
        tower, site, layer, position = best.cell.item()
        token = trace.token.sel(sample=0, tower=tower, position=position).item()
        print(f"{name:>8}: {tower} {site} of layer {layer} at {token} restores {best.item():.2f}")
    print(f"figures and results are in {folder}")


if __name__ == "__main__":
    main()
