"""What four bits do to a model's boxes, and the memory that a training takes.

Printed from notebooks/06_quantization_and_trainable_params.py: edit that, then run `make sync`.
"""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import PreTrainedModel, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from helpers.loading import AREAS, KEPT_MODULES, area_of
from helpers.metrics import boxes_of, match_boxes, resample_weights
from helpers.recipes import TrainingRecipe


def score_agreement(record: dict, reference: dict) -> float:
    """Mean IoU of the boxes of one image's `reference` with those of another model's `record`, one to one.

    A box that is missing counts as 0, one too many does not count, nor do labels. Without boxes in `reference` it is 1
    where the other model found nothing either, else 0.
    """
    wanted, boxes = boxes_of(reference, "prediction"), boxes_of(record, "prediction")
    return float(np.mean(match_boxes(wanted, boxes))) if wanted else float(not boxes)


def measure_agreement(records: Sequence[dict], reference: Sequence[dict]) -> float:
    """Mean of `score_agreement` over the images; 1 means that every box is the same."""
    return float(np.mean([score_agreement(*pair) for pair in zip(records, reference, strict=True)]))


def bootstrap_agreement(records: Sequence[dict], reference: Sequence[dict]) -> np.ndarray:
    """`measure_agreement` on resamples of the images: the same ones for every model, so differences are paired."""
    weights = np.concatenate(list(resample_weights(reference)))
    scores = [score_agreement(*pair) for pair in zip(records, reference, strict=True)]
    return weights @ np.array(scores) / weights.sum(axis=1)


def summarize_memory(model: PreTrainedModel) -> pd.DataFrame:
    """Weights of a model by area: megabytes with scales, the types they are stored in, how many layers in 4 bits."""
    lines = []
    for area in [*AREAS, "other"]:
        tensors = [p for name, p in model.named_parameters() if area_of(name) == area]
        kinds = sorted({str(p.dtype).removeprefix("torch.") for p in tensors})
        layers = [m for name, m in model.named_modules() if area_of(name) == area and isinstance(m, torch.nn.Linear)]
        packed = sum(isinstance(m, Linear4bit) for m in layers)
        megabytes = sum(p.numel() * p.element_size() + count_scale_bytes(p) for p in tensors) / 1e6
        lines.append([area, megabytes, ", ".join(kinds), f"{packed} of {len(layers)}"])
    table = pd.DataFrame(lines, columns=["area", "megabytes", "stored as", "layers in 4 bits"]).set_index("area")
    return table if table["stored as"]["other"] else table.drop("other")


def count_scale_bytes(parameter: torch.nn.Parameter) -> int:
    """Bytes of the scales that a 4-bit weight is kept with; 0 for other weights."""
    state = parameter.quant_state if isinstance(parameter, Params4bit) else None
    if state is None:
        return 0
    return state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)


BITS_IN_NF4 = 4 + 8 / 64 + 32 / (64 * 256)  # a weight, its share of an 8-bit scale, that scale's share of a 32-bit one


def count_lora_numbers(model: torch.nn.Module, recipe: TrainingRecipe) -> int:
    """How many numbers LoRA adds to a model, by a recipe; the model may be on the meta device."""
    if recipe.lora_target_modules is None:
        return 0
    targets = re.compile(recipe.lora_target_modules)
    layers = [module for name, module in model.named_modules() if targets.fullmatch(name)]
    return recipe.lora_rank * sum(layer.in_features + layer.out_features for layer in layers)


def estimate_memory(model: torch.nn.Module, recipe: TrainingRecipe | None, itemsize: int = 2) -> dict[str, float]:
    """Bytes that a training takes before any activation, by what they hold; the model may be on the meta device.

    Without a recipe all weights are trained. What is trained is in float32, what is frozen in NF4 if the recipe
    quantises it, else it takes `itemsize` bytes a number.
    """
    numbers = {"kept": 0, "packed": 0, "trained": 0 if recipe is None else count_lora_numbers(model, recipe)}
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, parameter in model.named_parameters():
        trained = recipe is None or (recipe.train_vision == "full" and area_of(name) == "visual")
        packed = not trained and recipe.quantized and name in linear and not name.startswith(KEPT_MODULES)
        numbers["trained" if trained else "packed" if packed else "kept"] += parameter.numel()
    return {
        "frozen, kept": numbers["kept"] * itemsize,
        "frozen, NF4": numbers["packed"] * BITS_IN_NF4 / 8,
        "trained, float32": numbers["trained"] * 4,
        "gradients": numbers["trained"] * 4,
        "AdamW's averages": numbers["trained"] * 8,
    }


def describe_text(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int) -> dict:
    """The shape of a language model, under the names of its configuration."""
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "vocab_size": vocab,
    }  # fmt: skip


PUBLISHED_SIZES = {  # the configurations of Qwen2-VL on the hub; the smallest uses one matrix as embedding and lm_head
    "2B": (describe_text(1536, 28, 12, 2, 8960, 151936), True),
    "7B": (describe_text(3584, 28, 28, 4, 18944, 152064), False),
    "72B": (describe_text(8192, 80, 64, 8, 29568, 152064), False),
}


def build_published_model(size: str) -> PreTrainedModel:
    """Qwen2-VL in one of its published sizes, without weights, on the meta device."""
    text, tied = PUBLISHED_SIZES[size]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": text["hidden_size"], "mlp_ratio": 4, "num_heads": 16}
    text = text | {"rope_parameters": rope, "tie_word_embeddings": tied}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    with torch.device("meta"):
        return Qwen2VLForConditionalGeneration(config)
