"""The shipped task, chained modular sums, and the generator of its files under ``data/``.

``3+1+4+2=`` asks for the sum modulo the task's modulus. A response may reason, ``+1=4+4=3+2=0;0`` (each further term
with the running sum, then the answer), or just guess, ``0``. The demonstrations mostly guess and sometimes reason, with
a few slips, like the text that a base LLM has seen; an outcome reward must teach the policy to reason. In ``long_sums``
most chains are given up before their end and the answer is guessed: there, carrying on pays, and responses grow.
``python -m slime_fipo.local.task`` writes the files anew, byte for byte. How files are read is in ``data.py``.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

DATA_DIRECTORY = Path(__file__).parent / "data"
ALPHABET = "0123456789+=;"


@dataclass(frozen=True)
class ModularSums:
    """One difficulty of the task, and how its demonstrators behave."""

    name: str
    modulus: int
    min_terms: int
    max_terms: int
    reason_probability: float  # share of demonstrations that write the running sums before the answer
    slip_probability: float  # per running sum; the mistake is carried on
    lucky_probability: float  # a guess is right by insight this often, otherwise uniform
    give_up_probability: float = 0.0  # after each running sum: the rest is left out, the answer guessed
    train_prompts: int = 1024
    heldout_prompts: int = 128
    demonstrations: int = 8192
    seed: int = 0

    def prompt(self, rng: random.Random) -> tuple[str, list[int]]:
        terms = [rng.randrange(self.modulus) for _ in range(rng.randint(self.min_terms, self.max_terms))]
        return "+".join(map(str, terms)) + "=", terms

    def label(self, terms: list[int]) -> str:
        return str(sum(terms) % self.modulus)

    def demonstrate(self, terms: list[int], rng: random.Random) -> str:
        if rng.random() >= self.reason_probability:
            lucky = rng.random() < self.lucky_probability
            return self.label(terms) if lucky else str(rng.randrange(self.modulus))
        running, steps = terms[0], []
        for term in terms[1:]:
            if steps and self.give_up_probability and rng.random() < self.give_up_probability:
                running = rng.randrange(self.modulus)
                break
            running = (running + term) % self.modulus
            if rng.random() < self.slip_probability:
                running = rng.randrange(self.modulus)
            steps.append(f"+{term}={running}")
        return "".join(steps) + f";{running}"

    def files(self) -> dict[str, list[dict]]:
        """File name -> its records. No held-out prompt stands in another file; no prompt stands twice in its own."""
        rng = random.Random(f"{self.name}-{self.seed}")
        heldout, train = {}, {}
        for split, size in ((heldout, self.heldout_prompts), (train, self.train_prompts)):
            while len(split) < size:
                prompt, terms = self.prompt(rng)
                if prompt not in heldout:
                    split[prompt] = terms
        demonstrations = []
        while len(demonstrations) < self.demonstrations:
            prompt, terms = self.prompt(rng)
            if prompt not in heldout:
                demonstrations.append({"prompt": prompt, "response": self.demonstrate(terms, rng)})
        prompts = {
            name: [{"prompt": prompt, "label": self.label(terms)} for prompt, terms in split.items()]
            for name, split in (("train.jsonl", train), ("heldout.jsonl", heldout))
        }
        return prompts | {"demonstrations.jsonl": demonstrations}


SUMS = ModularSums(
    "sums", 5, 3, 6, reason_probability=0.4, slip_probability=0.02, lucky_probability=0.3, demonstrations=4096
)
LONG_SUMS = ModularSums(
    "long_sums",
    7,
    6,
    12,
    reason_probability=0.5,
    slip_probability=0.03,
    lucky_probability=0.2,
    give_up_probability=0.15,
    demonstrations=8192,
)


def write_data(directory: Path = DATA_DIRECTORY) -> None:
    for task in (SUMS, LONG_SUMS):
        folder = directory / task.name
        folder.mkdir(parents=True, exist_ok=True)
        for name, records in task.files().items():
            (folder / name).write_text("".join(json.dumps(r, separators=(",", ":")) + "\n" for r in records))


if __name__ == "__main__":
    write_data()
