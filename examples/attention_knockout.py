"""Which layers read the object? Forbid each layer's cross-attention to read it, or to read anything else.

    python examples/attention_knockout.py [SAMPLES]

In the toy an object is one patch, so the key to block is one image position, another one in each row of the batch.
"""

import sys

import torch

from hooked_vlm import HookedVLM
from hooked_vlm.data import generate
from hooked_vlm.edits import BlockAttention
from hooked_vlm.metrics import Probability
from hooked_vlm.sweep import sweep


@torch.no_grad()
def main() -> None:
    """Print a table: layers down, what they may not read across."""
    n_samples = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    model = HookedVLM.from_pretrained("toy-blip-vqa")
    samples = list(generate(n_samples, seed=7, kinds=("color",)))
    inputs = model.prepare([sample.image for sample in samples], [sample.question for sample in samples])

    n_positions = 1 + len(inputs.spans["image"][0])  # the class token and the patches
    is_object = torch.zeros(n_samples, n_positions, dtype=torch.bool)
    for row, sample in enumerate(samples):
        is_object[row, 1 + sample.objects[sample.about[0]].cell_index] = True

    layers = [f"question_encoder.blocks.{layer}.cross_attn" for layer in range(model.config.text.n_layers)]
    layers.append("question_encoder.blocks.*.cross_attn")
    token = model.processor.tokenizer.convert_tokens_to_ids
    metric = Probability(torch.tensor([token(sample.answer) for sample in samples]))
    blocked = {"the object": is_object, "all else": ~is_object}
    scores = {
        what: sweep(model, inputs, [[BlockAttention(layer, keys=keys)] for layer in layers], metric)
        for what, keys in blocked.items()
    }

    print(f"mean p(answer) over {n_samples} pictures: {metric(model(inputs)).mean():.3f}")
    print(f"{'no reading in':40}" + "".join(f"{what:>12}" for what in scores))
    for index, layer in enumerate(layers):
        print(f"{layer:40}" + "".join(f"{score[index].mean():12.3f}" for score in scores.values()))


if __name__ == "__main__":
    main()
