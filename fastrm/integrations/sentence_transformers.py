"""fastrm's listwise loss for the `CrossEncoderTrainer` of sentence-transformers.

Letters: N queries, K_n documents of query n, M = Σ K_n pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from sentence_transformers.cross_encoder import CrossEncoder
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn

from fastrm.functional import listwise_loss_from_scores
from fastrm.groups import offsets_from_sizes, target_from_scores


class ListwiseLoss(nn.Module):
    """Listwise softmax cross entropy over the documents of each query, any number a query.

    Data has the columns of sentence-transformers' listwise losses, in this order: query, a list of
    documents, and `labels`, a number for each document. The mean over queries of the cross entropy
    between the scores' softmax and `target`; with the default one this is `losses.ListNetLoss`.

    A `CrossEncoder` brings scores, one a pair, so this is `fastrm.listwise_loss_from_scores`: no
    padding to the longest list and no mask. All pairs of a batch take one forward.

    Args:
        model: with one output label.
        target: from labels (M,) and offsets (N + 1,) to the target distribution (M,):
            `fastrm.target_from_scores`, the softmax of the labels (ListNet), or
            `fastrm.target_from_labels`, the labels divided by their sum (1 for each positive, 0 for
            the others; or grades).
        options: for `fastrm.listwise_loss_from_scores`: temperature, label_smoothing, center_coef,
            backend.

    Raises:
        ValueError: the model has several output labels, the data other columns, or a query not as
            many labels as documents.
    """

    def __init__(
        self,
        model: CrossEncoder,
        target: Callable[[Tensor, Tensor], Tensor] = target_from_scores,
        **options: Any,
    ) -> None:
        super().__init__()
        if model.num_labels != 1:
            raise ValueError(f"model must have num_labels=1, got num_labels={model.num_labels}")
        self.model = model
        self.target = target
        self.options = options

    def forward(
        self,
        inputs: tuple[Sequence[str], Sequence[Sequence[str]]],
        labels: Sequence[Tensor],
        prompt: str | None = None,
        task: str | None = None,
    ) -> Tensor:
        """The loss () of N queries: `inputs` are queries (N) and documents (N x K_n)."""
        if len(inputs) != 2:
            raise ValueError(f"inputs must be queries and lists of documents, got {len(inputs)} "
                             "columns beside the labels")  # fmt: skip
        queries, documents = inputs
        sizes = [len(d) for d in documents]
        if isinstance(labels, Tensor) or sizes != [len(x) for x in labels]:
            got = "one a query" if isinstance(labels, Tensor) else [len(x) for x in labels]
            raise ValueError(f"labels must be one a document, {sizes} for these queries, got {got}")
        pairs = [(q, d) for q, group in zip(queries, documents, strict=True) for d in group]
        features = batch_to_device(
            self.model.preprocess(pairs, prompt=prompt, task=task), self.model.device
        )
        scores = self.model(features)["scores"].view(-1)
        offsets = offsets_from_sizes(sizes)
        target = self.target(torch.cat(list(labels)).cpu(), offsets)
        return listwise_loss_from_scores(
            scores, offsets=offsets.to(scores.device), target=target.to(scores.device),
            **self.options,
        )  # fmt: skip

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of the loss."""
        return {"target": getattr(self.target, "__name__", repr(self.target)), **self.options}

    @property
    def citation(self) -> str:
        """For the model card: ListNet, of which the top-one form is this loss."""
        return """
@inproceedings{cao2007learning,
    title = {Learning to Rank: From Pairwise Approach to Listwise Approach},
    author = {Cao, Zhe and Qin, Tao and Liu, Tie-Yan and Tsai, Ming-Feng and Li, Hang},
    booktitle = {Proceedings of the 24th International Conference on Machine Learning},
    year = {2007}
}
"""
