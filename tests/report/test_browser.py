"""The page in a real browser, at the widths of a phone and of a desktop screen."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.report.test_page import SECTIONS

WIDTHS, HEIGHT = (360, 1280), 900
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# Runs next to the page, which itself has no script: each frame is as wide as a screen.
MEASURE = """
addEventListener("load", () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement;
    const all = selector => [...page.querySelectorAll(selector)];
    const box = element => element.getBoundingClientRect();
    const free = element => !element.closest(".scroll") && !element.closest("svg");
    const fetched = frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name);
    const texts = all("p, td, th, li, dd, dt, figcaption");
    found[frame.id] = {
      width: root.clientWidth,
      scroll: root.scrollWidth,
      sticking_out: all("body *").filter(element => free(element) && box(element).right > root.clientWidth + 1)
        .map(element => element.outerHTML.slice(0, 80)),
      images: page.images.length,
      undecoded: [...page.images].filter(image => !image.complete || image.naturalWidth === 0).length,
      fetched: fetched.filter(name => !name.startsWith("data:")),
      sections: all("section").filter(section => box(section).height > 50).map(section => section.id),
      drawings: all("svg").map(drawing => box(drawing).height),
      smallest_text: Math.min(...texts.map(element => parseFloat(getComputedStyle(element).fontSize))),
    };
  }
  document.getElementById("found").textContent = JSON.stringify(found);
});
"""


@pytest.fixture(scope="module")
def seen(pages, tmp_path_factory):
    """Return what the browser measures of each page at each width, and a screenshot; it is started once for all."""
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH")
    folder = tmp_path_factory.mktemp("browser")
    texts = {kind: html.escape(page.read_text(encoding="utf-8")) for kind, page in pages.items()}
    frames = {
        (kind, width): f'<iframe id="{kind}-{width}" style="width: {width}px" srcdoc="{text}"></iframe>'
        for kind, text in texts.items()
        for width in WIDTHS
    }
    style = f"body {{ margin: 0 }} iframe {{ display: block; height: {HEIGHT}px; border: 0 }}"
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        f"<!DOCTYPE html><meta charset=utf-8><style>{style}</style><script>{MEASURE}</script>"
        f"{''.join(frames.values())}<pre id=found></pre>",
        encoding="utf-8",
    )
    done = subprocess.run(
        [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-dev-shm-usage", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}",
            f"--window-size={max(WIDTHS)},{HEIGHT * len(frames)}", f"--screenshot={folder / 'seen.png'}",
            "--dump-dom", wrapper.as_uri(),
        ],
        capture_output=True, text=True, timeout=90, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, flags=re.DOTALL)
    assert found, "the browser measured nothing"
    measured = json.loads(html.unescape(found.group(1)))
    with Image.open(folder / "seen.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    return {
        (kind, width): (measured[f"{kind}-{width}"], pixels[place * HEIGHT : (place + 1) * HEIGHT, :width])
        for place, (kind, width) in enumerate(frames)
    }


@pytest.mark.parametrize("kind", ["image", "series"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_its_screen_and_is_complete(seen, kind, width):
    found, _ = seen[kind, width]
    assert found["width"] == width
    assert found["scroll"] <= width
    assert found["sticking_out"] == []
    assert found["images"] == (39 if kind == "image" else 37)
    assert found["undecoded"] == 0
    assert found["fetched"] == []
    assert found["sections"] == SECTIONS[kind]
    assert len(found["drawings"]) == (5 if kind == "image" else 3)
    assert min(found["drawings"]) > 100
    assert found["smallest_text"] >= 13


@pytest.mark.parametrize("kind", ["image", "series"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_painted(seen, kind, width):
    _, pixels = seen[kind, width]
    assert pixels.shape == (HEIGHT, width, 3)
    assert len(Image.fromarray(pixels).getcolors(pixels.size)) > 50
