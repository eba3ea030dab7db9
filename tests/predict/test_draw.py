"""Boxes on pictures."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from gfldeploy.errors import OutputError
from gfldeploy.predict import fonts
from gfldeploy.predict.draw import colour, draw_all, draw_boxes, drawing_notes


def box(x: float, y: float, width: float, height: float, score: float = 0.9, category: int = 0) -> dict[str, object]:
    return {"class": "box", "class_id": category, "score": score, "bbox": [x, y, width, height]}


def test_the_box_is_where_it_should_be() -> None:
    picture = np.full((200, 300, 3), 90, np.uint8)
    drawn = draw_boxes(picture, [box(50, 60, 100, 80)])
    assert (picture == 90).all(), "the image is left alone"
    for place in ((100, 50), (100, 150), (60, 100), (140, 100)):
        assert tuple(drawn[place]) == colour(0), place
    assert (drawn[70:130, 60:140] == 90).all()
    assert (drawn[45:59, 50:100] != 90).any(), "a label above it"


def test_scores_below_the_threshold_are_left_out() -> None:
    picture = np.zeros((100, 100, 3), np.uint8)
    assert not draw_boxes(picture, [box(10, 20, 50, 50, score=0.3)], 0.4).any()
    assert draw_boxes(picture, [box(10, 20, 50, 50, score=0.4)], 0.4).any()


@pytest.mark.parametrize(
    "detection",
    [box(-20, -20, 50, 50), box(80, 90, 500, 500), box(10, 10, 0, 0), box(10, 10, -5, 3), box(500, 500, 5, 5)],
)
def test_boxes_beyond_the_image_do_no_harm(detection: dict[str, object]) -> None:
    for shape in ((100, 100, 3), (1, 1, 3)):
        drawn = draw_boxes(np.zeros(shape, np.uint8), [detection])
        assert drawn.shape == shape and drawn.dtype == np.uint8


def test_neighbouring_classes_look_different() -> None:
    colours = np.array([colour(category) for category in range(80)])
    assert len(np.unique(colours, axis=0)) == 80
    assert np.abs(np.diff(colours, axis=0)).sum(axis=1).min() > 100


def font_with(path: Path, text: str) -> None:
    """A font in which each of these characters is a square."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    for place in ((0, 0), (0, 900), (900, 900), (900, 0)):
        (pen.moveTo if place == (0, 0) else pen.lineTo)(place)
    pen.closePath()
    square, empty = pen.glyph(), TTGlyphPen(None).glyph()
    names = [f"uni{ord(char):04X}" for char in text]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap(dict(zip(map(ord, text), names, strict=True)))
    builder.setupGlyf({".notdef": empty, **dict.fromkeys(names, square)})
    builder.setupHorizontalMetrics(dict.fromkeys((".notdef", *names), (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


@pytest.fixture
def folder_of_fonts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder that has fonts."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for cached in (fonts._has_none, fonts._font_of, fonts._font, fonts._system_fonts):
        cached.cache_clear()
    folder = tmp_path / "data/fonts/some"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.posix
def test_names_are_drawn_in_a_font_that_has_them(folder_of_fonts: Path) -> None:
    pytest.importorskip("fontTools")
    font_with(folder_of_fonts / "squares.ttf", "中文")
    (folder_of_fonts / "broken.ttf").write_bytes(b"no font")
    assert [text for text, _ in fonts.runs("a 中文 b", 20)] == ["a ", "中文", " b"]
    assert fonts.missing_glyphs(["a 中文", "人"]) == ["人"]
    picture = np.zeros((100, 300, 3), np.uint8)
    drawn = draw_boxes(picture, [{**box(10, 60, 100, 30), "class": "中文"}])
    white = (drawn == 255).all(axis=2)
    assert white.sum() > 100, "two filled squares in white"
    (note,) = drawing_notes(["中文", "人"], False)
    assert "no font here has \\u4eba: pictures show such codes" in note and "fonts-noto-cjk" in note


def test_what_no_font_has_is_drawn_as_its_code(folder_of_fonts: Path) -> None:
    assert ["".join(text for text, _ in fonts.runs(name, 20)) for name in ("人", "a\nb\x1b", "é", "e\u0301")] == [
        "\\u4eba",
        "a\\nb\\x1b",
        "e",
        "e",
    ]
    assert len("".join(text for text, _ in fonts.runs("x" * 10_000, 20))) == 80
    picture = np.zeros((100, 300, 3), np.uint8)
    one, other = (draw_boxes(picture, [{**box(10, 60, 100, 30), "class": name}]) for name in "人中")
    assert (one != other).any(), "names that differ look different"


def write_records(folder: Path, name: str) -> tuple[Path, Path]:
    """The records of a video of three frames, which is beside them, and a folder for what is drawn."""
    video = folder / "a.mp4"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"mp4v"), 10, (80, 48))
    for _ in range(3):
        writer.write(np.full((48, 80, 3), 200, np.uint8))
    writer.release()
    video = video.rename(folder / f"{name}.mp4")
    size = {"width": 80, "height": 48, "detections": [box(4, 20, 30, 9)]}
    lines: list[dict[str, object]] = [{"file": str(video), "frame": number, "time_s": 0, **size} for number in range(3)]
    lines += [{"file": str(video), "error": f"{video} ends early"}]
    records, out = folder / "records.jsonl", folder / "out"
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out.mkdir()
    return records, out


@pytest.mark.posix
def test_a_video_that_the_disk_did_not_take_is_none(tmp_path: Path) -> None:
    import resource

    records, out = write_records(tmp_path, "clip")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(OutputError, match=r"File too large\. Raise the limit"):
            list(draw_all(records, out, 0.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(draw_all(records, out, 0.0)) == [1, 2, 3, 4]
    capture = cv2.VideoCapture(str(out / "000001-clip.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    capture.release()


@pytest.mark.parametrize("name", ["café", pytest.param("caf\udce9", marks=pytest.mark.posix)])  # which is not UTF-8
def test_a_drawn_video_plays_in_browsers_and_takes_frames_of_any_size(name: str, tmp_path: Path) -> None:
    records, out = write_records(tmp_path, name)
    assert list(draw_all(records, out, 0.0)) == [1, 2, 3, 4]
    (drawn,) = out.iterdir()
    assert drawn.name == f"000001-{name}.mp4"
    capture = cv2.VideoCapture(str(drawn.rename(out / "drawn.mp4")))
    codec = int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little").decode()
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1])
    assert len(frames) == 3 and frames[0].shape == (48, 80, 3)
    told = " ".join(drawing_notes([], True))
    assert (codec in ("avc1", "h264", "VP90", "vp09")) != ("browsers do not" in told)
