"""The Layer that is exported: ppdet's backbone, neck and head convolutions, with a decode that every format can hold.

ppdet's own export fails on Paddle 3, and its decode does not survive a dynamic batch. `export.parity` makes sure that
both compute the same.
"""

# mypy: disable-error-code="misc"
# Imported only by the exporter, after it has checked that Paddle is there.
from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import paddle  # noqa: TID253
import paddle.nn.functional as F  # noqa: N812, TID253
from paddle import nn  # noqa: TID253

# Below any logit: the score of cells that are not there.
_NO_CELL = -1e30


class GflGraph(nn.Layer):
    """Image to scores and boxes, without NMS.

    forward: image float32 [N, 3, H, W], H and W multiples of the largest pad stride
    returns: scores float32 [N, A, C], boxes float32 [N, A, 4] as x1, y1, x2, y2 in pixels of the network input,
             A = the cells (anchors) of all pyramid levels, finest level first, row by row;
             with `candidates` = K: scores [N, K, C] and boxes [N, K, 4] of the K cells of each image whose best class
             scores highest, in the order of cells, and anchors int32 [N, K], which cells those are. Where an image has
             fewer than K, the rest of scores is 0 and of anchors -1.
    """

    def __init__(self, detector: Any, candidates: int | None = None) -> None:
        """`detector`: a ppdet GFL with a GFLHead or LDGFLHead, or a `GflGraph`; its sublayers are shared, not copied.

        `candidates`: how many cells of an image to decode; None for all.
        """
        super().__init__()
        self.candidates = candidates
        self.backbone = detector.backbone
        self.neck = detector.neck
        self.head = detector.head
        bins = self.head.reg_max + 1
        self.bins = bins
        # Half of 0..reg_max, and the strides doubled in return, which changes no bit of the result: Paddle's oneDNN
        # INT8 pass takes any constant operand of whole numbers for a quantised weight, and then refuses the program.
        self.half_projection = self.create_parameter(
            [bins, 1], default_initializer=nn.initializer.Assign(np.arange(bins, dtype=np.float32).reshape(bins, 1) / 2)
        )

    def forward(self, image: Any) -> tuple[Any, ...]:
        head = self.head
        levels = self.neck(self.backbone({"image": image}))
        logits, distributions, cells = [], [], []
        for stride, scale, level in zip(head.fpn_stride, head.scales_regs, levels):  # noqa: B905 - Paddle traces it
            class_features, box_features = head.conv_feat(level)
            logit = head.gfl_head_cls(class_features)
            distribution = scale(head.gfl_head_reg(box_features))
            centre = self.cell_centres(paddle.shape(logit), stride)
            logit, distribution = paddle.flatten(logit, 2), paddle.flatten(distribution, 2)
            if head.dgqp_module:
                # GFLv2: ppdet squashes this product again below, as every score. The second sigmoid is part of what
                # its checkpoints were trained and evaluated with.
                logit = F.sigmoid(logit) * quality(head.dgqp_module, distribution)
            logits.append(logit)
            distributions.append(distribution)
            cells.append(paddle.concat([centre, paddle.full_like(centre[:, :1], float(stride))], 1))
        logit, distribution, cell = paddle.concat(logits, 2), paddle.concat(distributions, 2), paddle.concat(cells, 0)
        if self.candidates is None:
            return F.sigmoid(paddle.transpose(logit, [0, 2, 1])), self.decode(distribution, cell)
        anchors, there = self.best_cells(logit)
        chosen = paddle.clip(anchors, min=0)
        scores = F.sigmoid(paddle.transpose(take(logit, chosen), [0, 2, 1])) * there.astype("float32").unsqueeze(-1)
        cell = paddle.reshape(paddle.gather(cell, paddle.flatten(chosen)), [-1, self.candidates, 3])
        return scores, self.decode(take(distribution, chosen), cell), anchors.astype("int32")

    def best_cells(self, logits: Any) -> tuple[Any, Any]:
        """Of logits [N, C, A] the cells with the highest best class, int64 [N, K] in rising order, and which are there.

        The graph must do with fewer cells than it is to choose, and its shapes must not depend on that: K cells that
        no other scores below are added. They come last, as -1 in the result.
        """
        best = paddle.max(logits, axis=1)
        absent = paddle.tile(paddle.full_like(best[:, :1], _NO_CELL), [1, self.candidates])
        highest, cells = paddle.topk(paddle.concat([best, absent], 1), self.candidates, axis=1)
        # NMS keeps the order of candidates where scores are equal: it has to be that of all cells.
        cells, _ = paddle.topk(cells, self.candidates, axis=1, largest=False)
        there = (highest > _NO_CELL).astype("int64")
        return (cells + 1) * there - 1, there

    def cell_centres(self, shape: Any, stride: int) -> Any:
        """x, y [H * W, 2] in pixels of the cells of one level of `shape` [N, C, H, W]."""
        x = (paddle.arange(shape[3]).astype("float32") + self.head.cell_offset) * stride
        y = (paddle.arange(shape[2]).astype("float32") + self.head.cell_offset) * stride
        y, x = paddle.meshgrid(y, x)
        return paddle.stack([x.flatten(), y.flatten()], -1)

    def decode(self, distributions: Any, cells: Any) -> Any:
        """Boxes [N, A, 4] from the logits of the side distributions [N, 4 * bins, A] of cells [A, 3] or [N, A, 3].

        A cell is the x and y of its centre, and its stride, in pixels.

        The distance to each side is the expectation of its distribution over 0..reg_max, in strides
        (Li et al., Generalized Focal Loss, 2020, equation 4 and section 3.2).
        """
        sides = paddle.reshape(paddle.transpose(distributions, [0, 2, 1]), [0, -1, 4, self.bins])
        centres, strides = cells[..., :2], cells[..., 2:]
        distances = F.linear(F.softmax(sides, axis=-1), self.half_projection).squeeze(-1) * (strides * 2)
        return paddle.concat([centres - distances[..., :2], centres + distances[..., 2:]], -1)


class GflNmsGraph(nn.Layer):
    """`GflGraph` with NMS, taking and giving what PaddleDetection's deploy tools expect of an exported model.

    forward: im_shape [N, 2], image [N, 3, H, W], scale_factor [N, 2] (y, x)
    returns: detections [M, 6] as class, score, x1, y1, x2, y2 in pixels of the original images; their number [N]
    """

    def __init__(self, graph: GflGraph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, im_shape: Any, image: Any, scale_factor: Any) -> tuple[Any, Any]:
        scores, boxes = self.graph(image)
        boxes = boxes / paddle.tile(paddle.flip(scale_factor, [1]), [1, 2]).unsqueeze(1)
        nms = self.graph.head.nms
        detections, _, count = paddle._C_ops.multiclass_nms3(
            boxes,
            paddle.transpose(scores, [0, 2, 1]),
            None,
            nms.score_threshold,
            nms.nms_top_k,
            nms.keep_top_k,
            nms.nms_threshold,
            nms.normalized,
            nms.nms_eta,
            -1,
        )
        # im_shape is part of the deploy contract but GFL does not use it: keep it from being pruned.
        return detections + 0.0 * paddle.sum(im_shape), count


def take(values: Any, cells: Any) -> Any:
    """Of values [N, M, A] those of cells [N, K]: [N, M, K]."""
    return paddle.take_along_axis(values, paddle.tile(cells.unsqueeze(1), [1, values.shape[1], 1]), 2, broadcast=False)


def quality(module: Any, distribution: Any) -> Any:
    """GFLv2's quality score [N, 1, A] of distributions [N, 4 * bins, A]: ppdet's DGQP, with a sigmoid that program mode
    has, and without sizes that are computed, so that ONNX's shape inference can follow. Its convolutions are 1x1."""
    bins = distribution.shape[1] // 4
    probability = F.softmax(paddle.reshape(distribution, [0, 4, bins, -1]), axis=2)
    statistics, _ = paddle.topk(probability, module.reg_topk, axis=2)
    if module.add_mean:
        statistics = paddle.concat([statistics, paddle.mean(statistics, axis=2, keepdim=True)], axis=2)
    statistics = paddle.reshape(statistics, [0, 4 * module.total_dim, -1, 1])
    return F.sigmoid(module.reg_conv2(F.relu(module.reg_conv1(statistics)))).squeeze(-1)


def fold_batch_norm(detector: Any, image: Any) -> int:
    """Fold every BatchNorm that follows a convolution, and it alone, into that convolution, in place; returns how many.

    y = gamma * (conv(x) - mean) / sqrt(var + eps) + beta is a convolution with weights scaled by
    gamma / sqrt(var + eps) per output channel. Which norm follows which convolution is seen in one forward pass over
    `image` [N, 3, H, W], so that any backbone works, whatever its attributes are called. A head's convolution and norm
    that all pyramid levels share are folded too; a convolution with a norm for each level is not.
    """
    norms = (nn.BatchNorm, nn.BatchNorm2D, nn.SyncBatchNorm)
    layers = {id(layer): layer for layer in detector.sublayers()}
    # By the id of an output: its convolution, and the output, so that ids stay unique.
    produced: dict[int, tuple[int, Any]] = {}
    calls: Counter[int] = Counter()
    pairs: Counter[tuple[int, int]] = Counter()
    handles = []

    def after_convolution(layer: Any, inputs: Any, output: Any) -> None:
        produced[id(output)] = (id(layer), output)
        calls[id(layer)] += 1

    def before_norm(layer: Any, inputs: Any) -> None:
        calls[id(layer)] += 1
        if id(inputs[0]) in produced:
            pairs[produced[id(inputs[0])][0], id(layer)] += 1

    for layer in layers.values():
        if isinstance(layer, nn.Conv2D):
            handles.append(layer.register_forward_post_hook(after_convolution))
        elif isinstance(layer, norms):
            handles.append(layer.register_forward_pre_hook(before_norm))
    with paddle.no_grad():
        detector.head(detector.neck(detector.backbone({"image": image})))
    for handle in handles:
        handle.remove()

    parents = {id(child): (parent, name) for parent in layers.values() for name, child in parent.named_children()}
    folded = 0
    for (convolution_id, norm_id), together in pairs.items():
        if calls[convolution_id] != together or calls[norm_id] != together:
            continue
        _fold(layers[convolution_id], layers[norm_id])
        parent, name = parents[norm_id]
        setattr(parent, name, nn.Identity())
        folded += 1
    return folded


def _fold(convolution: Any, norm: Any) -> None:
    scale = norm.weight / paddle.sqrt(norm._variance + norm._epsilon)
    bias = norm.bias - norm._mean * scale
    if convolution.bias is not None:
        bias = bias + convolution.bias * scale
    else:
        convolution.bias = convolution.create_parameter([convolution._out_channels], is_bias=True)
    convolution.weight.set_value(convolution.weight * scale.reshape([-1, 1, 1, 1]))
    convolution.bias.set_value(bias)
