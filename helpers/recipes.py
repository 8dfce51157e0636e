"""Which weights a recipe trains, and how.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from helpers.collators import COLLATORS
from helpers.loading import build_empty_model, summarize_trainables_by_area

LLM_LAYERS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
BITS = {"bf16": 16, "nf4": 4, "fp8": 8}  # precisions; bf16 stands for float16 or float32 where there is no bfloat16
VISION_LAYERS = r".*visual\.blocks\.\d+\.(attn\.qkv|mlp\.((linear_)?fc[12]|(gate|up|down)_proj))"  # of all families


@dataclass(frozen=True)
class TrainingRecipe:
    """One way to fine-tune: which weights, in which precision, how fast. Raises ValueError where that cannot work."""

    name: str
    description: str
    precision: str = "bf16"  # of the frozen layers of the language model, a key of BITS
    train_vision: str = "frozen"  # or "lora", or "full": all weights of the vision tower, merger included
    train_llm: str = "frozen"  # or "lora"
    lora_rank: int = 64
    lora_alpha: int = 128
    learning_rate: float = 1e-4  # peak; TRL's default for full fine-tuning (2e-5) is too slow for LoRA
    collator: str = "v2-assistant-only"  # a key of COLLATORS
    loss_function: Callable | None = None  # of a processor: the loss of logits and labels; None: cross-entropy
    stages: tuple[str, ...] = ()  # recipes to train one after the other, each from the weights of the one before

    def __post_init__(self):
        full, frozen = self.train_vision == "full", self.train_vision == self.train_llm == "frozen"
        known = self.train_vision in ("frozen", "lora", "full") and self.train_llm in ("frozen", "lora")
        problems = {
            "train_vision is frozen, lora or full, train_llm is frozen or lora": not known,
            f"collator is one of {', '.join(COLLATORS)}": self.collator not in COLLATORS,
            f"precision is one of {', '.join(BITS)}": self.precision not in BITS,
            "it either trains something or has stages": frozen != bool(self.stages),
            "4-bit or 8-bit weights cannot be saved as a full checkpoint": self.precision != "bf16" and full,
            "with LoRA, all else is frozen: train one after the other, in stages": full and self.train_llm == "lora",
            "lora_rank and learning_rate are positive": self.lora_rank < 1 or self.learning_rate <= 0,
        }
        if found := [problem for problem, is_there in problems.items() if is_there]:
            raise ValueError(f"Recipe {self.name!r}: {found[0]}.")

    @property
    def quantized(self) -> bool:
        """Whether the language model is loaded in 4 bits; to 8 bits it is converted after loading."""
        return self.precision == "nf4"

    @property
    def lora_target_modules(self) -> str | None:
        """Regular expression on the paths of the layers that get LoRA; None without LoRA."""
        towers = {LLM_LAYERS: self.train_llm, VISION_LAYERS: self.train_vision}
        return "|".join(f"({layers})" for layers, mode in towers.items() if mode == "lora") or None


R1 = TrainingRecipe("r1-llm-only", "QLoRA on the language model", precision="nf4", train_llm="lora")
R2 = TrainingRecipe("r2-vision-only", "all weights of the vision tower", train_vision="full", learning_rate=1e-5)
R3 = TrainingRecipe("r3-two-stage", "r2, then r1 from its weights", stages=("r2-vision-only", "r1-llm-only"))
R4 = replace(R1, name="r4-joint", description="r1 and LoRA on the vision tower", train_vision="lora")
CATALOGUE = {recipe.name: recipe for recipe in (R1, R2, R3, R4)}


def apply_freeze_policy(model: PreTrainedModel, recipe: TrainingRecipe) -> None:
    """Freeze everything but a vision tower that is trained whole; adapters are added later, by PEFT.

    A frozen tower runs without building a backward graph, which gradient checkpointing would otherwise make it do.
    """
    visual = model.model.visual
    model.requires_grad_(False)
    visual.requires_grad_(recipe.train_vision == "full")
    if recipe.train_vision == "frozen":
        visual.forward = torch.no_grad()(visual.forward)


def build_lora_config_for_recipe(recipe: TrainingRecipe) -> LoraConfig | None:
    """PEFT's settings for a recipe; None where it trains no adapter."""
    layers, rank, alpha = recipe.lora_target_modules, recipe.lora_rank, recipe.lora_alpha
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, task_type="CAUSAL_LM") if layers else None


def count_trainables(model_id: str, recipe: TrainingRecipe) -> pd.DataFrame:
    """`summarize_trainables_by_area` of a recipe, without loading weights."""
    model = build_empty_model(model_id)
    apply_freeze_policy(model, recipe)
    config = build_lora_config_for_recipe(recipe)
    return summarize_trainables_by_area(model if config is None else get_peft_model(model, config))
