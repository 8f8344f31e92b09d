"""Which heads carry the answer? Patch each cross-attention head of the toy, alone, into runs on other pictures.

    python examples/patch_heads.py [SAMPLES]

A number is the mean normalised logit difference: 0 where the patched run answers as on the counterfactual picture, 1
where it answers as on the clean one.
"""

import sys

import torch

from hooked_vlm import HookedVLM
from hooked_vlm.data import generate
from hooked_vlm.edits import Replace
from hooked_vlm.metrics import LogitDifference, normalized
from hooked_vlm.sweep import sweep


@torch.no_grad()
def main() -> None:
    """Print a table: attention layers down, heads across."""
    n_samples = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    model = HookedVLM.from_pretrained("toy-blip-vqa")
    samples = list(generate(n_samples, seed=7, kinds=("color",)))
    questions = [sample.question for sample in samples]
    clean = model.prepare([sample.image for sample in samples], questions)
    corrupted = model.prepare([sample.sip.image for sample in samples], questions)

    token = model.processor.tokenizer.convert_tokens_to_ids
    metric = LogitDifference(
        torch.tensor([token(sample.answer) for sample in samples]),
        torch.tensor([token(sample.sip.answer) for sample in samples]),
    )
    logits, cache = model.run_with_cache(clean, names_filter="*.cross_attn.hook_z")
    sites = list(cache)
    n_heads = model.config.text.n_heads
    heads = [[Replace(site, cache, heads=head)] for site in sites for head in range(n_heads)]
    scores = sweep(model, corrupted, heads, metric)
    parts = normalized(scores, metric(logits), metric(model(corrupted))).nanmean(1).view(len(sites), n_heads)

    print(f"{'':48}" + "".join(f"{f'head {head}':>9}" for head in range(n_heads)))
    for site, row in zip(sites, parts.tolist(), strict=True):
        print(f"{site:48}" + "".join(f"{part:9.3f}" for part in row))
    layer, head = divmod(int(parts.argmax()), n_heads)
    print(f"strongest: head {head} at {sites[layer]}, mean over {n_samples} pictures")


if __name__ == "__main__":
    main()
