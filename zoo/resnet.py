"""The residual network of the classifiers that judge samples: timm's (He et al., arXiv 1512.03385) for small pictures.

The change for small pictures is the usual one: a first convolution of 3 x 3 with stride 1, and no pooling behind it.
"""

from typing import Any

from torch import nn


def check_stages(layers: tuple[int, ...], widths: tuple[int, ...]) -> None:
    """Raises ValueError, naming the field, unless both have four numbers, one a stage, each 1 or more."""
    for name, stages in (("layers", layers), ("widths", widths)):
        if len(stages) != 4 or min(stages) < 1:
            raise ValueError(f"{name} = {stages}; it takes four numbers, one a stage, each 1 or more")


def small_resnet(
    channels: int, classes: int, layers: tuple[int, ...], widths: tuple[int, ...], dropout: float = 0.0
) -> Any:
    """(B, channels, H, W) float -> logits (B, classes), or features (B, widths[-1]) where classes is 0.

    layers     residual blocks of each of four stages; the first keeps the picture's size, each further one halves it
    widths     channels of each stage; the last are the features
    dropout    of the features, before the logits
    """
    from timm.models.resnet import BasicBlock, ResNet

    net: Any = ResNet(
        BasicBlock,  # type: ignore[arg-type]
        layers,
        num_classes=classes,
        in_chans=channels,
        channels=widths,
        drop_rate=dropout,
    )
    net.conv1 = nn.Conv2d(channels, net.conv1.out_channels, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net
