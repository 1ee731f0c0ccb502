"""What report, survey and annotate share: templates, text made safe for HTML, tables, a clip's frames and player.

A page is one file that asks no network for anything: its Content-Security-Policy allows data: alone.
"""

import base64
import html
import re
from pathlib import Path

from torch import Tensor

TEMPLATES = Path(__file__).parent / "templates"
PLAYABLE = {".mp4": "video/mp4", ".m4v": "video/mp4", ".webm": "video/webm"}  # what every browser opens


def fill(template: str, **parts: str) -> str:
    """A template with each {{name}} replaced, in one pass: what is put in is not read again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], (TEMPLATES / template).read_text(encoding="utf-8"))


def text(value) -> str:
    """Any value as text that HTML shows and never runs, also inside a quoted attribute; lone surrogates become `?`."""
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def table(head: list[str], rows: list[list[str]], attributes: str = "") -> str:
    """Cells as HTML, of which each row's first is its heading, in a box that scrolls where they are too wide."""
    head = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    body = "".join(f"<tr><th scope=row>{row[0]}</th>{''.join(f'<td>{x}</td>' for x in row[1:])}</tr>" for row in rows)
    return f'<div class="wide"><table{attributes}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def jpeg(frame: Tensor) -> bytes:
    """uint8 [H, W, 3] -> JPEG, at most 200 wide; sides are even (4:2:0)."""
    import av
    scale = min(1.0, 200 / frame.shape[1])
    height, width = (max(2, round(side * scale / 2) * 2) for side in frame.shape[:2])
    picture = av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")
    codec = av.CodecContext.create("mjpeg", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = width, height, "yuvj420p", 1
    codec.options = {"qmin": "3", "qmax": "3"}
    picture = picture.reformat(width, height, "yuvj420p", dst_color_range="JPEG", interpolation="AREA")
    packets = codec.encode(picture) + codec.encode(None)
    return b"".join(bytes(packet) for packet in packets)
