"""What the picture of queries and the images they brought promises."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from tutelage.curation import montage as room
from tutelage.curation.montage import KeptOut, Row, choose_rows, montage


def plain(red: int, green: int, blue: int, height: int = 40, width: int = 40) -> np.ndarray:
    """An image of one colour."""
    return np.full((height, width, 3), (red, green, blue), dtype=np.uint8)


def places(picture: Image.Image, colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) of the pixels of exactly one colour."""
    return np.nonzero((np.asarray(picture) == colour).all(axis=2))


def middle(picture: Image.Image, colour: tuple[int, int, int]) -> tuple[float, float]:
    """(y, x) of the middle of a colour."""
    ys, xs = places(picture, colour)
    assert len(ys), f"{colour} is nowhere to be seen"
    return float(ys.mean()), float(xs.mean())


QUERY, BEST, NEXT, LEAK, TWIN = (200, 10, 10), (10, 200, 10), (10, 10, 200), (200, 200, 10), (10, 200, 200)


def test_each_line_is_a_query_and_what_it_brought():
    """The query stands left of its images, the best of them first, all on one line; the next query is below."""
    rows = [
        Row("cat", plain(*QUERY), [(plain(*BEST), "0.91"), (plain(*NEXT), "0.90")]),
        Row("dog", plain(*LEAK), [(plain(*TWIN), "0.5")]),
    ]
    picture = montage(rows, "what was found")
    query, best, following = middle(picture, QUERY), middle(picture, BEST), middle(picture, NEXT)
    assert query[1] < best[1] < following[1]
    assert query[0] == best[0] == following[0]
    assert middle(picture, LEAK)[0] == middle(picture, TWIN)[0] > query[0]
    assert middle(picture, LEAK)[1] == query[1]
    assert len(places(picture, BEST)[0]) == 62 * 62  # the tile without its edge


def test_similarity_is_written_below_its_image():
    """A caption changes the picture below its own image, and nowhere else."""
    row = Row("cat", plain(*QUERY), [(plain(*BEST), "0.91"), (plain(*NEXT), "0.90")])
    bare = Row("cat", plain(*QUERY), [(plain(*BEST), ""), (plain(*NEXT), "0.90")])
    ys, xs, _ = np.nonzero(np.asarray(montage([row], "")) != np.asarray(montage([bare], "")))
    image_ys, image_xs = places(montage([row], ""), BEST)
    assert image_ys.max() < ys.min() <= ys.max() < image_ys.max() + 20
    assert image_xs.min() <= xs.min() <= xs.max() <= image_xs.max()


def test_frames_tell_classes_apart():
    """Queries of one class have frames of one colour, and other classes have others."""
    names = ["cat", "dog", "cat", "fox", "owl", "bee", "ant"]
    picture = montage([Row(name, plain(*QUERY)) for name in names], "")
    ys, xs = places(picture, QUERY)
    tops = np.setdiff1d(ys, ys + 1)
    frames = [picture.getpixel((int(xs.mean()), int(top) - 3)) for top in tops]
    assert len(frames) == 7
    assert frames[0] == frames[2]
    assert len(set(frames)) == 6
    for i, first in enumerate(frames):
        for second in frames[i + 1 :]:
            assert first == second or np.abs(np.subtract(first, second)).max() > 30


def test_whole_image_is_shown_in_its_proportions():
    """A wide image is neither cut nor squashed: its ends are there, and it is half as high as wide."""
    wide = np.concatenate([plain(*BEST, 50, 10), plain(*QUERY, 50, 80), plain(*BEST, 50, 10)], axis=1)
    ys, xs = places(montage([Row("cat", plain(0, 0, 0), [(wide, "")])], ""), BEST)
    assert np.ptp(xs) >= 58
    assert 28 <= np.ptp(ys) <= 32


def test_kept_out_images_stand_beside_what_they_repeat():
    """A leak is at the end of the picture with its twin at its right; without leaks there is no such strip."""
    rows = [Row("cat", plain(*QUERY), [(plain(*BEST), "0.91")])]
    picture = montage(rows, "", [KeptOut(plain(*LEAK), plain(*TWIN), "copy")], 1)
    leak, twin = middle(picture, LEAK), middle(picture, TWIN)
    assert leak[0] == twin[0] > middle(picture, QUERY)[0]
    assert 64 <= twin[1] - leak[1] <= 70
    assert montage(rows, "").height < picture.height


@pytest.mark.parametrize(
    "name",
    [
        "Käuzchen",
        "日本の犬",
        "собака",
        "a" * 400,
        "two\nlines\tof it",
        "\x00\x07",
        "bad \udcff byte",
        "",
        "كلب",
        "🐕‍🦺",
    ],
)
def test_any_class_name_can_be_written(name: str):
    """Long names are cut and those of any script or broken bytes drawn, left of the query and never across it."""
    row = Row(name, plain(*QUERY), [(plain(*BEST), "0.9")])
    picture = np.asarray(montage([row], title=name))
    ys, xs = places(Image.fromarray(picture), QUERY)
    assert len(ys) == 62 * 62
    dark = (picture[ys.min() : ys.max()] < 128).all(axis=2)
    left, right = dark[:, : xs.min() - 4], dark[:, xs.max() + 5 :]
    assert not left[:, :20].any()
    assert not right.any()
    assert left.any() == any(c.isprintable() and not c.isspace() for c in name)


def test_letters_that_no_font_has_lose_their_accents(monkeypatch):
    """Without a system font an accent is dropped and a foreign letter becomes a question mark, never an empty box."""
    monkeypatch.setattr(room, "FONTS", ("no such font.ttf",))
    room._writable.cache_clear()
    assert room._writable("Käuz-1 犬", 12)[0] == "Kauz-1 ?"
    room._writable.cache_clear()


def test_pillow_without_freetype(monkeypatch):
    """Where Pillow was built without FreeType the picture is still made, with its bitmap font."""

    def missing(*_, **options):
        if options.get("size") is not None:
            raise ImportError("The _imagingft C module is not installed")
        return ImageFont.load_default_imagefont()

    monkeypatch.setattr(ImageFont, "load_default", missing)
    room._font.cache_clear()
    room._writable.cache_clear()
    try:
        assert isinstance(room._font("", 12), ImageFont.ImageFont)
        middle(montage([Row("Käuzchen, 犬", plain(*QUERY), [(plain(*BEST), "0.9")])], "title"), BEST)
    finally:
        room._font.cache_clear()
        room._writable.cache_clear()


def test_a_query_that_brought_nothing_is_still_shown():
    """No query is dropped because it brought nothing, and no rows at all make a picture too."""
    middle(montage([Row("cat", plain(*QUERY))], ""), QUERY)
    assert montage([], "nothing").size > (0, 0)


# Which queries


def test_rows_take_classes_in_turn():
    """The worked example: each class once before any a second time, spread over its queries."""
    assert choose_rows(np.array([0, 0, 0, 1, 1, 1]), most=4).tolist() == [0, 3, 2, 5]


def test_every_class_is_seen_equally():
    """Of unequal classes each shows as many queries, as far as it has them, and never more than the lines allowed."""
    labels = np.repeat(np.arange(9), [50, 1, 50, 50, 2, 50, 50, 50, 400])
    labels = labels[np.random.default_rng(0).permutation(len(labels))]
    chosen = choose_rows(labels)
    assert len(set(chosen.tolist())) == len(chosen) <= 30
    assert np.bincount(labels[chosen]).tolist() == [3, 1, 3, 3, 2, 3, 3, 3, 3]
    assert labels[chosen[:9]].tolist() == list(range(9))
    assert chosen.tolist() == choose_rows(labels).tolist()


def test_more_classes_than_lines():
    """Of 1,000 classes 30 are shown, one query each, from the first class to the last."""
    chosen = choose_rows(np.repeat(np.arange(1000), 2))
    shown = np.repeat(np.arange(1000), 2)[chosen]
    assert len(set(shown.tolist())) == len(chosen) == 30
    assert (shown[0], shown[-1]) == (0, 999)
    assert np.diff(shown).max() <= 36
