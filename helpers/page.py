"""A web page that finds boxes: drop a picture, see them with labels and scores, move a threshold.

    pip install "gradio>=6.31,<7"
    python -m helpers.page --model OUTPUT_DIR/r4-joint

The page is at http://127.0.0.1:7860, for this machine only, and asks no other. With --share, pictures travel
through a server of gradio's makers, and for a week whoever has the address that is printed can use the page.
"""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from helpers.deployment import as_code
from helpers.detect import Detector, describe_file_problem, draw

try:
    import gradio as gr
except ModuleNotFoundError:
    gr = None  # it is an extra: `main` says how to get it

MISSING = 'this page needs gradio: pip install "gradio>=6.31,<7"'


def find(file: str | None, detector: Detector) -> tuple[str, list[dict]] | None:
    """A picture's file and the objects in it; None without a file, or if it cannot be read, as the page then says."""
    if file is None:
        return None
    problem = describe_file_problem(Path(file))
    if problem:
        gr.Warning(problem)
        return None
    return file, detector.detect([file])[0]


def show(found: tuple[str, list[dict]] | None, threshold: float) -> tuple[Image.Image | None, list[dict]]:
    """The picture with those of the objects found that score `threshold` or more, and a line for each of them."""
    if found is None:
        return None, []
    file, objects = found
    kept = [labelled for labelled in objects if labelled["score"] >= threshold]
    return draw(Path(file), kept), [to_line(labelled) for labelled in kept]


def to_line(labelled: dict) -> dict:
    """Label, box `[x1, y1, x2, y2]` in pixels of the upright picture, and score, rounded for reading."""
    box = [round(edge, 1) for edge in labelled["box"]]
    return {"label": labelled["label"], "box": box, "score": round(labelled["score"], 3)}


def build_page(detector: Detector) -> gr.Blocks:
    """The page. What was found stays in its state: a threshold needs no new answer."""
    yesterday = (3600, 86400)  # every hour, files of that age in seconds
    with gr.Blocks(title="Boxes for pictures", analytics_enabled=False, delete_cache=yesterday) as page:
        found = gr.State()
        labels = ", ".join(map(as_code, detector.task.labels))
        gr.Markdown(f"# Boxes for pictures\nDrop a picture: the model looks for {labels}.")
        with gr.Row():
            given = {"sources": ["upload", "clipboard"], "type": "filepath", "image_mode": None}
            picture = gr.Image(label="Picture", height=480, **given)
            made = {"buttons": ["download", "fullscreen"], "format": "jpeg", "alt_text": "the picture with boxes"}
            drawn = gr.Image(label="Boxes", height=480, interactive=False, **made)
        threshold = gr.Slider(0, 1, 0, step=0.01, label="Threshold: boxes with a lower score are left out")
        lines = gr.JSON([], label="Boxes: [x1, y1, x2, y2] in pixels")
        shown = {"fn": show, "inputs": [found, threshold], "outputs": [drawn, lines]}
        asked = picture.change(lambda file: find(file, detector), picture, found, show_progress_on=drawn)
        asked.then(**shown)
        threshold.change(**shown, show_progress="hidden")
    return page


def is_free(port: int) -> bool:
    """Whether a server can have the port."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was in use a moment ago is free
        try:
            server.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
    return True


def serve(page: gr.Blocks, port: int, share: bool) -> None:
    """Serve the page until Ctrl-C. Its fonts are the reader's own: gradio's would come from a server."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(server_port=port, share=share, theme=theme, footer_links=[], show_error=True)


def build_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="what a training left, or merged/")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--share", action="store_true", help="a public address as well")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command, see the module's docstring. Exit code 2 on bad input."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if gr is None:
        parser.error(MISSING)
    if not is_free(options.port):
        parser.error(f"port {options.port} cannot be had: name another one with --port")
    try:
        detector = Detector.from_pretrained(options.model)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    serve(build_page(detector), options.port, options.share)
    return 0


if __name__ == "__main__":
    sys.exit(main())
