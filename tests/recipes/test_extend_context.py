"""The context extension: the source is untouched, the target whole or absent."""

import json
import os
import subprocess
import sys

import pytest

from slime_fipo.recipes.extend_context import extend_context


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "Qwen2.5-Math-7B"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"max_position_embeddings": 4096, "rope_theta": 10000.0}))
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def test_links_the_weights_and_changes_one_number(source, tmp_path):
    before = (source / "config.json").read_bytes()
    target = tmp_path / "models" / "Qwen2.5-Math-7B-32k"
    assert extend_context(source, target, 32768)
    assert json.loads((target / "config.json").read_text()) == {"max_position_embeddings": 32768, "rope_theta": 10000.0}
    assert (target / "model.safetensors").is_symlink() and (target / "model.safetensors").read_bytes() == b"weights"
    assert (source / "config.json").read_bytes() == before
    assert not (target / "config.json").is_symlink()

    stamp = (target / "config.json").stat().st_mtime_ns
    assert not extend_context(source, target, 32768), "a second run finds it done"
    assert (target / "config.json").stat().st_mtime_ns == stamp


def test_refuses_rather_than_guesses(source, tmp_path):
    target = tmp_path / "target"
    with pytest.raises(ValueError, match="--positions 2048 is below the 4096"):
        extend_context(source, target, 2048)
    with pytest.raises(ValueError, match=r"config.json is missing or says no"):
        extend_context(tmp_path / "nothing", target, 32768)
    assert not target.exists()
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not"):
        extend_context(source, target, 32768)
    assert [p.name for p in target.iterdir()] == ["notes.txt"]


def test_a_failure_leaves_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        extend_context(source, tmp_path / "target", 32768)
    assert [p.name for p in tmp_path.iterdir()] == [source.name]
    assert (source / "model.safetensors").read_bytes() == b"weights"


def test_as_a_program(source, tmp_path):
    command = [sys.executable, "-m", "slime_fipo.recipes.extend_context", str(source), str(tmp_path / "t")]
    done = subprocess.run([*command, "--positions", "32768"], capture_output=True, text=True)
    assert done.returncode == 0 and "32768 positions" in done.stdout
    failed = subprocess.run([*command, "--positions", "16"], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and "--positions 16" in failed.stderr
