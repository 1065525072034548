from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Hashable
from pathlib import Path

import pytest

from rama_ebpf.core import AuthFailed, Credentials, Stream, User, stack
from rama_ebpf.layers.auth import AuthLayer, PasswordFile, PasswordFileError, StaticUsers, hash_password
from rama_ebpf.layers.check_queue import CheckQueue
from rama_ebpf.layers.mapping import AddExtensionLayer

from .conftest import Serve


@pytest.fixture(scope="module")
def scrypt_line() -> str:
    return f"tom:{hash_password('sécret')}\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def to_file(text: str) -> Path:
        path = tmp_path / "users"
        path.write_text(text)
        return path

    return to_file


async def test_static_users() -> None:
    users = StaticUsers({"tom": "secret", "anna": ""})
    assert await users(Credentials("tom", "secret")) == User("tom")
    for name, password in (("tom", "Secret"), ("tom", ""), ("bob", ""), ("", "")):
        with pytest.raises(AuthFailed):
            await users(Credentials(name, password))


async def test_scrypt_file(write: Callable[[str], Path], scrypt_line: str) -> None:
    users = PasswordFile(write(f"# staff\n\n{scrypt_line}"))
    assert await users(Credentials("tom", "sécret")) == User("tom")
    for name, password in (("tom", "secret"), ("bob", "sécret")):
        with pytest.raises(AuthFailed):
            await users(Credentials(name, password))


@pytest.fixture
def htpasswd(tmp_path: Path) -> Path:
    path = tmp_path / "users"
    subprocess.run(["htpasswd", "-cbB", "-C", "5", path, "tom", "secret"], check=True, capture_output=True)
    return path


async def test_bcrypt_file_of_htpasswd(htpasswd: Path) -> None:
    users = PasswordFile(htpasswd)
    assert await users(Credentials("tom", "secret")) == User("tom")
    with pytest.raises(AuthFailed):
        await users(Credentials("tom", "wrong"))


async def test_a_correct_password_is_remembered_for_a_while_only(
    write: Callable[[str], Path], scrypt_line: str
) -> None:
    times = iter((1.0, 1.0, 2.0, 60.9, 61.1, 61.2))
    checks: list[object] = []

    class Counted(CheckQueue):
        async def run(self, source: Hashable, check: Callable[[], bool]) -> bool:
            checks.append(source)
            return await super().run(source, check)

    users = PasswordFile(write(scrypt_line), cache=60, clock=lambda: next(times), queue=Counted())
    for _ in range(3):
        await users(Credentials("tom", "sécret"))
    assert len(checks) == 1
    await users(Credentials("tom", "sécret"))
    assert len(checks) == 2


async def test_a_changed_file_counts_at_once_and_its_old_passwords_no_more(
    write: Callable[[str], Path], scrypt_line: str
) -> None:
    path = write(scrypt_line)
    users = PasswordFile(path)
    await users(Credentials("tom", "sécret"))
    path.write_text(f"anna:{hash_password('new')}\n")
    assert await users(Credentials("anna", "new")) == User("anna")
    with pytest.raises(AuthFailed):
        await users(Credentials("tom", "sécret"))


async def test_a_file_that_went_bad_leaves_the_last_good_one_in_force(
    write: Callable[[str], Path], scrypt_line: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(scrypt_line)
    users = PasswordFile(path)
    path.write_text("tom:plain\n")
    assert await users(Credentials("tom", "sécret")) == User("tom")
    os.unlink(path)
    for _ in range(3):
        assert await users(Credentials("tom", "sécret")) == User("tom")
    errors = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert f"{path}:1: the hash must be" in errors[0]
    assert "No such file" in errors[1]
    assert len(errors) == 2  # once for each thing that is wrong, not for every client


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tom", r"users:2: write name:hash"),
        (":$2b$05$x", r"users:2: write name:hash"),
        ("tom:secret", r"users:2: the hash must be"),
        ("tom:$scrypt$ln=15,r=8$AA$AA", r"users:2: 'p'"),
        ("tom:$scrypt$ln=30,r=8,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAA", r"users:2: .*out of range"),
        ("tom:$scrypt$ln=20,r=8,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAA", r"users:2: .*128 MiB"),
        ("tom:$2b$05$tooshort", r"users:2: "),
    ],
)
def test_a_bad_line_is_named(write: Callable[[str], Path], line: str, message: str) -> None:
    with pytest.raises(PasswordFileError, match=message):
        PasswordFile(write(f"# head\n{line}\n"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PasswordFileError, match="nowhere: No such file"):
        PasswordFile(tmp_path / "nowhere")


async def test_auth_layer_adds_the_user_or_refuses(serve: Serve) -> None:
    async def who(stream: Stream) -> str:
        return stream.extensions.require(User).name

    users = StaticUsers({"tom": "secret"})
    for layers, expected in (
        ((AddExtensionLayer(Credentials("tom", "secret")), AuthLayer(users)), "tom"),
        ((AddExtensionLayer(Credentials("tom", "wrong")), AuthLayer(users)), AuthFailed),
        ((AuthLayer(users),), AuthFailed),
    ):
        server = await serve(stack(*layers, who))
        await server.open()
        outcome = await server.outcome()
        assert outcome == expected or type(outcome) is expected


def test_passwords_show_in_no_representation() -> None:
    assert "secret" not in repr(Credentials("tom", "secret"))


async def test_a_file_that_a_worker_may_not_read_again_comes_with_a_remedy(
    write: Callable[[str], Path], scrypt_line: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(scrypt_line)
    users = PasswordFile(path)

    def refused(*_args: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("rama_ebpf.layers.auth.read_text_file", refused)
    path.write_text(scrypt_line + "# changed\n")
    assert await users(Credentials("tom", "sécret")) == User("tom")
    (error,) = (record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)
    assert f"{path}: Permission denied (SIGHUP has it read by root" in error


@pytest.mark.root
async def test_a_closed_directory_is_no_error_and_serves_on(
    write: Callable[[str], Path], scrypt_line: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = write(scrypt_line)
    path.parent.chmod(0o700)
    users = PasswordFile(path)
    os.seteuid(65534)  # as a worker
    try:
        for _ in range(3):
            assert await users(Credentials("tom", "s\u00e9cret")) == User("tom")
    finally:
        os.seteuid(0)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", f"{path} is not watched, for workers cannot enter its directory: SIGHUP has it read")
    ]
