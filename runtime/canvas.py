"""A small chart drawer on Pillow: stacked panels over one x axis, drawn large and reduced, with text set at the final
size.

No ComfyUI and no plotting package: Pillow comes with ComfyUI, and so does the one font that Pillow embeds. That font
holds ASCII and little more, so fixed texts stay in ASCII; labels in other scripts use a system font where one has the
characters.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont


# Okabe & Ito's colors, which stay apart for color-blind readers; their yellow, too pale for lines on white, is a gray
# here.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
# The same hues, lighter, for a dark ground.
DARK_COLORS = ("#4FA8DC", "#FF8A4C", "#2BC79A", "#E7A3CB", "#F2C14E", "#9AD7F7", "#FFFFFF", "#A8A8A8")
DASHES: tuple[tuple[float, ...], ...] = ((), (9, 4), (2.5, 3), (9, 3, 2.5, 3))
"""On and off lengths in line widths; a second cue beside color, and what shows two equal curves as two."""
SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSans-Regular.ttf",
    "msyh.ttc",
    "PingFang.ttc",
    "arial.ttf",
)
MIN_SIDE, MAX_SIDE = 256, 4096
MIN_TEXT = 12
"""Pixels; smaller letters cannot be read, however small the picture."""


@dataclass(frozen=True)
class Theme:
    """Colors of everything but the lines, and the lines' colors in order."""

    paper: str
    ink: str
    muted: str
    grid: str
    lines: tuple[str, ...]


LIGHT = Theme("#FFFFFF", "#222222", "#666666", "#E6E6E6", COLORS)
DARK = Theme("#1E1E1E", "#F0F0F0", "#B4B4B4", "#3A3A3A", DARK_COLORS)
THEMES = {"light": LIGHT, "dark": DARK}


@dataclass(frozen=True)
class Line:
    """One curve. Points that are not finite, or not positive on a log axis, are gaps."""

    x: Sequence[float]
    y: Sequence[float]
    color: str
    label: str = ""
    """Legend text; an empty one is left out."""
    width: float = 2.0
    dash: tuple[float, ...] = ()
    dots: bool = False
    """Mark each point."""


@dataclass(frozen=True)
class Panel:
    """One plot area; `title` says quantity and unit of its y axis."""

    title: str
    lines: Sequence[Line]
    log: bool = False
    share: float = 1.0
    """Height relative to the other panels."""


@dataclass(frozen=True)
class Axis:
    """Range and ticks of one axis; `log` axes keep their range as log10."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False
    falls: bool = False
    """The high end comes first."""

    def position(self, value: float) -> float | None:
        """0 at the first end, 1 at the last; None where the value has no place on the axis."""
        if not math.isfinite(value) or (self.log and value <= 0.0):
            return None
        place = ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)
        return 1.0 - place if self.falls else place


def nice_step(span: float, count: int) -> float:
    """A step of 1, 2 or 5 times a power of ten that cuts `span` into at most about `count` parts."""
    rough = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def tick_label(value: float, step: float, largest: float) -> str:
    """Digits enough to tell neighbors apart; exponents on axes whose `largest` tick would show a row of zeros."""
    if abs(value) < step * 1e-6:
        return "0"
    if 1e-3 <= largest < 1e5:
        return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
    digits = max(0, math.floor(math.log10(abs(value)) + 1e-9) - math.floor(math.log10(step) + 1e-9))
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def linear_axis(values: Sequence[float], count: int, pad: float = 0.04, whole: bool = False) -> Axis:
    """An axis over the finite ones of `values`, with about `count` ticks. `whole`: ticks at whole numbers only."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    step = nice_step(high - low, count)
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    largest = max(abs(first), abs(last)) * step
    ticks = tuple((k * step, tick_label(k * step, step, largest)) for k in range(first, last + 1))
    room = (high - low) * pad
    return Axis(low - room, high + room, ticks)


def log_axis(values: Sequence[float], count: int) -> Axis:
    """A log10 axis over the positive finite ones of `values`; where there is room it also ticks 2 and 5."""
    logs = [math.log10(value) for value in values if math.isfinite(value) and value > 0.0] or [-1.0, 0.0]
    low, high = min(logs), max(logs)
    if high - low < 0.1:
        low, high = low - 0.3, high + 0.3
    low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)
    every = max(1, math.ceil((high - low) / max(count, 1)))
    factors = (1, 2, 5) if 3 * (high - low) <= count else (1,)
    powers = [power for power in range(math.floor(low), math.ceil(high) + 1) if power % every == 0]
    values = [factor * 10.0**power for power in powers for factor in factors]
    return Axis(
        low,
        high,
        tuple((v, f"{v:g}".replace("e-0", "e-").replace("e+0", "e")) for v in values if low <= math.log10(v) <= high),
        log=True,
    )


@lru_cache(maxsize=64)
def _font(size: int, name: str | None = None) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)  # pyright: ignore[reportReturnType]


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, or the first system font that has every character of `text`; without one, Pillow's after
    all."""
    own = _font(size)
    for font in (own, *_system_fonts(size)) if not text.isascii() else ():
        missing = _bitmap(font, "\uffff")
        if all(_bitmap(font, character) != missing for character in set(text) if not character.isspace()):
            return font
    return own


def _bitmap(font: ImageFont.FreeTypeFont, character: str) -> bytes:
    return bytes(font.getmask(character))  # pyright: ignore[reportArgumentType]


def _system_fonts(size: int) -> Iterator[ImageFont.FreeTypeFont]:
    for name in SYSTEM_FONTS:
        try:
            yield _font(size, name)
        except OSError:
            continue


def shorten(text: str, size: int, room: float) -> str:
    """`text` cut with an ellipsis to at most `room` pixels."""
    font = font_for(text, size)
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "...") > room:
        text = text[:-1]
    return text + "..."


class Figure:
    """Draws panels into an image of width × height pixels; `image` is the result."""

    def __init__(
        self,
        panels: Sequence[Panel],
        x_label: str,
        title: str,
        notes: Sequence[str],
        width: int,
        height: int,
        *,
        theme: Theme = LIGHT,
        whole_x: bool = True,
        falling_x: bool = False,
    ):
        """`whole_x`: x ticks at whole numbers only. `falling_x`: the largest x stands on the left."""
        for name, side in (("width", width), ("height", height)):
            if not MIN_SIDE <= side <= MAX_SIDE:
                raise ValueError(
                    f"the plot's {name} must be {MIN_SIDE} to {MAX_SIDE} pixels, got {side}; 1024 x 640 is usual"
                )
        unit = math.sqrt(width * height / (1024 * 640))
        self.size = max(MIN_TEXT, round(15 * unit))
        self.unit = self.size / 15
        self.theme, self.whole_x, self.falling_x = theme, whole_x, falling_x
        self.image = Image.new("RGB", (width, height), theme.paper)
        self.draw = ImageDraw.Draw(self.image)
        # 3 samples a side are enough for clean edges; very large pictures are smooth with 2.
        self.samples = 3 if width * height <= 2_000_000 else 2
        margin = self.size
        top = self._header(title, panels, margin, width)
        bottom = self._footer(notes, x_label, margin, width, height)
        self._panels(panels, top, bottom, margin, width)

    def text(
        self, x: float, y: float, text: str, color: str | None = None, anchor: str = "la", grow: float = 1.0
    ) -> None:
        size = round(self.size * grow)
        self.draw.text((x, y), text, fill=color or self.theme.ink, font=font_for(text, size), anchor=anchor)

    def _header(self, title: str, panels: Sequence[Panel], margin: int, width: int) -> float:
        """Title and legend; returns the y below them."""
        self.text(margin, margin, shorten(title, round(self.size * 1.25), width - 2 * margin), grow=1.25)
        x, y = float(margin), margin + self.size * 2.1
        sample, gap = 30 * self.unit, 8 * self.unit
        lines = [line for panel in panels for line in panel.lines if line.label]
        for line in lines:
            label = shorten(line.label, self.size, width - 2 * margin - sample - gap)
            needed = sample + gap + font_for(label, self.size).getlength(label)
            if x > margin and x + needed > width - margin:
                x, y = float(margin), y + self.size * 1.6
            middle = y + self.size * 0.55
            self._legend_sample(line, x, middle, sample)
            self.text(x + sample + gap, middle, label, anchor="lm")
            x += needed + 22 * self.unit
        return y + (self.size * 1.8 if lines else 0)

    def _legend_sample(self, line: Line, x: float, y: float, length: float) -> None:
        s, box = self.samples, (round(x), round(y - self.size / 2))
        area = Image.new("RGB", (round(length) * s, self.size * s), self.theme.paper)
        draw, half = ImageDraw.Draw(area), self.size * s / 2
        self._stroke(draw, [(0.0, half), (length * s, half)], replace(line, dots=False))
        if line.dots:
            self._stroke(draw, [(length * s / 2, half)], line)
        self.image.paste(area.resize((round(length), self.size), Image.Resampling.LANCZOS), box)

    def _footer(self, notes: Sequence[str], x_label: str, margin: int, width: int, height: int) -> float:
        """Notes and the x axis' label; returns the y above them and the tick labels."""
        y = height - margin
        for note in reversed(notes):
            self.text(
                margin, y, shorten(note, round(self.size * 0.85), width - 2 * margin), self.theme.muted, "ls", grow=0.85
            )
            y -= self.size * 1.3
        self.text(width / 2, y, x_label, self.theme.muted, "ms")
        return y - self.size * 2.9

    def _panels(self, panels: Sequence[Panel], top: float, bottom: float, margin: int, width: int) -> None:
        heading = self.size * 1.7
        free = bottom - top - heading * len(panels) - self.size * (len(panels) - 1)
        xs = [x for panel in panels for line in panel.lines for x in line.x]
        columns = max(2, int((width - 6 * margin) / (5 * self.size)))
        x_axis = linear_axis(xs, min(columns, 12), pad=0.015, whole=self.whole_x)
        x_axis = replace(x_axis, falls=self.falling_x)
        heights = [max(2 * self.size, free * panel.share / sum(p.share for p in panels)) for panel in panels]
        axes = [self._y_axis(panel, size) for panel, size in zip(panels, heights, strict=True)]
        font = font_for("0", self.size)
        labels = (
            max(font.getlength(label) for axis in axes for _, label in axis.ticks) if any(a.ticks for a in axes) else 0
        )
        left = margin + labels + self.size * 0.6
        y = top
        for panel, axis, size in zip(panels, axes, heights, strict=True):
            self.text(margin, y, shorten(panel.title, self.size, width - 2 * margin), self.theme.muted)
            y += heading
            box = (round(left), round(y), round(width - margin), round(y + size))
            self._panel(panel, x_axis, axis, box, last=panel is panels[-1])
            y += size + self.size

    def _y_axis(self, panel: Panel, height: float) -> Axis:
        values = [y for line in panel.lines for y in line.y]
        count = max(3, int(height / (2.4 * self.size)))
        return log_axis(values, count) if panel.log else linear_axis(values, min(count, 8))

    def _panel(self, panel: Panel, x_axis: Axis, y_axis: Axis, box: tuple[int, int, int, int], last: bool) -> None:
        left, top, right, bottom = box
        s, width, height = self.samples, right - left, bottom - top
        area = Image.new("RGB", (width * s, height * s), self.theme.paper)
        draw = ImageDraw.Draw(area)
        hair = max(1, round(self.unit * s))
        for value, label in y_axis.ticks:
            y = height * (1 - (y_axis.position(value) or 0.0))
            draw.line([(0, y * s), (width * s, y * s)], self.theme.grid, hair)
            self.text(left - self.size * 0.6, top + y, label, self.theme.muted, "rm")
        for value, label in x_axis.ticks:
            x = width * (x_axis.position(value) or 0.0)
            draw.line([(x * s, 0), (x * s, height * s)], self.theme.grid, hair)
            if last:
                self.text(left + x, bottom + self.size * 0.5, label, self.theme.muted, "ma")
        for line in panel.lines:
            for run in _runs(line, x_axis, y_axis):
                self._stroke(draw, [(x * width * s, (1 - y) * height * s) for x, y in run], line)
        low = height * s - hair
        draw.line([(hair, 0), (hair, low), (width * s, low)], self.theme.muted, round(1.3 * hair))
        self.image.paste(area.resize((width, height), Image.Resampling.LANCZOS), (left, top))

    def _stroke(self, draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], line: Line) -> None:
        width = line.width * self.unit * self.samples
        for piece in _dashed(points, [length * width / 2 for length in line.dash]) if len(points) > 1 else ():
            draw.line(piece, line.color, max(1, round(width)), joint="curve" if len(points) < 2000 else None)
        radius = width * 1.5
        for x, y in points if line.dots or len(points) == 1 else ():
            draw.ellipse(
                (x - radius, y - radius, x + radius, y + radius), line.color, self.theme.paper, max(1, round(width / 3))
            )


def _runs(line: Line, x_axis: Axis, y_axis: Axis) -> Iterator[list[tuple[float, float]]]:
    """Stretches of neighboring points that both axes can show, as fractions of the panel."""
    run: list[tuple[float, float]] = []
    for x, y in zip(line.x, line.y, strict=True):
        place = (x_axis.position(x), y_axis.position(y))
        if place[0] is None or place[1] is None:
            if run:
                yield run
            run = []
        else:
            run.append((place[0], place[1]))
    if run:
        yield run


def _dashed(points: list[tuple[float, float]], pattern: Sequence[float]) -> Iterator[list[tuple[float, float]]]:
    """Cut a polyline into its drawn pieces; `pattern` alternates on and off lengths, and empty means solid."""
    if not pattern:
        yield points
        return
    index, left, piece = 0, pattern[0], [points[0]]
    for (x0, y0), (x1, y1) in pairwise(points):
        length, done = math.hypot(x1 - x0, y1 - y0), 0.0
        while length - done > left:
            done += left
            corner = (x0 + (x1 - x0) * done / length, y0 + (y1 - y0) * done / length)
            if index % 2 == 0:
                yield [*piece, corner]
            index, piece = (index + 1) % len(pattern), [corner]
            left = pattern[index]
        left -= length - done
        piece.append((x1, y1))
    if index % 2 == 0 and len(piece) > 1:
        yield piece
