"""Pages: escaped, self-contained, complete."""

import base64
import re

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
