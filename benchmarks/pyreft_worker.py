"""The other end of `pyreft_steps.py`: runs in the environment of pyreft, and trains when told to.

Orders are JSON on standard input: `load` with a host's folder or name, layers and rank; `steps` with texts
as token ids and a number of steps. Answers are JSON on standard output, one a line; whatever else is
printed goes to the error channel. Between orders it waits and computes nothing.
"""

import json
import os
import sys
import time
from typing import Any, TextIO


def answers() -> TextIO:
    """The real standard output; from here on, prints go to the error channel."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


class Reft:
    """LoReFT by pyreft on one host."""

    def __init__(self, model: str, layers: list[int], rank: int, threads: int):
        import pyreft  # type: ignore[import-not-found]  # there is none outside its environment
        import torch

        from baft.hosts.models import load_host

        torch.set_num_threads(threads)
        self.torch = torch
        torch.manual_seed(0)
        host = load_host(model).model
        representations = [
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": rank,
                "intervention": pyreft.LoreftIntervention(
                    embed_dim=host.config.hidden_size, low_rank_dimension=rank, dtype=torch.float32
                ),
            }
            for layer in layers
        ]
        self.model = pyreft.get_reft_model(host, pyreft.ReftConfig(representations=representations))
        self.n_layers = len(layers)
        self.optimizer = torch.optim.Adam(self.model.get_trainable_parameters(), lr=1e-2)

    def steps(self, order: dict[str, Any]) -> dict[str, Any]:
        """Seconds of every step, and the losses."""
        torch = self.torch
        ids, mask, labels = (torch.tensor(order[name]) for name in ("ids", "mask", "labels"))
        # One list of places for every intervention; each row has as many as the others.
        where = {"sources->base": (None, [order["positions"]] * self.n_layers)}
        took, losses = [], []
        for _ in range(order["n_steps"]):
            began = time.perf_counter()
            _, output = self.model(
                {"input_ids": ids, "attention_mask": mask},
                unit_locations=where,
                labels=labels,
                use_cache=False,
            )
            output.loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            took.append(time.perf_counter() - began)
            losses.append(output.loss.item())
        return {"seconds": took, "losses": losses}


def main() -> None:
    channel = answers()
    reft: Reft | None = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if order.pop("do") == "load":
                reft, answer = Reft(**order), {}
            else:
                assert reft is not None, "load comes first"
                answer = reft.steps(order)
        except Exception as error:  # told to whoever ordered it
            answer = {"error": f"{type(error).__name__}: {error}"}
        channel.write(json.dumps(answer) + "\n")
        channel.flush()


if __name__ == "__main__":
    main()
