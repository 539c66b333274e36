"""The C++ kernels: compiled at first use, and what happens where they cannot be."""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from lrlora.ops import cpu
from lrlora.ops.phi import TransferSpec
from lrlora.ops.table import TransferTable
from lrlora.ops.transfer import Transfer

from .test_fused_linear import formula, fused, make_case, relative

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
    with pytest.warns(UserWarning, match=r"C\+\+ compiler .*CXX.*no-such-compiler"):
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


def exchange(kept: Path, code: str, folder: Path) -> Path:
    """Put a library with other code in the place of the kept one, under the name that its content asks for."""
    source, made = folder / "other.cpp", folder / "other.so"
    source.write_text(code)
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(made)], check=True)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in (kept, made)]
    made.chmod(0o700)
    kept.unlink()
    return made.rename(kept.with_name(kept.name.replace(*digests)))


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
    return exchange(kept, code, outside)


def script(path: Path, *lines: str) -> str:
    """A compiler of one's own."""
    path.write_text("\n".join(("#!/bin/sh", *lines)))
    path.chmod(0o700)
    return str(path)


@needs_compiler
@pytest.mark.parametrize("share", [0, 0.5])
def test_a_cut_off_library_is_compiled_anew(kept: Path, share: float) -> None:
    size = kept.stat().st_size
    os.truncate(kept, int(size * share))
    process = start_loading()  # which half a library may end
    process.join()
    assert process.exitcode == 0
    assert kept.stat().st_size == size


@needs_compiler
def test_a_library_without_the_kernels_is_compiled_anew(kept: Path, outside: Path) -> None:
    exchange(kept, "int other;", outside)
    assert hasattr(load_quietly(), "lrlora_gradient")


@needs_compiler
def test_a_compiler_that_leaves_the_kernels_out_is_told_of(
    monkeypatch: pytest.MonkeyPatch, fresh_library: Path, outside: Path
) -> None:
    (outside / "empty.cpp").write_text("")
    # The last argument is the file to write.
    compiler = script(outside / "c++", 'for out; do :; done; c++ -shared -fPIC "$(dirname "$0")"/empty.cpp -o "$out"')
    monkeypatch.setenv("CXX", compiler)
    case = make_case(dtype=torch.float32)
    with pytest.warns(UserWarning, match="has no function lrlora_"):
        assert relative(fused(case), formula(case)) <= 1e-6
    assert list(fresh_library.rglob("*.so")) == []


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
@pytest.mark.parametrize("change", CHANGES)
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
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a folder has no path but its name")
def test_a_folder_that_is_exchanged_after_the_check_is_not_loaded_from(
    evil: Path, filled_cache: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = evil.parent
    evil = evil.rename(outside / "evil.so")
    (good,) = filled_cache.rglob("*.so")
    shutil.copy2(good, folder)
    load = ctypes.CDLL

    def exchange_and_load(name: str) -> ctypes.CDLL:
        folder.rename(outside / "away")
        folder.mkdir()
        evil.rename(folder / good.name)
        return load(name)

    monkeypatch.setattr(ctypes, "CDLL", exchange_and_load)
    load_quietly()
    assert not (outside / "it-ran").exists()


@needs_compiler
@pytest.mark.parametrize("umask", [0, 0o002])
def test_others_cannot_write_whatever_the_umask(fresh_library: Path, umask: int) -> None:
    mode = 0o777 & ~umask
    fresh_library.chmod(mode)
    before = os.umask(umask)
    try:
        load_quietly()
    finally:
        os.umask(before)
    (kept,) = fresh_library.rglob("*.so")
    for path in (kept, kept.parent):
        assert path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH) == 0
    assert stat.S_IMODE(fresh_library.stat().st_mode) == mode  # it may be shared for its downloads
    compiled = kept.stat()
    load_quietly()
    assert kept.stat().st_ino == compiled.st_ino


def test_a_compiler_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch, fresh_library: Path, outside: Path) -> None:
    # What it starts holds the pipe open for as long as it lives.
    os.mkfifo(outside / "alive")
    alive = os.open(outside / "alive", os.O_RDONLY | os.O_NONBLOCK)
    monkeypatch.setenv("CXX", script(outside / "c++", f"exec 3> {outside}/alive", "sleep 600", "true"))
    monkeypatch.setattr(cpu, "_COMPILER_SECONDS", 2)
    case = make_case(dtype=torch.float32)
    with pytest.warns(UserWarning, match="did not finish in 2 s"):
        assert relative(fused(case), formula(case)) <= 1e-6
    assert select.select([alive], [], [], 60)[0]  # at its end
    os.close(alive)


@needs_compiler
def test_what_a_killed_process_left_is_removed(
    monkeypatch: pytest.MonkeyPatch, fresh_library: Path, outside: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("CXX", script(outside / "c++", "kill -9 $PPID"))
        process = start_loading()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    (scratch,) = (path for path in fresh_library.rglob("*") if path.is_dir() and not any(path.iterdir()))
    load_quietly()
    assert scratch.exists()  # its process might be alive, on another machine even
    os.utime(scratch, (0, 0))
    load_quietly()
    assert not scratch.exists()


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


@needs_compiler
def test_the_natural_tails_are_taken_as_far_as_a_table_reaches() -> None:
    spec = TransferSpec("sinc", 50)
    transfer, plain = Transfer(spec), torch.zeros(1)
    for largest, expected in ((0.0, True), (40.0, True), (1e6, False), (float("inf"), False)):
        table = TransferTable(spec, transfer.amplitude, transfer.bandwidth, torch.float32, largest)
        assert cpu.supports(table, plain) is expected
