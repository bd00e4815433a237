"""The seed's convolutional network (seed, section 5.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """Two convolutions and two linear layers: (N, 1, 28, 28) images to (N, 10) log-probabilities; 1,199,882 parameters.

    Args:
        dropout1: probability of dropping a channel after the convolutions.
        dropout2: probability of dropping a unit after the first linear layer. The seed names it `Dropout2d` too, which
            on (N, units) means what `Dropout` says; PyTorch has deprecated the former.
    """

    def __init__(self, dropout1: float = 0.25, dropout2: float = 0.5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.dropout1 = nn.Dropout2d(dropout1)
        self.dropout2 = nn.Dropout(dropout2)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = F.relu(x)
        x = self.conv2(x)
        x = F.max_pool2d(x, 2)
        x = self.dropout1(x)
        x = torch.flatten(x, 1)
        x = self.fc1(x)
        x = F.relu(x)
        x = self.dropout2(x)
        x = self.fc2(x)
        # In the parameters' precision also where a layer before was in bfloat16, as autocast does on GPUs.
        return F.log_softmax(x.to(self.fc2.weight.dtype), dim=1)
