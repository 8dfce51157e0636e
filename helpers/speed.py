"""What makes training fast: a memory plan, micro-batches, compiled layers, kept features, 8 bits.

Printed from fine_tuning_vlm_for_object_detection_trl.py: edit that, then run `make sync`.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import safetensors.torch
import torch
import xxhash
from torch.nn.functional import embedding, scaled_dot_product_attention
from torch.utils._triton import has_triton
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures as VisionOutput

from helpers.generation import Detector
from helpers.loading import best_dtype
from helpers.recipes import TrainingRecipe
from helpers.runs import write_file


@dataclass(frozen=True)
class MemoryPlan:
    """How a step is computed: images at once, whether activations are computed twice, the estimated peak in bytes."""

    micro_batch_size: int
    checkpointing: bool
    peak: float


def count_activations(model: PreTrainedModel, recipe: TrainingRecipe, checkpointing: bool, max_pixels: int) -> float:
    """Numbers that the backward pass needs of one image of `max_pixels` pixels and its conversation; from above."""
    text, vision = model.config.get_text_config(), model.config.vision_config
    patches = max_pixels / vision.patch_size**2
    tokens = patches / vision.spatial_merge_size**2 + 128
    block = model.model.visual.blocks[0]
    vision_width = block.attn.qkv.in_features
    inner = max(layer.out_features for layer in block.mlp.modules() if isinstance(layer, torch.nn.Linear))
    attention = model.model.language_model.layers[0].self_attn  # in Qwen3 queries and keys are normalised
    queries = attention.q_proj.out_features if "q_norm" in dict(attention.named_children()) else 0
    sizes = text.hidden_size, text.intermediate_size, queries, text.num_hidden_layers
    towers = [(tokens, *sizes, recipe.train_llm != "frozen")]
    if recipe.train_vision != "frozen":
        towers.append((patches, vision_width, inner, 0, vision.depth, True))
    total, largest = 0.0, 0.0
    for count, width, inner, queries, depth, is_trained in towers:
        layer = count * (3.5 * queries + (6 * width + 3.6 * inner if is_trained else 4 * width + 2.5 * inner))
        total += depth * (count * width if checkpointing else layer)
        largest = max(largest, layer)
    return total + 3 * largest if checkpointing else total


def count_trained(model: PreTrainedModel, recipe: TrainingRecipe) -> int:
    """Numbers that a recipe will train: rank x (in + out) for each layer with LoRA, or all of the vision tower."""
    pattern = re.compile(recipe.lora_target_modules or "nothing")
    layers = [layer for name, layer in model.named_modules() if pattern.fullmatch(name)]
    whole = sum(p.numel() for p in model.model.visual.parameters()) if recipe.train_vision == "full" else 0
    return whole + sum(recipe.lora_rank * (layer.in_features + layer.out_features) for layer in layers)


def free_memory() -> int:
    """Bytes that can still be taken, of all visible GPUs together; without a GPU, of the machine's memory.

    Under torchrun a process has one of the GPUs.
    """
    if not torch.cuda.is_available():
        return psutil.virtual_memory().available
    if "LOCAL_RANK" in os.environ:
        return torch.cuda.mem_get_info(int(os.environ["LOCAL_RANK"]))[0]
    return sum(torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count()))


def can_compile(settings: SimpleNamespace) -> bool:
    """Whether layers are to be compiled: as COMPILE says, else where there is a GPU that it works on."""
    if settings.compile is not None:
        return settings.compile
    if torch.cuda.is_available() and not has_triton():
        print("layers are not compiled: Triton is missing or does not know this GPU")
    return torch.cuda.is_available() and has_triton()


def plan_memory(detector: Detector, recipe: TrainingRecipe, settings: SimpleNamespace, free: float) -> MemoryPlan:
    """The largest micro-batch that fits into 95 % of `free` bytes without checkpointing; if that is under 4, with it.

    MICRO_BATCH_SIZE and GRADIENT_CHECKPOINTING of the settings take its place where they are given.
    """
    pixels = detector.task.pixel_budget["max_pixels"]
    # in float32: weight, gradient, two moments; a vision tower that is trained whole was loaded in 16 bits before
    fixed = count_trained(detector.model, recipe) * (14 if recipe.train_vision == "full" else 16)
    sizes = [settings.micro_batch_size] if settings.micro_batch_size else halvings(settings.batch_size)
    asked, plans = settings.gradient_checkpointing, []
    for checkpointing in [False, True] if asked is None else [asked]:
        image = best_dtype().itemsize * count_activations(detector.model, recipe, checkpointing, pixels)
        image *= 1 if can_compile(settings) else 1.5  # layers that are not compiled keep more
        plans += [MemoryPlan(size, checkpointing, fixed + size * image) for size in sizes]
    enough = min(4, sizes[0])
    fitting = [plan for plan in plans if plan.peak < 0.95 * free]
    return next((p for p in fitting if p.checkpointing or p.micro_batch_size >= enough), plans[-1])


def describe_plan(plan: MemoryPlan) -> str:
    """What was planned, in a sentence."""
    how = "activations computed twice" if plan.checkpointing else "activations kept"
    return f"{plan.micro_batch_size} images at once, {how}: about {plan.peak / 2**30:.1f} GiB besides the loaded model"


def halvings(size: int) -> list[int]:
    """16, 8, 4, 2, 1 for 16."""
    return [size, *halvings(size // 2)] if size > 1 else [1]


def split_batch(batch: dict[str, torch.Tensor], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of `size` rows of like length, the longest first; columns that none of the rows uses are cut off.

    `batch` is what a collator made, one image a row; rows stay a multiple of 8 tokens long.
    """
    if len(batch["input_ids"]) <= size:
        return (yield batch)
    mask, grid = batch["attention_mask"].bool(), batch["image_grid_thw"]
    images = batch["pixel_values"].split(grid.prod(dim=1).tolist())
    for rows in mask.sum(dim=1).argsort(descending=True, stable=True).split(size):
        columns = slice(8 * math.ceil(mask[rows].sum(dim=1).max().item() / 8))  # padding is on the right
        part = {name: tensor[rows, columns] for name, tensor in batch.items() if tensor.shape[:2] == mask.shape}
        yield part | {"pixel_values": torch.cat([images[row] for row in rows]), "image_grid_thw": grid[rows]}


def describe_compilation() -> str:
    """What torch.compile made of the layers since `compile_layers`."""
    counters = torch._dynamo.utils.counters
    breaks = sum(counters["graph_break"].values())
    return f"compiled {counters['frames']['ok']} of {counters['frames']['total']} frames, {breaks} graph breaks"


def compile_layers(model: PreTrainedModel, recipe: TrainingRecipe) -> None:
    """Compile each decoder layer, and each block of a vision tower that is trained. Raises where it falls back."""
    torch._dynamo.reset()  # what was compiled for another recipe counts towards the limit of recompilations
    torch._dynamo.utils.counters.clear()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._inductor.config.emulate_precision_casts = True  # rounds where layers that are not compiled round
    blocks = [] if recipe.train_vision == "frozen" else model.model.visual.blocks
    for layer in [*model.model.language_model.layers, *blocks]:
        layer.compile()


def hash_tensors(tensors: Iterable[torch.Tensor]) -> str:
    """xxHash of the bytes of some tensors, in hexadecimal digits."""
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def cache_features(visual: PreTrainedModel, folder: Path) -> None:
    """Let a frozen vision tower compute the features of each image once; they are kept in `folder`.

    Images go through it one at a time and without autocast, so that their features do not depend on the batch.
    """
    compute, weights = visual.forward, hash_tensors(visual.parameters())

    def recall(patches: torch.Tensor, grid: torch.Tensor) -> list[torch.Tensor]:
        file = folder / weights / f"{hash_tensors([patches, grid])}.safetensors"
        try:
            return list(safetensors.torch.load_file(file, device=str(patches.device)).values())
        except FileNotFoundError:
            with torch.autocast(patches.device.type, enabled=False):
                output = compute(patches, grid_thw=grid, return_dict=True)
            features = [output.pooler_output, *output.get("deepstack_features", [])]
            named = {f"{place}": tensor.contiguous() for place, tensor in enumerate(features)}
            write_file(file, safetensors.torch.save(named))
            return features

    def forward(hidden_states: torch.Tensor, grid_thw: torch.Tensor, **options) -> VisionOutput:
        images = zip(hidden_states.split(grid_thw.prod(dim=1).tolist()), grid_thw.split(1), strict=True)
        first, *others = map(torch.cat, zip(*(recall(*image) for image in images), strict=True))
        return VisionOutput(pooler_output=first, deepstack_features=others)

    visual.forward = forward


PACKED = "packed_sdpa_not_flash"  # transformers hands the lengths of the images to names that hold "flash"


def attend_images(module, query, key, value, attention_mask=None, cu_seq_lens_q=None, max_length_q=None, **options):
    """Attention within each of several packed images or windows, (1, heads, patches, width); all of them at once."""
    images, packed = len(cu_seq_lens_q) - 1, [tensor.squeeze(0) for tensor in (query, key, value)]
    places = torch.arange(query.shape[2], device=query.device)
    if images * max_length_q == query.shape[2]:  # the mean length is the largest: all are equal
        stacked = [tensor.unflatten(1, (images, max_length_q)).transpose(0, 1) for tensor in packed]
        return scaled_dot_product_attention(*stacked).transpose(1, 2).flatten(0, 1)[None], None
    starts, ends = cu_seq_lens_q[:-1, None], cu_seq_lens_q[1:, None]
    filled = starts + torch.arange(8 * math.ceil(max_length_q / 8), device=query.device)  # (images, longest)
    # the backward pass of `embedding` is faster than that of an index
    stacked = [embedding(filled.clamp(max=len(places) - 1), tensor.transpose(0, 1).flatten(1)) for tensor in packed]
    stacked = [tensor.unflatten(2, (query.shape[1], -1)).transpose(1, 2) for tensor in stacked]
    attended = scaled_dot_product_attention(*stacked, (filled < ends)[:, None, None]).transpose(1, 2)
    image = torch.bucketize(places, ends.flatten(), right=True)
    return attended[image, places - starts.flatten()[image]][None], None


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let the vision tower attend through `attend_images`."""
    AttentionInterface.register(PACKED, attend_images)
    model.model.visual.config._attn_implementation = PACKED


def to_float8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in 8 bits, and what to multiply each with to get it back: (rows, 1), float32."""
    scale = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (rows / scale).to(torch.float8_e4m3fn), scale


class Float8Product(torch.autograd.Function):
    """x W^T with both in 8 bits, a scale for each row; the gradient of x in the same way, none for W."""

    @staticmethod
    def forward(context, x, weight, weight_transposed, scale):
        context.save_for_backward(weight_transposed, scale)
        rows, row_scale = to_float8(x.flatten(0, -2))
        product = torch._scaled_mm(rows, weight.t(), row_scale, scale, out_dtype=x.dtype, use_fast_accum=True)
        return product.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(context, gradient):
        weight_transposed, scale = context.saved_tensors
        rows, row_scale = to_float8(gradient.flatten(0, -2) * scale.to(gradient.dtype))  # W's rows are its columns
        ones, dtype = torch.ones(1, weight_transposed.shape[0], device=gradient.device), gradient.dtype
        product = torch._scaled_mm(rows, weight_transposed.t(), row_scale, ones, out_dtype=dtype, use_fast_accum=True)
        return product.unflatten(0, gradient.shape[:-1]), None, None, None


class Float8Linear(torch.nn.Linear):
    """A frozen linear layer in 8 bits. The matrix is kept twice, since the GPU reads the second factor by columns."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = Float8Product.apply(x.bfloat16(), self.weight, self.weight_transposed, self.scale)
        return product if self.bias is None else product + self.bias


def convert_to_float8(model: torch.nn.Module) -> None:
    """Turn every frozen linear layer of the language model into one of 8 bits, where the GPU can multiply them."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        return print("8-bit products need an Ada or Hopper GPU: the language model stays in 16 bits")
    for name, layer in model.named_modules():
        if type(layer) is torch.nn.Linear and "language_model" in name and "lora_" not in name:
            quantized, scale = to_float8(layer.weight.data)
            layer.__class__, layer.weight = Float8Linear, torch.nn.Parameter(quantized, requires_grad=False)
            layer.register_buffer("weight_transposed", quantized.t().contiguous(), persistent=False)
            layer.register_buffer("scale", scale.t().contiguous(), persistent=False)
