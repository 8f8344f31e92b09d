"""Which layers of a LLaVA read the object where it answers? Forbid the last position to read the object's patches.

    python examples/image_knockout.py [SAMPLES]

In a LLaVA the image is among the language model's tokens, so what is blocked is self-attention. ``positions_in`` says
which of them show an object, whatever the processor did to the picture.
"""

import sys

import torch

from hooked_vlm import HookedVLM
from hooked_vlm.data import ShapesSample, generate
from hooked_vlm.edits import BlockAttention
from hooked_vlm.metrics import Probability
from hooked_vlm.sweep import sweep
from hooked_vlm.toys import demo_sample


@torch.no_grad()
def main() -> None:
    """Print one answer that changes, and a table: layers down, what the last position may not read across."""
    n_samples = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    model = HookedVLM.from_pretrained("toy-llava")
    sample = demo_sample()
    inputs = model.prepare(sample.image, sample.question)
    patches = inputs.positions_in(box_asked_about(sample))
    logits = model.patch(inputs, [BlockAttention("language_model.blocks.*.attn", positions="last", keys=patches)])
    blind = model.token_strings(logits[:, -1].argmax(-1))[0]
    print(f"{sample.question} {model.generate(inputs)[0]}; without a look at position {patches[0][0]}: {blind}")

    samples = list(generate(n_samples, seed=7, kinds=("color",)))
    inputs = model.prepare([sample.image for sample in samples], [sample.question for sample in samples])
    blocked = {
        "the object": inputs.positions_in([box_asked_about(sample) for sample in samples]),
        "another": inputs.positions_in([another_box(sample) for sample in samples]),
        "the image": "image",
        "the question": "question",
    }
    token = model.processor.tokenizer.convert_tokens_to_ids
    metric = Probability(torch.tensor([token(sample.answer) for sample in samples]))
    layers = [f"language_model.blocks.{layer}.attn" for layer in (*range(model.config.text.n_layers), "*")]
    scores = {
        what: sweep(model, inputs, [[BlockAttention(layer, positions="last", keys=keys)] for layer in layers], metric)
        for what, keys in blocked.items()
    }
    print(f"mean p(answer) over {n_samples} pictures: {metric(model(inputs)).mean():.3f}")
    print(f"{'the last position does not read':32}" + "".join(f"{what:>14}" for what in scores))
    for index, layer in enumerate(layers):
        print(f"{layer:32}" + "".join(f"{score[index].mean():14.3f}" for score in scores.values()))


def box_asked_about(sample: ShapesSample) -> tuple[int, int, int, int]:
    """Where the object is that the question asks about: left, top, right, bottom, in the picture's pixels."""
    return sample.objects[sample.about[0]].box


def another_box(sample: ShapesSample) -> tuple[int, int, int, int]:
    """Where another object is."""
    return next(thing.box for index, thing in enumerate(sample.objects) if index not in sample.about)


if __name__ == "__main__":
    main()
