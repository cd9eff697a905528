"""Folds: which images train, which choose the epoch, which are tested."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nucsam.config import Config, Data
from nucsam.data.folders import Record, find_records
from nucsam.data.samples import by_region
from nucsam.errors import UserError
from nucsam.files import shortened

TRAIN, INNER, TEST, UNUSED = range(4)
PARTS = ("train", "inner", "test")
CHANGES = {  # entry of an inventory -> what a reader is told where it differs
    "sha256": "other pixels or labels",
    "organ": "another organ",
    "group": "another group",
    "part": "another part of the split",
}


@dataclass(frozen=True)
class Split:
    """Ascending indices into the records: to train on, to choose the epoch by, to test on."""

    train: tuple[int, ...]
    inner: tuple[int, ...]
    test: tuple[int, ...]


def training_images(
    data: Data, records: Sequence[Record], split: Split
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices of the images to train on, and of those that choose the epoch.

    Raises:
        UserError: one of the two is empty.
    """
    on_test = data.select == "test"
    train = split.train + split.inner if on_test else split.train
    select = split.test if on_test else split.inner
    if not train or not select:
        left = f"{len(train)} are left to train on and {len(select)} to choose the epoch by"
        found = f"found {len(records)} images in {data.root}, of which {left}"
        key = "data.images" if data.images else "data.root"
        raise UserError(f"{key}: {found}; expected at least one of each")
    return train, select


def _stratified(organs: np.ndarray, sizes: np.ndarray, parts: int, seed: int | tuple) -> np.ndarray:
    """The part of each group, 0 to parts - 1.

    Groups are dealt organ by organ, the largest first. A group goes to the part with the fewest
    images of its organ; the fewest images of all break ties.
    """
    order = np.random.default_rng(seed).permutation(len(organs))
    turn = {organs[group]: place for place, group in enumerate(order)}
    part_of = np.empty(len(organs), int)
    images = Counter()
    for group in sorted(order, key=lambda group: (turn[organs[group]], -sizes[group])):
        organ = organs[group]
        least = min(range(parts), key=lambda part: (images[part, organ], images[part]))
        part_of[group] = least
        images[least, organ] += sizes[group]
        images[least] += sizes[group]
    return part_of


def inventory(
    records: Sequence[Record], split: Split, digests: Sequence[str]
) -> dict[str, dict[str, str]]:
    """What a run keeps of its data set: name -> organ, group, part and SHA-256 of each image.

    Args:
        records: the images.
        split: names the part of each: train, inner or test; "unused" where it holds none.
        digests: of `samples.digest`, in the order of the records.
    """
    parts = {i: part for part in PARTS for i in getattr(split, part)}
    return {
        record.name: {
            "organ": record.organ,
            "group": record.group,
            "part": parts.get(i, "unused"),
            "sha256": sha,
        }
        for i, (record, sha) in enumerate(zip(records, digests))
    }


def inventory_changes(
    old: Mapping[str, Mapping[str, str]], new: Mapping[str, Mapping[str, str]]
) -> list[str]:
    """How two inventories differ, a text for each kind of change.

    Returns:
        For example ["added: a, b", "removed: c", "other pixels or labels: d"].
    """
    common = sorted(old.keys() & new.keys())
    kinds = {"added": sorted(new.keys() - old.keys()), "removed": sorted(old.keys() - new.keys())}
    for key, title in CHANGES.items():
        kinds[title] = [name for name in common if old[name][key] != new[name][key]]
    return [f"{title}: {shortened(names)}" for title, names in kinds.items() if names]


def split_records(records: Sequence[Record], data: Data) -> Split:
    """Split records into training, inner validation and test; no group is ever separated.

    - `split = "official"` is scikit-learn's KFold(folds, shuffle=True, random_state=seed) over the
      records, or over the sorted groups where a group has several images. `"organ"` gives each fold
      its share of every organ. `"leave-one-out"` tests fold k on all images of organ k, in
      alphabetical order: how a model does on an organ, or a source, that it never saw.
    - `fold = "all"` tests on nothing.
    - `images` is how many of the others are used. They are drawn from (seed, fold), spread over the
      groups; a smaller number uses a subset of what a larger one uses.
    - The inner split is the first of round(1 / inner) parts of the training images, at most one for
      each group, stratified by organ and drawn from (seed, fold). Where a large group makes it over
      twice its share, it is the part of the nearest ratio to the share. It is never empty where
      there are two groups.

    Args:
        records: the images, in their order.
        data: the section `data` of the configuration.

    Raises:
        UserError: there are more folds than groups; or one organ is left out, and there are not as
            many folds as organs, or a group has several.
    """
    images = Counter(record.group for record in records)
    groups = list(images) if len(images) == len(records) else sorted(images)
    organ_of = {record.group: record.organ for record in reversed(records)}
    organs = np.array([organ_of[group] for group in groups])
    sizes = np.array([images[group] for group in groups])
    kind = np.full(len(groups), TRAIN)
    number = data.fold
    names = sorted(set(organs))
    if data.split == "leave-one-out":
        _check_left_out(records, names, data.folds)
    if data.fold == "all":
        number = data.folds
    elif data.folds > len(groups):
        expected = f"at most one per group in {data.root}: {len(groups)}"
        raise UserError(f"data.folds: found {data.folds}, expected {expected}")
    elif data.split == "official":
        shuffled = np.random.RandomState(data.seed).permutation(len(groups))
        kind[np.array_split(shuffled, data.folds)[data.fold]] = TEST
    elif data.split == "leave-one-out":
        kind[organs == names[data.fold]] = TEST
    else:
        kind[_stratified(organs, sizes, data.folds, data.seed) == data.fold] = TEST
    kind_of = dict(zip(groups, kind))
    others = [i for i, record in enumerate(records) if kind_of[record.group] == TRAIN]
    used = _drawn(others, records, data.images, (data.seed, number)) if data.images else others
    sizes = Counter(records[i].group for i in used)
    rest = [k for k, group in enumerate(groups) if sizes[group]]
    if len(rest) > 1:
        counts = np.array([sizes[groups[k]] for k in rest])
        number_of_parts = round(1 / max(data.inner, 1 / len(rest)))
        parts = _stratified(organs[rest], counts, number_of_parts, (data.seed, number))
        held, share = np.bincount(parts, counts), data.inner * counts.sum()
        inner = 0 if held[0] <= 2 * share else np.argmin(np.abs(np.log(held) - np.log(share)))
        kind_of |= {groups[k]: INNER for k, part in zip(rest, parts) if part == inner}
    kinds = np.array([kind_of[record.group] for record in records])
    kinds[sorted(set(others) - set(used))] = UNUSED
    indices = (np.flatnonzero(kinds == wanted) for wanted in (TRAIN, INNER, TEST))
    return Split(*(tuple(found.tolist()) for found in indices))


def _check_left_out(records: Sequence[Record], organs: Sequence[str], folds: int) -> None:
    """Raise a UserError where not each organ can be left out."""
    if len(organs) == 1:
        expected = "several, each in a folder of its own"
        raise UserError(f"data.split: found leave-one-out of a single organ, expected {expected}")
    organs_of = defaultdict(set)
    for record in records:
        organs_of[record.group].add(record.organ)
    if several := sorted(group for group, names in organs_of.items() if len(names) > 1):
        found = f"found leave-one-out, and group {several[0]!r} in several organs"
        raise UserError(f"data.split: {found}, expected each group in one")
    if folds != len(organs):
        expected = f"{len(organs)}, one for each organ: {shortened(organs)}"
        raise UserError(f"data.folds: found {folds}, expected {expected}")


def _drawn(
    indices: Sequence[int], records: Sequence[Record], most: int, seed: tuple[int, int]
) -> list[int]:
    """At most `most` of the indices, at random: one of each group, then a second of each, ..."""
    order = np.random.default_rng(seed).permutation(indices).tolist()
    seen = Counter()
    turns = {}
    for i in order:
        turns[i] = seen[records[i].group]
        seen[records[i].group] += 1
    return sorted(order, key=turns.get)[:most]


def find_split(data: Data, root: str = "") -> tuple[list[Record], Split]:
    """The images of a configuration and their split; training and scoring must agree on it.

    The images of `data.test` come last. One with the name of another image is called test_NAME.

    Args:
        data: the section `data` of the configuration.
        root: folder of the images, if it has moved.
    """

    def found_in(folder: str, group: str) -> list[Record]:
        records = find_records(folder, layout=data.layout, group=group)
        return by_region(records, data.region_class, data.connected)

    records = found_in(root or data.root, data.group)
    split = split_records(records, data)
    if data.test:
        first = len(records)
        names = {record.name for record in records}
        for record in found_in(data.test, ""):
            name = record.name
            while name in names:
                name = f"test_{name}"
            names.add(name)
            records.append(replace(record, name=name))
        split = replace(split, test=tuple(range(first, len(records))))
    return records, split


def with_epochs(config: Config, processes: int = 1, split: Split | None = None) -> Config:
    """The configuration with the number of epochs, from 1, nearest to `train.presentations`.

    So runs on different numbers of images train equally long. 0 presentations change nothing.

    Args:
        config: of a run.
        processes: that train it together, each with `train.batch` images at a time.
        split: of its images, if it is known.
    """
    t = config.train
    if not t.presentations:
        return config
    split = split or find_split(config.data)[1]
    images = len(split.train) + (len(split.inner) if config.data.select == "test" else 0)
    batch = t.batch * t.accumulate * processes
    filled = batch * math.ceil(images / batch)  # the last batch of an epoch repeats images
    return replace(config, train=replace(t, epochs=max(1, round(t.presentations / max(1, filled)))))
