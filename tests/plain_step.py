"""The three training stages a second time, written from the paper's text, to hold the scripts against.

No speed and no sharing with what is tested: one completion at a time, its logits at all positions by HumanOmni.forward,
autograd, torch.optim.AdamW. Equations 2 to 5 and algorithm 1 are the paper's; what it leaves open (order of the data,
divergences, named variants) is as the README and the options' help say. `o` holds a run's options as attributes.
"""

import math
import re

import torch

EMOTIONS = ("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise", "contempt", "anxiety",
            "helplessness", "disappointment")
OF_DFEW = {"angry": "anger", "disgust": "disgust", "fear": "fear", "happy": "happiness", "neutral": "neutral",
           "sad": "sadness", "surprise": "surprise"}  # DFEW's labels -> the verifier's
GOEMOTIONS_CLASS = (2, 11, 14, 17, 27, 25, 26, 10, 19, 16, 9)  # of EMOTIONS in a head of 28 (divergence 4)


# ---- Eq. 4, Eq. 5 and algorithm 1 ------------------------------------------------------------------------------------


def split(explanation, rule):
    if rule == "released":  # white space after . ! ? with an even number of double quotes behind it
        parts = re.split(r'(?<=[.!?])\s+(?=(?:[^"]*"[^"]*")*[^"]*$)', explanation)
    else:  # "extended": not after Mr.; at newlines, too
        parts = re.split(r"(?<=[.!?])(?<!\bMr\.)[ \t]+|\n+", explanation)
    return [part.strip() for part in parts if part.strip()]


def labels_of(u, o):
    """Lines 7 to 14: EL_k of a sentence with probabilities u [11]."""
    best = sorted(range(11), key=lambda j: -u[j])
    over = [j for j in best if u[j] > o.tau]
    return [EMOTIONS[j] for j in (over[: o.k] if len(over) > 1 else best[:1])]


def explanation_reward(text, e_gt, table, o):
    found = re.search(r"<think>(.*?)</think>", text, re.DOTALL)
    explanation = found[1].strip() if found else ""
    S = [explanation] * bool(explanation) if o.ablate == "sentence-level" else split(explanation, o.sentence_rule)
    c = N_neu = 0
    for s in S:
        EL = labels_of(table(s), o)
        N_neu += EL == ["neutral"] if o.neutral_rule == "only" else "neutral" in EL
        c += OF_DFEW[e_gt] in EL
    everything = e_gt == "neutral" or o.ablate == "neutral-filtering"
    N = len(S) if everything else len(S) - N_neu
    return c / N if N > 0 else 0.0


def answer_reward(text, e_gt, o):
    if o.answer_rule == "paper":
        found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
        word = re.sub(r"^[\W_]+|[\W_]+$", "", found[1].lower()) if found else ""
        return float(OF_DFEW.get(word, word) == OF_DFEW[e_gt])
    found = re.search(r"<answer>(.*?)</answer>", text)  # on one line; else the whole output is the answer
    word = (found[1] if found else text).strip().lower().replace("\n", "")
    if word == "sadness":
        word = "sad"
    elif "happiness" in word or "anger" in word:
        word = "happy" if "happiness" in word else "angry"
    return float(word == e_gt)


def reward(text, e_gt, table, o):
    """(R, R_format, R_answer, R_E) of an output."""
    R_format = float(re.fullmatch(r"<think>.*?</think>\s*<answer>.*?</answer>", text, re.DOTALL) is not None)
    R_answer, R_E = answer_reward(text, e_gt, o), explanation_reward(text, e_gt, table, o)
    return o.w_explanation * R_E + o.w_format * R_format + o.w_answer * R_answer, R_format, R_answer, R_E


# ---- what the stages share -------------------------------------------------------------------------------------------


def places(count, o, step, per_step):
    """Which items step `step` reads: epochs of whole steps, each in an order drawn from seed and epoch, whose first
    items stand at the end of the last step again."""
    epoch, step_of_epoch = divmod(step, math.ceil(count / per_step))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(o.seed * 1_000_003 + epoch)).tolist()
    for at in range(step_of_epoch * per_step, (step_of_epoch + 1) * per_step):
        yield order[at % count]


def rate(step, total, o):
    rising = math.ceil(total * o.warmup)
    if step < rising:
        return o.lr * step / rising
    done = (step - rising) / (total - rising)
    return o.lr * {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[o.schedule]


def optimizer_of(model, parts):
    """AdamW of table 8 on the parameters whose names begin so; the others stay as they are."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(parts))
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, betas=(0.9, 0.999), weight_decay=0.0)


def update(optimizer, lr, max_grad_norm):
    """A step on the summed gradients, scaled to a norm of at most max_grad_norm; the norm before."""
    group, = optimizer.param_groups
    grads = [p.grad for p in group["params"] if p.grad is not None]
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
    for grad in grads:
        grad *= min(1.0, max_grad_norm / (norm + 1e-6))
    group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


def token_logits(model, x, ids):
    """x: (prompt ids, the clip's and the gate's tensors by name); logits [T, V] that predict each of `ids`."""
    prompt, clip = x
    logits = model(torch.tensor([prompt + ids]), **clip).logits[0]
    return logits[-len(ids) - 1 : -1]


def logps_of(logits, ids):
    return logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]


# ---- Eq. 3 -----------------------------------------------------------------------------------------------------------


def drawn(logits, ids, noise, o):
    """Whether each of `ids` is where its number in [0, 1) falls in the cumulative distribution, to 1e-5."""
    probs = logits.double().softmax(-1)
    if o.top_k:
        probs = probs.masked_fill(probs < probs.topk(o.top_k).values[:, -1:], 0)
    mass = probs.cumsum(-1)
    at, rows = torch.tensor(noise) * mass[:, -1], range(len(ids))
    return all(mass[t, ids[t]] - probs[t, ids[t]] - 1e-5 <= at[t] <= mass[t, ids[t]] + 1e-5 for t in rows)


def advantages(R, o):
    mean = sum(R) / len(R)
    std = math.sqrt(sum((r - mean) ** 2 for r in R) / (len(R) - 1))
    divisor = std + 1e-4 if o.advantages == "grpo" else 1.0
    return [0.0 if max(R) == min(R) else (r - mean) / divisor for r in R]


def grpo_step(model, reference, optimizer, lr, batch, eos, o):
    """batch: a (x, ids, A, noise) per completion. mu updates; what metrics.jsonl tells of the last one."""
    old, kept = [], [not o.mask_truncated or ids[-1] == eos for _, ids, _, _ in batch]
    tokens = sum(len(ids) for _, ids, _, _ in batch)
    tokens_kept = max(1, sum(len(ids) for (_, ids, _, _), keep in zip(batch, kept) if keep))
    norms = []
    for _ in range(o.mu):
        sums = dict.fromkeys(("loss", "kl", "entropy", "clip_fraction_low", "clip_fraction_high"), 0.0)
        for i, (x, ids, A, noise) in enumerate(batch):
            logits = token_logits(model, x, ids) / o.temperature
            logps = logps_of(logits, ids)
            with torch.no_grad():
                ref_logps = logps_of(token_logits(reference, x, ids) / o.temperature, ids)
            if len(old) == i:
                old.append(logps.detach())
                assert drawn(logits, ids, noise, o), f"completion {i} is not this policy's"
            ratio, d = (logps - old[i]).exp(), ref_logps - logps
            k3 = d.exp() - d - 1
            kl = k3 if o.kl == "k3" else ratio.detach() * d**2 / 2
            gain = torch.minimum(ratio * A, ratio.clamp(1 - o.epsilon, 1 + o.epsilon) * A)
            total = (o.beta * kl - gain).sum() * kept[i]
            lengths = {"grpo": len(ids) * len(batch), "dapo": tokens_kept, "dr-grpo": o.max_new_tokens * len(batch)}
            loss = total / lengths[o.loss_type]
            loss.backward()
            with torch.no_grad():
                sums["loss"] += loss.item()
                sums["kl"] += float(k3.sum()) / tokens
                sums["entropy"] -= float((logits.softmax(-1) * logits.log_softmax(-1)).sum()) / tokens
                sums["clip_fraction_low"] += float(((ratio < 1 - o.epsilon) & (A < 0)).sum()) / tokens
                sums["clip_fraction_high"] += float(((ratio > 1 + o.epsilon) & (A > 0)).sum()) / tokens
        norms.append(update(optimizer, lr, o.max_grad_norm))
    ended = sum(ids[-1] == eos for _, ids, _, _ in batch)
    return sums | {"lr": lr, "grad_norm": sum(norms) / o.mu, "truncated": 1 - ended / len(batch),
                   "completion_length": tokens / len(batch)}


GRPO_PARTS = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")  # table 8's language model
GRPO_PROJECTORS = ("model.mm_projector.", "model.audio_projector.", "model.bert_model.")  # and its other parts
SFT_PROJECTORS = ("model.mm_projector.", "model.audio_projector.", "model.bert_gate.")


def grpo(model, reference, inputs, labels, sampled, decode, table, eos, o):
    """The whole stage on the completions that the script sampled: sampled[step][place][i] is (ids up to and with EOS,
    the numbers that drew them). inputs, labels: the clip's x and e_gt by item. Trains `model`; a row per step, and
    AdamW."""
    optimizer, rows = optimizer_of(model, GRPO_PARTS + GRPO_PROJECTORS * o.train_projectors), []
    for step, groups in enumerate(sampled):
        batch, scores, zero = [], [], 0
        for item, group in zip(places(len(inputs), o, step, o.batch_size), groups, strict=True):
            of_group = [reward(decode(ids), labels[item], table, o) for ids, _ in group]
            A = advantages([R for R, *_ in of_group], o)
            batch += [(inputs[item], ids, a, noise) for (ids, noise), a in zip(group, A)]
            scores += of_group
            zero += len({R for R, *_ in of_group}) == 1
        row = grpo_step(model, reference, optimizer, rate(step, len(sampled), o), batch, eos, o)
        for name, values in zip(("reward", "reward_format", "reward_answer", "reward_explanation"), zip(*scores)):
            row[name] = sum(values) / len(values)
        rows.append(row | {"frac_zero_std": zero / len(groups)})
    return rows, optimizer


# ---- Eq. 2 -----------------------------------------------------------------------------------------------------------


def units_of(examples, size):
    """Lists of `size` targets of one clip; a clip's last one is filled up with its first targets."""
    clips = {}
    for example in examples:
        clips.setdefault((example.path, example.subtitle), []).append(example)
    return [[targets[(at + i) % len(targets)] for i in range(size)]
            for targets in clips.values() for at in range(0, len(targets), size)]


def sft(model, examples, x_of, encode, steps, o):
    """x_of(example): its x. Trains `model`; a row per step."""
    parts = GRPO_PARTS + SFT_PROJECTORS * o.train_projectors + ("model.vision_tower.",) * o.train_vision_tower
    optimizer, rows, units = optimizer_of(model, parts), [], units_of(examples, o.targets_per_clip)
    for step in range(steps):
        batch = [(x_of(example), encode(f"<think>{'' if o.answers_only else example.explanation}</think>\n<answer>"
                                        f"{example.label}</answer>") + encode("<|im_end|>\n"))
                 for item in places(len(units), o, step, o.batch_size // o.targets_per_clip) for example in units[item]]
        tokens = sum(len(y) for _, y in batch)
        total = 0.0
        for x, y in batch:
            divisor = tokens if o.loss_reduction == "mean" else len(batch)
            loss = -logps_of(token_logits(model, x, y), y).sum() / divisor
            loss.backward()
            total += loss.item()
        lr = rate(step, steps, o)
        rows.append({"loss": total, "lr": lr, "grad_norm": update(optimizer, lr, o.max_grad_norm), "tokens": tokens})
    return rows


# ---- the verifier (section 3.2) --------------------------------------------------------------------------------------


def macro_f1(u, truth, o):
    """Mean F1 over the emotions that occur, of the labels that the reward would read; u, truth: [S][11]."""
    chosen, scores = [labels_of(row, o) for row in u], []
    for j, emotion in enumerate(EMOTIONS):
        said, true = [emotion in EL for EL in chosen], [bool(row[j]) for row in truth]
        if any(true):
            scores.append(2 * sum(a and b for a, b in zip(said, true)) / (sum(said) + sum(true)))
    return sum(scores) / len(scores)


def verifier(model, rows, valid, encode, o, processes=1):
    """model: a RobertaForSequenceClassification; rows, valid: {"text", "labels", "source", "truth"}; encode(texts):
    ids and mask. Trains `model`; rows of metrics.jsonl and of epochs.jsonl, and the weights."""
    columns = GOEMOTIONS_CLASS if o.head == 28 else range(11)

    def many_hot(names, size, at):
        return torch.tensor([[float(any(at[EMOTIONS.index(x)] == j for x in labels)) for j in range(size)]
                             for labels in names])

    rows = [row for row in rows if not o.sources or row["source"] in o.sources.split(",")]
    wanted = many_hot([row["labels"] for row in rows], o.head, columns)
    truth = many_hot([row["truth"] for row in valid], 11, range(11)).tolist()
    optimizer, per_epoch = optimizer_of(model, ""), math.ceil(len(rows) / o.batch_size)
    total, logged, epochs = o.steps or o.epochs * per_epoch, [], []
    model.dropout.p = o.dropout
    for step in range(total):
        picked = list(places(len(rows), o, step, o.batch_size))
        ids, mask = encode([rows[i]["text"] for i in picked])
        logits = torch.empty(len(picked), o.head)
        for rank in range(processes):  # dropout is a function of seed, step and process
            torch.manual_seed(o.seed * 1_000_003 + step * processes + rank)
            mine = slice(rank, None, processes)
            logits[mine] = model.train()(ids[mine], mask[mine])
        bce = torch.nn.functional.binary_cross_entropy_with_logits
        loss = sum(bce(row, y) for row, y in zip(logits, wanted[picked])) / len(picked)
        loss.backward()
        lr = rate(step, total, o)
        logged.append({"loss": loss.item(), "lr": lr, "grad_norm": update(optimizer, lr, o.max_grad_norm)})
        if (step + 1) % per_epoch == 0 or step + 1 == total:
            with torch.no_grad():
                u = model.eval()(*encode([row["text"] for row in valid])).sigmoid()[:, list(columns)].tolist()
            epochs.append({"step": step, "macro_f1": macro_f1(u, truth, o)})
    return logged, epochs, model.state_dict()
