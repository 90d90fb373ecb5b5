"""The page in a headless Chromium: by mouse, by keyboard, on a phone's screen. Skipped where there is no browser.

With SCREENSHOTS=DIR in the environment, what it looks like is kept there to be judged by eye.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api")


def runs(name: str) -> bool:
    """Whether there is such a program; Ubuntu's package holds one that only asks for a snap."""
    return shutil.which(name) is not None and subprocess.run([name, "--version"], capture_output=True).returncode == 0


CHROMIUM = next(filter(runs, ("chromium", "chromium-browser", "google-chrome")), None)
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio"),
    pytest.mark.bundled,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH, such as Debian's package chromium"),
]
VIDEO = Path(__file__).resolve().parents[3] / "examples" / "videos" / "000001.mp4"
QUESTIONS = {"Which sign did the card show?": "y", "In which direction does the green square go?": "down"}  # all right
FOR_CONTAINERS = ["--no-sandbox", "--disable-dev-shm-usage"]  # root, and a /dev/shm of 64 MB
SIZES = {"desk": (1280, 800), "phone": (360, 740)}


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    playwright.expect.set_options(timeout=120_000)  # a busy machine takes its time; what is expected does not change
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=shutil.which(CHROMIUM), args=FOR_CONTAINERS)
        yield running
        running.close()


@pytest.fixture(params=SIZES)
def page(browser, served, request: pytest.FixtureRequest) -> Iterator["playwright.Page"]:
    """The page, opened on one of the screens; it may fetch nothing from elsewhere, and nothing may go wrong in it."""
    width, height = SIZES[request.param]
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(120_000)
    foreign, errors = [], []
    page.on(
        "request", lambda sent: foreign.append(sent.url) if not sent.url.startswith((served.url, "blob:")) else None
    )
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(served.url)
    page.get_by_role("button", name="Read the video").wait_for()
    yield page
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{request.node.originalname}_{request.param}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing to scroll sideways
    page.close()
    assert foreign == []
    assert errors == []


def test_upload_read_ask_twice_download(page, tmp_path: Path):
    page.locator("input[type=file][accept*=video]").set_input_files(VIDEO)
    page.locator("video[src]").first.wait_for()
    page.get_by_role("button", name="Read the video").click()
    page.get_by_text("55 frames of 55 s of video read").wait_for()
    answers = page.locator(".message.bot")
    said = []
    for question, answer in QUESTIONS.items():
        page.get_by_label("Your question").fill(question)
        page.get_by_role("button", name="Ask").click()
        playwright.expect(answers).to_have_text(said := [*said, answer])
        playwright.expect(page.get_by_role("button", name="Stop").last).to_be_disabled()  # ready for the next one

    page.get_by_role("button", name="State file").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the state").click()
    state = tmp_path / download.value.suggested_filename
    download.value.save_as(state)
    assert state.name == "000001.state"

    page.reload()  # another visitor, another day
    page.get_by_role("button", name="State file").click()
    page.locator("input[type=file]:not([accept])").set_input_files(state)
    page.get_by_text("55 frames of 55 s of video read; kept in").wait_for()
    playwright.expect(answers).to_have_text(said)


@pytest.mark.parametrize("page", ["desk"], indirect=True)
def test_a_picture_of_the_strip_shows_its_second_in_the_video(page):
    page.get_by_label("Video 1 (40 s)").check()
    page.locator("video[src]").first.wait_for()
    page.get_by_role("button", name="Read the video").click()
    page.get_by_text("40 frames of 40 s of video read").wait_for()
    page.get_by_label("Your question").fill("Which sign did the card show?")
    page.get_by_role("button", name="Ask").click()
    playwright.expect(page.locator(".message.bot")).to_have_text(["2"])
    page.get_by_role("button", name="Where in the video is that?").click()
    picture = page.locator(".filmstrip li button").last
    picture.wait_for()
    second = float(picture.inner_text().split()[0])
    assert second > 30
    picture.click()
    page.wait_for_function(
        "second => Math.abs(document.querySelector('video').currentTime - second) < 0.6", arg=second
    )


@pytest.mark.parametrize("page", ["phone"], indirect=True)
def test_a_stopped_reading_keeps_its_frames_and_goes_on(page, served, monkeypatch):
    monkeypatch.setattr(served, "pace", 1.5)
    page.get_by_label("Video 2 (55 s)").check()
    page.locator("video[src]").first.wait_for()
    page.get_by_label("Frames read per second of video").first.fill("8")
    page.get_by_role("button", name="Read the video").click()
    page.get_by_text(re.compile(r"[1-9]\d* of 440 frames read")).wait_for()
    page.get_by_role("button", name="Stop").first.click()
    said = page.get_by_text("Stopped: ask about these, or go on.")
    said.wait_for()
    assert 0 < int(said.inner_text().split()[0]) < 440
    page.get_by_label("Your question").fill("Which sign did the card show?")
    page.get_by_role("button", name="Ask").click()
    playwright.expect(page.locator(".message.bot")).to_have_count(1)
    monkeypatch.setattr(served, "pace", 0.0)
    page.get_by_role("button", name="Go on reading").click()
    page.get_by_text("440 frames of 55 s of video read").wait_for()
    playwright.expect(page.get_by_role("button", name="Go on reading")).to_be_hidden()


def test_by_keyboard_alone(page):
    tab_to(page, "Read the video")
    page.keyboard.press("Enter")
    assert page.get_by_role("alert").inner_text() == "Pick a video or upload one first"
    page.reload()
    tab_to(page, "Video 1 (40 s)")
    page.keyboard.press("Space")
    page.locator("video[src]").first.wait_for()
    tab_to(page, "Read the video")
    page.keyboard.press("Enter")
    page.get_by_text("40 frames of 40 s of video read").wait_for()
    tab_to(page, "Your question")
    page.keyboard.type("Which sign did the card show?")
    page.keyboard.press("Enter")
    playwright.expect(page.locator(".message.bot")).to_have_text(["2"])


def tab_to(page, name: str) -> None:
    """Press Tab until what has this name has the focus, which must be seen."""
    focused = """() => { const it = document.activeElement; const style = getComputedStyle(it);
        return [it.ariaLabel || it.labels?.[0]?.innerText || it.innerText || '', style.outlineWidth] }"""
    for _ in range(40):
        page.keyboard.press("Tab")
        label, outline = page.evaluate(focused)
        if label.strip().startswith(name):
            assert outline != "0px", f"{name} has the focus, and nothing shows it"
            return
    raise AssertionError(f"40 presses of Tab do not lead to {name}")
