"""Words of notes read out of an adapter's update: the span attack, and what noise leaves of it.

LoRA's A at the first layer is moved along sums of the layer's inputs, which are normalised
embeddings of the tokens that were read. Whoever holds an update knows the space that these span,
and asks for every token of the vocabulary how much of its input lies in it (the idea of DAGER,
Petrov et al. 2024, arXiv 2405.15586).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedward.errors import ModelError
from fedward.privacy.audit_canaries import Scores, area

_FIRST_A = re.compile(r"\.layers\.0\.self_attn\.[qkv]_proj\.lora_A\.")


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """Tokens found in updates of single patients.

    Args:
        found: Share of a patient's different tokens among as many best guesses.
        chance: The same for guesses at random.
        auc: Chance that a token that was read scores above one that was not; 0.5 is luck.
        updates: How many patients were attacked.
    """

    found: float
    chance: float
    auc: float
    updates: int


def token_scores(model: nn.Module, change: Mapping[str, Tensor]) -> Scores:
    """How well every token's first-layer input lies in the space that an update spans.

    Args:
        model: A Llama with LoRA on its first attention layer, as before the update.
        change: Parameter name to how it moved.

    Returns:
        ``(vocabulary,)``, 0 to 1.

    Raises:
        ModelError: The update has no A of the first layer's queries, keys or values.
    """
    parts = [delta for name, delta in sorted(change.items()) if _FIRST_A.search(name)]
    if not parts:
        raise ModelError("the span attack needs LoRA on q_proj, k_proj or v_proj of layer 0")
    _, strength, right = torch.linalg.svd(torch.cat(parts).double(), full_matrices=False)
    span = right[strength > 1e-7 * strength[0]]
    norm = next(m for n, m in model.named_modules() if n.endswith("layers.0.input_layernorm"))
    embeddings = next(m for n, m in model.named_modules() if n.endswith("embed_tokens"))
    with torch.no_grad():
        inputs = norm(embeddings.weight).double()
    inputs = inputs / inputs.norm(dim=1, keepdim=True).clamp(min=1e-30)
    scores: Scores = (inputs @ span.T).square().sum(1).numpy()
    return scores


def judge_tokens(scores: Scores, read: set[int]) -> tuple[float, float, float]:
    """Share of the read tokens among as many best guesses, the same by chance, and the AUC."""
    there = np.zeros(len(scores), dtype=bool)
    there[sorted(read)] = True
    best = np.argsort(-scores, kind="stable")[: len(read)]
    chance = len(read) / len(scores)
    return float(there[best].mean()), chance, area(scores[there], scores[~there])
