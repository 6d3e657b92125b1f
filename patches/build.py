"""Rebuilds every patch for slime: ``python patches/build.py --slime-root PATH``.

A patch is made of definitions out of ``slime_fipo``, of the files in ``templates/`` that they are put into, and of the
few lines below (``SERIES``) that go into files of slime's. ``PATH`` is a clone of slime that holds the commits of
``BASES``; it is read, never changed. Writes ``patches/<base>/*.patch`` and ``series.json``, which tells
``slime-fipo patch`` what every file must be before and after.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEMPLATES = HERE / "templates"
PACKAGE = HERE.parent / "slime_fipo"

BASES = {
    "main-624b824a": "624b824a898ab0ec1fcb4d373004c7f3852bf515",
    "v0.3.1": "a6272da0d4f3d0a08520c99a2f3b4f6c887960dc",
}
AUTHOR = "slime-fipo maintainers"
EMAIL = "maintainers@slime-fipo.invalid"
DATE = "2026-09-01T00:00:00+0000"  # fixed: the same sources make the same bytes


class BuildError(Exception):
    """The sources or the checkout are not what this generator knows how to turn into patches."""


# ---------------------------------------------------------------- definitions out of slime_fipo


def source_of(module: str, name: str) -> str:
    """A top-level definition of ``slime_fipo.<module>`` as it is written, with the comment above it."""
    text, node = _find(module, name)
    return _lines(text, node)


def statements_of(module: str, function: str) -> list[tuple[ast.stmt, str]]:
    """The statements of a top-level function with their source, docstring left out."""
    text, node = _find(module, function)
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return [(statement, _lines(text, statement)) for statement in body]


def literal(module: str, name: str) -> object:
    """The value of a top-level constant."""
    return ast.literal_eval(_find(module, name)[1].value)


def _find(module: str, name: str) -> tuple[str, ast.stmt]:
    path = PACKAGE / f"{module.replace('.', '/')}.py"
    text = path.read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]
        if name in names:
            return text, node
    raise BuildError(f"{path} has no top-level {name}; adjust templates/ to what replaced it")


def _lines(text: str, node: ast.stmt) -> str:
    lines = text.splitlines()
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    while first and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return "\n".join(lines[first : node.end_lineno]) + "\n"


def edit(text: str, *changes: tuple[str, str]) -> str:
    """Replace each first string by its second; each must occur exactly once."""
    for old, new in changes:
        if text.count(old) != 1:
            raise BuildError(f"expected once, found {text.count(old)} times:\n{old}\nin\n{text}")
        text = text.replace(old, new)
    return text


def replace_between(text: str, start: str, end: str, new: str) -> str:
    """Replace what lies from ``start`` up to ``end``; each must occur exactly once."""
    for mark in (start, end):
        if text.count(mark) != 1:
            raise BuildError(f"expected once, found {text.count(mark)} times:\n{mark}\nin\n{text}")
    return text[: text.index(start)] + new + text[text.index(end) :]


def without_method(text: str, name: str) -> str:
    node = next((n for n in ast.parse(text).body[0].body if getattr(n, "name", None) == name), None)
    if node is None:
        raise BuildError(f"no method {name} to leave out of\n{text}")
    return edit(text, (_lines(text, node), ""))


def without_keys(text: str, keys: tuple[str, ...]) -> str:
    """A dict display without some of its entries, which span whole lines."""
    table = ast.parse(text).body[0].value
    lines = text.splitlines(keepends=True)
    for key, value in reversed(list(zip(table.keys, table.values, strict=True))):
        if key.value in keys:
            del lines[key.lineno - 1 : value.end_lineno]
            keys = tuple(k for k in keys if k != key.value)
    if keys:
        raise BuildError(f"no entry {keys[0]} to leave out of\n{text}")
    return "".join(lines)


def without_argument_docs(text: str, names: tuple[str, ...]) -> str:
    """A class docstring's ``Args:`` without some of its entries, whose further lines are indented deeper."""
    for name in names:
        text, found = re.subn(rf"^ {{8}}{name}: .*\n(?: {{12}}.*\n)*", "", text, flags=re.MULTILINE)
        if found != 1:
            raise BuildError(f"expected one entry for {name} in the docstring of\n{text}")
    return text


def first_paragraph(text: str, summary: str) -> str:
    """The definition with another first paragraph in its docstring."""
    return re.sub(r'"""(.+?)(?=\n\n|""")', lambda _: f'"""{summary}', text, count=1, flags=re.DOTALL)


# ---------------------------------------------------------------- what differs upstream


def _config(text: str) -> str:
    """One implementation, and errors that name the flag: nothing but flags makes a config upstream."""
    text = without_argument_docs(without_method(text, "as_dict"), ("impl", "chunk_size"))
    text = re.sub(r"^    (impl: str|chunk_size: int) = .*\n", "", text, flags=re.MULTILINE)
    return edit(
        text,
        ('        self._require_integer("chunk_size", 1)\n', ""),
        (
            'for name, choices in (("decay_over", DECAY_OVER), ("impl", IMPLEMENTATIONS)):\n'
            "            if getattr(self, name) not in choices:\n"
            '                self._refuse(name, "one of " + ", ".join(repr(c) for c in choices))',
            "if self.decay_over not in DECAY_OVER:\n"
            '            self._refuse("decay_over", "one of " + ", ".join(map(repr, DECAY_OVER)))',
        ),
        ("the message names the field, the value and the range", "the message names the flag, the value and the range"),
        (
            'raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {wanted}")',
            'flag = name.replace("_", "-")\n'
            '        raise ValueError(f"--fipo-{flag} is {getattr(self, name)!r}; it must be {wanted}")',
        ),
        ('f"preset {name!r} is unknown;', 'f"--fipo-preset {name!r} is unknown;'),
    ).replace(', or None"', ", or 'none'\"")


def _add_arguments(text: str) -> str:
    group_flags = "".join(code for _, code in statements_of("plugin.arguments", "_add_fipo_group")[2:-1])
    group_flags = edit(group_flags, ("choices=_SHIFT_FROM", f"choices={literal('plugin.arguments', '_SHIFT_FROM')!r}"))
    return edit(text, ("    return parser\n", group_flags + "    return parser\n"))


def _always_set(text: str) -> str:
    """slime's parser sets every attribute that the plugin, which may get any namespace, asks for with care."""
    text = text.replace("getattr(args, _dest(flag), None)", "getattr(args, _dest(flag))")
    return re.sub(r'getattr\(args, "(\w+)", None\)', r"args.\1", text)


def _config_from_args(text: str) -> str:
    text = replace_between(
        text,
        "Precedence:",
        "    Raises:",
        "Precedence: a flag that was given (not None), then ``--fipo-preset``, then the defaults. ``none`` turns a"
        " setting\n    off. What ``validate_fipo_args`` writes back gives the same settings again.\n\n",
    )
    text = replace_between(
        text,
        "    try:\n",
        "    if not config.clip_influence:\n",
        "    config = FipoConfig.preset(preset, **given) if preset is not None else FipoConfig(**given)\n\n",
    )
    text = replace_between(
        text, '    eps_clip_high = getattr(args, "eps_clip_high"', "    c = config.dual_clip_c\n", ""
    )
    return edit(
        _always_set(text),
        (
            "if c is not None and eps_clip_high is not None and c <= 1 + eps_clip_high:",
            "if c is not None and c <= 1 + args.eps_clip_high:",
        ),
        ("{1 + eps_clip_high:g}", "{1 + args.eps_clip_high:g}"),
    )


def _weights_body(text: str) -> str:
    text, found = re.subn(
        r"compute_future_kl\(\n? *(.+), (?:config\.)?impl, config\.chunk_size\n? *\)", r"scan_future_kl(\1)", text
    )
    if found != 1:
        raise BuildError(f"expected one call of compute_future_kl(…, impl, chunk_size) in\n{text}")
    return edit(text, ("shift = log_probs.to(dtype) - old_log_probs.to(dtype)", "shift = log_ratio.to(dtype)"))


ADAPT: dict[str, Callable[[str], str]] = {
    "FipoConfig": _config,
    "PRESETS": lambda text: edit(text, (", chunk 128", "")),
    "_FIELD_FLAGS": lambda text: without_keys(text, ("--fipo-chunk-size", "--fipo-impl")),
    "add_fipo_arguments": _add_arguments,
    "fipo_config_from_args": _config_from_args,
    "shift_is_apart": _always_set,
    "solve_recurrence": lambda text: edit(text, (", n ≥ 1.", "."), ("if n == 1:", "if n <= 1:")),
    "ContextParallel": lambda text: edit(
        without_method(text, "check"), ("what :meth:`check` returned.", "``chunk_lengths`` as a tensor.")
    ),
    "FipoWeights": lambda text: first_paragraph(text, "What ``fipo_weights`` returns. All tensors are detached."),
    "fipo_weights": _weights_body,
}

_MARKER = re.compile(r"^ *#: (\S+) (\w+)(?: from (\w+))?\n", re.MULTILINE)


def expand(template: str) -> str:
    """A template with every ``#: module name`` line replaced by that definition of ``slime_fipo``.

    ``#: module function from variable`` stands for the function's statements from that variable's assignment on.
    """

    def insert(marker: re.Match) -> str:
        module, name, variable = marker.groups()
        if variable is None:
            text = source_of(module, name)
        else:
            statements = statements_of(module, name)
            starts = [s for s in statements if variable in map(ast.unparse, getattr(s[0], "targets", ()))]
            if not starts:
                raise BuildError(f"{module}.{name} assigns no {variable}; adjust templates/ to what replaced it")
            # The function's text from that statement on, with its blank lines and comments.
            whole = source_of(module, name)
            text = whole[whole.index(starts[0][1]) :]
        return ADAPT.get(name, lambda text: text)(text)

    return _MARKER.sub(insert, template)


def formatted(text: str) -> str:
    """As slime's pre-commit wants it: black's style, 119 columns."""
    options = ["--isolated", "--line-length", "119", "--stdin-filename", "a.py"]
    command = [sys.executable, "-m", "ruff", "format", *options, "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def added_file(path: str) -> str:
    """The text of a file that the series adds to slime."""
    if path.startswith("scripts/models/"):
        return (HERE.parent / path).read_text(encoding="utf-8")
    text = (TEMPLATES / path).read_text(encoding="utf-8")
    return formatted(expand(text)) if path.endswith(".py") else text


# ---------------------------------------------------------------- what changes in slime's files


@dataclass(frozen=True)
class Hook:
    """Text put in after ``anchor``, which occurs once in ``path``, or in its place."""

    path: str
    anchor: str
    text: str
    replace: bool = False
    bases: tuple[str, ...] = tuple(BASES)

    def apply(self, tree: Path) -> None:
        path = tree / self.path
        new = self.text if self.replace else self.anchor + self.text
        try:
            path.write_text(edit(path.read_text(encoding="utf-8"), (self.anchor, new)), encoding="utf-8")
        except BuildError:
            raise BuildError(f"{self.path}: {self.anchor!r} does not occur exactly once; adjust SERIES") from None


@dataclass(frozen=True)
class Commit:
    message: str
    added: tuple[str, ...]
    hooks: tuple[Hook, ...] = ()
    workflows: bool = False


LOSS, ARGUMENTS = "slime/backends/megatron_utils/loss.py", "slime/utils/arguments.py"
TEMPLATE = ".github/workflows/pr-test.yml.j2"

OBJECTIVE = (
    Hook(LOSS, "    slice_log_prob_with_cp,\n)\n", "from .fipo import compute_fipo_weights\n"),
    Hook(
        LOSS,
        "        ppo_kl = old_log_probs - log_probs\n\n",
        "    # Compute FIPO weights if enabled\n"
        '    if args.loss_type == "fipo_loss":\n'
        "        fipo_weights, fipo_metrics = "
        "compute_fipo_weights(args, batch, ppo_kl, advantages, sum_of_sample_mean)\n\n",
    ),
    Hook(
        LOSS,
        "        pg_loss, pg_clipfrac = compute_policy_loss(ppo_kl, advantages, args.eps_clip, args.eps_clip_high)\n",
        '        c = args.eps_clip_c if args.loss_type == "fipo_loss" else None\n'
        "        pg_loss, pg_clipfrac = "
        "compute_policy_loss(ppo_kl, advantages, args.eps_clip, args.eps_clip_high, eps_clip_c=c)\n",
        replace=True,
        bases=("v0.3.1",),
    ),
    Hook(
        LOSS,
        "        pg_loss = pg_loss * opsm_mask\n",
        '    if args.loss_type == "fipo_loss":\n        pg_loss = pg_loss * fipo_weights\n',
    ),
    Hook(
        LOSS,
        '        reported_loss["opsm_clipfrac"] = opsm_clipfrac\n',
        '    if args.loss_type == "fipo_loss":\n        reported_loss.update(fipo_metrics)\n',
    ),
    Hook(LOSS, '        case "policy_loss":\n', '        case "policy_loss" | "fipo_loss":\n', replace=True),
    Hook(
        "slime/backends/megatron_utils/model.py",
        "    if args.custom_megatron_before_train_step_hook_path:\n",
        "    args.fipo_step_id = step_id  # fipo_loss reports the engines' mismatch at a rollout's first step\n"
        "    if args.custom_megatron_before_train_step_hook_path:\n",
        replace=True,
    ),
    Hook(
        ARGUMENTS,
        "from slime.utils.eval_config import EvalDatasetConfig, build_eval_dataset_configs, ensure_dataset_list\n",
        "from slime.utils.fipo import add_fipo_arguments, validate_fipo_args\n",
    ),
    Hook(
        ARGUMENTS,
        '                choices=["policy_loss", "sft_loss", "custom_loss"],\n',
        '                choices=["policy_loss", "fipo_loss", "sft_loss", "custom_loss"],\n',
        replace=True,
    ),
    Hook(
        ARGUMENTS,
        '                    "Choose loss type, currently support ppo policy_loss or sft_loss, "\n',
        '                    "Choose loss type, currently support ppo policy_loss, fipo_loss or sft_loss, "\n',
        replace=True,
    ),
    Hook(
        ARGUMENTS,
        "        parser = add_algo_arguments(parser)\n",
        "        parser = add_fipo_arguments(parser)\n",
    ),
    Hook(ARGUMENTS, "\n    slime_validate_args(args)\n", "    validate_fipo_args(args)\n"),
)

DOCS = tuple(
    Hook(f"docs/{language}/index.rst", "   advanced/on-policy-distillation.md\n", "   advanced/fipo.md\n")
    for language in ("en", "zh")
)

SERIES = (
    Commit(
        """Add FIPO: --loss-type fipo_loss

Future-KL Influenced Policy Optimization (arXiv:2603.19835) weights each
token's policy loss by how the policy moves on everything after it. The
clipped PPO term is positively homogeneous in the advantage, so FIPO is one
non-negative weight per token, multiplied on where OPSM's mask is. OPSM,
TIS, custom reducers, KL and entropy terms follow it unchanged.

Future-KL is a linear recurrence, evaluated in time linear in the tokens.
Under context parallelism it is exact and costs one all-gather of three
floats per response.

slime/utils/fipo.py holds the settings, the flags and the weights, and
slime/backends/megatron_utils/fipo.py the batch layout; both come from the
reference implementation, slime-fipo.
""",
        ("slime/utils/fipo.py", "slime/backends/megatron_utils/fipo.py"),
        OBJECTIVE,
    ),
    Commit(
        """Test fipo_loss on CPU

Weights against a per-token float64 recurrence, loss_function's loss,
gradient and metrics, CP 1 against CP 2 and 4 on gloo, train_one_step, and
parse_args. Registered in the cpu-unittest matrix.
""",
        ("tests/test_fipo_loss.py",),
        (
            Hook(
                TEMPLATE,
                "        {'test_file': 'test_cispo_loss.py', 'num_gpus': 0},\n",
                "        {'test_file': 'test_fipo_loss.py', 'num_gpus': 0},\n",
            ),
        ),
        workflows=True,
    ),
    Commit(
        """Document fipo_loss, and add the Qwen3.5-2B model script

One page in English and in Chinese.
""",
        ("docs/en/advanced/fipo.md", "docs/zh/advanced/fipo.md", "scripts/models/qwen3.5-2B.sh"),
        DOCS,
    ),
    Commit(
        """Add an example launch script for fipo_loss

Qwen3.5-2B on one node with 8 GPUs. Nothing else in the series needs it.
""",
        ("scripts/run-qwen3.5-2B-fipo.sh",),
    ),
)


# ---------------------------------------------------------------- git


def git(*arguments: str, cwd: Path, **options) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_NAME": AUTHOR,
        "GIT_AUTHOR_EMAIL": EMAIL,
        "GIT_AUTHOR_DATE": DATE,
        "GIT_COMMITTER_NAME": AUTHOR,
        "GIT_COMMITTER_EMAIL": EMAIL,
        "GIT_COMMITTER_DATE": DATE,
    }
    command = ["git", "-c", "core.autocrlf=false", "-c", "core.hooksPath=/dev/null", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, **options)
    if done.returncode:
        raise BuildError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def build_base(base: str, tree: Path, out: Path) -> dict:
    """Commit the series on ``base`` in the clone ``tree`` and write its mails into ``out``."""
    commit = BASES[base]
    git("checkout", "--quiet", "--force", "--detach", commit, cwd=tree)
    touched, results = {}, []
    for part in SERIES:
        for path in part.added:
            target = tree / path
            if target.exists():
                raise BuildError(f"{base} already has {path}")
            if not target.parent.is_dir():  # so that taking the patch back leaves no folder behind
                raise BuildError(f"{base} has no folder {target.parent.relative_to(tree)} for {path}")
            target.write_text(added_file(path), encoding="utf-8")
        for hook in part.hooks:
            if base in hook.bases:
                hook.apply(tree)
        if part.workflows:
            generator = ".github/workflows/generate_github_workflows.py"
            subprocess.run([sys.executable, generator], cwd=tree, check=True, capture_output=True)
        git("add", "--all", cwd=tree)
        git("commit", "--quiet", "--no-verify", "--message", part.message, cwd=tree)
        results.append(git("rev-parse", "HEAD^{tree}", cwd=tree).strip())
    for line in git("diff", "--raw", "--no-renames", "--no-abbrev", commit, "HEAD", cwd=tree).splitlines():
        meta, path = line.split("\t")
        _, mode, before, after, _ = meta.split()
        touched[path] = {"before": before if before.strip("0") else None, "after": after, "mode": mode}
    options = ["--unified=1", "--no-renames", "--full-index", "--zero-commit", "--no-signature"]
    options += ["--diff-algorithm=myers", "--numbered", "--stat=80", f"--output-directory={out}"]
    git("format-patch", "--quiet", *options, commit, cwd=tree)
    return {
        "commit": commit,
        "describe": git("describe", "--tags", "--always", commit, cwd=tree).strip(),
        "tree": git("rev-parse", f"{commit}^{{tree}}", cwd=tree).strip(),
        "results": results,
        "patches": sorted(path.name for path in out.glob("*.patch")),
        "files": touched,
    }


def build(slime_root: Path, out: Path) -> None:
    """Write every base's series and ``series.json`` into the folder ``out``."""
    with tempfile.TemporaryDirectory(prefix="slime-fipo-patches-") as scratch:
        tree = Path(scratch) / "slime"
        git("clone", "--quiet", "--shared", "--no-checkout", str(slime_root.resolve()), str(tree), cwd=Path(scratch))
        for base, commit in BASES.items():
            try:
                git("cat-file", "-e", f"{commit}^{{commit}}", cwd=tree)
            except BuildError:
                fetch = f"git -C {slime_root} fetch --tags origin"
                raise BuildError(f"{slime_root} lacks {commit} ({base}): {fetch}") from None
        fresh = Path(scratch) / "patches"
        series = {}
        for base in BASES:
            (fresh / base).mkdir(parents=True)
            series[base] = build_base(base, tree, fresh / base)
        (fresh / "series.json").write_text(json.dumps(series, indent=1) + "\n", encoding="utf-8")
        for base in BASES:
            shutil.rmtree(out / base, ignore_errors=True)
        shutil.copytree(fresh, out, dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slime-root", type=Path, required=True, help="a clone of slime; it is not changed")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: this one)")
    options = parser.parse_args()
    try:
        build(options.slime_root, options.out)
    except BuildError as error:
        sys.exit(f"patches/build.py: {error}")
    for path in sorted(options.out.glob("*/*.patch")):
        print(path)


if __name__ == "__main__":
    main()
