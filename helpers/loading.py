"""Printed from fine_tuning_vlm_for_object_detection_trl.py: edit the script, then run `make sync`."""

import gc

import torch
from PIL import Image
from transformers import (
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


def load_model(model_id: str, quantized: bool, dtype: torch.dtype) -> PreTrainedModel:
    """Load Qwen2-VL, its language model in NF4 if `quantized`. Raises RuntimeError if vision was quantised too."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["model.visual", "lm_head"],  # the name is historic, it holds for 4 bits too
    )
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        model_id,
        dtype=dtype,
        attn_implementation="sdpa",
        device_map="auto" if torch.cuda.is_available() else "cpu",
        quantization_config=quantization if quantized else None,
    )
    check_quantization(model, quantized)
    return model


def check_quantization(model: PreTrainedModel, quantized: bool) -> None:
    """Raise RuntimeError unless 4-bit layers are in the language model, and only there."""
    found = [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    strays = [name for name in found if "language_model" not in name]
    if strays or bool(found) != quantized:
        raise RuntimeError(f"4-bit layers: {len(found)} in all, {strays[:3]} outside the language model.")


def release_memory() -> None:
    """Free what a finished function held. Models are in reference cycles with their trainers: `del` is not enough."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
