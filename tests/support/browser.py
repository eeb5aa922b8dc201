"""A page as a real browser shows it: headless Chromium from the system's packages, where there is one."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync --disable-extensions "
    "--disable-background-networking --disable-component-update --allow-file-access-from-files --enable-logging=stderr"
)
PHONE = 375  # pixels

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")


@dataclass(frozen=True)
class Shown:
    """What the browser makes of a page: its widths in pixels, its elements by tag, and what it complains of."""

    needed_width: int
    given_width: int
    tags: dict[str, int]
    console: list[str]


def show(page: Path, scratch: Path, width: int = PHONE) -> Shown:
    """Opens a page in a frame of that width; a script around the frame measures it, so that the page needs none."""
    assert CHROMIUM is not None
    frame = scratch / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="file://{page}" style="width:{width}px;height:800px;border:0"></iframe>'
        '<pre id="o"></pre><script>onload = () => {'
        "const d = document.getElementById('f').contentDocument, e = d.documentElement, tags = {};"
        "for (const found of d.querySelectorAll('*')) tags[found.localName] = (tags[found.localName] || 0) + 1;"
        "document.getElementById('o').textContent = ['measured', e.scrollWidth, e.clientWidth,"
        " ...Object.entries(tags).map(([name, count]) => name + '=' + count)].join(' '); }</script>"
    )
    done = subprocess.run(
        [CHROMIUM, *FLAGS.split(), f"--user-data-dir={scratch / 'profile'}", "--dump-dom", f"file://{frame}"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env={**os.environ, "HOME": str(scratch)},
    )
    found = re.search(r"measured (\d+) (\d+) ([^<]*)", done.stdout)
    assert found is not None, done.stdout[-500:] + done.stderr[-500:]
    tags = {name: int(count) for name, count in re.findall(r"([\w-]+)=(\d+)", found[3])}
    return Shown(int(found[1]), int(found[2]), tags, re.findall(r".*CONSOLE.*", done.stderr))
