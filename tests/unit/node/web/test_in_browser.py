"""The page as a person sees it: headless Chromium, also without scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from browser_support import CHROMIUM, Browser, contrast
from ctflow.node.access.users import User, hash_of_password, write_users
from ctflow.node.web.server import serving
from needs import skip_without
from node_support import Ward, fill_busy

WIDE, NARROW = (1400, 900), (390, 800)
AXE = Path(__file__).parents[3] / "viewers" / "node_modules" / "axe-core" / "axe.min.js"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        skip_without("Chromium")
    browser = Browser(*WIDE)
    yield browser
    browser.close()


@pytest.fixture
def address(ward):
    with serving(ward.node) as port:
        yield f"http://127.0.0.1:{port}"


def look(browser, url, size=WIDE, scheme="light") -> None:
    """Go to an address and wait until it is drawn."""
    width, height = size
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
    browser.requests.clear()
    browser.said.clear()
    browser.call("Page.navigate", url=url)
    browser.wait_for(f"location.href === '{url}' && document.readyState === 'complete'")
    browser.settle()


def press(browser, label) -> None:
    """Press the button with this label where it is drawn. Nothing here waits for a frame: pages without scripts tell
    of none.
    """
    place = browser.value(
        "(() => { const button = [...document.querySelectorAll('button, summary')]"
        f".find(each => each.textContent === {label!r}); button.scrollIntoView({{block: 'center'}});"
        " const box = button.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2] })()"
    )
    for kind, buttons in (("mousePressed", 1), ("mouseReleased", 0)):
        browser.call(
            "Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", buttons=buttons, clickCount=1
        )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_every_page_fits_its_window_and_can_be_read(ward, address, browser, result_folder, size, scheme):
    empty = f"{address}/"
    look(browser, empty, size, scheme)
    assert browser.value("document.documentElement.scrollWidth") <= size[0]
    keys = fill_busy(ward, result_folder)
    ward.problems.append("Instances are refused: 3 GB are free")
    for path in ("/", "/?state=dead", "/events", "/series/none", *(f"/series/{key}" for key in keys.values())):
        look(browser, f"{address}{path}", size, scheme)
        assert browser.value("document.documentElement.scrollWidth") <= size[0], path
        assert contrast(browser) == [], path
        ground = browser.value("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(12, 14, 18)") is (scheme == "dark")


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_axe_finds_nothing(ward, address, browser, result_folder, size):
    """Names of controls, labels, order of headings, roles, contrast (WCAG 2.2 A and AA, and axe's best practices)."""
    if not AXE.is_file():
        skip_without("axe-core")
    keys = fill_busy(ward, result_folder)
    ward.problems.append("Instances are refused: 3 GB are free")
    for path in ("/", "/?q=none", "/events", "/series/none", *(f"/series/{keys[name]}" for name in ("late", "dead"))):
        look(browser, f"{address}{path}", size)
        browser.value(f"{AXE.read_text()}; 1")
        assert browser.value("axe.run().then(found => found.passes.length)") > 15
        found = browser.value(
            "axe.run().then(found => found.violations.map(each => [each.id, ...each.nodes.map(node => node.html)]))"
        )
        assert found == [], path


def test_the_list_is_searched_with_the_keyboard_alone(ward, address, browser):
    fill_busy(ward)
    look(browser, f"{address}/")
    for _ in range(40):
        browser.key("Tab")
        if browser.value("document.activeElement.id") == "q":
            break
    for letter in "scanner2":
        browser.key(letter)
    browser.key("Enter")
    browser.wait_for("location.search.includes('q=scanner2') && document.readyState === 'complete'")
    assert browser.value("document.querySelectorAll('table.series tbody tr').length") == 1
    assert browser.value("document.getElementById('q').value") == "scanner2"
    assert browser.value("document.querySelector('.chart').getAttribute('aria-label')")


def test_a_page_asks_for_nothing_from_elsewhere_and_the_browser_complains_of_nothing(
    ward, address, browser, result_folder
):
    keys = fill_busy(ward, result_folder)
    for path in ("/", "/events", f"/series/{keys['late']}"):
        look(browser, f"{address}{path}")
        assert browser.said == []
        assert all(url.startswith(f"{address}/") for url in browser.requests)
    assert [url for url in browser.requests if url.endswith("preview.png")]
    assert browser.value("document.querySelector('.preview img').naturalWidth") > 100


def test_a_report_works_in_its_sandbox(ward, address, browser, result_folder):
    key = ward.delivered("1", result=result_folder)
    look(browser, f"{address}/series/{key}/results/1/report.html")
    browser.wait_for("!!document.body.dataset.state")
    assert browser.value("document.body.dataset.state") == "ready"
    assert browser.value("window.origin") == "null"  # an origin of its own: it could ask the node for nothing


def test_a_script_that_got_into_a_page_would_not_run(ward, address, browser):
    look(browser, f"{address}/")
    browser.value(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
    )
    browser.settle()
    assert browser.value("window.ran") is None
    assert any("Content Security Policy" in said for said in browser.said)


def test_buttons_work_without_scripts(ward, address, browser):
    keys = fill_busy(ward)
    look(browser, f"{address}/")
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.call("Page.navigate", url=f"{address}/?state=aside")
        browser.wait_for("location.search === '?state=aside' && document.readyState === 'complete'")
        press(browser, "Try again")
        browser.wait_for(f"location.pathname === '/series/{keys['aside']}' && document.readyState === 'complete'")
        assert ward.journal.find(keys["aside"]).state == "complete"
        browser.call("Page.navigate", url=f"{address}/series/{keys['complete']}")
        browser.wait_for(f"location.pathname === '/series/{keys['complete']}' && document.readyState === 'complete'")
        press(browser, "Discard\u2026")
        browser.wait_for("document.querySelector('details').open")
        press(browser, "Discard")
        browser.wait_for("document.querySelector('.badge')?.textContent === 'Discarded'")
        assert ward.journal.find(keys["complete"]).state == "discarded"
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_a_keyboard_reaches_the_list_and_its_buttons(ward, address, browser):
    fill_busy(ward)
    look(browser, f"{address}/?state=aside")
    reached = []
    for _ in range(40):
        browser.key("Tab")
        reached.append(browser.value("document.activeElement.textContent.trim()"))
        assert browser.value("getComputedStyle(document.activeElement).outlineStyle") != "none" or not reached[-1]
        if reached[-1] == "Try again":
            break
    assert reached[0] == "Skip to content"
    assert reached[-1] == "Try again"


def test_a_form_of_another_site_changes_nothing(ward, address, browser, tmp_path):
    key = fill_busy(ward)["aside"]
    look(browser, f"{address}/")  # the browser has the cookie
    page = tmp_path / "evil.html"
    page.write_text(f'<form method="post" action="{address}/series/{key}/retry"><input name="token"></form>')
    browser.call("Page.navigate", url=page.as_uri())
    browser.wait_for("document.forms.length === 1")
    browser.value("document.forms[0].submit()")
    browser.wait_for(f"location.href.startsWith('{address}') && document.readyState === 'complete'")
    assert "Nothing was changed" in browser.value("document.body.textContent")
    assert ward.journal.find(key).state == "aside"


def test_no_other_page_can_frame_it(address, browser, tmp_path):
    page = tmp_path / "evil.html"
    page.write_text(f'<iframe src="{address}/"></iframe>')
    browser.said.clear()
    browser.call("Page.navigate", url=page.as_uri())
    browser.wait_for("document.readyState === 'complete' && document.querySelector('iframe')")
    browser.wait_for("document.querySelector('iframe').contentDocument === null")
    assert any("frame" in said.lower() for said in browser.said)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_the_form_to_sign_in_fits_its_window_can_be_read_and_works(tmp_path, browser, size, scheme):
    users = tmp_path / "users"
    write_users(users, {"anna": User("anna", "operate", hash_of_password("correct horse battery"))})
    ward = Ward(tmp_path / "signed", sign_on="local", users_file=users)
    fill_busy(ward)
    try:
        with serving(ward.node) as port:
            browser.call("Network.clearBrowserCookies")
            look(browser, f"http://127.0.0.1:{port}/sign-in", size, scheme)
            assert browser.value("document.documentElement.scrollWidth") <= size[0]
            assert contrast(browser) == []
            labels = "[...document.querySelectorAll('.entry input:not([type=hidden])')].map(each => each.labels.length)"
            assert browser.value(labels) == [1, 1]
            for name, text in (("name", "anna"), ("password", "correct horse battery")):
                browser.value(f"document.querySelector('#{name}').value = {text!r}")
            press(browser, "Sign in")
            browser.wait_for("location.pathname === '/' && document.readyState === 'complete'")
            browser.settle()
            assert browser.value("document.querySelector('.viewer bdi').textContent") == "anna"
            assert browser.value("document.documentElement.scrollWidth") <= size[0]
            assert contrast(browser) == []
    finally:
        ward.close()
