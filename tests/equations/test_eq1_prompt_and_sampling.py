"""Eq. 1 by hand: X_m = Concat(X_v, X_a, X_p), a clip's tokens spliced into the text; o ~ psi(X_m), a sampled token."""

import pytest
import torch
from erv_min.config import humanomni
from erv_min.generate import sample_token
from erv_min.model.humanomni import AUDIO, IGNORE, VIDEO
from erv_min.model.parameters import random_humanomni


@pytest.fixture(scope="module")
def toy():
    return random_humanomni(humanomni("toy"), seed=1)


def test_splice_by_hand(toy):
    # Row 0: 5 <video> 6, 2 video tokens: 5 v v 6. Row 1: <audio> 7 8 (8 masked out), 1 audio token: a 7, then padding.
    words = toy.model.embed_tokens.weight
    video, audio = torch.randn(1, 2, 96), torch.randn(1, 1, 96)
    ids = torch.tensor([[5, VIDEO, 6], [AUDIO, 7, 8]])
    labels = torch.tensor([[5, 1, 6], [1, 7, 8]])  # a placeholder's own label teaches nothing
    keep = torch.tensor([[1, 1, 1], [1, 1, 0]])
    prompts = toy.splice(ids, video, audio, labels, keep)
    zero = torch.zeros(96)
    expected = torch.stack([torch.stack([words[5], video[0, 0], video[0, 1], words[6]]),
                            torch.stack([audio[0, 0], words[7], zero, zero])])
    assert torch.equal(prompts.embeds, expected)
    assert prompts.labels.tolist() == [[5, IGNORE, IGNORE, 6], [IGNORE, 7, IGNORE, IGNORE]]
    assert prompts.mask.tolist() == [[True] * 4, [True, True, False, False]]


def test_sample_token_by_hand():
    # Probabilities 0.2, 0.3, 0.5: cumulative 0.2, 0.5, 1.
    logits = torch.tensor([0.2, 0.3, 0.5]).log().expand(5, 3)
    noise = torch.tensor([0.0, 0.19, 0.21, 0.51, 0.999], dtype=torch.float64)
    assert sample_token(logits, noise, 1.0).tolist() == [0, 0, 1, 2, 2]
    # top-k 2 leaves 0.3 and 0.5: cumulative 0, 0.375, 1 of what is left.
    cut = torch.tensor([0.0, 0.37, 0.38, 0.9, 0.99], dtype=torch.float64)
    assert sample_token(logits, cut, 1.0, top_k=2).tolist() == [1, 1, 2, 2, 2]
    # top-p 0.6: 0.5 does not reach it, 0.5 + 0.3 does: the same two are left. top-p 0.5 leaves the best alone.
    assert sample_token(logits, cut, 1.0, top_p=0.6).tolist() == [1, 1, 2, 2, 2]
    assert sample_token(logits, noise, 1.0, top_p=0.5).tolist() == [2] * 5
    # Of four equal tokens, the two that first reach 0.5; any two are as good.
    assert len(set(sample_token(torch.zeros(5, 4), noise, 1.0, top_p=0.5).tolist())) == 2
    # Of 3, 2, 1, 1, 1, 1, 1 tenths top-k 2 leaves 0.6 and 0.4 of what is left, of which 0.6 reaches 0.5.
    tenths = torch.tensor([3.0, 2, 1, 1, 1, 1, 1]).log().expand(5, 7)
    assert sample_token(tenths, noise, 1.0, top_k=2, top_p=0.5).tolist() == [0] * 5
    assert sample_token(logits, noise, 0).tolist() == [2] * 5
    # Temperature 1/2 squares them: 4, 9, 25 of 38, cumulative 0.105, 0.342, 1.
    assert sample_token(logits, torch.tensor([0.0, 0.1, 0.11, 0.34, 0.35]), 0.5).tolist() == [0, 0, 1, 1, 2]


def test_a_token_of_probability_one_in_a_billion_can_be_drawn():
    # Probabilities 1, 1e-9, 1e-9 (their sum apart): at noise 1 - 1.5e-9 the second, at 1 - 0.5e-9 the third. In float32
    # all cumulative sums are 1, and the first would always be drawn.
    logits = torch.tensor([1.0, 1e-9, 1e-9]).log().expand(3, 3)
    noise = torch.tensor([1 - 3e-9, 1 - 1.5e-9, 1 - 0.5e-9], dtype=torch.float64)
    assert sample_token(logits, noise, 1.0).tolist() == [0, 1, 2]
