"""model/bert.py against the released networks' recorded outputs, and what the golden vectors do not reach."""

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN
from safetensors.torch import load_file

from erv_min.checkpoint import load_erv
from erv_min.config import BertConfig, roberta
from erv_min.erv import erv_loss
from erv_min.model.bert import BertEncoder, RobertaClassifier

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


def test_dropout_acts_where_roberta_has_it_in_training_alone(monkeypatch):
    """On the embeddings, on each layer's attention weights and both of its outputs, on [CLS] and before the logits."""
    model, ids, seen = RobertaClassifier(roberta("toy")), torch.tensor([[0, 5, 6, 2]]), []
    model.dropout.p, attend = 0.5, F.scaled_dot_product_attention
    model.dropout.register_forward_hook(lambda _, x, y: seen.append((*y.shape[1:], bool((y == 0).any()))))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args: seen.append(args[4]) or attend(*args))
    assert not torch.allclose(model.train()(ids), model(ids))
    layer = [0.5, (4, 64, True), (4, 64, True)]
    assert seen[: len(seen) // 2] == [(4, 64, True), *layer, *layer, (64, True), (64, True)]
    seen.clear()
    assert torch.equal(model.eval()(ids), model(ids))
    assert not any(x if isinstance(x, float) else x[-1] for x in seen)


def test_a_rate_of_0_changes_no_bit():
    model, ids = RobertaClassifier(roberta("toy")), torch.tensor([[0, 5, 6, 2], [0, 7, 2, 1]])
    assert torch.equal(model.train()(ids, ids != 1), model.eval()(ids, ids != 1))
