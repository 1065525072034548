"""The second start needs no compiler, and what is kept for it is used only where it is ours, whole and of today."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from rama_ebpf import loader
from rama_ebpf.kernel import bpf
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy.rule import Action

from ..policy.frames import ethernet, ipv4, tcp
from ..policy.probe import Probe, listen
from ..proxy import rama_ebpf

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

# Loads and ends where no BCC is: an empty file system hides it, in a mount namespace of its own.
_WITHOUT_BCC = """
set -e
mount --make-rprivate /
mount -t tmpfs none "$(dirname "$1")"
exec "$2" -c "
import logging, sys
from rama_ebpf import loader
from rama_ebpf.kernel.instance import Instance
logging.basicConfig(format='%(levelname)s %(message)s', level='INFO', stream=sys.stdout)
gate = loader.load(Instance('$3'))
print(sorted(gate.programs))
gate.close()"
"""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAMA_EBPF_STATE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def place(instance: str) -> Instance:
    Instance(instance).run_dir.mkdir(parents=True)
    return Instance(instance)


def load(place: Instance) -> dict[str, str]:
    """Load the gate once; return the kernel's tags of its programs."""
    gate = loader.load(place)
    try:
        return {name: bpf.prog_info(fd).tag for name, fd in gate.programs.items()}
    finally:
        gate.close()


def kept(state: Path) -> Path:
    (file,) = (state / ".programs").iterdir()
    return file


def load_without_bcc(place: Instance) -> subprocess.CompletedProcess[str]:
    import bcc

    command = ["unshare", "--mount", "bash", "-c", _WITHOUT_BCC, "-", bcc.__file__, sys.executable, place.name]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_second_load_needs_no_compiler(place: Instance, state: Path) -> None:
    first = load(place)
    assert (kept(state).stat().st_mode & 0o777, kept(state).parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert load(place) == first
    done = load_without_bcc(place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == str(sorted(first))
    kept(state).unlink()
    refused = load_without_bcc(place)
    assert refused.returncode == 1
    assert "CompileError: BCC failed" in refused.stderr


def _damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _give_away(file: Path) -> None:
    os.chown(file, 65534, 65534)


def _open_up(file: Path) -> None:
    file.chmod(0o640)


def _put_link(file: Path) -> None:
    elsewhere = file.parent.parent / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_damage, "it is damaged"),
        (_cut, "it is damaged"),
        (_give_away, "the file belongs to user 65534"),
        (_open_up, "the file is open to others (mode 640)"),
        (_put_link, "Too many levels of symbolic links"),
    ],
)
def test_spoiled_file_is_not_used_and_made_anew(
    place: Instance, state: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None], why: str
) -> None:
    caplog.set_level(logging.INFO)
    first = load(place)
    spoil(kept(state))
    caplog.clear()
    assert load(place) == first
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert f"{kept(state)} are not used" in warning
    assert why in warning
    assert any("compiled 11 kernel programs" in record.getMessage() for record in caplog.records)
    caplog.clear()
    assert load(place) == first
    assert not [record for record in caplog.records if "compiled" in record.getMessage()]


def test_directory_that_is_open_to_others_is_not_used(
    place: Instance, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = load(place)
    before = kept(state).read_bytes()
    kept(state).parent.chmod(0o755)
    assert load(place) == first
    assert "the directory is open to others (mode 755)" in caplog.text
    assert kept(state).read_bytes() == before  # nor is anything put into it
    assert "each start compiles" in caplog.text


def test_changed_compiler_makes_it_stale(place: Instance, state: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = load(place)
    header = Path("/usr/include/linux/udp.h").resolve()
    before = header.stat()
    os.utime(header, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    try:
        assert load(place) == first
    finally:
        os.utime(header, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert f"{header} has changed since" in caplog.text


def test_kept_code_of_another_source_is_not_asked_for(place: Instance, state: Path) -> None:
    load(place)
    loader.load(place, xdp=True).close()
    assert len(list((state / ".programs").iterdir())) == 2


@pytest.fixture
def probes(instance: str) -> Iterator[tuple[Probe, Probe]]:
    with Probe(Instance(f"{instance}-a")) as first, Probe(Instance(f"{instance}-b")) as second:
        yield first, second


def test_the_same_code_reads_each_instance_s_own_maps(probes: tuple[Probe, Probe], state: Path) -> None:
    kept(state)  # one compilation for both
    source = IPv4Address("198.18.0.7")
    frame = ethernet(ipv4(source, IPv4Address("198.18.0.1"), tcp(1080)))
    first, second = probes
    second.store.ban(source)
    with listen(first, 1080), listen(second, 1080):
        actions = [parsed.verdict.action for parsed in (first.judge(frame), second.judge(frame)) if parsed.verdict]
    assert actions == [Action.ALLOW, Action.DROP]


def test_purge_removes_it(place: Instance, state: Path) -> None:
    load(place)
    rama_ebpf("unload", "--instance", place.name)
    assert kept(state)
    rama_ebpf("unload", "--purge", "--instance", place.name)
    assert not (state / ".programs").exists()
