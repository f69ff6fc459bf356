"""lm-eval's ``local-completions`` over the gateway: a task of our own on a real model, scored as it should be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from urllib.request import Request, urlopen

TASK = """\
task: lowbit_imports
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 8, temperature: 0}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""


def complete(url: str, prompt: str) -> str:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0, "seed": 1234, "stop": ["\n\n"]}
    request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request) as response:
        return str(json.load(response)["choices"][0]["text"])


def test_a_task_runs_and_scores_what_the_model_says(tiny: str, tmp_path: Path) -> None:
    questions = ["def add(a, b):\n    return", "import ", "class Fox:", "for i in range(", "print(", "if x is None:"]
    answers = [complete(tiny, question) for question in questions]
    answers[-2:] = ["never said", "nor this"]
    data = tmp_path / "test.jsonl"
    rows = [{"question": each, "answer": answer} for each, answer in zip(questions, answers, strict=True)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK.format(data=data))
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--tasks", "lowbit_imports"),
        *("--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"),
        "--model_args",
        f"model=tiny,base_url={tiny}/v1/completions,tokenizer_backend=None,tokenized_requests=False,num_concurrent=3",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-6000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["lowbit_imports"]["exact_match,none"] == 4 / 6
