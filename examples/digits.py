"""A model file: a residual network that classifies scikit-learn's handwritten digits.

It is trained when it is loaded, within seconds: 1,347 images of 8 x 8 pixels to learn from, 450 held out
for ``evaluate``.
"""

from collections.abc import Callable, Iterator

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 64
EPOCHS = 5


class Block(nn.Module):
    """Two convolutions beside a shortcut.

    Training drops half of the inner channels at random, so no channel relies on a single other one.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.drop = nn.Dropout2d(0.5)
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(self.drop(F.relu(self.norm1(self.conv1(x)))))))


class Net(nn.Module):
    """A residual block at full resolution, a stride, two more blocks, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.early = Block(32, 64)
        self.down = nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.late = nn.Sequential(Block(64, 160), Block(64, 160))
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.late(self.down(self.early(self.stem(images))))
        return self.head(x.mean((2, 3)))


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images ``(n, 1, 8, 8)`` in [0, 1] and labels ``(n,)``: for training, then held out."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=450, random_state=0, stratify=labels)
    known, held, known_labels, held_labels = (torch.from_numpy(part) for part in split)
    known, held = (part.float().reshape(-1, 1, 8, 8) / 16 for part in (known, held))
    return known, known_labels, held, held_labels


def model() -> nn.Module:
    torch.manual_seed(0)
    images, labels, _, _ = data()
    net = Net().train()
    steps = EPOCHS * (len(images) // BATCH)
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            optimiser.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch], label_smoothing=0.1).backward()
            optimiser.step()
            schedule.step()
    return net.eval()


def example_inputs() -> tuple[Tensor]:
    return (torch.rand(16, 1, 8, 8),)


def calibration() -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images and labels: the model takes what it has inputs for, the loss the whole batch."""
    images, labels, _, _ = data()
    yield from zip(images[:512].split(BATCH), labels[:512].split(BATCH), strict=True)


def loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def evaluate(predict: Callable[[Tensor], Tensor]) -> dict[str, float]:
    _, _, images, labels = data()
    return {"accuracy": (predict(images).argmax(1) == labels).float().mean().item()}
