"""The gallery in a browser: a person decides by keys, and `dedup` takes the file that comes out."""

import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from playwright.sync_api import Browser, Page, expect

from pipeline.leaks import decision, features, findings, gallery, thumbnails
from pipeline.store import artifact, decode
from tests.browser import WIDTHS, is_cut, opened
from tests.leaks.bench import Bench, manifest_of, png
from tests.photographs import photograph

HOSTILE = '<img src=x onerror=alert(1)>, "q"\nb & c.png'
CLASS = '<b>it\'s</b> & "bird"'


def row(relation: str, image: str, match: str | None = None, outcome: str = "review", score: float | None = 0.6) -> findings.Row:
    """A finding; where images match, the right half of the match lies in the left half of the image."""
    measured: dict[str, Any] = {}
    if match is not None:
        measured = {"zncc": score, "local": score, "cover_image": 0.5, "cover_match": 0.5, "inliers": 9, "mirrored": False}
        measured |= {"negative": False, "transform": [1, 0, -0.5, 0, 1, 0, 0, 0, 1]}
    rule = findings.TOO_FEW if match is None else "same pixels" if outcome == "copy" else "shared features"
    return {"relation": relation, "id": image, "match_id": match, "outcome": outcome, "rule": rule, "score": score} | measured


def written(folder: Path, found: list[findings.Row], **sets: Mapping[str, bytes | np.ndarray]) -> Bench:
    """A bench whose search has found these rows."""
    work = Bench(folder, **sets)
    with artifact.writing(folder / "found") as tmp:
        findings.write_found(tmp, pa.Table.from_pylist(found, findings.FOUND), [*decision.REPORTED, "train-train"])
    return work


def many(folder: Path) -> Bench:
    """30 pool images for review, of which one has a copy, too; one copy; others of which nothing can be decided or seen."""
    pool: dict[str, bytes | np.ndarray] = {f"p{i:02}": photograph(i, 48, 36) for i in range(30)}
    pool |= {HOSTILE: photograph(90, 36, 48), "broken": b"no image"}
    val = {f"v{i}": photograph(50 + i, 48, 36) for i in range(4)}
    found = [row("pool-val", f"p{i:02}", f"v{i % 3}", score=0.3 + i / 100) for i in range(30)]
    found += [row("pool-val", "p07", "v3", "copy", 0.9), row("pool-val", HOSTILE, "v0", "copy", 0.95)]
    found += [row("pool-train", "p07", "t0"), row("val-val", "v1", "v0"), row("pool", "broken", None, "unverifiable", None)]
    work = written(folder, found, pool=pool, val=val, train={"t0": photograph(70, 48, 36)})
    work.overrides.write_text('id,action,reason\np29,keep,"old, and ""quoted"""\nt0,keep,no finding\n')
    work.decide()
    return work


@pytest.fixture
def work(tmp_path: Path) -> Bench:
    return many(tmp_path)


def page_of(work: Bench) -> Path:
    return work.folder / "out" / "gallery" / "index.html"


def counted(page: Page) -> dict[tuple[str, str], tuple[int, int | None]]:
    """The table of counts: images, and how many of them are undecided."""
    cells = "[...row.querySelectorAll('.number')].map(cell => cell.textContent)"
    row = f"rows => rows.map(row => [row.dataset.relation, row.dataset.outcome, ...{cells}])"
    rows = page.locator("#counts tr[data-relation]").evaluate_all(row)
    return {(relation, outcome): (int(n), int(left) if left else None) for relation, outcome, n, left in rows}


def names(page: Page) -> list[str]:
    return page.locator(".card .name").all_text_contents()


def test_ten_pairs_decided_by_keys_are_gone_after_the_next_decision(work: Bench, browser: Browser, tmp_path: Path):
    with opened(browser, page_of(work)) as page:
        expect(page.locator("#left")).to_have_text("31 of 32 images left")
        first = names(page)[:10]
        assert len(names(page)) == 24
        for key in "rkkrkrkrkk":
            page.keyboard.press(key)
        expect(page.locator("#left")).to_have_text("21 of 32 images left")
        assert not set(first) & set(names(page))
        page.reload()
        expect(page.locator("#left")).to_have_text("21 of 32 images left")
        with page.expect_download() as download:
            page.click("#download")
        file = tmp_path / "new.csv"
        download.value.save_as(file)
        assert download.value.suggested_filename == "overrides.csv"
    lines = list(csv.reader(io.StringIO(file.read_bytes().decode(), newline="")))
    assert lines[:3] == [["id", "action", "reason"], ["p29", "keep", 'old, and "quoted"'], ["t0", "keep", "no finding"]]
    actions = [{"k": "keep", "r": "remove"}[key] for key in "rkkrkrkrkk"]
    assert lines[3:] == [[image, action, "seen by eye"] for image, action in zip(first, actions, strict=True)]

    work.overrides.write_bytes(file.read_bytes())
    assert work.decide()["overrides"] == 11, "with p29; t0 has no finding"
    removed = {image for image, action in zip(first, actions, strict=True) if action == "remove"}
    assert not removed & work.kept()
    with opened(browser, page_of(work)) as page:
        expect(page.locator("#left")).to_have_text("21 of 32 images left")
        assert not set(first) & set(names(page))
        page.select_option("[name=state]", "written")
        assert set(names(page)) == {*first, "p29"}
        decision_on_first = page.locator(".card", has_text=first[0]).locator(".decision")
        expect(decision_on_first).to_have_text("remove: seen by eye (in overrides.csv)")


def test_what_was_decided_in_a_browser_is_known_again_by_the_search_alone(work: Bench, browser: Browser):
    """Until the decisions stand in overrides.csv; those of another search are not mixed up with these."""
    window = browser.new_context()
    page = window.new_page()

    def left(file: Path) -> str:
        page.goto(file.as_uri())
        page.wait_for_selector(".card")
        return page.inner_text("#left") + ", " + page.inner_text("#download")

    assert left(page_of(work)) == "31 of 32 images left, overrides.csv (0 new)"
    page.keyboard.press("r")
    chosen = page.evaluate("Object.keys(localStorage)")
    assert chosen == [f"winnow.gallery.{artifact.identity(work.folder / 'found')}"]
    work.decide(review="remove")
    assert left(page_of(work)) == "30 of 32 images left, overrides.csv (1 new)"
    other = written(work.folder / "other", [row("pool-val", "p00", "v0")], pool={"p00": photograph(0)}, val={"v0": photograph(1)})
    other.decide()
    assert left(page_of(other)) == "1 of 1 images left, overrides.csv (0 new)"
    page.goto(page_of(work).as_uri())
    page.select_option("[name=state]", "decided")
    [image] = names(page)
    work.overrides.write_text(f"id,action,reason\n{image},remove,edited in the file\n")
    work.decide()
    assert left(page_of(work)) == "31 of 32 images left, overrides.csv (0 new)"
    assert page.evaluate("Object.values(localStorage)") == ["[]"]
    window.close()


def test_undo_takes_the_last_decision_back_and_an_image_can_be_decided_again(work: Bench, browser: Browser):
    with opened(browser, page_of(work)) as page:
        first, second, *_ = names(page)
        for key in ("ArrowRight", "k", "ArrowLeft", "r", "u"):
            page.keyboard.press(key)
        expect(page.locator(".card[aria-current] .name")).to_have_text(first)
        expect(page.locator("#left")).to_have_text("30 of 32 images left")
        page.select_option("[name=state]", "decided")
        page.locator(".card .remove").click()
        expect(page.locator(".card .decision")).to_have_text("remove: seen by eye (decided here)")
        page.keyboard.press("u")
        expect(page.locator(".card .decision")).to_have_text("keep: seen by eye (decided here)")
        assert names(page) == [second]
        page.keyboard.press("Control+r")  # the browser's own
        expect(page.locator(".card .decision")).to_have_text("keep: seen by eye (decided here)")
        page.select_option("[name=state]", "open")
        page.locator("[name=text]").press_sequentially("rok")
        expect(page.locator("#left")).to_have_text("1 of 1 images left")
        assert names(page) == ["broken"]
        page.once("dialog", lambda dialog: dialog.accept())
        page.click("#forget")
        page.fill("[name=text]", "")
        expect(page.locator("#left")).to_have_text("31 of 32 images left")


def test_arrows_move_within_and_between_pages(work: Bench, browser: Browser):
    with opened(browser, page_of(work)) as page:
        order = names(page)
        columns = len(page.evaluate("getComputedStyle(document.getElementById('list')).gridTemplateColumns").split())
        assert columns == 3
        for key, place in (("ArrowDown", 3), ("ArrowRight", 4), ("ArrowUp", 1), ("ArrowLeft", 0), ("ArrowLeft", 0)):
            page.keyboard.press(key)
            expect(page.locator(".card[aria-current] .name")).to_have_text(order[place])
        for _ in range(24):
            page.keyboard.press("ArrowRight")
        expect(page.locator("#page")).to_have_text("images 25 to 31 of 31")
        expect(page.locator(".card[aria-current] .name")).to_have_text(names(page)[0])
        assert not set(order) & set(names(page))
        page.click("#before")
        assert names(page) == order


def test_filters_and_counts_are_those_of_the_audit(work: Bench, browser: Browser):
    metrics = work.decide()
    audit = work.audit()
    strongest = findings.counts(findings.read(work.folder / "out" / "leaks"))
    with opened(browser, page_of(work)) as page:
        table = counted(page)
        assert {key: images for key, (images, _) in table.items()} == strongest
        assert table["pool-val", "review"] == (metrics["review"], metrics["review"] - 1) == (29, 28)
        assert table["pool-val", "copy"] == (metrics["pool_val_copies"],) * 2 == (2, 2)
        assert table["val-val", "review"] == (1, None)
        for (relation, outcome), (images, left) in table.items():
            page.select_option("[name=state]", "")
            page.locator(f"tr[data-relation={relation}][data-outcome={outcome}] button").click()
            page.select_option("[name=state]", "")
            expect(page.locator("#page")).to_have_text(re.compile(rf" of {images}$"))
            if left is not None:
                expect(page.locator("#left")).to_have_text(f"{left} of {images} images left")
        page.select_option("[name=relation]", "")
        page.select_option("[name=strongest]", "")

        def passing(**values: str) -> set[str]:
            for name, value in values.items():
                field = page.locator(f"[name={name}]")
                field.select_option(value) if field.evaluate("f => f.tagName") == "SELECT" else field.fill(value)
            found = set(names(page))
            for name in values:
                field = page.locator(f"[name={name}]")
                field.select_option("") if field.evaluate("f => f.tagName") == "SELECT" else field.fill("")
            return found

        scored = {r["id"] for r in audit if r["score"] is not None and 0.4 <= r["score"] <= 0.5}
        assert passing(least="0.4", most="0.5") == scored
        assert passing(rule=findings.TOO_FEW) == {"broken"}
        assert passing(**{"class": "thing"}) == {"p07"}
        assert passing(text="v3") == {"p07"}
        page.select_option("[name=rule]", "shared features")
        page.fill("[name=text]", "p07")
        assert page.locator(".match").all_text_contents() == ["in t0 (train, thing)", "in v1 (val)"], "what passes comes first"
        page.select_option("[name=rule]", "")
        page.fill("[name=text]", "")
        page.select_option("[name=order]", "high")
        assert names(page)[:2] == [HOSTILE, "p07"]
        page.select_option("[name=order]", "matches")
        assert names(page)[0] == "p07"


def test_review_comes_first_and_the_matches_of_an_image_stand_together(work: Bench, browser: Browser):
    rows = gallery.by_doubt(findings.read(work.folder / "out" / "leaks"))
    images = list(dict.fromkeys(r["id"] for r in rows))
    scores = {r["id"]: abs(r["score"] - gallery.DOUBT) for r in rows if r["outcome"] == "review"}
    review = sorted(set(scores) - {"p07"}, key=lambda image: scores[image])
    assert images == [*review, "broken", "p07", HOSTILE]
    assert [r["match_id"] for r in rows if r["id"] == "p07"] == ["v3", "t0", "v1"]
    with opened(browser, page_of(work)) as page:
        page.fill("[name=text]", "p07")
        card = page.locator(".card")
        expect(card.locator("figure")).to_have_count(2)
        page.click("text=1 more")
        assert card.locator(".match").all_text_contents() == ["in v3 (val)", "in t0 (train, thing)", "in v1 (val)"]
        assert card.locator(".fate").all_text_contents() == ["goes from pool"] * 3


def test_foreign_text_is_shown_as_text(tmp_path: Path, browser: Browser):
    script = "</script><script>alert(1)</script>"
    work = written(tmp_path, [row("pool-train", HOSTILE, script)], pool={HOSTILE: photograph(1)})
    work.inputs["train"] = manifest_of(tmp_path / "labelled", {script: photograph(2)}, 0, [CLASS])
    work.decide()
    with opened(browser, page_of(work)) as page:
        assert names(page) == [HOSTILE]
        assert page.inner_text(".match") == f"in {script} (train, {CLASS})"
        page.select_option("[name=class]", CLASS)
        page.fill("#reason", ' "a, b" ')
        page.click(".card .keep")
        with page.expect_download() as download:
            page.click("#download")
        file = tmp_path / "overrides.csv"
        download.value.save_as(file)
        page.select_option("[name=state]", "decided")
        expect(page.locator(".decision")).to_have_text('keep: "a, b" (decided here)')
    assert work.decide()["overrides"] == 1
    with opened(browser, page_of(work)) as page:
        page.select_option("[name=state]", "written")
        expect(page.locator(".fate")).to_have_text('keep by hand: "a, b"')
        assert page.locator(".card img").count() == 0


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut(work: Bench, browser: Browser, width: int, scheme: Any):
    with opened(browser, page_of(work), width, color_scheme=scheme) as page:
        page.select_option("[name=state]", "", force=True)
        page.wait_for_selector("svg image[href]")
        assert not is_cut(page)
        for summary in page.locator("details:not([open]) summary").element_handles():
            summary.click()
        assert not is_cut(page)
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
        assert dark == (scheme == "dark")


def test_each_image_is_decoded_once_and_shown_in_its_place(tmp_path: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch):
    decoded: list[bytes] = []

    def counting(data: bytes) -> np.ndarray:
        decoded.append(data)
        return decode.decode(data)

    monkeypatch.setattr(thumbnails, "decode", counting)
    monkeypatch.setattr(thumbnails, "IN_FILE", 3)
    colours = {f"p{i}": np.full((40, 60, 3), (40 * i, 250 - 40 * i, 0), np.uint8) for i in range(5)}
    val: dict[str, bytes | np.ndarray] = {"v0": np.full((500, 250, 3), (0, 0, 250), np.uint8), "v1": b"no image"}
    found = [row("pool-val", name, "v0", score=0.65 + i / 100) for i, name in enumerate(colours)] + [row("pool-val", "p0", "v1")]
    work = written(tmp_path, found, pool=colours, val=val)
    work.decide()
    assert len(decoded) == len(set(decoded)) == 7
    assert len(list(page_of(work).parent.glob("thumbnails/*.js"))) == 3
    middle = """async image => {
        const picture = new Image(); picture.src = image.getAttribute("href"); await picture.decode();
        const canvas = document.createElement("canvas"), pen = canvas.getContext("2d"); pen.drawImage(picture, 0, 0);
        return [picture.width, picture.height, ...pen.getImageData(picture.width / 2, picture.height / 2, 1, 1).data.slice(0, 3)];
    }"""
    with opened(browser, page_of(work)) as page:
        page.wait_for_function("document.querySelectorAll('svg image[href]').length == 11")
        for name, colour in colours.items():
            left, right = page.locator(".card", has_text=f"{name}pool").locator("figure", has_text="in v0").locator("image").all()
            assert left.evaluate(middle) == pytest.approx([60, 40, *colour[0, 0].tolist()], abs=4)
            assert right.evaluate(middle) == pytest.approx([96, 192, 0, 0, 250], abs=4)
        expect(page.locator("figure", has_text="in v1").locator("text.missing")).to_have_text("no picture")


def test_the_outline_and_the_lines_lie_where_the_images_agree(tmp_path: Path, browser: Browser):
    """The pool image is the upper left quarter of its match, so the outline is there, and each line joins equal places."""
    match = photograph(3, 240, 160)
    work = Bench(tmp_path, pool={"quarter": match[:80, :120]}, val={"whole": match})
    work.run()
    with opened(browser, page_of(work)) as page:
        corners = page.locator(".outline").get_attribute("points") or ""
        frame = page.locator("svg > svg")
        x, width = (float(frame.get_attribute(name) or 0) for name in ("x", "width"))
        points = np.array([float(value) for value in corners.replace(" ", ",").split(",")]).reshape(4, 2)
        assert points == pytest.approx(np.array([[0, 0], [150, 0], [150, 100], [0, 100]]), abs=6)
        assert width == pytest.approx(300, abs=1)
        place = "['x1', 'y1', 'x2', 'y2'].map(name => Number(line.getAttribute(name)))"
        lines = page.locator("line").evaluate_all(f"lines => lines.map(line => {place})")
        assert 8 <= len(lines) <= 2 * gallery.LINES
        ends = np.array(lines)
        assert ends[:, :2] / 2 == pytest.approx(ends[:, 2:] - [x, 0], abs=6)


def test_a_page_holds_no_more_than_it_can_show_and_says_so(work: Bench, browser: Browser, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gallery, "SHOWN", 12)
    work.decide()
    with opened(browser, page_of(work)) as page:
        expect(page.locator(".warning")).to_have_text("The 12 most doubtful of 35 findings are here; all are in leaks.parquet.")
        assert len(names(page)) == 12 - 2, "p29 was decided on, and about v1 nobody can"
        assert counted(page)["pool-val", "review"][0] == 29


def test_thumbnails_do_not_change_with_the_decisions(work: Bench):
    """DVC's cache keeps them once."""

    def files() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in page_of(work).parent.glob("thumbnails/*")}

    before = files()
    work.overrides.write_text("id,action,reason\np03,remove,a\np04,keep,b\n")
    work.decide()
    assert files() == before != {}


def test_features_of_a_grey_copy_are_those_of_the_image():
    """Lines are drawn between features of images that were shrunk when they were decoded."""
    image = photograph(5, 640, 480)
    _, grey = thumbnails._small(png(image), True)
    assert grey is not None
    assert (features.extract(grey).features.descriptors == features.extract(image).features.descriptors).all()
