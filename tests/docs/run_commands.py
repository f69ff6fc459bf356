"""Runs what the documentation tells a reader to type: `make test-docs`, PAGES="gguf quickstart" for some.

Every `lowbit` command of the pages and of each verb's `--help` runs as a process of its own and must end with status 0;
a server must answer and then leave when told. The names that the pages use (`./Qwen3-8B`, `chats.jsonl`, `config.yaml`)
stand in a temporary directory for the embedded model and for real text, so that no network and no large model is
needed. What cannot run like that is in `ELSEWHERE`, with what runs it instead.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from test_commands import COMMANDS, ROOT

LOWBIT = str(Path(sys.executable).with_name("lowbit"))
KEY = "a-key-of-the-documentation"
ENVIRONMENT = {**os.environ, "LOWBIT_KEY": KEY, "OPENAI_API_KEY": KEY, "COLUMNS": "120"}
LIMIT = 600.0
"""Seconds one command may take."""

ELSEWHERE = {
    r"s3://|ssh://": "needs servers: make test-backup",
    r"--ray": "needs Ray: make test-ray",
    r"Qwen/Qwen3-8B|--calibration general": "needs the hub: tests of the hub against a stand-in",
}
STANDS_FOR = [
    (r"--budget 20m", "--budget 6m"),  # shorter, otherwise as written
    (r"/mnt/backup", "./mnt-backup"),
    (r"/tmp/report", "./tmp-report"),
    (r"\bMODEL\b", "./Qwen3-8B"),
    (r"\bOUT\b", "./out"),
    (r"--snapshot \S+", ""),  # an identity that only that backup has
]
SMALL = "the budget holds the model as it is"
"""What `fit` rightly says where the model that stands for the reader's is a thousand times smaller."""
SAMPLES = ["--samples", "16", "--seq-len", "512"]
"""Calibration of the verbs that calibrate, where the page does not say how much: shorter than their default."""
DURATION = ["--duration", "10s"]
"""Of each run of `bench` under load, where the page does not say."""
CALIBRATING = ("quantize", "imatrix", "compare", "fit")
WRITERS = {"quantize": 1, "convert": 1, "fit": 1, "imatrix": 1, "restore": 1}
"""Verbs, and which of their names without a flag is the output."""


def lowbit(*arguments: str, folder: Path) -> None:
    """One command of the preparation."""
    done = subprocess.run([LOWBIT, *arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"preparing: lowbit {' '.join(arguments)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def prepare(folder: Path) -> None:
    """The reader's directory: a model, what was made of it earlier, texts, configurations."""
    model = folder / "Qwen3-8B"
    shutil.copytree(ROOT / "src" / "lowbit" / "demo" / "model", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40960}))
    text = "\n\n".join(path.read_text("utf-8") for path in sorted((ROOT / "src" / "lowbit").rglob("*.py"))[:60])
    for name in ("wiki.txt", "测试.txt"):
        (folder / name).write_text(text[:40_000], "utf-8")
    rows = [text[start : start + 2000] for start in range(0, 60_000, 2000)]
    chats = [{"messages": [{"role": "user", "content": row}]} if i % 2 else {"text": row} for i, row in enumerate(rows)]
    for name in ("chats.jsonl", "my-chats.jsonl", "对话.jsonl"):
        (folder / name).write_text("".join(json.dumps(each) + "\n" for each in chats), "utf-8")
    lowbit("quantize", "demo", "demo-int4", "--method", "rtn", *SAMPLES, folder=folder)
    lowbit("quantize", "./Qwen3-8B", "./Qwen3-8B-W4A16", "--method", "rtn", *SAMPLES, folder=folder)
    lowbit("quantize", "./Qwen3-8B", "./model-gptq", "--format", "gptq", "--group-size", "32", *SAMPLES, folder=folder)
    lowbit(
        "quantize", "./Qwen3-8B", "./model-awq", "--format", "awq", "--asym", "--method", "rtn", *SAMPLES, folder=folder
    )
    lowbit("imatrix", "./Qwen3-8B", "model.imatrix.gguf", "--calibration", "wiki.txt", *SAMPLES, folder=folder)
    lowbit("quantize", "./Qwen3-8B", "Qwen3-8B-Q4_K_M.gguf", "--scheme", "Q4_K_M", *SAMPLES, folder=folder)
    for name in ("qwen3.Q4_K_M.gguf", "qwen3-8b.Q4_K_M.gguf", "model-Q4_K_M.gguf", "model.gguf"):
        shutil.copy(folder / "Qwen3-8B-Q4_K_M.gguf", folder / name)
    os.symlink("Qwen3-8B", folder / "model")
    tier = {"name": "int4", "path": "./Qwen3-8B-Q4_K_M.gguf", "context": 2048, "concurrency": 2}
    models = {name: {"tiers": [tier]} for name in ("assistant", "qwen3")}
    for name in ("config.yaml", "serve.yaml"):
        (folder / name).write_text(json.dumps({"models": models}))
    short = ["--prompt-tokens", "16", "--output-tokens", "8", "--repeats", "2"]
    lowbit("bench", "demo", *short, "--json", "before.json", folder=folder)
    lowbit("bench", "demo", *short, "--json", "after.json", folder=folder)
    lowbit("bench", "./model.gguf", *short, "--concurrency", "1,2", "--json", "fleet.json", folder=folder)


def answers(port: int, path: str) -> bool:
    """Whether a server answers at ``path``."""
    with suppress(urllib.error.URLError, OSError):
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=5) as response:
            return bool(response.status == 200)
    return False


def started(command: list[str], folder: Path, port: int, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server's process, and what was wrong with it before it was ready."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=output, stderr=output)
    for _ in range(int(10 * LIMIT)):
        if process.poll() is not None:
            return process, f"ended with status {process.returncode}: {log.read_text('utf-8', 'replace')[-800:]}"
        if answers(port, "/ready"):
            return process, ""
        time.sleep(0.1)
    return process, "not ready in time"


def stopped(process: subprocess.Popen[bytes]) -> int:
    """Its exit status, having been told to end."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


@contextmanager
def gateway(folder: Path, wanted: bool) -> Iterator[None]:
    """The server that commands with a url speak to."""
    if not wanted:
        yield
        return
    process, wrong = started([LOWBIT, "serve", "config.yaml"], folder, 8000, folder / "gateway.log")
    try:
        if wrong:
            raise SystemExit(f"lowbit serve config.yaml: {wrong}")
        yield
    finally:
        stopped(process)


def written(arguments: list[str]) -> str | None:
    """What a command is to write, for it must not be there yet."""
    if "-o" in arguments:
        return arguments[arguments.index("-o") + 1]
    if arguments[0] not in WRITERS:
        return None
    names = []
    skip = False
    for each in arguments[1:]:
        if not skip and not each.startswith("-"):
            names.append(each)
        skip = each.startswith("--") and each not in ("--asym", "--smoke", "--pure", "--overwrite")
    return names[WRITERS[arguments[0]]] if len(names) > WRITERS[arguments[0]] else None


def attempt(command: str, folder: Path) -> str:
    """Run one command as a reader would; what was wrong with it, or nothing."""
    for pattern, stands in STANDS_FOR:
        command = re.sub(pattern, stands, command)
    arguments = shlex.split(command)[1:]
    output = written(arguments)
    if arguments[0] in CALIBRATING and "--samples" not in arguments:
        arguments += SAMPLES
    if arguments[0] == "bench" and {"--rate", "--concurrency"} & {*arguments} and "--duration" not in arguments:
        arguments += DURATION
    if output:
        for path in (folder / output, (folder / output).with_suffix(".lowbit.json")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    url = re.search(r"http://(127\.0\.0\.1|localhost):8000", command)
    if arguments[0] == "serve" and "--print-command" not in arguments:
        port = int(arguments[arguments.index("--port") + 1]) if "--port" in arguments else 8000
        process, wrong = started([LOWBIT, *arguments], folder, port, folder / "serve.log")
        if not wrong and not answers(port, "/v1/models"):
            wrong = "it does not tell its models"
        status = stopped(process)
        return wrong or (f"ended with status {status}" if status else "")
    with gateway(folder, bool(url)):
        try:
            done = subprocess.run(
                [LOWBIT, *arguments],
                cwd=folder,
                env=ENVIRONMENT,
                input="import os\n",
                capture_output=True,
                text=True,
                timeout=LIMIT,
            )
        except subprocess.TimeoutExpired:
            return f"still running after {LIMIT:.0f} s"
    if arguments[0] == "doctor" and done.returncode == 1:
        return ""  # it found something to mend, which is its work
    said = (done.stdout[-1200:] + done.stderr[-1200:]).strip()
    return f"status {done.returncode}: {said}" if done.returncode and SMALL not in said else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="parts of the names of pages (default: all)")
    parser.add_argument("--folder", type=Path, help="where to run; kept, and not prepared again if it is there")
    options = parser.parse_args()
    pages = options.pages
    wanted = [(page, command) for page, command in COMMANDS if not pages or any(each in page for each in pages)]
    failed = 0
    ran: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "fleet.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            prepare(folder)
        for page, command in wanted:
            reason = next((why for pattern, why in ELSEWHERE.items() if re.search(pattern, command)), None)
            if reason:
                print(f"elsewhere  {page}: {command}   ({reason})", flush=True)
                continue
            if command in ran:
                print(f"as above   {page}: {command}   (of {ran[command]})", flush=True)
                continue
            ran[command] = page
            begin = time.perf_counter()
            wrong = attempt(command, folder)
            failed += bool(wrong)
            print(
                f"{'FAILED' if wrong else 'ok':9}  {page}: {command}   {time.perf_counter() - begin:.1f} s", flush=True
            )
            if wrong:
                print("           " + wrong.replace("\n", "\n           "), flush=True)
    print(f"{len(wanted)} commands, {len(ran)} run, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
