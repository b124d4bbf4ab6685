"""Take the screenshot of the web page in docs/images: python -m tools.page. Needs Chromium, gradio and playwright."""

import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.page.test_browser import CHROMIUM, FLAGS, open_and_paint, press, served, shown

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "page.png"


def main() -> None:
    """Paint over the cat's mouth and edit it with the bundled model."""
    with (
        tempfile.TemporaryDirectory() as folder,
        served(["emoji32"], Path(folder) / "log", Path(folder) / "temporary") as address,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 940})
        page.set_default_timeout(600_000)
        page.goto(address)
        open_and_paint(page, "cat, 32 x 32 pixels")
        press(page, "Edit")
        shown(page, "Edits")
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)  # until the messages have gone
        page.screenshot(path=PICTURE)
        browser.close()
    print(f"Wrote {PICTURE}.")


if __name__ == "__main__":
    main()
