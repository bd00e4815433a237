"""The last block of every classifier."""

import torch
from torch import Tensor, nn


class LogProbabilities(nn.Module):
    """Scores (N, classes) to log-probabilities; in float32 where the layers before were in bfloat16, as autocast does
    on GPUs."""

    def forward(self, scores: Tensor) -> Tensor:
        return (scores.float() if scores.dtype == torch.bfloat16 else scores).log_softmax(1)
