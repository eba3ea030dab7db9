"""The ONNX file that deploys by itself: pixels in, detections out, everything between in one file.

Around a bundle's ONNX graph go its normalisation and zero padding, and PaddleDetection's NMS, in operators of standard
ONNX that ONNX Runtime, OpenVINO and TensorRT read. Whoever runs the file resizes images, and does nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gfldeploy.bundle import END_TO_END_OUTPUTS, Manifest
from gfldeploy.export.half import copied
from gfldeploy.files import native_writes
from gfldeploy.graph_guard import METADATA
from gfldeploy.serialization import plain

# What begins the names of values: of the network those that it reads and gives alone.
_BEFORE, _NETWORK, _AFTER = "before.", "network.", "after."
# Detections of an image: each is compared with each other to order them.
_MOST_DETECTIONS = 2000
# Numbers of pairs of a class and an anchor that float32 holds; a level of a pyramid has mostly far fewer anchors.
_MOST_PAIRS, _ANCHORS = 1 << 24, 1 << 16

# The parts in ONNX's own text. Normalisation is a table of 3 x 256 numbers: subtraction and division are rounded from
# 64 bits, and in 32 bits give others. TensorRT has uint8 as inputs alone: the first operator is the Cast.
_PREPARE = """
prepare (uint8[N,H,W,3] image, int32[N,2] im_shape, float[768] table) => (float[N,3,P,Q] result)
<int32[1,3,1,1] tables = {0, 256, 512}, float blank = {0}, int64 zero = {0}, int64 one = {1}, int64 two = {2},
 int64[1] y = {0}, int64[1] x = {1}, int64[2] not_y = {1, 3}, int64[2] not_x = {1, 2}>
{
    levels = Cast <to = 6> (image)
    planes = Transpose <perm = [0, 3, 1, 2]> (levels)
    places = Add (planes, tables)
    normalised = Gather (table, places)
    size = Shape (image)
    height = Gather (size, one)
    width = Gather (size, two)
    rows = Range (zero, height, one)
    columns = Range (zero, width, one)
    valid_size = Cast <to = 7> (im_shape)
    valid_height = Gather <axis = 1> (valid_size, y)
    valid_width = Gather <axis = 1> (valid_size, x)
    valid_rows = Less (rows, valid_height)
    valid_columns = Less (columns, valid_width)
    by_row = Unsqueeze (valid_rows, not_y)
    by_column = Unsqueeze (valid_columns, not_x)
    valid = And (by_row, by_column)
    result = Where (valid, normalised, blank)
}
"""
_PAD = """
pad (float[N,3,H,W] image) => (float[N,3,P,Q] result)
<int64 stride = {STRIDE}, int64 to_next = {STRIDE_LESS_1}, int64[1] two = {2}, int64[1] four = {4},
 int64[6] nothing = {0, 0, 0, 0, 0, 0}, float blank = {0}>
{
    shape = Shape (image)
    size = Slice (shape, two, four)
    reaching = Add (size, to_next)
    strides = Div (reaching, stride)
    padded_size = Mul (strides, stride)
    missing = Sub (padded_size, size)
    pads = Concat <axis = 0> (nothing, missing)
    result = Pad (image, pads, blank)
}
"""
_IN_ORIGINAL = """
in_original (float[N,A,C] scores, float[N,A,4] boxes, float[N,2] scale_factor)
    => (float[N,C,A] by_class, float[N,A,4] original)
<int64[4] xyxy = {1, 0, 1, 0}, int64[1] one = {1}>
{
    by_class = Transpose <perm = [0, 2, 1]> (scores)
    factors = Gather <axis = 1> (scale_factor, xyxy)
    factor = Unsqueeze (factors, one)
    original = Div (boxes, factor)
}
"""
# Zeros behind the scores of each row, so that there are as many as are chosen next.
_FILL = """
fill (float[N,P] scores) => (float[N,Q] result) <int64[1] count = {COUNT}, int64[1] zero = {0}, int64[1] last = {-1}>
{
    shape = Shape (scores)
    rows = Slice (shape, zero, last)
    more_shape = Concat <axis = 0> (rows, count)
    more = ConstantOfShape (more_shape)
    result = Concat <axis = -1> (scores, more)
}
"""
# Which scores of each row are the best, and of equal ones the first. ONNX defines TopK so, but OpenVINO's takes any of
# equal ones: what it gives is read for the lowest score that is chosen alone.
_CHOOSE = """
choose (float[N,P] scores) => (bool[N,P] result)
<int64[1] count = {COUNT}, int64 axis = {-1}, int64[1] last = {-1}, int64[1] end = {2147483647},
 float count_32 = {COUNT}>
{
    best, any_places = TopK (scores, count)
    lowest = Slice (best, last, end, last)
    above = Greater (scores, lowest)
    above_32 = Cast <to = 1> (above)
    above_count = ReduceSum (above_32, last)
    room = Sub (count_32, above_count)
    equal = Equal (scores, lowest)
    equal_32 = Cast <to = 1> (equal)
    number = CumSum (equal_32, axis)
    has_room = LessOrEqual (number, room)
    also = And (equal, has_room)
    result = Or (above, also)
}
"""
_ALONE = """
alone (float[N,C,A] scores, bool[N,C,B] chosen, float[N,C,B] filled) => (float[N,C,A] result)
<float blank = {0}, int64[1] zero = {0}, int64[1] two = {2}, int64[1] three = {3}>
{
    shape = Shape (scores)
    anchors = Slice (shape, two, three)
    best = Where (chosen, filled, blank)
    result = Slice (best, zero, anchors, two)
}
"""
# NMS says which pairs of a class and an anchor it keeps of all images; the score of each goes where its pair is among
# all pairs of its image, so that of equal scores the first class comes first, then the first anchor.
_NMS = """
nms (float[N,C,A] scores, float[N,A,4] boxes) => (float[N,P] result)
<int64[1] most = {MOST}, float[1] iou = {IOU}, float[1] threshold = {THRESHOLD}>
{
    selected = NonMaxSuppression (boxes, scores, most, iou, threshold)
    selected_scores = GatherND (scores, selected)
    shape = Shape (scores)
    nothing = ConstantOfShape (shape)
    kept = ScatterND (nothing, selected, selected_scores)
    result = Flatten (kept)
}
"""
# The chosen ones of each image, in their order.
_TAKE = """
take (float[N,P] scores, bool[N,P] chosen) => (float[N,K] values, int64[N,K] places)
<int64[1] count = {COUNT}, int64 zero = {0}, int64 one = {1}, float never = {1e9}>
{
    shape = Shape (scores)
    end = Gather (shape, one)
    numbers = Range (zero, end, one)
    numbers_32 = Cast <to = 1> (numbers)
    keys = Where (chosen, numbers_32, never)
    first, places = TopK <largest = 0> (keys, count)
    values = GatherElements <axis = 1> (scores, places)
}
"""
# Without those of channels that are no class.
_NAMED = """
named (float[N,K] values, int64[N,K] places, float[N,A,4] boxes) => (float[N,K] result)
<int64 classes = {CLASSES}, int64 one = {1}, float blank = {0}>
{
    shape = Shape (boxes)
    anchors = Gather (shape, one)
    end = Mul (anchors, classes)
    is_named = Less (places, end)
    result = Where (is_named, values, blank)
}
"""
# By falling score, equal ones in the order they have: each goes behind all that come before it.
_SORT = """
sort (float[N,K] values, int64[N,K] places) => (float[N,K] best, int64[N,K] best_places)
<int64[1] count = {COUNT}, int64 zero = {0}, int64 one = {1}, int64 end = {COUNT}, int64[1] axis_1 = {1},
 int64[1] axis_2 = {2}>
{
    each = Unsqueeze (values, axis_2)
    other = Unsqueeze (values, axis_1)
    better = Greater (other, each)
    equal = Equal (other, each)
    numbers = Range (zero, end, one)
    number = Unsqueeze (numbers, axis_1)
    earlier = Less (numbers, number)
    as_good = And (equal, earlier)
    ahead = Or (better, as_good)
    ahead_32 = Cast <to = 1> (ahead)
    count_ahead = ReduceSum <keepdims = 0> (ahead_32, axis_2)
    rank = Cast <to = 7> (count_ahead)
    best = ScatterElements <axis = 1> (values, rank, values)
    best_places = ScatterElements <axis = 1> (places, rank, places)
}
"""
_GIVE = """
give (float[N,K] best, int64[N,K] places, float[N,A,4] original)
    => (float[N,K,4] boxes, int32[N,K] classes, int32[N] count)
<int64 zero = {0}, int64 one = {1}, int64[1] axis_1 = {1}, int64[1] axis_2 = {2}, int32 no_class = {-1},
 float blank = {0}>
{
    there = Greater (best, blank)
    shape = Shape (original)
    anchors = Gather (shape, one)
    pairs = Where (there, places, zero)
    channels = Div (pairs, anchors)
    channels32 = Cast <to = 6> (channels)
    classes = Where (there, channels32, no_class)
    before = Mul (channels, anchors)
    anchor = Sub (pairs, before)
    index = Unsqueeze (anchor, axis_2)
    chosen = GatherND <batch_dims = 1> (original, index)
    there_too = Unsqueeze (there, axis_2)
    boxes = Where (there_too, chosen, blank)
    ones = Cast <to = 1> (there)
    sum = ReduceSum <keepdims = 0> (ones, axis_1)
    count = Cast <to = 6> (sum)
}
"""


def obstacle(manifest: Manifest) -> str | None:
    """Why standard ONNX has no form of this detector's NMS, or None."""
    nms = manifest.nms
    if not nms.normalized:
        return "its NMS counts a box's last pixel (normalized: false), ONNX's does not"
    if nms.nms_eta != 1:
        return f"its NMS lowers the threshold as it goes (nms_eta {nms.nms_eta:g}), ONNX's does not"
    if nms.keep_top_k == -1:
        return "its NMS keeps every detection (keep_top_k -1), and the file needs a number of rows"
    if nms.keep_top_k > _MOST_DETECTIONS:
        return f"its NMS keeps {nms.keep_top_k} detections of an image, and the file orders {_MOST_DETECTIONS} at most"
    if (manifest.candidates or _ANCHORS) * manifest.score_channels > _MOST_PAIRS:
        return "it has too many classes for its candidates to be numbered in float32"
    return None


def write_end_to_end(source: Path, target: Path, manifest: Manifest) -> None:
    """Write the file around the ONNX graph `source` of a bundle; see `wrap`. Raises `OutputError`."""
    import onnx

    model = onnx.load(str(source))
    wrap(model, manifest)
    onnx.checker.check_model(model)
    with native_writes(target.parent):
        onnx.save(model, str(target))


def wrap(model: Any, manifest: Manifest) -> None:
    """Put normalisation, padding and NMS around an ONNX graph of a bundle with this manifest, in place.

    Inputs: `image` uint8 [N, H, W, 3], RGB, resized, with anything to the right of and below the valid part;
    `im_shape` int32 [N, 2], height and width in pixels of the valid part; `scale_factor` float32 [N, 2] (y, x), by
    which the image was resized. H and W are free where the bundle's are.

    Outputs, for the K = `keep_top_k` best detections of each image, best first: `boxes` float32 [N, K, 4], x1, y1, x2,
    y2 in pixels of the original; `scores` float32 [N, K]; `classes` int32 [N, K]; `count` int32 [N], how many there
    are. Behind these, boxes and scores are 0 and classes -1.

    The arithmetic is that of `Preprocess` and `postprocess`, operation by operation, but for boxes without any area:
    Paddle's NMS drops all but the first of equal ones, ONNX's none. `obstacle` must be None.
    """
    from onnx import helper, numpy_helper

    graph, nms, stride = model.graph, manifest.nms, max(manifest.preprocess.pad_stride, 1)
    batch, _, height, width = manifest.inputs[0].shape
    free = height is None or width is None
    parts = _Parts()
    table = numpy_helper.from_array(manifest.preprocess.table.reshape(-1), f"{_BEFORE}table")
    (image,) = parts.add(_BEFORE, _PREPARE, "image", "im_shape", table.name)
    if free and stride > 1:
        (image,) = parts.add(_BEFORE, _PAD, image, STRIDE=stride, STRIDE_LESS_1=stride - 1)
    given = {value.name: f"{_NETWORK}{value.name}" for value in graph.output}
    network = [copied(node) for node in graph.node]
    _rename(network, {"image": image, **given})
    parts.nodes += network
    scores, boxes = parts.add(_AFTER, _IN_ORIGINAL, given["scores"], given["boxes"], "scale_factor")
    anchors, kept = manifest.candidates, nms.keep_top_k
    if nms.nms_top_k != -1 and (anchors is None or nms.nms_top_k < anchors):
        (filled,) = parts.add(f"{_AFTER}classes.", _FILL, scores, COUNT=nms.nms_top_k)
        (chosen,) = parts.add(f"{_AFTER}classes.", _CHOOSE, filled, COUNT=nms.nms_top_k)
        (scores,) = parts.add(_AFTER, _ALONE, scores, chosen, filled)
    limits = {"MOST": kept, "IOU": nms.nms_threshold, "THRESHOLD": nms.score_threshold}
    (pairs,) = parts.add(_AFTER, _NMS, scores, boxes, **limits)
    if anchors is None or anchors * manifest.score_channels < kept:
        (pairs,) = parts.add(_AFTER, _FILL, pairs, COUNT=kept)
    (chosen,) = parts.add(_AFTER, _CHOOSE, pairs, COUNT=kept)
    best, places = parts.add(_AFTER, _TAKE, pairs, chosen, COUNT=kept)
    if (classes := len(manifest.classes)) < manifest.score_channels:
        (best,) = parts.add(_AFTER, _NAMED, best, places, boxes, CLASSES=classes)
    best, places = parts.add(_AFTER, _SORT, best, places, COUNT=kept)
    original, classes_of, count = parts.add(_AFTER, _GIVE, best, places, boxes)
    _rename(parts.nodes, {original: "boxes", best: "scores", classes_of: "classes", count: "count"})

    images = batch or "N"
    constants = [*map(copied, graph.initializer), table, *parts.constants]
    del graph.node[:], graph.initializer[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(_needed(parts.nodes))
    used = {name for node in graph.node for name in node.input}
    graph.initializer.extend(constant for constant in constants if constant.name in used)
    # Numbers of types: uint8 2, int32 6, float 1.
    for values, specs in (
        (graph.input, (("image", 2, [images, height or "H", width or "W", 3]), ("im_shape", 6, [images, 2]),
                       ("scale_factor", 1, [images, 2]))),
        (graph.output, (("boxes", 1, [images, kept, 4]), ("scores", 1, [images, kept]), ("classes", 6, [images, kept]),
                        ("count", 6, [images]))),
    ):  # fmt: skip
        values.extend(helper.make_tensor_value_info(*spec) for spec in specs)
    about = {"name": manifest.name, "classes": list(manifest.classes), "preprocess": plain(manifest.preprocess)}
    helper.set_model_props(model, {METADATA: json.dumps(about)})


class _Parts:
    """Collects nodes, and the constants of those that are added as text."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, prefix: str, text: str, *inputs: str, **numbers: float) -> list[str]:
        """Add the nodes of a graph in ONNX's text, which reads `inputs`; return the names of what it gives.

        `numbers`: what stands for words in capitals in it.
        """
        from onnx import parser

        for word, number in numbers.items():
            text = text.replace(f"{{{word}}}", f"{{{number!r}}}")
        part = parser.parse_graph(text)
        prefix = f"{prefix}{part.name}."
        names = {name: f"{prefix}{name}" for node in part.node for name in node.output}
        names |= {constant.name: f"{prefix}{constant.name}" for constant in part.initializer}
        results = [names[value.name] for value in part.output]
        names |= dict(zip((value.name for value in part.input), inputs, strict=True))
        _rename(part.node, names)
        for constant in part.initializer:
            constant.name = names[constant.name]
        for node in part.node:
            node.name = node.output[0]
        self.nodes += part.node
        self.constants += part.initializer
        return results


def _rename(nodes: Iterable[Any], names: dict[str, str]) -> None:
    for node in nodes:
        for values in (node.input, node.output):
            for index, name in enumerate(values):
                values[index] = names.get(name, name)


def _needed(nodes: list[Any]) -> list[Any]:
    """Those that the results come from, in their order: nothing reads the network's anchors."""
    wanted, needed = set(END_TO_END_OUTPUTS), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            needed.append(node)
    return needed[::-1]
