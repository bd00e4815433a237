"""The last block of each classifier."""

import torch
from torch import Tensor, nn


class LogProbabilities(nn.Module):
    """Log-softmax of scores (N, classes); computed in float32 if the scores are bfloat16, as autocast does on GPUs."""

    def forward(self, scores: Tensor) -> Tensor:
        return (scores.float() if scores.dtype == torch.bfloat16 else scores).log_softmax(1)
