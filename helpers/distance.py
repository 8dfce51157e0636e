"""A loss that knows that 499 is near 500.

Printed from notebooks/07_beyond_sft.py: edit that, then run `make sync`.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate

import numpy as np
import torch
from transformers import ProcessorMixin

from helpers.parsing import BOX
from helpers.recipes import TrainingRecipe

SPREAD = 5.0  # standard deviation of a target, in units of the coordinates
DIGITS = "0123456789"


@cache
def spread_digits(value: int, spread: float) -> np.ndarray:
    """Targets for the tokens that write a whole number, (digits, 10): the share of each digit at each place.

    Numbers near `value` and as long as it weigh as in a normal distribution. The shares of a place are those of the
    numbers that agree with `value` in all places before it, since these are what the model has read by then.
    """
    written, reach = str(value), math.ceil(4 * spread)
    numbers = [str(number) for number in range(max(0, value - reach), value + reach + 1)]
    targets = np.zeros((len(written), 10))
    for number in (number for number in numbers if len(number) == len(written)):
        weight = math.exp(-(((int(number) - value) / spread) ** 2) / 2)
        for place in range(len(written)):
            targets[place, int(number[place])] += weight * (number[:place] == written[:place])
    return targets / targets.sum(axis=1, keepdims=True)


class DistanceLoss:
    """Cross-entropy whose targets for the coordinates of boxes are spread over the numbers near the right one."""

    def __init__(self, processor: ProcessorMixin, spread: float = SPREAD):
        tokenizer = processor.tokenizer
        self.spread, self.texts = spread, [tokenizer.decode([token]) for token in range(len(tokenizer))]
        self.digits = tokenizer.convert_tokens_to_ids(list(DIGITS))

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor, items: torch.Tensor | None = None) -> torch.Tensor:
        """Sum over the labels (batch, tokens) that are not -100, by `items` or by their number; logits are theirs."""
        chosen = labels != -100
        scores, written = logits[chosen].float().log_softmax(dim=-1), labels[chosen]
        losses = -scores.gather(1, written[:, None])[:, 0]
        places, targets = self.find_targets(written.tolist())
        if places:
            targets = torch.tensor(np.array(targets), dtype=scores.dtype, device=scores.device)
            losses[places] = -(targets * scores[places][:, self.digits]).sum(dim=1)
        return losses.sum() / (len(written) if items is None else items)

    def find_targets(self, tokens: Sequence[int]) -> tuple[list[int], list[np.ndarray]]:
        """The places of the digits of all coordinates among the tokens, and their targets."""
        texts = [self.texts[token] for token in tokens]
        starts = {start: place for place, start in enumerate(accumulate(map(len, texts), initial=0))}
        places, targets = [], []
        for box in re.finditer(BOX, "".join(texts)):
            for number in re.finditer(r"\d+", box[0]):
                first, wanted = starts[box.start() + number.start()], spread_digits(int(number[0]), self.spread)
                places += range(first, first + len(wanted))
                targets += list(wanted)
        return places, targets


def with_distance_loss(recipe: TrainingRecipe) -> TrainingRecipe:
    """The recipe with `DistanceLoss`, under a name of its own."""
    return replace(recipe, name=f"{recipe.name}-distance", loss_function=DistanceLoss)
