"""Makes the pictures of the guide (infer/inspection/README.md) and of the README: `make pictures`.

The notebooks draw them, the others are a report's: its picture, and, where a Chromium is installed, its page.
"""

import io
import runpy
import shutil
import subprocess
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import phi3_jax
from phi3_jax.infer.inspection import collect
from phi3_jax.infer.inspection.html import html
from phi3_jax.infer.inspection.picture import save_png

ROOT = Path(phi3_jax.__file__).parent.parent
FOLDER = ROOT / "infer" / "inspection"
PICTURES = FOLDER / "pictures"
PROMPT = "The capital of France is"
# The notebook, and those of its figures that the guide shows.
FIGURES = {
    "first_walk": ["attention", "lens"],
    "patching": ["patching"],
    "steering": ["steering"],
    "what_int4_does": ["int4"],
    "heads_that_copy": ["heads"],
}
MOST = 150_000  # bytes of a picture


def main() -> None:
    """Writes all pictures anew."""
    PICTURES.mkdir(exist_ok=True)
    for notebook, figures in FIGURES.items():
        runpy.run_path(str(FOLDER / "notebooks" / f"{notebook}.py"))
        for name in figures:
            drawn = io.BytesIO()
            plt.figure(name).savefig(drawn, dpi=110)
            store(drawn, name)
        plt.close("all")
    report_pictures()


def report_pictures() -> None:
    """The picture that `phi3-inspect --format png` draws, and the page."""
    checkpoint = phi3_jax.load("demo")
    report = collect(checkpoint, checkpoint.tokenizer.encode(PROMPT), PROMPT, name="demo")
    with tempfile.TemporaryDirectory() as folder:
        save_png(report, Path(folder) / "walk.png")
        store(Path(folder) / "walk.png", "walk")
        browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if browser is None:
            print("no Chromium is installed: page.png stays as it is")
            return
        page, shot = Path(folder) / "page.html", Path(folder) / "page.png"
        page.write_text(html(report), encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1200,2600", f"--screenshot={shot}"]
        subprocess.run([browser, *flags, page.as_uri()], check=True, capture_output=True, timeout=120)
        with Image.open(shot) as opened:
            part = io.BytesIO()
            attention_part(opened.convert("RGB")).save(part, "PNG")
        store(part, "page")


def attention_part(page: Image.Image) -> Image.Image:
    """The page's part about attention, which begins below the third line from edge to edge."""
    rows = np.asarray(page)[:, 100:-100]
    is_line = (rows == rows[:, :1]).all(axis=(1, 2)) & (rows[:, 0] != rows[0, 0]).any(axis=1)
    top = int(np.flatnonzero(is_line & ~np.roll(is_line, 1))[2])
    return page.crop((0, top + 4, page.width, min(top + 980, page.height)))


def store(source: Path | io.BytesIO, name: str, widest: int = 1200) -> None:
    """A picture of at most 256 colours and `widest` pixels, which is what pages show."""
    with Image.open(source) as opened:
        image = opened.convert("RGB")
    if image.width > widest:
        image = image.resize((widest, round(image.height * widest / image.width)), Image.Resampling.LANCZOS)
    place = PICTURES / f"{name}.png"
    image.quantize(256).save(place, optimize=True)
    size = place.stat().st_size
    print(f"{place.relative_to(ROOT)}: {size / 1000:.0f} kB")
    assert size < MOST, f"{place} has {size} bytes: at most {MOST} are to be"


if __name__ == "__main__":
    main()
