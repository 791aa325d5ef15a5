"""Train a small RWKV 5.2 on any text file, on one GPU in minutes or on a CPU in patience, and write a folder to serve.

    PYTHONPATH=src python recipes/rwkv5-small/train.py TEXT --out FOLDER --seconds 90
    martlet infer --model FOLDER            # or martlet deploy --model FOLDER

The vocabulary is made from the text: all bytes, and the pieces of words that save the most tokens. Training runs the
recurrence in chunks: what a chunk's tokens give each other is a masked product of matrices, what came before is the
state that chunks hand on. The last part of the text is held back; the weights that predict it best are written.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from martlet.hub.world_tokenizer import WorldTokenizer

CHUNK = 32  # tokens that see each other in one product; decays stay within exp(CHUNK), which float32 holds
MOST_DECAY = 1.0  # of -log(w) for one token


# The vocabulary


def make_vocabulary(text: str, size: int) -> WorldTokenizer:
    """`size` tokens: the end token, all bytes, and pieces of words. Begins with too many and drops the least used."""
    words = Counter(re.findall(r"\n+| ?[^\W\d_]+| ?\d| ?[^\w\s]+|\s+|_", text))
    saved: Counter[bytes] = Counter()  # bytes that a piece spares, if it stands where it can
    for word, count in words.items():
        data = word.encode()[:24]
        for begin in range(len(data) - 1):
            for end in range(begin + 2, len(data) + 1):
                saved[data[begin:end]] += count * (end - begin - 1)
    single = [bytes([byte]) for byte in range(256)]
    wanted = max(0, size - 257)
    pieces = [piece for piece, _ in saved.most_common(8 * wanted)]
    for room in (4 * wanted, 2 * wanted, wanted * 3 // 2, wanted * 5 // 4, wanted):
        tokenizer = WorldTokenizer(dict(enumerate(single + pieces, 1)))
        used: Counter[bytes] = Counter()
        for word, count in words.items():
            for token in tokenizer.encode(word):
                piece = tokenizer.token_bytes(token)
                used[piece] += count * (len(piece) - 1)
        pieces = [piece for piece, _ in used.most_common() if len(piece) > 1][:room]
    return WorldTokenizer(dict(enumerate(single + sorted(pieces), 1)))


# The network, with the names of the authors' files


def wkv(r: Tensor, k: Tensor, v: Tensor, rate: Tensor, bonus: Tensor) -> Tensor:
    """y_t = r_t (S + diag(bonus) k_t^T v_t), S <- diag(exp(-rate)) S + k_t^T v_t, from S = 0.

    r, k, v: float32 [B, H, T, D], T a multiple of CHUNK; rate, bonus: [H, D].
    """
    batch, heads, length, dim = r.shape
    chunks = length // CHUNK
    r, k, v = (x.view(batch, heads, chunks, CHUNK, dim) for x in (r, k, v))
    age = torch.arange(CHUNK, device=r.device, dtype=r.dtype).view(CHUNK, 1)
    rate = rate.view(heads, 1, 1, dim)
    r_in = r * (-rate * age).exp()  # decayed since the chunk began
    k_in = k * (rate * (age + 1)).exp()  # to be decayed from its own place on
    k_out = k * (-rate * (CHUNK - 1 - age)).exp()  # decayed until the chunk ends
    scores = (r_in @ k_in.transpose(-1, -2)).tril(-1)
    scores = scores + torch.diag_embed((r * bonus.view(heads, 1, 1, dim) * k).sum(-1))
    y = scores @ v
    given = k_out.transpose(-1, -2) @ v  # [B, H, chunks, D, D]
    keep = (-rate * CHUNK).exp().view(heads, dim, 1)
    state = torch.zeros_like(given[:, :, 0])
    before = []
    for chunk in range(chunks):
        before.append(state)
        state = state * keep + given[:, :, chunk]
    y = y + r_in @ torch.stack(before, 2)
    return y.view(batch, heads, length, dim)


def shifted(x: Tensor, share: Tensor) -> Tensor:
    """A mix of each token with the one before; share: of the token itself."""
    return x * share + F.pad(x, (0, 0, 1, -1)) * (1 - share)


class TimeMix(nn.Module):
    def __init__(self, layer: int, depth: int, width: int, head: int):
        super().__init__()
        place, late = torch.arange(width) / width, layer / max(1, depth - 1)
        power = 1 - layer / depth
        self.heads, self.head = width // head, head
        self.time_mix_k = nn.Parameter(place.pow(power).view(1, 1, -1))
        self.time_mix_v = nn.Parameter((place.pow(power) + 0.3 * late).view(1, 1, -1))
        self.time_mix_r = nn.Parameter(place.pow(0.5 * power).view(1, 1, -1))
        self.time_mix_g = nn.Parameter(place.pow(0.5 * power).view(1, 1, -1))
        channel = torch.arange(width) / (width - 1)
        zigzag = 0.1 * ((torch.arange(width) + 1) % 3 - 1)
        self.time_decay = nn.Parameter((-6 + 5 * channel.pow(0.7 + 1.3 * late)).view(self.heads, head))
        self.time_faaaa = nn.Parameter((late * (1 - channel) + zigzag).view(self.heads, head))
        self.receptance, self.key, self.value, self.gate, self.output = (
            nn.Linear(width, width, bias=False) for _ in range(5)
        )
        self.ln_x = nn.GroupNorm(self.heads, width, eps=64e-5)
        nn.init.zeros_(self.output.weight)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shares = (self.time_mix_r, self.time_mix_k, self.time_mix_v)
        linears = (self.receptance, self.key, self.value)
        r, k, v = (
            linear(shifted(x, share)).view(batch, length, self.heads, self.head).transpose(1, 2)
            for linear, share in zip(linears, shares, strict=True)
        )
        gate = F.silu(self.gate(shifted(x, self.time_mix_g)))
        with torch.autocast(x.device.type, enabled=False):
            rate = self.time_decay.float().exp().clamp(max=MOST_DECAY)
            y = wkv(r.float(), k.float(), v.float(), rate, self.time_faaaa.float())
            y = self.ln_x(y.transpose(1, 2).reshape(batch * length, width)).view(batch, length, width)
        return self.output(y * gate)


class ChannelMix(nn.Module):
    def __init__(self, layer: int, depth: int, width: int):
        super().__init__()
        share = (torch.arange(width) / width).pow(1 - layer / depth).view(1, 1, -1)
        self.time_mix_k, self.time_mix_r = nn.Parameter(share), nn.Parameter(share.clone())
        hidden = int(3.5 * width) // 32 * 32
        self.key = nn.Linear(width, hidden, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.value.weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.key(shifted(x, self.time_mix_k))).square()
        return self.receptance(shifted(x, self.time_mix_r)).sigmoid() * self.value(hidden)


class Block(nn.Module):
    def __init__(self, layer: int, depth: int, width: int, head: int, dropout: float):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(width)
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.att, self.ffn = TimeMix(layer, depth, width, head), ChannelMix(layer, depth, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.att(self.ln1(x)), self.dropout, self.training)
        return x + F.dropout(self.ffn(self.ln2(x)), self.dropout, self.training)


class RWKV(nn.Module):
    def __init__(self, vocabulary: int, depth: int, width: int, head: int, dropout: float):
        super().__init__()
        self.emb = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(layer, depth, width, head, dropout) for layer in range(depth))
        self.ln_out, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.emb.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, T] -> logits float32 [B, T, vocabulary]."""
        x = self.blocks[0].ln0(self.emb(tokens))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_out(x)).float()


# Training


def windows(tokens: Tensor, length: int, begins: list[int], device: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, length] from the places `begins`."""
    both = torch.stack([tokens[begin : begin + length + 1] for begin in begins]).to(device, non_blocking=True)
    return both[:, :-1], both[:, 1:]


@torch.no_grad()
def held_out_loss(model: RWKV, tokens: Tensor, length: int, batch: int, device: str) -> float:
    model.eval()
    begins = list(range(0, len(tokens) - length - 1, length))
    losses = []
    for at in range(0, len(begins), batch):
        x, y = windows(tokens, length, begins[at : at + batch], device)
        losses += F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none").view(x.shape).mean(1).tolist()
    model.train()
    return sum(losses) / len(losses)


def optimiser(model: RWKV, rate: float) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() == 2 and min(p.shape) > 64]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), eps=1e-8)


def train(model: RWKV, training: Tensor, held_out: Tensor, options: argparse.Namespace) -> dict[str, Tensor]:
    """The state of the model at its best, on the CPU."""
    device, rng = options.device, random.Random(options.seed)
    steps, seconds = options.steps or math.inf, options.seconds or math.inf
    optimizer, began, best, kept = optimiser(model, options.rate), time.perf_counter(), math.inf, {}
    last = len(training) - options.context - 1
    step, next_look, shown = 0, 0.0, []
    while True:
        done = max(step / steps, (time.perf_counter() - began) / seconds)
        if done >= next_look:
            loss = held_out_loss(model, held_out, options.context, options.batch, device)
            if loss < best:
                best, kept = loss, {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
            recent = f"{sum(shown) / len(shown):5.3f}" if shown else "    -"
            spent, shown = time.perf_counter() - began, []
            print(f"{spent:6.1f} s  step {step:5d}  training {recent}  held out {loss:.3f}", flush=True)
            next_look = done + 1 / options.looks
        if done >= 1:
            print(f"best held-out loss {best:.3f} nats a token")
            return kept
        warm = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = options.rate * warm * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)
        x, y = windows(training, options.context, [rng.randint(0, last) for _ in range(options.batch)], device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        # Keeps the largest logits near 0, as RWKV's own training does.
        (loss + 5e-5 * logits.amax(-1).square().mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            shown.append(loss.item())
        step += 1


def write(state: dict[str, Tensor], tokenizer: WorldTokenizer, options: argparse.Namespace) -> None:
    folder = options.out
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in state.items():
        if name.endswith("time_decay"):
            tensor = tensor.clamp(max=math.log(MOST_DECAY))
        tensors[name] = tensor.to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "rwkv5",
        "model_version": "5_2",
        "hidden_size": options.width,
        "num_hidden_layers": options.layers,
        "intermediate_size": int(3.5 * options.width) // 32 * 32,
        "head_size": options.head,
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(folder)
    size = (folder / "model.safetensors").stat().st_size
    print(f"wrote {folder}: {sum(t.numel() for t in tensors.values()) / 1e6:.2f} M parameters, {size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="any UTF-8 text file")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seconds", type=float, help="train so long")
    parser.add_argument("--steps", type=int, help="train so many steps, where that is shorter")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--head", type=int, default=64, help="size of a head")
    parser.add_argument("--vocabulary", type=int, default=2048, help="tokens")
    parser.add_argument("--context", type=int, default=256, help=f"tokens of a window, a multiple of {CHUNK}")
    parser.add_argument("--batch", type=int, default=32, help="windows of a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--looks", type=int, default=30, help="how often to measure the held-out loss")
    parser.add_argument("--held_out", type=float, default=0.03, help="share of the text that is not trained on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.seconds is None and options.steps is None:
        parser.error("say how long: --seconds or --steps")
    if options.context % CHUNK or options.width % options.head:
        parser.error(f"--context is a multiple of {CHUNK}, and --width one of --head")

    text = options.text.read_text(encoding="utf-8")
    cut = int(len(text) * (1 - options.held_out))
    tokenizer = make_vocabulary(text[:cut], options.vocabulary)
    training, held_out = (torch.tensor(tokenizer.encode(part)) for part in (text[:cut], text[cut:]))
    if min(len(training), len(held_out)) < 2 * options.context:
        parser.error(f"{len(training)} and {len(held_out)} tokens are too few for windows of {options.context}")
    counts = torch.bincount(training, minlength=tokenizer.vocab_size) + 1.0
    unigram = F.nll_loss((counts / counts.sum()).log().expand(len(held_out), -1), held_out).item()
    size = len(text[cut:].encode()) / len(held_out)
    print(f"{len(training):,} tokens to train on, {size:.2f} bytes each; by their frequencies alone the held-out part "
          f"costs {unigram:.3f} nats a token")  # fmt: skip
    torch.manual_seed(options.seed)
    model = RWKV(tokenizer.vocab_size, options.layers, options.width, options.head, options.dropout).to(options.device)
    torch.set_float32_matmul_precision("high")
    write(train(model, training, held_out, options), tokenizer, options)


if __name__ == "__main__":
    main()
