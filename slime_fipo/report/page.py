"""The page: one HTML file that holds its style, its scripts, plotly and all data.

Nothing that came from a model or a file stands in the HTML as text, but for the title: it is all in one block, gzip in
base64, which the scripts unpack and show as text nodes. A content security policy lets no other script run and nothing
be loaded. The block is JSON (its length, little-endian, in the first four bytes), then the arrays.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections import defaultdict
from importlib.resources import files as package_files
from pathlib import Path

import jinja2
import numpy as np
import plotly.offline
from markupsafe import Markup

from .. import files
from ..records import FATES, TokenRecord
from ..records.text import Decoders
from ..version import __version__
from .inputs import Run
from .statistics import PERCENTILES, histograms, noise, response_row, trend

ASSETS = package_files(__package__) / "assets"
# In the order in which the browser runs them; each file says what it needs of those before it.
SCRIPTS = (
    "weights.js",
    "data.js",
    "dom.js",
    "charts.js",
    "heatmap.js",
    "trend.js",
    "rollout.js",
    "response.js",
    "what_if.js",
    "noise.js",
    "app.js",
)


def write_page(
    output: Path, runs: list[Run], chosen: list[tuple[int, TokenRecord]], selection: str, decoders: Decoders
) -> None:
    """Write the page of ``runs`` to ``output``; the tokens of ``chosen`` (index of the run, record) go in whole.

    Raises:
        OSError: the file cannot be written.
    """
    data = _payload(runs, chosen, selection, decoders)
    scripts = [plotly.offline.get_plotlyjs(), *((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS)]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    html = environment.from_string((ASSETS / "page.html.j2").read_text(encoding="utf-8")).render(
        title=", ".join(run.name for run in runs)[:200],
        style=Markup((ASSETS / "style.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],  # ours and plotly's: no data
        policy=" ".join(f"'sha256-{_hash(script)}'" for script in scripts),
        data=base64.b64encode(gzip.compress(data, 6, mtime=0)).decode(),
        version=__version__,
    )
    files.replace(output, lambda temporary: temporary.write_text(html, encoding="utf-8", newline="\n"))


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _payload(runs: list[Run], chosen: list, selection: str, decoders: Decoders) -> bytes:
    """JSON and arrays, as the module's docstring says."""
    pieces: dict = {}  # piece -> its number
    arrays = {name: [] for name in ("tokens", "prompts", "flags", "advantages", "shift", "F", "f", "mismatch")}
    dtypes = dict.fromkeys(arrays, np.float32) | {"tokens": np.uint32, "prompts": np.uint32, "flags": np.uint16}
    responses, on_page = [], {}

    def numbers(decoder, tokens) -> np.ndarray:
        return np.asarray([pieces.setdefault(piece, len(pieces)) for piece in decoder.pieces(tokens)], dtype=np.uint32)

    for run, record in chosen:
        decoder = decoders.of(record.header)
        known = record.influence is not None
        on_page[id(record)] = len(responses)
        responses.append(
            {
                "run": run,
                "rollout": record.header.rollout_id,
                "step": record.header.step_id,
                "position": record.position,
                "group": record.group,
                "length": len(record.tokens),
                "prompt": len(record.prompt),
                "known": known,
                "mismatch": record.mismatch is not None,
                "config": record.header.config,
            }
        )
        zeros = np.zeros(len(record.tokens), np.float32)
        arrays["prompts"].append(numbers(decoder, record.prompt))
        arrays["tokens"].append(numbers(decoder, record.tokens))
        # Fate in the low byte, then whether the token is trained and whether it is there.
        arrays["flags"].append(record.fate.astype(np.uint16) | record.loss_mask * 256 | record.present * 512)
        arrays["advantages"].append(record.advantages)
        arrays["shift"].append(record.shift if known else zeros)
        arrays["F"].append(record.future_kl if known else zeros)
        arrays["f"].append(record.influence if known else zeros)
        arrays["mismatch"].append(record.mismatch if record.mismatch is not None else zeros)

    description = {
        "selection": selection,
        "notes": decoders.notes + [note for run in runs for note in run.notes],
        "runs": [{"name": run.name, "panels": trend(run), "missing": run.missing} for run in runs],
        "rollouts": _rollouts(runs, on_page),
        "responses": responses,
        "pieces": {"text": [p.text for p in pieces], "kind": [p.kind for p in pieces], "id": [p.token for p in pieces]},
        "fates": FATES,
        "percentiles": PERCENTILES,
        "arrays": {},
    }
    blocks, offset = [], 0
    for name, parts in arrays.items():
        packed = np.concatenate(parts or [[]]).astype(dtypes[name])
        packed = packed.astype(packed.dtype.newbyteorder("<"))
        description["arrays"][name] = {"type": packed.dtype.name, "offset": offset, "length": len(packed)}
        blocks.append(packed.tobytes() + bytes(-packed.nbytes % 4))
        offset += len(blocks[-1])
    header = json.dumps(description, allow_nan=False).encode()
    header += b" " * (-len(header) % 4)
    return len(header).to_bytes(4, "little") + header + b"".join(blocks)


def _rollouts(runs: list[Run], on_page: dict[int, int]) -> list[dict]:
    """Every recorded rollout of every run: the table, histograms and the verdict on noise, over all of its records."""
    result = []
    for i, run in enumerate(runs):
        by_rollout: dict[int, dict[int, list[TokenRecord]]] = defaultdict(lambda: defaultdict(list))
        for record in run.records:
            by_rollout[record.header.rollout_id][record.header.step_id].append(record)
        for rollout, steps in sorted(by_rollout.items()):
            header = next(iter(steps.values()))[0].header
            result.append(
                {
                    "run": i,
                    "rollout": rollout,
                    "steps_per_rollout": header.steps_per_rollout,
                    "samples": header.samples_per_rollout,
                    "source": header.source,
                    "shift_from": header.shift_from,
                    "steps": [
                        {
                            "step": step,
                            "rows": [response_row(r) | {"page": on_page.get(id(r), -1)} for r in records],
                        }
                        for step, records in sorted(steps.items())
                    ],
                    "histograms": histograms(steps),
                    "noise": noise(steps, header.steps_per_rollout - 1),
                }
            )
    return result
