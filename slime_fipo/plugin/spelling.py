"""Finds what means to be a flag of ours and is spelt otherwise: slime's parser ignores flags that it does not know, and
the run would go on with a default.

``OTHER_NAMES`` holds what other implementations call the same settings; the table in docs/slime.md is tested against
it. Which flags there are comes from the caller; the messages are complete sentences for the user.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from .values import FALSE

VERL, SWIFT, TRL, PULL_REQUEST = "the authors' verl recipe", "ms-swift", "TRL", "slime PR #1801"
TURN_ON = "--loss-type fipo_loss"


@dataclass(frozen=True)
class OtherName:
    """A setting's name elsewhere. ``flag`` is the one here, empty where it is fixed; ``note`` says what differs."""

    framework: str
    name: str
    flag: str
    note: str = ""


OTHER_NAMES = (
    OtherName(VERL, "policy_loss.loss_mode=future_kl", TURN_ON),
    OtherName(VERL, "policy_loss.decay_rate", "--fipo-decay-rate"),
    OtherName(VERL, "policy_loss.chunk_size", "--fipo-chunk-size"),
    OtherName(VERL, "policy_loss.future_kl_clip_ratio", "--fipo-clip-ratio", "0 means --fipo-unclipped there"),
    OtherName(VERL, "policy_loss.future_kl_clip_high_only", "--fipo-clip-high-only"),
    OtherName(VERL, "policy_loss.safety_thresh", "--fipo-safety-thresh"),
    OtherName(VERL, "clip_ratio_c", "--fipo-dual-clip-c"),
    OtherName(VERL, "clip_ratio", "--eps-clip", "PPO's clip; FIPO's is --fipo-clip-ratio"),
    OtherName(VERL, "clip_ratio_low", "--eps-clip", "PPO's clip; FIPO's is --fipo-clip-ratio-low"),
    OtherName(VERL, "clip_ratio_high", "--eps-clip-high", "PPO's clip; FIPO's is --fipo-clip-ratio-high"),
    OtherName(VERL, "policy_loss.future_kl_start", "", "Future-KL always includes the current token here"),
    OtherName(VERL, "policy_loss.future_kl_window", "", "Future-KL always runs to the end of the response here"),
    OtherName(VERL, "policy_loss.future_kl_average", "", "Future-KL is always a sum here"),
    OtherName(VERL, "overlong_buffer.enable", "--overlong-buffer-len", "giving it turns the penalty on"),
    OtherName(VERL, "overlong_buffer.len", "--overlong-buffer-len"),
    OtherName(VERL, "overlong_buffer.penalty_factor", "--overlong-penalty-factor"),
    OtherName(VERL, "overlong_buffer_cfg.enable", "--overlong-buffer-len", "giving it turns the penalty on"),
    OtherName(VERL, "overlong_buffer_cfg.len", "--overlong-buffer-len"),
    OtherName(VERL, "overlong_buffer_cfg.penalty_factor", "--overlong-penalty-factor"),
    OtherName(SWIFT, "--loss_type fipo", TURN_ON),
    OtherName(SWIFT, "--fipo_decay_rate", "--fipo-decay-rate"),
    OtherName(SWIFT, "--fipo_clip_range", "--fipo-clip-ratio"),
    OtherName(SWIFT, "--fipo_clip_high_only", "--fipo-clip-high-only", "on by default there"),
    OtherName(SWIFT, "--fipo_safety_threshold", "--fipo-safety-thresh", "4 by default there"),
    OtherName(SWIFT, "--delta", "--fipo-dual-clip-c", "off by default there"),
    OtherName(SWIFT, "--fipo_detach_weight", "", "weights are always detached here"),
    OtherName(SWIFT, "--soft_cache_length", "--overlong-buffer-len"),
    OtherName(TRL, "delta", "--fipo-dual-clip-c", "off by default there"),
    OtherName(PULL_REQUEST, TURN_ON, TURN_ON),
    *(
        OtherName(PULL_REQUEST, flag, flag)
        for flag in (
            "--fipo-decay-rate",
            "--fipo-chunk-size",
            "--fipo-clip-ratio-low",
            "--fipo-clip-ratio-high",
            "--fipo-clip-high-only",
            "--fipo-safety-thresh",
            "--fipo-dual-clip-c",
        )
    ),
)

# How alike a name without «fipo» or «overlong» in it must be: with one wrong, missing or swapped letter even the
# shortest of ours stays above 0.87; all flags of slime, Megatron-LM and SGLang are below 0.7.
_ALIKE = 0.85
_DASHES = "-‐‑‒–—―−﹣－"  # word processors make typographic dashes of hyphens
_PLAIN_DASHES = str.maketrans(dict.fromkeys(_DASHES, "-"))
_LOSS_NAMES = ("fipo", "fipoloss", "futurekl")
_LOSS_FLAGS = ("loss-type", "loss-mode", "policy-loss", "policy-loss-type", "policy-loss-mode")


def misspelt_flags(
    arguments: Sequence[str], parser: argparse.ArgumentParser, own: Collection[str]
) -> Iterator[tuple[str, str]]:
    """The words of a command line that mean to be flags of ours and are not, each with what to write instead.

    Args:
        arguments: what follows the script.
        parser: knows our flags and as many of slime's as there are; what follows a flag that it does not know may be
            that flag's values, and is left alone.
        own: our option strings.
    """
    options = parser._option_string_actions
    flag, free = "", 0.0  # the last flag, and how many more values it takes
    for position, word in enumerate(arguments):
        written, _, value = word.partition("=")
        if not _is_flag(word):
            if free > 0:
                free -= 1
            elif not word.strip():
                continue  # a variable of the launch script that is empty
            elif message := _in_another_form(word, own):
                yield written, message
            elif flag in own:
                yield flag, _left_over(flag, options[flag], word, own)
            continue
        flag, action = written, options.get(written)
        free = math.inf if action is None else 0 if "=" in word else _most_values(action)
        if action is None:
            following = value if "=" in word else next(iter(arguments[position + 1 : position + 2]), "")
            if message := correction(written, own, following):
                yield written, message
        elif flag in own and action.nargs == 0 and "=" in word:
            yield flag, _left_over(flag, action, value, own)


def correction(written: str, own: Collection[str], value: str = "") -> str:
    """What to write instead of a flag that does not exist; empty if it is not meant to be ours.

    Args:
        written: the flag as it was given.
        own: our option strings.
        value: what was given for it.
    """
    if names_fipo(written) or (_is_about_the_loss(written) and names_fipo(value)):
        return f"{written} is not a flag, and slime ignores it; use {TURN_ON}"
    meaning = _meaning(written, own)
    if meaning is None:
        return ""
    if meaning.other is not None:
        theirs, note = f"{written} is {meaning.other.framework}'s name, and slime ignores it", meaning.other.note
        if not meaning.flag:
            return f"{theirs}; drop it: {note}"
        return f"{theirs}; use {meaning.flag}" + (f" ({note})" if note else "")
    if not meaning.flag:
        known = ", ".join(sorted(flag for flag in own if not flag.startswith("--no-")))
        return f"{written} is not a flag, and slime ignores it; there are {known}"
    if meaning.negated:
        return f"{written} is not a flag, and slime ignores it; {meaning.flag} is off unless it is given"
    instead = f"write {meaning.flag}" if meaning.certain else f"did you mean {meaning.flag}?"
    return f"{written} is not a flag, and slime ignores it; {instead}"


def key_correction(key: str, own: Collection[str]) -> str:
    """What to write instead of a YAML key that does not exist; empty if it is not meant to be ours.

    The file also holds what a user's own functions read, so other implementations' names count only where they say
    that they are FIPO's.
    """
    meaning = _meaning(key, own)
    if meaning is None or meaning.elsewhere:
        return ""
    if not meaning.flag:
        note = meaning.other.note if meaning.other else f"there are {', '.join(sorted({_key(flag) for flag in own}))}"
        return f"{key} is not a setting; {note}"
    return f"{key} is not a setting; write {_key(meaning.flag)}"


def names_fipo(value: object) -> bool:
    """Whether a loss name means FIPO's, here or elsewhere."""
    return isinstance(value, str) and _letters(value) in _LOSS_NAMES


@dataclass(frozen=True)
class _Meaning:
    flag: str = ""  # ours; empty where there is none
    certain: bool = False
    negated: bool = False
    other: OtherName | None = None
    elsewhere: bool = False  # a name without ours in it, which could be a key of the user's own


def _meaning(written: str, own: Collection[str]) -> _Meaning | None:
    name = _normal(written)
    by_letters = {_letters(flag): flag for flag in own}
    if flag := by_letters.get(_letters(name)):
        return _Meaning(flag, certain=True)
    if name.startswith("no-") and (flag := by_letters.get(_letters(name[3:]))):
        return _Meaning(flag, negated=True)
    if other := _other_name(written):
        return _Meaning(other.flag, other=other, elsewhere=not _says_fipo(name))
    if "-" in name and (flag := by_letters.get(f"fipo{_letters(name)}")):
        return _Meaning(flag, elsewhere=True)  # the prefix is missing
    ours = name.replace("future-kl", "fipo")
    names = {flag.lstrip("-"): flag for flag in own}
    longer = [known for known in names if known.startswith(f"{ours}-")]
    alike = 0.6 if _says_fipo(name) else _ALIKE
    close = difflib.get_close_matches(ours, longer, 1, 0) or difflib.get_close_matches(ours, names, 1, alike)
    if close:
        return _Meaning(names[close[0]])
    return _Meaning() if _says_fipo(name) else None


def _says_fipo(name: str) -> bool:
    return any(word in _letters(name) for word in ("fipo", "overlong", "futurekl"))


def _is_about_the_loss(written: str) -> bool:
    name = _normal(written)
    return name.endswith("policy-loss-loss-mode") or bool(difflib.get_close_matches(name, _LOSS_FLAGS, 1, 0.88))


def _key(flag: str) -> str:
    return flag.removeprefix("--no-").removeprefix("--").replace("-", "_")


def _is_flag(word: str) -> bool:
    """Whether argparse takes the word for a flag and not for a value, or the author does."""
    before = word.partition("=")[0]
    if len(word) < 2 or word[0] not in _DASHES or any(c.isspace() for c in before):
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False


def _most_values(action: argparse.Action) -> float:
    if isinstance(action.nargs, int):
        return action.nargs
    return {None: 1, argparse.OPTIONAL: 1}.get(action.nargs, math.inf)


def _left_over(flag: str, action: argparse.Action, word: str, own: Collection[str]) -> str:
    if action.nargs != 0:
        return f"{flag} takes one value, and {word} is left over; drop it"
    negated = f"--no-{flag[2:]}"
    instead = f"write {negated}" if negated in own else "drop both"
    return f"{flag} takes no value; " + (instead if word.lower() in FALSE else f"drop {word}")


def _in_another_form(word: str, own: Collection[str]) -> str:
    """A word that is nobody's value: flags quoted into one word, or Hydra's name=value."""
    if word[:1] in _DASHES and word[:1]:
        for part in word.split():
            written = part.partition("=")[0]
            if _is_flag(part) and (written in own or correction(written, own)):
                return f"{word!r} is one word, and slime ignores it; take the quotes off, so that {part} is a flag"
        if any(map(names_fipo, word.split())):
            return f"{word!r} is one word, and slime ignores it; take the quotes off"
        return ""
    written, equals, value = word.partition("=")
    return correction(written, own, value) if equals else ""


def _other_name(written: str) -> OtherName | None:
    parts = [part for part in re.split(r"\.", written.lstrip(_DASHES + "+")) if part]
    endings = {_normal(".".join(parts[i:])) for i in range(len(parts))}
    for other in OTHER_NAMES:
        path = other.name.partition("=")[0].partition(" ")[0]
        known = _normal(path)
        if known in ("loss-type", "policy-loss-loss-mode"):
            continue  # what they turn on is in the value
        last = _normal(path.rpartition(".")[2])
        if known in endings or (last in endings and last not in ("len", "enable", "penalty-factor")):
            return other
    return None


def _normal(name: str) -> str:
    """Lower case, without leading dashes, and with single hyphens between the words."""
    return re.sub(r"[-._\s]+", "-", name.translate(_PLAIN_DASHES).lower()).strip("-+")


def _letters(name: str) -> str:
    return _normal(name).replace("-", "")
