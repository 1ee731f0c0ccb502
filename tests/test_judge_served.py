"""The judge against a server that nobody here wrote: `transformers serve`, with a model that says "happy" to all."""

import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from erv_min.base.errors import JudgeError
from erv_min.emotions import labels
from erv_min.judge import make_judge

transformers = pytest.importorskip("transformers")
for module in ("fastapi", "uvicorn", "openai", "accelerate"):
    pytest.importorskip(module)


def cheerful_model(folder) -> None:
    """Layers of zeros hand on each token's embedding; the head turns every word into "happy", and "happy" into the
    end."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = Tokenizer(models.WordLevel({"happy": 0, "[UNK]": 1, "<end>": 2}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="[UNK]")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=3, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, tie_word_embeddings=False, bos_token_id=None, eos_token_id=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight += 1
        model.model.embed_tokens.weight[:, 0], model.model.embed_tokens.weight[0] = 1, torch.tensor([0.0, 1, 0, 0])
        model.lm_head.weight[0, 0], model.lm_head.weight[2, 1] = 1, 1
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cheerful")
    cheerful_model(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--host", "127.0.0.1",
               "--port", address.rpartition(":")[2], "--device", "cpu"]
    log = open(folder / "log", "w+")
    process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{address}/health")
            break
        except OSError:
            assert process.poll() is None, (log.seek(0), log.read())
            time.sleep(0.2)
    yield f"{address}/v1", str(folder)
    process.terminate()
    process.wait()


def test_a_server_of_others_is_asked_and_read(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ERV_JUDGE_BASE_URL", server[0])
    monkeypatch.setattr("erv_min.base.chat.RETRIES", 1)
    texts = ["She smiles.", "He laughs.", ""]
    judge = make_judge(f"openai:{server[1]}", tmp_path / "cache.jsonl")
    assert [j.emotion for j in judge(texts, labels("dfew"))] == ["happy", "happy", None]
    assert "2 requests (0 answered or repeated)" in capsys.readouterr().out
    with pytest.raises(JudgeError, match="2 of 2 requests failed|HTTP 404"):
        make_judge("openai:no/such-model")(texts, labels("dfew"))
