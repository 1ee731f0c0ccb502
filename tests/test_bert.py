"""model/bert.py against the released networks' recorded outputs, and what the golden vectors do not reach."""

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file

from erv_min.checkpoint import load_erv
from erv_min.config import BertConfig, roberta
from erv_min.erv import erv_loss
from erv_min.model.bert import BertEncoder, Dropout, RobertaClassifier

FOLDER = GOLDEN / "roberta"
BERT = BertConfig(20, 8, 2, 2, 16, max_position_embeddings=12)


@pytest.fixture(scope="module")
def golden() -> tuple[RobertaClassifier, dict]:
    return load_erv(FOLDER), load_file(FOLDER / "expected.safetensors")


@torch.no_grad()
def test_roberta_logits_with_padded_rows(golden):
    model, x = golden
    assert (x["attention_mask"] == 0).any()
    torch.testing.assert_close(model(x["input_ids"], x["attention_mask"]), x["logits"], atol=2e-6, rtol=0)


@torch.no_grad()
def test_roberta_loss(golden):
    model, x = golden
    loss = erv_loss(model(x["input_ids"], x["attention_mask"]), x["labels"])
    torch.testing.assert_close(loss, x["loss"][0], atol=1e-6, rtol=0)


@torch.no_grad()
def test_padding_changes_nothing(golden):
    """A sentence alone and the same sentence padded to the batch's length give the same logits."""
    model, x = golden
    for ids, mask, logits in zip(x["input_ids"], x["attention_mask"], x["logits"]):
        alone = model(ids[mask.bool()][None])
        torch.testing.assert_close(alone[0], logits, atol=2e-6, rtol=0)


@torch.no_grad()
def test_positions():
    """RoBERTa counts real tokens from pad_token_id + 1 (padding sits at pad_token_id); BERT counts places from 0."""
    for config, ids, places in ((roberta("toy"), [0, 7, 1, 1], [2, 3, 1, 1]), (BERT, [2, 7, 0], [0, 1, 2])):
        model, ids = BertEncoder(config), torch.tensor(ids)
        e = model.embeddings
        summed = e.word_embeddings(ids) + e.position_embeddings.weight[places] + e.token_type_embeddings.weight[0]
        torch.testing.assert_close(model.embed(ids[None])[0], e.LayerNorm(summed))


@torch.no_grad()
def test_a_masked_token_is_not_read():
    torch.manual_seed(0)
    model, ids = BertEncoder(BERT).eval(), torch.tensor([[2, 7, 9, 3]])
    cut = model(ids, torch.tensor([[1, 1, 1, 0]]))
    torch.testing.assert_close(cut[:, :3], model(ids[:, :3]))


def test_parameter_names_are_the_released_ones():
    names = set(dict(BertEncoder(BERT).named_parameters()))
    assert {"embeddings.LayerNorm.weight", "encoder.layer.1.attention.self.query.bias", "pooler.dense.weight",
            "encoder.layer.0.attention.output.LayerNorm.bias", "encoder.layer.0.intermediate.dense.weight"} <= names
    assert len(names) == 5 + 2 * 16 + 2
    saved = set(load_file(FOLDER / "model.safetensors"))
    assert saved == set(RobertaClassifier(roberta("toy", 28)).state_dict())

def test_dropout_acts_in_train_mode_only():
    model = RobertaClassifier(roberta("toy")).eval()
    ids = torch.tensor([[0, 5, 6, 2]])
    model.dropout.p, model.dropout.count = 0.5, 1
    torch.testing.assert_close(model(ids), model(ids), rtol=0, atol=0)
    model.train()
    assert not torch.allclose(model(ids), model(ids))
    model.dropout.p = 0.0
    torch.testing.assert_close(model(ids), model(ids), rtol=0, atol=0)


def test_dropout_by_hand():
    """A share p of the values is 0, the others grow by 1 / (1 - p), so that the mean stays. Rows of a batch that lies
    on two processes have the masks that they have on one."""
    dropout = Dropout(0.25).train()
    dropout.count = 4
    torch.manual_seed(0)
    whole = dropout(torch.ones(4, 10_000))
    assert sorted(whole.unique().tolist()) == [0, pytest.approx(4 / 3)]
    assert (whole == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    for rank in (0, 1):
        dropout.rows = slice(rank, None, 2)
        torch.manual_seed(0)
        assert torch.equal(dropout(torch.ones(2, 10_000)), whole[rank::2])


def test_attention_written_out_for_dropout_is_the_same_attention():
    """With a rate that drops nothing the training's form gives what evaluation gives, masked places left out."""
    torch.manual_seed(0)
    model, ids = BertEncoder(BERT), torch.tensor([[2, 7, 9, 3], [2, 8, 0, 0]])
    mask = torch.tensor([[1] * 4, [1, 1, 0, 0]])
    expected = model.eval()(ids, mask)
    model.train()
    model.dropout.p, model.dropout.count = 1e-12, 2
    assert model.dropout.active
    torch.testing.assert_close(model(ids, mask)[mask.bool()], expected[mask.bool()])
    torch.testing.assert_close(model(ids), model.eval()(ids))
