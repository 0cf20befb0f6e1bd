"""Contact sheets: one row per prompt, one column per precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

_SMALLEST, _GAP, _FONT = 192, 12, 14
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)


def contact_sheet(captions: list[str], columns: list[str], cells: list[list[tuple[Image, str]]]) -> Image:
    """A sheet of pictures. cells: per caption, one (picture, note) per column; small pictures are enlarged."""
    from PIL import Image as images
    from PIL import ImageDraw

    pictures = [[_enlarged(picture) for picture, _ in row] for row in cells]
    width = max(p.width for row in pictures for p in row)
    font, small = _font(_FONT), _font(_FONT - 2)
    total = len(columns) * (width + _GAP) + _GAP
    pen = ImageDraw.Draw(images.new("RGB", (1, 1)))
    wrapped = [_wrap(pen, caption, font, total - 2 * _GAP) for caption in captions]
    line, note_line = _FONT + 5, _FONT + 3
    head = line + _GAP
    tops, y = [], head
    for lines, row in zip(wrapped, pictures, strict=True):
        tops.append(y)
        y += len(lines) * line + max(p.height for p in row) + note_line + _GAP
    sheet = images.new("RGB", (total, y), _PAPER)
    pen = ImageDraw.Draw(sheet)
    lefts = [_GAP + i * (width + _GAP) for i in range(len(columns))]
    for left, title in zip(lefts, columns, strict=True):
        pen.text((left, _GAP // 2), title, fill=_INK, font=font)
    for top, lines, row, notes in zip(tops, wrapped, pictures, cells, strict=True):
        for number, text in enumerate(lines):
            pen.text((_GAP, top + number * line), text, fill=_INK, font=font)
        at = top + len(lines) * line
        for left, picture, (_, note) in zip(lefts, row, notes, strict=True):
            sheet.paste(picture, (left, at))
            pen.text((left, at + picture.height + 2), note, fill=_FAINT, font=small)
    return sheet


def _enlarged(picture: Image) -> Image:
    from PIL.Image import Resampling

    picture = picture.convert("RGB")
    factor = -(-_SMALLEST // max(picture.size))
    if factor <= 1:
        return picture
    return picture.resize((picture.width * factor, picture.height * factor), Resampling.NEAREST)


def _font(points: int) -> Any:
    from PIL import ImageFont

    try:
        return ImageFont.load_default(points)
    except (ImportError, TypeError):  # Pillow without FreeType, or before 10.1: one fixed size
        return ImageFont.load_default()


def _wrap(pen: Any, text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and pen.textlength(longer, font=font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
