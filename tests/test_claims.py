"""Claims: one process holds a job, its children with it, and its death lets go."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from subprocess import PIPE

import pytest

from nucsam import claims
from nucsam.claims import Claim, folder_of_claims, is_claimed, lock_file, read_note
from nucsam.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from nucsam.claims import Claim
claim = Claim.take(Path(sys.argv[1]))
print(claim is not None, flush=True)
time.sleep(60)
"""


def start_holder(path) -> tuple[subprocess.Popen, bool]:
    """A process that takes the claim and keeps it, and whether it got it."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return holder, holder.stdout.readline() == "True\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "job.lock"


def test_only_one_process_holds_a_claim_and_its_death_lets_go(path):
    holder, holds = start_holder(path)
    assert holds
    assert is_claimed(path) and Claim.take(path) is None
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not is_claimed(path)
    with Claim.take(path, wait=True):
        other, holds = start_holder(path)
        assert not holds
        other.kill()
        other.wait()


def test_a_child_holds_the_claim_of_its_parent(path):
    claim = Claim.take(path)
    child = subprocess.Popen(["sleep", "60"], pass_fds=(claim.descriptor,))
    os.close(claim.descriptor)  # as the death of the parent would
    assert is_claimed(path)
    child.kill()
    child.wait()
    assert not is_claimed(path)


def test_release_lets_go_although_a_child_lives(path):
    claim = Claim.take(path)
    child = subprocess.Popen(["sleep", "60"], pass_fds=(claim.descriptor,))
    claim.release()
    assert not is_claimed(path)
    child.kill()
    child.wait()


def test_the_last_note_is_read_while_the_claim_is_held_and_after(path):
    assert read_note(path) == {}
    with Claim.take(path, wait=True) as claim:
        assert read_note(path) == {}
        claim.note({"began": 1.5, "where": "a machine with a long name"})
        claim.note({"began": 2})
        assert read_note(path) == {"began": 2}
    assert read_note(path) == {"began": 2}


class Msvcrt:
    """Windows' module of locks, made of `fcntl`: each lock excludes all others."""

    LK_NBLCK, LK_UNLCK = "lock", "unlock"

    def locking(self, descriptor: int, mode: str, count: int) -> None:
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == claims.FAR and count == 1
        kind = fcntl.LOCK_UN if mode == "unlock" else fcntl.LOCK_EX | fcntl.LOCK_NB
        try:
            fcntl.flock(descriptor, kind)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None


def test_the_branch_for_windows_holds_releases_and_waits(path, monkeypatch):
    monkeypatch.setattr(claims, "fcntl", None)
    monkeypatch.setattr(claims, "msvcrt", Msvcrt(), raising=False)
    assert not is_claimed(path)
    with Claim.take(path) as claim:
        claim.note({"holder": "a"})
        assert is_claimed(path) and Claim.take(path) is None
        assert read_note(path) == {"holder": "a"}
        monkeypatch.setattr(claims.time, "sleep", lambda _: claim.release())
        second = Claim.take(path, wait=True)
        assert is_claimed(path)
        monkeypatch.setattr(claim, "release", lambda: None)
    second.release()
    assert not is_claimed(path)
    folder = path.parent / "claims"
    with folder_of_claims(folder):
        Claim.take(folder / "job").release()
    assert (folder / "job").is_file()


VISITOR = """
import sys
from pathlib import Path
from nucsam.claims import Claim, folder_of_claims
folder = Path(sys.argv[1])
with folder_of_claims(folder):
    with Claim.take(folder / "job", wait=True) as claim:
        claim.note({"ended": 1})
    print("in", flush=True)
    sys.stdin.read()
"""


def start_visitor(folder) -> subprocess.Popen:
    """A process that is in the folder, and leaves it when its input ends."""
    command = [sys.executable, "-c", VISITOR, str(folder)]
    visitor = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True)
    assert visitor.stdout.readline() == "in\n"
    return visitor


def test_the_last_process_to_leave_removes_a_folder_of_claims(tmp_path):
    folder = tmp_path / "out" / "claims"
    killed, stays = start_visitor(folder), start_visitor(folder)
    killed.kill()
    killed.wait()
    with folder_of_claims(folder):
        assert read_note(folder / "job") == {"ended": 1}
    assert read_note(folder / "job") == {"ended": 1}  # for the one that stays
    stays.communicate()
    assert stays.returncode == 0
    assert list((tmp_path / "out").iterdir()) == []


VISITS = """
import os, sys
from pathlib import Path
from nucsam.claims import Claim, folder_of_claims
folder = Path(sys.argv[1])
job = folder / str(os.getpid())
for _ in range(300):
    with folder_of_claims(folder):
        with Claim.take(job):
            assert job.is_file()
"""


def test_processes_that_enter_and_leave_a_folder_of_claims_do_not_meet_its_removal(tmp_path):
    folder = tmp_path / "claims"
    command = [sys.executable, "-c", VISITS, str(folder)]
    visitors = [subprocess.Popen(command) for _ in range(3)]
    assert [visitor.wait() for visitor in visitors] == [0, 0, 0]
    assert not folder.exists()


def test_a_lock_file_lets_one_in_at_a_time_and_goes(tmp_path):
    total, path = tmp_path / "total", tmp_path / ".lock"
    total.write_text("0")

    def add_one(_):
        with lock_file(path):
            value = int(total.read_text())
            time.sleep(0.002)
            total.write_text(str(value + 1))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add_one, range(40)))
    assert total.read_text() == "40" and not path.exists()


def test_without_locks_a_lock_file_holds_nobody_up(tmp_path, monkeypatch):
    def lockless(*_, **__):
        raise UserError("no locks")

    monkeypatch.setattr(Claim, "take", lockless)
    with lock_file(tmp_path / ".lock"), lock_file(tmp_path / ".lock"):
        assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_claims_is_an_error(tmp_path):
    (tmp_path / "claims").touch()
    with pytest.raises(FileExistsError), folder_of_claims(tmp_path / "claims"):
        pass
