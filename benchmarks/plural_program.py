"""Federated averaging of a preference predictor the way a research program does it, to measure ours
against.

A stand-in for the program released with PluralLLM (github.com/MoSrewa/PluralLLM, MIT), written anew
after what it does: one client after another, one task a step, a batch of one, PyTorch's own encoder
with a dense mask; an evaluation predicts each question by itself.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import jensenshannon
from torch import Tensor, nn

Question = tuple[NDArray[np.float32], NDArray[np.float32]]  # embeddings [options, D], shares
STEPS, RATE, CONTEXT = 6, 3e-4, 20
COUNTS = (9, 90)


class Transformer(nn.Module):
    """GPO's, of PyTorch's modules."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        sizes = [inputs + 1, 128, 128, 128, 128]
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
        self.embedder = nn.Sequential(*layers[:-1])
        layer = nn.TransformerEncoderLayer(128, 4, 128, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))

    def forward(self, x: Tensor, y: Tensor, context: int) -> tuple[Tensor, Tensor]:
        """Raw means and deviations of the targets, which come after the context in x [1, P, D]; y
        holds zeros for them.
        """
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        hidden[:, :context] = False
        out = self.head(self.encoder(self.embedder(torch.cat([x, y[..., None]], -1)), mask=hidden))[
            :, context:
        ]
        return out[0, :, 0], out[0, :, 1].exp()


@dataclass
class Program:
    """The server's model and its clients, each with an optimiser that lives as long as the run."""

    clients: Sequence[Sequence[Question]]
    model: Transformer
    optimisers: list[torch.optim.Adam] = field(default_factory=list)
    models: list[Transformer] = field(default_factory=list)

    @staticmethod
    def begin(clients: Sequence[Sequence[Question]]) -> Program:
        model = Transformer(clients[0][0][0].shape[1])
        found = Program(clients, model)
        found.models = [copy.deepcopy(model) for _ in clients]
        found.optimisers = [torch.optim.Adam(one.parameters(), RATE) for one in found.models]
        return found

    def round(self, draw: random.Random) -> None:
        """All clients in turn, then the mean by the points that each has seen."""
        weights = []
        for questions, model, optimiser in zip(
            self.clients, self.models, self.optimisers, strict=True
        ):
            model.load_state_dict(self.model.state_dict())
            model.train()
            seen = 0
            for _ in range(STEPS):
                order = draw.sample(range(len(questions)), len(questions))
                context = min(draw.randint(*COUNTS), len(order) - 1)
                targets = min(draw.randint(*COUNTS), len(order) - context)
                loss, points = self.loss(
                    model,
                    [questions[i] for i in order[:context]],
                    [questions[i] for i in order[context:][:targets]],
                )
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                seen = seen or points
            weights.append(seen)
        states = [model.state_dict() for model in self.models]
        mean = {
            n: sum(w / sum(weights) * s[n] for w, s in zip(weights, states, strict=True))
            for n in states[0]
        }
        self.model.load_state_dict(mean)

    @staticmethod
    def loss(
        model: Transformer, context: Sequence[Question], targets: Sequence[Question]
    ) -> tuple[Tensor, int]:
        raw, std, y = ask(model, context, targets)
        sizes = [len(shares) for _, shares in targets]
        mean = torch.cat([part.softmax(0) for part in raw.split(sizes)])
        return -torch.distributions.Normal(mean, std).log_prob(y).mean(), sum(sizes) + sum(
            len(shares) for _, shares in context
        )

    @torch.no_grad()
    def evaluate(self, questions: Sequence[Question]) -> float:
        """The mean alignment of a group's questions but those of the context, each asked for by
        itself.
        """
        self.model.eval()
        found = []
        for question in questions[CONTEXT:]:
            p = ask(self.model, questions[:CONTEXT], [question])[0].softmax(0)
            distance = jensenshannon(p.numpy(), question[1])
            found.append(1 - (0.0 if np.isnan(distance) else float(distance)))
        return float(np.mean(found))


def ask(
    model: Transformer, context: Sequence[Question], targets: Sequence[Question]
) -> tuple[Tensor, Tensor, Tensor]:
    """The targets' raw means, deviations and true shares."""
    shown, asked = (
        torch.from_numpy(np.concatenate([y for _, y in part])) for part in (context, targets)
    )
    x = torch.from_numpy(np.concatenate([x for x, _ in (*context, *targets)]))[None]
    raw, std = model(x, torch.cat([shown, torch.zeros_like(asked)])[None], len(shown))
    return raw, std, asked
