"""Backups at an S3 server (moto's) and at an SSH server (OpenSSH's sshd), both on this machine.

    make test-backup

Each verb runs as a process of its own. Not part of `make test`: it needs s3fs, moto and paramiko, which live in an
environment of their own, and sshd (Debian: openssh-server). What is absent is said, and the exit status is then 1.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from backup_world import contents, flip, make_model

PEER = Path(sys.argv[1] if len(sys.argv) > 1 else ".venvs/backup").resolve()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(command: list[str], port: int, environment: dict[str, str]) -> Iterator[None]:
    """A process that listens on ``port``; ended at the end."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            if process.poll() is not None:
                raise SystemExit(f"{command[0]} ended with status {process.returncode}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def s3(home: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Arguments for a bucket of moto's server, and the environment that reaches it."""
    port = free_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with server([str(PEER / "bin" / "moto_server"), "-H", "127.0.0.1", "-p", str(port)], port, dict(os.environ)):
        endpoint = f"http://127.0.0.1:{port}"
        make = f"import boto3; boto3.client('s3', endpoint_url='{endpoint}').create_bucket(Bucket='kept')"
        subprocess.run([str(PEER / "bin" / "python"), "-c", make], check=True, env={**os.environ, **keys})
        yield ["s3://kept/models", "--option", f"endpoint_url={endpoint}"], keys


@contextmanager
def ssh(home: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Arguments for a directory behind sshd, and the environment with the key for it."""
    port, folder = free_port(), home / ".ssh"
    folder.mkdir(mode=0o700)
    for name in ("host", "id_ed25519"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "id_ed25519.pub", folder / "authorized_keys")
    settings = {
        "ListenAddress": f"127.0.0.1:{port}",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "authorized_keys",
        "StrictModes": "no",
        "PasswordAuthentication": "no",
        "UsePAM": "no",
        "PidFile": "none",
        "Subsystem": "sftp internal-sftp",
        "PermitRootLogin": "yes",
    }
    (folder / "config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    Path("/run/sshd").mkdir(exist_ok=True)
    with server([str(shutil.which("sshd")), "-D", "-f", str(folder / "config")], port, dict(os.environ)):
        yield [f"ssh://{getpass.getuser()}@127.0.0.1:{port}{home}/kept"], {"HOME": str(home)}


def lowbit(environment: dict[str, str], *arguments: str, status: int = 0) -> str:
    """Run a verb; its output."""
    command = [sys.executable, "-m", "lowbit", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == status, (arguments, done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def check(name: str, place: list[str], extra: dict[str, str], home: Path) -> None:
    """Round trip, increment, a killed backup, damage in the middle, prune."""
    site = next((PEER / "lib").glob("python*/site-packages"))
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **extra, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    model = make_model(home / "tiny", shards=3, size=2_000_000)
    work = ["backup", str(model), *place, "--chunk", "64K", "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lowbit", *work[:-1]], env=environment, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    next((line for line in process.stderr if "[1/" in line), None)  # the first file is there
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    killed = process.wait() == -signal.SIGKILL
    print(f"{name}: {lowbit(environment, *work).strip()} (killed before: {killed})")
    assert "0 B in 0 blobs were new" in lowbit(environment, *work[:-3], "--quiet")
    flip(model / "model-1.safetensors")
    os.utime(model / "model-1.safetensors")
    assert "64 KiB in 1 blobs were new" in lowbit(environment, *work[:-3], "--quiet")
    print(f"{name}: {lowbit(environment, 'backup-verify', *place, '--quiet').splitlines()[-1]}")
    lowbit(environment, "restore", place[0], str(home / "out"), *place[1:], "--quiet")
    assert contents(home / "out") == contents(model)
    print(f"{name}: restored, byte-identical")
    lowbit(environment, "prune", *place, "--keep", "0h")
    lowbit(environment, "backup-verify", *place, "--quiet")
    damage = (
        "import sys; from lowbit.ops.backup.store import open_store\n"
        "store = open_store(sys.argv[1], dict(text.split('=', 1) for text in sys.argv[2:]))\n"
        "digest = max(store.blobs(), key=store.blobs().get)\n"
        "data = bytearray(store.read(f'blobs/{digest[:2]}/{digest}')); data[7] ^= 1\n"
        "store.write(f'blobs/{digest[:2]}/{digest}', bytes(data))\n"
    )
    options = [text for text in place[1:] if text != "--option"]
    subprocess.run([sys.executable, "-c", damage, place[0], *options], env=environment, check=True)
    assert "has changed" in lowbit(environment, "backup-verify", *place, "--quiet", status=2)
    said = lowbit(environment, "restore", place[0], str(home / "out2"), *place[1:], "--quiet", status=2)
    assert "has changed" in said
    assert not list(home.glob("out2*"))
    print(f"{name}: a flipped bit is found and not restored: {said.strip()}")
    lowbit(environment, "backup-verify", *place, "--quiet", "--set-aside", status=2)
    lowbit(environment, *work[:-3], "--quiet")
    lowbit(environment, "backup-verify", *place, "--quiet")
    print(f"{name}: mended from the source")


def main() -> int:
    """Check every server that is here; 1 if one is not."""
    here = {"s3": (PEER / "bin" / "moto_server").exists(), "ssh": shutil.which("sshd") is not None}
    for name, open_place in (("s3", s3), ("ssh", ssh)):
        if not here[name]:
            print(f"{name}: NOT CHECKED: {'sshd (openssh-server)' if name == 'ssh' else PEER} is not installed")
            continue
        with ExitStack() as stack:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            place, extra = stack.enter_context(open_place(home))
            check(name, place, extra, home)
    return 0 if all(here.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
