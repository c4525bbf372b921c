"""Recognise words of synthesised tones from their spectrogram: an encoder-decoder with cross-attention.

    python examples/speech_tones.py       with fastattn installed
    python -m examples.speech_tones       from a checkout's root, after `make build`

The language has eight sounds: four steady tones, and four that rise or fall. A word is three to seven of them, each
held for as long as it pleases, with pauses between, in noise. What the model gets is the spectrogram, about 30 to 110
frames; nobody tells it where a sound begins. An encoder reads the frames, and a transformer decoder writes the sounds:
it attends to what it has written (causal) and to the frames. Both are fastattn.attention; the words of a batch differ
in length, and kv_lengths keeps every one from looking at the padding of its frames.

The run fails unless enough sounds are recognised and the alignment that the attention has found by itself is
monotonic: from each sound to the next, the centre of attention must move on in time, as the sounds themselves do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm  # type: ignore[import-untyped]

import fastattn

try:
    from examples import common
except ImportError:  # run as a file: its folder, not the root, is on the path
    import common  # type: ignore[import-not-found, no-redef]

RATE, WINDOW, HOP = 8000, 256, 128  # samples a second; samples of a frame; samples from frame to frame (16 ms)
# Where each sound begins and ends, in Hz.
SOUNDS = {
    "do": (500, 500),
    "mi": (900, 900),
    "so": (1400, 1400),
    "ti": (2000, 2000),
    "up": (600, 1200),
    "UP": (1300, 2400),
    "dn": (1200, 600),
    "DN": (2400, 1300),
}
NAMES = (*SOUNDS, "end")
END, START, NOTHING = len(SOUNDS), len(SOUNDS) + 1, -100  # NOTHING: padding of the targets, which no loss counts
MIN_SOUNDS, MAX_SOUNDS = 3, 7
LOUDNESS, NOISE = 0.5, 0.15

WIDTH, HEADS = 64, 4
BATCH = 32
STEPS, SMOKE_STEPS = 600, 15
LEARNING_RATE = 3e-3
TESTED = 256
ACCURACY, MONOTONIC, SMOKE_ACCURACY = 0.95, 0.95, 0.10


@dataclass
class Batch:
    """Words, padded to the longest."""

    frames: Tensor  # (B, T, WINDOW / 2 + 1): the logarithm of the spectrogram
    lengths: Tensor  # (B,) int32: frames of each word
    targets: Tensor  # (B, L): its sounds, then END, then NOTHING
    spans: list[Tensor]  # B times (sounds, 2): where each begins and ends, in frames

    @property
    def inputs(self) -> Tensor:
        """(B, L): what the decoder reads, START and the sounds so far."""
        return F.pad(self.targets[:, :-1].clamp(min=0), (1, 0), value=START)


def synthesise(sounds: list[int], chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """The sounds one after the other, each of its own length and loudness, with pauses, in noise: (samples,).

    And where each of them begins and ends, in samples: (sounds, 2).
    """

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=chance))

    pieces, spans = [torch.zeros(int(RATE * between(0.02, 0.1)))], []
    for sound in sounds:
        samples = int(RATE * between(0.08, 0.25))
        begin, end = list(SOUNDS.values())[sound]
        frequency = torch.linspace(begin, end, samples) * between(0.97, 1.03)  # nobody sings quite true
        phase = torch.cumsum(2 * math.pi * frequency / RATE, 0)
        envelope = torch.linspace(0, math.pi, samples).sin().clamp(min=0).sqrt()  # no clicks
        before = sum(map(len, pieces))
        spans.append([before, before + samples])
        pieces.append(between(0.5, 1) * LOUDNESS * envelope * phase.sin())
        pieces.append(torch.zeros(int(RATE * between(0.0, 0.06))))
    wave = torch.cat(pieces)
    return wave + NOISE * torch.randn(len(wave), generator=chance), torch.tensor(spans)


def make_batch(size: int, chance: torch.Generator) -> Batch:
    words, spectra, spans = [], [], []
    window = torch.hann_window(WINDOW)
    for _ in range(size):
        count = int(torch.randint(MIN_SOUNDS, MAX_SOUNDS + 1, (), generator=chance))
        word = torch.randint(len(SOUNDS), (count,), generator=chance).tolist()
        wave, span = synthesise(word, chance)
        spectrum = torch.stft(wave, WINDOW, HOP, window=window, return_complex=True).abs()  # (WINDOW / 2 + 1, T)
        words.append(torch.tensor([*word, END]))
        spectra.append((spectrum.T + 0.1).log())
        spans.append(span / HOP)
    lengths = torch.tensor([len(spectrum) for spectrum in spectra], dtype=torch.int32)
    frames = nn.utils.rnn.pad_sequence(spectra, batch_first=True)
    targets = nn.utils.rnn.pad_sequence(words, batch_first=True, padding_value=NOTHING)
    return Batch(frames, lengths, targets, spans)


class Attention(nn.Module):
    """Queries from one sequence, keys and values from the same or from another; several heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def heads(self, *projected: Tensor) -> list[Tensor]:
        """Each (B, L, WIDTH) -> (B, HEADS, L, WIDTH / HEADS)."""
        return [x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in projected]

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        q, k, v = self.heads(self.q(queries), self.k(keys), self.v(values))
        o = fastattn.attention(q, k, v, kv_lengths=lengths, causal=causal)
        out: Tensor = self.out(o.transpose(1, 2).flatten(2))
        return out

    def weights(self, queries: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
        """(B, Lq, Lk): the mean of the heads."""
        q, k = self.heads(self.q(queries), self.k(keys))
        return fastattn.attention_weights(q, k, kv_lengths=lengths).mean(1)


class Recogniser(nn.Module):
    """Convolutions and a GRU over the frames; one decoder layer over the sounds."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv1d(WINDOW // 2 + 1, WIDTH, 5, padding=2), nn.GELU(), nn.Conv1d(WIDTH, WIDTH, 5, padding=2), nn.GELU()
        )
        self.gru = nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)
        self.embed = nn.Embedding(len(SOUNDS) + 2, WIDTH)
        self.position = nn.Parameter(0.5 * torch.randn(MAX_SOUNDS + 1, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.self_attention, self.cross_attention = Attention(), Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.out = nn.Linear(WIDTH, END + 1)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Keys and values of the frames, (B, T, WIDTH).

        The GRU has been through the whole word and can tell which of its sounds a frame belongs to: that is for keys.
        Values know of a few frames only. What a sound is can so be learned nowhere but where it sounds.
        """
        x = self.convolutions(batch.frames.transpose(1, 2)).transpose(1, 2)
        packed = nn.utils.rnn.pack_padded_sequence(x, batch.lengths.long(), batch_first=True, enforce_sorted=False)
        y, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        return x + y, x

    def forward(self, inputs: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Sounds so far (B, L) -> logits of the next (B, L, END + 1); and what asked the frames (B, L, WIDTH)."""
        x = self.embed(inputs) + self.position[: inputs.shape[1]]
        y = self.norms[0](x)
        x = x + self.self_attention(y, y, y, causal=True)
        queries = self.norms[1](x)
        x = x + self.cross_attention(queries, keys, values, lengths)
        x = x + self.mlp(self.norms[2](x))
        return self.out(self.norms[3](x)), queries

    @torch.no_grad()
    def recognise(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What it hears, sound by sound: (B, MAX_SOUNDS + 1), and where it looked: (B, MAX_SOUNDS + 1, T)."""
        keys, values = self.encode(batch)
        heard = torch.full((len(keys), 1), START)
        for _ in range(MAX_SOUNDS + 1):
            logits, queries = self(heard, keys, values, batch.lengths)
            heard = torch.cat([heard, logits[:, -1:].argmax(2)], 1)
        return heard[:, 1:], self.cross_attention.weights(queries, keys, batch.lengths)


def train(model: Recogniser, steps: int, chance: torch.Generator) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.15)
    losses = []
    with tqdm(total=steps, desc="training", unit="step") as bar:
        for _ in range(steps):
            batch = make_batch(BATCH, chance)  # no word is heard twice
            logits, _ = model(batch.inputs, *model.encode(batch), batch.lengths)
            loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=NOTHING)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix_str(f"loss {losses[-1]:.4f}")
            bar.update()
    return losses


def centres(weights: Tensor) -> Tensor:
    """(..., T) -> (...): the frame around which attention lies."""
    return (weights * torch.arange(weights.shape[-1])).sum(-1)


def evaluate(heard: Tensor, weights: Tensor, test: Batch) -> dict[str, float]:
    """heard (B, L) and weights (B, L, T) against the truth."""
    targets = F.pad(test.targets, (0, heard.shape[1] - test.targets.shape[1]), value=NOTHING)
    counts = targets != NOTHING
    forward, pairs, on_sound, sounds = 0, 0, 0, 0
    for centre, span in zip(centres(weights), test.spans, strict=True):
        centre = centre[: len(span)]  # the end has no place
        forward += int((centre[1:] > centre[:-1]).sum())
        pairs += len(span) - 1
        on_sound += int(((span[:, 0] <= centre) & (centre <= span[:, 1])).sum())
        sounds += len(span)
    return {
        "accuracy": float((heard == targets)[counts].float().mean()),
        "words": float(((heard == targets) | ~counts).all(1).float().mean()),
        "monotonic": forward / pairs,
        "on_sound": on_sound / sounds,
    }


def write_plot(options: Any, result: dict[str, Any], heard: Tensor, weights: Tensor, test: Batch) -> None:
    """The longest word: what was heard, above where attention lay while each sound was written."""
    figure = common.new_figure(12.5, 7)
    figure.suptitle("Told no times, cross-attention moves on through the frames from sound to sound", fontsize=13)
    spectrum, curves, alignment, text = figure.subplot_mosaic(
        [["spectrum", "curves"], ["alignment", "text"]], width_ratios=(2, 1)
    ).values()
    word = max(range(len(test.spans)), key=lambda n: len(test.spans[n]))
    length, span = int(test.lengths[word]), test.spans[word]
    truth = [NAMES[n] for n in test.targets[word, : len(span)].tolist()]
    written = heard[word, : len(span) + 1].tolist()

    spectrum.imshow(
        test.frames[word, :length].T,
        origin="lower",
        aspect="auto",
        cmap="magma",
        extent=(-0.5, length - 0.5, 0, RATE / 2),
    )
    spectrum.set(ylabel="frequency, Hz", ylim=(0, 3000), xlabel=f"frame, every {1000 * HOP / RATE:g} ms")
    spectrum.set_title("What is heard: the spectrogram, and what it was made of", loc="left", fontsize=11)
    for name, middle in zip(truth, span.mean(1).tolist(), strict=True):
        spectrum.text(middle, 2750, name, color="white", ha="center", fontsize=11, fontweight="bold")

    names = [f"{n + 1}. {NAMES[sound]}" for n, sound in enumerate(written)]
    fastattn.plot_attention(weights[word, : len(names), :length], None, names, alignment)
    alignment.set(xlabel=f"frame, every {1000 * HOP / RATE:g} ms", ylabel="written, from top to bottom")
    alignment.set_title("Where attention lies while each sound is written", loc="left", fontsize=11)
    middles = centres(weights[word, : len(span)])
    alignment.plot(
        middles, range(len(span)), "o-", color=common.ORANGE, linewidth=1, markersize=4, label="centre of attention"
    )
    for row, (begin, end) in enumerate(span.tolist()):
        label = "when it sounded" if row == 0 else None
        alignment.plot([begin, end], [row + 0.4] * 2, color=common.GREEN, linewidth=3, label=label)
    alignment.legend(loc="lower left", frameon=False)

    curves.plot(result["losses"], color=common.BLUE, linewidth=1)
    curves.set(yscale="log", xlabel="step", ylabel="training loss, nats a sound")
    curves.spines[["top", "right"]].set_visible(False)
    text.set_axis_off()
    lines = (
        f"{TESTED} words never heard before:",
        f"{result['accuracy']:.1%} of the sounds right",
        f"{result['words']:.1%} of the words right as a whole",
        f"{result['monotonic']:.1%} of the steps from sound to sound",
        "move attention on in time",
        f"{result['on_sound']:.1%} of the centres of attention lie",
        "within the very sound",
    )
    text.text(0, 0.9, "\n".join(lines), va="top", fontsize=11, linespacing=1.6)
    common.save_figure(figure, options.plot)


def main() -> None:
    smoke = f"{SMOKE_STEPS} steps, and accuracy above chance"
    options = common.parse_options("speech_tones", __doc__.splitlines()[0], smoke)
    chance = torch.Generator().manual_seed(options.seed)
    test = make_batch(TESTED, chance)
    model = Recogniser()
    losses = train(model, SMOKE_STEPS if options.smoke else STEPS, chance)
    heard, weights = model.recognise(test)
    result: dict[str, Any] = {"losses": losses, **evaluate(heard, weights, test)}
    print(f"{result['words']:.1%} of the words are right as a whole")
    print(f"{result['on_sound']:.1%} of the centres of attention lie within the sound that was written")
    if not options.no_plot:
        write_plot(options, result, heard, weights, test)
    promises = [common.Promise("sounds right", result["accuracy"], SMOKE_ACCURACY if options.smoke else ACCURACY)]
    if not options.smoke:
        promises.append(common.Promise("steps forward in time", result["monotonic"], MONOTONIC))
    common.finish(options, result, promises)


if __name__ == "__main__":
    main()
