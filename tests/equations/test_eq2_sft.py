"""Eq. 2 by hand: L_SFT = - sum_t log pi_theta(y_t | x, y_<t), as mean over label tokens and as sum; its log-probs."""

import pytest
import torch
from erv_min.config import humanomni
from erv_min.logps import Completions, Prompts, completion_logps, token_logps
from erv_min.model.humanomni import IGNORE
from erv_min.model.parameters import random_humanomni
from erv_min.sft import sft_loss
from tiny import tiny_model


@pytest.fixture(scope="module")
def toy():
    return random_humanomni(humanomni("toy"), seed=1)


@torch.no_grad()
def test_loss_is_the_mean_over_label_tokens(toy):
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    labels = torch.tensor([[IGNORE, IGNORE, 3, 4], [IGNORE, 6, IGNORE, IGNORE]])
    out = toy(ids, labels=labels)
    logps = out.logits.log_softmax(-1)
    expected = -(logps[0, 1, 3] + logps[0, 2, 4] + logps[1, 0, 6]) / 3
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_token_logps_by_hand():
    # Two words with logits 0 and ln 3 at temperature 1: probabilities 1/4, 3/4. At temperature 1/2 the logits double:
    # 0 and 2 ln 3: 1/10, 9/10. Entropy at temperature 1: -(1/4 ln 1/4 + 3/4 ln 3/4) = 0.562335.
    weight = torch.tensor([[0.0], [1.0]])
    hidden = torch.tensor([[3.0]]).log()
    logps, entropy = token_logps(hidden, weight, torch.tensor([1]), with_entropy=True)
    torch.testing.assert_close(logps.exp(), torch.tensor([0.75]))
    assert entropy.item() == pytest.approx(0.562335, abs=1e-5)
    torch.testing.assert_close(token_logps(hidden, weight, torch.tensor([0]), 0.5)[0].exp(), torch.tensor([0.1]))


def test_sft_loss_by_hand():
    # Eq. 2: label tokens with log-probs -1, -2 and -4; the 9s are padding. Mean 7/3; sum over tokens, mean over two
    # targets 7/2.
    logps = torch.tensor([[-1.0, -2.0], [-4.0, 9.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    assert sft_loss(logps, mask).item() == pytest.approx(7 / 3)
    assert sft_loss(logps, mask, denominator=2).item() == pytest.approx(3.5)


def test_sft_on_a_shared_prompt_equals_the_models_own_loss():
    """Eq. 2 through completion_logps and through the model's forward with labels (the released form) agree."""
    model = tiny_model()
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(0, 512, (1, 6), generator=generator)
    target = torch.randint(0, 512, (1, 5), generator=generator)
    input_ids = torch.cat([prompt, target], 1)
    labels = torch.cat([torch.full_like(prompt, -100), target], 1)
    embeds = model.model.embed_tokens(prompt)
    logps, _ = completion_logps(model, Prompts(embeds, torch.ones(1, 6, dtype=torch.bool)),
                                Completions(target, torch.ones(1, 5, dtype=torch.bool)))
    torch.testing.assert_close(sft_loss(logps, torch.ones(1, 5)), model(input_ids, labels=labels).loss)
