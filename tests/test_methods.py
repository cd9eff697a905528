"""The methods section says what the runs did, and nothing else."""

import re
from pathlib import Path

import pytest
from conftest import whole_scores

from nucsam.folds.jobs import plan, variants
from nucsam.folds.methods import methods_section

CITATIONS = (Path(__file__).parents[1] / "CITATION.cff").read_text("utf-8")
RULES = (
    {"protocol": {"name": "nuinsseg"}, "rules": "nuinsseg: match at IoU > 0.5"},
    {"protocol": {"name": "nuinsseg-no-vague"}, "rules": "nuinsseg-no-vague: vague out"},
)
RUN = {  # environment.json
    "parameters": 6_028_720,
    "parameters_trainable": 284_828,
    "steps": 1500,
    "processes": 2,
    "precision": "fp16",
    "device": "Tesla T4",
    "device_type": "cuda",
    "nucsam": "0.1.0",
    "packages": {"torch": "2.6.0", "accelerate": "1.0.1"},
}
SCORED = {}  # entries of scores.json


def finish(job, protocols, organs):
    """Write the files of a finished run on four of twelve images, two of each group."""
    scored = [whole_scores()["scores"][0] | rules for rules in RULES[:protocols]]
    for document in scored:
        document["summary"] = document["summary"] | {"images": 4, "nuclei": 700}
    job.run.mkdir(parents=True)
    job.directory.write_metrics([{"epoch": job.config.train.epochs}])
    job.directory.write_scores(whole_scores(scores=scored, epoch=job.fold + 1, **SCORED))
    counts = {"train": 6 - job.fold // 2, "inner": 2 + job.fold // 2, "test": 4}
    job.directory.write_environment(RUN | {"images": counts})
    kind = {"part": "test", "sha256": ""}
    images = {f"{k}": {"organ": f"{k % organs}", "group": f"{k // 2}", **kind} for k in range(12)}
    job.directory.prepare(job.config, images)


@pytest.fixture
def section(tmp_path, tiny):
    """A function: the section of a configuration of which some folds are finished."""

    def write(*overrides, folds=(0, 1, 2), protocols=2, organs=2, nuinsseg=False):
        jobs = plan(variants(tiny(*overrides), []), tmp_path)
        for job in jobs:
            if job.fold in folds:
                finish(job, protocols, organs)
        return methods_section(jobs, nuinsseg=nuinsseg)

    return write


@pytest.mark.parametrize("certainty", [None, 0.0, 0.9])  # of earlier versions; not measured
def test_lower_thresholds_are_mentioned_where_a_fold_has_them(section, monkeypatch, certainty):
    if certainty is not None:
        monkeypatch.setitem(SCORED, "certainty", certainty)
    sentence = (
        "Nuclei under 30 px, or with a mean nucleus probability under 0.7, were removed. Where the "
        "nuclei of an image had a mean probability p below the lower quartile q of the images that "
        "chose the epoch, both thresholds of the probability were multiplied, by (p / q)^8 and "
        "(p / q)^3."
    )
    assert (sentence in section()) == bool(certainty)


@pytest.mark.parametrize("resampled", [0, 2])
def test_images_resampled_to_their_median_are_mentioned(section, monkeypatch, resampled):
    monkeypatch.setitem(RUN, "mpp", 0.375)
    monkeypatch.setitem(RUN, "resampled", resampled)
    sentence = "Images of another resolution were resampled to 0.375 µm per pixel."
    assert (sentence in section()) == (resampled > 0)


@pytest.mark.parametrize("root, name", [(".", "my set"), ("../link", "link")])
def test_a_data_set_has_the_name_of_its_folder(section, tmp_path, monkeypatch, root, name):
    (tmp_path / "my set").mkdir()
    (tmp_path / "link").symlink_to("my set")
    monkeypatch.chdir(tmp_path / "my set")
    assert f"We used the data set `{name}`: 12 images" in section(f"data.root={root}")


def test_every_number_is_of_the_runs(section):
    text = section("model.weights=auto", "model.alpha=8", "train.schedule=cosine")
    for sentence in (
        "We used the data set `set`: 12 images of 2 organs. It has 2,100 annotated nuclei.",
        "We ran a 3-fold cross-validation.",
        "scikit-learn's KFold with shuffling and random state 19.",
        "The images form 6 groups, such as patients or source images; the split separates no",
        "a part, stratified by organ, formed an inner validation set.",
        "each fold used 5 to 6 images for training, 2 to 3 for validation and 4 for testing.",
        "The model is MobileSAM [1], a compact form of the Segment Anything Model [2], with its",
        r"match `image_encoder\..*\.attn\.(qkv|proj)`, of rank 4 and scale alpha / rank = 2.",
        "Of 6,028,720 parameters, 284,828 were trained.",
        "trained once, with seed 0, for 2 epochs (1,500 optimizer steps) of AdamW.",
        "was 0.0005 for the adapters and 0.001 for the decoder, with a linear warm-up over 5 %",
        "A batch held 4 random crops of 64 x 64 px. The crops",
        "Areas that the annotators marked as vague had no part in the loss.",
        "Training ran on 2 Tesla T4 processes in fp16. The software was nucsam 0.1.0, PyTorch",
        "We validated after every epoch, and kept the epoch with the highest mean AJI on the valid",
        "(epoch 1 in fold 0, 2 in fold 1, 3 in fold 2). The test images had no part in this",
        "paper [8]: match at IoU > 0.5. A second score ignores vague areas: vague out.",
        "mean and sample standard deviation over 3 folds.",
    ):
        assert sentence in text, sentence
    assert "incomplete" not in text and "random:" not in text and "Dice loss" not in text


def test_the_works_are_those_of_the_citation_file(section):
    text = section(nuinsseg=True)
    body, works = text.split("\n\nReferences\n\n")
    numbers = [int(number) for number in re.findall(r"\[(\d+)\]", body)]
    listed = re.findall(r"^(\d+)\. .*(?:doi:|https://)(\S+)$", works, re.MULTILINE)
    assert [int(number) for number, _ in listed] == list(range(1, 9))
    assert sorted({*numbers}) == list(range(1, 9)) and body.index("[1]") < body.index("[2]")
    assert all(place in CITATIONS for _, place in listed)
    assert "NuInsSeg [1]: 12 H&E images" in text and "as in the NuInsSeg paper" not in text


@pytest.mark.parametrize(
    ("encoder", "name", "papers"),
    [
        ("sam_vit_b", "SAM ViT-B", ["ICCV51070.2023.00371"]),
        ("efficient_sam_ti", "EfficientSAM-Ti", ["2312.00863", "ICCV51070.2023.00371"]),
        ("lite_medsam", "LiteMedSAM", ["s41467-024-44824-z", "ICCV51070.2023.00371"]),
    ],
)
def test_the_encoder_is_named_and_cited(section, encoder, name, papers):
    text = section(f"model.encoder={encoder}", "model.weights=auto")
    compact = ", a compact form of the Segment Anything Model" if len(papers) > 1 else ""
    marks = [f"[{number}]" for number in range(1, len(papers) + 1)]
    model = f"{name} {marks[0]}{compact}{f' {marks[-1]}' if compact else ''}"
    assert f"The model is {model}, with its published weights." in text
    works = filter(None, text.split("\n\nReferences\n\n")[1].splitlines())
    assert all(paper in work and paper in CITATIONS for paper, work in zip(papers, works))
    assert "MobileSAM" not in text


def test_what_a_run_did_not_do_is_not_said(section):
    changes = ["model.head=sam", "model.train=full", "data.select=test", "train.schedule=step"]
    changes += ["train.ema=0", "loss.cross_entropy=0", "data.split=organ", "train.best=dice"]
    plain = ["stain=0", "blur=0", "noise=0", "d4=false", "scale_min=1", "scale_max=1"]
    text = section(*changes, *(f"augment.{change}" for change in plain), protocols=1, organs=1)
    for sentence in (
        "12 images. It has",
        "stratified by organ and were drawn with seed 19.",
        "Its weights were random: nothing was pretrained. We trained the whole image encoder.",
        "0.0005 for the encoder and 0.001 for the decoder, multiplied by 0.1 every 10 epochs.",
        "px. The loss is the sum of these terms, with their weights: soft Dice loss of the for",
        "highest mean Dice on the test images of the fold",
        "The test images thus chose the epoch, so that the scores are optimistic.",
    ):
        assert sentence in text, sentence
    for words in (
        "LoRA",
        "vague",
        "augmented",
        "average",
        "validation image",
        "micro-sam",
        "Tversky",
    ):
        assert words not in text, words


def test_unfinished_folds_are_named(section):
    text = section("model.train=head", folds=[1])
    for sentence in (
        "So far 4 of them are tested, which have 700 annotated nuclei.",
        "incomplete: folds 0, 2 of 3 (counted from 0) are missing.",
        "The image encoder stayed frozen.",
        "The peak learning rate was 0.001 for the decoder, with",
        "Scores are means over the test images of one fold.",
    ):
        assert sentence in text, sentence
    assert "standard deviation" not in text


def test_no_section_without_a_finished_fold(section):
    assert section(folds=[]) == ""
