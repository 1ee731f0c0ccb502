"""transformers' Qwen2 of the same dimensions with random weights, where it is installed (never at run time)."""

import time

import torch
from torch import Tensor

from benches.common import Options
from erv_min.base.errors import SettingsError


def qwen2(options: Options):
    """Their model, in eval mode. Raises SettingsError where transformers is missing."""
    try:
        from transformers import Qwen2Config, Qwen2ForCausalLM
    except ImportError as error:
        raise SettingsError("--versus transformers needs transformers: pip install transformers") from error
    c = options.config.text
    config = Qwen2Config(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, tie_word_embeddings=c.tie_word_embeddings, use_sliding_window=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).to(options.device, options.torch_dtype).eval()


def sample(model, prompt: Tensor, options: Options) -> list[float]:
    """`generate` as a user calls it: options.group samples of one prompt [1, P]; the time at which each token came."""
    times = []

    def clock(ids: Tensor, scores: Tensor) -> Tensor:
        times.append(time.perf_counter())
        return scores

    model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                   num_return_sequences=options.group, max_new_tokens=options.new_tokens,
                   min_new_tokens=options.new_tokens, logits_processor=[clock], pad_token_id=0)
    return times


def train_step(model, prompt: Tensor, completions: Tensor) -> None:
    """Forward and backward as GRPO trainers do it: the prompt repeated, logits at completion positions only."""
    ids = torch.cat([prompt.expand(len(completions), -1), completions], 1)
    logits = model(ids, logits_to_keep=completions.shape[1] + 1).logits[:, :-1]  # [G, T, V]
    logits.float().log_softmax(-1).gather(-1, completions[..., None]).sum().backward()
