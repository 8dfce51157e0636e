"""Printed from fine_tuning_vlm_for_object_detection_trl.py: edit the script, then run `make sync`."""

import ctypes
import gc
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import psutil
import torch
from peft import PeftModel
from PIL import Image
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    PreTrainedModel,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)


def best_dtype() -> torch.dtype:
    """bfloat16 where the GPU computes in it (emulation does not count), float16 on other GPUs, float32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_processor(model_id: str, max_pixels: int) -> Qwen2VLProcessor:
    """The model's processor, with its pixel budget lowered to `max_pixels` if it is above.

    Raises ValueError when the budget is under the smallest picture, or is not kept.
    """
    processor = Qwen2VLProcessor.from_pretrained(model_id)
    image_processor, size = processor.image_processor, processor.image_processor.size
    size["longest_edge"] = min(max_pixels, size["longest_edge"])
    if size["longest_edge"] < size["shortest_edge"]:
        raise ValueError(
            f"MAX_PIXELS={max_pixels} is under the processor's smallest picture: {size['shortest_edge']}."
        )
    grid = image_processor(images=[Image.new("RGB", (4000, 3000))], return_tensors="pt")["image_grid_thw"]
    if grid.prod() * image_processor.patch_size**2 > size["longest_edge"]:
        raise ValueError(f"The budget of {size['longest_edge']} pixels is not kept: try another transformers version.")
    return processor


AREAS = ["visual", "language_model", "lm_head"]  # parts of the paths in `named_parameters`


def build_empty_model(model_id: str) -> PreTrainedModel:
    """The model without weights, on the meta device: names, shapes and counts cost no memory."""
    with torch.device("meta"):
        return Qwen2VLForConditionalGeneration(AutoConfig.from_pretrained(model_id))


def area_of(name: str) -> str:
    """The area a parameter or module belongs to, by its path; "other" when it belongs to none."""
    return next((area for area in AREAS if area in name), "other")


def list_linear_modules(model: torch.nn.Module, prefix: str = "") -> pd.DataFrame:
    """The linear layers below `prefix`: path with `{i}` for layer numbers, how many of them, their shape."""
    found = Counter(
        (re.sub(r"\.\d+\.", ".{i}.", name), module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(prefix)
    )
    lines = [(*key, count) for key, count in found.items()]
    return pd.DataFrame(lines, columns=["module", "in", "out", "count"]).set_index("module")


def find_modules_by_pattern(model: torch.nn.Module, pattern: str) -> list[str]:
    """Paths of the modules that a regular expression matches in full, as PEFT matches `target_modules`."""
    return [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]


def summarize_trainables_by_area(model: torch.nn.Module) -> pd.DataFrame:
    """Parameters of each area, and how many of them are trained. Packed 4-bit weights count as they are stored."""
    counts = {area: [0, 0] for area in [*AREAS, "other"]}
    for name, parameter in model.named_parameters():
        counts[area_of(name)][0] += parameter.numel()
        counts[area_of(name)][1] += parameter.numel() * parameter.requires_grad
    table = pd.DataFrame.from_dict(counts, orient="index", columns=["parameters", "trained"])
    table.loc["total"] = table.sum()
    return table


KEPT_MODULES = ("model.visual", "lm_head")  # not quantised


def load_model(
    model_id: str, quantized: bool, dtype: torch.dtype, kept_modules: Sequence[str] = KEPT_MODULES
) -> PreTrainedModel:
    """Load Qwen2-VL, in NF4 but for `kept_modules` if `quantized`. Raises RuntimeError if it came out otherwise."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(kept_modules),  # the name is historic, it holds for 4 bits too
    )
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        model_id,
        dtype=dtype,
        attn_implementation="sdpa",
        device_map=choose_device_map(),
        quantization_config=quantization if quantized else None,
    )
    check_quantization(model, quantized, kept_modules)
    return model


def choose_device_map() -> str | dict[str, int]:
    """CPU without a GPU; under torchrun the GPU of this process; else the layers are spread over all visible GPUs."""
    if not torch.cuda.is_available():
        return "cpu"
    return {"": int(os.environ["LOCAL_RANK"])} if "LOCAL_RANK" in os.environ else "auto"


def check_quantization(model: PreTrainedModel, quantized: bool, kept_modules: Sequence[str] = KEPT_MODULES) -> None:
    """Raise RuntimeError unless 4-bit layers are everywhere but in `kept_modules`, or nowhere if not `quantized`."""
    linear = {n: type(m).__name__ == "Linear4bit" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    wrong = [n for n, packed in linear.items() if packed != (quantized and not n.startswith(tuple(kept_modules)))]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(linear)} linear layers have the wrong precision, first {wrong[0]}.")


def release_memory() -> None:
    """Free what a finished function held. Models are in reference cycles with their trainers: `del` is not enough."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # the C library keeps what was freed unless it is asked


def allocated_megabytes() -> float:
    """Memory that tensors hold on all GPUs; without a GPU, the memory that this process holds."""
    if torch.cuda.is_available():
        return sum(torch.cuda.memory_allocated(gpu) for gpu in range(torch.cuda.device_count())) / 1e6
    return psutil.Process().memory_info().rss / 1e6


def summarize_memory(model: PreTrainedModel) -> pd.DataFrame:
    """Weights of a model by area: megabytes, the types they are stored in, and how many layers are in 4 bits."""
    lines = []
    for area in AREAS:
        tensors = [p for name, p in model.named_parameters() if area in name]
        kinds = sorted({str(p.dtype).removeprefix("torch.") for p in tensors})
        layers = [m for name, m in model.named_modules() if area in name and isinstance(m, torch.nn.Linear)]
        packed = sum(type(m).__name__ == "Linear4bit" for m in layers)
        megabytes = sum(p.numel() * p.element_size() for p in tensors) / 1e6
        lines.append([area, round(megabytes, 2), ", ".join(kinds), f"{packed} of {len(layers)}"])
    return pd.DataFrame(lines, columns=["area", "megabytes", "stored as", "layers in 4 bits"]).set_index("area")


def load_trained_model(folder: Path, quantized: bool | None = None) -> PreTrainedModel:
    """A full checkpoint, or an adapter on its base, whose precision `quantized` can override.

    Which of the two it is shows by the files in `folder`. An adapter computes in the precision of its base, as it did
    in training; its weights come in float32, which would be slower on a GPU.
    """
    recipe = json.loads((folder / "recipe.json").read_text())
    quantized = recipe["quantized"] if quantized is None else quantized
    if not (folder / "adapter_config.json").exists():
        return load_model(str(folder), quantized, best_dtype()).eval()
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    adapted = PeftModel.from_pretrained(load_model(base, quantized, best_dtype()), str(folder))
    return adapted.to(best_dtype()).eval()
