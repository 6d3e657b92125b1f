"""One response's heatmap in slime's Weights & Biases run: its tokens coloured by influence weight, as HTML.

slime opens a run in three processes: the driver, the rollout manager, and the training rank that logs the training
metrics, which joins the driver's run. Nothing here opens one. The page with every view is ``slime_fipo.report``'s.
"""

from __future__ import annotations

import functools
import io

import jinja2
import numpy as np

from ..records import FATES, StepHeader, TokenRecord
from ..records.text import Decoders

METRIC = "train/fipo/heatmap"

_PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """\
<!doctype html><meta charset="utf-8">
<style>
body { font: 14px/1.7 ui-monospace, monospace; background: #fff; color: #111 }
p { white-space: pre-wrap; overflow-wrap: anywhere }
.masked { opacity: .45 }
.marked { border-bottom: 2px solid #111 }
.dropped { text-decoration: line-through }
</style>
<h3>rollout {{ header.rollout_id }}, step {{ header.step_id }}, response {{ record.position }} of group {{ record.group
}}</h3>
<p>reward {{ "%.4g" | format(record.reward) }}; influence weight f: <span style="background:{{ colour(low) }}">{{
"%.3f" | format(low) }}</span> … 1 … <span style="background:{{ colour(high) }}">{{ "%.3f" | format(high) }}</span>;
underlined: clipped, capped or excluded; struck through: dropped</p>
<p>
{%- for token in tokens -%}
{%- if token.gap %}<span title="held by other context-parallel ranks"> […] </span>{% endif -%}
<span{% if token.classes %} class="{{ token.classes }}"{% endif %} style="background:{{ colour(token.f)
}}" title="{{ token.title }}">{{ token.text }}</span>
{%- endfor -%}
</p>
"""
)


def heatmap(record: TokenRecord, header: StepHeader) -> str:
    """The response of ``record`` as a self-contained HTML page; whatever comes from a model is escaped."""
    held = record.present.nonzero()[0].tolist()
    values = record.influence[held].tolist()
    low, high = min([1.0, *values]), max([1.0, *values])
    texts = _texts(header, record.tokens[held])
    tokens, previous = [], -1
    for i, f, text in zip(held, values, texts, strict=True):
        fates = [name for name, flag in FATES.items() if record.fate[i] & flag]
        numbers = f"f {f:.4f}, F {record.future_kl[i]:.4f}, Δ {record.shift[i]:.4f}, A {record.advantages[i]:.4g}"
        classes = [name for name in ("masked", "dropped") if name in fates]
        classes += ["marked"] if {"clipped_high", "clipped_low", "capped", "excluded"} & set(fates) else []
        tokens.append(
            {
                "text": text,
                "f": f,
                "gap": i != previous + 1,
                "classes": " ".join(classes),
                "title": ", ".join([f"token {i}", numbers, *(name.replace("_", " ") for name in fates)]),
            }
        )
        previous = i
    scale = max(high - 1.0, 1.0 - low, 1e-9)

    def colour(f: float) -> str:
        """Orange above 1, blue below: told apart by every kind of colour vision."""
        rgb = "230,97,1" if f > 1 else "69,117,180"
        return f"rgba({rgb},{0.75 * min(abs(f - 1.0) / scale, 1.0):.2f})"

    return _PAGE.render(record=record, header=header, tokens=tokens, low=low, high=high, colour=colour)


@functools.cache
def _decoders() -> Decoders:
    return Decoders()


def _texts(header: StepHeader, tokens: np.ndarray) -> list[str]:
    """Each token's text; its id where the tokenizer cannot be loaded."""
    return [piece.text for piece in _decoders().of(header).pieces(tokens)]


def show_response(record: TokenRecord, header: StepHeader) -> None:
    """Log the heatmap to the run that slime opened in this process, at the training step that it is of."""
    import wandb

    if wandb.run is None:
        return
    step = header.rollout_id * header.steps_per_rollout + header.step_id
    page = wandb.Html(io.StringIO(heatmap(record, header)), inject=False)
    wandb.log({METRIC: page, "train/step": step})
