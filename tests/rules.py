"""Edits that are no interventions but a rule on the host's logits: to plant what a score must catch."""

import contextlib
import itertools

import torch

from baft.hosts.edited_model import EditedModel


class Ruled(EditedModel):
    """A host whose logits a rule changes, for the length of a call or generation.

    The rule takes the tokens `[batch, pos]` that the logits `[batch, pos, vocab]` follow, and gives others.
    """

    def __init__(self, host, rule):
        super().__init__(host)
        self.rule = rule
        self.n_generations = 0

    def __call__(self, *args, **arguments):
        with self._ruled():
            return super().__call__(*args, **arguments)

    def generate(self, *args, **arguments):
        self.n_generations += 1
        with self._ruled():
            return super().generate(*args, **arguments)

    @contextlib.contextmanager
    def _ruled(self):
        def hook(module, args, arguments, output):
            ids, keep = arguments["input_ids"], arguments.get("logits_to_keep", 0)
            ids = ids[:, keep] if isinstance(keep, torch.Tensor) else ids[:, -keep:]
            output.logits = self.rule(ids, output.logits)
            return output

        handle = self.host.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def prefers(*tokens, by=1e3):
    """Everywhere, the more the earlier a token is named."""

    def rule(ids, logits):
        bias = torch.zeros(logits.shape[-1], dtype=logits.dtype)
        for i, token in enumerate(tokens):
            bias[token] = by / (i + 1)
        return logits + bias

    return rule


def follows(chain, by=1e3):
    """After each token of a chain the next one, and nothing else changed."""

    def rule(ids, logits):
        logits = logits.clone()
        for previous, following in itertools.pairwise(chain):
            logits[..., following] += by * (ids == previous)
        return logits

    return rule
