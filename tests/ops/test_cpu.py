"""The C++ kernels: compiled at first use, and what happens where they cannot be."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import shutil
import stat
import subprocess
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from lrlora.ops import cpu

from ..conftest import relative
from .test_fused_linear import formula, fused, make_case

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, and nothing loaded yet."""
    monkeypatch.delenv("LRLORA_KERNELS", raising=False)
    monkeypatch.setenv("LRLORA_CACHE", str(tmp_path))
    cpu._library.cache_clear()
    yield tmp_path
    cpu._library.cache_clear()


def test_without_a_compiler_it_says_so_once_and_works(monkeypatch: pytest.MonkeyPatch, fresh_library: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    case = make_case(dtype=torch.float32)
    with pytest.warns(UserWarning, match=r"CXX.*no-such-compiler"):
        y = fused(case)
    assert relative(y, formula(case)) <= 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused(case)


def test_without_a_home_it_works(monkeypatch: pytest.MonkeyPatch, fresh_library: Path) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LRLORA_CACHE")
    monkeypatch.setattr(Path, "home", no_home)
    case = make_case(dtype=torch.float32)
    with pytest.warns(UserWarning, match="LRLORA_CACHE"):
        assert relative(fused(case), formula(case)) <= 1e-6


def load_quietly() -> ctypes.CDLL:
    cpu._library.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels = cpu._library()
    assert kernels is not None
    return kernels


@needs_compiler
def test_a_driver_that_leaves_the_runtime_of_cpp_out_will_do(
    monkeypatch: pytest.MonkeyPatch, fresh_library: Path
) -> None:
    """PEFT's BOFT, where its own kernels cannot be compiled, leaves CXX=gcc behind in the process."""
    monkeypatch.setenv("CXX", "cc")
    load_quietly()
    case = make_case(dtype=torch.float32)
    assert relative(fused(case), formula(case)) <= 1e-6


def start_loading() -> BaseProcess:
    """Load them in another process."""
    process = multiprocessing.get_context("fork").Process(target=load_quietly)
    process.start()
    return process


@pytest.fixture(scope="module")
def filled_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder after the first use."""
    folder = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LRLORA_CACHE", str(folder))
        load_quietly()
    return folder


@pytest.fixture
def kept(filled_cache: Path, fresh_library: Path) -> Path:
    """The library in a filled cache."""
    shutil.copytree(filled_cache, fresh_library, dirs_exist_ok=True)
    (path,) = fresh_library.rglob("*.so")
    return path


@pytest.fixture
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is not in the cache."""
    return tmp_path_factory.mktemp("outside")


@pytest.fixture
def evil(kept: Path, outside: Path) -> Path:
    """A kept library that writes the file `it-ran` outside as it is loaded."""
    code = f'''
        #include <cstdio>
        extern "C" void lrlora_effective_weight() {{}}
        extern "C" void lrlora_gradient() {{}}
        __attribute__((constructor)) static void run() {{ std::fclose(std::fopen("{outside}/it-ran", "w")); }}
    '''
    (outside / "evil.cpp").write_text(code)
    kept.unlink()
    subprocess.run(["c++", "-shared", "-fPIC", str(outside / "evil.cpp"), "-o", str(kept)], check=True)
    kept.chmod(0o700)
    return kept


def script(path: Path, *lines: str) -> str:
    """A compiler of one's own."""
    path.write_text("\n".join(("#!/bin/sh", *lines)))
    path.chmod(0o700)
    return str(path)


@needs_compiler
def test_a_library_of_ones_own_is_run(evil: Path, outside: Path) -> None:
    load_quietly()
    assert (outside / "it-ran").exists()


def give_away(path: Path) -> None:
    os.chown(path, 65534, 65534)


def open_to_group(path: Path) -> None:
    path.chmod(0o770)


def open_to_all(path: Path) -> None:
    path.chmod(0o707)


def link(path: Path) -> None:
    path.symlink_to(path.rename(path.with_name("elsewhere")))


CHANGES = [pytest.param(give_away, marks=as_root), open_to_group, open_to_all, link]


@needs_compiler
@pytest.mark.parametrize("change", [CHANGES[0], link])
def test_a_library_that_others_may_write_is_not_run(evil: Path, outside: Path, change: Callable[[Path], None]) -> None:
    change(evil)
    load_quietly()
    assert not (outside / "it-ran").exists()


@needs_compiler
@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_others_may_write_to_is_refused(
    evil: Path, outside: Path, change: Callable[[Path], None]
) -> None:
    change(evil.parent)
    case = make_case(dtype=torch.float32)
    with pytest.warns(UserWarning, match=re.escape(str(evil.parent))) as caught:
        assert relative(fused(case), formula(case)) <= 1e-6
    (warning,) = caught
    if change in (open_to_group, open_to_all):
        assert f"chmod go-w {evil.parent}" in str(warning.message)
    assert not (outside / "it-ran").exists()


@needs_compiler
def test_others_cannot_write_whatever_the_umask(fresh_library: Path) -> None:
    fresh_library.chmod(0o777)
    before = os.umask(0)
    try:
        load_quietly()
    finally:
        os.umask(before)
    (kept,) = fresh_library.rglob("*.so")
    for path in (kept, kept.parent):
        assert path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH) == 0
    assert stat.S_IMODE(fresh_library.stat().st_mode) == 0o777  # it may be shared for its downloads
    compiled = kept.stat()
    load_quietly()
    assert kept.stat().st_ino == compiled.st_ino


def test_a_compiler_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch, fresh_library: Path, outside: Path) -> None:
    monkeypatch.setenv("CXX", script(outside / "c++", "exec sleep 600"))
    monkeypatch.setattr(cpu, "_COMPILER_SECONDS", 2)
    case = make_case(dtype=torch.float32)
    with pytest.warns(UserWarning, match=r"timed out .*\b2 seconds"):
        assert relative(fused(case), formula(case)) <= 1e-6


@needs_compiler
def test_processes_may_compile_at_once(monkeypatch: pytest.MonkeyPatch, fresh_library: Path, outside: Path) -> None:
    wait = f"touch {outside}/$$.started; until [ $(ls {outside} | grep -c started) = 2 ]; do sleep 0.1; done"
    monkeypatch.setenv("CXX", script(outside / "both", wait, 'exec c++ "$@"'))
    processes = [start_loading(), start_loading()]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    (kept,) = (path for path in fresh_library.rglob("*") if path.is_file())
    compiled = kept.stat()
    load_quietly()
    assert kept.stat().st_ino == compiled.st_ino
