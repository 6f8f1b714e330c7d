"""fastrm: fused listwise loss over ragged groups, and a trainer for reward models and rerankers."""

from typing import TYPE_CHECKING, Any

from fastrm.functional import (
    bradley_terry_loss,
    bradley_terry_loss_from_scores,
    listwise_loss,
    listwise_loss_from_scores,
    plackett_luce_loss,
    plackett_luce_loss_from_scores,
    score,
)
from fastrm.groups import (
    offsets_from_ids,
    offsets_from_sizes,
    position_weight_from_ranks,
    target_from_labels,
    target_from_scores,
)

if TYPE_CHECKING:
    from fastrm.model import load_reward_model
    from fastrm.trainer import RewardConfig, RewardTrainer

__version__ = "0.1.0"
__all__ = [
    "RewardConfig",
    "RewardTrainer",
    "bradley_terry_loss",
    "bradley_terry_loss_from_scores",
    "listwise_loss",
    "listwise_loss_from_scores",
    "load_reward_model",
    "offsets_from_ids",
    "offsets_from_sizes",
    "plackett_luce_loss",
    "plackett_luce_loss_from_scores",
    "position_weight_from_ranks",
    "score",
    "target_from_labels",
    "target_from_scores",
]
# Looked up on first use: they need transformers, which the losses do not.
_LAZY = {
    "RewardConfig": "fastrm.trainer",
    "RewardTrainer": "fastrm.trainer",
    "load_reward_model": "fastrm.model",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fastrm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
