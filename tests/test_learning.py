"""What is said of a model that has learnt nothing."""

import pytest

from nucsam.config import Config, Train
from nucsam.run.learning import advice, learnt_nothing, steps_sentence


def scores(nuclei, predicted, dice):
    summary = {"images": 4, "nuclei": nuclei, "predicted": predicted, "pooled": {"dice": dice}}
    return {"images_of": "test", "scores": [{"summary": summary}]}


@pytest.mark.parametrize(
    "nuclei, predicted, dice, says",
    [(9, 0, 0.0, "predicts no nucleus"), (9, 5, 0.002, "about 0"), (9, 5, 0.2, ""), (0, 0, 0, "")],
)
def test_nothing_is_learnt(nuclei, predicted, dice, says):
    sentence = learnt_nothing(scores(nuclei, predicted, dice))
    assert says in sentence and bool(says) == bool(sentence)


def test_steps_and_what_may_help():
    text = "10 images x 100 epochs = 300 optimizer steps; 1,500 or more are usual"
    assert steps_sentence(10, 100, 300) == text
    assert "train.epochs=500 would" in advice(Config(), 100, 300)
    counted = Config(train=Train(epochs=200, presentations=2400))
    assert "which train.presentations=0 train.epochs=500 would" in advice(counted, 100, 300)
    assert "train.lr_head = 0.001: other rates" in advice(Config(), 100, 11300)
    assert "other rates" in advice(Config(), 0, 0)
