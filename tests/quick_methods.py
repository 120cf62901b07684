"""Settings and edits by which every method learns on a tiny random host, and what each can be asked."""

import dataclasses

from baft.methods.base import methods
from baft.types import Edit, EditRequest

# A random host has nothing to build on, and all its states look alike: larger steps and wider gates than real
# ones need, and the same whatever the presets say.
STEPS = {"learning_rate": 5e-2, "max_steps": 60, "stop_loss": None, "stop_margin": 0.7}
WIDE = {"gate_midpoint": 0.3, "output_midpoint": 0.3, "gate_clearance": 0.0, "gate_shrinkage": 0.05}
QUICK = {**STEPS, **WIDE, "schedule": "constant", "moments_tokens": 2000}
_AT_A_SUBJECT = {
    "train_eos": False,
    "clamp": 1e4,
    "kl_weight": 0.0,
    "learning_rate": 0.5,
    "stop_margin": 1.5,
    "n_prefixes": 2,
    "n_key_prefixes": 4,
}
# What a least-squares solution weighs an edit against is as small here as the host. Adapters are scaled up
# and take smaller steps for it; MELO trains two layers of the three, and wide blocks.
QUICK_OF = {
    "rome": _AT_A_SUBJECT,
    "memit": {**_AT_A_SUBJECT, "moments_weight": 1e-6},
    "alphaedit": {
        **_AT_A_SUBJECT,
        "stop_margin": 2.0,
        "threshold": 0.5,
        "threshold_unit": "mean",
        "l2": 1e-6,
    },
    "ultraedit": {"learning_rate": 1e-2},
    "lora": {"learning_rate": 1e-2},
    "adalora": {"learning_rate": 2e-2},
    "melo": {
        "learning_rate": 2e-2,
        "scale": 4.0,
        "radius": 0.5,
        "rank": 16,
        "key_layer": 0,
        "halve_every": None,
    },
    # One vector at the last prompt token says one token, and states of all texts are alike.
    "grace": {"learning_rate": 0.2, "train_eos": False},
    "wise": {
        **{"alpha": 50.0, "beta": 0.1, "gamma": 1e-3, "norm_bound": None, "n_openings": 0, "n_irrelevant": 1},
        **{"mask_ratio": 0.98, "learning_rate": 0.1, "optimizer": "adam"},
    },
}
TOWER = Edit("The tower is in the city of", "Ro")
REQUESTS = (
    EditRequest((TOWER,)),
    EditRequest((Edit("Paris is in", "Be"), Edit("Nine hats of", "Co"), Edit("A river", " dry"))),
    EditRequest((Edit("The king of France was", "Al"),), unrelated=("The king of Spain was",)),
)
# What it says of every target token at once, it can say of targets of one token alone.
OF_ONE_TOKEN = (
    EditRequest((Edit("The tower is in the city of ", "R"),)),
    EditRequest((Edit("Paris is in ", "B"), Edit("Nine hats of ", "C"), Edit("A river ", "d"))),
    EditRequest((Edit("The king of France was ", "A"),), unrelated=("The king of Spain was",)),
)
# Methods that put text into the prompt. A random host cannot read, so they are not asked to be decoded but to
# have put the edit there; and nothing is trained, so there are no steps.
READ = {"ike", "retrieval"}
# Some edit at a subject's last token alone. A random host's attention carries next to nothing from one token
# to another: so the subject ends where the prompt does, and the target is the one token that a space begins.
ABOUT = (
    EditRequest((Edit("The tower is in the city of", "R", subject="city of"),)),
    EditRequest(
        (
            Edit("Paris is in", "R", subject="is in"),
            Edit("Nine hats of", "R", subject="hats of"),
            Edit("A river", "R", subject="river"),
        )
    ),
    EditRequest(
        (Edit("The king of France was", "R", subject="France was"),), unrelated=("The king of Spain was",)
    ),
)
AT_A_SUBJECT = ("rome", "memit", "alphaedit")
NOT_RANDOM = {"ft-l", "ft-m", "ultraedit", *READ}
ASKED = {"ft-l": OF_ONE_TOKEN, "grace": OF_ONE_TOKEN, **dict.fromkeys(AT_A_SUBJECT, ABOUT)}
ONE_BY_ONE = {"rome"}  # edits of one request are made one after the other
ONE_STEP = {"ultraedit"}  # nothing is trained, and one step gets as far as it gets: here, not to the target


def make(host, method, preset, *, seed=0, **settings):
    """An editor by its preset, quick to learn, with those of the settings that its method has."""
    kind = methods.get(method)
    config = kind.preset(preset)
    known = {one.name for one in dataclasses.fields(config)}
    chosen = {**QUICK, **QUICK_OF.get(method, {}), **settings}
    changes = {name: value for name, value in chosen.items() if name in known}
    return kind(host, dataclasses.replace(config, **changes), seed=seed)
