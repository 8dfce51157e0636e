"""Model and processor, in 4 bits or not; precision and memory.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

import ctypes
import gc
import os
import sys

import pandas as pd
import psutil
import torch
from bitsandbytes.nn import Linear4bit
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)

PACKAGES = ["torch", "transformers", "trl", "peft", "bitsandbytes", "datasets"]  # whose versions a result depends on


def best_dtype() -> torch.dtype:
    """bfloat16 where the GPU computes in it (emulation does not count), float16 on other GPUs, float32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_processor(model_id: str, max_pixels: int) -> ProcessorMixin:
    """The model's processor, with its pixel budget lowered to `max_pixels` if it is above.

    Raises ValueError when the budget is under the smallest image, or is not kept.
    """
    processor = AutoProcessor.from_pretrained(model_id)
    image_processor, size = processor.image_processor, processor.image_processor.size
    size["longest_edge"] = max_pixels = min(max_pixels, size["longest_edge"])
    if max_pixels < size["shortest_edge"]:
        raise ValueError(f"MAX_PIXELS={max_pixels} is under the processor's smallest image: {size['shortest_edge']}.")
    grid = image_processor(images=[Image.new("RGB", (4000, 3000))], return_tensors="pt")["image_grid_thw"]
    if grid.prod() * image_processor.patch_size**2 > max_pixels:
        raise ValueError(f"The budget of {size['longest_edge']} pixels is not kept: try another transformers version.")
    return processor


def pixel_budget(processor: ProcessorMixin) -> dict[str, int]:
    """The processor's settings as arguments of `resized_size`."""
    images, size = processor.image_processor, processor.image_processor.size
    limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    return {"factor": images.patch_size * images.merge_size} | limits


AREAS = ["visual", "language_model", "lm_head"]  # parts of the paths in `named_parameters`


def build_empty_model(model_id: str) -> PreTrainedModel:
    """The model without weights, on the meta device: names, shapes and counts cost no memory."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(model_id))


def area_of(name: str) -> str:
    """The area a parameter or module belongs to, by its path; "other" when it belongs to none."""
    return next((area for area in AREAS if area in name), "other")


def summarize_trainables_by_area(model: torch.nn.Module) -> pd.DataFrame:
    """Parameters of each area, and how many of them are trained. Packed 4-bit weights count as they are stored."""
    counts = [(area_of(name), p.numel(), p.numel() * p.requires_grad) for name, p in model.named_parameters()]
    table = pd.DataFrame(counts, columns=["area", "parameters", "trained"]).groupby("area").sum()
    table = table.reindex([*AREAS, "other"], fill_value=0)
    return pd.concat([table, table.sum().to_frame("total").T])


KEPT_MODULES = ("model.visual", "lm_head")  # not quantised


def load_model(model_id: str, quantized: bool, dtype: torch.dtype, kept_modules=KEPT_MODULES) -> PreTrainedModel:
    """Load a model, in NF4 but for `kept_modules` if `quantized`; weights that could run code (.bin) are not read.

    Raises RuntimeError if tensors were missing, which would be random now, or have another precision.
    """
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    nf4 |= {"bnb_4bit_compute_dtype": dtype, "llm_int8_skip_modules": list(kept_modules)}  # a historic name
    arguments = {"dtype": dtype, "attn_implementation": "sdpa", "device_map": choose_device_map()}
    arguments |= {"quantization_config": BitsAndBytesConfig(**nf4)} if quantized else {}
    arguments |= {"use_safetensors": True, "output_loading_info": True}
    model, found = AutoModelForImageTextToText.from_pretrained(model_id, **arguments)
    if found["missing_keys"]:
        raise RuntimeError(
            f"{model_id} lacks {len(found['missing_keys'])} tensors, {min(found['missing_keys'])} first."
        )
    check_placement(model)
    check_quantization(model, quantized, kept_modules)
    return model


def check_placement(model: torch.nn.Module) -> None:
    """Raise RuntimeError where a part of a model was put beside the GPUs, on CPU or disk."""
    aside = [name for name, p in model.named_parameters() if p.device.type != "cuda"]
    if torch.cuda.is_available() and aside:
        remedy = "Free memory on the GPUs, take more of them, or a smaller MODEL_ID"
        raise RuntimeError(f"The GPUs are full: {len(aside)} weights are not on them, {aside[0]} first. {remedy}.")


def choose_device_map() -> str | dict[str, int]:
    """CPU without a GPU; under torchrun the GPU of this process; else the layers are spread over all visible GPUs."""
    if not torch.cuda.is_available():
        return "cpu"
    return {"": int(os.environ["LOCAL_RANK"])} if "LOCAL_RANK" in os.environ else "auto"


def check_quantization(model: PreTrainedModel, quantized: bool, kept_modules=KEPT_MODULES) -> None:
    """Raise RuntimeError unless 4-bit layers are everywhere but in `kept_modules`, or nowhere if not `quantized`."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    wanted = {name: quantized and not name.startswith(tuple(kept_modules)) for name in linear}
    wrong = [name for name, module in linear.items() if isinstance(module, Linear4bit) != wanted[name]]
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
