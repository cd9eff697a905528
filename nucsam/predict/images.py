"""Image files in, files of their nuclei out: `nucsam predict`.

Several launched processes share the images by claims. Each takes the largest image that nobody
holds, predicts it, and notes the outcome in its claim. The system drops the claims of a process
that dies, so that another one takes its images. One image stays with one process: no result depends
on their number.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, repeat, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from nucsam.claims import Claim, folder_of_claims, read_note
from nucsam.console import Bar, PlainConsole
from nucsam.data.folders import (
    PREDICTIONS,
    bare_stem,
    is_data_set,
    list_folder,
    scan_folder,
    stem_of,
)
from nucsam.data.geojson import read_shapes, write_geojson
from nucsam.data.images import IMAGES, check_mpp, open_image, read_metadata
from nucsam.data.rois import Outlines
from nucsam.data.slides import one_file_each
from nucsam.errors import UserError, check_packages
from nucsam.files import (
    atomic,
    expanded,
    make_folder,
    shortened,
    stale_partials,
)
from nucsam.names import find_model, is_model_name
from nucsam.predict import writers
from nucsam.predict.models import load
from nucsam.predict.predictor import Predictor
from nucsam.predict.results import check_files, note_results, record_files, settings_of
from nucsam.predict.threads import in_threads
from nucsam.predict.tiles import Tiles, Window
from nucsam.predict.tissue import Tissue, find_tissue
from nucsam.processes import exit_on_sigterm, is_first, launch_time, process_count
from nucsam.run.directory import RunDirectory

POLL = 0.5  # s between looks at the images that other processes hold


def predict_files(
    model: str | Path,
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    formats: Sequence[str] = writers.USUAL,
    mpp: float | None = None,
    force: bool = False,
    roi: Path | None = None,
    tissue: bool = True,
    **options: Any,
) -> int:
    """Predict images into files of `out`, and return the exit status of this process.

    Args:
        model: a run directory, a file or a name, as `models.load` takes it.
        paths: image files, and folders of them; or one of them.
        out: folder of the results, which are named by the images' stems.
        formats: keys of `writers.FILES`.
        mpp: microns per px of every image, instead of what its file says.
        force: predict also the images that have all their files.
        roi: GeoJSON of the regions of one image to predict in, or a folder of STEM.geojson.
        tissue: skip the tiles that show glass alone.
        options: of `models.load`; `scale` and `mpp` exclude each other.

    Returns:
        1 on the first process where an image failed, else 0.

    Raises:
        UserError: a mistake that concerns more than one image; nothing has been written.
    """
    paths = [paths] if isinstance(paths, str | Path) else paths
    out = expanded(out)
    _check_options(formats, options.get("scale"), mpp)
    images = find_image_files(list(map(expanded, paths)))
    files = {path: writers.output_files(out, stem_of(path), formats) for path in images}
    regions = _roi_files(expanded(roi), images) if roi else {}
    check_files(files, out, regions.values())
    files = {path: files[path] for path in sorted(images, key=_size, reverse=True)}
    outlines = {path: Outlines(file, *read_shapes(file)) for path, file in regions.items()}
    path, name = find_model(model)
    predictor = load(path, **options)
    if path.is_dir() and is_first():
        _remark_unfinished(RunDirectory(path))
    settings = settings_of(name, predictor, mpp) | {"tissue": tissue}
    claims = out / ".claims" if process_count() > 1 else None
    make_folder(out)
    with exit_on_sigterm(), folder_of_claims(claims) if claims else nullcontext():
        results = record_files(out, settings, files, outlines, force)
        known = None if force else results
        batch = Batch(predictor, files, out, mpp, force, claims, outlines, tissue, known)
        try:
            return batch.run()
        except predictor.out_of_memory as error:
            raise UserError(f"out of device memory: lower batch, then tile ({error})") from error


def _remark_unfinished(run: RunDirectory) -> None:
    config = run.read_config()
    if not run.is_trained(config):
        text = f"{run.path}: UNFINISHED, {run.progress(config)}; its best epoch so far predicts"
        PlainConsole(stderr=True).say(text, style="yellow")


def _check_options(formats: Sequence[str], scale: float | None, mpp: float | None) -> None:
    unknown = [name for name in formats if name not in writers.FILES]
    if unknown or not formats:
        raise UserError(f"formats: found {unknown or 'none'}, expected {', '.join(writers.FILES)}")
    if set(formats) == {"tissue"}:
        raise UserError("formats: found tissue alone, expected another format beside it")
    if "parquet" in formats:
        check_packages("spatial", "pyarrow", "shapely")
    if scale and mpp:
        raise UserError("scale, mpp: found both, expected one")
    check_mpp(mpp)


def find_image_files(paths: Sequence[Path]) -> list[Path]:
    """The image files among `paths` and in the folders among them, each once.

    Subfolders and hidden files are left out; so are label maps, which have the names of images
    beside them with `_mask` and the like.

    Raises:
        UserError: names every path that is no image and every folder without one.
    """
    images: dict[Path, None] = {}
    problems = []
    for path in paths:
        suffix = path.suffix.lower()
        inside = _without_labels(list(filter(_is_image, list_folder(path))))
        if (path / PREDICTIONS).is_file():
            problems.append(f"{path}: found results of nucsam predict, expected images")
        elif path.is_dir() and not inside:
            problems.append(f"{path}: found no image, expected {', '.join(IMAGES)}{_inside(path)}")
        elif not path.exists():
            first = "; MODEL comes before PATHS" if is_model_name(str(path)) else ""
            problems.append(f"{path}: no such file or folder{first}")
        elif not path.is_dir() and suffix not in IMAGES:
            expected = f"expected {', '.join(IMAGES)}; convert it to TIFF"
            problems.append(f"{path}: found {suffix or 'no'} suffix, {expected}")
        images |= dict.fromkeys(inside if path.is_dir() else [path])
    if problems:
        raise UserError("\n  ".join(problems))
    return one_file_each(list(images))


def _without_labels(images: list[Path]) -> list[Path]:
    stems = {path: stem_of(path) for path in images}
    others = {*stems.values()}
    labels = [path for path, stem in stems.items() if bare_stem(stem) in others - {stem}]
    if labels and is_first():
        found = f"{labels[0]}: found {len(labels)} label map(s) beside their images, left out"
        PlainConsole(stderr=True).say(f"{found}; name such a file itself to predict it")
    return sorted({*images} - {*labels})


def _inside(folder: Path) -> str:
    """What a folder without images has instead, and what to do with it; "" for nothing."""
    records = scan_folder(folder).records if is_data_set(folder) else []
    if records:
        names = shortened(sorted({str(r.image.parent.relative_to(folder)) for r in records}))
        return f"; its images lie in subfolders, so name these instead: {names}"
    subfolders = list_folder(folder, folders_only=True)
    with_images = [path for path in subfolders if any(map(_is_image, list_folder(path)))]
    if with_images:
        names = shortened([path.name for path in with_images])
        return f"; its subfolders have some, so name them instead: {names}"
    others = Counter(path.suffix.lower() for path in list_folder(folder) if path.is_file())
    kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in others.items())
    return f"; convert to TIFF what lies there: {kinds}" if kinds else ""


def _is_image(path: Path) -> bool:
    if path.suffix.lower() not in IMAGES:
        return False
    # Reading a link to nothing says what is wrong, beside the results of the other images.
    return path.is_file() or (path.is_symlink() and not path.exists())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a link to nothing
        return 0


def _roi_files(roi: Path, images: Sequence[Path]) -> dict[Path, Path]:
    """The file of the regions to predict in, of each image."""
    if roi.is_dir():
        regions = {stem_of(p): p for p in list_folder(roi) if p.suffix.lower() == ".geojson"}
        stems = {path: stem_of(path) for path in images}
        return {path: regions.get(s, roi / f"{s}.geojson") for path, s in stems.items()}
    if len(images) == 1:
        return {images[0]: roi}
    expected = "one image, or a folder with a GeoJSON file for each"
    raise UserError(f"roi: found {roi} for {len(images)} images, expected {expected}")


@dataclass(eq=False)
class Batch:
    """Images and their result files, shared by the launched processes.

    Args:
        predictor: the model and its tiles.
        files: the result files by format, of each image.
        out: folder of the results.
        mpp: microns per px of every image; None = as its file says.
        force: predict also the images that have all their files.
        claims: folder of the claims, one file per image; None where this process is alone.
        rois: regions to predict in, by image; empty = everywhere.
        tissue: skip the tiles that show glass alone.
        known: as in `note_results`.
    """

    predictor: Predictor
    files: Mapping[Path, dict[str, Path]]
    out: Path
    mpp: float | None = None
    force: bool = False
    claims: Path | None = None
    rois: Mapping[Path, Outlines] = field(default_factory=dict)
    tissue: bool = True
    known: Mapping[str, set[str]] | None = None

    def __post_init__(self) -> None:
        self.since = launch_time()
        self.held: dict[Path, Claim | None] = {}
        self.outcomes: dict[Path, dict[str, Any]] = {}  # of the images that have ended
        for path in self.files:
            self._has_ended(path)
        self.skipped = len(self.outcomes)
        self.stale = defaultdict(list)  # result -> what a killed process has left of it
        for folder in {file.parent for results in self.files.values() for file in results.values()}:
            for stale, result in stale_partials(folder).items():
                self.stale[result].append(stale)
        self.warned = not is_first()  # of images without microns per px
        self.console = PlainConsole(stderr=True)
        self.bar = Bar(self.console, total=len(self.files) - self.skipped, shown=is_first())

    def run(self) -> int:
        """Predict the images until each has ended, on this process or another.

        Returns:
            1 on the first process where an image failed, else 0: a launcher ends all processes when
            one has another status than 0.
        """
        if self.skipped and is_first():
            self.console.say(f"{self.skipped} image(s) with results skipped; force replaces them")
        with self.bar:
            self._predict()
            while len(self.outcomes) < len(self.files):
                time.sleep(POLL)  # other processes hold the rest
                self._predict()
        if not is_first():
            return 0
        outcomes = [outcome for outcome in self.outcomes.values() if "skipped" not in outcome]
        failed = sum("failed" in outcome for outcome in outcomes)
        nuclei, tiles = (sum(o.get(key, 0) for o in outcomes) for key in ("nuclei", "tiles"))
        text = (
            f"{self.out}: {len(outcomes) - failed} image(s), {nuclei:,} nuclei, {tiles} tiles in "
        )
        text += f"{self.bar.task.elapsed:.1f} s" + (f"; {failed} failed" if failed else "")
        self.console.say(text)
        if nuclei and "geojson" in next(iter(self.files.values())):
            self.console.say(
                f"QuPath: open an image, then drag its .geojson from {self.out} onto it"
            )
        if len(outcomes) > failed and not nuclei:
            number = "mpp" if self.predictor.mpp else "scale"
            why = f"another magnification (try auto_scale or {number}) or stain (try adapt)"
            text = (
                f"no nucleus in any image; they may have {why}. {self.predictor.trained}".rstrip()
            )
            self.console.say(text, style="yellow")
        return int(failed > 0)

    def _has_ended(self, path: Path) -> bool:
        """Whether an image has ended, in this launch or with all its results before it."""
        note = read_note(self.claims / path.name) if self.claims else {}
        if note.get("ended", 0) >= self.since:
            self.outcomes[path] = note
        elif not self.force and all(file.is_file() for file in self.files[path].values()):
            self.outcomes[path] = {"skipped": True}
        return path in self.outcomes

    def _take(self) -> Iterator[Path]:
        """The images that no process holds or has ended, claimed one by one."""
        for path in [path for path in self.files if path not in self.outcomes]:
            claim = Claim.take(self.claims / path.name) if self.claims else None
            if self.claims and claim is None:
                continue
            if claim and self._has_ended(path):
                claim.release()
                continue
            self.held[path] = claim
            for file in self.files[path].values():
                for stale in self.stale.pop(file, []):
                    stale.unlink(missing_ok=True)
            yield path

    def _end(self, path: Path, **outcome: Any) -> None:
        """Note how an image has ended, and give it up."""
        self.outcomes[path] = outcome | {"ended": time.time()}
        if claim := self.held.pop(path):
            claim.note(self.outcomes[path])
            claim.release()
        self._show()

    def _predict(self) -> None:
        """Predict the images that no other process holds.

        The next image is read and goes through the model while the nuclei of one are extracted and
        written.
        """
        opened: dict[Tiles, tuple[Path, float | None]] = {}  # image file, microns per px

        def images() -> Iterator[Tiles]:
            for path in self._take():
                try:
                    image = open_image(path)
                    if 0 in image.shape:
                        raise UserError(f"{path}: found no pixels")
                    roi = self.rois.get(path)
                    if roi and not roi.areas:
                        others = roi.unused | Counter(detection=len(roi.nuclei))
                        kinds = ", ".join(f"{n} {kind}" for kind, n in others.items() if n)
                        found = f"{roi.path}: found {kinds or 'nothing'} and no annotation"
                        raise UserError(f"{found}, expected one to predict in")
                    area = roi and roi.inside
                    mpp, tissue = self._mpp(path), self._tissue(path, image)
                    tiles = self.predictor.grid(image, mpp=mpp, area=area, tissue=tissue)
                    if not tiles.windows:
                        found = f"found no pixel in the regions of {roi.path}"
                        raise UserError(f"{path}: {found}, expected coordinates in px")
                except (UserError, OSError) as error:
                    self._fail(path, error)
                    continue
                opened[tiles] = path, mpp
                yield tiles

        # A thread takes the next windows of the model while this one writes.
        following = in_threads(next, repeat((self.predictor.extract(images()), None)), 1)
        results = takewhile(lambda result: result is not None, following)
        for tiles, labels in groupby(results, key=lambda result: result[0]):
            windows = ((window, label) for _, window, label in labels)
            self._write(*opened.pop(tiles), tiles, windows)
        for tiles, (path, _) in opened.items():  # not one of its windows could be read
            self._fail(path, tiles.failed)

    def _tissue(self, path: Path, image: Any) -> Tissue | None:
        """Where to predict an image; None = everywhere. Writes the mask if a file is for it."""
        file = self.files[path].get("tissue")
        if not (file or self.tissue):
            return None
        tissue = find_tissue(image, whole=file is not None)
        if file:
            with atomic(file) as temporary:
                write_geojson(temporary, tissue.features(image.shape[:2]))
                note_results(self.out, {file: temporary}, self.known)
        return tissue if self.tissue else None

    def _mpp(self, path: Path) -> float | None:
        """Microns per px of an image. Warns once where an image or the training lacks them."""
        mpp, remarks = read_metadata(path)
        mpp = self.mpp or mpp
        trained = self.predictor.mpp
        lacking = (mpp is None) != (trained is None) and self.predictor.ratio is None
        if lacking and not self.warned:
            who = f"{path} has no" if mpp is None else "the model was trained without"
            why = "".join(f" ({remark})" for remark in remarks)
            assumed = "assuming the magnification of the training"
            self.console.say(f"{who} microns per px{why}: {assumed}")
            self.warned = True
        return mpp

    def _write(
        self,
        path: Path,
        mpp: float | None,
        tiles: Tiles,
        labels: Iterable[tuple[Window, np.ndarray]],
    ) -> None:
        def windows() -> Iterator[tuple[Window, np.ndarray]]:
            for done, window in enumerate(labels, 1):
                yield window
                self._show(done / len(tiles.windows))
            if tiles.failed:  # an OSError would be taken for one of the files written
                raise UserError(str(tiles.failed)) from tiles.failed

        try:
            files = {name: file for name, file in self.files[path].items() if name != "tissue"}
            finished = partial(note_results, self.out, known=self.known)
            nuclei = writers.write_files(files, tiles.image, windows(), mpp, finished=finished)
        except (UserError, OSError) as error:
            self._fail(path, error)
        else:
            self._end(path, nuclei=nuclei, tiles=tiles.run)

    def _fail(self, path: Path, error: Exception) -> None:
        text = str(error) if str(path) in str(error) else f"{path}: {error}"
        self.console.say(text, style="red")
        self._end(path, failed=text)

    def _show(self, part: float = 0.0) -> None:
        """Show how many images have ended, and `part`, 0..1, of the one that is being written."""
        ended = len(self.outcomes) - self.skipped
        speed = self.predictor.tiles_done / self.bar.task.elapsed
        text = f"{ended}/{len(self.files) - self.skipped} images, {speed:.1f} tiles/s"
        self.bar.show(text, ended + part)
