"""Pages: escaped, self-contained, complete."""

import base64
import re

import pytest
from matplotlib.figure import Figure

from pyro_vae.app.pages import Formula, Heading, Note, Page, Paragraph, Picture, Table, Verbatim


def page_with_everything():
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1], [1, 0])
    page = Page("All <parts>")
    page.add(
        Heading("One & two"),
        Paragraph("<script>alert(1)</script>"),
        Note("mind"),
        Verbatim("a  b\nc  d"),
        Formula(r"\log p(x) = \mathrm{ELBO} + \mathrm{KL}"),
        Table(["name", "value"], [["<b>", "1"], ["second", "2"]]),
        Picture(figure, 'a "caption"'),
    )
    return page


def page_of(*parts) -> Page:
    page = Page("A page")
    page.add(*parts)
    return page


def panels(count: int, *, together: bool = False) -> Figure:
    figure = Figure(figsize=(3.0 * count, 2.0), layout="constrained")
    for i, ax in enumerate(figure.subplots(1, count, squeeze=False)[0]):
        ax.plot([0, 1], [i, 1], label=f"line {i}")
        ax.set(title=f"panel {i}", xlabel="across", ylabel=f"up {i}")
    if together:
        figure.suptitle("all")
    return figure


def test_panels_beside_one_another_become_pictures_that_can_stack():
    picture = Picture(panels(3), "three")
    assert [part.alt for part in picture.panels] == [
        f"panel {i}: up {i} against across" for i in range(3)
    ]
    widths = [part.width for part in picture.panels]
    whole = Picture(panels(3, together=True), "a title over all keeps them together")
    (only,) = whole.panels
    assert only.alt == "all: " + "; ".join(part.alt for part in picture.panels)
    assert sum(widths) == pytest.approx(only.width, rel=0.1)
    html = page_of(picture).html()
    assert html.count("<img") == 3
    assert html.count("<figcaption>three</figcaption>") == 1
    assert 'alt="three"' not in html


def test_a_picture_without_a_caption_has_none():
    html = page_of(Picture(panels(1))).html()
    assert "<figcaption>" not in html
    assert 'alt="panel 0: up 0 against across"' in html


def test_what_is_wide_scrolls_in_its_own_box():
    html = page_with_everything().html()
    for tag in ("<table", "<img"):
        for at in (found.start() for found in re.finditer(tag, html)):
            assert 'class="scroll' in html[html.rindex("<div", 0, at) : at]


def test_tables_of_many_columns_are_set_smaller():
    for columns, dense in ((8, False), (9, True)):
        names = [str(i) for i in range(columns)]
        assert ('<table class="dense">' in page_of(Table(names, [names])).html()) == dense


def test_every_part_is_there_and_text_is_escaped(tmp_path):
    html = page_with_everything().save(tmp_path / "page.html").read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "<b>" not in html
    for text in ("All &lt;parts&gt;", "One &amp; two", "mind", "a  b\nc  d", "second"):
        assert text in html


def test_pictures_are_inside_the_page_and_nothing_is_outside():
    html = page_with_everything().html()
    images = re.findall(r'src="data:image/(png|svg\+xml);base64,([^"]+)"', html)
    assert [kind for kind, _ in images] == ["svg+xml", "png"]
    assert base64.b64decode(images[1][1]).startswith(b"\x89PNG")
    assert b"<svg" in base64.b64decode(images[0][1])
    assert not re.search(r'(src|href)="(?!data:)', html)
