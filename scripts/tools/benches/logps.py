"""Log-probs of G x T tokens at the head, forward and backward: in chunks, against logits [G, T, V] whole."""

from collections.abc import Iterator

import torch

from benches.common import Options, ceilings, fraction, ratios, timed
from erv_min.logps import token_logps


def measure(options: Options) -> Iterator[dict]:
    ceiling, c = ceilings(options), options.config.text
    n = options.group * options.tokens
    kwargs = dict(device=options.device, dtype=options.torch_dtype)
    hidden = torch.randn(n, c.hidden_size, **kwargs).requires_grad_()
    weight = (torch.randn(c.vocab_size, c.hidden_size, **kwargs) * c.hidden_size**-0.5).requires_grad_()
    ids = torch.arange(n, device=options.device) % c.vocab_size
    product = 2.0 * n * c.vocab_size * c.hidden_size

    def full() -> None:
        (hidden @ weight.T).float().log_softmax(-1).gather(-1, ids[:, None]).sum().backward()

    def run(variant: str, work, products: int) -> dict:
        def fresh() -> None:
            hidden.grad = weight.grad = None
            work()
        seconds, peak = timed(fresh, options)
        hidden.grad = weight.grad = None
        traffic = 2 * weight.nbytes + 4 * hidden.nbytes
        return {"variant": variant, "seconds": seconds, "tokens_per_s": n / seconds, "peak_bytes": peak.bytes,
                "flops": products * product, "bytes": traffic, "tokens": n,
                "ceiling_fraction": fraction(seconds, products * product, traffic, ceiling)}

    ours = run("ours", lambda: token_logps(hidden, weight, ids)[0].sum().backward(), 4)
    if options.versus:
        naive = run("naive", full, 3)
        yield naive
        ours |= ratios(ours, naive)
    yield ours
