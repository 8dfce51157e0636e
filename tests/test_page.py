"""The page in a real browser: a picture in, boxes out; and what the command refuses.

The browser is the machine's, the first of BROWSERS that it has. CI takes Debian's chromium-headless-shell.
"""

import io
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from test_detect import write_result

from helpers import page
from helpers.export import ROOT
from helpers.metrics import match_boxes
from helpers.tiny.packages import draw_package

BROWSERS = ["chromium-headless-shell", "chromium", "google-chrome"]
# the command, which prints a line each time that the model is asked
COMMAND = """
import sys
from helpers import page

detect = page.Detector.detect
page.Detector.detect = lambda *given: print("asked", flush=True) or detect(*given)
sys.exit(page.main())
"""
WAIT = 120  # seconds at most; a busy machine is no defect
RED = (215, 48, 39)  # of boxes


@pytest.fixture(scope="module")
def browser():
    """A headless browser."""
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    with sync_playwright() as playwright:
        program = found[0] if found else playwright.chromium.executable_path  # what `make test` downloads without root
        assert Path(program).exists(), f"This test needs a browser, one of {BROWSERS}: run `make .venv/browser`"
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])  # root cannot have it
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(base, tmp_path_factory):
    """The page of a model that finds barcodes: its address, and the file of what it prints."""
    folder = tmp_path_factory.mktemp("page")
    model = write_result(base, folder / "r2-vision-only")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", COMMAND, "--model", str(model), "--port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(folder / "pictures")}
    with (folder / "printed.txt").open("w") as printed:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT)
    yield SimpleNamespace(address=f"http://127.0.0.1:{port}", printed=folder / "printed.txt", process=process)
    process.terminate()
    process.wait()


@pytest.fixture
def tab(browser, server):
    """The page in a new window, and every address that it asks for."""
    end = time.monotonic() + WAIT
    while "Running on" not in (printed := server.printed.read_text()):
        assert server.process.poll() is None, printed
        assert time.monotonic() < end, printed
        time.sleep(0.2)
    expect.set_options(timeout=1000 * WAIT)
    with browser.new_page() as tab:
        tab.set_default_timeout(1000 * WAIT)
        asked = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(server.address)
        yield tab, asked


def read_lines(tab):
    """The boxes as the page lists them."""
    return json.loads(tab.locator(".json-holder").inner_text())


def find_drawing(tab):
    """The address of the picture with boxes."""
    return tab.get_by_alt_text("the picture with boxes").get_attribute("src")


def count_red(tab, drawing):
    """The pixels of a drawing that have about the colour of boxes: it is a JPEG."""
    drawn = Image.open(io.BytesIO(tab.request.get(drawing).body()))
    far = np.abs(np.asarray(drawn, int) - RED).max(axis=2)
    return int((far < 40).sum())


@pytest.mark.slow
def test_a_picture_gets_boxes_and_a_threshold_hides_them(tab, server, tmp_path):
    tab, addresses = tab
    image, objects = draw_package(100)
    image.save(tmp_path / "a é.png")
    tab.set_input_files("input[type=file]", tmp_path / "a é.png")
    expect(tab.get_by_test_id("json")).to_contain_text("barcode")
    (line,) = read_lines(tab)
    assert match_boxes([box for label, box in objects if label == "barcode"], [line["box"]])[0] > 0.5
    assert 0.5 < line["score"] < 1
    drawing = find_drawing(tab)
    assert count_red(tab, drawing) > 300

    tab.get_by_label("range slider").press("End")  # to 1
    expect(tab.get_by_test_id("json")).not_to_contain_text("barcode")
    assert read_lines(tab) == []
    expect(tab.get_by_alt_text("the picture with boxes")).not_to_have_attribute("src", drawing)
    assert count_red(tab, find_drawing(tab)) == 0
    tab.get_by_label("number input").fill(str(line["score"] - 0.01))
    expect(tab.get_by_test_id("json")).to_contain_text("barcode")
    assert read_lines(tab) == [line]
    assert Counter(server.printed.read_text().splitlines())["asked"] == 1
    assert [address for address in addresses if not address.startswith(server.address)] == []


@pytest.mark.slow
def test_a_picture_that_cannot_be_read_is_named(tab, tmp_path):
    tab, _ = tab
    draw_package(100)[0].save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    tab.set_input_files("input[type=file]", tmp_path / "cut.png")
    expect(tab.get_by_test_id("toast-body")).to_contain_text("image cannot be decoded (OSError)")
    assert read_lines(tab) == []


def stop(capsys, *argv):
    """What the command says when it stops with exit code 2: its last line."""
    with pytest.raises(SystemExit) as stopped:
        page.main(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    said = stop(capsys, "--model", str(tmp_path / "nowhere"))
    assert "nowhere is not what a training of this project left: there is no recipe.json in it" in said


def test_a_port_that_cannot_be_had_is_named(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} cannot be had" in stop(capsys, "--model", "unused", "--port", str(port))
    assert "port 70000 cannot be had" in stop(capsys, "--model", "unused", "--port", "70000")


def test_without_gradio_the_command_says_how_to_get_it(monkeypatch, capsys):
    (requirement,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["demo"]
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "helpers.page")
    monkeypatch.setattr(sys, "argv", ["page", "--model", "unused"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("helpers.page", run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f'this page needs gradio: pip install "{requirement}"')
