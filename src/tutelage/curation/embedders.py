"""Sources of the vectors for the search: the frozen teacher, a CLIP model, or embeddings computed elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from tutelage.curation.embed import ByNetwork, EmbeddingCache, Piece, pieces_of
from tutelage.curation.labelled_set import LabelledSplit
from tutelage.curation.precomputed_embeddings import PrecomputedEmbeddings
from tutelage.curation.ray_backend import embed_on_ray
from tutelage.data.image_cache import Images, short_side
from tutelage.data.sources import ImageRef
from tutelage.errors import TutelageError, shown
from tutelage.features.output_cache import OutputCache, compute_outputs
from tutelage.features.view_batches import CLEAN, ViewSettings
from tutelage.image_size import Size
from tutelage.metrics import unit
from tutelage.models.adapted_teacher import FeatureExtractor
from tutelage.progress import Advance, logger, progress
from tutelage.settings.command_flags import Curation

Ticking = Callable[[Advance], Advance]  # wraps a function that reports progress, as `Clock.ticking` does


@dataclass(frozen=True)
class Queries:
    """The queries with which the gallery is searched.

    vectors: (Q, D) float32, unit length. labels: (Q,) int64 class of each. names: their names in the manifest.
    drawn: (Q,) int64, the labelled image that represents each in the montage, as a position among those drawn. text: whether the
    queries are class names instead of images.
    """

    vectors: np.ndarray
    labels: np.ndarray
    names: list[str]
    drawn: np.ndarray
    text: bool = False


@dataclass(frozen=True)
class GalleryEmbedder:
    """Embeds gallery and target. side: short side of stored images. cache: folder. resize: as in evaluation. network or given: source.

    words: gives the (C, D) float32 vectors of class names for text queries; None for image queries. is_teacher: whether later
    stages need the same outputs. about_words: what the vectors of class names depend on.
    """

    side: int
    cache: Path
    resize: str
    network: FeatureExtractor | None = None
    given: PrecomputedEmbeddings | None = None
    words: Callable[[Sequence[str]], np.ndarray] | None = None
    about_words: list[object] = field(default_factory=list)
    is_teacher: bool = False

    @classmethod
    def of(cls, settings: Curation, cache: Path) -> GalleryEmbedder:
        """Build the embedder that the settings of `curate` name."""
        from tutelage.models.teachers import size_of

        sizes = [size_of(settings, kind) for kind in ("teacher", "student")]
        one = cls(short_side(*sizes), cache, settings.resize)
        if not settings.embeddings:
            return one._by_network(settings, sizes)
        given = PrecomputedEmbeddings(settings.embeddings)
        if not settings.text_embeddings:
            return replace(one, given=given)
        words = PrecomputedEmbeddings([settings.text_embeddings], "--text-embeddings")
        if words.width != given.width:
            raise TutelageError(
                f"--text-embeddings with {words.width} features, --embeddings with {given.width}: they are not of one model",
                "use the text and image vectors of the same CLIP model",
            )
        return replace(one, given=given, words=words.of_names, about_words=[words.about])

    def _by_network(self, settings: Curation, sizes: list[Size]) -> GalleryEmbedder:
        from tutelage.device import accelerator
        from tutelage.models.adapted_teacher import network_of
        from tutelage.models.teachers import build_teacher

        hardware = accelerator(settings.device, settings.precision)
        if settings.strategy != "text":
            size = settings.teacher_window or settings.teacher_size  # embed whole images at the size of one window
            teacher = build_teacher(settings.teacher, settings.teacher_weights, size)
            return replace(self, network=network_of(teacher, hardware), is_teacher=True)
        from tutelage.models.clip import TEMPLATES, build_clip, class_embeddings

        clip = build_clip(settings.clip, settings.clip_weights, hardware)
        templates = tuple(settings.templates) or TEMPLATES
        words = partial(class_embeddings, clip, templates=templates)
        side = short_side(max(sizes), clip.network.size)  # or it would see enlarged images
        return replace(self, side=side, network=clip.network, words=words, about_words=[clip.hash, templates])

    @property
    def identity(self) -> list[object]:
        """Return everything besides the images that the vectors depend on."""
        if self.given is not None:
            return [self.given.about, *self.about_words]
        assert self.network is not None
        return [self.network.hash, self.network.size, self.network.precision, *self.about_words]

    def target(self, labelled: LabelledSplit, rows: np.ndarray, what: str) -> np.ndarray | None:
        """Return raw vectors (n, D) float32 of these rows of the target set; None if precomputed embeddings lack all of them.

        Raises:
            TutelageError: precomputed embeddings lack some of the images.
        """
        if self.given is None:
            return self.outputs(labelled.of(rows), what)
        refs = [labelled.target.refs[row] for row in rows]
        found = self.given.find(refs, what)
        if (found < 0).all():
            return None
        if (found < 0).any():
            without = [ref.id for ref, row in zip(refs, found, strict=True) if row < 0]
            message = f"--embeddings: {len(without):,} of {len(refs):,} {what} have no vector: {shown(without)}"
            raise TutelageError(message, "embed all images of --target, or none of them")
        return self.given.finite(found)

    def queries(self, labelled: LabelledSplit, mean: np.ndarray | None) -> Queries:
        """Return the queries: labelled images, or class names. mean: (D,) float32 with which the gallery's vectors are centred."""
        labels, drawn = labelled.target.labels[labelled.drawn], np.arange(len(labelled.drawn))
        if self.words is not None:
            classes = list(labelled.target.classes)
            first = labelled.target.shows(labelled.drawn).argmax(axis=0)  # an image that shows the class
            vectors, names = unit(self.words(classes)), [f"text: {name}" for name in classes]
            return Queries(vectors, np.arange(len(classes)), names, first, text=True)
        features = self.target(labelled, labelled.drawn, "labelled images")
        if features is None:
            raise TutelageError(
                "--embeddings: no vector for any labelled image, although these are the queries",
                "embed the images of --target with the same encoder, or search by class name: "
                "--strategy text --text-embeddings FILE",
            )
        ids = [labelled.target.refs[row].id for row in labelled.drawn]
        return Queries(unit(features if mean is None else features - mean), labels, ids, drawn)

    def outputs(self, images: Images, what: str) -> np.ndarray:
        """Return the network's raw outputs (n, D) float32 for stored images, from the cache where it has them."""
        assert self.network is not None
        cache, settings = self._output_cache(), ViewSettings(resize=self.resize)
        with progress(what, len(images)) as advance:
            compute_outputs(cache, self.network, images, [CLEAN], settings, advance)
        return cache.table(images, CLEAN).rows()

    def hand_on(self, images: Images, features: np.ndarray) -> None:
        """Cache the teacher's features of chosen images for the later stages. features: (n, D), as the encoder gave them."""
        cache = self._output_cache()
        missing = cache.table(images, CLEAN).missing
        if len(missing):
            cache.add(images.keys[missing], features[missing], CLEAN)

    def _output_cache(self) -> OutputCache:
        assert self.network is not None
        return OutputCache(self.cache, self.network, self.resize, self.side)

    def cache_of_vectors(self) -> EmbeddingCache:
        """Return the cache of the gallery's vectors."""
        if self.given is not None:
            return EmbeddingCache(self.cache, self.given, self.side)
        assert self.network is not None
        return EmbeddingCache(self.cache, ByNetwork(self.network, self.resize), self.side)

    def embedded(
        self,
        refs: Sequence[ImageRef],
        settings: Curation,
        share: tuple[int, int] = (0, 1),
        ticking: Ticking = lambda advance: advance,
    ) -> tuple[EmbeddingCache, list[Piece], int]:
        """Embed the missing pieces of this share, here or on a cluster, as the settings say.

        Args:
            ticking: wraps the function that reports progress, as `Clock.ticking` does.

        Returns:
            the cache; all pieces; the number of images in the pieces that were missing.
        """
        if self.given is not None and (found := self.given.find(refs, "gallery images")).max(initial=-1) < 0:
            message = f"--embeddings: none of its {len(self.given):,} names is one of the {len(found):,} gallery images"
            hint = f"use names such as {refs[0].id!r}, or paths, instead of names such as {self.given.names[0]!r}"
            raise TutelageError(message, hint)
        cache, pieces = self.cache_of_vectors(), pieces_of(refs)
        missing = [piece for piece in pieces[share[0] :: share[1]] if not cache.has(piece)]
        count = sum(len(piece.refs) for piece in missing)
        with progress("embed the gallery", count) as advance:
            advance = ticking(advance)
            if missing and settings.engine == "ray":
                make = partial(_cache_of, _everywhere(settings), self.cache.absolute())
                embed_on_ray(make, cache.folder.name, missing, settings.device in ("auto", "cuda"), advance)
            else:
                for piece in missing:
                    cache.embed(piece, advance)
        return cache, pieces, count

    def held(self, labelled: LabelledSplit, mean: np.ndarray | None) -> np.ndarray | None:
        """Return (H, D) float32 unit vectors of validation and test images; None if precomputed embeddings lack all of them."""
        features = self.target(labelled, labelled.held, "validation and test images")
        if features is None:
            logger.info(
                "--embeddings has no vectors of validation and test images: copies of them are found by their pixels only"
            )
            return None
        return unit(features if mean is None else features - mean)


def _everywhere(settings: Curation) -> Curation:
    """Return the settings with absolute paths, for workers that run in other folders."""

    def whole(value: str) -> str:
        return str(Path(value).absolute()) if Path(value).exists() else value

    given = [whole(place) for place in settings.embeddings]
    words = settings.text_embeddings and whole(settings.text_embeddings)
    weights = {name: whole(getattr(settings, name)) for name in ("teacher_weights", "clip_weights")}
    return replace(settings, embeddings=given, text_embeddings=words, **weights)


def _cache_of(settings: Curation, cache: Path) -> EmbeddingCache:
    """Build the encoder and return the cache of its vectors."""
    return GalleryEmbedder.of(settings, cache).cache_of_vectors()
