"""Draws `docs/images/demo.png`, the page after two questions (needs playwright and Chromium)."""

import os
import shutil
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported

from video_ma2mba import EXAMPLE_VIDEOS
from video_ma2mba.cli.demo import demo_page
from video_ma2mba.hub_cards.space.web.examples import load_examples
from video_ma2mba.hub_cards.space.web.layout import serve
from video_ma2mba.loading import load_pipeline

OUT = Path(__file__).parent / "images" / "demo.png"
ASKED = {"In which direction does the green square go?": "down", "Which sign did the card show?": "y"}


def main() -> None:
    page = demo_page(EXAMPLE_VIDEOS, load_pipeline(device="cpu"))
    serve(page, load_examples(EXAMPLE_VIDEOS), wait=False, server_name="127.0.0.1")
    expect.set_options(timeout=120_000)
    with sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        shown = browser.new_page(viewport={"width": 1000, "height": 1440})
        shown.goto(page.local_url)
        shown.get_by_label("Video 2 (55 s)").check()
        shown.locator("video[src]").first.wait_for()
        shown.get_by_role("button", name="Read the video").click()
        shown.get_by_text("55 frames of 55 s of video read").wait_for(timeout=120_000)
        said: list[str] = []
        for question, answer in ASKED.items():
            shown.get_by_label("Your question").fill(question)
            shown.get_by_role("button", name="Ask").click()
            expect(shown.locator(".message.bot")).to_have_text(said := [*said, answer])
            expect(shown.get_by_role("button", name="Stop").last).to_be_disabled()
        shown.get_by_role("button", name="Where in the video is that?").click()
        shown.locator(".filmstrip li").last.wait_for(timeout=120_000)
        expect(shown.get_by_role("button", name="Stop").last).to_be_disabled()
        shown.screenshot(path=OUT, full_page=True)
        browser.close()
    page.close()
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()
