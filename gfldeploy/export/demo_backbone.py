"""SlimResNet: a small residual backbone for the demo detector, registered with PaddleDetection.

Importing this module imports paddle and ppdet and registers the class: `export.config` does so before it builds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paddle  # noqa: TID253
from paddle import nn  # noqa: TID253
from ppdet.core.workspace import register, serializable  # noqa: TID253
from ppdet.modeling.shape_spec import ShapeSpec  # noqa: TID253


class _ConvNorm(nn.Layer):  # type: ignore[misc]
    """Convolution, batch normalisation and, unless `act` is false, ReLU. Plain convolutions only: INT8 kernels gain
    little or nothing on depthwise ones."""

    def __init__(self, ch_in: int, ch_out: int, kernel: int, stride: int = 1, *, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2D(
            ch_in,
            ch_out,
            kernel,
            stride=stride,
            padding=kernel // 2,
            weight_attr=paddle.ParamAttr(initializer=nn.initializer.KaimingNormal()),
            bias_attr=False,
        )
        # no weight decay on the normalisation, as PaddleDetection's own ResNet has it
        undecayed = paddle.ParamAttr(regularizer=paddle.regularizer.L2Decay(0.0))
        self.norm = nn.BatchNorm2D(ch_out, weight_attr=undecayed, bias_attr=undecayed)
        self.act = act

    def forward(self, x: Any) -> Any:
        x = self.norm(self.conv(x))
        return nn.functional.relu(x) if self.act else x


class _BasicBlock(nn.Layer):  # type: ignore[misc]
    """Two 3x3 convolutions around a shortcut, which is projected where the shape changes."""

    def __init__(self, ch_in: int, ch_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _ConvNorm(ch_in, ch_out, 3, stride)
        self.conv2 = _ConvNorm(ch_out, ch_out, 3, act=False)
        changes = stride != 1 or ch_in != ch_out
        self.shortcut = _ConvNorm(ch_in, ch_out, 1, stride, act=False) if changes else None

    def forward(self, x: Any) -> Any:
        kept = x if self.shortcut is None else self.shortcut(x)
        return nn.functional.relu(kept + self.conv2(self.conv1(x)))


@register
@serializable
class SlimResNet(nn.Layer):  # type: ignore[misc]
    """A narrow ResNet of basic blocks.

    Args:
        widths: channels of the stem and of the stages at strides 4, 8, 16 and 32.
        depths: basic blocks in the stages at strides 4, 8, 16 and 32.
    """

    def __init__(self, widths: Sequence[int] = (24, 32, 64, 128, 128), depths: Sequence[int] = (1, 2, 2, 2)) -> None:
        super().__init__()
        if len(widths) != 5 or len(depths) != 4:
            raise ValueError("SlimResNet takes five widths (stem and four stages) and four depths")
        self.widths = tuple(int(width) for width in widths)
        self.stem = _ConvNorm(3, self.widths[0], 3, 2)
        # named sublayers, not a Python list: tools that walk the layer tree must see every convolution
        for stage, depth in enumerate(depths):
            ch_in, ch_out = self.widths[stage], self.widths[stage + 1]
            blocks = [_BasicBlock(ch_in if i == 0 else ch_out, ch_out, 2 if i == 0 else 1) for i in range(depth)]
            setattr(self, f"stage{stage + 2}", nn.Sequential(*blocks))

    def forward(self, inputs: dict[str, Any]) -> list[Any]:
        """`inputs["image"]` [N, 3, H, W], H and W multiples of 32, to C3, C4, C5 [N, C, H/s, W/s] at s = 8, 16, 32."""
        c2 = self.stage2(self.stem(inputs["image"]))
        c3 = self.stage3(c2)
        c4 = self.stage4(c3)
        return [c3, c4, self.stage5(c4)]

    @property
    def out_shape(self) -> list[Any]:
        """Channels and strides of C3, C4 and C5, from which PaddleDetection builds the neck."""
        return [ShapeSpec(channels=c, stride=s) for c, s in zip(self.widths[2:], (8, 16, 32), strict=True)]
