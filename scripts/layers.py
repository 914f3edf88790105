"""The layers of fedpref, from the lowest: a layer is a folder, and imports only those above it in
this list.

The arrow test, `docs/architecture.md` and the tree in the README are made from it (`make
references`).
"""

from __future__ import annotations

LAYERS: dict[str, str] = {
    "losses": "pure functions of log-probabilities and rewards: DPO and its family, KTO, policy "
    "gradients",
    "numerics": "trees of named tensors, seeds, metrics over clients, min-norm weights, graphs",
    "channel": "stages on the way to an aggregate, forward on the client and backward on the sum; "
    "means that a few cannot carry away",
    "privacy": "what is promised: the secret behind noise, its accountant, the ledger of what is "
    "spent; masks under which sums are all that is seen",
    "data": "rows of preferences and opinions, where they come from, and how clients share them",
    "rewards": "rewards of answers: read off the text, by other models, by a function of yours",
    "models": "a frozen language model with adapters as trees, packed rows, clients' own parts",
    "tasks": "learning problems that do not know that they are federated",
    "federation": "the verbs, the local training loop, and what many algorithms share",
    "algorithms": "one paper, one file, named as in YAML",
    "engines": "how verbs are carried out: in this process, in workers, at sites by messages",
    "experiments": "an experiment, round by round, into a run directory; a finished run as an "
    "object",
    "sites": "sites on NVIDIA FLARE: consent, programs, certificates",
    "runs": "what one does with runs: launch, sweep, watch, evaluate, join, export",
    "reports": "tables, comparisons, charts and the page of a run",
    "bench": "studies made of runs and reports: suites, trials on validation prompts, a board",
    "collect": "the page on a machine of one's own on which people choose between answers, and "
    "judge blind",
    "cli": "the commands, a file for each group",
}
