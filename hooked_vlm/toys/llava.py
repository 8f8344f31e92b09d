"""How a LLaVA becomes ``toy-llava``.

Two things are special about it. Every row carries 36 image tokens; but they come first, and nothing depends on what
follows it, so all questions about a picture share them in one packed sequence. And through the language model alone its
vision tower hardly learns: after 1,000 steps circles and squares were still the same to both, presumably because
neither gains from telling them apart before the other does. LLaVA's own tower is a CLIP, which knows words before the
language model sees it; here the image tokens learn to name what they show, for less than a minute, before the first
question.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from hooked_vlm.data.scene import CELL, COLORS, GRID, IMAGE_SIZE, SHAPES
from hooked_vlm.data.shapes import sample
from hooked_vlm.toys.lessons import Batch, pixel_values, vocabulary
from hooked_vlm.toys.recipe import Recipe, initialise

FOLDER = "toy-llava"
RECIPE = Recipe(
    steps=3000, learning_rate=1e-3, primers=4, float32_steps=200, naming_steps=150, vision_layers=4, text_layers=5
)
END = "</s>"
CONTINUES_PROMPT = True
IMAGE_TOKEN = "<image>"
BEFORE_QUESTION, AFTER_QUESTION = f"USER: {IMAGE_TOKEN}\n", " ASSISTANT:"
SPECIAL_TOKENS = ("<pad>", "<s>", END, "<unk>", IMAGE_TOKEN)
CONTEXT = 256

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] != 'system' %}{{ message['role'] | upper + ': ' }}{% endif -%}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor -%}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif -%}"""
"""In effect that of llava-hf's LLaVA-1.5: of each message the role, all images, all text."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word. The newline after the images is one too; other white space only separates."""
    words = vocabulary((*SPECIAL_TOKENS, "\n", "USER:", "ASSISTANT:"))
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), behavior="removed"),
            pre_tokenizers.Split(Regex(r"[\n?]"), behavior="isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", words["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=END,
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """HF's processor, for pictures of the toy's own size: they pass through it unresized."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
        build_tokenizer(),
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(recipe: Recipe) -> LlavaForConditionalGeneration:
    """HF's model, freshly initialised. As in LLaVA-1.5, the vision tower's last layer is there but not looked at."""
    tokenizer = build_tokenizer()
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    heads = recipe.d_model // recipe.d_head
    vision = CLIPVisionConfig(
        hidden_size=recipe.d_model,
        intermediate_size=4 * recipe.d_model,
        projection_dim=recipe.d_model,
        num_hidden_layers=recipe.vision_layers,
        num_attention_heads=heads,
        image_size=IMAGE_SIZE,
        patch_size=CELL,
    )
    text = LlamaConfig(
        hidden_size=recipe.d_model,
        intermediate_size=8 * recipe.d_model // 3,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        **ends,
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=GRID**2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**ends)
    initialise(model, recipe, [model.model.vision_tower.embeddings.class_embedding])
    # No norm comes between the words and the residual stream that the layers write to: they are of one scale.
    with torch.no_grad():
        nn.init.normal_(model.get_input_embeddings().weight)
    # On a CPU, in bfloat16, going back through the fused attention took three times as long.
    model.set_attn_implementation("eager")
    return model


def prompt(question: str) -> str:
    """What the processor is given: the chat template's text for one picture and a question."""
    return BEFORE_QUESTION + question + AFTER_QUESTION


def before_questions(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, recipe: Recipe, log: Callable[[str], None]
) -> None:
    """Teach every image token with an object in it to point at the words for the object's color and for its shape."""
    optimizer = recipe.optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    colors, shapes = (processor.tokenizer.convert_tokens_to_ids(list(names)) for names in (COLORS, SHAPES))
    for step in range(recipe.naming_steps):
        # The samples that follow those of the questions.
        first = (recipe.steps + step) * recipe.samples_per_step
        samples = [sample(recipe.seed, first + index) for index in range(recipe.samples_per_step)]
        scenes = [scene for one in samples for scene in (one.scene, one.sip.scene)]
        pictures = [picture for picture, scene in enumerate(scenes) for _ in scene.objects]
        objects = [item for scene in scenes for item in scene.objects]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = image_features(model, pixel_values(scenes, processor.image_processor))
        tokens = features[pictures, [item.cell_index for item in objects]].float()
        scores = tokens @ model.get_input_embeddings().weight.T * recipe.d_model**-0.5
        loss = F.cross_entropy(scores[:, colors], torch.tensor([list(COLORS).index(item.color) for item in objects]))
        loss = loss + F.cross_entropy(scores[:, shapes], torch.tensor([SHAPES.index(item.shape) for item in objects]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if (step + 1) % 50 == 0:
            log(f"naming {step + 1:4d}  loss {loss.item():.4f}")


def image_features(
    model: LlavaForConditionalGeneration, pixels: Float[torch.Tensor, "picture 3 height width"]
) -> Float[torch.Tensor, "picture patch d_model"]:
    """What the language model reads in the places of a picture's image tokens."""
    return torch.stack(list(model.get_image_features(pixels).pooler_output))


def parts(batch: Batch, step: int) -> list[Batch]:
    """The batch as it is: padding never reaches what comes before it."""
    return [batch]


def answer_logits(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, batch: Batch
) -> Float[torch.Tensor, "row 2 vocabulary"]:
    """Logits after ``ASSISTANT:`` and after ``ASSISTANT: answer``.

    A picture's rows lie behind its image tokens one after the other, each at the positions and with the mask that it
    would have alone.
    """
    asked = zip(batch.questions, batch.answers, strict=True)
    rows = tokenizer(
        [f"{question.text}{AFTER_QUESTION} {answer}" for question, answer in asked],
        add_special_tokens=False,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    n_rows, length = rows.input_ids.shape
    # Which of its picture's rows each one is.
    slots = torch.arange(n_rows) - torch.searchsorted(batch.pictures, batch.pictures)
    packed = torch.full((len(batch.pixel_values), int(slots.max()) + 1, length), tokenizer.pad_token_id)
    packed[batch.pictures, slots] = rows.input_ids

    embed, features = model.get_input_embeddings(), image_features(model, batch.pixel_values)
    before, after = (
        embed(tokenizer(text, return_tensors="pt", add_special_tokens=begins).input_ids).expand(len(packed), -1, -1)
        for text, begins in zip(BEFORE_QUESTION.split(IMAGE_TOKEN), (True, False), strict=True)
    )
    shared = torch.cat([before, features.to(before), after], 1)
    place = torch.arange(packed[0].numel())
    offset = shared.shape[1]
    # Numbers of rows, with the shared beginning as row -1.
    row = torch.cat([torch.full((offset,), -1), place // length])
    position = torch.cat([torch.arange(offset), offset + place % length])
    sees = ((row[:, None] == row) & (position[:, None] >= position)) | (row == -1) & (row[:, None] > -1)
    states = model.model.language_model(
        inputs_embeds=torch.cat([shared, embed(packed.flatten(1))], 1),
        attention_mask=torch.where(sees, 0.0, torch.finfo(torch.float32).min)[None, None],
        position_ids=position.expand(len(packed), -1),
        use_cache=False,
    ).last_hidden_state
    last = offset + slots * length + rows.attention_mask.sum(1) - 1
    ends = torch.stack([last - 1, last], 1)
    return model.lm_head(states[batch.pictures[:, None], ends])
